// SPDX-License-Identifier: GPL-2.0-only
/*
 * The descriptor of a slot: checks and copies what user space hands over. The semantics
 * are in the UAPI header.
 */
#include <linux/ctype.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/fs_struct.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/stddef.h>
#include <linux/string.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "client.h"
#include "model.h"
#include "model_cached.h"
#include "model_evict.h"
#include "model_file.h"
#include "model_gen.h"
#include "model_inode.h"
#include "model_load.h"
#include "pages.h"
#include "trace.h"

/* The parts every version of a struct has had. */
#define TM_MIN_OPEN	offsetofend(struct tensormem_model_open, fd)
#define TM_MIN_STAGE	offsetofend(struct tensormem_model_stage, fd)
#define TM_MIN_WHICH	offsetofend(struct tensormem_model_which, flags)
#define TM_MIN_ACQUIRE	offsetofend(struct tensormem_model_acquire, fd)
#define TM_MIN_REMOVE	offsetofend(struct tensormem_model_remove, flags)
#define TM_MIN_EVICT	offsetofend(struct tensormem_model_evict, flags)

/**
 * struct tm_model_handle - what a slot's descriptor stands for
 * @model: the slot; a reference
 * @client: who pays for what is staged; a reference
 * @seen: the generation acquired or described last, for poll(2)
 */
struct tm_model_handle {
	struct tm_model *model;
	struct tm_client *client;
	u64 seen;
};

/* The caller was told what did not come to be. */
static void tm_model_untell(void __user *arg, size_t size, const void *before,
			    size_t before_size)
{
	/* Where that cannot be written, it was not told either. */
	if (tm_args_out(arg, size, before, before_size))
		return;
}

static int tm_model_file_slot(struct tm_model_handle *handle, void __user *arg,
			      size_t size)
{
	struct tm_model *model = handle->model;
	struct tm_slot *slot = &model->slot;
	struct tensormem_model_slot info;
	bool removed;
	int err;

	err = tm_args_in(&info, sizeof(info), 0, arg, size);
	if (err)
		return err;
	if (down_read_killable(&model->lock))
		return -EINTR;
	removed = slot->removed;
	info = (struct tensormem_model_slot){
		.active = slot->active ? slot->active->number : 0,
		.previous = slot->previous ? slot->previous->number : 0,
		.staged = slot->staged ? slot->staged->number : 0,
		.last = slot->last,
		.generations = slot->generations,
	};
	up_read(&model->lock);
	if (removed)
		return -ENOENT;
	err = tm_args_out(arg, size, &info, sizeof(info));
	if (!err)
		WRITE_ONCE(handle->seen, info.active);
	return err;
}

/* Return: whether a load can read @file, or an errno. */
static int tm_model_check_source(const struct file *file)
{
	umode_t mode = file_inode(file)->i_mode;

	if (!(file->f_mode & FMODE_READ))
		return -EACCES;
	/* Of those without read_iter() the kernel complains in its log. */
	if ((!S_ISREG(mode) && !S_ISBLK(mode)) || file->f_flags & O_DIRECT ||
	    !(file->f_mode & FMODE_CAN_READ) || file->f_op->read ||
	    !file->f_op->read_iter)
		return -EINVAL;
	return 0;
}

/* Fill in a size of 0: all that follows. Return: 0, -EINVAL for nothing or too much. */
static int tm_model_check_size(const struct file *file,
			       struct tensormem_model_stage *stage)
{
	u64 all = i_size_read(file->f_mapping->host);

	if (stage->offset > MAX_LFS_FILESIZE)
		return -EINVAL;
	if (!stage->size && stage->offset < all)
		stage->size = all - stage->offset;
	if (!stage->size || stage->size > MAX_LFS_FILESIZE - stage->offset)
		return -EINVAL;
	return 0;
}

static int tm_model_check_stage(const struct tensormem_model_stage *stage)
{
	u32 known = TENSORMEM_MODEL_CACHED | TENSORMEM_MODEL_VERIFY |
		    TENSORMEM_MODEL_KEEP | TENSORMEM_MODEL_EVICTABLE;
	u32 both = TENSORMEM_MODEL_CACHED | TENSORMEM_MODEL_EVICTABLE;

	if (stage->flags & ~known || stage->pad ||
	    (stage->flags & both) == both)
		return -EINVAL;
	if (!(stage->flags & TENSORMEM_MODEL_VERIFY) &&
	    memchr_inv(stage->sha256, 0, sizeof(stage->sha256)))
		return -EINVAL;
	return 0;
}

