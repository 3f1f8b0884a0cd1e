/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A KV cache as what its users believe it to be: every sequence has all its contents for
 * itself, nothing is shared, and a published block is a copy put aside. The core shares,
 * copies, evicts and packs; after every call what a sequence reads through it has to be
 * what it would read here.
 *
 * This also plays the part of the kernel: it has the memory, keeps mappings, removes those
 * the header says have to go before a call (and no other: one that is left must still
 * be right after it), zeroes, copies, packs and moves.
 *
 * What a call is to answer is worked out here beforehand. Where the header leaves a choice
 * (block numbers, which of several blocks of one hash) what the core chose is looked at
 * and judged.
 */
#ifndef TM_TEST_CACHE_MODEL_H
#define TM_TEST_CACHE_MODEL_H

#include "core/cache.h"
#include "harness.h"

#define CACHE_SEQS	8
#define CACHE_GROUPS	TM_KV_GROUPS
/* Of a sequence in a group. */
#define CACHE_BLOCKS	16
/* Of a block. */
#define CACHE_PAGES	64
#define CACHE_CHUNKS	6
/* Of the pool. */
#define CACHE_POOL	1024
#define CACHE_EVENTS	64
#define CACHE_ITEMS	4
/* Bytes of all tables. */
#define CACHE_SNAPSHOT	(1u << 20)

/* A page of the model: few words stand for what a page holds. */
#define CACHE_WORDS	4
#define CACHE_DATA	(CACHE_PAGES * CACHE_WORDS)

/* How a page is mapped. */
enum cache_map {
	CACHE_UNMAPPED,
	CACHE_READ,
	CACHE_WRITE,
};

struct cache_model_seq {
	bool open;
	struct tm_seq_id id;
	u64 tenant;
	u32 length;
	u32 sealed;
	u32 block[CACHE_GROUPS][CACHE_BLOCKS];
	u32 data[CACHE_GROUPS][CACHE_BLOCKS][CACHE_DATA];
	/* Pages mapped, and where they were then. */
	u32 mapped[CACHE_GROUPS][CACHE_BLOCKS];
	u8 map[CACHE_GROUPS][CACHE_BLOCKS][CACHE_PAGES];
	struct tm_page_id at[CACHE_GROUPS][CACHE_BLOCKS][CACHE_PAGES];
};

struct cache_model_block {
	bool used;
	bool published;
	bool packed;
	u32 group;
	u32 pages;
	u32 refs;
	struct tm_prefix_key key;
	/* As published. */
	u32 data[CACHE_DATA];
	/* What was packed. */
	u32 aside[CACHE_DATA];
};

/* A block that no table has any more because of the call under way. */
struct cache_released {
	u32 block;
	/* Of one sequence the last goes first; TM_NONE: at any time. */
	u32 place;
	u32 index;
};

struct cache_model {
	struct tm_cache cache;
	tm_sleep_lock_t lock;
	struct tm_kv_geometry geo;
	u32 max_tokens;
	u32 max_seqs;
	u32 max_blocks;
	/* Chunks there are for the pool. */
	u32 limit;
	bool in_pool[CACHE_CHUNKS];
	u32 used_pages;
	u32 nr_used;
	struct tm_kv_move move;
	bool moving;
	bool move_counts;
	/* By place. */
	struct cache_model_seq seq[CACHE_SEQS];
	u32 uses[CACHE_SEQS];
	u32 nr_open;
	u32 next;
	struct cache_model_block block[CACHE_POOL];
	/* Cached blocks, the one to go next first. */
	u32 lru[CACHE_POOL];
	u32 nr_lru;
	struct tm_cache_stats stats;
	u64 wanting;
	u32 nr_events;
	struct tm_cache_event event[CACHE_EVENTS];
	u32 nr_unread;
	/* The call under way: who goes, who was let go, what is told. */
	u32 victims[CACHE_POOL];
	u32 nr_victims;
	struct cache_released released[CACHE_POOL];
	u32 nr_released;
	struct tm_cache_event told[CACHE_POOL];
	u32 nr_told;
	/* What pages hold. */
	u32 memory[CACHE_CHUNKS << TM_MAX_CHUNK_ORDER][CACHE_WORDS];
	/* Contents for whoever wants some. */
	struct tm_rng rng;
	/* Comparisons: what no sequence has is looked at in one of 16. */
	u32 compared;
};

