/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_PARK_H
#define TM_PARK_H

#include <linux/types.h>

struct tm_client;
struct tm_tensor;

int __must_check tm_park_init(void);
void tm_park_exit(void);

void tm_park(struct tm_client *client, struct tm_tensor *tensor);
struct tm_tensor *tm_unpark(struct tm_client *client,
			    const struct tm_tensor *like);
u64 tm_park_held(void);
u64 tm_park_relieve(u64 bytes, bool wait);
bool tm_park_relieve_client(struct tm_client *client);
void tm_park_close(struct tm_client *client);

#endif
