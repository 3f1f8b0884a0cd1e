// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RT pool's arenas against a map of their granules: random calls, every short sequence on a tiny arena,
 * what is promised to reservations and to those who wait, moves with all else that may happen
 * meanwhile, and how many steps a call takes.
 */
#include <stdlib.h>

#include "rt_model.h"

static struct rt_model m;

#define MOVABLE		TM_RT_ALLOC_MOVABLE
#define RESERVED	TM_RT_ALLOC_RESERVED

static u32 allocated(u32 c, u32 size, u32 flags)
{
	u32 t = ~0u;

	CHECK_EQ(rt_do_alloc(&m, c, size, flags, &t), 0);
	rt_model_compare(&m);
	return t;
}

static u32 handle_of(u32 t)
{
	return m.thing[t].handle;
}

static void freed(u32 t)
{
	CHECK_EQ(rt_do_free(&m, m.thing[t].client, handle_of(t)), 0);
	rt_model_compare(&m);
}

/* Compact until a whole round has changed nothing. */
static void compacted(void)
{
	u32 rounds = 0;

	while (rounds < 2) {
		enum tm_rt_step step = rt_do_move_begin(&m);

		CHECK(step != TM_RT_STEP_BUSY);
		if (step == TM_RT_STEP_MOVE) {
			rt_do_move_end(&m);
			rt_model_compare(&m);
		}
		rounds += step == TM_RT_STEP_ROUND;
	}
	rt_model_compare(&m);
}

static void start(u32 size, u32 max_movable, u32 clients)
{
	rt_model_init(&m, size, max_movable);
	for (u32 c = 0; c < clients; c++)
		CHECK_EQ(rt_do_join(&m, c, c * 10), 0);
}

TEST(rt_sizes_that_cannot_be)
{
	tm_raw_lock_t lock = { 0 };
	static struct tm_rt rt;

	CHECK_EQ(tm_rt_init(&rt, &lock, 1, 0), -EINVAL);
	CHECK_EQ(tm_rt_init(&rt, &lock, 0, 0), -EINVAL);
	CHECK_EQ(tm_rt_init(&rt, &lock, TM_HEAP_MAX + 1, 0), -EINVAL);
	CHECK_EQ(tm_rt_init(&rt, &lock, 64, TM_RT_MOVABLE + 1), -EINVAL);
	tm_rt_exit(&rt);
	CHECK_EQ(tm_rt_init(&rt, &lock, 2, TM_RT_MOVABLE), 0);
	tm_rt_exit(&rt);
	tm_rt_exit(&rt);
	for (u32 nth = 1; nth <= 2; nth++) {
		tm_host_fail_table(nth);
		CHECK_EQ(tm_rt_init(&rt, &lock, 64, 4), -ENOMEM);
		CHECK_EQ(tm_host_tables(), 0);
		tm_rt_exit(&rt);
	}
	tm_host_fail_table(0);
}

TEST(rt_without_movable_blocks)
{
	u32 t;

	start(16, 0, 1);
	CHECK_EQ(rt_do_alloc(&m, 0, 1, MOVABLE, &t), -ENFILE);
	CHECK_EQ(rt_do_free(&m, 0, TM_RT_HANDLE_MOVABLE), -ENOENT);
	allocated(0, 1, 0);
	compacted();
	rt_model_destroy(&m);
}

/* 255 and no more; a place that is left is the next one's. */
TEST(rt_as_many_clients_as_there_are_places)
{
	static struct tm_rt_client client[TM_RT_CLIENTS + 1];
	static const u32 leave[] = { 254, 0, 63, 64, 191, 192, 128 };
	tm_raw_lock_t lock = { 0 };
	static struct tm_rt rt;

	CHECK_EQ(tm_rt_init(&rt, &lock, 64, 0), 0);
	tm_host_lock(&lock);
	for (u32 i = 0; i < TM_RT_CLIENTS; i++) {
		CHECK_EQ(tm_rt_join(&rt, &client[i], 99), 0);
		CHECK_EQ(client[i].index, i);
	}
	tm_rt_check(&rt);
	CHECK_EQ(tm_rt_join(&rt, &client[255], 99), -ENOSPC);
	CHECK_EQ(tm_rt_join(&rt, &client[255], 100), -EINVAL);
	for (u32 i = 0; i < 7; i++) {
		CHECK(!tm_rt_leave(&rt, &client[leave[i]]));
		tm_rt_check(&rt);
		CHECK_EQ(tm_rt_join(&rt, &client[255], 3), 0);
		CHECK_EQ(client[255].index, leave[i]);
		CHECK_EQ(client[255].priority, 3);
		tm_rt_check(&rt);
		CHECK(!tm_rt_leave(&rt, &client[255]));
		CHECK_EQ(tm_rt_join(&rt, &client[leave[i]], 99), 0);
	}
	for (u32 i = 0; i < TM_RT_CLIENTS; i++)
		CHECK(!tm_rt_leave(&rt, &client[i]));
	tm_rt_check(&rt);
	tm_host_unlock(&lock);
	tm_rt_exit(&rt);
}

/* Each number as a handle, of each client: what is not named is not found. */
TEST(rt_any_number_as_a_handle)
{
	static const u32 far[] = { 0, 64, 65, 66, 1000, 1u << 26, 1u << 29,
				   1u << 30, 0x7fffffff, 0x80000000,
				   0x80000003, 0x80000004, 0x80010000,
				   0xffffffff };
	u32 t, u;

	start(64, 4, 3);
	CHECK_EQ(rt_do_reserve(&m, 0, 3, 5), 0);
	CHECK_EQ(rt_do_reserve(&m, 1, 1, 5), 0);
	t = allocated(0, 3, 0);
	u = allocated(1, 1, 0);
	freed(allocated(0, 2, RESERVED));
	allocated(0, 4, 0);
	allocated(0, 2, MOVABLE);
	allocated(2, 7, MOVABLE);
	for (u32 c = 0; c < 3; c++) {
		for (u32 i = 0; i < 80 + 14; i++) {
			u32 handle = i < 80 ? i : far[i - 80];
			bool mine = false;

			for (u32 k = 0; k < m.nr_things; k++)
				mine |= m.thing[k].kind != MODEL_NONE &&
					m.thing[k].client == c &&
					m.thing[k].handle == handle;
			if (!rt_do_pin(&m, c, handle))
				CHECK(mine);
			CHECK(rt_do_unpin(&m, c, handle) != -EINVAL);
			if (!mine)
				CHECK_EQ(rt_do_free(&m, c, handle), -ENOENT);
			rt_model_compare(&m);
		}
	}
	/* Each thing once, then no more. */
	freed(t);
	CHECK_EQ(rt_do_free(&m, 0, handle_of(t)), -ENOENT);
	freed(u);
	CHECK_EQ(rt_do_free(&m, 1, handle_of(u)), -ENOENT);
	rt_model_destroy(&m);
}

