// SPDX-License-Identifier: GPL-2.0-only
#include "core/compact.h"

/* Pages to move out of a chunk; 0 for one that nobody may or need drain now. */
static u32 tm_compact_pages(const struct tm_buddy_chunk *c, u64 pass)
{
	u32 pages = 0;

	if (!c->in_pool || c->class != TM_BUDDY_MOVABLE || c->arriving ||
	    c->rest > pass)
		return 0;
	for (unsigned int o = 0; o < TM_BUDDY_ORDERS; o++)
		pages += (u32)c->used[o] << o;
	return pages;
}

/*
 * Whether the runs of @c fit into free runs of other chunks. To place the largest
 * first is exact: a run of an order takes one place of that order wherever it goes,
 * and a larger free run is two places of the order below.
 */
static bool tm_compact_fits(const struct tm_buddy *buddy,
			    const struct tm_buddy_chunk *c)
{
	u32 room = 0;

	for (unsigned int o = tm_buddy_max_order(buddy) + 1; o-- > 0;) {
		room = 2 * room - c->nr[o] +
		       buddy->free_runs[TM_BUDDY_MOVABLE][o] +
		       buddy->free_runs[TM_BUDDY_UNMOVABLE][o];
		if (c->used[o] > room)
			return false;
		room -= c->used[o];
	}
	return true;
}

static void tm_compact_restart(struct tm_compact *compact)
{
	compact->slot = 0;
	compact->best = TM_NONE;
	compact->best_pages = TM_NONE;
}

void tm_compact_begin(struct tm_buddy *buddy, struct tm_compact *compact)
{
	tm_assert_locked(buddy->lock);
	compact->pass = ++buddy->pass;
	tm_compact_restart(compact);
}

int tm_compact_choose(struct tm_buddy *buddy, struct tm_compact *compact,
		      struct tm_buddy_drain *drain)
{
	u32 left = buddy->nr_slots - compact->slot;
	struct tm_chunk_id id;

	tm_assert_locked(buddy->lock);
	if (left > TM_COMPACT_SCAN)
		left = TM_COMPACT_SCAN;
	for (; left; left--, compact->slot++) {
		const struct tm_buddy_chunk *c = &buddy->chunks[compact->slot];
		u32 pages = tm_compact_pages(c, compact->pass);

		if (!pages || pages >= compact->best_pages ||
		    !tm_compact_fits(buddy, c))
			continue;
		compact->best = compact->slot;
		compact->best_pages = pages;
	}
	if (compact->slot < buddy->nr_slots)
		return -EAGAIN;

	id.v = compact->best;
	tm_compact_restart(compact);
	if (id.v == TM_NONE)
		return -ENOENT;
	/* Much may have happened since the search came by. */
	if (!tm_compact_pages(&buddy->chunks[id.v], compact->pass) ||
	    !tm_compact_fits(buddy, &buddy->chunks[id.v]))
		return -EAGAIN;
	return tm_buddy_drain_begin(buddy, id, drain);
}

u32 tm_fragmentation(const struct tm_buddy *buddy, u32 spare)
{
	unsigned int chunk_order = buddy->geometry.chunk_order;
	/* A chunk without an allocated run is one free run. */
	u64 whole = (u64)spare +
		    buddy->free_runs[TM_BUDDY_MOVABLE][chunk_order] +
		    buddy->free_runs[TM_BUDDY_DRAINING][chunk_order];
	u64 free = ((u64)spare << chunk_order) + buddy->free_pages;

	tm_assert_locked(buddy->lock);
	if (!free)
		return 0;
	return (free - (whole << chunk_order)) * TM_FRAGMENTATION_ONE / free;
}
