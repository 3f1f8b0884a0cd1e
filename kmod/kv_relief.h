/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_RELIEF_H
#define TM_KV_RELIEF_H

#include <linux/types.h>

u64 tm_kv_relieve_prefixes(u64 bytes, bool wait);
u64 tm_kv_relieve_idle(u64 bytes);

#endif
