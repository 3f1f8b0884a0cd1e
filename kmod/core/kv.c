// SPDX-License-Identifier: GPL-2.0-only
#include "core/kv.h"

/*
 * A link is the page it leads to plus 1, so that a zeroed table is all free pages;
 * the link of a block's last page says which block it is. The link to a page with a
 * mark says which mark: it has a number after those of blocks.
 */
#define TM_KV_END	(1u << 31)

/* Whole pages of a plane; a state's are rounded up. 0 when they do not come out even. */
static u64 tm_kv_plane_pages(struct tm_geometry g,
			     const struct tm_kv_group *group, u32 block_tokens)
{
	u64 bytes = group->token_bytes, page = (u64)1 << g.page_shift;

	if (group->rule == TM_KV_STATE)
		return (bytes + page - 1) >> g.page_shift;
	bytes *= block_tokens;
	return bytes % page ? 0 : bytes >> g.page_shift;
}

/*
 * The fewest tokens that fill whole pages. A page is a power of two, and so what a
 * token count has to be a multiple of: for all groups together the largest of them.
 */
static u32 tm_kv_choose_tokens(struct tm_geometry g,
			       const struct tm_kv_group *groups, u32 nr_groups)
{
	u32 tokens = TM_KV_MIN_TOKENS;

	for (u32 i = 0; i < nr_groups; i++)
		while (!tm_kv_plane_pages(g, &groups[i], tokens))
			tokens *= 2;
	return tokens;
}

static bool tm_kv_group_valid(const struct tm_kv_group *group)
{
	return group->rule < TM_KV_RULES &&
	       group->planes && group->token_bytes &&
	       !group->window == (group->rule != TM_KV_WINDOW);
}

int tm_kv_geometry_init(struct tm_kv_geometry *geo, struct tm_geometry pages,
			const struct tm_kv_group *groups, u32 nr_groups,
			u32 block_tokens)
{
	*geo = (struct tm_kv_geometry){ .pages = pages };
	if (!nr_groups || nr_groups > TM_KV_GROUPS)
		return -EINVAL;
	for (u32 i = 0; i < nr_groups; i++)
		if (!tm_kv_group_valid(&groups[i]))
			return -EINVAL;
	if (!block_tokens) {
		block_tokens = tm_kv_choose_tokens(pages, groups, nr_groups);
		if (block_tokens > TM_KV_MAX_TOKENS)
			return -EINVAL;
	}
	for (u32 i = 0; i < nr_groups; i++) {
		u64 plane = tm_kv_plane_pages(pages, &groups[i], block_tokens);

		/* Of two factors below 2^32, so that the product is right. */
		if (!plane || plane > TM_KV_MAX_BLOCK_PAGES ||
		    plane * groups[i].planes > TM_KV_MAX_BLOCK_PAGES)
			return -EINVAL;
		geo->group[i] = groups[i];
		geo->plane_pages[i] = plane;
		geo->block_pages[i] = plane * groups[i].planes;
	}
	geo->nr_groups = nr_groups;
	geo->block_tokens = block_tokens;
	return 0;
}

u32 tm_kv_held(const struct tm_kv_geometry *geo, u32 group, u32 tokens,
	       u32 *first)
{
	const struct tm_kv_group *g = &geo->group[group];

	*first = 0;
	if (g->rule == TM_KV_STATE)
		return 1;
	if (g->rule == TM_KV_WINDOW && tokens > g->window)
		*first = (tokens - g->window) / geo->block_tokens;
	/* Not (tokens + block_tokens - 1), which can overflow. */
	return tokens / geo->block_tokens + !!(tokens % geo->block_tokens);
}

static void tm_kv_list_add(struct tm_kv_pool *pool, u32 v)
{
	struct tm_kv_chunk *c = &pool->chunks[v];
	u32 list = c->nr_free;

	c->prev = TM_NONE;
	c->next = pool->head[list];
	if (c->next != TM_NONE)
		pool->chunks[c->next].prev = v;
	pool->head[list] = v;
	pool->lists[list / 64] |= (u64)1 << (list % 64);
}

