// SPDX-License-Identifier: GPL-2.0-only
/*
 * Packing: the blocks that one idle sequence has to itself, compressed in place. A
 * packed block is the same block with fewer pages, which hold
 *
 *	struct tm_packed, the length of each segment, the segments
 *
 * A segment is what core/planes.h makes of a unit of the block, compressed, or as it
 * is where that is no longer. The layout never leaves the kernel's memory.
 *
 * Locks: all of this runs under tm_kv::lock held for writing; tm_packer_mutex, inside of it,
 * guards the buffers and the codec, of which there is one set for all caches.
 */
#include <linux/crc32.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "client.h"
#include "codec.h"
#include "core/planes.h"
#include "kv.h"
#include "kv_pack.h"
#include "pages.h"
#include "trace.h"

/* Bytes that are taken apart and compressed at a time. */
#define TM_PACK_UNIT		TM_CODEC_MAX
/* Larger blocks (the states of large models) stay as they are. */
#define TM_PACK_MAX_BYTES	(16u << 20)
/* A sequence that was not used for so long is idle. */
#define TM_PACK_IDLE		HZ

#define TM_PACKED_MAGIC		0x4b565031

/* The segment is as it was. */
#define TM_SEGMENT_RAW		BIT(31)

/**
 * struct tm_packed - the beginning of a packed block
 * @magic: TM_PACKED_MAGIC
 * @crc: of the contents before they were packed
 * @bytes: of all that is packed, this struct too
 * @pad: 0
 */
struct tm_packed {
	u32 magic;
	u32 crc;
	u32 bytes;
	u32 pad;
};

static DEFINE_MUTEX(tm_packer_mutex);

/* @plain and @split: a unit each; @small: a segment; @packed: a whole block. */
static struct {
	u8 *plain;
	u8 *split;
	u8 *small;
	u8 *packed;
	u32 room;
} tm_packer;

/* Get what it takes to pack blocks of @bytes. Return: 0, -EOPNOTSUPP, -ENOMEM. */
static int tm_packer_get(u32 bytes)
{
	int err = tm_codec_init();
	u8 *packed;

	lockdep_assert_held(&tm_packer_mutex);
	if (err || tm_packer.room >= bytes)
		return err;
	if (!tm_packer.plain)
		tm_packer.plain = kmalloc(TM_PACK_UNIT, GFP_KERNEL);
	if (!tm_packer.split)
		tm_packer.split = kmalloc(TM_PACK_UNIT, GFP_KERNEL);
	if (!tm_packer.small)
		tm_packer.small = kmalloc(TM_PACK_UNIT, GFP_KERNEL);
	/* The old one stays until there is a new one: packed blocks rely on it. */
	packed = kvmalloc(bytes, GFP_KERNEL);
	if (!tm_packer.plain || !tm_packer.split || !tm_packer.small ||
	    !packed) {
		kvfree(packed);
		return -ENOMEM;
	}
	kvfree(tm_packer.packed);
	tm_packer.packed = packed;
	tm_packer.room = bytes;
	return 0;
}

/* No cache is left. */
void tm_kv_pack_unload(void)
{
	kfree(tm_packer.plain);
	kfree(tm_packer.split);
	kfree(tm_packer.small);
	kvfree(tm_packer.packed);
	tm_codec_exit();
}

/* The bytes of a block as a stream. */
struct tm_kv_stream {
	struct tm_kv *kv;
	struct tm_kv_walk walk;
};

static void tm_kv_stream_start(struct tm_kv_stream *stream, struct tm_kv *kv,
			       struct tm_kv_block block)
{
	stream->kv = kv;
	WARN_ON_ONCE(tm_kv_walk_start(&kv->cache.pool, block, &stream->walk));
}

/* @bytes is whole pages but at the end. */
static void tm_kv_stream_read(struct tm_kv_stream *stream, u8 *to, u32 bytes)
{
	struct tm_page_id page;

	while (bytes && tm_kv_walk_next(&stream->kv->cache.pool, &stream->walk,
					&page)) {
		u32 some = min_t(u32, bytes, PAGE_SIZE);

		memcpy(to, tm_kv_address(stream->kv, page), some);
		to += some;
		bytes -= some;
	}
}

static void tm_kv_stream_write(struct tm_kv_stream *stream, const u8 *from,
			       u32 bytes)
{
	struct tm_page_id page;

	while (bytes && tm_kv_walk_next(&stream->kv->cache.pool, &stream->walk,
					&page)) {
		u32 some = min_t(u32, bytes, PAGE_SIZE);

		tm_kv_mark_dirty(stream->kv, page);
		memcpy(tm_kv_address(stream->kv, page), from, some);
		from += some;
		bytes -= some;
	}
}

