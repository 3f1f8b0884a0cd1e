/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A slab pool as arrays of objects and whether each is allocated. Descriptors are
 * of the exact size, so that the sanitizer sees a step beyond their end.
 */
#ifndef TM_TEST_SLAB_MODEL_H
#define TM_TEST_SLAB_MODEL_H

#include "core/slab.h"
#include "harness.h"

#define SLAB_MODEL_SLABS	6
#define SLAB_MODEL_OBJECTS	(SLAB_MODEL_SLABS * TM_SLAB_MAX_OBJECTS)

struct slab_model {
	u32 nr_objects;		/* of a slab */
	struct tm_slab *slab[SLAB_MODEL_SLABS];
	bool in_pool[SLAB_MODEL_SLABS];
	bool used[SLAB_MODEL_SLABS][TM_SLAB_MAX_OBJECTS];
	/* The allocated objects, oldest first. */
	struct tm_slab_object objects[SLAB_MODEL_OBJECTS];
	u32 nr;
	u64 allocs;
	u64 frees;
};

/* A pool and its descriptors, byte for byte. */
struct slab_snapshot {
	struct tm_slab_pool pool;
	u8 *slab[SLAB_MODEL_SLABS];
};

void slab_model_init(struct slab_model *model, const struct tm_slab_pool *pool);
void slab_model_destroy(struct slab_model *model);
u32 slab_model_free(const struct slab_model *model, u32 s);
/* Free objects of all slabs in the pool. */
u32 slab_model_room(const struct slab_model *model);
bool slab_model_allocated(const struct slab_model *model,
			  struct tm_slab_object object);
/* Fail the test where @pool is not what @model says. */
void slab_model_compare(const struct slab_model *model,
			const struct tm_slab_pool *pool);

void slab_snapshot_take(struct slab_snapshot *snapshot,
			const struct slab_model *model,
			const struct tm_slab_pool *pool);
bool slab_snapshot_same(const struct slab_snapshot *snapshot,
			const struct slab_model *model,
			const struct tm_slab_pool *pool);
/* Put the pool back to what it was. */
void slab_snapshot_restore(const struct slab_snapshot *snapshot,
			   const struct slab_model *model,
			   struct tm_slab_pool *pool);
void slab_snapshot_drop(struct slab_snapshot *snapshot);

/* The operations, as in chunk_model.h. */
void slab_do_add(struct slab_model *model, struct tm_slab_pool *pool, u32 s);
/* Return: the slab taken out, -1 for none. */
int slab_do_take_empty(struct slab_model *model, struct tm_slab_pool *pool);
int slab_do_alloc(struct slab_model *model, struct tm_slab_pool *pool, u32 nr);
/* Free allocated objects and others: fails if there is one of the others. */
int slab_do_free(struct slab_model *model, struct tm_slab_pool *pool,
		 const struct tm_slab_object *objects, u32 nr);

#endif
