// SPDX-License-Identifier: GPL-2.0-only
#include "core/check.h"

const char *tm_chunk_check(const struct tm_chunk_pool *pool)
{
	u32 count[TM_CHUNK_STATES] = { 0 };
	u32 owned[TM_OWNERS] = { 0 };

	for (u32 v = 0; v < pool->nr_slots; v++) {
		const struct tm_chunk *c = &pool->chunks[v];

		if (c->state >= TM_CHUNK_STATES)
			return "a chunk has no valid state";
		count[c->state]++;
		if (c->state == TM_CHUNK_OWNED) {
			if (c->owner >= TM_OWNERS)
				return "an owned chunk has no valid owner";
			owned[c->owner]++;
		}
	}
	for (u32 s = 0; s < TM_CHUNK_STATES; s++) {
		bool listed = s == TM_CHUNK_ABSENT ||
			      s == TM_CHUNK_FREE_ZEROED ||
			      s == TM_CHUNK_FREE_DIRTY;
		u32 n = 0, prev = TM_NONE;

		if (count[s] != pool->count[s])
			return "a state's count is not the chunks in it";
		for (u32 v = pool->head[s]; v != TM_NONE;
		     v = pool->chunks[v].next) {
			if (pool->chunks[v].state != s)
				return "a chunk is on the list of another state";
			if (pool->chunks[v].prev != prev)
				return "a chunk's back link is wrong";
			if (++n > pool->nr_slots)
				return "a list of chunks is a ring";
			prev = v;
		}
		if (n != (listed ? count[s] : 0))
			return "a list does not hold all chunks of its state";
	}
	for (u32 o = 0; o < TM_OWNERS; o++)
		if (owned[o] != pool->owned[o])
			return "an owner's count is not the chunks it owns";
	return NULL;
}

static bool tm_check_zero(const void *object, size_t size)
{
	const u8 *byte = object;

	while (size--)
		if (*byte++)
			return false;
	return true;
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
			if (!tm_buddy_test(buddy, c, o, i))
				continue;
			nr++;
			if (o < buddy->geometry.chunk_order &&
			    tm_buddy_test(buddy, c, o, i ^ 1))
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
			if (!tm_check_zero(c, sizeof(*c)))
				return "a chunk outside the pool is not zero";
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