/* Units are numbers one after the other: planes lie end to end and have no gaps. */
static struct tm_planes_shape tm_kv_unit(const struct tm_kv *kv, u32 group,
					 u32 bytes)
{
	u32 element = kv->layout[group].element;

	if (kv->cache.pool.geo.group[group].token_bytes % element)
		element = 1;
	return (struct tm_planes_shape){
		.rows = 1, .row_bytes = bytes, .element = element,
	};
}

static u64 tm_kv_block_bytes(const struct tm_kv *kv, u32 group)
{
	return (u64)kv->cache.pool.geo.block_pages[group] << PAGE_SHIFT;
}

/* Append the segments of a unit at tm_packer.split. Return: false: no room. */
static bool tm_packer_append(const struct tm_planes_shape *unit,
			     u32 *lengths, u32 *at, u32 end)
{
	u8 *segment = tm_packer.split;

	for (u32 i = 0; i < tm_planes_segments(unit); i++) {
		u32 bytes = tm_planes_segment_bytes(unit, i);
		int small = tm_codec_compress(segment, bytes, tm_packer.small,
					      bytes);
		bool raw = small <= 0 || small >= bytes;
		u32 length = raw ? bytes : small;

		if (length > end - *at)
			return false;
		memcpy(tm_packer.packed + *at, raw ? segment : tm_packer.small,
		       length);
		lengths[i] = length | (raw ? TM_SEGMENT_RAW : 0);
		*at += length;
		segment += bytes;
	}
	return true;
}

/*
 * Pack a block into tm_packer.packed. Return: bytes, or 0 when it would not be fewer
 * pages than it has.
 */
static u32 tm_kv_encode(struct tm_kv *kv, u32 group, struct tm_kv_block block)
{
	u32 total = tm_kv_block_bytes(kv, group);
	struct tm_packed *head = (struct tm_packed *)tm_packer.packed;
	struct tm_planes_shape unit = tm_kv_unit(kv, group, TM_PACK_UNIT);
	u32 units = DIV_ROUND_UP(total, TM_PACK_UNIT);
	u32 *lengths = (u32 *)(head + 1);
	u32 at = sizeof(*head) +
		 units * tm_planes_segments(&unit) * sizeof(*lengths);
	struct tm_kv_stream stream;
	u32 crc = ~0;

	/* One page fewer, or it is for nothing. */
	if (total <= PAGE_SIZE || at >= total - PAGE_SIZE)
		return 0;
	tm_kv_stream_start(&stream, kv, block);
	for (u32 left = total; left; left -= unit.row_bytes) {
		unit.row_bytes = min_t(u32, left, TM_PACK_UNIT);
		tm_kv_stream_read(&stream, tm_packer.plain, unit.row_bytes);
		crc = crc32_le(crc, tm_packer.plain, unit.row_bytes);
		tm_planes_split(&unit, tm_packer.plain, tm_packer.split);
		if (!tm_packer_append(&unit, lengths, &at, total - PAGE_SIZE))
			return 0;
		lengths += tm_planes_segments(&unit);
	}
	*head = (struct tm_packed){
		.magic = TM_PACKED_MAGIC, .crc = crc, .bytes = at,
	};
	return at;
}

/* Take the next unit out of tm_packer.packed into tm_packer.plain. */
static int tm_packer_extract(const struct tm_planes_shape *unit,
			     const u32 *lengths, u32 *at)
{
	const struct tm_packed *head = (struct tm_packed *)tm_packer.packed;
	u8 *segment = tm_packer.split;

	for (u32 i = 0; i < tm_planes_segments(unit); i++) {
		u32 bytes = tm_planes_segment_bytes(unit, i);
		u32 length = lengths[i] & ~TM_SEGMENT_RAW;
		int err;

		if (length > bytes || length > head->bytes - *at)
			return -EIO;
		if (lengths[i] & TM_SEGMENT_RAW) {
			memcpy(segment, tm_packer.packed + *at, bytes);
		} else {
			/* The codec wants linear memory. */
			memcpy(tm_packer.small, tm_packer.packed + *at, length);
			err = tm_codec_decompress(tm_packer.small, length,
						  segment, bytes);
			if (err)
				return err;
		}
		*at += length;
		segment += bytes;
	}
	tm_planes_join(unit, tm_packer.split, tm_packer.plain);
	return 0;
}

