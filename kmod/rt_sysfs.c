// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/class/misc/tensormem/rt: the RT pool, and a folder for each RT client. Every file is
 * described in docs/ABI/sysfs-class-misc-tensormem.
 */
#include <linux/capability.h>
#include <linux/kobject.h>
#include <linux/kstrtox.h>
#include <linux/mutex.h>
#include <linux/printk.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "rt.h"
#include "rt_pool.h"
#include "rt_sysfs.h"

/* The folder of all, who is in it, and what of its totals nobody there has any more. */
static DEFINE_MUTEX(tm_rt_mutex);
/* Not the other: when a file of it cannot be made, those before wait for their readers. */
static DEFINE_MUTEX(tm_rt_folder_mutex);
static LIST_HEAD(tm_rt_users);
static struct kobject *tm_rt_device;
static struct kobject *tm_rt_folder;
static struct tm_rt_counts tm_rt_gone;
static struct tm_rt_times tm_rt_times_gone;

static void tm_rt_add_counts(struct tm_rt_counts *sum,
			     const struct tm_rt_counts *counts)
{
	sum->allocs += counts->allocs;
	sum->refused += counts->refused;
	sum->misses += counts->misses;
	sum->waits += counts->waits;
}

static void tm_rt_totals(struct tm_rt_counts *sum)
{
	struct tm_rt_user *user;

	mutex_lock(&tm_rt_mutex);
	*sum = tm_rt_gone;
	list_for_each_entry(user, &tm_rt_users, all) {
		struct tm_rt_state state;

		tm_rt_user_state(user, &state);
		tm_rt_add_counts(sum, &state.counts);
	}
	mutex_unlock(&tm_rt_mutex);
}

static ssize_t tm_rt_emit_times(char *buf, const u64 *bucket)
{
	ssize_t length = 0;

	for (u32 i = 0; i < TM_RT_BUCKETS; i++)
		length += sysfs_emit_at(buf, length, "%llu%c", bucket[i],
					i + 1 < TM_RT_BUCKETS ? ' ' : '\n');
	return length;
}

static void tm_rt_add_times(u64 *bucket, const atomic64_t *times)
{
	for (u32 i = 0; i < TM_RT_BUCKETS; i++)
		bucket[i] += atomic64_read(&times[i]);
}

#define TM_RT_ATTR_RO(kind, file)					\
static struct kobj_attribute tm_##kind##_##file##_attr =			\
	__ATTR(file, 0444, tm_##kind##_##file##_show, NULL)

#define TM_RT_ATTR_RW(kind, file)					\
static struct kobj_attribute tm_##kind##_##file##_attr =			\
	__ATTR(file, 0644, tm_##kind##_##file##_show,			\
	       tm_##kind##_##file##_store)

#define TM_RT_SHOW(kind, file, setup, value)				\
static ssize_t tm_##kind##_##file##_show(struct kobject *kobj,		\
					 struct kobj_attribute *attr,	\
					 char *buf)			\
{									\
	setup;								\
	return sysfs_emit(buf, "%llu\n", (u64)(value));			\
}

#define TM_RT_POOL_SHOW(file)						\
	TM_RT_SHOW(rt, file, struct tm_rt_pool_stats s;			\
		   tm_rt_pool_stats(&s), s.file)

#define TM_RT_POOL_STORE(file)						\
static ssize_t tm_rt_##file##_store(struct kobject *kobj,		\
				    struct kobj_attribute *attr,	\
				    const char *buf, size_t count)	\
{									\
	u64 bytes;							\
	int err;							\
									\
	if (!capable(CAP_SYS_ADMIN))					\
		return -EPERM;						\
	err = kstrtou64(buf, 0, &bytes);				\
	if (!err)							\
		err = tm_rt_pool_set_##file(bytes);			\
	return err ?: count;						\
}

#define TM_RT_TOTAL(file)						\
	TM_RT_SHOW(rt, file, struct tm_rt_counts c; tm_rt_totals(&c), c.file) \
	TM_RT_ATTR_RO(rt, file)

