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

static const struct tm_chunk_form whole = { 0 };
static const struct tm_chunk_form split = { .split = true };
static const struct tm_chunk_form charged = { .charged = true };
static const struct tm_chunk_form charged_split = {
	.split = true,
	.charged = true,
};

/* The next slot, with memory of @form that a tensor has. */
static struct tm_chunk_id grow(struct tm_chunk_form form)
{
	struct tm_chunk_id id;

	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
	chunk_do_grow_take(&model, &pool, id, TM_OWNER_TENSOR, form, false);
	return id;
}

/* The next slot, free and whole. */
static struct tm_chunk_id grow_free(bool zeroed)
{
	struct tm_chunk_id id;

	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
	chunk_do_grow_end(&model, &pool, id, zeroed);
	return id;
}

/* The next slot, free and split. */
static struct tm_chunk_id grow_split(void)
{
	struct tm_chunk_id id = grow(split);

	CHECK(!chunk_do_put(&model, &pool, id));
	return id;
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
			tm_host_expect_warnings(4);
			tm_chunk_grow_end(&pool, id, zeroed);
			tm_chunk_grow_take(&pool, id, TM_OWNER_BUDDY,
					   zeroed ? split : whole);
			tm_chunk_grow_take(&pool, id, TM_OWNER_TENSOR, charged);
			tm_chunk_grow_abort(&pool, id);
			CHECK_EQ(tm_host_missing_warnings(), 0);
		}
		if (state != TM_CHUNK_OWNED) {
			tm_host_expect_warnings(1);
			CHECK(!tm_chunk_put(&pool, id, zeroed));
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
	struct tm_chunk_id id, gone;

	setup(12);
	for (u32 i = 0; i < 6; i++) {
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		if (i)
			chunk_do_grow_end(&model, &pool, id, i % 2);
	}
	CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR, false, true,
			       &id), 0);
	CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_BUDDY, false, false,
			       &id), 0);
	CHECK_EQ(chunk_do_zero_begin(&model, &pool, &id), 0);
	CHECK_EQ(chunk_do_zero_begin(&model, &pool, &id), -ENOENT);
	grow_free(false);
	grow_split();
	grow(split);
	grow(charged);
	/* A slot that a charged chunk left is absent, whatever it was before. */
	gone = grow(charged_split);
	CHECK(chunk_do_put(&model, &pool, gone));
	CHECK_EQ(model.state[gone.v], TM_CHUNK_ABSENT);
	for (u32 s = 0; s < TM_CHUNK_STATES; s++)
		CHECK(chunk_model_count(&model, s));
	for (id.v = 0; id.v < 12; id.v++)
		misuse(id);
	id.v = 12;
	misuse(id);
	id.v = TM_NONE;
	misuse(id);
	chunk_model_compare(&model, &pool);
	drain();
	teardown();
}

/* A request for one form is not served with the other, not even at the last. */
TEST(chunk_take_keeps_to_the_form)
{
	struct tm_chunk_id id;

	setup(4);
	grow_free(true);
	grow_free(false);
	for (u32 want_zeroed = 0; want_zeroed < 2; want_zeroed++)
		CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_BUDDY, true,
				       want_zeroed, &id), -ENOMEM);
	while (!chunk_do_remove(&model, &pool, &id))
		;
	grow_split();
	grow_split();
	for (u32 want_zeroed = 0; want_zeroed < 2; want_zeroed++)
		CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR, false,
				       want_zeroed, &id), -ENOMEM);
	/* A split chunk is never handed out as zeroed: chunk_do_take() sees to it. */
	for (u32 want_zeroed = 0; want_zeroed < 2; want_zeroed++) {
		CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_BUDDY, true,
				       want_zeroed, &id), 0);
		CHECK(pool.chunks[id.v].form.split);
		CHECK(!chunk_do_put(&model, &pool, id));
		CHECK_EQ(pool.chunks[id.v].state, TM_CHUNK_FREE_SPLIT);
	}
	chunk_model_compare(&model, &pool);
	drain();
	teardown();
}

