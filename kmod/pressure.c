// SPDX-License-Identifier: GPL-2.0-only
/*
 * What happens when the system is short of memory: it gets back what we can do without,
 * step by step, the cheapest first.
 *
 * A worker relieves from the low watermark on until there is as much as the high one says.
 * Nothing polls while there is: reclaim calls shrinkers, ours looks whether that is so. Below the
 * high watermark a timer looks as well, less and less often as long as there is nothing to give.
 * Reclaim itself, which runs under locks we do not know, gets free chunks only (pages.c,
 * park.c, runcache.c); and before the kernel kills somebody, what can be had without waiting.
 *
 * What counts is si_mem_available(): free memory and what of the page cache can be dropped
 * without swapping, as MemAvailable in /proc/meminfo says.
 *
 * tm_pressure_mutex: one relief at a time, and the level; see pages.c for the order.
 */
#include <linux/atomic.h>
#include <linux/capability.h>
#include <linux/device.h>
#include <linux/err.h>
#include <linux/kobject.h>
#include <linux/kstrtox.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/oom.h>
#include <linux/sched/signal.h>
#include <linux/shrinker.h>
#include <linux/spinlock.h>
#include <linux/stddef.h>
#include <linux/sysfs.h>
#include <linux/wait.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "compat.h"
#include "event.h"
#include "kv_relief.h"
#include "model_evict.h"
#include "pages.h"
#include "park.h"
#include "pressure.h"
#include "runcache.h"
#include "trace.h"

/* The watermarks unless told otherwise: parts of the RAM. */
#define TM_PRESSURE_LOW_DIVISOR		32
#define TM_PRESSURE_HIGH_DIVISOR	16

/* Below the high watermark: how often to look again, and at least so often. */
#define TM_PRESSURE_PERIOD		HZ
#define TM_PRESSURE_MAX_PERIOD		(8 * HZ)

/* Given before somebody is killed: others wait for that. */
#define TM_PRESSURE_OOM_BYTES		(16 * (u64)TM_CHUNK_SIZE)

#define TM_MIN_RELIEVE	offsetofend(struct tensormem_relieve, given)

/**
 * struct tm_relief - a relief under way
 * @giver: as whom it is counted
 * @goal: bytes to give
 * @wait: for locks
 */
struct tm_relief {
	enum tm_giver giver;
	u64 goal;
	bool wait;
};

/*
 * @woken: the worker is to look. @resting: it has looked, and does so again in @period.
 * @reliefs and below: events since load; all but the last two under tm_pressure_mutex.
 */
static struct {
	u64 low;	/* with @high under tm_pressure_lock; read without */
	u64 high;
	u32 level;	/* under tm_pressure_mutex; read without */
	bool woken;
	bool resting;
	unsigned long period;
	struct kobject *device;
	struct task_struct *worker;
	struct tm_shrinker *shrinker;
	u64 reliefs;
	u64 fruitless;
	u64 calls[TENSORMEM_RELIEF_STEPS];
	u64 given[TENSORMEM_RELIEF_STEPS];
	atomic64_t oom_calls;
	atomic64_t oom_given;
} tm_pressure;

static DEFINE_MUTEX(tm_pressure_mutex);
static DEFINE_SPINLOCK(tm_pressure_lock);
static DECLARE_WAIT_QUEUE_HEAD(tm_pressure_wait);

static u64 tm_pressure_available(void)
{
	return (u64)si_mem_available() << PAGE_SHIFT;
}

static u64 tm_relief_left(const struct tm_relief *relief)
{
	u64 given = tm_pages_given(relief->giver);

	return given < relief->goal ? relief->goal - given : 0;
}

/* Give what is free at level 1. Return: what is left to give. */
static u64 tm_relief_trim(const struct tm_relief *relief)
{
	tm_pages_trim(tm_relief_left(relief));
	return tm_relief_left(relief);
}

static void tm_relief_chunks(const struct tm_relief *relief)
{
	u64 left = tm_relief_trim(relief), parked = tm_park_held();

	if (!left)
		return;
	tm_runcache_drain();
	left = tm_relief_trim(relief);
	/* Runs do not make chunks at once; but no more than there was to begin with. */
	while (left && parked) {
		u64 freed = tm_park_relieve(min(left, parked), relief->wait);

		if (!freed || fatal_signal_pending(current))
			break;
		parked -= min(freed, parked);
		left = tm_relief_trim(relief);
	}
}

