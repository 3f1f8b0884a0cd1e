// SPDX-License-Identifier: GPL-2.0-only
/* Level 2, the kv pool: what a block is, and where its pages lie. */
#include <sanitizer/asan_interface.h>
#include <stdlib.h>

#include "kv_model.h"

#define SLOTS	4

static tm_lock_t lock;
static struct tm_kv_pool pool;
static struct kv_model model;

static struct tm_kv_group full(u32 planes, u32 token_bytes)
{
	return (struct tm_kv_group){ TM_KV_FULL, planes, token_bytes, 0 };
}

static struct tm_kv_group window(u32 planes, u32 token_bytes, u32 tokens)
{
	return (struct tm_kv_group){ TM_KV_WINDOW, planes, token_bytes, tokens };
}

static struct tm_kv_group state(u32 planes, u32 bytes)
{
	return (struct tm_kv_group){ TM_KV_STATE, planes, bytes, 0 };
}

/* Groups whose blocks have so many pages each. */
static struct tm_kv_geometry sized(unsigned int page_shift, const u32 *pages,
				   u32 nr)
{
	struct tm_kv_group groups[TM_KV_GROUPS] = { 0 };
	struct tm_kv_geometry geo;

	for (u32 i = 0; i < nr; i++)
		groups[i] = state(pages[i], 1u << page_shift);
	CHECK_EQ(tm_kv_geometry_init(&geo, tm_geometry(page_shift), groups, nr,
				     1), 0);
	for (u32 i = 0; i < nr; i++)
		CHECK_EQ(geo.block_pages[i], pages[i]);
	return geo;
}

static void setup(const struct tm_kv_geometry *geo, u32 nr_slots, u32 nr_chunks)
{
	lock.held = false;
	CHECK_EQ(tm_kv_pool_init(&pool, geo, nr_slots, &lock), 0);
	kv_model_init(&model, geo, nr_slots);
	tm_host_lock(&lock);
	kv_model_compare(&model, &pool);
	while (nr_chunks--)
		CHECK_EQ(kv_do_add(&model, &pool), 0);
}

static void teardown(void)
{
	if (model.moving)
		kv_do_move_end(&model, &pool, false);
	while (model.nr_blocks)
		kv_do_free(&model, &pool, model.nr_blocks - 1);
	while (!kv_do_remove(&model, &pool))
		;
	kv_model_compare(&model, &pool);
	CHECK_EQ(pool.nr_chunks, 0);
	tm_host_unlock(&lock);
	tm_kv_pool_destroy(&pool);
	CHECK(!pool.chunks && !pool.links && !pool.blocks && !pool.marks);
	CHECK_EQ(tm_host_tables(), 0);
}

/* One block of @group. */
static int alloc_one(u32 group)
{
	u32 count[TM_KV_GROUPS] = { 0 };

	count[group] = 1;
	return kv_do_alloc(&model, &pool, count);
}

/* Models as they are: K and V of each layer apart, and all layers together. */
TEST(kv_geometry_of_models)
{
	static const struct {
		u32 layers;
		u32 token_bytes;
		/* Tokens and pages of a block on 4K, 16K and 64K pages. */
		u32 apart[3][2];
		u32 together[3][2];
	} models[] = {
		/* TinyLlama-1.1B, Qwen2.5-0.5B, Llama 3.2 Vision, Gemma-2-2B */
		{ 22, 512, { { 8, 44 }, { 32, 44 }, { 128, 44 } },
		  { { 8, 44 }, { 8, 11 }, { 32, 11 } } },
		{ 24, 256, { { 16, 48 }, { 64, 48 }, { 256, 48 } },
		  { { 8, 24 }, { 8, 6 }, { 16, 3 } } },
		{ 40, 2048, { { 8, 320 }, { 8, 80 }, { 32, 80 } },
		  { { 8, 320 }, { 8, 80 }, { 8, 20 } } },
		{ 26, 2048, { { 8, 208 }, { 8, 52 }, { 32, 52 } },
		  { { 8, 208 }, { 8, 52 }, { 8, 13 } } },
	};

	for (u32 m = 0; m < sizeof(models) / sizeof(*models); m++)
		for (u32 i = 0; i < 3; i++) {
			struct tm_geometry g = tm_geometry(12 + 2 * i);
			u32 planes = 2 * models[m].layers;
			u32 bytes = models[m].token_bytes;
			struct tm_kv_group group = full(planes, bytes);
			struct tm_kv_geometry geo;

			tm_op("model %u, page shift %u", m, 12 + 2 * i);
			CHECK_EQ(tm_kv_geometry_init(&geo, g, &group, 1, 0), 0);
			CHECK_EQ(geo.block_tokens, models[m].apart[i][0]);
			CHECK_EQ(geo.block_pages[0], models[m].apart[i][1]);
			CHECK_EQ(geo.plane_pages[0],
				 models[m].apart[i][1] / planes);
			group = full(1, planes * bytes);
			CHECK_EQ(tm_kv_geometry_init(&geo, g, &group, 1, 0), 0);
			CHECK_EQ(geo.block_tokens, models[m].together[i][0]);
			CHECK_EQ(geo.block_pages[0], models[m].together[i][1]);
			CHECK_EQ(geo.plane_pages[0], geo.block_pages[0]);
		}
}

/* Whether blocks of @tokens are whole pages in each plane, and not too many. */
static bool even(const struct tm_kv_group *groups, u32 nr, u32 page, u32 tokens)
{
	for (u32 i = 0; i < nr; i++)
		if (groups[i].rule != TM_KV_STATE &&
		    ((u64)groups[i].token_bytes * tokens % page ||
		     (u64)groups[i].token_bytes * tokens / page *
		     groups[i].planes > 1u << 20))
			return false;
	return true;
}

static void random_groups(struct tm_rng *rng, struct tm_kv_group *groups, u32 nr)
{
	for (u32 i = 0; i < nr; i++) {
		u32 planes = 1 + tm_rand_below(rng, 64);
		u32 bytes = (1 + tm_rand_below(rng, 99)) <<
			    tm_rand_below(rng, 14);

		groups[i] = full(planes, bytes);
		if (tm_rand_one_in(rng, 3))
			groups[i] = window(planes, bytes, 7);
		if (tm_rand_one_in(rng, 4))
			groups[i] = state(planes, bytes);
	}
}

static void check_geometry(const struct tm_kv_geometry *geo, u32 page,
			   const struct tm_kv_group *groups, u32 nr, u32 tokens)
{
	CHECK_EQ(geo->block_tokens, tokens);
	CHECK_EQ(geo->nr_groups, nr);
	for (u32 i = 0; i < nr; i++) {
		u64 bytes = groups[i].token_bytes;

		if (groups[i].rule != TM_KV_STATE)
			bytes *= tokens;
		CHECK(!memcmp(&geo->group[i], &groups[i], sizeof(groups[i])));
		CHECK_EQ(geo->plane_pages[i], bytes / page + !!(bytes % page));
		CHECK_EQ(geo->block_pages[i],
			 groups[i].planes * geo->plane_pages[i]);
	}
}

