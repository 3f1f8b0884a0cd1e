/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The buddy pool as an array of pages and who has each. A free run is not stored:
 * since buddies always merge, the free pages of a chunk divide into aligned runs
 * in one way only, and the model finds it anew each time.
 */
#ifndef TM_TEST_BUDDY_MODEL_H
#define TM_TEST_BUDDY_MODEL_H

#include "core/check.h"
#include "harness.h"

#define BUDDY_MODEL_SLOTS	12
#define BUDDY_MODEL_PAGES	(1u << TM_MAX_CHUNK_ORDER)
#define BUDDY_MODEL_RUNS	(BUDDY_MODEL_SLOTS * BUDDY_MODEL_PAGES)

struct buddy_run {
	struct tm_page_id page;
	unsigned int order;
	bool unmovable;
	/* A move to it is under way. */
	bool arriving;
	/* Of all runs there ever were; for whoever follows one on its moves. */
	u32 id;
};

struct buddy_model {
	struct tm_geometry geometry;
	u32 nr_slots;
	bool in_pool[BUDDY_MODEL_SLOTS];
	bool used[BUDDY_MODEL_SLOTS][BUDDY_MODEL_PAGES];
	/* What tm_buddy_chunk::run must be. */
	u8 run[BUDDY_MODEL_SLOTS][BUDDY_MODEL_PAGES];
	/* The allocated runs, oldest first. */
	struct buddy_run runs[BUDDY_MODEL_RUNS];
	u32 nr_runs;
	u32 last_id;
	/* What the fields of the same name must be. */
	u64 drain[BUDDY_MODEL_SLOTS];
	u64 rest[BUDDY_MODEL_SLOTS];
	/* tm_buddy_drain_next() has named the run that starts here. */
	bool named[BUDDY_MODEL_SLOTS][BUDDY_MODEL_PAGES];
	u64 pass;
	u64 drains;
	u64 emptied;
	u64 halved;
	u64 given_up;
	u64 starved;
	u64 moved_runs;
	u64 moved_pages;
	u64 allocs;
	u64 frees;
	u64 splits;
	u64 merges;
};

/* A pool and its table, byte for byte. */
struct buddy_snapshot {
	struct tm_buddy buddy;
	struct tm_buddy_chunk chunks[BUDDY_MODEL_SLOTS];
};

void buddy_model_init(struct buddy_model *model, struct tm_geometry g,
		      u32 nr_slots);
u32 buddy_model_pages(const struct buddy_model *model);
u32 buddy_model_chunks(const struct buddy_model *model);
u32 buddy_model_used(const struct buddy_model *model);
bool buddy_model_empty(const struct buddy_model *model, struct tm_chunk_id id);
enum tm_buddy_class buddy_model_class(const struct buddy_model *model, u32 v);
/* A move to one of its runs is under way. */
bool buddy_model_arriving(const struct buddy_model *model, u32 v);
/* Index into the runs, or their number when no run starts at @page. */
u32 buddy_model_find(const struct buddy_model *model, struct tm_page_id page);
/* Order of the largest free run, -1 for none. */
int buddy_model_largest(const struct buddy_model *model, struct tm_chunk_id id);
/* Fail the test where @buddy is not what @model says. */
void buddy_model_compare(const struct buddy_model *model,
			 const struct tm_buddy *buddy);

void buddy_snapshot_take(struct buddy_snapshot *snapshot,
			 const struct tm_buddy *buddy);
bool buddy_snapshot_same(const struct buddy_snapshot *snapshot,
			 const struct tm_buddy *buddy);
/* Put the pool back to what it was. */
void buddy_snapshot_restore(const struct buddy_snapshot *snapshot,
			    struct tm_buddy *buddy);

/* The operations, as in chunk_model.h. */
void buddy_do_add(struct buddy_model *model, struct tm_buddy *buddy,
		  struct tm_chunk_id id);
int buddy_do_remove(struct buddy_model *model, struct tm_buddy *buddy,
		    struct tm_chunk_id id);
int buddy_do_alloc(struct buddy_model *model, struct tm_buddy *buddy,
		   unsigned int order, struct tm_page_id *page);
int buddy_do_alloc_unmovable(struct buddy_model *model, struct tm_buddy *buddy,
			     unsigned int order, struct tm_page_id *page);
/* Free the @nth allocated run. Return: its chunk is empty now. */
bool buddy_do_free(struct buddy_model *model, struct tm_buddy *buddy, u32 nth);
/* Free what is not an allocated run: must be refused. */
void buddy_do_bad_free(const struct buddy_model *model, struct tm_buddy *buddy,
		       struct tm_page_id page, unsigned int order);

int buddy_do_drain_begin(struct buddy_model *model, struct tm_buddy *buddy,
			 struct tm_chunk_id id, struct tm_buddy_drain *drain);
/* The model's part of it: for what somebody else does to the pool, too. */
void buddy_model_drain_half(struct buddy_model *model, u32 v);
void buddy_do_drain_half(struct buddy_model *model, struct tm_buddy *buddy,
			 struct tm_buddy_drain *drain);
int buddy_do_drain_next(struct buddy_model *model, struct tm_buddy *buddy,
			struct tm_buddy_drain *drain, struct tm_page_id *page,
			unsigned int *order);
int buddy_do_drain_alloc(struct buddy_model *model, struct tm_buddy *buddy,
			 const struct tm_buddy_drain *drain,
			 unsigned int order, struct tm_page_id *page);
/* The @from-th allocated run is at the @to-th now. Return: its chunk is empty. */
bool buddy_do_drain_moved(struct buddy_model *model, struct tm_buddy *buddy,
			  u32 from, u32 to);
void buddy_do_drain_cancel(struct buddy_model *model, struct tm_buddy *buddy,
			   const struct tm_buddy_drain *drain);

#endif
