/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_COMPACT_H
#define TM_COMPACT_H

#include <linux/types.h>

int tm_compact(u64 nodes, u32 *emptied);

#endif