/* Stacks: what came last goes first, whatever order the chunks have. */
TEST(chunk_last_put_is_first_taken)
{
	static const u32 order[] = { 2, 0, 3, 1 };
	struct tm_chunk_id id;

	setup(4);
	for (u32 is_split = 0; is_split < 2; is_split++) {
		for (u32 i = 0; i < 4; i++)
			grow(is_split ? split : whole);
		for (u32 i = 0; i < 4; i++)
			chunk_do_put(&model, &pool,
				     (struct tm_chunk_id){ order[i] });
		for (u32 i = 4; i-- > 0;) {
			CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_TENSOR,
					       is_split, false, &id), 0);
			CHECK_EQ(id.v, order[i]);
		}
		for (id.v = 4; id.v-- > 0;)
			chunk_do_put(&model, &pool, id);
		/* 0 is on top: removed first, and last when they grow again. */
		for (u32 i = 0; i < 4; i++) {
			CHECK_EQ(chunk_do_remove(&model, &pool, &id), 0);
			CHECK_EQ(id.v, i);
		}
		CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
		CHECK_EQ(id.v, 3);
		chunk_do_grow_abort(&model, &pool, id);
	}
	chunk_model_compare(&model, &pool);
	drain();
	teardown();
}

/* Whoever had a charged chunk, and whatever form it has, nobody else gets it. */
TEST(chunk_charged_leaves_the_pool)
{
	setup(8);
	for (u32 i = 0; i < 2; i++) {
		for (u32 owner = 0; owner < TM_OWNERS; owner++) {
			for (u32 zeroed = 0; zeroed < 2; zeroed++) {
				struct tm_chunk_id id;

				CHECK_EQ(chunk_do_grow_begin(&model, &pool,
							     &id), 0);
				chunk_do_grow_take(&model, &pool, id, owner,
						   i ? charged_split : charged,
						   zeroed);
				CHECK_EQ(pool.owned[owner], 1);
				chunk_model_compare(&model, &pool);
				CHECK(chunk_do_put(&model, &pool, id));
				CHECK_EQ(pool.owned[owner], 0);
				CHECK_EQ(tm_chunk_total(&pool), 0);
				CHECK_EQ(pool.shrunk, pool.grown);
				chunk_model_compare(&model, &pool);
			}
		}
	}
	CHECK_EQ(pool.taken[TM_OWNER_TENSOR], 4);
	CHECK_EQ(pool.taken[TM_OWNER_BUDDY], 4);
	CHECK_EQ(pool.shrunk, 8);
	CHECK_EQ(pool.recast, 0);
	teardown();
}

/* A form is of the memory, not of the slot: it does not survive the memory. */
TEST(chunk_form_goes_with_the_memory)
{
	static const struct tm_chunk_form *const forms[] = {
		&whole, &split, &charged, &charged_split,
	};
	struct tm_chunk_id id;

	setup(1);
	for (u32 i = 0; i < 16; i++) {
		struct tm_chunk_form form = *forms[i / 4];

		tm_op("%u after %u", i % 4, i / 4);
		id = grow(form);
		if (!chunk_do_put(&model, &pool, id))
			CHECK_EQ(chunk_do_remove(&model, &pool, &id), 0);
		/* As a free chunk, then as one for an owner. */
		id = grow_free(i % 2);
		chunk_model_compare(&model, &pool);
		CHECK_EQ(chunk_do_recast_begin(&model, &pool, &id), 0);
		chunk_do_grow_take(&model, &pool, id, TM_OWNER_BUDDY, form,
				   true);
		chunk_model_compare(&model, &pool);
		if (!chunk_do_put(&model, &pool, id))
			CHECK_EQ(chunk_do_remove(&model, &pool, &id), 0);
		CHECK_EQ(grow(*forms[i % 4]).v, id.v);
		chunk_model_compare(&model, &pool);
		if (!chunk_do_put(&model, &pool, id))
			CHECK_EQ(chunk_do_remove(&model, &pool, &id), 0);
	}
	drain();
	teardown();
}

