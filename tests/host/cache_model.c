// SPDX-License-Identifier: GPL-2.0-only
#include <stdlib.h>

#include "cache_model.h"
#include "kv_model.h"

/* Errors that a call may give, where several apply. */
struct wants {
	int err[8];
	u32 nr;
};

static void want(struct wants *w, int err)
{
	w->err[w->nr++] = err;
}

struct tm_kv_group cache_full(struct tm_geometry g, u32 tokens, u32 planes,
			      u32 plane_pages)
{
	return (struct tm_kv_group){
		TM_KV_FULL, planes, (plane_pages << g.page_shift) / tokens, 0
	};
}

struct tm_kv_group cache_window(struct tm_geometry g, u32 tokens, u32 planes,
				u32 plane_pages, u32 window)
{
	return (struct tm_kv_group){
		TM_KV_WINDOW, planes, (plane_pages << g.page_shift) / tokens,
		window
	};
}

struct tm_kv_group cache_state(struct tm_geometry g, u32 planes,
			       u32 plane_pages)
{
	return (struct tm_kv_group){
		TM_KV_STATE, planes, plane_pages << g.page_shift, 0
	};
}

static bool is_state(const struct cache_model *m, u32 group)
{
	return m->geo.group[group].rule == TM_KV_STATE;
}

static bool has_state(const struct cache_model *m)
{
	for (u32 g = 0; g < m->geo.nr_groups; g++)
		if (is_state(m, g))
			return true;
	return false;
}

/* The blocks that @tokens need, token by token. */
static void span(const struct cache_model *m, u32 group, u32 tokens, u32 *first,
		 u32 *end)
{
	const struct tm_kv_group *rule = &m->geo.group[group];

	*first = 0;
	*end = 0;
	if (!tokens)
		return;
	*end = is_state(m, group) ? 1 : (tokens - 1) / m->geo.block_tokens + 1;
	if (rule->rule == TM_KV_WINDOW && tokens > rule->window)
		*first = (tokens - rule->window) / m->geo.block_tokens;
}

static u32 chunk_pages(const struct cache_model *m)
{
	return tm_chunk_pages(m->geo.pages);
}

u32 cache_nr_chunks(const struct cache_model *m)
{
	u32 n = 0;

	for (u32 i = 0; i < CACHE_CHUNKS; i++)
		n += m->in_pool[i];
	return n;
}

u32 cache_free_pages(const struct cache_model *m)
{
	return cache_nr_chunks(m) * chunk_pages(m) - m->used_pages - m->moving;
}

u32 cache_refs(const struct cache_model *m, u32 block)
{
	return m->block[block].refs;
}

u32 cache_place(const struct cache_model *m, const struct cache_model_seq *s)
{
	return (u32)(s - m->seq);
}

struct cache_model_seq *cache_seq(struct cache_model *m, struct tm_seq_id id)
{
	for (u32 i = 0; i < m->max_seqs; i++)
		if (m->seq[i].open && m->seq[i].id.v == id.v)
			return &m->seq[i];
	return NULL;
}

u32 cache_nr_full(const struct cache_model *m, const struct cache_model_seq *s)
{
	return s->length / m->geo.block_tokens;
}

/* What lies in a page. */
static u32 *page_at(struct cache_model *m, struct tm_page_id page)
{
	u32 i = 0, v = tm_page_chunk(m->geo.pages, page).v;

	while (i < CACHE_CHUNKS - 1 && kv_model_id(i).v != v)
		i++;
	CHECK_EQ(kv_model_id(i).v, v);
	CHECK(m->in_pool[i]);
	return m->memory[(i << TM_MAX_CHUNK_ORDER) |
			 tm_page_index(m->geo.pages, page)];
}

static u32 *block_page(struct cache_model *m, u32 block, u32 i)
{
	struct tm_page_id page;

	CHECK_EQ(tm_kv_page(&m->cache.pool, (struct tm_kv_block){ block }, i,
			    &page), 0);
	return page_at(m, page);
}

/* What stands in page @page of a packed block. */
static void pack_mark(const u32 *aside, u32 page, u32 *mark)
{
	struct tm_rng rng = { page };

	for (u32 i = 0; i < CACHE_DATA; i++)
		rng.state = rng.state * 31 + aside[i];
	for (u32 w = 0; w < CACHE_WORDS; w++)
		mark[w] = (u32)tm_rand(&rng);
}

static const u32 *packed_contents(struct cache_model *m, u32 block)
{
	struct cache_model_block *b = &m->block[block];

	for (u32 p = 0; p < b->pages; p++) {
		u32 mark[CACHE_WORDS];

		pack_mark(b->aside, p, mark);
		CHECK(!memcmp(block_page(m, block, p), mark, sizeof(mark)));
	}
	return b->aside;
}

static void put_contents(struct cache_model *m, u32 block, const u32 *data)
{
	u32 pages = m->geo.block_pages[m->block[block].group];

	for (u32 p = 0; p < pages; p++)
		memcpy(block_page(m, block, p), &data[p * CACHE_WORDS],
		       CACHE_WORDS * sizeof(*data));
}

static void get_contents(struct cache_model *m, u32 block, u32 *data)
{
	u32 pages = m->geo.block_pages[m->block[block].group];

	if (m->block[block].packed) {
		memcpy(data, packed_contents(m, block),
		       CACHE_DATA * sizeof(*data));
		return;
	}
	memset(data, 0, CACHE_DATA * sizeof(*data));
	for (u32 p = 0; p < pages; p++)
		memcpy(&data[p * CACHE_WORDS], block_page(m, block, p),
		       CACHE_WORDS * sizeof(*data));
}

/* Mappings */

static void unmap(struct cache_model_seq *s, u32 group, u32 index)
{
	if (!s->mapped[group][index])
		return;
	s->mapped[group][index] = 0;
	memset(s->map[group][index], CACHE_UNMAPPED,
	       sizeof(s->map[group][index]));
}

/* What another length drops is what is there now and would not be then. */
static void check_leaving(struct cache_model *m, struct cache_model_seq *s,
			  u32 group, u32 length, u32 *first, u32 *end)
{
	u32 then_first, then_end;

	tm_cache_leaving(&m->cache, cache_place(m, s), group, length, first,
			 end);
	span(m, group, length, &then_first, &then_end);
	CHECK(*first <= *end && *end <= m->max_blocks);
	for (u32 i = 0; i < m->max_blocks; i++)
		CHECK_EQ(s->block[group][i] != TM_NONE &&
			 (i < then_first || i >= then_end),
			 i >= *first && i < *end);
}

static void unmap_leaving(struct cache_model *m, struct cache_model_seq *s,
			  u32 length)
{
	for (u32 g = 0; g < m->geo.nr_groups; g++) {
		u32 first, end;

		check_leaving(m, s, g, length, &first, &end);
		for (; first < end; first++)
			unmap(s, g, first);
	}
}

static void map(struct cache_model_seq *s, const struct tm_cache_page *page,
		u32 group, u32 index, enum cache_map how)
{
	u8 *was = &s->map[group][index][page->index];

	s->mapped[group][index] += *was == CACHE_UNMAPPED;
	*was = how;
	s->at[group][index][page->index] = page->page;
}

/* The parts of an operation */

static void begin(struct cache_model *m)
{
	m->nr_victims = 0;
	m->nr_released = 0;
	m->nr_told = 0;
}

static void tell(struct cache_model *m, enum tm_cache_event_type type,
		 const struct tm_prefix_key *key, u32 index,
		 struct tm_hash parent)
{
	m->told[m->nr_told++] = (struct tm_cache_event){
		.type = type,
		.group = key->group,
		.block = index,
		.tenant = key->tenant,
		.hash = key->hash,
		.parent = parent,
	};
}

static void lru_remove(struct cache_model *m, u32 block)
{
	u32 i = 0;

	while (m->lru[i] != block) {
		i++;
		CHECK(i < m->nr_lru);
	}
	m->nr_lru--;
	memmove(&m->lru[i], &m->lru[i + 1],
		(m->nr_lru - i) * sizeof(*m->lru));
}

static void release(struct cache_model *m, u32 block, u32 place, u32 index)
{
	m->released[m->nr_released++] = (struct cache_released){
		block, place, index
	};
}

/* A cached block was of use, though it stays where it is. */
static void used_again(struct cache_model *m, u32 block)
{
	if (m->block[block].refs)
		return;
	lru_remove(m, block);
	release(m, block, TM_NONE, 0);
}

