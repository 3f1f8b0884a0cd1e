// SPDX-License-Identifier: GPL-2.0-only
/*
 * The slab beside the kernel's own, in one run.
 *
 * Reading /sys/kernel/debug/tm_check_slab checks the calls, on all CPUs at once
 * too, and says "ok". Reading /sys/kernel/debug/tm_bench_slab measures them and
 * gives a line per row:
 *
 *     NAME OURS PEER
 *
 * in nanoseconds per allocation and free, the bulk rows for the whole bulk. They
 * mean something where time counts instructions (the guest's --icount). Lines that
 * start with # are for the reader: other numbers of live objects, and the median
 * and worst of single operations, without the time of reading the clock.
 */
#include <linux/atomic.h>
#include <linux/cache.h>
#include <linux/completion.h>
#include <linux/cpu.h>
#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/prandom.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/tensormem.h>
#include <linux/vmalloc.h>

#include "tm_histogram.h"

#define TM_BENCH_SIZE		256
#define TM_BENCH_LIVE		64	/* objects held at a time */
#define TM_BENCH_OBJECTS	400000	/* of a row: over many ticks of the clock */
#define TM_BENCH_BULK		16
#define TM_BENCH_MOST		2048
#define TM_BENCH_SINGLES	1000000
#define TM_CHECK_SLOTS		256
#define TM_CHECK_STEPS		20000

struct tm_bench {
	struct tensormem_slab *slab;
	struct kmem_cache *cache;
	void *object[TM_BENCH_MOST];
	struct tm_histogram histogram;
};

static struct dentry *tm_bench_file;
static struct dentry *tm_check_file;

/* Filled with what tells it from all others, and looked at before the free. */
static void tm_check_fill(u32 *object, size_t size, u32 stamp)
{
	for (size_t i = 0; i < size / sizeof(*object); i++)
		object[i] = stamp;
}

static bool tm_check_filled(const u32 *object, size_t size, u32 stamp)
{
	for (size_t i = 0; i < size / sizeof(*object); i++)
		if (object[i] != stamp)
			return false;
	return true;
}

/* Every object where it may be, none on top of another, zeroed if asked for. */
static int tm_check_size(struct tm_bench *b, size_t size, unsigned int flags)
{
	size_t line = cache_line_size();
	struct tensormem_slab *slab;
	int err = 0;

	slab = tensormem_slab_create(size, flags);
	if (IS_ERR(slab))
		return PTR_ERR(slab);
	for (u32 round = 0; round < 2 && !err; round++) {
		err = tensormem_slab_alloc_bulk(slab, b->object,
						TM_BENCH_MOST / 2);
		if (err)
			break;
		for (u32 i = TM_BENCH_MOST / 2; i < TM_BENCH_MOST; i++) {
			b->object[i] = tensormem_slab_alloc(slab);
			if (WARN_ON(!b->object[i])) {
				err = -ENOMEM;
				goto out;
			}
		}
		for (u32 i = 0; i < TM_BENCH_MOST; i++) {
			size_t offset = (unsigned long)b->object[i] % line;

			if (WARN_ON(size >= line ? offset : offset + size > line) ||
			    WARN_ON(flags && !tm_check_filled(b->object[i],
							      size, 0)))
				err = -EIO;
			tm_check_fill(b->object[i], size, ~i);
		}
		for (u32 i = 0; i < TM_BENCH_MOST; i++)
			if (WARN_ON(!tm_check_filled(b->object[i], size, ~i)))
				err = -EIO;
		for (u32 i = 0; i < TM_BENCH_MOST / 2; i++)
			tensormem_slab_free(slab, b->object[i]);
		tensormem_slab_free_bulk(slab, &b->object[TM_BENCH_MOST / 2],
					 TM_BENCH_MOST / 2);
	}
out:
	tensormem_slab_destroy(slab);
	return err;
}

static int tm_check_refusals(void)
{
	if (WARN_ON(PTR_ERR(tensormem_slab_create(0, 0)) != -EINVAL) ||
	    WARN_ON(PTR_ERR(tensormem_slab_create(PAGE_SIZE, 0)) != -EINVAL) ||
	    WARN_ON(PTR_ERR(tensormem_slab_create(8, ~0u)) != -EINVAL))
		return -EIO;
	return 0;
}

/* Threads that free what another CPU allocated, through slots they share. */
struct tm_check_all {
	struct tensormem_slab *slab;
	u32 *slot[TM_CHECK_SLOTS];
	atomic_t threads;
	atomic_t errors;
	struct completion done;
};

