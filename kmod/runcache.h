/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_RUNCACHE_H
#define TM_RUNCACHE_H

#include <linux/types.h>

struct tm_run;

int __must_check tm_runcache_init(void);
void tm_runcache_exit(void);

bool tm_runcache_take(unsigned int order, u32 kind, bool keeps,
		      struct tm_run *run);
bool tm_runcache_put(const struct tm_run *run, u32 kind, bool keeps);
void tm_runcache_untake(unsigned int order, u32 kind);
u64 tm_runcache_drain(void);
u64 tm_runcache_pages(void);
u64 tm_runcache_used(u32 kind);

#endif
