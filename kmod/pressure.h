/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_PRESSURE_H
#define TM_PRESSURE_H

#include <linux/types.h>

struct attribute_group;
struct kobject;

extern const struct attribute_group tm_pressure_group;

int __must_check tm_pressure_init(void);
void tm_pressure_exit(void);
void tm_pressure_start(struct kobject *device);
void tm_pressure_stop(void);

void tm_pressure_wake(void);
int __must_check tm_pressure_file_relieve(void __user *arg, size_t size);

#endif
