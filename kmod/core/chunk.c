// SPDX-License-Identifier: GPL-2.0-only
#include "core/chunk.h"

static bool tm_chunk_listed(enum tm_chunk_state state)
{
	return state == TM_CHUNK_ABSENT || state == TM_CHUNK_FREE_ZEROED ||
	       state == TM_CHUNK_FREE_DIRTY || state == TM_CHUNK_FREE_SPLIT;
}

static void tm_chunk_push(struct tm_chunk_pool *pool, u32 v)
{
	struct tm_chunk *c = &pool->chunks[v];

	c->next = pool->head[c->state];
	pool->head[c->state] = v;
}

/* Move a chunk on: one that is listed has to be the top of its stack. */
static void tm_chunk_move(struct tm_chunk_pool *pool, u32 v,
			  enum tm_chunk_state to)
{
	struct tm_chunk *c = &pool->chunks[v];

	if (tm_chunk_listed(c->state))
		pool->head[c->state] = c->next;
	pool->count[c->state]--;
	pool->count[to]++;
	c->state = to;
	if (tm_chunk_listed(to))
		tm_chunk_push(pool, v);
}

/* The free chunk that is missed least, or TM_NONE. */
static u32 tm_chunk_least(const struct tm_chunk_pool *pool)
{
	if (pool->head[TM_CHUNK_FREE_SPLIT] != TM_NONE)
		return pool->head[TM_CHUNK_FREE_SPLIT];
	if (pool->head[TM_CHUNK_FREE_DIRTY] != TM_NONE)
		return pool->head[TM_CHUNK_FREE_DIRTY];
	return pool->head[TM_CHUNK_FREE_ZEROED];
}

static void tm_chunk_own(struct tm_chunk_pool *pool, u32 v, enum tm_owner owner,
			 struct tm_chunk_form form)
{
	tm_chunk_move(pool, v, TM_CHUNK_OWNED);
	pool->chunks[v].owner = owner;
	pool->chunks[v].form = form;
	pool->owned[owner]++;
	pool->taken[owner]++;
}

static bool tm_chunk_is(const struct tm_chunk_pool *pool, struct tm_chunk_id id,
			enum tm_chunk_state state)
{
	return !tm_warn_on(id.v >= pool->nr_slots ||
			   pool->chunks[id.v].state != state);
}

int tm_chunk_pool_init(struct tm_chunk_pool *pool, u32 nr_slots,
		       tm_lock_t *lock)
{
	*pool = (struct tm_chunk_pool){ .lock = lock };
	/* A page id has to name every page of every chunk. */
	if (!nr_slots || nr_slots > TM_NONE >> TM_MAX_CHUNK_ORDER)
		return -EINVAL;
	pool->chunks = tm_table_alloc(nr_slots, sizeof(*pool->chunks));
	if (!pool->chunks)
		return -ENOMEM;

	pool->nr_slots = nr_slots;
	pool->capacity = nr_slots;
	for (u32 s = 0; s < TM_CHUNK_STATES; s++)
		pool->head[s] = TM_NONE;
	/* Highest first, so that slots are handed out from 0 up. */
	for (u32 v = nr_slots; v-- > 0;)
		tm_chunk_push(pool, v);
	pool->count[TM_CHUNK_ABSENT] = nr_slots;
	return 0;
}

void tm_chunk_pool_destroy(struct tm_chunk_pool *pool)
{
	tm_warn_on(tm_chunk_total(pool));
	tm_table_free(pool->chunks);
	pool->chunks = NULL;
}

int tm_chunk_grow_begin(struct tm_chunk_pool *pool, struct tm_chunk_id *id)
{
	u32 v = pool->head[TM_CHUNK_ABSENT];

	tm_assert_locked(pool->lock);
	if (v == TM_NONE || tm_chunk_total(pool) >= pool->capacity)
		return -ENOSPC;
	tm_chunk_move(pool, v, TM_CHUNK_GROWING);
	id->v = v;
	return 0;
}

void tm_chunk_grow_end(struct tm_chunk_pool *pool, struct tm_chunk_id id,
		       bool zeroed)
{
	tm_assert_locked(pool->lock);
	if (!tm_chunk_is(pool, id, TM_CHUNK_GROWING))
		return;
	pool->grown++;
	pool->chunks[id.v].form = (struct tm_chunk_form){ 0 };
	tm_chunk_move(pool, id.v,
		      zeroed ? TM_CHUNK_FREE_ZEROED : TM_CHUNK_FREE_DIRTY);
}

void tm_chunk_grow_take(struct tm_chunk_pool *pool, struct tm_chunk_id id,
			enum tm_owner owner, struct tm_chunk_form form)
{
	tm_assert_locked(pool->lock);
	if (!tm_chunk_is(pool, id, TM_CHUNK_GROWING))
		return;
	pool->grown++;
	tm_chunk_own(pool, id.v, owner, form);
}

