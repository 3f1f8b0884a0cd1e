// SPDX-License-Identifier: GPL-2.0-only
/*
 * The heap by itself: which list a block is in and which block an allocation gets, merging,
 * slides, sizes that random calls on a small arena (test_rt.c) do not reach, and how many
 * steps a call takes.
 */
#include <stdlib.h>

#include "core/heap.h"
#include "harness.h"

static struct tm_heap heap;
static tm_raw_lock_t lock;

static void begin(u32 size)
{
	memset(&heap, 0xa5, sizeof(heap));
	CHECK_EQ(tm_heap_init(&heap, &lock, size), 0);
	tm_host_lock(&lock);
	tm_heap_check(&heap);
	CHECK_EQ(heap.free, size);
	CHECK_EQ(heap.nr_free, 1);
	CHECK_EQ(heap.cursor, 0);
}

static void end(void)
{
	tm_heap_check(&heap);
	tm_host_unlock(&lock);
	tm_heap_exit(&heap);
	CHECK(!heap.node);
}

TEST(heap_sizes_that_cannot_be)
{
	static const u32 bad[] = { 0, 1, TM_HEAP_MAX + 1, ~0u };

	for (u32 i = 0; i < 4; i++) {
		CHECK_EQ(tm_heap_init(&heap, &lock, bad[i]), -EINVAL);
		tm_heap_exit(&heap);
	}
	tm_host_fail_table(1);
	CHECK_EQ(tm_heap_init(&heap, &lock, 64), -ENOMEM);
	tm_heap_exit(&heap);
	begin(2);
	CHECK_EQ(tm_heap_alloc(&heap, 2), 0);
	CHECK_EQ(tm_heap_largest(&heap), 0);
	CHECK_EQ(tm_heap_alloc(&heap, 2), TM_HEAP_NONE);
	end();
}

TEST(heap_lengths_out_of_range)
{
	begin(100);
	CHECK_EQ(tm_heap_alloc(&heap, 0), TM_HEAP_NONE);
	CHECK_EQ(tm_heap_alloc(&heap, 1), TM_HEAP_NONE);
	CHECK_EQ(tm_heap_alloc(&heap, 101), TM_HEAP_NONE);
	CHECK_EQ(tm_heap_alloc(&heap, 1u << 31), TM_HEAP_NONE);
	CHECK_EQ(tm_heap_alloc(&heap, ~0u), TM_HEAP_NONE);
	CHECK_EQ(tm_heap_length(&heap, 0), 0);
	CHECK_EQ(tm_heap_length(&heap, 100), 0);
	CHECK_EQ(tm_heap_length(&heap, ~0u), 0);
	CHECK_EQ(tm_heap_alloc(&heap, 100), 0);
	CHECK_EQ(tm_heap_length(&heap, 0), 100);
	CHECK_EQ(tm_heap_length(&heap, 99), 0);
	end();
}

/* No block can be of one granule: who takes all but one takes that, too. */
TEST(heap_no_rest_of_one)
{
	begin(10);
	CHECK_EQ(tm_heap_alloc(&heap, 9), 0);
	CHECK_EQ(tm_heap_length(&heap, 0), 10);
	CHECK_EQ(heap.free, 0);
	tm_heap_free(&heap, 0);
	CHECK_EQ(tm_heap_alloc(&heap, 8), 0);
	CHECK_EQ(tm_heap_length(&heap, 0), 8);
	CHECK_EQ(heap.free, 2);
	CHECK_EQ(tm_heap_largest(&heap), 2);
	end();
}

static void free_unlocked(void *arg)
{
	(void)arg;
	tm_heap_free(&heap, 0);
}

static void alloc_unlocked(void *arg)
{
	(void)arg;
	tm_heap_alloc(&heap, 2);
}

static void slide_unlocked(void *arg)
{
	(void)arg;
	tm_heap_slide_begin(&heap, 0);
}

static void slide_end_unlocked(void *arg)
{
	(void)arg;
	tm_heap_slide_end(&heap, 0);
}

static void largest_unlocked(void *arg)
{
	(void)arg;
	tm_heap_largest(&heap);
}

