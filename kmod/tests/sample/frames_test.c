// SPDX-License-Identifier: GPL-2.0-only
/* KUnit: the in-kernel API, and the sample that is made of it. */
#include <kunit/test.h>
#include <linux/mm.h>
#include <linux/numa.h>
#include <linux/prandom.h>
#include <linux/sizes.h>
#include <linux/string.h>

#include "frames.h"

#define TEST_LIVE	96
#define TEST_STEPS	4000
#define TEST_OBJECTS	300

static u64 bytes_of(struct kunit *test, enum tensormem_kind kind)
{
	struct tensormem_stats stats;

	KUNIT_ASSERT_EQ(test, tensormem_stats(NUMA_NO_NODE, &stats), 0);
	return stats.bytes[kind];
}

static size_t run_bytes(const struct tensormem_run *run)
{
	return PAGE_SIZE << run->order;
}

/* A word for each page, made of where it is: no two live pages have the same. */
static void mark(struct tensormem_run *run, u32 stamp)
{
	for (u32 i = 0; i < 1u << run->order; i++)
		*(u64 *)page_address(run->page + i) =
			(u64)stamp << 32 | page_to_pfn(run->page + i);
}

static bool marked(const struct tensormem_run *run, u32 stamp)
{
	for (u32 i = 0; i < 1u << run->order; i++)
		if (*(u64 *)page_address(run->page + i) !=
		    ((u64)stamp << 32 | page_to_pfn(run->page + i)))
			return false;
	return true;
}

static void sizes_and_kinds(struct kunit *test)
{
	for (u32 kind = TENSORMEM_KIND_WEIGHTS;
	     kind <= TENSORMEM_KIND_PROTOCOL; kind++) {
		u64 before = bytes_of(test, kind);

		for (size_t want = 1; want <= SZ_2M; want = want * 2 + 1) {
			struct tensormem_run run;

			KUNIT_ASSERT_EQ(test, tensormem_alloc(&run, kind, want,
							      NUMA_NO_NODE, 0), 0);
			KUNIT_EXPECT_EQ(test, run_bytes(&run),
					PAGE_SIZE << get_order(want));
			KUNIT_EXPECT_EQ(test, page_to_phys(run.page) &
					(run_bytes(&run) - 1), 0);
			KUNIT_EXPECT_EQ(test, bytes_of(test, kind),
					before + run_bytes(&run));
			tensormem_free(&run);
			KUNIT_EXPECT_EQ(test, bytes_of(test, kind), before);
		}
	}
}

static void bad_requests(struct kunit *test)
{
	static const struct {
		u32 kind;
		size_t size;
		int node;
		unsigned int flags;
	} bad[] = {
		{ TENSORMEM_KIND_KV, 0, NUMA_NO_NODE, 0 },
		{ TENSORMEM_KIND_KV, SZ_2M + 1, NUMA_NO_NODE, 0 },
		{ TENSORMEM_KIND_KV, SIZE_MAX, NUMA_NO_NODE, 0 },
		{ 0, PAGE_SIZE, NUMA_NO_NODE, 0 },
		{ TENSORMEM_KIND_PROTOCOL + 1, PAGE_SIZE, NUMA_NO_NODE, 0 },
		{ TENSORMEM_KIND_KV, PAGE_SIZE, -2, 0 },
		{ TENSORMEM_KIND_KV, PAGE_SIZE, MAX_NUMNODES, 0 },
		{ TENSORMEM_KIND_KV, PAGE_SIZE, INT_MAX, 0 },
		{ TENSORMEM_KIND_KV, PAGE_SIZE, NUMA_NO_NODE, BIT(3) },
		{ TENSORMEM_KIND_KV, PAGE_SIZE, NUMA_NO_NODE, ~0u },
		{ TENSORMEM_KIND_KV, PAGE_SIZE, NUMA_NO_NODE,
		  TENSORMEM_THISNODE },
	};
	struct tensormem_run untouched, run;
	struct tensormem_stats stats;

	memset(&untouched, 0xa5, sizeof(untouched));
	for (u32 i = 0; i < ARRAY_SIZE(bad); i++) {
		run = untouched;
		KUNIT_EXPECT_EQ_MSG(test,
				    tensormem_alloc(&run, bad[i].kind,
						    bad[i].size, bad[i].node,
						    bad[i].flags),
				    -EINVAL, "case %u", i);
		KUNIT_EXPECT_MEMEQ(test, &run, &untouched, sizeof(run));
	}
	KUNIT_EXPECT_EQ(test, tensormem_stats(-2, &stats), -EINVAL);
	KUNIT_EXPECT_EQ(test, tensormem_stats(INT_MAX, &stats), -EINVAL);
}

