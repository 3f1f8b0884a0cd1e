// SPDX-License-Identifier: GPL-2.0-only
/*
 * The prefix index against a list: what is cached stands in it in the order in which
 * it is to go, and finding looks at every block.
 */
#include "core/prefix.h"
#include "harness.h"

#define MOST_BLOCKS	256
#define SEQUENTIAL	4096

struct model_block {
	struct tm_prefix_key key;
	u32 refs;
	/* When it was published, from 1; 0 for not at all. */
	u32 published;
};

static tm_sleep_lock_t lock;
static struct tm_prefix prefix;
static struct model_block blocks[MOST_BLOCKS];
/* The cached blocks, oldest first. */
static u32 order[MOST_BLOCKS];
static u32 nr_order;
static u32 nr_blocks;
static u32 clock;

static void setup(u32 nr)
{
	lock.held = false;
	memset(blocks, 0, sizeof(blocks));
	nr_order = 0;
	nr_blocks = nr;
	clock = 0;
	CHECK_EQ(tm_prefix_init(&prefix, nr, &lock), 0);
	tm_host_lock(&lock);
}

static void teardown(void)
{
	tm_host_unlock(&lock);
	tm_prefix_destroy(&prefix);
	CHECK(!prefix.blocks && !prefix.buckets);
	CHECK_EQ(tm_host_tables(), 0);
}

static struct tm_prefix_key key(u64 hash, u64 tenant, u32 group)
{
	return (struct tm_prefix_key){ { { hash, ~hash } }, tenant, group };
}

static bool same(const struct tm_prefix_key *a, const struct tm_prefix_key *b)
{
	return a->hash.v[0] == b->hash.v[0] && a->hash.v[1] == b->hash.v[1] &&
	       a->tenant == b->tenant && a->group == b->group;
}

/* One in use before one that is not; of these the one published last. */
static u32 model_find(const struct tm_prefix_key *k)
{
	u32 found = TM_NONE;

	for (u32 i = 0; i < nr_blocks; i++) {
		const struct model_block *b = &blocks[i];

		if (!b->published || !same(&b->key, k))
			continue;
		if (found == TM_NONE || (!blocks[found].refs && b->refs) ||
		    (!blocks[found].refs == !b->refs &&
		     b->published > blocks[found].published))
			found = i;
	}
	return found;
}

static void compare(void)
{
	u32 older = TM_NONE, published = 0, chained = 0, block;

	for (u32 i = 0; i < nr_blocks; i++) {
		const struct model_block *b = &blocks[i];

		CHECK_EQ(tm_prefix_refs(&prefix, i), b->refs);
		CHECK_EQ(prefix.blocks[i].published, b->published != 0);
		if (!b->published)
			continue;
		published++;
		CHECK(same(&prefix.blocks[i].key, &b->key));
		CHECK_EQ(tm_prefix_find(&prefix, &b->key), model_find(&b->key));
	}
	CHECK_EQ(prefix.published, published);
	for (u32 i = 0; i < prefix.nr_buckets; i++)
		for (block = prefix.buckets[i]; block != TM_NONE;
		     block = prefix.blocks[block].chain) {
			CHECK(blocks[block].published);
			CHECK(chained++ < published);
		}
	CHECK_EQ(chained, published);
	CHECK_EQ(prefix.cached, nr_order);
	block = prefix.oldest;
	for (u32 i = 0; i < nr_order; i++) {
		CHECK_EQ(block, order[i]);
		CHECK_EQ(prefix.blocks[block].older, older);
		older = block;
		block = prefix.blocks[block].newer;
	}
	CHECK_EQ(block, TM_NONE);
	CHECK_EQ(prefix.newest, older);
}

static void remove_from_order(u32 block)
{
	u32 at = 0;

	while (order[at] != block)
		at++;
	CHECK(at < nr_order);
	nr_order--;
	memmove(&order[at], &order[at + 1], (nr_order - at) * sizeof(*order));
}

static void get(u32 block)
{
	tm_prefix_get(&prefix, block);
	if (blocks[block].published && !blocks[block].refs)
		remove_from_order(block);
	blocks[block].refs++;
}

static bool put(u32 block)
{
	bool gone = tm_prefix_put(&prefix, block);

	blocks[block].refs--;
	if (blocks[block].published && !blocks[block].refs)
		order[nr_order++] = block;
	CHECK_EQ(gone, !blocks[block].published && !blocks[block].refs);
	return gone;
}

static void publish(u32 block, struct tm_prefix_key k)
{
	tm_prefix_publish(&prefix, block, &k);
	blocks[block].key = k;
	blocks[block].published = ++clock;
}

static void forget(u32 block)
{
	tm_prefix_forget(&prefix, block);
	if (!blocks[block].refs)
		remove_from_order(block);
	blocks[block].published = 0;
}

