// SPDX-License-Identifier: GPL-2.0-only
/*
 * Budgets for cores: how many events of its PMU a core may count in a period, events
 * that stand for memory traffic. It is the idea of MemGuard (Yun et al., RTAS 2013): the
 * counter is set to overflow when the budget is used up, and then a thread of the lowest
 * real-time priority takes the core from all ordinary tasks until the period ends.
 *
 * - The thread lets go for the last sixteenth of each period: RCU, timers and watchdogs want
 *   to run, and the scheduler stops real-time tasks that take more than 95 %. What is
 *   used meanwhile is missing in the next period, so that the budget holds on average.
 * - Real-time tasks are exempt: they take the core from the thread, and what they
 *   do is not charged. Who runs is known from the scheduler's tracepoint. Nor is what
 *   counters count while nobody runs.
 * - With bandwidth/reclaim a core gives away what it did not use in its last period, and
 *   who has used up its own takes from that before it is held.
 *
 * Without a budget there is neither counter nor timer, thread nor probe.
 *
 * What a core has is its own: it is looked at in interrupts of that CPU, or with them off
 * there. tm_core_setting is taken first, then the lock of CPU hotplug, then tm_core_mutex:
 * probes come and go under the first alone, because they take the second themselves.
 */
#include <linux/bitops.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/err.h>
#include <linux/hrtimer.h>
#include <linux/irq_work.h>
#include <linux/irqflags.h>
#include <linux/kstrtox.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/minmax.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/perf_event.h>
#include <linux/printk.h>
#include <linux/sched.h>
#include <linux/sched/prio.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/tracepoint.h>
#ifdef CONFIG_ARM64
#include <asm/barrier.h>
#include <asm/cpuidle.h>
#include <asm/sysreg.h>
#endif

#include "bandwidth.h"
#include "bandwidth_core.h"
#include "compat.h"

/* The part of a period that is always the ordinary tasks', and the least that is drawn. */
#define TM_CORE_PART	16

/* Events until an overflow that nobody waits for: half of what the counters hold. */
#define TM_CORE_LONG	((u64)S32_MAX)

/* The part that is drawn doubles so often. */
#define TM_CORE_MAX_DRAWS	12u

/* Above, the sums of some periods would not fit. */
#define TM_CORE_MAX_BUDGET	(1ull << 48)

/**
 * struct tm_core - a core with a budget
 * @event: the counter, or NULL; with @holder under tm_core_mutex
 * @holder: who holds the core
 * @budget: events in a period; 0: any. Under tm_core_setting
 * @cpu: which core
 * @timer: goes off where the last sixteenth of a period begins, and where it ends
 * @work: runs after an overflow
 * @live: what follows is in use; written and read on this CPU
 * @exempt: what is counted now is not charged
 * @over: the budget of this period is used up
 * @hold: the core is to be held
 * @draws: times it has drawn on others in this period
 * @seen: what the counter had when it was looked at
 * @end: when the period ends
 * @limit: what may be charged in it
 * @spent: what was, with @debt
 * @debt: what earlier periods had too many
 * @usage: for who asks; @budget there is not used
 */
struct tm_core {
	struct perf_event *event;
	struct task_struct *holder;
	u64 budget;
	unsigned int cpu;
	struct hrtimer timer;
	struct irq_work work;
	bool live;
	bool exempt;
	bool over;
	bool hold;
	u32 draws;
	u64 seen;
	u64 end;
	u64 limit;
	u64 spent;
	u64 debt;
	struct tm_core_usage usage;
};

struct tm_core_event {
	char name[TM_CORE_EVENT_NAME];
	u32 type;
	u64 config;
};

/* Numbers of the architecture; the first two the kernel translates. */
static const struct tm_core_event tm_core_events[] = {
	{ "cycles", PERF_TYPE_HARDWARE, PERF_COUNT_HW_CPU_CYCLES },
	{ "instructions", PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS },
	{ "l2d_cache_refill", PERF_TYPE_RAW, 0x17 },
	{ "bus_access", PERF_TYPE_RAW, 0x19 },
	{ "l3d_cache_refill", PERF_TYPE_RAW, 0x2a },
	{ "ll_cache_miss_rd", PERF_TYPE_RAW, 0x37 },
	{ "mem_access", PERF_TYPE_RAW, 0x13 },
	{ "l1d_cache_refill", PERF_TYPE_RAW, 0x03 },
};