static void free_block(struct cache_model *m, u32 block)
{
	struct cache_model_block *b = &m->block[block];

	m->used_pages -= b->pages;
	m->nr_used--;
	if (m->moving && m->move.block.v == block)
		m->move_counts = false;
	b->used = false;
	b->published = false;
	b->packed = false;
}

static void take(struct cache_model *m, u32 block, u32 group)
{
	struct cache_model_block *b = &m->block[block];

	CHECK(block < m->cache.pool.nr_blocks);
	CHECK(!b->used);
	CHECK_EQ(m->cache.pool.blocks[block].group, group);
	b->used = true;
	b->group = group;
	b->pages = m->geo.block_pages[group];
	b->refs = 0;
	m->used_pages += b->pages;
	m->nr_used++;
}

static void get(struct cache_model *m, u32 block)
{
	if (m->block[block].published && !m->block[block].refs)
		lru_remove(m, block);
	m->block[block].refs++;
}

static void put(struct cache_model *m, u32 block, u32 place, u32 index)
{
	if (--m->block[block].refs)
		return;
	if (m->block[block].published)
		release(m, block, place, index);
	else
		free_block(m, block);
}

/* Put @block, or none, where @s has another one or none. */
static void set(struct cache_model *m, struct cache_model_seq *s, u32 group,
		u32 index, u32 block)
{
	u32 old = s->block[group][index];

	if (block != TM_NONE)
		get(m, block);
	s->block[group][index] = block;
	if (old == TM_NONE)
		return;
	/* What is replaced is of no sequence's end. */
	put(m, old, block == TM_NONE ? cache_place(m, s) : TM_NONE, index);
}

static bool among(u32 block, const u32 *blocks, u32 nr)
{
	for (u32 i = 0; i < nr; i++)
		if (blocks[i] == block)
			return true;
	return false;
}

/*
 * Whether there is room for @need pages in @blocks blocks, and who has to go for it: the
 * oldest, none of @keep.
 */
static int room(struct cache_model *m, u32 need, u32 blocks, bool evict,
		const u32 *keep, u32 nr_keep)
{
	u32 free = cache_free_pages(m);
	u32 unused = m->cache.pool.nr_blocks - m->nr_used;

	m->nr_victims = 0;
	if (need <= free && blocks <= unused)
		return 0;
	m->wanting = need <= free ? 0 : (need - free - 1) / chunk_pages(m) + 1;
	if (blocks > unused)
		m->wanting = TM_KV_NEVER;
	for (u32 i = 0; evict && (free < need || unused < blocks) &&
	     i < m->nr_lru; i++) {
		if (among(m->lru[i], keep, nr_keep))
			continue;
		m->victims[m->nr_victims++] = m->lru[i];
		free += m->block[m->lru[i]].pages;
		unused++;
	}
	if (need <= free && blocks <= unused)
		return 0;
	m->nr_victims = 0;
	return -ENOMEM;
}

static bool key_is(const struct tm_prefix_key *a, const struct tm_prefix_key *b)
{
	return a->hash.v[0] == b->hash.v[0] && a->hash.v[1] == b->hash.v[1] &&
	       a->tenant == b->tenant && a->group == b->group;
}

static u32 nr_of_key(const struct cache_model *m,
		     const struct tm_prefix_key *key)
{
	u32 nr = 0;

	for (u32 i = 0; i < m->cache.pool.nr_blocks; i++)
		nr += m->block[i].published && key_is(&m->block[i].key, key);
	return nr;
}

static void forget_victims(struct cache_model *m)
{
	for (u32 i = 0; i < m->nr_victims; i++) {
		u32 block = m->victims[i];

		lru_remove(m, block);
		if (nr_of_key(m, &m->block[block].key) == 1)
			tell(m, TM_CACHE_REMOVED, &m->block[block].key, 0,
			     (struct tm_hash){ { 0, 0 } });
		free_block(m, block);
		m->stats.evictions++;
	}
}

/* The block that the cache has there now, a new one. */
static u32 new_block(struct cache_model *m, const struct cache_model_seq *s,
		     u32 group, u32 index)
{
	u32 block = m->cache.tables[(cache_place(m, s) * m->geo.nr_groups +
				     group) * m->max_blocks + index];

	take(m, block, group);
	return block;
}

static void zero(struct cache_model *m, struct cache_model_seq *s, u32 group,
		 u32 index)
{
	memset(s->data[group][index], 0, sizeof(s->data[group][index]));
	put_contents(m, s->block[group][index], s->data[group][index]);
}

/* A copy has to be asked for from @from. Return: to where. */
static u32 copy_to(const struct tm_cache_copies *copies, u32 group, u32 index,
		   u32 from)
{
	for (u32 i = 0; i < copies->nr; i++) {
		if (copies->copy[i].group != group)
			continue;
		CHECK_EQ(copies->copy[i].index, index);
		CHECK_EQ(copies->copy[i].from.v, from);
		return copies->copy[i].to.v;
	}
	tm_test_fail(__FILE__, __LINE__, "no copy of group %u", group);
}

static void carry_out(struct cache_model *m,
		      const struct tm_cache_copies *copies)
{
	u32 data[CACHE_DATA];

	for (u32 i = 0; i < copies->nr; i++) {
		get_contents(m, copies->copy[i].from.v, data);
		put_contents(m, copies->copy[i].to.v, data);
	}
	m->stats.copies += copies->nr;
}

static bool hash_is(const struct tm_hash *a, const struct tm_hash *b)
{
	return a->v[0] == b->v[0] && a->v[1] == b->v[1];
}

static bool event_is(const struct tm_cache_event *a,
		     const struct tm_cache_event *b)
{
	if (a->type != b->type)
		return false;
	if (a->type == TM_CACHE_CLEARED)
		return true;
	if (a->group != b->group || a->tenant != b->tenant ||
	    !hash_is(&a->hash, &b->hash))
		return false;
	return a->type == TM_CACHE_REMOVED ||
	       (a->block == b->block && hash_is(&a->parent, &b->parent));
}

/*
 * Whether the events there are now are those told: of what is stored each group's in
 * order, of what is removed all.
 */
static void check_events(struct cache_model *m)
{
	const struct tm_cache *cache = &m->cache;
	u32 kept = m->nr_told < m->nr_events ? m->nr_told : m->nr_events;
	bool seen[CACHE_POOL] = { false };

	if (!m->nr_events)
		return;
	for (u32 n = kept; n; n--) {
		const struct tm_cache_event *e =
			&cache->events[(cache->event_head - n) %
				       m->nr_events];
		u32 i = 0;

		for (; i < m->nr_told; i++) {
			const struct tm_cache_event *t = &m->told[i];

			if (seen[i] || t->type != e->type ||
			    (t->type == TM_CACHE_STORED &&
			     t->group != e->group))
				continue;
			/* Which come first is not known of more than fit. */
			if (kept == m->nr_told)
				CHECK(event_is(e, t));
			if (event_is(e, t))
				break;
		}
		CHECK(i < m->nr_told);
		seen[i] = true;
		if (m->nr_unread == m->nr_events) {
			m->nr_unread--;
			memmove(m->event, m->event + 1,
				m->nr_unread * sizeof(*m->event));
			m->stats.events_lost++;
		}
		m->event[m->nr_unread++] = *e;
	}
	m->stats.events_lost += m->nr_told - kept;
	CHECK_EQ(cache->event_head - cache->event_tail, m->nr_unread);
}

/* Whether the order of eviction is what it was, and then those just let go. */
static void check_order(struct cache_model *m)
{
	const struct tm_prefix *prefix = &m->cache.prefix;
	u32 last[CACHE_SEQS], nr = 0, older = TM_NONE;

	memset(last, 0xff, sizeof(last));
	CHECK_EQ(prefix->cached, m->nr_lru + m->nr_released);
	for (u32 b = prefix->oldest; b != TM_NONE;
	     b = prefix->blocks[b].newer) {
		CHECK(nr < prefix->cached);
		CHECK_EQ(prefix->blocks[b].older, older);
		older = b;
		if (nr < m->nr_lru) {
			CHECK_EQ(b, m->lru[nr]);
		} else {
			u32 i = 0;

			while (i < m->nr_released && m->released[i].block != b)
				i++;
			CHECK(i < m->nr_released);
			m->released[i].block = TM_NONE;
			if (m->released[i].place != TM_NONE) {
				u32 *before = &last[m->released[i].place];

				CHECK(m->released[i].index <= *before);
				*before = m->released[i].index;
			}
			m->lru[nr] = b;
		}
		nr++;
	}
	CHECK_EQ(nr, prefix->cached);
	CHECK_EQ(prefix->newest, older);
	m->nr_lru = nr;
}

