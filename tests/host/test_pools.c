// SPDX-License-Identifier: GPL-2.0-only
/*
 * Both levels together, as the module runs them: chunks go from the system to
 * tensors and to the buddy pool, back, and from one to the other. The caller's
 * part (grow when nothing is free, recast when it cannot grow, undo when the rest
 * fails, give back what falls empty) is played here. Tensors have whole chunks,
 * some of them charged; the buddy pool has split ones.
 */
#include "buddy_model.h"
#include "chunk_model.h"

#define SLOTS		10
#define MAX_TENSORS	SLOTS
#define ROUNDS		10

struct tensor {
	struct tm_chunk_id chunks[SLOTS];
	u32 nr;
};

static tm_lock_t lock;
static struct tm_chunk_pool pool;
static struct tm_buddy buddy;
static struct chunk_model chunks;
static struct buddy_model pages;
static struct tensor tensors[MAX_TENSORS];
static u32 nr_tensors;
/* The last owner of a chunk, and how often it went to the other one. */
static int last_owner[SLOTS];
static u64 moves[TM_OWNERS];
static u64 recasts, charges;
/* The nth request to the system from now fails; 0: none does. */
static u32 system_fails;

static int setup(unsigned int page_shift, u32 nr_slots)
{
	struct tm_geometry g = tm_geometry(page_shift);
	int err;

	lock.held = false;
	system_fails = 0;
	nr_tensors = 0;
	err = tm_chunk_pool_init(&pool, nr_slots, &lock);
	if (err)
		return err;
	err = tm_buddy_init(&buddy, g, nr_slots, &lock);
	if (err) {
		tm_chunk_pool_destroy(&pool);
		return err;
	}
	chunk_model_init(&chunks, nr_slots);
	buddy_model_init(&pages, g, nr_slots);
	for (u32 v = 0; v < nr_slots; v++)
		last_owner[v] = -1;
	tm_host_lock(&lock);
	return 0;
}

static void compare(void)
{
	chunk_model_compare(&chunks, &pool);
	buddy_model_compare(&pages, &buddy);
	/* A chunk has one owner, and level 2 has what level 1 says it has. */
	for (u32 v = 0; v < chunks.nr_slots; v++) {
		if (pool.chunks[v].state == TM_CHUNK_OWNED)
			CHECK_EQ(pool.chunks[v].form.split,
				 pool.chunks[v].owner == TM_OWNER_BUDDY);
		CHECK_EQ(buddy.chunks[v].in_pool,
			 pool.chunks[v].state == TM_CHUNK_OWNED &&
			 pool.chunks[v].owner == TM_OWNER_BUDDY);
	}
	CHECK_EQ(buddy.nr_chunks, pool.owned[TM_OWNER_BUDDY]);
}

/*
 * Have memory of @form in a new slot or, with @recast, for a free chunk that is
 * given back. Return: 0, -ENOSPC at capacity, -ENOENT for nothing to recast,
 * -ENOMEM when the system has none.
 */
static int take_grown(bool recast, enum tm_owner owner,
		      struct tm_chunk_form form, bool zeroed,
		      struct tm_chunk_id *id)
{
	u32 total = tm_chunk_total(&pool);
	int err = recast ? chunk_do_recast_begin(&chunks, &pool, id) :
			   chunk_do_grow_begin(&chunks, &pool, id);

	if (err)
		return err;
	CHECK_EQ(tm_chunk_total(&pool), total + !recast);
	recasts += recast;
	/* The lock would be dropped here: the chunk is nobody's. */
	compare();
	if (system_fails && !--system_fails) {
		chunk_do_grow_abort(&chunks, &pool, *id);
		return -ENOMEM;
	}
	chunk_do_grow_take(&chunks, &pool, *id, owner, form, zeroed);
	charges += form.charged;
	return 0;
}

