// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/class/misc/tensormem/model: a folder for each slot, and in it one for each
 * generation. Every file is described in docs/ABI/sysfs-class-misc-tensormem.
 */
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/kobject.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/uidgid.h>
#include <uapi/linux/tensormem.h>

#include "model.h"
#include "model_evict.h"
#include "model_inode.h"
#include "model_sysfs.h"

/* The folder of all; made, and used by those who make a slot, under their mutex. */
static struct kobject *tm_model_folder;

#define TM_MODEL_ATTR(kind, file)					\
static struct kobj_attribute tm_##kind##_##file##_attr =			\
	__ATTR(file, 0444, tm_##kind##_##file##_show, NULL)

#define TM_MODEL_TOTAL(file)						\
static ssize_t tm_models_##file##_show(struct kobject *kobj,		\
				       struct kobj_attribute *attr,	\
				       char *buf)			\
{									\
	struct tm_model_totals totals;					\
									\
	tm_model_totals(&totals);					\
	return sysfs_emit(buf, "%llu\n", totals.file);			\
}									\
TM_MODEL_ATTR(models, file)

TM_MODEL_TOTAL(slots);
TM_MODEL_TOTAL(generations);
TM_MODEL_TOTAL(held);

#define TM_MODEL_EVICT_TOTAL(file, field)				\
static ssize_t tm_models_##file##_show(struct kobject *kobj,		\
				       struct kobj_attribute *attr,	\
				       char *buf)			\
{									\
	struct tm_model_evict_stats stats;				\
									\
	tm_model_evict_stats(&stats);					\
	return sysfs_emit(buf, "%llu\n", stats.field);			\
}									\
TM_MODEL_ATTR(models, file)

TM_MODEL_EVICT_TOTAL(evictable, evictable);
TM_MODEL_EVICT_TOTAL(evicted, evicted);
TM_MODEL_EVICT_TOTAL(reloads, reloads);
TM_MODEL_EVICT_TOTAL(reload_failed, failed);

static const struct attribute *const tm_models_attrs[] = {
	&tm_models_slots_attr.attr,
	&tm_models_generations_attr.attr,
	&tm_models_held_attr.attr,
	&tm_models_evictable_attr.attr,
	&tm_models_evicted_attr.attr,
	&tm_models_reloads_attr.attr,
	&tm_models_reload_failed_attr.attr,
	NULL
};

/* The number of the generation in a place, 0 for none. */
#define TM_MODEL_PLACE(file)						\
static ssize_t tm_model_##file##_show(struct kobject *kobj,		\
				      struct kobj_attribute *attr,	\
				      char *buf)			\
{									\
	struct tm_model *model = container_of(kobj, struct tm_model, kobj); \
	u64 number;							\
									\
	down_read(&model->lock);					\
	number = model->slot.file ? model->slot.file->number : 0;	\
	up_read(&model->lock);						\
	return sysfs_emit(buf, "%llu\n", number);			\
}									\
TM_MODEL_ATTR(model, file)

TM_MODEL_PLACE(active);
TM_MODEL_PLACE(previous);
TM_MODEL_PLACE(staged);

#define TM_MODEL_INODE(file, format, value)				\
static ssize_t tm_model_##file##_show(struct kobject *kobj,		\
				      struct kobj_attribute *attr,	\
				      char *buf)			\
{									\
	const struct inode *inode =					\
		container_of(kobj, struct tm_model, kobj)->inode;	\
									\
	return sysfs_emit(buf, format "\n", value);			\
}									\
TM_MODEL_ATTR(model, file)

TM_MODEL_INODE(uid, "%u", from_kuid_munged(current_user_ns(), inode->i_uid));
TM_MODEL_INODE(gid, "%u", from_kgid_munged(current_user_ns(), inode->i_gid));
TM_MODEL_INODE(mode, "%04o", inode->i_mode & 07777);

static struct attribute *tm_model_attrs[] = {
	&tm_model_active_attr.attr,
	&tm_model_previous_attr.attr,
	&tm_model_staged_attr.attr,
	&tm_model_uid_attr.attr,
	&tm_model_gid_attr.attr,
	&tm_model_mode_attr.attr,
	NULL
};
ATTRIBUTE_GROUPS(tm_model);

#define TM_GEN_SHOW(file, setup, format, value)				\
static ssize_t tm_gen_##file##_show(struct kobject *kobj,		\
				    struct kobj_attribute *attr,	\
				    char *buf)				\
{									\
	struct tm_model_gen *gen =					\
		container_of(kobj, struct tm_model_gen, kobj);		\
									\
	setup;								\
	return sysfs_emit(buf, format "\n", value);			\
}									\
TM_MODEL_ATTR(gen, file)

