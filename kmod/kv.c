// SPDX-License-Identifier: GPL-2.0-only
/*
 * KV caches: their geometry, their tables, their beginning and end. What is done with
 * them is in kv_ops.c, where their memory comes from in kv_memory.c.
 */
#include <linux/err.h>
#include <linux/jiffies.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/overflow.h>
#include <linux/slab.h>
#include <uapi/linux/tensormem.h>

#include "client.h"
#include "kv.h"
#include "kv_compact.h"
#include "kv_memory.h"
#include "kv_pack.h"

/* A quarter of the addresses a process has on the kernels with most (48 bits). */
#define TM_KV_MAX_WINDOW	BIT_ULL(46)

/* Events kept for read(2). */
#define TM_KV_EVENT_RING	4096

static atomic_t tm_kv_ids = ATOMIC_INIT(0);
static atomic64_t tm_nr_kvs = ATOMIC64_INIT(0);

/* All caches; who was visited last is the last. */
static DEFINE_MUTEX(tm_kvs_mutex);
static LIST_HEAD(tm_kvs);

static const u32 tm_kv_rules[] = {
	[TENSORMEM_KV_FULL] = TM_KV_FULL,
	[TENSORMEM_KV_WINDOW] = TM_KV_WINDOW,
	[TENSORMEM_KV_STATE] = TM_KV_STATE,
};

/* Return: 0 or -EINVAL. */
static int tm_kv_groups(const struct tensormem_kv_create *request,
			const struct tensormem_kv_group *groups,
			struct tm_kv_geometry *geo)
{
	struct tm_kv_group core[TM_KV_GROUPS];

	for (u32 i = 0; i < request->nr_groups; i++) {
		const struct tensormem_kv_group *group = &groups[i];

		if (group->rule < TENSORMEM_KV_FULL ||
		    group->rule > TENSORMEM_KV_STATE || group->pad ||
		    group->element > 8 ||
		    (group->element && !is_power_of_2(group->element)))
			return -EINVAL;
		core[i] = (struct tm_kv_group){
			.rule = tm_kv_rules[group->rule],
			.planes = group->planes,
			.token_bytes = group->token_bytes,
			.window = group->window,
		};
	}
	return tm_kv_geometry_init(geo, tm_pages_geometry(), core,
				   request->nr_groups, request->block_tokens);
}

/* Pages of a plane's array. */
static u64 tm_kv_plane(const struct tm_kv_geometry *geo, u32 group,
		       u32 max_tokens)
{
	u64 blocks = DIV_ROUND_UP_ULL(max_tokens, geo->block_tokens);

	if (geo->group[group].rule == TM_KV_STATE)
		blocks = 1;
	return blocks * geo->plane_pages[group];
}

/* Lay out a sequence's place. Return: 0, or -EINVAL when the window overflows. */
static int tm_kv_lay_out(struct tm_kv *kv,
			 const struct tensormem_kv_create *request,
			 const struct tensormem_kv_group *groups,
			 const struct tm_kv_geometry *geo)
{
	u64 limit = TM_KV_MAX_WINDOW >> PAGE_SHIFT;
	u64 pages = 0, bytes;

	for (u32 i = 0; i < geo->nr_groups; i++) {
		/* Below 2^52: blocks of at most 2^20 pages, 2^32 of them. */
		u64 stride = tm_kv_plane(geo, i, request->max_tokens);
		u64 size;

		/* A page of a plane is counted in 32 bits. */
		if (stride > U32_MAX)
			return -EINVAL;

		kv->layout[i] = (struct tm_kv_layout){
			.offset = pages,
			.stride = stride,
			.element = groups[i].element ?: 1,
		};
		if (check_mul_overflow(stride, (u64)geo->group[i].planes,
				       &size) || size > limit)
			return -EINVAL;
		pages += size;
	}
	if (pages > limit)
		return -EINVAL;
	/* With 4K pages no page table is shared by two sequences. */
	kv->place_pages = round_up(pages, TM_CHUNK_SIZE >> PAGE_SHIFT);
	if (check_mul_overflow(kv->place_pages << PAGE_SHIFT,
			       (u64)request->max_sequences, &bytes) ||
	    bytes > TM_KV_MAX_WINDOW)
		return -EINVAL;
	return 0;
}

