// SPDX-License-Identifier: GPL-2.0-only
/*
 * Clients: one per open of the device. What a client holds is bounded by its
 * quota and dies with it.
 */
#include <linux/atomic.h>
#include <linux/capability.h>
#include <linux/err.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/mount.h>
#include <linux/mutex.h>
#include <linux/pseudo_fs.h>
#include <linux/slab.h>

#include "client.h"
#include "park.h"
#include "small.h"
#include "tensor.h"

#define TM_FS_MAGIC		0x544d454d	/* "TMEM" */

/*
 * Offsets are cheap and memory is not: with a window of four times the RAM it is
 * the memory that runs out first, unless offsets are fragmented on purpose.
 */
#define TM_WINDOW_PER_RAM	4

/* Page indexes within a tensor are 32 bits wide. */
#define TM_WINDOW_MAX_PAGES	BIT(31)

static struct vfsmount *tm_mount;
static u64 tm_window_pages;
static u64 tm_default_quota = U64_MAX;
/* Every open client; outside of all locks of theirs. */
static DEFINE_MUTEX(tm_clients_mutex);
static LIST_HEAD(tm_clients);
static atomic_t tm_client_ids = ATOMIC_INIT(0);
static atomic64_t tm_nr_clients = ATOMIC64_INIT(0);
static atomic64_t tm_nr_tensors = ATOMIC64_INIT(0);
static atomic64_t tm_nr_bytes = ATOMIC64_INIT(0);
static atomic64_t tm_nr_kept = ATOMIC64_INIT(0);

static int tm_fs_init_context(struct fs_context *fc)
{
	return init_pseudo(fc, TM_FS_MAGIC) ? 0 : -ENOMEM;
}

/*
 * No .owner: the mount lives as long as the module and would pin it. Every inode
 * is gone before, because each open file holds the module.
 */
static struct file_system_type tm_fs = {
	.name = "tensormem",
	.init_fs_context = tm_fs_init_context,
	.kill_sb = kill_anon_super,
};

int __init tm_clients_init(void)
{
	tm_window_pages = min_t(u64, roundup_pow_of_two(totalram_pages()) *
				     TM_WINDOW_PER_RAM, TM_WINDOW_MAX_PAGES);
	tm_mount = kern_mount(&tm_fs);
	return PTR_ERR_OR_ZERO(tm_mount);
}

void tm_clients_exit(void)
{
	kern_unmount(tm_mount);
}

/**
 * tm_client_inode - make an inode whose i_mapping can be somebody's window
 *
 * Context: may sleep. Return: the inode, to be let go by iput(), or an ERR_PTR: -ENOMEM.
 */
struct inode *tm_client_inode(void)
{
	return alloc_anon_inode(tm_mount->mnt_sb);
}

/**
 * tm_client_create - make a client that holds nothing
 *
 * Context: may sleep. Return: the client or an ERR_PTR: -ENOMEM.
 */
struct tm_client *tm_client_create(void)
{
	struct tm_client *client = kzalloc(sizeof(*client), TM_GFP);
	int err;

	if (!client)
		return ERR_PTR(-ENOMEM);
	client->inode = tm_client_inode();
	if (IS_ERR(client->inode)) {
		err = PTR_ERR(client->inode);
		kfree(client);
		return ERR_PTR(err);
	}
	kref_init(&client->ref);
	hash_init(client->parked);
	client->numa = tm_numa_local();
	xa_init_flags(&client->tensors, XA_FLAGS_ALLOC1 | XA_FLAGS_ACCOUNT);
	tm_window_init(&client->window, tm_window_pages);
	spin_lock_init(&client->lock);
	client->quota = tm_client_default_quota();
	tm_bandwidth_init(client);
	client->id = atomic_inc_return(&tm_client_ids);
	atomic64_inc(&tm_nr_clients);
	mutex_lock(&tm_clients_mutex);
	list_add_tail(&client->all, &tm_clients);
	mutex_unlock(&tm_clients_mutex);
	return client;
}

static void tm_client_release(struct kref *ref)
{
	struct tm_client *client = container_of(ref, struct tm_client, ref);

	xa_destroy(&client->tensors);
	tm_small_destroy(client);
	iput(client->inode);
	kfree(client);
}

struct tm_client *tm_client_get(struct tm_client *client)
{
	kref_get(&client->ref);
	return client;
}

/* Context: may sleep when it was the last reference. */
void tm_client_put(struct tm_client *client)
{
	kref_put(&client->ref, tm_client_release);
}

/**
 * tm_client_destroy - free every tensor a client still has, and let go of it
 * @client: the client; consumed
 *
 * What others still hold of its memory keeps it in existence, and charged.
 *
 * Context: may sleep. The last file and mapping are gone, so nobody looks.
 */
void tm_client_destroy(struct tm_client *client)
{
	mutex_lock(&tm_clients_mutex);
	list_del(&client->all);
	mutex_unlock(&tm_clients_mutex);
	tm_park_close(client);
	tm_tensor_free_all(client);
	atomic64_dec(&tm_nr_clients);
	tm_client_put(client);
}

/**
 * tm_client_unmap - take a range out of the window and empty its mappings
 * @client: whose window; its invalidate_lock is held for writing
 * @range: the range
 *
 * Nothing is done for a client that is closing: its window is nobody's any more.
 *
 * Context: may sleep.
 */
