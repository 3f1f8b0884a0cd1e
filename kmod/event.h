/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_EVENT_H
#define TM_EVENT_H

#include <linux/types.h>
#include <uapi/linux/tensormem.h>

int tm_events_init(void);
void tm_events_exit(void);

/* All of these: context any, hard interrupts and raw locks too; a few instructions while nobody listens. */
void tm_event_slot(enum tensormem_nl_command kind, const char *slot,
		   u64 generation, u64 size, int error);
void tm_event_rt_miss(u32 client, u32 pid, u64 size, u64 had_ns);
void tm_event_kv_evicted(u32 client, u32 cache, u64 blocks);
void tm_event_kv_packing(enum tensormem_nl_command kind, u32 client, u32 cache,
			 u32 sequence, u64 blocks, u64 before, u64 after);
void tm_event_kv_full(u32 client, u32 cache, int error);
void tm_event_pressure(u32 level, u64 available, u64 given);
void tm_event_bandwidth(u32 client, s32 cpu, u64 used, u64 budget,
			bool throttled);

#endif