/* The chunks a cache may hold: as asked for, or what all it can hold takes. */
static u32 tm_kv_max_chunks(const struct tensormem_kv_create *request,
			    const struct tm_kv_geometry *geo)
{
	u64 all = totalram_pages() >> geo->pages.chunk_order;
	/* Not DIV_ROUND_UP_ULL(), which can overflow. */
	u64 pages = (request->limit >> PAGE_SHIFT) +
		    !!(request->limit & ~PAGE_MASK);

	/* Below 2^46 bytes of addresses, by tm_kv_lay_out(). */
	for (u32 i = 0; !request->limit && i < geo->nr_groups; i++)
		pages += tm_kv_plane(geo, i, request->max_tokens) *
			 geo->group[i].planes * request->max_sequences;
	return min(DIV_ROUND_UP_ULL(pages, tm_chunk_pages(geo->pages)), all);
}

static int tm_kv_init_tables(struct tm_kv *kv,
			     const struct tm_cache_config *config)
{
	int err;

	kv->backing = kvcalloc(config->max_chunks, sizeof(*kv->backing),
			       TM_GFP);
	kv->used = kvcalloc(config->max_seqs, sizeof(*kv->used), TM_GFP);
	kv->tried = kvcalloc(config->max_seqs, sizeof(*kv->tried), TM_GFP);
	if (!kv->backing || !kv->used || !kv->tried) {
		err = -ENOMEM;
		goto err;
	}
	for (u32 i = 0; i < config->max_chunks; i++)
		kv->backing[i].next = i + 1 < config->max_chunks ? i + 1 :
								   TM_NONE;
	err = tm_cache_init(&kv->cache, config, &kv->lock);
	if (!err)
		return 0;
err:
	kvfree(kv->tried);
	kvfree(kv->used);
	kvfree(kv->backing);
	return err;
}

static void tm_kv_free_tables(struct tm_kv *kv)
{
	tm_cache_destroy(&kv->cache);
	kvfree(kv->tried);
	kvfree(kv->used);
	kvfree(kv->backing);
}

static int tm_kv_init(struct tm_kv *kv,
		      const struct tensormem_kv_create *request,
		      const struct tensormem_kv_group *groups)
{
	struct tm_cache_config *config;
	int err;

	/* Too large for the stack. */
	config = kzalloc(sizeof(*config), TM_GFP);
	if (!config)
		return -ENOMEM;
	config->max_tokens = request->max_tokens;
	config->max_seqs = request->max_sequences;
	if (request->flags & TENSORMEM_KV_EVENTS)
		config->nr_events = TM_KV_EVENT_RING;
	err = tm_kv_groups(request, groups, &config->geo);
	if (!err)
		err = tm_kv_lay_out(kv, request, groups, &config->geo);
	if (err)
		goto out;
	config->max_chunks = tm_kv_max_chunks(request, &config->geo);
	err = tm_kv_init_tables(kv, config);
out:
	kfree(config);
	return err;
}

/**
 * tm_kv_create - make a KV cache that holds nothing
 * @client: who pays for it
 * @request: what it is to be, as user space gave it
 * @groups: request->nr_groups of them
 *
 * Context: may sleep. Return: the cache or an ERR_PTR: -EINVAL, -ENOMEM.
 */
struct tm_kv *tm_kv_create(struct tm_client *client,
			   const struct tensormem_kv_create *request,
			   const struct tensormem_kv_group *groups)
{
	struct tm_kv *kv;
	int err;

	if (!request->max_tokens || !request->max_sequences ||
	    request->max_sequences > TM_CACHE_MAX_SEQS || request->pad ||
	    request->flags & ~TENSORMEM_KV_EVENTS)
		return ERR_PTR(-EINVAL);
	kv = kvzalloc(sizeof(*kv), TM_GFP);
	if (!kv)
		return ERR_PTR(-ENOMEM);
	init_rwsem(&kv->lock);
	refcount_set(&kv->ref, 1);
	mutex_init(&kv->readers);
	init_waitqueue_head(&kv->events);
	err = tm_kv_init(kv, request, groups);
	if (err)
		goto err_free;
	kv->inode = tm_client_inode();
	if (IS_ERR(kv->inode)) {
		err = PTR_ERR(kv->inode);
		goto err_tables;
	}
	tm_kv_pack_init(kv);
	tm_kv_compact_init(kv);
	kv->client = tm_client_get(client);
	kv->id = atomic_inc_return(&tm_kv_ids);
	atomic64_inc(&tm_nr_kvs);
	mutex_lock(&tm_kvs_mutex);
	list_add_tail(&kv->all, &tm_kvs);
	mutex_unlock(&tm_kvs_mutex);
	return kv;

err_tables:
	tm_kv_free_tables(kv);
err_free:
	kvfree(kv);
	return ERR_PTR(err);
}

