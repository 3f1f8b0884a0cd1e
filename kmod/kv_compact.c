// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages of a KV cache moved together when demand has fallen, so that chunks fall empty
 * and go back to level 1. Which page goes where is the core's to say: a page fits in any
 * hole.
 *
 * Who maps a block is not recorded, because a block may have many users and is hardly
 * ever moved: the mappings of the whole window are removed, and come back by faults.
 */
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/workqueue.h>

#include "bandwidth.h"
#include "kv.h"
#include "kv_memory.h"
#include "kv_compact.h"

/* Long enough for what is freed together, as conversations are. */
#define TM_KV_COMPACT_DELAY	(HZ / 10)

/* Pages moved before others get the cache: as many as a chunk of small pages has. */
#define TM_KV_COMPACT_BATCH	512

/*
 * Whether it is worth everybody's mappings: two chunks, of which tm_kv_trim() keeps one
 * at most, and a 16th of all.
 */
static bool tm_kv_compact_due(const struct tm_kv *kv)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;
	u32 chunk = tm_chunk_pages(pool->geo.pages);

	return pool->free_pages >= 2 * chunk + pool->nr_chunks * (chunk / 16);
}

/**
 * tm_kv_compact_some - move pages of a cache together, and let others have it again
 * @kv: the cache, locked for writing
 * @all: as long as there is a chunk to be had; else while it is worth everybody's mappings
 *
 * Context: may sleep. Return: pages moved.
 */
u32 tm_kv_compact_some(struct tm_kv *kv, bool all)
{
	struct tm_kv_pool *pool = &kv->cache.pool;
	struct tm_kv_move move;
	u32 i;

	lockdep_assert_held_write(&kv->lock);
	for (i = 0; i < TM_KV_COMPACT_BATCH && (all || tm_kv_compact_due(kv));
	     i++) {
		if (tm_kv_move_begin(pool, &move))
			break;
		if (!i)
			unmap_mapping_pages(kv->inode->i_mapping, 0,
					    tm_kv_window_pages(kv), true);
		tm_kv_mark_dirty(kv, move.to);
		copy_page(tm_kv_address(kv, move.to),
			  tm_kv_address(kv, move.from));
		WARN_ON_ONCE(tm_kv_move_end(pool, true));
	}
	if (i)
		tm_bandwidth_count(TM_MOVER_KV, (u64)i << PAGE_SHIFT);
	return i;
}

static void tm_kv_compact_work(struct work_struct *work)
{
	struct tm_kv *kv = container_of(work, struct tm_kv, compact_work.work);
	u32 moved;

	do {
		down_write(&kv->lock);
		moved = tm_kv_compact_some(kv, false);
		up_write(&kv->lock);
		tm_kv_trim(kv);
		cond_resched();
	} while (moved);
}

/* Blocks have been freed. Context: any; does not wait. */
void tm_kv_compact_wake(struct tm_kv *kv)
{
	/* A hint: the work looks again. */
	if (data_race(tm_kv_compact_due(kv)))
		queue_delayed_work(system_unbound_wq, &kv->compact_work,
				   TM_KV_COMPACT_DELAY);
}

void tm_kv_compact_init(struct tm_kv *kv)
{
	INIT_DELAYED_WORK(&kv->compact_work, tm_kv_compact_work);
}

/* Context: may sleep; nobody wakes it any more. */
void tm_kv_compact_exit(struct tm_kv *kv)
{
	cancel_delayed_work_sync(&kv->compact_work);
}