static void finish(struct cache_model *m)
{
	check_events(m);
	check_order(m);
	cache_compare(m);
}

static struct {
	struct tm_cache cache;
	size_t size;
	unsigned char bytes[CACHE_SNAPSHOT];
} before;

/* Call @fn for each table of the cache. */
static bool each_table(const struct tm_cache *cache,
		       bool (*fn)(size_t at, const void *table, size_t size))
{
	const struct tm_kv_pool *pool = &cache->pool;
	const struct {
		const void *table;
		size_t size;
	} tables[] = {
		{ pool->chunks, pool->nr_slots * sizeof(*pool->chunks) },
		{ pool->links, ((size_t)pool->nr_slots <<
				pool->geo.pages.chunk_order) *
				sizeof(*pool->links) },
		{ pool->blocks, pool->nr_blocks * sizeof(*pool->blocks) },
		{ pool->marks, pool->nr_marks * sizeof(*pool->marks) },
		{ cache->prefix.blocks, cache->prefix.nr_blocks *
		  sizeof(*cache->prefix.blocks) },
		{ cache->prefix.buckets, cache->prefix.nr_blocks *
		  sizeof(*cache->prefix.buckets) },
		{ cache->seqs, cache->max_seqs * sizeof(*cache->seqs) },
		{ cache->tables, (size_t)cache->max_seqs * pool->geo.nr_groups *
		  cache->max_blocks * sizeof(*cache->tables) },
		{ cache->events, cache->nr_events * sizeof(*cache->events) },
	};
	size_t at = 0;

	for (u32 i = 0; i < sizeof(tables) / sizeof(*tables); i++) {
		if (tables[i].size && !fn(at, tables[i].table, tables[i].size))
			return false;
		at += tables[i].size;
	}
	return true;
}

static bool remember_table(size_t at, const void *table, size_t size)
{
	CHECK(at + size <= sizeof(before.bytes));
	memcpy(before.bytes + at, table, size);
	return true;
}

static bool same_table(size_t at, const void *table, size_t size)
{
	return !memcmp(before.bytes + at, table, size);
}

void cache_remember(const struct tm_cache *cache)
{
	memcpy(&before.cache, cache, sizeof(*cache));
	each_table(cache, remember_table);
}

bool cache_unchanged(const struct tm_cache *cache)
{
	before.cache.wanting = cache->wanting;
	return !memcmp(&before.cache, cache, sizeof(*cache)) &&
	       each_table(cache, same_table);
}

/* Whether the call was refused, as it had to be. */
static bool refused(struct cache_model *m, const struct wants *w, int err)
{
	bool wanted = false;

	if (!w->nr) {
		CHECK_EQ(err, 0);
		return false;
	}
	for (u32 i = 0; i < w->nr; i++)
		wanted |= err == w->err[i];
	if (!wanted)
		CHECK_EQ(err, w->err[0]);
	CHECK(cache_unchanged(&m->cache));
	if (err == -ENOMEM)
		CHECK_EQ(m->cache.wanting, m->wanting);
	return true;
}

static void expect(struct cache_model *m, const struct wants *w)
{
	if (w->nr)
		cache_remember(&m->cache);
}

/* Comparison */

static void compare_blocks(struct cache_model *m)
{
	const struct tm_cache *cache = &m->cache;
	u32 used[TM_KV_GROUPS] = { 0 }, nr = 0, published = 0, packed = 0;
	u64 packed_pages = 0, unpacked_pages = 0, evictable = 0;

	for (u32 i = 0; i < cache->pool.nr_blocks; i++) {
		const struct tm_prefix_block *p = &cache->prefix.blocks[i];
		const struct cache_model_block *b = &m->block[i];
		struct tm_kv_block block = { i };

		if (!b->used) {
			CHECK_EQ(cache->pool.blocks[i].group, TM_NONE);
			CHECK(!p->published && !p->refs);
			continue;
		}
		nr++;
		used[b->group]++;
		CHECK_EQ(cache->pool.blocks[i].group, b->group);
		CHECK_EQ(cache->pool.blocks[i].pages, b->pages);
		CHECK_EQ(p->refs, b->refs);
		CHECK_EQ(p->published, b->published);
		CHECK_EQ(tm_cache_shared(cache, block),
			 b->published || b->refs > 1);
		CHECK_EQ(tm_cache_packed(cache, block), b->packed);
		if (b->published) {
			published++;
			CHECK(key_is(&p->key, &b->key));
			evictable += b->refs ? 0 : b->pages;
		}
		if (b->packed) {
			packed++;
			packed_pages += b->pages;
			unpacked_pages += m->geo.block_pages[b->group];
		}
	}
	CHECK(!memcmp(used, cache->pool.used, sizeof(used)));
	CHECK_EQ(cache->pool.allocs - cache->pool.frees, nr);
	CHECK_EQ(cache->pool.free_pages, cache_free_pages(m));
	CHECK_EQ(cache->pool.nr_chunks, cache_nr_chunks(m));
	CHECK_EQ(cache->prefix.published, published);
	CHECK_EQ(cache->packed, packed);
	CHECK_EQ(cache->packed_pages, packed_pages);
	CHECK_EQ(cache->unpacked_pages, unpacked_pages);
	CHECK_EQ(tm_cache_evictable(cache), evictable);
}

static void compare_stats(const struct cache_model *m)
{
	const struct tm_cache_stats *s = &m->cache.stats;

	CHECK_EQ(s->lookups, m->stats.lookups);
	CHECK_EQ(s->hits, m->stats.hits);
	CHECK_EQ(s->copies, m->stats.copies);
	CHECK_EQ(s->evictions, m->stats.evictions);
	CHECK_EQ(s->packs, m->stats.packs);
	CHECK_EQ(s->unpacks, m->stats.unpacks);
	CHECK_EQ(s->events_lost, m->stats.events_lost);
}

/*
 * What is said of many pages at a time is what is said of each. From page @at of a plane
 * on, in turn another one.
 */
static void compare_run(struct cache_model *m, struct cache_model_seq *s,
			u32 group, u32 index, u32 plane, u32 at)
{
	u32 pages = m->geo.plane_pages[group], place = cache_place(m, s);
	u32 max = 1 + m->compared % (pages + 1), left = pages - at;
	struct tm_cache_run run = { .index = TM_NONE };
	struct tm_cache_page page;
	struct tm_page_id id;
	int err;

	err = tm_cache_pages(&m->cache, place, group, plane,
			     index * pages + at, max, &run);
	CHECK_EQ(run.nr, left < max ? left : max);
	CHECK_EQ(tm_cache_page(&m->cache, place, group, plane,
			       index * pages + at, &page), err);
	if (err == -ENOENT) {
		CHECK_EQ(run.index, TM_NONE);
		return;
	}
	CHECK_EQ(run.block.v, page.block.v);
	CHECK_EQ(run.index, page.index);
	if (err)
		return;
	CHECK_EQ(run.writable, page.writable);
	/* On to the end of the block, through the planes after this one. */
	for (u32 n = run.index; n < m->geo.block_pages[group]; n++) {
		CHECK(tm_kv_walk_next(&m->cache.pool, &run.walk, &id));
		CHECK_EQ(tm_cache_page(&m->cache, place, group, n / pages,
				       index * pages + n % pages, &page), 0);
		CHECK_EQ(id.v, page.page.v);
	}
	CHECK(!tm_kv_walk_next(&m->cache.pool, &run.walk, &id));
}