static void check_unlocked(void *arg)
{
	(void)arg;
	tm_heap_check(&heap);
}

TEST(heap_needs_its_lock)
{
	begin(10);
	tm_host_unlock(&lock);
	tm_check_aborts("alloc", alloc_unlocked, NULL);
	tm_check_aborts("free", free_unlocked, NULL);
	tm_check_aborts("slide", slide_unlocked, NULL);
	tm_check_aborts("slide end", slide_end_unlocked, NULL);
	tm_check_aborts("largest", largest_unlocked, NULL);
	tm_check_aborts("check", check_unlocked, NULL);
	tm_host_lock(&lock);
	end();
}

/* A free of what is no block is warned of and changes nothing. */
TEST(heap_frees_that_cannot_be)
{
	static const u32 bad[] = { 1, 4, 5, 9, 10, 11, ~0u };

	begin(10);
	CHECK_EQ(tm_heap_alloc(&heap, 5), 0);
	tm_host_expect_warnings(7);
	for (u32 i = 0; i < 7; i++)
		tm_heap_free(&heap, bad[i]);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	tm_heap_check(&heap);
	CHECK_EQ(heap.free, 5);
	tm_heap_free(&heap, 0);
	tm_host_expect_warnings(1);
	tm_heap_free(&heap, 0);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	CHECK_EQ(heap.free, 10);
	end();
}

/* Merging with what is before, behind, both, neither: of three blocks in each order. */
TEST(heap_merges)
{
	static const u32 order[6][3] = {
		{ 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 },
		{ 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 },
	};

	for (u32 full = 0; full < 2; full++) {
		for (u32 i = 0; i < 6; i++) {
			u32 start[3], last = 0;

			begin(full ? 9 : 17);
			for (u32 k = 0; k < 3; k++)
				start[k] = tm_heap_alloc(&heap, 3);
			CHECK_EQ(start[2], 6);
			heap.cursor = start[i % 3];
			for (u32 k = 0; k < 3; k++) {
				last = order[i][k];
				tm_heap_free(&heap, start[last]);
				tm_heap_check(&heap);
			}
			CHECK_EQ(heap.nr_free, 1);
			CHECK_EQ(heap.cursor, 0);
			CHECK_EQ(tm_heap_largest(&heap), full ? 9 : 17);
			end();
		}
	}
}

/*
 * Each length up to 700 is found if there is one free block of it or more, and if there is a shorter one it is not. Blocks between
 * keep the free ones apart.
 */
TEST(heap_finds_each_length)
{
	for (u32 have = 2; have < 700; have++) {
		u32 want[] = { have - 1, have, have + 1, have / 2, 2 };

		for (u32 i = 0; i < 5; i++) {
			u32 start, got;

			begin(have + 2);
			start = tm_heap_alloc(&heap, 2);
			CHECK_EQ(start, 0);
			CHECK_EQ(tm_heap_largest(&heap), have);
			got = tm_heap_alloc(&heap, want[i]);
			if (want[i] < 2 || want[i] > have)
				CHECK_EQ(got, TM_HEAP_NONE);
			else
				CHECK_EQ(got, 2);
			end();
		}
	}
}

/* Free blocks of these lengths, the last one's list first; used ones between. */
static void gaps(const u32 *n, u32 nr)
{
	u32 size = 0, start[16];

	for (u32 i = 0; i < nr; i++)
		size += n[i] + 2;
	begin(size);
	for (u32 i = 0; i < nr; i++) {
		start[i] = tm_heap_alloc(&heap, n[i]);
		CHECK(tm_heap_alloc(&heap, 2) != TM_HEAP_NONE);
	}
	CHECK_EQ(heap.free, 0);
	for (u32 i = 0; i < nr; i++)
		tm_heap_free(&heap, start[i]);
	tm_heap_check(&heap);
}