TEST_PAGE_SIZES(kv_geometry_random)
{
	struct tm_geometry g = tm_geometry(page_shift);
	u32 page = 1u << page_shift, chosen = 0, given = 0;
	struct tm_round round;

	tm_for_each_round(&round, 4, 400) {
		for (u32 step = 0; step < round.steps; step++) {
			u32 nr = 1 + tm_rand_below(&round.rng, 4);
			u32 tokens = 1 + tm_rand_below(&round.rng, 100);
			struct tm_kv_group groups[4];
			struct tm_kv_geometry geo;
			u32 want = 8;
			int err;

			random_groups(&round.rng, groups, nr);
			tm_op("%u groups, %u planes of %u bytes", nr,
			      groups[0].planes, groups[0].token_bytes);
			while (want <= 512 && !even(groups, nr, page, want))
				want++;
			err = tm_kv_geometry_init(&geo, g, groups, nr, 0);
			CHECK_EQ(err, want <= 512 ? 0 : -EINVAL);
			if (!err) {
				check_geometry(&geo, page, groups, nr, want);
				chosen += want > 8;
			}
			tokens <<= tm_rand_below(&round.rng, page_shift);
			err = tm_kv_geometry_init(&geo, g, groups, nr, tokens);
			CHECK_EQ(err, even(groups, nr, page, tokens) ?
				 0 : -EINVAL);
			if (!err) {
				check_geometry(&geo, page, groups, nr, tokens);
				given += tokens > 512;
			}
		}
	}
	CHECK(round.nr < 4 || (chosen && given));
}

static int geometry(struct tm_kv_group group, u32 tokens)
{
	struct tm_kv_geometry geo;
	int err;

	err = tm_kv_geometry_init(&geo, tm_geometry(12), &group, 1, tokens);
	if (err)
		CHECK(!geo.nr_groups && !geo.block_tokens);
	return err;
}

TEST(kv_geometry_refuses)
{
	struct tm_kv_group groups[TM_KV_GROUPS + 1];
	struct tm_kv_geometry geo;

	for (u32 i = 0; i <= TM_KV_GROUPS; i++)
		groups[i] = full(1, 4096);
	CHECK_EQ(tm_kv_geometry_init(&geo, tm_geometry(12), groups, 0, 1),
		 -EINVAL);
	CHECK_EQ(tm_kv_geometry_init(&geo, tm_geometry(12), groups,
				     TM_KV_GROUPS + 1, 1), -EINVAL);
	CHECK_EQ(tm_kv_geometry_init(&geo, tm_geometry(12), groups,
				     TM_KV_GROUPS, 1), 0);
	/* The last one counts too. */
	groups[TM_KV_GROUPS - 1].planes = 0;
	CHECK_EQ(tm_kv_geometry_init(&geo, tm_geometry(12), groups,
				     TM_KV_GROUPS, 1), -EINVAL);

	CHECK_EQ(geometry(full(0, 4096), 1), -EINVAL);
	CHECK_EQ(geometry(full(1, 0), 1), -EINVAL);
	CHECK_EQ(geometry(full(1, 0), 0), -EINVAL);
	CHECK_EQ(geometry(state(1, 0), 1), -EINVAL);
	CHECK_EQ(geometry(window(1, 4096, 1), 1), 0);
	CHECK_EQ(geometry(window(1, 4096, 0), 1), -EINVAL);
	CHECK_EQ(geometry((struct tm_kv_group){ TM_KV_FULL, 1, 4096, 1 }, 1),
		 -EINVAL);
	CHECK_EQ(geometry((struct tm_kv_group){ TM_KV_STATE, 1, 4096, 1 }, 1),
		 -EINVAL);
	CHECK_EQ(geometry((struct tm_kv_group){ TM_KV_RULES, 1, 4096, 0 }, 1),
		 -EINVAL);
	CHECK_EQ(geometry((struct tm_kv_group){ TM_KV_RULES, 1, 4096, 1 }, 1),
		 -EINVAL);
	/* A plane is whole pages, but not a state's; of what is chosen 512 is most. */
	CHECK_EQ(geometry(full(1, 4095), 1), -EINVAL);
	CHECK_EQ(geometry(full(1, 1024), 6), -EINVAL);
	CHECK_EQ(geometry(full(1, 1024), 12), 0);
	CHECK_EQ(geometry(full(1, 4097), 4096), 0);
	CHECK_EQ(geometry(full(1, 8), 0), 0);
	CHECK_EQ(geometry(full(1, 4), 0), -EINVAL);
	CHECK_EQ(geometry(full(1, 4), 1024), 0);
	CHECK_EQ(geometry(full(1, 1), 0), -EINVAL);
	/* 2^20 pages of 4K are the most, also when products overflow. */
	CHECK_EQ(geometry(full(1u << 20, 4096), 1), 0);
	CHECK_EQ(geometry(full(1u << 20, 4096), 0), -EINVAL);
	CHECK_EQ(geometry(full(1u << 20, 512), 0), 0);
	CHECK_EQ(geometry(full((1u << 20) + 1, 512), 0), -EINVAL);
	CHECK_EQ(geometry(full((1u << 20) + 1, 4096), 1), -EINVAL);
	CHECK_EQ(geometry(full(1u << 20, 4096), 2), -EINVAL);
	CHECK_EQ(geometry(full(1, 1u << 31), 2), 0);
	CHECK_EQ(geometry(full(1, 1u << 31), 4), -EINVAL);
	CHECK_EQ(geometry(full(2, 1u << 31), 2), -EINVAL);
	CHECK_EQ(geometry(full(~0u, 1u << 31), 2), -EINVAL);
	CHECK_EQ(geometry(full(~0u, 512), 0), -EINVAL);
	CHECK_EQ(geometry(full(1u << 31, 4096), 2), -EINVAL);
	CHECK_EQ(geometry(full(1, 4096), ~0u), -EINVAL);
	CHECK_EQ(geometry(full(16, 1u << 28), 1), 0);
	CHECK_EQ(geometry(full(16, 1u << 28), 1u << 31), -EINVAL);
	CHECK_EQ(geometry(full(4096, 1), 1u << 31), -EINVAL);
	CHECK_EQ(geometry(full(1u << 14, 1u << 31), 1u << 31), -EINVAL);
	/* A state has no tokens: it is as large with any number of them. */
	CHECK_EQ(geometry(state(1, ~0u), ~0u), 0);
	CHECK_EQ(geometry(state(1, 1), 0), 0);
}