static int take(enum tm_owner owner, bool want_zeroed, bool charged,
		struct tm_chunk_id *id)
{
	struct tm_chunk_form form = {
		.split = owner == TM_OWNER_BUDDY,
		.charged = charged,
	};
	int err = -ENOMEM;

	if (!charged)
		err = chunk_do_take(&chunks, &pool, owner, form.split,
				    want_zeroed, id);
	if (err) {
		int grow_err = take_grown(false, owner, form, want_zeroed, id);

		err = grow_err;
		/* A bill that is full must not cost the pool its free chunks. */
		if (err == -ENOSPC || (err && !charged))
			err = take_grown(true, owner, form, want_zeroed, id);
		if (err == -ENOENT)
			err = grow_err;
		if (err)
			return err;
	}
	moves[owner] += last_owner[id->v] >= 0 &&
			last_owner[id->v] != (int)owner;
	last_owner[id->v] = owner;
	return 0;
}

/* All chunks or none. */
static int tensor_alloc(u32 nr, bool want_zeroed, bool charged)
{
	struct tensor *tensor = &tensors[nr_tensors];

	for (tensor->nr = 0; tensor->nr < nr; tensor->nr++) {
		int err = take(TM_OWNER_TENSOR, want_zeroed, charged,
			       &tensor->chunks[tensor->nr]);

		if (!err)
			continue;
		while (tensor->nr--)
			chunk_do_put(&chunks, &pool,
				     tensor->chunks[tensor->nr]);
		return err;
	}
	nr_tensors++;
	return 0;
}

static void tensor_free(u32 nth, bool written)
{
	struct tensor *tensor = &tensors[nth];

	for (u32 i = 0; i < tensor->nr; i++) {
		if (written)
			chunks.written[tensor->chunks[i].v] = true;
		chunk_do_put(&chunks, &pool, tensor->chunks[i]);
	}
	*tensor = tensors[--nr_tensors];
}

static int run_alloc(unsigned int order)
{
	struct tm_chunk_id id;
	struct tm_page_id page;
	int err = buddy_do_alloc(&pages, &buddy, order, &page);

	if (err == -ENOMEM) {
		err = take(TM_OWNER_BUDDY, false, false, &id);
		if (err)
			return err;
		buddy_do_add(&pages, &buddy, id);
		CHECK_EQ(buddy_do_alloc(&pages, &buddy, order, &page), 0);
		CHECK_EQ(tm_page_chunk(buddy.geometry, page).v, id.v);
	}
	if (!err)
		chunks.written[tm_page_chunk(buddy.geometry, page).v] = true;
	return err;
}

static void run_free(u32 nth)
{
	struct tm_chunk_id id = tm_page_chunk(buddy.geometry,
					      pages.runs[nth].page);

	if (!buddy_do_free(&pages, &buddy, nth)) {
		CHECK_EQ(buddy_do_remove(&pages, &buddy, id), -EBUSY);
		return;
	}
	CHECK_EQ(buddy_do_remove(&pages, &buddy, id), 0);
	CHECK(!chunk_do_put(&chunks, &pool, id));
	CHECK_EQ(chunks.state[id.v], TM_CHUNK_FREE_SPLIT);
}

static void drain(void)
{
	struct tm_chunk_id id;

	while (nr_tensors)
		tensor_free(0, true);
	while (pages.nr_runs)
		run_free(pages.nr_runs / 2);
	compare();
	CHECK_EQ(buddy.nr_chunks, 0);
	for (id.v = 0; id.v < chunks.nr_slots; id.v++)
		if (chunks.state[id.v] == TM_CHUNK_ZEROING)
			chunk_do_zero_end(&chunks, &pool, id);
	while (!chunk_do_remove(&chunks, &pool, &id))
		;
	compare();
	CHECK_EQ(tm_chunk_total(&pool), 0);
	CHECK_EQ(pool.grown, pool.shrunk);
	tm_host_unlock(&lock);
	tm_buddy_destroy(&buddy);
	tm_chunk_pool_destroy(&pool);
	CHECK_EQ(tm_host_tables(), 0);
}