/*
 * Put a generation into the slot and tell the caller, before it is so: nothing is left
 * to write once it has succeeded.
 */
static int tm_model_file_foretell(struct tm_model_load *load,
				  struct tm_model *model, struct file *file,
				  struct tensormem_model_stage *stage,
				  void __user *arg, size_t size)
{
	int err;

	do {
		stage->generation = tm_model_next(model);
		err = tm_args_out(arg, size, stage, sizeof(*stage));
		if (!err)
			err = tm_model_load_stage(load, stage->generation,
						  file);
	} while (err == -ESTALE);
	return err;
}

/* Stage @gen, which is consumed in any case. */
static int tm_model_file_load(struct tm_model_gen *gen, struct file *from,
			      struct tensormem_model_stage *stage,
			      void __user *arg, size_t size)
{
	bool verify = stage->flags & TENSORMEM_MODEL_VERIFY;
	struct tm_model_load *load;
	struct file *file;
	int err;

	load = tm_model_load_create(gen, from, stage->offset,
				    verify ? stage->sha256 : NULL);
	if (IS_ERR(load)) {
		err = PTR_ERR(load);
		goto err_gen;
	}
	file = tm_model_gen_file(gen);
	if (IS_ERR(file)) {
		err = PTR_ERR(file);
		goto err_load;
	}
	stage->fd = get_unused_fd_flags(O_CLOEXEC);
	err = stage->fd;
	if (err < 0)
		goto err_file;
	err = tm_model_file_foretell(load, gen->model, file, stage, arg, size);
	if (err)
		goto err_fd;
	tm_model_load_start(load);
	fd_install(stage->fd, file);
	return 0;

err_fd:
	put_unused_fd(stage->fd);
err_file:
	file->private_data = NULL;
	fput(file);
err_load:
	tm_model_load_discard(load);
err_gen:
	tm_model_gen_discard(gen);
	return err;
}

/* Make of @gen what the flags say. Return: 0 or an errno. */
static int tm_model_file_watch(struct tm_model_gen *gen, struct file *from,
			       u64 offset)
{
	struct tm_model_cached *cached;
	struct tm_model_evict *evict;

	if (gen->flags & TENSORMEM_MODEL_CACHED) {
		cached = tm_model_cached_create(gen, from, offset);
		if (IS_ERR(cached))
			return PTR_ERR(cached);
		gen->cached = cached;
	}
	if (gen->flags & TENSORMEM_MODEL_EVICTABLE) {
		evict = tm_model_evict_create(gen, from, offset);
		if (IS_ERR(evict))
			return PTR_ERR(evict);
		gen->evict = evict;
	}
	return 0;
}

static int tm_model_file_stage_from(struct tm_model_handle *handle,
				    struct file *from,
				    struct tensormem_model_stage *stage,
				    void __user *arg, size_t size)
{
	bool cached = stage->flags & TENSORMEM_MODEL_CACHED;
	struct tm_client *client = handle->client;
	struct tm_model_gen *gen;
	int err;

	err = tm_model_check_source(from);
	if (!err)
		err = tm_model_check_size(from, stage);
	/* Before a thread and a lease are taken for nothing. */
	if (!err)
		err = tm_model_may_stage(handle->model);
	if (err)
		return err;
	if (!cached && !tm_pages_could_hold(tm_client_numa(client).nodes,
					    PFN_UP(stage->size)))
		return -ENOSPC;
	gen = tm_model_gen_create(handle->model, client, stage->size,
				  stage->flags);
	if (IS_ERR(gen))
		return PTR_ERR(gen);
	err = tm_model_file_watch(gen, from, stage->offset);
	if (err) {
		tm_model_gen_discard(gen);
		return err;
	}
	return tm_model_file_load(gen, from, stage, arg, size);
}

