// SPDX-License-Identifier: GPL-2.0-only
/*
 * A sample of the in-kernel API: what a network or camera driver would do with it.
 * Buffers are runs of pages on the device's node, their headers are slab objects.
 */
#include <linux/err.h>
#include <linux/module.h>
#include <linux/numa.h>

#include "frames.h"

static unsigned int frames = 16;
module_param(frames, uint, 0444);
MODULE_PARM_DESC(frames, "frames of the pool that loading makes");

static unsigned int size = 16384;
module_param(size, uint, 0444);
MODULE_PARM_DESC(size, "bytes of a frame");

static struct frame_pool sample_pool;

static int frame_pool_add(struct frame_pool *pool, size_t bytes, int node)
{
	struct frame *frame = tensormem_slab_alloc(pool->headers);
	int err;

	if (!frame)
		return -ENOMEM;
	frame->length = 0;
	err = tensormem_alloc(&frame->run, TENSORMEM_KIND_PROTOCOL, bytes, node,
			      TENSORMEM_ZEROED);
	if (err) {
		tensormem_slab_free(pool->headers, frame);
		return err;
	}
	frame_put(pool, frame);
	pool->nr++;
	return 0;
}

/**
 * frame_pool_init - make a pool of @nr frames of @bytes bytes
 * @pool: the pool
 * @nr: frames
 * @bytes: bytes of each, up to 2 MiB
 * @node: the memory node the device is near to, or NUMA_NO_NODE
 *
 * Context: may sleep. Return: 0, or as tensormem_alloc() and
 * tensormem_slab_create().
 */
int frame_pool_init(struct frame_pool *pool, u32 nr, size_t bytes, int node)
{
	int err = 0;

	*pool = (struct frame_pool){ 0 };
	spin_lock_init(&pool->lock);
	INIT_LIST_HEAD(&pool->free);
	pool->headers = tensormem_slab_create(sizeof(struct frame), 0);
	if (IS_ERR(pool->headers))
		return PTR_ERR(pool->headers);
	while (pool->nr < nr && !err)
		err = frame_pool_add(pool, bytes, node);
	if (err)
		frame_pool_destroy(pool);
	return err;
}

/* Every frame has been put. Context: may sleep. */
void frame_pool_destroy(struct frame_pool *pool)
{
	struct frame *frame, *next;

	WARN_ON(pool->nr_free != pool->nr);
	list_for_each_entry_safe(frame, next, &pool->free, list) {
		tensormem_free(&frame->run);
		tensormem_slab_free(pool->headers, frame);
	}
	tensormem_slab_destroy(pool->headers);
}

/* Context: any but hard interrupt. Return: a frame, or NULL when all are out. */
struct frame *frame_get(struct frame_pool *pool)
{
	struct frame *frame;

	spin_lock_bh(&pool->lock);
	frame = list_first_entry_or_null(&pool->free, struct frame, list);
	if (frame) {
		list_del(&frame->list);
		pool->nr_free--;
	}
	spin_unlock_bh(&pool->lock);
	return frame;
}

/* Context: any but hard interrupt. */
void frame_put(struct frame_pool *pool, struct frame *frame)
{
	spin_lock_bh(&pool->lock);
	list_add(&frame->list, &pool->free);
	pool->nr_free++;
	spin_unlock_bh(&pool->lock);
}

static int __init frames_init(void)
{
	return frame_pool_init(&sample_pool, frames, size, NUMA_NO_NODE);
}

static void __exit frames_exit(void)
{
	frame_pool_destroy(&sample_pool);
}

module_init(frames_init);
module_exit(frames_exit);

MODULE_DESCRIPTION("A sample of tensormem's in-kernel API");
MODULE_LICENSE("GPL");
