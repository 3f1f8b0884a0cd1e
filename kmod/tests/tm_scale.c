// SPDX-License-Identifier: GPL-2.0-only
/*
 * Every CPU allocates and frees at once: what the locks make of that. Reading
 * /sys/kernel/debug/tm_scale/NAME does so with one allocator and prints how many
 * operations there were; how often a lock was contended meanwhile is for the reader
 * to count (the tracepoint lock:contention_begin).
 */
#include <linux/completion.h>
#include <linux/cpu.h>
#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/numa.h>
#include <linux/prandom.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/tensormem.h>

#define TM_SCALE_LIVE	32	/* allocations each CPU holds at a time */
#define TM_SCALE_STEPS	20000
#define TM_SCALE_MIX	4	/* of orders 0 to 3 */
#define TM_SCALE_SIZE	256

union tm_scale_slot {
	struct tensormem_run run;
	struct page *page;
	void *object;
};

/**
 * struct tm_scale_allocator - one of those compared
 * @name: its file
 * @alloc: fill a slot with 2^@order pages, or an object
 * @free: the way back
 */
struct tm_scale_allocator {
	const char *name;
	int (*alloc)(union tm_scale_slot *slot, unsigned int order);
	void (*free)(union tm_scale_slot *slot, unsigned int order);
};

struct tm_scale {
	const struct tm_scale_allocator *allocator;
	struct completion *start;
	struct completion done;
	int err;
	struct {
		union tm_scale_slot slot;
		u32 order;
		bool live;
	} at[TM_SCALE_LIVE];
};

static struct dentry *tm_scale_dir;
static struct tensormem_slab *tm_scale_slab;
static struct kmem_cache *tm_scale_cache;

static int tm_scale_runs_alloc(union tm_scale_slot *slot, unsigned int order)
{
	return tensormem_alloc(&slot->run, TENSORMEM_KIND_ACTIVATIONS,
			       PAGE_SIZE << order, NUMA_NO_NODE, 0);
}

static void tm_scale_runs_free(union tm_scale_slot *slot, unsigned int order)
{
	tensormem_free(&slot->run);
}

static int tm_scale_pages_alloc(union tm_scale_slot *slot, unsigned int order)
{
	slot->page = alloc_pages(GFP_KERNEL, order);
	return slot->page ? 0 : -ENOMEM;
}

static void tm_scale_pages_free(union tm_scale_slot *slot, unsigned int order)
{
	__free_pages(slot->page, order);
}

static int tm_scale_slab_alloc(union tm_scale_slot *slot, unsigned int order)
{
	slot->object = tensormem_slab_alloc(tm_scale_slab);
	return slot->object ? 0 : -ENOMEM;
}

static void tm_scale_slab_free(union tm_scale_slot *slot, unsigned int order)
{
	tensormem_slab_free(tm_scale_slab, slot->object);
}

static int tm_scale_cache_alloc(union tm_scale_slot *slot, unsigned int order)
{
	slot->object = kmem_cache_alloc(tm_scale_cache, GFP_KERNEL);
	return slot->object ? 0 : -ENOMEM;
}

static void tm_scale_cache_free(union tm_scale_slot *slot, unsigned int order)
{
	kmem_cache_free(tm_scale_cache, slot->object);
}

static const struct tm_scale_allocator tm_scale_allocators[] = {
	{ "tensormem_alloc", tm_scale_runs_alloc, tm_scale_runs_free },
	{ "alloc_pages", tm_scale_pages_alloc, tm_scale_pages_free },
	{ "tensormem_slab", tm_scale_slab_alloc, tm_scale_slab_free },
	{ "kmem_cache", tm_scale_cache_alloc, tm_scale_cache_free },
};

static int tm_scale_step(struct tm_scale *s, u32 i, u32 order)
{
	int err = 0;

	if (s->at[i].live) {
		s->allocator->free(&s->at[i].slot, s->at[i].order);
	} else {
		err = s->allocator->alloc(&s->at[i].slot, order);
		s->at[i].order = order;
	}
	if (!err)
		s->at[i].live = !s->at[i].live;
	return err;
}

static int tm_scale_thread(void *data)
{
	struct tm_scale *s = data;
	struct rnd_state random;

	prandom_seed_state(&random, smp_processor_id() + 1);
	wait_for_completion(s->start);
	for (u32 step = 0; step < TM_SCALE_STEPS && !s->err; step++)
		s->err = tm_scale_step(s, prandom_u32_state(&random) %
					  TM_SCALE_LIVE,
				       prandom_u32_state(&random) %
				       TM_SCALE_MIX);
	for (u32 i = 0; i < TM_SCALE_LIVE; i++)
		if (s->at[i].live)
			s->allocator->free(&s->at[i].slot, s->at[i].order);
	/* Nothing of ours runs after this: the module may go. */
	kthread_complete_and_exit(&s->done, 0);
}

static int tm_scale_show(struct seq_file *m, void *unused)
{
	u32 cpus = num_online_cpus(), made = 0;
	struct completion start;
	struct tm_scale *all;
	int cpu, err = 0;

	all = kvcalloc(cpus, sizeof(*all), GFP_KERNEL);
	if (!all)
		return -ENOMEM;
	init_completion(&start);
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		struct tm_scale *s = &all[made];
		struct task_struct *task;

		if (made == cpus)
			break;
		s->allocator = m->private;
		s->start = &start;
		init_completion(&s->done);
		task = kthread_create_on_cpu(tm_scale_thread, s, cpu,
					     "tm_scale/%u");
		if (IS_ERR(task)) {
			err = PTR_ERR(task);
			break;
		}
		wake_up_process(task);
		made++;
	}
	cpus_read_unlock();
	complete_all(&start);
	for (u32 i = 0; i < made; i++) {
		wait_for_completion(&all[i].done);
		err = err ?: all[i].err;
	}
	if (!err)
		seq_printf(m, "%u\n", made * TM_SCALE_STEPS);
	kvfree(all);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(tm_scale);

static int __init tm_scale_init(void)
{
	tm_scale_slab = tensormem_slab_create(TM_SCALE_SIZE, 0);
	if (IS_ERR(tm_scale_slab))
		return PTR_ERR(tm_scale_slab);
	tm_scale_cache = kmem_cache_create("tm_scale", TM_SCALE_SIZE, 0, 0, NULL);
	if (!tm_scale_cache) {
		tensormem_slab_destroy(tm_scale_slab);
		return -ENOMEM;
	}
	tm_scale_dir = debugfs_create_dir("tm_scale", NULL);
	for (u32 i = 0; i < ARRAY_SIZE(tm_scale_allocators); i++)
		debugfs_create_file(tm_scale_allocators[i].name, 0400,
				    tm_scale_dir,
				    (void *)&tm_scale_allocators[i],
				    &tm_scale_fops);
	return 0;
}

static void __exit tm_scale_exit(void)
{
	debugfs_remove(tm_scale_dir);
	kmem_cache_destroy(tm_scale_cache);
	tensormem_slab_destroy(tm_scale_slab);
}

module_init(tm_scale_init);
module_exit(tm_scale_exit);

MODULE_DESCRIPTION("tensormem and the kernel's own allocators on all CPUs at once");
MODULE_LICENSE("GPL");
