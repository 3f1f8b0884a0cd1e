/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The test runner. Every test runs in a process of its own, so that a sanitizer's
 * abort or an endless loop fails one test and the next one still runs.
 *
 * A library (cmocka, Check) would give the assertions and the fork; what these
 * tests live on it would not: a seed to replay, and a record of the last
 * operations that outlives the process which crashed. Hence no dependency.
 *
 * SEED=n   run one round of every random test, with this seed
 * STEPS=n  steps of a round
 * TIMEOUT=n seconds of processor time a test may take: wall time would fail tests
 *          on a busy machine, and nothing here waits
 */
#ifndef TM_TEST_HARNESS_H
#define TM_TEST_HARNESS_H

#include "platform_host.h"

struct tm_test {
	const char *name;
	const char *variant;
	void (*fn)(unsigned int arg);
	unsigned int arg;
	struct tm_test *next;
};

void tm_test_register(struct tm_test *test);

#define TM_TEST_VARIANT(fn, tag, variant, arg)				\
	static struct tm_test fn##_##tag = {				\
		#fn, variant, fn, arg, NULL				\
	};								\
	__attribute__((constructor)) static void fn##_##tag##_add(void)	\
	{								\
		tm_test_register(&fn##_##tag);				\
	}

/* A test. */
#define TEST(fn)							\
	static void fn(unsigned int arg);				\
	TM_TEST_VARIANT(fn, test, NULL, 0)				\
	static void fn(__attribute__((unused)) unsigned int arg)

/* A test that runs for every page size a kernel may have. */
#define TEST_PAGE_SIZES(fn)						\
	static void fn(unsigned int page_shift);			\
	TM_TEST_VARIANT(fn, 4k, "4k", 12)				\
	TM_TEST_VARIANT(fn, 16k, "16k", 14)				\
	TM_TEST_VARIANT(fn, 64k, "64k", 16)				\
	static void fn(unsigned int page_shift)

/* Random numbers: splitmix64, the same on every machine. */
struct tm_rng {
	u64 state;
};

u64 tm_rand(struct tm_rng *rng);
/* 0 to @n - 1 */
u32 tm_rand_below(struct tm_rng *rng, u32 n);
/* True once in @n. */
bool tm_rand_one_in(struct tm_rng *rng, u32 n);
/* An index into @weights, as often as its weight says. */
u32 tm_rand_weighted(struct tm_rng *rng, const u32 *weights, u32 n);

/*
 * Rounds of a random test: each starts with a seed of its own.
 *
 *	struct tm_round round;
 *
 *	tm_for_each_round(&round, 8, 4000)
 *		...round.rng, round.steps...
 */
struct tm_round {
	struct tm_rng rng;
	u32 steps;
	u32 nr;
};

bool tm_round_next(struct tm_round *round, u32 rounds, u32 steps);

#define tm_for_each_round(round, rounds, steps)				\
	for (*(round) = (struct tm_round){ 0 };				\
	     tm_round_next(round, rounds, steps);)

/* The operation that comes now: printed, with those before it, on a failure. */
__attribute__((format(printf, 1, 2)))
void tm_op(const char *fmt, ...);

__attribute__((noreturn, format(printf, 3, 4)))
void tm_test_fail(const char *file, int line, const char *fmt, ...);

#define CHECK(cond)							\
	do {								\
		if (!(cond))						\
			tm_test_fail(__FILE__, __LINE__, "%s", #cond);	\
	} while (0)

#define CHECK_EQ(got, want)						\
	do {								\
		long long got_ = (long long)(got);			\
		long long want_ = (long long)(want);			\
									\
		if (got_ != want_)					\
			tm_test_fail(__FILE__, __LINE__,		\
				     "%s is %lld, not %lld (%s)",	\
				     #got, got_, want_, #want);		\
	} while (0)

/* @call must return NULL, else the sentence it returns is the failure. */
#define CHECK_OK(call)							\
	do {								\
		const char *error_ = (call);				\
									\
		if (error_)						\
			tm_test_fail(__FILE__, __LINE__, "%s: %s",	\
				     #call, error_);			\
	} while (0)

/* @fn has to end in abort(). */
void tm_check_aborts(const char *what, void (*fn)(void *), void *arg);

#endif
