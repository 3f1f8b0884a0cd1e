// SPDX-License-Identifier: GPL-2.0-only
#include <stdlib.h>

#include "kv_model.h"

#define FIRST_ID	5
#define ID_STEP		3

static bool bit(const u64 *bits, u32 i)
{
	return bits[i / 64] >> (i % 64) & 1;
}

static const char *check_chunk(const struct tm_kv_pool *pool, u32 v)
{
	const struct tm_kv_chunk *c = &pool->chunks[v];
	u32 pages = tm_chunk_pages(pool->geo.pages), nr = 0;

	for (u32 i = 0; i < 64 * TM_KV_WORDS; i++) {
		if (!bit(c->bits, i))
			continue;
		if (!c->in_pool)
			return "a slot without a chunk has free pages";
		if (i >= pages)
			return "a page beyond the chunk is free";
		if (pool->links[v * pages + i])
			return "a free page has a link";
		nr++;
	}
	if (nr != c->nr_free)
		return "a chunk's count is not its free pages";
	if (!c->in_pool && c->stuck)
		return "a slot without a chunk is stuck";
	for (u32 o = 0; c->in_pool && o < v; o++)
		if (pool->chunks[o].in_pool &&
		    pool->chunks[o].id.v == c->id.v)
			return "a chunk is there twice";
	return NULL;
}

static const char *check_lists(const struct tm_kv_pool *pool)
{
	u32 chunks = 0, slots = 0, records = 0, used = 0, marks = 0;

	for (u32 n = 0; n < TM_KV_LISTS; n++) {
		u32 prev = TM_NONE;

		if (bit(pool->lists, n) != (pool->head[n] != TM_NONE))
			return "the mask of lists is wrong";
		for (u32 v = pool->head[n]; v != TM_NONE;
		     v = pool->chunks[v].next) {
			const struct tm_kv_chunk *c = &pool->chunks[v];

			if (!c->in_pool || c->nr_free != n)
				return "a chunk is on the list of another count";
			if (c->prev != prev)
				return "a chunk's back link is wrong";
			if (++chunks > pool->nr_slots)
				return "a list of chunks is a ring";
			prev = v;
		}
	}
	if (chunks != pool->nr_chunks)
		return "a chunk is on no list";
	for (u32 v = pool->free_slot; v != TM_NONE; v = pool->chunks[v].next) {
		if (pool->chunks[v].in_pool)
			return "a slot with a chunk is on the list of those without";
		if (++slots > pool->nr_slots)
			return "the list of slots is a ring";
	}
	if (slots + chunks != pool->nr_slots)
		return "a slot is lost";
	for (u32 g = 0; g < pool->geo.nr_groups; g++)
		used += pool->used[g];
	for (u32 b = pool->free_block; b < pool->nr_blocks;
	     b = pool->blocks[b].link) {
		if (pool->blocks[b].group != TM_NONE)
			return "a block is on the list of free records";
		if (++records > pool->nr_blocks)
			return "the list of records is a ring";
	}
	if (used + records != pool->nr_blocks)
		return "a record is lost";
	for (u32 b = 0; b < pool->nr_blocks; b++)
		if (pool->blocks[b].group != TM_NONE)
			marks += (pool->blocks[b].pages - 1) / TM_KV_MARK_PAGES;
	for (u32 m = pool->free_mark; m < pool->nr_marks;
	     m = pool->marks[m].link) {
		if (pool->marks[m].nth)
			return "a mark of a block is on the list of those of none";
		if (++marks > pool->nr_marks)
			return "the list of marks is a ring, or too long";
	}
	if (marks != pool->nr_marks)
		return "a mark is lost";
	return NULL;
}

/*
 * Where a mark jumps to: its number from 0, written as a sum of as large 2^n - 1 as
 * possible, without the last of these.
 */
static u32 jump_from(u32 nth)
{
	u32 left = nth - 1, weight = 1;

	while (left) {
		for (weight = 1; 2 * weight + 1 <= left;)
			weight = 2 * weight + 1;
		left -= weight;
	}
	return nth > 1 ? nth - weight : 1;
}

