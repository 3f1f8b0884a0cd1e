/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_PAGES_H
#define TM_PAGES_H

#include <linux/bits.h>
#include <linux/gfp.h>
#include <linux/minmax.h>
#include <linux/nodemask.h>
#include <uapi/linux/tensormem.h>

#include "core/chunk.h"
#include "core/compact.h"

struct page;
struct tm_node;

/* A node is a bit of a user's mask: no more than fit there. */
#define TM_MAX_NODES	(MAX_NUMNODES < 64 ? MAX_NUMNODES : 64)
/* In place of a node in a run: the DMA pool's region. */
#define TM_DMA_NODE	TM_MAX_NODES

/* For what describes memory: on the caller's cgroup, and no reason for an OOM kill. */
#define TM_GFP	(GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

/**
 * struct tm_run - contiguous pages out of the pools: a run, or a whole chunk
 * @page: the first of them, as its node's pools number it
 * @node: whose pools they are from
 * @order: log2 of the pages; a chunk's order stands for a whole chunk
 * @zeroed: its contents were zero when it was allocated; else they were undefined
 */
struct tm_run {
	struct tm_page_id page;
	u8 node;
	u8 order;
	bool zeroed;
};

/* What an allocation asks for beside its order and node. */
#define TM_PAGES_ZEROED		BIT(0)	/* a zeroed chunk, if there is one */
#define TM_PAGES_CHARGED	BIT(1)	/* growth is on current's memory cgroup */
#define TM_PAGES_GROW		BIT(2)	/* the buddy pool may take another chunk */
#define TM_PAGES_UNMOVABLE	BIT(3)	/* compaction leaves a run where it is */
/* What a whole chunk is for: enum tm_purpose; for those who look, nothing depends on it. */
#define TM_PAGES_FOR(purpose)		((unsigned int)(purpose) << 8)
#define TM_PAGES_PURPOSE(flags)		((flags) >> 8)

/* Who has a whole chunk. The first ones are other modules, and tensors by kind. */
enum tm_purpose {
	TM_FOR_MODULE,
	TM_FOR_WEIGHTS = TENSORMEM_KIND_WEIGHTS,
	TM_FOR_KV = TENSORMEM_KIND_KV,
	TM_FOR_ACTIVATIONS = TENSORMEM_KIND_ACTIVATIONS,
	TM_FOR_PROTOCOL = TENSORMEM_KIND_PROTOCOL,
	TM_FOR_CACHE,		/* a KV cache */
	TM_FOR_MODEL,		/* a generation of a model slot */
	TM_FOR_RT,		/* the RT pool */
	TM_PURPOSES,
};

/**
 * struct tm_pages_stats - counters of one node's pools, or of all together
 *
 * Chunks and pages as their names say; @grown and below count events since the
 * module was loaded; @served is how many allocations the pools met.
 */
struct tm_pages_stats {
	u64 capacity;
	u64 reserve;
	u64 total;
	u64 free;
	u64 zeroed;
	u64 used;
	u64 charged;
	u64 grown;
	u64 shrunk;
	u64 grow_failed;
	u64 recast;
	u64 served;
	struct {
		u64 chunks;
		u64 free_pages;
		u64 used_pages;
		u64 allocs;
		u64 frees;
		u64 splits;
		u64 merges;
		u64 moved_pages;
		u64 emptied;
		u64 given_up;
		u64 fragmentation;	/* millionths, weighted by free memory */
	} buddy;
};

/**
 * struct tm_chunk_view - one chunk as it was at one moment
 * @node: its node
 * @id: its number there
 * @frame: page frame number of its first page
 * @chunk: state, owner and form
 * @purpose: enum tm_purpose, of a chunk that TM_OWNER_TENSOR has
 * @run: of one that the buddy pool has: as tm_buddy_chunk::run
 */
struct tm_chunk_view {
	u32 node;
	u32 id;
	unsigned long frame;
	struct tm_chunk chunk;
	u8 purpose;
	u8 run[1u << TM_MAX_CHUNK_ORDER];
};

/*
 * Chunks drained at a time. More make a sweep over all clients worth more; but each
 * is chosen as if it had all the free room for itself.
 */
#define TM_PAGES_DRAINS		4

/**
 * struct tm_pages_pass - one compaction of a node's buddy pool
 * @node: the node
 * @buddy: which of its buddy pools
 * @compact: which chunks have been looked at
 * @drain: chunks being emptied, @nr_drains long
 * @emptied: the pool's count when they were chosen
 */
struct tm_pages_pass {
	struct tm_node *node;
	struct tm_buddy *buddy;
	struct tm_compact compact;
	struct tm_buddy_drain drain[TM_PAGES_DRAINS];
	u32 nr_drains;
	u64 emptied;
};

/* Who gives memory back because the system is short of it. */
enum tm_giver {
	TM_GIVER_RELIEF,	/* under tm_pressure_mutex */
	TM_GIVER_OOM,		/* before the kernel kills somebody; under its own lock */
	TM_GIVERS,
};

/* The nodes that have memory, a bit each. */
extern u64 tm_pages_node_mask;

static inline u64 tm_pages_nodes(void)
{
	return tm_pages_node_mask;
}

int __must_check tm_pages_init(void);
void tm_pages_exit(void);

struct tm_geometry tm_pages_geometry(void);
struct page *tm_pages_page(const struct tm_run *run);
void tm_pages_stats(u64 nodes, struct tm_pages_stats *stats);
u32 tm_pages_slots(void);
bool __must_check tm_pages_view(u32 slot, struct tm_chunk_view *view);

int __must_check tm_pages_alloc(unsigned int node, unsigned int order,
				unsigned int flags, struct tm_run *run);
void tm_pages_free(const struct tm_run *run, bool zeroed);
void tm_pages_zero(const struct tm_run *run);

void tm_pages_pass_begin(unsigned int node, bool charged,
			 struct tm_pages_pass *pass);
bool __must_check tm_pages_drain_begin(struct tm_pages_pass *pass);
u32 tm_pages_drain_end(struct tm_pages_pass *pass);
int __must_check tm_pages_move_begin(const struct tm_run *from,
				     struct tm_run *to);
void tm_pages_move_end(const struct tm_run *from, const struct tm_run *to);
void tm_pages_move_fail(const struct tm_run *from, const struct tm_run *to);

bool tm_pages_could_hold(u64 nodes, u64 nr_pages);
int __must_check tm_pages_set_capacity(u32 chunks);
int __must_check tm_pages_set_reserve(u32 chunks);

bool __must_check tm_pages_giving_begin(enum tm_giver giver);
void tm_pages_giving_end(enum tm_giver giver);
u64 tm_pages_given(enum tm_giver giver);
void tm_pages_trim(u64 bytes);
void tm_pages_set_floor(u64 bytes);
void tm_pages_refill(void);

#endif
