// SPDX-License-Identifier: GPL-2.0-only
#include "core/cache.h"

/* Memory that a call needs: pages, and numbers of blocks. */
struct tm_cache_need {
	u64 pages;
	u64 blocks;
};

int tm_cache_init(struct tm_cache *cache, const struct tm_cache_config *config,
		  tm_sleep_lock_t *lock)
{
	const struct tm_kv_geometry *geo = &config->geo;
	u64 entries, pages = 0;
	int err = -ENOMEM;

	/* Too large for a literal on a kernel stack. */
	memset(cache, 0, sizeof(*cache));
	cache->lock = lock;
	cache->max_tokens = config->max_tokens;
	cache->max_seqs = config->max_seqs;
	cache->nr_events = config->nr_events;
	if (!config->max_tokens || !config->max_seqs ||
	    config->max_seqs > TM_CACHE_MAX_SEQS ||
	    config->nr_events & (config->nr_events - 1))
		return -EINVAL;
	cache->max_blocks = config->max_tokens / geo->block_tokens +
			    !!(config->max_tokens % geo->block_tokens);
	/* Below 2^53. */
	entries = (u64)config->max_seqs * geo->nr_groups * cache->max_blocks;
	if (entries > TM_CACHE_MAX_ENTRIES)
		return -EINVAL;
	for (u32 g = 0; g < geo->nr_groups; g++)
		pages += geo->block_pages[g];
	if ((u64)config->max_chunks << geo->pages.chunk_order < pages)
		return -EINVAL;

	err = tm_kv_pool_init(&cache->pool, geo, config->max_chunks, lock);
	if (err)
		return err;
	err = tm_prefix_init(&cache->prefix, cache->pool.nr_blocks, lock);
	if (err)
		goto err_pool;
	err = -ENOMEM;
	cache->seqs = tm_table_alloc(cache->max_seqs, sizeof(*cache->seqs));
	if (!cache->seqs)
		goto err_prefix;
	cache->tables = tm_table_alloc(entries, sizeof(*cache->tables));
	if (!cache->tables)
		goto err_seqs;
	if (cache->nr_events) {
		cache->events = tm_table_alloc(cache->nr_events,
					       sizeof(*cache->events));
		if (!cache->events)
			goto err_tables;
	}
	for (u32 i = 0; i < cache->max_seqs; i++)
		cache->seqs[i].generation = 1;
	memset(cache->tables, 0xff, entries * sizeof(*cache->tables));
	return 0;

err_tables:
	tm_table_free(cache->tables);
	cache->tables = NULL;
err_seqs:
	tm_table_free(cache->seqs);
	cache->seqs = NULL;
err_prefix:
	tm_prefix_destroy(&cache->prefix);
err_pool:
	tm_kv_pool_destroy(&cache->pool);
	return err;
}

void tm_cache_destroy(struct tm_cache *cache)
{
	tm_table_free(cache->events);
	tm_table_free(cache->tables);
	tm_table_free(cache->seqs);
	cache->events = NULL;
	cache->tables = NULL;
	cache->seqs = NULL;
	tm_prefix_destroy(&cache->prefix);
	tm_kv_pool_destroy(&cache->pool);
}

u32 tm_cache_find(const struct tm_cache *cache, struct tm_seq_id id)
{
	u32 place = id.v & 0xffff;

	tm_assert_sleep_locked(cache->lock);
	if (place >= cache->max_seqs)
		return TM_NONE;
	place = tm_index(place, cache->max_seqs);
	if (!cache->seqs[place].open ||
	    cache->seqs[place].generation != id.v >> 16)
		return TM_NONE;
	return place;
}

void tm_cache_span(const struct tm_cache *cache, u32 group, u32 tokens,
		   u32 *first, u32 *end)
{
	tm_assert_sleep_locked(cache->lock);
	*end = tm_kv_held(&cache->pool.geo, group, tokens, first);
	if (!tokens)
		*end = 0;
}

void tm_cache_leaving(const struct tm_cache *cache, u32 place, u32 group,
		      u32 length, u32 *first, u32 *end)
{
	u32 had = tm_cache_seq(cache, place)->length;
	u32 new_first, new_end;

	tm_cache_span(cache, group, had, first, end);
	tm_cache_span(cache, group, length, &new_first, &new_end);
	if (length > had && *end > new_first)
		*end = new_first;
	else if (length <= had && *first < new_end)
		*first = new_end;
}

static bool tm_cache_is_state(const struct tm_cache *cache, u32 group)
{
	return cache->pool.geo.group[group].rule == TM_KV_STATE;
}

static u32 *tm_cache_entry(const struct tm_cache *cache, u32 place, u32 group,
			   u32 index)
{
	u32 tables = cache->max_seqs * cache->pool.geo.nr_groups;
	u32 table = tm_index(place * cache->pool.geo.nr_groups + group, tables);

	return &cache->tables[table * cache->max_blocks +
			      tm_index(index, cache->max_blocks)];
}