static int tm_check_thread(void *data)
{
	struct tm_check_all *all = data;

	for (u32 step = 0; step < TM_CHECK_STEPS; step++) {
		u32 **slot = &all->slot[get_random_u32() % TM_CHECK_SLOTS];
		u32 *object = NULL;

		if (step % 2) {
			object = tensormem_slab_alloc(all->slab);
			if (object)
				tm_check_fill(object, TM_BENCH_SIZE,
					      (u32)(unsigned long)object);
		}
		object = xchg(slot, object);
		if (!object)
			continue;
		if (!tm_check_filled(object, TM_BENCH_SIZE,
				     (u32)(unsigned long)object))
			atomic_inc(&all->errors);
		tensormem_slab_free(all->slab, object);
		cond_resched();
	}
	if (atomic_dec_and_test(&all->threads))
		complete(&all->done);
	return 0;
}

static int tm_check_all_cpus(void)
{
	struct tm_check_all *all = kzalloc(sizeof(*all), GFP_KERNEL);
	unsigned int cpu;
	int err = 0;

	if (!all)
		return -ENOMEM;
	all->slab = tensormem_slab_create(TM_BENCH_SIZE, 0);
	if (IS_ERR(all->slab)) {
		err = PTR_ERR(all->slab);
		goto out;
	}
	init_completion(&all->done);
	atomic_set(&all->threads, 1);
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		struct task_struct *task;

		task = kthread_create_on_cpu(tm_check_thread, all, cpu,
					     "tm_check/%u");
		if (IS_ERR(task)) {
			err = PTR_ERR(task);
			break;
		}
		atomic_inc(&all->threads);
		wake_up_process(task);
	}
	cpus_read_unlock();
	if (!atomic_dec_and_test(&all->threads))
		wait_for_completion(&all->done);
	for (u32 i = 0; i < TM_CHECK_SLOTS; i++)
		if (all->slot[i])
			tensormem_slab_free(all->slab, all->slot[i]);
	tensormem_slab_destroy(all->slab);
	if (WARN_ON(atomic_read(&all->errors)))
		err = -EIO;
out:
	kfree(all);
	return err;
}

