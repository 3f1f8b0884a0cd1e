/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_LIMITS_H
#define TM_LIMITS_H

#include <linux/types.h>

struct cred;

bool tm_limits_in_cgroup(void);
int __must_check tm_limits_pin(u64 pages, const struct cred **payer);
void tm_limits_unpin(u64 pages, const struct cred *payer);

#endif
