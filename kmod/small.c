// SPDX-License-Identifier: GPL-2.0-only
/*
 * Small tensors: objects in slabs of their client's own. A slab is a region of the
 * window like a tensor's, only that several tensors share it; it is charged as a
 * whole, and goes when its last object is freed.
 */
#include <linux/atomic.h>
#include <linux/cache.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "bandwidth.h"
#include "client.h"
#include "memory.h"
#include "quarantine.h"
#include "small.h"
#include "supply.h"

/* A slab of one client: where it is, and what of it is taken. */
struct tm_small_slab {
	struct tm_region region;
	struct tm_slab slab;
};

/**
 * struct tm_smalls - the slabs of one client
 * @lock: guards the pools; nothing is taken inside it
 * @nr_classes: how many classes there are
 * @pool: by class
 */
struct tm_smalls {
	spinlock_t lock;
	u32 nr_classes;
	struct tm_slab_pool pool[];
};

static atomic64_t tm_small_nr_pages = ATOMIC64_INIT(0);
static atomic64_t tm_small_nr_bytes = ATOMIC64_INIT(0);

/* Pages in all clients' slabs. */
u64 tm_small_slab_pages(void)
{
	return atomic64_read(&tm_small_nr_pages);
}

/* Bytes of all small tensors, in whole objects. */
u64 tm_small_object_bytes(void)
{
	return atomic64_read(&tm_small_nr_bytes);
}

/* The largest object. Context: any. */
u32 tm_small_max(void)
{
	u32 line = cache_line_size();

	return tm_slab_class_size(tm_slab_classes(tm_pages_geometry(), line) - 1,
				  line);
}

static struct tm_small_slab *tm_small_slab(const struct tm_slab_object *object)
{
	return container_of(object->slab, struct tm_small_slab, slab);
}

/* Bytes the object takes. Context: any; the caller owns the object. */
u32 tm_small_size(const struct tm_slab_object *object)
{
	return object->slab->pool->layout.size;
}

/* Bytes from the start of its slab. */
static u32 tm_small_begin(const struct tm_slab_object *object)
{
	return object->index * tm_small_size(object);
}

/* Where in the window it is, in bytes. Context: any; the caller owns the object. */
u64 tm_small_offset(const struct tm_slab_object *object)
{
	return (tm_small_slab(object)->region.range.start << PAGE_SHIFT) +
	       tm_small_begin(object);
}

static void tm_small_zero(struct tm_client *client,
			  const struct tm_slab_object *object)
{
	struct address_space *mapping = client->inode->i_mapping;
	const struct tm_memory *memory = tm_small_slab(object)->region.memory;
	u32 at = tm_small_begin(object), left = tm_small_size(object);

	tm_bandwidth_move(client, TM_MOVER_SLAB, left);
	/* Compaction may be about to move the slab. */
	filemap_invalidate_lock_shared(mapping);
	while (left) {
		const struct tm_extent *extent =
			tm_memory_find(memory, at >> PAGE_SHIFT);
		struct page *page = tm_pages_page(&extent->run) +
				    ((at >> PAGE_SHIFT) - extent->first);
		u32 n = min_t(u32, left, PAGE_SIZE - offset_in_page(at));

		memzero_page(page, offset_in_page(at), n);
		at += n;
		left -= n;
	}
	filemap_invalidate_unlock_shared(mapping);
}

/* The client's slabs, made when it first needs them. */
static struct tm_smalls *tm_smalls_get(struct tm_client *client)
{
	struct tm_geometry g = tm_pages_geometry();
	struct tm_smalls *smalls, *other;
	u32 line = cache_line_size();
	u32 n = tm_slab_classes(g, line);

	/* Pairs with the cmpxchg below: the pools are ready when they are seen. */
	smalls = smp_load_acquire(&client->smalls);
	if (smalls)
		return smalls;
	smalls = kvzalloc(struct_size(smalls, pool, n), TM_GFP);
	if (!smalls)
		return ERR_PTR(-ENOMEM);
	smalls->nr_classes = n;
	spin_lock_init(&smalls->lock);
	for (u32 i = 0; i < n; i++)
		WARN_ON(tm_slab_pool_init(&smalls->pool[i],
					  tm_slab_layout(g, tm_slab_class_size(i, line)),
					  &smalls->lock));
	other = cmpxchg_release(&client->smalls, NULL, smalls);
	if (!other)
		return smalls;
	kvfree(smalls);
	return other;
}

