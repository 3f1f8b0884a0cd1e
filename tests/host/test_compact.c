// SPDX-License-Identifier: GPL-2.0-only
/*
 * Draining and compaction, with the caller's part played here: contents are
 * copied, owners come and go while a move is under way, and moves fail.
 */
#include "buddy_model.h"
#include "core/compact.h"

#define SLOTS		6
#define MAX_MOVES	4
#define MAX_DRAINS	3
/* Passes a chunk rests after a drain that its caller gave up. */
#define REST		8

static tm_lock_t lock;
static struct tm_buddy buddy;
static struct buddy_model model;
/* What each page holds: the id of the run that it was written for. */
static u32 memory[BUDDY_MODEL_SLOTS][BUDDY_MODEL_PAGES];

/* A run on its way: the lock is not held. */
struct move {
	struct tm_page_id from;
	struct tm_page_id to;
	/* Of the run at @from, and of the one at @to until it is done. */
	u32 id;
	u32 to_id;
	struct tm_buddy_drain drain;
};

static struct move moves[MAX_MOVES];
static u32 nr_moves;

static void setup(unsigned int page_shift, u32 nr_slots)
{
	struct tm_geometry g = tm_geometry(page_shift);

	lock.held = false;
	CHECK_EQ(tm_buddy_init(&buddy, g, nr_slots, &lock), 0);
	buddy_model_init(&model, g, nr_slots);
	memset(memory, 0, sizeof(memory));
	nr_moves = 0;
	tm_host_lock(&lock);
}

static void add_chunks(u32 nr)
{
	for (struct tm_chunk_id id = { 0 }; id.v < nr; id.v++)
		buddy_do_add(&model, &buddy, id);
}

static u32 *contents(struct tm_page_id page)
{
	u32 pages = buddy_model_pages(&model);

	return &memory[page.v / pages][page.v % pages];
}

static void fill(const struct buddy_run *run, u32 value)
{
	for (u32 p = 0; p < 1u << run->order; p++)
		contents(run->page)[p] = value;
}

static int take(unsigned int order, bool unmovable, struct tm_page_id *page)
{
	int err = unmovable ?
		  buddy_do_alloc_unmovable(&model, &buddy, order, page) :
		  buddy_do_alloc(&model, &buddy, order, page);

	if (!err)
		fill(&model.runs[model.nr_runs - 1], model.last_id);
	return err;
}

/* As the module does it: a chunk that falls empty leaves the pool. */
static void give(u32 nth)
{
	struct tm_chunk_id id = tm_page_chunk(buddy.geometry,
					      model.runs[nth].page);

	fill(&model.runs[nth], 0);
	if (buddy_do_free(&model, &buddy, nth))
		CHECK_EQ(buddy_do_remove(&model, &buddy, id), 0);
}

static void give_page(struct tm_page_id page)
{
	u32 nth = buddy_model_find(&model, page);

	CHECK(nth < model.nr_runs);
	give(nth);
}

/* Every run has what was written for it, wherever it went. */
static void verify(void)
{
	buddy_model_compare(&model, &buddy);
	for (u32 i = 0; i < model.nr_runs; i++) {
		const struct buddy_run *run = &model.runs[i];

		if (run->arriving)
			continue;
		for (u32 p = 0; p < 1u << run->order; p++)
			CHECK_EQ(contents(run->page)[p], run->id);
	}
}

static void finish_all(void)
{
	while (nr_moves)
		give_page(moves[--nr_moves].to);
}

static void teardown(void)
{
	finish_all();
	while (model.nr_runs)
		give(model.nr_runs - 1);
	for (struct tm_chunk_id id = { 0 }; id.v < model.nr_slots; id.v++)
		if (model.in_pool[id.v])
			CHECK_EQ(buddy_do_remove(&model, &buddy, id), 0);
	buddy_model_compare(&model, &buddy);
	CHECK_EQ(buddy.drains, buddy.emptied + buddy.halved + buddy.given_up +
			       buddy.starved);
	tm_host_unlock(&lock);
	tm_buddy_destroy(&buddy);
}

static u32 used_pages(u32 v)
{
	u32 used = 0;

	for (u32 p = 0; p < buddy_model_pages(&model); p++)
		used += model.used[v][p];
	return used;
}

/* All of the aligned block of @size pages that page @p is in is free. */
static bool block_is_free(u32 v, u32 p, u32 size)
{
	for (u32 q = p / size * size; q < p / size * size + size; q++)
		if (model.used[v][q])
			return false;
	return true;
}

/*
 * Find an aligned free place in a chunk in use, and take it; not in a block of
 * @spare pages that was free before all this, if that is not 0.
 */
static bool place(bool used[][BUDDY_MODEL_PAGES], u32 size, u32 spare)
{
	for (u32 v = 0; v < model.nr_slots; v++) {
		if (!model.in_pool[v] || model.drain[v] || !used_pages(v))
			continue;
		for (u32 p = 0; p < buddy_model_pages(&model); p += size) {
			u32 n = 0;

			if (spare && block_is_free(v, p, spare))
				continue;
			while (n < size && !used[v][p + n])
				n++;
			if (n < size)
				continue;
			memset(&used[v][p], true, size);
			return true;
		}
	}
	return false;
}

/* Move all runs of @v in thought, page by page; or those below half a chunk. */
static bool fits(u32 v, bool half)
{
	u32 top = half ? buddy.geometry.chunk_order - 1u : TM_BUDDY_ORDERS;
	u32 spare = half ? buddy_model_pages(&model) / 2 : 0;
	static bool used[BUDDY_MODEL_SLOTS][BUDDY_MODEL_PAGES];

	memcpy(used, model.used, sizeof(used));
	memset(used[v], true, sizeof(used[v]));
	for (u32 run = top; run > 0; run--)
		for (u32 p = 0; p < buddy_model_pages(&model); p++)
			if (model.run[v][p] == run &&
			    !place(used, 1u << (run - 1), spare))
				return false;
	return true;
}

/* One half is one run; of the other, some is used and some may be free. */
static bool is_half(u32 v)
{
	u32 half = buddy_model_pages(&model) / 2;
	bool one = model.run[v][0] == buddy.geometry.chunk_order;
	bool other = model.run[v][half] == buddy.geometry.chunk_order;

	return one != other && used_pages(v) > half;
}

