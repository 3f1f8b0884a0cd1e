// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tensors. Allocation has two steps, so that a batch is all or nothing and nobody
 * sees half of one: tensors are created (quota, memory) with no lock held, then
 * published (offset, handle) together under the client's invalidate_lock.
 */
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/xarray.h>

#include "client.h"
#include "dispatch.h"
#include "limits.h"
#include "park.h"
#include "quarantine.h"
#include "supply.h"
#include "tensor.h"
#include "trace.h"
#include "vm.h"

#define TM_TENSOR_FLAGS	(TENSORMEM_NOZERO | TENSORMEM_HUGE | TENSORMEM_PAGED | \
			 TENSORMEM_PINNED)

/* Nanoseconds since its memory was asked for; 0 while nobody traces. */
static u64 tm_tensor_age(const struct tm_tensor *tensor)
{
	return tensor->born_ns ? ktime_get_ns() - tensor->born_ns : 0;
}

static void tm_tensor_trace_alloc(const struct tm_client *client,
				  const struct tm_tensor *tensor)
{
	if (trace_tensormem_alloc_enabled())
		trace_tensormem_alloc(client->id, tensor->handle, tensor->kind,
				      tensor->pool, tensor->size,
				      tm_tensor_held(tensor),
				      tm_tensor_offset(tensor),
				      tm_tensor_age(tensor));
}

static void tm_tensor_trace_free(const struct tm_client *client,
				 const struct tm_tensor *tensor)
{
	if (trace_tensormem_free_enabled())
		trace_tensormem_free(client->id, tensor->handle, tensor->kind,
				     tensor->pool, tensor->size,
				     tm_tensor_held(tensor),
				     tm_tensor_offset(tensor),
				     tm_tensor_age(tensor));
}

/* Pages that several tensors share are neither pinned nor placed for one of them. */
static bool tm_tensor_may_share(const struct tensormem_alloc *request)
{
	return !(request->flags & TENSORMEM_PINNED) &&
	       request->numa == TENSORMEM_NUMA_DEFAULT;
}

static int tm_tensor_check_request(const struct tensormem_alloc *request)
{
	if (!request->size || request->size > tm_client_window_size())
		return -EINVAL;
	if (request->kind < TENSORMEM_KIND_WEIGHTS ||
	    request->kind > TENSORMEM_KIND_PROTOCOL)
		return -EINVAL;
	if (request->pool > TENSORMEM_POOL_DMA || request->pad ||
	    request->flags & ~TM_TENSOR_FLAGS)
		return -EINVAL;
	if (request->pool == TENSORMEM_POOL_SLAB &&
	    (request->size > tm_small_max() || !tm_tensor_may_share(request)))
		return -EINVAL;
	/* A region is where it is. */
	if (request->pool == TENSORMEM_POOL_DMA &&
	    request->numa != TENSORMEM_NUMA_DEFAULT)
		return -EINVAL;
	if (request->flags & TENSORMEM_HUGE && request->flags & TENSORMEM_PAGED)
		return -EINVAL;
	return 0;
}

static int tm_tensor_numa(struct tm_client *client,
			  const struct tensormem_alloc *request,
			  struct tm_numa *numa)
{
	if (request->numa != TENSORMEM_NUMA_DEFAULT)
		return tm_numa_parse(request->numa, request->nodes, numa);
	*numa = tm_client_numa(client);
	return request->nodes ? -EINVAL : 0;
}

static u8 tm_tensor_pool(const struct tensormem_alloc *request,
			 struct tm_dispatch dispatch)
{
	if (request->pool != TENSORMEM_POOL_AUTO)
		return request->pool;
	if (dispatch.pool == TENSORMEM_POOL_SLAB &&
	    !tm_tensor_may_share(request))
		return TENSORMEM_POOL_BUDDY;
	return dispatch.pool;
}

/* What the request describes; it has no memory yet. */
static int tm_tensor_init(struct tm_tensor *tensor, struct tm_client *client,
			  const struct tensormem_alloc *request)
{
	u64 nr_pages = DIV_ROUND_UP_ULL(request->size, PAGE_SIZE);
	struct tm_dispatch dispatch = tm_dispatch(request->kind, request->size);

	*tensor = (struct tm_tensor){
		.region = {
			.range.length = nr_pages,
			.huge = request->pool != TENSORMEM_POOL_DMA &&
				(request->flags & TENSORMEM_HUGE ||
				 (dispatch.huge &&
				  !(request->flags & TENSORMEM_PAGED))),
		},
		.size = request->size,
		.kind = request->kind,
		.asked = request->pool,
		.pool = tm_tensor_pool(request, dispatch),
		.flags = request->flags,
	};
	INIT_LIST_HEAD(&tensor->doomed);
	return tm_tensor_numa(client, request, &tensor->numa);
}

