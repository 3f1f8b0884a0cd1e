// SPDX-License-Identifier: GPL-2.0-only
/*
 * The descriptor of an RT client: checks and copies what user space hands over. The
 * semantics are in the UAPI header. Nothing here asks for memory once there is a descriptor.
 */
#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/stddef.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "client.h"
#include "rt.h"
#include "rt_file.h"
#include "rt_vm.h"
#include "trace.h"
#include "vm.h"

/* The parts every version of a struct has had. */
#define TM_MIN_RT_OPEN		offsetofend(struct tensormem_rt_open, fd)
#define TM_MIN_RT_RESERVE	offsetofend(struct tensormem_rt_reserve, flags)
#define TM_MIN_RT_ALLOC		offsetofend(struct tensormem_rt_alloc, offset)
#define TM_MIN_RT_FREE		offsetofend(struct tensormem_rt_block, flags)
#define TM_MIN_RT_PIN		offsetofend(struct tensormem_rt_block, offset)
#define TM_MIN_RT_PRIORITY	offsetofend(struct tensormem_rt_priority, flags)

static_assert(TENSORMEM_RT_STEP == TM_RT_STEP);
static_assert(TENSORMEM_RT_MAX_CLASSES == TM_RT_CLASSES);
static_assert(TENSORMEM_RT_MAX_PRIORITY < TM_RT_PRIORITIES);

static void tm_rt_fill_info(struct tm_rt_user *user,
			    struct tensormem_rt_info *info)
{
	struct tm_rt_state s;

	tm_rt_user_state(user, &s);
	*info = (struct tensormem_rt_info){
		.size = s.size,
		.granule = tm_rt_granule(),
		.clients = s.clients,
		.free = s.free,
		.largest = s.largest,
		.reserved = s.reserved,
		.used = s.used,
		.blocks = s.blocks,
		.priority = s.priority,
		.waiting = s.waiting,
		.allocs = s.counts.allocs,
		.refused = s.counts.refused,
		.misses = s.counts.misses,
		.waits = s.counts.waits,
		.moves = s.moves,
	};
}

static int tm_rt_file_info(struct tm_rt_user *user, void __user *arg,
			   size_t size)
{
	struct tensormem_rt_info info;
	int err;

	err = tm_args_in(&info, sizeof(info), 0, arg, size);
	if (err)
		return err;
	tm_rt_fill_info(user, &info);
	return tm_args_out(arg, size, &info, sizeof(info));
}

static int tm_rt_file_reserve(struct tm_rt_user *user, void __user *arg,
			      size_t size)
{
	struct tensormem_rt_reserve reserve;
	int err;

	err = tm_args_in(&reserve, sizeof(reserve), TM_MIN_RT_RESERVE, arg,
			 size);
	if (err)
		return err;
	if (reserve.flags)
		return -EINVAL;
	if (!capable(CAP_SYS_NICE))
		return -EPERM;
	return tm_rt_user_reserve(user, reserve.size, reserve.count);
}

static int tm_rt_file_priority(struct tm_rt_user *user, void __user *arg,
			       size_t size)
{
	struct tensormem_rt_priority priority;
	int err;

	err = tm_args_in(&priority, sizeof(priority), TM_MIN_RT_PRIORITY, arg,
			 size);
	if (err)
		return err;
	if (priority.flags || priority.priority > TENSORMEM_RT_MAX_PRIORITY)
		return -EINVAL;
	if (priority.priority > READ_ONCE(user->core.priority) &&
	    !capable(CAP_SYS_NICE))
		return -EPERM;
	return tm_rt_user_set_priority(user, priority.priority);
}

/* When a request has to be served. @now: when it was made. Return: 0, -EINVAL. */
static int tm_rt_file_deadline(const struct tensormem_rt_alloc *request,
			       ktime_t now, ktime_t *deadline)
{
	if (request->deadline_ns > KTIME_MAX)
		return -EINVAL;
	*deadline = request->deadline_ns;
	if (*deadline && !(request->flags & TENSORMEM_RT_ABSOLUTE))
		*deadline = ktime_add_safe(now, *deadline);
	return 0;
}

