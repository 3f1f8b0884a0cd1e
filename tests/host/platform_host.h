/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What core/platform.h promises, made of the C library, for the host library and
 * its tests.
 *
 * Stricter than the kernel where that finds bugs: a bit search of 0 aborts, an index
 * out of range aborts, a lock that is not held aborts, a warning nobody expects aborts,
 * and any table allocation can be made to fail. With NDEBUG (the library for benchmarks)
 * the first three cost nothing, as in a kernel without lockdep.
 */
#ifndef TM_PLATFORM_HOST_H
#define TM_PLATFORM_HOST_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __must_check		__attribute__((warn_unused_result))

#define tm_static_assert(...)	_Static_assert(__VA_ARGS__)

/* Like WARN_ON(): the value of @cond. */
#define tm_warn_on(cond)						\
	tm_host_warn(!!(cond), #cond, __FILE__, __LINE__)

/* A warning came: counted, or the end. */
void tm_host_warned(const char *text, const char *file, int line);

static inline bool tm_host_warn(bool cond, const char *text, const char *file,
				int line)
{
	if (cond)
		tm_host_warned(text, file, line);
	return cond;
}

/* The next @n warnings are counted instead of ending the program. */
void tm_host_expect_warnings(unsigned int n);
/* Warnings still expected; forgets them. */
unsigned int tm_host_missing_warnings(void);

/* Print and abort. */
__attribute__((noreturn, format(printf, 3, 4)))
void tm_host_die(const char *file, int line, const char *fmt, ...);

#ifdef NDEBUG
#define tm_host_require(cond)	((void)sizeof(!(cond)))
#else
#define tm_host_require(cond)						\
	((cond) ? (void)0 :						\
	 tm_host_die(__FILE__, __LINE__, "does not hold: %s", #cond))
#endif

typedef struct {
	bool held;
} tm_lock_t;

typedef tm_lock_t tm_sleep_lock_t;
typedef tm_lock_t tm_raw_lock_t;

#define tm_assert_locked(lock)		tm_host_require((lock)->held)
#define tm_assert_sleep_locked(lock)	tm_host_require((lock)->held)
#define tm_assert_raw_locked(lock)	tm_host_require((lock)->held)

#ifdef NDEBUG
#define tm_step()		((void)0)
#else
/* Steps so far; a test looks at the difference. */
extern u64 tm_host_steps;
#define tm_step()		((void)tm_host_steps++)
#endif

static inline void tm_host_lock(tm_lock_t *lock)
{
	tm_host_require(!lock->held);
	lock->held = true;
}

static inline void tm_host_unlock(tm_lock_t *lock)
{
	tm_host_require(lock->held);
	lock->held = false;
}

static inline unsigned int tm_ctz64(u64 v)
{
	tm_host_require(v);
	return (unsigned int)__builtin_ctzll(v);
}

static inline unsigned int tm_fls32(u32 v)
{
	tm_host_require(v);
	return 31u ^ (unsigned int)__builtin_clz(v);
}

/* The same numbers in each run. */
static inline u64 tm_random64(void)
{
	static u64 state;
	u64 v = state += 0x9e3779b97f4a7c15;

	v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9;
	v = (v ^ (v >> 27)) * 0x94d049bb133111eb;
	return v ^ (v >> 31);
}

static inline u32 tm_index(u32 i, u32 size)
{
	tm_host_require(i < size);
	return i;
}

static inline void tm_relax(void)
{
}

void *tm_table_alloc(size_t n, size_t size);
void tm_table_free(void *table);

/* The @nth allocation from now fails (1 is the next one); 0: none does. */
void tm_host_fail_table(unsigned int nth);
/* Tables that are allocated now. */
unsigned int tm_host_tables(void);

#endif
