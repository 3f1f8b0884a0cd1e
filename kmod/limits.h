/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_LIMITS_H
#define TM_LIMITS_H

#include <linux/types.h>

struct user_struct;

bool tm_limits_in_cgroup(void);
int __must_check tm_limits_pin(u64 pages, struct user_struct **user);
void tm_limits_unpin(u64 pages, struct user_struct *user);

#endif