enum op {
	OP_TENSOR_ALLOC,
	OP_TENSOR_FREE,
	OP_RUN_ALLOC,
	OP_RUN_FREE,
	OP_ZERO_BEGIN,
	OP_ZERO_END,
	OP_SHRINK,
	OP_CAPACITY,
	OP_SYSTEM_FAILS,
	OPS,
};

enum free_order {
	FREE_RANDOM,
	FREE_NEWEST,
	FREE_OLDEST,
	FREE_ORDERS,
};

static void random_op(enum op op, struct tm_rng *rng, enum free_order how)
{
	struct tm_chunk_id id;
	bool charged;
	u32 n;

	switch (op) {
	case OP_TENSOR_ALLOC:
		if (nr_tensors == MAX_TENSORS)
			break;
		n = 1 + tm_rand_below(rng, 4);
		charged = tm_rand_one_in(rng, 3);
		tm_op("tensor_alloc %u chunks, charged %d", n, charged);
		tensor_alloc(n, tm_rand_one_in(rng, 2), charged);
		break;
	case OP_TENSOR_FREE:
		if (!nr_tensors)
			break;
		n = tm_rand_below(rng, nr_tensors);
		tm_op("tensor_free %u", n);
		tensor_free(n, tm_rand_one_in(rng, 2));
		break;
	case OP_RUN_ALLOC:
		n = tm_rand_below(rng, tm_buddy_max_order(&buddy) + 1);
		tm_op("run_alloc order %u", n);
		run_alloc(n);
		break;
	case OP_RUN_FREE:
		if (!pages.nr_runs)
			break;
		n = how == FREE_NEWEST ? pages.nr_runs - 1 :
		    how == FREE_OLDEST ? 0 :
					 tm_rand_below(rng, pages.nr_runs);
		tm_op("run_free %u: page %u order %u", n,
		      pages.runs[n].page.v, pages.runs[n].order);
		run_free(n);
		break;
	case OP_ZERO_BEGIN:
		tm_op("zero_begin");
		chunk_do_zero_begin(&chunks, &pool, &id);
		break;
	case OP_ZERO_END:
		if (!chunk_model_pick(&chunks, rng, TM_CHUNK_ZEROING, &id))
			break;
		tm_op("zero_end chunk %u", id.v);
		chunk_do_zero_end(&chunks, &pool, id);
		break;
	case OP_SHRINK:
		n = chunk_model_excess(&chunks);
		tm_op("shrink by %u", n);
		while (n--)
			CHECK_EQ(chunk_do_remove(&chunks, &pool, &id), 0);
		break;
	case OP_CAPACITY:
		chunks.capacity = pool.capacity =
			tm_rand_below(rng, chunks.nr_slots + 1);
		chunks.reserve = pool.reserve = tm_rand_below(rng, 4);
		tm_op("capacity %u reserve %u", pool.capacity, pool.reserve);
		break;
	case OP_SYSTEM_FAILS:
		system_fails = tm_rand_below(rng, 4);
		tm_op("system fails at request %u", system_fails);
		break;
	case OPS:
		break;
	}
}

TEST_PAGE_SIZES(pools_random)
{
	struct tm_round round;

	memset(moves, 0, sizeof(moves));
	recasts = charges = 0;
	tm_for_each_round(&round, ROUNDS, 3000) {
		enum free_order how = FREE_RANDOM;
		u32 weights[OPS] = { 0 };

		CHECK_EQ(setup(page_shift, SLOTS), 0);
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 4);
				weights[tm_rand_below(&round.rng, 4)] += 10;
				weights[OP_RUN_ALLOC] += 4;
				weights[OP_RUN_FREE] += 4;
				how = tm_rand_below(&round.rng, FREE_ORDERS);
			}
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng, how);
			compare();
		}
		drain();
	}
	/* Memory did flow, both ways. A replay of one round need not show it. */
	if (round.nr < ROUNDS)
		return;
	CHECK(moves[TM_OWNER_TENSOR] > 50);
	CHECK(moves[TM_OWNER_BUDDY] > 50);
	CHECK(recasts > 50);
	CHECK(charges > 50);
}