static const char *check_mark(const struct tm_kv_pool *pool, u32 b, u32 m,
			      u32 nth, u32 before)
{
	const struct tm_kv_mark *mark = &pool->marks[m];

	if (mark->block != b || mark->nth != nth)
		return "a mark is of another page";
	if (nth == 1)
		before = m;
	if (mark->before != before)
		return "a mark does not know the one before it";
	/* The marks before this one are known to be right. */
	while (pool->marks[before].nth > jump_from(nth))
		before = pool->marks[before].before;
	if (mark->jump != before)
		return "a mark jumps elsewhere";
	return NULL;
}

/* Count the pages of block @b in @seen. */
static const char *check_block(const struct tm_kv_pool *pool, u32 b, u8 *seen)
{
	u32 pages = tm_chunk_pages(pool->geo.pages), nr = 0, mark = TM_NONE;
	const struct tm_kv_record *record = &pool->blocks[b];
	u32 link = record->link, start = link;
	const char *error;

	for (;; link = pool->links[link - 1]) {
		u32 v, m = (link & ~(1u << 31)) - pool->nr_blocks;

		if (link >> 31 && (link & ~(1u << 31)) < pool->nr_blocks)
			break;
		if (link >> 31) {
			if (m >= pool->nr_marks)
				return "a link leads to a mark that is not there";
			if (!nr || nr % TM_KV_MARK_PAGES)
				return "a mark is where there should be none";
			error = check_mark(pool, b, m, nr / TM_KV_MARK_PAGES,
					   mark);
			if (error)
				return error;
			mark = m;
			link = pool->marks[m].link;
		} else if (nr && nr % TM_KV_MARK_PAGES == 0) {
			return "a page has no mark";
		}
		v = (link - 1) / pages;

		if (!link || v >= pool->nr_slots || !pool->chunks[v].in_pool)
			return "a block has a page that is not in the pool";
		if (bit(pool->chunks[v].bits, (link - 1) % pages))
			return "a block has a page that is free";
		if (seen[link - 1]++)
			return "a page is in two blocks";
		if (record->run && link != start + nr)
			return "a run is not one";
		nr++;
	}
	if ((link & ~(1u << 31)) != b)
		return "a block ends as another one";
	if (nr != record->pages)
		return "a block has not as many pages as it says";
	if (!nr || nr > pool->geo.block_pages[record->group])
		return "a block has more pages than its group says, or none";
	if (record->mark != mark)
		return "a block does not know its last mark";
	return NULL;
}

const char *kv_check(const struct tm_kv_pool *pool)
{
	u32 pages = tm_chunk_pages(pool->geo.pages);
	u32 used[TM_KV_GROUPS] = { 0 }, free_pages = 0, nr_chunks = 0;
	const char *error = NULL;
	u8 *seen;

	for (u32 v = 0; v < pool->nr_slots; v++) {
		error = check_chunk(pool, v);
		if (error)
			return error;
		nr_chunks += pool->chunks[v].in_pool;
		free_pages += pool->chunks[v].nr_free;
	}
	if (nr_chunks != pool->nr_chunks)
		return "the pool's chunk count is wrong";
	if (free_pages != pool->free_pages)
		return "the pool's free page count is wrong";

	seen = calloc(pool->nr_slots, pages);
	CHECK(seen);
	for (u32 b = 0; !error && b < pool->nr_blocks; b++) {
		if (pool->blocks[b].group == TM_NONE)
			continue;
		if (pool->blocks[b].group >= pool->geo.nr_groups)
			error = "a block has no valid group";
		else
			error = check_block(pool, b, seen);
		if (!error)
			used[pool->blocks[b].group]++;
	}
	if (!error && pool->moving.active && seen[pool->moving.to]++)
		error = "a page set aside for a move is in a block";
	for (u32 p = 0; !error && p < pool->nr_slots * pages; p++)
		if (pool->chunks[p / pages].in_pool && !seen[p] &&
		    !bit(pool->chunks[p / pages].bits, p % pages))
			error = "a page is neither free nor in a block";
	free(seen);
	if (error)
		return error;
	if (memcmp(used, pool->used, sizeof(used)))
		return "a group's count is not its blocks";
	return check_lists(pool);
}

