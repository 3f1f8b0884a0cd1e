/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Compaction of the buddy pool: which chunk to empty next.
 *
 * A pass chooses one chunk after another, the one with the fewest allocated pages
 * first, until none is left whose runs fit into the free runs of the others. When
 * the pages are there and only the orders are wrong, it has half a chunk emptied
 * instead, beside a run that is the other half: that makes the room which the
 * largest runs want. How a chosen chunk is emptied is in core/buddy.h.
 *
 *	tm_compact_begin(buddy, &compact)
 *	while ((err = tm_compact_choose(buddy, &compact, &drain)) != -ENOENT)
 *		if (!err)
 *			...drain...
 *
 * The lock may be dropped between any two calls. Several passes at once are
 * allowed; each has a struct of its own.
 *
 * Context: all functions need buddy->lock and never sleep.
 */
#ifndef TM_CORE_COMPACT_H
#define TM_CORE_COMPACT_H

#include "core/buddy.h"

/* Chunks one call of tm_compact_choose() looks at. */
#define TM_COMPACT_SCAN		64

/**
 * struct tm_compact - one pass, as its caller holds it
 * @pass: its number
 * @slot: where the search goes on
 * @best: the best chunk of those seen, TM_NONE for none
 * @best_pages: its allocated pages
 * @half: the best chunk to empty by half, TM_NONE for none
 * @half_pages: its allocated pages
 */
struct tm_compact {
	u64 pass;
	u32 slot;
	u32 best;
	u32 best_pages;
	u32 half;
	u32 half_pages;
};

void tm_compact_begin(struct tm_buddy *buddy, struct tm_compact *compact);

/**
 * tm_compact_choose - begin the drain of the chunk that costs least
 * @buddy: the pool
 * @compact: the pass
 * @drain: the drain
 *
 * A chunk qualifies when all its runs may move and would find room, largest first,
 * in the chunks that are in use and do not drain; and when it is not at rest after
 * a drain that failed, and no run is being moved to it. At most TM_COMPACT_SCAN chunks are looked at in one call.
 * If none qualifies while the free pages of chunks in use are a chunk's or more,
 * the drain is one by half (tm_buddy_drain_half()) of a chunk whose smaller runs
 * would find room without breaking a free half.
 *
 * A pass ends, whatever others do meanwhile, unless they keep changing the chunk
 * that a search found while that search goes on.
 *
 * Return: 0; -EAGAIN when the search is not over or what it found does not qualify
 * any more: call again; -ENOENT when no chunk qualifies: the pass is over.
 */
int __must_check tm_compact_choose(struct tm_buddy *buddy,
				   struct tm_compact *compact,
				   struct tm_buddy_drain *drain);

/* A fraction of 1 in millionths. */
#define TM_FRAGMENTATION_ONE	1000000u

/**
 * tm_fragmentation - external fragmentation of the pool
 * @buddy: the pool
 * @spare: chunks that the pool does not hold and could get from level 1
 *
 * The part of all free memory that no request for a whole chunk can have:
 *
 *	1 - whole / free
 *
 * free: pages in free runs, and those of the @spare chunks; whole: those of them
 * that lie in chunks without any allocated run, and those of the @spare chunks.
 * Chunks that drain count like any other. No free memory is no fragmentation.
 *
 * Return: millionths, rounded down.
 */
u32 tm_fragmentation(const struct tm_buddy *buddy, u32 spare);

#endif
