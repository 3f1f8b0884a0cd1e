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

#endif
