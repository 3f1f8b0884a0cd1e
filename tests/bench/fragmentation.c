// SPDX-License-Identifier: GPL-2.0-only
/*
 * External fragmentation of the buddy pool before and after compaction.
 *
 *   fragmentation PAGE_SHIFT CASE SEED
 *
 * CASE  movable      every run may move
 *       unmovable    5 % of the objects may not, and the allocator is told so
 *       pinned       5 % of the objects turn out not to move when it is tried
 *       pages        5 % of the pages do, each by itself: whatever run has one
 *
 * A pool of 1 GiB, 512 chunks and no more. A million steps, each allocates an
 * object while less than 90 % of the pages are in use, else frees one at random. An
 * object has 1 page to 1 MiB: its octave is uniform, and its pages are uniform in
 * the octave; all of the last one is 1 MiB. It is made of runs as kmod/memory.c
 * makes a tensor: the binary digits, largest first, and smaller runs where a size
 * is not to be had. A chunk that falls empty leaves the pool. What fragmentation
 * is, core/compact.h defines. Then one pass of compaction. Prints "NAME VALUE"
 * lines; steps are turns of the loops in an allocation or a free of one run.
 */
#include <stdio.h>
#include <stdlib.h>

#include "core/check.h"
#include "core/compact.h"

#define CHUNKS		512u
#define STEPS		1000000u
#define MOST_STEPS	64u