/* Pages of the window. */
u64 tm_kv_window_pages(const struct tm_kv *kv)
{
	return kv->place_pages * kv->cache.max_seqs;
}

/* What all caches hold together; each value is exact. */
void tm_kv_totals(struct tm_kv_totals *totals)
{
	totals->caches = atomic64_read(&tm_nr_kvs);
	totals->held = tm_kv_memory_held();
}

/* A sequence is in use: not one to pack. Context: any. */
void tm_kv_touch(struct tm_kv *kv, u32 place)
{
	WRITE_ONCE(kv->used[place], jiffies);
}

/* Where a page of a block is in the kernel's memory; the caller holds the lock. */
void *tm_kv_address(const struct tm_kv *kv, struct tm_page_id page)
{
	struct tm_geometry g = kv->cache.pool.geo.pages;

	return page_address(kv->backing[tm_page_chunk(g, page).v].page +
			    tm_page_index(g, page));
}

/* A page of a block gets contents: it is to be zeroed for the next block. */
void tm_kv_mark_dirty(struct tm_kv *kv, struct tm_page_id page)
{
	struct tm_geometry g = kv->cache.pool.geo.pages;

	__set_bit(tm_page_index(g, page),
		  kv->backing[tm_page_chunk(g, page).v].dirty);
}

/* Free a cache and all it holds: nobody looks any more. */
static void tm_kv_destroy(struct tm_kv *kv)
{
	mutex_lock(&tm_kvs_mutex);
	list_del(&kv->all);
	mutex_unlock(&tm_kvs_mutex);
	tm_kv_pack_exit(kv);
	tm_kv_compact_exit(kv);
	down_write(&kv->lock);
	for (u32 i = 0; i < kv->cache.max_seqs; i++) {
		struct tm_seq_id id = tm_cache_id(&kv->cache, i);

		if (tm_cache_find(&kv->cache, id) != TM_NONE)
			WARN_ON_ONCE(tm_cache_close(&kv->cache, id));
		cond_resched();
	}
	WARN_ON_ONCE(tm_cache_reset(&kv->cache));
	up_write(&kv->lock);
	tm_kv_trim(kv);
	atomic64_dec(&tm_nr_kvs);
	tm_client_put(kv->client);
	iput(kv->inode);
	tm_kv_free_tables(kv);
	kvfree(kv);
}

/**
 * tm_kv_put - let go of a cache
 * @kv: the cache
 *
 * Context: may sleep. With the last of its users go its descriptor's and mappings', so that
 * all it holds can be freed.
 */
void tm_kv_put(struct tm_kv *kv)
{
	if (refcount_dec_and_test(&kv->ref))
		tm_kv_destroy(kv);
}

/* The cache that was not visited for longest, or NULL. */
static struct tm_kv *tm_kvs_next(void)
{
	struct tm_kv *kv;

	mutex_lock(&tm_kvs_mutex);
	kv = list_first_entry_or_null(&tm_kvs, struct tm_kv, all);
	if (kv) {
		list_move_tail(&kv->all, &tm_kvs);
		/* It may be on its way out: then the next one will do. */
		if (!refcount_inc_not_zero(&kv->ref))
			kv = NULL;
	}
	mutex_unlock(&tm_kvs_mutex);
	return kv;
}

/**
 * tm_kvs_visit - call a function for each cache, once
 * @visit: what to call, under no lock; false: that is enough
 * @data: for it
 *
 * Who was visited last is visited last the next time: what is taken is taken in turn.
 *
 * Context: may sleep.
 */
void tm_kvs_visit(bool (*visit)(struct tm_kv *kv, void *data), void *data)
{
	u64 nr = atomic64_read(&tm_nr_kvs);
	bool more = true;

	while (nr-- && more) {
		struct tm_kv *kv = tm_kvs_next();

		if (!kv)
			continue;
		more = visit(kv, data);
		tm_kv_put(kv);
	}
}

/**
 * tm_kvs_try - the same for one who may wait for nobody
 * @visit: what to call, under tm_kvs_mutex; it tries the locks that it wants
 * @data: for it
 *
 * Context: may sleep; under any lock that reclaim may run under.
 */
void tm_kvs_try(bool (*visit)(struct tm_kv *kv, void *data), void *data)
{
	struct tm_kv *kv;

	if (!mutex_trylock(&tm_kvs_mutex))
		return;
	list_for_each_entry(kv, &tm_kvs, all)
		if (!visit(kv, data))
			break;
	mutex_unlock(&tm_kvs_mutex);
}
