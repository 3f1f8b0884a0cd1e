// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/class/misc/tensormem: one value per file, one folder per pool. Every file
 * is described in docs/ABI/sysfs-class-misc-tensormem.
 */
#include <linux/capability.h>
#include <linux/device.h>
#include <linux/kstrtox.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <uapi/linux/tensormem.h>

#include "bandwidth_sysfs.h"
#include "board.h"
#include "client.h"
#include "codec.h"
#include "compact.h"
#include "dispatch.h"
#include "dmabuf.h"
#include "kv.h"
#include "memory.h"
#include "numa.h"
#include "pages.h"
#include "pressure.h"
#include "quarantine.h"
#include "runcache.h"
#include "small.h"
#include "sysfs.h"

#define TM_SHOW(function, setup, value)					\
static ssize_t function(struct device *dev,				\
			struct device_attribute *attr, char *buf)	\
{									\
	setup;								\
	return sysfs_emit(buf, "%llu\n", (u64)(value));			\
}

#define TM_STORE(function, type, parse, set)				\
static ssize_t function(struct device *dev,				\
			struct device_attribute *attr,			\
			const char *buf, size_t count)			\
{									\
	type value;							\
	int err;							\
									\
	if (!capable(CAP_SYS_ADMIN))					\
		return -EPERM;						\
	err = parse(buf, 0, &value);					\
	if (!err)							\
		err = set(value);					\
	return err ?: count;						\
}

