/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KV rearranged so that a byte codec finds something in it.
 *
 * Keys and values are floating point numbers of like magnitude: their exponents
 * have few values, their mantissas are noise. Side by side, as they lie in memory, the
 * noise hides the exponents from a codec that sees bytes. So the bytes of one
 * significance are put together, and each such *segment* is to be given to the codec by
 * itself: a segment of noise would spoil the statistics of one that is not, and is
 * kept as it is when the codec cannot make it smaller. Sign and mantissa bits that
 * share a byte with the exponent go elsewhere first, by rotating each number left by
 * one bit: then the first segment of fp32 and bf16 has the exponents and nothing else.
 * (Byte planes are Blosc's shuffle filter; exponents apart from mantissas:
 * ZipNN, arXiv:2411.05239.) docs/kv.md has the measurements, also of what does not
 * help: channels side by side, differences from token to token.
 *
 *	tm_planes_split(&shape, block, scratch)
 *	for (i = 0, at = 0; i < tm_planes_segments(&shape); i++)
 *		...compress tm_planes_segment_bytes(&shape, i) bytes at scratch + at...
 *		at += tm_planes_segment_bytes(&shape, i)
 *
 * On the way back every segment is decompressed to its place in the scratch buffer,
 * and tm_planes_join() is the exact inverse, for any bit pattern.
 *
 * Context: any; needs no lock, no memory and a few words of stack. Some instructions
 * for each byte, so whoever may not hold the CPU for long gives it small units.
 */
#ifndef TM_CORE_PLANES_H
#define TM_CORE_PLANES_H

#include "core/platform.h"

/**
 * struct tm_planes_shape - what a unit is made of
 * @rows: rows, one after the other: tokens of all planes of the unit
 * @row_bytes: bytes of a row; @rows * @row_bytes must fit in 32 bits
 * @element: bytes of a number: 1, 2, 4 or 8. A row that is not a multiple of it ends
 *           with bytes that are kept as they are, in a segment of their own
 */
struct tm_planes_shape {
	u32 rows;
	u32 row_bytes;
	u32 element;
};

/* Bytes of a unit, both ways round. */
static inline u32 tm_planes_bytes(const struct tm_planes_shape *shape)
{
	return shape->rows * shape->row_bytes;
}

/* Segments of a unit: one for each byte of a number, the highest first, and the rest. */
static inline u32 tm_planes_segments(const struct tm_planes_shape *shape)
{
	return shape->element + !!(shape->row_bytes % shape->element);
}

/* Bytes of segment @i, less than tm_planes_segments(); they lie one after the other. */
static inline u32 tm_planes_segment_bytes(const struct tm_planes_shape *shape,
					  u32 i)
{
	return shape->rows * (i < shape->element ?
			      shape->row_bytes / shape->element :
			      shape->row_bytes % shape->element);
}

/**
 * tm_planes_split - rearrange a unit for a codec
 * @shape: its shape
 * @from: tm_planes_bytes() bytes, the numbers
 * @to: as many, the segments; must not overlap @from
 *
 * Neither has to be aligned.
 */
void tm_planes_split(const struct tm_planes_shape *shape, const u8 *from,
		     u8 *to);

/* The inverse: @from has the segments, @to gets the numbers. */
void tm_planes_join(const struct tm_planes_shape *shape, const u8 *from,
		    u8 *to);

#endif
