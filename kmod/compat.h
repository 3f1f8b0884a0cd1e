/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every difference between the kernels we build for, and nothing else.
 *
 * What TM_HAVE_ says comes from compiling the files in compat/ against the kernel
 * at hand (see Kbuild): distributions move interfaces into older versions, so a version
 * number proves nothing.
 */
#ifndef TM_COMPAT_H
#define TM_COMPAT_H

#include <linux/fs.h>
#include <linux/mm.h>
#ifdef TM_HAVE_PFN_T
#include <linux/pfn_t.h>
#endif
#include <linux/sched/mm.h>
#include <linux/shrinker.h>
#include <linux/slab.h>

typedef unsigned long (*tm_shrink_fn)(struct shrinker *shrinker,
				      struct shrink_control *sc);

#ifdef TM_HAVE_SHRINKER_ALLOC /* 6.7 */

struct tm_shrinker {
	struct shrinker *shrinker;
};

static inline struct shrinker *tm_shrinker_get(struct tm_shrinker *s,
					       const char *name)
{
	s->shrinker = shrinker_alloc(0, "%s", name);
	return s->shrinker;
}

static inline int tm_shrinker_start(struct tm_shrinker *s, const char *name)
{
	shrinker_register(s->shrinker);
	return 0;
}

static inline void tm_shrinker_stop(struct tm_shrinker *s)
{
	shrinker_free(s->shrinker);
}

#else

struct tm_shrinker {
	struct shrinker shrinker;
};

static inline struct shrinker *tm_shrinker_get(struct tm_shrinker *s,
					       const char *name)
{
	return &s->shrinker;
}

static inline int tm_shrinker_start(struct tm_shrinker *s, const char *name)
{
	return register_shrinker(&s->shrinker, "%s", name);
}

static inline void tm_shrinker_stop(struct tm_shrinker *s)
{
	unregister_shrinker(&s->shrinker);
}

#endif

/* Return: the registered shrinker, or NULL when memory is short. */
static inline struct tm_shrinker *
tm_shrinker_register(const char *name, long batch, tm_shrink_fn count,
		     tm_shrink_fn scan)
{
	struct tm_shrinker *s = kzalloc(sizeof(*s), GFP_KERNEL);
	struct shrinker *shrinker = s ? tm_shrinker_get(s, name) : NULL;

	if (!shrinker)
		goto err;
	shrinker->count_objects = count;
	shrinker->scan_objects = scan;
	shrinker->seeks = DEFAULT_SEEKS;
	shrinker->batch = batch;
	if (tm_shrinker_start(s, name))
		goto err;
	return s;
err:
	kfree(s);
	return NULL;
}

static inline void tm_shrinker_unregister(struct tm_shrinker *s)
{
	tm_shrinker_stop(s);
	kfree(s);
}

#ifdef TM_HAVE_MNT_IDMAP /* 6.3 */
typedef struct mnt_idmap tm_idmap;
#else
typedef struct user_namespace tm_idmap;
#endif

#ifndef TM_HAVE_VM_FLAGS_SET /* 6.3 */
static inline void vm_flags_mod(struct vm_area_struct *vma, vm_flags_t set,
				vm_flags_t clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}
#endif

/* mmap's own choice of an address: mm_get_unmapped_area() has changed twice. */
static inline unsigned long
tm_get_unmapped_area(struct file *file, unsigned long address,
		     unsigned long length, unsigned long pgoff,
		     unsigned long flags)
{
#if defined(TM_HAVE_UNMAPPED_AREA_FILE) /* 6.19 */
	return mm_get_unmapped_area(file, address, length, pgoff, flags);
#elif defined(TM_HAVE_UNMAPPED_AREA_MM) /* 6.10 */
	return mm_get_unmapped_area(current->mm, file, address, length, pgoff,
				    flags);
#else
	return current->mm->get_unmapped_area(file, address, length, pgoff,
					      flags);
#endif
}

/* Map a whole chunk at @vmf; not for write: the entry is born dirty (vm.c). */
static inline vm_fault_t tm_vmf_insert_block(struct vm_fault *vmf,
					     struct page *page)
{
#ifndef CONFIG_TRANSPARENT_HUGEPAGE
	return VM_FAULT_FALLBACK;
#elif defined(TM_HAVE_PFN_T) /* until 6.16 */
	return vmf_insert_pfn_pmd(vmf, page_to_pfn_t(page), false);
#else
	return vmf_insert_pfn_pmd(vmf, page_to_pfn(page), false);
#endif
}

#endif
