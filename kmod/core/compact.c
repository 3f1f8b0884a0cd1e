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
 * Whether the runs of @c up to order @top fit into free runs of other chunks up to
 * @top. To place the largest first is exact: a run of an order takes one place of
 * that order wherever it goes, and a larger free run is two places of the order
 * below.
 */
static bool tm_compact_fits(const struct tm_buddy *buddy,
			    const struct tm_buddy_chunk *c, unsigned int top)
{
	u32 room = 0;

	for (unsigned int o = top + 1; o-- > 0;) {
		room = 2 * room - c->nr[o] +
		       buddy->free_runs[TM_BUDDY_MOVABLE][o] +
		       buddy->free_runs[TM_BUDDY_UNMOVABLE][o];
		if (c->used[o] > room)
			return false;
		room -= c->used[o];
	}
	return true;
}

/* Half of @c is one run, and in the other half there is something to move. */
static bool tm_compact_is_half(const struct tm_buddy *buddy,
			       const struct tm_buddy_chunk *c)
{
	unsigned int half = tm_buddy_max_order(buddy);

	return c->used[half] == 1 && !c->nr[half] &&
	       tm_compact_fits(buddy, c, half - 1);
}

/*
 * Whether the free pages of chunks in use are a chunk's: if none can be emptied
 * then, it is because of their orders.
 */
static bool tm_compact_wastes(const struct tm_buddy *buddy)
{
	u32 pages = 0;

	for (unsigned int o = 0; o <= tm_buddy_max_order(buddy); o++)
		pages += (buddy->free_runs[TM_BUDDY_MOVABLE][o] +
			  buddy->free_runs[TM_BUDDY_UNMOVABLE][o]) << o;
	return pages >= tm_chunk_pages(buddy->geometry);
}

static void tm_compact_restart(struct tm_compact *compact)
{
	compact->slot = 0;
	compact->best = TM_NONE;
	compact->best_pages = TM_NONE;
	compact->half = TM_NONE;
	compact->half_pages = TM_NONE;
}

static void tm_compact_look(const struct tm_buddy *buddy,
			    struct tm_compact *compact)
{
	const struct tm_buddy_chunk *c = &buddy->chunks[compact->slot];
	u32 pages = tm_compact_pages(c, compact->pass);

	if (!pages)
		return;
	if (pages < compact->best_pages &&
	    tm_compact_fits(buddy, c, tm_buddy_max_order(buddy))) {
		compact->best = compact->slot;
		compact->best_pages = pages;
	}
	if (pages < compact->half_pages && tm_compact_is_half(buddy, c)) {
		compact->half = compact->slot;
		compact->half_pages = pages;
	}
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
	const struct tm_buddy_chunk *c;
	struct tm_chunk_id id;
	bool half;
	int err;

	tm_assert_locked(buddy->lock);
	if (left > TM_COMPACT_SCAN)
		left = TM_COMPACT_SCAN;
	for (; left; left--, compact->slot++)
		tm_compact_look(buddy, compact);
	if (compact->slot < buddy->nr_slots)
		return -EAGAIN;

	half = compact->best == TM_NONE && tm_compact_wastes(buddy);
	id.v = half ? compact->half : compact->best;
	tm_compact_restart(compact);
	if (id.v == TM_NONE)
		return -ENOENT;
	/* Much may have happened since the search came by. */
	c = &buddy->chunks[id.v];
	if (!tm_compact_pages(c, compact->pass) ||
	    !(half ? tm_compact_is_half(buddy, c) :
		     tm_compact_fits(buddy, c, tm_buddy_max_order(buddy))))
		return -EAGAIN;
	err = tm_buddy_drain_begin(buddy, id, drain);
	if (!err && half)
		tm_buddy_drain_half(buddy, drain);
	return err;
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
