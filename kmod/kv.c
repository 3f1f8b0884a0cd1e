// SPDX-License-Identifier: GPL-2.0-only
/*
 * KV caches: the memory behind core/cache.h, which decides what each sequence has.
 *
 * Every operation has the same course. Under the lock: remove the mappings that it
 * takes the ground from, let the core do it, zero and copy what the core says. Where
 * the core lacks room: let the lock go, get chunks, and again; when there are none to
 * be had, again at the cost of cached blocks. Nothing of an operation that fails is
 * left but mappings that a touch brings back.
 *
 * Pages are mapped by number, without a reference (kv_vm.c): none of them is in
 * anybody's hands once its mappings are removed.
 */
#include <linux/err.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/overflow.h>
#include <linux/slab.h>
#include <uapi/linux/tensormem.h>

#include "client.h"
#include "kv.h"
#include "kv_compact.h"
#include "kv_pack.h"
#include "kv_vm.h"
#include "memory.h"
#include "quarantine.h"
#include "supply.h"
#include "trace.h"

/* Half of the addresses that the smallest common kernels give a process (39 bits). */
#define TM_KV_MAX_WINDOW	BIT_ULL(46)

/* Events kept for read(2). */
#define TM_KV_EVENT_RING	4096

static atomic_t tm_kv_ids = ATOMIC_INIT(0);
static atomic64_t tm_nr_kvs = ATOMIC64_INIT(0);
static atomic64_t tm_kv_chunks = ATOMIC64_INIT(0);

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
		/* Both below 2^52: blocks of at most 2^20 pages, 2^32 of them. */
		u64 stride = tm_kv_plane(geo, i, request->max_tokens);
		u64 size;

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
	/* No page table is shared by two sequences. */
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
	totals->held = (u64)atomic64_read(&tm_kv_chunks) << TM_CHUNK_SHIFT;
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

static void tm_kv_zero(struct tm_kv *kv, struct tm_kv_block block)
{
	struct tm_geometry g = kv->cache.pool.geo.pages;
	struct tm_kv_walk walk;
	struct tm_page_id page;

	if (WARN_ON_ONCE(tm_kv_walk_start(&kv->cache.pool, block, &walk)))
		return;
	while (tm_kv_walk_next(&kv->cache.pool, &walk, &page)) {
		struct tm_kv_backing *backing =
			&kv->backing[tm_page_chunk(g, page).v];

		if (__test_and_set_bit(tm_page_index(g, page), backing->dirty))
			clear_page(tm_kv_address(kv, page));
	}
}

/* Carry out what the core has decided. */
static void tm_kv_copy(struct tm_kv *kv, const struct tm_cache_copies *copies)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;

	for (u32 i = 0; i < copies->nr; i++) {
		const struct tm_cache_copy *copy = &copies->copy[i];
		struct tm_kv_walk from, to;
		struct tm_page_id a, b;

		trace_tensormem_kv_copy(kv->client->id, kv->id, copy->group,
					copy->index,
					(u64)pool->geo.block_pages[copy->group]
					<< PAGE_SHIFT);
		if (tm_cache_packed(&kv->cache, copy->from)) {
			tm_kv_unpack_to(kv, copy->group, copy->from,
					copy->to);
			continue;
		}
		if (WARN_ON_ONCE(tm_kv_walk_start(pool, copy->from, &from) ||
				 tm_kv_walk_start(pool, copy->to, &to)))
			return;
		while (tm_kv_walk_next(pool, &from, &a) &&
		       tm_kv_walk_next(pool, &to, &b)) {
			tm_kv_mark_dirty(kv, b);
			copy_page(tm_kv_address(kv, b), tm_kv_address(kv, a));
		}
	}
}

/**
 * tm_kv_zap - remove the mappings of blocks
 * @kv: the cache
 * @place: of their sequence
 * @group: their group
 * @first: the first
 * @end: the one after the last
 *
 * Context: may sleep; kv->lock is held for writing: no fault brings them back.
 */
void tm_kv_zap(struct tm_kv *kv, u32 place, u32 group, u32 first, u32 end)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	const struct tm_kv_layout *layout = &kv->layout[group];
	u64 pages = geo->plane_pages[group];
	u64 start = place * kv->place_pages + layout->offset + first * pages;

	lockdep_assert_held_write(&kv->lock);
	if (first >= end)
		return;
	for (u32 i = 0; i < geo->group[group].planes; i++)
		unmap_mapping_pages(kv->inode->i_mapping,
				    start + i * layout->stride,
				    (end - first) * pages, true);
}

