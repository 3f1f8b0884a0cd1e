// SPDX-License-Identifier: GPL-2.0-only
/*
 * Parked tensors: freed with TENSORMEM_NOZERO, without a handle, but with their
 * memory, their place in the window and their mappings, for the client's next
 * allocation of the same kind and length. A loop that frees and allocates its
 * activations so neither zeroes, nor unmaps, nor faults.
 *
 * A parked tensor is in its client's hash, where it is found again, and on the list
 * of all, oldest first, from which whoever needs memory takes it; both under
 * tm_park_lock, which nests inside everything. Taken off, it belongs to whoever took
 * it. The shrinker, which runs under locks we do not know, only tries the client's
 * invalidate_lock, and puts the tensor back when it cannot have it.
 */
#include <linux/fs.h>
#include <linux/hashtable.h>
#include <linux/list.h>
#include <linux/mm.h>

#include "client.h"
#include "compat.h"
#include "park.h"
#include "tensor.h"

static DEFINE_SPINLOCK(tm_park_lock);
static LIST_HEAD(tm_park_list);
static u64 tm_park_bytes;
static u32 tm_park_nr;
static struct tm_shrinker *tm_park_shrinker;

static void tm_park_add(struct tm_client *client, struct tm_tensor *tensor)
{
	lockdep_assert_held(&tm_park_lock);
	hash_add(client->parked, &tensor->parked, tensor->region.range.length);
	list_add_tail(&tensor->parked_all, &tm_park_list);
	tm_park_bytes += tm_tensor_held(tensor);
	tm_park_nr++;
}

static void tm_park_remove(struct tm_tensor *tensor)
{
	lockdep_assert_held(&tm_park_lock);
	hash_del(&tensor->parked);
	list_del(&tensor->parked_all);
	tm_park_bytes -= tm_tensor_held(tensor);
	tm_park_nr--;
}

/**
 * tm_park - keep a tensor that was freed, for reuse
 * @client: whose it is
 * @tensor: the tensor, without a handle; no longer the caller's
 *
 * Context: never sleeps.
 */
void tm_park(struct tm_client *client, struct tm_tensor *tensor)
{
	tensor->client = client;
	tm_client_keep(client, tm_tensor_held(tensor));
	spin_lock(&tm_park_lock);
	tm_park_add(client, tensor);
	spin_unlock(&tm_park_lock);
}

/**
 * tm_unpark - find a parked tensor that will do
 * @client: whose
 * @like: what it has to be like: see tm_tensor_alike()
 *
 * Context: never sleeps.
 * Return: the tensor, which is the caller's now, or NULL.
 */
struct tm_tensor *tm_unpark(struct tm_client *client,
			    const struct tm_tensor *like)
{
	struct tm_tensor *tensor, *found = NULL;

	spin_lock(&tm_park_lock);
	hash_for_each_possible(client->parked, tensor, parked,
			       like->region.range.length) {
		if (!tm_tensor_alike(tensor, like))
			continue;
		tm_park_remove(tensor);
		found = tensor;
		break;
	}
	spin_unlock(&tm_park_lock);
	if (found)
		tm_client_keep(client, -(s64)tm_tensor_held(found));
	return found;
}

static void tm_park_destroy(struct tm_client *client, struct tm_tensor *tensor)
{
	tm_client_keep(client, -(s64)tm_tensor_held(tensor));
	tm_tensor_release(client, tensor);
}

/* Empty the mappings of @tensor; without @wait only if the lock can be had at once. */
static bool tm_park_unmap(struct tm_client *client, struct tm_tensor *tensor,
			  bool wait)
{
	struct address_space *mapping = client->inode->i_mapping;

	if (wait)
		filemap_invalidate_lock(mapping);
	else if (!down_write_trylock(&mapping->invalidate_lock))
		return false;
	tm_client_unmap(client, &tensor->region.range);
	filemap_invalidate_unlock(mapping);
	return true;
}

/*
 * Give up the oldest parked tensor. Return: its bytes, 0 when there is none, or
 * when its client is busy: then it is the youngest now.
 */
