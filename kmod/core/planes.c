// SPDX-License-Identifier: GPL-2.0-only
#include "core/planes.h"

/*
 * Numbers are loaded and stored in the byte order of the machine. On a big-endian
 * one a number's highest byte is the first all the same: shifts tell, not addresses.
 *
 * One loop for each size, written out: -O2 would keep a loop over the bytes of a
 * number, and double the instructions.
 */

/*
 * Numbers of 2 bytes go four at a time, as the lanes of a word: they are what most
 * caches have, and it halves the instructions. The lanes of larger ones gain nothing.
 */
#define TM_PLANES_LANES	4

/* The low byte of each lane. */
static u32 tm_planes_low_bytes(u64 lanes)
{
	lanes &= 0x00ff00ff00ff00ffull;
	lanes = (lanes | lanes >> 8) & 0x0000ffff0000ffffull;
	return lanes | lanes >> 16;
}

/* A byte for each lane. */
static u64 tm_planes_lanes(u32 bytes)
{
	u64 lanes = bytes;

	lanes = (lanes | lanes << 16) & 0x0000ffff0000ffffull;
	return (lanes | lanes << 8) & 0x00ff00ff00ff00ffull;
}

static void tm_planes_split_16(const u8 *from, u8 *to, u32 nr, size_t stride)
{
	for (; nr >= TM_PLANES_LANES; nr -= TM_PLANES_LANES) {
		u32 high, low;
		u64 v;

		memcpy(&v, from, sizeof(v));
		v = (v & 0x7fff7fff7fff7fffull) << 1 |
		    (v >> 15 & 0x0001000100010001ull);
		high = tm_planes_low_bytes(v >> 8);
		low = tm_planes_low_bytes(v);
		memcpy(to, &high, sizeof(high));
		memcpy(to + stride, &low, sizeof(low));
		from += sizeof(v);
		to += TM_PLANES_LANES;
	}
	for (; nr; nr--, from += sizeof(u16), to++) {
		u16 v;

		memcpy(&v, from, sizeof(v));
		to[0] = v >> 7;
		to[stride] = v << 1 | v >> 15;
	}
}

static void tm_planes_join_16(const u8 *from, u8 *to, u32 nr, size_t stride)
{
	for (; nr >= TM_PLANES_LANES; nr -= TM_PLANES_LANES) {
		u32 high, low;
		u64 v;

		memcpy(&high, from, sizeof(high));
		memcpy(&low, from + stride, sizeof(low));
		v = tm_planes_lanes(high) << 8 | tm_planes_lanes(low);
		v = (v >> 1 & 0x7fff7fff7fff7fffull) |
		    (v & 0x0001000100010001ull) << 15;
		memcpy(to, &v, sizeof(v));
		from += TM_PLANES_LANES;
		to += sizeof(v);
	}
	for (; nr; nr--, from++, to += sizeof(u16)) {
		u16 v = from[0] << 7 | from[stride] >> 1 | from[stride] << 15;

		memcpy(to, &v, sizeof(v));
	}
}

static void tm_planes_split_32(const u8 *from, u8 *to, u32 nr, size_t stride)
{
	for (u32 i = 0; i < nr; i++, from += sizeof(u32), to++) {
		u32 v;

		memcpy(&v, from, sizeof(v));
		v = v << 1 | v >> 31;
		to[0] = v >> 24;
		to[stride] = v >> 16;
		to[2 * stride] = v >> 8;
		to[3 * stride] = v;
	}
}

static void tm_planes_join_32(const u8 *from, u8 *to, u32 nr, size_t stride)
{
	for (u32 i = 0; i < nr; i++, from++, to += sizeof(u32)) {
		u32 v = (u32)from[0] << 24 | (u32)from[stride] << 16 |
			(u32)from[2 * stride] << 8 | from[3 * stride];

		v = v >> 1 | v << 31;
		memcpy(to, &v, sizeof(v));
	}
}

static void tm_planes_split_64(const u8 *from, u8 *to, u32 nr, size_t stride)
{
	for (u32 i = 0; i < nr; i++, from += sizeof(u64), to++) {
		u64 v;

		memcpy(&v, from, sizeof(v));
		v = v << 1 | v >> 63;
		to[0] = v >> 56;
		to[stride] = v >> 48;
		to[2 * stride] = v >> 40;
		to[3 * stride] = v >> 32;
		to[4 * stride] = v >> 24;
		to[5 * stride] = v >> 16;
		to[6 * stride] = v >> 8;
		to[7 * stride] = v;
	}
}

static void tm_planes_join_64(const u8 *from, u8 *to, u32 nr, size_t stride)
{
	for (u32 i = 0; i < nr; i++, from++, to += sizeof(u64)) {
		u64 v = (u64)from[0] << 56 | (u64)from[stride] << 48 |
			(u64)from[2 * stride] << 40 |
			(u64)from[3 * stride] << 32 |
			(u64)from[4 * stride] << 24 |
			(u64)from[5 * stride] << 16 |
			(u64)from[6 * stride] << 8 | from[7 * stride];

		v = v >> 1 | v << 63;
		memcpy(to, &v, sizeof(v));
	}
}

/* Elements of several rows at once, where nothing is between them. */
struct tm_planes_runs {
	u32 runs;
	u32 elements;	/* of a run */
	u32 rest;	/* bytes behind a run */
	size_t stride;	/* from one segment to the next */
};

static struct tm_planes_runs tm_planes_runs(const struct tm_planes_shape *shape)
{
	u32 elements = shape->row_bytes / shape->element;
	u32 rest = shape->row_bytes % shape->element;

	return (struct tm_planes_runs){
		.runs = rest ? shape->rows : 1,
		.elements = rest ? elements : elements * shape->rows,
		.rest = rest,
		.stride = (size_t)elements * shape->rows,
	};
}

void tm_planes_split(const struct tm_planes_shape *shape, const u8 *from,
		     u8 *to)
{
	struct tm_planes_runs r = tm_planes_runs(shape);
	u8 *rest = to + shape->element * r.stride;

	for (u32 run = 0; run < r.runs; run++) {
		switch (shape->element) {
		case 2:
			tm_planes_split_16(from, to, r.elements, r.stride);
			break;
		case 4:
			tm_planes_split_32(from, to, r.elements, r.stride);
			break;
		case 8:
			tm_planes_split_64(from, to, r.elements, r.stride);
			break;
		default:
			memcpy(to, from, r.elements);
			break;
		}
		from += (size_t)r.elements * shape->element;
		to += r.elements;
		memcpy(rest, from, r.rest);
		from += r.rest;
		rest += r.rest;
	}
}

void tm_planes_join(const struct tm_planes_shape *shape, const u8 *from, u8 *to)
{
	struct tm_planes_runs r = tm_planes_runs(shape);
	const u8 *rest = from + shape->element * r.stride;

	for (u32 run = 0; run < r.runs; run++) {
		switch (shape->element) {
		case 2:
			tm_planes_join_16(from, to, r.elements, r.stride);
			break;
		case 4:
			tm_planes_join_32(from, to, r.elements, r.stride);
			break;
		case 8:
			tm_planes_join_64(from, to, r.elements, r.stride);
			break;
		default:
			memcpy(to, from, r.elements);
			break;
		}
		to += (size_t)r.elements * shape->element;
		from += r.elements;
		memcpy(to, rest, r.rest);
		to += r.rest;
		rest += r.rest;
	}
}
