/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MEMORY_H
#define TM_MEMORY_H

#include <linux/list.h>
#include <linux/types.h>

#include "core/geometry.h"

/* Physically contiguous pages of a memory: a run, or a whole chunk. */
struct tm_extent {
	u32 first;		/* index of its first page within the memory */
	struct tm_page_id page;
	u8 order;
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
 * @quarantine: on the list of memory that somebody still holds
 * @small: what @extent points to while it suffices
 */
struct tm_memory {
	struct tm_extent *extent;
	u32 nr_extents;
	u32 max_extents;
	u32 nr_chunks;
	u32 nr_pages;
	struct list_head quarantine;
	struct tm_extent small[TM_EXTENTS_INLINE];
};

/* How a memory may be made up. */
enum tm_memory_policy {
	TM_MEMORY_AUTO,		/* chunks, then runs for what is left */
	TM_MEMORY_CHUNKS,	/* whole chunks only */
	TM_MEMORY_RUNS,		/* runs only */
};

struct tm_memory *tm_memory_alloc(u32 nr_pages, enum tm_memory_policy policy);
void tm_memory_free(struct tm_memory *memory);
void tm_memory_discard(struct tm_memory *memory);

const struct tm_extent *tm_memory_find(const struct tm_memory *memory,
				       u32 index);

u64 tm_memory_fallbacks(void);
u64 tm_memory_quarantined(void);
void tm_memory_exit(void);

#endif
