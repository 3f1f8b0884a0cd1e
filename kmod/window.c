// SPDX-License-Identifier: GPL-2.0-only
/*
 * Offsets in a client's window: first fit over the gaps between the ranges taken,
 * found in O(log n) through a tree that knows the largest gap below each node.
 * The nodes live in the tensors, so taking and giving back never allocates and a
 * free cannot fail.
 */
#include <linux/align.h>
#include <linux/container_of.h>
#include <linux/errno.h>
#include <linux/rbtree_augmented.h>

#include "window.h"

#define tm_range_entry(rb)	rb_entry_safe(rb, struct tm_range, node)

static u64 tm_range_own_gap(struct tm_range *range)
{
	return range->gap;
}

RB_DECLARE_CALLBACKS_MAX(static, tm_window_callbacks, struct tm_range, node,
			 u64, subtree_gap, tm_range_own_gap)

void tm_window_init(struct tm_window *window, u64 size)
{
	*window = (struct tm_window){ .ranges = RB_ROOT, .size = size };
}

static u64 tm_subtree_gap(struct rb_node *rb)
{
	return rb ? tm_range_entry(rb)->subtree_gap : 0;
}

/* The first page above @range; 0 when there is none. */
static u64 tm_range_end(const struct tm_range *range)
{
	return range ? range->start + range->length : 0;
}

static void tm_window_set_gap(struct tm_range *range, u64 gap)
{
	range->gap = gap;
	tm_window_callbacks_propagate(&range->node, NULL);
}

/* The lowest range with a gap of @need pages below it. */
static struct tm_range *tm_window_first_gap(const struct tm_window *window,
					    u64 need)
{
	struct rb_node *rb = window->ranges.rb_node;

	if (tm_subtree_gap(rb) < need)
		return NULL;
	for (;;) {
		struct tm_range *range = tm_range_entry(rb);

		if (tm_subtree_gap(rb->rb_left) >= need) {
			rb = rb->rb_left;
			continue;
		}
		if (range->gap >= need)
			return range;
		rb = rb->rb_right;
	}
}

/* What is left of the gap below @range when its start is aligned. */
static u64 tm_aligned_gap(const struct tm_range *range, u64 align)
{
	u64 start = ALIGN(range->start - range->gap, align);

	return start < range->start ? range->start - start : 0;
}

/**
 * tm_window_insert - take @length pages
 * @window: where
 * @length: pages
 * @range: filled in and inserted
 * @align: a power of two the start is a multiple of
 *
 * Context: never sleeps; the caller excludes every other use of @window.
 * Return: 0, or -ENOBUFS when no gap is large enough. A gap is taken as large
 * enough when it holds @length however it is aligned, the lowest one of @length
 * also when it is aligned as it is.
 */
int tm_window_insert(struct tm_window *window, struct tm_range *range,
		     u64 length, u64 align)
{
	struct rb_node **link = &window->ranges.rb_node, *parent = NULL;
	struct tm_range *above = tm_window_first_gap(window, length);
	struct tm_range *below;
	u64 start;

	/* A gap that an equal range left is aligned as it is; else allow for it. */
	if (above && tm_aligned_gap(above, align) < length)
		above = tm_window_first_gap(window, length + align - 1);
	if (above) {
		start = ALIGN(above->start - above->gap, align);
		below = tm_range_entry(rb_prev(&above->node));
	} else {
		below = tm_range_entry(rb_last(&window->ranges));
		start = ALIGN(tm_range_end(below), align);
		if (start > window->size || length > window->size - start)
			return -ENOBUFS;
	}

	while (*link) {
		parent = *link;
		link = start < tm_range_entry(parent)->start ? &parent->rb_left :
							       &parent->rb_right;
	}
	range->start = start;
	range->length = length;
	range->gap = start - tm_range_end(below);
	range->subtree_gap = range->gap;
	rb_link_node(&range->node, parent, link);
	tm_window_callbacks_propagate(parent, NULL);
	rb_insert_augmented(&range->node, &window->ranges,
			    &tm_window_callbacks);
	if (above)
		tm_window_set_gap(above, above->start - (start + length));
	return 0;
}

/**
 * tm_window_remove - give back a range
 * @window: where it is
 * @range: what to give back
 *
 * Context: never sleeps; the caller excludes every other use of @window.
 */
void tm_window_remove(struct tm_window *window, struct tm_range *range)
{
	struct tm_range *above = tm_range_entry(rb_next(&range->node));
	u64 gap = range->gap + range->length;

	rb_erase_augmented(&range->node, &window->ranges,
			   &tm_window_callbacks);
	if (above)
		tm_window_set_gap(above, above->gap + gap);
}

/**
 * tm_window_find - the range that holds @page, or NULL
 * @window: where to look
 * @page: an offset in pages
 *
 * Context: never sleeps; the caller excludes changes to @window.
 */
struct tm_range *tm_window_find(const struct tm_window *window, u64 page)
{
	struct rb_node *rb = window->ranges.rb_node;

	while (rb) {
		struct tm_range *range = tm_range_entry(rb);

		if (page < range->start)
			rb = rb->rb_left;
		else if (page - range->start >= range->length)
			rb = rb->rb_right;
		else
			return range;
	}
	return NULL;
}
