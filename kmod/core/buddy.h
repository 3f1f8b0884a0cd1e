/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Level 2: the buddy pool, runs of 2^order pages inside chunks.
 *
 * A run is naturally aligned in its chunk. Free runs are bits: one bitmap per
 * order and chunk, 168 bytes for 512 pages, so nothing is ever written into the
 * memory itself and a free or a split touches few cache lines. Chunks are
 * listed by their largest free order; an allocation takes the chunk whose largest
 * run is the smallest that fits, which leaves the emptier chunks to fall empty
 * and go back to level 1.
 *
 * Chunks with runs that cannot move have lists of their own, and such runs go
 * there first: one of them is enough to keep a chunk from ever being emptied.
 * Grouping pages by mobility is Linux's (mm/page_alloc.c). Either kind goes to the
 * other's chunks rather than fail; and there one that may not move takes of the
 * largest free run, as in Linux, so that those after it find room beside it.
 *
 * Draining empties a chunk that stays in use: nothing is given out of it while
 * the caller moves its runs elsewhere. It never fails an allocation: one that
 * finds nothing else ends the drain of a chunk that has what it needs.
 *
 *	tm_buddy_drain_begin(buddy, id, &drain)
 *	while (!tm_buddy_drain_next(buddy, &drain, &from, &order))
 *		if (tm_buddy_drain_alloc(buddy, &drain, order, &to))
 *			break;
 *		...drop the lock, move the contents, take the lock...
 *		moved:  tm_buddy_drain_moved(buddy, from, to, order, &empty)
 *		        and, when empty, tm_buddy_remove_chunk() as ever
 *		failed: tm_buddy_free(buddy, to, order, &empty)
 *		        tm_buddy_drain_cancel(buddy, &drain)
 *
 * Between any two of these calls the lock may be dropped and anything may happen
 * to the pool. A drain that is over, for whatever reason, is noticed by its number.
 *
 * Context: all functions but init and destroy need buddy->lock and never sleep.
 */
#ifndef TM_CORE_BUDDY_H
#define TM_CORE_BUDDY_H

#include "core/geometry.h"

#define TM_BUDDY_ORDERS	(TM_MAX_CHUNK_ORDER + 1)
/* 512 pages: 8 + 4 + 2 words for orders 0 to 2, one for each order above. */
#define TM_BUDDY_WORDS	(8 + 4 + 2 + TM_BUDDY_ORDERS - 3)

/* What a chunk's free runs are good for; each class has lists of its own. */
enum tm_buddy_class {
	TM_BUDDY_MOVABLE,	/* every run in it may move, or it is all free */
	TM_BUDDY_UNMOVABLE,	/* some run in it may not */
	TM_BUDDY_DRAINING,	/* its runs are on their way out */
	TM_BUDDY_CLASSES,
};

#define TM_BUDDY_LISTS	(TM_BUDDY_CLASSES * TM_BUDDY_ORDERS)

/* tm_buddy_chunk::run: order + 1, and what else there is to know of a run. */
#define TM_BUDDY_RUN_ORDER	0x3f
#define TM_BUDDY_RUN_ARRIVING	0x40	/* a move to it is under way */
#define TM_BUDDY_RUN_UNMOVABLE	0x80

/**
 * struct tm_buddy_chunk - the free runs of one chunk
 * @bits: one bit per free run, by order (tm_buddy::word says where)
 * @nr: free runs by order
 * @used: allocated runs by order
 * @orders: bit o is set when @nr[o] is not 0; 0 for a chunk that is full
 * @unmovable: allocated runs that may not move
 * @arriving: allocated runs that something is being moved to
 * @drain: number of the drain that empties the chunk, 0 for none
 * @rest: first compaction pass that may drain the chunk
 * @run: TM_BUDDY_RUN_ at the first page of an allocated run, else 0: what tells a
 *       double free, and what a walk over the allocated runs reads
 * @class: an enum tm_buddy_class
 * @in_pool: the chunk belongs to the buddy pool
 * @next: @prev: list of chunks with the same class and largest free order
 */