TEST(rt_arguments_that_cannot_be)
{
	u32 t;

	start(400, 4, 1);
	CHECK_EQ(rt_do_alloc(&m, 0, 0, 0, &t), -EINVAL);
	CHECK_EQ(rt_do_alloc(&m, 0, 401, 0, &t), -EINVAL);
	CHECK_EQ(rt_do_alloc(&m, 0, ~0u, 0, &t), -EINVAL);
	CHECK_EQ(rt_do_alloc(&m, 0, 129, MOVABLE, &t), -EINVAL);
	CHECK_EQ(rt_do_alloc(&m, 0, 1, MOVABLE | RESERVED, &t), -EINVAL);
	for (u32 bit = 2; bit < 32; bit++)
		CHECK_EQ(rt_do_alloc(&m, 0, 1, 1u << bit, &t), -EINVAL);
	CHECK_EQ(rt_do_alloc(&m, 0, 1, RESERVED, &t), -ENOSPC);
	CHECK_EQ(rt_do_reserve(&m, 0, 0, 1), -EINVAL);
	CHECK_EQ(rt_do_reserve(&m, 0, 1, 0), -EINVAL);
	CHECK_EQ(rt_do_reserve(&m, 0, 401, 1), -EINVAL);
	CHECK_EQ(rt_do_reserve(&m, 0, ~0u, ~0u), -EINVAL);
	CHECK_EQ(rt_do_reserve(&m, 0, 400, 1), -ENOSPC);
	CHECK_EQ(rt_do_reserve(&m, 0, 399, 1), -ENOSPC);
	CHECK_EQ(rt_do_reserve(&m, 0, 1, ~0u), -ENOSPC);
	/* 16 * 2^28 is 0 in 32 bits. */
	CHECK_EQ(rt_do_reserve(&m, 0, 16, 1u << 28), -ENOSPC);
	CHECK_EQ(rt_do_unreserve(&m, 0, 0), -ENOENT);
	CHECK_EQ(rt_do_unreserve(&m, 0, 7), -ENOENT);
	rt_model_compare(&m);
	CHECK_EQ(rt_do_reserve(&m, 0, 398, 1), 0);
	rt_model_compare(&m);
	t = allocated(0, 398, 0);
	CHECK_EQ(rt_do_alloc(&m, 0, 1, 0, &t), -ENOSPC);
	rt_model_destroy(&m);
	start(400, 4, 1);
	allocated(0, 128, MOVABLE);
	allocated(0, 272, 0);
	rt_model_destroy(&m);
}

TEST(rt_reservation_life)
{
	u32 t, items[5], extra;

	start(200, 4, 2);
	for (u32 i = 0; i < TM_RT_CLASSES; i++)
		CHECK_EQ(rt_do_reserve(&m, 0, i + 1, 1), 0);
	CHECK_EQ(rt_do_reserve(&m, 0, 17, 1), -ENOSPC);
	CHECK_EQ(rt_do_reserve(&m, 0, 16, 1), -EEXIST);
	CHECK_EQ(rt_do_reserve(&m, 1, 31, 1), -ENOSPC);
	CHECK_EQ(rt_do_reserve(&m, 1, 10, 1), 0);
	rt_model_compare(&m);
	for (u32 i = 0; i < TM_RT_CLASSES; i++)
		CHECK_EQ(rt_do_unreserve(&m, 0, i + 1), 0);
	rt_model_compare(&m);

	CHECK_EQ(rt_do_reserve(&m, 0, 4, 3), 0);
	CHECK_EQ(rt_do_reserve(&m, 0, 8, 2), 0);
	/* A size is served by the class of the smallest items that do, and by that only. */
	for (u32 i = 0; i < 3; i++) {
		items[i] = allocated(0, 4 - i, RESERVED);
		CHECK_EQ(m.thing[items[i]].granules, 4);
	}
	CHECK_EQ(rt_do_alloc(&m, 0, 4, RESERVED, &t), -ENOSPC);
	extra = allocated(0, 4, 0);
	CHECK_EQ(m.thing[extra].kind, MODEL_FIXED);
	items[3] = allocated(0, 5, 0);
	CHECK_EQ(m.thing[items[3]].granules, 8);
	items[4] = allocated(0, 8, 0);
	CHECK_EQ(rt_do_alloc(&m, 0, 8, RESERVED, &t), -ENOSPC);
	CHECK_EQ(rt_do_alloc(&m, 0, 9, RESERVED, &t), -ENOSPC);
	CHECK_EQ(rt_do_unreserve(&m, 0, 4), -EBUSY);
	/* Movable ones never come from it, nor does another client's. */
	freed(items[0]);
	t = allocated(0, 4, MOVABLE);
	CHECK_EQ(m.thing[t].kind, MODEL_MOVABLE);
	CHECK_EQ(rt_do_unreserve(&m, 1, 10), 0);
	t = allocated(1, 4, 0);
	CHECK_EQ(m.thing[t].kind, MODEL_FIXED);
	items[0] = allocated(0, 3, RESERVED);
	for (u32 i = 0; i < 5; i++)
		freed(items[i]);
	CHECK_EQ(rt_do_unreserve(&m, 0, 4), 0);
	rt_model_compare(&m);
	/* One with items goes as a whole when its client does. */
	items[3] = allocated(0, 5, 0);
	rt_model_destroy(&m);
}

/* Tags stay when a run goes: nobody finds an item by them, at no place of no later run. */
TEST(rt_old_tags_of_items)
{
	u32 old[24], nr = 0;

	start(128, 4, 2);
	CHECK_EQ(rt_do_reserve(&m, 0, 2, 12), 0);
	for (u32 i = 0; i < 12; i++)
		old[nr++] = handle_of(allocated(0, 2, RESERVED));
	while (rt_do_leave(&m, 0))
		;
	/* The place is another's, who reserves other and then the same sizes where they were. */
	CHECK_EQ(rt_do_join(&m, 0, 0), 0);
	for (u32 i = 0; i < nr; i++)
		CHECK_EQ(rt_do_free(&m, 0, old[i]), -ENOENT);
	CHECK_EQ(rt_do_reserve(&m, 0, 3, 8), 0);
	for (u32 used = 0; used <= 8; used++) {
		for (u32 i = 0; i < nr; i++) {
			int err = rt_do_pin(&m, 0, old[i]);

			CHECK(used || err == -ENOENT);
		}
		rt_model_compare(&m);
		if (used < 8)
			allocated(0, 3, RESERVED);
	}
	while (rt_do_leave(&m, 0))
		;
	CHECK_EQ(rt_do_join(&m, 0, 0), 0);
	CHECK_EQ(rt_do_reserve(&m, 0, 2, 12), 0);
	for (u32 used = 0; used <= 12; used++) {
		u32 found = 0;

		for (u32 i = 0; i < nr; i++)
			found += !rt_do_pin(&m, 0, old[i]);
		CHECK_EQ(found, used);
		for (u32 i = 0; i < nr; i++)
			CHECK_EQ(rt_do_pin(&m, 1, old[i]), -ENOENT);
		if (used < 12)
			allocated(0, 2, RESERVED);
	}
	/* And as a part of an ordinary block. */
	while (rt_do_leave(&m, 0))
		;
	CHECK_EQ(rt_do_join(&m, 0, 0), 0);
	allocated(0, 60, 0);
	for (u32 i = 0; i < nr; i++)
		CHECK_EQ(rt_do_free(&m, 0, old[i]), -ENOENT);
	rt_model_compare(&m);
	rt_model_destroy(&m);
}

/* A handle that was freed is nobody's until all other entries have been used. */
TEST(rt_entries_go_in_a_circle)
{
	u32 first, t;

	start(64, 7, 1);
	first = handle_of(allocated(0, 2, MOVABLE));
	t = rt_model_nth(&m, MODEL_MOVABLE, 0);
	freed(t);
	for (u32 i = 0; i < 6; i++) {
		t = allocated(0, 2, MOVABLE);
		CHECK(handle_of(t) != first);
		freed(t);
	}
	t = allocated(0, 2, MOVABLE);
	CHECK_EQ(handle_of(t), first);
	for (u32 i = 0; i < 6; i++)
		allocated(0, 2, MOVABLE);
	CHECK_EQ(rt_do_alloc(&m, 0, 2, MOVABLE, &t), -ENFILE);
	t = rt_model_nth(&m, MODEL_MOVABLE, 3);
	first = handle_of(t);
	freed(t);
	t = allocated(0, 2, MOVABLE);
	CHECK_EQ(handle_of(t), first);
	rt_model_destroy(&m);
}