static bool qualifies(u32 v, u64 pass, bool half)
{
	return model.in_pool[v] && used_pages(v) &&
	       buddy_model_class(&model, v) == TM_BUDDY_MOVABLE &&
	       !buddy_model_arriving(&model, v) && model.rest[v] <= pass &&
	       (!half || is_half(v)) && fits(v, half);
}

/* Pages of the cheapest chunk to empty, or to empty by half; TM_NONE for none. */
static u32 cheapest(u64 pass, bool half)
{
	u32 best = TM_NONE;

	for (u32 v = 0; v < model.nr_slots; v++)
		if (qualifies(v, pass, half) && used_pages(v) < best)
			best = used_pages(v);
	return best;
}

/* Free pages in chunks in use. */
static u32 holes(void)
{
	u32 n = 0;

	for (u32 v = 0; v < model.nr_slots; v++)
		if (model.in_pool[v] && !model.drain[v] && used_pages(v))
			n += buddy_model_pages(&model) - used_pages(v);
	return n;
}

static void do_begin(struct tm_compact *compact)
{
	tm_compact_begin(&buddy, compact);
	CHECK_EQ(compact->pass, ++model.pass);
}

/* One call is a whole search here: there are fewer slots than it looks at. */
static int do_choose(struct tm_compact *compact, struct tm_buddy_drain *drain)
{
	u32 best = cheapest(compact->pass, false), v;
	bool half = false;
	int err;

	if (best == TM_NONE && holes() >= buddy_model_pages(&model)) {
		half = true;
		best = cheapest(compact->pass, true);
	}
	err = tm_compact_choose(&buddy, compact, drain);
	CHECK_EQ(err, best == TM_NONE ? -ENOENT : 0);
	if (err)
		return err;
	v = drain->id.v;
	CHECK(v < model.nr_slots);
	CHECK(qualifies(v, compact->pass, half));
	CHECK_EQ(used_pages(v), best);
	CHECK_EQ(drain->half, half);
	model.drain[v] = ++model.drains;
	CHECK_EQ(drain->nr, model.drains);
	memset(model.named[v], 0, sizeof(model.named[v]));
	if (half)
		buddy_model_drain_half(&model, v);
	return 0;
}

/* The next run of @drain, and where it goes. Return: what the core said. */
static int begin_move(struct tm_buddy_drain *drain)
{
	struct move *move = &moves[nr_moves];
	unsigned int order;
	int err;

	CHECK(nr_moves < MAX_MOVES);
	err = buddy_do_drain_next(&model, &buddy, drain, &move->from, &order);
	if (err)
		return err;
	move->id = model.runs[buddy_model_find(&model, move->from)].id;
	err = buddy_do_drain_alloc(&model, &buddy, drain, order, &move->to);
	if (err)
		return err;
	move->to_id = model.last_id;
	move->drain = *drain;
	nr_moves++;
	return 0;
}

/* The owner may have freed the run meanwhile: then there is nothing to move. */
static void end_move(u32 nth, bool fail)
{
	struct move move = moves[nth];
	u32 from = buddy_model_find(&model, move.from);
	u32 to = buddy_model_find(&model, move.to);
	bool there = from < model.nr_runs && model.runs[from].id == move.id;
	struct tm_chunk_id id;

	CHECK_EQ(model.runs[to].id, move.to_id);
	moves[nth] = moves[--nr_moves];
	if (!there || fail) {
		give(to);
		if (there)
			buddy_do_drain_cancel(&model, &buddy, &move.drain);
		return;
	}
	memcpy(contents(move.to), contents(move.from),
	       sizeof(u32) << model.runs[from].order);
	model.runs[to].id = move.id;
	fill(&model.runs[from], 0);
	id = tm_page_chunk(buddy.geometry, move.from);
	if (buddy_do_drain_moved(&model, &buddy, from, to))
		CHECK_EQ(buddy_do_remove(&model, &buddy, id), 0);
}

/* Drain to the end; the @failing-th move fails (0: none does). */
static int drain_all(struct tm_buddy_drain *drain, u32 failing)
{
	int err;

	while (!(err = begin_move(drain))) {
		verify();
		end_move(nr_moves - 1, failing && !--failing);
		verify();
	}
	return err;
}

static void compact_all(void)
{
	struct tm_compact compact;
	struct tm_buddy_drain drain;
	u32 drains = 0;

	do_begin(&compact);
	while (!do_choose(&compact, &drain)) {
		u32 v = drain.id.v;

		/* Nobody interferes: what fitted fits. */
		CHECK_EQ(drain_all(&drain, 0), -ENOENT);
		CHECK(!model.drain[v]);
		CHECK_EQ(model.in_pool[v], drain.half);
		/* A chunk at most by half, and then at most as a whole. */
		CHECK(++drains <= 2 * model.nr_slots);
	}
}

static struct tm_chunk_id chunk_of(struct tm_page_id page)
{
	return tm_page_chunk(buddy.geometry, page);
}

/* Runs of all orders in chunk 0, nothing else in use but a page of chunk 1. */
static void one_of_each(struct tm_page_id *other)
{
	unsigned int top = tm_buddy_max_order(&buddy);
	struct tm_page_id page;

	add_chunks(1);
	for (unsigned int order = 0; order <= top; order++)
		CHECK_EQ(take(order, false, &page), 0);
	/* The page that is left, so that the next one lies in chunk 1. */
	CHECK_EQ(take(0, false, &page), 0);
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 1 });
	CHECK_EQ(take(0, false, other), 0);
	CHECK_EQ(chunk_of(*other).v, 1);
	give_page(page);
}

TEST_PAGE_SIZES(compact_moves_a_chunk_largest_first)
{
	struct tm_buddy_drain drain;
	struct tm_page_id other;
	unsigned int top;
	u32 runs;

	setup(page_shift, 2);
	one_of_each(&other);
	top = tm_buddy_max_order(&buddy);
	runs = model.nr_runs;
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain), 0);
	for (unsigned int order = top + 1; order-- > 0;) {
		CHECK_EQ(begin_move(&drain), 0);
		verify();
		CHECK_EQ(model.runs[model.nr_runs - 1].order, order);
		CHECK_EQ(chunk_of(moves[0].to).v, 1);
		end_move(0, false);
		verify();
	}
	CHECK_EQ(begin_move(&drain), -ENOENT);
	CHECK(!model.in_pool[0]);
	CHECK_EQ(model.nr_runs, runs);
	CHECK_EQ(buddy.emptied, 1);
	CHECK_EQ(buddy.moved_runs, top + 1);
	CHECK_EQ(buddy.moved_pages, buddy_model_pages(&model) - 1);
	teardown();
}

