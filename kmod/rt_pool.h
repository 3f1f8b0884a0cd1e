/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_RT_POOL_H
#define TM_RT_POOL_H

#include <linux/types.h>

struct tm_client;
struct tm_memory;

/* In bytes, but for @arenas. */
struct tm_rt_pool_stats {
	u64 size;
	u64 ready;
	u64 held;
	u64 used;
	u32 arenas;
};

void tm_rt_pool_init(void);
void tm_rt_pool_exit(void);

int __must_check tm_rt_pool_admit(u64 chunks);
void tm_rt_pool_dismiss(u64 chunks, bool last);
struct tm_memory *tm_rt_pool_take(void);
bool tm_rt_pool_put(struct tm_client *client, struct tm_memory *memory);
void tm_rt_pool_settle(void);

void tm_rt_pool_stats(struct tm_rt_pool_stats *stats);
int __must_check tm_rt_pool_set_size(u64 bytes);
int __must_check tm_rt_pool_set_ready(u64 bytes);

#endif