#define TM_RO(group, file)						\
static struct device_attribute tm_attr_##group##_##file =			\
	__ATTR(file, 0444, tm_##group##_##file##_show, NULL)

#define TM_RW(group, file)						\
static struct device_attribute tm_attr_##group##_##file =			\
	__ATTR(file, 0644, tm_##group##_##file##_show,			\
	       tm_##group##_##file##_store)

/* A value out of all nodes' counters. */
#define TM_POOL_SHOW(group, file, value)				\
	TM_SHOW(tm_##group##_##file##_show,				\
		struct tm_pages_stats s; tm_pages_stats(U64_MAX, &s), value)

#define TM_POOL_RO(group, file, value)					\
	TM_POOL_SHOW(group, file, value)				\
	TM_RO(group, file)

TM_POOL_SHOW(chunk, capacity, s.capacity)
TM_STORE(tm_chunk_capacity_store, u32, kstrtou32, tm_pages_set_capacity)
TM_RW(chunk, capacity);
TM_POOL_SHOW(chunk, reserve, s.reserve)
TM_STORE(tm_chunk_reserve_store, u32, kstrtou32, tm_pages_set_reserve)
TM_RW(chunk, reserve);
TM_POOL_RO(chunk, total, s.total);
TM_POOL_RO(chunk, free, s.free);
TM_POOL_RO(chunk, zeroed, s.zeroed);
TM_POOL_RO(chunk, used, s.used);
TM_POOL_RO(chunk, grown, s.grown);
TM_POOL_RO(chunk, shrunk, s.shrunk);
TM_POOL_RO(chunk, grow_failed, s.grow_failed);
TM_POOL_RO(chunk, charged, s.charged);
TM_POOL_RO(chunk, recast, s.recast);
TM_SHOW(tm_chunk_quarantined_show, (void)0, tm_quarantine_pages())
TM_RO(chunk, quarantined);

static struct attribute *tm_chunk_attrs[] = {
	&tm_attr_chunk_capacity.attr,
	&tm_attr_chunk_reserve.attr,
	&tm_attr_chunk_total.attr,
	&tm_attr_chunk_free.attr,
	&tm_attr_chunk_zeroed.attr,
	&tm_attr_chunk_used.attr,
	&tm_attr_chunk_quarantined.attr,
	&tm_attr_chunk_grown.attr,
	&tm_attr_chunk_shrunk.attr,
	&tm_attr_chunk_grow_failed.attr,
	&tm_attr_chunk_charged.attr,
	&tm_attr_chunk_recast.attr,
	NULL
};

TM_POOL_RO(buddy, chunks, s.buddy.chunks);
TM_POOL_RO(buddy, free_pages, s.buddy.free_pages);
/* Two counters, read one after the other: what one CPU takes meanwhile shows. */
TM_POOL_RO(buddy, used_pages,
	   s.buddy.used_pages - min(s.buddy.used_pages, tm_runcache_pages()));
TM_SHOW(tm_buddy_cached_pages_show, (void)0, tm_runcache_pages())
TM_RO(buddy, cached_pages);
TM_POOL_RO(buddy, allocs, s.buddy.allocs);
TM_POOL_RO(buddy, frees, s.buddy.frees);
TM_POOL_RO(buddy, splits, s.buddy.splits);
TM_POOL_RO(buddy, merges, s.buddy.merges);
TM_POOL_RO(buddy, moved_pages, s.buddy.moved_pages);
TM_POOL_RO(buddy, emptied, s.buddy.emptied);
TM_POOL_RO(buddy, given_up, s.buddy.given_up);
TM_POOL_RO(buddy, fragmentation, s.buddy.fragmentation);
TM_SHOW(tm_buddy_fallbacks_show, (void)0, tm_memory_fallbacks())
TM_RO(buddy, fallbacks);

static int tm_sysfs_compact(u32 value)
{
	u32 emptied;

	return value == 1 ? tm_compact(tm_pages_nodes(), &emptied) : -EINVAL;
}

TM_STORE(tm_buddy_compact_store, u32, kstrtou32, tm_sysfs_compact)
static struct device_attribute tm_attr_buddy_compact =
	__ATTR(compact, 0200, NULL, tm_buddy_compact_store);

static struct attribute *tm_buddy_attrs[] = {
	&tm_attr_buddy_chunks.attr,
	&tm_attr_buddy_free_pages.attr,
	&tm_attr_buddy_used_pages.attr,
	&tm_attr_buddy_cached_pages.attr,
	&tm_attr_buddy_allocs.attr,
	&tm_attr_buddy_frees.attr,
	&tm_attr_buddy_splits.attr,
	&tm_attr_buddy_merges.attr,
	&tm_attr_buddy_fallbacks.attr,
	&tm_attr_buddy_moved_pages.attr,
	&tm_attr_buddy_emptied.attr,
	&tm_attr_buddy_given_up.attr,
	&tm_attr_buddy_fragmentation.attr,
	&tm_attr_buddy_compact.attr,
	NULL
};

TM_SHOW(tm_slab_pages_show, (void)0, tm_small_slab_pages())
TM_RO(slab, pages);
TM_SHOW(tm_slab_bytes_show, (void)0, tm_small_object_bytes())
TM_RO(slab, bytes);

static struct attribute *tm_slab_attrs[] = {
	&tm_attr_slab_pages.attr,
	&tm_attr_slab_bytes.attr,
	NULL
};

static int tm_sysfs_set_default_quota(u64 bytes)
{
	tm_client_set_default_quota(bytes);
	return 0;
}

#define TM_KV_RO(file, value)						\
	TM_SHOW(tm_kv_##file##_show,					\
		struct tm_kv_totals t; tm_kv_totals(&t), value)		\
	TM_RO(kv, file)

TM_KV_RO(caches, t.caches);
TM_KV_RO(held, t.held);

static ssize_t tm_kv_codec_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", tm_codec_name() ?: "none");
}
TM_RO(kv, codec);

static struct attribute *tm_kv_attrs[] = {
	&tm_attr_kv_caches.attr,
	&tm_attr_kv_held.attr,
	&tm_attr_kv_codec.attr,
	NULL
};

static const struct attribute_group tm_kv_group = {
	.name = "kv",
	.attrs = tm_kv_attrs,
};

#define TM_CLIENTS_RO(file, value)					\
	TM_SHOW(tm_clients_##file##_show,				\
		struct tm_client_totals t; tm_client_totals(&t), value)	\
	TM_RO(clients, file)

TM_CLIENTS_RO(count, t.clients);
TM_CLIENTS_RO(tensors, t.tensors);
TM_CLIENTS_RO(bytes, t.bytes);
TM_CLIENTS_RO(kept, t.kept);
TM_SHOW(tm_clients_default_quota_show, (void)0, tm_client_default_quota())
TM_STORE(tm_clients_default_quota_store, u64, kstrtou64,
	 tm_sysfs_set_default_quota)
TM_RW(clients, default_quota);

static struct attribute *tm_clients_attrs[] = {
	&tm_attr_clients_count.attr,
	&tm_attr_clients_tensors.attr,
	&tm_attr_clients_bytes.attr,
	&tm_attr_clients_kept.attr,
	&tm_attr_clients_default_quota.attr,
	NULL
};

#define TM_BOARD_RO(file, format, value)					\
static ssize_t tm_board_##file##_show(struct device *dev,		\
				      struct device_attribute *attr,	\
				      char *buf)			\
{									\
	return sysfs_emit(buf, format "\n", value);			\
}									\
TM_RO(board, file)

