// SPDX-License-Identifier: GPL-2.0-only
#include "core/buddy.h"

tm_static_assert(TM_BUDDY_ORDERS <= 16, "orders are bits of a u16");

static void tm_buddy_list_add(struct tm_buddy *buddy, u32 v, unsigned int list)
{
	struct tm_buddy_chunk *c = &buddy->chunks[v];

	c->prev = TM_NONE;
	c->next = buddy->head[list];
	if (c->next != TM_NONE)
		buddy->chunks[c->next].prev = v;
	buddy->head[list] = v;
	buddy->lists |= 1u << list;
}

static void tm_buddy_list_del(struct tm_buddy *buddy, u32 v, unsigned int list)
{
	struct tm_buddy_chunk *c = &buddy->chunks[v];

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

/* The chunk had @was as its orders: move it to the list of its largest one. */
static void tm_buddy_relist(struct tm_buddy *buddy, u32 v, u32 was)
{
	u32 now = buddy->chunks[v].orders;

	/* Same highest bit, or both 0. */
	if ((was ^ now) <= (was & now))
		return;
	if (was)
		tm_buddy_list_del(buddy, v, tm_fls32(was));
	if (now)
		tm_buddy_list_add(buddy, v, tm_fls32(now));
}

static void tm_buddy_set(struct tm_buddy *buddy, struct tm_buddy_chunk *c,
			 unsigned int order, u32 i)
{
	c->bits[buddy->word[order] + i / 64] |= (u64)1 << (i % 64);
	c->nr[order]++;
	c->orders |= 1u << order;
}

static void tm_buddy_clear(struct tm_buddy *buddy, struct tm_buddy_chunk *c,
			   unsigned int order, u32 i)
{
	c->bits[buddy->word[order] + i / 64] &= ~((u64)1 << (i % 64));
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
		buddy->head[o] = TM_NONE;
	}
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
	tm_buddy_relist(buddy, id.v, 0);
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
	tm_buddy_relist(buddy, id.v, was);
	c->in_pool = false;
	c->next = 0;
	c->prev = 0;
	buddy->nr_chunks--;
	buddy->free_pages -= tm_chunk_pages(buddy->geometry);
	return 0;
}

int tm_buddy_alloc(struct tm_buddy *buddy, unsigned int order,
		   struct tm_page_id *page)
{
	struct tm_buddy_chunk *c;
	unsigned int o;
	u32 v, i, was;

	tm_assert_locked(buddy->lock);
	if (order > tm_buddy_max_order(buddy))
		return -EINVAL;
	if (!(buddy->lists >> order))
		return -ENOMEM;

	v = buddy->head[order + tm_ctz64(buddy->lists >> order)];
	c = &buddy->chunks[v];
	was = c->orders;
	o = order + tm_ctz64(was >> order);
	i = tm_buddy_first(buddy, c, o);
	tm_buddy_clear(buddy, c, o, i);
	while (o > order) {
		o--;
		i <<= 1;
		tm_buddy_set(buddy, c, o, i ^ 1);
		buddy->splits++;
	}
	tm_buddy_relist(buddy, v, was);
	buddy->free_pages -= 1u << order;
	buddy->allocs++;
	c->run[i << order] = order + 1;
	*page = tm_page_id(buddy->geometry, (struct tm_chunk_id){ v },
			   i << order);
	return 0;
}

int tm_buddy_free(struct tm_buddy *buddy, struct tm_page_id page,
		  unsigned int order, bool *empty)
{
	struct tm_chunk_id id = tm_page_chunk(buddy->geometry, page);
	u32 index = tm_page_index(buddy->geometry, page);
	struct tm_buddy_chunk *c;
	u32 i, was;

	tm_assert_locked(buddy->lock);
	/* Order ~0 would match a page where no run starts. */
	if (id.v >= buddy->nr_slots || order > tm_buddy_max_order(buddy))
		return -EINVAL;
	c = &buddy->chunks[id.v];
	if (c->run[index] != order + 1)
		return -EINVAL;

	i = index >> order;
	c->run[index] = 0;
	was = c->orders;
	buddy->free_pages += 1u << order;
	buddy->frees++;
	/* Ends at the latest with the whole chunk, which has no buddy. */
	while (order < buddy->geometry.chunk_order &&
	       tm_buddy_test(buddy, c, order, i ^ 1)) {
		tm_buddy_clear(buddy, c, order, i ^ 1);
		i >>= 1;
		order++;
		buddy->merges++;
	}
	tm_buddy_set(buddy, c, order, i);
	tm_buddy_relist(buddy, id.v, was);
	*empty = order == buddy->geometry.chunk_order;
	return 0;
}
