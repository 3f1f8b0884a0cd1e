// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is done with the sequences of a KV cache. core/cache.h decides what each of them
 * has; here is the memory behind it.
 *
 * Every operation has the same course. Under the lock: remove the mappings that it
 * takes the ground from, let the core do it, zero and copy what the core says. Where
 * the core lacks room: let the lock go, get chunks, and again; when there are none to
 * be had, again at the cost of cached blocks (tm_kv_do()). Nothing of an operation that
 * fails is left but mappings that a touch brings back.
 *
 * Pages are mapped by number, without a reference (kv_vm.c): none of them is in
 * anybody's hands once its mappings are removed.
 */
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/overflow.h>
#include <linux/sched.h>

#include "bandwidth.h"
#include "client.h"
#include "kv.h"
#include "kv_memory.h"
#include "kv_ops.h"
#include "kv_pack.h"
#include "kv_vm.h"
#include "packer.h"
#include "trace.h"

static void tm_kv_zero(struct tm_kv *kv, struct tm_kv_block block)
{
	struct tm_geometry g = kv->cache.pool.geo.pages;
	struct tm_kv_walk walk;
	struct tm_page_id page;
	u64 cleared = 0;

	if (WARN_ON_ONCE(tm_kv_walk_start(&kv->cache.pool, block, &walk)))
		return;
	while (tm_kv_walk_next(&kv->cache.pool, &walk, &page)) {
		struct tm_kv_backing *backing =
			&kv->backing[tm_page_chunk(g, page).v];

		if (__test_and_set_bit(tm_page_index(g, page),
				       backing->dirty)) {
			clear_page(tm_kv_address(kv, page));
			cleared += PAGE_SIZE;
		}
	}
	if (cleared)
		tm_bandwidth_move(kv->client, TM_MOVER_KV, cleared);
	cond_resched();
}

/* Carry out what the core has decided. */
static void tm_kv_copy(struct tm_kv *kv, const struct tm_cache_copies *copies)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;

	for (u32 i = 0; i < copies->nr; i++) {
		const struct tm_cache_copy *copy = &copies->copy[i];
		struct tm_kv_walk from, to;
		struct tm_page_id a, b;

		trace_tensormem_kv_copy(kv->client->id, kv->id, copy->group,
					copy->index,
					(u64)pool->geo.block_pages[copy->group]
					<< PAGE_SHIFT);
		if (tm_cache_packed(&kv->cache, copy->from)) {
			tm_unpack_to(kv, copy->group, copy->from, copy->to);
			continue;
		}
		if (WARN_ON_ONCE(tm_kv_walk_start(pool, copy->from, &from) ||
				 tm_kv_walk_start(pool, copy->to, &to)))
			return;
		tm_bandwidth_move(kv->client, TM_MOVER_KV,
				  (u64)pool->geo.block_pages[copy->group]
				  << PAGE_SHIFT);
		while (tm_kv_walk_next(pool, &from, &a) &&
		       tm_kv_walk_next(pool, &to, &b)) {
			tm_kv_mark_dirty(kv, b);
			copy_page(tm_kv_address(kv, b), tm_kv_address(kv, a));
			cond_resched();
		}
	}
}

/**
 * tm_kv_zap - remove the mappings of blocks
 * @kv: the cache
 * @place: of their sequence
 * @group: their group
 * @first: the first
 * @end: the one after the last
 *
 * Context: may sleep; kv->lock is held for writing: no fault brings them back.
 */
void tm_kv_zap(struct tm_kv *kv, u32 place, u32 group, u32 first, u32 end)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	const struct tm_kv_layout *layout = &kv->layout[group];
	u64 pages = geo->plane_pages[group];
	u64 start = place * kv->place_pages + layout->offset + first * pages;

	lockdep_assert_held_write(&kv->lock);
	if (first >= end)
		return;
	for (u32 i = 0; i < geo->group[group].planes; i++)
		unmap_mapping_pages(kv->inode->i_mapping,
				    start + i * layout->stride,
				    (end - first) * pages, true);
}

/* Remove what may be mapped for writing of blocks below @index, in all groups. */
static void tm_kv_seal(struct tm_kv *kv, u32 place, struct tm_seq_id id,
		       u32 index)
{
	u32 sealed = tm_cache_seq(&kv->cache, place)->sealed;

	if (index <= sealed)
		return;
	for (u32 i = 0; i < kv->cache.pool.geo.nr_groups; i++)
		if (kv->cache.pool.geo.group[i].rule != TM_KV_STATE)
			tm_kv_zap(kv, place, i, sealed, index);
	WARN_ON_ONCE(tm_cache_seal(&kv->cache, id, index));
}

