// SPDX-License-Identifier: GPL-2.0-only
/*
 * Small geometries, completely: the buddy pool in every state it can get into,
 * with every call tried in each.
 *
 * A state is what the future depends on: the layout of each chunk and the order
 * of the chunks on their lists. The counters are left out; they only count.
 */
#include <stdlib.h>

#include "buddy_model.h"

#define MAX_SLOTS	3
#define MAX_PAGES	8

/* What identifies a state. */
struct key {
	u8 in_pool[MAX_SLOTS];
	u8 run[MAX_SLOTS][MAX_PAGES];
	u8 list[MAX_SLOTS];
};

static tm_lock_t lock;
static struct tm_buddy buddy;
static struct buddy_model model;

static void setup(unsigned int page_shift, u32 nr_slots)
{
	struct tm_geometry g = tm_geometry(page_shift);

	CHECK_EQ(tm_buddy_init(&buddy, g, nr_slots, &lock), 0);
	buddy_model_init(&model, g, nr_slots);
	tm_host_lock(&lock);
}

/* A stored state is small: a handful of runs and chunks. */
struct stored {
	struct key key;
	struct tm_buddy buddy;
	struct tm_buddy_chunk chunks[MAX_SLOTS];
	struct buddy_run runs[MAX_SLOTS * MAX_PAGES];
	u32 nr_runs;
};

#define TABLE	(1u << 17)

static struct stored *stored;
static u32 nr_stored, room;
/* Open addressing; 0 is empty, else index + 1. */
static u32 table[TABLE];

static void make_key(struct key *key)
{
	u32 n = 0;

	memset(key, 0, sizeof(*key));
	for (u32 v = 0; v < model.nr_slots; v++) {
		key->in_pool[v] = model.in_pool[v];
		memcpy(key->run[v], model.run[v], MAX_PAGES);
	}
	for (u32 o = 0; o <= buddy.geometry.chunk_order; o++)
		for (u32 v = buddy.head[o]; v != TM_NONE;
		     v = buddy.chunks[v].next) {
			CHECK(n < MAX_SLOTS);
			key->list[n++] = (u8)(v + 1);
		}
}

static u32 hash(const struct key *key)
{
	const u8 *byte = (const u8 *)key;
	u32 h = 2166136261u;

	for (size_t i = 0; i < sizeof(*key); i++)
		h = (u32)((h ^ byte[i]) * 16777619ull);
	return h;
}

static void remember(void)
{
	struct stored *s;
	struct key key;
	u32 slot;

	make_key(&key);
	for (slot = hash(&key) % TABLE; table[slot]; slot = (slot + 1) % TABLE)
		if (!memcmp(&stored[table[slot] - 1].key, &key, sizeof(key)))
			return;
	if (nr_stored == room) {
		room = room ? room * 2 : 256;
		stored = realloc(stored, room * sizeof(*stored));
		CHECK(stored);
	}
	CHECK(nr_stored < TABLE / 2);
	s = &stored[nr_stored++];
	table[slot] = nr_stored;
	memset(s, 0, sizeof(*s));
	s->key = key;
	s->buddy = buddy;
	memcpy(s->chunks, buddy.chunks, model.nr_slots * sizeof(*s->chunks));
	memcpy(s->runs, model.runs, model.nr_runs * sizeof(*s->runs));
	s->nr_runs = model.nr_runs;
}

static void restore(u32 index)
{
	struct stored *s = &stored[index];

	buddy = s->buddy;
	memcpy(buddy.chunks, s->chunks, model.nr_slots * sizeof(*s->chunks));
	memcpy(model.runs, s->runs, s->nr_runs * sizeof(*s->runs));
	model.nr_runs = s->nr_runs;
	memset(model.used, 0, sizeof(*model.used) * MAX_SLOTS);
	memset(model.run, 0, sizeof(*model.run) * MAX_SLOTS);
	for (u32 v = 0; v < model.nr_slots; v++)
		model.in_pool[v] = s->key.in_pool[v];
	for (u32 i = 0; i < model.nr_runs; i++) {
		struct buddy_run run = model.runs[i];
		u32 v = run.page.v / buddy_model_pages(&model);
		u32 first = run.page.v % buddy_model_pages(&model);

		model.run[v][first] = (u8)(run.order + 1);
		for (u32 p = 0; p < 1u << run.order; p++)
			model.used[v][first + p] = true;
	}
	model.allocs = buddy.allocs;
	model.frees = buddy.frees;
	model.splits = buddy.splits;
	model.merges = buddy.merges;
}

/* Free every page of the table and one beyond, with every order, but the runs. */
static void bad_frees(void)
{
	u32 pages = buddy_model_pages(&model);

	for (u32 p = 0; p <= model.nr_slots * pages; p++)
		for (unsigned int order = 0; order <= 4; order++) {
			u32 v = p / pages;

			if (v < model.nr_slots &&
			    model.run[v][p % pages] == order + 1)
				continue;
			buddy_do_bad_free(&model, &buddy,
					  (struct tm_page_id){ p }, order);
		}
}

