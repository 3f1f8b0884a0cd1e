// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where chunks come from: the one place that asks the system for memory and
 * gives it back, and the locks both allocator levels run under. Every memory node
 * has pools of its own; which node an allocation tries is numa.c's to say.
 *
 * Lock order, outermost first:
 *
 *   mmap_lock                   the kernel's; a fault in a KV cache may need memory. Who walks
 *                               page tables (walk.c) takes nothing of ours in it
 *   tm_compact_mutex            one compaction at a time (compact.c)
 *   tm_clients_mutex            the list of clients (client.c)
 *   mapping->invalidate_lock    a client's window and handles (client.c)
 *   tm_node::lock               both allocator levels of a node (here)
 *
 * and beside the three in the middle, never with one of them:
 *
 *   mmap_lock
 *   tm_kv::lock                 a KV cache (kv.c)
 *   tm_packer::mutex            a set of buffers to pack or unpack with (packer.c)
 *
 * and outside of both lists, but for mmap_lock, which nobody takes in it:
 *
 *   tm_pressure_mutex           one relief at a time (pressure.c)
 *   tm_kvs_mutex                the list of KV caches (kv.c); their locks are only tried in it
 *
 * and for model slots, none of which is held while memory is taken or given back:
 *
 *   tm_models_mutex             their names (model.c)
 *   tm_model::staging           one stage at a time (model.c)
 *   tm_model_watch::lock        which generation a file is behind (model_watch.c)
 *   tm_model::lock              a slot and its generations (model.c)
 *
 * Their folders in sysfs are made and taken away under the first two at most: who reads
 * a file there takes the last. A fault in a cached generation takes tm_model_cached::fence inside of
 * the kernel's page lock; one in a resident generation takes nothing, unless it is evictable
 * (model_evict.c), where none of the above is held:
 *
 *   mmap_lock
 *   tm_model_evict_mutex        one piece goes at a time
 *   mapping->invalidate_lock    of a generation's inode: its pieces' memory
 *   tm_model_evict_lock         the order of their use; a spinlock, in tm_model::lock too
 *
 * Memory that is wanted under the locks of the first list, down to mmap_lock and the mutexes, may come from there. Who
 * brings a piece in has its bit (tm_model_piece::coming) and none of these.
 *
 * For the RT pool, beside all others: tm_rt_mutex (who its clients are), tm_rt_folder_mutex (their folder), and
 * tm_rt_pool_setting with tm_rt_pool_mutex in it (what arenas may have; the former is held while chunks are taken). Under tm_arena::lock, which is raw and taken in hard
 * interrupts, nothing is called but the core and the clock.
 *
 * tm_dma_binding, tm_dma_mutex (the DMA pool's device and region, dma_pool.c) are taken in this order with no other lock of ours; in them none is taken but by reclaim.
 *
 * For bandwidth, beside all others: tm_core_setting, the lock of CPU hotplug, tm_core_mutex
 * (bandwidth_core.c); tm_spare.lock is raw, and taken in hard interrupts.
 * tm_event_mutex (one who sends events, event.c) is held while messages are allocated and sent, and taken with no lock of ours.
 *
 * The last of the first list is a spinlock held for a bounded number of steps; no page
 * or slab allocator is called under it. These stand alone, nothing is taken inside them:
 * tm_client::lock (a client's quota), tm_smalls::lock (its slabs), tm_park_lock,
 * tm_quarantine_lock, tm_runcache::lock, tm_event_lock. None of these runs in interrupt context.
 */
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "bandwidth.h"
#include "board.h"
#include "compat.h"
#include "core/buddy.h"
#include "core/chunk.h"
#include "dma_pool.h"
#include "pages.h"
#include "trace.h"

/* What the module may take of a machine that no board is known for, in percent. */
#define TM_DEFAULT_CAPACITY_PERCENT	60
/* The reserve unless told otherwise: little, but enough for a first burst. */
#define TM_DEFAULT_RESERVE_CHUNKS	4
#define TM_DEFAULT_RESERVE_DIVISOR	16

static unsigned int capacity;
module_param(capacity, uint, 0444);
MODULE_PARM_DESC(capacity, "chunks of 2 MiB the module may hold (0: by the board, else 60 % of RAM)");

static int reserve = -1;
module_param(reserve, int, 0444);
MODULE_PARM_DESC(reserve, "zeroed chunks kept ready (-1: 4, less on small boards)");

/**
 * struct tm_node - the pools of one memory node
 * @lock: guards everything below but @page's pages, which their owners have
 * @chunk: level 1
 * @buddy: level 2
 * @charged_buddy: the same in charged chunks, for those who pay: a cgroup neither
 *                 lives on the pages of those who do not, nor pays for theirs
 * @page: first page of a chunk, by chunk id
 * @purpose: enum tm_purpose, by chunk id; what it was when the slot last had a user of a whole chunk
 * @charged: owned chunks that are on a memory cgroup's bill
 * @pass: the compaction that is going on, or NULL
 * @nid: the kernel's number of the node
 * @slots_below: slots of the nodes before this one: what shares are made from
 * @reserve_work: brings the reserve to its size
 */
struct tm_node {
	spinlock_t lock;
	struct tm_chunk_pool chunk;
	struct tm_buddy buddy;
	struct tm_buddy charged_buddy;
	struct page **page;
	u8 *purpose;
	u32 charged;
	struct tm_pages_pass *pass;
	int nid;
	u32 slots_below;
	struct work_struct reserve_work;
};

/**
 * struct tm_giving - somebody who gives memory back because the system is short of it
 * @task: who, or NULL
 * @chunks: given by him since he began; his alone
 */
struct tm_giving {
	struct task_struct *task;
	u64 chunks;
};

static struct {
	struct tm_geometry geometry;
	struct tm_node *node[TM_MAX_NODES];	/* NULL: no memory */
	u32 slots;
	struct tm_shrinker *shrinker;
	unsigned long floor;		/* pages */
	struct tm_giving giving[TM_GIVERS];
} tm_pools;

u64 tm_pages_node_mask __read_mostly;

/* The node at or after @i that has memory, or NULL. */
static struct tm_node *tm_node_from(unsigned int i)
{
	while (i < TM_MAX_NODES && !tm_pools.node[i])
		i++;
	return i < TM_MAX_NODES ? tm_pools.node[i] : NULL;
}

#define tm_for_each_node(n)						\
	for ((n) = tm_node_from(0); (n); (n) = tm_node_from((n)->nid + 1))

struct tm_geometry tm_pages_geometry(void)
{
	return tm_pools.geometry;
}

/**
 * tm_pages_page - the struct page behind a run
 * @run: which run
 *
 * Context: any; the caller owns the run, so its chunk cannot go away.
 */
struct page *tm_pages_page(const struct tm_run *run)
{
	struct tm_geometry g = tm_pools.geometry;

	if (unlikely(run->node == TM_DMA_NODE))
		return tm_dma_pool_page(run->page);
	return tm_pools.node[run->node]->page[tm_page_chunk(g, run->page).v] +
	       tm_page_index(g, run->page);
}

static void tm_node_add_buddy(const struct tm_buddy *buddy, u32 free_chunks,
			      struct tm_pages_stats *stats)
{
	u64 free = buddy->free_pages +
		   ((u64)free_chunks << tm_pools.geometry.chunk_order);

	stats->served += buddy->allocs - buddy->moved_runs;
	stats->buddy.chunks += buddy->nr_chunks;
	stats->buddy.free_pages += buddy->free_pages;
	stats->buddy.used_pages += tm_buddy_used_pages(buddy);
	stats->buddy.allocs += buddy->allocs;
	stats->buddy.frees += buddy->frees;
	stats->buddy.splits += buddy->splits;
	stats->buddy.merges += buddy->merges;
	stats->buddy.moved_pages += buddy->moved_pages;
	stats->buddy.emptied += buddy->emptied;
	stats->buddy.given_up += buddy->given_up + buddy->starved;
	/* Parts that cannot be had as chunks; a fraction once all are summed up. */
	stats->buddy.fragmentation +=
		(u64)tm_fragmentation(buddy, free_chunks) * free;
}

static void tm_node_add_stats(struct tm_node *n, struct tm_pages_stats *stats)
{
	const struct tm_chunk_pool *chunk = &n->chunk;

	spin_lock(&n->lock);
	tm_node_add_buddy(&n->buddy, tm_chunk_free_count(chunk), stats);
	tm_node_add_buddy(&n->charged_buddy, 0, stats);
	stats->capacity += chunk->capacity;
	stats->reserve += chunk->reserve;
	stats->total += tm_chunk_total(chunk);
	stats->free += tm_chunk_free_count(chunk);
	stats->zeroed += chunk->count[TM_CHUNK_FREE_ZEROED];
	stats->used += chunk->owned[TM_OWNER_TENSOR];
	stats->charged += n->charged;
	stats->grown += chunk->grown;
	stats->shrunk += chunk->shrunk;
	stats->grow_failed += chunk->grow_failed;
	stats->recast += chunk->recast;
	stats->served += chunk->taken[TM_OWNER_TENSOR];
	spin_unlock(&n->lock);
}

/**
 * tm_pages_stats - counters of the pools of some nodes
 * @nodes: which, a bit each
 * @stats: their sums; what is read of one node is a consistent set
 *
 * Context: never sleeps.
 */
void tm_pages_stats(u64 nodes, struct tm_pages_stats *stats)
{
	struct tm_node *n;
	u64 free;

	*stats = (struct tm_pages_stats){ 0 };
	tm_for_each_node(n)
		if (nodes & BIT_ULL(n->nid))
			tm_node_add_stats(n, stats);
	free = stats->buddy.free_pages +
	       (stats->free << tm_pools.geometry.chunk_order);
	if (free)
		stats->buddy.fragmentation =
			div64_u64(stats->buddy.fragmentation, free);
}

/* How many chunks there can ever be, on all nodes. Context: any. */
u32 tm_pages_slots(void)
{
	return tm_pools.slots;
}

/**
 * tm_pages_view - look at one chunk
 * @slot: which, below tm_pages_slots(); nodes come one after the other
 * @view: what it is like
 *
 * Context: never sleeps. Return: false when there is no memory in the slot.
 */
bool tm_pages_view(u32 slot, struct tm_chunk_view *view)
{
	const struct tm_buddy_chunk *runs;
	struct tm_node *n, *next;
	struct page *page;
	u32 id;

	n = tm_node_from(0);
	while ((next = tm_node_from(n->nid + 1)) && next->slots_below <= slot)
		n = next;
	id = slot - n->slots_below;

	spin_lock(&n->lock);
	page = n->page[id];
	if (page) {
		view->node = n->nid;
		view->id = id;
		view->frame = page_to_pfn(page);
		view->chunk = n->chunk.chunks[id];
		view->purpose = n->purpose[id];
		runs = (view->chunk.form.charged ? &n->charged_buddy :
						   &n->buddy)->chunks + id;
		memcpy(view->run, runs->run, sizeof(view->run));
	}
	spin_unlock(&n->lock);
	return page;
}

static struct page *tm_pages_from_system(struct tm_node *n, bool zeroed,
					 struct tm_chunk_form form)
{
	/* A chunk is worth one honest try, not an OOM kill or a warning. */
	gfp_t gfp = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN | __GFP_THISNODE;
	unsigned int order = tm_pools.geometry.chunk_order;
	struct page *page;

	if (zeroed)
		gfp |= __GFP_ZERO;
	if (form.charged)
		gfp |= __GFP_ACCOUNT;
	if (!form.split)
		gfp |= __GFP_COMP;
	page = alloc_pages_node(n->nid, gfp, order);
	if (page && zeroed)
		tm_bandwidth_count(TM_MOVER_CHUNK, (u64)PAGE_SIZE << tm_pools.geometry.chunk_order);
	if (page && form.split)
		split_page(page, order);
	return page;
}

static void tm_pages_to_system(struct page *page, bool split)
{
	if (!split) {
		__free_pages(page, tm_pools.geometry.chunk_order);
		return;
	}
	for (u32 i = 0; i < tm_chunk_pages(tm_pools.geometry); i++)
		__free_page(page + i);
}

/* Give back a chunk for good, and tell who asked for that. */
static void tm_pages_give(struct page *page, bool split)
{
	tm_pages_to_system(page, split);
	for (u32 i = 0; i < TM_GIVERS; i++)
		if (READ_ONCE(tm_pools.giving[i].task) == current)
			tm_pools.giving[i].chunks++;
}

static bool tm_pages_giving(void)
{
	for (u32 i = 0; i < TM_GIVERS; i++)
		if (READ_ONCE(tm_pools.giving[i].task))
			return true;
	return false;
}

/**
 * tm_pages_giving_begin - count what current gives back from now on
 * @giver: as whom; one task at a time
 *
 * Meanwhile no reserve is filled: that would take what is being given.
 *
 * Context: any. Return: false when current does so as another already.
 */
bool tm_pages_giving_begin(enum tm_giver giver)
{
	for (u32 i = 0; i < TM_GIVERS; i++)
		if (READ_ONCE(tm_pools.giving[i].task) == current)
			return false;
	tm_pools.giving[giver].chunks = 0;
	WRITE_ONCE(tm_pools.giving[giver].task, current);
	return true;
}

/* Context: any; who began. */
void tm_pages_giving_end(enum tm_giver giver)
{
	WRITE_ONCE(tm_pools.giving[giver].task, NULL);
}

/* Bytes that the system got from @giver since he began. Context: any; himself. */
u64 tm_pages_given(enum tm_giver giver)
{
	return tm_pools.giving[giver].chunks << TM_CHUNK_SHIFT;
}

/**
 * tm_pages_zero - zero a run
 * @run: the run
 *
 * Context: may sleep; the caller owns the run.
 */
void tm_pages_zero(const struct tm_run *run)
{
	struct page *page = tm_pages_page(run);

	tm_bandwidth_count(run->order == tm_pools.geometry.chunk_order ?
				   TM_MOVER_CHUNK : TM_MOVER_BUDDY,
			   PAGE_SIZE << run->order);
	for (u32 i = 0; i < 1u << run->order; i++) {
		clear_highpage(page + i);
		cond_resched();
	}
}

/* Take the memory out of a slot that the pool has let go of. */
static struct page *tm_node_pick_up(struct tm_node *n, struct tm_chunk_id id)
{
	struct page *page = n->page[id.v];

	lockdep_assert_held(&n->lock);
	n->page[id.v] = NULL;
	return page;
}

/*
 * Give free chunks back, @most of them: those in excess, or with @reserve all. Return:
 * how many.
 */
static u32 tm_node_trim(struct tm_node *n, u32 most, bool reserve)
{
	u32 done = 0;

	while (done < most) {
		struct tm_chunk_id id;
		struct page *page;
		int err = -ENOENT;
		bool split;

		spin_lock(&n->lock);
		if (reserve || tm_chunk_excess(&n->chunk))
			err = tm_chunk_remove(&n->chunk, &id);
		if (!err) {
			split = n->chunk.chunks[id.v].form.split;
			page = tm_node_pick_up(n, id);
		}
		spin_unlock(&n->lock);
		if (err)
			break;
		tm_pages_give(page, split);
		trace_tensormem_chunk_shrink(n->nid, id.v);
		done++;
	}
	return done;
}

static bool tm_node_over_capacity(struct tm_node *n)
{
	lockdep_assert_held(&n->lock);
	return tm_chunk_total(&n->chunk) > n->chunk.capacity;
}

static void tm_node_trim_to_capacity(struct tm_node *n)
{
	u32 over;

	spin_lock(&n->lock);
	over = tm_node_over_capacity(n) ?
	       tm_chunk_total(&n->chunk) - n->chunk.capacity : 0;
	spin_unlock(&n->lock);
	tm_node_trim(n, over, false);
}

/* Ask the system for the memory of a chunk that is GROWING. */
static struct page *tm_node_grow(struct tm_node *n, struct tm_chunk_id id,
				 bool zeroed, struct tm_chunk_form form)
{
	u64 start = trace_tensormem_chunk_grow_enabled() ? ktime_get_ns() : 0;
	struct page *page = tm_pages_from_system(n, zeroed, form);

	if (start)
		trace_tensormem_chunk_grow(n->nid, id.v, !!page,
					   ktime_get_ns() - start);
	return page;
}

/*
 * Get a slot to GROW: a new one, or with @recast a free one, whose memory goes back
 * to the system. Return: 0, -ENOSPC or -ENOENT when there is none.
 */
static int tm_node_grow_begin(struct tm_node *n, bool recast,
			      struct tm_chunk_id *id)
{
	struct page *page = NULL;
	bool split;
	int err;

	spin_lock(&n->lock);
	if (recast) {
		err = tm_chunk_recast_begin(&n->chunk, id);
		if (!err) {
			split = n->chunk.chunks[id->v].form.split;
			page = tm_node_pick_up(n, *id);
		}
	} else {
		err = tm_chunk_grow_begin(&n->chunk, id);
	}
	spin_unlock(&n->lock);
	if (page)
		tm_pages_to_system(page, split);
	return err;
}

/* Conclude a growth with a free chunk. Return: 0, or -ENOMEM for no @page. */
static int tm_node_grown(struct tm_node *n, struct tm_chunk_id id,
			 struct page *page)
{
	spin_lock(&n->lock);
	n->page[id.v] = page;
	if (page)
		tm_chunk_grow_end(&n->chunk, id, true);
	else
		tm_chunk_grow_abort(&n->chunk, id);
	spin_unlock(&n->lock);
	return page ? 0 : -ENOMEM;
}

/* Whether the system has so much memory that a chunk for the reserve is not missed. */
static bool tm_pages_plenty(void)
{
	return si_mem_available() >=
	       READ_ONCE(tm_pools.floor) + tm_chunk_pages(tm_pools.geometry);
}

/* Bring the reserve to its size: zero what is free, then grow, then recast. */
static void tm_node_refill(struct work_struct *work)
{
	struct tm_node *n = container_of(work, struct tm_node, reserve_work);
	const struct tm_chunk_form whole = { 0 };
	int err = 0;

	while (!err) {
		struct tm_chunk_id id;
		struct tm_run run;
		bool deficit;

		spin_lock(&n->lock);
		deficit = !tm_pages_giving() && tm_chunk_deficit(&n->chunk);
		err = deficit ? tm_chunk_zero_begin(&n->chunk, &id) : -ENOENT;
		spin_unlock(&n->lock);
		if (!deficit)
			break;
		if (!err) {
			run = (struct tm_run){
				.page = tm_page_id(tm_pools.geometry, id, 0),
				.node = n->nid,
				.order = tm_pools.geometry.chunk_order,
			};
			tm_pages_zero(&run);
			spin_lock(&n->lock);
			tm_chunk_zero_end(&n->chunk, id);
			spin_unlock(&n->lock);
			continue;
		}
		if (!tm_pages_plenty())
			break;
		err = tm_node_grow_begin(n, false, &id);
		if (err)
			err = tm_node_grow_begin(n, true, &id);
		if (!err)
			err = tm_node_grown(n, id,
					    tm_node_grow(n, id, true, whole));
	}
	/* A lower capacity could not reach the chunk that was in hand here. */
	tm_node_trim_to_capacity(n);
}

static void tm_node_kick(struct tm_node *n)
{
	queue_work(system_unbound_wq, &n->reserve_work);
}

static int tm_node_take_grown(struct tm_node *n, bool recast,
			      enum tm_owner owner, struct tm_chunk_form form,
			      bool zeroed, struct tm_chunk_id *id)
{
	struct page *page;
	int err;

	err = tm_node_grow_begin(n, recast, id);
	if (err)
		return err;
	page = tm_node_grow(n, *id, zeroed, form);
	spin_lock(&n->lock);
	n->page[id->v] = page;
	if (page) {
		tm_chunk_grow_take(&n->chunk, *id, owner, form);
		n->charged += form.charged;
	} else {
		tm_chunk_grow_abort(&n->chunk, *id);
	}
	spin_unlock(&n->lock);
	return page ? 0 : -ENOMEM;
}

/*
 * Take a chunk. A free one first, unless it has to be charged; then a new one; and
 * when there is no room or no memory for that, a free one in another form.
 */
static int tm_node_take(struct tm_node *n, enum tm_owner owner,
			unsigned int flags, struct tm_chunk_id *id,
			bool *zeroed)
{
	struct tm_chunk_form form = {
		.split = owner == TM_OWNER_BUDDY,
		.charged = flags & TM_PAGES_CHARGED,
	};
	bool want_zeroed = flags & TM_PAGES_ZEROED;
	int err = -ENOMEM, grow_err;
	bool kick;

	might_sleep();
retry:
	spin_lock(&n->lock);
	if (!form.charged)
		err = tm_chunk_take(&n->chunk, owner, form.split, want_zeroed,
				    id, zeroed);
	kick = tm_chunk_deficit(&n->chunk);
	spin_unlock(&n->lock);
	if (err) {
		*zeroed = want_zeroed;
		err = grow_err = tm_node_take_grown(n, false, owner, form,
						    want_zeroed, id);
		/* A cgroup at its limit is not to cost the pool its free chunks. */
		if (err == -ENOSPC || (err && !form.charged))
			err = tm_node_take_grown(n, true, owner, form,
						 want_zeroed, id);
		/* At capacity, or the system has no more; but the last chunk may be in the worker's hands. */
		if (err == -ENOENT && flush_work(&n->reserve_work)) {
			if (fatal_signal_pending(current))
				return -EINTR;
			goto retry;
		}
		if (err == -ENOENT)
			err = grow_err;
	}
	if (kick)
		tm_node_kick(n);
	return err;
}

static void tm_node_put(struct tm_node *n, struct tm_chunk_id id, bool zeroed)
{
	struct page *page = NULL;
	bool over, kick, split;

	spin_lock(&n->lock);
	split = n->chunk.chunks[id.v].form.split;
	if (tm_chunk_put(&n->chunk, id, zeroed)) {
		n->charged--;
		page = tm_node_pick_up(n, id);
	}
	over = tm_node_over_capacity(n);
	kick = tm_chunk_deficit(&n->chunk);
	spin_unlock(&n->lock);
	if (page)
		tm_pages_give(page, split);
	if (over)
		tm_node_trim_to_capacity(n);
	else if (kick)
		tm_node_kick(n);
}

static int tm_node_alloc_chunk(struct tm_node *n, unsigned int flags,
			       struct tm_run *run)
{
	struct tm_chunk_id id;
	int err;

	err = tm_node_take(n, TM_OWNER_TENSOR, flags, &id, &run->zeroed);
	if (err)
		return err;
	run->page = tm_page_id(tm_pools.geometry, id, 0);
	spin_lock(&n->lock);
	n->purpose[id.v] = TM_PAGES_PURPOSE(flags);
	spin_unlock(&n->lock);
	return 0;
}

static struct tm_buddy *tm_node_buddy(struct tm_node *n, bool charged)
{
	return charged ? &n->charged_buddy : &n->buddy;
}

/* The buddy pool that a run is from: its owner keeps the chunk where it is. */
static struct tm_buddy *tm_node_buddy_of(struct tm_node *n,
					 struct tm_page_id page)
{
	u32 id = tm_page_chunk(tm_pools.geometry, page).v;

	return tm_node_buddy(n, n->chunk.chunks[id].form.charged);
}

static int tm_node_buddy_alloc(struct tm_node *n, unsigned int order,
			       unsigned int flags, struct tm_page_id *page)
{
	struct tm_buddy *buddy = tm_node_buddy(n, flags & TM_PAGES_CHARGED);

	lockdep_assert_held(&n->lock);
	return flags & TM_PAGES_UNMOVABLE ?
	       tm_buddy_alloc_unmovable(buddy, order, page) :
	       tm_buddy_alloc(buddy, order, page);
}

static int tm_node_alloc_run(struct tm_node *n, unsigned int order,
			     unsigned int flags, struct tm_run *run)
{
	struct tm_chunk_id id;
	bool zeroed, spare;
	int err;

	spin_lock(&n->lock);
	err = tm_node_buddy_alloc(n, order, flags, &run->page);
	spin_unlock(&n->lock);
	if (likely(err != -ENOMEM) || !(flags & TM_PAGES_GROW))
		return err;

	err = tm_node_take(n, TM_OWNER_BUDDY, flags & ~TM_PAGES_ZEROED, &id,
			   &zeroed);
	if (err)
		return err;
	spin_lock(&n->lock);
	/* A run freed meanwhile comes first: a chunk added for nothing would stay. */
	err = tm_node_buddy_alloc(n, order, flags, &run->page);
	spare = !err;
	if (!spare) {
		tm_buddy_add_chunk(tm_node_buddy(n, flags & TM_PAGES_CHARGED),
				   id);
		err = tm_node_buddy_alloc(n, order, flags, &run->page);
	}
	spin_unlock(&n->lock);
	if (spare)
		tm_node_put(n, id, false);
	return err;
}

/**
 * tm_pages_alloc - allocate 2^@order pages on a node
 * @node: one of tm_pages_nodes()
 * @order: log2 of the pages; a whole chunk at most
 * @flags: TM_PAGES_ flags
 * @run: what was allocated
 *
 * Runs come split, a reference count for each page; a whole chunk is one object.
 *
 * Context: may sleep; under no lock of ours.
 * Return: 0, -EINVAL for an order above a chunk, -ENOSPC at the node's capacity,
 * -ENOMEM when the system has none or the pool may not grow, -EINTR on a fatal
 * signal.
 */
int tm_pages_alloc(unsigned int node, unsigned int order, unsigned int flags,
		   struct tm_run *run)
{
	struct tm_node *n = tm_pools.node[node];

	run->node = node;
	run->order = order;
	run->zeroed = false;
	if (order == tm_pools.geometry.chunk_order)
		return tm_node_alloc_chunk(n, flags, run);
	return tm_node_alloc_run(n, order, flags, run);
}

/* Take an empty chunk out of the buddy pool. Return: whether it is the caller's. */
static bool tm_node_emptied(struct tm_node *n, struct tm_page_id page)
{
	lockdep_assert_held(&n->lock);
	return !tm_buddy_remove_chunk(tm_node_buddy_of(n, page),
				      tm_page_chunk(tm_pools.geometry, page));
}

/**
 * tm_pages_free - free what tm_pages_alloc() gave
 * @run: the run
 * @zeroed: nobody wrote to it since it was zeroed
 *
 * A chunk that falls empty goes back to level 1.
 *
 * Context: process context; may call the page allocator to free.
 */
void tm_pages_free(const struct tm_run *run, bool zeroed)
{
	struct tm_chunk_id id = tm_page_chunk(tm_pools.geometry, run->page);
	struct tm_node *n = tm_pools.node[run->node];
	bool empty = false;

	if (run->order == tm_pools.geometry.chunk_order) {
		tm_node_put(n, id, zeroed);
		return;
	}
	spin_lock(&n->lock);
	WARN_ON_ONCE(tm_buddy_free(tm_node_buddy_of(n, run->page), run->page,
				   run->order, &empty));
	if (empty)
		empty = tm_node_emptied(n, run->page);
	spin_unlock(&n->lock);
	if (empty)
		tm_node_put(n, id, false);
}

/**
 * tm_pages_pass_begin - begin to compact the buddy pool of a node
 * @node: one of tm_pages_nodes()
 * @charged: the one in charged chunks
 * @pass: what the calls below want
 *
 * Context: never sleeps; the caller excludes other passes.
 */
void tm_pages_pass_begin(unsigned int node, bool charged,
			 struct tm_pages_pass *pass)
{
	struct tm_node *n = tm_pools.node[node];

	*pass = (struct tm_pages_pass){
		.node = n,
		.buddy = tm_node_buddy(n, charged),
	};
	spin_lock(&n->lock);
	tm_compact_begin(pass->buddy, &pass->compact);
	spin_unlock(&n->lock);
}

/**
 * tm_pages_drain_begin - choose the next chunks to empty
 * @pass: the pass
 *
 * Context: may sleep. Return: false when there are no more: the pass is over.
 */
bool tm_pages_drain_begin(struct tm_pages_pass *pass)
{
	struct tm_node *n = pass->node;
	int err = 0;

	pass->nr_drains = 0;
	spin_lock(&n->lock);
	pass->emptied = pass->buddy->emptied;
	spin_unlock(&n->lock);
	while (err != -ENOENT && pass->nr_drains < TM_PAGES_DRAINS) {
		cond_resched();
		spin_lock(&n->lock);
		err = tm_compact_choose(pass->buddy, &pass->compact,
					&pass->drain[pass->nr_drains]);
		if (!err) {
			pass->nr_drains++;
			n->pass = pass;
		}
		spin_unlock(&n->lock);
	}
	return pass->nr_drains;
}

/**
 * tm_pages_drain_end - put back into service what could not be emptied
 * @pass: the pass
 *
 * Context: never sleeps. Return: how many chunks fell empty.
 */
u32 tm_pages_drain_end(struct tm_pages_pass *pass)
{
	struct tm_node *n = pass->node;
	u32 emptied;

	spin_lock(&n->lock);
	n->pass = NULL;
	for (u32 i = 0; i < pass->nr_drains; i++) {
		struct tm_page_id left;
		unsigned int order;

		/* With nothing left, a drain of half a chunk has done its work. */
		if (!tm_buddy_drain_next(pass->buddy, &pass->drain[i], &left,
					 &order))
			tm_buddy_drain_cancel(pass->buddy, &pass->drain[i]);
	}
	emptied = pass->buddy->emptied - pass->emptied;
	spin_unlock(&n->lock);
	return emptied;
}

/* The drain of the chunk that @run is in, or NULL. */
static const struct tm_buddy_drain *tm_node_drain(struct tm_node *n,
						  const struct tm_run *run)
{
	struct tm_chunk_id id = tm_page_chunk(tm_pools.geometry, run->page);

	lockdep_assert_held(&n->lock);
	for (u32 i = 0; n->pass && i < n->pass->nr_drains; i++)
		if (n->pass->drain[i].id.v == id.v)
			return &n->pass->drain[i];
	return NULL;
}

/**
 * tm_pages_move_begin - find a new place for a run whose chunk is being emptied
 * @from: the run
 * @to: its new place; contents undefined
 *
 * Context: never sleeps; the caller owns @from.
 * Return: 0, -ENOENT when the run may stay, -ENOMEM when there is no room.
 */
int tm_pages_move_begin(const struct tm_run *from, struct tm_run *to)
{
	struct tm_node *n = tm_pools.node[from->node];
	const struct tm_buddy_drain *drain;
	int err = -ENOENT;

	*to = *from;
	spin_lock(&n->lock);
	drain = tm_node_drain(n, from);
	if (drain && !(drain->half &&
		       from->order == tm_buddy_max_order(n->pass->buddy)))
		err = tm_buddy_drain_alloc(n->pass->buddy, drain, from->order,
					   &to->page);
	spin_unlock(&n->lock);
	return err;
}

/* Free the old place of a run that was moved. Context: as tm_pages_free(). */
void tm_pages_move_end(const struct tm_run *from, const struct tm_run *to)
{
	struct tm_node *n = tm_pools.node[from->node];
	bool empty = false;

	spin_lock(&n->lock);
	WARN_ON_ONCE(tm_buddy_drain_moved(tm_node_buddy_of(n, from->page), from->page, to->page,
					  from->order, &empty));
	if (empty)
		empty = tm_node_emptied(n, from->page);
	spin_unlock(&n->lock);
	if (empty)
		tm_node_put(n, tm_page_chunk(tm_pools.geometry, from->page),
			    false);
}

/* The run stays: free the place it was to have. Context: as tm_pages_free(). */
void tm_pages_move_fail(const struct tm_run *from, const struct tm_run *to)
{
	struct tm_node *n = tm_pools.node[from->node];
	const struct tm_buddy_drain *drain;

	spin_lock(&n->lock);
	drain = tm_node_drain(n, from);
	if (drain)
		tm_buddy_drain_cancel(n->pass->buddy, drain);
	spin_unlock(&n->lock);
	tm_pages_free(to, false);
}

/* Whether @nodes could ever hold @nr_pages. Context: never sleeps. */
bool tm_pages_could_hold(u64 nodes, u64 nr_pages)
{
	struct tm_node *n;
	u64 chunks = 0;

	tm_for_each_node(n)
		if (nodes & BIT_ULL(n->nid))
			chunks += READ_ONCE(n->chunk.capacity);
	return nr_pages <= chunks << tm_pools.geometry.chunk_order;
}

/* A node's part of @chunks, by its memory; the parts of all nodes add up. */
static u32 tm_node_share(const struct tm_node *n, u32 chunks)
{
	u64 below = (u64)chunks * n->slots_below;
	u64 with = below + (u64)chunks * n->chunk.nr_slots;

	return div_u64(with, tm_pools.slots) - div_u64(below, tm_pools.slots);
}

/**
 * tm_pages_set_capacity - bound what the pools may hold
 * @chunks: the new bound, shared among the nodes by their memory
 *
 * Free chunks above it go to the system at once, others as they are freed.
 *
 * Context: may sleep. Return: 0, -EINVAL above what the machine could hold.
 */
int tm_pages_set_capacity(u32 chunks)
{
	struct tm_node *n;

	if (chunks > tm_pools.slots)
		return -EINVAL;
	tm_for_each_node(n) {
		spin_lock(&n->lock);
		WRITE_ONCE(n->chunk.capacity, tm_node_share(n, chunks));
		spin_unlock(&n->lock);
		tm_node_trim_to_capacity(n);
	}
	return 0;
}

/**
 * tm_pages_set_reserve - how many zeroed chunks to keep ready
 * @chunks: the new reserve, shared among the nodes by their memory
 *
 * Filled in the background; a smaller reserve goes to the system at once.
 *
 * Context: may sleep. Return: 0, -EINVAL above the capacity.
 */
int tm_pages_set_reserve(u32 chunks)
{
	struct tm_pages_stats stats;
	struct tm_node *n;

	tm_pages_stats(U64_MAX, &stats);
	if (chunks > stats.capacity)
		return -EINVAL;
	tm_for_each_node(n) {
		u32 share = tm_node_share(n, chunks);
		bool shrink;

		spin_lock(&n->lock);
		shrink = share < n->chunk.reserve;
		n->chunk.reserve = share;
		spin_unlock(&n->lock);
		if (shrink)
			tm_node_trim(n, U32_MAX, false);
		tm_node_kick(n);
	}
	return 0;
}

/**
 * tm_pages_trim - give free chunks to the system, at last those of the reserve
 * @bytes: how much; rounded up to chunks
 *
 * Context: any that may free pages; no lock of ours but those outside of tm_node::lock.
 */
void tm_pages_trim(u64 bytes)
{
	u64 most = (bytes >> TM_CHUNK_SHIFT) +
		   !!(bytes & (TM_CHUNK_SIZE - 1));
	struct tm_node *n;

	/* What no node has to keep goes before what some node keeps ready. */
	for (u32 reserve = 0; reserve < 2; reserve++)
		tm_for_each_node(n)
			most -= tm_node_trim(n, min(most, (u64)U32_MAX),
					     reserve);
}

/**
 * tm_pages_set_floor - what the system is to have before the reserve grows
 * @bytes: of available memory
 *
 * Context: any.
 */
void tm_pages_set_floor(u64 bytes)
{
	WRITE_ONCE(tm_pools.floor, bytes >> PAGE_SHIFT);
}

/* There may be memory again for a reserve that is not full. Context: any. */
void tm_pages_refill(void)
{
	struct tm_node *n;

	tm_for_each_node(n)
		tm_node_kick(n);
}

/* The shrinker counts pages; free chunks above the reserve can go. */
static unsigned long tm_pages_count(struct shrinker *shrinker,
				    struct shrink_control *sc)
{
	unsigned long excess = 0;
	struct tm_node *n;

	tm_for_each_node(n) {
		spin_lock(&n->lock);
		excess += tm_chunk_excess(&n->chunk);
		spin_unlock(&n->lock);
	}
	return excess ? excess << tm_pools.geometry.chunk_order : SHRINK_EMPTY;
}

static unsigned long tm_pages_scan(struct shrinker *shrinker,
				   struct shrink_control *sc)
{
	u32 order = tm_pools.geometry.chunk_order;
	u32 most = DIV_ROUND_UP(sc->nr_to_scan, 1ul << order);
	struct tm_node *n;
	u32 done = 0;

	tm_for_each_node(n)
		done += tm_node_trim(n, most - done, false);
	sc->nr_scanned = (unsigned long)done << order;
	return done ? (unsigned long)done << order : SHRINK_STOP;
}

static void tm_node_destroy(struct tm_node *n)
{
	cancel_work_sync(&n->reserve_work);
	n->chunk.reserve = 0;
	tm_node_trim(n, U32_MAX, false);
	kvfree(n->purpose);
	kvfree(n->page);
	tm_buddy_destroy(&n->charged_buddy);
	tm_buddy_destroy(&n->buddy);
	tm_chunk_pool_destroy(&n->chunk);
	kfree(n);
}

static struct tm_node *__init tm_node_create(int nid, u32 slots)
{
	struct tm_node *n = kzalloc(sizeof(*n), GFP_KERNEL);
	int err;

	if (!n)
		return ERR_PTR(-ENOMEM);
	n->nid = nid;
	n->slots_below = tm_pools.slots;
	spin_lock_init(&n->lock);
	INIT_WORK(&n->reserve_work, tm_node_refill);

	err = tm_chunk_pool_init(&n->chunk, slots, &n->lock);
	if (err)
		goto err_node;
	err = tm_buddy_init(&n->buddy, tm_pools.geometry, slots, &n->lock);
	if (err)
		goto err_chunk;
	err = tm_buddy_init(&n->charged_buddy, tm_pools.geometry, slots,
			    &n->lock);
	if (err)
		goto err_buddy;
	n->page = kvcalloc(slots, sizeof(*n->page), GFP_KERNEL);
	if (!n->page) {
		err = -ENOMEM;
		goto err_charged;
	}
	n->purpose = kvcalloc(slots, sizeof(*n->purpose), GFP_KERNEL);
	if (!n->purpose) {
		err = -ENOMEM;
		goto err_page;
	}
	return n;

err_page:
	kvfree(n->page);
err_charged:
	tm_buddy_destroy(&n->charged_buddy);
err_buddy:
	tm_buddy_destroy(&n->buddy);
err_chunk:
	tm_chunk_pool_destroy(&n->chunk);
err_node:
	kfree(n);
	return ERR_PTR(err);
}

static void tm_nodes_destroy(void)
{
	for (unsigned int i = 0; i < TM_MAX_NODES; i++)
		if (tm_pools.node[i])
			tm_node_destroy(tm_pools.node[i]);
}

static int __init tm_nodes_create(void)
{
	u64 present = 0, ram = totalram_pages();
	int nid;

	for_each_node_state(nid, N_MEMORY)
		present += node_present_pages(nid);
	for_each_node_state(nid, N_MEMORY) {
		/* What firmware and kernel keep for themselves is not ours to count. */
		u64 pages = div64_u64(ram * node_present_pages(nid), present);
		u32 slots = pages >> tm_pools.geometry.chunk_order;
		struct tm_node *n;

		if (nid >= TM_MAX_NODES || !slots)
			continue;
		n = tm_node_create(nid, slots);
		if (IS_ERR(n)) {
			tm_nodes_destroy();
			return PTR_ERR(n);
		}
		tm_pools.node[nid] = n;
		tm_pages_node_mask |= BIT_ULL(nid);
		tm_pools.slots += slots;
	}
	return tm_pools.slots ? 0 : -ENOMEM;
}

static void __init tm_pages_defaults(void)
{
	const struct tm_board *board = tm_board();
	u64 chunks = div_u64((u64)tm_pools.slots * TM_DEFAULT_CAPACITY_PERCENT,
			     100);
	u32 ready;

	/* Arenas of the RT pool are made of chunks as well. */
	if (board->matched)
		chunks = (board->model + board->protocol) >> TM_CHUNK_SHIFT;
	if (capacity)
		chunks = capacity;
	chunks = min_t(u64, chunks, tm_pools.slots);
	ready = min_t(u32, TM_DEFAULT_RESERVE_CHUNKS,
		      (u32)chunks / TM_DEFAULT_RESERVE_DIVISOR);
	if (reserve >= 0)
		ready = min_t(u32, reserve, chunks);
	WARN_ON(tm_pages_set_capacity(chunks));
	WARN_ON(tm_pages_set_reserve(ready));
}

int __init tm_pages_init(void)
{
	int err;

	tm_pools.geometry = tm_geometry(PAGE_SHIFT);
	err = tm_nodes_create();
	if (err)
		return err;
	tm_pools.shrinker = tm_shrinker_register("tensormem-chunk",
						 tm_chunk_pages(tm_pools.geometry),
						 tm_pages_count, tm_pages_scan);
	if (!tm_pools.shrinker) {
		tm_nodes_destroy();
		return -ENOMEM;
	}
	tm_pages_defaults();
	return 0;
}

/* Nobody holds memory any more: the last client has gone before the module. */
void tm_pages_exit(void)
{
	tm_shrinker_unregister(tm_pools.shrinker);
	tm_nodes_destroy();
}
