/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kv pool as an array of pages and which block has each, and at what place.
 * What an allocation or a move is to choose is worked out here by looking at every
 * chunk, and every run of it; where chunks are alike the pool may take either.
 */
#ifndef TM_TEST_KV_MODEL_H
#define TM_TEST_KV_MODEL_H

#include "core/kv.h"
#include "harness.h"

#define KV_MODEL_CHUNKS	8
#define KV_MODEL_PAGES	(1u << TM_MAX_CHUNK_ORDER)
#define KV_MODEL_BLOCKS	(KV_MODEL_CHUNKS * KV_MODEL_PAGES)
#define KV_MODEL_MARKS	(KV_MODEL_BLOCKS / TM_KV_MARK_PAGES)

/* The page is set aside for a move. */
#define KV_MODEL_MOVING	(TM_NONE - 1)

struct kv_model_chunk {
	bool in_pool;
	bool stuck;
	/* Block + 1, 0 for a free page, or KV_MODEL_MOVING. */
	u32 owner[KV_MODEL_PAGES];
	u32 place[KV_MODEL_PAGES];
};

struct kv_model {
	struct tm_kv_geometry geo;
	u32 nr_slots;
	struct kv_model_chunk chunk[KV_MODEL_CHUNKS];
	/* The allocated blocks, oldest first. */
	struct tm_kv_block blocks[KV_MODEL_BLOCKS];
	u32 group[KV_MODEL_BLOCKS];
	u32 pages[KV_MODEL_BLOCKS];
	bool run[KV_MODEL_BLOCKS];
	u32 nr_blocks;
	struct tm_kv_move move;
	bool moving;
	/* The page that is moved is its block's still. */
	bool move_counts;
	u64 allocs;
	u64 frees;
	u64 gathered;
	u64 moved;
};

/* A pool and its tables, byte for byte. */
struct kv_snapshot {
	struct tm_kv_pool pool;
	struct tm_kv_chunk chunks[KV_MODEL_CHUNKS];
	u32 links[KV_MODEL_CHUNKS * KV_MODEL_PAGES];
	struct tm_kv_record blocks[KV_MODEL_BLOCKS];
	struct tm_kv_mark marks[KV_MODEL_MARKS];
};

/*
 * Everything that must be true of a pool between two operations. Return: NULL when
 * all holds, else a sentence that says what does not.
 */
const char *kv_check(const struct tm_kv_pool *pool);

void kv_model_init(struct kv_model *model, const struct tm_kv_geometry *geo,
		   u32 nr_slots);
u32 kv_model_pages(const struct kv_model *model);
u32 kv_model_chunks(const struct kv_model *model);
u32 kv_model_free(const struct kv_model *model);
/* The model's chunk @i as level 1 calls it: no pool's slot has that number. */
struct tm_chunk_id kv_model_id(u32 i);
/* Fail the test where @pool is not what @model says. */
void kv_model_compare(const struct kv_model *model,
		      const struct tm_kv_pool *pool);

void kv_snapshot_take(struct kv_snapshot *snapshot,
		      const struct tm_kv_pool *pool);
bool kv_snapshot_same(const struct kv_snapshot *snapshot,
		      const struct tm_kv_pool *pool);
/* Put the pool back to what it was. */
void kv_snapshot_restore(const struct kv_snapshot *snapshot,
			 struct tm_kv_pool *pool);

/*
 * The operations: each calls the pool, checks its answer against the model's, that
 * a refused call changed nothing, and does the same to the model.
 */
int kv_do_add(struct kv_model *model, struct tm_kv_pool *pool);
int kv_do_remove(struct kv_model *model, struct tm_kv_pool *pool);
int kv_do_alloc(struct kv_model *model, struct tm_kv_pool *pool,
		const u32 *count);
/* Free the @nth allocated block. */
void kv_do_free(struct kv_model *model, struct tm_kv_pool *pool, u32 nth);
int kv_do_shrink(struct kv_model *model, struct tm_kv_pool *pool, u32 nth,
		 u32 pages);
int kv_do_regrow(struct kv_model *model, struct tm_kv_pool *pool, u32 nth);
/* Free what is not a block, or do anything else with it. */
void kv_do_bad_free(const struct kv_model *model, struct tm_kv_pool *pool,
		    struct tm_kv_block block);
int kv_do_move_begin(struct kv_model *model, struct tm_kv_pool *pool);
int kv_do_move_end(struct kv_model *model, struct tm_kv_pool *pool,
		   bool copied);

#endif