/* The block of a sequence at this place; TM_NONE where it has none. */
static u32 tm_cache_at(const struct tm_cache *cache, u32 place, u32 group,
		       u32 index)
{
	if (place >= cache->max_seqs || index >= cache->max_blocks)
		return TM_NONE;
	return *tm_cache_entry(cache, place, group, index);
}

static void tm_cache_tell(struct tm_cache *cache, struct tm_cache_event event)
{
	if (!cache->nr_events)
		return;
	if (cache->event_head - cache->event_tail == cache->nr_events) {
		cache->event_tail++;
		cache->stats.events_lost++;
	}
	cache->events[cache->event_head++ & (cache->nr_events - 1)] = event;
}

bool tm_cache_next_event(struct tm_cache *cache, struct tm_cache_event *event)
{
	tm_assert_sleep_locked(cache->lock);
	if (cache->event_tail == cache->event_head)
		return false;
	*event = cache->events[cache->event_tail++ & (cache->nr_events - 1)];
	return true;
}

/* The geometry's pages of a block. */
static u32 tm_cache_full_pages(const struct tm_cache *cache, u32 block)
{
	return cache->pool.geo.block_pages[cache->pool.blocks[block].group];
}

/* Pages that a block is short of because it is packed. */
static u32 tm_cache_lost_pages(const struct tm_cache *cache, u32 block)
{
	return tm_cache_full_pages(cache, block) -
	       cache->pool.blocks[block].pages;
}

bool tm_cache_packed(const struct tm_cache *cache, struct tm_kv_block block)
{
	tm_assert_sleep_locked(cache->lock);
	return tm_kv_pages(&cache->pool, block) &&
	       tm_cache_lost_pages(cache, block.v);
}

bool tm_cache_shared(const struct tm_cache *cache, struct tm_kv_block block)
{
	tm_assert_sleep_locked(cache->lock);
	return cache->prefix.blocks[block.v].published ||
	       tm_prefix_refs(&cache->prefix, block.v) > 1;
}

static bool tm_cache_cached(const struct tm_cache *cache, u32 block)
{
	return cache->prefix.blocks[block].published &&
	       !tm_prefix_refs(&cache->prefix, block);
}

/* A packed block is whole again, or goes. */
static void tm_cache_count_unpacked(struct tm_cache *cache, u32 block)
{
	cache->packed--;
	cache->packed_pages -= cache->pool.blocks[block].pages;
	cache->unpacked_pages -= tm_cache_full_pages(cache, block);
}

static void tm_cache_free(struct tm_cache *cache, u32 block)
{
	if (tm_cache_lost_pages(cache, block))
		tm_cache_count_unpacked(cache, block);
	tm_warn_on(tm_kv_free(&cache->pool, (struct tm_kv_block){ block }));
}

static void tm_cache_get(struct tm_cache *cache, u32 block)
{
	if (tm_cache_cached(cache, block))
		cache->cached_pages -= cache->pool.blocks[block].pages;
	tm_prefix_get(&cache->prefix, block);
}

/* Undo the last tm_cache_get(), as tm_prefix_unget(). */
static void tm_cache_unget(struct tm_cache *cache, u32 block)
{
	tm_prefix_unget(&cache->prefix, block);
	if (tm_cache_cached(cache, block))
		cache->cached_pages += cache->pool.blocks[block].pages;
}

static void tm_cache_put(struct tm_cache *cache, u32 block)
{
	if (tm_prefix_put(&cache->prefix, block))
		tm_cache_free(cache, block);
	else if (tm_cache_cached(cache, block))
		cache->cached_pages += cache->pool.blocks[block].pages;
}

/* Empty one entry of a table. */
static void tm_cache_drop(struct tm_cache *cache, u32 place, u32 group,
			  u32 index)
{
	u32 *entry = tm_cache_entry(cache, place, group, index);

	tm_cache_put(cache, *entry);
	*entry = TM_NONE;
}

/* Forget a cached block, and free it. Return: whether there was no other of its key. */
static bool tm_cache_discard(struct tm_cache *cache, u32 block)
{
	bool last = tm_prefix_forget(&cache->prefix, block);

	cache->cached_pages -= cache->pool.blocks[block].pages;
	tm_cache_free(cache, block);
	return last;
}

static void tm_cache_give_up(struct tm_cache *cache, u32 block)
{
	const struct tm_prefix_key *key = &cache->prefix.blocks[block].key;

	if (tm_cache_discard(cache, block))
		tm_cache_tell(cache, (struct tm_cache_event){
			.type = TM_CACHE_REMOVED,
			.group = key->group,
			.tenant = key->tenant,
			.hash = key->hash,
		});
	cache->stats.evictions++;
}

int tm_cache_evict(struct tm_cache *cache)
{
	tm_assert_sleep_locked(cache->lock);
	if (cache->prefix.oldest == TM_NONE)
		return -ENOENT;
	tm_cache_give_up(cache, cache->prefix.oldest);
	return 0;
}