TM_BOARD_RO(name, "%s", tm_board()->name);
TM_BOARD_RO(matched, "%d", tm_board()->matched);
TM_BOARD_RO(ram, "%llu", tm_board()->ram);
TM_BOARD_RO(model_bytes, "%llu", tm_board()->model);
TM_BOARD_RO(protocol_bytes, "%llu", tm_board()->protocol);

static struct attribute *tm_board_attrs[] = {
	&tm_attr_board_name.attr,
	&tm_attr_board_matched.attr,
	&tm_attr_board_ram.attr,
	&tm_attr_board_model_bytes.attr,
	&tm_attr_board_protocol_bytes.attr,
	NULL
};

static const struct attribute_group tm_board_group = {
	.name = "board",
	.attrs = tm_board_attrs,
};

static const struct attribute_group tm_chunk_group = {
	.name = "chunk",
	.attrs = tm_chunk_attrs,
};

static const struct attribute_group tm_buddy_group = {
	.name = "buddy",
	.attrs = tm_buddy_attrs,
};

static const struct attribute_group tm_slab_group = {
	.name = "slab",
	.attrs = tm_slab_attrs,
};

static const struct attribute_group tm_clients_group = {
	.name = "clients",
	.attrs = tm_clients_attrs,
};

#define TM_DISPATCH(kind, number)					\
static ssize_t tm_dispatch_##kind##_show(struct device *dev,		\
					 struct device_attribute *attr,	\
					 char *buf)			\
{									\
	return tm_dispatch_show(number, buf);				\
}									\
TM_RO(dispatch, kind)

TM_DISPATCH(weights, TENSORMEM_KIND_WEIGHTS);
TM_DISPATCH(kv, TENSORMEM_KIND_KV);
TM_DISPATCH(activations, TENSORMEM_KIND_ACTIVATIONS);
TM_DISPATCH(protocol, TENSORMEM_KIND_PROTOCOL);

static struct attribute *tm_dispatch_attrs[] = {
	&tm_attr_dispatch_weights.attr,
	&tm_attr_dispatch_kv.attr,
	&tm_attr_dispatch_activations.attr,
	&tm_attr_dispatch_protocol.attr,
	NULL
};

static const struct attribute_group tm_dispatch_group = {
	.name = "dispatch",
	.attrs = tm_dispatch_attrs,
};

/* A folder for each memory node: which nodes there are is known at load. */
struct tm_node_attr {
	struct device_attribute attr;
	u32 node;
};

#define TM_NODE_SHOW(file, setup, value)				\
static ssize_t tm_node_##file##_show(struct device *dev,		\
				     struct device_attribute *attr,	\
				     char *buf)				\
{									\
	u32 node = container_of(attr, struct tm_node_attr, attr)->node;	\
									\
	setup;								\
	return sysfs_emit(buf, "%llu\n", (u64)(value));			\
}

