/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A KV cache: sequences of tokens, the blocks each of them holds, which blocks they
 * share, and which are kept to be found again.
 *
 *  - A sequence has a table of blocks for each group of the geometry. A block has a
 *    count of the tables it is in.
 *  - A full block may be *published* under a hash that names its contents and all
 *    before it. Others of the same tenant find it by that. When no table has it any
 *    more it stays, *cached*, until its memory is needed: least recently used first,
 *    and of one sequence the last block first, because a prefix is of use without its
 *    suffix and not the other way round. (vLLM's block pool; RadixAttention,
 *    arXiv:2312.07104, has the same order from a tree.)
 *  - A block may be written in place by one who alone has it, as long as it is not
 *    published; anybody else gets a copy first. *Sealed* blocks have no writable
 *    mapping, so that sharing them takes no walk over page tables.
 *  - A block may be *packed*: the same block with fewer pages, holding compressed
 *    contents. What that is, is the caller's business.
 *
 * The core decides and counts; the caller has the memory. A function that gives up,
 * moves or shares blocks says which mappings the caller has to remove before calling
 * it; one that hands out blocks says which to zero and which to copy afterwards, before
 * the lock is let go.
 *
 * Memory. A call that needs blocks fails with -ENOMEM where the pool has no room, and
 * leaves in tm_cache::wanting how many chunks would do, which can be more than the pool
 * takes. The caller adds chunks
 * (tm_kv_add_chunk() on tm_cache::pool) and calls again; or, when there are no more to be
 * had, calls again with @evict, which gives up cached blocks, if that suffices. A call
 * that fails, whatever for, changes no count, no table and no order of eviction.
 *
 * Context: all functions but init and destroy need the lock. Steps are bounded by the
 * blocks concerned; what deals with many lets others run meanwhile (tm_relax()), with the
 * lock held.
 */
#ifndef TM_CORE_CACHE_H
#define TM_CORE_CACHE_H

#include "core/kv.h"
#include "core/prefix.h"

/* Most sequences: a name has 16 bits for the place and 16 for how often it was used. */
#define TM_CACHE_MAX_SEQS	65535
/* Most entries of all tables together: 64 MiB of them. */
#define TM_CACHE_MAX_ENTRIES	(1u << 24)

/* An open sequence: place | generation << 16, never 0. */
struct tm_seq_id {
	u32 v;
};

/**
 * struct tm_cache_config - what a cache is to be
 * @geo: from tm_kv_geometry_init()
 * @max_tokens: of a sequence, at least 1
 * @max_seqs: open at a time, at least 1
 * @max_chunks: chunks the pool may hold
 * @nr_events: events kept until read, a power of two; 0 for none
 */
struct tm_cache_config {
	struct tm_kv_geometry geo;
	u32 max_tokens;
	u32 max_seqs;
	u32 max_chunks;
	u32 nr_events;
};

/**
 * struct tm_cache_seq - a sequence
 * @generation: of the name; it counts on when the sequence is closed
 * @open: there is one
 * @tenant: whose it is
 * @length: tokens
 * @sealed: blocks below this one have no writable mapping; a state is another matter
 * @pending: on a list of tm_cache_extend() already
 */
struct tm_cache_seq {
	u16 generation;
	bool open;
	bool pending;
	u32 length;
	u32 sealed;
	u64 tenant;
};

enum tm_cache_event_type {
	TM_CACHE_STORED = 1,	/* can be found now; could not before */
	TM_CACHE_REMOVED,	/* cannot be found any more */
	TM_CACHE_CLEARED,	/* nothing can */
};

/*
 * A change of what a tenant can find in a group. Of several blocks of one hash the first
 * one published is told, and the last one evicted. @parent and @block: for
 * TM_CACHE_STORED.
 */
struct tm_cache_event {
	u32 type;
	u32 group;
	u32 block;
	u64 tenant;
	struct tm_hash hash;
	struct tm_hash parent;
};

