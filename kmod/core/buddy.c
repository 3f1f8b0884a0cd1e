// SPDX-License-Identifier: GPL-2.0-only
#include "core/buddy.h"

tm_static_assert(TM_BUDDY_ORDERS <= 16, "orders are bits of a u16");
tm_static_assert(TM_BUDDY_LISTS <= 32, "lists are bits of a u32");
tm_static_assert(TM_BUDDY_ORDERS <= TM_BUDDY_RUN_ORDER,
		 "an order and two flags share a byte");

/*
 * Passes that leave a chunk alone which was given up: long enough that a run that
 * stays pinned costs little, short enough that a chunk is not lost for long. Linux
 * defers compaction that failed in the same spirit (defer_compaction()).
 */
#define TM_BUDDY_REST	8

static unsigned int tm_buddy_list(const struct tm_buddy_chunk *c, u32 orders)
{
	return c->class * TM_BUDDY_ORDERS + tm_fls32(orders);
}

static void tm_buddy_list_add(struct tm_buddy *buddy, u32 v, u32 orders)
{
	struct tm_buddy_chunk *c = &buddy->chunks[v];
	unsigned int list = tm_buddy_list(c, orders);

	c->prev = TM_NONE;
	c->next = buddy->head[list];
	if (c->next != TM_NONE)
		buddy->chunks[c->next].prev = v;
	buddy->head[list] = v;
	buddy->lists |= 1u << list;
}

static void tm_buddy_list_del(struct tm_buddy *buddy, u32 v, u32 orders)
{
	struct tm_buddy_chunk *c = &buddy->chunks[v];
	unsigned int list = tm_buddy_list(c, orders);

	if (c->next != TM_NONE)
		buddy->chunks[c->next].prev = c->prev;
	if (c->prev != TM_NONE) {
		buddy->chunks[c->prev].next = c->next;
		return;
	}
	buddy->head[list] = c->next;
	if (c->next == TM_NONE)
		buddy->lists &= ~(1u << list);
}

static void tm_buddy_move(struct tm_buddy *buddy, u32 v, u32 was,
			  enum tm_buddy_class class)
{
	struct tm_buddy_chunk *c = &buddy->chunks[v];
	u32 now = c->orders;

	if (was)
		tm_buddy_list_del(buddy, v, was);
	for (u32 left = class == c->class ? 0 : now; left; left &= left - 1) {
		unsigned int o = tm_ctz64(left);

		buddy->free_runs[c->class][o] -= c->nr[o];
		buddy->free_runs[class][o] += c->nr[o];
	}
	c->class = class;
	if (now)
		tm_buddy_list_add(buddy, v, now);
}

/*
 * The chunk had @was as its orders and is of @class from now on: see that it is on
 * the list that it belongs to.
 */
static inline void tm_buddy_relist(struct tm_buddy *buddy, u32 v, u32 was,
				   enum tm_buddy_class class)
{
	const struct tm_buddy_chunk *c = &buddy->chunks[v];

	/* The same highest bit, or both 0. */
	if (class != c->class || (was ^ c->orders) > (was & c->orders))
		tm_buddy_move(buddy, v, was, class);
}

static void tm_buddy_set_class(struct tm_buddy *buddy, u32 v,
			       enum tm_buddy_class class)
{
	tm_buddy_relist(buddy, v, buddy->chunks[v].orders, class);
}

static void tm_buddy_set(struct tm_buddy *buddy, struct tm_buddy_chunk *c,
			 unsigned int order, u32 i)
{
	c->bits[buddy->word[order] + i / 64] |= (u64)1 << (i % 64);
	c->nr[order]++;
	buddy->free_runs[c->class][order]++;
	c->orders |= 1u << order;
}

static void tm_buddy_clear(struct tm_buddy *buddy, struct tm_buddy_chunk *c,
			   unsigned int order, u32 i)
{
	c->bits[buddy->word[order] + i / 64] &= ~((u64)1 << (i % 64));
	buddy->free_runs[c->class][order]--;
	if (!--c->nr[order])
		c->orders &= ~(1u << order);
}

/* Some free run of @order; the caller knows that there is one. */
static u32 tm_buddy_first(const struct tm_buddy *buddy,
			  const struct tm_buddy_chunk *c, unsigned int order)
{
	const u64 *word = &c->bits[buddy->word[order]];
	u32 base = 0;

	while (!*word) {
		word++;
		base += 64;
	}
	return base + tm_ctz64(*word);
}