static void tm_kv_list_del(struct tm_kv_pool *pool, u32 v)
{
	struct tm_kv_chunk *c = &pool->chunks[v];
	u32 list = c->nr_free;

	if (c->next != TM_NONE)
		pool->chunks[c->next].prev = c->prev;
	if (c->prev != TM_NONE) {
		pool->chunks[c->prev].next = c->next;
		return;
	}
	pool->head[list] = c->next;
	if (c->next == TM_NONE)
		pool->lists[list / 64] &= ~((u64)1 << (list % 64));
}

/* A chunk has @nr_free free pages now. */
static void tm_kv_relist(struct tm_kv_pool *pool, u32 v, u32 nr_free)
{
	struct tm_kv_chunk *c = &pool->chunks[v];

	tm_kv_list_del(pool, v);
	pool->free_pages += nr_free - c->nr_free;
	c->nr_free = nr_free;
	tm_kv_list_add(pool, v);
}

/*
 * The first bit from @from on that is set (@flip 0) or clear (~0), or @end. No bit
 * is set from @end on.
 */
static u32 tm_kv_find(const u64 *bits, u32 from, u32 end, u64 flip)
{
	while (from < end) {
		u64 word = (bits[from / 64] ^ flip) >> (from % 64);

		if (word)
			return from + tm_ctz64(word);
		from = (from | 63) + 1;
	}
	return end;
}

/* The chunk with the fewest free pages, but at least @nr; TM_NONE for none. */
static u32 tm_kv_fullest(const struct tm_kv_pool *pool, u32 nr)
{
	u32 list = tm_kv_find(pool->lists, nr, TM_KV_LISTS, 0);

	return list < TM_KV_LISTS ? pool->head[list] : TM_NONE;
}

/* The chunk with the most free pages; the pool has a free page. */
static u32 tm_kv_emptiest(const struct tm_kv_pool *pool)
{
	u32 w = TM_KV_LISTS / 64;
	u32 high;

	while (!pool->lists[w])
		w--;
	high = pool->lists[w] >> 32;
	return pool->head[w * 64 + (high ? 32 + tm_fls32(high) :
					   tm_fls32((u32)pool->lists[w]))];
}

/* The smallest run of @nr free pages or more; 0 where there is none. */
static u32 tm_kv_best_run(const struct tm_kv_chunk *c, u32 pages, u32 nr)
{
	u32 best = 0, best_len = TM_NONE;
	u32 start = tm_kv_find(c->bits, 0, pages, 0);

	while (start < pages) {
		u32 end = tm_kv_find(c->bits, start, pages, ~(u64)0);

		if (end - start >= nr && end - start < best_len) {
			best = start;
			best_len = end - start;
		}
		start = tm_kv_find(c->bits, end, pages, 0);
	}
	return best;
}

/* The mark that a link names, or the first number that is none. */
static u32 tm_kv_mark_of(const struct tm_kv_pool *pool, u32 link)
{
	u32 v = link & ~TM_KV_END;

	return link & TM_KV_END && v >= pool->nr_blocks ? v - pool->nr_blocks :
							  pool->nr_marks;
}

/* Through a mark: to a page, or the end. */
static u32 tm_kv_through(const struct tm_kv_pool *pool, u32 link)
{
	u32 m = tm_kv_mark_of(pool, link);

	return m < pool->nr_marks ? pool->marks[m].link : link;
}

/* The same, and there is no mark any more. */
static u32 tm_kv_unmark(struct tm_kv_pool *pool, u32 link)
{
	u32 m = tm_kv_mark_of(pool, link);

	if (m == pool->nr_marks)
		return link;
	link = pool->marks[m].link;
	pool->marks[m] = (struct tm_kv_mark){ .link = pool->free_mark };
	pool->free_mark = m;
	return link;
}

/* Mark what is to be the next page of a block. Return: a link to it. */
static u32 tm_kv_mark(struct tm_kv_pool *pool, u32 b, u32 page)
{
	struct tm_kv_record *record = &pool->blocks[b];
	u32 m = pool->free_mark;
	struct tm_kv_mark *mark = &pool->marks[m];
	u32 before = record->mark == TM_NONE ? m : record->mark;
	u32 jump, far;

	pool->free_mark = mark->link;
	*mark = (struct tm_kv_mark){
		.link = page + 1,
		.block = b,
		.nth = record->pages / TM_KV_MARK_PAGES,
		.before = before,
		.jump = before,
	};
	/* Two jumps of one length become one of twice that, and a step. */
	jump = pool->marks[before].jump;
	far = pool->marks[jump].jump;
	if (pool->marks[before].nth - pool->marks[jump].nth ==
	    pool->marks[jump].nth - pool->marks[far].nth)
		mark->jump = far;
	record->mark = m;
	return TM_KV_END | (pool->nr_blocks + m);
}