/* Counts of what has happened so far; blocks. */
struct tm_cache_stats {
	u64 lookups;
	u64 hits;
	u64 copies;
	u64 evictions;
	u64 packs;
	u64 unpacks;
	u64 events_lost;
};

/**
 * struct tm_cache - sequences over a pool of blocks
 * @pool: the blocks; the caller adds and removes chunks, and moves pages
 * @prefix: counts, hashes and order of eviction, by block
 * @max_tokens: of a sequence
 * @max_seqs: length of @seqs
 * @max_blocks: blocks of a sequence in one group: length of a table
 * @seqs: by place
 * @tables: block numbers, TM_NONE for none:
 *          [place][group][index], @max_blocks long
 * @nr_open: open sequences
 * @next: where the search for a free place begins
 * @cached_pages: pages of cached blocks
 * @wanting: after -ENOMEM: chunks to add, or TM_KV_NEVER
 * @packed: packed blocks
 * @packed_pages: pages in them
 * @unpacked_pages: pages they had
 * @events: ring of @nr_events
 * @nr_events: power of two or 0
 * @event_head: next one to write; @event_tail: next one to read
 * @stats: counters
 * @lock: the caller's lock, for assertions only
 */
struct tm_cache {
	struct tm_kv_pool pool;
	struct tm_prefix prefix;
	u32 max_tokens;
	u32 max_seqs;
	u32 max_blocks;
	struct tm_cache_seq *seqs;
	u32 *tables;
	u32 nr_open;
	u32 next;
	u64 cached_pages;
	u64 wanting;
	u32 packed;
	u64 packed_pages;
	u64 unpacked_pages;
	struct tm_cache_event *events;
	u32 nr_events;
	u64 event_head;
	u64 event_tail;
	struct tm_cache_stats stats;
	tm_sleep_lock_t *lock;
};

/*
 * Context: may sleep; no lock. Return: 0, -EINVAL for 0 or too many tokens, sequences
 * or table entries, another number of events, more chunks than a link can name, or fewer
 * than one block of each group takes; -ENOMEM.
 */
int __must_check tm_cache_init(struct tm_cache *cache,
			       const struct tm_cache_config *config,
			       tm_sleep_lock_t *lock);
/* Every chunk must have been removed. Context: may sleep; no lock. */
void tm_cache_destroy(struct tm_cache *cache);

/* Return: the place, or TM_NONE when no open sequence has this name. */
u32 tm_cache_find(const struct tm_cache *cache, struct tm_seq_id id);

static inline const struct tm_cache_seq *
tm_cache_seq(const struct tm_cache *cache, u32 place)
{
	return &cache->seqs[tm_index(place, cache->max_seqs)];
}

/* The name of the open sequence at @place. */
static inline struct tm_seq_id tm_cache_id(const struct tm_cache *cache,
					   u32 place)
{
	return (struct tm_seq_id){
		(u32)cache->seqs[place].generation << 16 | place,
	};
}

/* The blocks [first, end) of @group that a sequence of @tokens has; none for 0. */
void tm_cache_span(const struct tm_cache *cache, u32 group, u32 tokens,
		   u32 *first, u32 *end);

/**
 * tm_cache_leaving - what a sequence drops when its length changes
 * @cache: the cache
 * @place: of an open sequence
 * @group: less than nr_groups
 * @length: tokens it is to have: what leaves a window, when there are more; the end, when
 *          there are fewer
 * @first: @end: blocks [first, end), out of those it has; none of them may be mapped
 *               when a call sets this length
 */
void tm_cache_leaving(const struct tm_cache *cache, u32 place, u32 group,
		      u32 length, u32 *first, u32 *end);

/**
 * tm_cache_open - begin an empty sequence
 *
 * Places are taken in turn, and a name comes back only after its place was used 65535
 * times. Return: 0, -ENOBUFS when max_seqs are open.
 */
int __must_check tm_cache_open(struct tm_cache *cache, u64 tenant,
			       struct tm_seq_id *id);

/**
 * tm_cache_close - end a sequence, and let go of its blocks, the last one first
 *
 * Before: remove the mappings of what tm_cache_leaving() says of no tokens: all.
 * Return: 0, -ENOENT.
 */