/**
 * tm_kv_open - begin an empty sequence
 * @kv: the cache
 * @tenant: whose
 * @id: its name
 *
 * Context: may sleep. Return: 0, -ENOBUFS, -EINTR.
 */
int tm_kv_open(struct tm_kv *kv, u64 tenant, struct tm_seq_id *id)
{
	int err;

	if (down_write_killable(&kv->lock))
		return -EINTR;
	err = tm_cache_open(&kv->cache, tenant, id);
	if (!err)
		tm_kv_touch(kv, tm_cache_find(&kv->cache, *id));
	up_write(&kv->lock);
	return err;
}

/* Tokens of a sequence, 0 when there is none. Context: may sleep. */
u32 tm_kv_length(struct tm_kv *kv, struct tm_seq_id id)
{
	u32 place, length = 0;

	down_read(&kv->lock);
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE)
		length = tm_cache_seq(&kv->cache, place)->length;
	up_read(&kv->lock);
	return length;
}

/**
 * tm_kv_close - end a sequence
 * @kv: the cache
 * @id: its name
 *
 * Context: may sleep. Return: 0, -ENOENT.
 */
int tm_kv_close(struct tm_kv *kv, struct tm_seq_id id)
{
	u32 place;
	int err;

	down_write(&kv->lock);
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE)
		unmap_mapping_pages(kv->inode->i_mapping,
				    place * kv->place_pages, kv->place_pages,
				    true);
	err = tm_cache_close(&kv->cache, id);
	up_write(&kv->lock);
	if (!err)
		tm_kv_settle(kv);
	return err;
}

struct tm_kv_extend_args {
	struct tm_cache_extend *items;
	u32 nr;
	u32 *failed;
};

/* Remove the mappings of what a sequence drops when it has @length tokens. */
static void tm_kv_zap_leaving(struct tm_kv *kv, u32 place, u32 length)
{
	for (u32 i = 0; i < kv->cache.pool.geo.nr_groups; i++) {
		u32 first, end;

		tm_cache_leaving(&kv->cache, place, i, length, &first, &end);
		tm_kv_zap(kv, place, i, first, end);
	}
}

/* The same when it grows. Where that is refused, nothing is to be done. */
static void tm_kv_zap_growing(struct tm_kv *kv, u32 place, u32 tokens)
{
	u32 length = tm_cache_seq(&kv->cache, place)->length;

	if (!check_add_overflow(length, tokens, &length) &&
	    length <= kv->cache.max_tokens)
		tm_kv_zap_leaving(kv, place, length);
}

/* What the core wants unmapped before it extends a sequence. */
static void tm_kv_before_extend(struct tm_kv *kv,
				const struct tm_cache_extend *item)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	u32 place = tm_cache_find(&kv->cache, item->id);
	u32 length, last;

	if (place == TM_NONE)
		return;
	tm_kv_touch(kv, place);
	tm_kv_zap_growing(kv, place, item->tokens);
	length = tm_cache_seq(&kv->cache, place)->length;
	last = length / geo->block_tokens;
	for (u32 i = 0; length % geo->block_tokens && i < geo->nr_groups; i++) {
		struct tm_cache_page page;

		if (geo->group[i].rule != TM_KV_STATE &&
		    tm_cache_page(&kv->cache, place, i, 0,
				  last * geo->plane_pages[i],
				  &page) != -ENOENT &&
		    tm_cache_shared(&kv->cache, page.block))
			tm_kv_zap(kv, place, i, last, last + 1);
	}
}

/* New blocks are zero, and what is full now is written: seal it some time. */
static void tm_kv_after_extend(struct tm_kv *kv,
			       const struct tm_cache_extend *item)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	u32 place = tm_cache_find(&kv->cache, item->id);
	const struct tm_cache_seq *seq = tm_cache_seq(&kv->cache, place);
	u32 full = item->length / geo->block_tokens;

	for (u32 i = 0; i < geo->nr_groups; i++) {
		u32 old, first, end;
		struct tm_cache_page page;

		tm_cache_span(&kv->cache, i, item->length, &first, &old);
		tm_cache_span(&kv->cache, i, seq->length, &first, &end);
		for (u32 b = max(old, first); b < end; b++)
			if (!WARN_ON_ONCE(tm_cache_page(&kv->cache, place, i, 0,
							b * geo->plane_pages[i],
							&page)))
				tm_kv_zero(kv, page.block);
	}
	tm_kv_copy(kv, &item->copies);
	if (full - min(seq->sealed, full) >= TM_KV_SEAL_BLOCKS)
		tm_kv_seal(kv, place, item->id, full);
}