/* The mark of a block with this number, which it has. */
static u32 tm_kv_find_mark(const struct tm_kv_pool *pool, u32 b, u32 nth)
{
	u32 m = pool->blocks[b].mark;

	while (pool->marks[m].nth != nth) {
		u32 jump = pool->marks[m].jump;

		m = pool->marks[jump].nth < nth ? pool->marks[m].before : jump;
	}
	return m;
}

/* A link to a page of a block, which it has: not through a mark. */
static u32 tm_kv_link_at(const struct tm_kv_pool *pool, u32 b, u32 index)
{
	const struct tm_kv_record *record = &pool->blocks[b];
	u32 nth = index / TM_KV_MARK_PAGES;
	u32 link = record->link;

	if (record->run)
		return link + index;
	if (nth)
		link = pool->marks[tm_kv_find_mark(pool, b, nth)].link;
	for (index %= TM_KV_MARK_PAGES; index; index--)
		link = pool->links[link - 1];
	return link;
}

/* A free page of a chunk, the first one from @i on. */
static u32 tm_kv_take_page(struct tm_kv_pool *pool, u32 v, u32 i)
{
	struct tm_kv_chunk *c = &pool->chunks[v];

	i = tm_kv_find(c->bits, i, tm_chunk_pages(pool->geo.pages), 0);
	c->bits[i / 64] &= ~((u64)1 << (i % 64));
	return (v << pool->geo.pages.chunk_order) | i;
}

/*
 * Take @nr free pages of a chunk for a block. @link leads away from its last page.
 * Return: the link that does so now.
 */
static u32 *tm_kv_take(struct tm_kv_pool *pool, u32 v, u32 nr, u32 b, u32 *link)
{
	struct tm_kv_chunk *c = &pool->chunks[v];
	struct tm_kv_record *record = &pool->blocks[b];
	u32 i = tm_kv_best_run(c, tm_chunk_pages(pool->geo.pages), nr);

	tm_relax();
	tm_kv_relist(pool, v, c->nr_free - nr);
	for (; nr; nr--) {
		u32 page = tm_kv_take_page(pool, v, i);
		bool mark = record->pages &&
			    !(record->pages % TM_KV_MARK_PAGES);

		i = tm_page_index(pool->geo.pages, (struct tm_page_id){ page });
		*link = mark ? tm_kv_mark(pool, b, page) : page + 1;
		link = &pool->links[page];
		record->pages++;
	}
	return link;
}

static void tm_kv_put_page(struct tm_kv_pool *pool, u32 page)
{
	u32 v = page >> pool->geo.pages.chunk_order;
	struct tm_kv_chunk *c = &pool->chunks[v];
	u32 i = tm_page_index(pool->geo.pages, (struct tm_page_id){ page });

	c->bits[i / 64] |= (u64)1 << (i % 64);
	pool->links[page] = 0;
	tm_kv_relist(pool, v, c->nr_free + 1);
}

