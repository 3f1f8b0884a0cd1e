// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/class/misc/tensormem: one value per file, one folder per pool. Every file
 * is described in docs/ABI/sysfs-class-misc-tensormem.
 */
#include <linux/capability.h>
#include <linux/device.h>
#include <linux/kstrtox.h>
#include <linux/sysfs.h>

#include "client.h"
#include "memory.h"
#include "pages.h"
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

/* A value out of the pools' counters. */
#define TM_POOL_SHOW(group, file, value)				\
	TM_SHOW(tm_##group##_##file##_show,				\
		struct tm_pages_stats s; tm_pages_stats(&s), value)

#define TM_POOL_RO(group, file, value)					\
	TM_POOL_SHOW(group, file, value)				\
	TM_RO(group, file)

TM_POOL_SHOW(chunk, capacity, s.chunk.capacity)
TM_STORE(tm_chunk_capacity_store, u32, kstrtou32, tm_pages_set_capacity)
TM_RW(chunk, capacity);
TM_POOL_SHOW(chunk, reserve, s.chunk.reserve)
TM_STORE(tm_chunk_reserve_store, u32, kstrtou32, tm_pages_set_reserve)
TM_RW(chunk, reserve);
TM_POOL_RO(chunk, total, tm_chunk_total(&s.chunk));
TM_POOL_RO(chunk, free, tm_chunk_free_count(&s.chunk));
TM_POOL_RO(chunk, zeroed, s.chunk.count[TM_CHUNK_FREE_ZEROED]);
TM_POOL_RO(chunk, used, s.chunk.owned[TM_OWNER_TENSOR]);
TM_POOL_RO(chunk, grown, s.chunk.grown);
TM_POOL_RO(chunk, shrunk, s.chunk.shrunk);
TM_POOL_RO(chunk, grow_failed, s.chunk.grow_failed);
TM_SHOW(tm_chunk_quarantined_show, (void)0, tm_memory_quarantined())
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
	NULL
};

TM_POOL_RO(buddy, chunks, s.buddy.nr_chunks);
TM_POOL_RO(buddy, free_pages, s.buddy.free_pages);
TM_POOL_RO(buddy, used_pages, tm_buddy_used_pages(&s.buddy));
TM_POOL_RO(buddy, allocs, s.buddy.allocs);
TM_POOL_RO(buddy, frees, s.buddy.frees);
TM_POOL_RO(buddy, splits, s.buddy.splits);
TM_POOL_RO(buddy, merges, s.buddy.merges);
TM_SHOW(tm_buddy_fallbacks_show, (void)0, tm_memory_fallbacks())
TM_RO(buddy, fallbacks);

static struct attribute *tm_buddy_attrs[] = {
	&tm_attr_buddy_chunks.attr,
	&tm_attr_buddy_free_pages.attr,
	&tm_attr_buddy_used_pages.attr,
	&tm_attr_buddy_allocs.attr,
	&tm_attr_buddy_frees.attr,
	&tm_attr_buddy_splits.attr,
	&tm_attr_buddy_merges.attr,
	&tm_attr_buddy_fallbacks.attr,
	NULL
};

static int tm_sysfs_set_default_quota(u64 bytes)
{
	tm_client_set_default_quota(bytes);
	return 0;
}

#define TM_CLIENTS_RO(file, value)					\
	TM_SHOW(tm_clients_##file##_show,				\
		struct tm_client_totals t; tm_client_totals(&t), value)	\
	TM_RO(clients, file)

TM_CLIENTS_RO(count, t.clients);
TM_CLIENTS_RO(tensors, t.tensors);
TM_CLIENTS_RO(bytes, t.bytes);
TM_SHOW(tm_clients_default_quota_show, (void)0, tm_client_default_quota())
TM_STORE(tm_clients_default_quota_store, u64, kstrtou64,
	 tm_sysfs_set_default_quota)
TM_RW(clients, default_quota);

static struct attribute *tm_clients_attrs[] = {
	&tm_attr_clients_count.attr,
	&tm_attr_clients_tensors.attr,
	&tm_attr_clients_bytes.attr,
	&tm_attr_clients_default_quota.attr,
	NULL
};

static const struct attribute_group tm_chunk_group = {
	.name = "chunk",
	.attrs = tm_chunk_attrs,
};

static const struct attribute_group tm_buddy_group = {
	.name = "buddy",
	.attrs = tm_buddy_attrs,
};

static const struct attribute_group tm_clients_group = {
	.name = "clients",
	.attrs = tm_clients_attrs,
};

const struct attribute_group *tm_sysfs_groups[] = {
	&tm_chunk_group,
	&tm_buddy_group,
	&tm_clients_group,
	NULL
};