/* Whether the sequence does not have the length that the caller was told. */
static bool tm_kv_stale(const struct tm_kv *kv, struct tm_seq_id id, u32 length)
{
	u32 place = tm_cache_find(&kv->cache, id);

	return place != TM_NONE &&
	       tm_cache_seq(&kv->cache, place)->length != length;
}

static int tm_kv_call_extend(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_extend_args *extend = args;
	int err;

	for (u32 i = 0; i < extend->nr; i++)
		if (tm_kv_stale(kv, extend->items[i].id,
				extend->items[i].length))
			return -ESTALE;
	for (u32 i = 0; i < extend->nr; i++)
		tm_kv_before_extend(kv, &extend->items[i]);
	err = tm_cache_extend(&kv->cache, extend->items, extend->nr, evict,
			      extend->failed);
	for (u32 i = 0; !err && i < extend->nr; i++)
		tm_kv_after_extend(kv, &extend->items[i]);
	return err;
}

/**
 * tm_kv_extend - make room for more tokens, in all of several sequences or none
 * @kv: the cache
 * @items: the sequences, how many tokens each, and what lengths they are known to have
 * @nr: how many
 * @failed: on failure the item concerned
 *
 * Context: may sleep. Return: 0, -ESTALE for another length, -ENOENT, -EINVAL, -ERANGE as
 * tm_cache_extend(), or as tm_kv_do().
 */
int tm_kv_extend(struct tm_kv *kv, struct tm_cache_extend *items, u32 nr,
		 u32 *failed)
{
	struct tm_kv_extend_args args = {
		.items = items, .nr = nr, .failed = failed,
	};
	u64 start = trace_tensormem_kv_extend_enabled() ? ktime_get_ns() : 0;
	int err = tm_kv_do(kv, tm_kv_call_extend, &args);

	if (err)
		return err;
	for (u32 i = 0; i < nr; i++)
		tm_kv_vm_map_ahead(kv, &items[i]);
	for (u32 i = 0; start && i < nr; i++)
		trace_tensormem_kv_extend(kv->client->id, kv->id,
					  items[i].id.v, items[i].tokens,
					  items[i].length + items[i].tokens,
					  ktime_get_ns() - start);
	tm_kv_settle(kv);
	tm_kv_pack_wake(kv, false);
	return 0;
}

/**
 * tm_kv_truncate - drop tokens from the end
 * @kv: the cache
 * @id: the sequence
 * @length: tokens to keep
 *
 * Context: may sleep. Return: as tm_cache_truncate(), -EINTR.
 */
int tm_kv_truncate(struct tm_kv *kv, struct tm_seq_id id, u32 length)
{
	u32 place;
	int err;

	if (down_write_killable(&kv->lock))
		return -EINTR;
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE) {
		tm_kv_touch(kv, place);
		if (length <= tm_cache_seq(&kv->cache, place)->length)
			tm_kv_zap_leaving(kv, place, length);
	}
	err = tm_cache_truncate(&kv->cache, id, length);
	up_write(&kv->lock);
	if (!err)
		tm_kv_settle(kv);
	return err;
}

struct tm_kv_fork_args {
	struct tm_seq_id id;
	u32 at;
	struct tm_seq_id *child;
};

static int tm_kv_call_fork(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_fork_args *fork = args;
	u32 place = tm_cache_find(&kv->cache, fork->id);
	struct tm_cache_copies copies;
	int err;

	if (place != TM_NONE) {
		tm_kv_touch(kv, place);
		if (fork->at <= tm_cache_seq(&kv->cache, place)->length)
			tm_kv_seal(kv, place, fork->id,
				   fork->at / kv->cache.pool.geo.block_tokens);
	}
	err = tm_cache_fork(&kv->cache, fork->id, fork->at, evict, fork->child,
			    &copies);
	if (err)
		return err;
	tm_kv_touch(kv, tm_cache_find(&kv->cache, *fork->child));
	tm_kv_copy(kv, &copies);
	trace_tensormem_kv_fork(kv->client->id, kv->id, fork->id.v,
				fork->child->v, fork->at);
	return 0;
}

