/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_CLIENT_H
#define TM_CLIENT_H

#include <linux/fs.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/xarray.h>

#include "window.h"

/**
 * struct tm_client - one open of the device
 * @inode: an anonymous inode whose i_mapping is the window: it holds the
 *         client's mappings, and its invalidate_lock keeps faults from seeing
 *         a tensor while it goes away, as for a file that is truncated
 * @tensors: handle → tensor; under invalidate_lock
 * @next_handle: handles are given out in a circle, so that a stale one is found
 *               out instead of naming the next tensor
 * @window: offsets; under invalidate_lock
 * @id: names the client in traces
 * @lock: guards @quota, @used and @nr_tensors
 * @quota: most bytes the client may hold
 * @used: bytes it holds
 * @nr_tensors: tensors it holds
 */
struct tm_client {
	struct inode *inode;
	struct xarray tensors;
	u32 next_handle;
	struct tm_window window;
	u32 id;
	spinlock_t lock;
	u64 quota;
	u64 used;
	u32 nr_tensors;
};

struct tm_client_totals {
	u64 clients;
	u64 tensors;
	u64 bytes;
};

int __must_check tm_clients_init(void);
void tm_clients_exit(void);

struct tm_client *tm_client_create(void);
void tm_client_destroy(struct tm_client *client);

int __must_check tm_client_charge(struct tm_client *client, u64 bytes);
void tm_client_uncharge(struct tm_client *client, u64 bytes);
int __must_check tm_client_set_quota(struct tm_client *client, u64 bytes);
void tm_client_usage(struct tm_client *client, u64 *quota, u64 *used,
		     u32 *nr_tensors);

u64 tm_client_window_size(void);
u64 tm_client_default_quota(void);
void tm_client_set_default_quota(u64 bytes);
void tm_client_totals(struct tm_client_totals *totals);

#endif