int tm_kv_pool_init(struct tm_kv_pool *pool, const struct tm_kv_geometry *geo,
		    u32 nr_slots, tm_sleep_lock_t *lock)
{
	u32 smallest = TM_KV_MAX_BLOCK_PAGES, largest = 0, nr_pages;

	/* Too large for a literal on a kernel stack. */
	memset(pool, 0, sizeof(*pool));
	pool->geo = *geo;
	pool->lock = lock;
	if (nr_slots >= TM_KV_END >> geo->pages.chunk_order)
		return -EINVAL;
	nr_pages = nr_slots << geo->pages.chunk_order;
	for (u32 i = 0; i < geo->nr_groups; i++) {
		if (geo->block_pages[i] < smallest)
			smallest = geo->block_pages[i];
		if (geo->block_pages[i] > largest)
			largest = geo->block_pages[i];
	}
	/* Twice what fits: shrunk blocks leave room for others. */
	pool->nr_blocks = smallest > 1 ? nr_pages / smallest * 2 : nr_pages;
	if (largest > TM_KV_MARK_PAGES)
		pool->nr_marks = nr_pages / TM_KV_MARK_PAGES;
	if (nr_pages < smallest || pool->nr_marks > TM_KV_END - pool->nr_blocks)
		return -EINVAL;

	pool->nr_slots = nr_slots;
	pool->chunks = tm_table_alloc(nr_slots, sizeof(*pool->chunks));
	if (!pool->chunks)
		return -ENOMEM;
	pool->links = tm_table_alloc(nr_pages, sizeof(*pool->links));
	if (!pool->links)
		goto err_chunks;
	pool->blocks = tm_table_alloc(pool->nr_blocks, sizeof(*pool->blocks));
	if (!pool->blocks)
		goto err_links;
	if (pool->nr_marks) {
		pool->marks = tm_table_alloc(pool->nr_marks,
					     sizeof(*pool->marks));
		if (!pool->marks)
			goto err_blocks;
	}

	for (u32 v = 0; v < nr_slots; v++)
		pool->chunks[v].next = v + 1 < nr_slots ? v + 1 : TM_NONE;
	for (u32 v = 0; v < pool->nr_blocks; v++)
		pool->blocks[v] = (struct tm_kv_record){
			.link = v + 1, .group = TM_NONE,
		};
	for (u32 m = 0; m < pool->nr_marks; m++)
		pool->marks[m].link = m + 1;
	for (u32 n = 0; n < TM_KV_LISTS; n++)
		pool->head[n] = TM_NONE;
	return 0;

err_blocks:
	tm_table_free(pool->blocks);
	pool->blocks = NULL;
err_links:
	tm_table_free(pool->links);
	pool->links = NULL;
err_chunks:
	tm_table_free(pool->chunks);
	pool->chunks = NULL;
	return -ENOMEM;
}

void tm_kv_pool_destroy(struct tm_kv_pool *pool)
{
	tm_warn_on(pool->nr_chunks);
	tm_table_free(pool->marks);
	tm_table_free(pool->blocks);
	tm_table_free(pool->links);
	tm_table_free(pool->chunks);
	pool->marks = NULL;
	pool->blocks = NULL;
	pool->links = NULL;
	pool->chunks = NULL;
}

int tm_kv_add_chunk(struct tm_kv_pool *pool, struct tm_chunk_id id)
{
	u32 pages = tm_chunk_pages(pool->geo.pages);
	u32 v = pool->free_slot;
	struct tm_kv_chunk *c;

	tm_assert_sleep_locked(pool->lock);
	if (v == TM_NONE)
		return -ENOSPC;
	c = &pool->chunks[v];
	pool->free_slot = c->next;
	for (u32 i = 0; i < pages; i += 64)
		c->bits[i / 64] = ~(u64)0 >> (pages < 64 ? 64 - pages : 0);
	c->id = id;
	c->nr_free = pages;
	c->in_pool = true;
	tm_kv_list_add(pool, v);
	pool->nr_chunks++;
	pool->free_pages += pages;
	return 0;
}

int tm_kv_remove_chunk(struct tm_kv_pool *pool, struct tm_chunk_id *id)
{
	u32 pages = tm_chunk_pages(pool->geo.pages);
	u32 v = pool->head[pages];
	struct tm_kv_chunk *c;

	tm_assert_sleep_locked(pool->lock);
	if (v == TM_NONE)
		return -ENOENT;
	c = &pool->chunks[v];
	tm_kv_list_del(pool, v);
	pool->nr_chunks--;
	pool->free_pages -= pages;
	*id = c->id;
	*c = (struct tm_kv_chunk){ .next = pool->free_slot };
	pool->free_slot = v;
	return 0;
}

