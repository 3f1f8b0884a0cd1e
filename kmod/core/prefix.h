/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which blocks are in use how often, which can be found by a hash, and which of those
 * that nobody uses is to go first.
 *
 * A block is a number below nr_blocks; what is known of it lies in arrays, so that
 * nothing is allocated and every operation takes a constant number of steps: on average
 * over the random numbers of the index, whatever keys are chosen. There are as many
 * buckets as blocks.
 *
 * Several blocks may have one key: each is evicted and forgotten by itself. They are a
 * ring, those in use before those that are cached, and stand as one in their bucket.
 *
 * Context: all functions but init and destroy need the lock and never sleep.
 */
#ifndef TM_CORE_PREFIX_H
#define TM_CORE_PREFIX_H

#include "core/geometry.h"

/* What names a block's contents and all before it; any value. */
struct tm_hash {
	u64 v[2];
};

/* What a block is found by: @hash of @tenant, in @group. */
struct tm_prefix_key {
	struct tm_hash hash;
	u64 tenant;
	u32 group;
};

/**
 * struct tm_prefix_block - what is known of a block
 * @key: when @published
 * @refs: users
 * @published: it can be found by @key
 * @chain: of the first block of a key: that of the next key in the bucket; TM_NONE
 *         for none
 * @prev: @next: neighbours in the ring of its key; itself when there is no other
 * @older: @newer: neighbours in the order of eviction, when published without users;
 *                  afterwards those it had
 */
struct tm_prefix_block {
	struct tm_prefix_key key;
	u32 refs;
	bool published;
	u32 chain;
	u32 prev;
	u32 next;
	u32 older;
	u32 newer;
};

/* Random numbers of an index: one for each 32 bits of a key, and one more. */
#define TM_PREFIX_SEEDS		8

/**
 * struct tm_prefix - the index
 * @blocks: by block, @nr_blocks long
 * @buckets: the first key's first block, TM_NONE for none; @nr_blocks long
 * @seed: what decides which bucket a key is in
 * @oldest: @newest: ends of the order of eviction, TM_NONE when it is empty
 * @cached: blocks in it: published and without users
 * @published: blocks that can be found
 * @lock: the caller's lock, for assertions only
 */
struct tm_prefix {
	struct tm_prefix_block *blocks;
	u32 *buckets;
	u64 seed[TM_PREFIX_SEEDS];
	u32 nr_blocks;
	u32 oldest;
	u32 newest;
	u32 cached;
	u32 published;
	tm_sleep_lock_t *lock;
};

/* Context: may sleep; no lock. Return: 0, -ENOMEM. */
int __must_check tm_prefix_init(struct tm_prefix *prefix, u32 nr_blocks,
				tm_sleep_lock_t *lock);
void tm_prefix_destroy(struct tm_prefix *prefix);

static inline u32 tm_prefix_refs(const struct tm_prefix *prefix, u32 block)
{
	return prefix->blocks[block].refs;
}

/*
 * One user more. A cached block leaves the order of eviction; it has to be one that
 * tm_prefix_find() gives.
 */
void tm_prefix_get(struct tm_prefix *prefix, u32 block);

/*
 * Undo tm_prefix_get(): a cached block is back in its place in the order. Only for the
 * last one not undone, with no other call that changes the order in between.
 */
void tm_prefix_unget(struct tm_prefix *prefix, u32 block);

/*
 * One user less. A published block without users is cached, as the newest.
 * Return: whether it is neither used nor published: the caller frees it.
 */
bool __must_check tm_prefix_put(struct tm_prefix *prefix, u32 block);

/*
 * The block, which has users and is not published, can be found by @key.
 * Return: whether none could be found by it before.
 */
bool tm_prefix_publish(struct tm_prefix *prefix, u32 block,
		       const struct tm_prefix_key *key);

/*
 * The block, which is published, cannot be found any more. It may be cached.
 * Return: whether none can be found by its key any more.
 */
bool tm_prefix_forget(struct tm_prefix *prefix, u32 block);

/*
 * Return: a block with this key, one in use if there is one; else, if they are forgotten
 * in the order of eviction, the one that is last in it; TM_NONE.
 */
u32 tm_prefix_find(const struct tm_prefix *prefix,
		   const struct tm_prefix_key *key);

#endif