TEST(prefix_init_without_memory)
{
	for (u32 nth = 1; nth <= 2; nth++) {
		memset(&prefix, 0xa5, sizeof(prefix));
		tm_host_fail_table(nth);
		CHECK_EQ(tm_prefix_init(&prefix, 100, &lock), -ENOMEM);
		CHECK_EQ(tm_host_tables(), 0);
		/* A failed init leaves something that destroy accepts. */
		tm_prefix_destroy(&prefix);
	}
	/* A bucket for each block: a power of two. */
	for (u32 nr = 1; nr <= 129; nr++) {
		setup(nr);
		CHECK_EQ(prefix.nr_blocks, nr);
		CHECK(prefix.nr_buckets >= nr && prefix.nr_buckets < 2 * nr);
		CHECK(!(prefix.nr_buckets & (prefix.nr_buckets - 1)));
		CHECK_EQ(tm_host_tables(), 2);
		compare();
		teardown();
	}
}

/* A block's way: in use, found, cached, found again, forgotten. */
TEST(prefix_life_of_a_block)
{
	struct tm_prefix_key k = key(7, 1, 0);

	setup(4);
	get(2);
	CHECK_EQ(tm_prefix_find(&prefix, &k), TM_NONE);
	publish(2, k);
	CHECK_EQ(tm_prefix_find(&prefix, &k), 2);
	CHECK(!put(2));
	CHECK_EQ(prefix.cached, 1);
	CHECK_EQ(tm_prefix_find(&prefix, &k), 2);
	get(2);
	CHECK_EQ(prefix.cached, 0);
	get(2);
	CHECK(!put(2));
	forget(2);
	CHECK_EQ(tm_prefix_find(&prefix, &k), TM_NONE);
	CHECK(put(2));
	compare();
	/* The same block again, by another name, and forgotten while cached. */
	get(2);
	publish(2, key(8, 1, 0));
	CHECK(!put(2));
	forget(2);
	CHECK_EQ(prefix.cached, 0);
	compare();
	teardown();
}

/* Each part of a key tells blocks apart. */
TEST(prefix_keys)
{
	static const struct tm_prefix_key keys[] = {
		{ { { 1, 1 } }, 1, 1 }, { { { 2, 1 } }, 1, 1 },
		{ { { 1, 2 } }, 1, 1 }, { { { 1, 1 } }, 2, 1 },
		{ { { 1, 1 } }, 1, 2 }, { { { 0, 0 } }, 0, 0 },
		{ { { ~0ull, ~0ull } }, ~0ull, 15 },
	};
	u32 nr = sizeof(keys) / sizeof(*keys);

	/* One bucket, then many. */
	for (u32 nr_there = 1; nr_there <= 64; nr_there *= 64) {
		setup(nr_there);
		for (u32 i = 0; i < nr && nr_there == 1; i++) {
			get(0);
			publish(0, keys[i]);
			for (u32 k = 0; k < nr; k++)
				CHECK_EQ(tm_prefix_find(&prefix, &keys[k]),
					 k == i ? 0 : TM_NONE);
			forget(0);
			CHECK(put(0));
		}
		for (u32 i = 0; i < nr && nr_there > 1; i++) {
			get(i);
			publish(i, keys[i]);
			for (u32 k = 0; k < nr; k++)
				CHECK_EQ(tm_prefix_find(&prefix, &keys[k]),
					 k <= i ? k : TM_NONE);
		}
		teardown();
	}
}

/* Least recently used first: who is used again goes to the end. */
TEST(prefix_order)
{
	static const u32 want[] = { 0, 3, 4, 1 };

	setup(6);
	for (u32 i = 0; i < 5; i++) {
		get(i);
		publish(i, key(i, 0, 0));
	}
	for (u32 i = 0; i < 5; i++)
		CHECK(!put(i));
	get(1);
	get(2);
	CHECK(!put(1));
	forget(2);
	CHECK(put(2));
	compare();
	CHECK_EQ(nr_order, 4);
	for (u32 i = 0; i < 4; i++)
		CHECK_EQ(order[i], want[i]);
	/* From both ends and the middle. */
	forget(0);
	forget(1);
	compare();
	forget(3);
	forget(4);
	compare();
	CHECK_EQ(prefix.oldest, TM_NONE);
	CHECK_EQ(prefix.newest, TM_NONE);
	teardown();
}

/* Blocks of one key are found in use first, and go one by one. */
TEST(prefix_duplicates)
{
	struct tm_prefix_key k = key(7, 1, 0);

	setup(4);
	for (u32 i = 0; i < 4; i++) {
		get(i);
		publish(i, k);
	}
	CHECK_EQ(tm_prefix_find(&prefix, &k), 3);
	CHECK(!put(3));
	CHECK_EQ(tm_prefix_find(&prefix, &k), 2);
	CHECK(!put(1));
	CHECK(!put(2));
	CHECK_EQ(tm_prefix_find(&prefix, &k), 0);
	CHECK(!put(0));
	CHECK_EQ(tm_prefix_find(&prefix, &k), 3);
	get(1);
	CHECK_EQ(tm_prefix_find(&prefix, &k), 1);
	CHECK(!put(1));
	for (u32 left = 4; left; left--) {
		CHECK_EQ(prefix.cached, left);
		compare();
		forget(prefix.oldest);
	}
	CHECK_EQ(tm_prefix_find(&prefix, &k), TM_NONE);
	teardown();
}

