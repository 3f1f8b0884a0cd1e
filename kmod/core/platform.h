/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The one door between core/ and the world. Core sees memory as numbers and
 * builds unchanged into the module and into a host library; whatever it needs
 * from its surroundings is declared here and provided by platform_kernel.h or by
 * the host library's platform_host.h:
 *
 *   types       u8 u16 u32 u64 bool size_t
 *   results     __must_check, the errno constants
 *   bits        tm_ctz64(), tm_fls32() (index of the highest set bit)
 *   chance      tm_random64(): a number that nobody outside can guess
 *   indexes     tm_index(i, size): @i, which was found to be below @size, in a form that
 *               is below it for speculation too; for what users choose
 *   memory      tm_table_alloc(), tm_table_free(): zeroed tables, may sleep
 *   locks       tm_lock_t, tm_assert_locked(); tm_sleep_lock_t, tm_assert_sleep_locked()
 *               for what may be held for long; tm_raw_lock_t, tm_assert_raw_locked() for
 *               what is taken in interrupts
 *   steps       tm_step(): the host library counts them; where a number of steps is promised
 *   time        tm_relax(): let others run, in loops under a tm_sleep_lock_t that are not
 *               bounded by a few hundred steps; may sleep
 *   assertions  tm_warn_on(), tm_static_assert()
 */
#ifndef TM_CORE_PLATFORM_H
#define TM_CORE_PLATFORM_H

#ifdef __KERNEL__
#include "platform_kernel.h"
#else
#include "platform_host.h"
#endif

#endif