TEST(rt_pins)
{
	u32 t, u, gap;

	start(64, 4, 1);
	gap = allocated(0, 5, 0);
	t = allocated(0, 5, MOVABLE);
	freed(gap);
	for (u32 i = 1; i < 65535; i++)
		CHECK_EQ(rt_do_pin(&m, 0, handle_of(t)), 0);
	CHECK_EQ(rt_do_pin(&m, 0, handle_of(t)), -EOVERFLOW);
	rt_model_compare(&m);
	compacted();
	CHECK_EQ(m.thing[t].start, 5);
	for (u32 i = 0; i < 65535; i++)
		CHECK_EQ(rt_do_unpin(&m, 0, handle_of(t)), 0);
	CHECK_EQ(rt_do_unpin(&m, 0, handle_of(t)), -EINVAL);
	CHECK_EQ(m.rt.frees, 2);
	compacted();
	CHECK_EQ(m.thing[t].start, 0);
	/* It may be freed while it is pinned. */
	CHECK_EQ(rt_do_pin(&m, 0, handle_of(t)), 0);
	freed(t);
	u = allocated(0, 3, 0);
	CHECK_EQ(rt_do_pin(&m, 0, handle_of(u)), 0);
	CHECK_EQ(rt_do_unpin(&m, 0, handle_of(u)), -ENOENT);
	rt_model_destroy(&m);
}

/* What is left between blocks that stay is one hole for each two of them. */
static void check_compact(void)
{
	u32 holes = 0;
	bool stays = true;

	for (u32 i = 0; i < m.size;) {
		if (m.gap[i]) {
			holes++;
			CHECK_EQ(holes, 1);
			i += m.gap[i];
			continue;
		}
		stays = m.thing[m.owner[i] - 1].kind != MODEL_MOVABLE ||
			m.thing[m.owner[i] - 1].pins;
		/* A hole is behind all that moves. */
		CHECK(stays || !holes);
		if (stays)
			holes = 0;
		i += m.thing[m.owner[i] - 1].granules;
	}
}

TEST(rt_compaction_leaves_one_hole)
{
	struct tm_round round;

	tm_for_each_round(&round, 60, 60) {
		u32 size = 64 + tm_rand_below(&round.rng, 900);
		bool pinned = round.nr % 2;

		start(size, 40, 2);
		for (u32 i = 0; i < round.steps; i++) {
			bool movable = tm_rand_below(&round.rng, 4);
			u32 t;

			if (rt_do_alloc(&m, i % 2,
					1 + tm_rand_below(&round.rng, 40),
					movable ? MOVABLE : 0, &t))
				continue;
			if (movable && !(pinned && tm_rand_one_in(&round.rng, 5)))
				CHECK_EQ(rt_do_unpin(&m, i % 2, handle_of(t)), 0);
		}
		for (u32 t = 0; t < m.nr_things; t++)
			if (m.thing[t].kind && tm_rand_one_in(&round.rng, 2))
				freed(t);
		compacted();
		check_compact();
		rt_model_destroy(&m);
	}
}

/* A block of TM_RT_STEP that has got a granule more is copied without that. */
TEST(rt_a_move_is_never_longer_than_a_step)
{
	u32 gap, t;

	start(2 + 129, 4, 1);
	gap = allocated(0, 2, 0);
	t = allocated(0, 128, MOVABLE);
	CHECK_EQ(m.thing[t].granules, 129);
	CHECK_EQ(m.thing[t].length, 128);
	CHECK_EQ(rt_do_unpin(&m, 0, handle_of(t)), 0);
	freed(gap);
	compacted();
	CHECK_EQ(m.thing[t].start, 0);
	CHECK_EQ(m.rt.moves, 1);
	rt_model_destroy(&m);
}

/* Each call that may come between the two halves of a move, then the second half. */
TEST(rt_during_a_move)
{
	for (u32 what = 0; what < 14; what++) {
		u32 left, gap, t, right, u;

		start(64, 3, 2);
		left = allocated(0, 3, 0);
		gap = allocated(0, what % 2 ? 4 : 9, 0);
		t = allocated(1, 5, MOVABLE);
		right = allocated(0, 3, 0);
		u = allocated(0, 2, MOVABLE);
		CHECK_EQ(rt_do_unpin(&m, 1, handle_of(t)), 0);
		CHECK_EQ(rt_do_unpin(&m, 0, handle_of(u)), 0);
		freed(gap);
		CHECK_EQ(rt_do_move_begin(&m), TM_RT_STEP_NOTHING);
		CHECK_EQ(rt_do_move_begin(&m), TM_RT_STEP_MOVE);
		rt_model_compare(&m);
		CHECK_EQ(rt_do_move_begin(&m), TM_RT_STEP_BUSY);
		CHECK_EQ(rt_do_pin(&m, 1, handle_of(t)), -EAGAIN);
		CHECK_EQ(rt_do_unpin(&m, 1, handle_of(t)), -EINVAL);
		rt_model_compare(&m);
		if (what / 2 == 1 || what / 2 == 4)
			freed(left);
		if (what / 2 == 2 || what / 2 == 4)
			freed(right);
		if (what / 2 == 3)
			freed(t);
		if (what / 2 == 4) {
			freed(t);
			/* Neither the hole nor the block can be had. */
			allocated(0, 2, 0);
			allocated(0, 3, MOVABLE);
		}
		if (what / 2 == 5) {
			while (rt_do_leave(&m, 1))
				;
			/* The place is free at once; the entry is not. */
			CHECK_EQ(rt_do_join(&m, 1, 1), 0);
			CHECK_EQ(rt_do_free(&m, 1, handle_of(t)), -ENOENT);
			allocated(1, 2, MOVABLE);
			CHECK_EQ(rt_do_alloc(&m, 1, 2, MOVABLE, &t), -ENFILE);
		}
		if (what / 2 == 6) {
			u32 n = rt_do_alloc(&m, 0, 60, 0, &left) ? 0 : 1;

			CHECK_EQ(n, 0);
			CHECK_EQ(rt_do_reserve(&m, 1, 2, 3), 0);
			rt_model_compare(&m);
		}
		rt_do_move_end(&m);
		rt_model_compare(&m);
		compacted();
		check_compact();
		rt_model_destroy(&m);
	}
}

/* Who waits. */

/* The arena is full; returns the blocks. */
static void full(u32 size, u32 each)
{
	u32 t;

	while (!rt_do_alloc(&m, 0, each, 0, &t))
		;
	CHECK_EQ(m.rt.heap.free, size % each > 1 ? size % each : 0);
}

TEST(rt_waiters_by_priority_then_in_order)
{
	static const u32 order[] = { 3, 5, 1, 4, 0, 2 };
	static const u32 client[] = { 1, 2, 1, 3, 2, 3 };

	start(64, 4, 4);
	full(64, 4);
	for (u32 w = 0; w < 6; w++) {
		rt_do_wait(&m, w, client[w], 4, 0);
		CHECK_EQ(rt_do_serve(&m), -1);
		rt_model_compare(&m);
	}
	for (u32 i = 0; i < 6; i++) {
		freed(rt_model_nth(&m, MODEL_FIXED, 0));
		CHECK_EQ(rt_do_serve(&m), order[i]);
		CHECK_EQ(m.thing[m.owner[m.waiter[order[i]].core.block.start] -
				 1].client, client[order[i]]);
		rt_model_compare(&m);
		CHECK_EQ(rt_do_serve(&m), -1);
		CHECK(rt_do_cancel(&m, order[i]));
	}
	rt_model_destroy(&m);
}