int __must_check tm_cache_close(struct tm_cache *cache, struct tm_seq_id id);

/* A block to copy, all its pages, from one to the other. */
struct tm_cache_copy {
	u32 group;
	u32 index;
	struct tm_kv_block from;
	struct tm_kv_block to;
};

/**
 * struct tm_cache_copies - what to copy before the lock is let go
 * @nr: how many
 * @copy: at most one for each group
 *
 * The source stays where it is until the lock is let go, or blocks are evicted: it can be
 * a cached one, and so can the copy of a state that is published. It may be packed, see
 * tm_cache_packed(): best unpacked straight to the copy, which takes no room.
 */
struct tm_cache_copies {
	u32 nr;
	struct tm_cache_copy copy[TM_KV_GROUPS];
};

/**
 * struct tm_cache_extend - one sequence to extend
 * @id: which
 * @tokens: by how many, at least 1
 * @length: out: tokens before
 * @copies: out: the last block, where it was not full and may not be written in place
 */
struct tm_cache_extend {
	struct tm_seq_id id;
	u32 tokens;
	u32 length;
	struct tm_cache_copies copies;
};

/**
 * tm_cache_extend - make room for more tokens, in all of several sequences or none
 * @cache: the cache
 * @items: the sequences, each once
 * @nr: how many
 * @evict: give up cached blocks where there is no other room
 * @failed: on failure the item concerned
 *
 * Before: remove the mappings of what the new length drops (tm_cache_leaving()), and of
 * a last block that is not full and is shared (tm_cache_shared()). Afterwards: zero the
 * new blocks, from the one after the last that was there on; copy @copies.
 *
 * Room is asked for as if each sequence were the only one: of two that share their last
 * block one is alone with it when the other has its copy, and gets none.
 *
 * Return: 0, -ENOENT, -EINVAL for no tokens or a sequence named twice, -ERANGE for more than
 * max_tokens, -ENOMEM.
 */
int __must_check tm_cache_extend(struct tm_cache *cache,
				 struct tm_cache_extend *items, u32 nr,
				 bool evict, u32 *failed);

/**
 * tm_cache_truncate - drop tokens from the end
 *
 * Before: remove the mappings of what the new length drops (tm_cache_leaving()). Blocks
 * go the last one first. The one that is not full any more stays mapped as it is.
 *
 * Return: 0, -ENOENT, -EINVAL for more tokens than there are, -ENODATA when a window has
 * moved past what @length needs, or a state would have to go back.
 */
int __must_check tm_cache_truncate(struct tm_cache *cache, struct tm_seq_id id,
				   u32 length);

/**
 * tm_cache_seal - no block below @index has a writable mapping any more
 *
 * Never lowers the mark. @index is at most the number of full blocks.
 * Return: 0, -ENOENT, -EINVAL.
 */
int __must_check tm_cache_seal(struct tm_cache *cache, struct tm_seq_id id,
			       u32 index);

/**
 * tm_cache_fork - begin a sequence with the first @at tokens of another
 * @cache: the cache
 * @id: the other
 * @at: tokens
 * @evict: give up cached blocks where there is no other room
 * @child: the new sequence, of the same tenant
 * @copies: the block that @at ends in, if it is not full then; the state
 *
 * Before: seal the full blocks (-EBUSY otherwise). Afterwards: copy @copies.
 *
 * Return: 0, -ENOENT, -EINVAL for more tokens than there are, -ENODATA as
 * tm_cache_truncate(), -EBUSY, -ENOBUFS, -ENOMEM.
 */
int __must_check tm_cache_fork(struct tm_cache *cache, struct tm_seq_id id,
			       u32 at, bool evict, struct tm_seq_id *child,
			       struct tm_cache_copies *copies);

/**
 * struct tm_cache_page - what a sequence has at a page
 * @block: the block
 * @index: which page of it
 * @page: where that is; not for a packed block
 * @writable: it may be mapped for writing: sealed blocks may not, even by
 *            one who could write them (tm_cache_write())
 */