void kv_model_init(struct kv_model *model, const struct tm_kv_geometry *geo,
		   u32 nr_slots)
{
	CHECK(nr_slots <= KV_MODEL_CHUNKS);
	memset(model, 0, sizeof(*model));
	model->geo = *geo;
	model->nr_slots = nr_slots;
}

u32 kv_model_pages(const struct kv_model *model)
{
	return TM_CHUNK_SIZE >> model->geo.pages.page_shift;
}

u32 kv_model_chunks(const struct kv_model *model)
{
	u32 n = 0;

	for (u32 i = 0; i < KV_MODEL_CHUNKS; i++)
		n += model->chunk[i].in_pool;
	return n;
}

/* Free pages of one chunk. */
static u32 chunk_free(const struct kv_model *model, u32 i)
{
	u32 n = 0;

	for (u32 p = 0; p < kv_model_pages(model); p++)
		n += !model->chunk[i].owner[p];
	return model->chunk[i].in_pool ? n : 0;
}

u32 kv_model_free(const struct kv_model *model)
{
	u32 n = 0;

	for (u32 i = 0; i < KV_MODEL_CHUNKS; i++)
		n += chunk_free(model, i);
	return n;
}

struct tm_chunk_id kv_model_id(u32 i)
{
	return (struct tm_chunk_id){ FIRST_ID + ID_STEP * i };
}

/* Where page @page of the machine is: chunk and page of the model. */
static void locate(const struct kv_model *model, struct tm_page_id page,
		   u32 *i, u32 *p)
{
	u32 id = page.v / kv_model_pages(model);

	*i = (id - FIRST_ID) / ID_STEP;
	*p = page.v % kv_model_pages(model);
	CHECK(*i < KV_MODEL_CHUNKS && kv_model_id(*i).v == id);
	CHECK(model->chunk[*i].in_pool);
}

static void compare_block(const struct kv_model *model,
			  const struct tm_kv_pool *pool, u32 nth)
{
	struct tm_kv_block block = model->blocks[nth];
	u32 pages = model->pages[nth], place = 0;
	struct tm_kv_walk walk, part = { 0 };
	struct tm_page_id page, again;

	CHECK_EQ(tm_kv_walk_start(pool, block, &walk), 0);
	while (tm_kv_walk_next(pool, &walk, &page)) {
		u32 i, p;

		locate(model, page, &i, &p);
		CHECK_EQ(model->chunk[i].owner[p], block.v + 1);
		CHECK_EQ(model->chunk[i].place[p], place);
		/* Each page of a large block would take too long. */
		if (place % (pages / 8 + 1) == 0 || place == pages - 1) {
			CHECK_EQ(tm_kv_page(pool, block, place, &again), 0);
			CHECK_EQ(again.v, page.v);
			CHECK_EQ(tm_kv_walk_at(pool, block, place, &part), 0);
		}
		/* Who has gone to the middle goes on from there as all others. */
		CHECK(tm_kv_walk_next(pool, &part, &again));
		CHECK_EQ(again.v, page.v);
		place++;
	}
	CHECK_EQ(place, pages);
	CHECK_EQ(tm_kv_pages(pool, block), pages);
	CHECK_EQ(tm_kv_page(pool, block, pages, &again), -EINVAL);
	CHECK_EQ(tm_kv_walk_at(pool, block, pages, &part), -EINVAL);
	CHECK_EQ(pool->blocks[block.v].run, model->run[nth]);
	/* The end stays the end. */
	CHECK(!tm_kv_walk_next(pool, &walk, &page));
	CHECK(!tm_kv_walk_next(pool, &part, &page));
}

void kv_model_compare(const struct kv_model *model,
		      const struct tm_kv_pool *pool)
{
	u32 used[TM_KV_GROUPS] = { 0 };

	for (u32 nth = 0; nth < model->nr_blocks; nth++) {
		compare_block(model, pool, nth);
		used[model->group[nth]]++;
	}
	CHECK(!memcmp(used, pool->used, sizeof(used)));
	CHECK_EQ(pool->nr_chunks, kv_model_chunks(model));
	CHECK_EQ(pool->free_pages, kv_model_free(model));
	CHECK_EQ(pool->allocs, model->allocs);
	CHECK_EQ(pool->frees, model->frees);
	CHECK_EQ(pool->gathered, model->gathered);
	CHECK_EQ(pool->moved, model->moved);
	CHECK_OK(kv_check(pool));
}

