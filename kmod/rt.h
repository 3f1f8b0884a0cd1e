/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_RT_USER_H
#define TM_RT_USER_H

#include <linux/atomic.h>
#include <linux/irq_work.h>
#include <linux/kobject.h>
#include <linux/kref.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/preempt.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/types.h>

#include "core/rt.h"

struct cred;
struct inode;
struct page;
struct tm_client;
struct tm_memory;

/* Of a histogram: bucket i counts times from 2^i ns up to 2^(i+1); the first also 0. */
#define TM_RT_BUCKETS	64

/**
 * struct tm_arena - memory of the RT pool, and those who allocate in it
 * @users: one for each RT client; without any it is emptied
 * @ref: one for all users, and for each chunk that somebody held then
 * @taken: how many of its chunks it has
 * @id: names it in sysfs and traces
 * @nr_chunks: of how many chunks it is
 * @client: on whose bill it is
 * @payer: whose user has it counted as locked, or NULL
 * @inode: its i_mapping is what is mapped
 * @chunk: its memory
 * @page: all pages of it, in order
 * @base: where the kernel has them, one behind the other
 * @chain: serves the next of those who wait, one at a time
 * @lock: guards what follows, and what of its clients says so; taken in hard interrupts
 * @nr_users: RT clients
 * @rt: the core's part
 */
struct tm_arena {
	struct kref users;
	struct kref ref;
	u32 id;
	u32 nr_chunks;
	u32 taken;
	struct tm_client *client;
	const struct cred *payer;
	struct inode *inode;
	struct tm_memory **chunk;
	struct page **page;
	void *base;
	struct irq_work chain;
	raw_spinlock_t lock;
	u32 nr_users;
	struct tm_rt rt;
};

/* What became of an RT client's requests. */
struct tm_rt_counts {
	u64 allocs;
	u64 refused;
	u64 misses;
	u64 waits;
};

/* Times in ns: what requests with a deadline took, and what those that missed it had. */
struct tm_rt_times {
	atomic64_t latency[TM_RT_BUCKETS];
	atomic64_t missed[TM_RT_BUCKETS];
};

/**
 * struct tm_rt_user - an RT client: one who allocates in an arena
 * @kobj: its folder in sysfs; owns this
 * @all: on the list of all; under the mutex of that (rt_sysfs.c)
 * @arena: the arena
 * @kernel: the client behind one that a module opened, or NULL
 * @id: names it in sysfs and traces
 * @times: for sysfs
 * @counts: under the arena's lock, like what follows
 * @waiting: calls that wait now
 * @core: the core's part
 */
struct tm_rt_user {
	struct kobject kobj;
	struct list_head all;
	struct tm_arena *arena;
	struct tm_client *kernel;
	u32 id;
	struct tm_rt_times times;
	struct tm_rt_counts counts;
	u32 waiting;
	struct tm_rt_client core;
};

/**
 * struct tm_rt_sleeper - a call that waits; on its stack
 * @waiter: the core's part
 * @task: whose call it is
 * @deadline: when it ends
 */
struct tm_rt_sleeper {
	struct tm_rt_waiter waiter;
	struct task_struct *task;
	ktime_t deadline;
};

/* What an RT client and its arena are like now; a consistent set. */
struct tm_rt_state {
	struct tm_rt_counts counts;
	u64 size;
	u64 free;
	u64 largest;
	u64 reserved;
	u64 used;
	u64 moves;
	u32 clients;
	u32 blocks;
	u32 priority;
	u32 waiting;
};

/* log2 of the bytes in a granule: no two share what a CPU or a device writes at once. */
extern u32 tm_rt_shift;

static inline u32 tm_rt_granule(void)
{
	return 1u << tm_rt_shift;
}

static inline u64 tm_rt_bytes(u32 granules)
{
	return (u64)granules << tm_rt_shift;
}

void tm_arenas_init(void);
void tm_rt_chain(struct irq_work *work);
u64 tm_arena_bytes(const struct tm_arena *arena);
void *tm_arena_address(const struct tm_arena *arena, u32 granule);

struct tm_arena *tm_arena_create(struct tm_client *client, u64 bytes,
				 u32 movable, bool pin);
struct tm_arena *tm_arena_get(struct tm_arena *arena);
void tm_arena_put(struct tm_arena *arena);
struct tm_rt_user *tm_rt_user_create(struct tm_arena *arena, u32 priority);
void tm_rt_user_destroy(struct tm_rt_user *user);
void tm_rt_user_state(struct tm_rt_user *user, struct tm_rt_state *state);

int __must_check tm_rt_user_reserve(struct tm_rt_user *user, u64 bytes,
				    u32 count);
int __must_check tm_rt_user_alloc(struct tm_rt_user *user, u64 bytes, u32 flags,
				  ktime_t deadline, struct tm_rt_block *block);
int __must_check tm_rt_user_free(struct tm_rt_user *user, u32 handle);
void tm_rt_user_undo(struct tm_rt_user *user, u32 handle);
int __must_check tm_rt_user_pin(struct tm_rt_user *user, u32 handle,
				struct tm_rt_block *block);
int __must_check tm_rt_user_unpin(struct tm_rt_user *user, u32 handle);
int __must_check tm_rt_user_set_priority(struct tm_rt_user *user, u32 priority);

/* The slow path (rt_wait.c), and what it shares with the fast one. */
struct task_struct *tm_rt_serve_next(struct tm_arena *arena);
int tm_rt_user_wait(struct tm_rt_user *user, u32 size, u32 flags, ktime_t start,
		    ktime_t deadline, struct tm_rt_block *block);
void tm_rt_count_time(atomic64_t *histogram, s64 ns);

/*
 * Who is served is woken after the lock has been dropped, and may by then have woken for another reason
 * and be gone. A task that waits is not dead, and one that dies is freed a grace period of RCU later; so
 * a read-side section that began before we found it waiting is enough (kernel/exit.c: rcuwait_wake_up()): that we cannot
 * be preempted until it is woken is one, and keeps others of a priority between from making it wait (kernel/locking/rtmutex.c). The wakeup
 * cannot be lost: who waits says so before it looks, under the lock, whether it was served. Should it
 * have gone on, it is woken for nothing, which every sleep in the kernel is prepared for.
 */
static inline unsigned long tm_arena_lock(struct tm_arena *arena)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&arena->lock, flags);
	return flags;
}

/* @task: whom to wake, from tm_rt_serve_next(), or NULL. */
static inline void tm_arena_unlock(struct tm_arena *arena, unsigned long flags,
				   struct task_struct *task)
{
	if (!task) {
		raw_spin_unlock_irqrestore(&arena->lock, flags);
		return;
	}
	preempt_disable();
	raw_spin_unlock_irqrestore(&arena->lock, flags);
	wake_up_process(task);
	preempt_enable();
}

#endif
