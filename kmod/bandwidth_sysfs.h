/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_BANDWIDTH_SYSFS_H
#define TM_BANDWIDTH_SYSFS_H

#include <linux/types.h>

struct attribute_group;

extern const struct attribute_group tm_bandwidth_group;

u32 tm_core_groups_count(void);
int __must_check tm_core_groups_init(const struct attribute_group **to);
void tm_core_groups_exit(void);

#endif
