// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a packed block is, and the way there and back. A packed block is the same block
 * with fewer pages, which hold
 *
 *	struct tm_packed, the length of each segment, the segments
 *
 * A segment is what core/planes.h makes of a unit of the block, compressed, or as it
 * is where that is no longer. The layout never leaves the kernel's memory.
 *
 * All of this runs under tm_kv::lock held for writing. Inside of it, tm_packer::mutex
 * guards a set of buffers and a stream of the codec: one set for all caches to pack
 * with, one to unpack, so that a fault waits for other blocks to come back and not for
 * those that go.
 */
#include <linux/crc32.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/slab.h>

#include "bandwidth.h"
#include "codec.h"
#include "core/planes.h"
#include "kv.h"
#include "packer.h"

/* Bytes that are taken apart and compressed at a time. */
#define TM_PACK_UNIT		TM_CODEC_MAX

/* What is asked of the system for packing is asked when it is short of memory. */
#define TM_PACK_GFP	(GFP_KERNEL | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

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

/**
 * struct tm_packer - buffers to pack or to unpack with
 * @mutex: guards them
 * @stream: of the codec
 * @plain: a unit as it is
 * @split: a unit in segments
 * @small: a compressed segment
 * @packed: a packed block
 * @room: bytes at @packed
 */
struct tm_packer {
	struct mutex mutex;
	struct tm_codec_stream stream;
	u8 *plain;
	u8 *split;
	u8 *small;
	u8 *packed;
	u32 room;
};

static struct tm_packer tm_packing = {
	.mutex = __MUTEX_INITIALIZER(tm_packing.mutex),
};

static struct tm_packer tm_unpacking = {
	.mutex = __MUTEX_INITIALIZER(tm_unpacking.mutex),
};

static int tm_packer_fill(struct tm_packer *packer, u32 bytes)
{
	u8 *packed;

	if (packer->room >= bytes)
		return 0;
	if (!packer->plain)
		packer->plain = kmalloc(TM_PACK_UNIT, TM_PACK_GFP);
	if (!packer->split)
		packer->split = kmalloc(TM_PACK_UNIT, TM_PACK_GFP);
	if (!packer->small)
		packer->small = kmalloc(TM_PACK_UNIT, TM_PACK_GFP);
	/* The old one stays until there is a new one: packed blocks rely on it. */
	packed = kvmalloc(bytes, TM_PACK_GFP);
	if (!packer->plain || !packer->split || !packer->small || !packed ||
	    tm_codec_open(&packer->stream)) {
		kvfree(packed);
		return -ENOMEM;
	}
	kvfree(packer->packed);
	packer->packed = packed;
	packer->room = bytes;
	return 0;
}

/**
 * tm_packer_get - get what it takes to pack blocks, and to unpack them
 * @bytes: of the largest
 *
 * Context: may sleep; not under tm_kv::lock. Return: 0, -EOPNOTSUPP, -ENOMEM.
 */
int tm_packer_get(u32 bytes)
{
	int err = tm_codec_init();

	if (err)
		return err;
	/* First what they come back with: nothing is packed without it. */
	mutex_lock(&tm_unpacking.mutex);
	err = tm_packer_fill(&tm_unpacking, bytes);
	mutex_unlock(&tm_unpacking.mutex);
	if (err)
		return err;
	mutex_lock(&tm_packing.mutex);
	err = tm_packer_fill(&tm_packing, bytes);
	mutex_unlock(&tm_packing.mutex);
	return err;
}

static void tm_packer_empty(struct tm_packer *packer)
{
	kfree(packer->plain);
	kfree(packer->split);
	kfree(packer->small);
	kvfree(packer->packed);
	tm_codec_close(&packer->stream);
}

