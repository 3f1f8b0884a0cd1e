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
	u32 used[TM_BUDDY_ORDERS] = { 0 };
	u32 unmovable = 0, arriving = 0;

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
		u32 run = c->run[p] & TM_BUDDY_RUN_ORDER;

		if (!c->run[p])
			continue;
		if (!run)
			return "a page without a run has a mark";
		if (run > buddy->geometry.chunk_order)
			return "an allocated run is as large as a chunk";
		if (p & ((1u << (run - 1)) - 1))
			return "an allocated run is not aligned";
		for (u32 q = p; q < p + (1u << (run - 1)); q++)
			if (covered[q]++)
				return "an allocated run overlaps another run";
		used[run - 1]++;
		unmovable += !!(c->run[p] & TM_BUDDY_RUN_UNMOVABLE);
		arriving += !!(c->run[p] & TM_BUDDY_RUN_ARRIVING);
	}
	for (u32 p = 0; p < pages; p++)
		if (!covered[p])
			return "a page is neither free nor allocated";
	for (unsigned int o = 0; o < TM_BUDDY_ORDERS; o++)
		if (used[o] != c->used[o])
			return "an order's count is not its allocated runs";
	if (unmovable != c->unmovable)
		return "a count is not the runs that may not move";
	if (arriving != c->arriving)
		return "a count is not the runs that are moved to";
	if (c->class != (c->drain ? TM_BUDDY_DRAINING :
			 unmovable ? TM_BUDDY_UNMOVABLE : TM_BUDDY_MOVABLE))
		return "a chunk is in the wrong class";
	if (c->drain && (unmovable || arriving))
		return "a chunk that drains has a run that may not move";
	if (c->drain > buddy->drains)
		return "a chunk drains that nobody began to drain";
	return NULL;
}

const char *tm_buddy_check(const struct tm_buddy *buddy)
{
	u32 nr_chunks = 0, free_pages = 0, listed = 0, with_free = 0;
	u32 free_runs[TM_BUDDY_CLASSES][TM_BUDDY_ORDERS] = { 0 };
	u64 drains = buddy->emptied + buddy->halved + buddy->given_up +
		     buddy->starved;

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
		drains += c->class == TM_BUDDY_DRAINING;
		for (unsigned int o = 0; o < TM_BUDDY_ORDERS; o++)
			free_runs[c->class][o] += c->nr[o];
	}
	if (nr_chunks != buddy->nr_chunks)
		return "the pool's chunk count is wrong";
	if (free_pages != buddy->free_pages)
		return "the pool's free page count is wrong";
	if (drains != buddy->drains)
		return "a drain is lost or has ended twice";
	for (u32 class = 0; class < TM_BUDDY_CLASSES; class++)
		for (unsigned int o = 0; o < TM_BUDDY_ORDERS; o++)
			if (free_runs[class][o] != buddy->free_runs[class][o])
				return "a class's count is not its free runs";

	for (u32 list = 0; list < TM_BUDDY_LISTS; list++) {
		u32 prev = TM_NONE;

		if (!(buddy->lists >> list & 1) != (buddy->head[list] == TM_NONE))
			return "the mask of lists is wrong";
		for (u32 v = buddy->head[list]; v != TM_NONE;
		     v = buddy->chunks[v].next) {
			const struct tm_buddy_chunk *c = &buddy->chunks[v];

			if (!c->in_pool || !c->orders ||
			    c->class * TM_BUDDY_ORDERS + tm_fls32(c->orders) !=
			    list)
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