/* Each move in turn fails: nothing is lost, and the chunk rests for some passes. */
TEST_PAGE_SIZES(compact_failure_at_each_move)
{
	u32 top = tm_geometry(page_shift).chunk_order - 1;

	for (u32 nth = 1; nth <= top + 1; nth++) {
		struct tm_compact compact;
		struct tm_buddy_drain drain;
		struct tm_page_id other;

		setup(page_shift, 2);
		one_of_each(&other);
		tm_op("move %u fails", nth);
		/* Only chunk 0 can be drained: chunk 1 has not the room of all. */
		CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
					      (struct tm_chunk_id){ 0 },
					      &drain), 0);
		CHECK_EQ(drain_all(&drain, nth), -ENOENT);
		CHECK_EQ(buddy.given_up, 1);
		CHECK_EQ(buddy.moved_runs, nth - 1);
		CHECK(model.in_pool[0]);
		CHECK_EQ(buddy.chunks[0].class, TM_BUDDY_MOVABLE);
		/* Make it the only one that could be chosen. */
		for (u32 p = 0; p < buddy_model_pages(&model); p++)
			if (model.run[1][p])
				buddy.chunks[1].rest = model.rest[1] = ~0ull;
		for (u32 pass = 1; pass < REST; pass++) {
			do_begin(&compact);
			CHECK_EQ(do_choose(&compact, &drain), -ENOENT);
		}
		do_begin(&compact);
		CHECK_EQ(do_choose(&compact, &drain), 0);
		CHECK_EQ(drain.id.v, 0);
		CHECK_EQ(drain_all(&drain, 0), -ENOENT);
		CHECK(!model.in_pool[0]);
		teardown();
	}
}

/* Nothing comes out of a chunk that drains; what is freed in it still joins. */
TEST_PAGE_SIZES(compact_draining_chunk_gives_nothing)
{
	struct tm_page_id other, page, kept;
	struct tm_buddy_drain drain;
	unsigned int order;

	setup(page_shift, 3);
	one_of_each(&other);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain), 0);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain),
		 -EBUSY);
	/* The owner of a run that was named frees it before it moves. */
	CHECK_EQ(buddy_do_drain_next(&model, &buddy, &drain, &kept, &order), 0);
	give_page(kept);
	verify();
	for (u32 i = 0; i < buddy_model_pages(&model) - 1; i++) {
		CHECK_EQ(take(0, i % 2, &page), 0);
		CHECK_EQ(chunk_of(page).v, 1);
	}
	CHECK_EQ(buddy.drains, 1);
	CHECK_EQ(buddy.starved, 0);
	CHECK_EQ(buddy.chunks[0].class, TM_BUDDY_DRAINING);
	verify();
	teardown();
}

/* Free runs are left in draining chunks only: an allocation gets one of them. */
TEST_PAGE_SIZES(compact_never_fails_an_allocation)
{
	for (u32 unmovable = 0; unmovable < 2; unmovable++) {
		struct tm_buddy_drain drain[2];
		struct tm_compact compact;
		struct tm_page_id page;
		unsigned int top;

		/* Chunks 0 and 1 have a page free each, 2 has none. */
		setup(page_shift, 3);
		top = tm_buddy_max_order(&buddy);
		add_chunks(3);
		while (!take(0, false, &page))
			;
		give_page(tm_page_id(buddy.geometry,
				     (struct tm_chunk_id){ 0 }, 3));
		give_page(tm_page_id(buddy.geometry,
				     (struct tm_chunk_id){ 1 }, 4));
		for (u32 v = 0; v < 2; v++)
			CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
						      (struct tm_chunk_id){ v },
						      &drain[v]), 0);
		do_begin(&compact);
		/* Too much is too much, and does not disturb anybody. */
		CHECK_EQ(take(1, unmovable, &page), -ENOMEM);
		CHECK_EQ(take(top + 1, unmovable, &page), -EINVAL);
		CHECK_EQ(buddy.starved, 0);
		CHECK_EQ(take(0, unmovable, &page), 0);
		CHECK_EQ(buddy.starved, 1);
		CHECK_EQ(take(0, unmovable, &page), 0);
		CHECK_EQ(buddy.starved, 2);
		CHECK_EQ(take(0, unmovable, &page), -ENOMEM);
		verify();
		/* Both drains are over, and cancelling them changes nothing. */
		for (u32 v = 0; v < 2; v++) {
			unsigned int order;

			CHECK_EQ(buddy_do_drain_next(&model, &buddy, &drain[v],
						     &page, &order), -ENOENT);
			CHECK_EQ(buddy_do_drain_alloc(&model, &buddy, &drain[v],
						      0, &page), -ENOENT);
			buddy_do_drain_cancel(&model, &buddy, &drain[v]);
		}
		CHECK_EQ(buddy.given_up, 0);
		verify();
		teardown();
	}
}

/* No room but in a chunk that is all free, and in one that drains. */
TEST_PAGE_SIZES(compact_moves_into_chunks_in_use_only)
{
	struct tm_page_id page[3], to, from;
	struct tm_buddy_drain drain[2];
	struct tm_compact compact;
	unsigned int order;

	setup(page_shift, 4);
	for (struct tm_chunk_id id = { 0 }; id.v < 3; id.v++) {
		/* Fill what is there, so that the next page is in @id. */
		buddy_do_add(&model, &buddy, id);
		CHECK_EQ(take(0, false, &page[id.v]), 0);
		while (!take(0, false, &to))
			;
	}
	give_page(to);
	give_page(tm_page_id(buddy.geometry, (struct tm_chunk_id){ 0 }, 1));
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 3 });
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain[0]), 0);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 2 }, &drain[1]), 0);
	do_begin(&compact);
	CHECK_EQ(buddy_do_drain_next(&model, &buddy, &drain[0], &from, &order),
		 0);
	CHECK_EQ(buddy_do_drain_alloc(&model, &buddy, &drain[0],
				      tm_buddy_max_order(&buddy) + 1, &to),
		 -EINVAL);
	CHECK_EQ(buddy_do_drain_alloc(&model, &buddy, &drain[0], order, &to),
		 -ENOMEM);
	/* That was the end of this drain, and not of the other. */
	CHECK_EQ(buddy.starved, 1);
	CHECK_EQ(buddy.chunks[0].class, TM_BUDDY_MOVABLE);
	CHECK_EQ(buddy.chunks[2].class, TM_BUDDY_DRAINING);
	/* Chunk 0 is in service: the other drain finds its free page. */
	CHECK_EQ(buddy_do_drain_next(&model, &buddy, &drain[1], &from, &order),
		 0);
	CHECK_EQ(buddy_do_drain_alloc(&model, &buddy, &drain[1], order, &to),
		 0);
	CHECK_EQ(chunk_of(to).v, 0);
	fill(&model.runs[model.nr_runs - 1], model.last_id);
	verify();
	/* It rests for this pass and may be drained in the next. */
	CHECK_EQ(buddy.chunks[0].rest, compact.pass + 1);
	teardown();
}

