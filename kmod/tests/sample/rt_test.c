// SPDX-License-Identifier: GPL-2.0-only
/* KUnit: the RT pool as interrupt handlers and threads of other modules use it. */
#include <kunit/test.h>
#include <linux/completion.h>
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/prandom.h>
#include <linux/sizes.h>
#include <linux/string.h>
#include <linux/tensormem.h>

#include "compat.h"

#define TEST_BLOCKS	12
#define TEST_FIRINGS	400
#define TEST_PERIOD	(500 * NSEC_PER_USEC)
#define TEST_THREADS	2

/* Long enough that nobody waits for it unless something is lost. */
static ktime_t ever(void)
{
	return ktime_add_ns(ktime_get(), 600ull * NSEC_PER_SEC);
}

static struct tensormem_rt *open_rt(struct kunit *test, size_t size)
{
	struct tensormem_rt *rt = tensormem_rt_open(size, 0);

	KUNIT_ASSERT_FALSE_MSG(test, IS_ERR(rt), "%ld", PTR_ERR(rt));
	return rt;
}

/* Nothing is lost or scattered: one block can have all of the arena. */
static void close_rt(struct kunit *test, struct tensormem_rt *rt, size_t size)
{
	void *all = tensormem_rt_alloc(rt, size, 0);

	KUNIT_EXPECT_FALSE_MSG(test, IS_ERR(all), "%ld", PTR_ERR(all));
	tensormem_rt_close(rt);
}

static void blocks(struct kunit *test)
{
	static const size_t sizes[] = { 1, 128, 129, 256, 4096, 100000, SZ_1M };
	struct tensormem_rt *rt = open_rt(test, SZ_2M);
	void *block[ARRAY_SIZE(sizes)];

	for (u32 i = 0; i < ARRAY_SIZE(sizes); i++) {
		block[i] = tensormem_rt_alloc(rt, sizes[i], 0);
		KUNIT_ASSERT_FALSE(test, IS_ERR(block[i]));
		KUNIT_EXPECT_TRUE(test, IS_ALIGNED((uintptr_t)block[i],
						   ARCH_DMA_MINALIGN));
		memset(block[i], i + 1, sizes[i]);
	}
	for (u32 i = 0; i < ARRAY_SIZE(sizes); i++) {
		KUNIT_EXPECT_NULL(test, memchr_inv(block[i], i + 1, sizes[i]));
		tensormem_rt_free(rt, block[i]);
	}
	close_rt(test, rt, SZ_2M);
}

static void bad_requests(struct kunit *test)
{
	struct tensormem_rt *rt;
	void *block;

	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_open(0, 0)), -EINVAL);
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_open(SZ_2M, 100)), -EINVAL);
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_open(SIZE_MAX, 0)), -ENOSPC);
	rt = open_rt(test, SZ_2M);
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_alloc(rt, 0, 0)), -EINVAL);
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_alloc(rt, SZ_2M + 1, 0)),
			-EINVAL);
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_alloc(rt, SIZE_MAX, 0)),
			-EINVAL);
	KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, 0, 1), -EINVAL);
	KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, SZ_2M, 1), -ENOSPC);
	KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, 64, UINT_MAX), -ENOSPC);
	KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, 64, 0), -ENOENT);
	/* A deadline that has passed does not refuse what is there. */
	block = tensormem_rt_alloc(rt, SZ_2M, ns_to_ktime(1));
	KUNIT_ASSERT_FALSE(test, IS_ERR(block));
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_alloc(rt, 1, 0)), -ENOSPC);
	KUNIT_EXPECT_EQ(test, PTR_ERR(tensormem_rt_alloc(rt, 1, ns_to_ktime(1))),
			-ETIMEDOUT);
	tensormem_rt_free(rt, block);
	close_rt(test, rt, SZ_2M);
}

static void reservations(struct kunit *test)
{
	struct tensormem_rt *rt = open_rt(test, SZ_2M);
	void *item[TEST_BLOCKS], *rest;
	u32 others = 0;

	KUNIT_ASSERT_EQ(test, tensormem_rt_reserve(rt, 1000, TEST_BLOCKS), 0);
	KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, 1000, 1), -EEXIST);
	while (!IS_ERR(tensormem_rt_alloc(rt, 1025, 0)))
		others++;
	KUNIT_EXPECT_GT(test, others, (SZ_2M - SZ_64K) / 1280);
	for (u32 round = 0; round < 3; round++) {
		for (u32 i = 0; i < TEST_BLOCKS; i++) {
			item[i] = tensormem_rt_alloc(rt, 1000, 0);
			KUNIT_ASSERT_FALSE(test, IS_ERR(item[i]));
			memset(item[i], i, 1000);
		}
		rest = tensormem_rt_alloc(rt, 1000, 0);
		KUNIT_EXPECT_EQ(test, PTR_ERR(rest), -ENOSPC);
		KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, 1000, 0), -EBUSY);
		for (u32 i = 0; i < TEST_BLOCKS; i++) {
			KUNIT_EXPECT_NULL(test, memchr_inv(item[i], i, 1000));
			tensormem_rt_free(rt, item[i]);
		}
	}
	KUNIT_EXPECT_EQ(test, tensormem_rt_reserve(rt, 1000, 0), 0);
	/* With blocks left: closing frees them. */
	tensormem_rt_close(rt);
}

