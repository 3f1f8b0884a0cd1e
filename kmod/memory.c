// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pages behind an object: extents from both allocator levels, zeroed before
 * anyone sees them, and kept aside on the way back while somebody holds them.
 */
#include <linux/atomic.h>
#include <linux/err.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "memory.h"
#include "pages.h"

/* How often quarantined pages are looked at: about as long as an I/O takes. */
#define TM_QUARANTINE_PERIOD	(HZ / 10)

static void tm_quarantine_poll(struct work_struct *work);

static DEFINE_SPINLOCK(tm_quarantine_lock);
static LIST_HEAD(tm_quarantine);
static DECLARE_DELAYED_WORK(tm_quarantine_work, tm_quarantine_poll);
static atomic64_t tm_quarantined_pages = ATOMIC64_INIT(0);
static atomic64_t tm_fallback_count = ATOMIC64_INIT(0);

/* Allocations that took smaller runs than they wanted. */
u64 tm_memory_fallbacks(void)
{
	return atomic64_read(&tm_fallback_count);
}

/* Pages freed by their owner and still held by somebody else. */
u64 tm_memory_quarantined(void)
{
	return atomic64_read(&tm_quarantined_pages);
}

static int tm_memory_reserve_extent(struct tm_memory *memory)
{
	struct tm_extent *extent;
	u32 max;

	if (memory->nr_extents < memory->max_extents)
		return 0;
	max = memory->max_extents * 2;
	extent = kvmalloc_array(max, sizeof(*extent), GFP_KERNEL_ACCOUNT);
	if (!extent)
		return -ENOMEM;
	memcpy(extent, memory->extent,
	       memory->nr_extents * sizeof(*extent));
	if (memory->extent != memory->small)
		kvfree(memory->extent);
	memory->extent = extent;
	memory->max_extents = max;
	return 0;
}

/* Add one zeroed extent of 2^@order pages at the end. */
static int tm_memory_extend(struct tm_memory *memory, unsigned int order,
			    bool may_grow)
{
	struct tm_geometry g = tm_pages_geometry();
	struct tm_page_id page;
	struct tm_chunk_id chunk;
	bool zeroed = false;
	int err;

	err = tm_memory_reserve_extent(memory);
	if (err)
		return err;
	if (order == g.chunk_order) {
		err = tm_pages_take_chunk(true, &chunk, &zeroed);
		if (err)
			return err;
		page = tm_page_id(g, chunk, 0);
		memory->nr_chunks++;
	} else {
		err = tm_pages_alloc_run(order, may_grow, &page);
		if (err)
			return err;
	}
	if (!zeroed)
		tm_pages_zero(page, order);

	memory->extent[memory->nr_extents++] = (struct tm_extent){
		.first = memory->nr_pages,
		.page = page,
		.order = order,
	};
	memory->nr_pages += 1u << order;
	return 0;
}

/**
 * tm_memory_alloc - allocate @nr_pages zeroed pages
 * @nr_pages: how many
 * @policy: what it may be made of
 *
 * Takes the largest extents first. Where the policy lets it and a size is not to
 * be had, goes on with smaller runs from chunks that the buddy pool already has,
 * and counts that. With TM_MEMORY_CHUNKS rounds up to whole chunks.
 *
 * Context: may sleep. Never invokes the OOM killer.
 * Return: the memory or an ERR_PTR: -ENOSPC at the pool's capacity, -ENOMEM when
 * the system has none, -EINTR on a fatal signal.
 */
struct tm_memory *tm_memory_alloc(u32 nr_pages, enum tm_memory_policy policy)
{
	struct tm_geometry g = tm_pages_geometry();
	unsigned int limit = policy == TM_MEMORY_RUNS ? g.chunk_order - 1 :
							g.chunk_order;
	struct tm_memory *memory;
	int first_err = 0, err;

	/* What cannot be had must not drain the pool before it fails. */
	if (!tm_pages_could_hold(nr_pages))
		return ERR_PTR(-ENOSPC);
	memory = kmalloc(sizeof(*memory), GFP_KERNEL_ACCOUNT);
	if (!memory)
		return ERR_PTR(-ENOMEM);
	*memory = (struct tm_memory){
		.extent = memory->small,
		.max_extents = ARRAY_SIZE(memory->small),
	};

	while (memory->nr_pages < nr_pages) {
		u32 left = nr_pages - memory->nr_pages;
		unsigned int order = min_t(unsigned int, ilog2(left), limit);

		if (policy == TM_MEMORY_CHUNKS)
			order = g.chunk_order;
		err = fatal_signal_pending(current) ? -EINTR :
		      tm_memory_extend(memory, order, !first_err);
		if (!err)
			continue;
		if (err == -EINTR || policy == TM_MEMORY_CHUNKS || !order) {
			err = first_err ?: err;
			goto err;
		}
		if (!first_err)
			atomic64_inc(&tm_fallback_count);
		first_err = first_err ?: err;
		limit = order - 1;
	}
	return memory;

err:
	tm_memory_discard(memory);
	return ERR_PTR(err);
}

