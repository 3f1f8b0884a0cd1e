// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tensors. Allocation has two steps, so that a batch is all or nothing and nobody
 * sees half of one: tensors are created (quota, memory) with no lock held, then
 * published (offset, handle) together under the client's invalidate_lock.
 */
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/xarray.h>

#include "client.h"
#include "memory.h"
#include "pages.h"
#include "tensor.h"
#include "trace.h"

static u64 tm_tensor_held(const struct tm_tensor *tensor)
{
	return (u64)tensor->memory->nr_pages << PAGE_SHIFT;
}

/* Nanoseconds since its memory was asked for; 0 while nobody traces. */
static u64 tm_tensor_age(const struct tm_tensor *tensor)
{
	return tensor->born_ns ? ktime_get_ns() - tensor->born_ns : 0;
}

/*
 * Which pool serves a tensor: whole chunks from one chunk up, runs below. Kinds
 * differ in their pools once the slab, KV and RT pools exist.
 */
static u8 tm_tensor_dispatch(const struct tensormem_alloc *request, u64 held)
{
	if (request->pool != TENSORMEM_POOL_AUTO)
		return request->pool;
	return held >= TM_CHUNK_SIZE ? TENSORMEM_POOL_CHUNK :
				       TENSORMEM_POOL_BUDDY;
}

static int tm_tensor_check_request(const struct tensormem_alloc *request)
{
	if (!request->size || request->size > tm_client_window_size())
		return -EINVAL;
	if (request->kind < TENSORMEM_KIND_WEIGHTS ||
	    request->kind > TENSORMEM_KIND_PROTOCOL)
		return -EINVAL;
	if (request->pool > TENSORMEM_POOL_BUDDY || request->flags)
		return -EINVAL;
	return 0;
}

static enum tm_memory_policy
tm_tensor_policy(const struct tensormem_alloc *request)
{
	switch (request->pool) {
	case TENSORMEM_POOL_CHUNK:
		return TM_MEMORY_CHUNKS;
	case TENSORMEM_POOL_BUDDY:
		return TM_MEMORY_RUNS;
	default:
		return TM_MEMORY_AUTO;
	}
}

/**
 * tm_tensor_create - allocate the memory of a tensor
 * @client: who it is for and who is charged
 * @request: size, kind, pool and flags, as user space gave them
 *
 * The tensor has no handle and no offset: publish it, or discard it.
 *
 * Context: may sleep.
 * Return: the tensor or an ERR_PTR: -EINVAL for a malformed request, -EDQUOT,
 * -ENOSPC, -ENOMEM, -EINTR as in the UAPI header.
 */
struct tm_tensor *tm_tensor_create(struct tm_client *client,
				   const struct tensormem_alloc *request)
{
	struct tm_geometry g = tm_pages_geometry();
	struct tm_tensor *tensor;
	u64 held, nr_pages;
	int err;

	err = tm_tensor_check_request(request);
	if (err)
		return ERR_PTR(err);
	nr_pages = DIV_ROUND_UP_ULL(request->size, PAGE_SIZE);
	if (request->pool == TENSORMEM_POOL_CHUNK)
		nr_pages = round_up(nr_pages, (u64)tm_chunk_pages(g));
	held = nr_pages << PAGE_SHIFT;

	tensor = kzalloc(sizeof(*tensor), GFP_KERNEL_ACCOUNT);
	if (!tensor)
		return ERR_PTR(-ENOMEM);
	if (trace_tensormem_alloc_enabled() || trace_tensormem_free_enabled())
		tensor->born_ns = ktime_get_ns();
	/* Charged before it is taken: a quota is never exceeded, not even briefly. */
	err = tm_client_charge(client, held);
	if (err)
		goto err_free;
	tensor->memory = tm_memory_alloc(nr_pages, tm_tensor_policy(request));
	if (IS_ERR(tensor->memory)) {
		err = PTR_ERR(tensor->memory);
		goto err_uncharge;
	}
	tensor->size = request->size;
	tensor->kind = request->kind;
	tensor->pool = tm_tensor_dispatch(request, held);
	INIT_LIST_HEAD(&tensor->doomed);
	return tensor;

err_uncharge:
	tm_client_uncharge(client, held);
err_free:
	kfree(tensor);
	return ERR_PTR(err);
}

/**
 * tm_tensor_discard - free a tensor that was created and never published
 * @client: whose it is
 * @tensor: the tensor; consumed
 *
 * Context: may sleep; consumes @tensor.
 */
void tm_tensor_discard(struct tm_client *client, struct tm_tensor *tensor)
{
	tm_client_uncharge(client, tm_tensor_held(tensor));
	tm_memory_discard(tensor->memory);
	kfree(tensor);
}

static void tm_tensor_assert_locked(struct tm_client *client)
{
	lockdep_assert_held_write(&client->inode->i_mapping->invalidate_lock);
}

static int tm_tensor_publish_one(struct tm_client *client,
				 struct tm_tensor *tensor)
{
	struct tm_geometry g = tm_pages_geometry();
	u64 pages = DIV_ROUND_UP_ULL(tensor->size, PAGE_SIZE);
	/* Virtual alignment like the largest extent's: larger mappings can follow. */
	u64 align = 1ull << min_t(unsigned int, ilog2(pages), g.chunk_order);
	int err;

