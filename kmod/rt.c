// SPDX-License-Identifier: GPL-2.0-only
/*
 * What must not wait: each call takes the arena's raw spinlock for a constant number of steps of the
 * core, then wakes one task at most. Nothing here asks for memory, sleeps or prints, so that all but
 * an allocation with a deadline may be called in hard interrupts.
 */
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/processor.h>

#include "rt.h"
#include "trace.h"

/* Count a time. Context: any. */
void tm_rt_count_time(atomic64_t *histogram, s64 ns)
{
	atomic64_inc(&histogram[ns > 0 ? ilog2((u64)ns) : 0]);
}

/* Granules for @bytes, or 0 for what is not in any arena of this size. */
static u32 tm_rt_granules_for(const struct tm_arena *arena, u64 bytes)
{
	return bytes > tm_arena_bytes(arena) ?
	       0 : (bytes + tm_rt_granule() - 1) >> tm_rt_shift;
}

/**
 * tm_rt_serve_next - hand what was freed to the first who waits
 * @arena: its lock is held since before that
 *
 * A block of the heap that comes after the deadline was never there; an item of a reservation is never late. Whoever
 * has been served, the next is served by an interrupt of its own: it cannot wait until the task of the first one runs.
 *
 * Context: any. Return: whom tm_arena_unlock() is to wake, or NULL.
 */
struct task_struct *tm_rt_serve_next(struct tm_arena *arena)
{
	bool item = arena->rt.handed;
	struct tm_rt_waiter *waiter = tm_rt_serve(&arena->rt);
	struct tm_rt_sleeper *sleeper;

	lockdep_assert_held(&arena->lock);
	if (!waiter)
		return NULL;
	sleeper = container_of(waiter, struct tm_rt_sleeper, waiter);
	if (waiter->state != TM_RT_SERVED)
		return sleeper->task;
	if (!item && ktime_get() > sleeper->deadline) {
		tm_warn_on(tm_rt_free(&arena->rt, waiter->client,
				      waiter->block.handle));
		waiter->state = TM_RT_IDLE;
	}
	if (arena->rt.levels[0] || arena->rt.levels[1])
		irq_work_queue(&arena->chain);
	return sleeper->task;
}

/* Context: hard interrupt. */
void tm_rt_chain(struct irq_work *work)
{
	struct tm_arena *arena = container_of(work, struct tm_arena, chain);
	unsigned long irq = tm_arena_lock(arena);

	tm_arena_unlock(arena, irq, tm_rt_serve_next(arena));
}

/**
 * tm_rt_user_reserve - lay blocks aside, or give them up
 * @user: for whom
 * @bytes: of each
 * @count: how many; 0 gives up those of this size
 *
 * Context: any.
 * Return: 0; -EINVAL, -ENOSPC, -EEXIST; -EBUSY and -ENOENT for what cannot be given up.
 */
int tm_rt_user_reserve(struct tm_rt_user *user, u64 bytes, u32 count)
{
	struct tm_arena *arena = user->arena;
	u32 size = tm_rt_granules_for(arena, bytes);
	struct task_struct *task = NULL;
	unsigned long irq;
	int err;

	if (!size)
		return -EINVAL;
	irq = tm_arena_lock(arena);
	if (count) {
		err = tm_rt_reserve(&arena->rt, &user->core, size, count);
	} else {
		err = tm_rt_unreserve(&arena->rt, &user->core, size);
		task = tm_rt_serve_next(arena);
	}
	tm_arena_unlock(arena, irq, task);
	return err;
}

/* @final: nothing else will be tried. */
static int tm_rt_try(struct tm_rt_user *user, u32 size, u32 flags, bool final,
		     struct tm_rt_block *block)
{
	struct tm_arena *arena = user->arena;
	unsigned long irq;
	int err;

	irq = tm_arena_lock(arena);
	err = tm_rt_alloc(&arena->rt, &user->core, size, flags, block);
	if (!err)
		user->counts.allocs++;
	else if (err == -ENFILE || (err == -ENOSPC && final))
		user->counts.refused++;
	tm_arena_unlock(arena, irq, NULL);
	return err;
}

/**
 * tm_rt_user_alloc - allocate a block
 * @user: for whom
 * @bytes: of what size
 * @flags: TM_RT_ALLOC_MOVABLE or _RESERVED
 * @deadline: how long to compact and wait for it; 0: not at all
 * @block: where it is
 *
 * Context: any if there is no @deadline; else may sleep.
 * Return: 0; -EINVAL; -ENOSPC, -ENFILE; -ETIMEDOUT; -EINTR.
 */