/* Give all memory to one use, then all of it to the other. */
TEST_PAGE_SIZES(pools_change_hands_completely)
{
	CHECK_EQ(setup(page_shift, SLOTS), 0);
	for (u32 turn = 0; turn < 3; turn++) {
		unsigned int order = turn * 2;
		u32 runs = SLOTS * (buddy_model_pages(&pages) >> order);

		tm_op("turn %u: all chunks to one tensor", turn);
		CHECK_EQ(tensor_alloc(SLOTS, turn % 2, false), 0);
		CHECK_EQ(run_alloc(order), -ENOSPC);
		compare();
		tensor_free(0, true);
		for (u32 i = 0; i < runs; i++) {
			tm_op("turn %u: run %u", turn, i);
			CHECK_EQ(run_alloc(order), 0);
		}
		CHECK_EQ(run_alloc(0), -ENOSPC);
		CHECK_EQ(tensor_alloc(1, false, turn % 2), -ENOSPC);
		compare();
		for (u32 i = 0; i < runs; i++)
			run_free(turn % 2 ? 0 : pages.nr_runs - 1);
		compare();
	}
	/* One came for each that went: six uses, five changes of the form. */
	CHECK_EQ(pool.recast, 5 * SLOTS);
	CHECK_EQ(pool.shrunk, 5 * SLOTS);
	CHECK_EQ(pool.grown, 6 * SLOTS);
	drain();
}

/* Bringing the pools up, with every allocation failing in turn. */
TEST_PAGE_SIZES(pools_setup_without_memory)
{
	unsigned int nth = 0;
	int err;

	do {
		tm_host_fail_table(++nth);
		err = setup(page_shift, SLOTS);
		CHECK(!err || err == -ENOMEM);
		if (err)
			CHECK_EQ(tm_host_tables(), 0);
	} while (err);
	tm_host_fail_table(0);
	/* One table for each level. */
	CHECK_EQ(nth, 3);
	drain();
}

/*
 * A request for chunks that fails at its first, second, ... chunk, because the
 * system has none or the capacity is reached: afterwards nobody has more or less
 * than before.
 */
TEST_PAGE_SIZES(pools_failure_at_each_chunk)
{
	CHECK_EQ(setup(page_shift, SLOTS), 0);
	CHECK_EQ(run_alloc(0), 0);
	CHECK_EQ(tensor_alloc(2, true, false), 0);
	for (u32 i = 0; i < 20; i++) {
		u32 nth = 1 + i % 5;
		bool limit = i / 5 % 2, charged = i / 10;
		u32 tensor = pool.owned[TM_OWNER_TENSOR];
		u32 total = tm_chunk_total(&pool);
		u64 failed = pool.grow_failed;
		/* What did come is free, unless it is on a bill. */
		u32 left = charged ? 0 : nth - 1;
		struct tm_chunk_id id;
		struct buddy_snapshot before;

		tm_op("%s at chunk %u, charged %d",
		      limit ? "capacity" : "system", nth, charged);
		buddy_snapshot_take(&before, &buddy);
		if (limit)
			chunks.capacity = pool.capacity = total + nth - 1;
		else
			system_fails = nth;
		CHECK_EQ(tensor_alloc(5, nth % 2, charged),
			 limit ? -ENOSPC : -ENOMEM);
		compare();
		CHECK(buddy_snapshot_same(&before, &buddy));
		CHECK_EQ(pool.owned[TM_OWNER_TENSOR], tensor);
		CHECK_EQ(pool.grow_failed, failed + !limit);
		CHECK_EQ(pool.count[TM_CHUNK_GROWING], 0);
		CHECK_EQ(tm_chunk_total(&pool), total + left);
		CHECK_EQ(tm_chunk_free_count(&pool), left);
		while (!chunk_do_remove(&chunks, &pool, &id))
			;
		CHECK_EQ(tm_chunk_total(&pool), total);
		chunks.capacity = pool.capacity = SLOTS;
	}
	CHECK_EQ(pool.recast, 0);
	CHECK_EQ(tensor_alloc(5, true, false), 0);
	CHECK_EQ(tensor_alloc(2, true, true), 0);
	drain();
}

