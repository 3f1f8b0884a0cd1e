/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MEMORY_H
#define TM_MEMORY_H

#include <linux/atomic.h>
#include <linux/list.h>
#include <linux/types.h>

#include "numa.h"
#include "pages.h"
#include "window.h"

struct tm_client;
struct tm_dma_grant;

/* Physically contiguous pages of a memory: a run, or a whole chunk. */
struct tm_extent {
	u32 first;		/* index of its first page within the memory */
	struct tm_run run;
};

/* Enough for a power of two, or for a few chunks with a small tail. */
#define TM_EXTENTS_INLINE	4

/**
 * struct tm_memory - the pages behind one object, in order
 * @extent: sorted by @first, @nr_extents long
 * @nr_extents: extents in use
 * @max_extents: room in @extent
 * @nr_chunks: how many extents are whole chunks; they come first
 * @nr_pages: pages in all extents
 * @grant: of the DMA pool: what all extents together are; else NULL
 * @held: in quarantine: the list of memories that somebody still holds
 * @debtor: in quarantine: who is charged for it
 * @first: @length: in quarantine for a fork: the pages of the window it was mapped at
 * @forks: the same: the client's count when the wait began
 * @gone: in quarantine: what is called, with @owner, when all of it has been given back; or NULL
 * @owner: for @gone
 * @small: what @extent points to while it suffices
 */
struct tm_memory {
	struct tm_extent *extent;
	u32 nr_extents;
	u32 max_extents;
	u32 nr_chunks;
	u32 nr_pages;
	struct tm_dma_grant *grant;
	struct list_head held;
	struct tm_client *debtor;
	u64 first;
	u64 length;
	int forks;
	void (*gone)(void *owner);
	void *owner;
	struct tm_extent small[TM_EXTENTS_INLINE];
};

/**
 * struct tm_region - a memory with a place in a client's window
 * @range: the place
 * @memory: the pages
 * @huge: whole chunks are mapped as blocks where the kernel can
 */
struct tm_region {
	struct tm_range range;
	struct tm_memory *memory;
	bool huge;
};

/* How a memory may be made up. */
enum tm_memory_policy {
	TM_MEMORY_AUTO,		/* chunks, then runs for what is left */
	TM_MEMORY_CHUNKS,	/* whole chunks only */
	TM_MEMORY_RUNS,		/* runs only */
	TM_MEMORY_DMA,		/* whole chunks side by side, out of the DMA pool */
};

/* Whether it came out of the DMA pool, in one piece. */
static inline bool tm_memory_is_dma(const struct tm_memory *memory)
{
	return memory->nr_extents &&
	       memory->extent[0].run.node == TM_DMA_NODE;
}

/**
 * struct tm_memory_request - what a memory is to be
 * @nr_pages: how many pages
 * @policy: what it may be made of
 * @flags: TM_PAGES_CHARGED, TM_PAGES_UNMOVABLE, TM_PAGES_FOR()
 * @numa: which nodes may serve it
 * @turn: whose turn it is when they are interleaved
 */
struct tm_memory_request {
	u32 nr_pages;
	enum tm_memory_policy policy;
	unsigned int flags;
	struct tm_numa numa;
	atomic_t *turn;
};

struct tm_memory *tm_memory_alloc(const struct tm_memory_request *request);
bool __must_check tm_memory_free(struct tm_memory *memory);
void tm_memory_discard(struct tm_memory *memory);
void tm_memory_abandon(struct tm_memory *memory);

bool tm_memory_held(const struct tm_run *run);
struct tm_memory *tm_memory_hold(const struct tm_memory *memory);
void tm_memory_let_go(struct tm_memory *memory);

const struct tm_extent *tm_memory_find(const struct tm_memory *memory,
				       u32 index);

u64 tm_memory_fallbacks(void);

#endif
