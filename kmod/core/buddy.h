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
 * Context: all functions but init and destroy need buddy->lock and never sleep.
 */
#ifndef TM_CORE_BUDDY_H
#define TM_CORE_BUDDY_H

#include "core/geometry.h"

#define TM_BUDDY_ORDERS	(TM_MAX_CHUNK_ORDER + 1)
/* 512 pages: 8 + 4 + 2 words for orders 0 to 2, one for each order above. */
#define TM_BUDDY_WORDS	(8 + 4 + 2 + TM_BUDDY_ORDERS - 3)

/**
 * struct tm_buddy_chunk - the free runs of one chunk
 * @bits: one bit per free run, by order (tm_buddy::word says where)
 * @nr: free runs by order
 * @orders: bit o is set when @nr[o] is not 0; 0 for a chunk that is full
 * @run: order + 1 at the first page of an allocated run, else 0: what tells a
 *       double free, and what a walk over the allocated runs reads
 * @in_pool: the chunk belongs to the buddy pool
 * @next: @prev: list of chunks with the same largest free order
 */
struct tm_buddy_chunk {
	u64 bits[TM_BUDDY_WORDS];
	u16 nr[TM_BUDDY_ORDERS];
	u16 orders;
	u8 run[1u << TM_MAX_CHUNK_ORDER];
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
 * @lists: bit o is set when @head[o] is not empty
 * @head: chunks whose largest free order is o
 * @nr_chunks: chunks in the pool
 * @free_pages: pages in free runs
 * @allocs: @frees: @splits: @merges: what was done so far
 * @lock: the caller's lock, for assertions only
 */
struct tm_buddy {
	struct tm_geometry geometry;
	struct tm_buddy_chunk *chunks;
	u32 nr_slots;
	u32 word[TM_BUDDY_ORDERS];
	u32 lists;
	u32 head[TM_BUDDY_ORDERS];
	u32 nr_chunks;
	u32 free_pages;
	u64 allocs;
	u64 frees;
	u64 splits;
	u64 merges;
	tm_lock_t *lock;
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
 * Constant time: a bounded walk over the orders.
 *
 * Return: 0, -EINVAL for an order above tm_buddy_max_order(), -ENOMEM when no
 * chunk of the pool has such a run (add a chunk and try again).
 */
int __must_check tm_buddy_alloc(struct tm_buddy *buddy, unsigned int order,
				struct tm_page_id *page);

/**
 * tm_buddy_free - free a run that tm_buddy_alloc() returned
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
