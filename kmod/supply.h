/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_SUPPLY_H
#define TM_SUPPLY_H

struct tm_client;
struct tm_memory;
struct tm_memory_request;

struct tm_memory *tm_supply(struct tm_client *client,
			    struct tm_memory_request *request);

#endif
