// SPDX-License-Identifier: GPL-2.0-only
#include "core/heap.h"

static u32 tm_heap_type(const struct tm_heap *heap, u32 i)
{
	tm_step();
	return heap->node[i].tag >> TM_HEAP_TYPE_SHIFT;
}

static u32 tm_heap_value(const struct tm_heap *heap, u32 i)
{
	tm_step();
	return heap->node[i].tag & TM_HEAP_VALUE_MASK;
}

static void tm_heap_clear(struct tm_heap *heap, u32 i)
{
	tm_step();
	heap->node[i].tag = 0;
}

/* The boundaries of a block, which are then in no list and have no note. */
static void tm_heap_mark(struct tm_heap *heap, u32 start, u32 n, u32 first,
			 u32 last)
{
	struct tm_heap_node *node = heap->node;

	tm_step();
	node[start].tag = tm_heap_tag(first, n);
	node[start].link = TM_HEAP_NONE;
	tm_step();
	node[start + n - 1].tag =
		tm_heap_tag(last, last == TM_HEAP_FREE_LAST ? n : 0);
	node[start + n - 1].link = TM_HEAP_NONE;
}

/* By how much a length is divided to find its list: none below two rows. */
static u32 tm_heap_shift(u32 n)
{
	return tm_fls32(n | TM_HEAP_SUBS) - TM_HEAP_SUB_BITS;
}

/* The list for blocks of @n granules. */
static u32 tm_heap_list(u32 n)
{
	u32 shift = tm_heap_shift(n);

	return shift * TM_HEAP_SUBS + (n >> shift);
}

static u32 *tm_heap_head(struct tm_heap *heap, u32 list)
{
	tm_step();
	return &heap->head[list];
}

/* A block of no list becomes a free one. */
static void tm_heap_link(struct tm_heap *heap, u32 start, u32 n)
{
	struct tm_heap_node *node = heap->node;
	u32 list = tm_heap_list(n);
	u32 *head = tm_heap_head(heap, list);
	u32 row = list / TM_HEAP_SUBS, next = *head;

	*head = start;
	tm_step();
	heap->subs[row] |= 1u << list % TM_HEAP_SUBS;
	heap->rows |= 1u << row;
	heap->free += n;
	heap->nr_free++;
	tm_heap_mark(heap, start, n, TM_HEAP_FREE_FIRST, TM_HEAP_FREE_LAST);
	node[start].link = next;
	if (next != TM_HEAP_NONE) {
		next += tm_heap_value(heap, next) - 1;
		tm_step();
		node[next].link = start;
	}
}

/* The first block of a list is that from now on, or the list is empty. */
static void tm_heap_set_head(struct tm_heap *heap, u32 list, u32 start)
{
	u32 row = list / TM_HEAP_SUBS, subs;

	*tm_heap_head(heap, list) = start;
	if (start != TM_HEAP_NONE)
		return;
	tm_step();
	subs = heap->subs[row] & ~(1u << list % TM_HEAP_SUBS);
	heap->subs[row] = subs;
	if (!subs)
		heap->rows &= ~(1u << row);
}

/* Take a free block off its list. Return: its granules. */
static u32 tm_heap_unlink(struct tm_heap *heap, u32 start)
{
	struct tm_heap_node *node = heap->node;
	u32 n = tm_heap_value(heap, start);
	u32 next = node[start].link, prev = node[start + n - 1].link;

	tm_step();
	if (next != TM_HEAP_NONE) {
		u32 last = next + tm_heap_value(heap, next) - 1;

		tm_step();
		node[last].link = prev;
	}
	if (prev == TM_HEAP_NONE) {
		tm_heap_set_head(heap, tm_heap_list(n), next);
	} else {
		tm_step();
		node[prev].link = next;
	}
	heap->free -= n;
	heap->nr_free--;
	return n;
}

/* Take the first block off a list. Return: its granules. */
static u32 tm_heap_pop(struct tm_heap *heap, u32 list, u32 start)
{
	struct tm_heap_node *node = heap->node;
	u32 n = tm_heap_value(heap, start), next = node[start].link;

	tm_heap_set_head(heap, list, next);
	if (next != TM_HEAP_NONE) {
		next += tm_heap_value(heap, next) - 1;
		tm_step();
		node[next].link = TM_HEAP_NONE;
	}
	heap->free -= n;
	heap->nr_free--;
	return n;
}