/* Somebody who allocates and frees at random. */
struct churner {
	struct tensormem_rt *rt;
	struct rnd_state random;
	u8 *block[TEST_BLOCKS];
	size_t size[TEST_BLOCKS];
	u8 stamp;
	size_t reserved;
	u32 wrong;
	u32 got;
	struct hrtimer timer;
	u32 firings;
	struct completion done;
	struct task_struct *task;
};

/* @i: no two have stamps in common, nor a class of a reservation. */
static void churner_init(struct churner *c, struct tensormem_rt *rt, u32 i)
{
	*c = (struct churner){
		.rt = rt,
		.stamp = 1 + i * 16,
		.reserved = 300 + i % TEST_THREADS * 600,
	};
	prandom_seed_state(&c->random, i);
	init_completion(&c->done);
}

static void churner_drop(struct churner *c, u32 i)
{
	if (!c->block[i])
		return;
	c->wrong += !!memchr_inv(c->block[i], c->stamp + i, c->size[i]);
	tensormem_rt_free(c->rt, c->block[i]);
	c->block[i] = NULL;
}

static void churner_step(struct churner *c, ktime_t deadline, size_t most)
{
	u32 i = prandom_u32_state(&c->random) % TEST_BLOCKS;
	u8 *block;

	if (c->block[i]) {
		churner_drop(c, i);
		return;
	}
	/* Longer than what anybody lays aside. */
	c->size[i] = SZ_1K + prandom_u32_state(&c->random) % most;
	block = tensormem_rt_alloc(c->rt, c->size[i], deadline);
	if (IS_ERR(block)) {
		c->wrong += PTR_ERR(block) != (deadline ? -ETIMEDOUT : -ENOSPC);
		return;
	}
	c->got++;
	c->block[i] = block;
	memset(block, c->stamp + i, c->size[i]);
}

/* Lay aside, use all of it, give it up. */
static void churner_reserve(struct churner *c)
{
	void *item[3];
	int err = tensormem_rt_reserve(c->rt, c->reserved, ARRAY_SIZE(item));

	if (err) {
		c->wrong += err != -ENOSPC;
		return;
	}
	for (u32 i = 0; i < ARRAY_SIZE(item); i++) {
		item[i] = tensormem_rt_alloc(c->rt, c->reserved, 0);
		c->wrong += IS_ERR(item[i]);
	}
	for (u32 i = 0; i < ARRAY_SIZE(item); i++)
		if (!IS_ERR(item[i]))
			tensormem_rt_free(c->rt, item[i]);
	c->wrong += !!tensormem_rt_reserve(c->rt, c->reserved, 0);
}

static enum hrtimer_restart churner_fire(struct hrtimer *timer)
{
	struct churner *c = container_of(timer, struct churner, timer);

	c->wrong += !in_hardirq();
	if (c->firings % 16)
		churner_step(c, 0, SZ_8K);
	else
		churner_reserve(c);
	if (++c->firings == TEST_FIRINGS) {
		complete(&c->done);
		return HRTIMER_NORESTART;
	}
	hrtimer_forward_now(timer, ns_to_ktime(TEST_PERIOD));
	return HRTIMER_RESTART;
}

/* With an interrupt handler of its own on the same CPU. */
static int churner_thread(void *data)
{
	struct churner *c = data, *interrupt = c + TEST_THREADS;

	hrtimer_setup(&interrupt->timer, churner_fire, CLOCK_MONOTONIC,
		      HRTIMER_MODE_REL_PINNED_HARD);
	hrtimer_start(&interrupt->timer, ns_to_ktime(TEST_PERIOD),
		      HRTIMER_MODE_REL_PINNED_HARD);
	while (!completion_done(&interrupt->done)) {
		ktime_t soon = ktime_add_ns(ktime_get(), 2 * NSEC_PER_MSEC);

		/* Large enough that not all of them fit. */
		churner_step(c, soon, SZ_256K);
		cond_resched();
	}
	hrtimer_cancel(&interrupt->timer);
	kthread_complete_and_exit(&c->done, 0);
}