static void nodes_and_flags(struct kunit *test)
{
	int node = page_to_nid(virt_to_page(test));
	struct tensormem_run run;

	KUNIT_ASSERT_EQ(test, tensormem_alloc(&run, TENSORMEM_KIND_PROTOCOL,
					      SZ_64K, node, TENSORMEM_THISNODE),
			0);
	KUNIT_EXPECT_EQ(test, page_to_nid(run.page), node);
	tensormem_free(&run);
	KUNIT_ASSERT_EQ(test, tensormem_alloc(&run, TENSORMEM_KIND_PROTOCOL,
					      SZ_64K, NUMA_NO_NODE,
					      TENSORMEM_ACCOUNT), 0);
	tensormem_free(&run);
}

/* What is freed dirty comes back zeroed to who asks for that. */
static void zeroed(struct kunit *test)
{
	for (unsigned int order = 0; PAGE_SIZE << order <= SZ_2M; order++) {
		struct tensormem_run run;
		size_t bytes = PAGE_SIZE << order;

		KUNIT_ASSERT_EQ(test, tensormem_alloc(&run, TENSORMEM_KIND_KV,
						      bytes, NUMA_NO_NODE, 0), 0);
		memset(page_address(run.page), 0xff, bytes);
		tensormem_free(&run);
		KUNIT_ASSERT_EQ(test, tensormem_alloc(&run, TENSORMEM_KIND_KV,
						      bytes, NUMA_NO_NODE,
						      TENSORMEM_ZEROED), 0);
		KUNIT_EXPECT_NULL(test, memchr_inv(page_address(run.page), 0,
						   bytes));
		tensormem_free(&run);
	}
}

/* Runs of mixed sizes come and go; nobody's pages are ever somebody else's. */
static void random_runs(struct kunit *test)
{
	struct live {
		struct tensormem_run run;
		u32 stamp;
	} *live = kunit_kcalloc(test, TEST_LIVE, sizeof(*live), GFP_KERNEL);
	u64 before = bytes_of(test, TENSORMEM_KIND_ACTIVATIONS);
	struct rnd_state random;

	KUNIT_ASSERT_NOT_NULL(test, live);
	prandom_seed_state(&random, 7);
	for (u32 step = 1; step <= TEST_STEPS; step++) {
		struct live *at = &live[prandom_u32_state(&random) % TEST_LIVE];
		size_t bytes = PAGE_SIZE << prandom_u32_state(&random) % 6;

		if (at->stamp) {
			KUNIT_EXPECT_TRUE(test, marked(&at->run, at->stamp));
			tensormem_free(&at->run);
			at->stamp = 0;
			continue;
		}
		KUNIT_ASSERT_EQ(test, tensormem_alloc(&at->run,
						      TENSORMEM_KIND_ACTIVATIONS,
						      bytes, NUMA_NO_NODE, 0), 0);
		mark(&at->run, step);
		at->stamp = step;
	}
	for (u32 i = 0; i < TEST_LIVE; i++) {
		if (!live[i].stamp)
			continue;
		KUNIT_EXPECT_TRUE(test, marked(&live[i].run, live[i].stamp));
		tensormem_free(&live[i].run);
	}
	KUNIT_EXPECT_EQ(test, bytes_of(test, TENSORMEM_KIND_ACTIVATIONS),
			before);
}

