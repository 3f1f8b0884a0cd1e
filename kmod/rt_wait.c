// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a request with a deadline does when there is no memory: it joins those who wait, compacts when
 * the core says that this may help, and sleeps. So what comes free is its own by its priority, also while it compacts.
 */
#include <linux/errno.h>
#include <linux/hrtimer.h>
#include <linux/ktime.h>
#include <linux/preempt.h>
#include <linux/processor.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/string.h>

#include "bandwidth.h"
#include "event.h"
#include "rt.h"
#include "trace.h"

/* Rounds of compaction until nothing is left to move: the first may begin anywhere. */
#define TM_RT_ROUNDS	2

static bool tm_rt_over(ktime_t deadline)
{
	return signal_pending(current) || ktime_get() >= deadline;
}

/* Copy a block that nobody else gets at. */
static void tm_rt_copy(const struct tm_arena *arena,
		       const struct tm_rt_move *move)
{
	tm_bandwidth_count(TM_MOVER_RT, tm_rt_bytes(move->length));
	memmove(tm_arena_address(arena, move->to),
		tm_arena_address(arena, move->from),
		tm_rt_bytes(move->length));
}

static void tm_rt_finish_move(struct tm_arena *arena,
			      const struct tm_rt_move *move)
{
	struct task_struct *task;
	unsigned long irq;

	irq = tm_arena_lock(arena);
	tm_rt_move_end(&arena->rt, move);
	task = tm_rt_serve_next(arena);
	tm_arena_unlock(arena, irq, task);
	trace_tensormem_rt_move(arena->id, tm_rt_bytes(move->from),
				tm_rt_bytes(move->to),
				tm_rt_bytes(move->length));
}

/*
 * A step of compaction. Not preemptible: who wants to pin the block waits for it on another CPU, and
 * nobody on this one can meet it half-way.
 */
static enum tm_rt_step tm_rt_compact_step(struct tm_arena *arena)
{
	enum tm_rt_step step;
	struct tm_rt_move move;
	unsigned long irq;

	preempt_disable();
	irq = tm_arena_lock(arena);
	step = tm_rt_move_begin(&arena->rt, &move);
	tm_arena_unlock(arena, irq, NULL);
	if (step == TM_RT_STEP_MOVE) {
		tm_rt_copy(arena, &move);
		tm_rt_finish_move(arena, &move);
	}
	preempt_enable();
	return step;
}

/* Compact until nothing more can be done, or nothing more need be. */
static void tm_rt_compact(struct tm_arena *arena,
			  const struct tm_rt_sleeper *sleeper)
{
	u32 rounds = 0;

	while (rounds < TM_RT_ROUNDS && !tm_rt_over(sleeper->deadline) &&
	       READ_ONCE(sleeper->waiter.state) == TM_RT_WAITING) {
		switch (tm_rt_compact_step(arena)) {
		case TM_RT_STEP_ROUND:
			rounds++;
			break;
		case TM_RT_STEP_BUSY:
			cpu_relax();
			break;
		default:
			break;
		}
		cond_resched();
	}
}

/* Sleep, or compact whenever told to, until served. Return: 0, -EINTR, -ETIMEDOUT. */
static int tm_rt_sleep(struct tm_arena *arena, struct tm_rt_sleeper *sleeper,
		       u32 told)
{
	ktime_t deadline = sleeper->deadline;
	int err = 0;

	for (;;) {
		unsigned long irq;
		bool waiting;
		u32 frees;

		/* Before it looks: see tm_arena_lock(). */
		set_current_state(TASK_INTERRUPTIBLE);
		irq = tm_arena_lock(arena);
		waiting = sleeper->waiter.state == TM_RT_WAITING;
		frees = sleeper->waiter.frees;
		tm_arena_unlock(arena, irq, NULL);
		if (!waiting)
			break;
		if (signal_pending(current))
			err = -EINTR;
		else if (ktime_get() >= deadline)
			err = -ETIMEDOUT;
		if (err)
			break;
		if (frees != told) {
			__set_current_state(TASK_RUNNING);
			told = frees;
			tm_rt_compact(arena, sleeper);
			continue;
		}
		/* In hard interrupts also for who is no real-time task. */
		schedule_hrtimeout_range(&deadline, 0, HRTIMER_MODE_ABS_HARD);
	}
	__set_current_state(TASK_RUNNING);
	return err;
}

/* Join those who wait. Return: what @sleeper was told so far. */
static u32 tm_rt_queue(struct tm_rt_user *user, struct tm_rt_sleeper *sleeper)
{
	struct tm_arena *arena = user->arena;
	struct task_struct *task;
	unsigned long irq;
	u32 told;

	irq = tm_arena_lock(arena);
	user->waiting++;
	user->counts.waits++;
	tm_rt_wait(&arena->rt, &sleeper->waiter);
	told = sleeper->waiter.frees;
	task = tm_rt_serve_next(arena);
	tm_arena_unlock(arena, irq, task);
	return told;
}

/*
 * Leave those who wait. A block that came by the deadline is a success, whatever else has come since.
 * Return: 0, @err, or -ETIMEDOUT for a block that would have come later.
 */
static int tm_rt_unqueue(struct tm_rt_user *user, struct tm_rt_sleeper *sleeper,
			 int err)
{
	struct tm_arena *arena = user->arena;
	struct task_struct *task;
	unsigned long irq;

	irq = tm_arena_lock(arena);
	user->waiting -= sleeper->waiter.state == TM_RT_WAITING;
	if (tm_rt_cancel(&arena->rt, &sleeper->waiter))
		err = 0;
	else if (!err)
		err = -ETIMEDOUT;
	if (!err)
		user->counts.allocs++;
	else if (err == -ETIMEDOUT)
		user->counts.misses++;
	task = tm_rt_serve_next(arena);
	tm_arena_unlock(arena, irq, task);
	return err;
}

/**
 * tm_rt_user_wait - compact and wait for a block
 * @user: for whom
 * @size: granules
 * @flags: TM_RT_ALLOC_MOVABLE or 0
 * @start: when the request began
 * @deadline: when it ends
 * @block: where the block is
 *
 * Context: may sleep. Return: 0, by the @deadline and a step of compaction; -ETIMEDOUT, not
 * before it; -EINTR.
 */
int tm_rt_user_wait(struct tm_rt_user *user, u32 size, u32 flags, ktime_t start,
		    ktime_t deadline, struct tm_rt_block *block)
{
	struct tm_rt_sleeper sleeper = {
		.waiter = {
			.client = &user->core,
			.size = size,
			.flags = flags,
		},
		.task = current,
		.deadline = deadline,
	};
	u64 bytes = tm_rt_bytes(size);
	s64 had = max_t(s64, ktime_to_ns(ktime_sub(deadline, start)), 0);
	int err;

	might_sleep();
	trace_tensormem_rt_wait(user->id, bytes, had);
	err = tm_rt_sleep(user->arena, &sleeper, tm_rt_queue(user, &sleeper));
	err = tm_rt_unqueue(user, &sleeper, err);
	if (!err) {
		*block = sleeper.waiter.block;
	} else if (err == -ETIMEDOUT) {
		tm_rt_count_time(user->times.missed, had);
		trace_tensormem_rt_miss(user->id, bytes, had);
		tm_event_rt_miss(user->id, task_pid_nr(current), bytes, had);
	} else {
		trace_tensormem_rt_interrupted(user->id, bytes, had);
	}
	return err;
}
