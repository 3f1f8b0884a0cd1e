// SPDX-License-Identifier: GPL-2.0-only
/*
 * Objects below a page for other modules: include/linux/tensormem.h describes
 * the calls.
 *
 * Three layers, after Bonwick and Adams, "Magazines and Vmem" (USENIX 2001):
 *
 *   magazines  each CPU has two, loaded and previous: an allocation or a free is a
 *              pop or a push there
 *   depot      more of them, full or empty: a CPU exchanges one for one
 *   pool       the slabs (core/slab.c): where a CPU fills a magazine when the depot
 *              has no full one, and empties it when the depot has no empty one
 *
 * So the number of magazines never changes: a free needs no memory and cannot fail,
 * and what lies idle in them is bounded. Those of a CPU that went offline stay as
 * they are until it returns or the slab is destroyed.
 *
 * Lock order: tm_slab_cpu::lock, tensormem_slab::lock. The first makes a CPU's
 * magazines its own for a few instructions; both sleep on PREEMPT_RT. No allocator
 * is called under either, and neither is taken in interrupt context.
 *
 * From an object to its slab leads page_private() of its page, which belongs to
 * whoever allocated the page. A header in the slab would take an object's place (a
 * half of a page of 2048s) or its alignment; a tree would need memory to insert.
 */
#include <linux/cache.h>
#include <linux/err.h>
#include <linux/export.h>
#include <linux/gfp.h>
#include <linux/local_lock.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/numa.h>
#include <linux/overflow.h>
#include <linux/percpu.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/tensormem.h>

#include "bandwidth.h"
#include "core/slab.h"

/* What a magazine may hold: so many bytes, but within these numbers of objects. */
#define TM_MAGAZINE_BYTES	8192
#define TM_MAGAZINE_MIN		4u
#define TM_MAGAZINE_MAX		64u
/* Objects that go from the pool into a magazine at a time. */
#define TM_SLAB_BATCH		16u

struct tm_magazine {
	struct tm_magazine *next;
	u32 nr;
	void *object[];
};

struct tm_slab_cpu {
	local_lock_t lock;
	struct tm_magazine *loaded;
	struct tm_magazine *previous;
};

/* A slab with its pages; its length follows from the pool. */
struct tm_slab_run {
	struct tensormem_run run;
	void *base;
	struct tm_slab slab;
};

/**
 * struct tensormem_slab - a pool of objects of one size
 * @cpu: the magazines in use
 * @rounds: objects of a full magazine
 * @size: bytes of an object
 * @zeroed: objects are handed out zeroed
 * @keep_empty: empty slabs that stay: what fills one magazine
 * @lock: what follows
 * @pool: the slabs
 * @full: the depot: magazines with @rounds objects
 * @empty: and those with none
 */
struct tensormem_slab {
	struct tm_slab_cpu __percpu *cpu;
	u32 rounds;
	u32 size;
	bool zeroed;
	u32 keep_empty;
	spinlock_t lock;
	struct tm_slab_pool pool;
	struct tm_magazine *full;
	struct tm_magazine *empty;
};

static void tm_magazine_push(struct tm_magazine **list, struct tm_magazine *m)
{
	m->next = *list;
	*list = m;
}

static struct tm_magazine *tm_magazine_pop(struct tm_magazine **list)
{
	struct tm_magazine *m = *list;

	if (m)
		*list = m->next;
	return m;
}

/* Fill an empty magazine with what the pool has. */
static void tm_magazine_fill(struct tensormem_slab *slab, struct tm_magazine *m)
{
	struct tm_slab_object batch[TM_SLAB_BATCH];

	lockdep_assert_held(&slab->lock);
	while (m->nr < slab->rounds && slab->pool.nr_free) {
		u32 nr = min3(TM_SLAB_BATCH, slab->rounds - m->nr,
			      (u32)min_t(u64, slab->pool.nr_free, U32_MAX));

		if (WARN_ON_ONCE(tm_slab_alloc(&slab->pool, batch, nr)))
			return;
		/* From the last to the first, which is popped first then. */
		while (nr--) {
			struct tm_slab_run *run =
				container_of(batch[nr].slab, struct tm_slab_run,
					     slab);

			m->object[m->nr++] = run->base +
					     batch[nr].index * slab->size;
		}
	}
}

