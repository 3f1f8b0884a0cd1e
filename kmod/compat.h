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

#include <linux/dma-buf.h>
#ifdef TM_HAVE_FILE_LEASE
#include <linux/filelock.h>
#endif
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/mm.h>
#include <linux/module.h>
#ifdef TM_HAVE_PFN_T
#include <linux/pfn_t.h>
#endif
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <net/genetlink.h>

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

/* A namespace of symbols is named by a word, later by a string. */
#ifdef TM_HAVE_IMPORT_NS_NAME /* until 6.12 */
#define TM_IMPORT_NS_DMA_BUF	MODULE_IMPORT_NS(DMA_BUF)
#else
#define TM_IMPORT_NS_DMA_BUF	MODULE_IMPORT_NS("DMA_BUF")
#endif

/* For who has not locked the dma-buf: it was not locked at all before. */
static inline int tm_dma_buf_vmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
#ifdef TM_HAVE_DMA_BUF_VMAP_UNLOCKED /* 6.2 */
	return dma_buf_vmap_unlocked(dmabuf, map);
#else
	return dma_buf_vmap(dmabuf, map);
#endif
}

static inline void tm_dma_buf_vunmap(struct dma_buf *dmabuf,
				     struct iosys_map *map)
{
#ifdef TM_HAVE_DMA_BUF_VMAP_UNLOCKED
	dma_buf_vunmap_unlocked(dmabuf, map);
#else
	dma_buf_vunmap(dmabuf, map);
#endif
}

#ifdef TM_HAVE_MNT_IDMAP /* 6.3 */
typedef struct mnt_idmap tm_idmap;
#else
typedef struct user_namespace tm_idmap;
#endif

#ifdef TM_HAVE_FILE_LEASE /* 6.9 */

#define tm_lease		file_lease
#define tm_lease_operations	lease_manager_operations

static inline struct tm_lease *
tm_lease_alloc(struct file *file, void *owner,
	       const struct tm_lease_operations *ops)
{
	struct tm_lease *lease = locks_alloc_lease();

	if (!lease)
		return NULL;
	lease->c.flc_flags = FL_LEASE;
	lease->c.flc_type = F_RDLCK;
	lease->c.flc_owner = owner;
	lease->c.flc_pid = current->tgid;
	lease->c.flc_file = file;
	lease->fl_lmops = ops;
	return lease;
}

static inline void *tm_lease_owner(const struct tm_lease *lease)
{
	return lease->c.flc_owner;
}

static inline void tm_lease_free(struct tm_lease *lease)
{
	if (lease)
		locks_free_lease(lease);
}

#else

#define tm_lease		file_lock
#define tm_lease_operations	lock_manager_operations

static inline struct tm_lease *
tm_lease_alloc(struct file *file, void *owner,
	       const struct tm_lease_operations *ops)
{
	struct tm_lease *lease = locks_alloc_lock();

	if (!lease)
		return NULL;
	lease->fl_flags = FL_LEASE;
	lease->fl_type = F_RDLCK;
	lease->fl_owner = owner;
	lease->fl_pid = current->tgid;
	lease->fl_file = file;
	lease->fl_end = OFFSET_MAX;
	lease->fl_lmops = ops;
	return lease;
}

static inline void *tm_lease_owner(const struct tm_lease *lease)
{
	return lease->fl_owner;
}

static inline void tm_lease_free(struct tm_lease *lease)
{
	if (lease)
		locks_free_lock(lease);
}

#endif

#ifndef TM_HAVE_HRTIMER_SETUP /* 6.13 */
static inline void hrtimer_setup(struct hrtimer *timer,
				 enum hrtimer_restart (*function)(struct hrtimer *),
				 clockid_t clock, enum hrtimer_mode mode)
{
	hrtimer_init(timer, clock, mode);
	timer->function = function;
}
#endif

/* What the kernel asks of who takes a lease; until 6.18 it looked by itself. */
#ifdef TM_HAVE_LEASE_OPEN_CONFLICT /* 6.19 */
static inline int tm_lease_open_conflict(struct file *file, int type)
{
	return inode_is_open_for_write(file_inode(file)) ? -EAGAIN : 0;
}

#define TM_LEASE_OPEN_CONFLICT .lm_open_conflict = tm_lease_open_conflict,
#else
#define TM_LEASE_OPEN_CONFLICT
#endif

#ifndef TM_HAVE_INODE_MTIME /* 6.7 */
static inline struct timespec64 inode_get_mtime(const struct inode *inode)
{
	return inode->i_mtime;
}
#endif

static inline bool tm_file_can_mmap(const struct file *file)
{
#ifdef TM_HAVE_VFS_MMAP
	return file->f_op->mmap || file->f_op->mmap_prepare;
#else
	return file->f_op->mmap;
#endif
}

/* A file's own mmap(), in either of its two forms. */
static inline int tm_file_mmap(struct file *file, struct vm_area_struct *vma)
{
#ifdef TM_HAVE_VFS_MMAP /* 6.16 */
	return vfs_mmap(file, vma);
#else
	return call_mmap(file, vma);
#endif
}

#ifndef TM_HAVE_VM_FLAGS_SET /* 6.3 */
static inline void vm_flags_mod(struct vm_area_struct *vma, vm_flags_t set,
				vm_flags_t clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}
#endif

#ifndef TM_HAVE_RELEASE_FAULT_LOCK /* 6.6 */
static inline void release_fault_lock(struct vm_fault *vmf)
{
	mmap_read_unlock(vmf->vma->vm_mm);
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

/* Map a page frame of a VM_MIXEDMAP area as one that cannot be pinned. What is there already stays. */
static inline vm_fault_t tm_vmf_insert_frame(struct vm_area_struct *vma,
					     unsigned long address,
					     unsigned long frame)
{
#ifdef TM_HAVE_PFN_T /* until 6.16 */
	return vmf_insert_mixed(vma, address, pfn_to_pfn_t(frame));
#else
	return vmf_insert_mixed(vma, address, frame);
#endif
}

/* Whether a family is told when somebody joins or leaves one of its groups. */
#ifdef TM_HAVE_GENL_BIND /* 6.9 */
#define TM_GENL_TELLS	true
#else
#define TM_GENL_TELLS	false
#endif

/* Have @join told before it, and @leave after it. */
static inline void tm_genl_bind(struct genl_family *family, int (*join)(int),
				void (*leave)(int))
{
#ifdef TM_HAVE_GENL_BIND
	family->bind = join;
	family->unbind = leave;
#endif
}

/* What a multicast group says to be for CAP_NET_ADMIN only. */
#ifdef TM_HAVE_GENL_MCAST_CAP /* 6.7 */
#define TM_GENL_ADMIN	GENL_MCAST_CAP_NET_ADMIN
#else
#define TM_GENL_ADMIN	GENL_UNS_ADMIN_PERM
#endif

/* The attributes that a dump was asked with. */
static inline struct nlattr **tm_genl_dump_attrs(struct netlink_callback *cb)
{
#ifdef TM_HAVE_GENL_INFO_DUMP /* 6.7 */
	return genl_info_dump(cb)->attrs;
#else
	return genl_dumpit_info(cb)->attrs;
#endif
}

#endif