/**
 * tm_memory_find - the extent that holds page @index
 * @memory: where to look
 * @index: a page of it
 *
 * Context: any; the caller keeps @memory alive. @index must be in range.
 */
const struct tm_extent *tm_memory_find(const struct tm_memory *memory,
				       u32 index)
{
	u32 low = 0, high = memory->nr_extents;

	while (high - low > 1) {
		u32 middle = low + (high - low) / 2;

		if (memory->extent[middle].first <= index)
			low = middle;
		else
			high = middle;
	}
	return &memory->extent[low];
}

static void tm_extent_free(const struct tm_extent *extent, bool zeroed)
{
	struct tm_geometry g = tm_pages_geometry();

	if (extent->order == g.chunk_order)
		tm_pages_put_chunk(tm_page_chunk(g, extent->page), zeroed);
	else
		tm_pages_free_run(extent->page, extent->order);
}

static void tm_memory_destroy(struct tm_memory *memory)
{
	if (memory->extent != memory->small)
		kvfree(memory->extent);
	kfree(memory);
}

/* Whether anyone beside the pool has a reference on a page of the extent. */
static bool tm_extent_held(const struct tm_extent *extent)
{
	const struct page *page = tm_pages_page(extent->page);

	for (u32 i = 0; i < 1u << extent->order; i++)
		if (page_count(page + i) != 1)
			return true;
	return false;
}

/* Free the extents that nobody holds; keep the others. */
static u32 tm_memory_release(struct tm_memory *memory)
{
	u32 kept = 0;

	memory->nr_pages = 0;
	for (u32 i = 0; i < memory->nr_extents; i++) {
		struct tm_extent extent = memory->extent[i];

		cond_resched();
		if (tm_extent_held(&extent)) {
			memory->extent[kept++] = extent;
			memory->nr_pages += 1u << extent.order;
		} else {
			tm_extent_free(&extent, false);
		}
	}
	memory->nr_extents = kept;
	return kept;
}

/**
 * tm_memory_free - give back memory that was mapped
 * @memory: what to give back; consumed
 *
 * Every mapping is gone. Extents with pages that somebody still holds go into
 * quarantine and are given back once nobody does.
 *
 * Context: may sleep; consumes @memory.
 */
void tm_memory_free(struct tm_memory *memory)
{
	if (!tm_memory_release(memory)) {
		tm_memory_destroy(memory);
		return;
	}
	atomic64_add(memory->nr_pages, &tm_quarantined_pages);
	spin_lock(&tm_quarantine_lock);
	list_add_tail(&memory->quarantine, &tm_quarantine);
	spin_unlock(&tm_quarantine_lock);
	schedule_delayed_work(&tm_quarantine_work, TM_QUARANTINE_PERIOD);
}

/**
 * tm_memory_discard - give back memory that nobody has seen
 * @memory: what to give back; consumed
 *
 * Context: may sleep; consumes @memory.
 */
void tm_memory_discard(struct tm_memory *memory)
{
	for (u32 i = 0; i < memory->nr_extents; i++)
		tm_extent_free(&memory->extent[i], true);
	tm_memory_destroy(memory);
}

static void tm_quarantine_poll(struct work_struct *work)
{
	struct tm_memory *memory, *next;
	bool again;
	LIST_HEAD(held);

	spin_lock(&tm_quarantine_lock);
	list_splice_init(&tm_quarantine, &held);
	spin_unlock(&tm_quarantine_lock);

	list_for_each_entry_safe(memory, next, &held, quarantine) {
		u32 before = memory->nr_pages;
		u32 kept = tm_memory_release(memory);

		atomic64_sub(before - memory->nr_pages, &tm_quarantined_pages);
		if (kept)
			continue;
		list_del(&memory->quarantine);
		tm_memory_destroy(memory);
	}

	spin_lock(&tm_quarantine_lock);
	list_splice(&held, &tm_quarantine);
	again = !list_empty(&tm_quarantine);
	spin_unlock(&tm_quarantine_lock);
	if (again)
		schedule_delayed_work(&tm_quarantine_work,
				      TM_QUARANTINE_PERIOD);
}

/*
 * At unload nobody can wait for the last holder any longer. What is still held
 * is handed to it: our reference goes, and the holder's last put frees the page.
 */
void tm_memory_exit(void)
{
	struct tm_memory *memory, *next;

	cancel_delayed_work_sync(&tm_quarantine_work);
	tm_quarantine_poll(NULL);
	cancel_delayed_work_sync(&tm_quarantine_work);
	list_for_each_entry_safe(memory, next, &tm_quarantine, quarantine) {
		for (u32 i = 0; i < memory->nr_extents; i++)
			tm_extent_free(&memory->extent[i], false);
		list_del(&memory->quarantine);
		tm_memory_destroy(memory);
	}
}
