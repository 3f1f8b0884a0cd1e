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
#include <linux/kernel.h>
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

/* The lowest (or highest) range with a gap of @need pages below it. */
static struct tm_range *tm_window_gap(const struct tm_window *window, u64 need,
				      bool high)
{
	struct rb_node *rb = window->ranges.rb_node;

	if (tm_subtree_gap(rb) < need)
		return NULL;
	for (;;) {
		struct tm_range *range = tm_range_entry(rb);
		struct rb_node *first = high ? rb->rb_right : rb->rb_left;
		struct rb_node *last = high ? rb->rb_left : rb->rb_right;

		if (tm_subtree_gap(first) >= need) {
			rb = first;
			continue;
		}
		if (range->gap >= need)
			return range;
		rb = last;
	}
}

/* Where @length aligned pages fit into the gap from @start to @end, or @end. */
static u64 tm_gap_place(u64 start, u64 end, u64 length, u64 align, bool high)
{
	u64 place = ALIGN(start, align);

	if (place > end || length > end - place)
		return end;
	return high ? ALIGN_DOWN(end - length, align) : place;
}

/* Find the place for a range and the range above it, if there is one. */
static int tm_window_place(const struct tm_window *window, u64 length,
			   u64 align, bool high, struct tm_range **above,
			   u64 *start)
{
	u64 end = tm_range_end(tm_range_entry(rb_last(&window->ranges)));
	u64 needs[] = { length, length + align - 1 };

	/* Above all ranges is one more gap: the first choice of high ones. */
	*above = NULL;
	*start = tm_gap_place(end, window->size, length, align, high);
	if (high && *start != window->size)
		return 0;
	/* A gap that an equal range left is aligned as it is; else allow for it. */
	for (u32 i = 0; i < ARRAY_SIZE(needs); i++) {
		struct tm_range *range = tm_window_gap(window, needs[i], high);
		u64 place;

		if (!range)
			break;
		place = tm_gap_place(range->start - range->gap, range->start,
				     length, align, high);
		if (place == range->start)
			continue;
		*above = range;
		*start = place;
		return 0;
	}
	return *start == window->size ? -ENOBUFS : 0;
}

/**
 * tm_window_insert - take @length pages
 * @window: where
 * @range: filled in and inserted
 * @length: pages
 * @align: a power of two the start is a multiple of
 * @high: from the top of the window down instead of from its bottom up
 *
 * What is mapped in blocks lives at the top: a block can only be mapped where no
 * page table is, and small tensors leave theirs behind.
 *
 * Context: never sleeps; the caller excludes every other use of @window.
 * Return: 0, or -ENOBUFS when no gap is large enough. A gap is taken as large
 * enough when it holds @length however it is aligned, the first one of @length
 * also when it is aligned as it is.
 */
int tm_window_insert(struct tm_window *window, struct tm_range *range,
		     u64 length, u64 align, bool high)
{
	struct rb_node **link = &window->ranges.rb_node, *parent = NULL;
	struct tm_range *above, *below;
	u64 start;
	int err;

	err = tm_window_place(window, length, align, high, &above, &start);
	if (err)
		return err;
	below = tm_range_entry(above ? rb_prev(&above->node) :
				       rb_last(&window->ranges));

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
