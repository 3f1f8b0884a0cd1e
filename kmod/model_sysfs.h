/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_SYSFS_H
#define TM_MODEL_SYSFS_H

#include <linux/compiler_attributes.h>

struct kobject;

int __must_check tm_model_sysfs_start(struct kobject *device);
void tm_model_sysfs_exit(void);
void tm_model_sysfs_gen(struct kobject *kobj);
int __must_check tm_model_sysfs_add(struct kobject *kobj, const char *name);

#endif