/* A handle whose drain is over must not touch the drain that came after it. */
TEST_PAGE_SIZES(compact_old_drains_are_over)
{
	struct tm_chunk_id zero = { 0 };
	struct tm_buddy_drain old, now;
	struct tm_page_id page, to;
	unsigned int order;

	setup(page_shift, 3);
	for (u32 how = 0; how < 3; how++) {
		add_chunks(2);
		CHECK_EQ(take(tm_buddy_max_order(&buddy), false, &page), 0);
		if (chunk_of(page).v)
			CHECK_EQ(take(tm_buddy_max_order(&buddy), false, &to),
				 0);
		while (chunk_of(page).v)
			CHECK_EQ(take(tm_buddy_max_order(&buddy), false, &page),
				 0);
		CHECK_EQ(buddy_do_drain_begin(&model, &buddy, zero, &old), 0);
		if (how == 0) {
			buddy_do_drain_cancel(&model, &buddy, &old);
		} else if (how == 1) {
			give_page(page);
			CHECK(!model.in_pool[0]);
			CHECK_EQ(buddy_do_drain_next(&model, &buddy, &old, &to,
						     &order), -ENOENT);
			buddy_do_drain_cancel(&model, &buddy, &old);
			buddy_do_add(&model, &buddy, zero);
		} else {
			while (model.drain[0])
				CHECK_EQ(take(0, false, &to), 0);
		}
		while (used_pages(0) == 0)
			CHECK_EQ(take(0, false, &to), 0);
		CHECK_EQ(buddy_do_drain_begin(&model, &buddy, zero, &now), 0);
		CHECK_EQ(buddy_do_drain_next(&model, &buddy, &old, &page,
					     &order), -ENOENT);
		CHECK_EQ(buddy_do_drain_alloc(&model, &buddy, &old, 0, &to),
			 -ENOENT);
		buddy_do_drain_cancel(&model, &buddy, &old);
		CHECK_EQ(buddy.chunks[0].class, TM_BUDDY_DRAINING);
		CHECK_EQ(buddy_do_drain_next(&model, &buddy, &now, &page,
					     &order), 0);
		buddy_do_drain_cancel(&model, &buddy, &now);
		verify();
		while (model.nr_runs)
			give(0);
	}
	teardown();
}

/* From nowhere, to nowhere, to a run that is somebody's, with another order. */
TEST_PAGE_SIZES(compact_wrong_moves_change_nothing)
{
	struct tm_page_id other, from, to, page;
	struct buddy_snapshot before;
	struct tm_buddy_drain drain;
	unsigned int order, wrong;
	bool empty = true;

	setup(page_shift, 2);
	one_of_each(&other);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain), 0);
	CHECK_EQ(buddy_do_drain_next(&model, &buddy, &drain, &from, &order), 0);
	CHECK_EQ(buddy_do_drain_next(&model, &buddy, &drain, &from, &order), 0);
	CHECK_EQ(buddy_do_drain_alloc(&model, &buddy, &drain, order, &to), 0);
	CHECK_EQ(take(order, false, &page), 0);
	buddy_snapshot_take(&before, &buddy);
	for (u32 p = 0; p < 3 * buddy_model_pages(&model); p++) {
		struct tm_page_id wild = { p };

		/* Not the place that was allocated for it. */
		if (p != to.v)
			CHECK_EQ(tm_buddy_drain_moved(&buddy, from, wild, order,
						      &empty), -EINVAL);
		/* Not a run of this order; and @to itself is none to move. */
		if (p != from.v && p != page.v)
			CHECK_EQ(tm_buddy_drain_moved(&buddy, wild, to, order,
						      &empty), -EINVAL);
	}
	for (wrong = 0; wrong < 300; wrong++)
		if (wrong != order)
			CHECK_EQ(tm_buddy_drain_moved(&buddy, from, to, wrong,
						      &empty), -EINVAL);
	CHECK_EQ(tm_buddy_drain_moved(&buddy, from, to, ~0u, &empty), -EINVAL);
	CHECK_EQ(tm_buddy_drain_moved(&buddy, from,
				      (struct tm_page_id){ TM_NONE }, order,
				      &empty), -EINVAL);
	CHECK(empty);
	CHECK(buddy_snapshot_same(&before, &buddy));
	buddy_do_drain_moved(&model, &buddy, buddy_model_find(&model, from),
			     buddy_model_find(&model, to));
	buddy_model_compare(&model, &buddy);
	teardown();
}

/* What cannot be drained is refused, and a run that cannot move is never named. */
TEST_PAGE_SIZES(compact_leaves_the_unmovable)
{
	struct tm_page_id stays, page, other;
	struct tm_buddy_drain drain;
	struct tm_compact compact;

	setup(page_shift, 4);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain),
		 -EINVAL);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 4 }, &drain),
		 -EINVAL);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ TM_NONE }, &drain),
		 -EINVAL);
	add_chunks(1);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain),
		 -EINVAL);
	CHECK_EQ(take(0, true, &stays), 0);
	CHECK_EQ(take(0, true, &page), 0);
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 1 });
	CHECK_EQ(take(1, false, &other), 0);
	CHECK_EQ(chunk_of(other).v, 1);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain),
		 -EBUSY);
	/* The chunk with less in it is not the one that is chosen. */
	CHECK_EQ(take(2, false, &page), 0);
	do_begin(&compact);
	CHECK_EQ(do_choose(&compact, &drain), 0);
	CHECK_EQ(drain.id.v, 1);
	CHECK_EQ(drain_all(&drain, 0), -ENOENT);
	CHECK_EQ(do_choose(&compact, &drain), -ENOENT);
	/* One of two such runs goes, then the other. */
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 1 });
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 2 });
	give_page(stays);
	verify();
	CHECK_EQ(buddy.chunks[0].class, TM_BUDDY_UNMOVABLE);
	for (u32 i = 0; i < model.nr_runs; i++)
		if (model.runs[i].unmovable) {
			give(i);
			break;
		}
	verify();
	CHECK_EQ(buddy.chunks[0].class, TM_BUDDY_MOVABLE);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy,
				      (struct tm_chunk_id){ 0 }, &drain), 0);
	teardown();
}

