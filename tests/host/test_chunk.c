// SPDX-License-Identifier: GPL-2.0-only
/* Level 1, the chunk pool. */
#include "chunk_model.h"

static tm_lock_t lock;
static struct tm_chunk_pool pool;
static struct chunk_model model;

static void setup(u32 nr_slots)
{
	lock.held = false;
	CHECK_EQ(tm_chunk_pool_init(&pool, nr_slots, &lock), 0);
	chunk_model_init(&model, nr_slots);
	chunk_model_compare(&model, &pool);
	tm_host_lock(&lock);
}

static void teardown(void)
{
	tm_host_unlock(&lock);
	tm_chunk_pool_destroy(&pool);
	CHECK(!pool.chunks);
	CHECK_EQ(tm_host_tables(), 0);
}

/* Everything back to the system, through every state's own way out. */
static void drain(void)
{
	struct tm_chunk_id id;

	for (id.v = 0; id.v < model.nr_slots; id.v++) {
		switch (model.state[id.v]) {
		case TM_CHUNK_GROWING:
			chunk_do_grow_abort(&model, &pool, id);
			break;
		case TM_CHUNK_ZEROING:
			chunk_do_zero_end(&model, &pool, id);
			break;
		case TM_CHUNK_OWNED:
			chunk_do_put(&model, &pool, id);
			break;
		default:
			break;
		}
		chunk_model_compare(&model, &pool);
	}
	while (!chunk_do_remove(&model, &pool, &id))
		chunk_model_compare(&model, &pool);
	CHECK_EQ(tm_chunk_total(&pool), 0);
}

TEST(chunk_init_refuses)
{
	const u32 most = ~0u >> 9;

	memset(&pool, 0xa5, sizeof(pool));
	CHECK_EQ(tm_chunk_pool_init(&pool, 0, &lock), -EINVAL);
	CHECK_EQ(tm_chunk_pool_init(&pool, most + 1, &lock), -EINVAL);
	CHECK_EQ(tm_chunk_pool_init(&pool, TM_NONE, &lock), -EINVAL);
	tm_host_fail_table(1);
	CHECK_EQ(tm_chunk_pool_init(&pool, 4, &lock), -ENOMEM);
	CHECK(!pool.chunks);
	CHECK_EQ(tm_host_tables(), 0);
	/* A failed init leaves something that destroy accepts. */
	tm_chunk_pool_destroy(&pool);

	CHECK_EQ(tm_chunk_pool_init(&pool, most, &lock), 0);
	CHECK_EQ(pool.nr_slots, most);
	tm_chunk_pool_destroy(&pool);
}

TEST(chunk_slots_come_from_0_up)
{
	struct tm_chunk_id id;

	setup(16);
	for (u32 v = 0; v < 16; v++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		CHECK_EQ(id.v, v);
	}
	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), -ENOSPC);
	drain();
	teardown();
}

TEST(chunk_capacity_beyond_the_slots)
{
	struct tm_chunk_id id;

	setup(2);
	pool.capacity = TM_NONE;
	model.capacity = TM_NONE;
	for (u32 v = 0; v < 2; v++)
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), -ENOSPC);
	drain();
	teardown();
}

TEST(chunk_destroy_warns_of_chunks)
{
	struct tm_chunk_id id;

	setup(4);
	CHECK_EQ(tm_chunk_grow_begin(&pool, &id), 0);
	tm_host_expect_warnings(1);
	teardown();
	CHECK_EQ(tm_host_missing_warnings(), 0);
}

/* A call on a chunk in the wrong state warns and changes nothing. */
static void misuse(struct tm_chunk_id id)
{
	enum tm_chunk_state state = TM_CHUNK_STATES;
	struct chunk_snapshot before;

	if (id.v < model.nr_slots)
		state = model.state[id.v];
	chunk_snapshot_take(&before, &pool);
	for (u32 zeroed = 0; zeroed < 2; zeroed++) {
		if (state != TM_CHUNK_GROWING) {
			tm_host_expect_warnings(2);
			tm_chunk_grow_end(&pool, id, zeroed);
			tm_chunk_grow_abort(&pool, id);
			CHECK_EQ(tm_host_missing_warnings(), 0);
		}
		if (state != TM_CHUNK_OWNED) {
			tm_host_expect_warnings(1);
			tm_chunk_put(&pool, id, zeroed);
			CHECK_EQ(tm_host_missing_warnings(), 0);
		}
		if (state != TM_CHUNK_ZEROING) {
			tm_host_expect_warnings(1);
			tm_chunk_zero_end(&pool, id);
			CHECK_EQ(tm_host_missing_warnings(), 0);
		}
	}
	CHECK(chunk_snapshot_same(&before, &pool));
}