/*
 * Whether it is parked when it is freed. An object just goes back to its slab, and a region is
 * small and somebody else's, too; who was given the memory of one tensor is not to see the next one in it.
 */
static bool tm_tensor_parks(const struct tm_tensor *tensor)
{
	return tensor->flags & TENSORMEM_NOZERO &&
	       tensor->pool != TENSORMEM_POOL_SLAB &&
	       tensor->pool != TENSORMEM_POOL_DMA && !tensor->exported;
}

/**
 * tm_tensor_alike - whether the memory of one tensor would do for another
 * @a: one tensor
 * @b: the other; neither needs to have memory
 *
 * Context: any.
 */
bool tm_tensor_alike(const struct tm_tensor *a, const struct tm_tensor *b)
{
	return a->region.range.length == b->region.range.length &&
	       a->kind == b->kind && a->asked == b->asked &&
	       a->flags == b->flags && a->numa.policy == b->numa.policy &&
	       a->numa.nodes == b->numa.nodes;
}

static int tm_tensor_supply(struct tm_client *client, struct tm_tensor *tensor)
{
	static const enum tm_memory_policy policies[] = {
		[TENSORMEM_POOL_AUTO] = TM_MEMORY_AUTO,
		[TENSORMEM_POOL_CHUNK] = TM_MEMORY_CHUNKS,
		[TENSORMEM_POOL_BUDDY] = TM_MEMORY_RUNS,
		[TENSORMEM_POOL_DMA] = TM_MEMORY_DMA,
	};
	struct tm_memory_request request = {
		.nr_pages = tensor->region.range.length,
		.flags = TM_PAGES_FOR(tensor->kind),
		.numa = tensor->numa,
	};

	if (tensor->pool == TENSORMEM_POOL_SLAB)
		return tm_small_alloc(client, tensor->size,
				      !(tensor->flags & TENSORMEM_NOZERO),
				      &tensor->object);
	request.policy = policies[tensor->asked];
	if (tensor->flags & TENSORMEM_PINNED)
		request.flags |= TM_PAGES_UNMOVABLE;
	tensor->region.memory = tm_supply(client, &request);
	return PTR_ERR_OR_ZERO(tensor->region.memory);
}

/* Pages that count as pinned: all that the tensor is to hold. */
static u64 tm_tensor_pinned_pages(const struct tm_tensor *tensor)
{
	u64 pages = tensor->region.range.length;

	return tensor->asked == TENSORMEM_POOL_CHUNK ||
	       tensor->asked == TENSORMEM_POOL_DMA ?
	       round_up(pages, TM_CHUNK_SIZE >> PAGE_SHIFT) : pages;
}

static int tm_tensor_pin(struct tm_client *client, struct tm_tensor *tensor)
{
	u64 pages = tm_tensor_pinned_pages(tensor);
	int err = tm_limits_pin(pages, &tensor->pinned_by);

	/* What is parked may be what uses up the limit. */
	if (err && tm_park_relieve_client(client))
		err = tm_limits_pin(pages, &tensor->pinned_by);
	return err;
}

static void tm_tensor_unpin(struct tm_tensor *tensor)
{
	tm_limits_unpin(tm_tensor_pinned_pages(tensor), tensor->pinned_by);
}

/**
 * tm_tensor_create - allocate the memory of a tensor
 * @client: who it is for and who is charged
 * @request: size, kind, pool and flags, as user space gave them
 *
 * The tensor has no handle, and no offset unless it is a reused one: publish it, or
 * discard it.
 *
 * Context: may sleep.
 * Return: the tensor or an ERR_PTR: -EINVAL for a malformed request, -EDQUOT,
 * -ENOSPC, -ENOMEM, -EPERM, -EINTR, -ENODEV as in the UAPI header.
 */