u64 tm_cache_evictable(const struct tm_cache *cache)
{
	tm_assert_sleep_locked(cache->lock);
	return cache->cached_pages;
}

static void tm_cache_need(const struct tm_cache *cache,
			  struct tm_cache_need *need, u32 group, u32 blocks)
{
	need->pages += (u64)blocks * cache->pool.geo.block_pages[group];
	need->blocks += blocks;
}

/* Whether there is room, or will be when all cached blocks but @keep are given up. */
static bool tm_cache_fits(const struct tm_cache *cache,
			  const struct tm_cache_need *need, bool evict, u32 keep)
{
	u64 pages = cache->cached_pages, blocks = cache->prefix.cached;

	if (!evict)
		return !tm_kv_lack(&cache->pool, need->pages, need->blocks);
	/* Whoever keeps one needs no numbers of others. */
	if (keep != TM_NONE && tm_cache_cached(cache, keep))
		pages -= cache->pool.blocks[keep].pages;
	return !tm_kv_lack(&cache->pool,
			   need->pages > pages ? need->pages - pages : 0,
			   need->blocks > blocks ? need->blocks - blocks : 0);
}

/* Have room, if need be by giving up cached blocks, but not @keep. */
static int tm_cache_make_room(struct tm_cache *cache,
			      const struct tm_cache_need *need, bool evict,
			      u32 keep)
{
	if (!tm_cache_fits(cache, need, evict, keep)) {
		cache->wanting = tm_kv_lack(&cache->pool, need->pages,
					    need->blocks);
		return -ENOMEM;
	}
	while (tm_kv_lack(&cache->pool, need->pages, need->blocks)) {
		u32 victim = cache->prefix.oldest;

		if (victim == keep)
			victim = cache->prefix.blocks[victim].newer;
		tm_cache_give_up(cache, victim);
	}
	return 0;
}

/* A block with one user. There is room. */
static u32 tm_cache_new(struct tm_cache *cache, u32 group)
{
	u32 count[TM_KV_GROUPS] = { 0 };
	struct tm_kv_block block = { 0 };

	count[group] = 1;
	tm_warn_on(tm_kv_alloc(&cache->pool, count, &block));
	tm_cache_get(cache, block.v);
	return block.v;
}

static void tm_cache_copy(struct tm_cache *cache,
			  struct tm_cache_copies *copies, u32 group, u32 index,
			  u32 from, u32 to)
{
	copies->copy[copies->nr++] = (struct tm_cache_copy){
		.group = group,
		.index = index,
		.from = { from },
		.to = { to },
	};
	cache->stats.copies++;
}

/* Begin a sequence; there is a place. */
static u32 tm_cache_begin(struct tm_cache *cache, u64 tenant)
{
	struct tm_cache_seq *seq;
	u32 place = cache->next;

	while (cache->seqs[place].open)
		place = (place + 1) % cache->max_seqs;
	cache->next = (place + 1) % cache->max_seqs;
	cache->nr_open++;
	seq = &cache->seqs[place];
	seq->open = true;
	seq->tenant = tenant;
	return place;
}

int tm_cache_open(struct tm_cache *cache, u64 tenant, struct tm_seq_id *id)
{
	tm_assert_sleep_locked(cache->lock);
	if (cache->nr_open == cache->max_seqs)
		return -ENOBUFS;
	*id = tm_cache_id(cache, tm_cache_begin(cache, tenant));
	return 0;
}

/* Drop what a new length does not have, of all groups the last block first. */
static void tm_cache_leave(struct tm_cache *cache, u32 place, u32 length)
{
	u32 from[TM_KV_GROUPS], to[TM_KV_GROUPS];

	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++)
		tm_cache_leaving(cache, place, g, length, &from[g], &to[g]);
	for (;;) {
		u32 last = 0, group = TM_NONE;

		for (u32 g = 0; g < cache->pool.geo.nr_groups; g++)
			if (to[g] > from[g] && to[g] > last) {
				last = to[g];
				group = g;
			}
		if (group == TM_NONE)
			return;
		tm_relax();
		to[group]--;
		tm_cache_drop(cache, place, group, to[group]);
	}
}

/* Keep the first @length tokens. */
static void tm_cache_cut(struct tm_cache *cache, u32 place, u32 length)
{
	struct tm_cache_seq *seq = &cache->seqs[place];
	u32 full = length / cache->pool.geo.block_tokens;

	tm_cache_leave(cache, place, length);
	seq->length = length;
	if (seq->sealed > full)
		seq->sealed = full;
}

int tm_cache_close(struct tm_cache *cache, struct tm_seq_id id)
{
	u32 place = tm_cache_find(cache, id);
	struct tm_cache_seq *seq;

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	tm_cache_cut(cache, place, 0);
	seq = &cache->seqs[place];
	seq->open = false;
	seq->tenant = 0;
	/* Never 0: no name is. */
	if (!++seq->generation)
		seq->generation = 1;
	cache->nr_open--;
	return 0;
}

