// SPDX-License-Identifier: GPL-2.0-only
/*
 * Nanoseconds of an allocation and a free, on the host: of the core, or of
 * whatever malloc() the dynamic linker found.
 *
 *   core_alloc core|malloc
 *
 * Prints "SIZE NS" lines. A step frees one of the live objects, chosen at random,
 * and allocates one in its place; nothing touches the memory, which the core does
 * not have. The lock that the core's callers hold is not counted, that of a
 * malloc() is. The best of several rounds: what the machine does besides only adds.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "core/buddy.h"
#include "core/slab.h"

#define PAGE_SHIFT	12
#define CACHE_LINE	64
#define ROUNDS		5
#define STEPS		200000
/* As many live objects as make this, but within these numbers. */
#define LIVE_BYTES	(32u << 20)
#define LIVE_MIN	32
#define LIVE_MAX	4096
#define CHUNKS		64

static const size_t sizes[] = {
	64, 256, 1024, 4096, 16384, 65536, 262144, 1048576,
};

/* Which live object a step replaces: chosen beforehand, so that it costs nothing. */
static unsigned short victim[STEPS];

static void fail(const char *what)
{
	fprintf(stderr, "core_alloc: %s\n", what);
	exit(1);
}

static u32 live_objects(size_t size)
{
	u32 live = LIVE_BYTES / size;

	return live < LIVE_MIN ? LIVE_MIN : live > LIVE_MAX ? LIVE_MAX : live;
}

static void choose_victims(u32 live)
{
	u64 random = 1;

	for (u32 i = 0; i < STEPS; i++) {
		random = random * 6364136223846793005ull + 1442695040888963407ull;
		victim[i] = (random >> 33) % live;
	}
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double best(double ns, double most)
{
	return ns / STEPS < most ? ns / STEPS : most;
}

static double run_slab(size_t size)
{
	static struct tm_slab_object object[LIVE_MAX];
	struct tm_geometry g = tm_geometry(PAGE_SHIFT);
	u32 bytes = tm_slab_class_size(tm_slab_class(size, CACHE_LINE), CACHE_LINE);
	u32 live = live_objects(size);
	struct tm_slab_pool pool;
	struct tm_slab *slab;
	double ns = 1e9;
	tm_lock_t lock;

	if (tm_slab_pool_init(&pool, tm_slab_layout(g, bytes), &lock))
		fail("no such slab");
	while (pool.nr_free < live) {
		slab = malloc(tm_slab_bytes(&pool));
		if (!slab)
			fail("no memory");
		tm_slab_add(&pool, slab);
	}
	if (tm_slab_alloc(&pool, object, live))
		fail("the slab is full");
	for (u32 round = 0; round < ROUNDS; round++) {
		double start = now();

		for (u32 i = 0; i < STEPS; i++)
			if (tm_slab_free(&pool, &object[victim[i]], 1) ||
			    tm_slab_alloc(&pool, &object[victim[i]], 1))
				fail("a slab step failed");
		ns = best(now() - start, ns);
	}
	if (tm_slab_free(&pool, object, live))
		fail("the slab lost an object");
	while ((slab = tm_slab_take_empty(&pool)))
		free(slab);
	tm_slab_pool_destroy(&pool);
	return ns;
}

static double run_buddy(size_t size)
{
	static struct tm_page_id page[LIVE_MAX];
	u32 order = tm_fls32((u32)size >> PAGE_SHIFT);
	u32 live = live_objects(size);
	struct tm_buddy buddy;
	double ns = 1e9;
	tm_lock_t lock;
	bool empty;

	if (tm_buddy_init(&buddy, tm_geometry(PAGE_SHIFT), CHUNKS, &lock))
		fail("no memory");
	for (struct tm_chunk_id id = { 0 }; id.v < CHUNKS; id.v++)
		tm_buddy_add_chunk(&buddy, id);
	for (u32 i = 0; i < live; i++)
		if (tm_buddy_alloc(&buddy, order, &page[i]))
			fail("the buddy pool is full");
	for (u32 round = 0; round < ROUNDS; round++) {
		double start = now();

		for (u32 i = 0; i < STEPS; i++)
			if (tm_buddy_free(&buddy, page[victim[i]], order,
					  &empty) ||
			    tm_buddy_alloc(&buddy, order, &page[victim[i]]))
				fail("a buddy step failed");
		ns = best(now() - start, ns);
	}
	for (u32 i = 0; i < live; i++)
		if (tm_buddy_free(&buddy, page[i], order, &empty))
			fail("the buddy pool lost a run");
	for (struct tm_chunk_id id = { 0 }; id.v < CHUNKS; id.v++)
		if (tm_buddy_remove_chunk(&buddy, id))
			fail("a chunk is not empty");
	tm_buddy_destroy(&buddy);
	return ns;
}

static double run_malloc(size_t size)
{
	/* volatile: or the compiler leaves out both calls. */
	static void *volatile object[LIVE_MAX];
	u32 live = live_objects(size);
	double ns = 1e9;

	for (u32 i = 0; i < live; i++)
		object[i] = malloc(size);
	for (u32 round = 0; round < ROUNDS; round++) {
		double start = now();

		for (u32 i = 0; i < STEPS; i++) {
			free(object[victim[i]]);
			object[victim[i]] = malloc(size);
			if (!object[victim[i]])
				fail("no memory");
		}
		ns = best(now() - start, ns);
	}
	for (u32 i = 0; i < live; i++)
		free(object[i]);
	return ns;
}

int main(int argc, char **argv)
{
	bool core = argc == 2 && !strcmp(argv[1], "core");

	if (argc != 2 || (!core && strcmp(argv[1], "malloc"))) {
		fprintf(stderr, "usage: core_alloc core|malloc\n");
		return 2;
	}
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		double ns;

		choose_victims(live_objects(sizes[i]));
		if (!core)
			ns = run_malloc(sizes[i]);
		else if (sizes[i] < 1u << PAGE_SHIFT)
			ns = run_slab(sizes[i]);
		else
			ns = run_buddy(sizes[i]);
		printf("%zu %.1f\n", sizes[i], ns);
	}
	return 0;
}