/* Give the pool one more slab. */
static int tm_small_grow(struct tm_client *client, struct tm_smalls *smalls,
			 struct tm_slab_pool *pool)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_memory_request request = {
		.nr_pages = 1u << pool->layout.order,
		.policy = TM_MEMORY_RUNS,
		.numa = tm_client_numa(client),
	};
	struct tm_small_slab *slab;
	struct tm_region *region;
	int err;

	slab = kzalloc(offsetof(struct tm_small_slab, slab) +
		       tm_slab_bytes(pool), TM_GFP);
	if (!slab)
		return -ENOMEM;
	region = &slab->region;
	region->memory = tm_supply(client, &request);
	if (IS_ERR(region->memory)) {
		err = PTR_ERR(region->memory);
		goto err_free;
	}
	filemap_invalidate_lock(mapping);
	err = tm_window_insert(&client->window, &region->range,
			       request.nr_pages, request.nr_pages, false);
	filemap_invalidate_unlock(mapping);
	if (err)
		goto err_memory;
	atomic64_add(request.nr_pages, &tm_small_nr_pages);
	spin_lock(&smalls->lock);
	tm_slab_add(pool, &slab->slab);
	spin_unlock(&smalls->lock);
	return 0;

err_memory:
	tm_client_uncharge(client, (u64)request.nr_pages << PAGE_SHIFT);
	tm_memory_discard(region->memory);
err_free:
	kfree(slab);
	return err;
}

/* Free a slab that is in no pool any more. */
static void tm_small_release(struct tm_client *client,
			     struct tm_small_slab *slab)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_range *range = &slab->region.range;

	filemap_invalidate_lock(mapping);
	tm_client_unmap(client, range);
	filemap_invalidate_unlock(mapping);
	atomic64_sub(range->length, &tm_small_nr_pages);
	tm_quarantine_free(client, &slab->region);
	kfree(slab);
}

/**
 * tm_small_alloc - allocate an object out of a client's slabs
 * @client: whose
 * @size: bytes, at most tm_small_max()
 * @zero: zero it; else it has what this client left in it, or zeros
 * @object: filled in on success; it has its place in the window
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: 0, or as tm_supply(), or -ENOBUFS when the window has no gap.
 */
int tm_small_alloc(struct tm_client *client, u32 size, bool zero,
		   struct tm_slab_object *object)
{
	struct tm_smalls *smalls = tm_smalls_get(client);
	struct tm_slab_pool *pool;
	int err;

	if (IS_ERR(smalls))
		return PTR_ERR(smalls);
	pool = &smalls->pool[tm_slab_class(size, cache_line_size())];
	for (;;) {
		spin_lock(&smalls->lock);
		err = tm_slab_alloc(pool, object, 1);
		spin_unlock(&smalls->lock);
		if (!err)
			break;
		/* Somebody may take what we add: then we add once more. */
		err = tm_small_grow(client, smalls, pool);
		if (err)
			return err;
	}
	atomic64_add(pool->layout.size, &tm_small_nr_bytes);
	if (zero)
		tm_small_zero(client, object);
	return 0;
}

/**
 * tm_small_free - free an object
 * @client: whose
 * @object: what tm_small_alloc() gave
 *
 * Context: may sleep; takes the client's invalidate_lock.
 */
void tm_small_free(struct tm_client *client,
		   const struct tm_slab_object *object)
{
	struct tm_smalls *smalls = client->smalls;
	struct tm_slab_pool *pool =
		&smalls->pool[tm_slab_class(tm_small_size(object),
					    cache_line_size())];
	struct tm_slab *empty;

	atomic64_sub(pool->layout.size, &tm_small_nr_bytes);
	spin_lock(&smalls->lock);
	WARN_ON_ONCE(tm_slab_free(pool, object, 1));
	empty = tm_slab_take_empty(pool);
	spin_unlock(&smalls->lock);
	if (empty)
		tm_small_release(client, container_of(empty, struct tm_small_slab,
						      slab));
}

/* The client's last small tensor is gone. Context: may sleep. */
void tm_small_destroy(struct tm_client *client)
{
	struct tm_smalls *smalls = client->smalls;

	if (!smalls)
		return;
	for (u32 i = 0; i < smalls->nr_classes; i++)
		tm_slab_pool_destroy(&smalls->pool[i]);
	kvfree(smalls);
}
