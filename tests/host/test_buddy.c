// SPDX-License-Identifier: GPL-2.0-only
/* Level 2, the buddy pool, by itself. */
#include "buddy_model.h"

#define SLOTS	5

static tm_lock_t lock;
static struct tm_buddy buddy;
static struct buddy_model model;

static void setup(unsigned int page_shift, u32 nr_slots)
{
	struct tm_geometry g = tm_geometry(page_shift);

	lock.held = false;
	CHECK_EQ(tm_buddy_init(&buddy, g, nr_slots, &lock), 0);
	buddy_model_init(&model, g, nr_slots);
	buddy_model_compare(&model, &buddy);
	tm_host_lock(&lock);
}

static void teardown(void)
{
	for (struct tm_chunk_id id = { 0 }; id.v < model.nr_slots; id.v++)
		if (model.in_pool[id.v])
			CHECK_EQ(buddy_do_remove(&model, &buddy, id), 0);
	buddy_model_compare(&model, &buddy);
	tm_host_unlock(&lock);
	tm_buddy_destroy(&buddy);
	CHECK(!buddy.chunks);
	CHECK_EQ(tm_host_tables(), 0);
}

/* Order limits from the page size alone: half of 2 MiB. */
static unsigned int max_order(void)
{
	unsigned int order = 0;

	while (2u << order < buddy_model_pages(&model))
		order++;
	return order;
}

/* No two orders may share a word of the bitmap, and none may lie outside it. */
TEST_PAGE_SIZES(buddy_bitmap_layout)
{
	bool taken[TM_BUDDY_WORDS] = { 0 };
	u32 orders = 0;

	setup(page_shift, 1);
	for (u32 runs = buddy_model_pages(&model); runs; runs /= 2) {
		u32 words = runs < 64 ? 1 : runs / 64;

		for (u32 w = 0; w < words; w++) {
			CHECK(buddy.word[orders] + w < TM_BUDDY_WORDS);
			CHECK(!taken[buddy.word[orders] + w]);
			taken[buddy.word[orders] + w] = true;
		}
		orders++;
	}
	CHECK_EQ(tm_buddy_max_order(&buddy), orders - 2);
	CHECK_EQ(tm_buddy_max_order(&buddy), max_order());
	teardown();
}

TEST(buddy_init_without_memory)
{
	memset(&buddy, 0xa5, sizeof(buddy));
	tm_host_fail_table(1);
	CHECK_EQ(tm_buddy_init(&buddy, tm_geometry(12), 4, &lock), -ENOMEM);
	CHECK(!buddy.chunks);
	CHECK_EQ(tm_host_tables(), 0);
	/* A failed init leaves something that destroy accepts. */
	tm_buddy_destroy(&buddy);
}

TEST(buddy_destroy_warns_of_chunks)
{
	setup(12, 2);
	tm_buddy_add_chunk(&buddy, (struct tm_chunk_id){ 1 });
	tm_host_unlock(&lock);
	tm_host_expect_warnings(1);
	tm_buddy_destroy(&buddy);
	CHECK_EQ(tm_host_missing_warnings(), 0);
}

/* A chunk beyond the table changes nothing, at either end of the numbers. */
TEST(buddy_refuses_chunks_beyond_the_table)
{
	static const u32 beyond[] = { 2, 3, 1u << 31, TM_NONE };
	struct buddy_snapshot before;

	setup(12, 2);
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 1 });
	buddy_snapshot_take(&before, &buddy);
	for (u32 i = 0; i < sizeof(beyond) / sizeof(*beyond); i++) {
		struct tm_chunk_id id = { beyond[i] };

		tm_host_expect_warnings(1);
		tm_buddy_add_chunk(&buddy, id);
		CHECK_EQ(tm_host_missing_warnings(), 0);
		CHECK_EQ(tm_buddy_remove_chunk(&buddy, id), -EINVAL);
		CHECK(buddy_snapshot_same(&before, &buddy));
	}
	teardown();
}

