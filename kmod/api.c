// SPDX-License-Identifier: GPL-2.0-only
/* The in-kernel API: include/linux/tensormem.h describes it. */
#include <linux/atomic.h>
#include <linux/export.h>
#include <linux/mm.h>
#include <linux/numa.h>
#include <linux/tensormem.h>

#include "numa.h"
#include "pages.h"

#define TM_API_FLAGS	(TENSORMEM_ZEROED | TENSORMEM_ACCOUNT | TENSORMEM_THISNODE)

static atomic_t tm_api_turn = ATOMIC_INIT(0);
static atomic64_t tm_api_bytes[TENSORMEM_KIND_PROTOCOL + 1];

static int tm_api_numa(int node, unsigned int flags, struct tm_numa *numa)
{
	*numa = tm_numa_local();
	if (node == NUMA_NO_NODE)
		return flags & TENSORMEM_THISNODE ? -EINVAL : 0;
	if (node < 0 || node >= TM_MAX_NODES || !(numa->nodes & BIT_ULL(node)))
		return -EINVAL;
	numa->from = node;
	if (flags & TENSORMEM_THISNODE)
		numa->nodes = BIT_ULL(node);
	return 0;
}

int tensormem_alloc(struct tensormem_run *run, enum tensormem_kind kind,
		    size_t size, int node, unsigned int flags)
{
	/* Nobody here could tell its holder that a run has moved. */
	unsigned int pages_flags = TM_PAGES_GROW | TM_PAGES_UNMOVABLE;
	struct tm_numa numa;
	struct tm_run got;
	bool zeroed;
	int err;

	if (!size || size > TM_CHUNK_SIZE || flags & ~TM_API_FLAGS ||
	    kind < TENSORMEM_KIND_WEIGHTS || kind > TENSORMEM_KIND_PROTOCOL)
		return -EINVAL;
	err = tm_api_numa(node, flags, &numa);
	if (err)
		return err;
	if (flags & TENSORMEM_ZEROED)
		pages_flags |= TM_PAGES_ZEROED;
	if (flags & TENSORMEM_ACCOUNT)
		pages_flags |= TM_PAGES_CHARGED;
	err = tm_numa_alloc(&numa, &tm_api_turn, get_order(size), pages_flags,
			    &got, &zeroed);
	if (err)
		return err;
	if (flags & TENSORMEM_ZEROED && !zeroed)
		tm_pages_zero(&got);
	atomic64_add(PAGE_SIZE << got.order, &tm_api_bytes[kind]);
	*run = (struct tensormem_run){
		.page = tm_pages_page(&got),
		.id = got.page.v,
		.node = got.node,
		.order = got.order,
		.kind = kind,
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

	atomic64_sub(PAGE_SIZE << run->order, &tm_api_bytes[run->kind]);
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
		stats->bytes[kind] = atomic64_read(&tm_api_bytes[kind]);
	return 0;
}
EXPORT_SYMBOL_GPL(tensormem_stats);