/* What is memory traffic, the best first. */
static const char *const tm_core_traffic[] = {
	"l2d_cache_refill", "bus_access",
};

static DEFINE_PER_CPU(struct tm_core, tm_cores);
/* Everybody who changes settings. */
static DEFINE_MUTEX(tm_core_setting);
static DEFINE_MUTEX(tm_core_mutex);
static struct tm_core_event tm_core_chosen = { .name = "none" };
static u32 tm_core_budgets;
static bool tm_core_reclaim;
static struct tracepoint *tm_core_switches;
static enum cpuhp_state tm_core_state;

/* What cores have given away in the period that ends at @end. */
static struct {
	raw_spinlock_t lock;
	u64 end;
	u64 left;
} tm_spare = {
	.lock = __RAW_SPIN_LOCK_UNLOCKED(tm_spare.lock),
};

/* Begin a core's period: what it may use now; the rest of its budget is for others. */
static u64 tm_spare_begin(struct tm_core *core, u64 budget)
{
	u64 keep = budget;

	if (!READ_ONCE(tm_core_reclaim))
		return budget;
	keep = clamp(core->usage.used, budget / TM_CORE_PART, budget);
	raw_spin_lock(&tm_spare.lock);
	if (tm_spare.end != core->end) {
		tm_spare.end = core->end;
		tm_spare.left = 0;
	}
	tm_spare.left += budget - keep;
	raw_spin_unlock(&tm_spare.lock);
	return keep;
}

/* A bit of what others have given away in this period, or 0. */
static u64 tm_spare_draw(struct tm_core *core, u64 budget, u64 lack)
{
	u64 part = max(budget / TM_CORE_PART, 1ull) << core->draws;
	u64 got = 0;

	if (!READ_ONCE(tm_core_reclaim))
		return 0;
	raw_spin_lock(&tm_spare.lock);
	if (tm_spare.end == core->end)
		got = min(tm_spare.left, lack + part);
	tm_spare.left -= got;
	raw_spin_unlock(&tm_spare.lock);
	/* More each time: an interrupt is not to cost more than what it draws. */
	core->draws = min(core->draws + 1, TM_CORE_MAX_DRAWS);
	return got;
}

static bool tm_core_exempts(const struct task_struct *task)
{
	return task->prio < MAX_RT_PRIO || is_idle_task(task);
}

/* Stop the counter and charge what it has counted. */
static void tm_core_stop(struct tm_core *core)
{
	struct perf_event *event = core->event;
	u64 count, events;

	lockdep_assert_irqs_disabled();
	if (event->state == PERF_EVENT_STATE_ACTIVE)
		event->pmu->stop(event, PERF_EF_UPDATE);
	count = local64_read(&event->count);
	events = count - core->seen;
	core->seen = count;
	if (core->exempt) {
		core->usage.exempt += events;
	} else {
		core->usage.total += events;
		core->spent += events;
	}
}

/* Let the counter go on, up to the next thing to decide. */
static void tm_core_start(struct tm_core *core)
{
	struct perf_event *event = core->event;
	u64 left = TM_CORE_LONG;

	if (event->state != PERF_EVENT_STATE_ACTIVE)
		return;
	if (!core->exempt && !core->over)
		left = core->spent < core->limit ?
		       min(core->limit - core->spent, TM_CORE_LONG) : 1;
	/* Or the kernel would stop and start it by itself, and lose count. */
	event->hw.interrupts = 0;
	local64_set(&event->hw.period_left, left);
	event->pmu->start(event, PERF_EF_RELOAD);
}

/* When the last sixteenth of the period begins. */
static u64 tm_core_let_go(const struct tm_core *core)
{
	return core->end - div_u64(tm_bandwidth_period_ns(), TM_CORE_PART);
}

