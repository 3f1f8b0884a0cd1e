/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_RT_SYSFS_H
#define TM_RT_SYSFS_H

#include <linux/compiler_attributes.h>

struct kobject;
struct tm_rt_user;

void tm_rt_sysfs_start(struct kobject *device);
void tm_rt_sysfs_exit(void);
int __must_check tm_rt_sysfs_add(struct tm_rt_user *user);
void tm_rt_sysfs_remove(struct tm_rt_user *user);

#endif