/* Every state, and every call that does not belong to it. */
TEST(chunk_misuse_changes_nothing)
{
	struct tm_chunk_id id;

	setup(8);
	for (u32 i = 0; i < 6; i++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		if (i)
			chunk_do_grow_end(&model, &pool, id, i % 2);
	}
	CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR, true, &id), 0);
	CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_BUDDY, false, &id), 0);
	CHECK_EQ(chunk_do_zero_begin(&model, &pool, &id), 0);
	/* Slots 6 and 7 are absent. */
	CHECK_EQ(chunk_do_zero_begin(&model, &pool, &id), -ENOENT);
	for (id.v = 0; id.v < 8; id.v++)
		misuse(id);
	id.v = 8;
	misuse(id);
	id.v = TM_NONE;
	misuse(id);
	chunk_model_compare(&model, &pool);
	drain();
	teardown();
}

/* The reserve and the capacity in figures worked out by hand. */
TEST(chunk_excess_and_deficit)
{
	struct tm_chunk_id id;

	setup(10);
	model.reserve = pool.reserve = 4;
	CHECK_EQ(tm_chunk_deficit(&pool), 4);
	CHECK_EQ(tm_chunk_excess(&pool), 0);

	/* One on its way, one dirty, one zeroed: two of four are as good as done. */
	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
	for (u32 i = 0; i < 2; i++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		chunk_do_grow_end(&model, &pool, id, i);
	}
	CHECK_EQ(tm_chunk_deficit(&pool), 2);
	CHECK_EQ(tm_chunk_excess(&pool), 0);

	/* One above the reserve. */
	for (u32 i = 0; i < 3; i++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		chunk_do_grow_end(&model, &pool, id, true);
	}
	CHECK_EQ(tm_chunk_excess(&pool), 1);
	CHECK_EQ(tm_chunk_deficit(&pool), 0);

	/* Six chunks and room for four: two go, reserve or not. */
	model.capacity = pool.capacity = 4;
	CHECK_EQ(tm_chunk_excess(&pool), 2);
	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), -ENOSPC);
	/* Room for none: all five free ones go, the growing one cannot. */
	model.capacity = pool.capacity = 0;
	CHECK_EQ(tm_chunk_excess(&pool), 5);
	CHECK_EQ(tm_chunk_deficit(&pool), 0);

	/* A reserve out of reach asks for what fits: 10 less 3 owned, 3 ready. */
	model.capacity = pool.capacity = 10;
	model.reserve = pool.reserve = 100;
	for (u32 i = 0; i < 3; i++)
		CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR, false,
				       &id), 0);
	CHECK_EQ(tm_chunk_deficit(&pool), 4);
	CHECK_EQ(tm_chunk_excess(&pool), 0);
	chunk_model_compare(&model, &pool);
	drain();
	teardown();
}

/*
 * Three owned, three dirty, one growing, room for five: two dirty ones go, and
 * only the one that stays is worth zeroing, however large the reserve is.
 */
TEST(chunk_deficit_over_capacity)
{
	struct tm_chunk_id id;

	setup(10);
	for (u32 i = 0; i < 7; i++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		if (i < 6)
			chunk_do_grow_end(&model, &pool, id, i < 3);
		if (i < 3)
			CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR,
					       true, &id), 0);
	}
	model.capacity = pool.capacity = 5;
	for (u32 reserve = 0; reserve < 8; reserve++) {
		model.reserve = pool.reserve = reserve;
		CHECK_EQ(tm_chunk_excess(&pool), reserve == 0 ? 3 : 2);
		CHECK_EQ(tm_chunk_deficit(&pool), reserve < 2 ? 0 : 1);
		chunk_model_compare(&model, &pool);
	}
	drain();
	teardown();
}

enum op {
	OP_GROW_BEGIN,
	OP_GROW_END,
	OP_GROW_ABORT,
	OP_TAKE,
	OP_WRITE,
	OP_PUT,
	OP_ZERO_BEGIN,
	OP_ZERO_END,
	OP_REMOVE,
	OP_CAPACITY,
	OP_RESERVE,
	OP_MISUSE,
	OPS,
};

