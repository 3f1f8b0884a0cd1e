// SPDX-License-Identifier: GPL-2.0-only
/*
 * Runs kept for each CPU in front of the buddy pool: a module that frees a run and
 * soon takes another finds it here, without the pool's lock, without splitting and
 * merging. What is kept is bounded in pages, and given up when memory is short. The
 * same lock counts what is in use, which costs nothing more here.
 *
 * tm_runcache::lock nests inside everything; it is contended only by who drains.
 */
#include <linux/cpumask.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/spinlock.h>
#include <linux/topology.h>
#include <uapi/linux/tensormem.h>

#include "compat.h"
#include "pages.h"
#include "runcache.h"

/* Runs of one order: what a burst of a driver takes. */
#define TM_RUNCACHE_RUNS	64
/* At most eight chunks a CPU, and all together no more than this part of the RAM. */
#define TM_RUNCACHE_CHUNKS	8
#define TM_RUNCACHE_RAM		64

/**
 * struct tm_runcache - what one CPU keeps
 * @lock: guards what follows
 * @pages: pages in all runs
 * @nr: runs by order
 * @used: pages that modules have, by enum tensormem_kind; they may be freed on another
 *        CPU than they were taken on, so that only the sum means something
 * @run: the runs, the last one in first out
 */
struct tm_runcache {
	spinlock_t lock;
	u32 pages;
	u8 nr[TM_MAX_CHUNK_ORDER];
	s64 used[TENSORMEM_KIND_PROTOCOL + 1];
	struct tm_run run[TM_MAX_CHUNK_ORDER][TM_RUNCACHE_RUNS];
};

static struct tm_runcache __percpu *tm_runcaches;
static u32 tm_runcache_limit;	/* pages a CPU may keep */
static struct tm_shrinker *tm_runcache_shrinker;

static bool tm_runcache_pop(struct tm_runcache *c, unsigned int order,
			    struct tm_run *run)
{
	lockdep_assert_held(&c->lock);
	if (!c->nr[order])
		return false;
	*run = c->run[order][--c->nr[order]];
	c->pages -= 1u << order;
	return true;
}

/* Return: whether there is room; @others: there would be without other orders. */
static bool tm_runcache_push(struct tm_runcache *c, const struct tm_run *run,
			     bool *others)
{
	u32 nr = c->nr[run->order], pages = 1u << run->order;

	lockdep_assert_held(&c->lock);
	*others = false;
	if (nr == TM_RUNCACHE_RUNS)
		return false;
	if (c->pages + pages > tm_runcache_limit) {
		*others = c->pages > nr << run->order;
		return false;
	}
	c->run[run->order][nr] = *run;
	c->nr[run->order] = nr + 1;
	c->pages += pages;
	return true;
}

/**
 * tm_runcache_take - count a run as in use, and take it from here if there is one
 * @order: log2 of its pages
 * @kind: enum tensormem_kind
 * @keeps: the run may be one that a CPU keeps; @order is below a chunk then
 * @run: filled in on success; contents undefined
 *
 * Context: process context. Return: whether there was one.
 */
bool tm_runcache_take(unsigned int order, u32 kind, bool keeps,
		      struct tm_run *run)
{
	struct tm_runcache *c = raw_cpu_ptr(tm_runcaches);
	bool found;

	spin_lock(&c->lock);
	c->used[kind] += 1 << order;
	found = keeps && tm_runcache_pop(c, order, run);
	spin_unlock(&c->lock);
	return found;
}

/* There was no such run elsewhere either. Context: process context. */
void tm_runcache_untake(unsigned int order, u32 kind)
{
	struct tm_runcache *c = raw_cpu_ptr(tm_runcaches);

	spin_lock(&c->lock);
	c->used[kind] -= 1 << order;
	spin_unlock(&c->lock);
}

/* Free the largest run that is not of @order. Return: whether there was one. */
static bool tm_runcache_evict(struct tm_runcache *c, unsigned int order)
{
	struct tm_run run;
	bool found = false;

	spin_lock(&c->lock);
	for (int o = TM_MAX_CHUNK_ORDER - 1; o >= 0 && !found; o--)
		found = o != order && tm_runcache_pop(c, o, &run);
	spin_unlock(&c->lock);
	if (found)
		tm_pages_free(&run, false);
	return found;
}