/* Every page of a block, as the sequence sees it; and its mappings. */
static void compare_contents(struct cache_model *m, struct cache_model_seq *s,
			     u32 group, u32 index)
{
	struct cache_model_block *b = &m->block[s->block[group][index]];
	u32 plane_pages = m->geo.plane_pages[group];
	bool writable = b->refs == 1 && !b->published &&
			(is_state(m, group) || index >= s->sealed);
	u32 n = 0, mapped = 0;

	if (b->packed) {
		CHECK(!memcmp(packed_contents(m, s->block[group][index]),
			      s->data[group][index],
			      sizeof(s->data[group][index])));
		CHECK_EQ(s->mapped[group][index], 0);
	}
	for (u32 plane = 0; plane < m->geo.group[group].planes; plane++)
		for (u32 p = 0; p < plane_pages; p++, n++) {
			enum cache_map how = s->map[group][index][n];
			struct tm_cache_page page = { .index = TM_NONE };

			CHECK_EQ(tm_cache_page(&m->cache, cache_place(m, s),
					       group, plane,
					       index * plane_pages + p, &page),
				 b->packed ? -EAGAIN : 0);
			CHECK_EQ(page.block.v, s->block[group][index]);
			CHECK_EQ(page.index, n);
			if (b->packed)
				continue;
			CHECK_EQ(page.writable, writable);
			CHECK(!memcmp(page_at(m, page.page),
				      &s->data[group][index][n * CACHE_WORDS],
				      CACHE_WORDS * sizeof(u32)));
			if (how == CACHE_UNMAPPED)
				continue;
			mapped++;
			CHECK_EQ(s->at[group][index][n].v, page.page.v);
			CHECK(how == CACHE_READ || writable);
		}
	n = m->compared % n;
	compare_run(m, s, group, index, n / plane_pages, n % plane_pages);
	CHECK_EQ(s->mapped[group][index], mapped);
}

static void compare_seq(struct cache_model *m, u32 place, u32 *refs)
{
	const struct tm_cache_seq *c = tm_cache_seq(&m->cache, place);
	struct cache_model_seq *s = &m->seq[place];
	u32 first, end;

	CHECK_EQ(c->open, s->open);
	CHECK(!c->pending);
	if (s->open) {
		CHECK_EQ(s->id.v, place | (u32)c->generation << 16);
		CHECK_EQ(tm_cache_find(&m->cache, s->id), place);
		CHECK_EQ(c->tenant, s->tenant);
		CHECK_EQ(c->length, s->length);
		CHECK_EQ(c->sealed, s->sealed);
	}
	for (u32 g = 0; g < m->geo.nr_groups; g++) {
		const u32 *table = &m->cache.tables[
			(place * m->geo.nr_groups + g) * m->max_blocks];

		CHECK(!memcmp(table, s->block[g],
			      m->max_blocks * sizeof(*table)));
		if (s->open)
			check_leaving(m, s, g, m->compared %
				      (m->max_tokens + 1), &first, &end);
		span(m, g, s->open ? s->length : 0, &first, &end);
		for (u32 i = 0; i < m->max_blocks; i++) {
			bool held = i >= first && i < end;

			CHECK_EQ(s->block[g][i] != TM_NONE, held);
			if (!held) {
				CHECK(!s->mapped[g][i]);
				compare_run(m, s, g, i, 0,
					    m->compared % m->geo.plane_pages[g]);
				continue;
			}
			refs[table[i]]++;
			CHECK_EQ(m->block[table[i]].group, g);
			compare_contents(m, s, g, i);
		}
	}
}

/* What nobody has now, but would be found, is what was published. */
static void compare_published(struct cache_model *m, u32 block)
{
	const struct cache_model_block *b = &m->block[block];
	u32 data[CACHE_DATA], in_use = 0, found;

	get_contents(m, block, data);
	CHECK(!memcmp(data, b->data, sizeof(data)));
	for (u32 i = 0; i < m->cache.pool.nr_blocks; i++)
		in_use += m->block[i].published && m->block[i].refs &&
			  key_is(&m->block[i].key, &b->key);
	found = tm_prefix_find(&m->cache.prefix, &b->key);
	CHECK(found != TM_NONE);
	CHECK(key_is(&m->block[found].key, &b->key));
	CHECK(!in_use == !m->block[found].refs);
}

void cache_compare(struct cache_model *m)
{
	u32 refs[CACHE_POOL] = { 0 };

	CHECK_EQ(m->cache.nr_open, m->nr_open);
	for (u32 place = 0; place < m->max_seqs; place++)
		compare_seq(m, place, refs);
	for (u32 i = 0; i < m->cache.pool.nr_blocks; i++)
		CHECK_EQ(m->block[i].used ? m->block[i].refs : 0, refs[i]);
	compare_blocks(m);
	compare_stats(m);
	if (m->compared++ % 16)
		return;
	for (u32 i = 0; i < m->cache.pool.nr_blocks; i++)
		if (m->block[i].published)
			compare_published(m, i);
	CHECK_OK(kv_check(&m->cache.pool));
}

/* Set-up */

void cache_setup(struct cache_model *m, const struct tm_cache_config *config,
		 u32 limit)
{
	memset(m, 0, sizeof(*m));
	m->geo = config->geo;
	m->max_tokens = config->max_tokens;
	m->max_seqs = config->max_seqs;
	m->max_blocks = (config->max_tokens - 1) / config->geo.block_tokens + 1;
	m->limit = limit;
	m->nr_events = config->nr_events;
	CHECK(m->max_seqs <= CACHE_SEQS && m->max_blocks <= CACHE_BLOCKS);
	CHECK(m->geo.nr_groups <= CACHE_GROUPS && limit <= CACHE_CHUNKS);
	CHECK(m->nr_events <= CACHE_EVENTS);
	for (u32 g = 0; g < m->geo.nr_groups; g++)
		CHECK(m->geo.block_pages[g] <= CACHE_PAGES);
	memset(m->seq, 0, sizeof(m->seq));
	for (u32 i = 0; i < CACHE_SEQS; i++)
		memset(m->seq[i].block, 0xff, sizeof(m->seq[i].block));
	CHECK_EQ(tm_cache_init(&m->cache, config, &m->lock), 0);
	CHECK(m->cache.pool.nr_blocks <= CACHE_POOL);
	CHECK_EQ(m->cache.prefix.nr_blocks, m->cache.pool.nr_blocks);
	CHECK_EQ(m->cache.max_blocks, m->max_blocks);
	tm_host_lock(&m->lock);
	cache_compare(m);
}

void cache_teardown(struct cache_model *m)
{
	if (m->moving)
		cache_do_move_end(m, false);
	for (u32 i = 0; i < m->max_seqs; i++)
		if (m->seq[i].open)
			CHECK_EQ(cache_do_close(m, m->seq[i].id), 0);
	CHECK_EQ(cache_do_reset(m), 0);
	while (!cache_do_remove(m))
		;
	CHECK_EQ(m->cache.pool.nr_chunks, 0);
	CHECK_OK(kv_check(&m->cache.pool));
	tm_host_unlock(&m->lock);
	tm_cache_destroy(&m->cache);
	CHECK_EQ(tm_host_tables(), 0);
}

/* The operations */

int cache_do_add(struct cache_model *m)
{
	u32 i = 0;

	if (cache_nr_chunks(m) == m->limit)
		return -ENOSPC;
	while (m->in_pool[i])
		i++;
	CHECK_EQ(tm_kv_add_chunk(&m->cache.pool, kv_model_id(i)), 0);
	m->in_pool[i] = true;
	/* What is there is somebody else's. */
	for (u32 p = 0; p < chunk_pages(m); p++)
		for (u32 w = 0; w < CACHE_WORDS; w++)
			m->memory[(i << TM_MAX_CHUNK_ORDER) | p][w] =
				(u32)tm_rand(&m->rng);
	cache_compare(m);
	return 0;
}

int cache_do_remove(struct cache_model *m)
{
	struct tm_chunk_id id;
	u32 i = 0;

	if (tm_kv_remove_chunk(&m->cache.pool, &id))
		return -ENOENT;
	while (i < CACHE_CHUNKS - 1 && kv_model_id(i).v != id.v)
		i++;
	CHECK_EQ(kv_model_id(i).v, id.v);
	CHECK(m->in_pool[i]);
	m->in_pool[i] = false;
	/* A block that was there still would not be found any more. */
	cache_compare(m);
	return 0;
}

/* A place was taken: the one after the last that is not open. */
static struct cache_model_seq *opened(struct cache_model *m,
				      struct tm_seq_id id, u64 tenant)
{
	struct cache_model_seq *s;

	while (m->seq[m->next].open)
		m->next = (m->next + 1) % m->max_seqs;
	s = &m->seq[m->next];
	CHECK(id.v);
	CHECK_EQ(id.v & 0xffff, m->next);
	CHECK(id.v != s->id.v);
	m->next = (m->next + 1) % m->max_seqs;
	s->open = true;
	s->id = id;
	s->tenant = tenant;
	s->length = 0;
	s->sealed = 0;
	m->nr_open++;
	return s;
}