	tm_tensor_assert_locked(client);
	err = tm_window_insert(&client->window, &tensor->range, pages, align);
	if (err)
		return err;
	err = xa_alloc_cyclic(&client->tensors, &tensor->handle, tensor,
			      xa_limit_31b, &client->next_handle,
			      GFP_KERNEL_ACCOUNT);
	if (err < 0) {
		tm_window_remove(&client->window, &tensor->range);
		tensor->handle = 0;
		return -ENOMEM;
	}
	return 0;
}

static void tm_tensor_unpublish(struct tm_client *client,
				struct tm_tensor *tensor)
{
	tm_tensor_assert_locked(client);
	xa_erase(&client->tensors, tensor->handle);
	tm_window_remove(&client->window, &tensor->range);
}

/**
 * tm_tensor_publish - give tensors their handles and offsets, all or none
 * @client: whose they are
 * @tensors: what tm_tensor_create() made, @count long
 * @count: how many
 * @results: where handle and offset of each are written
 * @failed: index of the tensor that had no room
 *
 * On failure the tensors are as they were, to be discarded by the caller.
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: 0, -ENOBUFS when the window has no gap, -ENOMEM.
 */
int tm_tensor_publish(struct tm_client *client, struct tm_tensor **tensors,
		      u32 count, struct tensormem_alloc *results, u32 *failed)
{
	struct address_space *mapping = client->inode->i_mapping;
	int err = 0;
	u32 i;

	filemap_invalidate_lock(mapping);
	for (i = 0; i < count; i++) {
		err = tm_tensor_publish_one(client, tensors[i]);
		if (err)
			break;
		results[i].handle = tensors[i]->handle;
		results[i].offset = tensors[i]->range.start << PAGE_SHIFT;
	}
	*failed = i;
	for (u32 done = 0; done < i; done++) {
		if (err)
			tm_tensor_unpublish(client, tensors[done]);
		else
			trace_tensormem_alloc(client->id, tensors[done],
					      tm_tensor_age(tensors[done]));
	}
	filemap_invalidate_unlock(mapping);
	return err;
}

static void tm_tensor_destroy(struct tm_client *client,
			      struct tm_tensor *tensor)
{
	trace_tensormem_free(client->id, tensor, tm_tensor_age(tensor));
	tm_client_uncharge(client, tm_tensor_held(tensor));
	tm_memory_free(tensor->memory);
	kfree(tensor);
}

/**
 * tm_tensor_free - free tensors by handle, all or none
 * @client: whose they are
 * @handles: their names, @count long
 * @count: how many
 * @failed: index of the handle that names none, or that came twice
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: 0 or -ENOENT.
 */
int tm_tensor_free(struct tm_client *client, const u32 *handles, u32 count,
		   u32 *failed)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_tensor *tensor, *next;
	LIST_HEAD(doomed);
	u32 i;

	filemap_invalidate_lock(mapping);
	for (i = 0; i < count; i++) {
		tensor = xa_load(&client->tensors, handles[i]);
		if (!tensor || !list_empty(&tensor->doomed))
			break;
		list_add_tail(&tensor->doomed, &doomed);
	}
	*failed = i;
	if (i < count) {
		list_for_each_entry_safe(tensor, next, &doomed, doomed)
			list_del_init(&tensor->doomed);
		filemap_invalidate_unlock(mapping);
		return -ENOENT;
	}
	list_for_each_entry(tensor, &doomed, doomed) {
		tm_tensor_unpublish(client, tensor);
		unmap_mapping_range(mapping,
				    (loff_t)tensor->range.start << PAGE_SHIFT,
				    (loff_t)tensor->range.length << PAGE_SHIFT,
				    1);
		cond_resched();
	}
	filemap_invalidate_unlock(mapping);

	list_for_each_entry_safe(tensor, next, &doomed, doomed)
		tm_tensor_destroy(client, tensor);
	return 0;
}

/**
 * tm_tensor_free_all - free what a dying client still has
 * @client: the dying client
 *
 * Context: may sleep. No file and no mapping of the client is left.
 */
void tm_tensor_free_all(struct tm_client *client)
{
	struct tm_tensor *tensor;
	unsigned long handle;

	xa_for_each(&client->tensors, handle, tensor) {
		xa_erase(&client->tensors, handle);
		tm_tensor_destroy(client, tensor);
	}
}

/**
 * tm_tensor_query - describe the tensor that @query->handle names
 * @client: whose it is
 * @query: in: handle and flags; out: all of it
 *
 * Context: may sleep; takes the client's invalidate_lock shared.
 * Return: 0, -EINVAL for an unknown flag, -ENOENT.
 */
int tm_tensor_query(struct tm_client *client, struct tensormem_query *query)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_tensor *tensor;

	if (query->flags)
		return -EINVAL;
	filemap_invalidate_lock_shared(mapping);
	tensor = xa_load(&client->tensors, query->handle);
	if (tensor)
		*query = (struct tensormem_query){
			.handle = tensor->handle,
			.kind = tensor->kind,
			.pool = tensor->pool,
			.size = tensor->size,
			.length = tensor->range.length << PAGE_SHIFT,
			.offset = tensor->range.start << PAGE_SHIFT,
			.held = tm_tensor_held(tensor),
			.nr_chunks = tensor->memory->nr_chunks,
			.nr_runs = tensor->memory->nr_extents -
				   tensor->memory->nr_chunks,
		};
	filemap_invalidate_unlock_shared(mapping);
	return tensor ? 0 : -ENOENT;
}
