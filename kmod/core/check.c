// SPDX-License-Identifier: GPL-2.0-only
#include "core/check.h"

/* Whether @c has the form that its state says it has. */
static bool tm_chunk_check_form(const struct tm_chunk *c)
{
	switch (c->state) {
	case TM_CHUNK_FREE_ZEROED:
	case TM_CHUNK_FREE_DIRTY:
	case TM_CHUNK_ZEROING:
		return !c->form.split && !c->form.charged;
	case TM_CHUNK_FREE_SPLIT:
		return c->form.split && !c->form.charged;
	default:
		return true;
	}
}

const char *tm_chunk_check(const struct tm_chunk_pool *pool)
{
	u32 count[TM_CHUNK_STATES] = { 0 };
	u32 owned[TM_OWNERS] = { 0 };

	for (u32 v = 0; v < pool->nr_slots; v++) {
		const struct tm_chunk *c = &pool->chunks[v];

		if (c->state >= TM_CHUNK_STATES)
			return "a chunk has no valid state";
		if (!tm_chunk_check_form(c))
			return "a free chunk is charged or of the wrong form";
		count[c->state]++;
		if (c->state == TM_CHUNK_OWNED) {
			if (c->owner >= TM_OWNERS)
				return "an owned chunk has no valid owner";
			owned[c->owner]++;
		}
	}
	for (u32 s = 0; s < TM_CHUNK_STATES; s++) {
		bool stacked = s == TM_CHUNK_ABSENT ||
			       s == TM_CHUNK_FREE_ZEROED ||
			       s == TM_CHUNK_FREE_DIRTY ||
			       s == TM_CHUNK_FREE_SPLIT;
		u32 n = 0;

		if (count[s] != pool->count[s])
			return "a state's count is not the chunks in it";
		if (!stacked && pool->head[s] != TM_NONE)
			return "a state that has no stack has one";
		for (u32 v = pool->head[s]; v != TM_NONE;
		     v = pool->chunks[v].next) {
			if (v >= pool->nr_slots)
				return "a stack leads out of the table";
			if (pool->chunks[v].state != s)
				return "a chunk is on the stack of another state";
			/* More chunks of the state than there are: one came twice. */
			if (++n > count[s])
				return "a stack is a ring";
		}
		if (stacked && n != count[s])
			return "a stack does not hold all chunks of its state";
	}
	for (u32 o = 0; o < TM_OWNERS; o++)
		if (owned[o] != pool->owned[o])
			return "an owner's count is not the chunks it owns";
	return NULL;
}

static bool tm_check_bit(const struct tm_buddy *buddy,
			 const struct tm_buddy_chunk *c, unsigned int order,
			 u32 i)
{
	return c->bits[buddy->word[order] + i / 64] >> (i % 64) & 1;
}

static const char *tm_buddy_check_chunk(const struct tm_buddy *buddy,
					const struct tm_buddy_chunk *c,
					u32 *free_pages)
{
	u8 covered[1u << TM_MAX_CHUNK_ORDER] = { 0 };
	u32 pages = tm_chunk_pages(buddy->geometry);

	for (unsigned int o = 0; o <= buddy->geometry.chunk_order; o++) {
		u32 nr = 0;

		for (u32 i = 0; i < pages >> o; i++) {
			if (!tm_check_bit(buddy, c, o, i))
				continue;
			nr++;
			if (o < buddy->geometry.chunk_order &&
			    tm_check_bit(buddy, c, o, i ^ 1))
				return "a run and its buddy are both free";
			for (u32 p = i << o; p < (i + 1) << o; p++)
				if (covered[p]++)
					return "two free runs overlap";
			*free_pages += 1u << o;
		}
		if (nr != c->nr[o])
			return "an order's count is not its free runs";
		if (!nr != !(c->orders >> o & 1))
			return "the mask of free orders is wrong";
	}
	for (u32 p = 0; p < pages; p++) {
		if (!c->run[p])
			continue;
		if (c->run[p] > buddy->geometry.chunk_order)
			return "an allocated run is as large as a chunk";
		if (p & ((1u << (c->run[p] - 1)) - 1))
			return "an allocated run is not aligned";
		for (u32 q = p; q < p + (1u << (c->run[p] - 1)); q++)
			if (covered[q]++)
				return "an allocated run overlaps another run";
	}
	for (u32 p = 0; p < pages; p++)
		if (!covered[p])
			return "a page is neither free nor allocated";
	return NULL;
}

const char *tm_buddy_check(const struct tm_buddy *buddy)
{
	u32 nr_chunks = 0, free_pages = 0, listed = 0, with_free = 0;

	for (u32 v = 0; v < buddy->nr_slots; v++) {
		const struct tm_buddy_chunk *c = &buddy->chunks[v];
		const char *error;

		if (!c->in_pool) {
			if (c->orders)
				return "a chunk outside the pool has free runs";
			continue;
		}
		nr_chunks++;
		with_free += c->orders != 0;
		error = tm_buddy_check_chunk(buddy, c, &free_pages);
		if (error)
			return error;
	}
	if (nr_chunks != buddy->nr_chunks)
		return "the pool's chunk count is wrong";
	if (free_pages != buddy->free_pages)
		return "the pool's free page count is wrong";

	for (unsigned int o = 0; o <= buddy->geometry.chunk_order; o++) {
		u32 prev = TM_NONE;

		if (!(buddy->lists >> o & 1) != (buddy->head[o] == TM_NONE))
			return "the mask of lists is wrong";
		for (u32 v = buddy->head[o]; v != TM_NONE;
		     v = buddy->chunks[v].next) {
			const struct tm_buddy_chunk *c = &buddy->chunks[v];

			if (!c->in_pool || !c->orders ||
			    tm_fls32(c->orders) != o)
				return "a chunk is on the list of another order";
			if (c->prev != prev)
				return "a chunk's back link is wrong";
			if (++listed > nr_chunks)
				return "a list of chunks is a ring";
			prev = v;
		}
	}
	if (listed != with_free)
		return "a chunk with free runs is on no list";
	return NULL;
}
