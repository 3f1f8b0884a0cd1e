/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_PACK_H
#define TM_KV_PACK_H

#include "core/cache.h"

struct tm_kv;

struct tm_kv_packed {
	u32 blocks;
	u64 before;
	u64 after;
};

void tm_kv_pack_init(struct tm_kv *kv);
void tm_kv_pack_exit(struct tm_kv *kv);
void tm_kv_pack_wake(struct tm_kv *kv, bool refused);

int __must_check tm_kv_pack(struct tm_kv *kv, struct tm_seq_id id,
			    struct tm_kv_packed *packed);
int __must_check tm_kv_pack_idlest(struct tm_kv *kv, u64 above, bool *later);
int __must_check tm_kv_unpack_all(struct tm_kv *kv, struct tm_seq_id id,
				  struct tm_kv_packed *packed);
int __must_check tm_kv_unpack(struct tm_kv *kv, u32 place, u32 group,
			      u32 index, struct tm_kv_packed *packed);

#endif