/**
 * tm_runcache_put - count a run as no longer in use, and keep it if there is room
 * @run: the run
 * @kind: enum tensormem_kind
 * @keeps: it may be kept: unmovable, below a chunk, not asked for with ACCOUNT
 *
 * What is freed now is wanted again sooner than what was freed before: runs of other
 * orders make room for it.
 *
 * Context: process context; may call the page allocator to free.
 * Return: whether it was kept; if not, it is the caller's.
 */
bool tm_runcache_put(const struct tm_run *run, u32 kind, bool keeps)
{
	struct tm_runcache *c = raw_cpu_ptr(tm_runcaches);
	bool kept = false, others = false;

	/* Who takes it wants memory of its own node. */
	keeps = keeps && run->node == numa_node_id();
	spin_lock(&c->lock);
	c->used[kind] -= 1 << run->order;
	if (keeps)
		kept = tm_runcache_push(c, run, &others);
	spin_unlock(&c->lock);
	while (others && tm_runcache_evict(c, run->order)) {
		spin_lock(&c->lock);
		kept = tm_runcache_push(c, run, &others);
		spin_unlock(&c->lock);
	}
	return kept;
}

static u64 tm_runcache_drain_order(struct tm_runcache *c, unsigned int order)
{
	struct tm_run run;
	u64 pages = 0;
	bool found;

	do {
		spin_lock(&c->lock);
		found = tm_runcache_pop(c, order, &run);
		spin_unlock(&c->lock);
		if (found) {
			tm_pages_free(&run, false);
			pages += 1u << order;
		}
	} while (found);
	return pages;
}

/* Give back what all CPUs keep. Context: may sleep. Return: how many pages. */
u64 tm_runcache_drain(void)
{
	u64 pages = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		for (unsigned int o = 0; o < TM_MAX_CHUNK_ORDER; o++)
			pages += tm_runcache_drain_order(per_cpu_ptr(tm_runcaches,
								     cpu), o);
	return pages;
}

/* Pages that all CPUs keep. Context: any. */
u64 tm_runcache_pages(void)
{
	u64 pages = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		pages += READ_ONCE(per_cpu_ptr(tm_runcaches, cpu)->pages);
	return pages;
}

/* Pages that modules have for @kind. Context: any. */
u64 tm_runcache_used(u32 kind)
{
	s64 pages = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		pages += READ_ONCE(per_cpu_ptr(tm_runcaches, cpu)->used[kind]);
	return pages;
}

static unsigned long tm_runcache_count(struct shrinker *shrinker,
				       struct shrink_control *sc)
{
	return tm_runcache_pages() ?: SHRINK_EMPTY;
}

static unsigned long tm_runcache_scan(struct shrinker *shrinker,
				      struct shrink_control *sc)
{
	unsigned long pages = tm_runcache_drain();

	sc->nr_scanned = pages;
	return pages ?: SHRINK_STOP;
}

int __init tm_runcache_init(void)
{
	u64 share = div_u64(totalram_pages() / TM_RUNCACHE_RAM,
			    num_possible_cpus());
	int cpu;

	tm_runcache_limit = min_t(u64, share, TM_RUNCACHE_CHUNKS *
				  tm_chunk_pages(tm_pages_geometry()));
	tm_runcaches = alloc_percpu(struct tm_runcache);
	if (!tm_runcaches)
		return -ENOMEM;
	for_each_possible_cpu(cpu)
		spin_lock_init(&per_cpu_ptr(tm_runcaches, cpu)->lock);
	tm_runcache_shrinker = tm_shrinker_register("tensormem-runs", 0,
						    tm_runcache_count,
						    tm_runcache_scan);
	if (!tm_runcache_shrinker) {
		free_percpu(tm_runcaches);
		return -ENOMEM;
	}
	return 0;
}

/* No module that could use it is left. */
void tm_runcache_exit(void)
{
	tm_shrinker_unregister(tm_runcache_shrinker);
	tm_runcache_drain();
	free_percpu(tm_runcaches);
}
