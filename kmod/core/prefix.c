// SPDX-License-Identifier: GPL-2.0-only
#include "core/prefix.h"

int tm_prefix_init(struct tm_prefix *prefix, u32 nr_blocks,
		   tm_sleep_lock_t *lock)
{
	*prefix = (struct tm_prefix){
		.nr_blocks = nr_blocks,
		.oldest = TM_NONE,
		.newest = TM_NONE,
		.lock = lock,
	};
	for (u32 i = 0; i < TM_PREFIX_SEEDS; i++)
		prefix->seed[i] = tm_random64();
	prefix->blocks = tm_table_alloc(nr_blocks, sizeof(*prefix->blocks));
	if (!prefix->blocks)
		return -ENOMEM;
	prefix->buckets = tm_table_alloc(nr_blocks, sizeof(*prefix->buckets));
	if (!prefix->buckets) {
		tm_prefix_destroy(prefix);
		return -ENOMEM;
	}
	for (u32 i = 0; i < nr_blocks; i++)
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

/*
 * The chain that a key is in. Who chooses keys must not be able to choose many of one
 * chain, so this is a universal hash with random coefficients: two keys, whatever they
 * are, meet with a probability of one in as many as there are chains. (Multiply and
 * shift, over a vector: Thorup, arXiv:1504.06804.)
 */
static u32 *tm_prefix_bucket(const struct tm_prefix *prefix,
			     const struct tm_prefix_key *key)
{
	const u64 *seed = prefix->seed;
	u64 sum = seed[0];

	sum += seed[1] * (u32)key->hash.v[0];
	sum += seed[2] * (u32)(key->hash.v[0] >> 32);
	sum += seed[3] * (u32)key->hash.v[1];
	sum += seed[4] * (u32)(key->hash.v[1] >> 32);
	sum += seed[5] * (u32)key->tenant;
	sum += seed[6] * (u32)(key->tenant >> 32);
	sum += seed[7] * key->group;
	return &prefix->buckets[(sum >> 32) * prefix->nr_blocks >> 32];
}

static bool tm_prefix_same(const struct tm_prefix_key *a,
			   const struct tm_prefix_key *b)
{
	return a->hash.v[0] == b->hash.v[0] && a->hash.v[1] == b->hash.v[1] &&
	       a->tenant == b->tenant && a->group == b->group;
}

/* What leads to the first block of a key, or the end of the chain it would be in. */
static u32 *tm_prefix_first(const struct tm_prefix *prefix,
			    const struct tm_prefix_key *key)
{
	u32 *link = tm_prefix_bucket(prefix, key);

	while (*link != TM_NONE &&
	       !tm_prefix_same(&prefix->blocks[*link].key, key))
		link = &prefix->blocks[*link].chain;
	return link;
}

/* Another block of its key's comes first from here on. */
static void tm_prefix_lead(struct tm_prefix *prefix, u32 *first, u32 block)
{
	prefix->blocks[block].chain = prefix->blocks[*first].chain;
	*first = block;
}

/* Put a block into a ring, where that ends. */
static void tm_prefix_join(struct tm_prefix *prefix, u32 first, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];

	b->next = first;
	b->prev = prefix->blocks[first].prev;
	prefix->blocks[b->prev].next = block;
	prefix->blocks[first].prev = block;
}

static void tm_prefix_part(struct tm_prefix *prefix, u32 block)
{
	const struct tm_prefix_block *b = &prefix->blocks[block];

	prefix->blocks[b->prev].next = b->next;
	prefix->blocks[b->next].prev = b->prev;
}

/* A block has no users any more: those of its key that have come before it. */
static void tm_prefix_step_back(struct tm_prefix *prefix, u32 block)
{
	u32 *first = tm_prefix_first(prefix, &prefix->blocks[block].key);
	u32 next = prefix->blocks[block].next;

	if (*first != block) {
		tm_prefix_part(prefix, block);
		tm_prefix_join(prefix, *first, block);
	} else if (prefix->blocks[next].refs) {
		/* In a ring the one before the first is the last. */
		tm_prefix_lead(prefix, first, next);
	}
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
		tm_prefix_step_back(prefix, block);
	}
	return !b->refs && !b->published;
}

bool tm_prefix_publish(struct tm_prefix *prefix, u32 block,
		       const struct tm_prefix_key *key)
{
	struct tm_prefix_block *b = &prefix->blocks[block];
	u32 *first = tm_prefix_first(prefix, key);

	tm_assert_sleep_locked(prefix->lock);
	b->key = *key;
	b->published = true;
	prefix->published++;
	if (*first != TM_NONE) {
		tm_prefix_join(prefix, *first, block);
		tm_prefix_lead(prefix, first, block);
		return false;
	}
	b->next = block;
	b->prev = block;
	b->chain = TM_NONE;
	*first = block;
	return true;
}

bool tm_prefix_forget(struct tm_prefix *prefix, u32 block)
{
	struct tm_prefix_block *b = &prefix->blocks[block];
	u32 *first = tm_prefix_first(prefix, &b->key);

	tm_assert_sleep_locked(prefix->lock);
	if (tm_prefix_cached(b))
		tm_prefix_unlink(prefix, block);
	b->published = false;
	prefix->published--;
	if (b->next == block) {
		*first = b->chain;
		return true;
	}
	if (*first == block)
		tm_prefix_lead(prefix, first, b->next);
	tm_prefix_part(prefix, block);
	return false;
}

u32 tm_prefix_find(const struct tm_prefix *prefix,
		   const struct tm_prefix_key *key)
{
	tm_assert_sleep_locked(prefix->lock);
	return *tm_prefix_first(prefix, key);
}