int cache_do_open(struct cache_model *m, u64 tenant, struct tm_seq_id *id)
{
	struct wants w = { 0 };
	int err;

	begin(m);
	if (m->nr_open == m->max_seqs)
		want(&w, -ENOBUFS);
	expect(m, &w);
	err = tm_cache_open(&m->cache, tenant, id);
	if (refused(m, &w, err))
		return err;
	opened(m, *id, tenant);
	finish(m);
	return 0;
}

/* Let go of the blocks from @first on, the last one first. */
static void drop_from(struct cache_model *m, struct cache_model_seq *s,
		      u32 first)
{
	for (u32 i = m->max_blocks; i-- > first;)
		for (u32 g = 0; g < m->geo.nr_groups; g++)
			if (!is_state(m, g) || !first)
				set(m, s, g, i, TM_NONE);
}

int cache_do_close(struct cache_model *m, struct tm_seq_id id)
{
	struct cache_model_seq *s = cache_seq(m, id);
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!s)
		want(&w, -ENOENT);
	expect(m, &w);
	if (s)
		unmap_leaving(m, s, 0);
	err = tm_cache_close(&m->cache, id);
	if (refused(m, &w, err))
		return err;
	drop_from(m, s, 0);
	s->open = false;
	m->nr_open--;
	finish(m);
	CHECK_EQ(tm_cache_find(&m->cache, id), TM_NONE);
	return 0;
}

/* Whether item @nth's last block is to be copied in @group. */
static bool extend_copies(struct cache_model *m,
			  const struct tm_cache_extend *items, u32 nr, u32 nth,
			  u32 group, u32 *index, bool others)
{
	struct cache_model_seq *s = cache_seq(m, items[nth].id);
	u32 tokens = m->geo.block_tokens, refs, block, first, end, old;

	if (is_state(m, group) || s->length % tokens == 0)
		return false;
	*index = s->length / tokens;
	span(m, group, s->length + items[nth].tokens, &first, &end);
	if (*index < first)
		return false;
	block = s->block[group][*index];
	if (m->block[block].published)
		return true;
	/* Who leaves the block behind has it no more; who has a copy neither. */
	refs = m->block[block].refs;
	for (u32 i = 0; others && i < nr; i++) {
		struct cache_model_seq *o = cache_seq(m, items[i].id);
		u32 last = o->length / tokens;

		span(m, group, o->length, &old, &end);
		span(m, group, o->length + items[i].tokens, &first, &end);
		for (; old < first && old < CACHE_BLOCKS; old++)
			refs -= o->block[group][old] == block;
		refs -= i < nth && o->length % tokens && last >= first &&
			o->block[group][last] == block;
	}
	return refs > 1;
}

/* Room is needed as if each item were the only one. */
static int extend_room(struct cache_model *m,
		       const struct tm_cache_extend *items, u32 nr, bool evict)
{
	u32 need = 0, blocks = 0, first, end, old_first, old_end;

	for (u32 i = 0; i < nr; i++) {
		struct cache_model_seq *s = cache_seq(m, items[i].id);

		for (u32 g = 0; g < m->geo.nr_groups; g++) {
			u32 index, n;

			span(m, g, s->length, &old_first, &old_end);
			span(m, g, s->length + items[i].tokens, &first, &end);
			n = end - (first > old_end ? first : old_end) +
			    extend_copies(m, &items[i], 1, 0, g, &index, false);
			need += n * m->geo.block_pages[g];
			blocks += n;
		}
	}
	return room(m, need, blocks, evict, NULL, 0);
}

/* What is left behind by the new length, and what is to be copied. */
static void extend_unmap(struct cache_model *m,
			 const struct tm_cache_extend *item)
{
	struct cache_model_seq *s = cache_seq(m, item->id);
	u32 last = s->length / m->geo.block_tokens;

	unmap_leaving(m, s, s->length + item->tokens);
	for (u32 g = 0; g < m->geo.nr_groups; g++)
		if (!is_state(m, g) && s->length % m->geo.block_tokens &&
		    tm_cache_shared(&m->cache, (struct tm_kv_block){
				    s->block[g][last] }))
			unmap(s, g, last);
}

/* Let go of what is in no window any more, the last one first. */
static void leave(struct cache_model *m, struct cache_model_seq *s, u32 length)
{
	u32 first, end;

	for (u32 i = m->max_blocks; i--;)
		for (u32 g = 0; g < m->geo.nr_groups; g++) {
			span(m, g, length, &first, &end);
			if (i < first)
				set(m, s, g, i, TM_NONE);
		}
}

static void extended(struct cache_model *m, const struct tm_cache_extend *item,
		     const bool *copy, const u32 *index)
{
	struct cache_model_seq *s = cache_seq(m, item->id);
	u32 copies = 0, first, end, old_first, old_end;

	CHECK_EQ(item->length, s->length);
	for (u32 g = 0; g < m->geo.nr_groups; g++) {
		span(m, g, s->length, &old_first, &old_end);
		span(m, g, s->length + item->tokens, &first, &end);
		for (u32 n = first > old_end ? first : old_end; n < end; n++) {
			set(m, s, g, n, new_block(m, s, g, n));
			zero(m, s, g, n);
		}
		if (copy[g]) {
			u32 to = new_block(m, s, g, index[g]);

			CHECK_EQ(copy_to(&item->copies, g, index[g],
					 s->block[g][index[g]]), to);
			set(m, s, g, index[g], to);
			copies++;
		}
	}
	CHECK_EQ(item->copies.nr, copies);
	s->length += item->tokens;
}

int cache_do_extend_many(struct cache_model *m, struct tm_cache_extend *items,
			 u32 nr, bool evict)
{
	bool copy[CACHE_ITEMS][CACHE_GROUPS] = { { false } };
	u32 index[CACHE_ITEMS][CACHE_GROUPS], bad[CACHE_ITEMS], failed = nr;
	struct wants w = { 0 };
	int err;

	CHECK(nr <= CACHE_ITEMS);
	begin(m);
	for (u32 i = 0; i < nr; i++) {
		struct cache_model_seq *s = cache_seq(m, items[i].id);
		int wrong = 0;

		if (!s)
			wrong = -ENOENT;
		else if (!items[i].tokens)
			wrong = -EINVAL;
		else if (items[i].tokens > m->max_tokens - s->length)
			wrong = -ERANGE;
		for (u32 o = 0; s && o < i; o++)
			if (items[o].id.v == items[i].id.v)
				wrong = -EINVAL;
		if (wrong) {
			bad[w.nr] = i;
			want(&w, wrong);
			break;
		}
	}
	for (u32 i = 0; !w.nr && i < nr; i++)
		if (extend_room(m, items, i + 1, evict)) {
			bad[w.nr] = i;
			want(&w, -ENOMEM);
			CHECK(extend_room(m, items, nr, evict));
		}
	for (u32 i = 0; !w.nr && i < nr; i++) {
		for (u32 g = 0; g < m->geo.nr_groups; g++)
			copy[i][g] = extend_copies(m, items, nr, i, g,
						   &index[i][g], true);
		extend_unmap(m, &items[i]);
	}
	for (u32 i = 0; i < nr; i++)
		items[i].copies.nr = TM_NONE;
	for (u32 i = 0; i < nr; i++)
		items[i].copies.nr = TM_NONE;
	expect(m, &w);
	err = tm_cache_extend(&m->cache, items, nr, evict, &failed);
	if (refused(m, &w, err)) {
		CHECK_EQ(failed, bad[0]);
		return err;
	}
	forget_victims(m);
	for (u32 i = 0; i < nr; i++)
		leave(m, cache_seq(m, items[i].id),
		      items[i].length + items[i].tokens);
	for (u32 i = 0; i < nr; i++)
		extended(m, &items[i], copy[i], index[i]);
	/* No source of a copy is gone, whoever else let go of it. */
	for (u32 i = 0; i < nr; i++)
		carry_out(m, &items[i].copies);
	finish(m);
	return 0;
}

int cache_do_extend(struct cache_model *m, struct tm_seq_id id, u32 tokens,
		    bool evict)
{
	struct tm_cache_extend item = { .id = id, .tokens = tokens };

	return cache_do_extend_many(m, &item, 1, evict);
}

