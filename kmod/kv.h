/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_H
#define TM_KV_H

#include <linux/bitmap.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/rwsem.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "core/cache.h"

struct page;
struct tensormem_kv_create;
struct tensormem_kv_group;
struct tm_client;
struct tm_memory;

/* Full blocks that may stay writable: sealing one at a time would cost more. */
#define TM_KV_SEAL_BLOCKS	32

/* Events handed out by read(2) at a time. */
#define TM_KV_UNREAD	16

/**
 * struct tm_kv_backing - a chunk of a cache
 * @memory: it, or NULL
 * @page: its first page
 * @next: the next entry without a chunk
 * @dirty: pages that a block had, and that are not zero for the next one
 */
struct tm_kv_backing {
	struct tm_memory *memory;
	struct page *page;
	u32 next;
	DECLARE_BITMAP(dirty, 1 << TM_MAX_CHUNK_ORDER);
};

/**
 * struct tm_kv_layout - where the planes of a group lie in a sequence's place
 * @offset: pages before its first plane
 * @stride: pages from one plane to the next
 * @element: bytes of one number
 */
struct tm_kv_layout {
	u64 offset;
	u64 stride;
	u32 element;
};

/**
 * struct tm_kv - a KV cache: what one descriptor stands for
 * @lock: guards everything below but what says otherwise; faults map under it for
 *        reading, so that who holds it for writing knows what is mapped
 * @ref: one of the descriptor, one of who relieves the system of what it holds
 * @all: on the list of all caches
 * @cache: sequences and their blocks
 * @client: who pays
 * @inode: an anonymous inode whose i_mapping is the window
 * @backing: chunks by the number the core knows them by, @cache.pool.nr_slots long
 * @free_backing: first entry without one
 * @layout: by group
 * @place_pages: pages of the window for each sequence
 * @used: when a sequence was last used (jiffies), by place; written without the lock
 * @mapped_mm: @mapped_at: the last mapping of the whole window: a hint for
 *             tm_kv_vm_map_ahead(), never dereferenced; under no lock
 * @tried: as @used was when its blocks were packed last, by place
 * @pack_target: used pages that packing goes on above
 * @pack_work: packs what is idle (kv_pack.c)
 * @compact_work: moves pages together (kv_compact.c)
 * @id: names the cache in traces
 * @readers: one read(2) at a time
 * @unread: events taken out of the ring and not delivered; under @readers
 * @nr_unread: how many
 * @events: woken when there are some
 */
struct tm_kv {
	struct rw_semaphore lock;
	refcount_t ref;
	struct list_head all;
	struct tm_cache cache;
	struct tm_client *client;
	struct inode *inode;
	struct tm_kv_backing *backing;
	u32 free_backing;
	struct tm_kv_layout layout[TM_KV_GROUPS];
	u64 place_pages;
	unsigned long *used;
	struct mm_struct *mapped_mm;
	unsigned long mapped_at;
	unsigned long *tried;
	u64 pack_target;
	struct delayed_work pack_work;
	struct delayed_work compact_work;
	u32 id;
	struct mutex readers;
	struct tm_cache_event unread[TM_KV_UNREAD];
	u32 nr_unread;
	wait_queue_head_t events;
};

struct tm_kv_totals {
	u64 caches;
	u64 held;
};

struct tm_kv *tm_kv_create(struct tm_client *client,
			   const struct tensormem_kv_create *request,
			   const struct tensormem_kv_group *groups);
void tm_kv_put(struct tm_kv *kv);

void tm_kvs_visit(bool (*visit)(struct tm_kv *kv, void *data), void *data);
void tm_kvs_try(bool (*visit)(struct tm_kv *kv, void *data), void *data);

u64 tm_kv_window_pages(const struct tm_kv *kv);
void tm_kv_totals(struct tm_kv_totals *totals);
void tm_kv_touch(struct tm_kv *kv, u32 place);

void *tm_kv_address(const struct tm_kv *kv, struct tm_page_id page);
void tm_kv_mark_dirty(struct tm_kv *kv, struct tm_page_id page);

#endif