struct tm_cache_page {
	struct tm_kv_block block;
	u32 index;
	struct tm_page_id page;
	bool writable;
};

/**
 * tm_cache_page - what is to be mapped
 * @cache: the cache
 * @place: of an open sequence, or not
 * @group: less than nr_groups
 * @plane: less than the group's planes
 * @index: page of the plane's array
 * @page: the answer
 *
 * Return: 0, -ENOENT where the sequence has nothing (mapping it is an error), -EAGAIN
 * for a packed block (all but @page->page and @writable is set).
 */
int __must_check tm_cache_page(const struct tm_cache *cache, u32 place,
			       u32 group, u32 plane, u32 index,
			       struct tm_cache_page *page);

/**
 * struct tm_cache_run - pages of a plane that lie in one block
 * @block: the block
 * @index: which page of it the first one is
 * @nr: how many they are
 * @writable: as in struct tm_cache_page
 * @walk: gives the pages, one after the other; after the last of the plane's it goes on
 *        with the first of the next plane's in this block, and so on
 */
struct tm_cache_run {
	struct tm_kv_block block;
	u32 index;
	u32 nr;
	bool writable;
	struct tm_kv_walk walk;
};

/**
 * tm_cache_pages - what is to be mapped, for many pages at a time
 * @cache: the cache
 * @place: of an open sequence, or not
 * @group: less than nr_groups
 * @plane: less than the group's planes
 * @index: first page, of the plane's array
 * @max: most pages, at least 1
 * @run: the answer
 *
 * Who wants the pages behind @run->nr asks again: they are of another block.
 * Steps: as tm_kv_walk_at().
 *
 * Return: 0, -ENOENT where the sequence has nothing (only @run->nr is set: so many
 * pages have nothing), -EAGAIN for a packed block (all but @run->walk and @writable is
 * set).
 */
int __must_check tm_cache_pages(const struct tm_cache *cache, u32 place,
				u32 group, u32 plane, u32 index, u32 max,
				struct tm_cache_run *run);

/**
 * tm_cache_write - make a block one that its sequence may write in place
 * @cache: the cache
 * @place: of the sequence
 * @group: @index: the block
 * @evict: give up cached blocks where there is no other room
 * @copies: the copy to make, if any
 *
 * Before: if somebody else has the block, or it is published (tm_cache_shared()),
 * remove this sequence's mappings of it. Lowers the seal to @index.
 *
 * Return: 0, -ENOENT, -ENOMEM.
 */
int __must_check tm_cache_write(struct tm_cache *cache, u32 place, u32 group,
				u32 index, bool evict,
				struct tm_cache_copies *copies);

/* Whether the block is published or in more than one table. */
bool tm_cache_shared(const struct tm_cache *cache, struct tm_kv_block block);

/**
 * tm_cache_publish - let others find blocks
 * @cache: the cache
 * @id: whose
 * @first: the first block
 * @hashes: names of @first and those that follow
 * @nr: how many, at least 1
 * @evict: give up cached blocks where there is no other room, for a copy of the state
 * @copies: the state, if the sequence ends with the last of the blocks
 *
 * Before: seal the blocks (-EBUSY otherwise). Of a window group those that are still
 * held are published. The parent of the first is the hash of the block before it in
 * the first group that has one published there, else 0.
 *
 * Return: 0, -ENOENT, -EINVAL for no blocks, a block that is not full, or has another
 * hash, -EBUSY, -ENOMEM.
 */
int __must_check tm_cache_publish(struct tm_cache *cache, struct tm_seq_id id,
				  u32 first, const struct tm_hash *hashes,
				  u32 nr, bool evict,
				  struct tm_cache_copies *copies);

/**
 * tm_cache_match - how long a prefix can be had
 *
 * Counts nothing and touches no order. Return: blocks of @hashes, 0 to @nr.
 */
u32 tm_cache_match(const struct tm_cache *cache, u64 tenant,
		   const struct tm_hash *hashes, u32 nr);