static void everybody_at_once(struct kunit *test)
{
	struct tensormem_rt *rt = open_rt(test, SZ_2M);
	struct churner *c = kunit_kcalloc(test, 2 * TEST_THREADS, sizeof(*c),
					  GFP_KERNEL);
	u32 cpu = cpumask_first(cpu_online_mask);

	KUNIT_ASSERT_NOT_NULL(test, c);
	for (u32 i = 0; i < 2 * TEST_THREADS; i++)
		churner_init(&c[i], rt, i);
	for (u32 i = 0; i < TEST_THREADS; i++) {
		c[i].task = kthread_create(churner_thread, &c[i], "tm_rt_test");
		KUNIT_ASSERT_FALSE(test, IS_ERR(c[i].task));
		kthread_bind(c[i].task, cpu);
		cpu = cpumask_next(cpu, cpu_online_mask);
		if (cpu >= nr_cpu_ids)
			cpu = cpumask_first(cpu_online_mask);
	}
	for (u32 i = 0; i < TEST_THREADS; i++)
		wake_up_process(c[i].task);
	for (u32 i = 0; i < TEST_THREADS; i++)
		wait_for_completion(&c[i].done);
	for (u32 i = 0; i < 2 * TEST_THREADS; i++) {
		for (u32 b = 0; b < TEST_BLOCKS; b++)
			churner_drop(&c[i], b);
		KUNIT_EXPECT_EQ(test, c[i].wrong, 0);
		KUNIT_EXPECT_GT(test, c[i].got, 0);
	}
	for (u32 i = TEST_THREADS; i < 2 * TEST_THREADS; i++)
		KUNIT_EXPECT_EQ(test, c[i].firings, TEST_FIRINGS);
	close_rt(test, rt, SZ_2M);
}

/* A thread waits for memory that an interrupt handler frees. */
struct waiting {
	struct tensormem_rt *rt;
	struct hrtimer timer;
	void *block;
	void *got;
	struct completion done;
};

static enum hrtimer_restart waiting_fire(struct hrtimer *timer)
{
	struct waiting *w = container_of(timer, struct waiting, timer);

	tensormem_rt_free(w->rt, w->block);
	return HRTIMER_NORESTART;
}

static int waiting_thread(void *data)
{
	struct waiting *w = data;

	w->got = tensormem_rt_alloc(w->rt, SZ_1M, ever());
	kthread_complete_and_exit(&w->done, 0);
}

static void an_interrupt_serves_who_waits(struct kunit *test)
{
	struct waiting *w = kunit_kzalloc(test, sizeof(*w), GFP_KERNEL);
	struct task_struct *task;
	void *half;

	KUNIT_ASSERT_NOT_NULL(test, w);
	w->rt = open_rt(test, SZ_2M);
	init_completion(&w->done);
	hrtimer_setup(&w->timer, waiting_fire, CLOCK_MONOTONIC,
		      HRTIMER_MODE_REL_HARD);
	half = tensormem_rt_alloc(w->rt, SZ_1M, 0);
	KUNIT_ASSERT_FALSE(test, IS_ERR(half));
	for (u32 i = 0; i < 50; i++) {
		w->block = tensormem_rt_alloc(w->rt, SZ_1M, 0);
		KUNIT_ASSERT_FALSE(test, IS_ERR(w->block));
		/* From before the thread begins to wait to long after. */
		hrtimer_start(&w->timer, ns_to_ktime(i * 20 * NSEC_PER_USEC),
			      HRTIMER_MODE_REL_HARD);
		task = kthread_run(waiting_thread, w, "tm_rt_test");
		KUNIT_ASSERT_FALSE(test, IS_ERR(task));
		wait_for_completion(&w->done);
		KUNIT_ASSERT_PTR_EQ(test, w->got, w->block);
		tensormem_rt_free(w->rt, w->got);
	}
	hrtimer_cancel(&w->timer);
	tensormem_rt_free(w->rt, half);
	close_rt(test, w->rt, SZ_2M);
}

static struct kunit_case tensormem_rt_cases[] = {
	KUNIT_CASE(blocks),
	KUNIT_CASE(bad_requests),
	KUNIT_CASE(reservations),
	KUNIT_CASE(everybody_at_once),
	KUNIT_CASE(an_interrupt_serves_who_waits),
	{}
};

static struct kunit_suite tensormem_rt_suite = {
	.name = "tensormem-rt",
	.test_cases = tensormem_rt_cases,
};
kunit_test_suite(tensormem_rt_suite);