/* Granules that are in no block become a free one, with what is free beside them. */
static void tm_heap_release(struct tm_heap *heap, u32 start, u32 n)
{
	u32 end = start + n;

	tm_heap_clear(heap, start);
	tm_heap_clear(heap, end - 1);
	if (end < heap->size && tm_heap_type(heap, end) == TM_HEAP_FREE_FIRST) {
		n = tm_heap_unlink(heap, end);
		tm_heap_clear(heap, end);
		if (heap->cursor == end)
			heap->cursor = start;
		end += n;
	}
	if (start && tm_heap_type(heap, start - 1) == TM_HEAP_FREE_LAST) {
		u32 prev = start - tm_heap_value(heap, start - 1);

		tm_heap_unlink(heap, prev);
		tm_heap_clear(heap, start - 1);
		if (heap->cursor == start)
			heap->cursor = prev;
		start = prev;
	}
	tm_heap_link(heap, start, end - start);
}

int tm_heap_init(struct tm_heap *heap, tm_raw_lock_t *lock, u32 size)
{
	/* Too large for a literal on a kernel stack. */
	memset(heap, 0, sizeof(*heap));
	if (size < TM_HEAP_MIN || size > TM_HEAP_MAX)
		return -EINVAL;
	heap->node = tm_table_alloc(size, sizeof(*heap->node));
	if (!heap->node)
		return -ENOMEM;
	heap->lock = lock;
	heap->size = size;
	memset(heap->head, 0xff, sizeof(heap->head));
	tm_heap_link(heap, 0, size);
	return 0;
}

void tm_heap_exit(struct tm_heap *heap)
{
	tm_table_free(heap->node);
	heap->node = NULL;
}

/* The list of whose blocks an allocation of @n granules gets the first, or TM_HEAP_NONE. */
static u32 tm_heap_find(struct tm_heap *heap, u32 n)
{
	/* All of this list are long enough: so are those of the lists behind it. */
	u32 list = tm_heap_list(n + (1u << tm_heap_shift(n)) - 1);
	u32 row = list / TM_HEAP_SUBS, rows, subs, start;

	subs = heap->subs[row] & ~0u << list % TM_HEAP_SUBS;
	tm_step();
	if (!subs) {
		rows = heap->rows & ~1u << row;
		if (!rows)
			goto own;
		row = tm_ctz64(rows);
		subs = heap->subs[row];
		tm_step();
	}
	return row * TM_HEAP_SUBS + tm_ctz64(subs);

own:
	list = tm_heap_list(n);
	start = *tm_heap_head(heap, list);
	if (start == TM_HEAP_NONE || tm_heap_value(heap, start) < n)
		return TM_HEAP_NONE;
	return list;
}

u32 tm_heap_alloc(struct tm_heap *heap, u32 n)
{
	u32 list, start, rest;

	tm_assert_raw_locked(heap->lock);
	if (n < TM_HEAP_MIN || n > heap->size)
		return TM_HEAP_NONE;
	n = tm_index(n, heap->size + 1);
	list = tm_heap_find(heap, n);
	if (list == TM_HEAP_NONE)
		return TM_HEAP_NONE;
	start = *tm_heap_head(heap, list);
	rest = tm_heap_pop(heap, list, start) - n;
	if (rest < TM_HEAP_MIN)
		n += rest;
	else
		tm_heap_link(heap, start + n, rest);
	tm_heap_mark(heap, start, n, TM_HEAP_USED_FIRST, TM_HEAP_USED_LAST);
	heap->nr_used++;
	return start;
}

void tm_heap_free(struct tm_heap *heap, u32 start)
{
	u32 n = tm_heap_length(heap, start);

	if (tm_warn_on(!n))
		return;
	heap->nr_used--;
	tm_heap_release(heap, start, n);
}

u32 tm_heap_length(const struct tm_heap *heap, u32 start)
{
	tm_assert_raw_locked(heap->lock);
	if (start >= heap->size)
		return 0;
	start = tm_index(start, heap->size);
	if (tm_heap_type(heap, start) != TM_HEAP_USED_FIRST)
		return 0;
	return tm_heap_value(heap, start);
}

u32 tm_heap_largest(const struct tm_heap *heap)
{
	u32 row;

	tm_assert_raw_locked(heap->lock);
	if (!heap->rows)
		return 0;
	row = tm_fls32(heap->rows);
	tm_step();
	return tm_heap_value(heap, heap->head[row * TM_HEAP_SUBS +
					      tm_fls32(heap->subs[row])]);
}

u32 tm_heap_slide_begin(struct tm_heap *heap, u32 hole)
{
	u32 n;

	tm_assert_raw_locked(heap->lock);
	n = tm_heap_unlink(heap, hole);
	tm_heap_mark(heap, hole, n, TM_HEAP_USED_FIRST, TM_HEAP_USED_LAST);
	heap->nr_used++;
	return hole + n;
}

