// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/class/misc/tensormem/bandwidth: what is moved, and the rules; and a folder for each
 * core. Every file is described in docs/ABI/sysfs-class-misc-tensormem.
 */
#include <linux/capability.h>
#include <linux/cpumask.h>
#include <linux/device.h>
#include <linux/kstrtox.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "bandwidth.h"
#include "bandwidth_core.h"
#include "bandwidth_sysfs.h"

#define TM_BANDWIDTH_SHOW(file, setup, value)				\
static ssize_t tm_bandwidth_##file##_show(struct device *dev,		\
					  struct device_attribute *attr, \
					  char *buf)			\
{									\
	setup;								\
	return sysfs_emit(buf, "%llu\n", (u64)(value));			\
}

#define TM_BANDWIDTH_RO(file, setup, value)				\
TM_BANDWIDTH_SHOW(file, setup, value)					\
static struct device_attribute tm_bandwidth_##file##_attr =		\
	__ATTR(file, 0444, tm_bandwidth_##file##_show, NULL)

#define TM_BANDWIDTH_RW(file, value, type, parse, set)			\
TM_BANDWIDTH_SHOW(file, (void)0, value)					\
static ssize_t tm_bandwidth_##file##_store(struct device *dev,		\
					   struct device_attribute *attr, \
					   const char *buf, size_t count) \
{									\
	type number;							\
	int err;							\
									\
	if (!capable(CAP_SYS_ADMIN))					\
		return -EPERM;						\
	err = parse(buf, 0, &number);					\
	if (!err)							\
		err = set(number);					\
	return err ?: count;						\
}									\
static struct device_attribute tm_bandwidth_##file##_attr =		\
	__ATTR(file, 0644, tm_bandwidth_##file##_show,			\
	       tm_bandwidth_##file##_store)

TM_BANDWIDTH_RO(chunk_bytes, (void)0, tm_bandwidth_bytes(TM_MOVER_CHUNK));
TM_BANDWIDTH_RO(buddy_bytes, (void)0, tm_bandwidth_bytes(TM_MOVER_BUDDY));
TM_BANDWIDTH_RO(slab_bytes, (void)0, tm_bandwidth_bytes(TM_MOVER_SLAB));
TM_BANDWIDTH_RO(kv_bytes, (void)0, tm_bandwidth_bytes(TM_MOVER_KV));
TM_BANDWIDTH_RO(model_bytes, (void)0, tm_bandwidth_bytes(TM_MOVER_MODEL));
TM_BANDWIDTH_RO(rt_bytes, (void)0, tm_bandwidth_bytes(TM_MOVER_RT));
TM_BANDWIDTH_RO(client_excess, struct tm_bandwidth_totals t;
		tm_bandwidth_totals(&t), t.excess);
TM_BANDWIDTH_RO(client_waits, struct tm_bandwidth_totals t;
		tm_bandwidth_totals(&t), t.waits);
TM_BANDWIDTH_RO(client_held_ns, struct tm_bandwidth_totals t;
		tm_bandwidth_totals(&t), t.held_ns);
TM_BANDWIDTH_RW(period_us, div_u64(tm_bandwidth_period_ns(), NSEC_PER_USEC),
		u32, kstrtou32, tm_bandwidth_set_period_us);
TM_BANDWIDTH_RW(throttle, tm_bandwidth_throttles(), u32, kstrtou32,
		tm_bandwidth_set_throttle);
TM_BANDWIDTH_RW(reclaim, tm_core_reclaims(), u32, kstrtou32,
		tm_core_set_reclaim);
TM_BANDWIDTH_RW(client_budget, tm_bandwidth_default_budget(), u64, kstrtou64,
		tm_bandwidth_set_default_budget);

static ssize_t tm_bandwidth_event_show(struct device *dev,
				       struct device_attribute *attr, char *buf)
{
	char name[TM_CORE_EVENT_NAME];

	tm_core_event(name);
	return sysfs_emit(buf, "%s\n", name);
}

static ssize_t tm_bandwidth_event_store(struct device *dev,
					struct device_attribute *attr,
					const char *buf, size_t count)
{
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	return tm_core_set_event(buf) ?: count;
}

static struct device_attribute tm_bandwidth_event_attr =
	__ATTR(event, 0644, tm_bandwidth_event_show, tm_bandwidth_event_store);

static struct attribute *tm_bandwidth_attrs[] = {
	&tm_bandwidth_chunk_bytes_attr.attr,
	&tm_bandwidth_buddy_bytes_attr.attr,
	&tm_bandwidth_slab_bytes_attr.attr,
	&tm_bandwidth_kv_bytes_attr.attr,
	&tm_bandwidth_model_bytes_attr.attr,
	&tm_bandwidth_rt_bytes_attr.attr,
	&tm_bandwidth_client_excess_attr.attr,
	&tm_bandwidth_client_waits_attr.attr,
	&tm_bandwidth_client_held_ns_attr.attr,
	&tm_bandwidth_period_us_attr.attr,
	&tm_bandwidth_throttle_attr.attr,
	&tm_bandwidth_reclaim_attr.attr,
	&tm_bandwidth_client_budget_attr.attr,
	&tm_bandwidth_event_attr.attr,
	NULL
};

const struct attribute_group tm_bandwidth_group = {
	.name = "bandwidth",
	.attrs = tm_bandwidth_attrs,
};

struct tm_core_attr {
	struct device_attribute attr;
	unsigned int cpu;
};

static unsigned int tm_core_of(struct device_attribute *attr)
{
	return container_of(attr, struct tm_core_attr, attr)->cpu;
}

#define TM_CORE_SHOW(file)						\
static ssize_t tm_core_##file##_show(struct device *dev,		\
				     struct device_attribute *attr,	\
				     char *buf)				\
{									\
	struct tm_core_usage usage;					\
									\
	tm_core_usage(tm_core_of(attr), &usage);			\
	return sysfs_emit(buf, "%llu\n", usage.file);			\
}