/* Both ways out of the free chunks: split ones first, zeroed ones last. */
TEST(chunk_least_goes_first)
{
	static const enum tm_chunk_state order[] = {
		TM_CHUNK_FREE_SPLIT, TM_CHUNK_FREE_SPLIT,
		TM_CHUNK_FREE_DIRTY, TM_CHUNK_FREE_DIRTY,
		TM_CHUNK_FREE_ZEROED, TM_CHUNK_FREE_ZEROED,
	};
	struct tm_chunk_id id;

	setup(6);
	for (u32 recast = 0; recast < 2; recast++) {
		for (u32 i = 0; i < 2; i++) {
			grow_free(true);
			grow_split();
			grow_free(false);
		}
		chunk_model_compare(&model, &pool);
		for (u32 i = 0; i < 6; i++) {
			enum tm_chunk_state was[6];

			memcpy(was, model.state, sizeof(was));
			if (recast) {
				CHECK_EQ(chunk_do_recast_begin(&model, &pool,
							       &id), 0);
				chunk_do_grow_abort(&model, &pool, id);
			} else {
				CHECK_EQ(chunk_do_remove(&model, &pool, &id),
					 0);
			}
			CHECK_EQ(was[id.v], order[i]);
			chunk_model_compare(&model, &pool);
		}
		CHECK_EQ(chunk_do_recast_begin(&model, &pool, &id), -ENOENT);
		CHECK_EQ(chunk_do_remove(&model, &pool, &id), -ENOENT);
	}
	CHECK_EQ(pool.recast, 6);
	CHECK_EQ(pool.shrunk, 12);
	CHECK_EQ(pool.grow_failed, 6);
	teardown();
}

/* At capacity a chunk changes its form, back and forth, and none is added. */
TEST(chunk_recast_at_capacity)
{
	struct tm_chunk_id id;

	setup(4);
	model.capacity = pool.capacity = 2;
	grow_free(true);
	grow_free(true);
	for (u32 i = 0; i < 6; i++) {
		bool want_split = i % 2 == 0;

		for (u32 n = 0; n < 2; n++) {
			CHECK_EQ(chunk_do_take(&model, &pool, TM_OWNER_BUDDY,
					       want_split, true, &id),
				 -ENOMEM);
			CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id),
				 -ENOSPC);
			CHECK_EQ(chunk_do_recast_begin(&model, &pool, &id), 0);
			/* On its way it is nobody's, but it has its place. */
			CHECK_EQ(tm_chunk_total(&pool), 2);
			CHECK_EQ(chunk_do_grow_begin(&model, &pool,
						     &(struct tm_chunk_id){ 0 }),
				 -ENOSPC);
			chunk_do_grow_take(&model, &pool, id, TM_OWNER_BUDDY,
					   want_split ? split : whole, true);
			chunk_model_compare(&model, &pool);
		}
		CHECK_EQ(chunk_do_recast_begin(&model, &pool, &id), -ENOENT);
		for (id.v = 0; id.v < 2; id.v++)
			CHECK(!chunk_do_put(&model, &pool, id));
		chunk_model_compare(&model, &pool);
	}
	CHECK_EQ(pool.recast, 12);
	CHECK_EQ(pool.grown, 14);
	/* The system may have none: then the chunk is gone, and its place free. */
	CHECK_EQ(chunk_do_recast_begin(&model, &pool, &id), 0);
	chunk_do_grow_abort(&model, &pool, id);
	CHECK_EQ(tm_chunk_total(&pool), 1);
	CHECK_EQ(chunk_do_grow_begin(&model, &pool, &id), 0);
	chunk_do_grow_end(&model, &pool, id, true);
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
				       false, &id), 0);
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
					       false, true, &id), 0);
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

/*
 * Split chunks are free, and so in excess like others, but not ready: two owned,
 * three split, one zeroed.
 */
