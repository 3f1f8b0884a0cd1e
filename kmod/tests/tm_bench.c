// SPDX-License-Identifier: GPL-2.0-only
/*
 * Benchmarks of the in-kernel API beside the kernel's own allocators, in one run.
 *
 * Reading /sys/kernel/debug/tm_bench runs them and gives a line per row:
 *
 *     NAME OURS PEER
 *
 * in nanoseconds per allocation and free. Lines that start with # are for the reader:
 * the median and the worst of single operations. They mean something where time counts
 * instructions (the guest's --icount). The reader needs the reserve filled with
 * TM_BENCH_CHUNKS zeroed chunks for the chunk row.
 */
#include <linux/debugfs.h>
#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/numa.h>
#include <linux/prandom.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/tensormem.h>

#include "tm_histogram.h"

#define TM_BENCH_ROUNDS		100
#define TM_BENCH_LIVE		64	/* allocations held at a time */
#define TM_BENCH_CHUNKS		32
#define TM_BENCH_SINGLES	1000000
#define TM_BENCH_MOST		1024	/* allocations of mixed orders held */
#define TM_BENCH_MIX		5	/* of orders 0 to 4 */
#define TM_BENCH_TOP_ORDER	ilog2(SZ_1M >> PAGE_SHIFT)

static struct dentry *tm_bench_file;

struct tm_bench {
	struct tensormem_run run[TM_BENCH_LIVE];
	struct page *page[TM_BENCH_LIVE];
	struct tm_histogram histogram;
	struct {
		struct tensormem_run run;
		struct page *page;
		u32 order;
	} mixed[TM_BENCH_MOST];
};



static int tm_bench_ours(struct tm_bench *b, unsigned int count,
			 unsigned int order, unsigned int flags)
{
	unsigned int i;
	int err = 0;

	for (i = 0; i < count && !err; i++)
		err = tensormem_alloc(&b->run[i], TENSORMEM_KIND_ACTIVATIONS,
				      PAGE_SIZE << order, NUMA_NO_NODE, flags);
	if (err)
		i--;
	while (i)
		tensormem_free(&b->run[--i]);
	return err;
}

static int tm_bench_peer(struct tm_bench *b, unsigned int count,
			 unsigned int order, gfp_t gfp)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		b->page[i] = alloc_pages(gfp, order);
		if (!b->page[i])
			break;
	}
	count -= i;
	while (i--)
		__free_pages(b->page[i], order);
	return count ? -ENOMEM : 0;
}

static int tm_bench_order(struct seq_file *m, struct tm_bench *b,
			  unsigned int order)
{
	u64 ours = 0, peer = 0;

	/* Round 0 warms both up: their caches fill and their chunks split. */
	for (int round = 0; round <= TM_BENCH_ROUNDS; round++) {
		u64 start = ktime_get_ns(), middle;
		int err;

		err = tm_bench_ours(b, TM_BENCH_LIVE, order, 0);
		middle = ktime_get_ns();
		err = err ?: tm_bench_peer(b, TM_BENCH_LIVE, order, GFP_KERNEL);
		if (err)
			return err;
		if (!round)
			continue;
		ours += middle - start;
		peer += ktime_get_ns() - middle;
	}
	seq_printf(m, "buddy-o%u %llu %llu\n", order,
		   div_u64(ours, TM_BENCH_ROUNDS * TM_BENCH_LIVE),
		   div_u64(peer, TM_BENCH_ROUNDS * TM_BENCH_LIVE));
	return 0;
}

/* One round: the reserve is refilled in the background, not while we measure. */
static int tm_bench_chunk(struct seq_file *m, struct tm_bench *b)
{
	unsigned int order = ilog2(SZ_2M >> PAGE_SHIFT);
	u64 start = ktime_get_ns(), middle;
	int err;

	err = tm_bench_ours(b, TM_BENCH_CHUNKS, order, TENSORMEM_ZEROED);
	middle = ktime_get_ns();
	err = err ?: tm_bench_peer(b, TM_BENCH_CHUNKS, order,
				   GFP_KERNEL | __GFP_ZERO);
	if (err)
		return err;
	seq_printf(m, "chunk-2m %llu %llu\n",
		   div_u64(middle - start, TM_BENCH_CHUNKS),
		   div_u64(ktime_get_ns() - middle, TM_BENCH_CHUNKS));
	return 0;
}

static int tm_bench_single(struct tm_bench *b, u32 i, u32 order, bool peer)
{
	struct tm_histogram *h = &b->histogram;
	u64 start = ktime_get_ns();
	int err = 0;

	if (b->mixed[i].page) {
		if (peer)
			__free_pages(b->mixed[i].page, b->mixed[i].order);
		else
			tensormem_free(&b->mixed[i].run);
		tm_histogram_add(h, start);
		b->mixed[i].page = NULL;
		return 0;
	}
	if (peer) {
		b->mixed[i].page = alloc_pages(GFP_KERNEL, order);
	} else {
		err = tensormem_alloc(&b->mixed[i].run,
				      TENSORMEM_KIND_ACTIVATIONS,
				      PAGE_SIZE << order, NUMA_NO_NODE, 0);
		if (!err)
			b->mixed[i].page = b->mixed[i].run.page;
	}
	tm_histogram_add(h, start);
	b->mixed[i].order = order;
	return b->mixed[i].page ? 0 : -ENOMEM;
}

/* Allocations and frees as they come, each timed: with @peer by the kernel's own. */
static int tm_bench_singles(struct seq_file *m, struct tm_bench *b, bool peer)
{
	struct rnd_state random;
	int err = 0;

	tm_histogram_init(&b->histogram);
	prandom_seed_state(&random, 1);
	memset(b->mixed, 0, sizeof(b->mixed));
	for (u32 step = 0; step < TM_BENCH_SINGLES && !err; step++)
		err = tm_bench_single(b, prandom_u32_state(&random) %
					 TM_BENCH_MOST,
				      prandom_u32_state(&random) %
				      TM_BENCH_MIX, peer);
	if (!err)
		seq_printf(m, "# %s median %u worst %llu\n",
			   peer ? "alloc_pages-mixed" : "buddy-mixed",
			   tm_histogram_median(&b->histogram),
			   b->histogram.worst);
	for (u32 i = 0; i < TM_BENCH_MOST; i++)
		if (b->mixed[i].page && tm_bench_single(b, i, 0, peer))
			break;
	return err;
}

static int tm_bench_show(struct seq_file *m, void *unused)
{
	struct tm_bench *b = kvmalloc(sizeof(*b), GFP_KERNEL);
	int err;

	if (!b)
		return -ENOMEM;
	/* Background zeroing waits its turn instead of being timed as ours. */
	sched_set_fifo(current);
	err = tm_bench_chunk(m, b);
	for (unsigned int order = 0; order <= TM_BENCH_TOP_ORDER && !err; order++)
		err = tm_bench_order(m, b, order);
	err = err ?: tm_bench_singles(m, b, false);
	err = err ?: tm_bench_singles(m, b, true);
	sched_set_normal(current, 0);
	kvfree(b);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(tm_bench);

static int __init tm_bench_init(void)
{
	tm_bench_file = debugfs_create_file("tm_bench", 0400, NULL, NULL,
					    &tm_bench_fops);
	return PTR_ERR_OR_ZERO(tm_bench_file);
}

static void __exit tm_bench_exit(void)
{
	debugfs_remove(tm_bench_file);
}

module_init(tm_bench_init);
module_exit(tm_bench_exit);

MODULE_DESCRIPTION("tensormem beside the kernel's own allocators");
MODULE_LICENSE("GPL");
