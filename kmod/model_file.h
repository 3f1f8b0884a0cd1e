/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_FILE_H
#define TM_MODEL_FILE_H

#include <linux/types.h>

struct kobject;
struct tm_client;

int tm_model_file_open(struct tm_client *client, struct kobject *device,
		       void __user *arg, size_t size);

#endif