static int tm_model_file_stage(struct tm_model_handle *handle, void __user *arg,
			       size_t size)
{
	struct tensormem_model_stage stage, before;
	struct file *from;
	int err;

	err = tm_args_in(&stage, sizeof(stage), TM_MIN_STAGE, arg, size);
	if (!err)
		err = tm_model_check_stage(&stage);
	if (err)
		return err;
	from = fget(stage.file);
	if (!from)
		return -EBADF;
	before = stage;
	err = tm_model_file_stage_from(handle, from, &stage, arg, size);
	fput(from);
	if (err)
		tm_model_untell(arg, size, &before, sizeof(before));
	return err;
}

static int tm_model_in_which(struct tensormem_model_which *which,
			     void __user *arg, size_t size)
{
	int err = tm_args_in(which, sizeof(*which), TM_MIN_WHICH, arg, size);

	return err ?: which->flags || which->pad ? -EINVAL : 0;
}

static int tm_model_file_commit(struct tm_model_handle *handle,
				void __user *arg, size_t size)
{
	struct tensormem_model_which which;
	int err = tm_model_in_which(&which, arg, size);

	return err ?: tm_model_commit(handle->model, which.generation);
}

static int tm_model_file_abort(struct tm_model_handle *handle, void __user *arg,
			       size_t size)
{
	struct tensormem_model_which which;
	int err = tm_model_in_which(&which, arg, size);

	return err ?: tm_model_abort(handle->model, which.generation);
}

/* The previous generation's number, or 0. */
static u64 tm_model_file_previous(struct tm_model *model)
{
	const struct tm_slot *slot = &model->slot;
	u64 number;

	down_read(&model->lock);
	number = slot->previous ? slot->previous->number : 0;
	up_read(&model->lock);
	return number;
}

static int tm_model_file_rollback(struct tm_model_handle *handle,
				  void __user *arg, size_t size)
{
	struct tensormem_model_which which, before;
	struct tm_model *model = handle->model;
	int err;

	err = tm_model_in_which(&which, arg, size);
	if (err)
		return err;
	before = which;
	do {
		/* Told before it is so, as the number of a generation staged. */
		if (!before.generation)
			which.generation = tm_model_file_previous(model);
		err = which.generation ?
		      tm_args_out(arg, size, &which, sizeof(which)) : -ENOENT;
		if (!err)
			err = tm_model_rollback(model, which.generation);
	} while (!before.generation && which.generation && err == -ENOENT);
	if (err)
		tm_model_untell(arg, size, &before, sizeof(before));
	return err;
}

static int tm_model_file_acquire(struct tm_model_handle *handle, bool write,
				 void __user *arg, size_t size)
{
	struct tensormem_model_acquire acquire;
	struct tm_model_gen *gen;
	struct file *file;
	int err;

	err = tm_args_in(&acquire, sizeof(acquire), TM_MIN_ACQUIRE, arg, size);
	if (err)
		return err;
	if (acquire.flags)
		return -EINVAL;
	gen = tm_model_acquire(handle->model, acquire.generation, write);
	if (IS_ERR(gen))
		return PTR_ERR(gen);
	acquire.generation = gen->core.number;
	file = tm_model_gen_file(gen);
	if (IS_ERR(file)) {
		tm_model_release(gen, NULL);
		return PTR_ERR(file);
	}
	acquire.fd = get_unused_fd_flags(O_CLOEXEC);
	err = acquire.fd < 0 ? acquire.fd :
	      tm_args_out(arg, size, &acquire, sizeof(acquire));
	if (err) {
		if (acquire.fd >= 0)
			put_unused_fd(acquire.fd);
		fput(file);
		return err;
	}
	WRITE_ONCE(handle->seen, acquire.generation);
	fd_install(acquire.fd, file);
	return 0;
}

static int tm_model_file_remove(struct tm_model_handle *handle,
				void __user *arg, size_t size)
{
	struct tensormem_model_remove remove;
	int err;

	err = tm_args_in(&remove, sizeof(remove), TM_MIN_REMOVE, arg, size);
	if (err)
		return err;
	if (remove.flags || remove.pad)
		return -EINVAL;
	return tm_model_remove(handle->model);
}