/* Fill chunks with runs of one order: nothing is left over, nothing overlaps. */
TEST_PAGE_SIZES(buddy_fill_each_order)
{
	setup(page_shift, SLOTS);
	for (u32 v = 0; v < SLOTS; v++)
		buddy_do_add(&model, &buddy, (struct tm_chunk_id){ v });
	for (unsigned int order = 0; order <= max_order(); order++) {
		u32 runs = SLOTS * (buddy_model_pages(&model) >> order);
		struct tm_page_id page;

		for (u32 i = 0; i < runs; i++) {
			tm_op("alloc order %u", order);
			CHECK_EQ(buddy_do_alloc(&model, &buddy, order, &page),
				 0);
		}
		buddy_model_compare(&model, &buddy);
		CHECK_EQ(tm_buddy_used_pages(&buddy),
			 SLOTS * buddy_model_pages(&model));
		for (unsigned int o = 0; o <= max_order(); o++)
			CHECK_EQ(buddy_do_alloc(&model, &buddy, o, &page),
				 -ENOMEM);
		/* Alternately the oldest and the newest. */
		for (u32 i = 0; i < runs; i++) {
			tm_op("free of order %u", order);
			buddy_do_free(&model, &buddy,
				      i % 2 ? 0 : model.nr_runs - 1);
		}
		buddy_model_compare(&model, &buddy);
		CHECK_EQ(tm_buddy_used_pages(&buddy), 0);
	}
	teardown();
}

/* Which chunk, and which run of it: the tightest, so that others fall empty. */
TEST_PAGE_SIZES(buddy_takes_the_tightest)
{
	struct tm_page_id big, page;
	unsigned int top;
	u32 tight;

	setup(page_shift, 3);
	top = max_order();
	for (u32 v = 0; v < 3; v++)
		buddy_do_add(&model, &buddy, (struct tm_chunk_id){ v });
	/* One chunk keeps a half, the others are whole. */
	CHECK_EQ(buddy_do_alloc(&model, &buddy, top, &big), 0);
	tight = tm_page_chunk(buddy.geometry, big).v;
	/* All small runs come from that half, until it is used up. */
	for (u32 i = 0; i < 1u << top; i++) {
		CHECK_EQ(buddy_do_alloc(&model, &buddy, 0, &page), 0);
		CHECK_EQ(tm_page_chunk(buddy.geometry, page).v, tight);
	}
	CHECK_EQ(buddy_do_alloc(&model, &buddy, 0, &page), 0);
	CHECK(tm_page_chunk(buddy.geometry, page).v != tight);
	while (model.nr_runs)
		buddy_do_free(&model, &buddy, 0);
	teardown();
}

/* Every page and every order, right or wrong, in a pool that holds all sorts. */
static void all_bad_frees(void)
{
	static const unsigned int wild[] = {
		10, 15, 16, 31, 32, 33, 63, 64, 255, 256, 257, 1u << 16,
		1u << 31, ~0u - 1, ~0u,
	};
	u32 pages = buddy_model_pages(&model);

	/* One chunk beyond the table too. */
	for (u32 p = 0; p < (model.nr_slots + 1) * pages; p++) {
		u32 v = p / pages;
		u8 run = v < model.nr_slots ? model.run[v][p % pages] : 0;
		struct tm_page_id page = { p };

		for (unsigned int order = 0; order < 10; order++)
			if (run != order + 1)
				buddy_do_bad_free(&model, &buddy, page, order);
		for (u32 i = 0; i < sizeof(wild) / sizeof(*wild); i++)
			buddy_do_bad_free(&model, &buddy, page, wild[i]);
	}
	for (unsigned int order = 0; order < 10; order++) {
		buddy_do_bad_free(&model, &buddy,
				  (struct tm_page_id){ TM_NONE }, order);
		buddy_do_bad_free(&model, &buddy,
				  (struct tm_page_id){ 1u << 31 }, order);
	}
}

