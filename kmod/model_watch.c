// SPDX-License-Identifier: GPL-2.0-only
/*
 * A file that a generation depends on, cached or evictable.
 *
 * A read lease makes the kernel tell us before anybody opens the file for writing or
 * truncates it, and makes him wait until we let go of it. By then the generation has seen
 * to it that what comes to be of the file is not seen.
 */
#include <linux/cred.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/slab.h>

#include "compat.h"
#include "model.h"
#include "model_watch.h"

/*
 * Of its own: what is done here is waited for by those who free generations, also from
 * the queue of slots.
 */
static struct workqueue_struct *tm_model_watch_queue;

/* The file's lease goes; from then on nobody tells us of writers. Only for kernel threads. */
static void tm_model_watch_let_go(struct tm_model_watch *watch)
{
	void *owner = watch;

	/* It may be gone: nothing else can be wrong. */
	if (vfs_setlease(watch->file, F_UNLCK, NULL, &owner))
		return;
}

static void tm_model_watch_break_work(struct work_struct *work)
{
	struct tm_model_watch *watch =
		container_of(work, struct tm_model_watch, breaking);

	mutex_lock(&watch->lock);
	if (watch->gen)
		watch->broke(watch, watch->gen);
	mutex_unlock(&watch->lock);
	tm_model_watch_let_go(watch);
}

static void tm_model_watch_close_work(struct work_struct *work)
{
	struct tm_model_watch *watch =
		container_of(work, struct tm_model_watch, closing);

	tm_model_watch_let_go(watch);
	/* Without a lease nobody queues it any more. */
	cancel_work_sync(&watch->breaking);
	/* Now: who lets go of a generation may unmount next. */
	__fput_sync(watch->file);
}

/* Context: may sleep. Return: 0 or -ENOMEM. */
int __init tm_model_watch_init(void)
{
	tm_model_watch_queue = alloc_workqueue("tensormem-lease", WQ_UNBOUND,
					       0);
	return tm_model_watch_queue ? 0 : -ENOMEM;
}

/* Context: may sleep; there is no generation any more. */
void tm_model_watch_exit(void)
{
	destroy_workqueue(tm_model_watch_queue);
}

/* Return: 0, or why nobody can say when the file changes. */
static int tm_model_watch_supported(const struct file *file)
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

/* Whether the file looks as it did, whoever waits to write. Context: any. */
bool tm_model_watch_unchanged(const struct tm_model_watch *watch)
{
	const struct inode *inode = file_inode(watch->file);
	struct timespec64 mtime = inode_get_mtime(inode);

	return i_size_read(inode) == watch->file_size &&
	       timespec64_equal(&mtime, &watch->mtime);
}

/*
 * Whether the file is as it was. The lease tells of writers beforehand; but who comes
 * through a file system above (truncate(2) on overlayfs, NFS) may get past it. Context: any.
 */
bool tm_model_watch_intact(const struct tm_model_watch *watch)
{
	return !READ_ONCE(watch->broken) && tm_model_watch_unchanged(watch);
}

/* Have tm_model_watch::broke called, unless it was or will be. Context: any. */
void tm_model_watch_spoil(struct tm_model_watch *watch)
{
	if (xchg(&watch->broken, true))
		return;
	queue_work(tm_model_watch_queue, &watch->breaking);
}

/* Under the lease's spinlock. Return: false: the lease stays until the work is done. */
static bool tm_model_watch_break(struct tm_lease *lease)
{
	struct tm_model_watch *watch = tm_lease_owner(lease);

	/* For ever: who waits must not go on before we are ready. */
	lease->fl_break_time = 0;
	tm_model_watch_spoil(watch);
	return false;
}

static const struct tm_lease_operations tm_model_watch_lease_ops = {
	.lm_break = tm_model_watch_break,
	.lm_change = lease_modify,
	TM_LEASE_OPEN_CONFLICT
};

static int tm_model_watch_lease(struct tm_model_watch *watch)
{
	struct tm_lease *lease;
	int err;

	lease = tm_lease_alloc(watch->file, watch, &tm_model_watch_lease_ops);
	if (!lease)
		return -ENOMEM;
	err = vfs_setlease(watch->file, F_RDLCK, &lease, NULL);
	tm_lease_free(lease);
	if (err == -EAGAIN)
		return -ETXTBSY;
	return err == -EINVAL ? -EOPNOTSUPP : err;
}

/**
 * tm_model_watch_begin - watch over the file of a generation
 * @watch: what the calls below want
 * @gen: the generation
 * @from: a descriptor of the file
 * @offset: of the model in it
 * @flags: for our own descriptor, beside O_RDONLY
 * @broke: what to do before the file changes; called once
 *
 * Context: may sleep. Return: 0, -ETXTBSY when the file is open for writing, -EACCES when it
 * is another user's, -EOPNOTSUPP when nobody can say when it changes, -ENOMEM, or what the file
 * system says to another descriptor.
 */
int tm_model_watch_begin(struct tm_model_watch *watch, struct tm_model_gen *gen,
			 const struct file *from, u64 offset,
			 unsigned int flags, tm_model_watcher broke)
{
	int err;

	err = tm_model_watch_supported(from);
	if (err)
		return err;
	watch->offset = offset;
	watch->size = gen->size;
	watch->gen = gen;
	watch->broke = broke;
	mutex_init(&watch->lock);
	INIT_WORK(&watch->breaking, tm_model_watch_break_work);
	INIT_WORK(&watch->closing, tm_model_watch_close_work);
	watch->file = dentry_open(&from->f_path, O_RDONLY | O_LARGEFILE | flags,
				  current_cred());
	if (IS_ERR(watch->file))
		return PTR_ERR(watch->file);
	err = tm_model_watch_lease(watch);
	if (err) {
		fput(watch->file);
		return err;
	}
	watch->file_size = i_size_read(file_inode(watch->file));
	watch->mtime = inode_get_mtime(file_inode(watch->file));
	return 0;
}

/* Undo it. Context: may sleep; no descriptor and no mapping of the generation is left. */
void tm_model_watch_end(struct tm_model_watch *watch)
{
	WRITE_ONCE(watch->ended, true);
	mutex_lock(&watch->lock);
	watch->gen = NULL;
	mutex_unlock(&watch->lock);
	/* Only a kernel thread may always let go of a lease, and close a file now. */
	queue_work(tm_model_watch_queue, &watch->closing);
	flush_work(&watch->closing);
}

/**
 * tm_model_watch_check - whether the file has all of the model, and as it was
 * @watch: the file
 *
 * Context: any. Return: 0, -EBADMSG when it is too short, -ETXTBSY when the lease is broken.
 */
int tm_model_watch_check(const struct tm_model_watch *watch)
{
	u64 size = watch->file_size;

	if (!tm_model_watch_intact(watch))
		return -ETXTBSY;
	return size < watch->offset || size - watch->offset < watch->size ?
	       -EBADMSG : 0;
}
