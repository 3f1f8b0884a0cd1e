// SPDX-License-Identifier: GPL-2.0-only
/* What our ioctls have in common: extensible structs, and batches of them. */
#include <linux/errno.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/stddef.h>
#include <linux/uaccess.h>
#include <uapi/linux/tensormem.h>

#include "args.h"

/* The part every version of a batch has had. */
#define TM_MIN_BATCH	offsetofend(struct tensormem_batch, item_size)

/**
 * tm_args_in - copy a struct in that may be older or newer than ours
 * @to: ours
 * @size: of ours
 * @least: bytes that every version has had
 * @from: the caller's
 * @from_size: of the caller's
 *
 * Context: may sleep. Return: 0, -EFAULT, or -EINVAL for a size or a tail we cannot know.
 */
int tm_args_in(void *to, size_t size, size_t least, const void __user *from,
	       size_t from_size)
{
	int err;

	if (from_size < least || from_size > PAGE_SIZE)
		return -EINVAL;
	err = copy_struct_from_user(to, size, from, from_size);
	return err == -E2BIG ? -EINVAL : err;
}

/* Copy out what of a struct the caller knows. Return: 0 or -EFAULT. */
int tm_args_out(void __user *to, size_t to_size, const void *from, size_t size)
{
	return copy_to_user(to, from, min(to_size, size)) ? -EFAULT : 0;
}

/* Call with the struct at @arg as the only item. */
int tm_args_single(void *object, void __user *arg, size_t size,
		   tm_items_fn call)
{
	const struct tm_items items = { .base = arg, .count = 1, .size = size };
	u32 failed;

	return call(object, &items, &failed);
}

/* Call with the items of the struct tensormem_batch at @arg. */
int tm_args_batch(void *object, void __user *arg, size_t size,
		  tm_items_fn call)
{
	struct tensormem_batch batch;
	struct tm_items items;
	int err;

	err = tm_args_in(&batch, sizeof(batch), TM_MIN_BATCH, arg, size);
	if (err)
		return err;
	if (batch.flags || !batch.count || batch.count > TM_MAX_BATCH)
		return -EINVAL;
	items = (struct tm_items){
		.base = u64_to_user_ptr(batch.items),
		.count = batch.count,
		.size = batch.item_size,
	};
	/* Told now, so that nothing is left to write once the call has succeeded. */
	batch.failed = batch.count;
	err = tm_args_out(arg, size, &batch, sizeof(batch));
	if (err)
		return err;
	err = call(object, &items, &batch.failed);
	if (!err)
		return 0;
	return tm_args_out(arg, size, &batch, sizeof(batch)) ?: err;
}