/* Block by block, token by token: which have a token that the group keeps. */
TEST(kv_held_blocks)
{
	static const u32 block_tokens[] = { 1, 3, 8, 16, 63 };
	static const u32 windows[] = { 1, 2, 7, 8, 9, 64, 100, 4096 };
	struct tm_kv_group groups[2] = { full(1, 4096), state(1, 1) };
	struct tm_kv_geometry geo;
	u32 first;

	for (u32 b = 0; b < 5; b++)
		for (u32 w = 0; w < 8; w++) {
			struct tm_kv_group three[3] = {
				groups[0], groups[1], window(1, 4096, windows[w]),
			};
			u32 t = block_tokens[b];

			CHECK_EQ(tm_kv_geometry_init(&geo, tm_geometry(12),
						     three, 3, t), 0);
			for (u32 n = 0; n <= 300; n++) {
				u32 low = TM_NONE, end = 0;

				for (u32 token = 0; token < n; token++) {
					end = token / t + 1;
					if (n - token <= windows[w] &&
					    low == TM_NONE)
						low = token / t;
				}
				tm_op("block %u window %u tokens %u", t,
				      windows[w], n);
				CHECK_EQ(tm_kv_held(&geo, 0, n, &first), end);
				CHECK_EQ(first, 0);
				CHECK_EQ(tm_kv_held(&geo, 1, n, &first), 1);
				CHECK_EQ(first, 0);
				CHECK_EQ(tm_kv_held(&geo, 2, n, &first), end);
				CHECK_EQ(first, n ? low : 0);
			}
			CHECK_EQ(tm_kv_held(&geo, 0, ~0u, &first),
				 (0xffffffffull + t - 1) / t);
		}
}

TEST(kv_init_refuses)
{
	struct tm_kv_geometry geo = sized(12, (u32[]){ 513, 1025 }, 2);

	CHECK_EQ(tm_kv_pool_init(&pool, &geo, 0, &lock), -EINVAL);
	/* A page and the end of a block have to fit into a link. */
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, 1u << 22, &lock), -EINVAL);
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, ~0u, &lock), -EINVAL);
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, 1, &lock), -EINVAL);
	CHECK_EQ(tm_host_tables(), 0);
	setup(&geo, 2, 2);
	CHECK_EQ(pool.nr_blocks, 2);
	CHECK_EQ(alloc_one(1), -ENOMEM);
	CHECK_EQ(alloc_one(0), 0);
	teardown();
	/* Nor are there numbers for the marks of so many. */
	geo = sized(12, (u32[]){ 1, 65 }, 2);
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, (64ull << 22) / 65 + 1, &lock),
		 -EINVAL);
	/* The most there can be: refused for want of memory only. */
	tm_host_fail_table(1);
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, (64ull << 22) / 65, &lock),
		 -ENOMEM);
	geo = sized(12, (u32[]){ 513, 1025 }, 2);
	tm_host_fail_table(1);
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, (1u << 22) - 1, &lock), -ENOMEM);
}

TEST(kv_init_without_memory)
{
	/* Marks are for blocks of more than 64 pages. */
	static const u32 sizes[] = { 3, 64, 65 };

	for (u32 i = 0; i < 3; i++) {
		struct tm_kv_geometry geo = sized(14, &sizes[i], 1);
		u32 tables = sizes[i] > 64 ? 4 : 3;

		for (u32 nth = 1; nth <= tables; nth++) {
			memset(&pool, 0xa5, sizeof(pool));
			tm_host_fail_table(nth);
			CHECK_EQ(tm_kv_pool_init(&pool, &geo, 4, &lock),
				 -ENOMEM);
			CHECK_EQ(tm_host_tables(), 0);
			/* A failed init leaves something that destroy accepts. */
			tm_kv_pool_destroy(&pool);
		}
		setup(&geo, 4, 0);
		CHECK_EQ(tm_host_tables(), tables);
		CHECK_EQ(pool.nr_blocks, 4 * 128 / sizes[i] * 2);
		CHECK_EQ(pool.nr_marks, tables == 4 ? 4 * 128 / 64 : 0);
		teardown();
	}
}

TEST(kv_destroy_warns_of_chunks)
{
	struct tm_kv_geometry geo = sized(12, (u32[]){ 3 }, 1);

	setup(&geo, 2, 1);
	tm_host_unlock(&lock);
	tm_host_expect_warnings(1);
	tm_kv_pool_destroy(&pool);
	CHECK_EQ(tm_host_missing_warnings(), 0);
}

/* A pool takes as many chunks as it has slots, in turn. */
TEST_PAGE_SIZES(kv_chunks_come_and_go)
{
	struct tm_kv_geometry geo = sized(page_shift, (u32[]){ 5 }, 1);

	setup(&geo, SLOTS, 0);
	for (u32 i = 0; i < 3 * SLOTS; i++) {
		u32 n = i % (SLOTS + 1);

		while (n--)
			CHECK_EQ(kv_do_add(&model, &pool), 0);
		if (i % (SLOTS + 1) == SLOTS)
			CHECK_EQ(kv_do_add(&model, &pool), -ENOSPC);
		kv_model_compare(&model, &pool);
		/* One that has a block stays. */
		if (i % 2 && !alloc_one(0))
			CHECK_EQ(pool.free_pages % kv_model_pages(&model),
				 kv_model_pages(&model) - 5);
		while (!kv_do_remove(&model, &pool))
			;
		CHECK_EQ(pool.nr_chunks, model.nr_blocks);
		if (model.nr_blocks)
			kv_do_free(&model, &pool, 0);
		while (!kv_do_remove(&model, &pool))
			;
	}
	teardown();
}

/* Of any size there are as many blocks as there are pages for: none is lost. */
TEST_PAGE_SIZES(kv_fill_each_size)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 step = pages / 32;

	for (u32 size = 1; size <= 2 * pages + step; size += 1 + size % step) {
		struct tm_kv_geometry geo = sized(page_shift, &size, 1);
		u32 want = SLOTS * pages / size;

		tm_op("blocks of %u pages", size);
		setup(&geo, SLOTS, SLOTS);
		CHECK_EQ(kv_do_alloc(&model, &pool, &(u32){ want + 1 }),
			 -ENOMEM);
		for (u32 n = want; n; n -= n / 2 + n % 2)
			CHECK_EQ(kv_do_alloc(&model, &pool,
					     &(u32){ n / 2 + n % 2 }), 0);
		CHECK_EQ(model.nr_blocks, want);
		CHECK_EQ(alloc_one(0), -ENOMEM);
		CHECK(pool.free_pages < size);
		kv_model_compare(&model, &pool);
		/* Again in the holes of half of them. */
		for (u32 i = 0; i < want / 2; i++)
			kv_do_free(&model, &pool, i);
		kv_model_compare(&model, &pool);
		while (!alloc_one(0))
			;
		CHECK_EQ(model.nr_blocks, want);
		kv_model_compare(&model, &pool);
		teardown();
	}
}

/* While a chunk has room for a block whole, no block is in two chunks. */
TEST_PAGE_SIZES(kv_gathers_only_when_it_must)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 size = pages * 2 / 5;
	struct tm_kv_geometry geo = sized(page_shift, &size, 1);

	setup(&geo, SLOTS, SLOTS);
	for (u32 i = 0; i < 2 * SLOTS; i++) {
		CHECK_EQ(alloc_one(0), 0);
		CHECK_EQ(pool.gathered, 0);
	}
	/* A fifth of each chunk is left: two of them make a block. */
	for (u32 i = 1; i <= SLOTS / 2; i++) {
		CHECK_EQ(alloc_one(0), 0);
		CHECK_EQ(pool.gathered, i);
	}
	CHECK_EQ(alloc_one(0), -ENOMEM);
	kv_model_compare(&model, &pool);
	teardown();
}

