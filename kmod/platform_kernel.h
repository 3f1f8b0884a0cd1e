/* SPDX-License-Identifier: GPL-2.0-only */
/* What core/platform.h promises, made of the kernel's own means. */
#ifndef TM_PLATFORM_KERNEL_H
#define TM_PLATFORM_KERNEL_H

#include <linux/bitops.h>
#include <linux/bug.h>
#include <linux/build_bug.h>
#include <linux/errno.h>
#include <linux/lockdep.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/random.h>
#include <linux/rwsem.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/types.h>

typedef spinlock_t tm_lock_t;
typedef struct rw_semaphore tm_sleep_lock_t;
typedef raw_spinlock_t tm_raw_lock_t;

#define tm_assert_locked(lock)		lockdep_assert_held(lock)
#define tm_assert_sleep_locked(lock)	lockdep_assert_held(lock)
#define tm_assert_raw_locked(lock)	lockdep_assert_held(lock)
#define tm_step()		do { } while (0)
#define tm_warn_on(cond)	WARN_ON_ONCE(cond)
#define tm_static_assert	static_assert

static inline unsigned int tm_ctz64(u64 v)
{
	return __ffs64(v);
}

static inline unsigned int tm_fls32(u32 v)
{
	return __fls(v);
}

static inline u64 tm_random64(void)
{
	return get_random_u64();
}

static inline u32 tm_index(u32 i, u32 size)
{
	return array_index_nospec(i, size);
}

static inline void tm_relax(void)
{
	cond_resched();
}

/* On the caller's cgroup, and no reason for an OOM kill: users choose some sizes. */
static inline void *tm_table_alloc(size_t n, size_t size)
{
	return kvcalloc(n, size, GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL |
				 __GFP_NOWARN);
}

static inline void tm_table_free(void *table)
{
	kvfree(table);
}

#endif