void kv_snapshot_take(struct kv_snapshot *snapshot,
		      const struct tm_kv_pool *pool)
{
	memcpy(&snapshot->pool, pool, sizeof(*pool));
	memcpy(snapshot->chunks, pool->chunks,
	       pool->nr_slots * sizeof(*pool->chunks));
	memcpy(snapshot->links, pool->links,
	       (pool->nr_slots << pool->geo.pages.chunk_order) *
	       sizeof(*pool->links));
	memcpy(snapshot->blocks, pool->blocks,
	       pool->nr_blocks * sizeof(*pool->blocks));
	if (pool->marks)
		memcpy(snapshot->marks, pool->marks,
		       pool->nr_marks * sizeof(*pool->marks));
}

bool kv_snapshot_same(const struct kv_snapshot *snapshot,
		      const struct tm_kv_pool *pool)
{
	return !memcmp(&snapshot->pool, pool, sizeof(*pool)) &&
	       !memcmp(snapshot->chunks, pool->chunks,
		       pool->nr_slots * sizeof(*pool->chunks)) &&
	       !memcmp(snapshot->links, pool->links,
		       (pool->nr_slots << pool->geo.pages.chunk_order) *
		       sizeof(*pool->links)) &&
	       !memcmp(snapshot->blocks, pool->blocks,
		       pool->nr_blocks * sizeof(*pool->blocks)) &&
	       (!pool->marks ||
		!memcmp(snapshot->marks, pool->marks,
			pool->nr_marks * sizeof(*pool->marks)));
}

void kv_snapshot_restore(const struct kv_snapshot *snapshot,
			 struct tm_kv_pool *pool)
{
	memcpy(pool, &snapshot->pool, sizeof(*pool));
	memcpy(pool->chunks, snapshot->chunks,
	       pool->nr_slots * sizeof(*pool->chunks));
	memcpy(pool->links, snapshot->links,
	       (pool->nr_slots << pool->geo.pages.chunk_order) *
	       sizeof(*pool->links));
	memcpy(pool->blocks, snapshot->blocks,
	       pool->nr_blocks * sizeof(*pool->blocks));
	if (pool->marks)
		memcpy(pool->marks, snapshot->marks,
		       pool->nr_marks * sizeof(*pool->marks));
}

static struct kv_snapshot before;

int kv_do_add(struct kv_model *model, struct tm_kv_pool *pool)
{
	u32 i = 0;
	int err;

	while (i < KV_MODEL_CHUNKS - 1 && model->chunk[i].in_pool)
		i++;
	kv_snapshot_take(&before, pool);
	err = tm_kv_add_chunk(pool, kv_model_id(i));
	CHECK_EQ(err, kv_model_chunks(model) < model->nr_slots ? 0 : -ENOSPC);
	if (err)
		CHECK(kv_snapshot_same(&before, pool));
	else
		model->chunk[i] = (struct kv_model_chunk){ .in_pool = true };
	return err;
}

int kv_do_remove(struct kv_model *model, struct tm_kv_pool *pool)
{
	struct tm_chunk_id id = { TM_NONE };
	bool empty = false;
	u32 i = 0;
	int err;

	for (u32 n = 0; n < KV_MODEL_CHUNKS; n++)
		empty |= chunk_free(model, n) == kv_model_pages(model);
	kv_snapshot_take(&before, pool);
	err = tm_kv_remove_chunk(pool, &id);
	CHECK_EQ(err, empty ? 0 : -ENOENT);
	if (err) {
		CHECK(kv_snapshot_same(&before, pool));
		CHECK_EQ(id.v, TM_NONE);
		return err;
	}
	while (i < KV_MODEL_CHUNKS && kv_model_id(i).v != id.v)
		i++;
	CHECK(i < KV_MODEL_CHUNKS);
	CHECK_EQ(chunk_free(model, i), kv_model_pages(model));
	model->chunk[i].in_pool = false;
	return 0;
}