/* The blocks [first, end) of a group that come when a sequence grows to @length. */
static void tm_cache_new_span(const struct tm_cache *cache, u32 place,
			      u32 group, u32 length, u32 *first, u32 *end)
{
	u32 had_first, had_end;

	tm_cache_span(cache, group, cache->seqs[place].length, &had_first,
		      &had_end);
	tm_cache_span(cache, group, length, first, end);
	if (*first < had_end)
		*first = had_end;
}

/*
 * The last block, if it is to be written on when a sequence grows to @length and is
 * not its sequence's alone; else TM_NONE.
 */
static u32 tm_cache_unfinished(const struct tm_cache *cache, u32 place,
			       u32 group, u32 length)
{
	u32 tokens = cache->pool.geo.block_tokens;
	u32 had = cache->seqs[place].length;
	u32 first, end, block;

	tm_cache_span(cache, group, length, &first, &end);
	if (tm_cache_is_state(cache, group) || !(had % tokens) ||
	    had / tokens < first)
		return TM_NONE;
	block = *tm_cache_entry(cache, place, group, had / tokens);
	return tm_cache_shared(cache, (struct tm_kv_block){ block }) ?
	       block : TM_NONE;
}

static int tm_cache_extend_check(struct tm_cache *cache,
				 struct tm_cache_extend *item,
				 struct tm_cache_need *need)
{
	u32 place = tm_cache_find(cache, item->id), length;

	if (place == TM_NONE)
		return -ENOENT;
	if (!item->tokens || cache->seqs[place].pending)
		return -EINVAL;
	item->length = cache->seqs[place].length;
	if (item->tokens > cache->max_tokens - item->length)
		return -ERANGE;
	length = item->length + item->tokens;
	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++) {
		u32 first, end;

		tm_cache_new_span(cache, place, g, length, &first, &end);
		if (tm_cache_unfinished(cache, place, g, length) != TM_NONE)
			end++;
		tm_cache_need(cache, need, g, end - first);
	}
	cache->seqs[place].pending = true;
	return 0;
}

static void tm_cache_extend_one(struct tm_cache *cache,
				struct tm_cache_extend *item)
{
	u32 place = tm_cache_find(cache, item->id);
	u32 length = item->length + item->tokens;

	item->copies.nr = 0;
	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++) {
		u32 from = tm_cache_unfinished(cache, place, g, length);
		u32 first, end;

		if (from != TM_NONE) {
			u32 last = item->length / cache->pool.geo.block_tokens;
			u32 to = tm_cache_new(cache, g);

			tm_cache_copy(cache, &item->copies, g, last, from, to);
			*tm_cache_entry(cache, place, g, last) = to;
			tm_cache_put(cache, from);
		}
		tm_cache_new_span(cache, place, g, length, &first, &end);
		for (; first < end; first++)
			*tm_cache_entry(cache, place, g, first) =
				tm_cache_new(cache, g);
	}
	cache->seqs[place].length = length;
}

int tm_cache_extend(struct tm_cache *cache, struct tm_cache_extend *items,
		    u32 nr, bool evict, u32 *failed)
{
	struct tm_cache_need need = { 0 };
	u32 n, short_of = nr;
	int err = 0;

	tm_assert_sleep_locked(cache->lock);
	for (n = 0; n < nr; n++) {
		err = tm_cache_extend_check(cache, &items[n], &need);
		if (err)
			break;
		if (short_of == nr &&
		    !tm_cache_fits(cache, &need, evict, TM_NONE))
			short_of = n;
		tm_relax();
	}
	*failed = n;
	while (n--)
		cache->seqs[tm_cache_find(cache, items[n].id)].pending = false;
	if (err)
		return err;
	*failed = short_of;
	err = tm_cache_make_room(cache, &need, evict, TM_NONE);
	if (err)
		return err;
	/*
	 * Who shares a last block with another of @items, or with what leaves another's
	 * window, may be alone with it in the end and then writes it in place: what
	 * is copied from must not be freed.
	 */
	for (n = 0; n < nr; n++)
		tm_cache_leave(cache, tm_cache_find(cache, items[n].id),
			       items[n].length + items[n].tokens);
	for (n = 0; n < nr; n++) {
		tm_cache_extend_one(cache, &items[n]);
		tm_relax();
	}
	return 0;
}

/* Whether a sequence has all that its first @length tokens would. */
static bool tm_cache_has(const struct tm_cache *cache, u32 place, u32 length)
{
	u32 had = cache->seqs[place].length;

	if (!length || length == had)
		return true;
	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++) {
		u32 first, had_first, end;

		tm_cache_span(cache, g, length, &first, &end);
		tm_cache_span(cache, g, had, &had_first, &end);
		if (tm_cache_is_state(cache, g) || first < had_first)
			return false;
	}
	return true;
}

int tm_cache_truncate(struct tm_cache *cache, struct tm_seq_id id, u32 length)
{
	u32 place = tm_cache_find(cache, id);

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	if (length > cache->seqs[place].length)
		return -EINVAL;
	if (!tm_cache_has(cache, place, length))
		return -ENODATA;
	tm_cache_cut(cache, place, length);
	return 0;
}

