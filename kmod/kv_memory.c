// SPDX-License-Identifier: GPL-2.0-only
/*
 * The memory of a KV cache: chunks come when the core wants some, and go when they have
 * fallen empty.
 */
#include <linux/err.h>
#include <linux/mm.h>

#include "client.h"
#include "event.h"
#include "kv.h"
#include "kv_compact.h"
#include "kv_memory.h"
#include "kv_pack.h"
#include "memory.h"
#include "quarantine.h"
#include "supply.h"
#include "trace.h"

static atomic64_t tm_kv_chunks = ATOMIC64_INIT(0);

/* Bytes that all caches hold. Context: any. */
u64 tm_kv_memory_held(void)
{
	return (u64)atomic64_read(&tm_kv_chunks) << TM_CHUNK_SHIFT;
}

static int tm_kv_add(struct tm_kv *kv, struct tm_memory *memory)
{
	u32 i = kv->free_backing;
	struct tm_kv_backing *backing;

	/* The pool has a slot for each entry, so it has one if there is one. */
	if (i == TM_NONE)
		return -ENOSPC;
	backing = &kv->backing[i];
	kv->free_backing = backing->next;
	backing->memory = memory;
	backing->page = tm_pages_page(&memory->extent[0].run);
	bitmap_zero(backing->dirty, 1 << TM_MAX_CHUNK_ORDER);
	atomic64_inc(&tm_kv_chunks);
	return tm_kv_add_chunk(&kv->cache.pool, (struct tm_chunk_id){ i });
}

static void tm_kv_give_back(struct tm_kv *kv, struct tm_memory *memory)
{
	struct tm_region region = { .memory = memory };

	tm_quarantine_free(kv->client, &region);
}

/* Take an empty chunk out. Return: its memory, or NULL when none is empty. */
static struct tm_memory *tm_kv_remove(struct tm_kv *kv)
{
	struct tm_kv_backing *backing;
	struct tm_memory *memory;
	struct tm_chunk_id id;

	if (tm_kv_remove_chunk(&kv->cache.pool, &id))
		return NULL;
	backing = &kv->backing[id.v];
	memory = backing->memory;
	backing->memory = NULL;
	backing->next = kv->free_backing;
	kv->free_backing = id.v;
	atomic64_dec(&tm_kv_chunks);
	return memory;
}

/**
 * tm_kv_take_empty - take chunks out that are empty
 * @kv: the cache, locked for writing
 * @most: so many at most
 * @list: where they go, for tm_kv_give_back_all()
 *
 * Context: never sleeps. Return: how many.
 */
u32 tm_kv_take_empty(struct tm_kv *kv, u32 most, struct list_head *list)
{
	u32 taken;

	lockdep_assert_held_write(&kv->lock);
	for (taken = 0; taken < most; taken++) {
		struct tm_memory *memory = tm_kv_remove(kv);

		if (!memory)
			break;
		list_add(&memory->held, list);
	}
	return taken;
}

/* Give back what tm_kv_take_empty() took. Context: may sleep; not under kv->lock. */
void tm_kv_give_back_all(struct tm_kv *kv, struct list_head *list)
{
	struct tm_memory *memory, *next;

	list_for_each_entry_safe(memory, next, list, held) {
		list_del(&memory->held);
		tm_kv_give_back(kv, memory);
	}
}

/* Whether @nr chunks can be had by growth and eviction together. */
static bool tm_kv_possible(const struct tm_kv *kv, u64 nr)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;

	return nr <= pool->nr_slots - pool->nr_chunks +
		     DIV_ROUND_UP_ULL(tm_cache_evictable(&kv->cache),
				      tm_chunk_pages(pool->geo.pages));
}

/* Add @nr chunks. @added: how many that were. Return: 0 or why it is not all. */
static int tm_kv_grow(struct tm_kv *kv, u64 nr, u32 *added)
{
	*added = 0;
	if (nr == TM_KV_NEVER)
		return -ENOSPC;
	for (; *added < nr; ++*added) {
		struct tm_memory_request request = {
			.nr_pages = 1u << tm_pages_geometry().chunk_order,
			.policy = TM_MEMORY_CHUNKS,
			.flags = TM_PAGES_FOR(TM_FOR_CACHE),
			.numa = tm_client_numa(kv->client),
		};
		struct tm_memory *memory;
		int err;

		if (READ_ONCE(kv->free_backing) == TM_NONE) {
			tm_kv_pack_wake(kv, true);
			return -ENOSPC;
		}
		memory = tm_supply(kv->client, &request);
		if (IS_ERR(memory)) {
			tm_kv_pack_wake(kv, true);
			return PTR_ERR(memory);
		}
		down_write(&kv->lock);
		err = tm_kv_add(kv, memory);
		up_write(&kv->lock);
		if (err) {
			tm_kv_give_back(kv, memory);
			return err;
		}
	}
	return 0;
}

