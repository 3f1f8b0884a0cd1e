/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * tensormem for other kernel modules: page runs and chunks from its pools.
 */
#ifndef _LINUX_TENSORMEM_H
#define _LINUX_TENSORMEM_H

#include <linux/bits.h>
#include <linux/ktime.h>
#include <linux/types.h>
#include <uapi/linux/tensormem.h>

struct page;

/* Hand the memory out zeroed. Without it the contents are undefined. */
#define TENSORMEM_ZEROED	BIT(0)
/* What the pools grow by for this call is on current's memory cgroup. */
#define TENSORMEM_ACCOUNT	BIT(1)
/* The node named and no other. */
#define TENSORMEM_THISNODE	BIT(2)

/**
 * struct tensormem_run - physically contiguous pages
 * @page: the first of them. Below a chunk each page has a reference count of its
 *        own; a whole chunk is one compound page.
 * @id: what tensormem knows the run by, with the fields that follow; not for the
 *      caller
 * @node: the memory node it is on
 * @order: log2 of the number of pages
 * @kind: enum tensormem_kind it was allocated for
 * @accounted: it was allocated with TENSORMEM_ACCOUNT
 */
struct tensormem_run {
	struct page *page;
	u32 id;
	u8 node;
	u8 order;
	u8 kind;
	bool accounted;
};

/**
 * struct tensormem_stats - what the pools hold
 * @capacity: chunks they may hold
 * @total: chunks they hold
 * @free: chunks nobody has
 * @buddy_pages: pages in runs that somebody has, or that a CPU keeps at hand
 * @bytes: what modules have through tensormem_alloc(), by enum tensormem_kind, on
 *         all nodes
 */
struct tensormem_stats {
	u64 capacity;
	u64 total;
	u64 free;
	u64 buddy_pages;
	u64 bytes[TENSORMEM_KIND_PROTOCOL + 1];
};

/**
 * tensormem_alloc - allocate contiguous pages, up to a whole chunk
 * @run: filled in on success
 * @kind: what they are for; counted by it
 * @size: bytes, from 1 to 2 MiB; rounded up to a power of two of pages
 * @node: the memory node to try first, or NUMA_NO_NODE for the caller's
 * @flags: TENSORMEM_ZEROED, _ACCOUNT, _THISNODE
 *
 * Context: process context; may sleep.
 * Return: 0; -EINVAL for a size, kind, node or flag that there is not; -ENOSPC when
 * the chunk pool is at its capacity; -ENOMEM when the system or the cgroup has no
 * memory. The OOM killer is never invoked.
 */
int __must_check tensormem_alloc(struct tensormem_run *run,
				 enum tensormem_kind kind, size_t size,
				 int node, unsigned int flags);

/**
 * tensormem_free - free what tensormem_alloc() returned
 * @run: the run
 *
 * The caller has dropped every reference it took on the pages.
 * Context: process context; may sleep.
 */
void tensormem_free(const struct tensormem_run *run);

/**
 * tensormem_stats - what the pools hold
 * @node: of one memory node, or NUMA_NO_NODE for all
 * @stats: filled in on success
 *
 * Context: process context. Return: 0, or -EINVAL for a node without a pool.
 */
int __must_check tensormem_stats(int node, struct tensormem_stats *stats);

/*
 * Objects smaller than a page.
 *
 * All calls but create and destroy may run on several CPUs at once. All are for
 * process context, where the caller may sleep, and not for under a spinlock. They
 * never invoke the OOM killer.
 */
struct tensormem_slab;

/**
 * tensormem_slab_create - make a pool of objects of one size
 * @size: bytes of an object, below a page
 * @flags: 0 or TENSORMEM_ZEROED, which holds for every object
 *
 * An object of a cache line or more begins at one; a smaller one lies within one.
 * No page is shared with another pool. The contents of an object are undefined
 * unless TENSORMEM_ZEROED says otherwise.
 *
 * Return: the pool or an ERR_PTR: -EINVAL for a size of 0 or too near to a page
 * (take a run instead) or for an unknown flag; -ENOMEM.
 */
struct tensormem_slab *tensormem_slab_create(size_t size, unsigned int flags);