#define TM_NODE_POOL_SHOW(file, value)					\
	TM_NODE_SHOW(file, struct tm_pages_stats s;			\
		     tm_pages_stats(BIT_ULL(node), &s), value)

TM_NODE_POOL_SHOW(capacity, s.capacity)
TM_NODE_POOL_SHOW(total, s.total)
TM_NODE_POOL_SHOW(free, s.free)
TM_NODE_POOL_SHOW(used, s.used)
TM_NODE_POOL_SHOW(used_pages, s.buddy.used_pages)
TM_NODE_POOL_SHOW(hits, s.served - tm_numa_fallbacks(node))
TM_NODE_SHOW(fallbacks, (void)0, tm_numa_fallbacks(node))

#define TM_NODE_ATTR(file) __ATTR(file, 0444, tm_node_##file##_show, NULL)

static const struct device_attribute tm_node_attrs[] = {
	TM_NODE_ATTR(capacity),
	TM_NODE_ATTR(total),
	TM_NODE_ATTR(free),
	TM_NODE_ATTR(used),
	TM_NODE_ATTR(used_pages),
	TM_NODE_ATTR(hits),
	TM_NODE_ATTR(fallbacks),
};

struct tm_node_group {
	struct attribute_group group;
	char name[sizeof("node63")];
	struct tm_node_attr attr[ARRAY_SIZE(tm_node_attrs)];
	struct attribute *attrs[ARRAY_SIZE(tm_node_attrs) + 1];
};

static const struct attribute_group *const tm_fixed_groups[] = {
	&tm_chunk_group,
	&tm_buddy_group,
	&tm_slab_group,
	&tm_kv_group,
	&tm_clients_group,
	&tm_dispatch_group,
	&tm_board_group,
	&tm_pressure_group,
	&tm_bandwidth_group,
	&tm_dma_group,
};

static struct tm_node_group *tm_node_groups;
static const struct attribute_group **tm_groups;

static void __init tm_node_group_init(struct tm_node_group *g, u32 node)
{
	for (u32 i = 0; i < ARRAY_SIZE(tm_node_attrs); i++) {
		g->attr[i].attr = tm_node_attrs[i];
		g->attr[i].node = node;
		sysfs_attr_init(&g->attr[i].attr.attr);
		g->attrs[i] = &g->attr[i].attr.attr;
	}
	snprintf(g->name, sizeof(g->name), "node%u", node);
	g->group.name = g->name;
	g->group.attrs = g->attrs;
}

/**
 * tm_sysfs_groups - make the folders of the device
 *
 * Context: may sleep. Return: an array that ends with NULL, or NULL when memory is
 * short. It lives until tm_sysfs_exit().
 */
const struct attribute_group **__init tm_sysfs_groups(void)
{
	u32 fixed = ARRAY_SIZE(tm_fixed_groups), i = 0;
	u64 nodes = tm_pages_nodes();

	tm_node_groups = kcalloc(hweight64(nodes), sizeof(*tm_node_groups),
				 GFP_KERNEL);
	tm_groups = kcalloc(fixed + hweight64(nodes) + tm_core_groups_count() + 1,
			    sizeof(*tm_groups), GFP_KERNEL);
	if (!tm_node_groups || !tm_groups ||
	    tm_core_groups_init(&tm_groups[fixed + hweight64(nodes)])) {
		tm_sysfs_exit();
		return NULL;
	}
	memcpy(tm_groups, tm_fixed_groups, sizeof(tm_fixed_groups));
	for (; nodes; nodes &= nodes - 1, i++) {
		tm_node_group_init(&tm_node_groups[i], __ffs64(nodes));
		tm_groups[fixed + i] = &tm_node_groups[i].group;
	}
	return tm_groups;
}

/* Context: may sleep; the device is gone. */
void tm_sysfs_exit(void)
{
	tm_core_groups_exit();
	kfree(tm_groups);
	kfree(tm_node_groups);
}