/* Remove what may be mapped for writing of blocks below @index, in all groups. */
static void tm_kv_seal(struct tm_kv *kv, u32 place, struct tm_seq_id id,
		       u32 index)
{
	u32 sealed = tm_cache_seq(&kv->cache, place)->sealed;

	if (index <= sealed)
		return;
	for (u32 i = 0; i < kv->cache.pool.geo.nr_groups; i++)
		if (kv->cache.pool.geo.group[i].rule != TM_KV_STATE)
			tm_kv_zap(kv, place, i, sealed, index);
	WARN_ON_ONCE(tm_cache_seal(&kv->cache, id, index));
}

static int tm_kv_add(struct tm_kv *kv, struct tm_memory *memory)
{
	u32 i = kv->free_backing;
	struct tm_kv_backing *backing;

	/* The pool has a slot for each entry, so it has one if there is one. */
	if (i == TM_NONE)
		return -ENOSPC;
	backing = &kv->backing[i];
	kv->free_backing = backing->next;
	backing->memory = memory;
	backing->page = tm_pages_page(&memory->extent[0].run);
	bitmap_zero(backing->dirty, 1 << TM_MAX_CHUNK_ORDER);
	atomic64_inc(&tm_kv_chunks);
	return tm_kv_add_chunk(&kv->cache.pool, (struct tm_chunk_id){ i });
}

static void tm_kv_give_back(struct tm_kv *kv, struct tm_memory *memory)
{
	struct tm_region region = { .memory = memory };

	tm_quarantine_free(kv->client, &region);
}

/* Take an empty chunk out. Return: its memory, or NULL when none is empty. */
static struct tm_memory *tm_kv_remove(struct tm_kv *kv)
{
	struct tm_kv_backing *backing;
	struct tm_memory *memory;
	struct tm_chunk_id id;

	if (tm_kv_remove_chunk(&kv->cache.pool, &id))
		return NULL;
	backing = &kv->backing[id.v];
	memory = backing->memory;
	backing->memory = NULL;
	backing->next = kv->free_backing;
	kv->free_backing = id.v;
	atomic64_dec(&tm_kv_chunks);
	return memory;
}

/* Whether @nr chunks can be had by growth and eviction together. */
static bool tm_kv_possible(const struct tm_kv *kv, u64 nr)
{
	const struct tm_kv_pool *pool = &kv->cache.pool;

	return nr <= pool->nr_slots - pool->nr_chunks +
		     DIV_ROUND_UP_ULL(tm_cache_evictable(&kv->cache),
				      tm_chunk_pages(pool->geo.pages));
}

/* Add @nr chunks. @added: how many that were. Return: 0 or why it is not all. */
static int tm_kv_grow(struct tm_kv *kv, u64 nr, u32 *added)
{
	*added = 0;
	/* What can never be had is to cost nobody anything. */
	if (!data_race(tm_kv_possible(kv, nr)))
		return -ENOSPC;
	for (; *added < nr; ++*added) {
		struct tm_memory_request request = {
			.nr_pages = 1u << tm_pages_geometry().chunk_order,
			.policy = TM_MEMORY_CHUNKS,
			.numa = tm_client_numa(kv->client),
		};
		struct tm_memory *memory;
		int err;

		if (READ_ONCE(kv->free_backing) == TM_NONE)
			return -ENOSPC;
		memory = tm_supply(kv->client, &request);
		if (IS_ERR(memory))
			return PTR_ERR(memory);
		down_write(&kv->lock);
		err = tm_kv_add(kv, memory);
		up_write(&kv->lock);
		if (err) {
			tm_kv_give_back(kv, memory);
			return err;
		}
	}
	return 0;
}

/* Give back @nr empty chunks, or as many as there are. */
static void tm_kv_shed(struct tm_kv *kv, u32 nr)
{
	while (nr--) {
		struct tm_memory *memory;

		down_write(&kv->lock);
		memory = tm_kv_remove(kv);
		up_write(&kv->lock);
		if (!memory)
			return;
		tm_kv_give_back(kv, memory);
	}
}

