/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_PAGES_H
#define TM_PAGES_H

#include "core/buddy.h"
#include "core/chunk.h"

struct page;

/**
 * struct tm_pages_stats - a consistent copy of both levels' counters
 *
 * The pools are copied without their tables: only counters may be read.
 */
struct tm_pages_stats {
	struct tm_chunk_pool chunk;
	struct tm_buddy buddy;
};

int __must_check tm_pages_init(void);
void tm_pages_exit(void);

struct tm_geometry tm_pages_geometry(void);
struct page *tm_pages_page(struct tm_page_id id);
void tm_pages_stats(struct tm_pages_stats *stats);

int __must_check tm_pages_take_chunk(bool want_zeroed, struct tm_chunk_id *id,
				     bool *zeroed);
void tm_pages_put_chunk(struct tm_chunk_id id, bool zeroed);

int __must_check tm_pages_alloc_run(unsigned int order, bool may_grow,
				    struct tm_page_id *page);
void tm_pages_free_run(struct tm_page_id page, unsigned int order);

void tm_pages_zero(struct tm_page_id page, unsigned int order);

bool tm_pages_could_hold(u64 nr_pages);
int __must_check tm_pages_set_capacity(u32 chunks);
int __must_check tm_pages_set_reserve(u32 chunks);

#endif
