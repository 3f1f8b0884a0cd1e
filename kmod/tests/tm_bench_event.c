// SPDX-License-Identifier: GPL-2.0-only
/*
 * Events that nobody listens to, and events from where nothing may be waited for.
 *
 * Reading /sys/kernel/debug/tm_bench_event/idle gives the row
 *
 *     netlink-idle OURS PEER
 *
 * in nanoseconds for each event, which are instructions where time counts these (the guest's --icount). The peer is to
 * ask generic netlink each time whether anybody listens. Writing a number to burst makes as many events of the group
 * bandwidth, in a hard interrupt under a raw lock: the worker that sends them waits until it is over.
 */
#include <linux/completion.h>
#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/irq_work.h>
#include <linux/kstrtox.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <net/genetlink.h>

#include "event.h"

#define TM_BENCH_EVENTS		100000
#define TM_BENCH_MOST		100000

static struct dentry *tm_bench_folder;

/* A family whose group nobody joins, for the peer. */
static const struct genl_multicast_group tm_bench_groups[] = {
	{ "idle" },
};

static struct genl_family tm_bench_family = {
	.name = "tm_bench",
	.module = THIS_MODULE,
	.mcgrps = tm_bench_groups,
	.n_mcgrps = ARRAY_SIZE(tm_bench_groups),
};

enum tm_bench_what {
	TM_BENCH_LOOP,
	TM_BENCH_EVENT,
	TM_BENCH_ASK,
};

static u64 tm_bench_run(enum tm_bench_what what)
{
	u64 start = ktime_get_ns();

	for (u32 i = 0; i < TM_BENCH_EVENTS; i++) {
		if (what == TM_BENCH_EVENT)
			tm_event_bandwidth(i, -1, i, i, false);
		else if (what == TM_BENCH_ASK)
			genl_has_listeners(&tm_bench_family, &init_net, 0);
		barrier();
	}
	return ktime_get_ns() - start;
}

static int tm_bench_idle_show(struct seq_file *m, void *unused)
{
	u64 loop, ours, peer;

	/* The work of other threads waits its turn instead of being timed. */
	sched_set_fifo(current);
	loop = tm_bench_run(TM_BENCH_LOOP);
	ours = tm_bench_run(TM_BENCH_EVENT) - loop;
	peer = tm_bench_run(TM_BENCH_ASK) - loop;
	sched_set_normal(current, 0);
	seq_printf(m, "netlink-idle %llu.%02llu %llu.%02llu\n",
		   div_u64(ours, TM_BENCH_EVENTS),
		   div_u64(ours, TM_BENCH_EVENTS / 100) % 100,
		   div_u64(peer, TM_BENCH_EVENTS),
		   div_u64(peer, TM_BENCH_EVENTS / 100) % 100);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(tm_bench_idle);

/* One burst at a time. */
static DEFINE_MUTEX(tm_bench_mutex);
static DEFINE_RAW_SPINLOCK(tm_bench_lock);
static DECLARE_COMPLETION(tm_bench_done);
static u32 tm_bench_count;

static void tm_bench_burst_work(struct irq_work *work)
{
	unsigned long flags;

	WARN_ON_ONCE(!in_hardirq());
	raw_spin_lock_irqsave(&tm_bench_lock, flags);
	for (u32 i = 0; i < tm_bench_count; i++)
		tm_event_bandwidth(i, -1, 2 * i, i, i % 2);
	raw_spin_unlock_irqrestore(&tm_bench_lock, flags);
	complete(&tm_bench_done);
}
static struct irq_work tm_bench_burst = IRQ_WORK_INIT_HARD(tm_bench_burst_work);

static ssize_t tm_bench_burst_write(struct file *file, const char __user *buf,
				    size_t size, loff_t *offset)
{
	u32 count;
	int err;

	err = kstrtou32_from_user(buf, size, 0, &count);
	if (err)
		return err;
	if (count > TM_BENCH_MOST)
		return -EINVAL;
	mutex_lock(&tm_bench_mutex);
	tm_bench_count = count;
	irq_work_queue(&tm_bench_burst);
	wait_for_completion(&tm_bench_done);
	irq_work_sync(&tm_bench_burst);
	mutex_unlock(&tm_bench_mutex);
	return size;
}

static const struct file_operations tm_bench_burst_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = tm_bench_burst_write,
};

/* LEVEL AVAILABLE GIVEN: a change of pressure. */
static ssize_t tm_bench_pressure_write(struct file *file,
				       const char __user *buf, size_t size,
				       loff_t *offset)
{
	u64 available, given;
	char text[64] = { };
	u32 level;

	if (size >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, buf, size))
		return -EFAULT;
	if (sscanf(text, "%u %llu %llu", &level, &available, &given) != 3)
		return -EINVAL;
	tm_event_pressure(level, available, given);
	return size;
}

static const struct file_operations tm_bench_pressure_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = tm_bench_pressure_write,
};

static int __init tm_bench_init(void)
{
	int err = genl_register_family(&tm_bench_family);

	if (err)
		return err;
	tm_bench_folder = debugfs_create_dir("tm_bench_event", NULL);
	debugfs_create_file("idle", 0400, tm_bench_folder, NULL,
			    &tm_bench_idle_fops);
	debugfs_create_file("burst", 0200, tm_bench_folder, NULL,
			    &tm_bench_burst_fops);
	debugfs_create_file("pressure", 0200, tm_bench_folder, NULL,
			    &tm_bench_pressure_fops);
	return 0;
}

static void __exit tm_bench_exit(void)
{
	debugfs_remove(tm_bench_folder);
	genl_unregister_family(&tm_bench_family);
}

module_init(tm_bench_init);
module_exit(tm_bench_exit);

MODULE_DESCRIPTION("tensormem's events, without listeners and in hard interrupts");
MODULE_LICENSE("GPL");