/* Groups share chunks, and an allocation of several is all or none. */
TEST_PAGE_SIZES(kv_all_or_none)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 size[3] = { 3, pages / 2 + 1, pages + 1 };
	struct tm_kv_geometry geo = sized(page_shift, size, 3);

	setup(&geo, 3, 2);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 0, 0, 0 }), 0);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 0, 1, 1 }), 0);
	/* One more of 3 pages than there is room for. */
	CHECK_EQ(kv_do_alloc(&model, &pool,
			     (u32[]){ (pages / 2 - 2) / 3 + 1, 0, 0 }),
		 -ENOMEM);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 1, 1, 0 }), -ENOMEM);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ ~0u, ~0u, ~0u }),
		 -ENOMEM);
	CHECK_EQ(kv_do_add(&model, &pool), 0);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 1, 1, 0 }), 0);
	CHECK_EQ(kv_do_alloc(&model, &pool,
			     (u32[]){ (pages / 2 - 2) / 3 + 1, 0, 0 }), 0);
	kv_model_compare(&model, &pool);
	teardown();
}

TEST_PAGE_SIZES(kv_bad_frees_change_nothing)
{
	u32 size[2] = { 1, 7 };
	struct tm_kv_geometry geo = sized(page_shift, size, 2);

	setup(&geo, 2, 1);
	for (u32 round = 0; round < 3; round++) {
		for (u32 b = 0; b <= pool.nr_blocks; b++) {
			bool live = false;

			for (u32 i = 0; i < model.nr_blocks; i++)
				live |= model.blocks[i].v == b;
			if (!live)
				kv_do_bad_free(&model, &pool,
					       (struct tm_kv_block){ b });
		}
		kv_do_bad_free(&model, &pool, (struct tm_kv_block){ ~0u });
		kv_do_bad_free(&model, &pool, (struct tm_kv_block){ 1u << 31 });
		if (round == 0)
			CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 3, 2 }),
				 0);
		else if (round == 1)
			while (!alloc_one(0))
				;
	}
	/* A block once freed is free; a second time it is refused. */
	while (model.nr_blocks) {
		struct tm_kv_block block = model.blocks[0];

		kv_do_free(&model, &pool, 0);
		kv_do_bad_free(&model, &pool, block);
	}
	teardown();
}

/* Chunks that are thinly used are emptied until less than one chunk is free. */
TEST_PAGE_SIZES(kv_moves_empty_chunks)
{
	struct tm_round round;

	tm_for_each_round(&round, 8, 400) {
		u32 size = 1 + tm_rand_below(&round.rng, 40);
		struct tm_kv_geometry geo = sized(page_shift, &size, 1);
		u32 removed = 0, free;

		setup(&geo, KV_MODEL_CHUNKS, KV_MODEL_CHUNKS);
		while (!alloc_one(0))
			;
		free = model.nr_blocks / 4;
		while (model.nr_blocks > free)
			kv_do_free(&model, &pool, tm_rand_below(
					&round.rng, model.nr_blocks));
		while (!kv_do_remove(&model, &pool))
			removed++;
		while (!kv_do_move_begin(&model, &pool)) {
			CHECK_EQ(kv_do_move_end(&model, &pool, true), 0);
			while (!kv_do_remove(&model, &pool))
				removed++;
		}
		kv_model_compare(&model, &pool);
		CHECK(pool.free_pages < kv_model_pages(&model));
		CHECK_EQ(pool.nr_chunks + removed, KV_MODEL_CHUNKS);
		teardown();
	}
}

/* A page that cannot be moved spoils its own chunk only, until one is freed. */
TEST_PAGE_SIZES(kv_moves_that_fail)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 size = pages / 4;
	struct tm_kv_geometry geo = sized(page_shift, &size, 1);
	struct tm_kv_block block;
	u32 failed = 0;

	setup(&geo, SLOTS, SLOTS);
	CHECK_EQ(kv_do_move_end(&model, &pool, true), -EINVAL);
	for (u32 i = 0; i < 4 * SLOTS; i++)
		CHECK_EQ(alloc_one(0), 0);
	/* Two blocks of four stay in each chunk but the last, which is full. */
	for (u32 i = 0; i < 2 * (SLOTS - 1); i++)
		kv_do_free(&model, &pool, i);
	kv_model_compare(&model, &pool);
	while (!kv_do_move_begin(&model, &pool)) {
		CHECK_EQ(kv_do_move_begin(&model, &pool), -EBUSY);
		CHECK_EQ(kv_do_move_end(&model, &pool, false), 0);
		CHECK_EQ(kv_do_move_end(&model, &pool, false), -EINVAL);
		failed++;
		kv_model_compare(&model, &pool);
	}
	CHECK_EQ(failed, SLOTS);
	block = model.blocks[0];
	kv_do_free(&model, &pool, 0);
	CHECK_EQ(kv_do_move_begin(&model, &pool), 0);
	CHECK(model.move.block.v != block.v);
	/* The block goes while its page is on its way. */
	for (u32 i = 0; i < model.nr_blocks; i++)
		if (model.blocks[i].v == model.move.block.v) {
			kv_do_free(&model, &pool, i);
			break;
		}
	kv_model_compare(&model, &pool);
	/* Another block by the same name is another block. */
	CHECK_EQ(alloc_one(0), 0);
	CHECK_EQ(model.blocks[model.nr_blocks - 1].v, model.move.block.v);
	CHECK_EQ(kv_do_move_end(&model, &pool, true), -ENOENT);
	kv_model_compare(&model, &pool);
	CHECK_EQ(pool.moved, 0);
	teardown();
}

/* A shrunk block keeps its first pages, and what was freed serves others. */
TEST_PAGE_SIZES(kv_shrink_and_regrow)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 size[2] = { pages / 2, pages + 3 };
	struct tm_kv_geometry geo = sized(page_shift, size, 2);
	struct tm_page_id first, page;

	setup(&geo, 3, 2);
	CHECK_EQ(alloc_one(0), 0);
	CHECK_EQ(alloc_one(1), 0);
	CHECK_EQ(pool.gathered, 1);
	CHECK(pool.blocks[model.blocks[0].v].run);
	CHECK(!pool.blocks[model.blocks[1].v].run);
	CHECK_EQ(kv_do_regrow(&model, &pool, 0), -EINVAL);
	CHECK_EQ(kv_do_shrink(&model, &pool, 0, 0), -EINVAL);
	CHECK_EQ(kv_do_shrink(&model, &pool, 0, size[0]), -EINVAL);
	CHECK_EQ(kv_do_shrink(&model, &pool, 0, ~0u), -EINVAL);
	CHECK_EQ(tm_kv_page(&pool, model.blocks[0], 0, &first), 0);
	CHECK_EQ(kv_do_shrink(&model, &pool, 0, size[0] - 1), 0);
	CHECK_EQ(kv_do_shrink(&model, &pool, 0, 2), 0);
	kv_model_compare(&model, &pool);
	CHECK_EQ(tm_kv_page(&pool, model.blocks[0], 1, &page), 0);
	CHECK_EQ(page.v, first.v + 1);
	CHECK_EQ(tm_kv_page(&pool, model.blocks[0], 2, &page), -EINVAL);
	CHECK_EQ(tm_kv_page(&pool, model.blocks[0], ~0u, &page), -EINVAL);
	/* The rest is not enough for one of its kind: for it, it is. */
	CHECK_EQ(kv_do_shrink(&model, &pool, 1, 1), 0);
	CHECK_EQ(alloc_one(1), 0);
	CHECK_EQ(kv_do_regrow(&model, &pool, 1), -ENOMEM);
	CHECK_EQ(kv_do_regrow(&model, &pool, 0), 0);
	CHECK_EQ(kv_do_regrow(&model, &pool, 0), -EINVAL);
	kv_model_compare(&model, &pool);
	CHECK_EQ(kv_do_add(&model, &pool), 0);
	CHECK_EQ(kv_do_regrow(&model, &pool, 1), 0);
	kv_model_compare(&model, &pool);
	CHECK_EQ(pool.gathered, 2);
	teardown();
}

