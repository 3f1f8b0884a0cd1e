/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_DMA_POOL_H
#define TM_DMA_POOL_H

#include <linux/types.h>

#include "pages.h"

struct device_attribute;
struct page;

/**
 * struct tm_dma_grant - chunks side by side out of the DMA pool
 * @page: the first of their pages, counted from the beginning of the region
 * @nr_chunks: how many
 * @address: what the kernel wants back with them
 */
struct tm_dma_grant {
	struct tm_page_id page;
	u32 nr_chunks;
	dma_addr_t address;
};

extern struct device_attribute tm_dma_pool_total;
extern struct device_attribute tm_dma_pool_used;
extern struct device_attribute tm_dma_pool_free;
extern struct device_attribute tm_dma_pool_node;

int __must_check tm_dma_pool_init(void);
void tm_dma_pool_exit(void);

struct tm_dma_grant *tm_dma_pool_take(u32 nr_chunks);
void tm_dma_pool_put(struct tm_dma_grant *grant);
struct tm_run tm_dma_pool_run(const struct tm_dma_grant *grant, u32 chunk);
struct page *tm_dma_pool_page(struct tm_page_id page);

#endif
