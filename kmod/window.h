/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_WINDOW_H
#define TM_WINDOW_H

#include <linux/rbtree.h>
#include <linux/types.h>

/**
 * struct tm_range - a taken range of a window, embedded in what takes it
 * @node: in tm_window::ranges, sorted by @start
 * @start: first page
 * @length: pages
 * @gap: free pages just below @start
 * @subtree_gap: largest @gap in the subtree
 */
struct tm_range {
	struct rb_node node;
	u64 start;
	u64 length;
	u64 gap;
	u64 subtree_gap;
};

/**
 * struct tm_window - a range of page offsets handed out piecewise
 * @ranges: the ranges taken
 * @size: pages
 */
struct tm_window {
	struct rb_root ranges;
	u64 size;
};

/* All ranges from the bottom up. None may be inserted or removed meanwhile. */
#define tm_window_for_each(range, window)				\
	for (struct rb_node *rb_ = rb_first(&(window)->ranges);		\
	     rb_ && ((range) = rb_entry(rb_, struct tm_range, node));	\
	     rb_ = rb_next(rb_))

void tm_window_init(struct tm_window *window, u64 size);
int __must_check tm_window_insert(struct tm_window *window,
				  struct tm_range *range, u64 length,
				  u64 align, bool high);
void tm_window_remove(struct tm_window *window, struct tm_range *range);
struct tm_range *tm_window_find(const struct tm_window *window, u64 page);

#endif