static const char * const tm_gen_states[] = {
	[TM_GENERATION_LOADING] = "loading",
	[TM_GENERATION_STAGED] = "staged",
	[TM_GENERATION_ACTIVE] = "active",
	[TM_GENERATION_PREVIOUS] = "previous",
	[TM_GENERATION_RETIRED] = "retired",
	[TM_GENERATION_FAILED] = "failed",
};

TM_GEN_SHOW(state, (void)0, "%s", tm_gen_states[READ_ONCE(gen->core.state)]);
TM_GEN_SHOW(size, (void)0, "%llu", gen->size);
TM_GEN_SHOW(loaded, (void)0, "%llu", READ_ONCE(gen->loaded));
TM_GEN_SHOW(readers, (void)0, "%d", atomic_read(&gen->readers));
TM_GEN_SHOW(private_bytes, struct tm_slot_usage u; tm_model_usage(gen, &u),
	    "%llu", u.own << PAGE_SHIFT);
TM_GEN_SHOW(shared_bytes, struct tm_slot_usage u; tm_model_usage(gen, &u),
	    "%llu", u.shared << PAGE_SHIFT);
TM_GEN_SHOW(error, (void)0, "%d", -READ_ONCE(gen->core.error));
TM_GEN_SHOW(cached, (void)0, "%d", !!(gen->flags & TENSORMEM_MODEL_CACHED));

#define TM_GEN_EVICT(file)						\
	TM_GEN_SHOW(file, struct tm_model_evict_stats s;		\
		    tm_model_evict_gen_stats(gen, &s), "%llu", s.file)

TM_GEN_EVICT(evictable);
TM_GEN_EVICT(evicted);
TM_GEN_EVICT(reloads);

static struct attribute *tm_gen_attrs[] = {
	&tm_gen_state_attr.attr,
	&tm_gen_size_attr.attr,
	&tm_gen_loaded_attr.attr,
	&tm_gen_readers_attr.attr,
	&tm_gen_private_bytes_attr.attr,
	&tm_gen_shared_bytes_attr.attr,
	&tm_gen_error_attr.attr,
	&tm_gen_cached_attr.attr,
	&tm_gen_evictable_attr.attr,
	&tm_gen_evicted_attr.attr,
	&tm_gen_reloads_attr.attr,
	NULL
};
ATTRIBUTE_GROUPS(tm_gen);

static void tm_model_sysfs_release(struct kobject *kobj)
{
	struct tm_model *model = container_of(kobj, struct tm_model, kobj);

	tm_model_inode_put(model->inode);
	kfree(model);
}

static const struct kobj_type tm_model_type = {
	.release = tm_model_sysfs_release,
	.sysfs_ops = &kobj_sysfs_ops,
	.default_groups = tm_model_groups,
};

static void tm_gen_sysfs_release(struct kobject *kobj)
{
	struct tm_model_gen *gen = container_of(kobj, struct tm_model_gen, kobj);

	tm_model_put(gen->model);
	kfree(gen);
}

static const struct kobj_type tm_gen_type = {
	.release = tm_gen_sysfs_release,
	.sysfs_ops = &kobj_sysfs_ops,
	.default_groups = tm_gen_groups,
};

/* Make @gen's kobject one that can be counted; kobject_add() makes the folder. */
void tm_model_sysfs_gen(struct kobject *kobj)
{
	kobject_init(kobj, &tm_gen_type);
}

/**
 * tm_model_sysfs_start - make the folder of all slots
 * @device: where
 *
 * Context: may sleep; under the mutex of all slots. Return: 0 or -ENOMEM.
 */
int tm_model_sysfs_start(struct kobject *device)
{
	struct kobject *folder;
	int err;

	if (tm_model_folder)
		return 0;
	folder = kobject_create_and_add("model", device);
	if (!folder)
		return -ENOMEM;
	err = sysfs_create_files(folder, tm_models_attrs);
	if (err)
		kobject_put(folder);
	else
		tm_model_folder = folder;
	return err;
}

/* Context: may sleep; there is no slot. */
void tm_model_sysfs_exit(void)
{
	kobject_put(tm_model_folder);
}

/**
 * tm_model_sysfs_add - make a slot's folder
 * @kobj: the slot's kobject; from now on it is counted, whatever this returns
 * @name: the slot's
 *
 * Context: may sleep; under the mutex of all slots. Return: 0 or -ENOMEM.
 */
int tm_model_sysfs_add(struct kobject *kobj, const char *name)
{
	return kobject_init_and_add(kobj, &tm_model_type, tm_model_folder, "%s",
				    name);
}
