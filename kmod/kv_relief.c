// SPDX-License-Identifier: GPL-2.0-only
/*
 * What KV caches can do without when the system is short of memory: cached blocks that no
 * sequence has, and the room that idle sequences take unpacked. Only what makes whole
 * chunks is taken: a block that would not is of more use where it is.
 */
#include <linux/list.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>

#include "client.h"
#include "kv.h"
#include "kv_compact.h"
#include "kv_memory.h"
#include "kv_pack.h"
#include "kv_relief.h"

/* What is wanted still, what level 1 got, whether to wait for a cache that is in use. */
struct tm_kv_relief {
	u64 bytes;
	u64 given;
	bool wait;
};

static bool tm_kv_relief_lock(struct tm_kv *kv, bool wait)
{
	return wait ? !down_write_killable(&kv->lock) :
		      down_write_trylock(&kv->lock);
}

/* Whether only who relieves it has the cache: all of it goes. */
static bool tm_kv_relief_last(const struct tm_kv *kv)
{
	return refcount_read(&kv->ref) == 1;
}

static u32 tm_kv_relief_chunks(const struct tm_kv_relief *relief)
{
	u64 chunks = (relief->bytes >> TM_CHUNK_SHIFT) +
		     !!(relief->bytes & (TM_CHUNK_SIZE - 1));

	return min_t(u64, chunks, U32_MAX);
}

/*
 * Empty @chunks, if there are so many free pages, and give them to level 1. Gets kv->lock
 * and lets go of it; others have the cache between two steps.
 */
static void tm_kv_relief_empty(struct tm_kv *kv, struct tm_kv_relief *relief,
			       u32 chunks)
{
	u32 taken, moved;

	do {
		LIST_HEAD(list);

		taken = tm_kv_take_empty(kv, chunks, &list);
		chunks -= taken;
		moved = chunks ? tm_kv_compact_some(kv, true) : 0;
		up_write(&kv->lock);
		tm_kv_give_back_all(kv, &list);
		relief->bytes -= min(relief->bytes,
				     (u64)taken << TM_CHUNK_SHIFT);
		relief->given += (u64)taken << TM_CHUNK_SHIFT;
		cond_resched();
	} while (chunks && (taken || moved) &&
		 tm_kv_relief_lock(kv, relief->wait));
}

/* Give up cached blocks, the oldest first, until @pages are free. */
static void tm_kv_relief_evict(struct tm_kv *kv, u64 pages)
{
	u64 events = kv->cache.event_head, evictions = 0;

	lockdep_assert_held_write(&kv->lock);
	while (kv->cache.pool.free_pages < pages &&
	       !tm_cache_evict(&kv->cache)) {
		evictions++;
		cond_resched();
	}
	if (evictions)
		tm_kv_tell_evicted(kv, evictions);
	if (kv->cache.event_head != events)
		wake_up_interruptible(&kv->events);
}

static bool tm_kv_relief_prefixes(struct tm_kv *kv, void *data)
{
	struct tm_kv_relief *relief = data;
	const struct tm_kv_pool *pool = &kv->cache.pool;
	u32 order = pool->geo.pages.chunk_order, chunks;

	/* Who does not wait has no reference of his own. */
	if (relief->wait && tm_kv_relief_last(kv))
		return true;
	if (!tm_kv_relief_lock(kv, relief->wait))
		return !fatal_signal_pending(current);
	chunks = min_t(u64, tm_kv_relief_chunks(relief),
		       (pool->free_pages + tm_cache_evictable(&kv->cache)) >>
		       order);
	tm_kv_relief_evict(kv, (u64)chunks << order);
	tm_kv_relief_empty(kv, relief, chunks);
	return relief->bytes && !fatal_signal_pending(current);
}

/**
 * tm_kv_relieve_prefixes - give cached blocks of all caches up, in chunks
 * @bytes: how much to give to level 1; rounded up to chunks
 * @wait: also from caches that are in use; not from reclaim
 *
 * What is free in a cache goes first, then its blocks without users, the oldest first.
 *
 * Context: may sleep; without @wait under any lock that reclaim may run under.
 * Return: what was given to level 1.
 */
u64 tm_kv_relieve_prefixes(u64 bytes, bool wait)
{
	struct tm_kv_relief relief = { .bytes = bytes, .wait = wait };

	if (wait)
		tm_kvs_visit(tm_kv_relief_prefixes, &relief);
	else
		tm_kvs_try(tm_kv_relief_prefixes, &relief);
	return relief.given;
}

/* The pages that may stay in use when @chunks are to come free. */
static u64 tm_kv_relief_target(struct tm_kv *kv, u32 chunks)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;
	u32 nr = READ_ONCE(pool->nr_chunks);

	return (u64)(nr - min(nr, chunks)) << pool->geo.pages.chunk_order;
}

static bool tm_kv_relief_idle(struct tm_kv *kv, void *data)
{
	struct tm_kv_relief *relief = data;
	const struct tm_kv_pool *pool = &kv->cache.pool;
	u32 chunks = tm_kv_relief_chunks(relief);
	bool later;
	int err;

	do {
		if (tm_kv_relief_last(kv))
			return true;
		err = tm_kv_pack_idlest(kv, tm_kv_relief_target(kv, chunks),
					&later);
		/* A sequence may have been closed meanwhile. */
	} while ((!err || err == -ENOENT) && !fatal_signal_pending(current));
	if (!tm_kv_relief_lock(kv, true))
		return false;
	chunks = min(chunks, pool->free_pages >> pool->geo.pages.chunk_order);
	tm_kv_relief_empty(kv, relief, chunks);
	/* Where there is no codec, there is none for the others. */
	return relief->bytes && err != -EOPNOTSUPP &&
	       !fatal_signal_pending(current);
}

/**
 * tm_kv_relieve_idle - pack the idle sequences of all caches
 * @bytes: how much to give to level 1; rounded up to chunks
 *
 * Context: may sleep; under no lock of ours but tm_pressure_mutex.
 * Return: what was given to level 1.
 */
u64 tm_kv_relieve_idle(u64 bytes)
{
	struct tm_kv_relief relief = { .bytes = bytes, .wait = true };

	tm_kvs_visit(tm_kv_relief_idle, &relief);
	return relief.given;
}