/**
 * tm_kv_fork - begin a sequence with the first tokens of another
 * @kv: the cache
 * @id: the other
 * @at: how many tokens
 * @child: the new one
 *
 * Context: may sleep. Return: as tm_cache_fork() but -EBUSY, or as tm_kv_do().
 */
int tm_kv_fork(struct tm_kv *kv, struct tm_seq_id id, u32 at,
	       struct tm_seq_id *child)
{
	struct tm_kv_fork_args args = { .id = id, .at = at, .child = child };

	return tm_kv_do(kv, tm_kv_call_fork, &args);
}

struct tm_kv_hash_args {
	struct tm_seq_id id;
	u32 first;
	const struct tm_hash *hashes;
	u32 nr;
	u32 *matched;
};

static int tm_kv_call_publish(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_hash_args *publish = args;
	u32 place = tm_cache_find(&kv->cache, publish->id);
	struct tm_cache_copies copies;
	int err;

	if (place != TM_NONE) {
		u32 full = tm_cache_seq(&kv->cache, place)->length /
			   kv->cache.pool.geo.block_tokens;
		u32 end;

		tm_kv_touch(kv, place);
		if (!check_add_overflow(publish->first, publish->nr, &end) &&
		    end <= full)
			tm_kv_seal(kv, place, publish->id, end);
	}
	err = tm_cache_publish(&kv->cache, publish->id, publish->first,
			       publish->hashes, publish->nr, evict, &copies);
	if (!err)
		tm_kv_copy(kv, &copies);
	return err;
}

/**
 * tm_kv_publish - let others find blocks of a sequence
 * @kv: the cache
 * @id: the sequence
 * @first: the first block
 * @hashes: names of it and of those that follow
 * @nr: how many
 *
 * Context: may sleep. Return: as tm_cache_publish() but -EBUSY, or as tm_kv_do().
 */
int tm_kv_publish(struct tm_kv *kv, struct tm_seq_id id, u32 first,
		  const struct tm_hash *hashes, u32 nr)
{
	struct tm_kv_hash_args args = {
		.id = id, .first = first, .hashes = hashes, .nr = nr,
	};

	return tm_kv_do(kv, tm_kv_call_publish, &args);
}

static int tm_kv_call_lookup(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_hash_args *lookup = args;
	u32 place = tm_cache_find(&kv->cache, lookup->id);
	struct tm_cache_copies copies;
	int err;

	err = tm_cache_lookup(&kv->cache, lookup->id, lookup->hashes,
			      lookup->nr, evict, lookup->matched, &copies);
	if (err)
		return err;
	tm_kv_touch(kv, place);
	tm_kv_copy(kv, &copies);
	trace_tensormem_kv_lookup(kv->client->id, kv->id, lookup->id.v,
				  lookup->nr, *lookup->matched);
	return 0;
}

/**
 * tm_kv_peek - how long a prefix a sequence could begin with
 * @kv: the cache
 * @id: the sequence, for its tenant
 * @hashes: names of its blocks
 * @nr: how many
 * @matched: blocks there are
 *
 * Context: may sleep. Return: 0, -ENOENT, -EINTR.
 */
int tm_kv_peek(struct tm_kv *kv, struct tm_seq_id id,
	       const struct tm_hash *hashes, u32 nr, u32 *matched)
{
	u32 place;

	if (down_read_killable(&kv->lock))
		return -EINTR;
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE)
		*matched = tm_cache_match(&kv->cache,
					  tm_cache_seq(&kv->cache,
						       place)->tenant,
					  hashes, nr);
	up_read(&kv->lock);
	return place == TM_NONE ? -ENOENT : 0;
}

/**
 * tm_kv_lookup - begin an empty sequence with the longest prefix there is
 * @kv: the cache
 * @id: the sequence
 * @hashes: names of its blocks
 * @nr: how many
 * @matched: blocks of it
 *
 * Context: may sleep. Return: as tm_cache_lookup(), or as tm_kv_do().
 */
int tm_kv_lookup(struct tm_kv *kv, struct tm_seq_id id,
		 const struct tm_hash *hashes, u32 nr, u32 *matched)
{
	struct tm_kv_hash_args args = {
		.id = id, .hashes = hashes, .nr = nr, .matched = matched,
	};

	return tm_kv_do(kv, tm_kv_call_lookup, &args);
}

