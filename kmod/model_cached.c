// SPDX-License-Identifier: GPL-2.0-only
/*
 * A cached generation: a part of a file, mapped from the page cache.
 *
 * A read lease makes the kernel tell us before anybody opens the file for writing or
 * truncates it, and makes him wait until we let go of it. By then no mapping of ours shows
 * the file any more: what comes to be of it is not seen.
 *
 * That faults must not map what is being unmapped is seen to by the fence. They insert
 * their pages themselves, under it and if the lease holds; whoever breaks the lease says so,
 * waits for the fence to be passed, and then unmaps. (The file system's own handler leaves
 * the inserting to the kernel, after it has returned.) Nothing is mapped around a fault: the
 * kernel's means for that may map a whole folio as a block, as which it takes it out again
 * in another way, because these areas are VM_MIXEDMAP.
 */
#include <linux/cred.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/rwsem.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/time64.h>
#include <linux/uio.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "model.h"
#include "model_cached.h"
#include "pages.h"
#include "trace.h"
#include "vm.h"

/**
 * struct tm_model_cached - the file behind a generation
 * @file: our own descriptor of it: the stager's locks and modes are not ours
 * @offset: of the model in it; a multiple of the page size
 * @size: bytes of the model
 * @file_size: bytes of the file when it was staged
 * @mtime: when it had been changed last by then
 * @broken: somebody waits to write, or has; set once
 * @fence: faults insert pages under it for reading
 * @vm_ops: the file system's, once it is mapped
 * @breaking: lets go of the file
 * @closing: the same, for good
 * @lock: guards @gen
 * @gen: the generation, or NULL when it is gone
 */
struct tm_model_cached {
	struct file *file;
	u64 offset;
	u64 size;
	loff_t file_size;
	struct timespec64 mtime;
	bool broken;
	struct rw_semaphore fence;
	const struct vm_operations_struct *vm_ops;
	struct work_struct breaking;
	struct work_struct closing;
	struct mutex lock;
	struct tm_model_gen *gen;
};

/*
 * Of its own: what is done here is waited for by those who free generations, also from
 * the queue of slots.
 */
static struct workqueue_struct *tm_model_cached_queue;

/* The file's lease goes; from then on nobody tells us of writers. Only for kernel threads. */
static void tm_model_cached_let_go(struct tm_model_cached *cached)
{
	void *owner = cached;

	/* It may be gone: nothing else can be wrong. */
	if (vfs_setlease(cached->file, F_UNLCK, NULL, &owner))
		return;
}

static void tm_model_cached_break_work(struct work_struct *work)
{
	struct tm_model_cached *cached =
		container_of(work, struct tm_model_cached, breaking);

	/* Who comes after this sees that it is broken. */
	down_write(&cached->fence);
	up_write(&cached->fence);
	/* Not copies that others have made of their own mappings of the file. */
	unmap_mapping_range(cached->file->f_mapping, cached->offset,
			    cached->size, 0);
	mutex_lock(&cached->lock);
	if (cached->gen)
		tm_model_fail(cached->gen, -ETXTBSY);
	mutex_unlock(&cached->lock);
	tm_model_cached_let_go(cached);
}

static void tm_model_cached_close_work(struct work_struct *work)
{
	struct tm_model_cached *cached =
		container_of(work, struct tm_model_cached, closing);

	tm_model_cached_let_go(cached);
	/* Without a lease nobody queues it any more. */
	cancel_work_sync(&cached->breaking);
	/* Now: who lets go of a generation may unmount next. */
	__fput_sync(cached->file);
}

/* Context: may sleep. Return: 0 or -ENOMEM. */
int __init tm_model_cached_init(void)
{
	tm_model_cached_queue = alloc_workqueue("tensormem-lease", WQ_UNBOUND,
						0);
	return tm_model_cached_queue ? 0 : -ENOMEM;
}

/* Context: may sleep; there is no generation any more. */
void tm_model_cached_exit(void)
{
	destroy_workqueue(tm_model_cached_queue);
}

/* Return: 0, or why nobody can say when the file changes. */
static int tm_model_cached_supported(const struct file *file)
{
	const struct inode *inode = file_inode(file);
	const struct super_block *sb = inode->i_sb;
	bool disk = sb->s_type->fs_flags & FS_REQUIRES_DEV;

	if (!S_ISREG(inode->i_mode) || !tm_file_can_mmap(file) || IS_DAX(inode))
		return -EOPNOTSUPP;
	/*
	 * Those on a disk of this machine, and tmpfs. Not what shows other files (overlayfs),
	 * makes up contents (sysfs), or asks others for them (FUSE, also of a disk).
	 */
	if (sb->s_magic == FUSE_SUPER_MAGIC ||
	    (!disk && sb->s_magic != TMPFS_MAGIC))
		return -EOPNOTSUPP;
	/*
	 * Nobody counts who has a memfd open for writing, nor a file of the kernel's own;
	 * those are on mounts that no user can see.
	 */
	return sb->s_flags & SB_NOUSER ? -EOPNOTSUPP : 0;
}

/*
 * Whether the file is as it was. The lease tells of writers beforehand; but who comes
 * through a file system above (truncate(2) on overlayfs, NFS) may get past it. Context: any.
 */
static bool tm_model_cached_intact(const struct tm_model_cached *cached)
{
	const struct inode *inode = file_inode(cached->file);
	struct timespec64 mtime = inode_get_mtime(inode);

	return !READ_ONCE(cached->broken) &&
	       i_size_read(inode) == cached->file_size &&
	       timespec64_equal(&mtime, &cached->mtime);
}

