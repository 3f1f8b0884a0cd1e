/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * An arena against maps: who has which granule, what each granule holds, who waits since
 * when. Free blocks are the gaps in the map, found by looking at all of it, and the one that an
 * allocation gets is chosen among them by the words of core/heap.h. Each rt_do_*() says what has to
 * come of a call, makes it, and checks that; rt_model_compare() checks all else.
 */
#ifndef TM_TEST_RT_MODEL_H
#define TM_TEST_RT_MODEL_H

#include "core/rt.h"
#include "harness.h"

#define RT_MODEL_SIZE		2048
#define RT_MODEL_CLIENTS	6
#define RT_MODEL_WAITERS	10
#define RT_MODEL_BLOCKS		1200
#define RT_MODEL_MOVABLE	80

enum model_kind {
	MODEL_NONE,
	MODEL_FIXED,
	MODEL_MOVABLE,
	MODEL_ITEM,
	MODEL_RUN,
};

struct model_thing {
	u32 kind;		/* MODEL_NONE: this entry is not used */
	u32 client;
	u32 start;
	u32 granules;		/* that it takes */
	u32 length;		/* that its owner may use */
	u32 handle;		/* 0: a run has none */
	u32 pins;
	u32 size, count;	/* of a run: its class */
	u32 run;		/* of an item: where its run is */
	u32 pattern;
	bool moving;
	bool abandoned;
};

struct model_client {
	bool joined;
	u32 priority;
	struct tm_rt_client core;
};

struct model_waiter {
	bool waiting;
	u32 client;
	u32 size;
	u32 flags;
	u32 priority;
	u32 since;
	u32 run;		/* whose items serve it, too; TM_HEAP_NONE: none */
	u32 handed;		/* when it got one that nobody was told of; or 0 */
	bool told;
	u32 told_at;
	struct tm_rt_waiter core;
};

struct rt_model {
	tm_raw_lock_t lock;
	struct tm_rt rt;
	u32 size;
	u32 max_movable;
	struct model_client client[RT_MODEL_CLIENTS];
	struct model_waiter waiter[RT_MODEL_WAITERS];
	struct model_thing thing[RT_MODEL_BLOCKS];
	u32 nr_things;			/* entries up to the last used one */
	u32 owner[RT_MODEL_SIZE];	/* thing + 1; 0: free. Items are not in it */
	u32 memory[RT_MODEL_SIZE];	/* what users have written */
	u32 since[RT_MODEL_SIZE];	/* of a gap that starts here */
	u32 gap[RT_MODEL_SIZE];		/* its length */
	u32 now;
	u32 entry[RT_MODEL_MOVABLE];	/* unused ones, longest unused first */
	u32 nr_entries;
	u32 cursor;
	u32 frees;
	u64 moves;
	bool moving;
	struct tm_rt_move move;
	u32 gap_moved;			/* granules taken for the block's new place */
	u32 pattern;
	u32 steps;			/* of the last call */
};

/* Copies of a model, to go back to. */
struct rt_snapshot {
	struct rt_model model;
	struct tm_heap_node node[RT_MODEL_SIZE];
	struct tm_rt_movable movable[RT_MODEL_MOVABLE];
};

void rt_model_init(struct rt_model *m, u32 size, u32 max_movable);
/* Everybody leaves: one free block must be left. */
void rt_model_destroy(struct rt_model *m);
void rt_model_compare(struct rt_model *m);
void rt_model_save(const struct rt_model *m, struct rt_snapshot *s);
/* Of the same model, in the same place. */
void rt_model_restore(struct rt_model *m, const struct rt_snapshot *s);

/* The thing of this kind that is the @nth; -1: there are not so many. */
int rt_model_nth(const struct rt_model *m, u32 kind, u32 nth);
u32 rt_model_count(const struct rt_model *m, u32 kind);
/* Items left in the class that serves a size. */
u32 rt_model_left(const struct rt_model *m, u32 c, u32 size);
/* The first of those that wait, or -1. */
int rt_model_first(const struct rt_model *m);
/* The first of those that got an item and have not been named, or -1. */
int rt_model_handed(const struct rt_model *m);
/* Whether the heap has to be able to give a block to the first of those that wait. */
bool rt_model_could_serve(const struct rt_model *m);
/* Whether compaction may help it and it has not been told so. */
bool rt_model_should_tell(const struct rt_model *m);

int rt_do_join(struct rt_model *m, u32 c, u32 priority);
bool rt_do_leave(struct rt_model *m, u32 c);
int rt_do_reserve(struct rt_model *m, u32 c, u32 size, u32 count);
int rt_do_unreserve(struct rt_model *m, u32 c, u32 size);
/* The thing's index in @t. */
int rt_do_alloc(struct rt_model *m, u32 c, u32 size, u32 flags, u32 *t);
int rt_do_free(struct rt_model *m, u32 c, u32 handle);
int rt_do_pin(struct rt_model *m, u32 c, u32 handle);
int rt_do_unpin(struct rt_model *m, u32 c, u32 handle);
void rt_do_wait(struct rt_model *m, u32 w, u32 c, u32 size, u32 flags);
bool rt_do_cancel(struct rt_model *m, u32 w);
/* The waiter's index, or -1. */
int rt_do_serve(struct rt_model *m);
enum tm_rt_step rt_do_move_begin(struct rt_model *m);
void rt_do_move_end(struct rt_model *m);

#endif