u64 tm_kv_lack(const struct tm_kv_pool *pool, u64 pages, u64 blocks)
{
	tm_assert_sleep_locked(pool->lock);
	for (u32 i = 0; i < pool->geo.nr_groups; i++)
		blocks += pool->used[i];
	if (blocks > pool->nr_blocks)
		return TM_KV_NEVER;
	if (pages <= pool->free_pages)
		return 0;
	pages -= pool->free_pages;
	return (pages + tm_chunk_pages(pool->geo.pages) - 1) >>
	       pool->geo.pages.chunk_order;
}

u64 tm_kv_missing(const struct tm_kv_pool *pool, const u32 *count)
{
	u64 pages = 0, blocks = 0;

	tm_assert_sleep_locked(pool->lock);
	for (u32 i = 0; i < pool->geo.nr_groups; i++) {
		pages += (u64)count[i] * pool->geo.block_pages[i];
		blocks += count[i];
	}
	return tm_kv_lack(pool, pages, blocks);
}

/*
 * Give a block @nr free pages, which the pool has, of one chunk if one has so many.
 * @link leads away from its last page. Return: the link that does so now.
 */
static u32 *tm_kv_gather(struct tm_kv_pool *pool, u32 nr, u32 b, u32 *link)
{
	u32 v = tm_kv_fullest(pool, nr);

	while (v == TM_NONE) {
		u32 most = tm_kv_emptiest(pool);
		u32 most_free = pool->chunks[most].nr_free;

		link = tm_kv_take(pool, most, most_free, b, link);
		nr -= most_free;
		v = tm_kv_fullest(pool, nr);
	}
	return tm_kv_take(pool, v, nr, b, link);
}

/* The pool has the free pages, and a record. */
static struct tm_kv_block tm_kv_alloc_one(struct tm_kv_pool *pool, u32 group)
{
	u32 b = pool->free_block;
	struct tm_kv_record *record = &pool->blocks[b];
	u32 pages = pool->geo.block_pages[group];
	bool whole = tm_kv_fullest(pool, pages) != TM_NONE;
	u32 *link;

	pool->free_block = record->link;
	*record = (struct tm_kv_record){ .group = group, .mark = TM_NONE };
	link = tm_kv_gather(pool, pages, b, &record->link);
	*link = TM_KV_END | b;
	/* Pages of one chunk come in ascending order: none is left out. */
	record->run = whole &&
		      link == &pool->links[record->link - 1 + pages - 1];
	pool->gathered += !whole;
	pool->used[group]++;
	pool->allocs++;
	return (struct tm_kv_block){ b };
}

int tm_kv_alloc(struct tm_kv_pool *pool, const u32 *count,
		struct tm_kv_block *blocks)
{
	tm_assert_sleep_locked(pool->lock);
	if (tm_kv_missing(pool, count))
		return -ENOMEM;
	for (u32 i = 0; i < pool->geo.nr_groups; i++)
		for (u32 n = 0; n < count[i]; n++)
			*blocks++ = tm_kv_alloc_one(pool, i);
	return 0;
}

static bool tm_kv_is_block(const struct tm_kv_pool *pool,
			   struct tm_kv_block block)
{
	return block.v < pool->nr_blocks &&
	       pool->blocks[block.v].group != TM_NONE;
}

/* Free the pages from @link to the end of their block, and their marks. */
static void tm_kv_put_chain(struct tm_kv_pool *pool, u32 link)
{
	link = tm_kv_unmark(pool, link);
	while (!(link & TM_KV_END)) {
		u32 v = (link - 1) >> pool->geo.pages.chunk_order;
		struct tm_kv_chunk *c = &pool->chunks[v];
		u32 nr = c->nr_free;

		/* One move between lists for all that lies in one chunk. */
		do {
			u32 i = tm_page_index(pool->geo.pages,
					      (struct tm_page_id){ link - 1 });
			u32 next = tm_kv_unmark(pool, pool->links[link - 1]);

			if (link - 1 == pool->moving.from)
				pool->moving.block = TM_NONE;
			c->bits[i / 64] |= (u64)1 << (i % 64);
			pool->links[link - 1] = 0;
			link = next;
			nr++;
		} while (!(link & TM_KV_END) &&
			 (link - 1) >> pool->geo.pages.chunk_order == v);
		c->stuck = false;
		tm_kv_relist(pool, v, nr);
		tm_relax();
	}
}