/* Return: 0, -EINVAL when @object is none of the slab or is free already. */
static int tm_slab_put(struct tensormem_slab *slab, const void *object)
{
	struct tm_slab_run *run = (void *)page_private(virt_to_page(object));
	struct tm_slab_object put;
	u32 offset;

	lockdep_assert_held(&slab->lock);
	if (!run)
		return -EINVAL;
	offset = object - run->base;
	if (offset % slab->size)
		return -EINVAL;
	put.slab = &run->slab;
	put.index = offset / slab->size;
	return tm_slab_free(&slab->pool, &put, 1);
}

/* Back into the pool. What is not an allocated object is left alone. */
static void tm_magazine_flush(struct tensormem_slab *slab,
			      struct tm_magazine *m)
{
	lockdep_assert_held(&slab->lock);
	while (m->nr)
		WARN_ON_ONCE(tm_slab_put(slab, m->object[--m->nr]));
}

/* The loaded magazine is empty. Return: it has objects now. */
static bool tm_slab_load(struct tensormem_slab *slab, struct tm_slab_cpu *cpu)
{
	struct tm_magazine *full;

	if (cpu->previous->nr) {
		swap(cpu->loaded, cpu->previous);
		return true;
	}
	spin_lock(&slab->lock);
	full = tm_magazine_pop(&slab->full);
	if (full) {
		tm_magazine_push(&slab->empty, cpu->previous);
		cpu->previous = cpu->loaded;
		cpu->loaded = full;
	} else {
		tm_magazine_fill(slab, cpu->loaded);
	}
	spin_unlock(&slab->lock);
	return cpu->loaded->nr;
}

/*
 * The loaded magazine is full: make it one with room. Return: objects went to the
 * pool, where slabs may have fallen empty.
 */
static bool tm_slab_unload(struct tensormem_slab *slab, struct tm_slab_cpu *cpu)
{
	struct tm_magazine *empty;

	if (cpu->previous->nr < slab->rounds) {
		swap(cpu->loaded, cpu->previous);
		return false;
	}
	spin_lock(&slab->lock);
	empty = tm_magazine_pop(&slab->empty);
	if (empty) {
		tm_magazine_push(&slab->full, cpu->previous);
		cpu->previous = empty;
	} else {
		tm_magazine_flush(slab, cpu->previous);
	}
	spin_unlock(&slab->lock);
	/* What was freed last stays near. */
	swap(cpu->loaded, cpu->previous);
	return !empty;
}

/* Take objects from this CPU's magazines. Return: how many, 0 if the pool has none. */
static __always_inline u32 tm_slab_take(struct tensormem_slab *slab,
					void **objects, u32 nr)
{
	struct tm_slab_cpu *cpu;
	struct tm_magazine *m;

	local_lock(&slab->cpu->lock);
	cpu = this_cpu_ptr(slab->cpu);
	if (likely(cpu->loaded->nr) || tm_slab_load(slab, cpu)) {
		m = cpu->loaded;
		nr = min(nr, m->nr);
		m->nr -= nr;
		memcpy(objects, &m->object[m->nr], nr * sizeof(*objects));
	} else {
		nr = 0;
	}
	local_unlock(&slab->cpu->lock);
	return nr;
}

/* Put objects into this CPU's magazines. Return: how many, at least one. */
static __always_inline u32 tm_slab_give(struct tensormem_slab *slab,
					void *const *objects, u32 nr,
					bool *flushed)
{
	struct tm_slab_cpu *cpu;
	struct tm_magazine *m;

	local_lock(&slab->cpu->lock);
	cpu = this_cpu_ptr(slab->cpu);
	if (unlikely(cpu->loaded->nr == slab->rounds))
		*flushed |= tm_slab_unload(slab, cpu);
	m = cpu->loaded;
	nr = min(nr, slab->rounds - m->nr);
	memcpy(&m->object[m->nr], objects, nr * sizeof(*objects));
	m->nr += nr;
	local_unlock(&slab->cpu->lock);
	return nr;
}

