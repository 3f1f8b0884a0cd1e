// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which memory node an allocation tries, and in what order: policies as Linux has
 * them for processes (set_mempolicy), here for clients and calls.
 */
#include <linux/bitops.h>
#include <linux/errno.h>
#include <linux/log2.h>
#include <linux/numa.h>
#include <linux/topology.h>

#include "numa.h"

/* By node: allocations it served although another was tried first. */
static atomic64_t tm_numa_fallback_count[TM_MAX_NODES];

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
 *
 * Context: may sleep.
 * Return: as tm_pages_alloc(); of several nodes' errors that of the first.
 */
int tm_numa_alloc(const struct tm_numa *numa, atomic_t *turn,
		  unsigned int order, unsigned int flags, struct tm_run *run)
{
	u64 left = numa->nodes;
	unsigned int first, node;
	int first_err = 0;

	if (is_power_of_2(left))
		return tm_pages_alloc(__ffs64(left), order, flags, run);
	first = node = tm_numa_first(numa, turn);
	for (;;) {
		int err = tm_pages_alloc(node, order, flags, run);

		if (!err) {
			if (node != first)
				atomic64_inc(&tm_numa_fallback_count[node]);
			return 0;
		}
		first_err = first_err ?: err;
		left &= ~BIT_ULL(node);
		if (!left || err == -EINTR || err == -EINVAL)
			return first_err;
		node = tm_numa_nearest(first, left);
	}
}

/* How often @node served although another was tried first. Context: any. */
u64 tm_numa_fallbacks(unsigned int node)
{
	return atomic64_read(&tm_numa_fallback_count[node]);
}