static void tm_relief_prefixes(const struct tm_relief *relief)
{
	u64 emptied = tm_kv_relieve_prefixes(tm_relief_left(relief),
					     relief->wait);

	tm_pages_trim(min(emptied, tm_relief_left(relief)));
}

static void tm_relief_idle(const struct tm_relief *relief)
{
	u64 emptied = tm_kv_relieve_idle(tm_relief_left(relief));

	tm_pages_trim(min(emptied, tm_relief_left(relief)));
}

static void tm_relief_weights(const struct tm_relief *relief)
{
	u64 left = tm_relief_left(relief), most = tm_model_evictable();

	/*
	 * Pieces that are no whole chunk may leave the system nothing, and readers bring others back: no more than
	 * there was to begin with.
	 */
	while (left && most && !fatal_signal_pending(current)) {
		u64 given = tm_model_evict(min(left, most));

		if (!given)
			break;
		most -= min(given, most);
		left = tm_relief_trim(relief);
	}
}

/* In this order. */
static void (*const tm_pressure_steps[])(const struct tm_relief *relief) = {
	[TENSORMEM_RELIEF_CHUNKS] = tm_relief_chunks,
	[TENSORMEM_RELIEF_PREFIXES] = tm_relief_prefixes,
	[TENSORMEM_RELIEF_IDLE] = tm_relief_idle,
	[TENSORMEM_RELIEF_WEIGHTS] = tm_relief_weights,
};

static_assert(ARRAY_SIZE(tm_pressure_steps) == TENSORMEM_RELIEF_STEPS);

/* Return: bytes that the system got from this step. */
static u64 tm_pressure_do_step(const struct tm_relief *relief, u32 step)
{
	u64 start = trace_tensormem_pressure_step_enabled() ? ktime_get_ns() : 0;
	u64 before = tm_pages_given(relief->giver);
	u64 wanted = tm_relief_left(relief), given;

	tm_pressure_steps[step](relief);
	given = tm_pages_given(relief->giver) - before;
	WRITE_ONCE(tm_pressure.calls[step], tm_pressure.calls[step] + 1);
	WRITE_ONCE(tm_pressure.given[step], tm_pressure.given[step] + given);
	if (start)
		trace_tensormem_pressure_step(step, wanted, given,
					      ktime_get_ns() - start);
	return given;
}

/*
 * Give @bytes back, by @steps, a bit each. @by: bytes given by each, added to what is
 * there. Return: their sum.
 */
static u64 tm_pressure_relieve(u64 bytes, u32 steps, u64 *by)
{
	const struct tm_relief relief = {
		.giver = TM_GIVER_RELIEF, .goal = bytes, .wait = true,
	};
	u64 given;

	lockdep_assert_held(&tm_pressure_mutex);
	/* Only who is about to be killed for memory gives as another. */
	if (WARN_ON_ONCE(!tm_pages_giving_begin(TM_GIVER_RELIEF)))
		return 0;
	for (u32 i = 0; i < TENSORMEM_RELIEF_STEPS; i++)
		if (steps & BIT(i) && tm_relief_left(&relief) &&
		    !fatal_signal_pending(current))
			by[i] += tm_pressure_do_step(&relief, i);
	given = tm_pages_given(TM_GIVER_RELIEF);
	tm_pages_giving_end(TM_GIVER_RELIEF);
	WRITE_ONCE(tm_pressure.reliefs, tm_pressure.reliefs + 1);
	if (!given)
		WRITE_ONCE(tm_pressure.fruitless, tm_pressure.fruitless + 1);
	return given;
}

/* What the level comes to be: it rises below a watermark and falls above the next one. */
static u32 tm_pressure_next(u32 level, u64 available)
{
	u64 low = READ_ONCE(tm_pressure.low);

	if (available < low / 2)
		return TENSORMEM_PRESSURE_CRITICAL;
	if (available < low)
		return max_t(u32, level, TENSORMEM_PRESSURE_LOW);
	if (available < READ_ONCE(tm_pressure.high))
		return min_t(u32, level, TENSORMEM_PRESSURE_LOW);
	return TENSORMEM_PRESSURE_NONE;
}