/* No cache is left. */
void tm_packer_exit(void)
{
	tm_packer_empty(&tm_packing);
	tm_packer_empty(&tm_unpacking);
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

	tm_bandwidth_move(stream->kv->client, TM_MOVER_KV, bytes);
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

	tm_bandwidth_move(stream->kv->client, TM_MOVER_KV, bytes);
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

static u32 tm_kv_block_bytes(const struct tm_kv *kv, u32 group)
{
	return kv->cache.pool.geo.block_pages[group] << PAGE_SHIFT;
}

/* Append the segments of the unit at @split. Return: false: no room. */
static bool tm_packer_append(struct tm_packer *packer,
			     const struct tm_planes_shape *unit, u32 *lengths,
			     u32 *at, u32 end)
{
	u8 *segment = packer->split;

	for (u32 i = 0; i < tm_planes_segments(unit); i++) {
		u32 bytes = tm_planes_segment_bytes(unit, i);
		int small = tm_codec_compress(&packer->stream, segment, bytes,
					      packer->small, bytes);
		bool raw = small <= 0 || small >= bytes;
		u32 length = raw ? bytes : small;

		if (length > end - *at)
			return false;
		memcpy(packer->packed + *at, raw ? segment : packer->small,
		       length);
		lengths[i] = length | (raw ? TM_SEGMENT_RAW : 0);
		*at += length;
		segment += bytes;
	}
	return true;
}

/*
 * Pack a block into @packed. Return: bytes, or 0 when it would not be fewer pages than
 * it has.
 */
static u32 tm_packer_encode(struct tm_packer *packer, struct tm_kv *kv,
			    u32 group, struct tm_kv_block block)
{
	u32 total = tm_kv_block_bytes(kv, group);
	struct tm_packed *head = (struct tm_packed *)packer->packed;
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
		tm_kv_stream_read(&stream, packer->plain, unit.row_bytes);
		crc = crc32_le(crc, packer->plain, unit.row_bytes);
		tm_planes_split(&unit, packer->plain, packer->split);
		if (!tm_packer_append(packer, &unit, lengths, &at,
				      total - PAGE_SIZE))
			return 0;
		lengths += tm_planes_segments(&unit);
	}
	*head = (struct tm_packed){
		.magic = TM_PACKED_MAGIC, .crc = crc, .bytes = at,
	};
	return at;
}

/* Take the next unit out of @packed into @plain. Return: 0 or -EIO. */
static int tm_packer_extract(struct tm_packer *packer,
			     const struct tm_planes_shape *unit,
			     const u32 *lengths, u32 *at)
{
	const struct tm_packed *head = (struct tm_packed *)packer->packed;
	u8 *segment = packer->split;

	for (u32 i = 0; i < tm_planes_segments(unit); i++) {
		u32 bytes = tm_planes_segment_bytes(unit, i);
		u32 length = lengths[i] & ~TM_SEGMENT_RAW;
		int err;

		if (length > bytes || length > head->bytes - *at)
			return -EIO;
		if (lengths[i] & TM_SEGMENT_RAW) {
			memcpy(segment, packer->packed + *at, bytes);
		} else {
			/* The codec wants linear memory. */
			memcpy(packer->small, packer->packed + *at, length);
			err = tm_codec_decompress(&packer->stream,
						  packer->small, length,
						  segment, bytes);
			if (err)
				return err;
		}
		*at += length;
		segment += bytes;
	}
	tm_planes_join(unit, packer->split, packer->plain);
	return 0;
}

/* Put the contents of what is in @packed into a block. Return: 0 or -EIO. */
static int tm_packer_decode(struct tm_packer *packer, struct tm_kv *kv,
			    u32 group, struct tm_kv_block to)
{
	u32 total = tm_kv_block_bytes(kv, group);
	const struct tm_packed *head = (struct tm_packed *)packer->packed;
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
		err = tm_packer_extract(packer, &unit, lengths, &at);
		if (err)
			return err;
		crc = crc32_le(crc, packer->plain, unit.row_bytes);
		tm_kv_stream_write(&stream, packer->plain, unit.row_bytes);
		lengths += tm_planes_segments(&unit);
	}
	return crc == head->crc ? 0 : -EIO;
}