/* Whether the pool can do without a chunk and still extend a sequence. */
static bool tm_kv_excess(const struct tm_kv_pool *pool)
{
	u32 spare = 0, pages = tm_chunk_pages(pool->geo.pages);

	for (u32 i = 0; i < pool->geo.nr_groups; i++)
		spare += pool->geo.block_pages[i];
	return pool->free_pages == pool->nr_chunks * pages ||
	       pool->free_pages >= pages + min(spare, pages);
}

/**
 * tm_kv_trim - give back chunks that have fallen empty
 * @kv: the cache
 *
 * One of them stays while the next block would want it at once.
 *
 * Context: may sleep; takes kv->lock.
 */
void tm_kv_trim(struct tm_kv *kv)
{
	struct tm_memory *memory;

	/* Without the lock: who makes it so after this will trim it himself. */
	if (!data_race(tm_kv_excess(&kv->cache.pool)))
		return;
	do {
		down_write(&kv->lock);
		memory = tm_kv_excess(&kv->cache.pool) ? tm_kv_remove(kv) :
							 NULL;
		up_write(&kv->lock);
		if (memory)
			tm_kv_give_back(kv, memory);
	} while (memory);
}

/**
 * tm_kv_settle - blocks have been freed
 * @kv: the cache
 *
 * Empty chunks go back; where much is free but no chunk is empty, they are made so, later.
 *
 * Context: may sleep; takes kv->lock.
 */
void tm_kv_settle(struct tm_kv *kv)
{
	tm_kv_trim(kv);
	tm_kv_compact_wake(kv);
}

/* Return: what @call does, or -EINTR on a fatal signal. */
static int tm_kv_once(struct tm_kv *kv, tm_kv_call call, void *args, bool evict,
		      u64 *wanting)
{
	u64 events, evictions;
	int err;

	if (down_write_killable(&kv->lock))
		return -EINTR;
	events = kv->cache.event_head;
	evictions = kv->cache.stats.evictions;
	err = call(kv, args, evict);
	evictions = kv->cache.stats.evictions - evictions;
	if (evictions)
		trace_tensormem_kv_evict(kv->client->id, kv->id, evictions);
	*wanting = kv->cache.wanting;
	events = kv->cache.event_head - events;
	up_write(&kv->lock);
	if (events)
		wake_up_interruptible(&kv->events);
	return err;
}

/**
 * tm_kv_do - call the core, and get it the memory it wants
 * @kv: the cache
 * @call: what to do, under kv->lock held for writing; -ENOMEM: the pool lacks
 *        tm_cache::wanting chunks, and nothing has been done
 * @args: for @call
 *
 * Context: may sleep; no lock of ours is held, mmap_lock may be.
 * Return: what @call does, or why it cannot have memory: -ENOSPC at the cache's limit or
 * the capacity, -EDQUOT, -ENOMEM, -EINTR.
 */
int tm_kv_do(struct tm_kv *kv, tm_kv_call call, void *args)
{
	u32 added = 0, sum = 0;
	bool evict = false;
	int err, refusal;
	u64 wanting;

	for (;;) {
		err = tm_kv_once(kv, call, args, evict, &wanting);
		if (err != -ENOMEM)
			break;
		if (evict) {
			err = refusal;
			break;
		}
		refusal = tm_kv_grow(kv, wanting, &added);
		sum += added;
		if (refusal == -EINTR) {
			err = refusal;
			break;
		}
		evict = refusal;
		if (refusal)
			tm_kv_pack_wake(kv, true);
	}
	if (err)
		tm_kv_shed(kv, sum);
	return err;
}


/**
 * tm_kv_open - begin an empty sequence
 * @kv: the cache
 * @tenant: whose
 * @id: its name
 *
 * Context: may sleep. Return: 0, -ENOBUFS, -EINTR.
 */
int tm_kv_open(struct tm_kv *kv, u64 tenant, struct tm_seq_id *id)
{
	int err;

	if (down_write_killable(&kv->lock))
		return -EINTR;
	err = tm_cache_open(&kv->cache, tenant, id);
	if (!err)
		tm_kv_touch(kv, tm_cache_find(&kv->cache, *id));
	up_write(&kv->lock);
	return err;
}

/**
 * tm_kv_close - end a sequence
 * @kv: the cache
 * @id: its name
 *
 * Context: may sleep. Return: 0, -ENOENT.
 */