/* Put the contents of what is in tm_packer.packed into @to. Return: 0 or -EIO. */
static int tm_kv_decode(struct tm_kv *kv, u32 group, struct tm_kv_block to)
{
	u32 total = tm_kv_block_bytes(kv, group);
	const struct tm_packed *head = (struct tm_packed *)tm_packer.packed;
	struct tm_planes_shape unit = tm_kv_unit(kv, group, TM_PACK_UNIT);
	u32 units = DIV_ROUND_UP(total, TM_PACK_UNIT);
	const u32 *lengths = (const u32 *)(head + 1);
	u32 at = sizeof(*head) +
		 units * tm_planes_segments(&unit) * sizeof(*lengths);
	struct tm_kv_stream stream;
	u32 crc = ~0;

	if (head->magic != TM_PACKED_MAGIC || head->bytes < at ||
	    head->bytes > total)
		return -EIO;
	tm_kv_stream_start(&stream, kv, to);
	for (u32 left = total; left; left -= unit.row_bytes) {
		int err;

		unit.row_bytes = min_t(u32, left, TM_PACK_UNIT);
		err = tm_packer_extract(&unit, lengths, &at);
		if (err)
			return err;
		crc = crc32_le(crc, tm_packer.plain, unit.row_bytes);
		tm_kv_stream_write(&stream, tm_packer.plain, unit.row_bytes);
		lengths += tm_planes_segments(&unit);
	}
	return crc == head->crc ? 0 : -EIO;
}

/* The packed contents of a block into tm_packer.packed. */
static u32 tm_kv_load(struct tm_kv *kv, struct tm_kv_block block)
{
	u32 bytes = tm_kv_pages(&kv->cache.pool, block) << PAGE_SHIFT;
	struct tm_kv_stream stream;

	tm_kv_stream_start(&stream, kv, block);
	tm_kv_stream_read(&stream, tm_packer.packed, bytes);
	return bytes;
}

/* @bytes at tm_packer.packed become all that @block has. */
static void tm_kv_store(struct tm_kv *kv, struct tm_kv_block block, u32 bytes)
{
	struct tm_kv_stream stream;

	if (WARN_ON_ONCE(tm_cache_pack(&kv->cache, block,
				       DIV_ROUND_UP(bytes, PAGE_SIZE))))
		return;
	tm_kv_stream_start(&stream, kv, block);
	tm_kv_stream_write(&stream, tm_packer.packed, bytes);
}

/* Memory has gone bad. Nobody is to see what came out of it: a touch fails. */
static void tm_kv_spoil(struct tm_kv *kv, struct tm_kv_block block, u32 bytes)
{
	pr_err_ratelimited("tensormem: a packed KV block does not match its checksum\n");
	tm_kv_store(kv, block, bytes);
}

/**
 * tm_kv_unpack_to - copy the contents of a packed block
 * @kv: the cache
 * @group: of both blocks
 * @from: packed
 * @to: not packed; if the contents are damaged it is packed, and as damaged
 *
 * Context: may sleep; kv->lock is held for writing.
 */
void tm_kv_unpack_to(struct tm_kv *kv, u32 group, struct tm_kv_block from,
		     struct tm_kv_block to)
{
	u32 bytes;

	mutex_lock(&tm_packer_mutex);
	bytes = tm_kv_load(kv, from);
	if (tm_kv_decode(kv, group, to))
		tm_kv_spoil(kv, to, bytes);
	mutex_unlock(&tm_packer_mutex);
}

struct tm_kv_unpack_args {
	u32 place;
	u32 group;
	u32 index;
	struct tm_kv_packed *packed;
};

static int tm_kv_call_unpack(struct tm_kv *kv, void *args, bool evict)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	struct tm_kv_unpack_args *unpack = args;
	u64 start = trace_tensormem_kv_unpack_enabled() ? ktime_get_ns() : 0;
	struct tm_cache_page page;
	u32 bytes;
	int err;

	unpack->packed->blocks = 0;
	err = tm_cache_page(&kv->cache, unpack->place, unpack->group, 0,
			    unpack->index * geo->plane_pages[unpack->group],
			    &page);
	if (err != -EAGAIN)
		return err;
	mutex_lock(&tm_packer_mutex);
	bytes = tm_kv_load(kv, page.block);
	err = tm_cache_unpack(&kv->cache, page.block, evict);
	if (err)
		goto out;
	err = tm_kv_decode(kv, unpack->group, page.block);
	if (err)
		tm_kv_spoil(kv, page.block, bytes);
	*unpack->packed = (struct tm_kv_packed){
		.blocks = 1, .before = bytes,
		.after = tm_kv_block_bytes(kv, unpack->group),
	};
	if (start)
		trace_tensormem_kv_unpack(kv->client->id, kv->id,
					  unpack->group, bytes,
					  unpack->packed->after,
					  ktime_get_ns() - start);
out:
	mutex_unlock(&tm_packer_mutex);
	return err;
}

