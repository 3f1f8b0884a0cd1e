/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_BANDWIDTH_CORE_H
#define TM_BANDWIDTH_CORE_H

#include <linux/types.h>

/* Longest name of an event, and the end of it. */
#define TM_CORE_EVENT_NAME	24

/**
 * struct tm_core_usage - what a core has done since load, in events of its counter
 * @budget: that it may in a period; 0: any, and nothing is counted
 * @used: charged in the last whole period
 * @total: charged
 * @exempt: not charged: of real-time tasks and while nobody ran
 * @periods: that have ended
 * @excess: of these, with more than the budget
 * @held_ns: how long it was held
 */
struct tm_core_usage {
	u64 budget;
	u64 used;
	u64 total;
	u64 exempt;
	u64 periods;
	u64 excess;
	u64 held_ns;
};

int __must_check tm_cores_init(void);
void tm_cores_exit(void);

int __must_check tm_core_set_budget(unsigned int cpu, u64 budget);
void tm_core_usage(unsigned int cpu, struct tm_core_usage *usage);

int __must_check tm_core_set_event(const char *name);
void tm_core_event(char *name);

bool tm_core_reclaims(void);
int __must_check tm_core_set_reclaim(u32 on);

#endif
