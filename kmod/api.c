// SPDX-License-Identifier: GPL-2.0-only
/* The in-kernel API: include/linux/tensormem.h describes it. */
#include <linux/atomic.h>
#include <linux/export.h>
#include <linux/mm.h>
#include <linux/numa.h>
#include <linux/tensormem.h>

#include "numa.h"
#include "pages.h"
#include "runcache.h"

#define TM_API_FLAGS	(TENSORMEM_ZEROED | TENSORMEM_ACCOUNT | TENSORMEM_THISNODE)

static atomic_t tm_api_turn = ATOMIC_INIT(0);
/* Try @node first, or no other. Return: 0, or -EINVAL for a node without memory. */
static int tm_api_node(int node, unsigned int flags, struct tm_numa *numa)
{
	if (node < 0 || node >= TM_MAX_NODES || !(numa->nodes & BIT_ULL(node)))
		return -EINVAL;
	numa->from = node;
	if (flags & TENSORMEM_THISNODE)
		numa->nodes = BIT_ULL(node);
	return 0;
}

/* What only the pools can meet: chunks, other nodes, a cgroup's bill, an empty cache. */
static int tm_api_alloc(struct tm_run *run, unsigned int order, int node,
			unsigned int flags)
{
	/* Nobody here could tell its holder that a run has moved. */
	unsigned int pages_flags = TM_PAGES_GROW | TM_PAGES_UNMOVABLE;
	struct tm_numa numa = tm_numa_local();
	int err;

	if (node != NUMA_NO_NODE || flags & TENSORMEM_THISNODE) {
		err = tm_api_node(node, flags, &numa);
		if (err)
			return err;
	}
	if (flags & TENSORMEM_ZEROED)
		pages_flags |= TM_PAGES_ZEROED;
	if (flags & TENSORMEM_ACCOUNT)
		pages_flags |= TM_PAGES_CHARGED;
	return tm_numa_alloc(&numa, &tm_api_turn, order, pages_flags, run);
}

/* Whether a run of this CPU's may serve the call, or be kept after it. */
static bool tm_api_cached(unsigned int order, int node, unsigned int flags)
{
	return node == NUMA_NO_NODE && !(flags & ~TENSORMEM_ZEROED) &&
	       order < tm_pages_geometry().chunk_order;
}

int tensormem_alloc(struct tensormem_run *run, enum tensormem_kind kind,
		    size_t size, int node, unsigned int flags)
{
	unsigned int order = get_order(size);
	struct tm_run got;
	int err;

	if (!size || size > TM_CHUNK_SIZE || flags & ~TM_API_FLAGS ||
	    kind < TENSORMEM_KIND_WEIGHTS || kind > TENSORMEM_KIND_PROTOCOL)
		return -EINVAL;
	might_sleep();
	if (!tm_runcache_take(order, kind, tm_api_cached(order, node, flags),
			      &got)) {
		err = tm_api_alloc(&got, order, node, flags);
		if (err) {
			tm_runcache_untake(order, kind);
			return err;
		}
	}
	if (flags & TENSORMEM_ZEROED && !got.zeroed)
		tm_pages_zero(&got);
	*run = (struct tensormem_run){
		.page = tm_pages_page(&got),
		.id = got.page.v,
		.node = got.node,
		.order = order,
		.kind = kind,
		.accounted = flags & TENSORMEM_ACCOUNT,
	};
	return 0;
}
EXPORT_SYMBOL_GPL(tensormem_alloc);

void tensormem_free(const struct tensormem_run *run)
{
	const struct tm_run got = {
		.page = { run->id },
		.node = run->node,
		.order = run->order,
	};

	if (!tm_runcache_put(&got, run->kind, !run->accounted &&
			     tm_api_cached(run->order, NUMA_NO_NODE, 0)))
		tm_pages_free(&got, false);
}
EXPORT_SYMBOL_GPL(tensormem_free);

int tensormem_stats(int node, struct tensormem_stats *stats)
{
	u64 nodes = node == NUMA_NO_NODE ? tm_pages_nodes() :
		    node >= 0 && node < TM_MAX_NODES ? BIT_ULL(node) : 0;
	struct tm_pages_stats s;

	if (!(nodes & tm_pages_nodes()))
		return -EINVAL;
	tm_pages_stats(nodes, &s);
	*stats = (struct tensormem_stats){
		.capacity = s.capacity,
		.total = s.total,
		.free = s.free,
		.buddy_pages = s.buddy.used_pages,
	};
	for (u32 kind = 0; kind <= TENSORMEM_KIND_PROTOCOL; kind++)
		stats->bytes[kind] = tm_runcache_used(kind) << PAGE_SHIFT;
	return 0;
}
EXPORT_SYMBOL_GPL(tensormem_stats);
