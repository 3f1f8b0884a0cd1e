/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_SAMPLE_FRAMES_H
#define TM_SAMPLE_FRAMES_H

#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/tensormem.h>

/**
 * struct frame - one buffer of a driver, with what the driver knows of it
 * @list: free frames of its pool
 * @run: its memory
 * @length: bytes in use
 */
struct frame {
	struct list_head list;
	struct tensormem_run run;
	u32 length;
};

/**
 * struct frame_pool - frames made beforehand: getting one never allocates
 * @headers: where struct frame comes from
 * @lock: guards what follows
 * @free: frames nobody has
 * @nr_free: how many
 * @nr: frames of the pool
 */
struct frame_pool {
	struct tensormem_slab *headers;
	spinlock_t lock;
	struct list_head free;
	u32 nr_free;
	u32 nr;
};

int __must_check frame_pool_init(struct frame_pool *pool, u32 nr, size_t size,
				 int node);
void frame_pool_destroy(struct frame_pool *pool);
struct frame *frame_get(struct frame_pool *pool);
void frame_put(struct frame_pool *pool, struct frame *frame);

#endif
