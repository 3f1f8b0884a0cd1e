/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_SMALL_H
#define TM_SMALL_H

#include <linux/types.h>

#include "core/slab.h"

struct tm_client;
struct tm_smalls;

int __must_check tm_small_alloc(struct tm_client *client, u32 size, bool zero,
				struct tm_slab_object *object);
void tm_small_free(struct tm_client *client,
		   const struct tm_slab_object *object);
void tm_small_destroy(struct tm_client *client);

u32 tm_small_max(void);
u32 tm_small_size(const struct tm_slab_object *object);
u64 tm_small_offset(const struct tm_slab_object *object);

u64 tm_small_slab_pages(void);
u64 tm_small_object_bytes(void);

#endif