/* Whether a sequence cannot be cut to @length, or forked there. */
static bool no_data(const struct cache_model *m,
		    const struct cache_model_seq *s, u32 length)
{
	for (u32 g = 0; g < m->geo.nr_groups; g++) {
		u32 first, end;

		if (is_state(m, g) && length && length != s->length)
			return true;
		span(m, g, length, &first, &end);
		for (; first < end; first++)
			if (s->block[g][first] == TM_NONE)
				return true;
	}
	return false;
}

int cache_do_truncate(struct cache_model *m, struct tm_seq_id id, u32 length)
{
	struct cache_model_seq *s = cache_seq(m, id);
	u32 tokens = m->geo.block_tokens;
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!s)
		want(&w, -ENOENT);
	else if (length > s->length)
		want(&w, -EINVAL);
	else if (no_data(m, s, length))
		want(&w, -ENODATA);
	expect(m, &w);
	if (!w.nr)
		unmap_leaving(m, s, length);
	err = tm_cache_truncate(&m->cache, id, length);
	if (refused(m, &w, err))
		return err;
	drop_from(m, s, length ? (length - 1) / tokens + 1 : 0);
	s->length = length;
	if (s->sealed > length / tokens)
		s->sealed = length / tokens;
	finish(m);
	return 0;
}

int cache_do_seal(struct cache_model *m, struct tm_seq_id id, u32 index)
{
	struct cache_model_seq *s = cache_seq(m, id);
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!s)
		want(&w, -ENOENT);
	else if (index > cache_nr_full(m, s))
		want(&w, -EINVAL);
	expect(m, &w);
	for (u32 g = 0; !w.nr && g < m->geo.nr_groups; g++)
		for (u32 i = 0; !is_state(m, g) && i < index; i++)
			for (u32 p = 0; p < CACHE_PAGES; p++)
				if (s->map[g][i][p] == CACHE_WRITE)
					s->map[g][i][p] = CACHE_READ;
	err = tm_cache_seal(&m->cache, id, index);
	if (refused(m, &w, err))
		return err;
	if (s->sealed < index)
		s->sealed = index;
	finish(m);
	return 0;
}

int cache_do_fork(struct cache_model *m, struct tm_seq_id id, u32 at,
		  bool evict, struct tm_seq_id *child)
{
	struct cache_model_seq *s = cache_seq(m, id), *c;
	u32 tokens = m->geo.block_tokens, full = at / tokens;
	u32 need = 0, blocks = 0, nr = 0, first, end;
	struct tm_cache_copies copies = { .nr = TM_NONE };
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!s) {
		want(&w, -ENOENT);
	} else if (at > s->length) {
		want(&w, -EINVAL);
	} else {
		if (no_data(m, s, at))
			want(&w, -ENODATA);
		if (full > s->sealed)
			want(&w, -EBUSY);
	}
	if (m->nr_open == m->max_seqs)
		want(&w, -ENOBUFS);
	for (u32 g = 0; !w.nr && at && g < m->geo.nr_groups; g++)
		if (is_state(m, g) || at % tokens) {
			need += m->geo.block_pages[g];
			blocks++;
		}
	if (!w.nr && room(m, need, blocks, evict, NULL, 0))
		want(&w, -ENOMEM);
	expect(m, &w);
	err = tm_cache_fork(&m->cache, id, at, evict, child, &copies);
	if (refused(m, &w, err))
		return err;
	forget_victims(m);
	c = opened(m, *child, s->tenant);
	for (u32 g = 0; g < m->geo.nr_groups; g++) {
		span(m, g, at, &first, &end);
		for (u32 i = first; i < end; i++) {
			u32 block = s->block[g][i];

			if (is_state(m, g) || i == full) {
				u32 to = new_block(m, c, g, i);

				CHECK_EQ(copy_to(&copies, g, i, block), to);
				block = to;
				nr++;
			}
			memcpy(c->data[g][i], s->data[g][i],
			       sizeof(c->data[g][i]));
			set(m, c, g, i, block);
		}
	}
	CHECK_EQ(copies.nr, nr);
	carry_out(m, &copies);
	c->length = at;
	c->sealed = full;
	finish(m);
	return 0;
}

int cache_do_write(struct cache_model *m, u32 place, u32 group, u32 index,
		   bool evict)
{
	struct cache_model_seq *s = &m->seq[place];
	struct tm_cache_copies copies = { .nr = TM_NONE };
	struct wants w = { 0 };
	bool shared = false;
	u32 block = TM_NONE;
	int err;

	begin(m);
	if (s->open && index < m->max_blocks)
		block = s->block[group][index];
	if (block == TM_NONE) {
		want(&w, -ENOENT);
	} else {
		shared = m->block[block].published || m->block[block].refs > 1;
		if (shared && room(m, m->geo.block_pages[group], 1, evict,
				   NULL, 0))
			want(&w, -ENOMEM);
		if (shared)
			unmap(s, group, index);
	}
	expect(m, &w);
	err = tm_cache_write(&m->cache, place, group, index, evict, &copies);
	if (refused(m, &w, err))
		return err;
	forget_victims(m);
	CHECK_EQ(copies.nr, shared);
	if (shared) {
		u32 to = new_block(m, s, group, index);

		CHECK_EQ(copy_to(&copies, group, index, block), to);
		carry_out(m, &copies);
		set(m, s, group, index, to);
	}
	if (!is_state(m, group) && s->sealed > index)
		s->sealed = index;
	finish(m);
	return 0;
}

/* Published blocks of this name, and whether any of them is in use. */
static u32 published(const struct cache_model *m,
		     const struct tm_prefix_key *key, bool *in_use)
{
	u32 nr = 0;

	*in_use = false;
	for (u32 i = 0; i < m->cache.pool.nr_blocks; i++)
		if (m->block[i].published && key_is(&m->block[i].key, key)) {
			*in_use |= m->block[i].refs;
			nr++;
		}
	return nr;
}

/* The block the cache will find, if there is one. */
static u32 choice(const struct cache_model *m, u64 tenant, u32 group,
		  const struct tm_hash *hash)
{
	struct tm_prefix_key key = { *hash, tenant, group };
	bool in_use;
	u32 block;

	block = tm_prefix_find(&m->cache.prefix, &key);
	if (!published(m, &key, &in_use)) {
		CHECK_EQ(block, TM_NONE);
		return TM_NONE;
	}
	CHECK(block < m->cache.pool.nr_blocks);
	CHECK(m->block[block].published && key_is(&m->block[block].key, &key));
	CHECK(!in_use || m->block[block].refs);
	return block;
}

static void publish(struct cache_model *m, u32 block, u64 tenant, u32 group,
		    const struct tm_hash *hash, u32 index,
		    struct tm_hash parent, const u32 *data)
{
	struct cache_model_block *b = &m->block[block];

	b->key = (struct tm_prefix_key){ *hash, tenant, group };
	memcpy(b->data, data, sizeof(b->data));
	if (!nr_of_key(m, &b->key))
		tell(m, TM_CACHE_STORED, &b->key, index, parent);
	b->published = true;
}