int tm_cache_seal(struct tm_cache *cache, struct tm_seq_id id, u32 index)
{
	u32 place = tm_cache_find(cache, id);
	struct tm_cache_seq *seq;

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	seq = &cache->seqs[place];
	if (index > seq->length / cache->pool.geo.block_tokens)
		return -EINVAL;
	if (index > seq->sealed)
		seq->sealed = index;
	return 0;
}

int tm_cache_fork(struct tm_cache *cache, struct tm_seq_id id, u32 at,
		  bool evict, struct tm_seq_id *child,
		  struct tm_cache_copies *copies)
{
	u32 place = tm_cache_find(cache, id);
	u32 tokens = cache->pool.geo.block_tokens;
	struct tm_cache_need need = { 0 };
	u32 to;
	int err;

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	if (at > cache->seqs[place].length)
		return -EINVAL;
	if (!tm_cache_has(cache, place, at))
		return -ENODATA;
	if (cache->seqs[place].sealed < at / tokens)
		return -EBUSY;
	if (cache->nr_open == cache->max_seqs)
		return -ENOBUFS;
	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++)
		if (tm_cache_is_state(cache, g) ? at : at % tokens)
			tm_cache_need(cache, &need, g, 1);
	err = tm_cache_make_room(cache, &need, evict, TM_NONE);
	if (err)
		return err;

	to = tm_cache_begin(cache, cache->seqs[place].tenant);
	*child = tm_cache_id(cache, to);
	cache->seqs[to].length = at;
	cache->seqs[to].sealed = at / tokens;
	copies->nr = 0;
	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++) {
		u32 first, end;

		tm_cache_span(cache, g, at, &first, &end);
		for (u32 i = first; i < end; i++) {
			u32 block = *tm_cache_entry(cache, place, g, i);
			u32 *entry = tm_cache_entry(cache, to, g, i);

			if (tm_cache_is_state(cache, g) || i == at / tokens) {
				*entry = tm_cache_new(cache, g);
				tm_cache_copy(cache, copies, g, i, block,
					      *entry);
			} else {
				*entry = block;
				tm_cache_get(cache, block);
			}
			tm_relax();
		}
	}
	return 0;
}

int tm_cache_pages(const struct tm_cache *cache, u32 place, u32 group,
		   u32 plane, u32 index, u32 max, struct tm_cache_run *run)
{
	u32 pages, block;

	tm_assert_sleep_locked(cache->lock);
	group = tm_index(group, cache->pool.geo.nr_groups);
	pages = cache->pool.geo.plane_pages[group];
	block = tm_cache_at(cache, place, group, index / pages);
	run->nr = pages - index % pages;
	if (run->nr > max)
		run->nr = max;
	if (block == TM_NONE)
		return -ENOENT;
	run->block = (struct tm_kv_block){ block };
	run->index = plane * pages + index % pages;
	if (tm_cache_packed(cache, run->block))
		return -EAGAIN;
	/* A state is always written in place, and never shared. */
	run->writable = tm_cache_is_state(cache, group) ||
			(index / pages >= tm_cache_seq(cache, place)->sealed &&
			 !tm_cache_shared(cache, run->block));
	return tm_kv_walk_at(&cache->pool, run->block, run->index, &run->walk);
}

int tm_cache_page(const struct tm_cache *cache, u32 place, u32 group,
		  u32 plane, u32 index, struct tm_cache_page *page)
{
	struct tm_cache_run run;
	int err;

	tm_assert_sleep_locked(cache->lock);
	err = tm_cache_pages(cache, place, group, plane, index, 1, &run);
	if (err == -ENOENT)
		return err;
	page->block = run.block;
	page->index = run.index;
	if (err)
		return err;
	page->writable = run.writable;
	tm_kv_walk_next(&cache->pool, &run.walk, &page->page);
	return 0;
}

int tm_cache_write(struct tm_cache *cache, u32 place, u32 group, u32 index,
		   bool evict, struct tm_cache_copies *copies)
{
	struct tm_cache_need need = { 0 };
	struct tm_cache_seq *seq;
	u32 block, to;
	int err;

	tm_assert_sleep_locked(cache->lock);
	group = tm_index(group, cache->pool.geo.nr_groups);
	block = tm_cache_at(cache, place, group, index);
	if (block == TM_NONE)
		return -ENOENT;
	seq = &cache->seqs[tm_index(place, cache->max_seqs)];
	copies->nr = 0;
	if (tm_cache_shared(cache, (struct tm_kv_block){ block })) {
		tm_cache_need(cache, &need, group, 1);
		err = tm_cache_make_room(cache, &need, evict, TM_NONE);
		if (err)
			return err;
		to = tm_cache_new(cache, group);
		tm_cache_copy(cache, copies, group, index, block, to);
		*tm_cache_entry(cache, place, group, index) = to;
		tm_cache_put(cache, block);
	}
	if (!tm_cache_is_state(cache, group) && seq->sealed > index)
		seq->sealed = index;
	return 0;
}

