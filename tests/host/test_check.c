// SPDX-License-Identifier: GPL-2.0-only
/*
 * The structural checkers: each damage done by hand must be found, and named.
 * All other tests rest on them.
 */
#include "core/check.h"
#include "harness.h"

static tm_lock_t lock;

static void expect(const char *got, const char *want, int line)
{
	if (!got || strcmp(got, want))
		tm_test_fail(__FILE__, line, "found \"%s\", not \"%s\"",
			     got ? got : "nothing", want);
}

/* Do @damage to a copy of what @pool points to, check, and undo it. */
#define EXPECT_CHUNK(want, damage)					\
	do {								\
		damage;							\
		expect(tm_chunk_check(&pool), want, __LINE__);		\
		pool = good;						\
		memcpy(pool.chunks, chunks, sizeof(chunks));		\
		CHECK_OK(tm_chunk_check(&pool));			\
	} while (0)

TEST(check_finds_chunk_damage)
{
	static const u8 stacked[] = {
		TM_CHUNK_ABSENT, TM_CHUNK_FREE_ZEROED, TM_CHUNK_FREE_DIRTY,
		TM_CHUNK_FREE_SPLIT,
	};
	static const u8 unstacked[] = {
		TM_CHUNK_GROWING, TM_CHUNK_ZEROING, TM_CHUNK_OWNED,
	};
	struct tm_chunk_pool pool, good;
	struct tm_chunk chunks[14], *c;
	struct tm_chunk_id id;
	bool zeroed;

	/*
	 * 0 and 1 owned, 2 growing, 3 zeroing, 4 to 6 zeroed, 7 and 8 dirty,
	 * 9 and 10 split, 11 to 13 absent.
	 */
	CHECK_EQ(tm_chunk_pool_init(&pool, 14, &lock), 0);
	tm_host_lock(&lock);
	for (u32 v = 0; v < 2; v++) {
		CHECK_EQ(tm_chunk_grow_begin(&pool, &id), 0);
		tm_chunk_grow_end(&pool, id, false);
		CHECK_EQ(tm_chunk_take(&pool, v ? TM_OWNER_BUDDY :
						  TM_OWNER_TENSOR,
				       false, false, &id, &zeroed), 0);
		CHECK_EQ(id.v, v);
	}
	for (u32 v = 2; v < 11; v++) {
		CHECK_EQ(tm_chunk_grow_begin(&pool, &id), 0);
		CHECK_EQ(id.v, v);
		if (v >= 9) {
			tm_chunk_grow_take(&pool, id, TM_OWNER_BUDDY,
					   (struct tm_chunk_form){
						   .split = true });
			CHECK(!tm_chunk_put(&pool, id, false));
		} else if (v != 2) {
			tm_chunk_grow_end(&pool, id, v >= 4 && v < 7);
		}
		if (v == 3)
			CHECK_EQ(tm_chunk_zero_begin(&pool, &id), 0);
	}
	tm_host_unlock(&lock);
	CHECK_OK(tm_chunk_check(&pool));
	good = pool;
	memcpy(chunks, pool.chunks, sizeof(chunks));
	c = pool.chunks;

	EXPECT_CHUNK("a chunk has no valid state",
		     c[0].state = TM_CHUNK_STATES);
	EXPECT_CHUNK("a chunk has no valid state", c[13].state = 0xff);
	for (u32 v = 3; v < 11; v++) {
		EXPECT_CHUNK("a free chunk is charged or of the wrong form",
			     c[v].form.split = v < 9);
		EXPECT_CHUNK("a free chunk is charged or of the wrong form",
			     c[v].form.charged = true);
	}
	/* An owned chunk may have any form; that of the last memory is nothing. */
	for (u32 i = 1; i < 4; i++) {
		for (u32 v = 0; v < 14; v++)
			if (v < 3 || v >= 11)
				c[v].form = (struct tm_chunk_form){
					.split = i & 1,
					.charged = i >> 1,
				};
		CHECK_OK(tm_chunk_check(&pool));
	}
	EXPECT_CHUNK("an owned chunk has no valid owner",
		     c[0].owner = TM_OWNERS);
	for (u32 s = 0; s < TM_CHUNK_STATES; s++) {
		EXPECT_CHUNK("a state's count is not the chunks in it",
			     pool.count[s]++);
		EXPECT_CHUNK("a state's count is not the chunks in it",
			     pool.count[s]--);
	}
	for (u32 o = 0; o < TM_OWNERS; o++) {
		EXPECT_CHUNK("an owner's count is not the chunks it owns",
			     pool.owned[o]++);
		EXPECT_CHUNK("an owner's count is not the chunks it owns",
			     pool.owned[o]--);
	}
	EXPECT_CHUNK("an owner's count is not the chunks it owns",
		     c[0].owner = TM_OWNER_BUDDY);
	/* A chunk that changed its state and its count, but not its stack. */
	EXPECT_CHUNK("a chunk is on the stack of another state",
		     (c[5].state = TM_CHUNK_FREE_DIRTY,
		      pool.count[TM_CHUNK_FREE_ZEROED]--,
		      pool.count[TM_CHUNK_FREE_DIRTY]++));
	for (u32 i = 0; i < 3; i++)
		EXPECT_CHUNK("a state that has no stack has one",
			     (pool.head[unstacked[i]] = i > 1 ? 0 : 2 + i,
			      c[2 + i].next = TM_NONE));
	for (u32 i = 0; i < 4; i++) {
		u32 s = stacked[i], top = good.head[s], last = top;

		while (chunks[last].next != TM_NONE)
			last = chunks[last].next;
		CHECK(top != last);
		EXPECT_CHUNK("a chunk is on the stack of another state",
			     pool.head[s] = good.head[stacked[(i + 1) % 4]]);
		EXPECT_CHUNK("a chunk is on the stack of another state",
			     c[last].next = 0);
		EXPECT_CHUNK("a stack leads out of the table",
			     pool.head[s] = 14);
		EXPECT_CHUNK("a stack leads out of the table",
			     c[last].next = 14);
		EXPECT_CHUNK("a stack leads out of the table",
			     c[top].next = TM_NONE - 1);
		/* The smallest ring, and the one that has all. */
		EXPECT_CHUNK("a stack is a ring", c[top].next = top);
		EXPECT_CHUNK("a stack is a ring", c[last].next = last);
		EXPECT_CHUNK("a stack is a ring", c[last].next = top);
		EXPECT_CHUNK("a stack does not hold all chunks of its state",
			     pool.head[s] = TM_NONE);
		EXPECT_CHUNK("a stack does not hold all chunks of its state",
			     c[top].next = TM_NONE);
		EXPECT_CHUNK("a stack does not hold all chunks of its state",
			     pool.head[s] = c[top].next);
	}
	tm_table_free(pool.chunks);
}