/* The shortest list that is all long enough; of a list the block that was freed last. */
TEST(heap_takes_of_the_shortest_list)
{
	u32 n[] = { 500, 40, 9, 41, 9, 31 };
	u32 long_ones[] = { 1000, 5000, 1001, 300 };

	gaps(n, 6);
	CHECK_EQ(tm_heap_alloc(&heap, 9), 500 + 2 + 40 + 2 + 9 + 2 + 41 + 2);
	CHECK_EQ(tm_heap_alloc(&heap, 9), 500 + 2 + 40 + 2);
	CHECK_EQ(tm_heap_alloc(&heap, 9), 500 + 40 + 9 + 41 + 9 + 10);
	CHECK_EQ(tm_heap_alloc(&heap, 32), 500 + 2);
	CHECK_EQ(tm_heap_alloc(&heap, 32), 500 + 40 + 9 + 6);
	CHECK_EQ(tm_heap_alloc(&heap, 32), 0);
	CHECK_EQ(tm_heap_length(&heap, 0), 32);
	end();
	gaps(long_ones, 4);
	/* 300's list is too short for 305; 1000's and 1001's is one list, 992 to 1007. Then what is left of that. */
	CHECK_EQ(tm_heap_alloc(&heap, 305), 6004);
	CHECK_EQ(tm_heap_alloc(&heap, 305), 6004 + 305);
	CHECK_EQ(tm_heap_alloc(&heap, 305), 6004 + 610);
	CHECK_EQ(tm_heap_alloc(&heap, 305), 0);
	CHECK_EQ(tm_heap_alloc(&heap, 300), 305);
	CHECK_EQ(tm_heap_alloc(&heap, 300), 605);
	end();
}

/* What the header says may be overlooked, and no more. */
TEST(heap_overlooks_what_is_hidden)
{
	u32 hidden[] = { 66, 65 }, first[] = { 64, 65 }, next[] = { 64, 66 };
	u32 small[] = { 63, 62 };

	/* Of one list: 64 and 65 long. */
	gaps(first, 2);
	CHECK_EQ(tm_heap_alloc(&heap, 65), 66);
	end();
	hidden[0] = 65;
	hidden[1] = 64;
	gaps(hidden, 2);
	CHECK_EQ(tm_heap_largest(&heap), 64);
	CHECK_EQ(tm_heap_alloc(&heap, 65), TM_HEAP_NONE);
	CHECK_EQ(tm_heap_alloc(&heap, 64), 67);
	CHECK_EQ(tm_heap_alloc(&heap, 65), 0);
	end();
	gaps(next, 2);
	CHECK_EQ(tm_heap_largest(&heap), 66);
	CHECK_EQ(tm_heap_alloc(&heap, 65), 66);
	end();
	gaps(small, 2);
	CHECK_EQ(tm_heap_alloc(&heap, 63), 0);
	end();
}

/* Slides into holes shorter, as long and longer than the block; neighbours free or not. */
TEST(heap_slides)
{
	for (u32 hole = 2; hole < 8; hole++) {
		for (u32 how = 0; how < 16; how++) {
			u32 before, gap, block, behind, last, n = 4, length;
			bool tail = how & 8;

			begin(3 + hole + n + 5 + (tail ? 2 : 3));
			before = tm_heap_alloc(&heap, 3);
			gap = tm_heap_alloc(&heap, hole);
			block = tm_heap_alloc(&heap, n);
			behind = tm_heap_alloc(&heap, 5);
			last = tm_heap_alloc(&heap, tail ? 2 : 3);
			CHECK_EQ(heap.free, 0);
			heap.node[block].link = 123;
			heap.node[block + n - 1].link = 456;
			heap.node[block + n - 1].tag |= 789;
			heap.node[block + 1].tag = tm_heap_tag(TM_HEAP_ITEM_USED,
							       5);
			tm_heap_free(&heap, gap);
			heap.cursor = how & 4 ? gap : block;
			if (how & 1)
				tm_heap_free(&heap, behind);
			CHECK_EQ(tm_heap_slide_begin(&heap, gap), block);
			tm_heap_check(&heap);
			CHECK_EQ(heap.free, how & 1 ? 5 : 0);
			CHECK_EQ(tm_heap_length(&heap, gap), hole);
			CHECK_EQ(tm_heap_length(&heap, block), n);
			/* Both stay what they are, whatever becomes free beside them. */
			if (how & 2) {
				tm_heap_free(&heap, before);
				if (!(how & 1))
					tm_heap_free(&heap, behind);
				tm_heap_check(&heap);
			}
			length = tm_heap_slide_end(&heap, gap);
			tm_heap_check(&heap);
			CHECK_EQ(length, hole + (how & 3 ? 5 : 0));
			CHECK_EQ(tm_heap_length(&heap, gap), n);
			CHECK_EQ(heap.node[gap].link, 123);
			CHECK_EQ(heap.node[gap + n - 1].link, 456);
			CHECK_EQ(heap.node[gap + n - 1].tag,
				 tm_heap_tag(TM_HEAP_USED_LAST, 789));
			CHECK_EQ(heap.cursor, gap);
			CHECK_EQ(heap.free, length + (how & 2 ? 3 : 0));
			tm_heap_free(&heap, last);
			tm_heap_free(&heap, gap);
			if (!(how & 2))
				tm_heap_free(&heap, before);
			if (!(how & 3))
				tm_heap_free(&heap, behind);
			CHECK_EQ(heap.nr_free, 1);
			CHECK_EQ(heap.cursor, 0);
			end();
		}
	}
}