static void slab_objects(struct kunit *test)
{
	static const size_t sizes[] = { 1, 24, 64, 200, 256, 1000, PAGE_SIZE / 2 };
	void **object = kunit_kcalloc(test, TEST_OBJECTS, sizeof(*object),
				      GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, object);
	for (u32 i = 0; i < ARRAY_SIZE(sizes); i++) {
		struct tensormem_slab *slab =
			tensormem_slab_create(sizes[i], TENSORMEM_ZEROED);

		KUNIT_ASSERT_FALSE(test, IS_ERR(slab));
		KUNIT_ASSERT_EQ(test, tensormem_slab_alloc_bulk(slab, object,
								TEST_OBJECTS), 0);
		for (u32 n = 0; n < TEST_OBJECTS; n++) {
			KUNIT_EXPECT_NULL(test, memchr_inv(object[n], 0,
							   sizes[i]));
			memset(object[n], n, sizes[i]);
		}
		for (u32 n = 0; n < TEST_OBJECTS; n++)
			KUNIT_EXPECT_NULL(test, memchr_inv(object[n], n,
							   sizes[i]));
		tensormem_slab_free_bulk(slab, object, TEST_OBJECTS);
		tensormem_slab_destroy(slab);
	}
	KUNIT_EXPECT_TRUE(test, IS_ERR(tensormem_slab_create(0, 0)));
	KUNIT_EXPECT_TRUE(test, IS_ERR(tensormem_slab_create(PAGE_SIZE, 0)));
	KUNIT_EXPECT_TRUE(test, IS_ERR(tensormem_slab_create(64, ~0u)));
}

static void the_sample(struct kunit *test)
{
	u64 before = bytes_of(test, TENSORMEM_KIND_PROTOCOL);
	struct frame_pool pool;
	struct frame *got[5];

	KUNIT_ASSERT_EQ(test, frame_pool_init(&pool, 4, SZ_16K, NUMA_NO_NODE),
			0);
	KUNIT_EXPECT_EQ(test, bytes_of(test, TENSORMEM_KIND_PROTOCOL),
			before + 4 * max_t(u64, SZ_16K, PAGE_SIZE));
	for (u32 i = 0; i < 5; i++)
		got[i] = frame_get(&pool);
	KUNIT_EXPECT_NULL(test, got[4]);
	for (u32 i = 0; i < 4; i++) {
		KUNIT_ASSERT_NOT_NULL(test, got[i]);
		mark(&got[i]->run, i);
	}
	for (u32 i = 0; i < 4; i++) {
		KUNIT_EXPECT_TRUE(test, marked(&got[i]->run, i));
		frame_put(&pool, got[i]);
	}
	KUNIT_EXPECT_PTR_EQ(test, frame_get(&pool), got[3]);
	frame_put(&pool, got[3]);
	frame_pool_destroy(&pool);
	KUNIT_EXPECT_EQ(test, bytes_of(test, TENSORMEM_KIND_PROTOCOL), before);

	/* One that cannot be made leaves nothing. */
	KUNIT_EXPECT_EQ(test, frame_pool_init(&pool, 4, SZ_4M, NUMA_NO_NODE),
			-EINVAL);
	KUNIT_EXPECT_EQ(test, bytes_of(test, TENSORMEM_KIND_PROTOCOL), before);
}

static struct kunit_case tensormem_cases[] = {
	KUNIT_CASE(sizes_and_kinds),
	KUNIT_CASE(bad_requests),
	KUNIT_CASE(nodes_and_flags),
	KUNIT_CASE(zeroed),
	KUNIT_CASE(random_runs),
	KUNIT_CASE(slab_objects),
	KUNIT_CASE(the_sample),
	{}
};

static struct kunit_suite tensormem_suite = {
	.name = "tensormem",
	.test_cases = tensormem_cases,
};
kunit_test_suite(tensormem_suite);
