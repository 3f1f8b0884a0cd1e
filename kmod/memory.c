// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pages behind an object: extents from both allocator levels, zeroed before
 * anyone sees them, and given back when nobody holds them.
 */
#include <linux/atomic.h>
#include <linux/err.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "dma_pool.h"
#include "memory.h"

static atomic64_t tm_fallback_count = ATOMIC64_INIT(0);

/* Allocations that took smaller runs than they wanted. */
u64 tm_memory_fallbacks(void)
{
	return atomic64_read(&tm_fallback_count);
}

static int tm_memory_reserve_extent(struct tm_memory *memory)
{
	struct tm_extent *extent;
	u32 max;

	if (memory->nr_extents < memory->max_extents)
		return 0;
	max = memory->max_extents * 2;
	extent = kvmalloc_array(max, sizeof(*extent), TM_GFP);
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

/* Return: a memory of no pages, with room for that many extents, or NULL. */
static struct tm_memory *tm_memory_create(u32 extents)
{
	struct tm_memory *memory = kmalloc(sizeof(*memory), TM_GFP);

	if (!memory)
		return NULL;
	*memory = (struct tm_memory){
		.extent = memory->small,
		.max_extents = max_t(u32, extents, TM_EXTENTS_INLINE),
	};
	if (extents > TM_EXTENTS_INLINE)
		memory->extent = kvmalloc_array(extents, sizeof(*memory->extent),
						TM_GFP);
	if (!memory->extent) {
		kfree(memory);
		return NULL;
	}
	return memory;
}

/* Add one zeroed extent of 2^@order pages at the end. */
static int tm_memory_extend(struct tm_memory *memory, unsigned int order,
			    const struct tm_memory_request *request,
			    bool may_grow)
{
	unsigned int flags = request->flags | TM_PAGES_ZEROED |
			     (may_grow ? TM_PAGES_GROW : 0);
	struct tm_run run;
	int err;

	err = tm_memory_reserve_extent(memory);
	if (err)
		return err;
	err = tm_numa_alloc(&request->numa, request->turn, order, flags, &run);
	if (err)
		return err;
	if (!run.zeroed)
		tm_pages_zero(&run);
	if (order == tm_pages_geometry().chunk_order)
		memory->nr_chunks++;
	memory->extent[memory->nr_extents++] = (struct tm_extent){
		.first = memory->nr_pages,
		.run = run,
	};
	memory->nr_pages += 1u << order;
	return 0;
}

static void tm_memory_destroy(struct tm_memory *memory)
{
	if (memory->extent != memory->small)
		kvfree(memory->extent);
	kfree(memory);
}

/* Take zeroed chunks side by side out of the DMA pool. */
static struct tm_memory *tm_memory_alloc_dma(u32 nr_chunks)
{
	struct tm_dma_grant *grant = tm_dma_pool_take(nr_chunks);
	struct tm_geometry g = tm_pages_geometry();
	struct tm_memory *memory;

	if (IS_ERR(grant))
		return ERR_CAST(grant);
	memory = tm_memory_create(nr_chunks);
	if (!memory) {
		tm_dma_pool_put(grant);
		return ERR_PTR(-ENOMEM);
	}
	for (u32 i = 0; i < nr_chunks; i++)
		memory->extent[i] = (struct tm_extent){
			.first = i << g.chunk_order,
			.run = tm_dma_pool_run(grant, i),
		};
	memory->nr_extents = nr_chunks;
	memory->nr_chunks = nr_chunks;
	memory->nr_pages = nr_chunks << g.chunk_order;
	memory->grant = grant;
	return memory;
}

/**
 * tm_memory_alloc - allocate zeroed pages
 * @request: how many, and of what
 *
 * Takes the largest extents first. Where the policy lets it and a size is not to
 * be had, goes on with smaller runs from chunks that the buddy pool already has,
 * and counts that. With TM_MEMORY_CHUNKS rounds up to whole chunks.
 *
 * Context: may sleep. Never invokes the OOM killer.
 * Return: the memory or an ERR_PTR: -ENOSPC at the pool's capacity, -ENOMEM when
 * the system or current's memory cgroup has none, -EINTR on a fatal signal, -ENODEV
 * with TM_MEMORY_DMA where there is no such pool.
 */
struct tm_memory *tm_memory_alloc(const struct tm_memory_request *request)
{
	unsigned int chunk_order = tm_pages_geometry().chunk_order;
	unsigned int limit = request->policy == TM_MEMORY_RUNS ?
			     chunk_order - 1 : chunk_order;
	bool chunks = request->policy == TM_MEMORY_CHUNKS;
	struct tm_memory *memory;
	int first_err = 0, err;

	if (request->policy == TM_MEMORY_DMA)
		return tm_memory_alloc_dma(request->nr_pages >> chunk_order);
	/* What cannot be had must not drain the pool before it fails. */
	if (!tm_pages_could_hold(request->numa.nodes, request->nr_pages))
		return ERR_PTR(-ENOSPC);
	memory = tm_memory_create(0);
	if (!memory)
		return ERR_PTR(-ENOMEM);

	while (memory->nr_pages < request->nr_pages) {
		u32 left = request->nr_pages - memory->nr_pages;
		unsigned int order = min_t(unsigned int, ilog2(left), limit);

		if (chunks)
			order = chunk_order;
		err = fatal_signal_pending(current) ? -EINTR :
		      tm_memory_extend(memory, order, request, !first_err);
		if (!err)
			continue;
		if (err == -EINTR || chunks || !order) {
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

/* References that stand for a run: a whole chunk of ours has one count, that of its first page. */
static u32 tm_memory_counts(const struct tm_run *run)
{
	return run->order == tm_pages_geometry().chunk_order &&
	       run->node != TM_DMA_NODE ?
	       1 : 1u << run->order;
}

/**
 * tm_memory_held - whether anyone beside the pool has a reference on a page
 * @run: the run; nobody has it mapped
 *
 * Context: any; the caller owns the run.
 */
bool tm_memory_held(const struct tm_run *run)
{
	const struct page *page = tm_pages_page(run);
	u32 counts = tm_memory_counts(run);

	for (u32 i = 0; i < counts; i++)
		if (page_count(page + i) != 1)
			return true;
	return false;
}

/**
 * tm_memory_hold - hold the pages of a memory beside its owner
 * @memory: the memory; nobody gives it back or moves it meanwhile
 *
 * From now on its pages stay where they are: compaction and quarantine find them held.
 *
 * Context: may sleep.
 * Return: the same pages, to look at and to be let go by tm_memory_let_go(); or an
 * ERR_PTR: -ENOMEM.
 */
struct tm_memory *tm_memory_hold(const struct tm_memory *memory)
{
	struct tm_memory *held = tm_memory_create(memory->nr_extents);

	if (!held)
		return ERR_PTR(-ENOMEM);
	held->nr_extents = memory->nr_extents;
	held->nr_chunks = memory->nr_chunks;
	held->nr_pages = memory->nr_pages;
	memcpy(held->extent, memory->extent,
	       held->nr_extents * sizeof(*held->extent));
	for (u32 i = 0; i < held->nr_extents; i++) {
		const struct tm_run *run = &held->extent[i].run;

		for (u32 p = 0; p < tm_memory_counts(run); p++)
			get_page(tm_pages_page(run) + p);
		cond_resched();
	}
	return held;
}

/**
 * tm_memory_let_go - end a hold
 * @memory: what tm_memory_hold() returned; consumed
 *
 * Context: may sleep; consumes @memory.
 */
void tm_memory_let_go(struct tm_memory *memory)
{
	for (u32 i = 0; i < memory->nr_extents; i++) {
		const struct tm_run *run = &memory->extent[i].run;

		for (u32 p = 0; p < tm_memory_counts(run); p++)
			put_page(tm_pages_page(run) + p);
		cond_resched();
	}
	tm_memory_destroy(memory);
}

static void tm_memory_give_back(struct tm_memory *memory, bool zeroed)
{
	if (memory->grant)
		tm_dma_pool_put(memory->grant);
	else
		for (u32 i = 0; i < memory->nr_extents; i++)
			tm_pages_free(&memory->extent[i].run, zeroed);
	tm_memory_destroy(memory);
}

/* What came in one piece goes back so, or stays. */
static bool tm_memory_free_dma(struct tm_memory *memory)
{
	for (u32 i = 0; i < memory->nr_extents; i++) {
		cond_resched();
		if (tm_memory_held(&memory->extent[i].run))
			return false;
	}
	tm_memory_give_back(memory, false);
	return true;
}

/**
 * tm_memory_free - give back memory that was mapped, as far as it can be
 * @memory: what to give back; consumed when all of it is given back
 *
 * Every mapping is gone. Extents with pages that somebody still holds stay in
 * @memory: they must not be handed out before nobody does. Of the DMA pool all stay.
 *
 * Context: may sleep. Return: whether all of it could be given back.
 */
bool tm_memory_free(struct tm_memory *memory)
{
	u32 kept = 0;

	if (memory->grant)
		return tm_memory_free_dma(memory);
	memory->nr_pages = 0;
	for (u32 i = 0; i < memory->nr_extents; i++) {
		struct tm_extent extent = memory->extent[i];

		cond_resched();
		if (tm_memory_held(&extent.run)) {
			memory->extent[kept++] = extent;
			memory->nr_pages += 1u << extent.run.order;
		} else {
			tm_pages_free(&extent.run, false);
		}
	}
	memory->nr_extents = kept;
	if (kept)
		return false;
	tm_memory_destroy(memory);
	return true;
}

/**
 * tm_memory_discard - give back memory that nobody has seen
 * @memory: what to give back; consumed
 *
 * Context: may sleep; consumes @memory.
 */
void tm_memory_discard(struct tm_memory *memory)
{
	tm_memory_give_back(memory, true);
}

/**
 * tm_memory_abandon - give back memory although somebody holds pages of it
 * @memory: what to give back; consumed
 *
 * Only for the end of the pools: our references go, the pages are not handed out
 * again, and the last holder's put frees them.
 *
 * Context: may sleep; consumes @memory.
 */
void tm_memory_abandon(struct tm_memory *memory)
{
	tm_memory_give_back(memory, false);
}
