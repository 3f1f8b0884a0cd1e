// SPDX-License-Identifier: GPL-2.0-only
/*
 * A cached generation: a part of a file, mapped from the page cache as long as the
 * watch over it holds.
 *
 * That faults must not map what is being unmapped is seen to by the fence. They insert
 * their pages themselves, under it and if the lease holds; whoever breaks the lease says so,
 * waits for the fence to be passed, and then unmaps. (The file system's own handler leaves
 * the inserting to the kernel, after it has returned.) Nothing is mapped around a fault: the
 * kernel's means for that may map a whole folio as a block, as which it takes it out again
 * in another way, because these areas are VM_MIXEDMAP.
 */
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rwsem.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uio.h>

#include "compat.h"
#include "model.h"
#include "model_cached.h"
#include "model_watch.h"
#include "pages.h"
#include "trace.h"
#include "vm.h"

/**
 * struct tm_model_cached - the file behind a cached generation
 * @watch: it; the model's offset in it is a multiple of the page size
 * @fence: faults insert pages under it for reading
 * @vm_ops: the file system's, once it is mapped
 */
struct tm_model_cached {
	struct tm_model_watch watch;
	struct rw_semaphore fence;
	const struct vm_operations_struct *vm_ops;
};

/* Its mappings are emptied: from then on a touch raises SIGBUS. */
static void tm_model_cached_broke(struct tm_model_watch *watch,
				  struct tm_model_gen *gen)
{
	struct tm_model_cached *cached =
		container_of(watch, struct tm_model_cached, watch);

	/* Who comes after this sees that it is broken. */
	down_write(&cached->fence);
	up_write(&cached->fence);
	/* Not copies that others have made of their own mappings of the file. */
	unmap_mapping_range(watch->file->f_mapping, watch->offset, watch->size,
			    0);
	tm_model_fail(gen, -ETXTBSY);
}

/**
 * tm_model_cached_create - watch over the file of a cached generation
 * @gen: the generation
 * @from: a descriptor of the file
 * @offset: of the model in it
 *
 * Context: may sleep. Return: it or an ERR_PTR: -EINVAL for an offset within a page, or as
 * tm_model_watch_begin().
 */
struct tm_model_cached *tm_model_cached_create(struct tm_model_gen *gen,
					       const struct file *from,
					       u64 offset)
{
	struct tm_model_cached *cached;
	int err;

	if (!IS_ALIGNED(offset, PAGE_SIZE))
		return ERR_PTR(-EINVAL);
	cached = kzalloc(sizeof(*cached), TM_GFP);
	if (!cached)
		return ERR_PTR(-ENOMEM);
	init_rwsem(&cached->fence);
	err = tm_model_watch_begin(&cached->watch, gen, from, offset, 0,
				   tm_model_cached_broke);
	if (err) {
		kfree(cached);
		return ERR_PTR(err);
	}
	return cached;
}

/* Context: may sleep; no descriptor and no mapping of the generation is left. */
void tm_model_cached_destroy(struct tm_model_cached *cached)
{
	tm_model_watch_end(&cached->watch);
	kfree(cached);
}

/* As tm_model_watch_check(). */
int tm_model_cached_check(const struct tm_model_cached *cached)
{
	return tm_model_watch_check(&cached->watch);
}

/**
 * tm_model_cached_read - read from the file
 * @cached: the file
 * @pos: from which byte of the model on; below its size
 * @to: where to
 *
 * Context: may sleep. Return: bytes read, -ESTALE when the lease was broken before or
 * meanwhile, or what the file system returns.
 */
ssize_t tm_model_cached_read(struct tm_model_cached *cached, u64 pos,
			     struct iov_iter *to)
{
	size_t left = iov_iter_count(to);
	loff_t from = cached->watch.offset + pos;
	ssize_t got;

	iov_iter_truncate(to, cached->watch.size - pos);
	left -= iov_iter_count(to);
	got = vfs_iter_read(cached->watch.file, to, &from, 0);
	iov_iter_reexpand(to, iov_iter_count(to) + left);
	/* What was read while the lease held is as it was promised. */
	smp_rmb();
	if (tm_model_watch_intact(&cached->watch))
		return got;
	tm_model_watch_spoil(&cached->watch);
	return -ESTALE;
}

static struct tm_model_cached *
tm_model_cached_of(const struct vm_area_struct *vma)
{
	const struct file *reader = vma->vm_private_data;
	const struct tm_model_gen *gen = reader->private_data;

	return gen->cached;
}

/* Map @page, which is locked and up to date, unless the lease is broken. */
static vm_fault_t tm_model_cached_insert(struct tm_model_cached *cached,
					 struct vm_fault *vmf,
					 struct page *page)
{
	unsigned int flags;
	int err = -ESTALE;