static void random_op(enum op op, struct tm_rng *rng)
{
	bool flag = tm_rand_one_in(rng, 2);
	enum tm_owner owner;
	struct tm_chunk_id id;
	u32 n;

	switch (op) {
	case OP_GROW_BEGIN:
		tm_op("grow_begin");
		chunk_do_grow_begin(&model, &pool, &id);
		break;
	case OP_GROW_END:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_GROWING, &id))
			break;
		tm_op("grow_end chunk %u zeroed %d", id.v, flag);
		chunk_do_grow_end(&model, &pool, id, flag);
		break;
	case OP_GROW_ABORT:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_GROWING, &id))
			break;
		tm_op("grow_abort chunk %u", id.v);
		chunk_do_grow_abort(&model, &pool, id);
		break;
	case OP_TAKE:
		owner = tm_rand_below(rng, TM_OWNERS);
		tm_op("take owner %u want_zeroed %d", owner, flag);
		chunk_do_take(&model, &pool, owner, flag, &id);
		break;
	case OP_WRITE:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_OWNED, &id))
			break;
		tm_op("write chunk %u", id.v);
		model.written[id.v] = true;
		break;
	case OP_PUT:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_OWNED, &id))
			break;
		tm_op("put chunk %u", id.v);
		chunk_do_put(&model, &pool, id);
		break;
	case OP_ZERO_BEGIN:
		tm_op("zero_begin");
		chunk_do_zero_begin(&model, &pool, &id);
		break;
	case OP_ZERO_END:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_ZEROING, &id))
			break;
		tm_op("zero_end chunk %u", id.v);
		chunk_do_zero_end(&model, &pool, id);
		break;
	case OP_REMOVE:
		tm_op("remove");
		chunk_do_remove(&model, &pool, &id);
		break;
	case OP_CAPACITY:
		n = tm_rand_below(rng, model.nr_slots + 1);
		tm_op("capacity %u", n);
		model.capacity = pool.capacity = n;
		break;
	case OP_RESERVE:
		n = tm_rand_below(rng, model.nr_slots * 3 / 2);
		tm_op("reserve %u", n);
		model.reserve = pool.reserve = n;
		break;
	case OP_MISUSE:
		id.v = tm_rand_below(rng, model.nr_slots + 2);
		tm_op("misuse chunk %u", id.v);
		misuse(id);
		break;
	case OPS:
		break;
	}
}

#define ROUNDS	16

TEST(chunk_random)
{
	static const u32 sizes[] = { 1, 2, 3, 8, 24, CHUNK_MODEL_SLOTS };
	/* What may happen to a chunk, and what has to be seen to happen. */
	bool seen[TM_CHUNK_STATES][TM_CHUNK_STATES] = { 0 };
	bool seen_together = false, seen_over_capacity = false;
	bool seen_reserve_over_capacity = false;
	struct tm_round round;

	tm_for_each_round(&round, ROUNDS, 8000) {
		u32 weights[OPS] = { 0 };

		setup(sizes[round.rng.state % (sizeof(sizes) /
					       sizeof(*sizes))]);
		for (u32 step = 0; step < round.steps; step++) {
			enum tm_chunk_state was[CHUNK_MODEL_SLOTS];

			/* New habits now and then: the pool fills and empties. */
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 12);
				weights[OP_CAPACITY] = 1;
				weights[OP_RESERVE] = 1;
			}
			memcpy(was, model.state, sizeof(was));
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng);
			chunk_model_compare(&model, &pool);

			for (u32 v = 0; v < model.nr_slots; v++)
				seen[was[v]][model.state[v]] = true;
			seen_together |=
				chunk_model_count(&model, TM_CHUNK_GROWING) > 1 &&
				chunk_model_count(&model, TM_CHUNK_ZEROING) > 1;
			seen_over_capacity |=
				chunk_model_total(&model) > model.capacity;
			seen_reserve_over_capacity |=
				model.reserve > model.capacity;
		}
		drain();
		teardown();
	}
	/* A replay of one round need not see it all. */
	if (round.nr < ROUNDS)
		return;
	CHECK(seen[TM_CHUNK_ABSENT][TM_CHUNK_GROWING]);
	CHECK(seen[TM_CHUNK_GROWING][TM_CHUNK_ABSENT]);
	CHECK(seen[TM_CHUNK_GROWING][TM_CHUNK_FREE_ZEROED]);
	CHECK(seen[TM_CHUNK_GROWING][TM_CHUNK_FREE_DIRTY]);
	CHECK(seen[TM_CHUNK_FREE_ZEROED][TM_CHUNK_OWNED]);
	CHECK(seen[TM_CHUNK_FREE_DIRTY][TM_CHUNK_OWNED]);
	CHECK(seen[TM_CHUNK_OWNED][TM_CHUNK_FREE_ZEROED]);
	CHECK(seen[TM_CHUNK_OWNED][TM_CHUNK_FREE_DIRTY]);
	CHECK(seen[TM_CHUNK_FREE_DIRTY][TM_CHUNK_ZEROING]);
	CHECK(seen[TM_CHUNK_ZEROING][TM_CHUNK_FREE_ZEROED]);
	CHECK(seen[TM_CHUNK_FREE_ZEROED][TM_CHUNK_ABSENT]);
	CHECK(seen[TM_CHUNK_FREE_DIRTY][TM_CHUNK_ABSENT]);
	CHECK(seen_together);
	CHECK(seen_over_capacity);
	CHECK(seen_reserve_over_capacity);
}

