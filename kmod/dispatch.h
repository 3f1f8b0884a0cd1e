/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_DISPATCH_H
#define TM_DISPATCH_H

#include <linux/types.h>

/**
 * struct tm_dispatch - what serves a tensor when the call does not say
 * @pool: enum tensormem_pool, never AUTO
 * @huge: whole chunks are mapped as blocks
 */
struct tm_dispatch {
	u8 pool;
	bool huge;
};

struct tm_dispatch tm_dispatch(u32 kind, u64 size);
ssize_t tm_dispatch_show(u32 kind, char *buf);

#endif