struct tm_tensor *tm_tensor_create(struct tm_client *client,
				   const struct tensormem_alloc *request)
{
	bool traced = trace_tensormem_alloc_enabled() ||
		      trace_tensormem_free_enabled();
	u64 born_ns = traced ? ktime_get_ns() : 0;
	struct tm_tensor *tensor, *parked, like;
	int err;

	err = tm_tensor_check_request(request);
	if (!err)
		err = tm_tensor_init(&like, client, request);
	if (err)
		return ERR_PTR(err);
	parked = tm_tensor_parks(&like) ? tm_unpark(client, &like) : NULL;
	if (parked) {
		parked->size = request->size;
		parked->reused = true;
		parked->born_ns = born_ns;
		tm_client_count(client, 1);
		return parked;
	}

	tensor = kmemdup(&like, sizeof(like), TM_GFP);
	if (!tensor)
		return ERR_PTR(-ENOMEM);
	INIT_LIST_HEAD(&tensor->doomed);
	tensor->born_ns = born_ns;
	if (tensor->flags & TENSORMEM_PINNED) {
		err = tm_tensor_pin(client, tensor);
		if (err)
			goto err_free;
	}
	err = tm_tensor_supply(client, tensor);
	if (err)
		goto err_unpin;
	tm_client_count(client, 1);
	return tensor;

err_unpin:
	tm_tensor_unpin(tensor);
err_free:
	kfree(tensor);
	return ERR_PTR(err);
}

static void tm_tensor_destroy(struct tm_tensor *tensor)
{
	tm_tensor_unpin(tensor);
	kfree(tensor);
}

/**
 * tm_tensor_discard - free a tensor that was created and is not published
 * @client: whose it is
 * @tensor: the tensor; consumed
 *
 * Context: may sleep; consumes @tensor.
 */
void tm_tensor_discard(struct tm_client *client, struct tm_tensor *tensor)
{
	tm_client_count(client, -1);
	if (tensor->reused) {
		tm_park(client, tensor);
		return;
	}
	if (tm_tensor_small(tensor)) {
		tm_small_free(client, &tensor->object);
	} else {
		tm_client_uncharge(client, tm_tensor_held(tensor));
		tm_memory_discard(tensor->region.memory);
	}
	tm_tensor_destroy(tensor);
}

static void tm_tensor_assert_locked(struct tm_client *client)
{
	lockdep_assert_held_write(&client->inode->i_mapping->invalidate_lock);
}

static int tm_tensor_place(struct tm_client *client, struct tm_tensor *tensor)
{
	unsigned int chunk_order = tm_pages_geometry().chunk_order;
	struct tm_range *range = &tensor->region.range;
	/* Virtual alignment like the largest extent's: larger mappings can follow. */
	u64 align = 1ull << min_t(unsigned int, ilog2(range->length),
				  chunk_order);

	tm_tensor_assert_locked(client);
	return tm_window_insert(&client->window, range, range->length, align,
				tensor->region.huge &&
				tensor->region.memory->nr_chunks);
}

static int tm_tensor_publish_one(struct tm_client *client,
				 struct tm_tensor *tensor)
{
	bool place = !tensor->reused && !tm_tensor_small(tensor);
	int err = place ? tm_tensor_place(client, tensor) : 0;

	if (err)
		return err;
	err = xa_alloc_cyclic(&client->tensors, &tensor->handle, tensor,
			      xa_limit_31b, &client->next_handle,
			      TM_GFP);
	if (err < 0) {
		tensor->handle = 0;
		if (place)
			tm_window_remove(&client->window,
					 &tensor->region.range);
		return -ENOMEM;
	}
	return 0;
}

/* Undo tm_tensor_publish_one() before anybody was told. */
static void tm_tensor_unpublish(struct tm_client *client,
				struct tm_tensor *tensor)
{
	tm_tensor_assert_locked(client);
	xa_erase(&client->tensors, tensor->handle);
	if (!tensor->reused && !tm_tensor_small(tensor))
		tm_window_remove(&client->window, &tensor->region.range);
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
		results[i].offset = tm_tensor_offset(tensors[i]);
	}
	*failed = i;
	for (u32 done = 0; done < i; done++) {
		if (err)
			tm_tensor_unpublish(client, tensors[done]);
		else
			tm_tensor_trace_alloc(client, tensors[done]);
	}
	filemap_invalidate_unlock(mapping);
	return err;
}