void tm_client_unmap(struct tm_client *client, struct tm_range *range)
{
	struct address_space *mapping = client->inode->i_mapping;

	lockdep_assert_held_write(&mapping->invalidate_lock);
	if (client->closing)
		return;
	tm_window_remove(&client->window, range);
	unmap_mapping_pages(mapping, range->start, range->length, true);
}

/**
 * tm_clients_visit - call a function for every open client
 * @visit: the function; anything but 0 ends the visit
 * @data: for @visit
 *
 * Clients are neither opened nor closed meanwhile.
 *
 * Context: may sleep; under no lock of a client's.
 * Return: 0 or what @visit returned, -EINTR on a fatal signal.
 */
int tm_clients_visit(int (*visit)(struct tm_client *client, void *data),
		     void *data)
{
	struct tm_client *client;
	int err;

	err = mutex_lock_killable(&tm_clients_mutex);
	if (err)
		return err;
	list_for_each_entry(client, &tm_clients, all) {
		err = visit(client, data);
		if (err)
			break;
	}
	mutex_unlock(&tm_clients_mutex);
	return err;
}

/**
 * tm_client_charge - count @bytes against the quota
 * @client: who is charged
 * @bytes: what is about to be allocated for it
 *
 * Context: never sleeps. Return: 0 or -EDQUOT.
 */
int tm_client_charge(struct tm_client *client, u64 bytes)
{
	int err = 0;

	spin_lock(&client->lock);
	if (bytes > client->quota || client->used > client->quota - bytes)
		err = -EDQUOT;
	else
		client->used += bytes;
	spin_unlock(&client->lock);
	if (!err)
		atomic64_add(bytes, &tm_nr_bytes);
	return err;
}

/* Undo tm_client_charge(). Context: never sleeps. */
void tm_client_uncharge(struct tm_client *client, u64 bytes)
{
	spin_lock(&client->lock);
	client->used -= bytes;
	spin_unlock(&client->lock);
	atomic64_sub(bytes, &tm_nr_bytes);
}

/* Charged @bytes have no tensor any more; negative: have one, or go. */
void tm_client_keep(struct tm_client *client, s64 bytes)
{
	spin_lock(&client->lock);
	client->kept += bytes;
	spin_unlock(&client->lock);
	atomic64_add(bytes, &tm_nr_kept);
}

/* Count @tensors more tensors, or fewer. Context: never sleeps. */
void tm_client_count(struct tm_client *client, int tensors)
{
	spin_lock(&client->lock);
	client->nr_tensors += tensors;
	spin_unlock(&client->lock);
	atomic64_add(tensors, &tm_nr_tensors);
}

static int tm_client_try_quota(struct tm_client *client, u64 bytes)
{
	bool any = bytes <= tm_client_default_quota() ||
		   capable(CAP_SYS_RESOURCE);
	int err = 0;

	spin_lock(&client->lock);
	if (!any && bytes > client->quota)
		err = -EPERM;
	else if (bytes < client->used)
		err = -EBUSY;
	else
		client->quota = bytes;
	spin_unlock(&client->lock);
	return err;
}

/**
 * tm_client_set_quota - bound what the client may hold
 * @client: whose quota
 * @bytes: the new quota
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: 0, -EBUSY below what it holds, -EPERM for a raise above the default
 * quota without CAP_SYS_RESOURCE.
 */
int tm_client_set_quota(struct tm_client *client, u64 bytes)
{
	int err = tm_client_try_quota(client, bytes);

	if (err == -EBUSY && tm_park_relieve_client(client))
		err = tm_client_try_quota(client, bytes);
	return err;
}

void tm_client_usage(struct tm_client *client, struct tm_client_usage *usage)
{
	spin_lock(&client->lock);
	*usage = (struct tm_client_usage){
		.quota = client->quota,
		.used = client->used,
		.kept = client->kept,
		.nr_tensors = client->nr_tensors,
	};
	spin_unlock(&client->lock);
}

/* Where the client's memory comes from unless a call says. Context: any. */
struct tm_numa tm_client_numa(struct tm_client *client)
{
	struct tm_numa numa;

	spin_lock(&client->lock);
	numa = client->numa;
	spin_unlock(&client->lock);
	return numa;
}

void tm_client_set_numa(struct tm_client *client, const struct tm_numa *numa)
{
	spin_lock(&client->lock);
	client->numa = *numa;
	spin_unlock(&client->lock);
}

/* Bytes in every client's window. */
u64 tm_client_window_size(void)
{
	return tm_window_pages << PAGE_SHIFT;
}

u64 tm_client_default_quota(void)
{
	return READ_ONCE(tm_default_quota);
}

/* Takes effect for clients made from now on. */
void tm_client_set_default_quota(u64 bytes)
{
	WRITE_ONCE(tm_default_quota, bytes);
}

/* What all clients hold together; each value is exact, together they are not a set. */
void tm_client_totals(struct tm_client_totals *totals)
{
	totals->clients = atomic64_read(&tm_nr_clients);
	totals->tensors = atomic64_read(&tm_nr_tensors);
	totals->bytes = atomic64_read(&tm_nr_bytes);
	totals->kept = atomic64_read(&tm_nr_kept);
}