/**
 * tm_cache_lookup - begin an empty sequence with the longest prefix that can be had
 * @cache: the cache
 * @id: the sequence
 * @hashes: names of its first blocks
 * @nr: how many, at least 1
 * @evict: give up other cached blocks where there is no room for a copy of the state
 * @matched: blocks it has now
 * @copies: the state
 *
 * What it gets is sealed. Return: 0, also for no match; -ENOENT, -EINVAL for no hashes or a sequence that is not
 * empty, -ENOMEM.
 */
int __must_check tm_cache_lookup(struct tm_cache *cache, struct tm_seq_id id,
				 const struct tm_hash *hashes, u32 nr,
				 bool evict, u32 *matched,
				 struct tm_cache_copies *copies);

/**
 * tm_cache_adopt - put a published block into a sequence
 * @cache: the cache
 * @id: the sequence
 * @index: a full block it has, or the one after its last when it ends there
 * @hash: what to put there
 * @tokens: how many of its tokens, from its start: all of them share the block;
 *          fewer, only at the end, take a copy
 * @evict: give up other cached blocks where there is no room for the copy
 * @copies: the copy
 *
 * Before: remove the mappings of what is replaced, and, where the sequence grows, of what
 * its new length drops (tm_cache_leaving()). In a window group that no longer has
 * @index nothing is done. A
 * state is needed where the sequence ends with the block afterwards: the one
 * published under @hash is copied to its own block, or to a new one in place of a
 * packed one. With a state @tokens must be all.
 *
 * Return: 0, -ENOENT, -EINVAL for another index, 0 or too many tokens, or too few for a
 * state, -ERANGE for more than max_tokens, -ENODATA when a group does not have the
 * hash, -ENOMEM.
 */
int __must_check tm_cache_adopt(struct tm_cache *cache, struct tm_seq_id id,
				u32 index, const struct tm_hash *hash,
				u32 tokens, bool evict,
				struct tm_cache_copies *copies);

/**
 * tm_cache_reset - forget all published blocks
 *
 * Return: 0, -EBUSY while a sequence has a block.
 */
int __must_check tm_cache_reset(struct tm_cache *cache);

/**
 * tm_cache_evict - give up the cached block that is to go next
 *
 * Return: 0, -ENOENT when there is none.
 */
int __must_check tm_cache_evict(struct tm_cache *cache);

/* Pages of cached blocks: what eviction can free at most. */
u64 tm_cache_evictable(const struct tm_cache *cache);

/* Whether the block is packed. */
bool tm_cache_packed(const struct tm_cache *cache, struct tm_kv_block block);

/**
 * tm_cache_packable - whether a block can be packed: one table has it, it is not packed
 *
 * The last block of a sequence that is not full is not.
 * Return: 0 with the block, -ENOENT.
 */
int __must_check tm_cache_packable(const struct tm_cache *cache, u32 place,
				   u32 group, u32 index,
				   struct tm_kv_block *block);

/**
 * tm_cache_pack - keep only the first @pages pages of a block
 *
 * Before: remove its mappings, and take what is in it. Afterwards: put the packed
 * contents there. Return: 0, -EINVAL when it is packed or @pages is 0 or not less than
 * it has.
 */
int __must_check tm_cache_pack(struct tm_cache *cache,
			       struct tm_kv_block block, u32 pages);

/**
 * tm_cache_unpack - give a packed block all its pages again
 * @cache: the cache
 * @block: the block, not cached itself, or a source of tm_cache_copies
 * @evict: give up cached blocks, but not this one, where there is no other room
 *
 * The pages it has keep their place and contents; those added are undefined.
 * Return: 0, -EINVAL when it is not packed, -ENOMEM.
 */
int __must_check tm_cache_unpack(struct tm_cache *cache,
				 struct tm_kv_block block, bool evict);

/* The oldest event that was not read. Return: false when there is none. */
bool tm_cache_next_event(struct tm_cache *cache, struct tm_cache_event *event);

#endif
