// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bytes that the module moves: zeroes, copies, reads from files, compares. Counted for
 * each pool where they are moved, and for the client they are moved for, which may
 * have a budget of them for each period. A client that has used more is told, once a
 * period, and if root wants it so (bandwidth/throttle) its next call waits.
 *
 * It waits before it begins, where it holds nothing: a call that moves a lot is not
 * cut into pieces, but what it took too much is missing in the periods that follow.
 * So the budget holds on average, whatever the size of the calls. Faults are counted
 * and never wait: whoever faults holds the address space. Nothing of an RT client is
 * counted for its client.
 */
#include <linux/atomic.h>
#include <linux/capability.h>
#include <linux/hrtimer.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/overflow.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "bandwidth.h"
#include "client.h"
#include "event.h"
#include "trace.h"

/* Longer than a tick and than what a hold costs; shorter than anybody's watchdog. */
#define TM_MIN_PERIOD_US	1000
#define TM_MAX_PERIOD_US	1000000
#define TM_DEFAULT_PERIOD_US	10000

/* How late a client may be woken, so that it shares an interrupt with others. */
#define TM_BANDWIDTH_SLACK_NS	(50 * NSEC_PER_USEC)

DEFINE_PER_CPU(struct tm_moved, tm_moved);

static u64 tm_period_ns = TM_DEFAULT_PERIOD_US * NSEC_PER_USEC;
static bool tm_throttle;
static u64 tm_default_budget = TM_BANDWIDTH_ANY;
static atomic64_t tm_excess = ATOMIC64_INIT(0);
static atomic64_t tm_waits = ATOMIC64_INIT(0);
static atomic64_t tm_held_ns = ATOMIC64_INIT(0);
/* Those who wait for their period to end; woken when the rules change. */
static DECLARE_WAIT_QUEUE_HEAD(tm_held);

/* Bytes moved since load. */
u64 tm_bandwidth_bytes(enum tm_mover mover)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(per_cpu(tm_moved, cpu).bytes[mover]);
	return sum;
}

/* Of all clients there ever were; each value is exact, together they are not a set. */
void tm_bandwidth_totals(struct tm_bandwidth_totals *totals)
{
	totals->excess = atomic64_read(&tm_excess);
	totals->waits = atomic64_read(&tm_waits);
	totals->held_ns = atomic64_read(&tm_held_ns);
}

/**
 * tm_bandwidth_exceeded - a budget is exceeded, for the first time in its period
 * @client: whose; 0: a core's
 * @cpu: which core; -1: a client's
 * @used: bytes, or events of the core's counter
 * @budget: what there was
 * @throttled: whether it has to wait now
 *
 * Context: any, hard interrupts too; no lock is held.
 */
void tm_bandwidth_exceeded(u32 client, s32 cpu, u64 used, u64 budget,
			   bool throttled)
{
	trace_tensormem_bandwidth(client, cpu, used, budget, throttled);
	tm_event_bandwidth(client, cpu, used, budget, throttled);
}

/* A new client's meter. */
void tm_bandwidth_init(struct tm_client *client)
{
	client->meter = (struct tm_meter){
		.budget = tm_bandwidth_default_budget(),
		.start = ktime_get_ns(),
	};
}

/* Begin the period that @now is in, if it is another. */
static void tm_meter_turn(struct tm_meter *meter, u64 now)
{
	u64 period = tm_bandwidth_period_ns();
	u64 budget = meter->budget, periods, allowed;

	if (now - meter->start < period)
		return;
	periods = div64_u64(now - meter->start, period);
	meter->start += periods * period;
	if (check_mul_overflow(periods, budget, &allowed) ||
	    allowed >= meter->used)
		meter->used = 0;
	else
		meter->used -= allowed;
	meter->over = false;
}

/**
 * tm_bandwidth_charge - count bytes moved for a client
 * @client: the client
 * @bytes: how many
 *
 * Context: never sleeps; not in interrupts.
 */
void tm_bandwidth_charge(struct tm_client *client, u64 bytes)
{
	struct tm_meter *meter = &client->meter;
	u64 used = 0, budget;
	bool tell = false;

	spin_lock(&client->lock);
	meter->moved += bytes;
	budget = meter->budget;
	if (budget != TM_BANDWIDTH_ANY) {
		tm_meter_turn(meter, ktime_get_ns());
		meter->used += bytes;
		used = meter->used;
		tell = used > budget && !meter->over;
		if (tell) {
			meter->over = true;
			meter->excess++;
		}
	}
	spin_unlock(&client->lock);
	if (!tell)
		return;
	atomic64_inc(&tm_excess);
	tm_bandwidth_exceeded(client->id, -1, used, budget,
			      tm_bandwidth_throttles());
}

/* Count bytes for a pool and a client. Context: as tm_bandwidth_charge(). */
void tm_bandwidth_move(struct tm_client *client, enum tm_mover mover, u64 bytes)
{
	tm_bandwidth_count(mover, bytes);
	tm_bandwidth_charge(client, bytes);
}

