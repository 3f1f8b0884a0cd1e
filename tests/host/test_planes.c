// SPDX-License-Identifier: GPL-2.0-only
/* Numbers taken apart into segments of like bytes, and put together again. */
#include <stdlib.h>

#include "core/planes.h"
#include "harness.h"

/* A number as the machine reads it. */
static u64 number(const u8 *at, u32 element)
{
	u16 v16;
	u32 v32;
	u64 v64;

	switch (element) {
	case 1:
		return *at;
	case 2:
		memcpy(&v16, at, sizeof(v16));
		return v16;
	case 4:
		memcpy(&v32, at, sizeof(v32));
		return v32;
	default:
		memcpy(&v64, at, sizeof(v64));
		return v64;
	}
}

/* What a segment has of a number, bit by bit: bit b was bit b - 1, bit 0 the highest. */
static u8 segment_byte(u64 v, u32 element, u32 segment)
{
	u32 bits = 8 * element, lowest = 8 * (element - 1 - segment);
	u8 byte = 0;

	if (element == 1)
		return v;
	for (u32 i = 0; i < 8; i++) {
		u32 bit = (lowest + i + bits - 1) % bits;

		byte |= (v >> bit & 1) << i;
	}
	return byte;
}

/* @to is what the description says it is, of @from. */
static void check_split(const struct tm_planes_shape *shape, const u8 *from,
			const u8 *to)
{
	u32 elements = shape->row_bytes / shape->element;
	u32 rest = shape->row_bytes % shape->element;

	for (u32 s = 0; s < tm_planes_segments(shape); s++) {
		u32 each = s < shape->element ? elements : rest;

		CHECK_EQ(tm_planes_segment_bytes(shape, s), shape->rows * each);
		for (u32 row = 0; row < shape->rows; row++) {
			const u8 *at = from + (size_t)row * shape->row_bytes;

			if (s == shape->element) {
				CHECK(!memcmp(to, at + elements * shape->element,
					      rest));
				to += rest;
				continue;
			}
			for (u32 e = 0; e < elements; e++, to++)
				CHECK_EQ(*to, segment_byte(number(at + e * shape->element,
								  shape->element),
							   shape->element, s));
		}
	}
}

/* There and back, in buffers that end where the unit does, @skew bytes off alignment. */
static void check_shape(struct tm_rng *rng, const struct tm_planes_shape *shape,
			u32 skew)
{
	u32 bytes = tm_planes_bytes(shape), sum = 0;
	u8 *unit = malloc(bytes + skew), *split = malloc(bytes + skew);
	u8 *copy = malloc(bytes + skew), *back = malloc(bytes + skew);

	CHECK(unit && split && copy && back);
	for (u32 i = 0; i < bytes + skew; i++) {
		copy[i] = unit[i] = tm_rand(rng);
		/* What a byte that is never written would keep. */
		split[i] = ~unit[i];
		back[i] = ~unit[i];
	}
	for (u32 s = 0; s < tm_planes_segments(shape); s++)
		sum += tm_planes_segment_bytes(shape, s);
	CHECK_EQ(sum, bytes);
	CHECK_EQ(tm_planes_segments(shape),
		 shape->element + (shape->row_bytes % shape->element > 0));
	tm_planes_split(shape, unit + skew, split + skew);
	CHECK(!memcmp(unit, copy, bytes + skew));
	check_split(shape, unit + skew, split + skew);
	tm_planes_join(shape, split + skew, back + skew);
	CHECK(!memcmp(back + skew, unit + skew, bytes));
	check_split(shape, unit + skew, split + skew);
	for (u32 i = 0; i < skew; i++) {
		CHECK_EQ(split[i], (u8)~copy[i]);
		CHECK_EQ(back[i], (u8)~copy[i]);
	}
	free(unit);
	free(split);
	free(copy);
	free(back);
}

static const u32 elements[] = { 1, 2, 4, 8 };