#define TM_RT_TOTAL_TIMES(file)						\
static ssize_t tm_rt_##file##_show(struct kobject *kobj,		\
				   struct kobj_attribute *attr, char *buf) \
{									\
	u64 bucket[TM_RT_BUCKETS] = { 0 };				\
	struct tm_rt_user *user;					\
									\
	mutex_lock(&tm_rt_mutex);					\
	tm_rt_add_times(bucket, tm_rt_times_gone.file);			\
	list_for_each_entry(user, &tm_rt_users, all)			\
		tm_rt_add_times(bucket, user->times.file);		\
	mutex_unlock(&tm_rt_mutex);					\
	return tm_rt_emit_times(buf, bucket);				\
}									\
TM_RT_ATTR_RO(rt, file)

TM_RT_POOL_SHOW(size)
TM_RT_POOL_STORE(size)
TM_RT_ATTR_RW(rt, size);
TM_RT_POOL_SHOW(ready)
TM_RT_POOL_STORE(ready)
TM_RT_ATTR_RW(rt, ready);
TM_RT_POOL_SHOW(held)
TM_RT_ATTR_RO(rt, held);
TM_RT_POOL_SHOW(used)
TM_RT_ATTR_RO(rt, used);
TM_RT_POOL_SHOW(arenas)
TM_RT_ATTR_RO(rt, arenas);
TM_RT_TOTAL(allocs);
TM_RT_TOTAL(refused);
TM_RT_TOTAL(misses);
TM_RT_TOTAL(waits);
TM_RT_TOTAL_TIMES(latency);
TM_RT_TOTAL_TIMES(missed);

static const struct attribute *const tm_rt_attrs[] = {
	&tm_rt_size_attr.attr,
	&tm_rt_ready_attr.attr,
	&tm_rt_held_attr.attr,
	&tm_rt_used_attr.attr,
	&tm_rt_arenas_attr.attr,
	&tm_rt_allocs_attr.attr,
	&tm_rt_refused_attr.attr,
	&tm_rt_misses_attr.attr,
	&tm_rt_waits_attr.attr,
	&tm_rt_latency_attr.attr,
	&tm_rt_missed_attr.attr,
	NULL
};

static struct tm_rt_user *tm_rt_user_of(struct kobject *kobj)
{
	return container_of(kobj, struct tm_rt_user, kobj);
}

#define TM_RT_USER_SHOW(file, value)					\
	TM_RT_SHOW(rt_user, file, struct tm_rt_state s;			\
		   tm_rt_user_state(tm_rt_user_of(kobj), &s), value)

#define TM_RT_USER_RO(file, value)					\
	TM_RT_USER_SHOW(file, value)					\
	TM_RT_ATTR_RO(rt_user, file)

#define TM_RT_USER_TIMES(file)						\
static ssize_t tm_rt_user_##file##_show(struct kobject *kobj,		\
					struct kobj_attribute *attr,	\
					char *buf)			\
{									\
	u64 bucket[TM_RT_BUCKETS] = { 0 };				\
									\
	tm_rt_add_times(bucket, tm_rt_user_of(kobj)->times.file);	\
	return tm_rt_emit_times(buf, bucket);				\
}									\
TM_RT_ATTR_RO(rt_user, file)

static ssize_t tm_rt_user_priority_store(struct kobject *kobj,
					 struct kobj_attribute *attr,
					 const char *buf, size_t count)
{
	u32 priority;
	int err;

	if (!capable(CAP_SYS_NICE))
		return -EPERM;
	err = kstrtou32(buf, 0, &priority);
	if (!err)
		err = tm_rt_user_set_priority(tm_rt_user_of(kobj), priority);
	return err ?: count;
}

TM_RT_SHOW(rt_user, arena, (void)0, tm_rt_user_of(kobj)->arena->id)
TM_RT_ATTR_RO(rt_user, arena);
TM_RT_USER_SHOW(priority, s.priority)
TM_RT_ATTR_RW(rt_user, priority);
TM_RT_USER_RO(size, s.size);
TM_RT_USER_RO(reserved, s.reserved);
TM_RT_USER_RO(used, s.used);
TM_RT_USER_RO(blocks, s.blocks);
TM_RT_USER_RO(waiting, s.waiting);
TM_RT_USER_RO(allocs, s.counts.allocs);
TM_RT_USER_RO(refused, s.counts.refused);
TM_RT_USER_RO(misses, s.counts.misses);
TM_RT_USER_RO(waits, s.counts.waits);
TM_RT_USER_RO(moves, s.moves);
TM_RT_USER_TIMES(latency);
TM_RT_USER_TIMES(missed);