int tm_kv_close(struct tm_kv *kv, struct tm_seq_id id)
{
	u32 place;
	int err;

	down_write(&kv->lock);
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE)
		unmap_mapping_pages(kv->inode->i_mapping,
				    place * kv->place_pages, kv->place_pages,
				    true);
	err = tm_cache_close(&kv->cache, id);
	up_write(&kv->lock);
	if (!err)
		tm_kv_settle(kv);
	return err;
}

struct tm_kv_extend_args {
	struct tm_cache_extend *items;
	u32 nr;
	u32 *failed;
};

/* Remove the mappings of what windows leave behind when @tokens more come. */
static void tm_kv_zap_left(struct tm_kv *kv, u32 place, u32 tokens)
{
	const struct tm_cache_seq *seq = tm_cache_seq(&kv->cache, place);
	u32 length;

	if (check_add_overflow(seq->length, tokens, &length) ||
	    length > kv->cache.max_tokens)
		return;
	for (u32 i = 0; i < kv->cache.pool.geo.nr_groups; i++) {
		u32 first, end, new_first, new_end;

		tm_cache_span(&kv->cache, i, seq->length, &first, &end);
		tm_cache_span(&kv->cache, i, length, &new_first, &new_end);
		tm_kv_zap(kv, place, i, first, min(new_first, end));
	}
}

/* What the core wants unmapped before it extends a sequence. */
static void tm_kv_before_extend(struct tm_kv *kv,
				const struct tm_cache_extend *item)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	u32 place = tm_cache_find(&kv->cache, item->id);
	u32 length, last;

	if (place == TM_NONE)
		return;
	tm_kv_touch(kv, place);
	tm_kv_zap_left(kv, place, item->tokens);
	length = tm_cache_seq(&kv->cache, place)->length;
	last = length / geo->block_tokens;
	for (u32 i = 0; length % geo->block_tokens && i < geo->nr_groups; i++) {
		struct tm_cache_page page;

		if (geo->group[i].rule != TM_KV_STATE &&
		    tm_cache_page(&kv->cache, place, i, 0,
				  last * geo->plane_pages[i],
				  &page) != -ENOENT &&
		    tm_cache_shared(&kv->cache, page.block))
			tm_kv_zap(kv, place, i, last, last + 1);
	}
}

/* New blocks are zero, and what is full now is written: seal it some time. */
static void tm_kv_after_extend(struct tm_kv *kv,
			       const struct tm_cache_extend *item)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	u32 place = tm_cache_find(&kv->cache, item->id);
	const struct tm_cache_seq *seq = tm_cache_seq(&kv->cache, place);
	u32 full = item->length / geo->block_tokens;

	for (u32 i = 0; i < geo->nr_groups; i++) {
		u32 old, first, end;
		struct tm_cache_page page;

		tm_cache_span(&kv->cache, i, item->length, &first, &old);
		tm_cache_span(&kv->cache, i, seq->length, &first, &end);
		for (u32 b = max(old, first); b < end; b++)
			if (!WARN_ON_ONCE(tm_cache_page(&kv->cache, place, i, 0,
							b * geo->plane_pages[i],
							&page)))
				tm_kv_zero(kv, page.block);
	}
	tm_kv_copy(kv, &item->copies);
	if (full - min(seq->sealed, full) >= TM_KV_SEAL_BLOCKS)
		tm_kv_seal(kv, place, item->id, full);
}

static int tm_kv_call_extend(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_extend_args *extend = args;
	int err;

	for (u32 i = 0; i < extend->nr; i++)
		tm_kv_before_extend(kv, &extend->items[i]);
	err = tm_cache_extend(&kv->cache, extend->items, extend->nr, evict,
			      extend->failed);
	for (u32 i = 0; !err && i < extend->nr; i++)
		tm_kv_after_extend(kv, &extend->items[i]);
	return err;
}

/**
 * tm_kv_extend - make room for more tokens, in all of several sequences or none
 * @kv: the cache
 * @items: the sequences and how many tokens each; &tm_cache_extend.length is filled in
 * @nr: how many
 * @failed: on failure the item concerned
 *
 * Context: may sleep. Return: 0, -ENOENT, -EINVAL, -ERANGE as tm_cache_extend(), or as
 * tm_kv_do().
 */
