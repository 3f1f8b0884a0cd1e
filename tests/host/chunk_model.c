// SPDX-License-Identifier: GPL-2.0-only
#include "chunk_model.h"

void chunk_model_init(struct chunk_model *model, u32 nr_slots)
{
	CHECK(nr_slots <= CHUNK_MODEL_SLOTS);
	*model = (struct chunk_model){
		.nr_slots = nr_slots,
		.capacity = nr_slots,
	};
	for (u32 v = 0; v < nr_slots; v++)
		model->state[v] = TM_CHUNK_ABSENT;
}

u32 chunk_model_count(const struct chunk_model *model,
		      enum tm_chunk_state state)
{
	u32 n = 0;

	for (u32 v = 0; v < model->nr_slots; v++)
		n += model->state[v] == state;
	return n;
}

u32 chunk_model_owned(const struct chunk_model *model, enum tm_owner owner)
{
	u32 n = 0;

	for (u32 v = 0; v < model->nr_slots; v++)
		n += model->state[v] == TM_CHUNK_OWNED &&
		     model->owner[v] == owner;
	return n;
}

u32 chunk_model_total(const struct chunk_model *model)
{
	u32 n = 0;

	for (u32 v = 0; v < model->nr_slots; v++)
		n += model->state[v] != TM_CHUNK_ABSENT;
	return n;
}

bool chunk_model_pick(const struct chunk_model *model, struct tm_rng *rng,
		      enum tm_chunk_state state, struct tm_chunk_id *id)
{
	u32 n = chunk_model_count(model, state);
	u32 nth;

	if (!n)
		return false;
	nth = tm_rand_below(rng, n);
	for (u32 v = 0; v < model->nr_slots; v++) {
		if (model->state[v] != state || nth--)
			continue;
		id->v = v;
		return true;
	}
	return false;
}

/* Give free chunks back, dirty ones first, while there are too many. */
static u32 give_back(struct chunk_model *model)
{
	u32 n = 0;

	for (;;) {
		u32 dirty = chunk_model_count(model, TM_CHUNK_FREE_DIRTY);
		u32 clean = chunk_model_count(model, TM_CHUNK_FREE_ZEROED);
		enum tm_chunk_state from = dirty ? TM_CHUNK_FREE_DIRTY :
						   TM_CHUNK_FREE_ZEROED;

		if (!(dirty + clean) ||
		    (dirty + clean <= model->reserve &&
		     chunk_model_total(model) <= model->capacity))
			return n;
		for (u32 v = 0; v < model->nr_slots; v++) {
			if (model->state[v] != from)
				continue;
			model->state[v] = TM_CHUNK_ABSENT;
			break;
		}
		n++;
	}
}

u32 chunk_model_excess(const struct chunk_model *model)
{
	struct chunk_model copy = *model;

	return give_back(&copy);
}

/*
 * The work left to fill the reserve once what is too much has gone: zeroing a
 * chunk that is about to be given back would be wasted.
 */
u32 chunk_model_deficit(const struct chunk_model *model)
{
	struct chunk_model copy = *model;
	u32 n = 0;

	give_back(&copy);
	for (;; n++) {
		u32 ready = chunk_model_count(&copy, TM_CHUNK_FREE_ZEROED) +
			    chunk_model_count(&copy, TM_CHUNK_ZEROING) +
			    chunk_model_count(&copy, TM_CHUNK_GROWING);
		enum tm_chunk_state from;
		u32 v;

		if (ready >= copy.reserve)
			return n;
		if (chunk_model_count(&copy, TM_CHUNK_FREE_DIRTY))
			from = TM_CHUNK_FREE_DIRTY;
		else if (chunk_model_total(&copy) < copy.capacity)
			from = TM_CHUNK_ABSENT;
		else
			return n;
		for (v = 0; copy.state[v] != from; v++)
			;
		copy.state[v] = TM_CHUNK_FREE_ZEROED;
	}
}

void chunk_model_compare(const struct chunk_model *model,
			 const struct tm_chunk_pool *pool)
{
	for (u32 v = 0; v < model->nr_slots; v++) {
		CHECK_EQ(pool->chunks[v].state, model->state[v]);
		if (model->state[v] == TM_CHUNK_OWNED)
			CHECK_EQ(pool->chunks[v].owner, model->owner[v]);
		if (model->state[v] == TM_CHUNK_FREE_ZEROED)
			CHECK(!model->written[v]);
	}
	for (u32 s = 0; s < TM_CHUNK_STATES; s++)
		CHECK_EQ(pool->count[s], chunk_model_count(model, s));
	for (u32 o = 0; o < TM_OWNERS; o++)
		CHECK_EQ(pool->owned[o], chunk_model_owned(model, o));
	CHECK_EQ(tm_chunk_total(pool), chunk_model_total(model));
	CHECK_EQ(tm_chunk_free_count(pool),
		 chunk_model_count(model, TM_CHUNK_FREE_ZEROED) +
		 chunk_model_count(model, TM_CHUNK_FREE_DIRTY));
	CHECK_EQ(pool->nr_slots, model->nr_slots);
	CHECK_EQ(pool->capacity, model->capacity);
	CHECK_EQ(pool->reserve, model->reserve);
	CHECK_EQ(pool->grown, model->grown);
	CHECK_EQ(pool->shrunk, model->shrunk);
	CHECK_EQ(pool->grow_failed, model->grow_failed);
	CHECK_EQ(tm_chunk_excess(pool), chunk_model_excess(model));
	CHECK_EQ(tm_chunk_deficit(pool), chunk_model_deficit(model));
	CHECK_OK(tm_chunk_check(pool));
}