/*
 * Whatever the pool looks like, a caller who gives back the excess and then
 * fills the deficit is done: neither is left, and it never grew what it would
 * have to give back.
 */
TEST(chunk_settles)
{
	struct tm_round round;

	tm_for_each_round(&round, 200, 200) {
		struct tm_chunk_id id;
		u32 work;

		setup(1 + tm_rand_below(&round.rng, CHUNK_MODEL_SLOTS));
		for (u32 step = 0; step < round.steps; step++)
			random_op(tm_rand_below(&round.rng, OP_MISUSE),
				  &round.rng);
		for (work = tm_chunk_excess(&pool); work; work--) {
			tm_op("give back, %u to go", work);
			CHECK_EQ(tm_chunk_excess(&pool), work);
			CHECK_EQ(chunk_do_remove(&model, &pool, &id), 0);
		}
		CHECK_EQ(tm_chunk_excess(&pool), 0);
		for (work = tm_chunk_deficit(&pool); work; work--) {
			tm_op("prepare, %u to go", work);
			CHECK_EQ(tm_chunk_deficit(&pool), work);
			if (!chunk_do_zero_begin(&model, &pool, &id)) {
				chunk_do_zero_end(&model, &pool, id);
				continue;
			}
			CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
			chunk_do_grow_end(&model, &pool, id, true);
		}
		CHECK_EQ(tm_chunk_deficit(&pool), 0);
		CHECK_EQ(tm_chunk_excess(&pool), 0);
		chunk_model_compare(&model, &pool);
		drain();
		teardown();
	}
}

static void unlocked(void *which)
{
	struct tm_chunk_id id = { 0 };
	bool zeroed;

	lock.held = false;
	switch (*(int *)which) {
	case 0:
		(void)!tm_chunk_grow_begin(&pool, &id);
		break;
	case 1:
		tm_chunk_grow_end(&pool, id, true);
		break;
	case 2:
		tm_chunk_grow_abort(&pool, id);
		break;
	case 3:
		(void)!tm_chunk_take(&pool, TM_OWNER_TENSOR, true, &id,
				     &zeroed);
		break;
	case 4:
		id.v = 1;
		tm_chunk_put(&pool, id, true);
		break;
	case 5:
		(void)!tm_chunk_zero_begin(&pool, &id);
		break;
	case 6:
		id.v = 2;
		tm_chunk_zero_end(&pool, id);
		break;
	case 7:
		(void)!tm_chunk_remove(&pool, &id);
		break;
	}
}

TEST(chunk_calls_need_the_lock)
{
	static const char *const calls[] = {
		"grow_begin", "grow_end", "grow_abort", "take", "put",
		"zero_begin", "zero_end", "remove",
	};
	struct tm_chunk_id id, growing;

	/* Every call is one that would succeed. */
	setup(8);
	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &growing), 0);
	CHECK_EQ(growing.v, 0);
	for (u32 i = 0; i < 4; i++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		chunk_do_grow_end(&model, &pool, id, false);
		if (i == 0)
			CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR,
					       false, &id), 0);
		if (i == 1)
			CHECK_EQ(chunk_do_zero_begin(&model, &pool, &id), 0);
	}
	for (int i = 0; i < 8; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	drain();
	teardown();
}