int tm_kv_extend(struct tm_kv *kv, struct tm_cache_extend *items, u32 nr,
		 u32 *failed)
{
	struct tm_kv_extend_args args = {
		.items = items, .nr = nr, .failed = failed,
	};
	u64 start = trace_tensormem_kv_extend_enabled() ? ktime_get_ns() : 0;
	int err = tm_kv_do(kv, tm_kv_call_extend, &args);

	if (err)
		return err;
	for (u32 i = 0; i < nr; i++)
		tm_kv_vm_map_ahead(kv, &items[i]);
	for (u32 i = 0; start && i < nr; i++)
		trace_tensormem_kv_extend(kv->client->id, kv->id,
					  items[i].id.v, items[i].tokens,
					  items[i].length + items[i].tokens,
					  ktime_get_ns() - start);
	tm_kv_settle(kv);
	tm_kv_pack_wake(kv, false);
	return 0;
}

/**
 * tm_kv_truncate - drop tokens from the end
 * @kv: the cache
 * @id: the sequence
 * @length: tokens to keep
 *
 * Context: may sleep. Return: as tm_cache_truncate(), -EINTR.
 */
int tm_kv_truncate(struct tm_kv *kv, struct tm_seq_id id, u32 length)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	u32 place;
	int err;

	if (down_write_killable(&kv->lock))
		return -EINTR;
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE) {
		u32 from = length / geo->block_tokens;
		u32 first, end;

		tm_kv_touch(kv, place);
		for (u32 i = 0; i < geo->nr_groups; i++) {
			tm_cache_span(&kv->cache, i,
				      tm_cache_seq(&kv->cache, place)->length,
				      &first, &end);
			if (geo->group[i].rule == TM_KV_STATE)
				tm_kv_zap(kv, place, i, 0, length ? 0 : end);
			else
				tm_kv_zap(kv, place, i, from, end);
		}
	}
	err = tm_cache_truncate(&kv->cache, id, length);
	up_write(&kv->lock);
	if (!err)
		tm_kv_settle(kv);
	return err;
}

struct tm_kv_fork_args {
	struct tm_seq_id id;
	u32 at;
	struct tm_seq_id *child;
};

static int tm_kv_call_fork(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_fork_args *fork = args;
	u32 place = tm_cache_find(&kv->cache, fork->id);
	struct tm_cache_copies copies;
	int err;

	if (place != TM_NONE) {
		tm_kv_touch(kv, place);
		if (fork->at <= tm_cache_seq(&kv->cache, place)->length)
			tm_kv_seal(kv, place, fork->id,
				   fork->at / kv->cache.pool.geo.block_tokens);
	}
	err = tm_cache_fork(&kv->cache, fork->id, fork->at, evict, fork->child,
			    &copies);
	if (err)
		return err;
	tm_kv_touch(kv, tm_cache_find(&kv->cache, *fork->child));
	tm_kv_copy(kv, &copies);
	trace_tensormem_kv_fork(kv->client->id, kv->id, fork->id.v,
				fork->child->v, fork->at);
	return 0;
}

/**
 * tm_kv_fork - begin a sequence with the first tokens of another
 * @kv: the cache
 * @id: the other
 * @at: how many tokens
 * @child: the new one
 *
 * Context: may sleep. Return: as tm_cache_fork() but -EBUSY, or as tm_kv_do().
 */
int tm_kv_fork(struct tm_kv *kv, struct tm_seq_id id, u32 at,
	       struct tm_seq_id *child)
{
	struct tm_kv_fork_args args = { .id = id, .at = at, .child = child };

	return tm_kv_do(kv, tm_kv_call_fork, &args);
}

struct tm_kv_hash_args {
	struct tm_seq_id id;
	u32 first;
	const struct tm_hash *hashes;
	u32 nr;
	u32 *matched;
};

static int tm_kv_call_publish(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_hash_args *publish = args;
	u32 place = tm_cache_find(&kv->cache, publish->id);
	struct tm_cache_copies copies;
	int err;

	if (place != TM_NONE) {
		u32 full = tm_cache_seq(&kv->cache, place)->length /
			   kv->cache.pool.geo.block_tokens;
		u32 end;

		tm_kv_touch(kv, place);
		if (!check_add_overflow(publish->first, publish->nr, &end) &&
		    end <= full)
			tm_kv_seal(kv, place, publish->id, end);
	}
	err = tm_cache_publish(&kv->cache, publish->id, publish->first,
			       publish->hashes, publish->nr, evict, &copies);
	if (!err)
		tm_kv_copy(kv, &copies);
	return err;
}