void tm_chunk_grow_abort(struct tm_chunk_pool *pool, struct tm_chunk_id id)
{
	tm_assert_locked(pool->lock);
	if (!tm_chunk_is(pool, id, TM_CHUNK_GROWING))
		return;
	pool->grow_failed++;
	tm_chunk_move(pool, id.v, TM_CHUNK_ABSENT);
}

int tm_chunk_recast_begin(struct tm_chunk_pool *pool, struct tm_chunk_id *id)
{
	tm_assert_locked(pool->lock);
	id->v = tm_chunk_least(pool);
	if (id->v == TM_NONE)
		return -ENOENT;
	tm_chunk_move(pool, id->v, TM_CHUNK_GROWING);
	pool->shrunk++;
	pool->recast++;
	return 0;
}

int tm_chunk_take(struct tm_chunk_pool *pool, enum tm_owner owner, bool split,
		  bool want_zeroed, struct tm_chunk_id *id, bool *zeroed)
{
	enum tm_chunk_state from = split ? TM_CHUNK_FREE_SPLIT :
				   want_zeroed ? TM_CHUNK_FREE_ZEROED :
						 TM_CHUNK_FREE_DIRTY;
	enum tm_chunk_state else_from = want_zeroed ? TM_CHUNK_FREE_DIRTY :
						      TM_CHUNK_FREE_ZEROED;

	tm_assert_locked(pool->lock);
	if (!split && pool->head[from] == TM_NONE)
		from = else_from;
	if (pool->head[from] == TM_NONE)
		return -ENOMEM;

	id->v = pool->head[from];
	*zeroed = from == TM_CHUNK_FREE_ZEROED;
	tm_chunk_own(pool, id->v, owner,
		     (struct tm_chunk_form){ .split = split });
	return 0;
}

bool tm_chunk_put(struct tm_chunk_pool *pool, struct tm_chunk_id id,
		  bool zeroed)
{
	struct tm_chunk_form form;

	tm_assert_locked(pool->lock);
	if (!tm_chunk_is(pool, id, TM_CHUNK_OWNED))
		return false;
	form = pool->chunks[id.v].form;
	pool->owned[pool->chunks[id.v].owner]--;
	if (form.charged) {
		tm_chunk_move(pool, id.v, TM_CHUNK_ABSENT);
		pool->shrunk++;
	} else {
		tm_chunk_move(pool, id.v, form.split ? TM_CHUNK_FREE_SPLIT :
					  zeroed ? TM_CHUNK_FREE_ZEROED :
						   TM_CHUNK_FREE_DIRTY);
	}
	return form.charged;
}

int tm_chunk_zero_begin(struct tm_chunk_pool *pool, struct tm_chunk_id *id)
{
	tm_assert_locked(pool->lock);
	if (pool->head[TM_CHUNK_FREE_DIRTY] == TM_NONE)
		return -ENOENT;
	id->v = pool->head[TM_CHUNK_FREE_DIRTY];
	tm_chunk_move(pool, id->v, TM_CHUNK_ZEROING);
	return 0;
}

void tm_chunk_zero_end(struct tm_chunk_pool *pool, struct tm_chunk_id id)
{
	tm_assert_locked(pool->lock);
	if (tm_chunk_is(pool, id, TM_CHUNK_ZEROING))
		tm_chunk_move(pool, id.v, TM_CHUNK_FREE_ZEROED);
}

int tm_chunk_remove(struct tm_chunk_pool *pool, struct tm_chunk_id *id)
{
	tm_assert_locked(pool->lock);
	id->v = tm_chunk_least(pool);
	if (id->v == TM_NONE)
		return -ENOENT;
	tm_chunk_move(pool, id->v, TM_CHUNK_ABSENT);
	pool->shrunk++;
	return 0;
}

u32 tm_chunk_excess(const struct tm_chunk_pool *pool)
{
	u32 free = tm_chunk_free_count(pool);
	u32 total = tm_chunk_total(pool);
	u32 above_reserve = free > pool->reserve ? free - pool->reserve : 0;
	u32 above_capacity = total > pool->capacity ? total - pool->capacity : 0;

	if (above_capacity > free)
		above_capacity = free;
	return above_reserve > above_capacity ? above_reserve : above_capacity;
}

u32 tm_chunk_deficit(const struct tm_chunk_pool *pool)
{
	u32 ready = pool->count[TM_CHUNK_FREE_ZEROED] +
		    pool->count[TM_CHUNK_ZEROING] +
		    pool->count[TM_CHUNK_GROWING];
	u32 room = pool->capacity > pool->count[TM_CHUNK_OWNED] ?
		   pool->capacity - pool->count[TM_CHUNK_OWNED] : 0;
	u32 reserve = pool->reserve;

	/* A reserve beyond what the capacity leaves room for is out of reach. */
	if (room < reserve)
		reserve = room;
	return ready < reserve ? reserve - ready : 0;
}
