// SPDX-License-Identifier: GPL-2.0-only
/*
 * Compaction: the runs of sparsely used chunks are moved to others, under the feet of
 * whoever uses them, so that whole chunks fall empty. core/compact.c chooses the
 * chunks; here is how a run moves.
 *
 * No run knows its owner. Instead, chunks are drained a few at a time, and a sweep
 * over every client's window moves what it meets of them. While a run moves, its
 * mappings are empty and its client's invalidate_lock keeps faults out: they wait,
 * and then find the new place. A page with a reference beyond the pool's own is in
 * use by somebody who has no mapping (get_user_pages): that run stays, and its chunk.
 *
 * Lock order, outermost first: tm_compact_mutex, the list of clients (client.c),
 * invalidate_lock, tm_node::lock.
 */
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/sched/signal.h>

#include "bandwidth.h"
#include "client.h"
#include "compact.h"
#include "memory.h"
#include "pages.h"
#include "runcache.h"
#include "trace.h"

static DEFINE_MUTEX(tm_compact_mutex);

static void tm_compact_copy(const struct tm_run *to, const struct tm_run *from)
{
	struct page *dst = tm_pages_page(to), *src = tm_pages_page(from);

	tm_bandwidth_count(TM_MOVER_BUDDY, PAGE_SIZE << from->order);
	for (u32 i = 0; i < 1u << from->order; i++) {
		copy_highpage(dst + i, src + i);
		cond_resched();
	}
}

/* Move one run of @region, if its chunk is being drained. */
static void tm_compact_extent(struct address_space *mapping,
			      struct tm_region *region,
			      struct tm_extent *extent)
{
	struct tm_run from = extent->run, to;
	u64 first = region->range.start + extent->first;

	if (tm_pages_move_begin(&from, &to))
		return;
	unmap_mapping_pages(mapping, first, 1u << from.order, true);
	if (tm_memory_held(&from)) {
		tm_pages_move_fail(&from, &to);
		return;
	}
	tm_compact_copy(&to, &from);
	extent->run = to;
	tm_pages_move_end(&from, &to);
}

static int tm_compact_client(struct tm_client *client, void *unused)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_region *region;
	struct tm_range *range;

	filemap_invalidate_lock(mapping);
	tm_window_for_each(range, &client->window) {
		region = container_of(range, struct tm_region, range);
		for (u32 i = region->memory->nr_chunks;
		     i < region->memory->nr_extents; i++)
			tm_compact_extent(mapping, region,
					  &region->memory->extent[i]);
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	filemap_invalidate_unlock(mapping);
	return fatal_signal_pending(current) ? -EINTR : 0;
}

static int tm_compact_pool(unsigned int node, bool charged, u32 *emptied)
{
	struct tm_pages_pass pass;
	int err = 0;

	tm_pages_pass_begin(node, charged, &pass);
	while (!err && tm_pages_drain_begin(&pass)) {
		err = tm_clients_visit(tm_compact_client, NULL);
		*emptied += tm_pages_drain_end(&pass);
	}
	return err;
}

/**
 * tm_compact - empty as many chunks of the buddy pool as can be emptied
 * @nodes: of which memory nodes, a bit each
 * @emptied: how many went back to level 1
 *
 * Context: may sleep; under no lock of ours.
 * Return: 0, -EINTR on a fatal signal.
 */
int tm_compact(u64 nodes, u32 *emptied)
{
	int err;

	*emptied = 0;
	err = mutex_lock_killable(&tm_compact_mutex);
	if (err)
		return err;
	/* What a CPU keeps does not move, and nobody would miss it. */
	tm_runcache_drain();
	for (; nodes && !err; nodes &= nodes - 1)
		err = tm_compact_pool(__ffs64(nodes), false, emptied) ?:
		      tm_compact_pool(__ffs64(nodes), true, emptied);
	mutex_unlock(&tm_compact_mutex);
	trace_tensormem_compact(*emptied);
	return err;
}
