/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_NUMA_H
#define TM_NUMA_H

#include <linux/atomic.h>
#include <linux/numa.h>
#include <linux/types.h>
#include <uapi/linux/tensormem.h>

#include "pages.h"

/**
 * struct tm_numa - where an allocation may go
 * @policy: enum tensormem_numa, never DEFAULT
 * @nodes: nodes allowed, a bit each
 * @from: the node to be near to, or NUMA_NO_NODE for the caller's
 */
struct tm_numa {
	u32 policy;
	u64 nodes;
	int from;
};

/* The caller's node, else the nearest. Context: any. */
static inline struct tm_numa tm_numa_local(void)
{
	return (struct tm_numa){
		.policy = TENSORMEM_NUMA_LOCAL,
		.nodes = tm_pages_nodes(),
		.from = NUMA_NO_NODE,
	};
}

int __must_check tm_numa_parse(u32 policy, u64 nodes, struct tm_numa *numa);
int __must_check tm_numa_alloc(const struct tm_numa *numa, atomic_t *turn,
			       unsigned int order, unsigned int flags,
			       struct tm_run *run);
u64 tm_numa_fallbacks(unsigned int node);

#endif