/* Give back @nr empty chunks, or as many as there are. */
static void tm_kv_shed(struct tm_kv *kv, u32 nr)
{
	while (nr--) {
		struct tm_memory *memory;

		down_write(&kv->lock);
		memory = tm_kv_remove(kv);
		up_write(&kv->lock);
		if (!memory)
			return;
		tm_kv_give_back(kv, memory);
	}
}

/* Whether the pool can do without a chunk and still extend a sequence. */
static bool tm_kv_excess(const struct tm_kv_pool *pool)
{
	u32 spare = 0, pages = tm_chunk_pages(pool->geo.pages);

	for (u32 i = 0; i < pool->geo.nr_groups; i++)
		spare += pool->geo.block_pages[i];
	return pool->free_pages == pool->nr_chunks * pages ||
	       pool->free_pages >= pages + min(spare, pages);
}

/**
 * tm_kv_trim - give back chunks that have fallen empty
 * @kv: the cache
 *
 * One of them stays while the next block would want it at once.
 *
 * Context: may sleep; takes kv->lock.
 */
void tm_kv_trim(struct tm_kv *kv)
{
	struct tm_memory *memory;

	/* Without the lock: who makes it so after this will trim it himself. */
	if (!data_race(tm_kv_excess(&kv->cache.pool)))
		return;
	do {
		down_write(&kv->lock);
		memory = tm_kv_excess(&kv->cache.pool) ? tm_kv_remove(kv) :
							 NULL;
		up_write(&kv->lock);
		if (memory)
			tm_kv_give_back(kv, memory);
	} while (memory);
}

/**
 * tm_kv_settle - blocks have been freed
 * @kv: the cache
 *
 * Empty chunks go back; where much is free but no chunk is empty, they are made so, later.
 *
 * Context: may sleep; takes kv->lock.
 */
void tm_kv_settle(struct tm_kv *kv)
{
	tm_kv_trim(kv);
	tm_kv_compact_wake(kv);
}

/* Cached blocks went. Context: any. */
void tm_kv_tell_evicted(const struct tm_kv *kv, u64 blocks)
{
	trace_tensormem_kv_evict(kv->client->id, kv->id, blocks);
	tm_event_kv_evicted(kv->client->id, kv->id, blocks);
}

/*
 * @wanting: after -ENOMEM: chunks to add, or TM_KV_NEVER. Return: what @call does, or
 * -EINTR on a fatal signal.
 */
static int tm_kv_once(struct tm_kv *kv, tm_kv_call call, void *args, bool evict,
		      u64 *wanting)
{
	u64 events, evictions;
	int err;

	if (down_write_killable(&kv->lock))
		return -EINTR;
	events = kv->cache.event_head;
	evictions = kv->cache.stats.evictions;
	err = call(kv, args, evict);
	evictions = kv->cache.stats.evictions - evictions;
	if (evictions)
		tm_kv_tell_evicted(kv, evictions);
	*wanting = kv->cache.wanting;
	/* What can never be had is to cost nobody anything. */
	if (err == -ENOMEM && !tm_kv_possible(kv, *wanting))
		*wanting = TM_KV_NEVER;
	events = kv->cache.event_head - events;
	up_write(&kv->lock);
	if (events)
		wake_up_interruptible(&kv->events);
	return err;
}

/**
 * tm_kv_do - call the core, and get it the memory it wants
 * @kv: the cache
 * @call: what to do, under kv->lock held for writing; -ENOMEM: the pool lacks
 *        tm_cache::wanting chunks, and nothing has been done
 * @args: for @call
 *
 * Context: may sleep; no lock of ours is held, mmap_lock may be.
 * Return: what @call does, or why it cannot have memory: -ENOSPC at the cache's limit or
 * the capacity, -EDQUOT, -ENOMEM, -EINTR.
 */
int tm_kv_do(struct tm_kv *kv, tm_kv_call call, void *args)
{
	u32 added = 0, sum = 0;
	bool evict = false;
	int err, refusal;
	u64 wanting;

	for (;;) {
		err = tm_kv_once(kv, call, args, evict, &wanting);
		if (err != -ENOMEM)
			break;
		if (evict) {
			err = refusal;
			tm_event_kv_full(kv->client->id, kv->id, err);
			break;
		}
		refusal = tm_kv_grow(kv, wanting, &added);
		sum += added;
		if (refusal == -EINTR) {
			err = refusal;
			break;
		}
		evict = refusal;
	}
	if (err)
		tm_kv_shed(kv, sum);
	return err;
}
