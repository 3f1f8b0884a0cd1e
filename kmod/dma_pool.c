// SPDX-License-Identifier: GPL-2.0-only
/*
 * The DMA pool: chunks side by side out of a region that the device tree sets aside, for
 * devices that want a tensor in one piece.
 *
 * The region is of one of two sorts. With "reusable" the kernel lends it to programs, and moves
 * them out of it when we want some (CMA). Without, nobody has it but us. Both are ordinary
 * memory with a struct page and a count for each page, so all else treats what comes from here
 * as it treats other pages: it is exported, and set aside while somebody holds it. But it is
 * mapped so that nobody can pin it (vm.c).
 *
 * What was taken in one piece goes back in one piece, as the kernel's DMA API has it. Until then
 * it keeps the module; so a region is never let go of before all of it is back.
 *
 * No other lock of ours is taken in tm_dma_binding and tm_dma_mutex, but for what reclaim takes.
 */
#include <linux/align.h>
#include <linux/bitmap.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/err.h>
#include <linux/mm.h>
#include <linux/mod_devicetable.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/of.h>
#include <linux/of_reserved_mem.h>
#include <linux/pfn.h>
#include <linux/platform_device.h>
#include <linux/rwsem.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "bandwidth.h"
#include "dma_pool.h"

/**
 * struct tm_dma_region - the region that the pool has
 * @dev: the device tree's node, as a device
 * @first: its first page frame
 * @nr_chunks: whole chunks in it
 * @used: those that somebody has
 * @taken: which, a bit each; NULL where CMA knows
 * @gone: the device is being taken away: nothing is handed out any more; written under tm_dma_binding as well
 */
struct tm_dma_region {
	struct device *dev;
	unsigned long first;
	u32 nr_chunks;
	u32 used;
	unsigned long *taken;
	bool gone;
};

static DEFINE_MUTEX(tm_dma_mutex);
/* Held for writing to let the device go, for reading by who asks the DMA API for memory. tm_dma_mutex is taken in it. */
static DECLARE_RWSEM(tm_dma_binding);
/* Under tm_dma_mutex; whoever has memory of it may look without. */
static struct tm_dma_region *tm_dma_region;

static size_t tm_dma_bytes(u32 nr_chunks)
{
	return (size_t)nr_chunks << TM_CHUNK_SHIFT;
}

static unsigned long tm_dma_pages(u32 nr_chunks)
{
	return (unsigned long)nr_chunks << tm_pages_geometry().chunk_order;
}

/* Let go of the region once the driver has, and all of it is back. */
static void tm_dma_region_close(void)
{
	struct tm_dma_region *region = tm_dma_region;

	lockdep_assert_held(&tm_dma_mutex);
	if (!region->gone || region->used)
		return;
	tm_dma_region = NULL;
	/* Only CMA was set up for the device. */
	if (!region->taken)
		of_reserved_mem_device_release(region->dev);
	put_device(region->dev);
	bitmap_free(region->taken);
	kfree(region);
}

static int tm_dma_count(struct tm_dma_region *region,
			struct tm_dma_grant *grant)
{
	unsigned long at = 0;

	lockdep_assert_held(&tm_dma_mutex);
	if (!region || region->gone)
		return -ENODEV;
	if (grant->nr_chunks > region->nr_chunks - region->used)
		return -ENOSPC;
	if (region->taken) {
		at = bitmap_find_next_zero_area(region->taken, region->nr_chunks,
						0, grant->nr_chunks, 0);
		if (at >= region->nr_chunks)
			return -ENOSPC;
		bitmap_set(region->taken, at, grant->nr_chunks);
	}
	region->used += grant->nr_chunks;
	grant->page = tm_page_id(tm_pages_geometry(),
				 (struct tm_chunk_id){ at }, 0);
	return 0;
}

/* Count @grant's chunks as taken, of a region with a bitmap also which. Return: 0, -ENODEV or -ENOSPC. */
static int tm_dma_begin(struct tm_dma_grant *grant)
{
	int err;

	mutex_lock(&tm_dma_mutex);
	err = tm_dma_count(tm_dma_region, grant);
	mutex_unlock(&tm_dma_mutex);
	return err;
}