/* @private: what leads from the pages to their slab; 0 before they go. */
static void tm_slab_run_mark(const struct tm_slab_run *run,
			     unsigned long private)
{
	for (u32 i = 0; i < 1u << run->run.order; i++)
		set_page_private(run->run.page + i, private);
}

/* Give empty slabs above @keep back. Context: process context; may sleep. */
static void tm_slab_reap(struct tensormem_slab *slab, u32 keep)
{
	for (;;) {
		struct tm_slab *empty = NULL;
		struct tm_slab_run *run;

		spin_lock(&slab->lock);
		if (slab->pool.nr_empty > keep)
			empty = tm_slab_take_empty(&slab->pool);
		spin_unlock(&slab->lock);
		if (!empty)
			break;
		run = container_of(empty, struct tm_slab_run, slab);
		tm_slab_run_mark(run, 0);
		tensormem_free(&run->run);
		kfree(run);
	}
}

/* Add a slab. Context: process context; may sleep. */
static int tm_slab_grow(struct tensormem_slab *slab)
{
	/* As the pages: one honest try, no OOM kill. */
	gfp_t gfp = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN;
	struct tm_slab_run *run;
	int err;

	run = kmalloc(offsetof(struct tm_slab_run, slab) +
		      tm_slab_bytes(&slab->pool), gfp);
	if (!run)
		return -ENOMEM;
	err = tensormem_alloc(&run->run, TENSORMEM_KIND_ACTIVATIONS,
			      PAGE_SIZE << slab->pool.layout.order,
			      NUMA_NO_NODE, 0);
	if (err) {
		kfree(run);
		return err;
	}
	run->base = page_address(run->run.page);
	tm_slab_run_mark(run, (unsigned long)run);
	spin_lock(&slab->lock);
	tm_slab_add(&slab->pool, &run->slab);
	spin_unlock(&slab->lock);
	return 0;
}

void *tensormem_slab_alloc(struct tensormem_slab *slab)
{
	void *object;

	might_sleep();
	while (unlikely(!tm_slab_take(slab, &object, 1)))
		if (tm_slab_grow(slab))
			return NULL;
	if (slab->zeroed) {
		tm_bandwidth_count(TM_MOVER_SLAB, slab->size);
		memset(object, 0, slab->size);
	}
	return object;
}
EXPORT_SYMBOL_GPL(tensormem_slab_alloc);

void tensormem_slab_free(struct tensormem_slab *slab, void *object)
{
	bool flushed = false;

	might_sleep();
	tm_slab_give(slab, &object, 1, &flushed);
	if (unlikely(flushed))
		tm_slab_reap(slab, slab->keep_empty);
}
EXPORT_SYMBOL_GPL(tensormem_slab_free);

int tensormem_slab_alloc_bulk(struct tensormem_slab *slab, void **objects,
			      u32 nr)
{
	u32 done = 0;

	might_sleep();
	while (done < nr) {
		u32 got = tm_slab_take(slab, objects + done, nr - done);
		int err = got ? 0 : tm_slab_grow(slab);

		if (err) {
			tensormem_slab_free_bulk(slab, objects, done);
			return err;
		}
		done += got;
	}
	if (slab->zeroed) {
		tm_bandwidth_count(TM_MOVER_SLAB, (u64)nr * slab->size);
		for (u32 i = 0; i < nr; i++)
			memset(objects[i], 0, slab->size);
	}
	return 0;
}
EXPORT_SYMBOL_GPL(tensormem_slab_alloc_bulk);

void tensormem_slab_free_bulk(struct tensormem_slab *slab,
			      void *const *objects, u32 nr)
{
	bool flushed = false;
	u32 done = 0;

	might_sleep();
	while (done < nr)
		done += tm_slab_give(slab, objects + done, nr - done, &flushed);
	if (unlikely(flushed))
		tm_slab_reap(slab, slab->keep_empty);
}
EXPORT_SYMBOL_GPL(tensormem_slab_free_bulk);

static struct tm_magazine *tm_magazine_new(const struct tensormem_slab *slab)
{
	struct tm_magazine *m;

	m = kmalloc(struct_size(m, object, slab->rounds),
		    GFP_KERNEL | __GFP_RETRY_MAYFAIL);
	if (m)
		m->nr = 0;
	return m;
}

