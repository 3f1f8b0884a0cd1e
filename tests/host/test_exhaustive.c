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
#include "chunk_model.h"

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

/*
 * The chunk pool of three slots, in the same way. Only an owned chunk's form tells
 * states apart: a free one's follows from its state, and that of an ABSENT or
 * GROWING one is of memory which is gone.
 */
#define CHUNK_SLOTS	3
#define CHUNK_STATES	3000
#define CHUNK_KEY_BITS	(8 * CHUNK_SLOTS)

static struct tm_chunk_pool chunk_pool;
static struct chunk_model chunk_model;
static struct chunk_stored {
	struct tm_chunk_pool pool;
	struct tm_chunk chunks[CHUNK_SLOTS];
	struct chunk_model model;
} chunk_stored[CHUNK_STATES];
static u32 nr_chunk_stored;
static bool chunk_known[1u << CHUNK_KEY_BITS];

/* Of each slot: the state, who has it in what form, the place in the stack. */
static u32 chunk_key(void)
{
	u32 key = 0;

	for (u32 v = 0; v < CHUNK_SLOTS; v++) {
		const struct tm_chunk *c = &chunk_pool.chunks[v];
		u32 kind = c->state;

		if (kind == TM_CHUNK_OWNED)
			kind += c->owner * 4u + c->form.split * 2u +
				c->form.charged;
		key |= kind << (8 * v);
	}
	for (u32 s = 0; s < TM_CHUNK_STATES; s++) {
		u32 place = 0;

		for (u32 v = chunk_pool.head[s]; v != TM_NONE;
		     v = chunk_pool.chunks[v].next)
			key |= place++ << (8 * v + 6);
	}
	return key;
}

static void chunk_restore(u32 index)
{
	const struct chunk_stored *s = &chunk_stored[index];
	struct tm_chunk *table_was = chunk_pool.chunks;

	chunk_pool = s->pool;
	CHECK(chunk_pool.chunks == table_was);
	memcpy(chunk_pool.chunks, s->chunks, sizeof(s->chunks));
	chunk_model = s->model;
}

static void chunk_arrived(void)
{
	struct chunk_stored *s = &chunk_stored[nr_chunk_stored];
	u32 key;

	chunk_model_compare(&chunk_model, &chunk_pool);
	key = chunk_key();
	if (chunk_known[key])
		return;
	chunk_known[key] = true;
	CHECK(nr_chunk_stored < CHUNK_STATES);
	nr_chunk_stored++;
	s->pool = chunk_pool;
	memcpy(s->chunks, chunk_pool.chunks, sizeof(s->chunks));
	s->model = chunk_model;
}

/* What a caller may do to one chunk: call @call of those there are. */
enum { CHUNK_CALLS = 14 };

static bool chunk_call(struct tm_chunk_id id, u32 call)
{
	enum tm_chunk_state state = id.v < CHUNK_SLOTS ?
				    chunk_model.state[id.v] : TM_CHUNK_STATES;
	struct tm_chunk_form form = {
		.split = call & 1,
		.charged = call >> 1 & 1,
	};
	enum tm_owner owner = call >> 2;
	enum tm_chunk_state needs = call < 11 ? TM_CHUNK_GROWING :
				    call < 13 ? TM_CHUNK_OWNED :
						TM_CHUNK_ZEROING;
	struct chunk_snapshot before;

	if (state != needs) {
		chunk_snapshot_take(&before, &chunk_pool);
		tm_host_expect_warnings(1);
		if (call < 8)
			tm_chunk_grow_take(&chunk_pool, id, owner, form);
		else if (call < 10)
			tm_chunk_grow_end(&chunk_pool, id, call & 1);
		else if (call == 10)
			tm_chunk_grow_abort(&chunk_pool, id);
		else if (call < 13)
			CHECK(!tm_chunk_put(&chunk_pool, id, call & 1));
		else
			tm_chunk_zero_end(&chunk_pool, id);
		CHECK_EQ(tm_host_missing_warnings(), 0);
		CHECK(chunk_snapshot_same(&before, &chunk_pool));
		return false;
	}
	if (call < 8) {
		chunk_do_grow_take(&chunk_model, &chunk_pool, id, owner, form,
				   false);
	} else if (call < 10) {
		chunk_do_grow_end(&chunk_model, &chunk_pool, id, call & 1);
	} else if (call == 10) {
		chunk_do_grow_abort(&chunk_model, &chunk_pool, id);
	} else if (call < 13) {
		chunk_model.written[id.v] = call & 1;
		chunk_do_put(&chunk_model, &chunk_pool, id);
	} else {
		chunk_do_zero_end(&chunk_model, &chunk_pool, id);
	}
	return true;
}