int tm_buddy_init(struct tm_buddy *buddy, struct tm_geometry g, u32 nr_slots,
		  tm_lock_t *lock)
{
	u32 word = 0;

	*buddy = (struct tm_buddy){ .geometry = g, .lock = lock };
	buddy->chunks = tm_table_alloc(nr_slots, sizeof(*buddy->chunks));
	if (!buddy->chunks)
		return -ENOMEM;
	buddy->nr_slots = nr_slots;
	for (unsigned int o = 0; o <= g.chunk_order; o++) {
		u32 runs = 1u << (g.chunk_order - o);

		buddy->word[o] = word;
		word += (runs + 63) / 64;
	}
	for (u32 list = 0; list < TM_BUDDY_LISTS; list++)
		buddy->head[list] = TM_NONE;
	return 0;
}

void tm_buddy_destroy(struct tm_buddy *buddy)
{
	tm_warn_on(buddy->nr_chunks);
	tm_table_free(buddy->chunks);
	buddy->chunks = NULL;
}

void tm_buddy_add_chunk(struct tm_buddy *buddy, struct tm_chunk_id id)
{
	struct tm_buddy_chunk *c;

	tm_assert_locked(buddy->lock);
	if (tm_warn_on(id.v >= buddy->nr_slots))
		return;
	c = &buddy->chunks[id.v];
	if (tm_warn_on(c->in_pool))
		return;
	c->in_pool = true;
	tm_buddy_set(buddy, c, buddy->geometry.chunk_order, 0);
	tm_buddy_relist(buddy, id.v, 0, TM_BUDDY_MOVABLE);
	buddy->nr_chunks++;
	buddy->free_pages += tm_chunk_pages(buddy->geometry);
}

int tm_buddy_remove_chunk(struct tm_buddy *buddy, struct tm_chunk_id id)
{
	struct tm_buddy_chunk *c;
	u32 was;

	tm_assert_locked(buddy->lock);
	if (id.v >= buddy->nr_slots)
		return -EINVAL;
	c = &buddy->chunks[id.v];
	was = c->orders;
	if (!c->in_pool || was != 1u << buddy->geometry.chunk_order)
		return -EBUSY;
	tm_buddy_clear(buddy, c, buddy->geometry.chunk_order, 0);
	tm_buddy_relist(buddy, id.v, was, TM_BUDDY_MOVABLE);
	buddy->emptied += c->drain != 0;
	c->drain = 0;
	c->rest = 0;
	c->in_pool = false;
	c->next = 0;
	c->prev = 0;
	buddy->nr_chunks--;
	buddy->free_pages -= tm_chunk_pages(buddy->geometry);
	return 0;
}

/* The lists of @class whose chunks have a free run of @order to @most. */
static u32 tm_buddy_lists(const struct tm_buddy *buddy,
			  enum tm_buddy_class class, unsigned int order,
			  unsigned int most)
{
	u32 upto = (2u << most) - (1u << order);

	return buddy->lists & upto << (class * TM_BUDDY_ORDERS);
}

/* The chunk for a run of @class among those whose largest is @order to @most. */
static u32 tm_buddy_find(const struct tm_buddy *buddy,
			 enum tm_buddy_class class, unsigned int order,
			 unsigned int most)
{
	u32 lists = tm_buddy_lists(buddy, class, order, most);

	if (lists)
		return buddy->head[tm_ctz64(lists)];
	if (class == TM_BUDDY_MOVABLE) {
		lists = tm_buddy_lists(buddy, TM_BUDDY_UNMOVABLE, order, most);
		return lists ? buddy->head[tm_ctz64(lists)] : TM_NONE;
	}
	lists = tm_buddy_lists(buddy, TM_BUDDY_MOVABLE, order, most);
	return lists ? buddy->head[tm_fls32(lists)] : TM_NONE;
}

/* Allocate from @v, which has a free run of @order or more. */
static struct tm_page_id tm_buddy_take(struct tm_buddy *buddy, u32 v,
				       unsigned int order, bool movable)
{
	struct tm_buddy_chunk *c = &buddy->chunks[v];
	enum tm_buddy_class class = c->class;
	u32 was = c->orders;
	unsigned int o = order + tm_ctz64(was >> order);
	u32 i = tm_buddy_first(buddy, c, o);

	tm_buddy_clear(buddy, c, o, i);
	buddy->splits += o - order;
	while (o > order) {
		o--;
		i <<= 1;
		tm_buddy_set(buddy, c, o, i ^ 1);
	}
	buddy->free_pages -= 1u << order;
	buddy->allocs++;
	c->used[order]++;
	c->run[i << order] = order + 1;
	if (!movable) {
		c->run[i << order] |= TM_BUDDY_RUN_UNMOVABLE;
		c->unmovable++;
		class = TM_BUDDY_UNMOVABLE;
	}
	tm_buddy_relist(buddy, v, was, class);
	return tm_page_id(buddy->geometry, (struct tm_chunk_id){ v },
			  i << order);
}