#define REQUIRE(cond)							\
	((cond) ? (void)0 :						\
	 tm_host_die(__FILE__, __LINE__, "does not hold: %s", #cond))

/* An allocated run, by its first page; the runs of an object are a list. */
struct run {
	u32 next;
	u32 prev;
	u32 object;
	u8 order;
	bool stays;
};

enum moves {
	MOVABLE,
	UNMOVABLE,
	PINNED,
	PAGES,
	MOVES,
};

static const char *const names[MOVES] = {
	"movable", "unmovable", "pinned", "pages",
};

static enum moves moves;
static tm_lock_t lock = { true };
static struct tm_buddy buddy;
static struct run runs[CHUNKS << TM_MAX_CHUNK_ORDER];
/* The first run of each object. */
static u32 objects[CHUNKS << TM_MAX_CHUNK_ORDER];
static u32 nr_objects;
static u32 spare[CHUNKS];
static u32 nr_spare;
static u64 fallbacks;
static u64 alloc_steps[MOST_STEPS], free_steps[MOST_STEPS];
static u64 rng;

static u32 below(u32 n)
{
	u64 z = rng += 0x9e3779b97f4a7c15;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return (u32)((z ^ (z >> 31)) % n);
}

static int take_run(unsigned int order, bool stays, struct tm_page_id *page)
{
	u64 splits = buddy.splits;
	u32 steps, found;
	int err = stays && moves == UNMOVABLE ?
		  tm_buddy_alloc_unmovable(&buddy, order, page) :
		  tm_buddy_alloc(&buddy, order, page);

	if (err)
		return err;
	steps = (u32)(buddy.splits - splits);
	/* The words of the bitmap in front of the one with the run. */
	found = tm_page_index(buddy.geometry, *page) >> (order + steps);
	alloc_steps[steps + found / 64]++;
	return 0;
}

/* The contents went to @to, if there is one. */
static void free_run(struct tm_page_id page, unsigned int order,
		     const struct tm_page_id *to)
{
	u64 merges = buddy.merges;
	bool empty;

	REQUIRE(!(to ? tm_buddy_drain_moved(&buddy, page, *to, order, &empty) :
		       tm_buddy_free(&buddy, page, order, &empty)));
	free_steps[buddy.merges - merges]++;
	if (empty) {
		struct tm_chunk_id id = tm_page_chunk(buddy.geometry, page);

		REQUIRE(!tm_buddy_remove_chunk(&buddy, id));
		spare[nr_spare++] = id.v;
	}
}

static void alloc_object(void)
{
	unsigned int limit = tm_buddy_max_order(&buddy);
	unsigned int octave = below(limit + 1);
	u32 left = 1u << octave;
	bool stays = (moves == UNMOVABLE || moves == PINNED) && !below(20);
	bool short_of = false;
	u32 last = TM_NONE;

	if (octave < limit)
		left += below(left);
	while (left) {
		unsigned int order = tm_fls32(left);
		struct tm_page_id page;

		if (order > limit)
			order = limit;
		if (take_run(order, stays, &page)) {
			if (!short_of && nr_spare) {
				tm_buddy_add_chunk(&buddy, (struct tm_chunk_id){
						   spare[--nr_spare] });
				continue;
			}
			fallbacks += !short_of;
			short_of = true;
			REQUIRE(order);
			limit = order - 1;
			continue;
		}
		runs[page.v] = (struct run){
			.next = TM_NONE,
			.prev = last,
			.object = nr_objects,
			.order = (u8)order,
			.stays = stays,
		};
		for (u32 p = 0; moves == PAGES && p < 1u << order; p++)
			runs[page.v].stays |= !below(20);
		if (last == TM_NONE)
			objects[nr_objects] = page.v;
		else
			runs[last].next = page.v;
		last = page.v;
		left -= 1u << order;
	}
	nr_objects++;
}

static void free_object(u32 nth)
{
	u32 next;

	for (u32 page = objects[nth]; page != TM_NONE; page = next) {
		next = runs[page].next;
		free_run((struct tm_page_id){ page }, runs[page].order, NULL);
	}
	objects[nth] = objects[--nr_objects];
	if (nth == nr_objects)
		return;
	for (u32 page = objects[nth]; page != TM_NONE;
	     page = runs[page].next)
		runs[page].object = nth;
}

/* The object's run has a new place. */
static void move_run(u32 from, u32 to)
{
	struct run *run = &runs[to];

	*run = runs[from];
	if (run->prev != TM_NONE)
		runs[run->prev].next = to;
	else
		objects[run->object] = to;
	if (run->next != TM_NONE)
		runs[run->next].prev = to;
}

static void drain_chunk(struct tm_buddy_drain *drain)
{
	struct tm_page_id from, to;
	unsigned int order;

	while (!tm_buddy_drain_next(&buddy, drain, &from, &order)) {
		if (runs[from.v].stays) {
			tm_buddy_drain_cancel(&buddy, drain);
			return;
		}
		/* Nobody else is here: what fitted fits. */
		REQUIRE(!tm_buddy_drain_alloc(&buddy, drain, order, &to));
		move_run(from.v, to.v);
		free_run(from, order, &to);
	}
}

static void compact(void)
{
	struct tm_compact pass;
	struct tm_buddy_drain drain;
	int err;

	tm_compact_begin(&buddy, &pass);
	do {
		err = tm_compact_choose(&buddy, &pass, &drain);
		if (!err)
			drain_chunk(&drain);
	} while (err != -ENOENT);
}

static u32 used_pages(void)
{
	return tm_buddy_used_pages(&buddy);
}

static double fragmentation(void)
{
	return (double)tm_fragmentation(&buddy, nr_spare) /
	       TM_FRAGMENTATION_ONE;
}

/* Chunks that nobody can empty, however few of their runs are in the way. */
static u32 stuck_chunks(void)
{
	bool stuck[CHUNKS] = { 0 };
	u32 nr = 0;

	for (u32 i = 0; i < nr_objects; i++)
		for (u32 page = objects[i]; page != TM_NONE;
		     page = runs[page].next)
			stuck[page >> buddy.geometry.chunk_order] |=
				runs[page].stays;
	for (u32 v = 0; v < CHUNKS; v++)
		nr += stuck[v];
	return nr;
}

static void print_steps(const char *what, const u64 *steps)
{
	u64 all = 0, seen = 0;
	u32 median = 0, worst = 0;

	for (u32 i = 0; i < MOST_STEPS; i++) {
		all += steps[i];
		if (steps[i])
			worst = i;
	}
	while ((seen += steps[median]) * 2 < all)
		median++;
	printf("%s-steps-median %u\n%s-steps-worst %u\n", what, median, what,
	       worst);
}

int main(int argc, char **argv)
{
	u32 pages;

	if (argc != 4 || (strcmp(argv[1], "12") && strcmp(argv[1], "14") &&
			  strcmp(argv[1], "16"))) {
		fprintf(stderr, "usage: %s 12|14|16 CASE SEED\n", *argv);
		return 2;
	}
	while (moves < MOVES && strcmp(argv[2], names[moves]))
		moves++;
	if (moves == MOVES) {
		fprintf(stderr, "no such case: %s\n", argv[2]);
		return 2;
	}
	rng = strtoull(argv[3], NULL, 0);

	REQUIRE(!tm_buddy_init(&buddy, tm_geometry((unsigned int)atoi(argv[1])),
			       CHUNKS, &lock));
	while (nr_spare < CHUNKS) {
		spare[nr_spare] = nr_spare;
		nr_spare++;
	}
	pages = CHUNKS << buddy.geometry.chunk_order;
	for (u32 step = 0; step < STEPS; step++)
		if (used_pages() < pages / 10 * 9)
			alloc_object();
		else
			free_object(below(nr_objects));

	printf("used %.4f\n", (double)used_pages() / pages);
	printf("fallbacks %llu\n", fallbacks);
	printf("chunks-before %u\n", buddy.nr_chunks);
	printf("chunks-stuck %u\n", stuck_chunks());
	printf("before %.6f\n", fragmentation());
	compact();
	REQUIRE(!tm_buddy_check(&buddy));
	printf("after %.6f\n", fragmentation());
	printf("chunks-after %u\n", buddy.nr_chunks);
	printf("moved-runs %llu\nmoved-pages %llu\n", buddy.moved_runs,
	       buddy.moved_pages);
	printf("drains %llu\nhalved %llu\ngiven-up %llu\n", buddy.drains,
	       buddy.halved, buddy.given_up);
	print_steps("alloc", alloc_steps);
	print_steps("free", free_steps);
	return 0;
}