int cache_do_publish(struct cache_model *m, struct tm_seq_id id, u32 first,
		     const struct tm_hash *hashes, u32 nr, bool evict)
{
	struct cache_model_seq *s = cache_seq(m, id);
	struct tm_cache_copies copies = { .nr = TM_NONE };
	struct tm_hash parent = { { 0, 0 } };
	u32 need = 0, blocks = 0, end = 0;
	struct wants w = { 0 };
	bool states = false;
	int err;

	begin(m);
	if (!s) {
		want(&w, -ENOENT);
	} else if (!nr || first > cache_nr_full(m, s) ||
		   nr > cache_nr_full(m, s) - first) {
		want(&w, -EINVAL);
	} else {
		end = first + nr;
		states = end * m->geo.block_tokens == s->length;
		if (end > s->sealed)
			want(&w, -EBUSY);
	}
	for (u32 g = 0; s && end && g < m->geo.nr_groups; g++) {
		if (is_state(m, g)) {
			if (states && choice(m, s->tenant, g,
					     &hashes[nr - 1]) == TM_NONE) {
				need += m->geo.block_pages[g];
				blocks++;
			}
			continue;
		}
		for (u32 i = first; i < end; i++) {
			u32 block = s->block[g][i];

			if (block != TM_NONE && m->block[block].published &&
			    !hash_is(&m->block[block].key.hash,
				     &hashes[i - first])) {
				want(&w, -EINVAL);
				break;
			}
		}
	}
	if (!w.nr && room(m, need, blocks, evict, NULL, 0))
		want(&w, -ENOMEM);
	expect(m, &w);
	err = tm_cache_publish(&m->cache, id, first, hashes, nr, evict,
			       &copies);
	if (refused(m, &w, err))
		return err;
	for (u32 g = 0; first && g < m->geo.nr_groups; g++) {
		u32 block = is_state(m, g) ? TM_NONE : s->block[g][first - 1];

		if (block == TM_NONE || !m->block[block].published)
			continue;
		parent = m->block[block].key.hash;
		break;
	}
	forget_victims(m);
	for (u32 i = first; i < end; i++) {
		const struct tm_hash *hash = &hashes[i - first];

		for (u32 g = 0; g < m->geo.nr_groups; g++) {
			u32 block = s->block[g][i];

			if (is_state(m, g) || block == TM_NONE ||
			    m->block[block].published)
				continue;
			publish(m, block, s->tenant, g, hash, i, parent,
				s->data[g][i]);
		}
		if (i < end - 1)
			parent = *hash;
	}
	CHECK_EQ(copies.nr, blocks);
	for (u32 i = 0; i < blocks; i++) {
		u32 g = copies.copy[i].group, to = copies.copy[i].to.v;

		CHECK(g < m->geo.nr_groups && is_state(m, g));
		copy_to(&copies, g, 0, s->block[g][0]);
		take(m, to, g);
		need -= m->geo.block_pages[g];
		publish(m, to, s->tenant, g, &hashes[nr - 1], end - 1, parent,
			s->data[g][0]);
		release(m, to, TM_NONE, 0);
	}
	/* Each of those that there have to be, once. */
	CHECK_EQ(need, 0);
	carry_out(m, &copies);
	finish(m);
	return 0;
}

/* The longest prefix that every group has, from the longest down. */
static u32 match(const struct cache_model *m, u64 tenant,
		 const struct tm_hash *hashes, u32 nr)
{
	u32 tokens = m->geo.block_tokens, first, end;

	if (nr > m->max_tokens / tokens)
		nr = m->max_tokens / tokens;
	for (; nr; nr--) {
		bool all = true;

		for (u32 g = 0; all && g < m->geo.nr_groups; g++) {
			span(m, g, nr * tokens, &first, &end);
			if (is_state(m, g))
				first = nr - 1, end = nr;
			for (; all && first < end; first++)
				all = choice(m, tenant, g, &hashes[first]) !=
				      TM_NONE;
		}
		if (all)
			break;
	}
	return nr;
}

u32 cache_do_match(struct cache_model *m, u64 tenant,
		   const struct tm_hash *hashes, u32 nr)
{
	u32 blocks;

	cache_remember(&m->cache);
	blocks = tm_cache_match(&m->cache, tenant, hashes, nr);
	CHECK(cache_unchanged(&m->cache));
	CHECK_EQ(blocks, match(m, tenant, hashes, nr));
	return blocks;
}

int cache_do_lookup(struct cache_model *m, struct tm_seq_id id,
		    const struct tm_hash *hashes, u32 nr, bool evict,
		    u32 *matched)
{
	struct cache_model_seq *s = cache_seq(m, id);
	u32 hits[CACHE_GROUPS][CACHE_BLOCKS], keep[CACHE_POOL], nr_keep = 0;
	struct tm_cache_copies copies = { .nr = TM_NONE };
	u32 need = 0, blocks = 0, nr_copies = 0, first, end, nr_new = 0;
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!s)
		want(&w, -ENOENT);
	else if (!nr || s->length)
		want(&w, -EINVAL);
	else
		blocks = match(m, s->tenant, hashes, nr);
	for (u32 g = 0; blocks && g < m->geo.nr_groups; g++) {
		span(m, g, blocks * m->geo.block_tokens, &first, &end);
		if (is_state(m, g)) {
			need += m->geo.block_pages[g];
			nr_new++;
		}
		for (u32 i = first; i < end; i++) {
			hits[g][i] = choice(m, s->tenant, g,
					    &hashes[is_state(m, g) ?
						    blocks - 1 : i]);
			keep[nr_keep++] = hits[g][i];
		}
	}
	if (!w.nr && room(m, need, nr_new, evict, keep, nr_keep))
		want(&w, -ENOMEM);
	expect(m, &w);
	*matched = TM_NONE;
	err = tm_cache_lookup(&m->cache, id, hashes, nr, evict, matched,
			      &copies);
	if (refused(m, &w, err))
		return err;
	CHECK_EQ(*matched, blocks);
	forget_victims(m);
	for (u32 g = 0; blocks && g < m->geo.nr_groups; g++) {
		span(m, g, blocks * m->geo.block_tokens, &first, &end);
		for (u32 i = first; i < end; i++) {
			u32 hit = hits[g][i];

			memcpy(s->data[g][i], m->block[hit].data,
			       sizeof(s->data[g][i]));
			if (is_state(m, g)) {
				u32 to = new_block(m, s, g, i);

				CHECK_EQ(copy_to(&copies, g, i, hit), to);
				used_again(m, hit);
				hit = to;
				nr_copies++;
			}
			set(m, s, g, i, hit);
		}
	}
	CHECK_EQ(copies.nr, nr_copies);
	carry_out(m, &copies);
	s->length = blocks * m->geo.block_tokens;
	s->sealed = blocks;
	m->stats.lookups += nr;
	m->stats.hits += blocks;
	finish(m);
	return 0;
}

int cache_do_adopt(struct cache_model *m, struct tm_seq_id id, u32 index,
		   const struct tm_hash *hash, u32 tokens, bool evict)
{
	struct cache_model_seq *s = cache_seq(m, id);
	u32 all = m->geo.block_tokens, length = 0, first, end, need = 0;
	u32 hits[CACHE_GROUPS], nr_hits = 0, nr_copies = 0, nr_new = 0, old;
	struct tm_cache_copies copies = { .nr = TM_NONE };
	bool append = false, at_end = false;
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!s)
		want(&w, -ENOENT);
	else
		append = index == cache_nr_full(m, s) &&
			 s->length % all == 0;
	if (!w.nr && (!tokens || tokens > all ||
		      (!append && index >= cache_nr_full(m, s)) ||
		      (tokens < all && (!append || has_state(m)))))
		want(&w, -EINVAL);
	if (append && tokens > m->max_tokens - s->length)
		want(&w, -ERANGE);
	if (!w.nr) {
		length = append ? s->length + tokens : s->length;
		at_end = length == index * all + tokens;
	}
	for (u32 g = 0; !w.nr && g < m->geo.nr_groups; g++) {
		span(m, g, length, &first, &end);
		hits[g] = TM_NONE;
		if (is_state(m, g) ? !at_end : index < first)
			continue;
		hits[g] = choice(m, s->tenant, g, hash);
		if (hits[g] == TM_NONE) {
			want(&w, -ENODATA);
			break;
		}
		nr_hits++;
		old = s->block[g][is_state(m, g) ? 0 : index];
		/* A state is copied to where there is one, but not a packed one. */
		if (is_state(m, g) ? old == TM_NONE || m->block[old].packed :
				     tokens < all) {
			need += m->geo.block_pages[g];
			nr_new++;
		}
	}
	if (!w.nr) {
		u32 keep[CACHE_GROUPS];

		nr_hits = 0;
		for (u32 g = 0; g < m->geo.nr_groups; g++)
			if (hits[g] != TM_NONE)
				keep[nr_hits++] = hits[g];
		if (room(m, need, nr_new, evict, keep, nr_hits))
			want(&w, -ENOMEM);
	}
	expect(m, &w);
	if (!w.nr && append)
		unmap_leaving(m, s, length);
	for (u32 g = 0; !w.nr && g < m->geo.nr_groups; g++)
		if (hits[g] != TM_NONE)
			unmap(s, g, is_state(m, g) ? 0 : index);
	err = tm_cache_adopt(&m->cache, id, index, hash, tokens, evict,
			     &copies);
	if (refused(m, &w, err))
		return err;
	forget_victims(m);
	/* What is hit may be what leaves a window: it is not let go. */
	for (u32 g = 0; g < m->geo.nr_groups; g++)
		if (hits[g] != TM_NONE)
			get(m, hits[g]);
	leave(m, s, length);
	for (u32 g = 0; g < m->geo.nr_groups; g++) {
		u32 i = is_state(m, g) ? 0 : index, to = hits[g];

		if (hits[g] == TM_NONE)
			continue;
		memcpy(s->data[g][i], m->block[hits[g]].data,
		       sizeof(s->data[g][i]));
		old = s->block[g][i];
		if (is_state(m, g) || tokens < all) {
			to = old;
			if (old == TM_NONE || m->block[old].packed)
				to = new_block(m, s, g, i);
			CHECK_EQ(copy_to(&copies, g, i, hits[g]), to);
			nr_copies++;
		}
		if (to != old)
			set(m, s, g, i, to);
		put(m, hits[g], TM_NONE, i);
	}
	CHECK_EQ(copies.nr, nr_copies);
	carry_out(m, &copies);
	s->length = length;
	finish(m);
	return 0;
}