/* @given: by the relief before, if any. */
static void tm_pressure_update(u64 given)
{
	u64 available = tm_pressure_available();
	u32 level = tm_pressure_next(tm_pressure.level, available);

	lockdep_assert_held(&tm_pressure_mutex);
	if (level == tm_pressure.level)
		return;
	WRITE_ONCE(tm_pressure.level, level);
	trace_tensormem_pressure_level(level, available, given);
	tm_event_pressure(level, available, given);
	if (tm_pressure.device)
		sysfs_notify(tm_pressure.device, tm_pressure_group.name,
			     "level");
	if (level == TENSORMEM_PRESSURE_NONE)
		tm_pages_refill();
}

/* Relieve if need be. Return: jiffies until it is time to look again. */
static unsigned long tm_pressure_look(void)
{
	u64 by[TENSORMEM_RELIEF_STEPS] = { 0 };
	u64 available, high, given = 0;
	unsigned long rest;

	mutex_lock(&tm_pressure_mutex);
	tm_pressure_update(0);
	available = tm_pressure_available();
	high = READ_ONCE(tm_pressure.high);
	if (tm_pressure.level && available < high) {
		given = tm_pressure_relieve(high - available, U32_MAX, by);
		tm_pressure_update(given);
	}
	/* What does not help is tried less and less often. */
	if (given || !tm_pressure.level)
		tm_pressure.period = TM_PRESSURE_PERIOD / 2;
	else
		tm_pressure.period = clamp(2 * tm_pressure.period,
					   TM_PRESSURE_PERIOD,
					   TM_PRESSURE_MAX_PERIOD);
	WRITE_ONCE(tm_pressure.resting, tm_pressure.level && !given);
	/* Weights in use are back at once: giving them without a pause would be all that a core does. */
	rest = !tm_pressure.level ? MAX_SCHEDULE_TIMEOUT :
	       !given ? tm_pressure.period :
	       by[TENSORMEM_RELIEF_WEIGHTS] ? TM_PRESSURE_PERIOD : 0;
	mutex_unlock(&tm_pressure_mutex);
	return rest;
}

static int tm_pressure_work(void *unused)
{
	unsigned long rest = MAX_SCHEDULE_TIMEOUT;

	while (!kthread_should_stop()) {
		wait_event_idle_timeout(tm_pressure_wait,
					READ_ONCE(tm_pressure.woken) ||
					kthread_should_stop(), rest);
		WRITE_ONCE(tm_pressure.woken, false);
		if (!kthread_should_stop())
			rest = tm_pressure_look();
	}
	return 0;
}

/* Context: any; does not wait. */
static void tm_pressure_kick(void)
{
	WRITE_ONCE(tm_pressure.woken, true);
	wake_up(&tm_pressure_wait);
}

/**
 * tm_pressure_wake - see whether the system is short of memory
 *
 * Context: any that reclaim may run in; does not wait.
 */
void tm_pressure_wake(void)
{
	if (!READ_ONCE(tm_pressure.resting) &&
	    tm_pressure_available() < READ_ONCE(tm_pressure.low))
		tm_pressure_kick();
}

/* Of no objects: it is told that reclaim runs. */
static unsigned long tm_pressure_count(struct shrinker *shrinker,
				       struct shrink_control *sc)
{
	tm_pressure_wake();
	return SHRINK_EMPTY;
}

static unsigned long tm_pressure_scan(struct shrinker *shrinker,
				      struct shrink_control *sc)
{
	return SHRINK_STOP;
}

/* The kernel is about to kill somebody for memory. */
static int tm_pressure_oom(struct notifier_block *block, unsigned long unused,
			   void *data)
{
	const struct tm_relief relief = {
		.giver = TM_GIVER_OOM, .goal = TM_PRESSURE_OOM_BYTES,
	};
	unsigned long *freed = data;
	u64 given;

	tm_pressure_wake();
	if (!tm_pages_giving_begin(TM_GIVER_OOM))
		return NOTIFY_OK;
	tm_relief_chunks(&relief);
	if (tm_relief_left(&relief))
		tm_relief_prefixes(&relief);
	given = tm_pages_given(TM_GIVER_OOM);
	tm_pages_giving_end(TM_GIVER_OOM);
	atomic64_inc(&tm_pressure.oom_calls);
	atomic64_add(given, &tm_pressure.oom_given);
	*freed += given >> PAGE_SHIFT;
	return NOTIFY_OK;
}

