// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where chunks come from: the one place that asks the system for memory and
 * gives it back, and the lock both allocator levels run under.
 *
 * Lock order, outermost first:
 *
 *   mmap_lock                   the kernel's
 *   mapping->invalidate_lock    a client's window and handles (client.c)
 *   tm_pools.lock               both allocator levels (here)
 *
 * The last is a spinlock held for a bounded number of steps; no page or slab
 * allocator is called under it. Two more stand alone, nothing is taken inside
 * them: tm_client::lock (a client's quota) and tm_quarantine_lock (memory.c).
 * Nothing here runs in interrupt context.
 */
#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/sched/signal.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "pages.h"
#include "trace.h"

/* What the module may take of the machine unless told otherwise, in percent. */
#define TM_DEFAULT_CAPACITY_PERCENT	60
/* The reserve unless told otherwise: little, but enough for a first burst. */
#define TM_DEFAULT_RESERVE_CHUNKS	4
#define TM_DEFAULT_RESERVE_DIVISOR	16

static unsigned int capacity;
module_param(capacity, uint, 0444);
MODULE_PARM_DESC(capacity, "chunks of 2 MiB the module may hold (0: 60 % of RAM)");

static int reserve = -1;
module_param(reserve, int, 0444);
MODULE_PARM_DESC(reserve, "zeroed chunks kept ready (-1: 4, less on small boards)");

static struct {
	spinlock_t lock;
	struct tm_geometry geometry;
	struct tm_chunk_pool chunk;
	struct tm_buddy buddy;
	struct page **page;	/* first page of a chunk, by chunk id */
	struct work_struct reserve_work;
	struct tm_shrinker *shrinker;
} tm_pools;

struct tm_geometry tm_pages_geometry(void)
{
	return tm_pools.geometry;
}

/**
 * tm_pages_page - the struct page behind a page id
 * @id: which page
 *
 * Context: any; the caller owns the page, so its chunk cannot go away.
 */
struct page *tm_pages_page(struct tm_page_id id)
{
	return tm_pools.page[tm_page_chunk(tm_pools.geometry, id).v] +
	       tm_page_index(tm_pools.geometry, id);
}

void tm_pages_stats(struct tm_pages_stats *stats)
{
	spin_lock(&tm_pools.lock);
	stats->chunk = tm_pools.chunk;
	stats->buddy = tm_pools.buddy;
	spin_unlock(&tm_pools.lock);
}

static struct page *tm_pages_from_system(bool zeroed)
{
	/* A chunk is worth one honest try, not an OOM kill or a warning. */
	gfp_t gfp = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN;
	unsigned int order = tm_pools.geometry.chunk_order;
	struct page *page;

	page = alloc_pages(zeroed ? gfp | __GFP_ZERO : gfp, order);
	/* One reference count per page: what tells which of them is still held. */
	if (page)
		split_page(page, order);
	return page;
}

static void tm_pages_to_system(struct page *page)
{
	for (u32 i = 0; i < tm_chunk_pages(tm_pools.geometry); i++)
		__free_page(page + i);
}

/**
 * tm_pages_zero - zero a run
 * @id: its first page
 * @order: log2 of its pages
 *
 * Context: may sleep; the caller owns the run.
 */
void tm_pages_zero(struct tm_page_id id, unsigned int order)
{
	struct page *page = tm_pages_page(id);

	for (u32 i = 0; i < 1u << order; i++) {
		clear_highpage(page + i);
		cond_resched();
	}
}

/* Give free chunks in excess back, @most of them. Return: how many. */
static u32 tm_pages_trim(u32 most)
{
	u32 done = 0;

	while (done < most) {
		struct tm_chunk_id id;
		struct page *page;
		int err = -ENOENT;

		spin_lock(&tm_pools.lock);
		if (tm_chunk_excess(&tm_pools.chunk))
			err = tm_chunk_remove(&tm_pools.chunk, &id);
		if (!err) {
			page = tm_pools.page[id.v];
			tm_pools.page[id.v] = NULL;
		}
		spin_unlock(&tm_pools.lock);
		if (err)
			break;
		tm_pages_to_system(page);
		trace_tensormem_chunk_shrink(id.v);
		done++;
	}
	return done;
}

static bool tm_pages_over_capacity(void)
{
	lockdep_assert_held(&tm_pools.lock);
	return tm_chunk_total(&tm_pools.chunk) > tm_pools.chunk.capacity;
}

static void tm_pages_trim_to_capacity(void)
{
	u32 over;

	spin_lock(&tm_pools.lock);
	over = tm_pages_over_capacity() ?
	       tm_chunk_total(&tm_pools.chunk) - tm_pools.chunk.capacity : 0;
	spin_unlock(&tm_pools.lock);
	tm_pages_trim(over);
}

/* Ask the system for the chunk that tm_chunk_grow_begin() made room for. */
static struct page *tm_pages_grow(struct tm_chunk_id id, bool zeroed)
{
	u64 start = trace_tensormem_chunk_grow_enabled() ? ktime_get_ns() : 0;
	struct page *page = tm_pages_from_system(zeroed);

	if (start)
		trace_tensormem_chunk_grow(id.v, !!page, ktime_get_ns() - start);
	return page;
}

/* Conclude a growth. Return: 0, or -ENOMEM when @page is NULL. */
static int tm_pages_grown(struct tm_chunk_id id, struct page *page, bool zeroed)
{
	lockdep_assert_held(&tm_pools.lock);
	if (!page) {
		tm_chunk_grow_abort(&tm_pools.chunk, id);
		return -ENOMEM;
	}
	tm_pools.page[id.v] = page;
	tm_chunk_grow_end(&tm_pools.chunk, id, zeroed);
	return 0;
}

/* Bring the reserve to its size: zero what is free, then grow. */
static void tm_pages_refill(struct work_struct *work)
{
	int err = 0;

	while (!err) {
		bool zero = false, grow = false;
		struct tm_chunk_id id;
		struct page *page;

		spin_lock(&tm_pools.lock);
		if (tm_chunk_deficit(&tm_pools.chunk)) {
			zero = !tm_chunk_zero_begin(&tm_pools.chunk, &id);
			grow = !zero &&
			       !tm_chunk_grow_begin(&tm_pools.chunk, &id);
		}
		spin_unlock(&tm_pools.lock);

		if (zero) {
			tm_pages_zero(tm_page_id(tm_pools.geometry, id, 0),
				      tm_pools.geometry.chunk_order);
			spin_lock(&tm_pools.lock);
			tm_chunk_zero_end(&tm_pools.chunk, id);
			spin_unlock(&tm_pools.lock);
		} else if (grow) {
			page = tm_pages_grow(id, true);
			spin_lock(&tm_pools.lock);
			err = tm_pages_grown(id, page, true);
			spin_unlock(&tm_pools.lock);
		} else {
			break;
		}
	}
	/* A lower capacity could not reach the chunk that was in hand here. */
	tm_pages_trim_to_capacity();
}

static void tm_pages_kick(void)
{
	queue_work(system_unbound_wq, &tm_pools.reserve_work);
}

static int tm_pages_take(enum tm_owner owner, bool want_zeroed,
			 struct tm_chunk_id *id, bool *zeroed)
{
	bool kick = false;
	struct page *page;
	int err;

	might_sleep();
retry:
	spin_lock(&tm_pools.lock);
	err = tm_chunk_take(&tm_pools.chunk, owner, want_zeroed, id, zeroed);
	if (!err) {
		kick = tm_chunk_deficit(&tm_pools.chunk);
		spin_unlock(&tm_pools.lock);
		goto out;
	}
	err = tm_chunk_grow_begin(&tm_pools.chunk, id);
	spin_unlock(&tm_pools.lock);
	/* At capacity, but the last chunk may be in the worker's hands. */
	if (err && flush_work(&tm_pools.reserve_work)) {
		if (fatal_signal_pending(current))
			return -EINTR;
		goto retry;
	}
	if (err)
		return err;

	page = tm_pages_grow(*id, want_zeroed);
	spin_lock(&tm_pools.lock);
	err = tm_pages_grown(*id, page, want_zeroed);
	if (!err)
		err = tm_chunk_take(&tm_pools.chunk, owner, want_zeroed, id,
				    zeroed);
	kick = tm_chunk_deficit(&tm_pools.chunk);
	spin_unlock(&tm_pools.lock);
out:
	if (kick)
		tm_pages_kick();
	return err;
}

/**
 * tm_pages_take_chunk - take a whole chunk for a tensor
 * @id: the chunk taken
 * @want_zeroed: prefer one that is zeroed
 * @zeroed: whether the one returned is
 *
 * Context: may sleep; not under tm_pools.lock.
 * Return: 0, -ENOSPC at capacity, -ENOMEM when the system has none, -EINTR on a
 * fatal signal.
 */
int tm_pages_take_chunk(bool want_zeroed, struct tm_chunk_id *id, bool *zeroed)
{
	return tm_pages_take(TM_OWNER_TENSOR, want_zeroed, id, zeroed);
}

/**
 * tm_pages_put_chunk - give a chunk back to level 1
 * @id: the chunk
 * @zeroed: nobody wrote to it since it was zeroed
 *
 * Context: process context; may call the page allocator to free.
 */
void tm_pages_put_chunk(struct tm_chunk_id id, bool zeroed)
{
	bool over, kick;

	spin_lock(&tm_pools.lock);
	tm_chunk_put(&tm_pools.chunk, id, zeroed);
	over = tm_pages_over_capacity();
	kick = tm_chunk_deficit(&tm_pools.chunk);
	spin_unlock(&tm_pools.lock);
	if (over)
		tm_pages_trim_to_capacity();
	else if (kick)
		tm_pages_kick();
}

/**
 * tm_pages_alloc_run - allocate 2^@order pages from the buddy pool
 * @order: log2 of its pages
 * @page: its first page
 * @may_grow: take a chunk from level 1 when no chunk of the pool has such a run
 *
 * The contents are undefined.
 *
 * Context: may sleep; not under tm_pools.lock.
 * Return: 0, -EINVAL for an order of a chunk or more, -ENOSPC at capacity,
 * -ENOMEM when the system has none or the pool may not grow.
 */
int tm_pages_alloc_run(unsigned int order, bool may_grow,
		       struct tm_page_id *page)
{
	struct tm_chunk_id id;
	bool zeroed, spare;
	int err;

	spin_lock(&tm_pools.lock);
	err = tm_buddy_alloc(&tm_pools.buddy, order, page);
	spin_unlock(&tm_pools.lock);
	if (likely(err != -ENOMEM) || !may_grow)
		return err;

	err = tm_pages_take(TM_OWNER_BUDDY, false, &id, &zeroed);
	if (err)
		return err;
	spin_lock(&tm_pools.lock);
	/* A run freed meanwhile comes first: a chunk added for nothing would stay. */
	err = tm_buddy_alloc(&tm_pools.buddy, order, page);
	spare = !err;
	if (!spare) {
		tm_buddy_add_chunk(&tm_pools.buddy, id);
		err = tm_buddy_alloc(&tm_pools.buddy, order, page);
	}
	spin_unlock(&tm_pools.lock);
	if (spare)
		tm_pages_put_chunk(id, zeroed);
	return err;
}

/**
 * tm_pages_free_run - free a run; an empty chunk goes back to level 1
 * @page: its first page
 * @order: log2 of its pages
 *
 * Context: process context; may call the page allocator to free.
 */
void tm_pages_free_run(struct tm_page_id page, unsigned int order)
{
	struct tm_chunk_id id = tm_page_chunk(tm_pools.geometry, page);
	bool empty = false;

	spin_lock(&tm_pools.lock);
	WARN_ON_ONCE(tm_buddy_free(&tm_pools.buddy, page, order, &empty));
	if (empty)
		empty = !tm_buddy_remove_chunk(&tm_pools.buddy, id);
	spin_unlock(&tm_pools.lock);
	if (empty)
		tm_pages_put_chunk(id, false);
}

/* Whether the pool could ever hold @nr_pages. Context: never sleeps. */
bool tm_pages_could_hold(u64 nr_pages)
{
	u64 pages;

	spin_lock(&tm_pools.lock);
	pages = (u64)tm_pools.chunk.capacity << tm_pools.geometry.chunk_order;
	spin_unlock(&tm_pools.lock);
	return nr_pages <= pages;
}

/**
 * tm_pages_set_capacity - bound what the pool may hold
 * @chunks: the new bound
 *
 * Free chunks above it go to the system at once, others as they are freed.
 *
 * Context: may sleep. Return: 0, -EINVAL above what the machine could hold.
 */
int tm_pages_set_capacity(u32 chunks)
{
	if (chunks > tm_pools.chunk.nr_slots)
		return -EINVAL;
	spin_lock(&tm_pools.lock);
	tm_pools.chunk.capacity = chunks;
	spin_unlock(&tm_pools.lock);
	tm_pages_trim_to_capacity();
	return 0;
}

/**
 * tm_pages_set_reserve - how many zeroed chunks to keep ready
 * @chunks: the new reserve
 *
 * Filled in the background; a smaller reserve goes to the system at once.
 *
 * Context: may sleep. Return: 0, -EINVAL above the capacity.
 */
int tm_pages_set_reserve(u32 chunks)
{
	bool shrink;
	int err = 0;

	spin_lock(&tm_pools.lock);
	shrink = chunks < tm_pools.chunk.reserve;
	if (chunks > tm_pools.chunk.capacity)
		err = -EINVAL;
	else
		tm_pools.chunk.reserve = chunks;
	spin_unlock(&tm_pools.lock);
	if (err)
		return err;
	if (shrink)
		tm_pages_trim(U32_MAX);
	tm_pages_kick();
	return 0;
}

/* The shrinker counts pages; free chunks above the reserve can go. */
static unsigned long tm_pages_count(struct shrinker *shrinker,
				    struct shrink_control *sc)
{
	unsigned long excess;

	spin_lock(&tm_pools.lock);
	excess = tm_chunk_excess(&tm_pools.chunk);
	spin_unlock(&tm_pools.lock);
	return excess ? excess << tm_pools.geometry.chunk_order : SHRINK_EMPTY;
}

static unsigned long tm_pages_scan(struct shrinker *shrinker,
				   struct shrink_control *sc)
{
	u32 order = tm_pools.geometry.chunk_order;
	u32 most = DIV_ROUND_UP(sc->nr_to_scan, 1ul << order);
	u32 done = tm_pages_trim(most);

	sc->nr_scanned = (unsigned long)done << order;
	return done ? (unsigned long)done << order : SHRINK_STOP;
}

static void __init tm_pages_defaults(void)
{
	struct tm_chunk_pool *pool = &tm_pools.chunk;

	pool->capacity = div_u64((u64)pool->nr_slots *
				 TM_DEFAULT_CAPACITY_PERCENT, 100);
	if (capacity)
		pool->capacity = min(capacity, pool->nr_slots);
	pool->reserve = min_t(u32, TM_DEFAULT_RESERVE_CHUNKS,
			      pool->capacity / TM_DEFAULT_RESERVE_DIVISOR);
	if (reserve >= 0)
		pool->reserve = min_t(u32, reserve, pool->capacity);
}

int __init tm_pages_init(void)
{
	u32 slots;
	int err;

	spin_lock_init(&tm_pools.lock);
	INIT_WORK(&tm_pools.reserve_work, tm_pages_refill);
	tm_pools.geometry = tm_geometry(PAGE_SHIFT);
	slots = totalram_pages() >> tm_pools.geometry.chunk_order;

	err = tm_chunk_pool_init(&tm_pools.chunk, slots, &tm_pools.lock);
	if (err)
		return err;
	err = tm_buddy_init(&tm_pools.buddy, tm_pools.geometry, slots,
			    &tm_pools.lock);
	if (err)
		goto err_chunk;
	tm_pools.page = kvcalloc(slots, sizeof(*tm_pools.page), GFP_KERNEL);
	if (!tm_pools.page) {
		err = -ENOMEM;
		goto err_buddy;
	}
	tm_pages_defaults();
	tm_pools.shrinker = tm_shrinker_register("tensormem-chunk",
						 tm_chunk_pages(tm_pools.geometry),
						 tm_pages_count, tm_pages_scan);
	if (!tm_pools.shrinker) {
		err = -ENOMEM;
		goto err_page;
	}
	tm_pages_kick();
	return 0;

err_page:
	kvfree(tm_pools.page);
err_buddy:
	tm_buddy_destroy(&tm_pools.buddy);
err_chunk:
	tm_chunk_pool_destroy(&tm_pools.chunk);
	return err;
}

/* Nobody holds memory any more: the last client has gone before the module. */
void tm_pages_exit(void)
{
	tm_shrinker_unregister(tm_pools.shrinker);
	cancel_work_sync(&tm_pools.reserve_work);
	tm_pools.chunk.reserve = 0;
	tm_pages_trim(U32_MAX);
	kvfree(tm_pools.page);
	tm_buddy_destroy(&tm_pools.buddy);
	tm_chunk_pool_destroy(&tm_pools.chunk);
}
