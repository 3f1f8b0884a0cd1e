/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Pages and chunks as numbers.
 *
 * A chunk is 2 MiB whatever the page size, so the number of pages in it, and with
 * it the highest run order, follows from the page size the kernel runs with.
 * Ids are structs so that a chunk id cannot be passed where a page id is meant.
 */
#ifndef TM_CORE_GEOMETRY_H
#define TM_CORE_GEOMETRY_H

#include "core/platform.h"

#define TM_CHUNK_SHIFT		21
#define TM_CHUNK_SIZE		(1u << TM_CHUNK_SHIFT)

/* The smallest page (4 KiB) bounds every per-chunk table. */
#define TM_MIN_PAGE_SHIFT	12
#define TM_MAX_CHUNK_ORDER	(TM_CHUNK_SHIFT - TM_MIN_PAGE_SHIFT)

#define TM_NONE			((u32)~0u)

/* A chunk: an index into the chunk table. */
struct tm_chunk_id {
	u32 v;
};

/* A page of a chunk: chunk index << chunk_order | page within the chunk. */
struct tm_page_id {
	u32 v;
};

/**
 * struct tm_geometry - how chunks divide into pages
 * @page_shift: log2 of the page size
 * @chunk_order: log2 of the pages in a chunk
 */
struct tm_geometry {
	u8 page_shift;
	u8 chunk_order;
};

static inline struct tm_geometry tm_geometry(unsigned int page_shift)
{
	return (struct tm_geometry){
		.page_shift = page_shift,
		.chunk_order = TM_CHUNK_SHIFT - page_shift,
	};
}

static inline u32 tm_chunk_pages(struct tm_geometry g)
{
	return 1u << g.chunk_order;
}

static inline struct tm_chunk_id tm_page_chunk(struct tm_geometry g,
					       struct tm_page_id p)
{
	return (struct tm_chunk_id){ p.v >> g.chunk_order };
}

static inline u32 tm_page_index(struct tm_geometry g, struct tm_page_id p)
{
	return p.v & (tm_chunk_pages(g) - 1);
}

static inline struct tm_page_id tm_page_id(struct tm_geometry g,
					   struct tm_chunk_id c, u32 index)
{
	return (struct tm_page_id){ (c.v << g.chunk_order) | index };
}

#endif