TEST(planes_every_small_shape)
{
	struct tm_rng rng = { 1 };
	struct tm_planes_shape shape;

	for (u32 e = 0; e < 4; e++) {
		shape.element = elements[e];
		for (shape.rows = 0; shape.rows < 6; shape.rows++)
			for (shape.row_bytes = 0; shape.row_bytes < 40;
			     shape.row_bytes++) {
				tm_op("%u rows of %u, element %u", shape.rows,
				      shape.row_bytes, shape.element);
				check_shape(&rng, &shape,
					    (shape.rows + shape.row_bytes) % 9);
			}
	}
}

TEST(planes_random_shapes)
{
	struct tm_round round;

	tm_for_each_round(&round, 4, 200)
		while (round.steps--) {
			struct tm_planes_shape shape = {
				.rows = tm_rand_below(&round.rng, 70),
				.row_bytes = tm_rand_below(&round.rng, 600),
				.element = elements[tm_rand_below(&round.rng, 4)],
			};

			tm_op("%u rows of %u, element %u", shape.rows,
			      shape.row_bytes, shape.element);
			check_shape(&round.rng, &shape,
				    tm_rand_below(&round.rng, 8));
		}
}

/* By hand: +1, -2 and the smallest number above 0. */
TEST(planes_fp32)
{
	static const u32 unit[] = { 0x3f800000, 0xc0000000, 0x00000001 };
	static const u8 want[] = {
		0x7f, 0x80, 0x00,	/* the exponents */
		0x00, 0x00, 0x00,
		0x00, 0x00, 0x00,
		0x00, 0x01, 0x02,	/* the sign comes last */
	};
	struct tm_planes_shape shape = { 3, 4, 4 };
	u8 split[sizeof(want)];

	tm_planes_split(&shape, (const u8 *)unit, split);
	CHECK(!memcmp(split, want, sizeof(want)));
}

TEST(planes_bf16)
{
	static const u16 unit[] = { 0x3f80, 0xc000, 0x0001, 0xffff };
	static const u8 want[] = {
		0x7f, 0x80, 0x00, 0xff,
		0x00, 0x01, 0x02, 0xff,
	};
	struct tm_planes_shape shape = { 2, 4, 2 };
	u8 split[sizeof(want)];

	tm_planes_split(&shape, (const u8 *)unit, split);
	CHECK(!memcmp(split, want, sizeof(want)));
}

TEST(planes_fp64)
{
	static const u64 unit[] = { 0x3ff0000000000000ull, 0x8123456789abcdefull };
	static const u8 want[] = {
		0x7f, 0x02, 0xe0, 0x46, 0x00, 0x8a, 0x00, 0xcf,
		0x00, 0x13, 0x00, 0x57, 0x00, 0x9b, 0x00, 0xdf,
	};
	struct tm_planes_shape shape = { 1, 16, 8 };
	u8 split[sizeof(want)];

	tm_planes_split(&shape, (const u8 *)unit, split);
	CHECK(!memcmp(split, want, sizeof(want)));
}

/* Rows of 7 bytes with numbers of 2: three of them, and a byte that is kept. */
TEST(planes_rest_of_a_row)
{
	static const u8 unit[] = {
		0, 0, 0, 0, 0, 0, 0xa1,
		0, 0, 0, 0, 0, 0, 0xa2,
	};
	static const u8 want[] = {
		0, 0, 0, 0, 0, 0,
		0, 0, 0, 0, 0, 0,
		0xa1, 0xa2,
	};
	struct tm_planes_shape shape = { 2, 7, 2 };
	u8 split[sizeof(want)];

	CHECK_EQ(tm_planes_segments(&shape), 3);
	CHECK_EQ(tm_planes_segment_bytes(&shape, 2), 2);
	tm_planes_split(&shape, unit, split);
	CHECK(!memcmp(split, want, sizeof(want)));
}

/* As large as a unit of a long block gets: no product of 32 bits overflows. */
TEST(planes_large_unit)
{
	struct tm_rng rng = { 2 };
	struct tm_planes_shape shape = { 4096, 513, 4 };

	check_shape(&rng, &shape, 3);
}