struct tm_buddy_chunk {
	u64 bits[TM_BUDDY_WORDS];
	u64 drain;
	u64 rest;
	u16 nr[TM_BUDDY_ORDERS];
	u16 used[TM_BUDDY_ORDERS];
	u16 orders;
	u16 unmovable;
	u16 arriving;
	u8 run[1u << TM_MAX_CHUNK_ORDER];
	u8 class;
	bool in_pool;
	u32 next;
	u32 prev;
};

/**
 * struct tm_buddy - level 2 for runs of pages
 * @geometry: pages and chunks
 * @chunks: by chunk id
 * @nr_slots: length of @chunks
 * @word: first word of an order in tm_buddy_chunk::bits
 * @lists: bit l is set when @head[l] is not empty
 * @head: chunks of a class whose largest free order is o, at
 *        class * TM_BUDDY_ORDERS + o
 * @free_runs: free runs by the class of their chunk and by order
 * @nr_chunks: chunks in the pool
 * @free_pages: pages in free runs
 * @allocs: @frees: @splits: @merges: what was done so far
 * @pass: compaction passes begun
 * @drains: drains begun; each ends as one of the next four
 * @emptied: the chunk fell empty and left the pool
 * @halved: a drain by half is done
 * @given_up: the caller cancelled
 * @starved: memory ran short: no room to move a run to, or an allocation that
 *           found nothing else took the chunk back
 * @moved_runs: @moved_pages: what drains moved
 * @lock: the caller's lock, for assertions only
 */
struct tm_buddy {
	struct tm_geometry geometry;
	struct tm_buddy_chunk *chunks;
	u32 nr_slots;
	u32 word[TM_BUDDY_ORDERS];
	u32 lists;
	u32 head[TM_BUDDY_LISTS];
	u32 free_runs[TM_BUDDY_CLASSES][TM_BUDDY_ORDERS];
	u32 nr_chunks;
	u32 free_pages;
	u64 allocs;
	u64 frees;
	u64 splits;
	u64 merges;
	u64 pass;
	u64 drains;
	u64 emptied;
	u64 halved;
	u64 given_up;
	u64 starved;
	u64 moved_runs;
	u64 moved_pages;
	tm_lock_t *lock;
};

/**
 * struct tm_buddy_drain - one drain, as its caller holds it
 * @id: the chunk
 * @nr: its number, what tells whether it is still in force
 * @order: @index: where tm_buddy_drain_next() goes on
 * @half: runs that are half the chunk stay
 */
struct tm_buddy_drain {
	struct tm_chunk_id id;
	u64 nr;
	u32 order;
	u32 index;
	bool half;
};

/* Context: may sleep; no lock. Return: 0 or -ENOMEM. */
int __must_check tm_buddy_init(struct tm_buddy *buddy, struct tm_geometry g,
			       u32 nr_slots, tm_lock_t *lock);
/* Every chunk must have been removed. Context: may sleep; no lock. */
void tm_buddy_destroy(struct tm_buddy *buddy);

/* The highest order a run may have: half a chunk. */
static inline unsigned int tm_buddy_max_order(const struct tm_buddy *buddy)
{
	return buddy->geometry.chunk_order - 1;
}

/* Give the pool a chunk of the table, all of it free. */
void tm_buddy_add_chunk(struct tm_buddy *buddy, struct tm_chunk_id id);

/**
 * tm_buddy_alloc - allocate a run of 2^@order pages
 * @buddy: the pool
 * @order: log2 of the pages
 * @page: the first page of the run
 *
 * Constant time: a bounded walk over the orders. The run may be moved later by
 * whoever drains its chunk.
 *
 * Return: 0, -EINVAL for an order above tm_buddy_max_order(), -ENOMEM when no
 * chunk of the pool has such a run (add a chunk and try again).
 */
int __must_check tm_buddy_alloc(struct tm_buddy *buddy, unsigned int order,
				struct tm_page_id *page);

/* The same for a run that stays where it is, because it is pinned for instance. */
int __must_check tm_buddy_alloc_unmovable(struct tm_buddy *buddy,
					  unsigned int order,
					  struct tm_page_id *page);

/**
 * tm_buddy_free - free an allocated run
 * @buddy: the pool
 * @page: the first page of the run
 * @order: what it was allocated with
 * @empty: set when the whole chunk is free now; take it out with
 *         tm_buddy_remove_chunk() to give it back to level 1
 *
 * Return: 0, or -EINVAL when there is no such allocated run (nothing changed).
 */
