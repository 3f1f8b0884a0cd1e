/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Objects smaller than a page: size classes, and a pool of slabs for one class.
 *
 * A slab is a run of pages cut into equal objects. The pool keeps a descriptor for
 * each, which the caller allocates (embedded in what else it knows of the slab), so
 * that a pool grows and shrinks a slab at a time and has no table of its own. An
 * object is a slab and an index: a kernel pointer and an offset in a window can
 * both be made of that. Nothing is written into the memory itself.
 *
 * Partly used slabs are listed by the log2 of their free objects and an allocation takes
 * from the lowest list: from a slab with less than twice the free objects of the
 * fullest one, in constant time. The emptier ones fall empty and can go back.
 *
 * A pool belongs to one owner, and so does each page in it.
 *
 * Context: the functions on a pool but init and destroy need pool->lock; none
 * sleeps.
 */
#ifndef TM_CORE_SLAB_H
#define TM_CORE_SLAB_H

#include "core/geometry.h"

#define TM_SLAB_MIN_SIZE	8u
/* A slab has 2^this pages at most. */
#define TM_SLAB_MAX_ORDER	3
/* The largest page (64 KiB) in objects of the smallest class. */
#define TM_SLAB_MAX_OBJECTS	(65536 / TM_SLAB_MIN_SIZE)
#define TM_SLAB_SUMMARY		(TM_SLAB_MAX_OBJECTS / 64 / 64)
/* Partly used slabs by log2 of their free objects, then those all free. */
#define TM_SLAB_EMPTY		13
#define TM_SLAB_LISTS		(TM_SLAB_EMPTY + 1)

/**
 * tm_slab_class - the smallest class that holds an object
 * @size: bytes of the object
 * @cache_line: bytes of a cache line, a power of two of 8 or more
 *
 * Below a cache line the classes are powers of two from 8 up: what tiles a line,
 * so that no object lies in two (a line of 64 holds two objects of 24, as it holds
 * two of 32). From there they are multiples of the line, 8 for each doubling where
 * the line allows: less than 12.5 % of an object above 8 lines is wasted.
 *
 * Context: any; no lock. Return: the number of the class, from 0.
 */
u32 tm_slab_class(u32 size, u32 cache_line);
/* Bytes of an object of class @class. Context: any; no lock. */
u32 tm_slab_class_size(u32 class, u32 cache_line);

/* How many classes are smaller than a page. Context: any; no lock. */
static inline u32 tm_slab_classes(struct tm_geometry g, u32 cache_line)
{
	return tm_slab_class(1u << g.page_shift, cache_line);
}

/**
 * struct tm_slab_layout - how a class lies in its slabs
 * @size: bytes of an object
 * @nr_objects: objects of a slab
 * @order: log2 of a slab's pages
 */
struct tm_slab_layout {
	u32 size;
	u32 nr_objects;
	u8 order;
};

/**
 * tm_slab_layout - choose the slabs for a class
 * @g: pages
 * @size: a class's bytes, below a page
 *
 * The fewest pages whose tail is a 16th or less; where no order up to
 * TM_SLAB_MAX_ORDER gives that, that order, whose tail is the smallest.
 *
 * Context: any; no lock.
 */
struct tm_slab_layout tm_slab_layout(struct tm_geometry g, u32 size);

struct tm_slab_pool;

/**
 * struct tm_slab - one slab; tm_slab_bytes() long
 * @next: @prev: slabs on the same list of the pool
 * @pool: the pool it is in, NULL for none
 * @nr_free: free objects
 * @summary: bit w is set when @free[w] is not 0
 * @free: one bit per object
 */
struct tm_slab {
	struct tm_slab *next;
	struct tm_slab *prev;
	const struct tm_slab_pool *pool;
	u32 nr_free;
	u64 summary[TM_SLAB_SUMMARY];
	u64 free[];
};

/* An object: @index of @slab. Its first byte is @index * layout.size in there. */
struct tm_slab_object {
	struct tm_slab *slab;
	u32 index;
};

/**
 * struct tm_slab_pool - the slabs of one class and one owner
 * @layout: the class
 * @lists: bit l is set when @head[l] is not empty
 * @head: slabs with 2^l to 2^(l+1) - 1 free objects; TM_SLAB_EMPTY: none in use
 * @nr_slabs: slabs in the pool
 * @nr_empty: slabs no object of which is allocated
 * @nr_free: free objects of all slabs
 * @allocs: @frees: objects handed out and taken back so far
 * @lock: the caller's lock, for assertions only
 */
struct tm_slab_pool {
	struct tm_slab_layout layout;
	u32 lists;
	struct tm_slab *head[TM_SLAB_LISTS];
	u32 nr_slabs;
	u32 nr_empty;
	u64 nr_free;
	u64 allocs;
	u64 frees;
	tm_lock_t *lock;
};

/* Context: any; no lock. Return: 0, -EINVAL for a layout no slab can have. */
int __must_check tm_slab_pool_init(struct tm_slab_pool *pool,
				   struct tm_slab_layout layout,
				   tm_lock_t *lock);
/* Every slab must have been taken out. Context: any; no lock. */
void tm_slab_pool_destroy(const struct tm_slab_pool *pool);

/* Bytes of a descriptor of the pool. Context: any; no lock. */
static inline size_t tm_slab_bytes(const struct tm_slab_pool *pool)
{
	return offsetof(struct tm_slab, free) +
	       (pool->layout.nr_objects + 63) / 64 * sizeof(u64);
}

/* Give the pool a slab, all of it free; what @slab held before is overwritten. */
void tm_slab_add(struct tm_slab_pool *pool, struct tm_slab *slab);

/**
 * tm_slab_take_empty - take a slab out of which no object is allocated
 * @pool: the pool, whose nr_empty says how many there are
 *
 * Return: the slab, which belongs to the caller now, or NULL when all are in use.
 */
struct tm_slab * __must_check tm_slab_take_empty(struct tm_slab_pool *pool);

/**
 * tm_slab_alloc - allocate objects
 * @pool: the pool
 * @objects: filled in, @nr long
 * @nr: how many
 *
 * Constant time for each object.
 *
 * Return: 0, or -ENOMEM when the pool has fewer free (nothing changed; add slabs
 * and try again).
 */
int __must_check tm_slab_alloc(struct tm_slab_pool *pool,
			       struct tm_slab_object *objects, u32 nr);

/**
 * tm_slab_free - free objects
 * @pool: the pool
 * @objects: what tm_slab_alloc() returned, from one call or from many
 * @nr: how many
 *
 * Constant time for each object. Slabs that fall empty show in pool->nr_empty and
 * stay until tm_slab_take_empty(). An object's slab must exist; of which pool it
 * is and what of it is allocated is checked.
 *
 * Return: 0, or -EINVAL when one of them is not an allocated object of the pool or
 * comes twice (none was freed).
 */
int __must_check tm_slab_free(struct tm_slab_pool *pool,
			      const struct tm_slab_object *objects, u32 nr);

#endif