static void tm_slab_free_magazines(struct tensormem_slab *slab)
{
	struct tm_magazine *m;
	int i;

	for_each_possible_cpu(i) {
		struct tm_slab_cpu *cpu = per_cpu_ptr(slab->cpu, i);

		kfree(cpu->loaded);
		kfree(cpu->previous);
	}
	while ((m = tm_magazine_pop(&slab->empty)))
		kfree(m);
}

/* Two magazines for each CPU and, for what moves between CPUs, one in the depot. */
static int tm_slab_make_magazines(struct tensormem_slab *slab)
{
	int i;

	for_each_possible_cpu(i) {
		struct tm_slab_cpu *cpu = per_cpu_ptr(slab->cpu, i);
		struct tm_magazine *spare = tm_magazine_new(slab);

		local_lock_init(&cpu->lock);
		if (spare)
			tm_magazine_push(&slab->empty, spare);
		cpu->loaded = tm_magazine_new(slab);
		cpu->previous = tm_magazine_new(slab);
		if (!spare || !cpu->loaded || !cpu->previous) {
			tm_slab_free_magazines(slab);
			return -ENOMEM;
		}
	}
	return 0;
}

struct tensormem_slab *tensormem_slab_create(size_t size, unsigned int flags)
{
	struct tm_geometry g = tm_geometry(PAGE_SHIFT);
	u32 line = cache_line_size();
	struct tensormem_slab *slab;
	struct tm_slab_layout layout;
	int err;

	if (!size || flags & ~TENSORMEM_ZEROED ||
	    size > tm_slab_class_size(tm_slab_classes(g, line) - 1, line))
		return ERR_PTR(-EINVAL);
	slab = kzalloc(sizeof(*slab), GFP_KERNEL | __GFP_RETRY_MAYFAIL);
	if (!slab)
		return ERR_PTR(-ENOMEM);
	spin_lock_init(&slab->lock);
	slab->size = tm_slab_class_size(tm_slab_class(size, line), line);
	slab->zeroed = flags & TENSORMEM_ZEROED;
	slab->rounds = clamp(TM_MAGAZINE_BYTES / slab->size, TM_MAGAZINE_MIN,
			     TM_MAGAZINE_MAX);
	layout = tm_slab_layout(g, slab->size);
	slab->keep_empty = DIV_ROUND_UP(slab->rounds, layout.nr_objects);
	err = tm_slab_pool_init(&slab->pool, layout, &slab->lock);
	if (err)
		goto err_slab;
	err = -ENOMEM;
	slab->cpu = alloc_percpu(struct tm_slab_cpu);
	if (!slab->cpu)
		goto err_slab;
	err = tm_slab_make_magazines(slab);
	if (err)
		goto err_cpu;
	return slab;

err_cpu:
	free_percpu(slab->cpu);
err_slab:
	kfree(slab);
	return ERR_PTR(err);
}
EXPORT_SYMBOL_GPL(tensormem_slab_create);

void tensormem_slab_destroy(struct tensormem_slab *slab)
{
	struct tm_magazine *m;
	u64 live;
	int i;

	/* Nobody else uses the slab any more: other CPUs' magazines stand still. */
	spin_lock(&slab->lock);
	for_each_possible_cpu(i) {
		struct tm_slab_cpu *cpu = per_cpu_ptr(slab->cpu, i);

		tm_magazine_flush(slab, cpu->loaded);
		tm_magazine_flush(slab, cpu->previous);
	}
	while ((m = tm_magazine_pop(&slab->full))) {
		tm_magazine_flush(slab, m);
		tm_magazine_push(&slab->empty, m);
	}
	live = slab->pool.allocs - slab->pool.frees;
	spin_unlock(&slab->lock);
	tm_slab_reap(slab, 0);
	/* Whoever still uses them keeps them: their slabs leak. */
	if (!WARN(live, "tensormem: %llu objects of %u bytes are still allocated\n",
		  live, slab->size))
		tm_slab_pool_destroy(&slab->pool);
	tm_slab_free_magazines(slab);
	free_percpu(slab->cpu);
	kfree(slab);
}
EXPORT_SYMBOL_GPL(tensormem_slab_destroy);