/**
 * tm_kv_unpack - bring a block back
 * @kv: the cache
 * @place: of its sequence
 * @group: its group
 * @index: which block
 * @packed: what became of it; no blocks if it was not packed
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
		.packed = packed,
	};

	return tm_kv_do(kv, tm_kv_call_unpack, &args);
}

/* Pack one block of a sequence, if it can be and gets smaller. */
static void tm_kv_pack_block(struct tm_kv *kv, u32 place, u32 group,
			     u32 index, struct tm_kv_packed *packed)
{
	u64 start = trace_tensormem_kv_pack_enabled() ? ktime_get_ns() : 0;
	u64 before = tm_kv_block_bytes(kv, group), after = before;
	struct tm_kv_block block;
	u32 bytes;

	if (before > tm_packer.room ||
	    tm_cache_packable(&kv->cache, place, group, index, &block))
		return;
	/* Nothing is written while it is read, nor after. */
	tm_kv_zap(kv, place, group, index, index + 1);
	bytes = tm_kv_encode(kv, group, block);
	if (bytes) {
		tm_kv_store(kv, block, bytes);
		after = round_up(bytes, PAGE_SIZE);
		packed->blocks++;
		packed->before += before;
		packed->after += after;
	}
	if (start)
		trace_tensormem_kv_pack(kv->client->id, kv->id, group, before,
					after, ktime_get_ns() - start);
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
	mutex_lock(&tm_packer_mutex);
	tm_kv_pack_block(kv, place, group, *index, packed);
	mutex_unlock(&tm_packer_mutex);
	++*index;
	return 0;
}

/* Buffers for the largest block of @kv that is packed at all. */
static int tm_kv_packer_get(const struct tm_kv *kv)
{
	u32 most = 0;
	int err;

	for (u32 i = 0; i < kv->cache.pool.geo.nr_groups; i++) {
		u64 bytes = (u64)kv->cache.pool.geo.block_pages[i] <<
			    PAGE_SHIFT;

		if (bytes <= TM_PACK_MAX_BYTES)
			most = max_t(u32, most, bytes);
	}
	mutex_lock(&tm_packer_mutex);
	err = tm_packer_get(most);
	mutex_unlock(&tm_packer_mutex);
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
	int err = tm_kv_packer_get(kv);

	*packed = (struct tm_kv_packed){ 0 };
	for (u32 i = 0; !err && i < kv->cache.pool.geo.nr_groups; i++) {
		u32 index = 0;

		while (!err) {
			if (down_write_killable(&kv->lock))
				return -EINTR;
			err = tm_kv_pack_step(kv, id, i, &index, packed);
			up_write(&kv->lock);
			cond_resched();
		}
		if (err == -ERANGE)
			err = 0;
	}
	tm_kv_settle(kv);
	return err;
}

/* Block @index of @group of a sequence. Return: as tm_kv_unpack(), -ERANGE for none. */
static int tm_kv_unpack_step(struct tm_kv *kv, struct tm_seq_id id, u32 group,
			     u32 *index, struct tm_kv_packed *packed)
{
	struct tm_kv_packed one;
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
	err = tm_kv_unpack(kv, place, group, *index, &one);
	if (err)
		return err;
	packed->blocks += one.blocks;
	packed->before += one.blocks ? one.before : 0;
	packed->after += one.blocks ? one.after : 0;
	++*index;
	return 0;
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
 * whose blocks were tried since. Return: its place, or TM_NONE.
 */
static u32 tm_kv_idlest(const struct tm_kv *kv)
{
	u32 best = TM_NONE;

	for (u32 i = 0; i < kv->cache.max_seqs; i++) {
		unsigned long used = READ_ONCE(kv->used[i]);

		if (!kv->cache.seqs[i].open || kv->tried[i] == used ||
		    time_before(jiffies, used + TM_PACK_IDLE))
			continue;
		if (best == TM_NONE || time_before(used, kv->used[best]))
			best = i;
	}
	return best;
}

static void tm_kv_pack_work(struct work_struct *work)
{
	struct tm_kv *kv = container_of(work, struct tm_kv, pack_work.work);
	struct tm_kv_packed packed;
	struct tm_seq_id id;
	u32 place;
	bool more;

	down_write(&kv->lock);
	more = tm_kv_used_pages(kv) > kv->pack_target;
	place = more ? tm_kv_idlest(kv) : TM_NONE;
	if (place != TM_NONE) {
		kv->tried[place] = READ_ONCE(kv->used[place]);
		id = tm_cache_id(&kv->cache, place);
	}
	up_write(&kv->lock);

	if (place != TM_NONE) {
		int err = tm_kv_pack(kv, id, &packed);

		/* Without a codec there is nothing to wait for. */
		if (err != -EOPNOTSUPP)
			mod_delayed_work(system_unbound_wq, &kv->pack_work,
					 err ? TM_PACK_IDLE : 0);
	} else if (more) {
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