/* What the check is there to find: each thing that can be wrong, by itself. */
TEST(heap_check_finds)
{
	struct tm_heap_node node[40];
	struct tm_heap good;

	begin(40);
	for (u32 i = 0; i < 5; i++)
		CHECK_EQ(tm_heap_alloc(&heap, 5), i * 5);
	tm_heap_free(&heap, 5);
	tm_heap_free(&heap, 15);
	tm_heap_check(&heap);
	good = heap;
	memcpy(node, heap.node, sizeof(node));
	for (u32 what = 0; what < 22; what++) {
		u32 warned;

		switch (what) {
		case 0: heap.free++; break;
		case 1: heap.nr_free++; break;
		case 2: heap.nr_used++; break;
		case 3: heap.cursor = 1; break;
		case 4: heap.rows |= 4; break;
		case 5: heap.subs[0] |= 2; heap.head[1] = 5; break;
		case 6: heap.subs[0] |= 2; heap.head[1] = 0; break;
		case 7: heap.head[5] = 5; break;
		case 8: heap.node[5].link = 15; break;
		case 9: heap.node[5].link = 40; break;
		case 10: heap.node[7].tag = tm_heap_tag(TM_HEAP_USED_FIRST, 2); break;
		case 11: heap.node[0].tag = 0; break;
		case 12: heap.node[0].tag = tm_heap_tag(TM_HEAP_USED_FIRST, 41); break;
		case 13: heap.node[0].tag = tm_heap_tag(TM_HEAP_USED_FIRST, 1); break;
		case 14: heap.node[4].tag = 0; break;
		case 15: heap.node[9].tag = tm_heap_tag(TM_HEAP_FREE_LAST, 4); break;
		case 16: heap.rows |= 1u << 30; break;
		case 17: heap.subs[0] &= ~(1u << 5); heap.rows = 0; break;
		case 18: heap.node[9].link = 9; break;
		case 19: heap.node[1].tag = 1; break;
		case 20: heap.node[10].tag = tm_heap_tag(TM_HEAP_FREE_FIRST, 5);
			 heap.node[14].tag = tm_heap_tag(TM_HEAP_FREE_LAST, 5); break;
		default: heap.node[9].tag = tm_heap_tag(TM_HEAP_USED_LAST, 5); break;
		}
		tm_host_expect_warnings(1000);
		tm_heap_check(&heap);
		warned = 1000 - tm_host_missing_warnings();
		if (!warned)
			tm_test_fail(__FILE__, __LINE__, "%u is not found", what);
		heap = good;
		memcpy(heap.node, node, sizeof(node));
		tm_heap_check(&heap);
	}
	end();
}

