/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A heap whose calls take a constant number of steps: two-level segregated fit (M. Masmano, I. Ripoll,
 * A. Crespo, J. Real: "TLSF: a New Dynamic Memory Allocator for Real-Time Systems", ECRTS 2004), with
 * the books beside the memory and not in it: users write to the memory.
 *
 * Memory is counted in granules; what a granule is, the caller knows. A block is @n granules, at least 2, from
 * a start. For each granule there is a node of two words, and a block uses those of its first and its last:
 *
 *       first                           last
 *     +-----------------+- - - - - - -+------------------+
 *     | FREE_FIRST | n  |             | FREE_LAST | n    |   tag
 *     | next free       |             | previous free    |   link
 *     +-----------------+- - - - - - -+------------------+
 *     | USED_FIRST | n  |             | USED_LAST | note |   tag
 *     | owner's         |             | owner's          |   link
 *     +-----------------+- - - - - - -+------------------+
 *
 * All nodes between are INSIDE, unless the owner of a block has put ITEMs there, which stay behind when the block goes: to clear
 * them would take as many steps as there are. So whether a block begins at a number that somebody claims is known at
 * once, and so are its neighbours; whether an item does, its owner has to know better.
 *
 * Free blocks are in lists by length: 32 for each power of two. An allocation takes the first block of the first list all of
 * whose blocks are long enough; failing that, the first of its own list if that is. So what a list has
 * hidden behind a shorter block may be overlooked: up to 1/32 of a block's length, never of a granule below 64.
 *
 * Context: all functions but init and exit need the lock and never sleep.
 */
#ifndef TM_CORE_HEAP_H
#define TM_CORE_HEAP_H

#include "core/platform.h"

/* What a node is, in the upper bits of its tag. */
enum tm_heap_type {
	TM_HEAP_INSIDE,		/* the whole tag is 0 */
	TM_HEAP_FREE_FIRST,
	TM_HEAP_FREE_LAST,
	TM_HEAP_USED_FIRST,
	TM_HEAP_USED_LAST,
	TM_HEAP_ITEM_FREE,	/* inside a used block: its owner's, or an earlier one's */
	TM_HEAP_ITEM_USED,
};

#define TM_HEAP_TYPE_SHIFT	29
#define TM_HEAP_VALUE_MASK	((1u << TM_HEAP_TYPE_SHIFT) - 1)

/* Granules of the shortest block, and of the largest heap. */
#define TM_HEAP_MIN		2
#define TM_HEAP_MAX		(1u << 26)

#define TM_HEAP_SUB_BITS	5
#define TM_HEAP_SUBS		(1u << TM_HEAP_SUB_BITS)
/* Powers of two from 2^5 on, and one row for all below. */
#define TM_HEAP_ROWS		(26 - TM_HEAP_SUB_BITS + 2)
#define TM_HEAP_LISTS		(TM_HEAP_ROWS * TM_HEAP_SUBS)

/* No block. */
#define TM_HEAP_NONE		(~0u)

struct tm_heap_node {
	u32 tag;
	u32 link;
};

static inline u32 tm_heap_tag(u32 type, u32 value)
{
	return type << TM_HEAP_TYPE_SHIFT | value;
}

/**
 * struct tm_heap - the books of a heap
 * @lock: what the caller holds around every call
 * @node: one for each granule
 * @size: granules
 * @free: granules in free blocks
 * @nr_used: used blocks
 * @nr_free: free blocks
 * @rows: bit r: row r has a free block
 * @subs: bit s of row r: list r * TM_HEAP_SUBS + s has one
 * @head: first free block of each list, or TM_HEAP_NONE
 * @cursor: start of some block, for who walks over the heap a step at a time: it stays a start when blocks merge
 */
struct tm_heap {
	tm_raw_lock_t *lock;
	struct tm_heap_node *node;
	u32 size;
	u32 free;
	u32 nr_used;
	u32 nr_free;
	u32 rows;
	u32 subs[TM_HEAP_ROWS];
	u32 head[TM_HEAP_LISTS];
	u32 cursor;
};

/* Return: 0, -EINVAL for a size that cannot be, -ENOMEM. Context: may sleep; no lock. */
int __must_check tm_heap_init(struct tm_heap *heap, tm_raw_lock_t *lock,
			      u32 size);
void tm_heap_exit(struct tm_heap *heap);

/* A block of @n granules or, where the rest is shorter than a block can be, one more. TM_HEAP_NONE: no room, or @n is out of range. */
u32 tm_heap_alloc(struct tm_heap *heap, u32 n);
/* Merge the used block at @start with its free neighbours. */
void tm_heap_free(struct tm_heap *heap, u32 start);
/* Granules of the used block that begins at @start, whatever number that is; 0 if none does. */
u32 tm_heap_length(const struct tm_heap *heap, u32 start);
/* A length that an allocation would get now; at least 31/32 of the largest. */
u32 tm_heap_largest(const struct tm_heap *heap);

/*
 * Slide: the used block right behind the free block at @hole moves down to it, in two parts, so that
 * the caller may copy in between without the lock. From begin to end both count as used, the hole without a note: nobody
 * else gets at either, and the block must not be freed. There has to be a used block. Returns its start.
 */
u32 tm_heap_slide_begin(struct tm_heap *heap, u32 hole);
/* The block is at @hole now, with its note and links; what is behind it is free and merged. Return: the length of that free block. */
u32 tm_heap_slide_end(struct tm_heap *heap, u32 hole);

/* Everything by tm_warn_on(), in as many steps as there are granules. For tests. */
void tm_heap_check(const struct tm_heap *heap);

#endif