struct tm_kv_adopt_args {
	struct tm_seq_id id;
	u32 index;
	const struct tm_hash *hash;
	u32 tokens;
	u32 length;
};

static int tm_kv_call_adopt(struct tm_kv *kv, void *args, bool evict)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	struct tm_kv_adopt_args *adopt = args;
	u32 place = tm_cache_find(&kv->cache, adopt->id);
	struct tm_cache_copies copies;
	int err;

	if (tm_kv_stale(kv, adopt->id, adopt->length))
		return -ESTALE;
	if (place != TM_NONE) {
		u32 full = adopt->length / geo->block_tokens;

		tm_kv_touch(kv, place);
		if (adopt->index == full)
			tm_kv_zap_growing(kv, place, adopt->tokens);
		for (u32 i = 0; i < geo->nr_groups; i++)
			if (geo->group[i].rule == TM_KV_STATE)
				tm_kv_zap(kv, place, i, 0, 1);
			else if (adopt->index < full)
				tm_kv_zap(kv, place, i, adopt->index,
					  adopt->index + 1);
	}
	err = tm_cache_adopt(&kv->cache, adopt->id, adopt->index, adopt->hash,
			     adopt->tokens, evict, &copies);
	if (err)
		return err;
	tm_kv_copy(kv, &copies);
	return 0;
}

/**
 * tm_kv_adopt - put a published block into a sequence
 * @kv: the cache
 * @id: the sequence
 * @index: where
 * @hash: the block
 * @tokens: how many of its tokens; 0 means all
 * @length: tokens that the sequence is known to have
 *
 * Context: may sleep. Return: -ESTALE for another length; as tm_cache_adopt(), or as
 * tm_kv_do().
 */
int tm_kv_adopt(struct tm_kv *kv, struct tm_seq_id id, u32 index,
		const struct tm_hash *hash, u32 tokens, u32 length)
{
	struct tm_kv_adopt_args args = {
		.id = id, .index = index, .hash = hash, .length = length,
		.tokens = tokens ?: kv->cache.pool.geo.block_tokens,
	};
	int err = tm_kv_do(kv, tm_kv_call_adopt, &args);

	if (!err)
		tm_kv_settle(kv);
	return err;
}

static int tm_kv_call_reset(struct tm_kv *kv, void *args, bool evict)
{
	return tm_cache_reset(&kv->cache);
}

/**
 * tm_kv_reset - forget all published blocks
 * @kv: the cache
 *
 * Context: may sleep. Return: 0, -EBUSY while a sequence holds a block, -EINTR.
 */
int tm_kv_reset(struct tm_kv *kv)
{
	int err = tm_kv_do(kv, tm_kv_call_reset, NULL);

	if (!err)
		tm_kv_settle(kv);
	return err;
}

struct tm_kv_write_args {
	u32 place;
	u32 group;
	u32 index;
};

static int tm_kv_call_write(struct tm_kv *kv, void *args, bool evict)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	struct tm_kv_write_args *write = args;
	struct tm_cache_copies copies;
	struct tm_cache_page page;
	int err;

	err = tm_cache_page(&kv->cache, write->place, write->group, 0,
			    write->index * geo->plane_pages[write->group],
			    &page);
	if (err)
		return err == -EAGAIN ? 0 : err;
	/*
	 * The entries that may not be written go and faults bring some that may. To
	 * have the kernel make this one writable, after we have let the lock go, would
	 * race with somebody who shares the block meanwhile and maps it again.
	 */
	tm_kv_zap(kv, write->place, write->group, write->index,
		  write->index + 1);
	if (page.writable)
		return 0;
	err = tm_cache_write(&kv->cache, write->place, write->group,
			     write->index, evict, &copies);
	if (!err)
		tm_kv_copy(kv, &copies);
	return err;
}

/**
 * tm_kv_write - let a sequence write to a block, which may take a copy of it
 * @kv: the cache
 * @place: of the sequence
 * @group: the block's
 * @index: which block
 *
 * Afterwards nothing of it is mapped, and faults map it for writing. A packed block
 * stays as it is.
 *
 * Context: may sleep; mmap_lock is held. Return: 0, -ENOENT, or as tm_kv_do().
 */
int tm_kv_write(struct tm_kv *kv, u32 place, u32 group, u32 index)
{
	struct tm_kv_write_args args = {
		.place = place, .group = group, .index = index,
	};

	return tm_kv_do(kv, tm_kv_call_write, &args);
}