static struct attribute *tm_rt_user_attrs[] = {
	&tm_rt_user_arena_attr.attr,
	&tm_rt_user_size_attr.attr,
	&tm_rt_user_priority_attr.attr,
	&tm_rt_user_reserved_attr.attr,
	&tm_rt_user_used_attr.attr,
	&tm_rt_user_blocks_attr.attr,
	&tm_rt_user_waiting_attr.attr,
	&tm_rt_user_allocs_attr.attr,
	&tm_rt_user_refused_attr.attr,
	&tm_rt_user_misses_attr.attr,
	&tm_rt_user_waits_attr.attr,
	&tm_rt_user_moves_attr.attr,
	&tm_rt_user_latency_attr.attr,
	&tm_rt_user_missed_attr.attr,
	NULL
};
ATTRIBUTE_GROUPS(tm_rt_user);

static void tm_rt_user_release(struct kobject *kobj)
{
	kfree(tm_rt_user_of(kobj));
}

static const struct kobj_type tm_rt_user_type = {
	.release = tm_rt_user_release,
	.sysfs_ops = &kobj_sysfs_ops,
	.default_groups = tm_rt_user_groups,
};

static int tm_rt_make_folder(void)
{
	struct kobject *folder;
	int err;

	lockdep_assert_held(&tm_rt_folder_mutex);
	if (tm_rt_folder)
		return 0;
	folder = kobject_create_and_add("rt", tm_rt_device);
	if (!folder)
		return -ENOMEM;
	err = sysfs_create_files(folder, tm_rt_attrs);
	if (err)
		kobject_put(folder);
	else
		tm_rt_folder = folder;
	return err;
}

/**
 * tm_rt_sysfs_start - make the folder of the RT pool
 * @device: where
 *
 * Without memory for it the first client tries again: the device cannot be taken back.
 *
 * Context: may sleep.
 */
void tm_rt_sysfs_start(struct kobject *device)
{
	mutex_lock(&tm_rt_folder_mutex);
	tm_rt_device = device;
	if (tm_rt_make_folder())
		pr_warn("tensormem: no memory for the folder of the RT pool\n");
	mutex_unlock(&tm_rt_folder_mutex);
}

/* Context: may sleep; there is no client. */
void tm_rt_sysfs_exit(void)
{
	kobject_put(tm_rt_folder);
}

/**
 * tm_rt_sysfs_add - make an RT client's folder
 * @user: the client; from now on kobject_put() frees it, whatever this returns
 *
 * Context: may sleep. Return: 0 or -ENOMEM.
 */
int tm_rt_sysfs_add(struct tm_rt_user *user)
{
	int err;

	kobject_init(&user->kobj, &tm_rt_user_type);
	mutex_lock(&tm_rt_folder_mutex);
	/* Opened before the folder's place is known. */
	err = tm_rt_device ? tm_rt_make_folder() : -ENOMEM;
	mutex_unlock(&tm_rt_folder_mutex);
	if (!err)
		err = kobject_add(&user->kobj, tm_rt_folder, "%u", user->id);
	if (err)
		return err;
	mutex_lock(&tm_rt_mutex);
	list_add_tail(&user->all, &tm_rt_users);
	mutex_unlock(&tm_rt_mutex);
	return 0;
}

/* Its folder goes, what it counted stays. Context: may sleep; no call of it is under way. */
void tm_rt_sysfs_remove(struct tm_rt_user *user)
{
	mutex_lock(&tm_rt_mutex);
	list_del(&user->all);
	tm_rt_add_counts(&tm_rt_gone, &user->counts);
	for (u32 i = 0; i < TM_RT_BUCKETS; i++) {
		atomic64_add(atomic64_read(&user->times.latency[i]),
			     &tm_rt_times_gone.latency[i]);
		atomic64_add(atomic64_read(&user->times.missed[i]),
			     &tm_rt_times_gone.missed[i]);
	}
	mutex_unlock(&tm_rt_mutex);
	kobject_del(&user->kobj);
}