/* See whether the budget is used up. Context: a hard interrupt: the holder may be woken. */
static void tm_core_judge(struct tm_core *core, u64 now)
{
	u64 budget = READ_ONCE(core->budget);
	bool hold;

	/* Who is exempt is not kept from running; who comes next will be. */
	if (core->exempt || core->over)
		return;
	if (core->spent >= core->limit)
		core->limit += tm_spare_draw(core, budget,
					     core->spent - core->limit);
	if (core->spent < core->limit)
		return;
	core->over = true;
	core->usage.excess++;
	hold = tm_bandwidth_throttles();
	tm_bandwidth_exceeded(0, core->cpu, core->spent, core->limit, hold);
	if (hold && now < tm_core_let_go(core)) {
		WRITE_ONCE(core->hold, true);
		wake_up_process(core->holder);
	}
}

/* Begin the period that @now is in. */
static void tm_core_begin_period(struct tm_core *core, u64 now)
{
	u64 period = tm_bandwidth_period_ns(), rest;

	div64_u64_rem(now, period, &rest);
	core->end = now - rest + period;
	core->spent = core->debt;
	core->over = false;
	core->draws = 0;
	core->limit = tm_spare_begin(core, READ_ONCE(core->budget));
}

/* End a period; several, when the timer was late. */
static void tm_core_end_period(struct tm_core *core, u64 now)
{
	u64 more = div64_u64(now - core->end, tm_bandwidth_period_ns());
	u64 allowed = core->limit + more * READ_ONCE(core->budget);

	core->usage.used = div64_u64(core->spent - core->debt, more + 1);
	core->usage.periods += more + 1;
	core->debt = 0;
	if (tm_bandwidth_throttles() && core->spent > allowed)
		core->debt = core->spent - allowed;
	tm_core_begin_period(core, now);
}

static enum hrtimer_restart tm_core_tick(struct hrtimer *timer)
{
	struct tm_core *core = container_of(timer, struct tm_core, timer);
	u64 now = ktime_get_ns();

	if (!core->live)
		return HRTIMER_NORESTART;
	WRITE_ONCE(core->hold, false);
	tm_core_stop(core);
	/* A task's priority may have changed without a switch. */
	core->exempt = tm_core_exempts(current);
	if (now >= core->end) {
		tm_core_end_period(core, now);
		hrtimer_set_expires(timer, ns_to_ktime(tm_core_let_go(core)));
	} else {
		hrtimer_set_expires(timer, ns_to_ktime(core->end));
	}
	tm_core_judge(core, now);
	tm_core_start(core);
	return HRTIMER_RESTART;
}

static void tm_core_work(struct irq_work *work)
{
	struct tm_core *core = container_of(work, struct tm_core, work);

	if (!core->live)
		return;
	tm_core_stop(core);
	core->exempt = tm_core_exempts(current);
	tm_core_judge(core, ktime_get_ns());
	tm_core_start(core);
}

/* Perhaps in a non-maskable interrupt: what is to be done is done later. */
static void tm_core_overflow(struct perf_event *event,
			     struct perf_sample_data *data,
			     struct pt_regs *regs)
{
	struct tm_core *core = event->overflow_handler_context;

	irq_work_queue(&core->work);
}

static void tm_core_switch(void *data, bool preempt, struct task_struct *prev,
			   struct task_struct *next, unsigned int prev_state)
{
	struct tm_core *core = this_cpu_ptr(&tm_cores);
	bool exempt = tm_core_exempts(next);

	if (!core->live || exempt == core->exempt)
		return;
	tm_core_stop(core);
	core->exempt = exempt;
	/* The runqueue is locked: if the budget is used up, an overflow says so at once. */
	tm_core_start(core);
}

/* Wait for an interrupt. Nothing is counted while the CPU does. */
static void tm_core_doze(const struct tm_core *core)
{
	local_irq_disable();
	if (!need_resched() && READ_ONCE(core->hold)) {
#ifdef CONFIG_ARM64
		struct arm_cpuidle_irq_context context;

		arm_cpuidle_save_irq_context(&context);
		dsb(sy);
		wfi();
		arm_cpuidle_restore_irq_context(&context);
#else
		cpu_relax();
#endif
	}
	local_irq_enable();
}