/* One allocation. Return: 0 or an errno as in the UAPI header. */
static int tm_rt_file_alloc_one(struct tm_rt_user *user,
				const struct tensormem_rt_alloc *request,
				ktime_t now, struct tm_rt_block *block)
{
	u32 flags = 0;
	ktime_t deadline;
	int err;

	if (request->flags & ~(TENSORMEM_RT_ABSOLUTE | TENSORMEM_RT_RESERVED |
			       TENSORMEM_RT_MOVABLE))
		return -EINVAL;
	if (request->flags & TENSORMEM_RT_RESERVED)
		flags |= TM_RT_ALLOC_RESERVED;
	if (request->flags & TENSORMEM_RT_MOVABLE)
		flags |= TM_RT_ALLOC_MOVABLE;
	err = tm_rt_file_deadline(request, now, &deadline);
	return err ?: tm_rt_user_alloc(user, request->size, flags, deadline,
				       block);
}

/* Tell the caller what became of an item. Return: 0 or -EFAULT. */
static int tm_rt_file_alloc_out(const struct tm_items *items, u32 i,
				const struct tm_rt_block *block)
{
	struct tensormem_rt_alloc __user *to = tm_item(items, i);

	if (put_user(block->handle, &to->handle) ||
	    put_user(tm_rt_bytes(block->start), &to->offset))
		return -EFAULT;
	return 0;
}

static int tm_rt_file_alloc(void *object, const struct tm_items *items,
			    u32 *failed)
{
	struct tm_rt_block block[TENSORMEM_RT_MAX_BATCH];
	struct tm_rt_user *user = object;
	struct tensormem_rt_alloc request;
	ktime_t now = ktime_get();
	u32 made = 0;
	int err = 0;

	*failed = 0;
	if (items->count > TENSORMEM_RT_MAX_BATCH)
		return -EINVAL;
	for (; made < items->count && !err; made += !err) {
		*failed = made;
		err = tm_args_in(&request, sizeof(request), TM_MIN_RT_ALLOC,
				 tm_item(items, made), items->size);
		if (!err)
			err = tm_rt_file_alloc_one(user, &request, now,
						   &block[made]);
	}
	for (u32 i = 0; i < items->count && !err; i++) {
		*failed = i;
		err = tm_rt_file_alloc_out(items, i, &block[i]);
	}
	while (err && made--)
		tm_rt_user_undo(user, block[made].handle);
	return err;
}

static int tm_rt_file_block_in(struct tensormem_rt_block *block, u32 least,
			       void __user *arg, size_t size)
{
	int err = tm_args_in(block, sizeof(*block), least, arg, size);

	return !err && block->flags ? -EINVAL : err;
}

/* Undo what @pinned says has been pinned. */
static void tm_rt_file_unpin(struct tm_rt_user *user, const u32 *handle,
			     u64 pinned)
{
	for (; pinned; pinned &= pinned - 1)
		/* One that is not movable is none that was pinned. */
		if (tm_rt_user_unpin(user, handle[__ffs64(pinned)]))
			continue;
}

/* Read the handles of a batch. Return: 0, -EINVAL, -EFAULT, -ENOENT for one named twice. */
static int tm_rt_file_handles(const struct tm_items *items, u32 *handle,
			      u32 *failed)
{
	struct tensormem_rt_block request;
	int err;

	for (u32 i = 0; i < items->count; i++) {
		*failed = i;
		err = tm_rt_file_block_in(&request, TM_MIN_RT_FREE,
					  tm_item(items, i), items->size);
		if (err)
			return err;
		handle[i] = request.handle;
		for (u32 j = 0; j < i; j++)
			if (handle[j] == handle[i])
				return -ENOENT;
	}
	return 0;
}

/*
 * All or none without a lock over all: who pins a block finds out whether it is there, and then frees it. That another
 * thread frees one in between is fine: all of them are gone, as was asked for.
 */
