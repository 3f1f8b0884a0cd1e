/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_COMPACT_H
#define TM_KV_COMPACT_H

#include <linux/types.h>

struct tm_kv;

void tm_kv_compact_init(struct tm_kv *kv);
void tm_kv_compact_exit(struct tm_kv *kv);
void tm_kv_compact_wake(struct tm_kv *kv);
u32 tm_kv_compact_some(struct tm_kv *kv, bool all);

#endif