static u64 tm_park_relieve_oldest(bool wait)
{
	struct tm_tensor *tensor;
	struct tm_client *client;
	u64 bytes;

	spin_lock(&tm_park_lock);
	tensor = list_first_entry_or_null(&tm_park_list, struct tm_tensor,
					  parked_all);
	if (!tensor) {
		spin_unlock(&tm_park_lock);
		return 0;
	}
	tm_park_remove(tensor);
	client = tm_client_get(tensor->client);
	spin_unlock(&tm_park_lock);

	bytes = tm_tensor_held(tensor);
	if (!tm_park_unmap(client, tensor, wait)) {
		spin_lock(&tm_park_lock);
		/* A closing client has no mappings any more. */
		if (!client->closing) {
			tm_park_add(client, tensor);
			bytes = 0;
		}
		spin_unlock(&tm_park_lock);
	}
	if (bytes)
		tm_park_destroy(client, tensor);
	tm_client_put(client);
	return bytes;
}

/**
 * tm_park_relieve - give up parked tensors of all clients, oldest first
 * @bytes: how much memory to free; more, because tensors are not divided
 * @wait: also for clients that are busy; not from reclaim
 *
 * Context: may sleep; without @wait under any lock that reclaim may run under.
 * Return: bytes freed; less than asked for when there are no more.
 */
u64 tm_park_relieve(u64 bytes, bool wait)
{
	u32 tries = READ_ONCE(tm_park_nr);
	u64 done = 0;

	/* Once round: those of a busy client have become the youngest. */
	while (tries-- && done < bytes)
		done += tm_park_relieve_oldest(wait);
	return done;
}

/* Bytes that are parked. Context: any. */
u64 tm_park_held(void)
{
	return READ_ONCE(tm_park_bytes);
}

/* Take all that @client has parked. */
static void tm_park_take_all(struct tm_client *client, struct list_head *list)
{
	struct tm_tensor *tensor;
	struct hlist_node *next;
	unsigned int i;

	lockdep_assert_held(&tm_park_lock);
	hash_for_each_safe(client->parked, i, next, tensor, parked) {
		tm_park_remove(tensor);
		list_add(&tensor->doomed, list);
	}
}

/**
 * tm_park_relieve_client - give up all that one client has parked
 * @client: whose
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: whether there was anything.
 */
bool tm_park_relieve_client(struct tm_client *client)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_tensor *tensor, *next;
	LIST_HEAD(doomed);

	spin_lock(&tm_park_lock);
	tm_park_take_all(client, &doomed);
	spin_unlock(&tm_park_lock);
	if (list_empty(&doomed))
		return false;
	filemap_invalidate_lock(mapping);
	list_for_each_entry(tensor, &doomed, doomed)
		tm_client_unmap(client, &tensor->region.range);
	filemap_invalidate_unlock(mapping);
	list_for_each_entry_safe(tensor, next, &doomed, doomed)
		tm_park_destroy(client, tensor);
	return true;
}

/**
 * tm_park_close - give up what a dying client has parked
 * @client: whose; no file and no mapping of it is left
 *
 * Context: may sleep; takes the client's invalidate_lock.
 */
void tm_park_close(struct tm_client *client)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_tensor *tensor, *next;
	LIST_HEAD(doomed);

	/* Somebody may be taking a parked tensor out of the window. */
	filemap_invalidate_lock(mapping);
	spin_lock(&tm_park_lock);
	client->closing = true;
	tm_park_take_all(client, &doomed);
	spin_unlock(&tm_park_lock);
	filemap_invalidate_unlock(mapping);
	list_for_each_entry_safe(tensor, next, &doomed, doomed)
		tm_park_destroy(client, tensor);
}

static unsigned long tm_park_count(struct shrinker *shrinker,
				   struct shrink_control *sc)
{
	unsigned long pages = tm_park_held() >> PAGE_SHIFT;

	return pages ?: SHRINK_EMPTY;
}

static unsigned long tm_park_scan(struct shrinker *shrinker,
				  struct shrink_control *sc)
{
	u64 done = tm_park_relieve((u64)sc->nr_to_scan << PAGE_SHIFT, false);

	sc->nr_scanned = done >> PAGE_SHIFT;
	return done ? done >> PAGE_SHIFT : SHRINK_STOP;
}

int __init tm_park_init(void)
{
	tm_park_shrinker = tm_shrinker_register("tensormem-parked", 0,
						tm_park_count, tm_park_scan);
	return tm_park_shrinker ? 0 : -ENOMEM;
}

void tm_park_exit(void)
{
	tm_shrinker_unregister(tm_park_shrinker);
}