/* End the generation, unless somebody does so already. Context: any. */
static void tm_model_cached_spoil(struct tm_model_cached *cached)
{
	if (xchg(&cached->broken, true))
		return;
	queue_work(tm_model_cached_queue, &cached->breaking);
}

/* Under the lease's spinlock. Return: false: the lease stays until the work is done. */
static bool tm_model_cached_break(struct tm_lease *lease)
{
	struct tm_model_cached *cached = tm_lease_owner(lease);

	/* For ever: who waits must not go on before we are ready. */
	lease->fl_break_time = 0;
	tm_model_cached_spoil(cached);
	return false;
}

static const struct tm_lease_operations tm_model_cached_lease_ops = {
	.lm_break = tm_model_cached_break,
	.lm_change = lease_modify,
	TM_LEASE_OPEN_CONFLICT
};

static int tm_model_cached_lease(struct tm_model_cached *cached)
{
	struct tm_lease *lease;
	int err;

	lease = tm_lease_alloc(cached->file, cached, &tm_model_cached_lease_ops);
	if (!lease)
		return -ENOMEM;
	err = vfs_setlease(cached->file, F_RDLCK, &lease, NULL);
	tm_lease_free(lease);
	if (err == -EAGAIN)
		return -ETXTBSY;
	return err == -EINVAL ? -EOPNOTSUPP : err;
}

/**
 * tm_model_cached_create - watch over the file of a generation
 * @gen: the generation
 * @from: a descriptor of the file
 * @offset: of the model in it
 *
 * Context: may sleep. Return: it or an ERR_PTR: -EINVAL for an offset within a page, -ETXTBSY
 * when the file is open for writing, -EACCES when it is another user's, -EOPNOTSUPP when nobody
 * can say when it changes, -ENOMEM, or what the file system says to another descriptor.
 */
struct tm_model_cached *tm_model_cached_create(struct tm_model_gen *gen,
					       const struct file *from,
					       u64 offset)
{
	struct tm_model_cached *cached;
	int err;

	if (!IS_ALIGNED(offset, PAGE_SIZE))
		return ERR_PTR(-EINVAL);
	err = tm_model_cached_supported(from);
	if (err)
		return ERR_PTR(err);
	cached = kzalloc(sizeof(*cached), TM_GFP);
	if (!cached)
		return ERR_PTR(-ENOMEM);
	cached->offset = offset;
	cached->size = gen->size;
	cached->gen = gen;
	init_rwsem(&cached->fence);
	mutex_init(&cached->lock);
	INIT_WORK(&cached->breaking, tm_model_cached_break_work);
	INIT_WORK(&cached->closing, tm_model_cached_close_work);
	cached->file = dentry_open(&from->f_path, O_RDONLY | O_LARGEFILE,
				   current_cred());
	if (IS_ERR(cached->file)) {
		err = PTR_ERR(cached->file);
		goto err_free;
	}
	err = tm_model_cached_lease(cached);
	if (err)
		goto err_file;
	cached->file_size = i_size_read(file_inode(cached->file));
	cached->mtime = inode_get_mtime(file_inode(cached->file));
	return cached;

err_file:
	fput(cached->file);
err_free:
	kfree(cached);
	return ERR_PTR(err);
}

/* Context: may sleep; no descriptor and no mapping of the generation is left. */
void tm_model_cached_destroy(struct tm_model_cached *cached)
{
	mutex_lock(&cached->lock);
	cached->gen = NULL;
	mutex_unlock(&cached->lock);
	/* Only a kernel thread may always let go of a lease, and close a file now. */
	queue_work(tm_model_cached_queue, &cached->closing);
	flush_work(&cached->closing);
	kfree(cached);
}

/**
 * tm_model_cached_check - whether the file has all of the model, and as it was
 * @cached: the file
 *
 * Context: any. Return: 0, -EBADMSG when it is too short, -ETXTBSY when the lease is broken.
 */
int tm_model_cached_check(const struct tm_model_cached *cached)
{
	u64 size = cached->file_size;

	if (!tm_model_cached_intact(cached))
		return -ETXTBSY;
	return size < cached->offset || size - cached->offset < cached->size ?
	       -EBADMSG : 0;
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
	loff_t from = cached->offset + pos;
	ssize_t got;

	iov_iter_truncate(to, cached->size - pos);
	left -= iov_iter_count(to);
	got = vfs_iter_read(cached->file, to, &from, 0);
	iov_iter_reexpand(to, iov_iter_count(to) + left);
	/* What was read while the lease held is as it was promised. */
	smp_rmb();
	if (tm_model_cached_intact(cached))
		return got;
	tm_model_cached_spoil(cached);
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
	if (tm_model_cached_intact(cached))
		err = vm_insert_page(vmf->vma, vmf->address, page);
	memalloc_nofs_restore(flags);
	up_read(&cached->fence);
	if (err == -ESTALE)
		tm_model_cached_spoil(cached);
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

	if (tm_vm_marked(vmf) || READ_ONCE(cached->broken))
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

	if (vma->vm_file != cached->file || !vma->vm_ops ||
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

	vma_set_file(vma, cached->file);
	vma->vm_pgoff += cached->offset >> PAGE_SHIFT;
	err = tm_file_mmap(cached->file, vma);
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