/* The free pages of chunk @i that @nr pages are to be taken from start here. */
static u32 best_run(const struct kv_model *model, u32 i, u32 nr)
{
	const struct kv_model_chunk *c = &model->chunk[i];
	u32 best = 0, best_len = TM_NONE;

	for (u32 p = 0; p < kv_model_pages(model); p++) {
		u32 len = 0;

		if (c->owner[p] || (p && !c->owner[p - 1]))
			continue;
		while (p + len < kv_model_pages(model) && !c->owner[p + len])
			len++;
		if (len >= nr && len < best_len) {
			best = p;
			best_len = len;
		}
	}
	return best;
}

/* Of the free counts of all chunks but @but: the least of @nr or more, or 0. */
static u32 least_free(const struct kv_model *model, u32 nr, u32 but)
{
	u32 least = 0;

	for (u32 i = 0; i < KV_MODEL_CHUNKS; i++) {
		u32 n = i == but ? 0 : chunk_free(model, i);

		if (n >= nr && (!least || n < least))
			least = n;
	}
	return least;
}

static u32 most_free(const struct kv_model *model)
{
	u32 most = 0;

	for (u32 i = 0; i < KV_MODEL_CHUNKS; i++)
		if (chunk_free(model, i) > most)
			most = chunk_free(model, i);
	return most;
}

/*
 * Block @block has @left new pages from @place on: they have to be those that the
 * policy says. Return: whether they are out of one chunk, and in one run.
 */
static void taken(struct kv_model *model, const struct tm_kv_pool *pool,
		  struct tm_kv_block block, u32 place, u32 left, bool *whole,
		  bool *run)
{
	struct tm_page_id page, before = { 0 };
	struct tm_kv_walk walk;

	*run = *whole = least_free(model, left, TM_NONE);
	CHECK_EQ(tm_kv_walk_start(pool, block, &walk), 0);
	for (u32 skip = 0; skip <= place; skip++)
		CHECK(tm_kv_walk_next(pool, &walk, &page));
	while (left) {
		u32 fit = least_free(model, left, TM_NONE);
		u32 nr = fit ? left : most_free(model);
		u32 i, p, at, first;

		locate(model, page, &i, &p);
		CHECK_EQ(chunk_free(model, i), fit ? fit : nr);
		first = at = best_run(model, i, nr);
		left -= nr;
		for (; nr; nr--) {
			while (model->chunk[i].owner[at])
				at++;
			CHECK_EQ(page.v, (kv_model_id(i).v <<
					  model->geo.pages.chunk_order) + at);
			*run &= at == first || page.v == before.v + 1;
			before = page;
			model->chunk[i].owner[at] = block.v + 1;
			model->chunk[i].place[at] = place++;
			CHECK_EQ(tm_kv_walk_next(pool, &walk, &page),
				 left || nr > 1);
		}
	}
}

static void allocated(struct kv_model *model, const struct tm_kv_pool *pool,
		      struct tm_kv_block block, u32 group)
{
	u32 n = model->nr_blocks++;
	bool whole;

	for (u32 nth = 0; nth < n; nth++)
		CHECK(model->blocks[nth].v != block.v);
	CHECK(block.v < pool->nr_blocks);
	model->blocks[n] = block;
	model->group[n] = group;
	model->pages[n] = model->geo.block_pages[group];
	taken(model, pool, block, 0, model->pages[n], &whole, &model->run[n]);
	model->gathered += !whole;
	model->allocs++;
}

/* Twice the blocks that fit, but not more than pages. */
static u32 most_blocks(const struct kv_model *model)
{
	u32 pages = model->nr_slots * kv_model_pages(model), smallest = ~0u;

	for (u32 g = 0; g < model->geo.nr_groups; g++)
		if (model->geo.block_pages[g] < smallest)
			smallest = model->geo.block_pages[g];
	return smallest == 1 ? pages : pages / smallest * 2;
}

