// SPDX-License-Identifier: GPL-2.0-only
#include "core/prefix.h"

int tm_prefix_init(struct tm_prefix *prefix, u32 nr_blocks,
		   tm_sleep_lock_t *lock)
{
	*prefix = (struct tm_prefix){
		.nr_blocks = nr_blocks,
		.nr_buckets = 1,
		.oldest = TM_NONE,
		.newest = TM_NONE,
		.lock = lock,
	};
	while (prefix->nr_buckets < nr_blocks)
		prefix->nr_buckets *= 2;
	prefix->blocks = tm_table_alloc(nr_blocks, sizeof(*prefix->blocks));
	if (!prefix->blocks)
		return -ENOMEM;
	prefix->buckets = tm_table_alloc(prefix->nr_buckets,
					 sizeof(*prefix->buckets));
	if (!prefix->buckets) {
		tm_prefix_destroy(prefix);
		return -ENOMEM;
	}
	for (u32 i = 0; i < prefix->nr_buckets; i++)
		prefix->buckets[i] = TM_NONE;
	return 0;
}

void tm_prefix_destroy(struct tm_prefix *prefix)
{
	tm_table_free(prefix->buckets);
	tm_table_free(prefix->blocks);
	prefix->buckets = NULL;
	prefix->blocks = NULL;
}

static bool tm_prefix_cached(const struct tm_prefix_block *b)
{
	return b->published && !b->refs;
}

/* Put a block between the neighbours it names. */
static void tm_prefix_link(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];

	if (b->older != TM_NONE)
		prefix->blocks[b->older].newer = block;
	else
		prefix->oldest = block;
	if (b->newer != TM_NONE)
		prefix->blocks[b->newer].older = block;
	else
		prefix->newest = block;
	prefix->cached++;
}

/* It goes on naming its neighbours, for tm_prefix_unget(). */
static void tm_prefix_unlink(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];

	if (b->older != TM_NONE)
		prefix->blocks[b->older].newer = b->newer;
	else
		prefix->oldest = b->newer;
	if (b->newer != TM_NONE)
		prefix->blocks[b->newer].older = b->older;
	else
		prefix->newest = b->older;
	prefix->cached--;
}

void tm_prefix_get(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];

	tm_assert_sleep_locked(prefix->lock);
	if (tm_prefix_cached(b))
		tm_prefix_unlink(prefix, block);
	b->refs++;
}

void tm_prefix_unget(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];

	tm_assert_sleep_locked(prefix->lock);
	b->refs--;
	if (tm_prefix_cached(b))
		tm_prefix_link(prefix, block);
}

bool tm_prefix_put(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];

	tm_assert_sleep_locked(prefix->lock);
	b->refs--;
	if (tm_prefix_cached(b)) {
		b->older = prefix->newest;
		b->newer = TM_NONE;
		tm_prefix_link(prefix, block);
	}
	return !b->refs && !b->published;
}

/* The start of the chain that a block with this key is in. */
static u32 *tm_prefix_bucket(const struct tm_prefix *prefix,
			     const struct tm_prefix_key *key)
{
	u64 mix = key->hash.v[0] ^ key->tenant;

	/* As splitmix64 does it: hashes and tenants may be any numbers, also 1, 2, 3. */
	mix = (mix ^ (mix >> 30)) * 0xbf58476d1ce4e5b9;
	mix += key->hash.v[1] + key->group;
	mix = (mix ^ (mix >> 27)) * 0x94d049bb133111eb;
	return &prefix->buckets[(mix ^ (mix >> 31)) & (prefix->nr_buckets - 1)];
}

void tm_prefix_publish(struct tm_prefix *prefix, u32 block,
		       const struct tm_prefix_key *key)
{
	struct tm_prefix_block *b = &prefix->blocks[block];
	u32 *bucket = tm_prefix_bucket(prefix, key);

	tm_assert_sleep_locked(prefix->lock);
	b->key = *key;
	b->published = true;
	b->chain = *bucket;
	*bucket = block;
	prefix->published++;
}

void tm_prefix_forget(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];
	u32 *link = tm_prefix_bucket(prefix, &b->key);

	tm_assert_sleep_locked(prefix->lock);
	if (tm_prefix_cached(b))
		tm_prefix_unlink(prefix, block);
	while (*link != block)
		link = &prefix->blocks[*link].chain;
	*link = b->chain;
	b->published = false;
	prefix->published--;
}

static bool tm_prefix_same(const struct tm_prefix_key *a,
			   const struct tm_prefix_key *b)
{
	return a->hash.v[0] == b->hash.v[0] && a->hash.v[1] == b->hash.v[1] &&
	       a->tenant == b->tenant && a->group == b->group;
}

u32 tm_prefix_find(const struct tm_prefix *prefix,
		   const struct tm_prefix_key *key)
{
	u32 found = TM_NONE;

	tm_assert_sleep_locked(prefix->lock);
	for (u32 i = *tm_prefix_bucket(prefix, key); i != TM_NONE;
	     i = prefix->blocks[i].chain) {
		if (!tm_prefix_same(&prefix->blocks[i].key, key))
			continue;
		if (prefix->blocks[i].refs)
			return i;
		if (found == TM_NONE)
			found = i;
	}
	return found;
}