/* The packed contents of a block into @packed. Return: bytes. */
static u32 tm_packer_load(struct tm_packer *packer, struct tm_kv *kv,
			  struct tm_kv_block block)
{
	u32 bytes = tm_kv_pages(&kv->cache.pool, block) << PAGE_SHIFT;
	struct tm_kv_stream stream;

	tm_kv_stream_start(&stream, kv, block);
	tm_kv_stream_read(&stream, packer->packed, bytes);
	return bytes;
}

/* @bytes at @packed become all that @block has. */
static void tm_packer_store(struct tm_packer *packer, struct tm_kv *kv,
			    struct tm_kv_block block, u32 bytes)
{
	struct tm_kv_stream stream;

	if (WARN_ON_ONCE(tm_cache_pack(&kv->cache, block,
				       DIV_ROUND_UP(bytes, PAGE_SIZE))))
		return;
	tm_kv_stream_start(&stream, kv, block);
	tm_kv_stream_write(&stream, packer->packed, bytes);
}

/* Memory has gone bad. Nobody is to see what came out of it: a touch fails. */
static void tm_packer_spoil(struct tm_packer *packer, struct tm_kv *kv,
			    struct tm_kv_block block, u32 bytes)
{
	pr_err_ratelimited("tensormem: a packed KV block does not match its checksum\n");
	tm_packer_store(packer, kv, block, bytes);
}

/**
 * tm_pack_block - pack a block
 * @kv: the cache
 * @group: the block's
 * @block: not packed, and nobody has it mapped
 *
 * Context: may sleep; kv->lock is held for writing.
 * Return: bytes of the pages it has now, or 0 when it stays as it is: it would not get
 * smaller, or is larger than tm_packer_get() was told.
 */
u32 tm_pack_block(struct tm_kv *kv, u32 group, struct tm_kv_block block)
{
	u32 bytes = 0;

	mutex_lock(&tm_packing.mutex);
	if (tm_kv_block_bytes(kv, group) <= tm_packing.room)
		bytes = tm_packer_encode(&tm_packing, kv, group, block);
	if (bytes)
		tm_packer_store(&tm_packing, kv, block, bytes);
	mutex_unlock(&tm_packing.mutex);
	return round_up(bytes, PAGE_SIZE);
}

/**
 * tm_unpack_block - bring a block back
 * @kv: the cache
 * @group: the block's
 * @block: packed
 * @evict: give up cached blocks where there is no other room
 *
 * Context: may sleep; kv->lock is held for writing.
 * Return: 0; -ENOMEM as tm_cache_unpack(); -EIO for damaged contents: it stays packed.
 */
int tm_unpack_block(struct tm_kv *kv, u32 group, struct tm_kv_block block,
		    bool evict)
{
	u32 bytes;
	int err;

	mutex_lock(&tm_unpacking.mutex);
	bytes = tm_packer_load(&tm_unpacking, kv, block);
	err = tm_cache_unpack(&kv->cache, block, evict);
	if (err)
		goto out;
	err = tm_packer_decode(&tm_unpacking, kv, group, block);
	if (err)
		tm_packer_spoil(&tm_unpacking, kv, block, bytes);
out:
	mutex_unlock(&tm_unpacking.mutex);
	return err;
}

/**
 * tm_unpack_to - copy the contents of a packed block
 * @kv: the cache
 * @group: of both blocks
 * @from: packed
 * @to: not packed; if the contents are damaged it is packed, and as damaged
 *
 * Context: may sleep; kv->lock is held for writing.
 */
void tm_unpack_to(struct tm_kv *kv, u32 group, struct tm_kv_block from,
		  struct tm_kv_block to)
{
	u32 bytes;

	mutex_lock(&tm_unpacking.mutex);
	bytes = tm_packer_load(&tm_unpacking, kv, from);
	if (tm_packer_decode(&tm_unpacking, kv, group, to))
		tm_packer_spoil(&tm_unpacking, kv, to, bytes);
	mutex_unlock(&tm_unpacking.mutex);
}