/* There are twice as many numbers as blocks fit, for blocks that are shrunk. */
TEST(kv_numbers_run_out)
{
	u32 size[2] = { 20, 30 };
	struct tm_kv_geometry geo = sized(16, size, 2);
	u32 most = 3 * 32 / 20 * 2;

	setup(&geo, 3, 3);
	CHECK_EQ(pool.nr_blocks, most);
	for (u32 i = 0; i < most; i++) {
		CHECK_EQ(alloc_one(0), 0);
		CHECK_EQ(kv_do_shrink(&model, &pool, i, 2), 0);
	}
	CHECK(pool.free_pages > 50);
	CHECK_EQ(alloc_one(1), -ENOMEM);
	CHECK(tm_kv_missing(&pool, (u32[]){ 0, 1 }) == TM_KV_NEVER);
	CHECK_EQ(tm_kv_missing(&pool, (u32[]){ 0, 0 }), 0);
	CHECK_EQ(tm_kv_lack(&pool, pool.free_pages, 0), 0);
	CHECK_EQ(tm_kv_lack(&pool, pool.free_pages + 1, 0), 1);
	CHECK_EQ(kv_do_regrow(&model, &pool, 0), 0);
	kv_do_free(&model, &pool, 3);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 1, 1 }), -ENOMEM);
	CHECK_EQ(alloc_one(1), 0);
	kv_model_compare(&model, &pool);
	teardown();
	/* But with pages for blocks none can be shrunk. */
	geo = sized(16, (u32[]){ 1, 9 }, 2);
	setup(&geo, 3, 3);
	CHECK_EQ(pool.nr_blocks, 3 * 32);
	teardown();
	/* Numbers enough for more pages than 32 bits count. */
	geo = sized(12, (u32[]){ 1, 1u << 20 }, 2);
	setup(&geo, 8, 1);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 0, 4096 }), -ENOMEM);
	CHECK_EQ(tm_kv_missing(&pool, (u32[]){ 0, 4096 }), (1u << 23) - 1);
	teardown();
}

/*
 * Steps are counted by hiding all but what may be looked at: the sanitizer ends the test
 * where something else is.
 */
static void hide(void *table, size_t size)
{
	ASAN_POISON_MEMORY_REGION(table, size);
	(void)table;
	(void)size;
}

static void show(void *entry, size_t size)
{
	ASAN_UNPOISON_MEMORY_REGION(entry, size);
	(void)entry;
	(void)size;
}

static void hide_chains(void)
{
	hide(pool.links, (size_t)pool.nr_slots * kv_model_pages(&model) *
			 sizeof(*pool.links));
	hide(pool.marks, pool.nr_marks * sizeof(*pool.marks));
}

static void show_chains(void)
{
	show(pool.links, (size_t)pool.nr_slots * kv_model_pages(&model) *
			 sizeof(*pool.links));
	show(pool.marks, pool.nr_marks * sizeof(*pool.marks));
}

/* The marks on the way to the @nth of block @b, and those passed over. */
static u32 way_to(u32 b, u32 nth, u32 *way)
{
	u32 m = pool.blocks[b].mark, nr = 0;

	if (!nth)
		return 0;
	way[nr++] = m;
	while (pool.marks[m].nth > nth) {
		u32 jump = pool.marks[m].jump;

		way[nr++] = jump;
		m = pool.marks[jump].nth < nth ? pool.marks[m].before : jump;
		way[nr++] = m;
	}
	return nr;
}

/*
 * Show the way to a page, whose 64 begin at @start, and what is behind it up to the next
 * mark. @pages has the block's.
 */
static void show_way(u32 b, u32 index, const u32 *pages)
{
	u32 start = index & ~63u, way[96], nr;

	show_chains();
	nr = way_to(b, index / 64, way);
	/* For twice as many marks it is some more: 16384 have 2^14. */
	CHECK(nr <= 2 * 2 * 14);
	if (start + 64 < pool.blocks[b].pages)
		way[nr++] = (pool.links[pages[start + 63]] & ~(1u << 31)) -
			    pool.nr_blocks;
	hide_chains();
	while (nr)
		show(&pool.marks[way[--nr]], sizeof(*pool.marks));
	for (u32 i = start; i < start + 64 && i < pool.blocks[b].pages; i++)
		show(&pool.links[pages[i]], sizeof(*pool.links));
}

/* A page of a run is where it has to be: nothing is looked at. */
TEST_PAGE_SIZES(kv_steps_in_a_run)
{
	u32 size = TM_CHUNK_SIZE >> page_shift;
	struct tm_kv_geometry geo = sized(page_shift, &size, 1);
	struct tm_kv_walk walk;

	setup(&geo, 1, 1);
	CHECK_EQ(alloc_one(0), 0);
	hide_chains();
	for (u32 i = 0; i < size; i++) {
		CHECK_EQ(tm_kv_walk_at(&pool, model.blocks[0], i, &walk), 0);
		CHECK_EQ(walk.link, pool.blocks[model.blocks[0].v].link + i);
	}
	show_chains();
	teardown();
}