static int tm_model_file_evict(struct tm_model_handle *handle, void __user *arg,
			       size_t size)
{
	struct tensormem_model_evict evict;
	struct tm_model_gen *gen;
	u64 bytes;
	int err;

	err = tm_args_in(&evict, sizeof(evict), TM_MIN_EVICT, arg, size);
	if (err)
		return err;
	if (evict.flags || evict.pad)
		return -EINVAL;
	gen = tm_model_acquire(handle->model, evict.generation, true);
	if (IS_ERR(gen))
		return PTR_ERR(gen);
	bytes = evict.bytes ?: U64_MAX;
	evict.generation = gen->core.number;
	evict.bytes = 0;
	/* Told before it is so: what cannot be told is not done. */
	err = gen->evict ? tm_args_out(arg, size, &evict, sizeof(evict)) :
			   -EINVAL;
	if (!err) {
		evict.bytes = tm_model_evict_gen(gen, bytes);
		err = tm_args_out(arg, size, &evict, sizeof(evict));
	}
	tm_model_release(gen, NULL);
	return err;
}

/* Those that only a descriptor for writing can do. */
static int tm_model_file_write(struct tm_model_handle *handle, unsigned int nr,
			       void __user *arg, size_t size)
{
	switch (nr) {
	case _IOC_NR(TENSORMEM_IOC_MODEL_STAGE):
		return tm_model_file_stage(handle, arg, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_COMMIT):
		return tm_model_file_commit(handle, arg, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_ABORT):
		return tm_model_file_abort(handle, arg, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_ROLLBACK):
		return tm_model_file_rollback(handle, arg, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_EVICT):
		return tm_model_file_evict(handle, arg, size);
	default:
		return tm_model_file_remove(handle, arg, size);
	}
}

static long tm_model_file_command(struct file *file, unsigned int cmd,
				  unsigned long arg)
{
	struct tm_model_handle *handle = file->private_data;
	bool write = file->f_mode & FMODE_WRITE;
	void __user *user = (void __user *)arg;
	size_t size = _IOC_SIZE(cmd);

	if (_IOC_TYPE(cmd) != TENSORMEM_IOC_MAGIC ||
	    _IOC_DIR(cmd) != (_IOC_READ | _IOC_WRITE))
		return -ENOTTY;

	/* By number: the size in a command is the caller's idea of the struct. */
	switch (_IOC_NR(cmd)) {
	case _IOC_NR(TENSORMEM_IOC_MODEL_SLOT):
		return tm_model_file_slot(handle, user, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_ACQUIRE):
		return tm_model_file_acquire(handle, write, user, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_STAGE):
	case _IOC_NR(TENSORMEM_IOC_MODEL_COMMIT):
	case _IOC_NR(TENSORMEM_IOC_MODEL_ABORT):
	case _IOC_NR(TENSORMEM_IOC_MODEL_ROLLBACK):
	case _IOC_NR(TENSORMEM_IOC_MODEL_REMOVE):
	case _IOC_NR(TENSORMEM_IOC_MODEL_EVICT):
		return write ? tm_model_file_write(handle, _IOC_NR(cmd), user,
						   size) : -EACCES;
	default:
		return -ENOTTY;
	}
}

static long tm_model_file_ioctl(struct file *file, unsigned int cmd,
				unsigned long arg)
{
	u64 start = trace_tensormem_ioctl_enabled() ? ktime_get_ns() : 0;
	const struct tm_model_handle *handle = file->private_data;
	long ret = tm_model_file_command(file, cmd, arg);

	if (start)
		trace_tensormem_ioctl(handle->client->id, _IOC_NR(cmd),
				      ret, ktime_get_ns() - start);
	return ret;
}

static __poll_t tm_model_file_poll(struct file *file, poll_table *wait)
{
	struct tm_model_handle *handle = file->private_data;
	struct tm_model *model = handle->model;
	__poll_t events = 0;

	poll_wait(file, &model->wait, wait);
	down_read(&model->lock);
	if (model->slot.removed)
		events |= EPOLLHUP;
	else if (model->slot.active &&
		 model->slot.active->number != READ_ONCE(handle->seen))
		events |= EPOLLIN | EPOLLRDNORM;
	up_read(&model->lock);
	return events;
}

static int tm_model_file_release(struct inode *inode, struct file *file)
{
	struct tm_model_handle *handle = file->private_data;

	tm_client_put(handle->client);
	tm_model_put(handle->model);
	kfree(handle);
	return 0;
}