static struct notifier_block tm_pressure_block = {
	.notifier_call = tm_pressure_oom,
};

/**
 * tm_pressure_file_relieve - TENSORMEM_IOC_RELIEVE
 * @arg: its struct
 * @size: of that
 *
 * Context: may sleep. Return: 0 or an errno as in the UAPI header.
 */
int tm_pressure_file_relieve(void __user *arg, size_t size)
{
	struct tensormem_relieve relieve;
	int err;

	err = tm_args_in(&relieve, sizeof(relieve), TM_MIN_RELIEVE, arg, size);
	if (err)
		return err;
	if (!relieve.bytes || relieve.flags ||
	    relieve.steps & ~(BIT(TENSORMEM_RELIEF_STEPS) - 1))
		return -EINVAL;
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	relieve.given = 0;
	memset(relieve.step, 0, sizeof(relieve.step));
	/* Found out now: what has been given cannot be taken back. */
	err = tm_args_out(arg, size, &relieve, sizeof(relieve));
	if (err)
		return err;
	if (mutex_lock_killable(&tm_pressure_mutex))
		return -EINTR;
	relieve.given = tm_pressure_relieve(relieve.bytes,
					    relieve.steps ?: U32_MAX,
					    relieve.step);
	tm_pressure_update(relieve.given);
	mutex_unlock(&tm_pressure_mutex);
	return tm_args_out(arg, size, &relieve, sizeof(relieve));
}

/* Return: 0, -EINVAL for a low watermark above the high one, or that above the RAM. */
static int tm_pressure_set(u64 *mark, u64 bytes)
{
	u64 ram = (u64)totalram_pages() << PAGE_SHIFT;
	int err = -EINVAL;

	spin_lock(&tm_pressure_lock);
	if (mark == &tm_pressure.low ? bytes <= tm_pressure.high :
				       bytes >= tm_pressure.low && bytes <= ram) {
		WRITE_ONCE(*mark, bytes);
		tm_pages_set_floor(tm_pressure.high);
		err = 0;
	}
	spin_unlock(&tm_pressure_lock);
	/* Now, whatever it waits for. */
	if (!err)
		tm_pressure_kick();
	return err;
}

#define TM_PRESSURE_SHOW(file, value)					\
static ssize_t tm_pressure_##file##_show(struct device *dev,		\
					 struct device_attribute *attr,	\
					 char *buf)			\
{									\
	return sysfs_emit(buf, "%llu\n", (u64)(value));			\
}

#define TM_PRESSURE_RO(file, value)					\
	TM_PRESSURE_SHOW(file, value)					\