/* Runs that stay share chunks, though movable ones come between them. */
TEST_PAGE_SIZES(compact_groups_by_mobility)
{
	bool stuck[BUDDY_MODEL_SLOTS] = { 0 };
	struct tm_page_id page;
	u32 pages, nr = 0;

	setup(page_shift, 8);
	pages = buddy_model_pages(&model);
	add_chunks(8);
	/* A chunk and a half of them, and four of the others. */
	for (u32 i = 0; i < pages / 2 * 11; i++) {
		bool stays = i % 11 < 3;

		CHECK_EQ(take(0, stays, &page), 0);
		if (stays)
			stuck[chunk_of(page).v] = true;
	}
	verify();
	for (u32 v = 0; v < 8; v++)
		nr += stuck[v];
	CHECK_EQ(nr, 2);
	teardown();
}

/* The pages would fit, the orders do not: that chunk is not begun in vain. */
TEST_PAGE_SIZES(compact_looks_at_orders)
{
	struct tm_buddy_drain drain;
	struct tm_compact compact;
	struct tm_page_id page;
	u32 pages;

	/* Chunk 0 has one run of order 1, chunk 1 every other page. */
	setup(page_shift, 2);
	pages = buddy_model_pages(&model);
	add_chunks(1);
	for (u32 i = 0; i < pages; i++)
		CHECK_EQ(take(0, false, &page), 0);
	for (u32 i = 0; i < pages; i += 2)
		give_page(tm_page_id(buddy.geometry, (struct tm_chunk_id){ 0 },
				     i));
	buddy_do_add(&model, &buddy, (struct tm_chunk_id){ 1 });
	CHECK_EQ(take(1, false, &page), 0);
	do_begin(&compact);
	CHECK_EQ(do_choose(&compact, &drain), 0);
	CHECK_EQ(drain.id.v, 0);
	buddy_do_drain_cancel(&model, &buddy, &drain);
	CHECK_EQ(do_choose(&compact, &drain), -ENOENT);
	/* Two pages that are one run make the difference. */
	give_page(tm_page_id(buddy.geometry, (struct tm_chunk_id){ 0 }, 1));
	CHECK_EQ(do_choose(&compact, &drain), 0);
	CHECK_EQ(drain.id.v, 1);
	CHECK_EQ(drain_all(&drain, 0), -ENOENT);
	teardown();
}

/*
 * The pages are there, the halves are not: chunks of half a run and some pages
 * cannot move, until one of them has given away the pages.
 */
TEST_PAGE_SIZES(compact_empties_a_half_first)
{
	struct tm_buddy_drain drain;
	struct tm_compact compact;
	struct tm_page_id page;
	unsigned int top;
	u32 pages;

	setup(page_shift, 3);
	top = tm_buddy_max_order(&buddy);
	pages = buddy_model_pages(&model);
	for (struct tm_chunk_id id = { 0 }; id.v < 3; id.v++) {
		buddy_do_add(&model, &buddy, id);
		CHECK_EQ(take(top, false, &page), 0);
		CHECK_EQ(chunk_of(page).v, id.v);
		for (u32 i = 0; i < pages / 2; i++)
			CHECK_EQ(take(0, false, &page), 0);
	}
	/* A quarter of two halves stays, and half of the third. */
	for (u32 i = 0; i < pages / 2; i++)
		for (u32 v = 0; v < 3; v++)
			if (i % (v == 2 ? 2 : 4))
				give_page(tm_page_id(buddy.geometry,
						     (struct tm_chunk_id){ v },
						     pages / 2 + i));
	verify();
	CHECK_EQ(holes(), pages);
	do_begin(&compact);
	CHECK_EQ(do_choose(&compact, &drain), 0);
	CHECK(drain.half);
	CHECK_EQ(drain_all(&drain, 0), -ENOENT);
	CHECK_EQ(buddy.halved, 1);
	CHECK_EQ(buddy.given_up, 0);
	CHECK_EQ(used_pages(drain.id.v), pages / 2);
	CHECK_EQ(buddy.chunks[drain.id.v].class, TM_BUDDY_MOVABLE);
	/* It is over. */
	buddy_do_drain_cancel(&model, &buddy, &drain);
	CHECK_EQ(buddy.given_up, 0);
	/* Now another finds room in that half. */
	CHECK_EQ(do_choose(&compact, &drain), 0);
	CHECK(!drain.half);
	CHECK_EQ(drain_all(&drain, 0), -ENOENT);
	CHECK_EQ(buddy.nr_chunks, 2);
	CHECK_EQ(do_choose(&compact, &drain), -ENOENT);
	teardown();
}