int tm_kv_free(struct tm_kv_pool *pool, struct tm_kv_block block)
{
	struct tm_kv_record *record;

	tm_assert_sleep_locked(pool->lock);
	if (!tm_kv_is_block(pool, block))
		return -EINVAL;
	record = &pool->blocks[block.v];
	tm_kv_put_chain(pool, record->link);
	pool->used[record->group]--;
	pool->frees++;
	*record = (struct tm_kv_record){
		.link = pool->free_block, .group = TM_NONE,
	};
	pool->free_block = block.v;
	return 0;
}

u32 tm_kv_pages(const struct tm_kv_pool *pool, struct tm_kv_block block)
{
	tm_assert_sleep_locked(pool->lock);
	return tm_kv_is_block(pool, block) ? pool->blocks[block.v].pages : 0;
}

/* The link that leads away from a page of a block, perhaps to a mark. */
static u32 *tm_kv_link_from(struct tm_kv_pool *pool, u32 b, u32 index)
{
	return &pool->links[tm_kv_link_at(pool, b, index) - 1];
}

int tm_kv_shrink(struct tm_kv_pool *pool, struct tm_kv_block block, u32 pages)
{
	struct tm_kv_record *record;
	u32 *end, rest, nth;

	tm_assert_sleep_locked(pool->lock);
	if (!pages || pages >= tm_kv_pages(pool, block))
		return -EINVAL;
	record = &pool->blocks[block.v];
	end = tm_kv_link_from(pool, block.v, pages - 1);
	rest = *end;
	*end = TM_KV_END | block.v;
	nth = (pages - 1) / TM_KV_MARK_PAGES;
	record->mark = nth ? tm_kv_find_mark(pool, block.v, nth) : TM_NONE;
	record->pages = pages;
	tm_kv_put_chain(pool, rest);
	return 0;
}

int tm_kv_regrow(struct tm_kv_pool *pool, struct tm_kv_block block)
{
	struct tm_kv_record *record;
	u32 *link, more;

	tm_assert_sleep_locked(pool->lock);
	if (!tm_kv_is_block(pool, block))
		return -EINVAL;
	record = &pool->blocks[block.v];
	more = pool->geo.block_pages[record->group] - record->pages;
	if (!more)
		return -EINVAL;
	if (more > pool->free_pages)
		return -ENOMEM;
	link = tm_kv_link_from(pool, block.v, record->pages - 1);
	*tm_kv_gather(pool, more, block.v, link) = TM_KV_END | block.v;
	record->run = false;
	return 0;
}

/* The page in the pool's own numbers to the world's. */
static struct tm_page_id tm_kv_page_id(const struct tm_kv_pool *pool, u32 page)
{
	struct tm_geometry g = pool->geo.pages;
	struct tm_page_id local = { page };

	return tm_page_id(g, pool->chunks[tm_page_chunk(g, local).v].id,
			  tm_page_index(g, local));
}

int tm_kv_walk_at(const struct tm_kv_pool *pool, struct tm_kv_block block,
		  u32 index, struct tm_kv_walk *walk)
{
	u32 pages = tm_kv_pages(pool, block);

	tm_assert_sleep_locked(pool->lock);
	if (index >= pages)
		return -EINVAL;
	walk->link = tm_kv_link_at(pool, block.v, tm_index(index, pages));
	return 0;
}

int tm_kv_page(const struct tm_kv_pool *pool, struct tm_kv_block block,
	       u32 index, struct tm_page_id *page)
{
	struct tm_kv_walk walk;
	int err = tm_kv_walk_at(pool, block, index, &walk);

	if (!err)
		tm_kv_walk_next(pool, &walk, page);
	return err;
}

int tm_kv_walk_start(const struct tm_kv_pool *pool, struct tm_kv_block block,
		     struct tm_kv_walk *walk)
{
	tm_assert_sleep_locked(pool->lock);
	if (!tm_kv_is_block(pool, block))
		return -EINVAL;
	walk->link = pool->blocks[block.v].link;
	return 0;
}

bool tm_kv_walk_next(const struct tm_kv_pool *pool, struct tm_kv_walk *walk,
		     struct tm_page_id *page)
{
	tm_assert_sleep_locked(pool->lock);
	if (walk->link & TM_KV_END)
		return false;
	*page = tm_kv_page_id(pool, walk->link - 1);
	walk->link = tm_kv_through(pool, pool->links[walk->link - 1]);
	return true;
}

