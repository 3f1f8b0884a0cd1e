/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_CLIENT_H
#define TM_CLIENT_H

#include <linux/fs.h>
#include <linux/hashtable.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/xarray.h>

#include "bandwidth.h"
#include "numa.h"
#include "window.h"

struct tm_smalls;

/* Buckets for parked tensors: a program has few distinct sizes. */
#define TM_PARKED_BITS	5

/**
 * struct tm_client - one open of the device
 * @ref: one of the open device, one for each memory of it in quarantine or in the
 *       hands of somebody who gives up parked tensors
 * @inode: an anonymous inode whose i_mapping is the window: it holds the
 *         client's mappings, and its invalidate_lock keeps faults from seeing
 *         a tensor while it goes away, as for a file that is truncated
 * @tensors: handle → tensor; under invalidate_lock
 * @next_handle: handles are given out in a circle, so that a stale one is found
 *               out instead of naming the next tensor
 * @window: offsets; under invalidate_lock
 * @parked: freed tensors whose memory and mappings wait for reuse, by length; under
 *          tm_park_lock (park.c)
 * @smalls: slabs for small tensors, or NULL (small.c)
 * @closing: nothing may be parked any more, and the window is nobody's: its ranges go
 *           without being taken out; set under tm_park_lock and invalidate_lock
 * @forks: mappings of it that fork() has begun to copy, ever
 * @turn: whose turn it is when its memory is interleaved over nodes
 * @all: on the list of all clients
 * @id: names the client in traces
 * @lock: guards what follows, in bandwidth.c as well
 * @numa: where its memory comes from unless a call says otherwise
 * @quota: most bytes the client may hold
 * @used: bytes it holds
 * @kept: those of @used that no tensor has: parked or in quarantine
 * @nr_tensors: tensors it holds
 * @meter: bytes moved for it (bandwidth.c)
 */
struct tm_client {
	struct kref ref;
	struct inode *inode;
	struct xarray tensors;
	u32 next_handle;
	struct tm_window window;
	DECLARE_HASHTABLE(parked, TM_PARKED_BITS);
	struct tm_smalls *smalls;
	bool closing;
	atomic_t forks;
	atomic_t turn;
	struct list_head all;
	u32 id;
	spinlock_t lock;
	struct tm_numa numa;
	u64 quota;
	u64 used;
	u64 kept;
	u32 nr_tensors;
	struct tm_meter meter;
};

struct tm_client_usage {
	u64 quota;
	u64 used;
	u64 kept;
	u32 nr_tensors;
};

struct tm_client_totals {
	u64 clients;
	u64 tensors;
	u64 bytes;
	u64 kept;
};

int __must_check tm_clients_init(void);
void tm_clients_exit(void);

struct inode *tm_client_inode(void);
struct tm_client *tm_client_create(void);
void tm_client_destroy(struct tm_client *client);
struct tm_client *tm_client_get(struct tm_client *client);
void tm_client_put(struct tm_client *client);

void tm_client_unmap(struct tm_client *client, struct tm_range *range);
int tm_clients_visit(int (*visit)(struct tm_client *client, void *data),
		     void *data);

int __must_check tm_client_charge(struct tm_client *client, u64 bytes);
void tm_client_uncharge(struct tm_client *client, u64 bytes);
void tm_client_keep(struct tm_client *client, s64 bytes);
void tm_client_count(struct tm_client *client, int tensors);
int __must_check tm_client_set_quota(struct tm_client *client, u64 bytes);
void tm_client_usage(struct tm_client *client, struct tm_client_usage *usage);
struct tm_numa tm_client_numa(struct tm_client *client);
void tm_client_set_numa(struct tm_client *client, const struct tm_numa *numa);

u64 tm_client_window_size(void);
u64 tm_client_default_quota(void);
void tm_client_set_default_quota(u64 bytes);
void tm_client_totals(struct tm_client_totals *totals);

#endif
