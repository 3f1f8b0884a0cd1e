/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_MEMORY_H
#define TM_KV_MEMORY_H

#include <linux/types.h>

struct list_head;
struct tm_kv;

/* A call on the cache that may take memory; see tm_kv_do(). */
typedef int (*tm_kv_call)(struct tm_kv *kv, void *args, bool evict);

int __must_check tm_kv_do(struct tm_kv *kv, tm_kv_call call, void *args);
void tm_kv_trim(struct tm_kv *kv);
void tm_kv_settle(struct tm_kv *kv);
u32 tm_kv_take_empty(struct tm_kv *kv, u32 most, struct list_head *list);
void tm_kv_give_back_all(struct tm_kv *kv, struct list_head *list);
u64 tm_kv_memory_held(void);
void tm_kv_tell_evicted(const struct tm_kv *kv, u64 blocks);

#endif