/* A table that takes several calls, without the model: it has not the slots. */
TEST(compact_searches_in_slices)
{
	const u32 slots = 3 * TM_COMPACT_SCAN + 5;
	struct tm_page_id page, keep;
	struct tm_buddy_drain drain;
	struct tm_compact compact;
	bool empty;

	lock.held = false;
	CHECK_EQ(tm_buddy_init(&buddy, tm_geometry(16), slots, &lock), 0);
	tm_host_lock(&lock);
	/*
	 * Two halves everywhere, but one page in the last chunk; and in chunk 0 a
	 * quarter, a free quarter and a half, which fit into the last.
	 */
	for (struct tm_chunk_id id = { 0 }; id.v < slots; id.v++) {
		tm_buddy_add_chunk(&buddy, id);
		if (id.v == slots - 1)
			break;
		if (id.v == 0) {
			CHECK_EQ(tm_buddy_alloc(&buddy, 3, &page), 0);
			CHECK_EQ(tm_buddy_alloc(&buddy, 3, &keep), 0);
		} else {
			CHECK_EQ(tm_buddy_alloc(&buddy, 4, &page), 0);
		}
		CHECK_EQ(tm_buddy_alloc(&buddy, 4, &page), 0);
		CHECK_EQ(tm_page_chunk(buddy.geometry, page).v, id.v);
	}
	CHECK_EQ(tm_buddy_alloc(&buddy, 0, &page), 0);
	CHECK_EQ(tm_page_chunk(buddy.geometry, page).v, slots - 1);
	CHECK_EQ(keep.v, 8);
	CHECK_EQ(tm_buddy_free(&buddy, keep, 3, &empty), 0);

	tm_compact_begin(&buddy, &compact);
	for (u32 call = 0; call < 3; call++) {
		CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -EAGAIN);
		CHECK_EQ(compact.slot, (call + 1) * TM_COMPACT_SCAN);
	}
	CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), 0);
	CHECK_EQ(drain.id.v, slots - 1);
	tm_buddy_drain_cancel(&buddy, &drain);

	/* What a search found, and what is not so any more at its end. */
	for (u32 how = 0; how < 3; how++) {
		CHECK_EQ(buddy.pass, 1 + how);
		tm_compact_begin(&buddy, &compact);
		CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -EAGAIN);
		CHECK_EQ(compact.best, 0);
		if (how == 0) {
			/* Given up meanwhile, by another pass. */
			CHECK_EQ(tm_buddy_drain_begin(
				&buddy, (struct tm_chunk_id){ 0 }, &drain), 0);
			tm_buddy_drain_cancel(&buddy, &drain);
			buddy.chunks[0].rest = compact.pass + 1;
		} else if (how == 1) {
			/* There is more in it than finds room. */
			CHECK_EQ(tm_buddy_alloc(&buddy, 3, &keep), 0);
			CHECK_EQ(keep.v, 8);
		} else {
			/* It is all free. */
			CHECK_EQ(tm_buddy_free(&buddy, (struct tm_page_id){ 0 },
					       3, &empty), 0);
			CHECK_EQ(tm_buddy_free(&buddy, (struct tm_page_id){ 16 },
					       4, &empty), 0);
			CHECK(empty);
		}
		for (u32 call = 0; call < 2; call++)
			CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain),
				 -EAGAIN);
		CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -EAGAIN);
		/* It started over, and finds nothing now. */
		CHECK_EQ(compact.slot, 0);
		for (u32 call = 0; call < 3; call++)
			CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain),
				 -EAGAIN);
		CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -ENOENT);
		CHECK_OK(tm_buddy_check(&buddy));
		if (how == 1)
			CHECK_EQ(tm_buddy_free(&buddy, keep, 3, &empty), 0);
	}
	tm_host_unlock(&lock);
	buddy.nr_chunks = 0;
	tm_buddy_destroy(&buddy);
}

/* The half to empty that a search found is none any more at its end. */
TEST(compact_looks_again_at_a_half)
{
	struct tm_buddy_drain drain;
	struct tm_compact compact;
	struct tm_page_id page;
	bool empty;

	lock.held = false;
	CHECK_EQ(tm_buddy_init(&buddy, tm_geometry(16), TM_COMPACT_SCAN + 1,
			       &lock), 0);
	tm_host_lock(&lock);
	/* Three times half a run, and every fourth page of the other half. */
	for (struct tm_chunk_id id = { 0 }; id.v < 3; id.v++) {
		tm_buddy_add_chunk(&buddy, id);
		CHECK_EQ(tm_buddy_alloc(&buddy, 4, &page), 0);
		for (u32 i = 0; i < 16; i++)
			CHECK_EQ(tm_buddy_alloc(&buddy, 0, &page), 0);
	}
	for (u32 p = 0; p < 3 * 32; p++)
		if (p % 32 >= 16 && p % 4)
			CHECK_EQ(tm_buddy_free(&buddy, (struct tm_page_id){ p },
					       0, &empty), 0);
	tm_compact_begin(&buddy, &compact);
	CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -EAGAIN);
	CHECK_EQ(compact.best, TM_NONE);
	CHECK_EQ(compact.half, 0);
	CHECK_EQ(tm_buddy_free(&buddy, (struct tm_page_id){ 0 }, 4, &empty), 0);
	CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -EAGAIN);
	CHECK_EQ(buddy.drains, 0);
	/* The next search finds that there is a half free now. */
	CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), -EAGAIN);
	CHECK_EQ(tm_compact_choose(&buddy, &compact, &drain), 0);
	CHECK(!drain.half);
	CHECK_OK(tm_buddy_check(&buddy));
	tm_host_unlock(&lock);
	buddy.nr_chunks = 0;
	tm_buddy_destroy(&buddy);
}

/* By hand: what is free, and what of it a request for a chunk can have. */
TEST_PAGE_SIZES(compact_fragmentation_by_hand)
{
	struct tm_page_id page, other;
	struct tm_buddy_drain drain;
	unsigned int top;

	setup(page_shift, 4);
	top = tm_buddy_max_order(&buddy);
	CHECK_EQ(tm_fragmentation(&buddy, 0), 0);
	CHECK_EQ(tm_fragmentation(&buddy, 7), 0);
	add_chunks(2);
	CHECK_EQ(tm_fragmentation(&buddy, 0), 0);
	/* Half a chunk of one and a half, of two and a half. */
	CHECK_EQ(take(top, false, &page), 0);
	CHECK_EQ(tm_fragmentation(&buddy, 0), 333333);
	CHECK_EQ(tm_fragmentation(&buddy, 1), 200000);
	CHECK_EQ(take(top - 1, false, &other), 0);
	/* That went to the chunk in use: a quarter of one and a quarter. */
	CHECK_EQ(tm_fragmentation(&buddy, 0), 200000);
	give_page(page);
	CHECK_EQ(tm_fragmentation(&buddy, 0), 428571);
	CHECK_EQ(tm_fragmentation(&buddy, TM_NONE >> TM_MAX_CHUNK_ORDER), 0);
	/* All of it. */
	CHECK_EQ(buddy_do_remove(&model, &buddy, (struct tm_chunk_id){
			!chunk_of(other).v }), 0);
	CHECK_EQ(tm_fragmentation(&buddy, 0), TM_FRAGMENTATION_ONE);
	give_page(other);
	/* A chunk that drains and is all free counts as what it is. */
	add_chunks(2);
	CHECK_EQ(take(top, false, &page), 0);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy, chunk_of(page), &drain),
		 0);
	CHECK_EQ(tm_fragmentation(&buddy, 0), 333333);
	CHECK(buddy_do_free(&model, &buddy, buddy_model_find(&model, page)));
	CHECK_EQ(tm_fragmentation(&buddy, 0), 0);
	teardown();
}