/* Wherever in the largest block: it is not walked to, nor back from. */
TEST(kv_steps_in_the_largest_block)
{
	u32 size[2] = { 1u << 20, 3 }, chunk = TM_CHUNK_SIZE >> 12;
	struct tm_kv_geometry geo = sized(12, size, 2);
	u32 *pages = calloc(size[0], sizeof(*pages)), nr = 0, slots = 2049;
	struct tm_kv_block block, small[80];
	struct tm_rng rng = { 1 };
	struct tm_page_id page;
	struct tm_chunk_id id;
	struct tm_kv_walk walk;
	struct tm_kv_move move;

	CHECK(pages);
	lock.held = false;
	CHECK_EQ(tm_kv_pool_init(&pool, &geo, slots, &lock), 0);
	kv_model_init(&model, &geo, 1);
	tm_host_lock(&lock);
	for (u32 i = 0; i < slots; i++)
		CHECK_EQ(tm_kv_add_chunk(&pool, (struct tm_chunk_id){ i }), 0);
	CHECK_EQ(tm_kv_alloc(&pool, (u32[]){ 1, 0 }, &block), 0);
	CHECK_EQ(tm_kv_alloc(&pool, (u32[]){ 0, 80 }, small), 0);
	CHECK_OK(kv_check(&pool));
	for (u32 link = pool.blocks[block.v].link; nr < size[0];) {
		pages[nr++] = link - 1;
		link = pool.links[link - 1];
		if (link - (1u << 31) >= pool.nr_blocks && link >> 31)
			link = pool.marks[link - (1u << 31) -
					  pool.nr_blocks].link;
	}
	for (u32 i = 0; i < 4000; i++) {
		u32 index = tm_rand_below(&rng, size[0]);

		if (i < 200)
			index = i < 100 ? i : size[0] - 1 - (i - 100);
		tm_op("page %u", index);
		show_way(block.v, index, pages);
		CHECK_EQ(tm_kv_walk_at(&pool, block, index, &walk), 0);
		show_chains();
		CHECK_EQ(walk.link, pages[index] + 1);
	}
	/* Its last chunk is the one to empty. */
	CHECK_EQ(tm_kv_shrink(&pool, block, size[0] - 300), 0);
	for (u32 i = size[0] - chunk; i < size[0] - 300; i++) {
		tm_op("move page %u", i);
		show_way(block.v, i, pages);
		/* Where it goes; what leads to it, at its end. */
		show(&pool.links[pages[i - 1]], sizeof(*pool.links));
		for (u32 p = 0; p < chunk; p++)
			show(&pool.links[pages[size[0] - 1] / chunk * chunk + p],
			     sizeof(*pool.links));
		CHECK_EQ(tm_kv_move_begin(&pool, &move), 0);
		CHECK_EQ(move.block.v, block.v);
		CHECK_EQ(move.index, i);
		show(&pool.links[pool.moving.to], sizeof(*pool.links));
		CHECK_EQ(tm_kv_move_end(&pool, true), 0);
		show_chains();
		pages[i] = move.to.v;
		CHECK_EQ(tm_kv_page(&pool, block, i, &page), 0);
		CHECK_EQ(page.v, move.to.v);
	}
	CHECK_OK(kv_check(&pool));
	CHECK_EQ(tm_kv_free(&pool, block), 0);
	for (u32 i = 0; i < 80; i++)
		CHECK_EQ(tm_kv_free(&pool, small[i]), 0);
	CHECK_OK(kv_check(&pool));
	while (!tm_kv_remove_chunk(&pool, &id))
		;
	tm_host_unlock(&lock);
	tm_kv_pool_destroy(&pool);
	free(pages);
}

/* A page on its way when its block is shrunk: it stays, or it is gone. */
TEST_PAGE_SIZES(kv_shrink_during_a_move)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 size = pages / 4;
	struct tm_kv_geometry geo = sized(page_shift, &size, 1);

	for (u32 keep = 1; keep <= 3; keep++) {
		u32 nth = 0, index;

		/* Two blocks are in the first chunk, the last one in the other. */
		setup(&geo, 2, 2);
		CHECK_EQ(kv_do_alloc(&model, &pool, &(u32){ 5 }), 0);
		kv_do_free(&model, &pool, 0);
		kv_do_free(&model, &pool, 0);
		CHECK_EQ(kv_do_move_begin(&model, &pool), 0);
		CHECK_EQ(kv_do_move_end(&model, &pool, true), 0);
		CHECK_EQ(kv_do_move_begin(&model, &pool), 0);
		index = model.move.index;
		CHECK_EQ(index, 1);
		while (model.blocks[nth].v != model.move.block.v)
			nth++;
		CHECK_EQ(kv_do_shrink(&model, &pool, nth, keep), 0);
		kv_model_compare(&model, &pool);
		CHECK_EQ(alloc_one(0), 0);
		CHECK_EQ(kv_do_regrow(&model, &pool, nth), 0);
		CHECK_EQ(kv_do_move_end(&model, &pool, true),
			 keep > index ? 0 : -ENOENT);
		kv_model_compare(&model, &pool);
		CHECK_EQ(pool.moved, keep > index ? 2 : 1);
		teardown();
	}
}

enum op {
	OP_ALLOC,
	OP_ALLOC_MANY,
	OP_FILL,
	OP_FREE,
	OP_FREE_ALL,
	OP_DOUBLE_FREE,
	OP_BAD_FREE,
	OP_ADD,
	OP_REMOVE,
	OP_MOVE_BEGIN,
	OP_MOVE_END,
	OP_MOVE_ALL,
	OP_SHRINK,
	OP_SHRINK_ALL,
	OP_REGROW,
	OPS,
};

static void random_free(struct tm_rng *rng, bool twice)
{
	struct tm_kv_block block;
	u32 nth;

	if (!model.nr_blocks)
		return;
	nth = tm_rand_below(rng, model.nr_blocks);
	block = model.blocks[nth];
	tm_op("%sfree block %u", twice ? "double " : "", block.v);
	kv_do_free(&model, &pool, nth);
	if (twice)
		kv_do_bad_free(&model, &pool, block);
}

static void random_bad_free(struct tm_rng *rng)
{
	struct tm_kv_block block = {
		tm_rand_below(rng, pool.nr_blocks + 2)
	};

	for (u32 i = 0; i < model.nr_blocks; i++)
		if (model.blocks[i].v == block.v)
			return;
	tm_op("bad free %u", block.v);
	kv_do_bad_free(&model, &pool, block);
}

static void random_shrink(struct tm_rng *rng, u32 nth)
{
	u32 pages = tm_rand_below(rng, model.pages[nth] + 1);

	tm_op("shrink block %u to %u pages", model.blocks[nth].v, pages);
	kv_do_shrink(&model, &pool, nth, pages);
}

