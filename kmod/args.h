/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_ARGS_H
#define TM_ARGS_H

#include <linux/types.h>

/* Bounds the time under a lock and the arrays of one call. */
#define TM_MAX_BATCH	4096

/* An array of one ioctl struct in user memory; a single call is an array of 1. */
struct tm_items {
	void __user *base;
	u32 count;
	u32 size;
};

static inline void __user *tm_item(const struct tm_items *items, u32 i)
{
	return items->base + (size_t)i * items->size;
}

int __must_check tm_args_in(void *to, size_t size, size_t least,
			    const void __user *from, size_t from_size);
int __must_check tm_args_out(void __user *to, size_t to_size, const void *from,
			     size_t size);

/* @failed: on failure the item concerned; else without meaning. */
typedef int (*tm_items_fn)(void *object, const struct tm_items *items,
			   u32 *failed);

int tm_args_single(void *object, void __user *arg, size_t size,
		   tm_items_fn call);
int tm_args_batch(void *object, void __user *arg, size_t size,
		  tm_items_fn call);

#endif
