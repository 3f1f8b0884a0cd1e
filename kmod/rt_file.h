/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_RT_FILE_H
#define TM_RT_FILE_H

#include <linux/types.h>

struct tm_client;

int tm_rt_file_open(struct tm_client *client, void __user *arg, size_t size);

#endif