/* Numbers that follow each other, in any part of the key, share few buckets. */
TEST(prefix_spreads)
{
	u32 longest[5] = { 0 };

	for (u32 part = 0; part < 5; part++) {
		CHECK_EQ(tm_prefix_init(&prefix, SEQUENTIAL, &lock), 0);
		lock.held = true;
		for (u32 i = 0; i < SEQUENTIAL; i++) {
			struct tm_prefix_key k = {
				{ { part == 0 ? i : part == 4 ? (u64)i << 40 : 0,
				    part == 1 ? i : 0 } },
				part == 2 ? i : 0, part == 3 ? i : 0,
			};

			tm_prefix_get(&prefix, i);
			tm_prefix_publish(&prefix, i, &k);
		}
		for (u32 i = 0; i < prefix.nr_buckets; i++) {
			u32 length = 0;

			for (u32 b = prefix.buckets[i]; b != TM_NONE;
			     b = prefix.blocks[b].chain)
				length++;
			if (length > longest[part])
				longest[part] = length;
		}
		tm_prefix_destroy(&prefix);
		/* At random it would be 6 or 7. */
		CHECK(longest[part] && longest[part] <= 10);
	}
}

enum op {
	OP_GET,
	OP_PUT,
	OP_PUBLISH,
	OP_FORGET,
	OP_EVICT,
	OP_PIN,
	OPS,
};

/* Take many blocks and change one's mind. */
static void pin(struct tm_rng *rng)
{
	static u32 pinned[64], before[MOST_BLOCKS];
	u32 nr = tm_rand_below(rng, 64), nr_before = nr_order;

	memcpy(before, order, sizeof(order));
	for (u32 i = 0; i < nr; i++) {
		pinned[i] = tm_rand_below(rng, nr_blocks);
		/* Also one that has no users and no name. */
		get(pinned[i]);
	}
	if (tm_rand_one_in(rng, 4))
		compare();
	while (nr--) {
		tm_prefix_unget(&prefix, pinned[nr]);
		blocks[pinned[nr]].refs--;
	}
	nr_order = nr_before;
	memcpy(order, before, sizeof(order));
}

static void random_op(enum op op, struct tm_rng *rng)
{
	u32 i = tm_rand_below(rng, nr_blocks);
	struct tm_prefix_key k = key(tm_rand_below(rng, nr_blocks / 4 + 1),
				     tm_rand_below(rng, 2),
				     tm_rand_below(rng, 2));

	switch (op) {
	case OP_GET:
		tm_op("get %u", i);
		get(i);
		break;
	case OP_PUT:
		tm_op("put %u", i);
		if (blocks[i].refs)
			(void)!put(i);
		break;
	case OP_PUBLISH:
		tm_op("publish %u", i);
		if (blocks[i].refs && !blocks[i].published)
			publish(i, k);
		break;
	case OP_FORGET:
		tm_op("forget %u", i);
		if (blocks[i].published)
			forget(i);
		break;
	case OP_EVICT:
		tm_op("evict");
		if (prefix.oldest != TM_NONE)
			forget(prefix.oldest);
		break;
	case OP_PIN:
		tm_op("pin");
		pin(rng);
		break;
	case OPS:
		break;
	}
	CHECK_EQ(tm_prefix_find(&prefix, &k), model_find(&k));
}

TEST(prefix_random)
{
	struct tm_round round;

	tm_for_each_round(&round, 12, 4000) {
		u32 weights[OPS] = { 0 };

		setup(1 + tm_rand_below(&round.rng, tm_rand_one_in(
						&round.rng, 2) ?
				MOST_BLOCKS : 12));
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 8);
				weights[tm_rand_one_in(&round.rng, 2) ?
					OP_PUT : OP_PUBLISH] += 10;
			}
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng);
			if (step % 4 == 0)
				compare();
		}
		teardown();
	}
}

static void unlocked(void *which)
{
	struct tm_prefix_key k = key(1, 2, 3);

	lock.held = false;
	switch (*(int *)which) {
	case 0:
		tm_prefix_get(&prefix, 0);
		break;
	case 1:
		tm_prefix_unget(&prefix, 1);
		break;
	case 2:
		(void)!tm_prefix_put(&prefix, 1);
		break;
	case 3:
		tm_prefix_publish(&prefix, 1, &k);
		break;
	case 4:
		tm_prefix_forget(&prefix, 2);
		break;
	case 5:
		(void)tm_prefix_find(&prefix, &k);
		break;
	}
}

TEST(prefix_calls_need_the_lock)
{
	static const char *const calls[] = {
		"get", "unget", "put", "publish", "forget", "find",
	};

	setup(4);
	get(1);
	get(2);
	publish(2, key(1, 1, 1));
	for (int i = 0; i < 6; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	teardown();
}