int kv_do_alloc(struct kv_model *model, struct tm_kv_pool *pool,
		const u32 *count)
{
	static struct tm_kv_block blocks[KV_MODEL_BLOCKS + 1];
	u64 need = 0, missing = 0, total = 0;
	u32 nr = 0;
	int err;

	for (u32 g = 0; g < model->geo.nr_groups; g++) {
		need += (u64)count[g] * model->geo.block_pages[g];
		total += count[g];
	}
	if (model->nr_blocks + total > most_blocks(model))
		missing = TM_KV_NEVER;
	else if (need > kv_model_free(model))
		missing = (need - kv_model_free(model) - 1) /
			  kv_model_pages(model) + 1;
	CHECK(tm_kv_missing(pool, count) == missing);
	CHECK(tm_kv_lack(pool, need, total) == missing);
	kv_snapshot_take(&before, pool);
	blocks[0].v = TM_NONE;
	if (!missing)
		blocks[total].v = TM_NONE;
	err = tm_kv_alloc(pool, count, blocks);
	CHECK_EQ(err, missing ? -ENOMEM : 0);
	if (err) {
		CHECK(kv_snapshot_same(&before, pool));
		CHECK_EQ(blocks[0].v, TM_NONE);
		return err;
	}
	CHECK_EQ(blocks[total].v, TM_NONE);
	for (u32 g = 0; g < model->geo.nr_groups; g++)
		for (u32 n = 0; n < count[g]; n++)
			allocated(model, pool, blocks[nr++], g);
	return 0;
}

/* Free the pages of a block from its page @place on. */
static void give_back(struct kv_model *model, struct tm_kv_block block,
		      u32 place)
{
	for (u32 i = 0; i < KV_MODEL_CHUNKS; i++)
		for (u32 p = 0; p < kv_model_pages(model); p++) {
			struct kv_model_chunk *c = &model->chunk[i];

			if (!c->in_pool || c->owner[p] != block.v + 1 ||
			    c->place[p] < place)
				continue;
			c->owner[p] = 0;
			c->stuck = false;
		}
	if (model->moving && model->move.block.v == block.v &&
	    model->move.index >= place)
		model->move_counts = false;
}

#define REMOVE(array, nth, left)					\
	memmove(&(array)[nth], &(array)[(nth) + 1],			\
		((left) - (nth)) * sizeof(*(array)))

void kv_do_free(struct kv_model *model, struct tm_kv_pool *pool, u32 nth)
{
	struct tm_kv_block block = model->blocks[nth];

	CHECK_EQ(tm_kv_free(pool, block), 0);
	give_back(model, block, 0);
	model->frees++;
	model->nr_blocks--;
	REMOVE(model->blocks, nth, model->nr_blocks);
	REMOVE(model->group, nth, model->nr_blocks);
	REMOVE(model->pages, nth, model->nr_blocks);
	REMOVE(model->run, nth, model->nr_blocks);
}

int kv_do_shrink(struct kv_model *model, struct tm_kv_pool *pool, u32 nth,
		 u32 pages)
{
	struct tm_kv_block block = model->blocks[nth];
	int want = pages && pages < model->pages[nth] ? 0 : -EINVAL;

	kv_snapshot_take(&before, pool);
	CHECK_EQ(tm_kv_shrink(pool, block, pages), want);
	if (want) {
		CHECK(kv_snapshot_same(&before, pool));
		return want;
	}
	give_back(model, block, pages);
	model->pages[nth] = pages;
	return 0;
}

int kv_do_regrow(struct kv_model *model, struct tm_kv_pool *pool, u32 nth)
{
	u32 all = model->geo.block_pages[model->group[nth]];
	u32 had = model->pages[nth];
	bool whole, run;
	int want = 0;

	if (had == all)
		want = -EINVAL;
	else if (all - had > kv_model_free(model))
		want = -ENOMEM;
	kv_snapshot_take(&before, pool);
	CHECK_EQ(tm_kv_regrow(pool, model->blocks[nth]), want);
	if (want) {
		CHECK(kv_snapshot_same(&before, pool));
		return want;
	}
	taken(model, pool, model->blocks[nth], had, all - had, &whole, &run);
	model->pages[nth] = all;
	model->run[nth] = false;
	return 0;
}

void kv_do_bad_free(const struct kv_model *model, struct tm_kv_pool *pool,
		    struct tm_kv_block block)
{
	struct tm_kv_walk walk;
	struct tm_page_id page;

