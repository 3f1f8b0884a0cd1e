/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_OPS_H
#define TM_KV_OPS_H

#include "core/cache.h"

struct tm_kv;

void tm_kv_zap(struct tm_kv *kv, u32 place, u32 group, u32 first, u32 end);

int __must_check tm_kv_open(struct tm_kv *kv, u64 tenant, struct tm_seq_id *id);
u32 tm_kv_length(struct tm_kv *kv, struct tm_seq_id id);
int __must_check tm_kv_close(struct tm_kv *kv, struct tm_seq_id id);
int __must_check tm_kv_extend(struct tm_kv *kv, struct tm_cache_extend *items,
			      u32 nr, u32 *failed);
int __must_check tm_kv_truncate(struct tm_kv *kv, struct tm_seq_id id,
				u32 length);
int __must_check tm_kv_fork(struct tm_kv *kv, struct tm_seq_id id, u32 at,
			    struct tm_seq_id *child);
int __must_check tm_kv_publish(struct tm_kv *kv, struct tm_seq_id id,
			       u32 first, const struct tm_hash *hashes, u32 nr);
int __must_check tm_kv_lookup(struct tm_kv *kv, struct tm_seq_id id,
			      const struct tm_hash *hashes, u32 nr,
			      u32 *matched);
int __must_check tm_kv_peek(struct tm_kv *kv, struct tm_seq_id id,
			    const struct tm_hash *hashes, u32 nr, u32 *matched);
int __must_check tm_kv_adopt(struct tm_kv *kv, struct tm_seq_id id, u32 index,
			     const struct tm_hash *hash, u32 tokens, u32 length);
int __must_check tm_kv_reset(struct tm_kv *kv);
int __must_check tm_kv_write(struct tm_kv *kv, u32 place, u32 group, u32 index);

#endif