/* Each of 100 levels by itself, and with each other one. */
TEST(rt_every_priority)
{
	u32 t;

	start(16, 0, 3);
	t = allocated(0, 16, 0);
	for (u32 a = 0; a < 100; a++) {
		for (u32 b = 0; b < 100; b++) {
			m.client[1].priority = m.client[1].core.priority = a;
			m.client[2].priority = m.client[2].core.priority = b;
			rt_do_wait(&m, 1, 1, 16, 0);
			rt_do_wait(&m, 2, 2, 16, 0);
			CHECK_EQ(rt_do_serve(&m), -1);
			freed(t);
			CHECK_EQ(rt_do_serve(&m), a >= b ? 1 : 2);
			CHECK(rt_do_cancel(&m, a >= b ? 1 : 2));
			CHECK(!rt_do_cancel(&m, a >= b ? 2 : 1));
			t = rt_model_nth(&m, MODEL_FIXED, 0);
		}
	}
	rt_model_compare(&m);
	rt_model_destroy(&m);
}

/* Nobody of the same or a lower priority takes what a waiter will need; one of a higher does. */
TEST(rt_nobody_overtakes)
{
	u32 first, t;

	start(64, 4, 3);
	CHECK_EQ(rt_do_reserve(&m, 0, 1, 2), 0);
	first = allocated(0, 10, 0);
	allocated(0, 40, 0);
	rt_do_wait(&m, 0, 1, 30, 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	freed(first);
	CHECK_EQ(rt_do_serve(&m), -1);
	/* Room enough, but not for those that it might starve. */
	CHECK_EQ(rt_do_alloc(&m, 0, 5, 0, &t), -ENOSPC);
	CHECK_EQ(rt_do_alloc(&m, 1, 5, 0, &t), -ENOSPC);
	CHECK_EQ(rt_do_alloc(&m, 1, 5, MOVABLE, &t), -ENOSPC);
	CHECK_EQ(rt_do_reserve(&m, 1, 1, 1), -ENOSPC);
	CHECK_EQ(rt_do_alloc(&m, 0, 1, 0, &t), 0);
	CHECK_EQ(rt_do_alloc(&m, 2, 5, 0, &t), 0);
	CHECK_EQ(rt_do_reserve(&m, 2, 1, 1), 0);
	/* A small one behind it waits, too, and goes first once that gives up. */
	rt_do_wait(&m, 1, 0, 2, 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	CHECK(!rt_do_cancel(&m, 0));
	CHECK_EQ(rt_do_serve(&m), 1);
	rt_model_compare(&m);
	rt_model_destroy(&m);
}

/* Enough is free, but in pieces: it is told once for each thing that may have helped. */
TEST(rt_told_to_compact)
{
	u32 stays[2], moves, gaps[3];

	start(40, 4, 2);
	gaps[0] = allocated(0, 10, 0);
	stays[0] = allocated(0, 4, 0);
	gaps[1] = allocated(0, 8, 0);
	moves = allocated(0, 4, MOVABLE);
	gaps[2] = allocated(0, 10, 0);
	stays[1] = allocated(0, 4, 0);
	freed(gaps[0]);
	rt_do_wait(&m, 0, 1, 18, 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	freed(gaps[1]);
	CHECK_EQ(rt_do_serve(&m), 0);
	CHECK_EQ(m.waiter[0].core.state, TM_RT_WAITING);
	CHECK_EQ(rt_do_serve(&m), -1);
	compacted();
	CHECK_EQ(rt_do_serve(&m), -1);
	freed(gaps[2]);
	CHECK_EQ(rt_do_serve(&m), 0);
	CHECK_EQ(m.waiter[0].core.state, TM_RT_WAITING);
	compacted();
	CHECK_EQ(rt_do_serve(&m), -1);
	/* Pins of a fixed block change nothing, the last one of a movable does. */
	CHECK_EQ(rt_do_pin(&m, 0, handle_of(stays[0])), 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	CHECK_EQ(rt_do_pin(&m, 0, handle_of(moves)), 0);
	CHECK_EQ(rt_do_unpin(&m, 0, handle_of(moves)), 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	CHECK_EQ(rt_do_unpin(&m, 0, handle_of(moves)), 0);
	CHECK_EQ(rt_do_serve(&m), 0);
	compacted();
	CHECK_EQ(rt_do_serve(&m), 0);
	CHECK_EQ(m.waiter[0].core.state, TM_RT_SERVED);
	rt_model_compare(&m);
	rt_model_destroy(&m);
}

/* What is being moved to counts as used: who waits is told when that ends. */
TEST(rt_told_when_a_move_ends)
{
	u32 gap, t, last;

	start(30, 4, 2);
	gap = allocated(0, 10, 0);
	t = allocated(0, 5, MOVABLE);
	last = allocated(0, 5, 0);
	allocated(0, 10, 0);
	CHECK_EQ(rt_do_unpin(&m, 0, handle_of(t)), 0);
	freed(gap);
	CHECK_EQ(rt_do_move_begin(&m), TM_RT_STEP_MOVE);
	rt_do_wait(&m, 0, 1, 15, 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	freed(last);
	CHECK_EQ(rt_do_serve(&m), -1);
	rt_do_move_end(&m);
	CHECK_EQ(rt_do_serve(&m), 0);
	CHECK_EQ(m.waiter[0].core.state, TM_RT_SERVED);
	rt_model_destroy(&m);
}

/* Entries are short, not memory: it waits for one, and compaction is no help. */
TEST(rt_waits_for_an_entry)
{
	u32 t, big;

	start(64, 1, 3);
	big = allocated(0, 62, 0);
	rt_do_wait(&m, 0, 1, 5, MOVABLE);
	CHECK_EQ(rt_do_serve(&m), -1);
	/* A more urgent one takes the only entry meanwhile. */
	t = allocated(2, 2, MOVABLE);
	freed(big);
	CHECK_EQ(rt_do_serve(&m), -1);
	freed(t);
	CHECK_EQ(rt_do_serve(&m), 0);
	CHECK_EQ(m.waiter[0].core.state, TM_RT_SERVED);
	rt_model_compare(&m);
	rt_model_destroy(&m);
}

/* An item that is freed is for who waits for one of its class, wherever he is in the other queue. */
TEST(rt_items_serve_their_waiters)
{
	u32 items[2], t;

	start(64, 4, 3);
	CHECK_EQ(rt_do_reserve(&m, 0, 4, 2), 0);
	CHECK_EQ(rt_do_reserve(&m, 0, 9, 1), 0);
	items[0] = allocated(0, 4, 0);
	items[1] = allocated(0, 4, 0);
	full(64 - 10 - 11, 43);
	rt_do_wait(&m, 0, 2, 30, 0);
	rt_do_wait(&m, 1, 0, 3, 0);
	rt_do_wait(&m, 2, 0, 4, MOVABLE);
	rt_do_wait(&m, 3, 0, 1, 0);
	rt_do_wait(&m, 4, 1, 3, 0);
	CHECK_EQ(rt_do_serve(&m), -1);
	rt_model_compare(&m);
	freed(items[0]);
	CHECK_EQ(rt_do_alloc(&m, 0, 4, RESERVED, &t), -ENOSPC);
	CHECK_EQ(rt_do_serve(&m), 1);
	CHECK_EQ(rt_do_serve(&m), -1);
	freed(items[1]);
	CHECK(rt_do_cancel(&m, 1));
	CHECK_EQ(rt_do_serve(&m), 3);
	/* One is left when it begins to wait: it has been freed since it was refused. */
	t = rt_model_nth(&m, MODEL_ITEM, 0);
	freed(t);
	CHECK_EQ(rt_do_serve(&m), -1);
	rt_do_wait(&m, 5, 0, 4, 0);
	CHECK_EQ(m.waiter[5].core.state, TM_RT_SERVED);
	CHECK_EQ(rt_do_serve(&m), 5);
	rt_model_compare(&m);
	/* The heap serves it first: it waits for no item any more. */
	rt_do_wait(&m, 6, 0, 2, 0);
	rt_do_wait(&m, 7, 0, 2, 0);
	CHECK(!rt_do_cancel(&m, 0));
	CHECK(!rt_do_cancel(&m, 2));
	CHECK(!rt_do_cancel(&m, 4));
	freed(rt_model_nth(&m, MODEL_FIXED, 0));
	CHECK_EQ(rt_do_serve(&m), 6);
	CHECK(!rt_do_cancel(&m, 7));
	freed(rt_model_nth(&m, MODEL_ITEM, 0));
	CHECK_EQ(rt_do_serve(&m), -1);
	CHECK_EQ(rt_do_alloc(&m, 0, 4, RESERVED, &t), 0);
	rt_model_compare(&m);
	rt_model_destroy(&m);
}

/* Served before it is cancelled: the block is its client's, and the next one gets on. */
TEST(rt_cancel_races)
{
	for (u32 served = 0; served < 2; served++) {
		u32 t, w;

		start(32, 4, 2);
		t = allocated(0, 20, 0);
		for (w = 0; w < 3; w++)
			rt_do_wait(&m, w, 1, 14, 0);
		CHECK_EQ(rt_do_serve(&m), -1);
		if (served) {
			freed(t);
			CHECK_EQ(rt_do_serve(&m), 0);
			CHECK(rt_do_cancel(&m, 0));
			CHECK_EQ(m.client[1].core.nr_blocks, 1);
		} else {
			CHECK(!rt_do_cancel(&m, 0));
			freed(t);
		}
		CHECK_EQ(rt_do_serve(&m), 1);
		rt_model_compare(&m);
		/* The middle one and the last one of a ring of three. */
		for (w = 3; w < 6; w++)
			rt_do_wait(&m, w, 1, 30, 0);
		CHECK(!rt_do_cancel(&m, 4));
		rt_model_compare(&m);
		CHECK(!rt_do_cancel(&m, 5));
		rt_model_compare(&m);
		rt_model_destroy(&m);
	}
}

/* What is promised to a reservation. */

/* Fill the heap as badly as can be, by a client that may be the reserver itself. */
static void fragment(u32 c, struct tm_rng *rng)
{
	u32 t, n = 0;

	while (!rt_do_alloc(&m, c, 2, 0, &t))
		n++;
	for (t = 0; t < m.nr_things; t++)
		if (m.thing[t].kind == MODEL_FIXED &&
		    (rng ? tm_rand_one_in(rng, 2) : n++ % 2))
			CHECK_EQ(rt_do_free(&m, m.thing[t].client,
					    handle_of(t)), 0);
}

TEST(rt_reserved_whatever_happens)
{
	struct tm_round round;

	tm_for_each_round(&round, 40, 200) {
		struct tm_rng *rng = &round.rng;
		u32 sizes[5], t;
		u32 size = 256 + tm_rand_below(rng, 700);

		start(size, 20, 3);
		fragment(0, round.nr % 4 ? rng : NULL);
		while (rt_do_leave(&m, 0))
			;
		CHECK_EQ(rt_do_join(&m, 0, 0), 0);
		for (u32 i = 0; i < 5; i++) {
			sizes[i] = 3 * i + 1 + tm_rand_below(rng, 3);
			CHECK_EQ(rt_do_reserve(&m, 1, sizes[i],
					       1 + tm_rand_below(rng, 4)), 0);
		}
		fragment(round.nr % 3, round.nr % 2 ? rng : NULL);
		rt_do_wait(&m, 0, 2, size, 0);
		for (u32 s = 0; s < round.steps; s++) {
			u32 i = tm_rand_below(rng, 5), want;
			int victim;

			/* The adversary: all else that there is. */
			switch (tm_rand_below(rng, 6)) {
			case 0:
				(void)rt_do_alloc(&m, 2 * (s % 2), 1 + s % 9,
						  s % 3 ? MOVABLE : 0, &t);
				break;
			case 1:
				(void)rt_do_alloc(&m, 1, size / 2, 0, &t);
				break;
			case 2:
				if (!m.moving)
					(void)rt_do_move_begin(&m);
				else
					rt_do_move_end(&m);
				break;
			case 3:
				(void)rt_do_reserve(&m, 2, 1 + s % 5, 2);
				break;
			case 4:
				(void)rt_do_unreserve(&m, 2, 1 + s % 5);
				break;
			default:
				rt_do_serve(&m);
			}
			want = i ? sizes[i - 1] + 1 : 1;
			want += tm_rand_below(rng, sizes[i] - want + 1);
			if (rt_model_left(&m, 1, want)) {
				CHECK_EQ(rt_do_alloc(&m, 1, want, RESERVED, &t),
					 0);
				CHECK_EQ(m.thing[t].kind, MODEL_ITEM);
			} else {
				CHECK_EQ(rt_do_alloc(&m, 1, want, RESERVED, &t),
					 -ENOSPC);
			}
			victim = rt_model_nth(&m, MODEL_ITEM,
					      tm_rand_below(rng, 16));
			if (victim >= 0)
				CHECK_EQ(rt_do_free(&m, m.thing[victim].client,
						    handle_of((u32)victim)), 0);
			rt_model_compare(&m);
		}
		rt_model_destroy(&m);
	}
}

/* Everything at random. */

enum op {
	OP_JOIN,
	OP_LEAVE,
	OP_ALLOC,
	OP_ALLOC_MOVABLE,
	OP_ALLOC_RESERVED,
	OP_FREE,
	OP_FREE_BAD,
	OP_PIN,
	OP_UNPIN,
	OP_RESERVE,
	OP_UNRESERVE,
	OP_WAIT,
	OP_CANCEL,
	OP_SERVE,
	OP_MOVE_BEGIN,
	OP_MOVE_END,
	OPS,
};

static const u32 weights[OPS] = {
	[OP_JOIN] = 2, [OP_LEAVE] = 1, [OP_ALLOC] = 30, [OP_ALLOC_MOVABLE] = 30,
	[OP_ALLOC_RESERVED] = 8, [OP_FREE] = 45, [OP_FREE_BAD] = 8,
	[OP_PIN] = 10, [OP_UNPIN] = 30, [OP_RESERVE] = 4, [OP_UNRESERVE] = 4,
	[OP_WAIT] = 12, [OP_CANCEL] = 3, [OP_SERVE] = 30, [OP_MOVE_BEGIN] = 30,
	[OP_MOVE_END] = 30,
};

static u32 some_size(struct tm_rng *rng)
{
	static const u32 most[] = { 3, 10, 40, 130, 2048 };
	u32 n = most[tm_rand_below(rng, 5)];

	return tm_rand_below(rng, n < m.size + 2 ? n : m.size + 2);
}

static bool client_waits(u32 c)
{
	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		if (m.waiter[w].waiting && m.waiter[w].client == c)
			return true;
	return false;
}

/* Any handle there is, or was, or never will be. */
static u32 some_handle(struct tm_rng *rng)
{
	if (tm_rand_one_in(rng, 4))
		return (u32)tm_rand(rng);
	if (tm_rand_one_in(rng, 2))
		return TM_RT_HANDLE_MOVABLE | tm_rand_below(rng, 84);
	return tm_rand_below(rng, m.size + 3);
}

static int some_thing(struct tm_rng *rng)
{
	static const u32 kinds[] = { MODEL_FIXED, MODEL_MOVABLE, MODEL_ITEM };
	u32 kind = kinds[tm_rand_below(rng, 3)];
	u32 n = rt_model_count(&m, kind);

	return n ? rt_model_nth(&m, kind, tm_rand_below(rng, n)) : -1;
}

static void random_wait(struct tm_rng *rng, u32 c)
{
	u32 size = some_size(rng), w = tm_rand_below(rng, RT_MODEL_WAITERS), t;
	u32 flags = tm_rand_one_in(rng, 3) && size <= TM_RT_STEP ? MOVABLE : 0;

	/* As who has time does: only after a refusal. */
	if (!m.waiter[w].waiting &&
	    rt_do_alloc(&m, c, size, flags, &t) == -ENOSPC) {
		rt_do_wait(&m, w, c, size, flags);
		rt_do_serve(&m);
	}
}

static void random_leave(struct tm_rng *rng, u32 c)
{
	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		if (m.waiter[w].waiting && m.waiter[w].client == c)
			CHECK(!rt_do_cancel(&m, w));
	while (rt_do_leave(&m, c))
		if (tm_rand_one_in(rng, 4)) {
			rt_do_serve(&m);
			rt_model_compare(&m);
		}
}

static void random_op(struct tm_rng *rng)
{
	u32 c = tm_rand_below(rng, RT_MODEL_CLIENTS), t;
	enum op op = tm_rand_weighted(rng, weights, OPS);
	int thing = some_thing(rng);

	if (op == OP_MOVE_BEGIN) {
		rt_do_move_begin(&m);
		return;
	}
	if (op == OP_SERVE) {
		rt_do_serve(&m);
		return;
	}
	if (op == OP_MOVE_END) {
		if (m.moving)
			rt_do_move_end(&m);
		return;
	}
	if (op == OP_CANCEL) {
		u32 w = tm_rand_below(rng, RT_MODEL_WAITERS);

		if (m.waiter[w].waiting)
			CHECK(!rt_do_cancel(&m, w));
		return;
	}
	if (!m.client[c].joined || op == OP_JOIN) {
		if (!m.client[c].joined)
			rt_do_join(&m, c, tm_rand_below(rng, 3) * 32 +
					  tm_rand_below(rng, 40));
		return;
	}
	switch (op) {
	case OP_LEAVE:
		if (tm_rand_one_in(rng, 3))
			random_leave(rng, c);
		break;
	case OP_ALLOC:
		(void)rt_do_alloc(&m, c, some_size(rng), 0, &t);
		break;
	case OP_ALLOC_MOVABLE:
		if (!rt_do_alloc(&m, c, some_size(rng), MOVABLE, &t) &&
		    tm_rand_one_in(rng, 2))
			CHECK_EQ(rt_do_unpin(&m, c, handle_of(t)), 0);
		break;
	case OP_ALLOC_RESERVED:
		(void)rt_do_alloc(&m, c, some_size(rng), RESERVED, &t);
		break;
	case OP_FREE:
		if (thing >= 0)
			CHECK_EQ(rt_do_free(&m, m.thing[thing].client,
					    handle_of((u32)thing)), 0);
		break;
	case OP_FREE_BAD:
		(void)rt_do_free(&m, c, some_handle(rng));
		break;
	case OP_PIN:
		if (thing >= 0)
			c = m.thing[thing].client;
		(void)rt_do_pin(&m, c, thing < 0 ? some_handle(rng) :
						   handle_of((u32)thing));
		break;
	case OP_UNPIN:
		if (thing >= 0)
			c = m.thing[thing].client;
		(void)rt_do_unpin(&m, c, thing < 0 ? some_handle(rng) :
						     handle_of((u32)thing));
		break;
	case OP_RESERVE:
		if (!client_waits(c))
			(void)rt_do_reserve(&m, c, tm_rand_below(rng, 9),
					    tm_rand_below(rng, 12));
		break;
	case OP_UNRESERVE:
		(void)rt_do_unreserve(&m, c, tm_rand_below(rng, 9));
		break;
	default:
		random_wait(rng, c);
	}
}

TEST(rt_random)
{
	static const u32 sizes[] = { 2, 7, 32, 65, 200, 513, 1024, 2047 };
	struct tm_round round;

	tm_for_each_round(&round, 24, 3000) {
		u32 size = sizes[round.nr % 8];

		rt_model_init(&m, size, tm_rand_below(&round.rng, 4) ?
					tm_rand_below(&round.rng, 80) : 3);
		for (u32 i = 0; i < round.steps; i++) {
			random_op(&round.rng);
			/* Who has served, serves on; then nobody sleeps who need not. */
			while (rt_do_serve(&m) >= 0)
				;
			CHECK(!rt_model_could_serve(&m));
			if (size < 600 || tm_rand_one_in(&round.rng, 4))
				rt_model_compare(&m);
		}
		rt_model_destroy(&m);
	}
}

/* Every sequence of calls up to a length, on an arena of ten granules. */

#define TINY_OPS	16

static struct rt_snapshot snapshots[8];
static u64 sequences;

/* Make the call if it says anything; whether it did. */
static bool tiny_op(u32 op)
{
	int thing;
	u32 t;

	switch (op) {
	case 0:
		return !rt_do_alloc(&m, 0, 1, 0, &t);
	case 1:
		return !rt_do_alloc(&m, 1, 3, 0, &t);
	case 2:
		return !rt_do_alloc(&m, 0, 3, MOVABLE, &t);
	case 3:
		return !rt_do_alloc(&m, 1, 2, MOVABLE, &t);
	case 4:
		return !rt_do_reserve(&m, 0, 1, 3);
	case 5:
		return !rt_do_unreserve(&m, 0, 1);
	case 6:
	case 7:
	case 8:
		/* The oldest of each kind. */
		thing = rt_model_nth(&m, op == 6 ? MODEL_FIXED :
				     op == 7 ? MODEL_MOVABLE : MODEL_ITEM, 0);
		return thing >= 0 &&
		       !rt_do_free(&m, m.thing[thing].client,
				   handle_of((u32)thing));
	case 9:
		/* And the second of the movable. */
		thing = rt_model_nth(&m, MODEL_MOVABLE, 1);
		return thing >= 0 &&
		       !rt_do_free(&m, m.thing[thing].client,
				   handle_of((u32)thing));
	case 10:
	case 11:
		thing = rt_model_nth(&m, MODEL_MOVABLE, op - 10);
		if (thing < 0)
			return false;
		t = m.thing[thing].pins;
		return !(t ? rt_do_unpin(&m, m.thing[thing].client,
					 handle_of((u32)thing)) :
			     rt_do_pin(&m, m.thing[thing].client,
				       handle_of((u32)thing)));
	case 12:
		if (m.moving)
			rt_do_move_end(&m);
		else
			rt_do_move_begin(&m);
		return true;
	case 13:
		if (m.waiter[0].waiting)
			return false;
		rt_do_wait(&m, 0, 0, 6, 0);
		return true;
	case 14:
		if (!m.waiter[0].waiting)
			return false;
		CHECK(!rt_do_cancel(&m, 0));
		return true;
	default:
		return rt_do_serve(&m) >= 0;
	}
}

static void every_sequence(u32 depth)
{
	struct rt_snapshot *s = &snapshots[depth];

	if (!depth)
		return;
	rt_model_save(&m, s);
	for (u32 op = 0; op < TINY_OPS; op++) {
		bool changed = tiny_op(op);

		sequences++;
		rt_model_compare(&m);
		if (changed)
			every_sequence(depth - 1);
		rt_model_restore(&m, s);
	}
}

/* From an empty arena, from one with holes between movable blocks, and from within a move. */
TEST(rt_every_short_sequence)
{
	for (u32 from = 0; from < 3; from++) {
		u32 t;

		start(from ? 14 : 10, 2, 2);
		if (from) {
			t = allocated(0, 2, 0);
			CHECK_EQ(rt_do_unpin(&m, 0,
					     handle_of(allocated(0, 3, MOVABLE))),
				 0);
			allocated(1, 2, 0);
			CHECK_EQ(rt_do_unpin(&m, 1,
					     handle_of(allocated(1, 2, MOVABLE))),
				 0);
			freed(t);
		}
		if (from == 2)
			CHECK_EQ(rt_do_move_begin(&m), TM_RT_STEP_MOVE);
		sequences = 0;
		every_sequence(5);
		CHECK(sequences > 20000);
		rt_model_destroy(&m);
	}
}

/* An arena with one of each thing, and a move under way. */
static void one_of_each(void)
{
	u32 gap, t;

	start(64, 6, 3);
	CHECK_EQ(rt_do_reserve(&m, 0, 2, 4), 0);
	t = allocated(0, 2, 0);
	allocated(0, 2, 0);
	freed(t);
	allocated(0, 3, 0);
	gap = allocated(1, 4, 0);
	t = allocated(1, 5, MOVABLE);
	allocated(1, 5, MOVABLE);
	CHECK_EQ(rt_do_unpin(&m, 1, handle_of(t)), 0);
	freed(gap);
	rt_do_wait(&m, 0, 2, 60, 0);
	rt_do_wait(&m, 1, 2, 60, 0);
	while (rt_do_move_begin(&m) != TM_RT_STEP_MOVE)
		;
	rt_model_compare(&m);
}

/* What the check is there to find: each thing that can be wrong, by itself. */
TEST(rt_check_finds)
{
	static struct rt_snapshot good;
	struct tm_rt *rt = &m.rt;
	struct tm_rt_client *a, *b;
	struct tm_heap_node *node;
	struct tm_rt_class *class;
	u32 run, item, spare, block;

	one_of_each();
	rt_model_save(&m, &good);
	a = &m.client[0].core;
	b = &m.client[1].core;
	node = rt->heap.node;
	class = &a->class[0];
	run = class->run;
	spare = class->free;
	item = run + 1 + run + 3 - spare;
	block = b->blocks;
	for (u32 what = 0; what < 51; what++) {
		u32 warned, last = block + 4, entry = node[last].tag & 0xffff;

		switch (what) {
		case 0: rt->frees++; rt->moving = false; break;
		case 1: rt->nr_movable++; break;
		case 2: rt->unused = 1000; break;
		case 3: rt->movable[rt->unused].start = rt->unused; break;
		case 4: rt->movable[rt->unused].start = 1000; break;
		case 5: rt->movable[rt->unused].start = entry; break;
		case 6: rt->movable[0].pins = 1; break;
		case 7: rt->movable[entry].state = TM_RT_UNUSED; break;
		case 8: rt->movable[entry].state = TM_RT_MOVING; break;
		case 9: rt->movable[entry].state = TM_RT_ABANDONED; break;
		case 10: rt->movable[entry].start++; break;
		case 11: rt->movable[entry].client = 0; break;
		case 12: node[last].tag ^= 1u << 16; break;
		case 13: node[last].tag |= 100; break;
		case 14: node[last].tag |= 3u << 24; break;
		case 15: node[last].tag ^= 3u << 24; break;
		case 16: node[last].tag &= ~(3u << 24); break;
		case 17: node[last].link = 5; break;
		case 18: node[block].link = block; break;
		case 19: node[block].link = 2; break;
		case 20: b->blocks = TM_HEAP_NONE; break;
		case 21: b->nr_blocks++; break;
		case 22: b->used++; break;
		case 23: a->reserved--; break;
		case 24: class->used++; break;
		case 25: class->fresh = 5; break;
		case 26: class->count = 1; break;
		case 27: class->count = 6; break;
		case 28: class->size = 0; break;
		case 29: class->run = block; break;
		case 30: class->free = TM_HEAP_NONE; break;
		case 31: class->free = 1000; break;
		case 32: class->free = item; break;
		case 33: class->free = spare + 1; break;
		case 34: node[spare].link = spare; break;
		case 35: node[spare].tag |= 1u << 4; break;
		case 36: node[item].tag = node[spare].tag; break;
		case 37: a->sizes[1] = 1; break;
		case 38: rt->places[0] |= 64; break;
		case 39: rt->places[3] |= 1ull << 62; break;
		case 40: a->index = 1; break;
		case 41: rt->levels[1] |= 1; break;
		case 42: rt->levels[0] = 0; break;
		case 43: m.waiter[0].core.state = TM_RT_SERVED; break;
		case 44: m.waiter[0].core.priority--; break;
		case 45: m.waiter[1].core.prev[0] = &m.waiter[1].core; break;
		case 46: node[run + 11 - 1].tag |= 16; break;
		case 47: a->order[3] = 2; break;
		case 48: a->nr_classes = 0; break;
		case 49: class->waiting = &m.waiter[0].core;
			 m.waiter[0].core.next[1] = &m.waiter[0].core;
			 m.waiter[0].core.prev[1] = &m.waiter[0].core; break;
		default: a->sizes[0] = 3; break;
		}
		tm_host_expect_warnings(1000);
		tm_rt_check(rt);
		warned = 1000 - tm_host_missing_warnings();
		if (!warned)
			tm_test_fail(__FILE__, __LINE__, "%u is not found",
				     what);
		rt_model_restore(&m, &good);
		rt_model_compare(&m);
	}
	rt_model_destroy(&m);
}

/* Calls without the lock. */
static void unlocked(void *arg)
{
	static struct tm_rt_client other;
	struct tm_rt_client *client = &m.client[0].core;
	struct tm_rt_waiter w = { .client = client, .size = 1 };
	struct tm_rt_block block;
	struct tm_rt_move move = { 0 };
	int got = 0;

	switch (*(u32 *)arg) {
	case 0: got = tm_rt_join(&m.rt, &other, 0); break;
	case 1: got = tm_rt_leave(&m.rt, client); break;
	case 2: got = tm_rt_reserve(&m.rt, client, 0, 0); break;
	case 3: got = tm_rt_unreserve(&m.rt, client, 0); break;
	case 4: got = tm_rt_alloc(&m.rt, client, 0, 0, &block); break;
	case 5: got = tm_rt_free(&m.rt, client, 0); break;
	case 6: got = tm_rt_pin(&m.rt, client, 0, &block); break;
	case 7: got = tm_rt_unpin(&m.rt, client, 0); break;
	case 8: tm_rt_wait(&m.rt, &w); break;
	case 9: got = tm_rt_cancel(&m.rt, &w); break;
	case 10: tm_rt_serve(&m.rt); break;
	case 11: tm_rt_move_begin(&m.rt, &move); break;
	case 12: tm_rt_move_end(&m.rt, &move); break;
	default: tm_rt_check(&m.rt); break;
	}
	(void)got;
}

TEST(rt_calls_need_the_lock)
{
	start(16, 2, 1);
	tm_host_unlock(&m.lock);
	for (u32 call = 0; call < 14; call++)
		tm_check_aborts("a call of rt.c", unlocked, &call);
	tm_host_lock(&m.lock);
	rt_model_destroy(&m);
}

/* Steps: the worst of each call, by each of the cases that make it long. */

#define STEP_SIZES	8

static struct {
	u32 alloc, item, free, free_item, reserve, unreserve, join, leave;
	u32 pin, unpin, wait, cancel, serve, begin, end;
} worst;

static tm_raw_lock_t steps_lock;
static struct tm_rt steps_rt;
static struct tm_rt_client steps_client[3];

#define COUNT(what, call)						\
	({								\
		u64 before_ = tm_host_steps;				\
		__auto_type result_ = (call);				\
		u32 steps_ = (u32)(tm_host_steps - before_);		\
									\
		if (worst.what < steps_)				\
			worst.what = steps_;				\
		result_;						\
	})

/* Blocks of @n granules until the arena is full. Return: how many. */
static u32 fill(u32 *handle, u32 n, u32 flags)
{
	struct tm_rt_block block;
	u32 nr = 0;

	while (!COUNT(alloc, tm_rt_alloc(&steps_rt, &steps_client[nr % 3], n,
					 flags, &block))) {
		if (flags)
			CHECK_EQ(COUNT(unpin, tm_rt_unpin(&steps_rt,
							  &steps_client[nr % 3],
							  block.handle)), 0);
		handle[nr++] = block.handle;
	}
	return nr;
}

static void empty(const u32 *handle, u32 nr, u32 from, u32 by)
{
	for (u32 i = from; i < nr; i += by)
		CHECK_EQ(COUNT(free, tm_rt_free(&steps_rt, &steps_client[i % 3],
						handle[i])), 0);
}

static void compact_steps(void)
{
	struct tm_rt_move move;
	u32 rounds = 0;

	while (rounds < 2) {
		enum tm_rt_step step = COUNT(begin,
					     tm_rt_move_begin(&steps_rt, &move));

		if (step == TM_RT_STEP_MOVE)
			COUNT(end, (tm_rt_move_end(&steps_rt, &move), 0));
		rounds += step == TM_RT_STEP_ROUND;
	}
}

/* A full ring, left from its middle and its ends, and served from a hole between others. */
static void wait_steps(u32 *handle, u32 nr)
{
	static struct tm_rt_waiter w[5];

	for (u32 i = 0; i < 5; i++) {
		w[i] = (struct tm_rt_waiter){
			.client = &steps_client[0],
			.size = 2,
			.flags = i % 2 ? MOVABLE : 0,
		};
		COUNT(wait, (tm_rt_wait(&steps_rt, &w[i]), 0));
		COUNT(serve, (tm_rt_serve(&steps_rt), 0));
	}
	(void)COUNT(cancel, tm_rt_cancel(&steps_rt, &w[2]));
	empty(handle, nr, 0, 3);
	while (COUNT(serve, tm_rt_serve(&steps_rt)))
		;
	for (u32 i = 0; i < 5; i++)
		CHECK(i == 2 || w[i].state == TM_RT_SERVED);
}

static void reserve_steps(void)
{
	struct tm_rt_client *client = &steps_client[0];
	struct tm_rt_block block[8];
	struct tm_rt_waiter w[3];

	/* All places, and one for which there is none. */
	for (u32 i = 0; i <= TM_RT_CLASSES; i++)
		(void)COUNT(reserve, tm_rt_reserve(&steps_rt, client, 17 - i, 8));
	for (u32 k = 0; k < 2; k++) {
		for (u32 i = 0; i < 8; i++)
			CHECK_EQ(COUNT(item, tm_rt_alloc(&steps_rt, client, 1,
							 i % 2 ? RESERVED : 0,
							 &block[i])), 0);
		/* Three in a ring, of which one gives up and two get what is freed. */
		for (u32 i = 0; i < 3; i++) {
			w[i] = (struct tm_rt_waiter){
				.client = client,
				.size = 1,
			};
			COUNT(wait, (tm_rt_wait(&steps_rt, &w[i]), 0));
		}
		CHECK(!COUNT(cancel, tm_rt_cancel(&steps_rt, &w[1])));
		for (u32 i = 0; i < 8; i++)
			CHECK_EQ(COUNT(free_item,
				       tm_rt_free(&steps_rt, client,
						  block[i].handle)), 0);
		for (u32 i = 0; i < 3; i += 2) {
			CHECK(COUNT(serve, tm_rt_serve(&steps_rt)) == &w[i]);
			CHECK_EQ(tm_rt_free(&steps_rt, client,
					    w[i].block.handle), 0);
		}
	}
	for (u32 i = 0; i <= TM_RT_CLASSES; i++)
		(void)COUNT(unreserve, tm_rt_unreserve(&steps_rt, client,
						       1 + i));
}

static void everybody_leaves(void)
{
	for (u32 c = 0; c < 3; c++) {
		while (COUNT(leave, tm_rt_leave(&steps_rt, &steps_client[c])))
			;
		CHECK_EQ(COUNT(join, tm_rt_join(&steps_rt, &steps_client[c],
						c)), 0);
	}
}

static void steps_of(u32 size)
{
	u32 *handle = malloc(size * sizeof(*handle)), nr;
	static const u32 lengths[] = { 2, 3, 5 };

	CHECK(handle);
	CHECK_EQ(tm_rt_init(&steps_rt, &steps_lock, size, TM_RT_MOVABLE), 0);
	tm_host_lock(&steps_lock);
	for (u32 c = 0; c < 3; c++)
		CHECK_EQ(COUNT(join, tm_rt_join(&steps_rt, &steps_client[c], c)),
			 0);
	/* Full of blocks of one size, every second or third free, then those between them. */
	for (u32 i = 0; i < 3; i++) {
		for (u32 flags = 0; flags < 2; flags++) {
			nr = fill(handle, lengths[i], flags);
			empty(handle, nr, 0, 2);
			compact_steps();
			for (u32 k = 0; k < nr; k++) {
				struct tm_rt_block block;

				(void)COUNT(pin, tm_rt_pin(&steps_rt,
							   &steps_client[k % 3],
							   handle[k], &block));
			}
			empty(handle, nr, 1, 2);
			CHECK_EQ(steps_rt.heap.nr_free, 1);
		}
		nr = fill(handle, lengths[i], 0);
		wait_steps(handle, nr);
		everybody_leaves();
		/* Each of theirs is between two holes. */
		for (u32 flags = 0; flags < 2; flags++) {
			nr = fill(handle, lengths[i], flags);
			empty(handle, nr, 0, 2);
			everybody_leaves();
		}
	}
	reserve_steps();
	tm_rt_check(&steps_rt);
	tm_host_unlock(&steps_lock);
	tm_rt_exit(&steps_rt);
	free(handle);
}

TEST(rt_steps_do_not_grow_with_the_arena)
{
	static const u32 sizes[STEP_SIZES] = {
		1 << 6, 1 << 8, 1000, 1 << 12, 1 << 14, 1 << 16, 77777, 1 << 20,
	};
	u32 small[15], *now = (u32 *)&worst;

	steps_of(1 << 12);
	memcpy(small, &worst, sizeof(small));
	for (u32 i = 0; i < STEP_SIZES; i++) {
		memset(&worst, 0, sizeof(worst));
		steps_of(sizes[i]);
		for (u32 k = 0; k < 15; k++) {
			/* One that is too small for all cases may take less. */
			if (sizes[i] < 1 << 12)
				CHECK(now[k] <= small[k]);
			else
				CHECK_EQ(now[k], small[k]);
		}
	}
	CHECK(worst.alloc <= 26 && worst.item <= 8);
	CHECK(worst.free <= 35 && worst.free_item <= 14);
	CHECK(worst.reserve <= 37 && worst.unreserve <= 43);
	CHECK(worst.join <= 4 && worst.leave <= 38);
	CHECK(worst.pin <= 5 && worst.unpin <= 1);
	CHECK(worst.wait <= 8 && worst.cancel <= 4 && worst.serve <= 26);
	CHECK(worst.begin <= 12 && worst.end <= 32);
}