/**
 * tm_tensor_release - free a tensor that has neither handle nor place
 * @client: whose it is
 * @tensor: the tensor; consumed
 *
 * Context: may sleep.
 */
void tm_tensor_release(struct tm_client *client, struct tm_tensor *tensor)
{
	if (tm_tensor_small(tensor))
		tm_small_free(client, &tensor->object);
	else
		tm_quarantine_free(client, &tensor->region);
	tm_tensor_destroy(tensor);
}

/* The handle is gone: what happens to the rest is up to NOZERO. */
static void tm_tensor_retire(struct tm_client *client, struct tm_tensor *tensor)
{
	tm_tensor_trace_free(client, tensor);
	tm_client_count(client, -1);
	if (tm_tensor_parks(tensor))
		tm_park(client, tensor);
	else
		tm_tensor_release(client, tensor);
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
		xa_erase(&client->tensors, tensor->handle);
		if (!tm_tensor_parks(tensor) && !tm_tensor_small(tensor))
			tm_client_unmap(client, &tensor->region.range);
		cond_resched();
	}
	filemap_invalidate_unlock(mapping);

	list_for_each_entry_safe(tensor, next, &doomed, doomed) {
		list_del_init(&tensor->doomed);
		tm_tensor_retire(client, tensor);
	}
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
		tm_tensor_trace_free(client, tensor);
		tm_client_count(client, -1);
		tm_tensor_release(client, tensor);
	}
}

static void tm_tensor_describe(const struct tm_tensor *tensor,
			       struct tensormem_query *query)
{
	const struct tm_region *region = &tensor->region;

	*query = (struct tensormem_query){
		.handle = tensor->handle,
		.kind = tensor->kind,
		.pool = tensor->pool,
		.size = tensor->size,
		.length = tm_tensor_held(tensor),
		.offset = tm_tensor_offset(tensor),
		.held = tm_tensor_held(tensor),
		.mapping = TENSORMEM_MAPPING_PAGES,
		.alloc_flags = tensor->flags,
	};
	if (tm_tensor_small(tensor))
		return;
	query->length = region->range.length << PAGE_SHIFT;
	query->nr_chunks = region->memory->nr_chunks;
	query->nr_runs = region->memory->nr_extents -
			 region->memory->nr_chunks;
	query->mapping = tm_vm_mapping(region);
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
		tm_tensor_describe(tensor, query);
	filemap_invalidate_unlock_shared(mapping);
	return tensor ? 0 : -ENOENT;
}

/* Behind what a reused tensor asked for may be what its client left in an earlier one: nothing for others. */
static void tm_tensor_clear_tail(const struct tm_tensor *tensor)
{
	u32 last = tensor->region.range.length - 1;
	u32 used = offset_in_page(tensor->size);
	const struct tm_extent *extent;

	if (!tensor->reused || !used)
		return;
	extent = tm_memory_find(tensor->region.memory, last);
	memzero_page(tm_pages_page(&extent->run) + (last - extent->first),
		     used, PAGE_SIZE - used);
}

static int tm_tensor_hold_one(struct tm_tensor *tensor,
			      struct tm_region *region)
{
	struct tm_memory *memory;

	if (!tensor)
		return -ENOENT;
	if (tm_tensor_small(tensor))
		return -EOPNOTSUPP;
	memory = tm_memory_hold(tensor->region.memory);
	if (IS_ERR(memory))
		return PTR_ERR(memory);
	*region = (struct tm_region){
		.range.length = tensor->region.range.length,
		.memory = memory,
		.huge = tensor->region.huge,
	};
	tensor->exported = true;
	tm_tensor_clear_tail(tensor);
	return 0;
}

/**
 * tm_tensor_hold - hold the memory of a tensor for somebody who may outlive it
 * @client: whose it is
 * @handle: its name
 * @region: its pages, at the beginning of a window of their own; to be let go by
 *          tm_memory_let_go()
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: 0, -ENOENT, -EOPNOTSUPP for one that shares its pages with others, -ENOMEM.
 */
int tm_tensor_hold(struct tm_client *client, u32 handle,
		   struct tm_region *region)
{
	struct address_space *mapping = client->inode->i_mapping;
	int err;

	filemap_invalidate_lock(mapping);
	err = tm_tensor_hold_one(xa_load(&client->tensors, handle), region);
	filemap_invalidate_unlock(mapping);
	return err;
}