#define EXPECT_BUDDY(want, damage)					\
	do {								\
		damage;							\
		expect(tm_buddy_check(&buddy), want, __LINE__);		\
		buddy = good;						\
		memcpy(buddy.chunks, chunks, sizeof(chunks));		\
		CHECK_OK(tm_buddy_check(&buddy));			\
	} while (0)

static void flip(const struct tm_buddy *buddy, struct tm_buddy_chunk *c,
		 unsigned int order, u32 i)
{
	c->bits[buddy->word[order] + i / 64] ^= 1ull << (i % 64);
}

TEST_PAGE_SIZES(check_finds_buddy_damage)
{
	struct tm_buddy_chunk chunks[6], *c;
	struct tm_page_id page, run[3];
	struct tm_buddy buddy, good;
	struct tm_geometry g = tm_geometry(page_shift);
	unsigned int top = g.chunk_order - 1;
	u32 mine;

	/* 0 and 4 are not in the pool; one chunk of the others is in use. */
	CHECK_EQ(tm_buddy_init(&buddy, g, 6, &lock), 0);
	tm_host_lock(&lock);
	tm_buddy_add_chunk(&buddy, (struct tm_chunk_id){ 1 });
	tm_buddy_add_chunk(&buddy, (struct tm_chunk_id){ 2 });
	tm_buddy_add_chunk(&buddy, (struct tm_chunk_id){ 3 });
	tm_buddy_add_chunk(&buddy, (struct tm_chunk_id){ 5 });
	/* An order 0 at 0, an order 2, and one full chunk. */
	CHECK_EQ(tm_buddy_alloc(&buddy, top, &page), 0);
	CHECK_EQ(tm_buddy_alloc(&buddy, top, &page), 0);
	for (u32 i = 0; i < 3; i++)
		CHECK_EQ(tm_buddy_alloc(&buddy, i % 2 * 2, &run[i]), 0);
	tm_host_unlock(&lock);
	mine = tm_page_chunk(g, run[0]).v;
	CHECK(mine != tm_page_chunk(g, page).v);
	CHECK_OK(tm_buddy_check(&buddy));
	good = buddy;
	memcpy(chunks, buddy.chunks, sizeof(chunks));
	c = &buddy.chunks[mine];
	/* Pages 0 and 1, then a free pair, then 4 to 7. */
	CHECK(c->run[0] == 1 && c->run[1] == 1 && c->run[4] == 3);
	CHECK_EQ(c->orders & 0xf, 2 | (g.chunk_order > 3 ? 8 : 0));

	EXPECT_BUDDY("a chunk outside the pool is not zero",
		     c->in_pool = false);
	/* Every byte of it. */
	for (u32 i = 0; i < sizeof(*c); i++)
		if (i != offsetof(struct tm_buddy_chunk, in_pool))
			EXPECT_BUDDY("a chunk outside the pool is not zero",
				     ((u8 *)&buddy.chunks[4])[i] = 1);
	EXPECT_BUDDY("a run and its buddy are both free",
		     flip(&buddy, c, 1, 0));
	EXPECT_BUDDY("a run and its buddy are both free",
		     flip(&buddy, c, top, 0));
	EXPECT_BUDDY("two free runs overlap", (flip(&buddy, c, 0, 2),
					       c->nr[0]++, c->orders |= 1));
	EXPECT_BUDDY("an order's count is not its free runs",
		     flip(&buddy, c, 1, 1));
	EXPECT_BUDDY("an order's count is not its free runs", c->nr[0]++);
	EXPECT_BUDDY("an order's count is not its free runs",
		     c->nr[top]--);
	EXPECT_BUDDY("the mask of free orders is wrong", c->orders ^= 1);
	EXPECT_BUDDY("the mask of free orders is wrong", c->orders ^= 2);
	EXPECT_BUDDY("the mask of free orders is wrong",
		     c->orders ^= 1u << g.chunk_order);
	EXPECT_BUDDY("an allocated run is as large as a chunk",
		     c->run[0] = g.chunk_order + 1);
	EXPECT_BUDDY("an allocated run is as large as a chunk",
		     c->run[3] = 0x3f);
	EXPECT_BUDDY("an allocated run is not aligned", c->run[1] = 2);
	EXPECT_BUDDY("an allocated run overlaps another run", c->run[0] = 2);
	EXPECT_BUDDY("an allocated run overlaps another run", c->run[0] = 4);
	EXPECT_BUDDY("an allocated run overlaps another run", c->run[2] = 1);
	EXPECT_BUDDY("a page is neither free nor allocated", c->run[0] = 0);
	EXPECT_BUDDY("a page is neither free nor allocated", c->run[4] = 2);
	EXPECT_BUDDY("a page is neither free nor allocated",
		     (flip(&buddy, c, 1, 1), c->nr[1]--, c->orders &= ~2u));
	EXPECT_BUDDY("a page without a run has a mark", c->run[3] = 0x80);
	EXPECT_BUDDY("a page without a run has a mark", c->run[3] = 0x40);
	EXPECT_BUDDY("an order's count is not its allocated runs",
		     c->used[0]++);
	EXPECT_BUDDY("an order's count is not its allocated runs",
		     (c->used[0]--, c->used[1]++));
	EXPECT_BUDDY("a count is not the runs that may not move",
		     c->run[0] |= 0x80);
	EXPECT_BUDDY("a count is not the runs that may not move",
		     c->unmovable++);
	EXPECT_BUDDY("a count is not the runs that are moved to",
		     c->run[0] |= 0x40);
	EXPECT_BUDDY("a count is not the runs that are moved to",
		     c->arriving++);
	EXPECT_BUDDY("a chunk is in the wrong class",
		     (c->unmovable++, c->run[0] |= 0x80));
	EXPECT_BUDDY("a chunk is in the wrong class",
		     c->class = TM_BUDDY_UNMOVABLE);
	EXPECT_BUDDY("a chunk is in the wrong class",
		     c->class = TM_BUDDY_DRAINING);
	EXPECT_BUDDY("a chunk is in the wrong class", c->drain = 1);
	EXPECT_BUDDY("a chunk that drains has a run that may not move",
		     (c->drain = 1, c->class = TM_BUDDY_DRAINING,
		      c->unmovable++, c->run[0] |= 0x80));
	EXPECT_BUDDY("a chunk that drains has a run that may not move",
		     (c->drain = 1, c->class = TM_BUDDY_DRAINING,
		      c->arriving++, c->run[0] |= 0x40));
	EXPECT_BUDDY("a chunk drains that nobody began to drain",
		     (c->drain = 1, c->class = TM_BUDDY_DRAINING));
	EXPECT_BUDDY("a drain is lost or has ended twice", buddy.drains++);
	EXPECT_BUDDY("a drain is lost or has ended twice", buddy.emptied++);
	EXPECT_BUDDY("a drain is lost or has ended twice", buddy.halved++);
	EXPECT_BUDDY("a drain is lost or has ended twice", buddy.given_up++);
	EXPECT_BUDDY("a drain is lost or has ended twice", buddy.starved++);
	for (u32 class = 0; class < TM_BUDDY_CLASSES; class++)
		for (unsigned int o = 0; o < TM_BUDDY_ORDERS; o++)
			EXPECT_BUDDY("a class's count is not its free runs",
				     buddy.free_runs[class][o]++);
	/* Right in itself, but the pool has it in another class. */
	EXPECT_BUDDY("a class's count is not its free runs",
		     (c->drain = ++buddy.drains,
		      c->class = TM_BUDDY_DRAINING));
	EXPECT_BUDDY("the pool's chunk count is wrong", buddy.nr_chunks++);
	EXPECT_BUDDY("the pool's chunk count is wrong", buddy.nr_chunks--);
	EXPECT_BUDDY("the pool's free page count is wrong",
		     buddy.free_pages++);
	EXPECT_BUDDY("the pool's free page count is wrong",
		     buddy.free_pages--);
	for (u32 list = 0; list < TM_BUDDY_LISTS; list++)
		EXPECT_BUDDY("the mask of lists is wrong",
			     buddy.lists ^= 1u << list);
	EXPECT_BUDDY("the mask of lists is wrong",
		     buddy.head[g.chunk_order] = TM_NONE);
	/* A chunk on the wrong list, one that is full, one not in the pool. */
	EXPECT_BUDDY("a chunk is on the list of another order",
		     (buddy.head[0] = mine, buddy.lists |= 1));
	EXPECT_BUDDY("a chunk is on the list of another order",
		     buddy.head[g.chunk_order] = tm_page_chunk(g, page).v);
	EXPECT_BUDDY("a chunk is on the list of another order",
		     buddy.head[g.chunk_order] = 0);
	/* The right order of another class. */
	EXPECT_BUDDY("a chunk is on the list of another order",
		     (buddy.head[TM_BUDDY_ORDERS + top] = buddy.head[top],
		      buddy.lists |= 1u << (TM_BUDDY_ORDERS + top)));
	/* A chunk that has more free than its list says. */
	EXPECT_BUDDY("a chunk is on the list of another order",
		     buddy.head[top] = buddy.head[g.chunk_order]);
	EXPECT_BUDDY("a chunk's back link is wrong", c->prev = 0);
	EXPECT_BUDDY("a chunk's back link is wrong",
		     buddy.chunks[buddy.head[g.chunk_order]].prev = 3);
	EXPECT_BUDDY("a chunk's back link is wrong",
		     buddy.chunks[buddy.head[g.chunk_order]].next =
		     buddy.head[g.chunk_order]);
	EXPECT_BUDDY("a chunk with free runs is on no list",
		     (buddy.head[top] = TM_NONE, buddy.lists &= ~(1u << top)));
	EXPECT_BUDDY("a chunk with free runs is on no list",
		     buddy.chunks[buddy.head[g.chunk_order]].next = TM_NONE);
	tm_table_free(buddy.chunks);
}