static struct tm_prefix_key tm_cache_key(u64 tenant, u32 group,
					 const struct tm_hash *hash)
{
	return (struct tm_prefix_key){
		.hash = *hash, .tenant = tenant, .group = group,
	};
}

/* A block that can be found; TM_NONE for none. */
static u32 tm_cache_published(const struct tm_cache *cache, u64 tenant,
			      u32 group, const struct tm_hash *hash)
{
	struct tm_prefix_key key = tm_cache_key(tenant, group, hash);

	return tm_prefix_find(&cache->prefix, &key);
}

/* Whether a block of a table, if there is one, can be published as @hash. */
static bool tm_cache_nameable(const struct tm_cache *cache, u32 block,
			      const struct tm_hash *hash)
{
	const struct tm_prefix_block *b;

	if (block == TM_NONE)
		return true;
	b = &cache->prefix.blocks[block];
	return !b->published || (b->key.hash.v[0] == hash->v[0] &&
				 b->key.hash.v[1] == hash->v[1]);
}

static void tm_cache_name(struct tm_cache *cache, u32 block, u32 index,
			  const struct tm_prefix_key *key, struct tm_hash parent)
{
	if (tm_prefix_publish(&cache->prefix, block, key))
		tm_cache_tell(cache, (struct tm_cache_event){
			.type = TM_CACHE_STORED,
			.group = key->group,
			.block = index,
			.tenant = key->tenant,
			.hash = key->hash,
			.parent = parent,
		});
}

/* What the block before @index is found by. */
static struct tm_hash tm_cache_parent(const struct tm_cache *cache, u32 place,
				      u32 index)
{
	for (u32 g = 0; index && g < cache->pool.geo.nr_groups; g++) {
		u32 block = *tm_cache_entry(cache, place, g, index - 1);

		if (block != TM_NONE && cache->prefix.blocks[block].published)
			return cache->prefix.blocks[block].key.hash;
	}
	return (struct tm_hash){ 0 };
}

int tm_cache_publish(struct tm_cache *cache, struct tm_seq_id id, u32 first,
		     const struct tm_hash *hashes, u32 nr, bool evict,
		     struct tm_cache_copies *copies)
{
	u32 place = tm_cache_find(cache, id);
	u32 tokens = cache->pool.geo.block_tokens;
	u32 nr_groups = cache->pool.geo.nr_groups;
	struct tm_cache_need need = { 0 };
	const struct tm_cache_seq *seq;
	struct tm_hash parent;
	bool state[TM_KV_GROUPS];
	int err;

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	seq = &cache->seqs[place];
	if (!nr || (u64)first + nr > seq->length / tokens)
		return -EINVAL;
	for (u32 g = 0; g < nr_groups; g++) {
		state[g] = tm_cache_is_state(cache, g);
		for (u32 i = 0; i < nr && !state[g]; i++) {
			if (!tm_cache_nameable(cache,
					       *tm_cache_entry(cache, place, g,
							       first + i),
					       &hashes[i]))
				return -EINVAL;
			tm_relax();
		}
		/* Again under the same hash is nothing for a state, too. */
		state[g] = state[g] && (first + nr) * tokens == seq->length &&
			   tm_cache_published(cache, seq->tenant, g,
					      &hashes[nr - 1]) == TM_NONE;
		if (state[g])
			tm_cache_need(cache, &need, g, 1);
	}
	if (seq->sealed < first + nr)
		return -EBUSY;
	err = tm_cache_make_room(cache, &need, evict, TM_NONE);
	if (err)
		return err;

	copies->nr = 0;
	parent = tm_cache_parent(cache, place, first);
	for (u32 i = 0; i < nr; i++) {
		for (u32 g = 0; g < nr_groups; g++) {
			struct tm_prefix_key key =
				tm_cache_key(seq->tenant, g, &hashes[i]);
			u32 block = *tm_cache_entry(cache, place, g,
						    first + i);

			if (!tm_cache_is_state(cache, g)) {
				if (block != TM_NONE &&
				    !cache->prefix.blocks[block].published)
					tm_cache_name(cache, block, first + i,
						      &key, parent);
			} else if (state[g] && i == nr - 1) {
				block = tm_cache_new(cache, g);
				tm_cache_copy(cache, copies, g, 0,
					      *tm_cache_entry(cache, place, g,
							      0), block);
				tm_cache_name(cache, block, first + i, &key,
					      parent);
				tm_cache_put(cache, block);
			}
		}
		parent = hashes[i];
		tm_relax();
	}
	return 0;
}