/* Holes all over; a pass without interference leaves none that it could fill. */
TEST_PAGE_SIZES(compact_packs_random_holes)
{
	struct tm_round round;

	tm_for_each_round(&round, 12, 40) {
		u32 before, after;

		setup(page_shift, BUDDY_MODEL_SLOTS);
		add_chunks(BUDDY_MODEL_SLOTS);
		for (u32 i = 0; i < 4000; i++) {
			struct tm_page_id page;
			unsigned int order = tm_rand_below(
				&round.rng, tm_buddy_max_order(&buddy) + 1);

			if (take(order, false, &page))
				break;
		}
		while (model.nr_runs && tm_rand_below(&round.rng, 64)) {
			give(tm_rand_below(&round.rng, model.nr_runs));
			tm_op("%u runs", model.nr_runs);
		}
		verify();
		before = tm_fragmentation(&buddy, BUDDY_MODEL_SLOTS -
						  buddy.nr_chunks);
		compact_all();
		verify();
		after = tm_fragmentation(&buddy, BUDDY_MODEL_SLOTS -
						 buddy.nr_chunks);
		CHECK(after <= before);
		/* No run is larger than half a chunk: two chunks at most differ. */
		CHECK_EQ(buddy.given_up + buddy.starved, 0);
		teardown();
	}
}

enum op {
	OP_ALLOC,
	OP_ALLOC_SMALL,
	OP_EXHAUST,
	OP_FREE,
	OP_FREE_MOVING,
	OP_ADD,
	OP_REMOVE,
	OP_PASS,
	OP_CHOOSE,
	OP_DRAIN,
	OP_DRAIN_HALF,
	OP_DRAIN_ALL,
	OP_MOVE_BEGIN,
	OP_MOVE_END,
	OP_MOVE_FAIL,
	OP_CANCEL,
	OPS,
};

static struct tm_buddy_drain drains[MAX_DRAINS];
static struct tm_compact passes[2];

static void random_op(enum op op, struct tm_rng *rng)
{
	struct tm_chunk_id id = { tm_rand_below(rng, model.nr_slots) };
	struct tm_buddy_drain *drain = &drains[tm_rand_below(rng, MAX_DRAINS)];
	struct tm_compact *pass = &passes[tm_rand_below(rng, 2)];
	bool unmovable = tm_rand_one_in(rng, 12);
	struct tm_page_id page;
	unsigned int order;
	u32 nth;

	switch (op) {
	case OP_ALLOC:
	case OP_ALLOC_SMALL:
		order = tm_rand_below(rng, op == OP_ALLOC_SMALL ? 2 :
				      tm_buddy_max_order(&buddy) + 1);
		tm_op("alloc order %u%s", order, unmovable ? " stays" : "");
		take(order, unmovable, &page);
		break;
	case OP_EXHAUST:
		order = tm_rand_below(rng, tm_buddy_max_order(&buddy) + 1);
		tm_op("exhaust with order %u", order);
		while (!take(order, unmovable, &page))
			;
		break;
	case OP_FREE:
		if (!model.nr_runs)
			break;
		nth = tm_rand_below(rng, model.nr_runs);
		if (model.runs[nth].arriving)
			break;
		tm_op("free page %u", model.runs[nth].page.v);
		give(nth);
		break;
	case OP_FREE_MOVING:
		if (!nr_moves)
			break;
		nth = buddy_model_find(
			&model, moves[tm_rand_below(rng, nr_moves)].from);
		if (nth == model.nr_runs || model.runs[nth].arriving)
			break;
		tm_op("free page %u on its way", model.runs[nth].page.v);
		give(nth);
		break;
	case OP_ADD:
		if (model.in_pool[id.v])
			break;
		tm_op("add chunk %u", id.v);
		buddy_do_add(&model, &buddy, id);
		break;
	case OP_REMOVE:
		tm_op("remove chunk %u", id.v);
		buddy_do_remove(&model, &buddy, id);
		break;
	case OP_PASS:
		tm_op("pass");
		do_begin(pass);
		break;
	case OP_CHOOSE:
		tm_op("choose, pass %llu", pass->pass);
		do_choose(pass, drain);
		break;
	case OP_DRAIN:
	case OP_DRAIN_HALF:
		tm_op("drain chunk %u%s", id.v,
		      op == OP_DRAIN ? "" : " by half");
		if (!buddy_do_drain_begin(&model, &buddy, id, drain) &&
		    op == OP_DRAIN_HALF) {
			buddy_do_drain_half(&model, &buddy, drain);
			if (nr_moves < MAX_MOVES && tm_rand_one_in(rng, 2))
				drain_all(drain, 0);
		}
		break;
	case OP_DRAIN_ALL:
		if (nr_moves == MAX_MOVES)
			break;
		/* When no earlier one is in force. */
		if (!drain->nr || model.drain[drain->id.v] != drain->nr)
			do_choose(pass, drain);
		if (!drain->nr)
			break;
		nth = tm_rand_one_in(rng, 3) ? tm_rand_below(rng, 40) : 0;
		tm_op("all of drain %llu, move %u fails", drain->nr, nth);
		drain_all(drain, nth);
		break;
	case OP_MOVE_BEGIN:
		if (!drain->nr || nr_moves == MAX_MOVES)
			break;
		tm_op("begin a move, drain %llu", drain->nr);
		begin_move(drain);
		break;
	case OP_MOVE_END:
	case OP_MOVE_FAIL:
		if (!nr_moves)
			break;
		nth = tm_rand_below(rng, nr_moves);
		tm_op("%s page %u to %u", op == OP_MOVE_END ? "move" :
							      "fail to move",
		      moves[nth].from.v, moves[nth].to.v);
		end_move(nth, op == OP_MOVE_FAIL);
		break;
	case OP_CANCEL:
		if (!drain->nr)
			break;
		tm_op("cancel drain %llu", drain->nr);
		buddy_do_drain_cancel(&model, &buddy, drain);
		break;
	case OPS:
		break;
	}
}