static struct device_attribute tm_pressure_##file##_attr =		\
	__ATTR(file, 0444, tm_pressure_##file##_show, NULL)

#define TM_PRESSURE_MARK(file)						\
	TM_PRESSURE_SHOW(file, READ_ONCE(tm_pressure.file))		\
static ssize_t tm_pressure_##file##_store(struct device *dev,		\
					  struct device_attribute *attr, \
					  const char *buf, size_t count) \
{									\
	u64 bytes;							\
	int err;							\
									\
	if (!capable(CAP_SYS_ADMIN))					\
		return -EPERM;						\
	err = kstrtou64(buf, 0, &bytes);				\
	if (!err)							\
		err = tm_pressure_set(&tm_pressure.file, bytes);	\
	return err ?: count;						\
}									\
static struct device_attribute tm_pressure_##file##_attr =		\
	__ATTR(file, 0644, tm_pressure_##file##_show,			\
	       tm_pressure_##file##_store)

#define TM_PRESSURE_STEP(file, step)					\
	TM_PRESSURE_RO(file##_calls, READ_ONCE(tm_pressure.calls[step])); \
	TM_PRESSURE_RO(file##_given, READ_ONCE(tm_pressure.given[step]))

TM_PRESSURE_MARK(low);
TM_PRESSURE_MARK(high);
static ssize_t tm_pressure_level_show(struct device *dev,
				      struct device_attribute *attr, char *buf)
{
	static const char *const names[] = {
		[TENSORMEM_PRESSURE_NONE] = "none",
		[TENSORMEM_PRESSURE_LOW] = "low",
		[TENSORMEM_PRESSURE_CRITICAL] = "critical",
	};

	return sysfs_emit(buf, "%s\n", names[READ_ONCE(tm_pressure.level)]);
}

static struct device_attribute tm_pressure_level_attr =
	__ATTR(level, 0444, tm_pressure_level_show, NULL);

TM_PRESSURE_RO(available, tm_pressure_available());
TM_PRESSURE_RO(reliefs, READ_ONCE(tm_pressure.reliefs));
TM_PRESSURE_RO(fruitless, READ_ONCE(tm_pressure.fruitless));
TM_PRESSURE_STEP(chunks, TENSORMEM_RELIEF_CHUNKS);
TM_PRESSURE_STEP(prefixes, TENSORMEM_RELIEF_PREFIXES);
TM_PRESSURE_STEP(idle, TENSORMEM_RELIEF_IDLE);
TM_PRESSURE_STEP(weights, TENSORMEM_RELIEF_WEIGHTS);
TM_PRESSURE_RO(oom_calls, atomic64_read(&tm_pressure.oom_calls));
TM_PRESSURE_RO(oom_given, atomic64_read(&tm_pressure.oom_given));

static struct attribute *tm_pressure_attrs[] = {
	&tm_pressure_low_attr.attr,
	&tm_pressure_high_attr.attr,
	&tm_pressure_level_attr.attr,
	&tm_pressure_available_attr.attr,
	&tm_pressure_reliefs_attr.attr,
	&tm_pressure_fruitless_attr.attr,
	&tm_pressure_chunks_calls_attr.attr,
	&tm_pressure_chunks_given_attr.attr,
	&tm_pressure_prefixes_calls_attr.attr,
	&tm_pressure_prefixes_given_attr.attr,
	&tm_pressure_idle_calls_attr.attr,
	&tm_pressure_idle_given_attr.attr,
	&tm_pressure_weights_calls_attr.attr,
	&tm_pressure_weights_given_attr.attr,
	&tm_pressure_oom_calls_attr.attr,
	&tm_pressure_oom_given_attr.attr,
	NULL
};

const struct attribute_group tm_pressure_group = {
	.name = "pressure",
	.attrs = tm_pressure_attrs,
};

/**
 * tm_pressure_start - tell who polls pressure/level from now on
 * @device: whose folder that is in
 *
 * Context: may sleep.
 */
void tm_pressure_start(struct kobject *device)
{
	mutex_lock(&tm_pressure_mutex);
	tm_pressure.device = device;
	mutex_unlock(&tm_pressure_mutex);
}

/* The folder is about to go. Context: may sleep. */
void tm_pressure_stop(void)
{
	tm_pressure_start(NULL);
}

int __init tm_pressure_init(void)
{
	u64 ram = (u64)totalram_pages() << PAGE_SHIFT;
	int err = -ENOMEM;

	tm_pressure.low = div_u64(ram, TM_PRESSURE_LOW_DIVISOR);
	tm_pressure.high = div_u64(ram, TM_PRESSURE_HIGH_DIVISOR);
	tm_pages_set_floor(tm_pressure.high);
	/*
	 * A thread of its own: there is no memory for a new one when it is needed. And no
	 * workqueue for reclaim: those may not wait for others, as closing a cache does.
	 */
	tm_pressure.worker = kthread_run(tm_pressure_work, NULL, "tm_pressure");
	if (IS_ERR(tm_pressure.worker))
		return PTR_ERR(tm_pressure.worker);
	tm_pressure.shrinker = tm_shrinker_register("tensormem-pressure", 0,
						    tm_pressure_count,
						    tm_pressure_scan);
	if (!tm_pressure.shrinker)
		goto err_worker;
	err = register_oom_notifier(&tm_pressure_block);
	if (err)
		goto err_shrinker;
	return 0;

err_shrinker:
	tm_shrinker_unregister(tm_pressure.shrinker);
err_worker:
	kthread_stop(tm_pressure.worker);
	return err;
}

/* Context: may sleep; nobody can set a watermark any more. */
void tm_pressure_exit(void)
{
	unregister_oom_notifier(&tm_pressure_block);
	tm_shrinker_unregister(tm_pressure.shrinker);
	kthread_stop(tm_pressure.worker);
}