/* The chunk to empty: with the most free pages of those that are not stuck. */
static u32 tm_kv_victim(const struct tm_kv_pool *pool)
{
	for (u32 list = tm_chunk_pages(pool->geo.pages); list-- > 0;)
		for (u32 v = pool->head[list]; v != TM_NONE;
		     v = pool->chunks[v].next)
			if (!pool->chunks[v].stuck)
				return v;
	return TM_NONE;
}

/* The fullest chunk with a free page that is not @victim; there is one. */
static u32 tm_kv_target(const struct tm_kv_pool *pool, u32 victim)
{
	const struct tm_kv_chunk *c = &pool->chunks[victim];
	u32 v = tm_kv_fullest(pool, 1);

	if (v != victim)
		return v;
	return c->next != TM_NONE ? c->next :
				    tm_kv_fullest(pool, c->nr_free + 1);
}

int tm_kv_move_begin(struct tm_kv_pool *pool, struct tm_kv_move *move)
{
	u32 pages = tm_chunk_pages(pool->geo.pages);
	struct tm_kv_moving *moving = &pool->moving;
	u32 victim, target, link, m, before = 1;

	tm_assert_sleep_locked(pool->lock);
	if (moving->active)
		return -EBUSY;
	if (pool->free_pages < pages || pool->head[pages] != TM_NONE)
		return -ENOENT;
	victim = tm_kv_victim(pool);
	if (victim == TM_NONE)
		return -ENOENT;

	moving->from = (victim << pool->geo.pages.chunk_order) |
		       tm_kv_find(pool->chunks[victim].bits, 0, pages, ~(u64)0);
	/* The next mark, or the end, knows the block and how far into it that is. */
	link = pool->links[moving->from];
	for (; !(link & TM_KV_END); before++)
		link = pool->links[link - 1];
	m = tm_kv_mark_of(pool, link);
	if (m < pool->nr_marks) {
		moving->block = pool->marks[m].block;
		moving->index = pool->marks[m].nth * TM_KV_MARK_PAGES - before;
	} else {
		moving->block = link & ~TM_KV_END;
		moving->index = pool->blocks[moving->block].pages - before;
	}
	target = tm_kv_target(pool, victim);
	moving->to = tm_kv_take_page(pool, target, tm_kv_best_run(
			&pool->chunks[target], pages, 1));
	tm_kv_relist(pool, target, pool->chunks[target].nr_free - 1);
	moving->active = true;
	*move = (struct tm_kv_move){
		.block = { moving->block },
		.index = moving->index,
		.from = tm_kv_page_id(pool, moving->from),
		.to = tm_kv_page_id(pool, moving->to),
	};
	return 0;
}

/* What leads to a page of a block: its record, a mark, or a link. */
static u32 *tm_kv_link_to(struct tm_kv_pool *pool, u32 b, u32 index)
{
	u32 nth = index / TM_KV_MARK_PAGES;

	if (!index)
		return &pool->blocks[b].link;
	if (index % TM_KV_MARK_PAGES)
		return tm_kv_link_from(pool, b, index - 1);
	return &pool->marks[tm_kv_find_mark(pool, b, nth)].link;
}

int tm_kv_move_end(struct tm_kv_pool *pool, bool copied)
{
	struct tm_kv_moving moving = pool->moving;

	tm_assert_sleep_locked(pool->lock);
	if (!moving.active)
		return -EINVAL;
	pool->moving.active = false;
	if (moving.block == TM_NONE) {
		tm_kv_put_page(pool, moving.to);
		return -ENOENT;
	}
	if (!copied) {
		tm_kv_put_page(pool, moving.to);
		pool->chunks[moving.from >> pool->geo.pages.chunk_order].stuck =
			true;
		return 0;
	}
	pool->links[moving.to] = pool->links[moving.from];
	*tm_kv_link_to(pool, moving.block, moving.index) = moving.to + 1;
	pool->blocks[moving.block].run &= pool->blocks[moving.block].pages == 1;
	tm_kv_put_page(pool, moving.from);
	pool->moved++;
	return 0;
}
