// SPDX-License-Identifier: GPL-2.0-only
/* The one place that says which pool serves what: (kind, size) → pool. */
#include <linux/build_bug.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/sysfs.h>
#include <uapi/linux/tensormem.h>

#include "core/geometry.h"
#include "dispatch.h"

/*
 * By kind: the largest size, in bytes, for the slab and for the buddy pool; the
 * chunk pool has no bound. Above half a page a slab object saves nothing. Weights
 * are read all over and pinned rarely, so few TLB entries count more than RSS. KV is
 * shared and written page by page.
 */
static const struct {
	u64 slab;
	u64 buddy;
	bool huge;
} tm_dispatch_table[] = {
	[TENSORMEM_KIND_WEIGHTS]     = { PAGE_SIZE / 2, TM_CHUNK_SIZE - PAGE_SIZE, true },
	[TENSORMEM_KIND_KV]	     = { 0, TM_CHUNK_SIZE - PAGE_SIZE, false },
	[TENSORMEM_KIND_ACTIVATIONS] = { PAGE_SIZE / 2, TM_CHUNK_SIZE - PAGE_SIZE, false },
	[TENSORMEM_KIND_PROTOCOL]    = { PAGE_SIZE / 2, TM_CHUNK_SIZE - PAGE_SIZE, false },
};

/**
 * tm_dispatch - which pool serves a tensor
 * @kind: enum tensormem_kind, checked by the caller
 * @size: bytes
 *
 * Context: any.
 */
struct tm_dispatch tm_dispatch(u32 kind, u64 size)
{
	u32 row = array_index_nospec(kind, ARRAY_SIZE(tm_dispatch_table));
	u8 pool = size <= tm_dispatch_table[row].slab ? TENSORMEM_POOL_SLAB :
		  size <= tm_dispatch_table[row].buddy ? TENSORMEM_POOL_BUDDY :
							 TENSORMEM_POOL_CHUNK;

	return (struct tm_dispatch){
		.pool = pool,
		.huge = tm_dispatch_table[row].huge,
	};
}

/* One line a pool: smallest size, largest size or -, pool. */
ssize_t tm_dispatch_show(u32 kind, char *buf)
{
	u64 slab = tm_dispatch_table[kind].slab;
	u64 buddy = tm_dispatch_table[kind].buddy;
	ssize_t n = 0;

	if (slab)
		n += sysfs_emit_at(buf, n, "1 %llu slab\n", slab);
	n += sysfs_emit_at(buf, n, "%llu %llu buddy\n", slab + 1, buddy);
	n += sysfs_emit_at(buf, n, "%llu - chunk%s\n", buddy + 1,
			   tm_dispatch_table[kind].huge ? " huge" : "");
	return n;
}