static int tm_core_holder(void *data)
{
	struct tm_core *core = data;

	while (!kthread_should_stop()) {
		u64 begin;

		/* Pushed away by an offline that failed after all: back, or it would hold nothing. */
		if (raw_smp_processor_id() != core->cpu && cpu_active(core->cpu))
			set_cpus_allowed_ptr(current, cpumask_of(core->cpu));
		set_current_state(TASK_IDLE);
		if (!(READ_ONCE(core->hold) &&
		      raw_smp_processor_id() == core->cpu) &&
		    !kthread_should_stop())
			schedule();
		__set_current_state(TASK_RUNNING);
		begin = ktime_get_ns();
		/* Elsewhere, when its CPU is going: then there is nothing to hold. */
		while (READ_ONCE(core->hold) &&
		       raw_smp_processor_id() == core->cpu) {
			tm_core_doze(core);
			/* No priority is lower; who has the same goes first. */
			yield();
		}
		core->usage.held_ns += ktime_get_ns() - begin;
	}
	return 0;
}

/* On the CPU, with interrupts off. */
static void tm_core_go(void *data)
{
	struct tm_core *core = data;

	core->exempt = tm_core_exempts(current);
	core->debt = 0;
	core->seen = local64_read(&core->event->count);
	core->usage.used = READ_ONCE(core->budget);
	tm_core_begin_period(core, ktime_get_ns());
	tm_core_stop(core);
	tm_core_start(core);
	core->live = true;
	hrtimer_start(&core->timer, ns_to_ktime(tm_core_let_go(core)),
		      HRTIMER_MODE_ABS_PINNED_HARD);
}

static void tm_core_halt(void *data)
{
	struct tm_core *core = data;

	core->live = false;
	WRITE_ONCE(core->hold, false);
}

static struct perf_event *tm_core_counter(const struct tm_core_event *what,
					  unsigned int cpu,
					  struct tm_core *core)
{
	struct perf_event_attr attr = {
		.type = what->type,
		.size = sizeof(attr),
		.config = what->config,
		.sample_period = TM_CORE_LONG,
		.pinned = 1,
	};
	struct perf_event *event;

	event = perf_event_create_kernel_counter(&attr, cpu, NULL,
						 tm_core_overflow, core);
	if (IS_ERR(event))
		return event;
	if (event->state == PERF_EVENT_STATE_ACTIVE)
		return event;
	/* Others have all the PMU's counters. */
	perf_event_release_kernel(event);
	return ERR_PTR(-EBUSY);
}

static int tm_core_enable(struct tm_core *core)
{
	int err;

	lockdep_assert_held(&tm_core_mutex);
	core->event = tm_core_counter(&tm_core_chosen, core->cpu, core);
	if (IS_ERR(core->event)) {
		err = PTR_ERR(core->event);
		goto err_none;
	}
	core->holder = kthread_create_on_cpu(tm_core_holder, core, core->cpu,
					     "tm-hold/%u");
	if (IS_ERR(core->holder)) {
		err = PTR_ERR(core->holder);
		goto err_event;
	}
	sched_set_fifo_low(core->holder);
	wake_up_process(core->holder);
	smp_call_function_single(core->cpu, tm_core_go, core, 1);
	return 0;

err_event:
	perf_event_release_kernel(core->event);
	irq_work_sync(&core->work);
err_none:
	core->event = NULL;
	return err;
}

static void tm_core_disable(struct tm_core *core)
{
	lockdep_assert_held(&tm_core_mutex);
	smp_call_function_single(core->cpu, tm_core_halt, core, 1);
	hrtimer_cancel(&core->timer);
	perf_event_release_kernel(core->event);
	irq_work_sync(&core->work);
	kthread_stop(core->holder);
	core->event = NULL;
}

static int tm_core_online(unsigned int cpu)
{
	struct tm_core *core = per_cpu_ptr(&tm_cores, cpu);
	int err = 0;

	mutex_lock(&tm_core_mutex);
	if (core->budget && !core->event)
		err = tm_core_enable(core);
	mutex_unlock(&tm_core_mutex);
	if (err)
		pr_warn("tensormem: core %u came without its counter (error %d): its budget does not hold\n",
			cpu, err);
	return 0;
}

