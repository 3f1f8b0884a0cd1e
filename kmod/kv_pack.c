// SPDX-License-Identifier: GPL-2.0-only
/*
 * When KV is packed: the blocks that one idle sequence has to itself are compressed in
 * place (packer.c), and come back by a touch or on demand.
 */
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/workqueue.h>

#include "client.h"
#include "codec.h"
#include "event.h"
#include "kv.h"
#include "kv_memory.h"
#include "kv_ops.h"
#include "kv_pack.h"
#include "packer.h"
#include "trace.h"

/* A sequence that was not used for so long is idle. */
#define TM_PACK_IDLE		HZ

/* Larger blocks (the states of large models) stay as they are. */
#define TM_PACK_MAX_BYTES	TM_CHUNK_SIZE

static u64 tm_kv_block_bytes(const struct tm_kv *kv, u32 group)
{
	return (u64)kv->cache.pool.geo.block_pages[group] << PAGE_SHIFT;
}

struct tm_kv_unpack_args {
	u32 place;
	u32 group;
	u32 index;
	struct tm_kv_packed packed;
};

static int tm_kv_call_unpack(struct tm_kv *kv, void *args, bool evict)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	struct tm_kv_unpack_args *unpack = args;
	u64 start = trace_tensormem_kv_unpack_enabled() ? ktime_get_ns() : 0;
	struct tm_cache_page page;
	u64 before, after;
	int err;

	err = tm_cache_page(&kv->cache, unpack->place, unpack->group, 0,
			    unpack->index * geo->plane_pages[unpack->group],
			    &page);
	if (err != -EAGAIN)
		return err;
	before = (u64)tm_kv_pages(&kv->cache.pool, page.block) << PAGE_SHIFT;
	after = tm_kv_block_bytes(kv, unpack->group);
	err = tm_unpack_block(kv, unpack->group, page.block, evict);
	if (err)
		return err;
	unpack->packed.blocks = 1;
	unpack->packed.before = before;
	unpack->packed.after = after;
	if (start)
		trace_tensormem_kv_unpack(kv->client->id, kv->id,
					  unpack->group, before, after,
					  ktime_get_ns() - start);
	return 0;
}

/**
 * tm_kv_unpack - bring a block back
 * @kv: the cache
 * @place: of its sequence
 * @group: its group
 * @index: which block
 * @packed: to add it to, if it was packed; or NULL
 *
 * Context: may sleep; mmap_lock may be held.
 * Return: 0, also when it is not packed; -ENOENT; -EIO for damaged contents; or as
 * tm_kv_do().
 */
int tm_kv_unpack(struct tm_kv *kv, u32 place, u32 group, u32 index,
		 struct tm_kv_packed *packed)
{
	struct tm_kv_unpack_args args = {
		.place = place, .group = group, .index = index,
	};
	int err = tm_kv_do(kv, tm_kv_call_unpack, &args);

	if (packed) {
		packed->blocks += args.packed.blocks;
		packed->before += args.packed.before;
		packed->after += args.packed.after;
	}
	return err;
}

/* Pack one block of a sequence, if it can be and gets smaller. */
static void tm_kv_pack_block(struct tm_kv *kv, u32 place, u32 group,
			     u32 index, struct tm_kv_packed *packed)
{
	u64 start = trace_tensormem_kv_pack_enabled() ? ktime_get_ns() : 0;
	u64 before = tm_kv_block_bytes(kv, group);
	struct tm_kv_block block;
	u32 after;

	if (before > TM_PACK_MAX_BYTES ||
	    tm_cache_packable(&kv->cache, place, group, index, &block))
		return;
	/* Nothing is written while it is read, nor after. */
	tm_kv_zap(kv, place, group, index, index + 1);
	after = tm_pack_block(kv, group, block);
	if (after) {
		packed->blocks++;
		packed->before += before;
		packed->after += after;
	}
	if (start)
		trace_tensormem_kv_pack(kv->client->id, kv->id, group, before,
					after ?: before,
					ktime_get_ns() - start);
}

