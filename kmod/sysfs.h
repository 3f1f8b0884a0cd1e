/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_SYSFS_H
#define TM_SYSFS_H

struct attribute_group;

const struct attribute_group **tm_sysfs_groups(void);
void tm_sysfs_exit(void);

#endif