static const struct file_operations tm_model_file_fops = {
	.owner = THIS_MODULE,
	.release = tm_model_file_release,
	.llseek = noop_llseek,
	.poll = tm_model_file_poll,
	.unlocked_ioctl = tm_model_file_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

/* What tm_model_open() is to make of a slot. */
struct tm_model_opening {
	struct tm_client *client;
	bool write;
};

static struct file *tm_model_file_make(struct tm_model *model, void *data,
				       bool made)
{
	const struct tm_model_opening *opening = data;
	struct tm_model_handle *handle = kmalloc(sizeof(*handle), TM_GFP);
	struct file *file;
	int err;

	if (!handle)
		return ERR_PTR(-ENOMEM);
	*handle = (struct tm_model_handle){
		.model = model,
		.client = opening->client,
	};
	file = tm_model_inode_file(model->inode, "tensormem-slot",
				   opening->write ? O_RDWR : O_RDONLY,
				   &tm_model_file_fops, handle);
	if (IS_ERR(file)) {
		kfree(handle);
		return file;
	}
	kobject_get(&model->kobj);
	tm_client_get(opening->client);
	/* Who makes a slot may have it, whatever its mode: as for open(2). */
	err = made ? 0 : file_permission(file, opening->write ?
					 MAY_READ | MAY_WRITE : MAY_READ);
	if (!err)
		return file;
	fput(file);
	return ERR_PTR(err);
}

/* Return: 0, or -EINVAL for what cannot be a slot's name. */
static int tm_model_check_name(const u8 *name)
{
	/* Files beside the slots' folders in sysfs. */
	static const char * const reserved[] = {
		"slots", "generations", "held",
		"evictable", "evicted", "reloads", "reload_failed",
	};
	size_t length = strnlen(name, TENSORMEM_MODEL_NAME);

	if (!length || *name == '.' ||
	    length == TENSORMEM_MODEL_NAME ||
	    memchr_inv(name + length, 0, TENSORMEM_MODEL_NAME - length))
		return -EINVAL;
	for (size_t i = 0; i < length; i++)
		if (!isascii(name[i]) ||
		    (!isalnum(name[i]) && !strchr("._-", name[i])))
			return -EINVAL;
	return match_string(reserved, ARRAY_SIZE(reserved), name) < 0 ?
	       0 : -EINVAL;
}

static int tm_model_check_open(const struct tensormem_model_open *open)
{
	u32 known = TENSORMEM_MODEL_CREATE | TENSORMEM_MODEL_EXCL |
		    TENSORMEM_MODEL_WRITE;
	bool create = open->flags & TENSORMEM_MODEL_CREATE;

	if (open->flags & ~known || open->mode & ~0666 || open->pad)
		return -EINVAL;
	if (create && !(open->flags & TENSORMEM_MODEL_WRITE))
		return -EINVAL;
	if (!create && (open->flags & TENSORMEM_MODEL_EXCL || open->mode))
		return -EINVAL;
	return tm_model_check_name(open->name);
}

/**
 * tm_model_file_open - TENSORMEM_IOC_MODEL_OPEN
 * @client: who asks
 * @device: the device, in sysfs
 * @arg: its struct
 * @size: of that
 *
 * Context: may sleep. Return: 0 or an errno as in the UAPI header.
 */
int tm_model_file_open(struct tm_client *client, struct kobject *device,
		       void __user *arg, size_t size)
{
	struct tm_model_opening opening = { .client = client };
	struct tensormem_model_open open, before;
	struct file *file;
	int err;

	err = tm_args_in(&open, sizeof(open), TM_MIN_OPEN, arg, size);
	if (!err)
		err = tm_model_check_open(&open);
	if (err)
		return err;
	before = open;
	open.fd = get_unused_fd_flags(O_CLOEXEC);
	if (open.fd < 0)
		return open.fd;
	/* Told before it is so: nothing is left to write once a slot is made. */
	err = tm_args_out(arg, size, &open, sizeof(open));
	if (err)
		goto err;
	opening.write = open.flags & TENSORMEM_MODEL_WRITE;
	file = tm_model_open(device, open.name, open.flags,
			     open.mode & ~current_umask(), tm_model_file_make,
			     &opening);
	if (IS_ERR(file)) {
		err = PTR_ERR(file);
		tm_model_untell(arg, size, &before, sizeof(before));
		goto err;
	}
	fd_install(open.fd, file);
	return 0;
err:
	put_unused_fd(open.fd);
	return err;
}
