/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The chunk pool as a plain table of states: what core/chunk.c must agree with.
 * It has no links and no running counts; everything is counted anew, the top of a
 * stack is the chunk that came last, and the excess and the deficit are found by
 * doing, one chunk at a time, what a caller would do.
 */
#ifndef TM_TEST_CHUNK_MODEL_H
#define TM_TEST_CHUNK_MODEL_H

#include "core/check.h"
#include "harness.h"

#define CHUNK_MODEL_SLOTS	48

struct chunk_model {
	u32 nr_slots;
	u32 capacity;
	u32 reserve;
	enum tm_chunk_state state[CHUNK_MODEL_SLOTS];
	enum tm_owner owner[CHUNK_MODEL_SLOTS];
	/* What the system handed out, while the slot has memory. */
	struct tm_chunk_form form[CHUNK_MODEL_SLOTS];
	/* Somebody's data may be in the chunk. */
	bool written[CHUNK_MODEL_SLOTS];
	/* When the chunk came to its state. */
	u64 since[CHUNK_MODEL_SLOTS];
	u64 now;
	u64 taken[TM_OWNERS];
	u64 grown;
	u64 shrunk;
	u64 grow_failed;
	u64 recast;
};

/* A pool and its table, byte for byte. */
struct chunk_snapshot {
	struct tm_chunk_pool pool;
	struct tm_chunk chunks[CHUNK_MODEL_SLOTS];
};

void chunk_model_init(struct chunk_model *model, u32 nr_slots);
u32 chunk_model_count(const struct chunk_model *model,
		      enum tm_chunk_state state);
u32 chunk_model_owned(const struct chunk_model *model, enum tm_owner owner);
u32 chunk_model_total(const struct chunk_model *model);
u32 chunk_model_free(const struct chunk_model *model);
/* Whether a chunk in @state has memory of a known form. */
bool chunk_model_has_memory(enum tm_chunk_state state);
/* A random chunk in @state; false when there is none. */
bool chunk_model_pick(const struct chunk_model *model, struct tm_rng *rng,
		      enum tm_chunk_state state, struct tm_chunk_id *id);
u32 chunk_model_excess(const struct chunk_model *model);
u32 chunk_model_deficit(const struct chunk_model *model);
/* Fail the test where @pool is not what @model says. */
void chunk_model_compare(const struct chunk_model *model,
			 const struct tm_chunk_pool *pool);

void chunk_snapshot_take(struct chunk_snapshot *snapshot,
			 const struct tm_chunk_pool *pool);
bool chunk_snapshot_same(const struct chunk_snapshot *snapshot,
			 const struct tm_chunk_pool *pool);

/*
 * The operations: each does it to the pool and the model, and fails the test
 * where the result is not what the model allows. A refused call must have left
 * every byte of the pool as it was. Where a chunk's memory goes back to the system,
 * the pool must still say what form it has. Return: what the pool returned.
 */
int chunk_do_grow_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id *id);
void chunk_do_grow_end(struct chunk_model *model, struct tm_chunk_pool *pool,
		       struct tm_chunk_id id, bool zeroed);
void chunk_do_grow_take(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id id, enum tm_owner owner,
			struct tm_chunk_form form, bool zeroed);
void chunk_do_grow_abort(struct chunk_model *model, struct tm_chunk_pool *pool,
			 struct tm_chunk_id id);
int chunk_do_recast_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			  struct tm_chunk_id *id);
int chunk_do_take(struct chunk_model *model, struct tm_chunk_pool *pool,
		  enum tm_owner owner, bool split, bool want_zeroed,
		  struct tm_chunk_id *id);
/* Says that the chunk is zeroed when nobody wrote to it, split or not. */
bool chunk_do_put(struct chunk_model *model, struct tm_chunk_pool *pool,
		  struct tm_chunk_id id);
int chunk_do_zero_begin(struct chunk_model *model, struct tm_chunk_pool *pool,
			struct tm_chunk_id *id);
void chunk_do_zero_end(struct chunk_model *model, struct tm_chunk_pool *pool,
		       struct tm_chunk_id id);
int chunk_do_remove(struct chunk_model *model, struct tm_chunk_pool *pool,
		    struct tm_chunk_id *id);

#endif