TM_CORE_SHOW(budget)
TM_CORE_SHOW(used)
TM_CORE_SHOW(total)
TM_CORE_SHOW(exempt)
TM_CORE_SHOW(periods)
TM_CORE_SHOW(excess)
TM_CORE_SHOW(held_ns)

static ssize_t tm_core_budget_store(struct device *dev,
				    struct device_attribute *attr,
				    const char *buf, size_t count)
{
	u64 budget;
	int err;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = kstrtou64(buf, 0, &budget);
	if (!err)
		err = tm_core_set_budget(tm_core_of(attr), budget);
	return err ?: count;
}

#define TM_CORE_RO(file) __ATTR(file, 0444, tm_core_##file##_show, NULL)

static const struct device_attribute tm_core_attrs[] = {
	__ATTR(budget, 0644, tm_core_budget_show, tm_core_budget_store),
	TM_CORE_RO(used),
	TM_CORE_RO(total),
	TM_CORE_RO(exempt),
	TM_CORE_RO(periods),
	TM_CORE_RO(excess),
	TM_CORE_RO(held_ns),
};

struct tm_core_group {
	struct attribute_group group;
	char name[sizeof("core4294967295")];
	struct tm_core_attr attr[ARRAY_SIZE(tm_core_attrs)];
	struct attribute *attrs[ARRAY_SIZE(tm_core_attrs) + 1];
};

static struct tm_core_group *tm_core_groups;

static void __init tm_core_group_init(struct tm_core_group *g, unsigned int cpu)
{
	for (u32 i = 0; i < ARRAY_SIZE(tm_core_attrs); i++) {
		g->attr[i].attr = tm_core_attrs[i];
		g->attr[i].cpu = cpu;
		sysfs_attr_init(&g->attr[i].attr.attr);
		g->attrs[i] = &g->attr[i].attr.attr;
	}
	snprintf(g->name, sizeof(g->name), "core%u", cpu);
	g->group.name = g->name;
	g->group.attrs = g->attrs;
}

/* How many folders there are: for each core that can ever be. */
u32 __init tm_core_groups_count(void)
{
	return num_possible_cpus();
}

/**
 * tm_core_groups_init - make the cores' folders
 * @to: room for tm_core_groups_count() of them
 *
 * Context: may sleep. Return: 0 or -ENOMEM.
 */
int __init tm_core_groups_init(const struct attribute_group **to)
{
	unsigned int cpu;
	u32 i = 0;

	tm_core_groups = kcalloc(tm_core_groups_count(),
				 sizeof(*tm_core_groups), GFP_KERNEL);
	if (!tm_core_groups)
		return -ENOMEM;
	for_each_possible_cpu(cpu) {
		tm_core_group_init(&tm_core_groups[i], cpu);
		to[i] = &tm_core_groups[i].group;
		i++;
	}
	return 0;
}

/* Context: may sleep; the device is gone. */
void tm_core_groups_exit(void)
{
	kfree(tm_core_groups);
}