static int tm_core_offline(unsigned int cpu)
{
	struct tm_core *core = per_cpu_ptr(&tm_cores, cpu);

	mutex_lock(&tm_core_mutex);
	if (core->event)
		tm_core_disable(core);
	mutex_unlock(&tm_core_mutex);
	return 0;
}

static void tm_core_find_switches(struct tracepoint *tp, void *data)
{
	if (!strcmp(tp->name, "sched_switch"))
		tm_core_switches = tp;
}

/* One budget more, or fewer. */
static int tm_core_count_budgets(int more)
{
	int err = 0;

	lockdep_assert_held(&tm_core_setting);
	if (more > 0 && !tm_core_budgets)
		err = tm_core_switches ?
		      tracepoint_probe_register(tm_core_switches,
						tm_core_switch, NULL) :
		      -EOPNOTSUPP;
	if (err)
		return err;
	tm_core_budgets += more;
	if (more < 0 && !tm_core_budgets) {
		tracepoint_probe_unregister(tm_core_switches, tm_core_switch,
					    NULL);
		tracepoint_synchronize_unregister();
	}
	return 0;
}

static int tm_core_change(struct tm_core *core, u64 budget)
{
	u64 before = core->budget;
	int err = 0;

	cpus_read_lock();
	mutex_lock(&tm_core_mutex);
	if (!budget && core->event)
		tm_core_disable(core);
	WRITE_ONCE(core->budget, budget);
	if (budget && !core->event && cpu_online(core->cpu))
		err = tm_core_enable(core);
	if (err)
		WRITE_ONCE(core->budget, before);
	mutex_unlock(&tm_core_mutex);
	cpus_read_unlock();
	return err;
}

/**
 * tm_core_set_budget - bound what a core may use in a period
 * @cpu: which core; one that is offline gets it when it comes
 * @budget: events of its counter; 0: any
 *
 * A core that has a budget gets the new one with its next period.
 *
 * Context: may sleep.
 * Return: 0, -EINVAL for a budget above 2^48, -ENODEV when no event is chosen, -EBUSY when others
 * have the PMU's counters, -ENOMEM, -EINTR.
 */
int tm_core_set_budget(unsigned int cpu, u64 budget)
{
	struct tm_core *core = per_cpu_ptr(&tm_cores, cpu);
	int more, err = 0;

	if (budget > TM_CORE_MAX_BUDGET)
		return -EINVAL;
	mutex_lock(&tm_core_setting);
	more = !!budget - !!core->budget;
	if (budget && !strcmp(tm_core_chosen.name, "none"))
		err = -ENODEV;
	if (!err && more > 0)
		err = tm_core_count_budgets(more);
	if (err)
		goto out;
	err = tm_core_change(core, budget);
	if (err ? more > 0 : more < 0)
		tm_core_count_budgets(-1);
out:
	mutex_unlock(&tm_core_setting);
	return err;
}

/* Each value is exact, together they are not a set. Context: any. */
void tm_core_usage(unsigned int cpu, struct tm_core_usage *usage)
{
	struct tm_core *core = per_cpu_ptr(&tm_cores, cpu);

	/* Its CPU writes it meanwhile. */
	*usage = data_race(core->usage);
	usage->budget = READ_ONCE(core->budget);
}

/* Whether the PMU has an event of the architecture: the kernel takes any number. */
static bool tm_core_implements(const struct tm_core_event *what)
{
#ifdef CONFIG_ARM64
	u64 version = read_sysreg(id_aa64dfr0_el1) >> 8 & 0xf;
	u64 has;

	if (what->type != PERF_TYPE_RAW || what->config >= 64)
		return true;
	/* Not one that says. */
	if (!version || version == 0xf)
		return true;
	has = what->config < 32 ? read_sysreg(pmceid0_el0) :
				  read_sysreg(pmceid1_el0);
	return has >> (what->config % 32) & 1;
#else
	return true;
#endif
}

