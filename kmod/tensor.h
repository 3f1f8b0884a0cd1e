/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_TENSOR_H
#define TM_TENSOR_H

#include <linux/list.h>
#include <linux/types.h>
#include <uapi/linux/tensormem.h>

#include "memory.h"
#include "small.h"

struct tm_client;
struct cred;

/**
 * struct tm_tensor - one allocation of a client
 * @region: its pages and their place in the client's window; unused by small ones
 * @object: of a small tensor: where in its client's slabs it is
 * @size: bytes asked for
 * @handle: its name; 0 until it is published
 * @kind: enum tensormem_kind
 * @asked: the pool asked for
 * @pool: enum tensormem_pool, never AUTO
 * @flags: TENSORMEM_NOZERO and the other flags asked for
 * @numa: where it was to come from
 * @reused: it was parked before: it has its place already
 * @exported: it was exported, or nearly; under the client's invalidate_lock
 * @born_ns: when its memory was asked for, if somebody traced at the time
 * @pinned_by: whose RLIMIT_MEMLOCK it counts against, or NULL
 * @doomed: links the tensors that one call frees
 * @client: while it is parked: whose it is
 * @parked: in tm_client::parked
 * @parked_all: on the list of all parked tensors
 */
struct tm_tensor {
	struct tm_region region;
	struct tm_slab_object object;
	u64 size;
	u32 handle;
	u8 kind;
	u8 asked;
	u8 pool;
	u32 flags;
	struct tm_numa numa;
	bool reused;
	bool exported;
	u64 born_ns;
	const struct cred *pinned_by;
	struct list_head doomed;
	struct tm_client *client;
	struct hlist_node parked;
	struct list_head parked_all;
};

static inline bool tm_tensor_small(const struct tm_tensor *tensor)
{
	return tensor->object.slab;
}

/* Bytes of memory that @tensor holds. */
static inline u64 tm_tensor_held(const struct tm_tensor *tensor)
{
	return tm_tensor_small(tensor) ?
	       tm_small_size(&tensor->object) :
	       (u64)tensor->region.memory->nr_pages << PAGE_SHIFT;
}

/* Bytes from the start of the window. */
static inline u64 tm_tensor_offset(const struct tm_tensor *tensor)
{
	return tm_tensor_small(tensor) ? tm_small_offset(&tensor->object) :
					 tensor->region.range.start << PAGE_SHIFT;
}

struct tm_tensor *tm_tensor_create(struct tm_client *client,
				   const struct tensormem_alloc *request);
void tm_tensor_discard(struct tm_client *client, struct tm_tensor *tensor);
int __must_check tm_tensor_publish(struct tm_client *client,
				   struct tm_tensor **tensors, u32 count,
				   struct tensormem_alloc *results,
				   u32 *failed);
int __must_check tm_tensor_free(struct tm_client *client, const u32 *handles,
				u32 count, u32 *failed);
void tm_tensor_free_all(struct tm_client *client);
int __must_check tm_tensor_query(struct tm_client *client,
				 struct tensormem_query *query);

int __must_check tm_tensor_hold(struct tm_client *client, u32 handle,
				struct tm_region *region);

bool tm_tensor_alike(const struct tm_tensor *a, const struct tm_tensor *b);
void tm_tensor_release(struct tm_client *client, struct tm_tensor *tensor);

#endif
