// SPDX-License-Identifier: GPL-2.0-only
/*
 * The prefix index against a list: what is cached stands in it in the order in which
 * it is to go, and finding looks at every block.
 */
#include <sanitizer/asan_interface.h>
#include <stdlib.h>

#include "core/prefix.h"
#include "harness.h"

#define MOST_BLOCKS	256
#define SEQUENTIAL	4096
#define ALIKE		16384
/* Kinds of keys that somebody might choose. */
#define CHOSEN		12

struct model_block {
	struct tm_prefix_key key;
	u32 refs;
	bool published;
};

static tm_sleep_lock_t lock;
static struct tm_prefix prefix;
static struct model_block blocks[MOST_BLOCKS];
/* The cached blocks, oldest first. */
static u32 order[MOST_BLOCKS];
static u32 nr_order;
static u32 nr_blocks;

static void setup(u32 nr)
{
	lock.held = false;
	memset(blocks, 0, sizeof(blocks));
	nr_order = 0;
	nr_blocks = nr;
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

/* One of this key, and one in use if there is one. Return: what was found. */
static u32 find(const struct tm_prefix_key *k)
{
	u32 found = tm_prefix_find(&prefix, k), nr = 0, used = 0;

	for (u32 i = 0; i < nr_blocks; i++)
		if (blocks[i].published && same(&blocks[i].key, k)) {
			nr++;
			used += blocks[i].refs != 0;
		}
	CHECK_EQ(found != TM_NONE, nr != 0);
	if (nr) {
		CHECK(found < nr_blocks && blocks[found].published);
		CHECK(same(&blocks[found].key, k));
		CHECK_EQ(blocks[found].refs != 0, used != 0);
	}
	return found;
}

/* Blocks of one key, the first one of which is @first: no chain has another of it. */
static u32 compare_ring(u32 first)
{
	u32 nr = 0, block = first;
	bool cached = false;

	do {
		const struct tm_prefix_block *b = &prefix.blocks[block];

		CHECK(blocks[block].published);
		CHECK(same(&blocks[block].key, &blocks[first].key));
		CHECK_EQ(prefix.blocks[b->next].prev, block);
		/* In use before cached. */
		CHECK(!cached || !b->refs);
		cached = !b->refs;
		CHECK(nr++ < nr_blocks);
		block = b->next;
	} while (block != first);
	CHECK_EQ(find(&blocks[first].key), first);
	return nr;
}

static void compare(void)
{
	u32 older = TM_NONE, published = 0, chained = 0, block;

	for (u32 i = 0; i < nr_blocks; i++) {
		const struct model_block *b = &blocks[i];

		CHECK_EQ(tm_prefix_refs(&prefix, i), b->refs);
		CHECK_EQ(prefix.blocks[i].published, b->published);
		if (!b->published)
			continue;
		published++;
		CHECK(same(&prefix.blocks[i].key, &b->key));
	}
	CHECK_EQ(prefix.published, published);
	for (u32 i = 0; i < prefix.nr_blocks; i++)
		for (block = prefix.buckets[i]; block != TM_NONE;
		     block = prefix.blocks[block].chain) {
			chained += compare_ring(block);
			CHECK(chained <= published);
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

/* Blocks of a key. */
static u32 alike(const struct tm_prefix_key *k)
{
	u32 nr = 0;

	for (u32 i = 0; i < nr_blocks; i++)
		nr += blocks[i].published && same(&blocks[i].key, k);
	return nr;
}

static void publish(u32 block, struct tm_prefix_key k)
{
	CHECK_EQ(tm_prefix_publish(&prefix, block, &k), !alike(&k));
	blocks[block].key = k;
	blocks[block].published = true;
}

static void forget(u32 block)
{
	bool last = tm_prefix_forget(&prefix, block);

	if (!blocks[block].refs)
		remove_from_order(block);
	blocks[block].published = false;
	CHECK_EQ(last, !alike(&blocks[block].key));
}

/* A block that one may get: of those cached the one that is found. */
static u32 to_get(u32 block)
{
	if (!blocks[block].published || blocks[block].refs)
		return block;
	return find(&blocks[block].key);
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
	for (u32 nr = 1; nr <= 129; nr++) {
		setup(nr);
		CHECK_EQ(prefix.nr_blocks, nr);
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
		CHECK_EQ(find(&k), i);
	}
	CHECK(!put(3));
	CHECK(find(&k) != 3);
	CHECK(!put(1));
	CHECK(!put(2));
	CHECK_EQ(find(&k), 0);
	/* Of those cached the last: it is the last to go, and the others age. */
	CHECK(!put(0));
	CHECK_EQ(find(&k), 0);
	for (u32 i = 0; i < 3; i++) {
		get(find(&k));
		CHECK_EQ(find(&k), 0);
		CHECK(!put(0));
		CHECK_EQ(order[0], 3);
	}
	compare();
	for (u32 left = 4; left; left--) {
		CHECK_EQ(prefix.cached, left);
		CHECK_EQ(find(&k), 0);
		compare();
		forget(prefix.oldest);
	}
	CHECK_EQ(find(&k), TM_NONE);
	/* Also when those in use are forgotten, from the first or the last. */
	for (u32 turn = 0; turn < 2; turn++) {
		for (u32 i = 0; i < 4; i++) {
			get(i);
			publish(i, k);
		}
		for (u32 i = 0; i < 4; i++) {
			u32 block = turn ? i : 3 - i;

			forget(block);
			compare();
			CHECK(put(block));
		}
	}
	teardown();
}

static void hide(void *table, size_t size)
{
	ASAN_POISON_MEMORY_REGION(table, size);
	(void)table;
	(void)size;
}

static void show(const void *entry, size_t size)
{
	ASAN_UNPOISON_MEMORY_REGION(entry, size);
	(void)entry;
	(void)size;
}

static void show_block(u32 block)
{
	if (block != TM_NONE)
		show(&prefix.blocks[block], sizeof(*prefix.blocks));
}

/*
 * Hide all blocks but @block, its neighbours, the first and the last of its key, and the
 * last in the order of eviction: the sanitizer ends the test where a step goes elsewhere.
 */
static void hide_but(u32 block, u32 first)
{
	u32 near[] = {
		block, prefix.blocks[block].prev, prefix.blocks[block].next,
		prefix.blocks[block].older, prefix.blocks[block].newer,
		first, prefix.blocks[first].prev, prefix.blocks[first].next,
		prefix.newest,
	};

	hide(prefix.blocks, ALIKE * sizeof(*prefix.blocks));
	for (u32 i = 0; i < sizeof(near) / sizeof(*near); i++)
		show_block(near[i]);
}

static void show_all(void)
{
	show(prefix.blocks, ALIKE * sizeof(*prefix.blocks));
}

/* All of one name, which is what somebody would choose who means harm. */
TEST(prefix_steps_with_one_key)
{
	struct tm_prefix_key k = key(7, 1, 0);
	struct tm_rng rng = { 1 };

	CHECK_EQ(tm_prefix_init(&prefix, ALIKE, &lock), 0);
	lock.held = true;
	for (u32 i = 0; i < ALIKE; i++) {
		tm_prefix_get(&prefix, i);
		if (i)
			hide_but(i - 1, i - 1);
		show_block(i);
		CHECK_EQ(tm_prefix_publish(&prefix, i, &k), !i);
		show_all();
	}
	/* From any place among them, in an order that is none. */
	for (u32 i = 0; i < ALIKE; i++) {
		u32 block = (u32)(i * 10007ull % ALIKE), found;

		show_all();
		found = tm_prefix_find(&prefix, &k);
		CHECK(tm_prefix_refs(&prefix, found));
		tm_op("put %u", block);
		hide_but(block, found);
		CHECK(!tm_prefix_put(&prefix, block));
		CHECK_EQ(tm_prefix_find(&prefix, &k) == block, i == ALIKE - 1);
	}
	for (u32 i = 0; i < 4096; i++) {
		u32 found;

		show_all();
		found = tm_prefix_find(&prefix, &k);
		tm_op("find %u", found);
		hide_but(found, found);
		CHECK_EQ(tm_prefix_find(&prefix, &k), found);
		tm_prefix_get(&prefix, found);
		CHECK_EQ(tm_prefix_find(&prefix, &k), found);
		if (tm_rand_one_in(&rng, 2))
			tm_prefix_unget(&prefix, found);
		else
			CHECK(!tm_prefix_put(&prefix, found));
	}
	for (u32 i = 0; i < ALIKE; i++) {
		u32 block = prefix.oldest, found;

		show_all();
		found = tm_prefix_find(&prefix, &k);
		tm_op("forget %u", block);
		hide_but(block, found);
		CHECK_EQ(tm_prefix_forget(&prefix, block), i == ALIKE - 1);
	}
	show_all();
	CHECK_EQ(tm_prefix_find(&prefix, &k), TM_NONE);
	CHECK_EQ(prefix.cached, 0);
	tm_prefix_destroy(&prefix);
	lock.held = false;
}

/* Keys that somebody might choose: in each part, and so that the parts cancel out. */
static struct tm_prefix_key chosen(u32 how, u32 i)
{
	u64 high = (u64)i << 32, v0 = 0, v1 = 0, tenant = 0;

	switch (how) {
	case 0:
		v0 = i;
		break;
	case 1:
		v0 = high;
		break;
	case 2:
		v1 = i;
		break;
	case 3:
		v1 = high;
		break;
	case 4:
		tenant = i;
		break;
	case 5:
		tenant = high;
		break;
	case 6:
		v0 = tenant = i;
		break;
	case 7:
		v0 = tenant = (u64)i * 0x9e3779b97f4a7c15;
		break;
	case 8:
		v1 = -(u64)i;
		return (struct tm_prefix_key){ { { v0, v1 } }, tenant, i };
	case 9:
		return (struct tm_prefix_key){ { { v0, v1 } }, tenant, i };
	case 10:
		v0 = high | (u32)-i;
		break;
	case 11:
		tenant = high | (u32)-i;
		break;
	case CHOSEN:
		/* By nobody. */
		v0 = (i + 1) * 0x9e3779b97f4a7c15;
		v0 = (v0 ^ (v0 >> 30)) * 0xbf58476d1ce4e5b9;
		v1 = (v0 ^ (v0 >> 27)) * 0x94d049bb133111eb;
		break;
	}
	return (struct tm_prefix_key){ { { v0, v1 } }, tenant, 0 };
}

/*
 * Whatever the keys, to find one takes a step and a half on average: itself, and half of
 * all others, which are as likely in its bucket as in any other. Now and then an index
 * has bad luck with all keys that follow each other: not twice what is to be expected of
 * sixteen.
 */
TEST(prefix_spreads)
{
	enum { TIMES = 16 };

	for (u32 how = 0; how <= CHOSEN; how++) {
		u64 steps = 0;

		tm_op("keys of kind %u", how);
		for (u32 times = 0; times < TIMES; times++) {
			CHECK_EQ(tm_prefix_init(&prefix, SEQUENTIAL, &lock), 0);
			lock.held = true;
			for (u32 i = 0; i < SEQUENTIAL; i++) {
				struct tm_prefix_key k = chosen(how, i);

				tm_prefix_get(&prefix, i);
				CHECK(tm_prefix_publish(&prefix, i, &k));
			}
			for (u32 i = 0; i < prefix.nr_blocks; i++) {
				u32 nth = 0;

				for (u32 b = prefix.buckets[i]; b != TM_NONE;
				     b = prefix.blocks[b].chain)
					steps += ++nth;
			}
			tm_prefix_destroy(&prefix);
		}
		CHECK(steps >= TIMES * SEQUENTIAL);
		CHECK(steps <= 3 * TIMES * SEQUENTIAL);
		if (how == CHOSEN)
			CHECK(steps <= 8 * TIMES * SEQUENTIAL / 5);
	}
}

/* Nobody can know which keys meet: another index has others. */
TEST(prefix_seeds)
{
	struct tm_prefix_key k = key(7, 1, 0);
	u64 seen[64][TM_PREFIX_SEEDS];
	u32 buckets[64] = { 0 }, used = 0;

	for (u32 i = 0; i < 64; i++) {
		setup(64);
		memcpy(seen[i], prefix.seed, sizeof(seen[i]));
		for (u32 o = 0; o <= i; o++)
			for (u32 n = 0; n < TM_PREFIX_SEEDS; n++)
				for (u32 p = 0; p < TM_PREFIX_SEEDS; p++)
					CHECK((o == i && n == p) ||
					      seen[o][n] != seen[i][p]);
		get(0);
		publish(0, k);
		for (u32 n = 0; n < 64; n++)
			buckets[n] += prefix.buckets[n] == 0;
		teardown();
	}
	for (u32 n = 0; n < 64; n++)
		used += buckets[n] != 0;
	/* Of 64 at random 40 or so. */
	CHECK(used > 25 && used < 60);
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
		pinned[i] = to_get(tm_rand_below(rng, nr_blocks));
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
		i = to_get(i);
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
	find(&k);
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
		(void)tm_prefix_publish(&prefix, 1, &k);
		break;
	case 4:
		(void)tm_prefix_forget(&prefix, 2);
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