static int tm_rt_file_free(void *object, const struct tm_items *items,
			   u32 *failed)
{
	static_assert(TENSORMEM_RT_MAX_BATCH <= 64);
	u32 handle[TENSORMEM_RT_MAX_BATCH];
	struct tm_rt_user *user = object;
	struct tm_rt_block where;
	u64 pinned = 0;
	int err;

	*failed = 0;
	if (items->count > TENSORMEM_RT_MAX_BATCH)
		return -EINVAL;
	err = tm_rt_file_handles(items, handle, failed);
	if (err)
		return err;
	if (items->count == 1)
		return tm_rt_user_free(user, handle[0]);
	for (u32 i = 0; i < items->count; i++) {
		*failed = i;
		err = tm_rt_user_pin(user, handle[i], &where);
		if (!err)
			pinned |= BIT_ULL(i);
		else if (err != -EOVERFLOW)
			break;
	}
	if (err == -ENOENT) {
		tm_rt_file_unpin(user, handle, pinned);
		return err;
	}
	for (u32 i = 0; i < items->count; i++)
		if (tm_rt_user_free(user, handle[i]))
			continue;
	return 0;
}

static int tm_rt_file_pin(struct tm_rt_user *user, void __user *arg,
			  size_t size)
{
	struct tensormem_rt_block pin;
	struct tm_rt_block block;
	int err;

	err = tm_rt_file_block_in(&pin, TM_MIN_RT_PIN, arg, size);
	if (!err)
		err = tm_rt_user_pin(user, pin.handle, &block);
	if (err)
		return err;
	pin.offset = tm_rt_bytes(block.start);
	err = tm_args_out(arg, size, &pin, sizeof(pin));
	if (err)
		tm_rt_file_unpin(user, &pin.handle, 1);
	return err;
}

static int tm_rt_file_unpin_one(struct tm_rt_user *user, void __user *arg,
				size_t size)
{
	struct tensormem_rt_block pin;
	int err;

	err = tm_rt_file_block_in(&pin, TM_MIN_RT_FREE, arg, size);
	return err ?: tm_rt_user_unpin(user, pin.handle);
}

static long tm_rt_file_command(struct file *file, unsigned int cmd,
			       unsigned long arg)
{
	struct tm_rt_user *user = file->private_data;
	void __user *to = (void __user *)arg;
	size_t size = _IOC_SIZE(cmd);

	if (_IOC_TYPE(cmd) != TENSORMEM_IOC_MAGIC ||
	    _IOC_DIR(cmd) != (_IOC_READ | _IOC_WRITE))
		return -ENOTTY;

	/* By number: the size in a command is the caller's idea of the struct. */
	switch (_IOC_NR(cmd)) {
	case _IOC_NR(TENSORMEM_IOC_RT_INFO):
		return tm_rt_file_info(user, to, size);
	case _IOC_NR(TENSORMEM_IOC_RT_RESERVE):
		return tm_rt_file_reserve(user, to, size);
	case _IOC_NR(TENSORMEM_IOC_RT_ALLOC):
		return tm_args_single(user, to, size, tm_rt_file_alloc);
	case _IOC_NR(TENSORMEM_IOC_RT_FREE):
		return tm_args_single(user, to, size, tm_rt_file_free);
	case _IOC_NR(TENSORMEM_IOC_RT_PIN):
		return tm_rt_file_pin(user, to, size);
	case _IOC_NR(TENSORMEM_IOC_RT_UNPIN):
		return tm_rt_file_unpin_one(user, to, size);
	case _IOC_NR(TENSORMEM_IOC_RT_PRIORITY):
		return tm_rt_file_priority(user, to, size);
	case _IOC_NR(TENSORMEM_IOC_RT_ALLOC_BATCH):
		return tm_args_batch(user, to, size, tm_rt_file_alloc);
	case _IOC_NR(TENSORMEM_IOC_RT_FREE_BATCH):
		return tm_args_batch(user, to, size, tm_rt_file_free);
	default:
		return -ENOTTY;
	}
}

static long tm_rt_file_ioctl(struct file *file, unsigned int cmd,
			     unsigned long arg)
{
	u64 start = trace_tensormem_ioctl_enabled() ? ktime_get_ns() : 0;
	const struct tm_rt_user *user = file->private_data;
	long ret = tm_rt_file_command(file, cmd, arg);

	if (start)
		trace_tensormem_ioctl(user->arena->client->id, _IOC_NR(cmd),
				      ret, ktime_get_ns() - start);
	return ret;
}