static void random_op(enum op op, struct tm_rng *rng)
{
	u32 count[TM_KV_GROUPS] = { 0 };
	u32 nr_groups = model.geo.nr_groups;
	bool copied;

	switch (op) {
	case OP_ALLOC:
		count[tm_rand_below(rng, nr_groups)] = 1;
		tm_op("alloc one");
		kv_do_alloc(&model, &pool, count);
		break;
	case OP_ALLOC_MANY:
		for (u32 g = 0; g < nr_groups; g++)
			count[g] = tm_rand_below(rng, 4);
		tm_op("alloc %u %u %u", count[0], count[1], count[2]);
		kv_do_alloc(&model, &pool, count);
		break;
	case OP_FILL:
		count[tm_rand_below(rng, nr_groups)] = 1;
		tm_op("fill with %u %u %u", count[0], count[1], count[2]);
		while (!kv_do_alloc(&model, &pool, count))
			;
		break;
	case OP_FREE:
		random_free(rng, false);
		break;
	case OP_FREE_ALL:
		tm_op("free all");
		while (model.nr_blocks)
			kv_do_free(&model, &pool,
				   tm_rand_below(rng, model.nr_blocks));
		break;
	case OP_DOUBLE_FREE:
		random_free(rng, true);
		break;
	case OP_BAD_FREE:
		random_bad_free(rng);
		break;
	case OP_ADD:
		tm_op("add a chunk");
		kv_do_add(&model, &pool);
		break;
	case OP_REMOVE:
		tm_op("remove a chunk");
		kv_do_remove(&model, &pool);
		break;
	case OP_MOVE_BEGIN:
		tm_op("begin a move");
		kv_do_move_begin(&model, &pool);
		break;
	case OP_MOVE_END:
		copied = !tm_rand_one_in(rng, 4);
		tm_op("end a move, %s", copied ? "copied" : "failed");
		kv_do_move_end(&model, &pool, copied);
		break;
	case OP_MOVE_ALL:
		tm_op("move all");
		while (!kv_do_move_begin(&model, &pool))
			kv_do_move_end(&model, &pool, true);
		break;
	case OP_SHRINK:
		if (model.nr_blocks)
			random_shrink(rng, tm_rand_below(rng, model.nr_blocks));
		break;
	case OP_SHRINK_ALL:
		for (u32 nth = 0; nth < model.nr_blocks; nth++)
			random_shrink(rng, nth);
		break;
	case OP_REGROW:
		if (!model.nr_blocks)
			break;
		count[0] = tm_rand_below(rng, model.nr_blocks);
		tm_op("regrow block %u", model.blocks[count[0]].v);
		kv_do_regrow(&model, &pool, count[0]);
		break;
	case OPS:
		break;
	}
}

/* From single pages to two chunks, at random and odd. */
static u32 random_size(struct tm_rng *rng, u32 pages)
{
	switch (tm_rand_below(rng, 4)) {
	case 0:
		return 1 + tm_rand_below(rng, 8);
	case 1:
		return pages / 4 + tm_rand_below(rng, pages);
	case 2:
		return 1 + tm_rand_below(rng, 2 * pages);
	default:
		return 1 + tm_rand_below(rng, pages / 4);
	}
}

TEST_PAGE_SIZES(kv_random)
{
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	struct tm_round round;

	tm_for_each_round(&round, 12, 1500) {
		u32 nr = 1 + tm_rand_below(&round.rng, 3);
		u32 weights[OPS] = { 0 }, size[3];
		struct tm_kv_geometry geo;

		for (u32 i = 0; i < nr; i++)
			size[i] = random_size(&round.rng, pages);
		geo = sized(page_shift, size, nr);
		setup(&geo, KV_MODEL_CHUNKS - tm_rand_below(&round.rng, 4), 0);
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 6);
				weights[tm_rand_one_in(&round.rng, 2) ?
					OP_FREE : OP_ALLOC] += 20;
				weights[OP_FILL] =
					tm_rand_one_in(&round.rng, 3);
				weights[OP_FREE_ALL] =
					tm_rand_one_in(&round.rng, 4);
				weights[OP_MOVE_ALL] =
					tm_rand_one_in(&round.rng, 3);
				weights[OP_SHRINK_ALL] =
					tm_rand_one_in(&round.rng, 3);
			}
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng);
			kv_model_compare(&model, &pool);
		}
		teardown();
	}
}

/* Every sequence of calls up to a depth: two sizes, two chunks of 8 pages. */
static u64 sequences;

static void descend(u32 depth)
{
	static struct kv_model models[16];
	static struct kv_snapshot pools[16];
	u32 nr_blocks = model.nr_blocks;

	kv_model_compare(&model, &pool);
	sequences++;
	if (!depth)
		return;
	models[depth] = model;
	kv_snapshot_take(&pools[depth], &pool);
	for (u32 call = 0; call < 8 + 3 * nr_blocks; call++) {
		static const u32 counts[3][2] = {
			{ 1, 0 }, { 0, 1 }, { 1, 1 },
		};
		int err = 0;

		tm_op("depth left %u: call %u", depth, call);
		switch (call) {
		case 0:
		case 1:
		case 2:
			err = kv_do_alloc(&model, &pool, counts[call]);
			break;
		case 3:
			err = kv_do_add(&model, &pool);
			break;
		case 4:
			err = kv_do_remove(&model, &pool);
			break;
		case 5:
			err = kv_do_move_begin(&model, &pool);
			break;
		case 6:
		case 7:
			err = kv_do_move_end(&model, &pool, call == 7);
			break;
		default:
			if (call - 8 < nr_blocks)
				kv_do_free(&model, &pool, call - 8);
			else if (call - 8 < 2 * nr_blocks)
				err = kv_do_shrink(&model, &pool,
						   call - 8 - nr_blocks, 2);
			else
				err = kv_do_regrow(&model, &pool,
						   call - 8 - 2 * nr_blocks);
		}
		/* What was refused changed nothing; an orphan's end did. */
		if (!err || pools[depth].pool.moving.active !=
			    pool.moving.active)
			descend(depth - 1);
		kv_snapshot_restore(&pools[depth], &pool);
		model = models[depth];
	}
}

TEST(kv_exhaustive_sequences)
{
	u32 size[2] = { 3, 5 };
	struct tm_kv_geometry geo = sized(18, size, 2);

	setup(&geo, 2, 2);
	CHECK_EQ(alloc_one(0), 0);
	CHECK_EQ(alloc_one(1), 0);
	CHECK_EQ(alloc_one(0), 0);
	descend(5);
	CHECK(sequences > 10000);
	teardown();
}

static void unlocked(void *which)
{
	u32 count[1] = { 0 };
	struct tm_kv_block block = { 0 };
	struct tm_kv_walk walk = { 1u << 31 };
	struct tm_kv_move move;
	struct tm_chunk_id id = { 0 };
	struct tm_page_id page;

	lock.held = false;
	switch (*(int *)which) {
	case 0:
		(void)!tm_kv_add_chunk(&pool, id);
		break;
	case 1:
		(void)!tm_kv_remove_chunk(&pool, &id);
		break;
	case 2:
		(void)tm_kv_missing(&pool, count);
		break;
	case 3:
		(void)!tm_kv_alloc(&pool, count, &block);
		break;
	case 4:
		(void)!tm_kv_free(&pool, block);
		break;
	case 5:
		(void)!tm_kv_walk_start(&pool, block, &walk);
		break;
	case 6:
		(void)tm_kv_walk_next(&pool, &walk, &page);
		break;
	case 7:
		(void)!tm_kv_move_begin(&pool, &move);
		break;
	case 8:
		(void)!tm_kv_move_end(&pool, true);
		break;
	case 9:
		(void)tm_kv_lack(&pool, 0, 0);
		break;
	case 10:
		(void)tm_kv_pages(&pool, block);
		break;
	case 11:
		(void)!tm_kv_shrink(&pool, block, 1);
		break;
	case 12:
		(void)!tm_kv_regrow(&pool, block);
		break;
	case 13:
		(void)!tm_kv_page(&pool, block, 0, &page);
		break;
	case 14:
		(void)!tm_kv_walk_at(&pool, block, 0, &walk);
		break;
	}
}