/* Sizes up to the largest rows: against a byte for each granule. */
TEST(heap_random)
{
	static const u32 sizes[] = { 64, 1000, 5000, 1 << 16 };
	struct tm_round round;

	tm_for_each_round(&round, 12, 4000) {
		u32 size = sizes[round.nr % 4], nr = 0;
		u8 *used = calloc(size, 1);
		u32 *block = calloc(round.steps, sizeof(*block));

		CHECK(used && block);
		begin(size);
		for (u32 i = 0; i < round.steps; i++) {
			u32 most = tm_rand_below(&round.rng, 3) ? 40 : size / 4;
			u32 n = 2 + tm_rand_below(&round.rng, most);
			u32 start, length;

			if (tm_rand_below(&round.rng, 100) < 55) {
				u32 largest = tm_heap_largest(&heap);

				tm_op("alloc %u", n);
				start = tm_heap_alloc(&heap, n);
				/* A longer one is there, if one fits at all. */
				CHECK(start != TM_HEAP_NONE || n > largest);
				CHECK(start == TM_HEAP_NONE ||
				      largest + largest / 32 >= n);
				if (start == TM_HEAP_NONE)
					continue;
				length = tm_heap_length(&heap, start);
				CHECK(length == n || length == n + 1);
				for (u32 g = 0; g < length; g++)
					CHECK(!used[start + g]++);
				block[nr++] = start;
			} else if (nr) {
				u32 b = tm_rand_below(&round.rng, nr);

				start = block[b];
				tm_op("free %u", start);
				length = tm_heap_length(&heap, start);
				for (u32 g = 0; g < length; g++)
					CHECK(used[start + g]--);
				tm_heap_free(&heap, start);
				block[b] = block[--nr];
			}
			CHECK_EQ(heap.nr_used, nr);
			if (size <= 1000 || tm_rand_one_in(&round.rng, 200))
				tm_heap_check(&heap);
		}
		while (nr)
			tm_heap_free(&heap, block[--nr]);
		CHECK_EQ(heap.nr_free, 1);
		CHECK_EQ(tm_heap_largest(&heap), size);
		end();
		free(used);
		free(block);
	}
}

/* The longest that a call has taken. */
static u32 worst_alloc, worst_free;

static u32 count_alloc(u32 n)
{
	u64 before = tm_host_steps;
	u32 start = tm_heap_alloc(&heap, n);

	if (worst_alloc < tm_host_steps - before)
		worst_alloc = (u32)(tm_host_steps - before);
	return start;
}

static void count_free(u32 start)
{
	u64 before = tm_host_steps;

	tm_heap_free(&heap, start);
	if (worst_free < tm_host_steps - before)
		worst_free = (u32)(tm_host_steps - before);
}

/*
 * The longest paths, by counting what is touched, are the same for each size of heap: blocks of the same lengths so that lists are long, and frees that merge with
 * two that are in the middle of theirs.
 */
TEST(heap_steps_do_not_grow)
{
	u32 alloc = 0, free_ = 0;

	for (u32 bits = 8; bits <= 20; bits += 2) {
		u32 size = 1u << bits, nr = 0;
		u32 *start = malloc(size * sizeof(*start));

		CHECK(start);
		worst_alloc = worst_free = 0;
		begin(size);
		do
			start[nr] = count_alloc(nr % 3 + 3);
		while (start[nr++] != TM_HEAP_NONE);
		nr--;
		for (u32 k = 0; k < nr; k += 2)
			count_free(start[k]);
		/* Holes of 3, 4 and 5; rests of 2. */
		for (u32 k = 0; k < nr; k += 6)
			start[k] = count_alloc(3);
		for (u32 k = 0; k < nr; k += 6)
			if (start[k] != TM_HEAP_NONE)
				count_free(start[k]);
		for (u32 k = 1; k < nr; k += 2)
			count_free(start[k]);
		CHECK_EQ(heap.nr_free, 1);
		end();
		free(start);
		if (bits == 8) {
			alloc = worst_alloc;
			free_ = worst_free;
		}
		CHECK_EQ(worst_alloc, alloc);
		CHECK_EQ(worst_free, free_);
	}
	CHECK(alloc <= 20);
	CHECK(free_ <= 40);
}