/* Return: 0, -ENOENT for no such sequence, -ERANGE past its end in this group. */
static int tm_kv_pack_step(struct tm_kv *kv, struct tm_seq_id id, u32 group,
			   u32 *index, struct tm_kv_packed *packed)
{
	u32 place = tm_cache_find(&kv->cache, id);
	u32 first, end;

	if (place == TM_NONE)
		return -ENOENT;
	tm_cache_span(&kv->cache, group,
		      tm_cache_seq(&kv->cache, place)->length, &first, &end);
	*index = max(*index, first);
	if (*index >= end)
		return -ERANGE;
	tm_kv_pack_block(kv, place, group, *index, packed);
	++*index;
	return 0;
}

/* Tell what a whole call did. */
static void tm_kv_tell_packing(const struct tm_kv *kv, struct tm_seq_id id,
			       enum tensormem_nl_command kind,
			       const struct tm_kv_packed *packed)
{
	if (packed->blocks)
		tm_event_kv_packing(kind, kv->client->id, kv->id, id.v,
				    packed->blocks, packed->before,
				    packed->after);
}

/* The largest block of @kv that is packed at all. */
static u32 tm_kv_pack_most(const struct tm_kv *kv)
{
	u32 most = 0;

	for (u32 i = 0; i < kv->cache.pool.geo.nr_groups; i++) {
		u64 bytes = tm_kv_block_bytes(kv, i);

		if (bytes <= TM_PACK_MAX_BYTES)
			most = max_t(u32, most, bytes);
	}
	return most;
}

static int tm_kv_pack_all(struct tm_kv *kv, struct tm_seq_id id,
			  struct tm_kv_packed *packed)
{
	int err = tm_packer_get(tm_kv_pack_most(kv));

	*packed = (struct tm_kv_packed){ 0 };
	for (u32 i = 0; !err && i < kv->cache.pool.geo.nr_groups; i++) {
		u32 index = 0;

		while (!err) {
			err = down_write_killable(&kv->lock);
			if (err)
				break;
			err = tm_kv_pack_step(kv, id, i, &index, packed);
			up_write(&kv->lock);
			cond_resched();
		}
		if (err == -ERANGE)
			err = 0;
	}
	return err;
}

/**
 * tm_kv_pack - compress the blocks that only one sequence holds
 * @kv: the cache
 * @id: the sequence
 * @packed: what became of how many
 *
 * A block at a time: others have the cache between two.
 *
 * Context: may sleep. Return: 0, -ENOENT, -EOPNOTSUPP, -ENOMEM for the codec's buffers,
 * -EINTR.
 */
int tm_kv_pack(struct tm_kv *kv, struct tm_seq_id id,
	       struct tm_kv_packed *packed)
{
	int err = tm_kv_pack_all(kv, id, packed);

	tm_kv_settle(kv);
	tm_kv_tell_packing(kv, id, TENSORMEM_NL_EVENT_KV_PACKED, packed);
	return err;
}

/* Block @index of @group of a sequence. Return: as tm_kv_unpack(), -ERANGE for none. */
static int tm_kv_unpack_step(struct tm_kv *kv, struct tm_seq_id id, u32 group,
			     u32 *index, struct tm_kv_packed *packed)
{
	u32 place, first, end;
	int err;

	down_read(&kv->lock);
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE)
		tm_cache_span(&kv->cache, group,
			      tm_cache_seq(&kv->cache, place)->length, &first,
			      &end);
	up_read(&kv->lock);
	if (place == TM_NONE)
		return -ENOENT;
	*index = max(*index, first);
	if (*index >= end)
		return -ERANGE;
	tm_kv_touch(kv, place);
	err = tm_kv_unpack(kv, place, group, *index, packed);
	++*index;
	return err;
}

/**
 * tm_kv_unpack_all - bring back all blocks of a sequence
 * @kv: the cache
 * @id: the sequence
 * @packed: what became of how many
 *
 * Context: may sleep. Return: 0, -ENOENT, -EIO, or as tm_kv_do(): those before the one
 * that failed are unpacked then.
 */
int tm_kv_unpack_all(struct tm_kv *kv, struct tm_seq_id id,
		     struct tm_kv_packed *packed)
{
	int err = 0;

	*packed = (struct tm_kv_packed){ 0 };
	for (u32 i = 0; !err && i < kv->cache.pool.geo.nr_groups; i++) {
		u32 index = 0;

		while (!err)
			err = tm_kv_unpack_step(kv, id, i, &index, packed);
		if (err == -ERANGE)
			err = 0;
	}
	tm_kv_tell_packing(kv, id, TENSORMEM_NL_EVENT_KV_UNPACKED, packed);
	return err;
}