static int tm_core_try(const struct tm_core_event *what)
{
	struct perf_event *event;
	struct tm_core *core;
	int err = 0;

	cpus_read_lock();
	core = per_cpu_ptr(&tm_cores, cpumask_first(cpu_online_mask));
	event = tm_core_counter(what, core->cpu, core);
	if (IS_ERR(event)) {
		err = PTR_ERR(event);
	} else {
		perf_event_release_kernel(event);
		irq_work_sync(&core->work);
	}
	cpus_read_unlock();
	return err ?: tm_core_implements(what) ? err : -EOPNOTSUPP;
}

static int tm_core_parse(const char *name, struct tm_core_event *what)
{
	for (u32 i = 0; i < ARRAY_SIZE(tm_core_events); i++) {
		*what = tm_core_events[i];
		if (sysfs_streq(name, what->name))
			return 0;
	}
	what->type = PERF_TYPE_RAW;
	if (name[0] != 'r' || kstrtou64(name + 1, 16, &what->config) ||
	    what->config > U16_MAX)
		return -EINVAL;
	snprintf(what->name, sizeof(what->name), "r%04llx", what->config);
	return 0;
}

/**
 * tm_core_set_event - choose what cores count
 * @name: a name of ours, or r and the PMU's number of it in hexadecimal
 *
 * Context: may sleep.
 * Return: 0, -EINVAL for no such name, -EBUSY while a core has a budget or when others have all counters,
 * -ENODEV without a PMU, -EOPNOTSUPP when it has no such event, -ENOMEM.
 */
int tm_core_set_event(const char *name)
{
	struct tm_core_event what;
	int err;

	err = tm_core_parse(name, &what);
	if (err)
		return err;
	mutex_lock(&tm_core_setting);
	err = tm_core_budgets ? -EBUSY : tm_core_try(&what);
	/* The kernel has one error for both. */
	if (err == -ENOENT || err == -EOPNOTSUPP || err == -ENODEV)
		err = tm_core_try(&tm_core_events[0]) ? -ENODEV : -EOPNOTSUPP;
	if (!err)
		tm_core_chosen = what;
	mutex_unlock(&tm_core_setting);
	return err;
}

/* What cores count. @name: room for TM_CORE_EVENT_NAME. Context: may sleep. */
void tm_core_event(char *name)
{
	mutex_lock(&tm_core_setting);
	strscpy(name, tm_core_chosen.name, TM_CORE_EVENT_NAME);
	mutex_unlock(&tm_core_setting);
}

bool tm_core_reclaims(void)
{
	return READ_ONCE(tm_core_reclaim);
}

/* From each core's next period on. */
int tm_core_set_reclaim(u32 on)
{
	if (on > 1)
		return -EINVAL;
	WRITE_ONCE(tm_core_reclaim, on);
	return 0;
}

int __init tm_cores_init(void)
{
	unsigned int cpu;
	int state;

	for_each_possible_cpu(cpu) {
		struct tm_core *core = per_cpu_ptr(&tm_cores, cpu);

		core->cpu = cpu;
		core->work = IRQ_WORK_INIT_HARD(tm_core_work);
		hrtimer_setup(&core->timer, tm_core_tick, CLOCK_MONOTONIC,
			      HRTIMER_MODE_ABS_PINNED_HARD);
	}
	for_each_kernel_tracepoint(tm_core_find_switches, NULL);
	state = cpuhp_setup_state_nocalls(CPUHP_AP_ONLINE_DYN,
					  "tensormem/bandwidth:online",
					  tm_core_online, tm_core_offline);
	if (state < 0)
		return state;
	tm_core_state = state;
	for (u32 i = 0; i < ARRAY_SIZE(tm_core_traffic); i++)
		if (!tm_core_set_event(tm_core_traffic[i]))
			break;
	return 0;
}

/* Context: may sleep; nobody sets a budget any more. */
void tm_cores_exit(void)
{
	unsigned int cpu;

	for_each_possible_cpu(cpu)
		WARN_ON(tm_core_set_budget(cpu, 0));
	cpuhp_remove_state_nocalls(tm_core_state);
}