/* The other way round. Nobody has the memory any more. */
static void tm_dma_end(const struct tm_dma_grant *grant)
{
	mutex_lock(&tm_dma_mutex);
	if (tm_dma_region->taken)
		bitmap_clear(tm_dma_region->taken,
			     tm_page_chunk(tm_pages_geometry(), grant->page).v,
			     grant->nr_chunks);
	tm_dma_region->used -= grant->nr_chunks;
	tm_dma_region_close();
	mutex_unlock(&tm_dma_mutex);
}

/**
 * tm_dma_pool_run - one chunk of what was taken
 * @grant: what was taken
 * @chunk: which, from 0 on
 *
 * Context: any. Return: it, zeroed, as a run of a node that is none.
 */
struct tm_run tm_dma_pool_run(const struct tm_dma_grant *grant, u32 chunk)
{
	unsigned int order = tm_pages_geometry().chunk_order;

	return (struct tm_run){
		.page.v = grant->page.v + (chunk << order),
		.node = TM_DMA_NODE,
		.order = order,
		.zeroed = true,
	};
}

static int tm_dma_zero(const struct tm_dma_grant *grant)
{
	for (u32 i = 0; i < grant->nr_chunks; i++) {
		struct tm_run run = tm_dma_pool_run(grant, i);

		if (fatal_signal_pending(current))
			return -EINTR;
		tm_pages_zero(&run);
	}
	return 0;
}

/* Have CMA make room. Zeroed, as the DMA API has it. */
static int tm_dma_from_cma(const struct tm_dma_region *region,
			   struct tm_dma_grant *grant)
{
	size_t size = tm_dma_bytes(grant->nr_chunks);
	unsigned long frame;
	struct page *page = NULL;
	bool gone;

	down_read(&tm_dma_binding);
	gone = region->gone;
	if (!gone)
		page = dma_alloc_pages(region->dev, size, &grant->address,
				       DMA_BIDIRECTIONAL,
				       GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN);
	up_read(&tm_dma_binding);
	if (!page)
		return gone ? -ENODEV :
		       fatal_signal_pending(current) ? -EINTR : -ENOSPC;
	/* Where CMA has none, the DMA API goes on with what is not ours. */
	frame = page_to_pfn(page);
	if (frame < region->first ||
	    frame - region->first >= tm_dma_pages(region->nr_chunks)) {
		dma_free_pages(region->dev, size, page, grant->address,
			       DMA_BIDIRECTIONAL);
		return -ENOSPC;
	}
	grant->page.v = frame - region->first;
	tm_bandwidth_count(TM_MOVER_CHUNK, size);
	return 0;
}

/**
 * tm_dma_pool_take - take chunks that lie side by side
 * @nr_chunks: how many, at least one
 *
 * Context: may sleep; under no lock of ours.
 * Return: them, zeroed, each page with a count of one; or an ERR_PTR: -ENODEV when the device
 * tree has no region, -ENOSPC when that has no such gap, -ENOMEM, -EINTR on a fatal signal.
 */
struct tm_dma_grant *tm_dma_pool_take(u32 nr_chunks)
{
	struct tm_dma_grant *grant = kzalloc(sizeof(*grant), TM_GFP);
	int err;

	if (!grant)
		return ERR_PTR(-ENOMEM);
	grant->nr_chunks = nr_chunks;
	err = tm_dma_begin(grant);
	if (err)
		goto err_free;
	if (tm_dma_region->taken)
		err = tm_dma_zero(grant);
	else
		err = tm_dma_from_cma(tm_dma_region, grant);
	if (err)
		goto err_end;
	__module_get(THIS_MODULE);
	return grant;

err_end:
	tm_dma_end(grant);
err_free:
	kfree(grant);
	return ERR_PTR(err);
}

/**
 * tm_dma_pool_put - give back what tm_dma_pool_take() gave
 * @grant: consumed; nobody holds a page of it
 *
 * Context: may sleep.
 */
