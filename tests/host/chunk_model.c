// SPDX-License-Identifier: GPL-2.0-only
#include "chunk_model.h"

static void enter(struct chunk_model *model, u32 v, enum tm_chunk_state state)
{
	model->state[v] = state;
	model->since[v] = ++model->now;
}

/* The chunk that came to @state last, or TM_NONE. */
static u32 newest(const struct chunk_model *model, enum tm_chunk_state state)
{
	u32 top = TM_NONE;

	for (u32 v = 0; v < model->nr_slots; v++)
		if (model->state[v] == state &&
		    (top == TM_NONE || model->since[v] > model->since[top]))
			top = v;
	return top;
}

/* The free chunk to part with: split before dirty before zeroed; or TM_NONE. */
static u32 least(const struct chunk_model *model)
{
	static const enum tm_chunk_state states[] = {
		TM_CHUNK_FREE_SPLIT, TM_CHUNK_FREE_DIRTY, TM_CHUNK_FREE_ZEROED,
	};

	for (u32 i = 0; i < 3; i++)
		if (chunk_model_count(model, states[i]))
			return newest(model, states[i]);
	return TM_NONE;
}

void chunk_model_init(struct chunk_model *model, u32 nr_slots)
{
	CHECK(nr_slots <= CHUNK_MODEL_SLOTS);
	*model = (struct chunk_model){
		.nr_slots = nr_slots,
		.capacity = nr_slots,
	};
	/* Slot 0 is the first to be handed out: it came last. */
	for (u32 v = nr_slots; v-- > 0;)
		enter(model, v, TM_CHUNK_ABSENT);
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

u32 chunk_model_free(const struct chunk_model *model)
{
	return chunk_model_count(model, TM_CHUNK_FREE_ZEROED) +
	       chunk_model_count(model, TM_CHUNK_FREE_DIRTY) +
	       chunk_model_count(model, TM_CHUNK_FREE_SPLIT);
}

bool chunk_model_has_memory(enum tm_chunk_state state)
{
	return state != TM_CHUNK_ABSENT && state != TM_CHUNK_GROWING;
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

/* Give free chunks back, those missed least first, while there are too many. */
static u32 give_back(struct chunk_model *model)
{
	u32 n = 0;

	while (chunk_model_free(model) &&
	       (chunk_model_free(model) > model->reserve ||
		chunk_model_total(model) > model->capacity)) {
		enter(model, least(model), TM_CHUNK_ABSENT);
		n++;
	}
	return n;
}

u32 chunk_model_excess(const struct chunk_model *model)
{
	struct chunk_model copy = *model;

	return give_back(&copy);
}

/*
 * The work left to fill the reserve once what is too much has gone: zeroing or
 * recasting a chunk that is about to be given back would be wasted.
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

		if (ready >= copy.reserve)
			return n;
		if (chunk_model_count(&copy, TM_CHUNK_FREE_DIRTY))
			from = TM_CHUNK_FREE_DIRTY;
		else if (chunk_model_count(&copy, TM_CHUNK_FREE_SPLIT))
			from = TM_CHUNK_FREE_SPLIT;
		else if (chunk_model_total(&copy) < copy.capacity)
			from = TM_CHUNK_ABSENT;
		else
			return n;
		enter(&copy, newest(&copy, from), TM_CHUNK_FREE_ZEROED);
	}
}

static void check_form(const struct chunk_model *model,
		       const struct tm_chunk_pool *pool, u32 v)
{
	CHECK_EQ(pool->chunks[v].form.split, model->form[v].split);
	CHECK_EQ(pool->chunks[v].form.charged, model->form[v].charged);
}

void chunk_model_compare(const struct chunk_model *model,
			 const struct tm_chunk_pool *pool)
{
	for (u32 v = 0; v < model->nr_slots; v++) {
		CHECK_EQ(pool->chunks[v].state, model->state[v]);
		if (model->state[v] == TM_CHUNK_OWNED)
			CHECK_EQ(pool->chunks[v].owner, model->owner[v]);
		if (chunk_model_has_memory(model->state[v]))
			check_form(model, pool, v);
		if (model->state[v] == TM_CHUNK_FREE_ZEROED)
			CHECK(!model->written[v]);
	}
	for (u32 s = 0; s < TM_CHUNK_STATES; s++)
		CHECK_EQ(pool->count[s], chunk_model_count(model, s));
	for (u32 o = 0; o < TM_OWNERS; o++) {
		CHECK_EQ(pool->owned[o], chunk_model_owned(model, o));
		CHECK_EQ(pool->taken[o], model->taken[o]);
	}
	CHECK_EQ(tm_chunk_total(pool), chunk_model_total(model));
	CHECK_EQ(tm_chunk_free_count(pool), chunk_model_free(model));
	CHECK_EQ(pool->nr_slots, model->nr_slots);
	CHECK_EQ(pool->capacity, model->capacity);
	CHECK_EQ(pool->reserve, model->reserve);
	CHECK_EQ(pool->grown, model->grown);
	CHECK_EQ(pool->shrunk, model->shrunk);
	CHECK_EQ(pool->grow_failed, model->grow_failed);
	CHECK_EQ(pool->recast, model->recast);
	/* What came and did not go is what is there. */
	CHECK_EQ(pool->grown - pool->shrunk, chunk_model_total(model) -
		 chunk_model_count(model, TM_CHUNK_GROWING));
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
	CHECK_EQ(id->v, newest(model, TM_CHUNK_ABSENT));
	enter(model, id->v, TM_CHUNK_GROWING);
	return 0;
}

void chunk_do_grow_end(struct chunk_model *model, struct tm_chunk_pool *pool,
		       struct tm_chunk_id id, bool zeroed)
{
	tm_chunk_grow_end(pool, id, zeroed);
	enter(model, id.v, zeroed ? TM_CHUNK_FREE_ZEROED : TM_CHUNK_FREE_DIRTY);
	model->form[id.v] = (struct tm_chunk_form){ 0 };
	model->written[id.v] = !zeroed;
	model->grown++;
}

void chunk_do_grow_take(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id id, enum tm_owner owner,
			struct tm_chunk_form form, bool zeroed)
{
	tm_chunk_grow_take(pool, id, owner, form);
	enter(model, id.v, TM_CHUNK_OWNED);
	model->owner[id.v] = owner;
	model->taken[owner]++;
	model->form[id.v] = form;
	model->written[id.v] = !zeroed;
	model->grown++;
}

void chunk_do_grow_abort(struct chunk_model *model, struct tm_chunk_pool *pool,
			 struct tm_chunk_id id)
{
	tm_chunk_grow_abort(pool, id);
	enter(model, id.v, TM_CHUNK_ABSENT);
	model->grow_failed++;
}

/* @call lets the free chunk go that is missed least: it is @to afterwards. */
static int let_go(struct chunk_model *model, struct tm_chunk_pool *pool,
		  int (*call)(struct tm_chunk_pool *pool,
			      struct tm_chunk_id *id),
		  enum tm_chunk_state to, struct tm_chunk_id *id)
{
	u32 want = least(model);
	struct chunk_snapshot before;
	int err;

	chunk_snapshot_take(&before, pool);
	err = call(pool, id);
	CHECK_EQ(err, want == TM_NONE ? -ENOENT : 0);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK_EQ(id->v, want);
	check_form(model, pool, id->v);
	enter(model, id->v, to);
	model->shrunk++;
	return 0;
}

int chunk_do_recast_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			  struct tm_chunk_id *id)
{
	int err = let_go(model, pool, tm_chunk_recast_begin, TM_CHUNK_GROWING,
			 id);

	model->recast += !err;
	return err;
}

