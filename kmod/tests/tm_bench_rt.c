// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RT pool beside what the kernel has for callers that must not wait, in one run.
 *
 * Reading /sys/kernel/debug/tm_bench_rt runs the same trace through each: blocks of random sizes, allocated and freed one at a
 * time at nine tenths of an arena. It gives a line per row:
 *
 *     NAME OURS PEER
 *
 * worst-over-median is of single operations, the worse of allocations and frees; worst-insns is the longest allocation in nanoseconds, which are
 * instructions where time counts these (the guest's --icount). The peer is kmalloc(GFP_ATOMIC). Lines that start with # are for the
 * reader: median and worst of all three allocators, without the time of reading the clock.
 *
 * An operation that a hard interrupt came into is not counted, with any allocator, but said: its time would be the interrupt's.
 */
#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/kernel_stat.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/prandom.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/tensormem.h>

#include "tm_histogram.h"

#define TM_BENCH_ARENA		SZ_16M
#define TM_BENCH_FULL		(TM_BENCH_ARENA / 10 * 9)
#define TM_BENCH_UNIT		128
#define TM_BENCH_UNITS		128	/* 128 bytes to 16 KiB */
#define TM_BENCH_MOST		8192	/* blocks held at a time */
#define TM_BENCH_STEPS		1000000

enum tm_bench_kind {
	TM_BENCH_RT,
	TM_BENCH_KMALLOC,
	TM_BENCH_PAGES,
	TM_BENCH_KINDS,
};

static const char *const tm_bench_names[] = { "rt", "kmalloc", "alloc_pages" };

struct tm_bench {
	struct tensormem_rt *rt;
	struct tm_histogram alloc;
	struct tm_histogram free;
	u64 interrupted;
	u64 refused;
	size_t held;
	u32 nr;
	struct {
		void *at;
		u32 size;
	} block[TM_BENCH_MOST];
};

/* In thousandths; the two rows of an allocator. */
struct tm_bench_result {
	u64 ratio;
	u64 worst;
};

static struct dentry *tm_bench_file;

static void *tm_bench_take(struct tm_bench *b, enum tm_bench_kind kind,
			   size_t size)
{
	void *at;

	if (kind == TM_BENCH_KMALLOC)
		return kmalloc(size, GFP_ATOMIC | __GFP_NOWARN);
	if (kind == TM_BENCH_PAGES)
		return alloc_pages(GFP_ATOMIC | __GFP_NOWARN, get_order(size));
	at = tensormem_rt_alloc(b->rt, size, 0);
	return IS_ERR(at) ? NULL : at;
}

static void tm_bench_give(struct tm_bench *b, enum tm_bench_kind kind, void *at,
			  size_t size)
{
	if (kind == TM_BENCH_KMALLOC)
		kfree(at);
	else if (kind == TM_BENCH_PAGES)
		__free_pages(at, get_order(size));
	else
		tensormem_rt_free(b->rt, at);
}

/* The thread stays on its CPU: there is one, or it is bound. */
static unsigned long tm_bench_interrupts(void)
{
	return kstat_cpu_irqs_sum(raw_smp_processor_id());
}

static void tm_bench_count(struct tm_bench *b, struct tm_histogram *h,
			   u64 start, unsigned long interrupts)
{
	u64 ns = ktime_get_ns() - start;

	if (tm_bench_interrupts() != interrupts)
		b->interrupted++;
	else
		tm_histogram_count(h, ns);
}

static bool tm_bench_alloc(struct tm_bench *b, enum tm_bench_kind kind,
			   size_t size)
{
	unsigned long interrupts = tm_bench_interrupts();
	u64 start = ktime_get_ns();
	void *at = tm_bench_take(b, kind, size);

	tm_bench_count(b, &b->alloc, start, interrupts);
	if (!at) {
		b->refused++;
		return false;
	}
	b->block[b->nr].at = at;
	b->block[b->nr++].size = size;
	b->held += size;
	return true;
}

static void tm_bench_free(struct tm_bench *b, enum tm_bench_kind kind, u32 i)
{
	u32 size = b->block[i].size;
	unsigned long interrupts = tm_bench_interrupts();
	u64 start = ktime_get_ns();

	tm_bench_give(b, kind, b->block[i].at, size);
	tm_bench_count(b, &b->free, start, interrupts);
	b->held -= size;
	b->block[i] = b->block[--b->nr];
}

static u64 tm_bench_ratio(const struct tm_histogram *h)
{
	return div_u64(h->worst * 1000, max(tm_histogram_median(h), 1u));
}

/* The same trace for each, but for what is refused. */
static struct tm_bench_result tm_bench_run(struct seq_file *m,
					   struct tm_bench *b,
					   enum tm_bench_kind kind)
{
	struct rnd_state random;

	b->interrupted = 0;
	b->refused = 0;
	b->held = 0;
	b->nr = 0;
	prandom_seed_state(&random, 1);
	tm_histogram_init(&b->alloc);
	tm_histogram_init(&b->free);
	for (u32 step = 0; step < TM_BENCH_STEPS; step++) {
		u32 units = 1 + prandom_u32_state(&random) % TM_BENCH_UNITS;
		size_t size = (size_t)units * TM_BENCH_UNIT;
		bool room = b->held + size <= TM_BENCH_FULL &&
			    b->nr < TM_BENCH_MOST;

		/* What is measured is a full arena, not how it fills. */
		if (!room && !b->free.count) {
			tm_histogram_init(&b->alloc);
			b->interrupted = 0;
		}
		if (!room || !tm_bench_alloc(b, kind, size))
			tm_bench_free(b, kind,
				      prandom_u32_state(&random) % b->nr);
		if (!(step % 1024))
			cond_resched();
	}
	seq_printf(m, "# %s: alloc median %u worst %llu, free median %u worst %llu; %llu refused, %llu interrupted\n",
		   tm_bench_names[kind], tm_histogram_median(&b->alloc),
		   b->alloc.worst, tm_histogram_median(&b->free),
		   b->free.worst, b->refused, b->interrupted);
	while (b->nr--)
		tm_bench_give(b, kind, b->block[b->nr].at,
			      b->block[b->nr].size);
	return (struct tm_bench_result){
		.ratio = max(tm_bench_ratio(&b->alloc),
			     tm_bench_ratio(&b->free)),
		.worst = b->alloc.worst,
	};
}

static int tm_bench_show(struct seq_file *m, void *unused)
{
	struct tm_bench *b = kvzalloc(sizeof(*b), GFP_KERNEL);
	struct tm_bench_result result[TM_BENCH_KINDS];
	int err = 0;

	if (!b)
		return -ENOMEM;
	b->rt = tensormem_rt_open(TM_BENCH_ARENA, 0);
	if (IS_ERR(b->rt)) {
		err = PTR_ERR(b->rt);
		goto out;
	}
	/* The work of other threads waits its turn instead of being timed. */
	sched_set_fifo(current);
	for (u32 kind = 0; kind < TM_BENCH_KINDS; kind++)
		result[kind] = tm_bench_run(m, b, kind);
	sched_set_normal(current, 0);
	seq_printf(m, "worst-over-median %llu.%03llu %llu.%03llu\n",
		   result[TM_BENCH_RT].ratio / 1000,
		   result[TM_BENCH_RT].ratio % 1000,
		   result[TM_BENCH_KMALLOC].ratio / 1000,
		   result[TM_BENCH_KMALLOC].ratio % 1000);
	seq_printf(m, "worst-insns %llu %llu\n", result[TM_BENCH_RT].worst,
		   result[TM_BENCH_KMALLOC].worst);
	tensormem_rt_close(b->rt);
out:
	kvfree(b);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(tm_bench);

static int __init tm_bench_init(void)
{
	tm_bench_file = debugfs_create_file("tm_bench_rt", 0400, NULL, NULL,
					    &tm_bench_fops);
	return PTR_ERR_OR_ZERO(tm_bench_file);
}

static void __exit tm_bench_exit(void)
{
	debugfs_remove(tm_bench_file);
}

module_init(tm_bench_init);
module_exit(tm_bench_exit);

MODULE_DESCRIPTION("tensormem's RT pool beside the kernel's allocators");
MODULE_LICENSE("GPL");