static void tm_rt_file_fdinfo(struct seq_file *out, struct file *file)
{
	struct tm_rt_user *user = file->private_data;
	struct tensormem_rt_info info;

	tm_rt_fill_info(user, &info);
	seq_printf(out, "tensormem-rt:\t%u\n", user->id);
	seq_printf(out, "arena:\t%u\n", user->arena->id);
	seq_printf(out, "client:\t%u\n", user->arena->client->id);
#define TM_RT_LINE(field)						\
	seq_printf(out, #field ":\t%llu\n", (unsigned long long)info.field)
	TM_RT_LINE(size);
	TM_RT_LINE(free);
	TM_RT_LINE(largest);
	TM_RT_LINE(reserved);
	TM_RT_LINE(used);
	TM_RT_LINE(blocks);
	TM_RT_LINE(priority);
	TM_RT_LINE(waiting);
	TM_RT_LINE(allocs);
	TM_RT_LINE(refused);
	TM_RT_LINE(misses);
	TM_RT_LINE(waits);
	TM_RT_LINE(moves);
#undef TM_RT_LINE
}

static int tm_rt_file_release(struct inode *inode, struct file *file)
{
	tm_rt_user_destroy(file->private_data);
	return 0;
}

static const struct file_operations tm_rt_fops = {
	.owner = THIS_MODULE,
	.release = tm_rt_file_release,
	.unlocked_ioctl = tm_rt_file_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = tm_rt_vm_mmap,
	.get_unmapped_area = tm_vm_unmapped_area,
	.show_fdinfo = tm_rt_file_fdinfo,
};

/* The arena that @fd has a client of, with a reference, or an ERR_PTR: -EBADF, -EINVAL. */
static struct tm_arena *tm_rt_file_arena(int fd)
{
	struct tm_arena *arena = ERR_PTR(-EINVAL);
	struct file *file = fget(fd);

	if (!file)
		return ERR_PTR(-EBADF);
	if (file->f_op == &tm_rt_fops)
		arena = tm_arena_get(((struct tm_rt_user *)
				      file->private_data)->arena);
	fput(file);
	return arena;
}

static struct tm_arena *tm_rt_file_get_arena(struct tm_client *client,
					     const struct tensormem_rt_open *open)
{
	if (open->flags || open->pad ||
	    open->priority > TENSORMEM_RT_MAX_PRIORITY)
		return ERR_PTR(-EINVAL);
	if (open->arena != -1 && (open->size || open->movable))
		return ERR_PTR(-EINVAL);
	if (open->priority && !capable(CAP_SYS_NICE))
		return ERR_PTR(-EPERM);
	if (open->arena != -1)
		return tm_rt_file_arena(open->arena);
	return tm_arena_create(client, open->size, open->movable, true);
}

/* A descriptor of a new client of @arena, whose reference it consumes. */
static struct file *tm_rt_new_file(struct tm_arena *arena, u32 priority)
{
	struct tm_rt_user *user = tm_rt_user_create(arena, priority);
	struct file *file;

	/* The client has one of its own. */
	tm_arena_put(arena);
	if (IS_ERR(user))
		return ERR_CAST(user);
	file = anon_inode_getfile("[tensormem-rt]", &tm_rt_fops, user,
				  O_RDWR | O_CLOEXEC);
	if (IS_ERR(file))
		tm_rt_user_destroy(user);
	else
		file->f_mapping = arena->inode->i_mapping;
	return file;
}

/**
 * tm_rt_file_open - TENSORMEM_IOC_RT_OPEN
 * @client: who asks
 * @arg: its struct
 * @size: of that
 *
 * Context: may sleep. Return: 0 or an errno as in the UAPI header.
 */
int tm_rt_file_open(struct tm_client *client, void __user *arg, size_t size)
{
	struct tensormem_rt_open open;
	struct tm_arena *arena;
	struct file *file;
	int err, fd;

	err = tm_args_in(&open, sizeof(open), TM_MIN_RT_OPEN, arg, size);
	if (err)
		return err;
	arena = tm_rt_file_get_arena(client, &open);
	if (IS_ERR(arena))
		return PTR_ERR(arena);
	file = tm_rt_new_file(arena, open.priority);
	if (IS_ERR(file))
		return PTR_ERR(file);
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0) {
		fput(file);
		return fd;
	}
	open.fd = fd;
	err = tm_args_out(arg, size, &open, sizeof(open));
	if (err) {
		put_unused_fd(fd);
		fput(file);
		return err;
	}
	fd_install(fd, file);
	return 0;
}