int chunk_do_take(struct chunk_model *model, struct tm_chunk_pool *pool,
		  enum tm_owner owner, bool split, bool want_zeroed,
		  struct tm_chunk_id *id)
{
	u32 clean = newest(model, TM_CHUNK_FREE_ZEROED);
	u32 dirty = newest(model, TM_CHUNK_FREE_DIRTY);
	struct chunk_snapshot before;
	bool zeroed;
	u32 want;
	int err;

	/* The form is a must; of the whole ones the kind asked for, else the other. */
	if (split)
		want = newest(model, TM_CHUNK_FREE_SPLIT);
	else if (want_zeroed)
		want = clean != TM_NONE ? clean : dirty;
	else
		want = dirty != TM_NONE ? dirty : clean;
	zeroed = want != clean;

	chunk_snapshot_take(&before, pool);
	err = tm_chunk_take(pool, owner, split, want_zeroed, id, &zeroed);
	CHECK_EQ(err, want == TM_NONE ? -ENOMEM : 0);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK_EQ(id->v, want);
	CHECK_EQ(zeroed, want == clean);
	CHECK_EQ(model->form[id->v].split, split);
	CHECK(!model->form[id->v].charged);
	if (zeroed)
		CHECK(!model->written[id->v]);
	enter(model, id->v, TM_CHUNK_OWNED);
	model->owner[id->v] = owner;
	model->taken[owner]++;
	return 0;
}

bool chunk_do_put(struct chunk_model *model, struct tm_chunk_pool *pool,
		  struct tm_chunk_id id)
{
	struct tm_chunk_form form = model->form[id.v];
	bool zeroed = !model->written[id.v];

	CHECK_EQ(tm_chunk_put(pool, id, zeroed), form.charged);
	if (form.charged) {
		check_form(model, pool, id.v);
		enter(model, id.v, TM_CHUNK_ABSENT);
		model->shrunk++;
	} else if (form.split) {
		enter(model, id.v, TM_CHUNK_FREE_SPLIT);
	} else {
		enter(model, id.v, zeroed ? TM_CHUNK_FREE_ZEROED :
					    TM_CHUNK_FREE_DIRTY);
	}
	return form.charged;
}

int chunk_do_zero_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id *id)
{
	u32 want = newest(model, TM_CHUNK_FREE_DIRTY);
	struct chunk_snapshot before;
	int err;

	chunk_snapshot_take(&before, pool);
	err = tm_chunk_zero_begin(pool, id);
	CHECK_EQ(err, want == TM_NONE ? -ENOENT : 0);
	if (err) {
		CHECK(chunk_snapshot_same(&before, pool));
		return err;
	}
	CHECK_EQ(id->v, want);
	enter(model, id->v, TM_CHUNK_ZEROING);
	return 0;
}

void chunk_do_zero_end(struct chunk_model *model, struct tm_chunk_pool *pool,
		       struct tm_chunk_id id)
{
	tm_chunk_zero_end(pool, id);
	enter(model, id.v, TM_CHUNK_FREE_ZEROED);
	model->written[id.v] = false;
}

int chunk_do_remove(struct chunk_model *model, struct tm_chunk_pool *pool,
		    struct tm_chunk_id *id)
{
	return let_go(model, pool, tm_chunk_remove, TM_CHUNK_ABSENT, id);
}