int __must_check tm_buddy_free(struct tm_buddy *buddy, struct tm_page_id page,
			       unsigned int order, bool *empty);

/*
 * Take a chunk out. Return: 0, -EINVAL for one beyond the table, -EBUSY when it
 * is not in the pool or a run of it is allocated.
 */
int __must_check tm_buddy_remove_chunk(struct tm_buddy *buddy,
				       struct tm_chunk_id id);

/**
 * tm_buddy_drain_begin - give nothing out of a chunk any more
 * @buddy: the pool
 * @id: a chunk with allocated runs, all of them movable
 * @drain: what the other calls want
 *
 * Return: 0, -EINVAL for a chunk that is not in the pool or is all free, -EBUSY
 * for one that has a run which may not move, that is draining, or that another
 * drain is moving a run to.
 */
int __must_check tm_buddy_drain_begin(struct tm_buddy *buddy,
				      struct tm_chunk_id id,
				      struct tm_buddy_drain *drain);

/*
 * Leave runs of half a chunk where they are; for a drain that has just begun.
 * tm_buddy_drain_next() ends it after the last of the others, and the chunk is in
 * service again.
 */
void tm_buddy_drain_half(const struct tm_buddy *buddy,
			 struct tm_buddy_drain *drain);

/**
 * tm_buddy_drain_next - the next run to move out
 * @buddy: the pool
 * @drain: the drain
 * @page: the first page of the run
 * @order: log2 of its pages
 *
 * Largest first: then runs that fit when the drain began all find room, unless
 * somebody else takes it. Each run is named once. At most two steps per page of a
 * chunk. The owner may free the run as soon as the lock is dropped; then its place
 * stays free while the drain is in force.
 *
 * Return: 0, -ENOENT when every run was named or the drain is over.
 */
int __must_check tm_buddy_drain_next(struct tm_buddy *buddy,
				     struct tm_buddy_drain *drain,
				     struct tm_page_id *page,
				     unsigned int *order);

/**
 * tm_buddy_drain_alloc - a run to move to
 * @buddy: the pool
 * @drain: the drain
 * @order: log2 of the pages, from tm_buddy_drain_next()
 * @page: the first page of the run
 *
 * It lies in a chunk that is in use and does not drain: to fill an empty one would
 * gain nothing, and to end another drain neither. Until tm_buddy_drain_moved() or
 * tm_buddy_free() its chunk is not drained: a run without an owner cannot move.
 *
 * Return: 0, -EINVAL for an order above tm_buddy_max_order(), -ENOENT when the
 * drain is over, -ENOMEM when there is no such run; that ends the drain.
 */
int __must_check tm_buddy_drain_alloc(struct tm_buddy *buddy,
				      const struct tm_buddy_drain *drain,
				      unsigned int order,
				      struct tm_page_id *page);

/**
 * tm_buddy_drain_moved - a run was moved: free its old place
 * @buddy: the pool
 * @from: its old place
 * @to: its new place, from tm_buddy_drain_alloc()
 * @order: log2 of the pages
 * @empty: as in tm_buddy_free()
 *
 * The drain may be over by now; what was moved was moved.
 *
 * Return: 0, or -EINVAL when one of the two is no such run (nothing changed).
 */
int __must_check tm_buddy_drain_moved(struct tm_buddy *buddy,
				      struct tm_page_id from,
				      struct tm_page_id to, unsigned int order,
				      bool *empty);

/*
 * Put the chunk back into service, and let it rest for some passes: what would not
 * move now will hardly move at once. Nothing happens when the drain is over.
 */
void tm_buddy_drain_cancel(struct tm_buddy *buddy,
			   const struct tm_buddy_drain *drain);

/* Whether the @i-th run of @order in @c is free. */
static inline bool tm_buddy_test(const struct tm_buddy *buddy,
				 const struct tm_buddy_chunk *c,
				 unsigned int order, u32 i)
{
	return c->bits[buddy->word[order] + i / 64] >> (i % 64) & 1;
}

static inline u32 tm_buddy_used_pages(const struct tm_buddy *buddy)
{
	return (buddy->nr_chunks << buddy->geometry.chunk_order) -
	       buddy->free_pages;
}

#endif
