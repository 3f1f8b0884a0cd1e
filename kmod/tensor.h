/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_TENSOR_H
#define TM_TENSOR_H

#include <linux/container_of.h>
#include <linux/list.h>
#include <linux/types.h>
#include <uapi/linux/tensormem.h>

#include "window.h"

struct tm_client;
struct tm_memory;

/**
 * struct tm_tensor - one allocation of a client
 * @range: its place in the client's window
 * @memory: its pages
 * @size: bytes asked for
 * @handle: its name; 0 until it is published
 * @kind: enum tensormem_kind
 * @pool: enum tensormem_pool, never AUTO
 * @born_ns: when its memory was asked for, if somebody traced at the time
 * @doomed: links the tensors that one call frees
 */
struct tm_tensor {
	struct tm_range range;
	struct tm_memory *memory;
	u64 size;
	u32 handle;
	u8 kind;
	u8 pool;
	u64 born_ns;
	struct list_head doomed;
};

static inline struct tm_tensor *tm_range_tensor(struct tm_range *range)
{
	return container_of(range, struct tm_tensor, range);
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

#endif