static int tm_check_show(struct seq_file *m, void *unused)
{
	static const size_t sizes[] = { 8, 16, 32, 64, 192, 256, 1152, 2048, 3840 };
	struct tm_bench *b = kvzalloc(sizeof(*b), GFP_KERNEL);
	int err;

	if (!b)
		return -ENOMEM;
	err = tm_check_refusals();
	for (u32 i = 0; i < ARRAY_SIZE(sizes) && !err; i++)
		err = tm_check_size(b, sizes[i], 0) ?:
		      tm_check_size(b, sizes[i], TENSORMEM_ZEROED);
	err = err ?: tm_check_all_cpus();
	if (!err)
		seq_puts(m, "ok\n");
	kvfree(b);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(tm_check);

static int tm_bench_ours(struct tm_bench *b, u32 live)
{
	u32 i;

	for (i = 0; i < live; i++) {
		b->object[i] = tensormem_slab_alloc(b->slab);
		if (!b->object[i])
			break;
	}
	live -= i;
	while (i--)
		tensormem_slab_free(b->slab, b->object[i]);
	return live ? -ENOMEM : 0;
}

static int tm_bench_peer(struct tm_bench *b, u32 live)
{
	u32 i;

	for (i = 0; i < live; i++) {
		b->object[i] = kmem_cache_alloc(b->cache, GFP_KERNEL);
		if (!b->object[i])
			break;
	}
	live -= i;
	while (i--)
		kmem_cache_free(b->cache, b->object[i]);
	return live ? -ENOMEM : 0;
}

/* @live objects as bulks, all allocated and then all freed. */
static int tm_bench_ours_bulk(struct tm_bench *b, u32 live)
{
	int err = 0;
	u32 i;

	for (i = 0; i < live && !err; i += TM_BENCH_BULK)
		err = tensormem_slab_alloc_bulk(b->slab, &b->object[i],
						TM_BENCH_BULK);
	if (err)
		i -= TM_BENCH_BULK;
	while (i) {
		i -= TM_BENCH_BULK;
		tensormem_slab_free_bulk(b->slab, &b->object[i], TM_BENCH_BULK);
	}
	return err;
}

static int tm_bench_peer_bulk(struct tm_bench *b, u32 live)
{
	bool failed = false;
	u32 i;

	for (i = 0; i < live && !failed; i += TM_BENCH_BULK)
		failed = !kmem_cache_alloc_bulk(b->cache, GFP_KERNEL,
						TM_BENCH_BULK, &b->object[i]);
	if (failed)
		i -= TM_BENCH_BULK;
	while (i) {
		i -= TM_BENCH_BULK;
		kmem_cache_free_bulk(b->cache, TM_BENCH_BULK, &b->object[i]);
	}
	return failed ? -ENOMEM : 0;
}

static int tm_bench_row(struct seq_file *m, struct tm_bench *b, const char *name,
			u32 live, u32 bulk)
{
	/* Few objects many times, so that reading the clock does not count. */
	u32 times = max(TM_BENCH_LIVE / live, 1u);
	u32 rounds = TM_BENCH_OBJECTS / (times * live);
	u32 per = rounds * times * live / bulk;
	u64 ours = 0, peer = 0;

	/* Round 0 warms both up: their caches fill and they get their slabs. */
	for (u32 round = 0; round <= rounds; round++) {
		u64 start = ktime_get_ns(), middle;
		int err = 0;

		for (u32 i = 0; i < times && !err; i++)
			err = bulk > 1 ? tm_bench_ours_bulk(b, live) :
					 tm_bench_ours(b, live);
		middle = ktime_get_ns();
		for (u32 i = 0; i < times && !err; i++)
			err = bulk > 1 ? tm_bench_peer_bulk(b, live) :
					 tm_bench_peer(b, live);
		if (err)
			return err;
		if (!round)
			continue;
		ours += middle - start;
		peer += ktime_get_ns() - middle;
	}
	seq_printf(m, "%s %llu %llu\n", name, div_u64(ours, per),
		   div_u64(peer, per));
	return 0;
}

/* Allocations and frees as they come, each timed: with @peer by the kernel's own. */
static int tm_bench_singles(struct seq_file *m, struct tm_bench *b, bool peer)
{
	struct tm_histogram *h = &b->histogram;
	struct rnd_state random;

	tm_histogram_init(h);
	prandom_seed_state(&random, 1);
	memset(b->object, 0, sizeof(b->object));
	for (u32 step = 0; step < TM_BENCH_SINGLES; step++) {
		void **at = &b->object[prandom_u32_state(&random) %
				       TM_BENCH_MOST];
		u64 start = ktime_get_ns();

		if (*at) {
			if (peer)
				kmem_cache_free(b->cache, *at);
			else
				tensormem_slab_free(b->slab, *at);
			*at = NULL;
		} else {
			*at = peer ? kmem_cache_alloc(b->cache, GFP_KERNEL) :
				     tensormem_slab_alloc(b->slab);
			if (!*at)
				return -ENOMEM;
		}
		tm_histogram_add(h, start);
	}
	for (u32 i = 0; i < TM_BENCH_MOST; i++) {
		if (!b->object[i])
			continue;
		if (peer)
			kmem_cache_free(b->cache, b->object[i]);
		else
			tensormem_slab_free(b->slab, b->object[i]);
	}
	seq_printf(m, "# %s median %u worst %llu\n",
		   peer ? "kmem_cache-256" : "slab-256",
		   tm_histogram_median(h), h->worst);
	return 0;
}

static int tm_bench_rows(struct seq_file *m, struct tm_bench *b)
{
	return tm_bench_row(m, b, "slab-256", TM_BENCH_LIVE, 1) ?:
	       tm_bench_row(m, b, "slab-256-bulk16", TM_BENCH_LIVE,
			    TM_BENCH_BULK) ?:
	       tm_bench_row(m, b, "# slab-256 1 live:", 1, 1) ?:
	       tm_bench_row(m, b, "# slab-256 2048 live:", TM_BENCH_MOST, 1) ?:
	       tm_bench_row(m, b, "# slab-256-bulk16 2048 live:", TM_BENCH_MOST,
			    TM_BENCH_BULK) ?:
	       tm_bench_singles(m, b, false) ?: tm_bench_singles(m, b, true);
}

static int tm_bench_show(struct seq_file *m, void *unused)
{
	struct tm_bench *b = kvzalloc(sizeof(*b), GFP_KERNEL);
	int err = -ENOMEM;

	if (!b)
		return -ENOMEM;
	b->cache = kmem_cache_create("tm_bench_slab", TM_BENCH_SIZE, 0,
				     SLAB_HWCACHE_ALIGN, NULL);
	if (!b->cache)
		goto out;
	b->slab = tensormem_slab_create(TM_BENCH_SIZE, 0);
	if (IS_ERR(b->slab)) {
		err = PTR_ERR(b->slab);
		goto out_cache;
	}
	/* The work of other threads waits its turn instead of being timed. */
	sched_set_fifo(current);
	err = tm_bench_rows(m, b);
	sched_set_normal(current, 0);
	tensormem_slab_destroy(b->slab);
out_cache:
	kmem_cache_destroy(b->cache);
out:
	kvfree(b);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(tm_bench);

static int __init tm_bench_init(void)
{
	tm_bench_file = debugfs_create_file("tm_bench_slab", 0400, NULL, NULL,
					    &tm_bench_fops);
	tm_check_file = debugfs_create_file("tm_check_slab", 0400, NULL, NULL,
					    &tm_check_fops);
	return PTR_ERR_OR_ZERO(tm_bench_file);
}

static void __exit tm_bench_exit(void)
{
	debugfs_remove(tm_check_file);
	debugfs_remove(tm_bench_file);
}

module_init(tm_bench_init);
module_exit(tm_bench_exit);

MODULE_DESCRIPTION("tensormem's slab beside the kernel's own");
MODULE_LICENSE("GPL");