/* What a caller may ask of the pool. */
enum { POOL_CALLS = 12 };

static int pool_call(u32 call)
{
	struct tm_chunk_id id;

	switch (call) {
	case 8:
		return chunk_do_grow_begin(&chunk_model, &chunk_pool, &id);
	case 9:
		return chunk_do_recast_begin(&chunk_model, &chunk_pool, &id);
	case 10:
		return chunk_do_zero_begin(&chunk_model, &chunk_pool, &id);
	case 11:
		return chunk_do_remove(&chunk_model, &chunk_pool, &id);
	default:
		return chunk_do_take(&chunk_model, &chunk_pool, call >> 2,
				     call & 1, call >> 1 & 1, &id);
	}
}

static void chunk_try_all(u32 index)
{
	chunk_restore(index);
	for (u32 i = 0; i < (CHUNK_SLOTS + 1) * CHUNK_CALLS; i++) {
		struct tm_chunk_id id = { i / CHUNK_CALLS };

		tm_op("state %u: chunk %u call %u", index, id.v,
		      i % CHUNK_CALLS);
		if (!chunk_call(id, i % CHUNK_CALLS))
			continue;
		chunk_arrived();
		chunk_restore(index);
	}
	for (u32 call = 0; call < POOL_CALLS; call++) {
		tm_op("state %u: pool call %u", index, call);
		if (pool_call(call))
			continue;
		chunk_arrived();
		chunk_restore(index);
	}
	/* The bounds are the caller's to set at any time. */
	for (u32 capacity = 0; capacity <= CHUNK_SLOTS; capacity++) {
		struct tm_chunk_id id;

		chunk_model.capacity = chunk_pool.capacity = capacity;
		for (u32 reserve = 0; reserve <= CHUNK_SLOTS + 1; reserve++) {
			tm_op("state %u: capacity %u reserve %u", index,
			      capacity, reserve);
			chunk_model.reserve = chunk_pool.reserve = reserve;
			chunk_model_compare(&chunk_model, &chunk_pool);
		}
		chunk_do_grow_begin(&chunk_model, &chunk_pool, &id);
		chunk_restore(index);
	}
}

/*
 * A slot is in one of 4 stacks or one of 10 other ways: GROWING, ZEROING, or had
 * by one of 2 owners in one of 4 forms. m chunks are in 4 stacks in m! orders, cut
 * into 4 parts in C(m + 3, 3) ways: the sum of C(3, m) m! C(m + 3, 3) 10^(3 - m).
 */
TEST(exhaustive_three_chunks_of_a_pool)
{
	CHECK_EQ(tm_chunk_pool_init(&chunk_pool, CHUNK_SLOTS, &lock), 0);
	chunk_model_init(&chunk_model, CHUNK_SLOTS);
	tm_host_lock(&lock);
	chunk_arrived();
	for (u32 index = 0; index < nr_chunk_stored; index++)
		chunk_try_all(index);
	CHECK_EQ(nr_chunk_stored, 1000 + 3 * 1 * 4 * 100 + 3 * 2 * 10 * 10 +
				  1 * 6 * 20);
	chunk_restore(0);
	tm_host_unlock(&lock);
	tm_chunk_pool_destroy(&chunk_pool);
}