TEST(chunk_excess_and_deficit_of_split)
{
	/* Of a capacity of 8, 6, 5, 3, 2, each with a reserve of 0, 1, 3 and 6. */
	static const struct {
		u32 capacity, excess[4], deficit[4];
	} want[] = {
		{ 8, { 4, 3, 1, 0 }, { 0, 0, 2, 5 } },
		{ 6, { 4, 3, 1, 0 }, { 0, 0, 2, 3 } },
		{ 5, { 4, 3, 1, 1 }, { 0, 0, 2, 2 } },
		{ 3, { 4, 3, 3, 3 }, { 0, 0, 0, 0 } },
		{ 2, { 4, 4, 4, 4 }, { 0, 0, 0, 0 } },
	};
	static const u32 reserve[] = { 0, 1, 3, 6 };

	setup(8);
	grow(whole);
	grow(charged_split);
	for (u32 i = 0; i < 3; i++)
		grow_split();
	grow_free(true);
	CHECK_EQ(tm_chunk_free_count(&pool), 4);
	for (u32 i = 0; i < 5; i++) {
		model.capacity = pool.capacity = want[i].capacity;
		for (u32 r = 0; r < 4; r++) {
			model.reserve = pool.reserve = reserve[r];
			CHECK_EQ(tm_chunk_excess(&pool), want[i].excess[r]);
			CHECK_EQ(tm_chunk_deficit(&pool), want[i].deficit[r]);
			chunk_model_compare(&model, &pool);
		}
	}
	drain();
	teardown();
}

enum op {
	OP_GROW_BEGIN,
	OP_GROW_END,
	OP_GROW_TAKE,
	OP_GROW_ABORT,
	OP_RECAST_BEGIN,
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
	struct tm_chunk_form form = {
		.split = tm_rand_one_in(rng, 2),
		.charged = tm_rand_one_in(rng, 3),
	};
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
	case OP_GROW_TAKE:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_GROWING, &id))
			break;
		owner = tm_rand_below(rng, TM_OWNERS);
		tm_op("grow_take chunk %u owner %u split %d charged %d zeroed %d",
		      id.v, owner, form.split, form.charged, flag);
		chunk_do_grow_take(&model, &pool, id, owner, form, flag);
		break;
	case OP_GROW_ABORT:
		if (!chunk_model_pick(&model, rng, TM_CHUNK_GROWING, &id))
			break;
		tm_op("grow_abort chunk %u", id.v);
		chunk_do_grow_abort(&model, &pool, id);
		break;
	case OP_RECAST_BEGIN:
		tm_op("recast_begin");
		chunk_do_recast_begin(&model, &pool, &id);
		break;
	case OP_TAKE:
		owner = tm_rand_below(rng, TM_OWNERS);
		tm_op("take owner %u split %d want_zeroed %d", owner,
		      form.split, flag);
		chunk_do_take(&model, &pool, owner, form.split, flag, &id);
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

/* What may happen to a chunk, and what has to be seen to happen. */
static const u8 may_go[TM_CHUNK_STATES][TM_CHUNK_STATES] = {
	[TM_CHUNK_ABSENT][TM_CHUNK_GROWING] = 1,
	[TM_CHUNK_GROWING][TM_CHUNK_ABSENT] = 1,
	[TM_CHUNK_GROWING][TM_CHUNK_FREE_ZEROED] = 1,
	[TM_CHUNK_GROWING][TM_CHUNK_FREE_DIRTY] = 1,
	[TM_CHUNK_GROWING][TM_CHUNK_OWNED] = 1,
	[TM_CHUNK_FREE_ZEROED][TM_CHUNK_ABSENT] = 1,
	[TM_CHUNK_FREE_ZEROED][TM_CHUNK_GROWING] = 1,
	[TM_CHUNK_FREE_ZEROED][TM_CHUNK_OWNED] = 1,
	[TM_CHUNK_FREE_DIRTY][TM_CHUNK_ABSENT] = 1,
	[TM_CHUNK_FREE_DIRTY][TM_CHUNK_GROWING] = 1,
	[TM_CHUNK_FREE_DIRTY][TM_CHUNK_ZEROING] = 1,
	[TM_CHUNK_FREE_DIRTY][TM_CHUNK_OWNED] = 1,
	[TM_CHUNK_FREE_SPLIT][TM_CHUNK_ABSENT] = 1,
	[TM_CHUNK_FREE_SPLIT][TM_CHUNK_GROWING] = 1,
	[TM_CHUNK_FREE_SPLIT][TM_CHUNK_OWNED] = 1,
	[TM_CHUNK_ZEROING][TM_CHUNK_FREE_ZEROED] = 1,
	[TM_CHUNK_OWNED][TM_CHUNK_ABSENT] = 1,
	[TM_CHUNK_OWNED][TM_CHUNK_FREE_ZEROED] = 1,
	[TM_CHUNK_OWNED][TM_CHUNK_FREE_DIRTY] = 1,
	[TM_CHUNK_OWNED][TM_CHUNK_FREE_SPLIT] = 1,
};