u32 tm_heap_slide_end(struct tm_heap *heap, u32 hole)
{
	u32 gap, block, n;
	struct tm_heap_node first, last;

	tm_assert_raw_locked(heap->lock);
	gap = tm_heap_value(heap, hole);
	block = hole + gap;
	n = tm_heap_value(heap, block);
	tm_step();
	first = heap->node[block];
	tm_step();
	last = heap->node[block + n - 1];
	tm_heap_clear(heap, block - 1);
	tm_heap_clear(heap, block);
	tm_heap_clear(heap, block + n - 1);
	tm_step();
	heap->node[hole] = first;
	tm_step();
	heap->node[hole + n - 1] = last;
	if (heap->cursor == block)
		heap->cursor = hole;
	heap->nr_used--;
	tm_heap_release(heap, hole + n, gap);
	return tm_heap_value(heap, hole + n);
}

/* A list: what is in it belongs there, both links agree. Return: how many it has. */
static u32 tm_heap_check_list(const struct tm_heap *heap, u32 list)
{
	u32 start = heap->head[list], prev = TM_HEAP_NONE, nr = 0;

	tm_warn_on((heap->subs[list / TM_HEAP_SUBS] >> list % TM_HEAP_SUBS & 1) !=
		   (start != TM_HEAP_NONE));
	while (start != TM_HEAP_NONE) {
		u32 n;

		/* More than there are: a circle. */
		if (tm_warn_on(start >= heap->size || nr++ == heap->nr_free))
			break;
		n = tm_heap_value(heap, start);
		tm_warn_on(tm_heap_type(heap, start) != TM_HEAP_FREE_FIRST);
		tm_warn_on(tm_heap_list(n) != list);
		tm_warn_on(heap->node[start + n - 1].link != prev);
		prev = start;
		start = heap->node[start].link;
	}
	return nr;
}

static void tm_heap_check_lists(const struct tm_heap *heap)
{
	u32 nr = 0;

	for (u32 row = 0; row < TM_HEAP_ROWS; row++)
		tm_warn_on((heap->rows >> row & 1) != !!heap->subs[row]);
	tm_warn_on(heap->rows >> TM_HEAP_ROWS);
	for (u32 list = 0; list < TM_HEAP_LISTS; list++)
		nr += tm_heap_check_list(heap, list);
	tm_warn_on(nr != heap->nr_free);
}

/* A block by itself. Return: its granules; 0 for none. */
static u32 tm_heap_check_block(const struct tm_heap *heap, u32 start, bool *free)
{
	u32 n = tm_heap_value(heap, start), type = tm_heap_type(heap, start);
	u32 last;

	if (tm_warn_on(type != TM_HEAP_FREE_FIRST &&
		       type != TM_HEAP_USED_FIRST))
		return 0;
	if (tm_warn_on(n < TM_HEAP_MIN || n > heap->size - start))
		return 0;
	*free = type == TM_HEAP_FREE_FIRST;
	last = heap->node[start + n - 1].tag;
	if (*free)
		tm_warn_on(last != tm_heap_tag(TM_HEAP_FREE_LAST, n));
	else
		tm_warn_on(last >> TM_HEAP_TYPE_SHIFT != TM_HEAP_USED_LAST);
	for (u32 i = start + 1; i < start + n - 1; i++) {
		type = tm_heap_type(heap, i);
		tm_warn_on(heap->node[i].tag && type != TM_HEAP_ITEM_FREE &&
			   type != TM_HEAP_ITEM_USED);
	}
	return n;
}

void tm_heap_check(const struct tm_heap *heap)
{
	u32 free = 0, nr_free = 0, nr_used = 0, cursors = 0, n;
	bool was_free = false, is_free = false;

	tm_assert_raw_locked(heap->lock);
	for (u32 start = 0; start < heap->size; start += n) {
		n = tm_heap_check_block(heap, start, &is_free);
		if (!n)
			return;
		tm_warn_on(was_free && is_free);
		was_free = is_free;
		free += is_free ? n : 0;
		nr_free += is_free;
		nr_used += !is_free;
		cursors += heap->cursor == start;
	}
	tm_warn_on(free != heap->free);
	tm_warn_on(nr_free != heap->nr_free);
	tm_warn_on(nr_used != heap->nr_used);
	tm_warn_on(cursors != 1);
	tm_heap_check_lists(heap);
}