TEST(kv_calls_need_the_lock)
{
	static const char *const calls[] = {
		"add_chunk", "remove_chunk", "missing", "alloc", "free",
		"walk_start", "walk_next", "move_begin", "move_end", "lack",
		"pages", "shrink", "regrow", "page", "walk_at",
	};
	struct tm_kv_geometry geo = sized(12, (u32[]){ 3 }, 1);

	setup(&geo, 2, 1);
	for (int i = 0; i < 15; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	teardown();
}

/* Do @damage to a copy of the pool, check, and undo it. */
#define EXPECT(want, damage)						\
	do {								\
		const char *found;					\
									\
		damage;							\
		found = kv_check(&pool);				\
		if (!found || strcmp(found, want))			\
			tm_test_fail(__FILE__, __LINE__,		\
				     "found \"%s\", not \"%s\"",	\
				     found ? found : "nothing", want);	\
		kv_snapshot_restore(&good, &pool);			\
		CHECK_OK(kv_check(&pool));				\
	} while (0)

/* All other tests rest on the checker: each damage must be found, and named. */
TEST_PAGE_SIZES(kv_check_finds_damage)
{
	static struct kv_snapshot good;
	u32 pages = TM_CHUNK_SIZE >> page_shift;
	u32 size[2] = { 3, pages - 4 };
	struct tm_kv_geometry geo = sized(page_shift, size, 2);
	struct tm_kv_chunk *c;
	u32 *links;

	/* Blocks 0 and 1 and a free page, then block 2, then an empty chunk. */
	setup(&geo, 4, 3);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 0, 1 }), 0);
	CHECK_EQ(kv_do_alloc(&model, &pool, (u32[]){ 2, 0 }), 0);
	kv_model_compare(&model, &pool);
	kv_snapshot_take(&good, &pool);
	c = &pool.chunks[(pool.blocks[0].link - 1) / pages];
	links = &pool.links[(c - pool.chunks) * pages];

	EXPECT("a slot without a chunk has free pages",
	       pool.chunks[pool.free_slot].bits[0] = 1);
	EXPECT("a slot without a chunk is stuck",
	       pool.chunks[pool.free_slot].stuck = true);
	if (pages < 64 * TM_KV_WORDS)
		EXPECT("a page beyond the chunk is free",
		       c->bits[pages / 64] |= 1ull << (pages % 64));
	EXPECT("a free page has a link", links[pages - 1] = 1);
	EXPECT("a chunk's count is not its free pages", c->nr_free++);
	EXPECT("a chunk's count is not its free pages",
	       c->bits[(pages - 1) / 64] ^= 1ull << ((pages - 1) % 64));
	EXPECT("a chunk is there twice", pool.chunks[1].id =
	       pool.chunks[0].id);
	EXPECT("the pool's chunk count is wrong", pool.nr_chunks++);
	EXPECT("the pool's free page count is wrong", pool.free_pages--);
	EXPECT("a block has no valid group", pool.blocks[0].group = 2);
	EXPECT("a block has a page that is not in the pool",
	       pool.blocks[0].link = 0);
	EXPECT("a block has a page that is not in the pool",
	       pool.blocks[0].link = pool.free_slot * pages + 1);
	EXPECT("a block has a page that is free",
	       pool.blocks[0].link = (c - pool.chunks) * pages + pages);
	EXPECT("a page is in two blocks",
	       pool.blocks[1].link = pool.blocks[0].link);
	EXPECT("a page is in two blocks", links[1] = pool.blocks[0].link);
	EXPECT("a block ends as another one", links[pages - 5] ^= 1);
	EXPECT("a run is not one", links[0]++);
	EXPECT("a block has not as many pages as it says",
	       (pool.blocks[1].run = false, pool.blocks[1].link++));
	EXPECT("a block has not as many pages as it says",
	       pool.blocks[0].pages++);
	EXPECT("a block has more pages than its group says, or none",
	       pool.geo.block_pages[1]--);
	EXPECT("a page set aside for a move is in a block",
	       (pool.moving.active = true,
		pool.moving.to = pool.blocks[0].link - 1));
	EXPECT("a page is neither free nor in a block",
	       (c->bits[(pages - 1) / 64] ^= 1ull << ((pages - 1) % 64),
		c->nr_free--, pool.free_pages--));
	EXPECT("a group's count is not its blocks", pool.used[1]++);
	if (size[1] > 2 * TM_KV_MARK_PAGES) {
		struct tm_kv_mark *last = &pool.marks[pool.blocks[0].mark];
		u32 *to = &links[TM_KV_MARK_PAGES - 1];

		EXPECT("a link leads to a mark that is not there",
		       *to = (1u << 31) + pool.nr_blocks + pool.nr_marks);
		EXPECT("a mark is where there should be none", links[0] = *to);
		EXPECT("a page has no mark",
		       *to = pool.marks[*to - (1u << 31) - pool.nr_blocks].link);
		EXPECT("a mark is of another page", last->block = 1);
		EXPECT("a mark is of another page", last->nth--);
		EXPECT("a mark does not know the one before it",
		       last->before = pool.blocks[0].mark);
		EXPECT("a mark jumps elsewhere",
		       last->jump = pool.blocks[0].mark);
		EXPECT("a block does not know its last mark",
		       pool.blocks[0].mark = last->before);
	}
	if (pool.nr_marks) {
		EXPECT("a mark of a block is on the list of those of none",
		       pool.marks[pool.free_mark].nth = 1);
		EXPECT("the list of marks is a ring, or too long",
		       pool.marks[pool.free_mark].link = pool.free_mark);
		EXPECT("a mark is lost", pool.free_mark = pool.nr_marks);
	}
	EXPECT("the mask of lists is wrong", pool.lists[0] ^= 1u << 31);
	EXPECT("the mask of lists is wrong", pool.head[pages] = TM_NONE);
	EXPECT("a chunk is on the list of another count",
	       (pool.head[2] = c - pool.chunks, pool.lists[0] |= 4));
	EXPECT("a chunk's back link is wrong", c->prev = 3);
	/* A ring shows as a back link that cannot be right. */
	EXPECT("a chunk's back link is wrong",
	       pool.chunks[pool.head[pages]].next = pool.head[pages]);
	EXPECT("a chunk is on no list",
	       (pool.head[1] = TM_NONE, pool.lists[0] &= ~2ull));
	EXPECT("a slot with a chunk is on the list of those without",
	       pool.free_slot = 0);
	EXPECT("the list of slots is a ring",
	       pool.chunks[pool.free_slot].next = pool.free_slot);
	EXPECT("a slot is lost", pool.free_slot = TM_NONE);
	EXPECT("a block is on the list of free records", pool.free_block = 0);
	EXPECT("the list of records is a ring",
	       pool.blocks[pool.free_block].link = pool.free_block);
	EXPECT("a record is lost",
	       pool.free_block = pool.blocks[pool.free_block].link);
	teardown();
}