/*
 * At capacity, with chunks of the wrong form only: a request that fails at its
 * first, second, ... recast. The chunk that was given back for nothing is gone;
 * those that were recast before it are free in their new form, or gone if charged.
 */
TEST_PAGE_SIZES(pools_failure_at_each_recast)
{
	for (u32 i = 0; i < 10; i++) {
		u32 nth = 1 + i % 5;
		bool charged = i / 5;
		u32 recast = charged ? 0 : nth - 1;

		tm_op("system at recast %u, charged %d", nth, charged);
		CHECK_EQ(setup(page_shift, 6), 0);
		/* Two runs of half a chunk each; one chunk of the six stays. */
		for (u32 run = 0; run < 12; run++)
			CHECK_EQ(run_alloc(tm_buddy_max_order(&buddy)), 0);
		while (pages.nr_runs > 1)
			run_free(pages.nr_runs - 1);
		compare();
		CHECK_EQ(pool.count[TM_CHUNK_FREE_SPLIT], 5);

		system_fails = nth;
		CHECK_EQ(tensor_alloc(5, true, charged), -ENOMEM);
		compare();
		CHECK_EQ(pool.recast, nth);
		CHECK_EQ(pool.grow_failed, 1);
		CHECK_EQ(pool.owned[TM_OWNER_TENSOR], 0);
		CHECK_EQ(pool.owned[TM_OWNER_BUDDY], 1);
		CHECK_EQ(pool.count[TM_CHUNK_GROWING], 0);
		CHECK_EQ(pool.count[TM_CHUNK_FREE_SPLIT], 5 - nth);
		CHECK_EQ(pool.count[TM_CHUNK_FREE_ZEROED], recast);
		CHECK_EQ(tm_chunk_total(&pool), 1 + 5 - nth + recast);
		/* Its place is free, so the same request can succeed. */
		CHECK_EQ(tensor_alloc(5, true, charged), 0);
		CHECK_EQ(tensor_alloc(1, true, charged), -ENOSPC);
		compare();
		drain();
	}
}

/*
 * Below the capacity, with split chunks free, but the system has no more: a tensor
 * is served by recasting one, unless it is charged; then the pool keeps them all.
 */
TEST_PAGE_SIZES(pools_recast_when_the_system_has_none)
{
	for (u32 charged = 0; charged < 2; charged++) {
		CHECK_EQ(setup(page_shift, SLOTS), 0);
		for (u32 i = 0; i < 4; i++)
			CHECK_EQ(run_alloc(tm_buddy_max_order(&buddy)), 0);
		while (pages.nr_runs)
			run_free(0);
		compare();
		CHECK_EQ(pool.count[TM_CHUNK_FREE_SPLIT], 2);
		system_fails = 1;
		CHECK_EQ(tensor_alloc(1, true, charged), charged ? -ENOMEM : 0);
		compare();
		CHECK_EQ(pool.grow_failed, 1);
		CHECK_EQ(pool.recast, !charged);
		CHECK_EQ(pool.owned[TM_OWNER_TENSOR], !charged);
		CHECK_EQ(pool.count[TM_CHUNK_FREE_SPLIT], 1 + charged);
		CHECK_EQ(tm_chunk_total(&pool), 2);
		drain();
	}
}