void tm_dma_pool_put(struct tm_dma_grant *grant)
{
	if (!tm_dma_region->taken)
		dma_free_pages(tm_dma_region->dev,
			       tm_dma_bytes(grant->nr_chunks),
			       tm_dma_pool_page(grant->page), grant->address,
			       DMA_BIDIRECTIONAL);
	tm_dma_end(grant);
	kfree(grant);
	module_put(THIS_MODULE);
}

/* The struct page of a page of the region. Context: any; the caller has it. */
struct page *tm_dma_pool_page(struct tm_page_id page)
{
	return pfn_to_page(tm_dma_region->first + page.v);
}

/* Whether the region is memory that the kernel maps and leaves alone: what it could not set aside is not. */
static bool tm_dma_idle(const struct tm_dma_region *region)
{
	unsigned long count = tm_dma_pages(region->nr_chunks);

	for (unsigned long i = 0; i < count; i++) {
		struct page *page;

		if (!pfn_is_map_memory(region->first + i))
			return false;
		page = pfn_to_page(region->first + i);
		if (!PageReserved(page) || page_count(page) != 1)
			return false;
		cond_resched();
	}
	return true;
}

static int tm_dma_region_open(struct tm_dma_region *region, bool reusable)
{
	int err;

	if (!region->nr_chunks)
		return dev_err_probe(region->dev, -EINVAL,
				     "memory-region is smaller than a chunk\n");
	if (reusable) {
		err = of_reserved_mem_device_init_by_idx(region->dev,
							 region->dev->of_node,
							 0);
		return err ? dev_err_probe(region->dev, err,
					   "memory-region is not CMA's\n") : 0;
	}
	if (!tm_dma_idle(region))
		return dev_err_probe(region->dev, -EINVAL,
				     "memory-region is not set aside\n");
	region->taken = bitmap_zalloc(region->nr_chunks, GFP_KERNEL);
	return region->taken ? 0 : -ENOMEM;
}

static struct tm_dma_region *
tm_dma_region_create(struct device *dev, const struct reserved_mem *memory,
		     bool reusable)
{
	unsigned int chunk_order = tm_pages_geometry().chunk_order;
	struct tm_dma_region *region = kzalloc(sizeof(*region), GFP_KERNEL);
	/* CMA counts from its beginning, wherever that is. */
	phys_addr_t start = reusable ? memory->base :
				       ALIGN(memory->base, TM_CHUNK_SIZE);
	phys_addr_t before = min(start - memory->base, memory->size);
	int err;

	if (!region)
		return ERR_PTR(-ENOMEM);
	region->dev = get_device(dev);
	region->first = PHYS_PFN(start);
	region->nr_chunks = min_t(u64, (memory->size - before) >> TM_CHUNK_SHIFT,
				  U32_MAX >> chunk_order);
	err = tm_dma_region_open(region, reusable);
	if (err) {
		put_device(dev);
		kfree(region);
		return ERR_PTR(err);
	}
	return region;
}

/* What the node points to. Return: the region, all of it free, or an ERR_PTR. */
static struct tm_dma_region *tm_dma_region_find(struct device *dev)
{
	struct device_node *node = of_parse_phandle(dev->of_node,
						    "memory-region", 0);
	struct reserved_mem *memory = node ? of_reserved_mem_lookup(node) : NULL;
	struct tm_dma_region *region;

	/* What the kernel does not map has no struct pages to speak of. */
	if (!memory || of_property_read_bool(node, "no-map"))
		region = ERR_PTR(dev_err_probe(dev, -EINVAL,
					       "memory-region is not in reserved-memory, or no-map\n"));
	else
		region = tm_dma_region_create(dev, memory,
					      of_property_read_bool(node, "reusable"));
	of_node_put(node);
	return region;
}

/* Nothing is handed out any more; who has memory keeps it. */
static void tm_dma_leave(void *unused)
{
	/* The DMA API looks at what the driver core is about to take from the device. */
	down_write(&tm_dma_binding);
	mutex_lock(&tm_dma_mutex);
	tm_dma_region->gone = true;
	tm_dma_region_close();
	mutex_unlock(&tm_dma_mutex);
	up_write(&tm_dma_binding);
}

