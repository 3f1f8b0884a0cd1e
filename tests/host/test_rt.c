// SPDX-License-Identifier: GPL-2.0-only
#include "core/rt.h"
#include "harness.h"

static tm_raw_lock_t lock;
static struct tm_rt rt;

/* A life of an arena by hand. */
TEST(rt_smoke)
{
	struct tm_rt_client a, b;
	struct tm_rt_block block, other, item;
	struct tm_rt_waiter w;
	struct tm_rt_move move;
	u32 rounds = 0;

	CHECK_EQ(tm_rt_init(&rt, &lock, 64, 4), 0);
	tm_host_lock(&lock);
	CHECK_EQ(tm_rt_join(&rt, &a, 0), 0);
	CHECK_EQ(tm_rt_join(&rt, &b, 5), 0);
	CHECK_EQ(tm_rt_reserve(&rt, &a, 3, 4), 0);
	tm_rt_check(&rt);
	CHECK_EQ(tm_rt_alloc(&rt, &a, 2, 0, &item), 0);
	tm_rt_check(&rt);
	CHECK_EQ(tm_rt_alloc(&rt, &b, 10, TM_RT_ALLOC_MOVABLE, &block), 0);
	CHECK_EQ(tm_rt_alloc(&rt, &b, 10, TM_RT_ALLOC_MOVABLE, &other), 0);
	tm_rt_check(&rt);
	CHECK_EQ(tm_rt_free(&rt, &a, block.handle), -ENOENT);
	CHECK_EQ(tm_rt_free(&rt, &b, block.handle), 0);
	CHECK_EQ(tm_rt_free(&rt, &b, block.handle), -ENOENT);
	tm_rt_check(&rt);
	CHECK_EQ(tm_rt_alloc(&rt, &a, 35, 0, &block), -ENOSPC);
	w = (struct tm_rt_waiter){ .client = &a, .size = 35 };
	tm_rt_wait(&rt, &w);
	CHECK(tm_rt_serve(&rt) == &w);
	CHECK_EQ(w.state, TM_RT_WAITING);
	CHECK_EQ(tm_rt_unpin(&rt, &b, other.handle), 0);
	CHECK(tm_rt_serve(&rt) == &w);
	while (w.state == TM_RT_WAITING) {
		enum tm_rt_step step = tm_rt_move_begin(&rt, &move);

		tm_rt_check(&rt);
		if (step == TM_RT_STEP_MOVE) {
			CHECK_EQ(tm_rt_pin(&rt, &b, other.handle, &block),
				 -EAGAIN);
			tm_rt_move_end(&rt, &move);
			tm_rt_serve(&rt);
		}
		rounds += step == TM_RT_STEP_ROUND;
		CHECK(rounds < 2);
		tm_rt_check(&rt);
	}
	CHECK(tm_rt_cancel(&rt, &w));
	CHECK_EQ(tm_rt_free(&rt, &a, item.handle), 0);
	CHECK_EQ(tm_rt_free(&rt, &a, item.handle), -ENOENT);
	CHECK_EQ(tm_rt_unreserve(&rt, &a, 3), 0);
	while (tm_rt_leave(&rt, &a))
		tm_rt_check(&rt);
	while (tm_rt_leave(&rt, &b))
		tm_rt_check(&rt);
	tm_rt_check(&rt);
	CHECK_EQ(rt.heap.free, 64);
	CHECK_EQ(rt.heap.nr_free, 1);
	tm_host_unlock(&lock);
	tm_rt_exit(&rt);
}