#define ROUNDS	10
#define STEPS	2500

TEST_PAGE_SIZES(compact_random)
{
	u64 emptied = 0, halved = 0, given_up = 0, starved = 0, moved = 0;
	struct tm_round round;

	tm_for_each_round(&round, ROUNDS, STEPS) {
		u32 weights[OPS] = { 0 };

		setup(page_shift, SLOTS);
		memset(drains, 0, sizeof(drains));
		do_begin(&passes[0]);
		do_begin(&passes[1]);
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 5);
				weights[tm_rand_one_in(&round.rng, 2) ?
					OP_FREE : OP_ALLOC] += 16;
				weights[OP_MOVE_BEGIN] += 12;
				weights[OP_MOVE_END] += 12;
				weights[OP_PASS] += 3;
				weights[OP_CHOOSE] += 3;
				weights[OP_EXHAUST] =
					tm_rand_one_in(&round.rng, 4);
				weights[OP_DRAIN] =
					tm_rand_one_in(&round.rng, 2);
			}
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng);
			verify();
		}
		finish_all();
		for (u32 i = 0; i < MAX_DRAINS; i++)
			if (drains[i].nr)
				buddy_do_drain_cancel(&model, &buddy,
						      &drains[i]);
		compact_all();
		verify();
		emptied += buddy.emptied;
		halved += buddy.halved;
		given_up += buddy.given_up;
		starved += buddy.starved;
		moved += buddy.moved_runs;
		teardown();
	}
	/* It all did happen. One round, or short ones, need not show it. */
	if (round.nr < ROUNDS || round.steps < STEPS)
		return;
	CHECK(emptied > 20);
	CHECK(halved > 10);
	CHECK(given_up > 20);
	CHECK(starved > 20);
	CHECK(moved > 200);
}

/* Every sequence of calls up to a depth, on two chunks of 4 pages. */
static u64 sequences;

static void descend(u32 depth)
{
	const u32 calls = 11;
	struct tm_buddy_drain old_drain = drains[0];
	struct tm_compact old_pass = passes[0];
	struct move old_moves[MAX_MOVES];
	struct buddy_snapshot here;
	u32 old_nr_moves = nr_moves;
	struct buddy_model was;
	struct tm_page_id page;

	verify();
	sequences++;
	if (!depth)
		return;
	was = model;
	memcpy(old_moves, moves, sizeof(moves));
	buddy_snapshot_take(&here, &buddy);
	for (u32 call = 0; call < calls + was.nr_runs; call++) {
		bool changed = true;

		tm_op("depth left %u: call %u", depth, call);
		if (call < 4)
			changed = !take(call % 2, call >= 2, &page);
		else if (call < 6 && !model.in_pool[call - 4])
			buddy_do_add(&model, &buddy,
				     (struct tm_chunk_id){ call - 4 });
		else if (call < 6)
			changed = !buddy_do_drain_begin(
				&model, &buddy,
				(struct tm_chunk_id){ call - 4 }, &drains[0]);
		else if (call == 6)
			changed = !do_choose(&passes[0], &drains[0]);
		else if (call == 7)
			changed = drains[0].nr && nr_moves < MAX_MOVES &&
				  begin_move(&drains[0]) != -ENOENT;
		else if (call < 10 && nr_moves)
			end_move(nr_moves - 1, call == 9);
		else if (call == 10 && drains[0].nr)
			buddy_do_drain_cancel(&model, &buddy, &drains[0]);
		else if (call < calls)
			changed = false;
		else if (!model.runs[call - calls].arriving)
			give(call - calls);
		else
			changed = false;
		if (changed)
			descend(depth - 1);
		buddy_snapshot_restore(&here, &buddy);
		model = was;
		memcpy(moves, old_moves, sizeof(moves));
		nr_moves = old_nr_moves;
		drains[0] = old_drain;
		passes[0] = old_pass;
		/* Contents follow from who has what. */
		for (u32 i = 0; i < model.nr_runs; i++)
			fill(&model.runs[i], model.runs[i].id);
	}
}

TEST(compact_exhaustive_sequences)
{
	setup(19, 2);
	add_chunks(2);
	memset(drains, 0, sizeof(drains));
	do_begin(&passes[0]);
	descend(7);
	CHECK(sequences > 100000);
	tm_host_unlock(&lock);
	/* The two it began with. */
	buddy.nr_chunks = 0;
	tm_buddy_destroy(&buddy);
}

static void unlocked(void *which)
{
	struct tm_buddy_drain drain = { .nr = 1 };
	struct tm_page_id page = { 0 };
	struct tm_compact compact = { 0 };
	unsigned int order;
	bool empty;

	lock.held = false;
	switch (*(int *)which) {
	case 0:
		(void)!tm_buddy_alloc_unmovable(&buddy, 0, &page);
		break;
	case 1:
		(void)!tm_buddy_drain_begin(&buddy, drain.id, &drain);
		break;
	case 2:
		(void)!tm_buddy_drain_next(&buddy, &drain, &page, &order);
		break;
	case 3:
		(void)!tm_buddy_drain_alloc(&buddy, &drain, 0, &page);
		break;
	case 4:
		(void)!tm_buddy_drain_moved(&buddy, page, page, 0, &empty);
		break;
	case 5:
		tm_buddy_drain_cancel(&buddy, &drain);
		break;
	case 6:
		tm_compact_begin(&buddy, &compact);
		break;
	case 7:
		(void)!tm_compact_choose(&buddy, &compact, &drain);
		break;
	case 8:
		(void)tm_fragmentation(&buddy, 0);
		break;
	case 9:
		tm_buddy_drain_half(&buddy, &drain);
		break;
	}
}

TEST(compact_calls_need_the_lock)
{
	static const char *const calls[] = {
		"alloc_unmovable", "drain_begin", "drain_next", "drain_alloc",
		"drain_moved", "drain_cancel", "begin", "choose",
		"fragmentation", "drain_half",
	};
	struct tm_buddy_drain drain;
	struct tm_page_id page;

	setup(12, 2);
	add_chunks(1);
	CHECK_EQ(take(0, false, &page), 0);
	CHECK_EQ(buddy_do_drain_begin(&model, &buddy, chunk_of(page), &drain),
		 0);
	for (int i = 0; i < 10; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	teardown();
}