/* The chunk is in service again; compaction leaves it alone until pass @rest. */
static void tm_buddy_drain_end(struct tm_buddy *buddy, u32 v, u64 rest)
{
	buddy->chunks[v].drain = 0;
	buddy->chunks[v].rest = rest;
	tm_buddy_set_class(buddy, v, TM_BUDDY_MOVABLE);
}

/*
 * End a drain for an allocation that finds nothing else. To grow the pool instead
 * would take from level 1 the chunk that the drain is to give it.
 */
static u32 tm_buddy_reclaim(struct tm_buddy *buddy, unsigned int order)
{
	u32 lists = tm_buddy_lists(buddy, TM_BUDDY_DRAINING, order,
				   buddy->geometry.chunk_order);
	u32 v;

	if (!lists)
		return TM_NONE;
	v = buddy->head[tm_ctz64(lists)];
	buddy->starved++;
	tm_buddy_drain_end(buddy, v, buddy->pass + 1);
	return v;
}

static int tm_buddy_alloc_class(struct tm_buddy *buddy,
				enum tm_buddy_class class, unsigned int order,
				struct tm_page_id *page)
{
	u32 v;

	tm_assert_locked(buddy->lock);
	if (order > tm_buddy_max_order(buddy))
		return -EINVAL;
	v = tm_buddy_find(buddy, class, order, buddy->geometry.chunk_order);
	if (v == TM_NONE)
		v = tm_buddy_reclaim(buddy, order);
	if (v == TM_NONE)
		return -ENOMEM;
	*page = tm_buddy_take(buddy, v, order, class == TM_BUDDY_MOVABLE);
	return 0;
}

int tm_buddy_alloc(struct tm_buddy *buddy, unsigned int order,
		   struct tm_page_id *page)
{
	return tm_buddy_alloc_class(buddy, TM_BUDDY_MOVABLE, order, page);
}

int tm_buddy_alloc_unmovable(struct tm_buddy *buddy, unsigned int order,
			     struct tm_page_id *page)
{
	return tm_buddy_alloc_class(buddy, TM_BUDDY_UNMOVABLE, order, page);
}

int tm_buddy_free(struct tm_buddy *buddy, struct tm_page_id page,
		  unsigned int order, bool *empty)
{
	struct tm_chunk_id id = tm_page_chunk(buddy->geometry, page);
	u32 index = tm_page_index(buddy->geometry, page);
	struct tm_buddy_chunk *c;
	enum tm_buddy_class class;
	unsigned int merged;
	u32 i, was;
	u8 run;

	tm_assert_locked(buddy->lock);
	/* Order ~0 would match a page where no run starts. */
	if (id.v >= buddy->nr_slots || order > tm_buddy_max_order(buddy))
		return -EINVAL;
	c = &buddy->chunks[id.v];
	run = c->run[index];
	if ((run & TM_BUDDY_RUN_ORDER) != order + 1)
		return -EINVAL;

	i = index >> order;
	class = c->class;
	if (run & TM_BUDDY_RUN_ARRIVING)
		c->arriving--;
	if (run & TM_BUDDY_RUN_UNMOVABLE && !--c->unmovable)
		class = TM_BUDDY_MOVABLE;
	c->run[index] = 0;
	c->used[order]--;
	was = c->orders;
	buddy->free_pages += 1u << order;
	buddy->frees++;
	/* Ends at the latest with the whole chunk, which has no buddy. */
	for (merged = order; merged < buddy->geometry.chunk_order &&
	     tm_buddy_test(buddy, c, merged, i ^ 1); merged++) {
		tm_buddy_clear(buddy, c, merged, i ^ 1);
		i >>= 1;
	}
	buddy->merges += merged - order;
	tm_buddy_set(buddy, c, merged, i);
	tm_buddy_relist(buddy, id.v, was, class);
	*empty = merged == buddy->geometry.chunk_order;
	return 0;
}

int tm_buddy_drain_begin(struct tm_buddy *buddy, struct tm_chunk_id id,
			 struct tm_buddy_drain *drain)
{
	struct tm_buddy_chunk *c;