	for (u32 nth = 0; nth < model->nr_blocks; nth++)
		CHECK(model->blocks[nth].v != block.v);
	kv_snapshot_take(&before, pool);
	CHECK_EQ(tm_kv_free(pool, block), -EINVAL);
	CHECK_EQ(tm_kv_walk_start(pool, block, &walk), -EINVAL);
	CHECK_EQ(tm_kv_pages(pool, block), 0);
	CHECK_EQ(tm_kv_page(pool, block, 0, &page), -EINVAL);
	CHECK_EQ(tm_kv_walk_at(pool, block, 0, &walk), -EINVAL);
	CHECK_EQ(tm_kv_shrink(pool, block, 1), -EINVAL);
	CHECK_EQ(tm_kv_regrow(pool, block), -EINVAL);
	CHECK(kv_snapshot_same(&before, pool));
}

/* Free pages of the emptiest chunk that is not stuck; TM_NONE for no such chunk. */
static u32 victim_free(const struct kv_model *model)
{
	u32 most = TM_NONE;

	for (u32 i = 0; i < KV_MODEL_CHUNKS; i++) {
		u32 n = chunk_free(model, i);

		if (!model->chunk[i].in_pool || model->chunk[i].stuck)
			continue;
		if (most == TM_NONE || n > most)
			most = n;
	}
	return most;
}

static int move_begin_wants(const struct kv_model *model)
{
	if (model->moving)
		return -EBUSY;
	if (kv_model_free(model) < kv_model_pages(model) ||
	    most_free(model) == kv_model_pages(model) ||
	    victim_free(model) == TM_NONE)
		return -ENOENT;
	return 0;
}

int kv_do_move_begin(struct kv_model *model, struct tm_kv_pool *pool)
{
	struct tm_kv_move move;
	int want = move_begin_wants(model);
	u32 i, p, victim;

	kv_snapshot_take(&before, pool);
	CHECK_EQ(tm_kv_move_begin(pool, &move), want);
	if (want) {
		CHECK(kv_snapshot_same(&before, pool));
		return want;
	}
	locate(model, move.from, &victim, &p);
	CHECK(!model->chunk[victim].stuck);
	CHECK_EQ(chunk_free(model, victim), victim_free(model));
	for (u32 q = 0; q < p; q++)
		CHECK(!model->chunk[victim].owner[q]);
	CHECK_EQ(model->chunk[victim].owner[p], move.block.v + 1);
	CHECK_EQ(model->chunk[victim].place[p], move.index);
	locate(model, move.to, &i, &p);
	CHECK(i != victim);
	CHECK_EQ(chunk_free(model, i), least_free(model, 1, victim));
	CHECK_EQ(p, best_run(model, i, 1));
	model->chunk[i].owner[p] = KV_MODEL_MOVING;
	model->move = move;
	model->moving = true;
	model->move_counts = true;
	return 0;
}

int kv_do_move_end(struct kv_model *model, struct tm_kv_pool *pool,
		   bool copied)
{
	int want = !model->moving ? -EINVAL : model->move_counts ? 0 : -ENOENT;
	u32 from, p, to, q;

	kv_snapshot_take(&before, pool);
	CHECK_EQ(tm_kv_move_end(pool, copied), want);
	if (want == -EINVAL) {
		CHECK(kv_snapshot_same(&before, pool));
		return want;
	}
	model->moving = false;
	locate(model, model->move.to, &to, &q);
	CHECK_EQ(model->chunk[to].owner[q], KV_MODEL_MOVING);
	model->chunk[to].owner[q] = 0;
	if (want)
		return want;
	locate(model, model->move.from, &from, &p);
	if (!copied) {
		model->chunk[from].stuck = true;
		return 0;
	}
	model->chunk[to].owner[q] = model->chunk[from].owner[p];
	model->chunk[to].place[q] = model->chunk[from].place[p];
	model->chunk[from].owner[p] = 0;
	model->moved++;
	for (u32 nth = 0; nth < model->nr_blocks; nth++)
		if (model->blocks[nth].v == model->move.block.v &&
		    model->pages[nth] > 1)
			model->run[nth] = false;
	return 0;
}
