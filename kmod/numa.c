// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which memory node an allocation tries, and in what order: policies as Linux has
 * them for processes (set_mempolicy), here for clients and calls.
 */
#include <linux/bitops.h>
#include <linux/errno.h>
#include <linux/numa.h>
#include <linux/topology.h>
#include <uapi/linux/tensormem.h>

#include "numa.h"
#include "pages.h"

static struct {
	atomic64_t hits;	/* served by the node that was tried first */
	atomic64_t fallbacks;	/* served although another was tried first */
} tm_numa_count[TM_MAX_NODES];

/* The caller's node, else the nearest. Context: any. */
struct tm_numa tm_numa_local(void)
{
	return (struct tm_numa){
		.policy = TENSORMEM_NUMA_LOCAL,
		.nodes = tm_pages_nodes(),
		.from = NUMA_NO_NODE,
	};
}

/**
 * tm_numa_parse - check what user space asked for
 * @policy: enum tensormem_numa, not DEFAULT
 * @nodes: its mask
 * @numa: filled in on success
 *
 * Context: any. Return: 0, -EINVAL for an unknown policy, a node without memory, or
 * a mask where there has to be none or one.
 */
int tm_numa_parse(u32 policy, u64 nodes, struct tm_numa *numa)
{
	u64 all = tm_pages_nodes();

	if (nodes & ~all)
		return -EINVAL;
	switch (policy) {
	case TENSORMEM_NUMA_LOCAL:
		if (nodes)
			return -EINVAL;
		nodes = all;
		break;
	case TENSORMEM_NUMA_BIND:
		if (!nodes)
			return -EINVAL;
		break;
	case TENSORMEM_NUMA_INTERLEAVE:
		nodes = nodes ?: all;
		break;
	default:
		return -EINVAL;
	}
	*numa = (struct tm_numa){
		.policy = policy,
		.nodes = nodes,
		.from = NUMA_NO_NODE,
	};
	return 0;
}

/* The one of @nodes, which is not empty, that is nearest to @from. */
static unsigned int tm_numa_nearest(unsigned int from, u64 nodes)
{
	unsigned int best = __ffs64(nodes);

	if (from < TM_MAX_NODES && nodes & BIT_ULL(from))
		return from;
	for (nodes &= nodes - 1; nodes; nodes &= nodes - 1)
		if (node_distance(from, __ffs64(nodes)) <
		    node_distance(from, best))
			best = __ffs64(nodes);
	return best;
}

static unsigned int tm_numa_first(const struct tm_numa *numa, atomic_t *turn)
{
	u64 nodes = numa->nodes;

	if (numa->policy == TENSORMEM_NUMA_INTERLEAVE) {
		u32 skip = (u32)atomic_inc_return(turn) % hweight64(nodes);

		while (skip--)
			nodes &= nodes - 1;
		return __ffs64(nodes);
	}
	return tm_numa_nearest(numa->from == NUMA_NO_NODE ? numa_node_id() :
							    numa->from, nodes);
}

/**
 * tm_numa_alloc - allocate where a policy says, falling back by distance
 * @numa: the policy
 * @turn: whose turn it is to be interleaved
 * @order: as in tm_pages_alloc(), like the parameters that follow
 * @flags: see there
 * @run: see there
 * @zeroed: see there
 *
 * Context: may sleep.
 * Return: as tm_pages_alloc(); of several nodes' errors that of the first.
 */
int tm_numa_alloc(const struct tm_numa *numa, atomic_t *turn,
		  unsigned int order, unsigned int flags, struct tm_run *run,
		  bool *zeroed)
{
	unsigned int first = tm_numa_first(numa, turn), node = first;
	u64 left = numa->nodes;
	int first_err = 0;

	for (;;) {
		int err = tm_pages_alloc(node, order, flags, run, zeroed);

		if (!err) {
			atomic64_inc(node == first ?
				     &tm_numa_count[node].hits :
				     &tm_numa_count[node].fallbacks);
			return 0;
		}
		first_err = first_err ?: err;
		left &= ~BIT_ULL(node);
		if (!left || err == -EINTR || err == -EINVAL)
			return first_err;
		node = tm_numa_nearest(first, left);
	}
}

/* How often @node served, first tried and fallen back to. Context: any. */
void tm_numa_stats(unsigned int node, u64 *hits, u64 *fallbacks)
{
	*hits = atomic64_read(&tm_numa_count[node].hits);
	*fallbacks = atomic64_read(&tm_numa_count[node].fallbacks);
}