TEST_PAGE_SIZES(buddy_bad_frees_change_nothing)
{
	struct tm_page_id page;

	/* Chunk 1 is not in the pool, and was. */
	setup(page_shift, 3);
	for (u32 v = 0; v < 2; v++)
		buddy_do_add(&model, &buddy, (struct tm_chunk_id){ v });
	while (!buddy_do_alloc(&model, &buddy, 1, &page))
		;
	while (model.nr_runs)
		buddy_do_free(&model, &buddy, 0);
	CHECK_EQ(buddy_do_remove(&model, &buddy, (struct tm_chunk_id){ 1 }), 0);
	tm_op("all free");
	all_bad_frees();
	for (unsigned int order = 0; order <= max_order(); order++) {
		CHECK_EQ(buddy_do_alloc(&model, &buddy, order, &page), 0);
		if (order == 1)
			buddy_do_free(&model, &buddy, 0);
	}
	tm_op("one run of each order but 0");
	all_bad_frees();
	while (!buddy_do_alloc(&model, &buddy, 0, &page))
		;
	tm_op("full");
	all_bad_frees();
	while (model.nr_runs)
		buddy_do_free(&model, &buddy, 0);
	teardown();
}

/* A run once freed is free; a second time it is refused. */
TEST_PAGE_SIZES(buddy_double_free)
{
	setup(page_shift, 1);
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 0 });
	for (unsigned int order = 0; order <= max_order(); order++) {
		struct tm_page_id page, other;

		CHECK_EQ(buddy_do_alloc(&model, &buddy, order, &page), 0);
		CHECK_EQ(buddy_do_alloc(&model, &buddy, order, &other), 0);
		buddy_do_free(&model, &buddy, 0);
		buddy_do_bad_free(&model, &buddy, page, order);
		buddy_do_free(&model, &buddy, 0);
		buddy_do_bad_free(&model, &buddy, page, order);
		buddy_do_bad_free(&model, &buddy, other, order);
		buddy_model_compare(&model, &buddy);
	}
	teardown();
}

enum op {
	OP_ALLOC,
	OP_ALLOC_SMALL,
	OP_ALLOC_TOO_LARGE,
	OP_EXHAUST,
	OP_FREE,
	OP_FREE_ALL,
	OP_DOUBLE_FREE,
	OP_BAD_FREE,
	OP_ADD,
	OP_REMOVE,
	OPS,
};

enum free_order {
	FREE_RANDOM,
	FREE_NEWEST,
	FREE_OLDEST,
	FREE_ORDERS,
};

static u32 pick_run(struct tm_rng *rng, enum free_order order)
{
	if (order == FREE_NEWEST)
		return model.nr_runs - 1;
	if (order == FREE_OLDEST)
		return 0;
	return tm_rand_below(rng, model.nr_runs);
}

static void free_one(struct tm_rng *rng, enum free_order how, bool twice)
{
	struct buddy_run run;
	u32 nth;

	if (!model.nr_runs)
		return;
	nth = pick_run(rng, how);
	run = model.runs[nth];
	tm_op("%sfree page %u order %u", twice ? "double " : "", run.page.v,
	      run.order);
	buddy_do_free(&model, &buddy, nth);
	if (twice)
		buddy_do_bad_free(&model, &buddy, run.page, run.order);
}

static void bad_free(struct tm_rng *rng)
{
	u32 pages = buddy_model_pages(&model);
	struct tm_page_id page;
	unsigned int order = tm_rand_below(rng, 12);

	/* Half of the time near a run: inside it, or with another order. */
	if (model.nr_runs && tm_rand_one_in(rng, 2)) {
		struct buddy_run run = model.runs[pick_run(rng, FREE_RANDOM)];

		page.v = run.page.v + tm_rand_below(rng, 1u << run.order);
	} else {
		page.v = tm_rand_below(rng, (model.nr_slots + 1) * pages);
	}
	if (page.v / pages < model.nr_slots &&
	    model.run[page.v / pages][page.v % pages] == order + 1)
		return;
	tm_op("bad free page %u order %u", page.v, order);
	buddy_do_bad_free(&model, &buddy, page, order);
}

