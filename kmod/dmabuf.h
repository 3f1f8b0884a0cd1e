/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_DMABUF_H
#define TM_DMABUF_H

#include <linux/types.h>

struct attribute_group;
struct tm_client;

extern const struct attribute_group tm_dma_group;

int tm_dmabuf_file_export(struct tm_client *client, void __user *arg,
			  size_t size);

#endif