TEST(chunk_random)
{
	static const u32 sizes[] = { 1, 2, 3, 8, 24, CHUNK_MODEL_SLOTS };
	bool seen[TM_CHUNK_STATES][TM_CHUNK_STATES] = { 0 };
	bool seen_form[TM_OWNERS][2][2] = { 0 };
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

			for (u32 v = 0; v < model.nr_slots; v++) {
				seen[was[v]][model.state[v]] = true;
				if (model.state[v] == TM_CHUNK_OWNED)
					seen_form[model.owner[v]]
						 [model.form[v].split]
						 [model.form[v].charged] = true;
			}
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
	for (u32 from = 0; from < TM_CHUNK_STATES; from++)
		for (u32 to = 0; to < TM_CHUNK_STATES; to++)
			if (from != to)
				CHECK_EQ(seen[from][to], may_go[from][to]);
	for (u32 i = 0; i < 4; i++)
		for (u32 o = 0; o < TM_OWNERS; o++)
			CHECK(seen_form[o][i / 2][i % 2]);
	CHECK(seen_together);
	CHECK(seen_over_capacity);
	CHECK(seen_reserve_over_capacity);
}

/*
 * Whatever the pool looks like, a caller who gives back the excess and then
 * fills the deficit is done. One who recasts before he grows never grew what he
 * would have to give back. One who grows first recasts split chunks only, and has
 * nothing but split chunks too many.
 */
TEST(chunk_settles)
{
	u32 recast = 0, too_many = 0;
	struct tm_round round;

	tm_for_each_round(&round, 200, 200) {
		bool grow_first = tm_rand_one_in(&round.rng, 2);
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
			if ((!grow_first && pool.count[TM_CHUNK_FREE_SPLIT]) ||
			    chunk_do_grow_begin(&model, &pool, &id)) {
				CHECK(pool.count[TM_CHUNK_FREE_SPLIT]);
				CHECK_EQ(chunk_do_recast_begin(&model, &pool,
							       &id), 0);
				recast++;
			}
			chunk_do_grow_end(&model, &pool, id, true);
		}
		CHECK_EQ(tm_chunk_deficit(&pool), 0);
		work = tm_chunk_excess(&pool);
		CHECK(work <= (grow_first ? pool.count[TM_CHUNK_FREE_SPLIT] :
					    0));
		too_many += work;
		while (work--)
			CHECK_EQ(chunk_do_remove(&model, &pool, &id), 0);
		CHECK_EQ(tm_chunk_deficit(&pool), 0);
		CHECK_EQ(tm_chunk_excess(&pool), 0);
		chunk_model_compare(&model, &pool);
		drain();
		teardown();
	}
	/* A replay of one round need not show either. */
	if (round.nr < 200)
		return;
	CHECK(recast);
	CHECK(too_many);
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
		(void)!tm_chunk_take(&pool, TM_OWNER_TENSOR, false, true, &id,
				     &zeroed);
		break;
	case 4:
		id.v = 1;
		(void)!tm_chunk_put(&pool, id, true);
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
	case 8:
		tm_chunk_grow_take(&pool, id, TM_OWNER_TENSOR, whole);
		break;
	case 9:
		(void)!tm_chunk_recast_begin(&pool, &id);
		break;
	}
}

TEST(chunk_calls_need_the_lock)
{
	static const char *const calls[] = {
		"grow_begin", "grow_end", "grow_abort", "take", "put",
		"zero_begin", "zero_end", "remove", "grow_take",
		"recast_begin",
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
					       false, false, &id), 0);
		if (i == 1)
			CHECK_EQ(chunk_do_zero_begin(&model, &pool, &id), 0);
	}
	for (int i = 0; i < 10; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	drain();
	teardown();
}