static void arrived(void)
{
	buddy_model_compare(&model, &buddy);
	remember();
}

/* Every call in state @index; those that succeed lead to other states. */
static void try_all(u32 index, bool chunks_move)
{
	struct tm_page_id page;

	restore(index);
	bad_frees();
	for (unsigned int order = 0; order <= 4; order++) {
		tm_op("state %u: alloc order %u", index, order);
		if (buddy_do_alloc(&model, &buddy, order, &page))
			continue;
		arrived();
		restore(index);
	}
	for (u32 i = 0; i < stored[index].nr_runs; i++) {
		tm_op("state %u: free run %u", index, i);
		buddy_do_free(&model, &buddy, i);
		arrived();
		restore(index);
	}
	if (!chunks_move)
		return;
	for (struct tm_chunk_id id = { 0 }; id.v < model.nr_slots; id.v++) {
		tm_op("state %u: add chunk %u", index, id.v);
		buddy_do_add(&model, &buddy, id);
		if (!stored[index].key.in_pool[id.v]) {
			arrived();
			restore(index);
		}
		tm_op("state %u: remove chunk %u", index, id.v);
		if (!buddy_do_remove(&model, &buddy, id)) {
			arrived();
			restore(index);
		}
	}
}

static u32 explore(bool chunks_move)
{
	u32 n;

	arrived();
	for (u32 index = 0; index < nr_stored; index++)
		try_all(index, chunks_move);
	n = nr_stored;
	free(stored);
	stored = NULL;
	nr_stored = room = 0;
	memset(table, 0, sizeof(table));
	tm_host_unlock(&lock);
	/* The state it ended in is one of many. */
	buddy.nr_chunks = 0;
	tm_buddy_destroy(&buddy);
	return n;
}

/*
 * One chunk of 8 pages. It is laid out in halves, each in halves: with f(0) = 2
 * (a page is free or used) and f(n) = f(n - 1)^2 + 1 (two halves, or one run) a
 * half has 26 layouts, and the chunk, which is never one run, 26^2.
 */
TEST(exhaustive_one_chunk_of_8_pages)
{
	setup(18, 1);
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 0 });
	CHECK_EQ(explore(false), 26 * 26);
}

/*
 * Three chunks of 4 pages that come and go. Of the 25 layouts 1 has an order 2 as
 * its largest free run, 8 an order 1, 12 an order 0; 4 are full and, like an
 * absent chunk, on no list. Every set of layouts with every order on the lists:
 * the sum of 3!/n! 1^a 8^b 12^c 5^n over a + b + c + n = 3.
 */
TEST(exhaustive_three_chunks_of_4_pages)
{
	u32 want = 0;

	for (u32 a = 0; a <= 3; a++)
		for (u32 b = 0; a + b <= 3; b++)
			for (u32 c = 0; a + b + c <= 3; c++) {
				u32 states = 1, n = 3 - a - b - c;

				for (u32 i = n + 1; i <= 3; i++)
					states *= i;
				for (u32 i = 0; i < b; i++)
					states *= 8;
				for (u32 i = 0; i < c; i++)
					states *= 12;
				for (u32 i = 0; i < n; i++)
					states *= 5;
				want += states;
			}
	setup(19, 3);
	CHECK_EQ(explore(true), want);
}

/* Every sequence of calls up to a depth, without leaving any out as known. */
static u64 sequences;

static void descend(u32 depth)
{
	struct buddy_model was = model;
	struct buddy_snapshot here;
	struct tm_page_id page;

	buddy_model_compare(&model, &buddy);
	sequences++;
	if (!depth)
		return;
	buddy_snapshot_take(&here, &buddy);
	/* Alloc of each order, then free of each run, then both chunks. */
	for (u32 call = 0; call < 3 + was.nr_runs + 2; call++) {
		if (call < 3) {
			tm_op("depth left %u: alloc order %u", depth, call);
			if (!buddy_do_alloc(&model, &buddy, call, &page))
				descend(depth - 1);
		} else if (call < 3 + was.nr_runs) {
			tm_op("depth left %u: free run %u", depth, call - 3);
			buddy_do_free(&model, &buddy, call - 3);
			descend(depth - 1);
		} else {
			struct tm_chunk_id id = { call - 3 - was.nr_runs };
			bool in = model.in_pool[id.v];

			tm_op("depth left %u: %s chunk %u", depth,
			      in ? "remove" : "add", id.v);
			if (!in)
				buddy_do_add(&model, &buddy, id);
			if (!in || !buddy_do_remove(&model, &buddy, id))
				descend(depth - 1);
		}
		buddy_snapshot_restore(&here, &buddy);
		model = was;
	}
}

TEST(exhaustive_sequences)
{
	setup(18, 2);
	descend(8);
	CHECK(sequences > 100000);
	tm_host_unlock(&lock);
	tm_buddy_destroy(&buddy);
}