int cache_do_reset(struct cache_model *m)
{
	struct tm_prefix_key none = { 0 };
	struct wants w = { 0 };
	int err;

	begin(m);
	for (u32 i = 0; i < m->max_seqs && !w.nr; i++)
		if (m->seq[i].open && m->seq[i].length)
			want(&w, -EBUSY);
	expect(m, &w);
	err = tm_cache_reset(&m->cache);
	if (refused(m, &w, err))
		return err;
	for (u32 i = 0; i < m->nr_lru; i++)
		free_block(m, m->lru[i]);
	m->nr_lru = 0;
	tell(m, TM_CACHE_CLEARED, &none, 0, none.hash);
	finish(m);
	CHECK_EQ(m->used_pages, 0);
	return 0;
}

int cache_do_evict(struct cache_model *m)
{
	struct wants w = { 0 };
	int err;

	begin(m);
	if (m->nr_lru)
		m->victims[m->nr_victims++] = m->lru[0];
	else
		want(&w, -ENOENT);
	expect(m, &w);
	err = tm_cache_evict(&m->cache);
	if (refused(m, &w, err))
		return err;
	forget_victims(m);
	finish(m);
	return 0;
}

static bool packable(const struct cache_model *m,
		     const struct cache_model_seq *s, u32 group, u32 index)
{
	u32 block = TM_NONE;

	if (s->open && index < m->max_blocks)
		block = s->block[group][index];
	if (block == TM_NONE)
		return false;
	if (!is_state(m, group) && index >= cache_nr_full(m, s))
		return false;
	return m->block[block].refs == 1 && !m->block[block].packed;
}

int cache_do_pack_block(struct cache_model *m, u32 v, u32 pages)
{
	struct cache_model_block *b = &m->block[v];
	struct tm_kv_block block = { v };
	struct wants w = { 0 };
	int err;

	begin(m);
	if (b->packed || !pages || pages >= b->pages)
		want(&w, -EINVAL);
	else
		get_contents(m, v, b->aside);
	for (u32 i = 0; i < m->max_seqs; i++)
		for (u32 n = 0; n < m->max_blocks; n++)
			if (m->seq[i].block[b->group][n] == v)
				unmap(&m->seq[i], b->group, n);
	expect(m, &w);
	err = tm_cache_pack(&m->cache, block, pages);
	if (refused(m, &w, err))
		return err;
	if (m->moving && m->move.block.v == v && m->move.index >= pages)
		m->move_counts = false;
	m->used_pages -= b->pages - pages;
	b->pages = pages;
	b->packed = true;
	m->stats.packs++;
	for (u32 p = 0; p < pages; p++)
		pack_mark(b->aside, p, block_page(m, v, p));
	finish(m);
	return 0;
}

int cache_do_pack(struct cache_model *m, u32 place, u32 group, u32 index,
		  u32 pages)
{
	struct cache_model_seq *s = &m->seq[place];
	bool can = packable(m, s, group, index);
	struct tm_kv_block block = { TM_NONE };

	CHECK_EQ(tm_cache_packable(&m->cache, place, group, index, &block),
		 can ? 0 : -ENOENT);
	if (!can)
		return -ENOENT;
	CHECK_EQ(block.v, s->block[group][index]);
	return cache_do_pack_block(m, block.v, pages);
}

int cache_do_unpack(struct cache_model *m, u32 block, bool evict)
{
	struct cache_model_block *b = &m->block[block];
	u32 pages = m->geo.block_pages[b->group];
	struct wants w = { 0 };
	int err;

	begin(m);
	if (!b->packed)
		want(&w, -EINVAL);
	else if (room(m, pages - b->pages, 0, evict, &block, 1))
		want(&w, -ENOMEM);
	expect(m, &w);
	err = tm_cache_unpack(&m->cache, (struct tm_kv_block){ block }, evict);
	if (refused(m, &w, err))
		return err;
	forget_victims(m);
	/* What was there is there still. */
	packed_contents(m, block);
	m->used_pages += pages - b->pages;
	b->pages = pages;
	b->packed = false;
	put_contents(m, block, b->aside);
	m->stats.unpacks++;
	finish(m);
	return 0;
}

bool cache_do_next_event(struct cache_model *m, struct tm_cache_event *event)
{
	if (!tm_cache_next_event(&m->cache, event)) {
		CHECK_EQ(m->nr_unread, 0);
		return false;
	}
	CHECK(m->nr_unread);
	CHECK(!memcmp(event, m->event, sizeof(*event)));
	m->nr_unread--;
	memmove(m->event, m->event + 1, m->nr_unread * sizeof(*m->event));
	return true;
}

/* Nobody may write to a page that is being copied. */
static void unmap_page(struct cache_model *m, struct tm_page_id page)
{
	for (u32 i = 0; i < m->max_seqs; i++)
		for (u32 g = 0; g < m->geo.nr_groups; g++)
			for (u32 n = 0; n < m->max_blocks; n++) {
				struct cache_model_seq *s = &m->seq[i];

				for (u32 p = 0; s->mapped[g][n] &&
				     p < m->geo.block_pages[g]; p++)
					if (s->map[g][n][p] &&
					    s->at[g][n][p].v == page.v) {
						s->map[g][n][p] =
							CACHE_UNMAPPED;
						s->mapped[g][n]--;
					}
			}
}

int cache_do_move_begin(struct cache_model *m)
{
	struct tm_kv_move move;
	int err;

	cache_remember(&m->cache);
	err = tm_kv_move_begin(&m->cache.pool, &move);
	if (err) {
		CHECK(cache_unchanged(&m->cache));
		CHECK(err == (m->moving ? -EBUSY : -ENOENT));
		return err;
	}
	CHECK(!m->moving);
	CHECK(m->block[move.block.v].used);
	CHECK(move.index < m->block[move.block.v].pages);
	m->move = move;
	m->moving = true;
	m->move_counts = true;
	cache_compare(m);
	return 0;
}

int cache_do_move_end(struct cache_model *m, bool copied)
{
	int want = !m->moving ? -EINVAL : m->move_counts ? 0 : -ENOENT;

	if (m->moving && copied && m->move_counts) {
		unmap_page(m, m->move.from);
		memcpy(page_at(m, m->move.to), page_at(m, m->move.from),
		       CACHE_WORDS * sizeof(u32));
	}
	CHECK_EQ(tm_kv_move_end(&m->cache.pool, copied), want);
	m->moving = false;
	cache_compare(m);
	return want;
}

int cache_do_touch(struct cache_model *m, u32 place, u32 group, u32 index,
		   u32 page, bool write)
{
	struct cache_model_seq *s = &m->seq[place];
	u32 plane_pages = m->geo.plane_pages[group];
	struct tm_cache_page p = { .writable = true };
	u32 block = TM_NONE, *words;
	int err;

	if (s->open && index < m->max_blocks)
		block = s->block[group][index];
	err = tm_cache_page(&m->cache, place, group, page / plane_pages,
			    index * plane_pages + page % plane_pages, &p);
	CHECK_EQ(err, block == TM_NONE ? -ENOENT :
		 m->block[block].packed ? -EAGAIN : 0);
	if (err)
		return err;
	CHECK_EQ(p.index, page);
	if (write && !p.writable)
		return -EACCES;
	if (write || !s->map[group][index][page])
		map(s, &p, group, index, write ? CACHE_WRITE : CACHE_READ);
	if (!write)
		return 0;
	words = page_at(m, p.page);
	for (u32 w = 0; w < CACHE_WORDS; w++)
		words[w] = s->data[group][index][page * CACHE_WORDS + w] =
			(u32)tm_rand(&m->rng);
	cache_compare(m);
	return 0;
}
