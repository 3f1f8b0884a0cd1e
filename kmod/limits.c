// SPDX-License-Identifier: GPL-2.0-only
/* Limits that are the system's, not ours: memory cgroups and RLIMIT_MEMLOCK. */
#include <linux/capability.h>
#include <linux/cgroup.h>
#include <linux/cred.h>
#include <linux/memcontrol.h>
#include <linux/resource.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>

#include "limits.h"

/**
 * tm_limits_in_cgroup - whether somebody limits current's memory
 *
 * Or, within set_active_memcg(), that of whom current works for.
 *
 * The kernel charges a cgroup when a page is allocated and in no other way that a
 * module may use. So memory for a task in a cgroup cannot come out of what the pools
 * have ready; for a task in the root cgroup, which has no limit, it can.
 *
 * Context: any.
 */
bool tm_limits_in_cgroup(void)
{
	bool root = true;

#ifdef CONFIG_MEMCG
	if (current->active_memcg)
		return current->active_memcg->css.parent;
	rcu_read_lock();
	root = !task_css(current, memory_cgrp_id)->parent;
	rcu_read_unlock();
#endif
	return !root;
}

/**
 * tm_limits_pin - count pages against the caller's RLIMIT_MEMLOCK
 * @pages: how many
 * @payer: whose user was charged, for tm_limits_unpin(); NULL with CAP_IPC_LOCK
 *
 * Per user, as io_uring and perf count: opening another client does not help. It is
 * the credentials that are kept because 6.1 lets no module drop a user.
 *
 * Context: may sleep. Return: 0, or -EPERM beyond the limit.
 */
int tm_limits_pin(u64 pages, const struct cred **payer)
{
	u64 limit = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;
	atomic_long_t *locked = &current_user()->locked_vm;
	long old = atomic_long_read(locked);

	*payer = NULL;
	if (capable(CAP_IPC_LOCK))
		return 0;
	do {
		if (pages > limit || old > limit - pages)
			return -EPERM;
	} while (!atomic_long_try_cmpxchg(locked, &old, old + pages));
	*payer = get_current_cred();
	return 0;
}

/* Undo tm_limits_pin(). Context: process context. */
void tm_limits_unpin(u64 pages, const struct cred *payer)
{
	if (!payer)
		return;
	atomic_long_sub(pages, &payer->user->locked_vm);
	put_cred(payer);
}