static int tm_dma_probe(struct platform_device *pdev)
{
	struct device *dev = &pdev->dev;
	struct tm_dma_region *region;
	int err;

	/* What is mapped for an IOMMU would have to be unmapped before the device is let go. */
	if (device_iommu_mapped(dev))
		return dev_err_probe(dev, -EINVAL,
				     "the node is not behind an IOMMU: no iommus\n");
	/* Whose memory a device is to reach is for the device's driver to say. */
	err = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(64));
	if (err)
		return err;
	mutex_lock(&tm_dma_mutex);
	/* Another node's; or this one's, of which somebody has memory since it was bound before. */
	if (tm_dma_region)
		region = ERR_PTR(dev_err_probe(dev, -EBUSY,
					       "there is a DMA pool\n"));
	else
		region = tm_dma_region_find(dev);
	if (!IS_ERR(region))
		tm_dma_region = region;
	mutex_unlock(&tm_dma_mutex);
	if (IS_ERR(region))
		return PTR_ERR(region);
	dev_info(dev, "DMA pool of %u chunks\n", region->nr_chunks);
	return devm_add_action_or_reset(dev, tm_dma_leave, NULL);
}

static const struct of_device_id tm_dma_match[] = {
	{ .compatible = "tensormem,dma" },
	{ }
};
MODULE_DEVICE_TABLE(of, tm_dma_match);

static struct platform_driver tm_dma_driver = {
	.probe = tm_dma_probe,
	.driver = {
		.name = "tensormem-dma",
		.of_match_table = tm_dma_match,
		/* The pool is there once the module is loaded. */
		.probe_type = PROBE_FORCE_SYNCHRONOUS,
	},
};

int __init tm_dma_pool_init(void)
{
	return platform_driver_register(&tm_dma_driver);
}

/* All of it is back: whatever is not keeps the module. */
void tm_dma_pool_exit(void)
{
	platform_driver_unregister(&tm_dma_driver);
}

static const struct tm_dma_region *tm_dma_offered(void)
{
	lockdep_assert_held(&tm_dma_mutex);
	return tm_dma_region && !tm_dma_region->gone ? tm_dma_region : NULL;
}

static u32 tm_dma_total(void)
{
	const struct tm_dma_region *region = tm_dma_offered();

	return region ? region->nr_chunks : 0;
}

static u32 tm_dma_free(void)
{
	const struct tm_dma_region *region = tm_dma_offered();

	return region ? region->nr_chunks - region->used : 0;
}

/* Also of a region that is not offered any more. */
static u32 tm_dma_used(void)
{
	lockdep_assert_held(&tm_dma_mutex);
	return tm_dma_region ? tm_dma_region->used : 0;
}

#define TM_DMA_POOL_RO(file)						\
static ssize_t tm_dma_pool_##file##_show(struct device *dev,		\
					 struct device_attribute *attr,	\
					 char *buf)			\
{									\
	u32 chunks;							\
									\
	mutex_lock(&tm_dma_mutex);					\
	chunks = tm_dma_##file();					\
	mutex_unlock(&tm_dma_mutex);					\
	return sysfs_emit(buf, "%u\n", chunks);				\
}									\
									\
struct device_attribute tm_dma_pool_##file =				\
	__ATTR(file, 0444, tm_dma_pool_##file##_show, NULL)

TM_DMA_POOL_RO(total);
TM_DMA_POOL_RO(used);
TM_DMA_POOL_RO(free);

static ssize_t tm_dma_pool_node_show(struct device *dev,
				     struct device_attribute *attr, char *buf)
{
	const struct tm_dma_region *region;
	ssize_t size;

	mutex_lock(&tm_dma_mutex);
	region = tm_dma_offered();
	size = region ? sysfs_emit(buf, "%pOF\n", region->dev->of_node) :
			sysfs_emit(buf, "none\n");
	mutex_unlock(&tm_dma_mutex);
	return size;
}

struct device_attribute tm_dma_pool_node =
	__ATTR(node, 0444, tm_dma_pool_node_show, NULL);
