/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_BANDWIDTH_H
#define TM_BANDWIDTH_H

#include <linux/percpu.h>
#include <linux/types.h>

struct tm_client;

/* What the module moves memory for: the pools, and model slots, which live in the first two. */
enum tm_mover {
	TM_MOVER_CHUNK,
	TM_MOVER_BUDDY,
	TM_MOVER_SLAB,
	TM_MOVER_KV,
	TM_MOVER_MODEL,
	TM_MOVER_RT,
	TM_MOVERS
};

struct tm_moved {
	u64 bytes[TM_MOVERS];
};

DECLARE_PER_CPU(struct tm_moved, tm_moved);

/* No budget. */
#define TM_BANDWIDTH_ANY	U64_MAX

/**
 * struct tm_meter - what is moved for a client, against its budget
 * @budget: bytes in a period, or TM_BANDWIDTH_ANY; all of it is under tm_client::lock
 * @start: when the period began
 * @used: bytes in it, and what periods before it had too many
 * @moved: bytes ever
 * @excess: periods that had more than the budget
 * @waits: calls that had to wait
 * @held_ns: how long they did
 * @over: @excess has counted this period
 */
struct tm_meter {
	u64 budget;
	u64 start;
	u64 used;
	u64 moved;
	u64 excess;
	u64 waits;
	u64 held_ns;
	bool over;
};

struct tm_bandwidth_totals {
	u64 excess;
	u64 waits;
	u64 held_ns;
};

/* Count what a pool has moved. Context: any. */
static inline void tm_bandwidth_count(enum tm_mover mover, u64 bytes)
{
	this_cpu_add(tm_moved.bytes[mover], bytes);
}

u64 tm_bandwidth_bytes(enum tm_mover mover);
void tm_bandwidth_totals(struct tm_bandwidth_totals *totals);

void tm_bandwidth_init(struct tm_client *client);
void tm_bandwidth_charge(struct tm_client *client, u64 bytes);
void tm_bandwidth_move(struct tm_client *client, enum tm_mover mover,
		       u64 bytes);
int __must_check tm_bandwidth_wait(struct tm_client *client);
int __must_check tm_bandwidth_set_budget(struct tm_client *client, u64 bytes);
void tm_bandwidth_usage(struct tm_client *client, struct tm_meter *meter);

u64 tm_bandwidth_period_ns(void);
int __must_check tm_bandwidth_set_period_us(u32 us);
bool tm_bandwidth_throttles(void);
int __must_check tm_bandwidth_set_throttle(u32 on);
u64 tm_bandwidth_default_budget(void);
int __must_check tm_bandwidth_set_default_budget(u64 bytes);

void tm_bandwidth_exceeded(u32 client, s32 cpu, u64 used, u64 budget,
			   bool throttled);

#endif