/* Groups with blocks of @pages pages of @tokens tokens. */
struct tm_kv_group cache_full(struct tm_geometry g, u32 tokens, u32 planes,
			      u32 plane_pages);
struct tm_kv_group cache_window(struct tm_geometry g, u32 tokens, u32 planes,
				u32 plane_pages, u32 window);
struct tm_kv_group cache_state(struct tm_geometry g, u32 planes,
			       u32 plane_pages);

/* The lock is held from here on, until the end. */
void cache_setup(struct cache_model *m, const struct tm_cache_config *config,
		 u32 limit);
void cache_teardown(struct cache_model *m);

/* Fail the test where the cache is not what the model says. */
void cache_compare(struct cache_model *m);

/* The whole state of a cache but what it wants, byte for byte. */
void cache_remember(const struct tm_cache *cache);
bool cache_unchanged(const struct tm_cache *cache);

/* The model's sequence of this name; NULL when it is not open. */
struct cache_model_seq *cache_seq(struct cache_model *m, struct tm_seq_id id);
u32 cache_place(const struct cache_model *m, const struct cache_model_seq *s);
/* Tables that have this block. */
u32 cache_refs(const struct cache_model *m, u32 block);
u32 cache_free_pages(const struct cache_model *m);
u32 cache_nr_chunks(const struct cache_model *m);
/* Full blocks of a sequence. */
u32 cache_nr_full(const struct cache_model *m, const struct cache_model_seq *s);

/*
 * The operations: each removes the mappings that have to go, calls the core, checks its
 * answer and that a refused call changed nothing, does the same to the model, and
 * compares all of it.
 */
int cache_do_add(struct cache_model *m);
int cache_do_remove(struct cache_model *m);
int cache_do_open(struct cache_model *m, u64 tenant, struct tm_seq_id *id);
int cache_do_close(struct cache_model *m, struct tm_seq_id id);
int cache_do_extend_many(struct cache_model *m, struct tm_cache_extend *items,
			 u32 nr, bool evict);
int cache_do_extend(struct cache_model *m, struct tm_seq_id id, u32 tokens,
		    bool evict);
int cache_do_truncate(struct cache_model *m, struct tm_seq_id id, u32 length);
int cache_do_seal(struct cache_model *m, struct tm_seq_id id, u32 index);
int cache_do_fork(struct cache_model *m, struct tm_seq_id id, u32 at,
		  bool evict, struct tm_seq_id *child);
int cache_do_write(struct cache_model *m, u32 place, u32 group, u32 index,
		   bool evict);
int cache_do_publish(struct cache_model *m, struct tm_seq_id id, u32 first,
		     const struct tm_hash *hashes, u32 nr, bool evict);
u32 cache_do_match(struct cache_model *m, u64 tenant,
		   const struct tm_hash *hashes, u32 nr);
int cache_do_lookup(struct cache_model *m, struct tm_seq_id id,
		    const struct tm_hash *hashes, u32 nr, bool evict,
		    u32 *matched);
int cache_do_adopt(struct cache_model *m, struct tm_seq_id id, u32 index,
		   const struct tm_hash *hash, u32 tokens, bool evict);
int cache_do_reset(struct cache_model *m);
int cache_do_evict(struct cache_model *m);
/* Pack what the sequence has there; -ENOENT when it cannot be. */
int cache_do_pack(struct cache_model *m, u32 place, u32 group, u32 index,
		  u32 pages);
/* Pack a block, whoever has it; not one that is shared. */
int cache_do_pack_block(struct cache_model *m, u32 block, u32 pages);
int cache_do_unpack(struct cache_model *m, u32 block, bool evict);
bool cache_do_next_event(struct cache_model *m, struct tm_cache_event *event);
int cache_do_move_begin(struct cache_model *m);
int cache_do_move_end(struct cache_model *m, bool copied);

/*
 * A touch of page @page of a block: what a fault does, once. -EAGAIN: unpack first;
 * -EACCES: cache_do_write() first; -ENOENT: SIGBUS. A write leaves random contents.
 */
int cache_do_touch(struct cache_model *m, u32 place, u32 group, u32 index,
		   u32 page, bool write);

#endif