void chunk_snapshot_take(struct chunk_snapshot *snapshot,
			 const struct tm_chunk_pool *pool)
{
	memcpy(&snapshot->pool, pool, sizeof(*pool));
	memcpy(snapshot->chunks, pool->chunks,
	       pool->nr_slots * sizeof(*pool->chunks));
}

bool chunk_snapshot_same(const struct chunk_snapshot *snapshot,
			 const struct tm_chunk_pool *pool)
{
	return !memcmp(&snapshot->pool, pool, sizeof(*pool)) &&
	       !memcmp(snapshot->chunks, pool->chunks,
		       pool->nr_slots * sizeof(*pool->chunks));
}

int chunk_do_grow_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id *id)
{
	bool room = chunk_model_total(model) < model->capacity &&
		    chunk_model_count(model, TM_CHUNK_ABSENT);
	struct chunk_snapshot before;
	int err;

	chunk_snapshot_take(&before, pool);
	err = tm_chunk_grow_begin(pool, id);
	CHECK_EQ(err, room ? 0 : -ENOSPC);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK(id->v < model->nr_slots);
	CHECK_EQ(model->state[id->v], TM_CHUNK_ABSENT);
	model->state[id->v] = TM_CHUNK_GROWING;
	return 0;
}

void chunk_do_grow_end(struct chunk_model *model, struct tm_chunk_pool *pool,
		       struct tm_chunk_id id, bool zeroed)
{
	tm_chunk_grow_end(pool, id, zeroed);
	model->state[id.v] = zeroed ? TM_CHUNK_FREE_ZEROED :
				      TM_CHUNK_FREE_DIRTY;
	model->written[id.v] = !zeroed;
	model->grown++;
}

void chunk_do_grow_abort(struct chunk_model *model, struct tm_chunk_pool *pool,
			 struct tm_chunk_id id)
{
	tm_chunk_grow_abort(pool, id);
	model->state[id.v] = TM_CHUNK_ABSENT;
	model->grow_failed++;
}

int chunk_do_take(struct chunk_model *model, struct tm_chunk_pool *pool,
		  enum tm_owner owner, bool want_zeroed,
		  struct tm_chunk_id *id)
{
	u32 clean = chunk_model_count(model, TM_CHUNK_FREE_ZEROED);
	u32 dirty = chunk_model_count(model, TM_CHUNK_FREE_DIRTY);
	/* The kind that was asked for if there is one, else the other. */
	bool want = want_zeroed ? clean != 0 : dirty == 0;
	struct chunk_snapshot before;
	bool zeroed = !want;
	int err;

	chunk_snapshot_take(&before, pool);
	err = tm_chunk_take(pool, owner, want_zeroed, id, &zeroed);
	CHECK_EQ(err, clean + dirty ? 0 : -ENOMEM);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK(id->v < model->nr_slots);
	CHECK_EQ(zeroed, want);
	CHECK_EQ(model->state[id->v], zeroed ? TM_CHUNK_FREE_ZEROED :
					       TM_CHUNK_FREE_DIRTY);
	if (zeroed)
		CHECK(!model->written[id->v]);
	model->state[id->v] = TM_CHUNK_OWNED;
	model->owner[id->v] = owner;
	return 0;
}

void chunk_do_put(struct chunk_model *model, struct tm_chunk_pool *pool,
		  struct tm_chunk_id id)
{
	bool zeroed = !model->written[id.v];

	tm_chunk_put(pool, id, zeroed);
	model->state[id.v] = zeroed ? TM_CHUNK_FREE_ZEROED :
				      TM_CHUNK_FREE_DIRTY;
}

int chunk_do_zero_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id *id)
{
	struct chunk_snapshot before;
	int err;

	chunk_snapshot_take(&before, pool);
	err = tm_chunk_zero_begin(pool, id);
	CHECK_EQ(err, chunk_model_count(model, TM_CHUNK_FREE_DIRTY) ?
		      0 : -ENOENT);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK(id->v < model->nr_slots);
	CHECK_EQ(model->state[id->v], TM_CHUNK_FREE_DIRTY);
	model->state[id->v] = TM_CHUNK_ZEROING;
	return 0;
}

void chunk_do_zero_end(struct chunk_model *model, struct tm_chunk_pool *pool,
		       struct tm_chunk_id id)
{
	tm_chunk_zero_end(pool, id);
	model->state[id.v] = TM_CHUNK_FREE_ZEROED;
	model->written[id.v] = false;
}

int chunk_do_remove(struct chunk_model *model, struct tm_chunk_pool *pool,
		    struct tm_chunk_id *id)
{
	u32 clean = chunk_model_count(model, TM_CHUNK_FREE_ZEROED);
	u32 dirty = chunk_model_count(model, TM_CHUNK_FREE_DIRTY);
	struct chunk_snapshot before;
	int err;

	chunk_snapshot_take(&before, pool);
	err = tm_chunk_remove(pool, id);
	CHECK_EQ(err, clean + dirty ? 0 : -ENOENT);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK(id->v < model->nr_slots);
	CHECK_EQ(model->state[id->v], dirty ? TM_CHUNK_FREE_DIRTY :
					      TM_CHUNK_FREE_ZEROED);
	model->state[id->v] = TM_CHUNK_ABSENT;
	model->shrunk++;
	return 0;
}