/* Whether a client has to wait, and until when: its debts are paid by periods. */
static bool tm_meter_held(struct tm_client *client, ktime_t *until)
{
	struct tm_meter *meter = &client->meter;
	bool held = false;

	spin_lock(&client->lock);
	if (tm_bandwidth_throttles() && meter->budget != TM_BANDWIDTH_ANY) {
		tm_meter_turn(meter, ktime_get_ns());
		held = meter->used > meter->budget;
	}
	if (held) {
		u64 periods = div64_u64(meter->used - 1, meter->budget), ns;

		if (check_mul_overflow(periods, tm_bandwidth_period_ns(), &ns) ||
		    check_add_overflow(ns, meter->start, &ns))
			ns = KTIME_MAX;
		*until = min_t(u64, ns, KTIME_MAX);
	}
	spin_unlock(&client->lock);
	return held;
}

static void tm_meter_count_wait(struct tm_client *client, u64 ns)
{
	spin_lock(&client->lock);
	client->meter.waits++;
	client->meter.held_ns += ns;
	spin_unlock(&client->lock);
	atomic64_inc(&tm_waits);
	atomic64_add(ns, &tm_held_ns);
}

/**
 * tm_bandwidth_wait - wait until a client may move bytes
 * @client: the client
 *
 * For the beginning of what moves bytes, and between its steps.
 *
 * Context: may sleep; under no lock. Return: 0, -EINTR on a fatal signal.
 */
int tm_bandwidth_wait(struct tm_client *client)
{
	DEFINE_WAIT(wait);
	u64 begin = 0;
	ktime_t until;

	/* What nearly everybody is: without a budget. */
	if (data_race(client->meter.budget) == TM_BANDWIDTH_ANY)
		return 0;
	for (;;) {
		prepare_to_wait(&tm_held, &wait,
				TASK_KILLABLE | TASK_FREEZABLE);
		if (fatal_signal_pending(current) ||
		    !tm_meter_held(client, &until))
			break;
		if (!begin)
			begin = ktime_get_ns();
		schedule_hrtimeout_range(&until, TM_BANDWIDTH_SLACK_NS,
					 HRTIMER_MODE_ABS);
	}
	finish_wait(&tm_held, &wait);
	if (begin)
		tm_meter_count_wait(client, ktime_get_ns() - begin);
	return fatal_signal_pending(current) ? -EINTR : 0;
}

/**
 * tm_bandwidth_set_budget - bound what may be moved for a client in a period
 * @client: whose budget
 * @bytes: the new one; TM_BANDWIDTH_ANY: none
 *
 * Context: may sleep.
 * Return: 0, -EINVAL for 0, -EPERM for a raise above the default without CAP_SYS_RESOURCE.
 */
int tm_bandwidth_set_budget(struct tm_client *client, u64 bytes)
{
	struct tm_meter *meter = &client->meter;
	bool any = bytes <= tm_bandwidth_default_budget() ||
		   capable(CAP_SYS_RESOURCE);
	int err = 0;

	if (!bytes)
		return -EINVAL;
	spin_lock(&client->lock);
	if (!any && bytes > meter->budget) {
		err = -EPERM;
	} else {
		/* What was owed is at the old price. */
		tm_meter_turn(meter, ktime_get_ns());
		if (meter->budget == TM_BANDWIDTH_ANY)
			meter->used = 0;
		meter->budget = bytes;
	}
	spin_unlock(&client->lock);
	wake_up_all(&tm_held);
	return err;
}

/* A client's meter as it is now. Context: never sleeps. */
void tm_bandwidth_usage(struct tm_client *client, struct tm_meter *meter)
{
	spin_lock(&client->lock);
	tm_meter_turn(&client->meter, ktime_get_ns());
	*meter = client->meter;
	spin_unlock(&client->lock);
}

u64 tm_bandwidth_period_ns(void)
{
	return READ_ONCE(tm_period_ns);
}

int tm_bandwidth_set_period_us(u32 us)
{
	if (us < TM_MIN_PERIOD_US || us > TM_MAX_PERIOD_US)
		return -EINVAL;
	WRITE_ONCE(tm_period_ns, us * NSEC_PER_USEC);
	wake_up_all(&tm_held);
	return 0;
}

bool tm_bandwidth_throttles(void)
{
	return READ_ONCE(tm_throttle);
}

int tm_bandwidth_set_throttle(u32 on)
{
	if (on > 1)
		return -EINVAL;
	WRITE_ONCE(tm_throttle, on);
	wake_up_all(&tm_held);
	return 0;
}

u64 tm_bandwidth_default_budget(void)
{
	return READ_ONCE(tm_default_budget);
}

/* Takes effect for clients made from now on. */
int tm_bandwidth_set_default_budget(u64 bytes)
{
	if (!bytes)
		return -EINVAL;
	WRITE_ONCE(tm_default_budget, bytes);
	return 0;
}