u32 tm_cache_match(const struct tm_cache *cache, u64 tenant,
		   const struct tm_hash *hashes, u32 nr)
{
	u32 tokens = cache->pool.geo.block_tokens;
	u32 hits[TM_KV_GROUPS] = { 0 };
	u32 best = 0;

	tm_assert_sleep_locked(cache->lock);
	if (nr > cache->max_tokens / tokens)
		nr = cache->max_tokens / tokens;
	/* How many hits in a row end here, in each group: enough for what it keeps? */
	for (u32 i = 0; i < nr; i++) {
		bool match = true;

		for (u32 g = 0; g < cache->pool.geo.nr_groups; g++) {
			u32 first, end;

			hits[g]++;
			if (tm_cache_published(cache, tenant, g, &hashes[i]) ==
			    TM_NONE) {
				hits[g] = 0;
				if (cache->pool.geo.group[g].rule ==
				    TM_KV_FULL)
					return best;
			}
			tm_cache_span(cache, g, (i + 1) * tokens, &first, &end);
			match &= hits[g] >= end - first;
		}
		if (match)
			best = i + 1;
		tm_relax();
	}
	return best;
}

int tm_cache_lookup(struct tm_cache *cache, struct tm_seq_id id,
		    const struct tm_hash *hashes, u32 nr, bool evict,
		    u32 *matched, struct tm_cache_copies *copies)
{
	u32 place = tm_cache_find(cache, id);
	u32 nr_groups = cache->pool.geo.nr_groups;
	struct tm_cache_need need = { 0 };
	u32 length, nr_match, first, end;
	struct tm_cache_seq *seq;
	int err;

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	seq = &cache->seqs[place];
	if (!nr || seq->length)
		return -EINVAL;
	nr_match = tm_cache_match(cache, seq->tenant, hashes, nr);
	length = nr_match * cache->pool.geo.block_tokens;

	/* What is hit is in use from here on, and so no victim; a state for a moment. */
	for (u32 g = 0; g < nr_groups; g++) {
		bool state = tm_cache_is_state(cache, g);

		tm_cache_span(cache, g, length, &first, &end);
		for (u32 i = first; i < end; i++) {
			u32 block = tm_cache_published(cache, seq->tenant, g,
						       &hashes[state ?
							       nr_match - 1 :
							       i]);

			tm_cache_get(cache, block);
			*tm_cache_entry(cache, place, g, i) = block;
			if (state)
				tm_cache_need(cache, &need, g, 1);
			tm_relax();
		}
	}
	err = tm_cache_make_room(cache, &need, evict, TM_NONE);
	for (u32 g = nr_groups; err && g--;) {
		tm_cache_span(cache, g, length, &first, &end);
		while (end-- > first) {
			u32 *entry = tm_cache_entry(cache, place, g, end);

			tm_cache_unget(cache, *entry);
			*entry = TM_NONE;
			tm_relax();
		}
	}
	if (err)
		return err;

	copies->nr = 0;
	for (u32 g = 0; g < nr_groups && length; g++) {
		u32 *entry = tm_cache_entry(cache, place, g, 0);
		u32 from = *entry;

		if (!tm_cache_is_state(cache, g))
			continue;
		*entry = tm_cache_new(cache, g);
		tm_cache_copy(cache, copies, g, 0, from, *entry);
		tm_cache_put(cache, from);
	}
	seq->length = length;
	seq->sealed = nr_match;
	*matched = nr_match;
	cache->stats.lookups += nr;
	cache->stats.hits += nr_match;
	return 0;
}

/*
 * What each group has to have to adopt a block at @index, after which @length tokens
 * are there: TM_NONE for nothing. Return: 0, -EINVAL, -ENODATA.
 */
static int tm_cache_adoptable(const struct tm_cache *cache, u32 place, u32 index,
			      const struct tm_hash *hash, u32 tokens, u32 length,
			      u32 *from)
{
	u32 block_tokens = cache->pool.geo.block_tokens;
	u64 tenant = cache->seqs[place].tenant;
	bool at_end = index == (length - 1) / block_tokens;
	int err = 0;

	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++) {
		u32 first, end;

		from[g] = TM_NONE;
		tm_cache_span(cache, g, length, &first, &end);
		if (tm_cache_is_state(cache, g)) {
			/* It is the one after the block's last token. */
			if (tokens < block_tokens)
				return -EINVAL;
			if (!at_end)
				continue;
		} else if (index < first) {
			continue;
		}
		from[g] = tm_cache_published(cache, tenant, g, hash);
		if (from[g] == TM_NONE)
			err = -ENODATA;
	}
	return err;
}

/* Whether a sequence has a block that a state can be copied to. */
static bool tm_cache_has_whole_state(const struct tm_cache *cache, u32 place,
				     u32 group)
{
	u32 block = *tm_cache_entry(cache, place, group, 0);

	return block != TM_NONE && !tm_cache_lost_pages(cache, block);
}

int tm_cache_adopt(struct tm_cache *cache, struct tm_seq_id id, u32 index,
		   const struct tm_hash *hash, u32 tokens, bool evict,
		   struct tm_cache_copies *copies)
{
	u32 place = tm_cache_find(cache, id);
	u32 nr_groups = cache->pool.geo.nr_groups;
	u32 block_tokens = cache->pool.geo.block_tokens;
	struct tm_cache_need need = { 0 };
	u32 from[TM_KV_GROUPS];
	u32 length;
	int err;