static void random_op(enum op op, struct tm_rng *rng, enum free_order how)
{
	static const unsigned int too_large[] = { 10, 16, 31, 32, 64, ~0u };
	struct tm_chunk_id id = { tm_rand_below(rng, model.nr_slots) };
	struct tm_page_id page;
	unsigned int order;

	switch (op) {
	case OP_ALLOC:
	case OP_ALLOC_SMALL:
		order = tm_rand_below(rng, op == OP_ALLOC ? max_order() + 1 :
							    2);
		tm_op("alloc order %u", order);
		buddy_do_alloc(&model, &buddy, order, &page);
		break;
	case OP_ALLOC_TOO_LARGE:
		order = tm_rand_one_in(rng, 2) ? max_order() + 1 :
						 too_large[tm_rand_below(rng, 6)];
		tm_op("alloc order %u", order);
		CHECK_EQ(buddy_do_alloc(&model, &buddy, order, &page), -EINVAL);
		break;
	case OP_EXHAUST:
		order = tm_rand_below(rng, max_order() + 1);
		tm_op("exhaust with order %u", order);
		while (!buddy_do_alloc(&model, &buddy, order, &page))
			;
		break;
	case OP_FREE:
		free_one(rng, how, false);
		break;
	case OP_FREE_ALL:
		tm_op("free all");
		while (model.nr_runs)
			buddy_do_free(&model, &buddy, pick_run(rng, how));
		break;
	case OP_DOUBLE_FREE:
		free_one(rng, how, true);
		break;
	case OP_BAD_FREE:
		bad_free(rng);
		break;
	case OP_ADD:
		tm_op("add chunk %u", id.v);
		buddy_do_add(&model, &buddy, id);
		break;
	case OP_REMOVE:
		tm_op("remove chunk %u", id.v);
		buddy_do_remove(&model, &buddy, id);
		break;
	case OPS:
		break;
	}
}

TEST_PAGE_SIZES(buddy_random)
{
	struct tm_round round;

	tm_for_each_round(&round, 10, 3000) {
		enum free_order how = FREE_RANDOM;
		u32 weights[OPS] = { 0 };

		setup(page_shift, SLOTS);
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 6);
				weights[tm_rand_one_in(&round.rng, 2) ?
					OP_FREE : OP_ALLOC] += 20;
				weights[OP_EXHAUST] =
					tm_rand_one_in(&round.rng, 3);
				weights[OP_FREE_ALL] =
					tm_rand_one_in(&round.rng, 3);
				how = tm_rand_below(&round.rng, FREE_ORDERS);
			}
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng, how);
			buddy_model_compare(&model, &buddy);
		}
		while (model.nr_runs)
			buddy_do_free(&model, &buddy,
				      pick_run(&round.rng, how));
		teardown();
	}
}

static void unlocked(void *which)
{
	struct tm_chunk_id id = { 0 };
	struct tm_page_id page = { 0 };
	bool empty;

	lock.held = false;
	switch (*(int *)which) {
	case 0:
		id.v = 1;
		tm_buddy_add_chunk(&buddy, id);
		break;
	case 1:
		(void)!tm_buddy_remove_chunk(&buddy, id);
		break;
	case 2:
		(void)!tm_buddy_alloc(&buddy, 0, &page);
		break;
	case 3:
		(void)!tm_buddy_free(&buddy, page, 0, &empty);
		break;
	}
}

TEST(buddy_calls_need_the_lock)
{
	static const char *const calls[] = {
		"add_chunk", "remove_chunk", "alloc", "free",
	};

	setup(12, 2);
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 0 });
	for (int i = 0; i < 4; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	teardown();
}
