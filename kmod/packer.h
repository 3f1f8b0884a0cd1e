/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_PACKER_H
#define TM_PACKER_H

#include "core/cache.h"

struct tm_kv;

int __must_check tm_packer_get(u32 bytes);
void tm_packer_exit(void);

u32 __must_check tm_pack_block(struct tm_kv *kv, u32 group,
			       struct tm_kv_block block);
int __must_check tm_unpack_block(struct tm_kv *kv, u32 group,
				 struct tm_kv_block block, bool evict);
void tm_unpack_to(struct tm_kv *kv, u32 group, struct tm_kv_block from,
		  struct tm_kv_block to);

#endif