	tm_assert_locked(buddy->lock);
	if (id.v >= buddy->nr_slots)
		return -EINVAL;
	c = &buddy->chunks[id.v];
	if (!c->in_pool || c->orders == 1u << buddy->geometry.chunk_order)
		return -EINVAL;
	if (c->class != TM_BUDDY_MOVABLE || c->arriving)
		return -EBUSY;
	c->drain = ++buddy->drains;
	tm_buddy_set_class(buddy, id.v, TM_BUDDY_DRAINING);
	*drain = (struct tm_buddy_drain){
		.id = id,
		.nr = c->drain,
		.order = tm_buddy_max_order(buddy),
	};
	return 0;
}

void tm_buddy_drain_half(const struct tm_buddy *buddy,
			 struct tm_buddy_drain *drain)
{
	tm_assert_locked(buddy->lock);
	drain->half = true;
	drain->order = tm_buddy_max_order(buddy) - 1;
}

int tm_buddy_drain_next(struct tm_buddy *buddy, struct tm_buddy_drain *drain,
			struct tm_page_id *page, unsigned int *order)
{
	const struct tm_buddy_chunk *c = &buddy->chunks[drain->id.v];
	u32 index;

	tm_assert_locked(buddy->lock);
	if (c->drain != drain->nr)
		return -ENOENT;
	for (;;) {
		/* Nothing is allocated here any more: what was passed is done. */
		while (c->used[drain->order] &&
		       drain->index < tm_chunk_pages(buddy->geometry)) {
			index = drain->index;
			drain->index += 1u << drain->order;
			if (c->run[index] != drain->order + 1)
				continue;
			*page = tm_page_id(buddy->geometry, drain->id, index);
			*order = drain->order;
			return 0;
		}
		if (!drain->order)
			break;
		drain->order--;
		drain->index = 0;
	}
	if (drain->half) {
		/* Not again in this pass: the room it made is to be used. */
		buddy->halved++;
		tm_buddy_drain_end(buddy, drain->id.v, buddy->pass + 1);
	}
	return -ENOENT;
}

int tm_buddy_drain_alloc(struct tm_buddy *buddy,
			 const struct tm_buddy_drain *drain,
			 unsigned int order, struct tm_page_id *page)
{
	unsigned int most = tm_buddy_max_order(buddy);
	struct tm_buddy_chunk *c;
	u32 v;

	tm_assert_locked(buddy->lock);
	if (order > most)
		return -EINVAL;
	if (buddy->chunks[drain->id.v].drain != drain->nr)
		return -ENOENT;
	v = tm_buddy_find(buddy, TM_BUDDY_MOVABLE, order, most);
	if (v == TM_NONE) {
		buddy->starved++;
		tm_buddy_drain_end(buddy, drain->id.v, buddy->pass + 1);
		return -ENOMEM;
	}
	*page = tm_buddy_take(buddy, v, order, true);
	c = &buddy->chunks[v];
	c->run[tm_page_index(buddy->geometry, *page)] |= TM_BUDDY_RUN_ARRIVING;
	c->arriving++;
	return 0;
}

int tm_buddy_drain_moved(struct tm_buddy *buddy, struct tm_page_id from,
			 struct tm_page_id to, unsigned int order, bool *empty)
{
	u32 v = tm_page_chunk(buddy->geometry, to).v;
	u32 index = tm_page_index(buddy->geometry, to);
	struct tm_buddy_chunk *c;
	int err;

	tm_assert_locked(buddy->lock);
	if (v >= buddy->nr_slots || from.v == to.v)
		return -EINVAL;
	c = &buddy->chunks[v];
	if (c->run[index] != (TM_BUDDY_RUN_ARRIVING | (order + 1)))
		return -EINVAL;
	err = tm_buddy_free(buddy, from, order, empty);
	if (err)
		return err;
	c->run[index] &= ~TM_BUDDY_RUN_ARRIVING;
	c->arriving--;
	buddy->moved_runs++;
	buddy->moved_pages += 1u << order;
	return 0;
}

void tm_buddy_drain_cancel(struct tm_buddy *buddy,
			   const struct tm_buddy_drain *drain)
{
	tm_assert_locked(buddy->lock);
	if (buddy->chunks[drain->id.v].drain != drain->nr)
		return;
	buddy->given_up++;
	tm_buddy_drain_end(buddy, drain->id.v, buddy->pass + TM_BUDDY_REST);
}