	down_read(&cached->fence);
	/* For a page table: reclaim must not wait for pages that wait for this one. */
	flags = memalloc_nofs_save();
	if (tm_model_watch_intact(&cached->watch))
		err = vm_insert_page(vmf->vma, vmf->address, page);
	memalloc_nofs_restore(flags);
	up_read(&cached->fence);
	if (err == -ESTALE)
		tm_model_watch_spoil(&cached->watch);
	/* Another has mapped it; or the page table went away meanwhile (vm.c). */
	if (!err || err == -EBUSY || err == -EFAULT)
		return VM_FAULT_NOPAGE;
	return vmf_error(err);
}

static vm_fault_t tm_model_cached_map(struct vm_fault *vmf)
{
	struct tm_model_cached *cached = tm_model_cached_of(vmf->vma);
	vm_fault_t got, result = VM_FAULT_NOPAGE;
	struct page *page;

	if (tm_vm_marked(vmf) || READ_ONCE(cached->watch.broken))
		return VM_FAULT_SIGBUS;
	got = cached->vm_ops->fault(vmf);
	if (got & (VM_FAULT_ERROR | VM_FAULT_NOPAGE | VM_FAULT_RETRY))
		return got;
	page = vmf->page;
	if (!(got & VM_FAULT_LOCKED))
		lock_page(page);
	/* As the kernel would check; and reclaimed meanwhile: the fault comes again. */
	if (PageHWPoison(page))
		result = VM_FAULT_HWPOISON;
	else if (page_folio(page)->mapping)
		result = tm_model_cached_insert(cached, vmf, page);
	unlock_page(page);
	put_page(page);
	vmf->page = NULL;
	return result | (got & VM_FAULT_MAJOR);
}

static vm_fault_t tm_model_cached_fault(struct vm_fault *vmf)
{
	u64 start = trace_tensormem_model_fault_enabled() ? ktime_get_ns() : 0;
	const struct file *reader = vmf->vma->vm_private_data;
	const struct tm_model_gen *gen = reader->private_data;
	vm_fault_t result = tm_model_cached_map(vmf);

	/* To be tried again: the mapping, and the generation with it, may be gone by now. */
	if (start && !(result & VM_FAULT_RETRY))
		trace_tensormem_model_fault(kobject_name(&gen->model->kobj),
					    gen->core.number, vmf->pgoff,
					    !(result & VM_FAULT_ERROR),
					    ktime_get_ns() - start);
	return result;
}

/* Each mapping has its reader's descriptor, and through that the generation. */
static void tm_model_cached_open(struct vm_area_struct *vma)
{
	struct tm_model_cached *cached = tm_model_cached_of(vma);

	get_file((struct file *)vma->vm_private_data);
	if (cached->vm_ops->open)
		cached->vm_ops->open(vma);
}

static void tm_model_cached_close(struct vm_area_struct *vma)
{
	struct tm_model_cached *cached = tm_model_cached_of(vma);

	if (cached->vm_ops->close)
		cached->vm_ops->close(vma);
	fput(vma->vm_private_data);
}

static const struct vm_operations_struct tm_model_cached_vm_ops = {
	.open = tm_model_cached_open,
	.close = tm_model_cached_close,
	.fault = tm_model_cached_fault,
	.mremap = tm_vm_mremap,
};

/* Whether what we call of them is the same: shmem has others for a file without a name. */
static bool tm_model_cached_alike(const struct vm_operations_struct *a,
				  const struct vm_operations_struct *b)
{
	return a->fault == b->fault && a->open == b->open &&
	       a->close == b->close;
}

/* Whether we can stand between @vma and its file system. */
static bool tm_model_cached_fits(struct tm_model_cached *cached,
				 const struct vm_area_struct *vma)
{
	const struct vm_operations_struct *old;

	if (vma->vm_file != cached->watch.file || !vma->vm_ops ||
	    !vma->vm_ops->fault || vma->vm_private_data)
		return false;
	old = cmpxchg(&cached->vm_ops, NULL, vma->vm_ops);
	return !old || tm_model_cached_alike(old, vma->vm_ops);
}

/**
 * tm_model_cached_mmap - map a part of the file
 * @cached: the file
 * @reader: a descriptor of the generation
 * @vma: what the kernel is about to map; its pages are the model's
 *
 * Context: process context with mmap_lock held for writing; may sleep.
 * Return: 0, -EOPNOTSUPP, or what the file system says.
 */
int tm_model_cached_mmap(struct tm_model_cached *cached, struct file *reader,
			 struct vm_area_struct *vma)
{
	int err;

	vma_set_file(vma, cached->watch.file);
	vma->vm_pgoff += cached->watch.offset >> PAGE_SHIFT;
	err = tm_file_mmap(cached->watch.file, vma);
	if (err)
		return err;
	if (!tm_model_cached_fits(cached, vma)) {
		if (vma->vm_ops && vma->vm_ops->close)
			vma->vm_ops->close(vma);
		return -EOPNOTSUPP;
	}
	vma->vm_private_data = get_file(reader);
	vma->vm_ops = &tm_model_cached_vm_ops;
	return 0;
}