/**
 * tm_kv_publish - let others find blocks of a sequence
 * @kv: the cache
 * @id: the sequence
 * @first: the first block
 * @hashes: names of it and of those that follow
 * @nr: how many
 *
 * Context: may sleep. Return: as tm_cache_publish() but -EBUSY, or as tm_kv_do().
 */
int tm_kv_publish(struct tm_kv *kv, struct tm_seq_id id, u32 first,
		  const struct tm_hash *hashes, u32 nr)
{
	struct tm_kv_hash_args args = {
		.id = id, .first = first, .hashes = hashes, .nr = nr,
	};

	return tm_kv_do(kv, tm_kv_call_publish, &args);
}

static int tm_kv_call_lookup(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_hash_args *lookup = args;
	u32 place = tm_cache_find(&kv->cache, lookup->id);
	struct tm_cache_copies copies;
	int err;

	err = tm_cache_lookup(&kv->cache, lookup->id, lookup->hashes,
			      lookup->nr, evict, lookup->matched, &copies);
	if (err)
		return err;
	tm_kv_touch(kv, place);
	tm_kv_copy(kv, &copies);
	trace_tensormem_kv_lookup(kv->client->id, kv->id, lookup->id.v,
				  lookup->nr, *lookup->matched);
	return 0;
}

static int tm_kv_call_peek(struct tm_kv *kv, void *args, bool evict)
{
	struct tm_kv_hash_args *lookup = args;
	u32 place = tm_cache_find(&kv->cache, lookup->id);

	if (place == TM_NONE)
		return -ENOENT;
	*lookup->matched =
		tm_cache_match(&kv->cache,
			       tm_cache_seq(&kv->cache, place)->tenant,
			       lookup->hashes, lookup->nr);
	return 0;
}

/**
 * tm_kv_lookup - begin an empty sequence with the longest prefix there is
 * @kv: the cache
 * @id: the sequence
 * @hashes: names of its blocks
 * @nr: how many
 * @peek: only say how long that is
 * @matched: blocks of it
 *
 * Context: may sleep. Return: as tm_cache_lookup(), or as tm_kv_do().
 */
int tm_kv_lookup(struct tm_kv *kv, struct tm_seq_id id,
		 const struct tm_hash *hashes, u32 nr, bool peek, u32 *matched)
{
	struct tm_kv_hash_args args = {
		.id = id, .hashes = hashes, .nr = nr, .matched = matched,
	};

	return tm_kv_do(kv, peek ? tm_kv_call_peek : tm_kv_call_lookup, &args);
}

struct tm_kv_adopt_args {
	struct tm_seq_id id;
	u32 index;
	const struct tm_hash *hash;
	u32 tokens;
	u32 *length;
};

static int tm_kv_call_adopt(struct tm_kv *kv, void *args, bool evict)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	struct tm_kv_adopt_args *adopt = args;
	u32 place = tm_cache_find(&kv->cache, adopt->id);
	struct tm_cache_copies copies;
	int err;

	if (place != TM_NONE) {
		u32 full = tm_cache_seq(&kv->cache, place)->length /
			   geo->block_tokens;

		tm_kv_touch(kv, place);
		if (adopt->index == full)
			tm_kv_zap_left(kv, place, adopt->tokens);
		for (u32 i = 0; i < geo->nr_groups; i++)
			if (geo->group[i].rule == TM_KV_STATE)
				tm_kv_zap(kv, place, i, 0, 1);
			else if (adopt->index < full)
				tm_kv_zap(kv, place, i, adopt->index,
					  adopt->index + 1);
	}
	err = tm_cache_adopt(&kv->cache, adopt->id, adopt->index, adopt->hash,
			     adopt->tokens, evict, &copies);
	if (err)
		return err;
	tm_kv_copy(kv, &copies);
	*adopt->length = tm_cache_seq(&kv->cache, place)->length;
	return 0;
}

/**
 * tm_kv_adopt - put a published block into a sequence
 * @kv: the cache
 * @id: the sequence
 * @index: where
 * @hash: the block
 * @tokens: how many of its tokens; 0 means all
 * @length: tokens of the sequence now
 *
 * Context: may sleep. Return: as tm_cache_adopt(), or as tm_kv_do().
 */