int tm_rt_user_alloc(struct tm_rt_user *user, u64 bytes, u32 flags,
		     ktime_t deadline, struct tm_rt_block *block)
{
	bool final = !deadline || flags & TM_RT_ALLOC_RESERVED;
	bool timed = deadline || trace_tensormem_rt_alloc_enabled();
	ktime_t start = timed ? ktime_get() : 0;
	u32 size = tm_rt_granules_for(user->arena, bytes);
	s64 took;
	int err;

	if (!size)
		return -EINVAL;
	err = tm_rt_try(user, size, flags, final, block);
	if (err == -ENOSPC && !final)
		err = tm_rt_user_wait(user, size, flags, start, deadline,
				      block);
	if (err || !timed)
		return err;
	took = ktime_to_ns(ktime_sub(ktime_get(), start));
	if (deadline)
		tm_rt_count_time(user->times.latency, took);
	trace_tensormem_rt_alloc(user->id, bytes, block->handle,
				 tm_rt_bytes(block->start), took);
	return 0;
}

static int tm_rt_give_up(struct tm_rt_user *user, u32 handle, u32 allocs)
{
	struct tm_arena *arena = user->arena;
	struct task_struct *task = NULL;
	unsigned long irq;
	int err;

	irq = tm_arena_lock(arena);
	err = tm_rt_free(&arena->rt, &user->core, handle);
	if (!err) {
		user->counts.allocs -= allocs;
		task = tm_rt_serve_next(arena);
	}
	tm_arena_unlock(arena, irq, task);
	if (!err)
		trace_tensormem_rt_free(user->id, handle);
	return err;
}

/* Free a block. Context: any. Return: 0, or -ENOENT for none of this client's. */
int tm_rt_user_free(struct tm_rt_user *user, u32 handle)
{
	return tm_rt_give_up(user, handle, 0);
}

/* An allocation has not been: the caller cannot be told of it. Context: any. */
void tm_rt_user_undo(struct tm_rt_user *user, u32 handle)
{
	/* Another thread may have guessed the handle and freed it: fine as well. */
	if (tm_rt_give_up(user, handle, 1))
		return;
}

/**
 * tm_rt_user_pin - keep a block where it is
 * @user: whose it is
 * @handle: its name
 * @block: where it is
 *
 * Who moves it meanwhile is on another CPU, with preemption disabled: that is over after one copy.
 *
 * Context: any but interrupts. Return: 0, -ENOENT, -EOVERFLOW.
 */
int tm_rt_user_pin(struct tm_rt_user *user, u32 handle,
		   struct tm_rt_block *block)
{
	struct tm_arena *arena = user->arena;
	unsigned long irq;
	int err;

	for (;;) {
		irq = tm_arena_lock(arena);
		err = tm_rt_pin(&arena->rt, &user->core, handle, block);
		tm_arena_unlock(arena, irq, NULL);
		if (err != -EAGAIN)
			return err;
		cpu_relax();
	}
}

/* Context: any. Return: 0, -ENOENT, -EINVAL when it is not pinned. */
int tm_rt_user_unpin(struct tm_rt_user *user, u32 handle)
{
	struct tm_arena *arena = user->arena;
	struct task_struct *task = NULL;
	unsigned long irq;
	int err;

	irq = tm_arena_lock(arena);
	err = tm_rt_unpin(&arena->rt, &user->core, handle);
	if (!err)
		task = tm_rt_serve_next(arena);
	tm_arena_unlock(arena, irq, task);
	return err;
}

/* For requests that begin to wait from now on. Context: any. Return: 0 or -EINVAL. */
int tm_rt_user_set_priority(struct tm_rt_user *user, u32 priority)
{
	unsigned long irq;

	if (priority >= TM_RT_PRIORITIES)
		return -EINVAL;
	irq = tm_arena_lock(user->arena);
	user->core.priority = tm_index(priority, TM_RT_PRIORITIES);
	tm_arena_unlock(user->arena, irq, NULL);
	return 0;
}

/* Context: any. */
void tm_rt_user_state(struct tm_rt_user *user, struct tm_rt_state *state)
{
	struct tm_arena *arena = user->arena;
	unsigned long irq;

	irq = tm_arena_lock(arena);
	*state = (struct tm_rt_state){
		.counts = user->counts,
		.size = tm_arena_bytes(arena),
		.free = tm_rt_bytes(arena->rt.heap.free),
		.largest = tm_rt_bytes(tm_heap_largest(&arena->rt.heap)),
		.reserved = tm_rt_bytes(user->core.reserved),
		.used = tm_rt_bytes(user->core.used),
		.moves = arena->rt.moves,
		.clients = arena->nr_users,
		.blocks = user->core.nr_blocks,
		.priority = user->core.priority,
		.waiting = user->waiting,
	};
	tm_arena_unlock(arena, irq, NULL);
}