/**
 * tensormem_slab_destroy - give all its memory back
 * @slab: the pool, which nobody else uses any more
 *
 * Objects that are still allocated are warned of, and their pages are leaked.
 */
void tensormem_slab_destroy(struct tensormem_slab *slab);

/**
 * tensormem_slab_alloc - allocate an object
 * @slab: the pool
 *
 * Return: the object, or NULL when there is no memory for another slab.
 */
void * __must_check tensormem_slab_alloc(struct tensormem_slab *slab);

/**
 * tensormem_slab_free - free an object
 * @slab: the pool that it is of
 * @object: what tensormem_slab_alloc() or tensormem_slab_alloc_bulk() returned
 *
 * Cannot fail. What is no object of the pool, or was freed before, is not noticed
 * at once: it may be handed out (again) first. When a CPU passes it on to its slab
 * it is warned of and left alone.
 */
void tensormem_slab_free(struct tensormem_slab *slab, void *object);

/**
 * tensormem_slab_alloc_bulk - allocate objects, all of them or none
 * @slab: the pool
 * @objects: filled in on success, undefined on failure; @nr long
 * @nr: how many
 *
 * Return: 0, or what tensormem_alloc() returned for the slab that was missing.
 */
int __must_check tensormem_slab_alloc_bulk(struct tensormem_slab *slab,
					   void **objects, u32 nr);

/**
 * tensormem_slab_free_bulk - free objects, as tensormem_slab_free()
 * @slab: the pool that they are of
 * @objects: the objects
 * @nr: how many
 */
void tensormem_slab_free_bulk(struct tensormem_slab *slab,
			      void *const *objects, u32 nr);

/*
 * The RT pool: memory in bounded time, for interrupt handlers too.
 */
struct tensormem_rt;

/**
 * tensormem_rt_open - make an arena of the RT pool with one client
 * @size: bytes, rounded up to 2 MiB
 * @priority: who is served first when several wait, 0 to 99
 *
 * Context: process context; may sleep.
 * Return: the client, or an ERR_PTR: -EINVAL; -ENOSPC when the pool has no such room; -ENOMEM; -EINTR on a fatal signal.
 */
struct tensormem_rt *tensormem_rt_open(size_t size, unsigned int priority);

/**
 * tensormem_rt_close - free all a client has, and its arena
 * @rt: the client, which nobody uses any more
 *
 * Context: process context; may sleep.
 */
void tensormem_rt_close(struct tensormem_rt *rt);

/**
 * tensormem_rt_reserve - lay blocks aside
 * @rt: for whom
 * @size: bytes of each
 * @count: how many; 0 gives up those of this size
 *
 * As long as fewer than @count blocks are allocated that only this size serves, allocating one cannot fail.
 *
 * Context: any, hard interrupts too.
 * Return: 0; -EINVAL; -ENOSPC; -EEXIST, -EBUSY and -ENOENT as TENSORMEM_IOC_RT_RESERVE.
 */
int __must_check tensormem_rt_reserve(struct tensormem_rt *rt, size_t size,
				      unsigned int count);

/**
 * tensormem_rt_alloc - allocate a block
 * @rt: of whose arena
 * @size: bytes
 * @deadline: CLOCK_MONOTONIC: how long to compact and wait for it; 0: not at all
 *
 * Takes a constant number of steps under a raw spinlock of the arena, and more only when there is no memory and a
 * @deadline. The address is one of vmalloc's: for DMA, take the pages by vmalloc_to_page().
 *
 * Context: any, hard interrupts too, if @deadline is 0; else process context, and it may sleep.
 * Return: the block, aligned to ARCH_DMA_MINALIGN at least, with undefined contents; or an ERR_PTR: -EINVAL for a size of 0 or beyond the
 * arena; -ENOSPC when there is none and no deadline; -ETIMEDOUT; -EINTR.
 */
void * __must_check tensormem_rt_alloc(struct tensormem_rt *rt, size_t size,
				       ktime_t deadline);

/**
 * tensormem_rt_free - free a block
 * @rt: whose it is
 * @block: what tensormem_rt_alloc() returned; anything else is warned of and left alone
 *
 * Context: any, hard interrupts too.
 */
void tensormem_rt_free(struct tensormem_rt *rt, void *block);

#endif