int tm_kv_adopt(struct tm_kv *kv, struct tm_seq_id id, u32 index,
		const struct tm_hash *hash, u32 tokens, u32 *length)
{
	struct tm_kv_adopt_args args = {
		.id = id, .index = index, .hash = hash, .length = length,
		.tokens = tokens ?: kv->cache.pool.geo.block_tokens,
	};
	int err = tm_kv_do(kv, tm_kv_call_adopt, &args);

	if (!err)
		tm_kv_settle(kv);
	return err;
}

static int tm_kv_call_reset(struct tm_kv *kv, void *args, bool evict)
{
	return tm_cache_reset(&kv->cache);
}

/**
 * tm_kv_reset - forget all published blocks
 * @kv: the cache
 *
 * Context: may sleep. Return: 0, -EBUSY while a sequence holds a block, -EINTR.
 */
int tm_kv_reset(struct tm_kv *kv)
{
	int err = tm_kv_do(kv, tm_kv_call_reset, NULL);

	if (!err)
		tm_kv_settle(kv);
	return err;
}

struct tm_kv_write_args {
	u32 place;
	u32 group;
	u32 index;
	u64 offset;
};

static int tm_kv_call_write(struct tm_kv *kv, void *args, bool evict)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	struct tm_kv_write_args *write = args;
	struct tm_cache_copies copies;
	struct tm_cache_page page;
	int err;

	err = tm_cache_page(&kv->cache, write->place, write->group, 0,
			    write->index * geo->plane_pages[write->group],
			    &page);
	if (err)
		return err == -EAGAIN ? 0 : err;
	/*
	 * The entry that may not be written goes and a fault brings one that may. To
	 * have the kernel make this one writable, after we have let the lock go, would
	 * race with somebody who shares the block meanwhile and maps it again.
	 */
	if (tm_cache_shared(&kv->cache, page.block))
		tm_kv_zap(kv, write->place, write->group, write->index,
			  write->index + 1);
	else
		unmap_mapping_pages(kv->inode->i_mapping, write->offset, 1,
				    true);
	if (page.writable)
		return 0;
	err = tm_cache_write(&kv->cache, write->place, write->group,
			     write->index, evict, &copies);
	if (!err)
		tm_kv_copy(kv, &copies);
	return err;
}

/**
 * tm_kv_write - let a sequence write to a block, which may take a copy of it
 * @kv: the cache
 * @place: of the sequence
 * @group: the block's
 * @index: which block
 * @offset: the page of the window that is about to be written
 *
 * Afterwards nothing is mapped at @offset, and a fault maps it for writing. A packed block
 * stays as it is.
 *
 * Context: may sleep; mmap_lock is held. Return: 0, -ENOENT, or as tm_kv_do().
 */
int tm_kv_write(struct tm_kv *kv, u32 place, u32 group, u32 index, u64 offset)
{
	struct tm_kv_write_args args = {
		.place = place, .group = group, .index = index,
		.offset = offset,
	};

	return tm_kv_do(kv, tm_kv_call_write, &args);
}

/**
 * tm_kv_destroy - free a cache and all it holds
 * @kv: the cache; consumed
 *
 * Context: may sleep. The last descriptor and mapping are gone, so nobody looks.
 */
void tm_kv_destroy(struct tm_kv *kv)
{
	struct tm_memory *memory;

	tm_kv_pack_exit(kv);
	tm_kv_compact_exit(kv);
	down_write(&kv->lock);
	for (u32 i = 0; i < kv->cache.max_seqs; i++) {
		struct tm_seq_id id = tm_cache_id(&kv->cache, i);

		if (tm_cache_find(&kv->cache, id) != TM_NONE)
			WARN_ON_ONCE(tm_cache_close(&kv->cache, id));
	}
	WARN_ON_ONCE(tm_cache_reset(&kv->cache));
	while ((memory = tm_kv_remove(kv)))
		tm_kv_give_back(kv, memory);
	up_write(&kv->lock);
	atomic64_dec(&tm_nr_kvs);
	tm_client_put(kv->client);
	iput(kv->inode);
	tm_kv_free_tables(kv);
	kvfree(kv);
}
