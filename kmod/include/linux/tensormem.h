/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * tensormem for other kernel modules: page runs and chunks from its pools.
 */
#ifndef _LINUX_TENSORMEM_H
#define _LINUX_TENSORMEM_H

#include <linux/bits.h>
#include <linux/types.h>

struct page;

/* Hand the memory out zeroed. Without it the contents are undefined. */
#define TENSORMEM_ZEROED	BIT(0)

/**
 * struct tensormem_run - 2^@order physically contiguous pages
 * @page: the first of them; each page has a reference count of its own
 * @id: what tensormem knows the run by; not for the caller
 * @order: log2 of the number of pages
 */
struct tensormem_run {
	struct page *page;
	u32 id;
	u8 order;
};

/**
 * tensormem_alloc_run - allocate a run of pages or a whole chunk
 * @run: filled in on success
 * @order: 0 up to the order of a chunk (2 MiB), which comes from the chunk pool
 * @flags: 0 or TENSORMEM_ZEROED
 *
 * Context: process context; may sleep.
 * Return: 0; -EINVAL for an order above a chunk or an unknown flag; -ENOSPC when
 * the chunk pool is at its capacity; -ENOMEM when the system has no memory. The
 * OOM killer is never invoked.
 */
int __must_check tensormem_alloc_run(struct tensormem_run *run,
				     unsigned int order, unsigned int flags);

/**
 * tensormem_free_run - free what tensormem_alloc_run() returned
 * @run: the run
 *
 * The caller has dropped every reference it took on the pages.
 * Context: process context; may sleep.
 */
void tensormem_free_run(const struct tensormem_run *run);

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
 * Return: 0, or what tensormem_alloc_run() returned for the slab that was missing.
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

#endif