static u64 tm_kv_used_pages(const struct tm_kv *kv)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;

	return ((u64)pool->nr_chunks << pool->geo.pages.chunk_order) -
	       pool->free_pages;
}

/*
 * The sequence to pack next: not used for a while, the longest ago first; not one
 * whose blocks were tried since. @later: there are some that may become idle.
 * Return: its place, or TM_NONE.
 */
static u32 tm_kv_idlest(const struct tm_kv *kv, bool *later)
{
	u32 best = TM_NONE;

	*later = false;
	for (u32 i = 0; i < kv->cache.max_seqs; i++) {
		unsigned long used = READ_ONCE(kv->used[i]);

		if (!kv->cache.seqs[i].open || kv->tried[i] == used)
			continue;
		*later = true;
		if (time_before(jiffies, used + TM_PACK_IDLE))
			continue;
		if (best == TM_NONE || time_before(used, kv->used[best]))
			best = i;
	}
	return best;
}

/**
 * tm_kv_pack_idlest - pack the sequence that was not used for longest
 * @kv: the cache
 * @above: only while more pages than this are used
 * @later: set when there are sequences that may become idle
 *
 * What comes free stays in the cache.
 *
 * Context: may sleep. Return: 0, -ENODATA when there is none to pack, or as tm_kv_pack().
 */
int tm_kv_pack_idlest(struct tm_kv *kv, u64 above, bool *later)
{
	u32 place = TM_NONE;
	struct tm_kv_packed packed;
	struct tm_seq_id id;
	int err;

	*later = false;
	down_write(&kv->lock);
	if (tm_kv_used_pages(kv) > above)
		place = tm_kv_idlest(kv, later);
	if (place != TM_NONE) {
		kv->tried[place] = READ_ONCE(kv->used[place]);
		id = tm_cache_id(&kv->cache, place);
	}
	up_write(&kv->lock);
	if (place == TM_NONE)
		return -ENODATA;
	err = tm_kv_pack_all(kv, id, &packed);
	tm_kv_tell_packing(kv, id, TENSORMEM_NL_EVENT_KV_PACKED, &packed);
	return err;
}

static void tm_kv_pack_work(struct work_struct *work)
{
	struct tm_kv *kv = container_of(work, struct tm_kv, pack_work.work);
	bool later;
	int err = tm_kv_pack_idlest(kv, READ_ONCE(kv->pack_target), &later);

	if (err != -ENODATA) {
		tm_kv_settle(kv);
		/* Without a codec there is nothing to wait for. */
		if (err != -EOPNOTSUPP)
			mod_delayed_work(system_unbound_wq, &kv->pack_work,
					 err ? TM_PACK_IDLE : 0);
	} else if (later) {
		mod_delayed_work(system_unbound_wq, &kv->pack_work,
				 TM_PACK_IDLE);
	}
}

/**
 * tm_kv_pack_wake - pack idle sequences if memory is short
 * @kv: the cache
 * @refused: it did not get what it wanted
 *
 * Begins when the cache is seven eighths full, or was refused memory, and goes on until
 * a quarter of what there was then is free: the gap keeps it from packing what the
 * next touch brings back.
 *
 * Context: may not hold kv->lock; does not wait.
 */
void tm_kv_pack_wake(struct tm_kv *kv, bool refused)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;
	u64 limit = (u64)pool->nr_slots << pool->geo.pages.chunk_order;
	u64 used;

	/* A hint: the work looks again. */
	used = data_race(tm_kv_used_pages(kv));
	if (refused)
		limit = min(limit, used);
	else if (used <= limit / 8 * 7)
		return;
	if (delayed_work_pending(&kv->pack_work))
		return;
	WRITE_ONCE(kv->pack_target, limit / 4 * 3);
	queue_delayed_work(system_unbound_wq, &kv->pack_work, 0);
}

void tm_kv_pack_init(struct tm_kv *kv)
{
	INIT_DELAYED_WORK(&kv->pack_work, tm_kv_pack_work);
}

/* Context: may sleep; nobody wakes it any more. */
void tm_kv_pack_exit(struct tm_kv *kv)
{
	cancel_delayed_work_sync(&kv->pack_work);
}
