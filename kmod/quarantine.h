/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_QUARANTINE_H
#define TM_QUARANTINE_H

#include <linux/types.h>

struct tm_client;
struct tm_memory;
struct tm_region;

bool tm_quarantine_put(struct tm_client *client, struct tm_memory *memory);
void tm_quarantine_free(struct tm_client *client, struct tm_region *region);
bool tm_quarantine_flush(void);
u64 tm_quarantine_pages(void);
void tm_quarantine_exit(void);

#endif
