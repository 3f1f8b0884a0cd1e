/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_NUMA_H
#define TM_NUMA_H

#include <linux/atomic.h>
#include <linux/types.h>

struct tm_run;

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

struct tm_numa tm_numa_local(void);
int __must_check tm_numa_parse(u32 policy, u64 nodes, struct tm_numa *numa);
int __must_check tm_numa_alloc(const struct tm_numa *numa, atomic_t *turn,
			       unsigned int order, unsigned int flags,
			       struct tm_run *run, bool *zeroed);
void tm_numa_stats(unsigned int node, u64 *hits, u64 *fallbacks);

#endif