	tm_assert_sleep_locked(cache->lock);
	if (place == TM_NONE)
		return -ENOENT;
	length = cache->seqs[place].length;
	if (!tokens || tokens > block_tokens)
		return -EINVAL;
	if (index == length / block_tokens && !(length % block_tokens)) {
		if (tokens > cache->max_tokens - length)
			return -ERANGE;
		length += tokens;
	} else if (index >= length / block_tokens || tokens < block_tokens) {
		return -EINVAL;
	}
	err = tm_cache_adoptable(cache, place, index, hash, tokens, length,
				 from);
	if (err)
		return err;
	/* In use from here on, and so no victim; what is copied for a moment. */
	for (u32 g = 0; g < nr_groups; g++) {
		if (from[g] == TM_NONE)
			continue;
		tm_cache_get(cache, from[g]);
		if (tm_cache_is_state(cache, g) ?
		    !tm_cache_has_whole_state(cache, place, g) :
		    tokens < block_tokens)
			tm_cache_need(cache, &need, g, 1);
	}
	err = tm_cache_make_room(cache, &need, evict, TM_NONE);
	/* Memory is needed at the end only, where every group adopts. */
	for (u32 g = nr_groups; err && g--;)
		tm_cache_unget(cache, from[g]);
	if (err)
		return err;

	tm_cache_leave(cache, place, length);
	cache->seqs[place].length = length;
	copies->nr = 0;
	for (u32 g = 0; g < nr_groups; g++) {
		bool state = tm_cache_is_state(cache, g);
		u32 at = state ? 0 : index;
		u32 *entry = tm_cache_entry(cache, place, g, at);
		u32 old = *entry;

		if (from[g] == TM_NONE)
			continue;
		if (!state && tokens == block_tokens) {
			*entry = from[g];
		} else {
			if (state && tm_cache_has_whole_state(cache, place, g))
				old = TM_NONE;
			else
				*entry = tm_cache_new(cache, g);
			tm_cache_copy(cache, copies, g, at, from[g], *entry);
			tm_cache_put(cache, from[g]);
		}
		if (old != TM_NONE)
			tm_cache_put(cache, old);
	}
	return 0;
}

int tm_cache_reset(struct tm_cache *cache)
{
	u32 used = 0;

	tm_assert_sleep_locked(cache->lock);
	for (u32 g = 0; g < cache->pool.geo.nr_groups; g++)
		used += cache->pool.used[g];
	if (used > cache->prefix.cached)
		return -EBUSY;
	while (cache->prefix.oldest != TM_NONE)
		tm_cache_discard(cache, cache->prefix.oldest);
	tm_cache_tell(cache, (struct tm_cache_event){
		.type = TM_CACHE_CLEARED,
	});
	return 0;
}

int tm_cache_packable(const struct tm_cache *cache, u32 place, u32 group,
		      u32 index, struct tm_kv_block *block)
{
	struct tm_kv_block b = { tm_cache_at(cache, place, group, index) };

	tm_assert_sleep_locked(cache->lock);
	if (b.v == TM_NONE || tm_prefix_refs(&cache->prefix, b.v) > 1 ||
	    tm_cache_packed(cache, b))
		return -ENOENT;
	/* The next token goes there. */
	if (!tm_cache_is_state(cache, group) &&
	    index == tm_cache_seq(cache, place)->length /
		     cache->pool.geo.block_tokens)
		return -ENOENT;
	*block = b;
	return 0;
}

int tm_cache_pack(struct tm_cache *cache, struct tm_kv_block block, u32 pages)
{
	u32 had = tm_kv_pages(&cache->pool, block);

	tm_assert_sleep_locked(cache->lock);
	if (tm_cache_packed(cache, block) ||
	    tm_kv_shrink(&cache->pool, block, pages))
		return -EINVAL;
	if (tm_cache_cached(cache, block.v))
		cache->cached_pages -= had - pages;
	cache->packed++;
	cache->packed_pages += pages;
	cache->unpacked_pages += had;
	cache->stats.packs++;
	return 0;
}

int tm_cache_unpack(struct tm_cache *cache, struct tm_kv_block block,
		    bool evict)
{
	struct tm_cache_need need = { 0 };
	int err;

	tm_assert_sleep_locked(cache->lock);
	if (!tm_cache_packed(cache, block))
		return -EINVAL;
	need.pages = tm_cache_lost_pages(cache, block.v);
	err = tm_cache_make_room(cache, &need, evict, block.v);
	if (err)
		return err;
	if (tm_cache_cached(cache, block.v))
		cache->cached_pages += need.pages;
	tm_cache_count_unpacked(cache, block.v);
	tm_warn_on(tm_kv_regrow(&cache->pool, block));
	cache->stats.unpacks++;
	return 0;
}
