/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Level 2: the kv pool, blocks of KV cache of any number of pages.
 *
 * A block holds a fixed number of tokens of one group of layers. Its size comes
 * from the model and is rarely a power of two (44 pages for TinyLlama), nor does
 * it divide a chunk. What lies where is free to choose, because the block table
 * is the page table: a block needs pages, not neighbours. So:
 *
 *  - Any free page of any chunk serves any block of any group. Jenga
 *    (arXiv:2503.18292) makes its large pages the LCM of the block sizes for want
 *    of an MMU; here the span over which blocks come out even is the pool, and no
 *    page is left over in a chunk because of what it was first used for.
 *  - A block lies whole in the fullest chunk that has room for it, in one run if
 *    it can. Only when no chunk has room for it whole is it gathered from several,
 *    the emptiest first, so that it has few pieces. That costs little: with an
 *    array of its own for each layer's K and V, the pages of one block are mapped
 *    far apart and could not share a TLB entry anyway.
 *  - Hence an allocation fails only when the pool has fewer free pages than it
 *    needs, and all-or-nothing is one comparison, made first: no rollback.
 *  - When demand falls, blocks that stay keep chunks half empty. A page fits in any
 *    hole, so tm_kv_move_begin() can go on until less than one chunk is free.
 *
 * A block's pages are a chain of links, 4 bytes for each page of a chunk; a block
 * has a dense number, by which its user keeps what else there is to know of it. Most
 * blocks are one run, and are known to be: any page of such a one is found at once.
 * Of the others every 64th page has a *mark*, which the chain leads through and from
 * which an earlier mark is found in a logarithm of steps (Myers, An applicative
 * random-access stack, 1983). So the way to a page, and the way from a page to its
 * block, is about a hundred steps for the largest block there is.
 *
 * A block may be made to hold fewer pages for a while (tm_kv_shrink()) and keeps its
 * number: that is what compressed contents lie in.
 *
 * Context: all functions but init and destroy need pool->lock. Those that allocate or
 * free pages let others run meanwhile (tm_relax()), with the lock held.
 */
#ifndef TM_CORE_KV_H
#define TM_CORE_KV_H

#include "core/geometry.h"

/* Most groups of a model. */
#define TM_KV_GROUPS		16
/* Fewest tokens of a block where the choice is ours: a block has its records. */
#define TM_KV_MIN_TOKENS	8
/* Most tokens of a block where the choice is ours: many sequences have no more. */
#define TM_KV_MAX_TOKENS	512
/* Most pages of a block: 4 GiB, for the states of the largest models. */
#define TM_KV_MAX_BLOCK_PAGES	(1u << 20)

#define TM_KV_WORDS		((1u << TM_MAX_CHUNK_ORDER) / 64)
/* One list for each number of free pages a chunk can have. */
#define TM_KV_LISTS		((1u << TM_MAX_CHUNK_ORDER) + 1)

/* Pages from one mark of a block to the next. */
#define TM_KV_MARK_PAGES	64

/* Which tokens a group keeps. */
enum tm_kv_rule {
	TM_KV_FULL,	/* all */
	TM_KV_WINDOW,	/* the last @window */
	TM_KV_STATE,	/* none: one block for the sequence, whatever its length */
	TM_KV_RULES,
};

/**
 * struct tm_kv_group - layers that share one KV shape and one rule
 * @rule: enum tm_kv_rule
 * @planes: arrays that are mapped apart and so begin on a page of their own: two
 *          for each layer (K and V) for attention code that wants each of them
 *          contiguous; fewer where layers are interleaved and read with a stride,
 *          which keeps blocks small on large pages (vAttention, arXiv:2405.04437)
 * @token_bytes: bytes of a token in one plane; for TM_KV_STATE of the whole state
 * @window: tokens, for TM_KV_WINDOW; else 0
 */
struct tm_kv_group {
	u32 rule;
	u32 planes;
	u32 token_bytes;
	u32 window;
};

/**
 * struct tm_kv_geometry - what a model's blocks are made of
 * @pages: pages and chunks
 * @nr_groups: groups in use
 * @block_tokens: tokens of a block, the same in all groups: a prefix that matches
 *                does so in all of them at once
 * @group: the groups
 * @plane_pages: pages of one plane of a block, by group
 * @block_pages: pages of a block, by group
 */
struct tm_kv_geometry {
	struct tm_geometry pages;
	u32 nr_groups;
	u32 block_tokens;
	struct tm_kv_group group[TM_KV_GROUPS];
	u32 plane_pages[TM_KV_GROUPS];
	u32 block_pages[TM_KV_GROUPS];
};

/**
 * tm_kv_geometry_init - work out the blocks of a model
 * @geo: the result
 * @pages: pages and chunks
 * @groups: the groups
 * @nr_groups: how many
 * @block_tokens: tokens of a block; 0 for the fewest, of TM_KV_MIN_TOKENS or more, that
 *                fill whole pages
 *
 * A plane of a block is whole pages, because the arrays that blocks are strung into are
 * to have one stride from end to end. Only a state's is rounded up: nothing follows it.
 *
 * Few tokens, because a prefix is found in whole blocks only and the last block
 * of a sequence is on average half empty. (vLLM pads all groups to one block size;
 * blocks grow to hundreds of tokens and short prefixes are never found.)
 *
 * Context: any. Return: 0, or -EINVAL for no or too many groups, a group that is
 * empty or whose rule and window do not fit, a plane that is not whole pages (for 0: with
 * no number up to TM_KV_MAX_TOKENS), or a block above TM_KV_MAX_BLOCK_PAGES.
 */
int __must_check tm_kv_geometry_init(struct tm_kv_geometry *geo,
				     struct tm_geometry pages,
				     const struct tm_kv_group *groups,
				     u32 nr_groups, u32 block_tokens);

/**
 * tm_kv_held - the blocks a sequence holds
 * @geo: the geometry
 * @group: of which group; less than geo->nr_groups
 * @tokens: tokens of the sequence that this group sees
 * @first: the first block, counted from the start of the sequence: those before
 *         it have left the window
 *
 * Context: any. Return: the block after the last one.
 */
u32 tm_kv_held(const struct tm_kv_geometry *geo, u32 group, u32 tokens,
	       u32 *first);

/* An allocated block: a number below tm_kv_pool::nr_blocks. */
struct tm_kv_block {
	u32 v;
};

/**
 * struct tm_kv_chunk - the free pages of one chunk
 * @bits: one bit per free page
 * @id: the chunk
 * @nr_free: bits set; the list the chunk is on
 * @in_pool: the slot holds a chunk
 * @stuck: a page could not be moved out, and none was freed since
 * @next: @prev: list of chunks with as many free pages, or of empty slots
 */
struct tm_kv_chunk {
	u64 bits[TM_KV_WORDS];
	struct tm_chunk_id id;
	u16 nr_free;
	bool in_pool;
	bool stuck;
	u32 next;
	u32 prev;
};

/**
 * struct tm_kv_record - a block, or room for one
 * @link: to the first page; of a record not in use, the next such record
 * @group: its group, or TM_NONE when not in use
 * @pages: pages it has: fewer than its group's blocks while it is shrunk
 * @mark: the last one; TM_NONE for none
 * @run: they are known to follow each other, in order
 */
struct tm_kv_record {
	u32 link;
	u32 group;
	u32 pages;
	u32 mark;
	bool run;
};

/**
 * struct tm_kv_mark - a page of a block that is found without a walk, or room for one
 * @link: to the page; of a mark not in use, the next such mark
 * @block: its block
 * @nth: it is page @nth * TM_KV_MARK_PAGES of the block; from 1
 * @before: the mark before this one; the first one, itself
 * @jump: an earlier mark, as far back as makes the way to any of them short
 */
struct tm_kv_mark {
	u32 link;
	u32 block;
	u32 nth;
	u32 before;
	u32 jump;
};

/**
 * struct tm_kv_moving - the page that is being moved
 * @active: there is one
 * @block: the block it is of; TM_NONE when the page was freed meanwhile
 * @index: which page of the block
 * @from: @to: pages of slots
 */
struct tm_kv_moving {
	bool active;
	u32 block;
	u32 index;
	u32 from;
	u32 to;
};

/**
 * struct tm_kv_pool - level 2 for KV blocks, of one model
 * @geo: the geometry
 * @chunks: by slot. A slot is the pool's own number for a chunk: a pool is as
 *          large as its cache may get, not as the machine
 * @links: by page of a slot: the next page of its block, 0 for a free page
 * @blocks: by block
 * @marks: NULL when no block is so large that it has one
 * @nr_slots: length of @chunks
 * @nr_blocks: length of @blocks: twice as many as all slots can hold, but no more
 *             than they have pages
 * @nr_marks: length of @marks: what all slots' pages can have
 * @free_slot: list of slots without a chunk
 * @free_block: list of records not in use
 * @free_mark: list of marks not in use
 * @lists: bit n is set when @head[n] is not TM_NONE
 * @head: chunks with n free pages
 * @nr_chunks: chunks in the pool
 * @free_pages: pages of them in no block
 * @used: blocks allocated, by group
 * @allocs: @frees: blocks, so far
 * @gathered: blocks that did not fit into one chunk, so far
 * @moved: pages moved, so far
 * @moving: a move under way
 * @lock: the caller's lock, for assertions only
 */
struct tm_kv_pool {
	struct tm_kv_geometry geo;
	struct tm_kv_chunk *chunks;
	u32 *links;
	struct tm_kv_record *blocks;
	struct tm_kv_mark *marks;
	u32 nr_slots;
	u32 nr_blocks;
	u32 nr_marks;
	u32 free_slot;
	u32 free_block;
	u32 free_mark;
	u64 lists[TM_KV_LISTS / 64 + 1];
	u32 head[TM_KV_LISTS];
	u32 nr_chunks;
	u32 free_pages;
	u32 used[TM_KV_GROUPS];
	u64 allocs;
	u64 frees;
	u64 gathered;
	u64 moved;
	struct tm_kv_moving moving;
	tm_sleep_lock_t *lock;
};

/**
 * tm_kv_pool_init - make an empty pool
 * @pool: the pool
 * @geo: from tm_kv_geometry_init(); copied
 * @nr_slots: most chunks the pool may hold
 * @lock: what the caller holds around every other call
 *
 * Context: may sleep; no lock. Return: 0, -EINVAL for too few slots for a
 * block of any group or too many for a link, -ENOMEM.
 */
int __must_check tm_kv_pool_init(struct tm_kv_pool *pool,
				 const struct tm_kv_geometry *geo, u32 nr_slots,
				 tm_sleep_lock_t *lock);
/* Every chunk must have been removed. Context: may sleep; no lock. */
void tm_kv_pool_destroy(struct tm_kv_pool *pool);

/**
 * tm_kv_add_chunk - give the pool a chunk from level 1, all of it free
 * @pool: the pool
 * @id: the chunk; the caller sees to it that no chunk is given twice
 *
 * Return: 0, or -ENOSPC when the pool holds as many as it may.
 */
int __must_check tm_kv_add_chunk(struct tm_kv_pool *pool,
				 struct tm_chunk_id id);

/**
 * tm_kv_remove_chunk - take out a chunk that has fallen empty, for level 1
 * @pool: the pool
 * @id: the chunk
 *
 * To be called after tm_kv_free(), until it has no more. An empty chunk that is
 * not taken out serves the next block that fits nowhere else.
 *
 * Return: 0, or -ENOENT when no chunk is empty.
 */
int __must_check tm_kv_remove_chunk(struct tm_kv_pool *pool,
				    struct tm_chunk_id *id);

/* No chunks will do: there are not so many numbers of blocks left. */
#define TM_KV_NEVER		(~(u64)0)

/**
 * tm_kv_missing - chunks to add before an allocation can succeed
 * @pool: the pool
 * @count: blocks wanted, by group; pool->geo.nr_groups long
 *
 * Return: chunks, or TM_KV_NEVER.
 */
u64 tm_kv_missing(const struct tm_kv_pool *pool, const u32 *count);

/* The same for @pages free pages and @blocks unused block numbers. */
u64 tm_kv_lack(const struct tm_kv_pool *pool, u64 pages, u64 blocks);

/**
 * tm_kv_alloc - allocate blocks of any groups: all or none
 * @pool: the pool
 * @count: blocks wanted, by group; pool->geo.nr_groups long
 * @blocks: the blocks, those of group 0 first; as long as the sum of @count
 *
 * Steps: some for each page allocated, and one pass over the bitmap of a chunk for
 * each piece of a block. The caller bounds what it asks for in one go.
 *
 * Return: 0, or -ENOMEM when tm_kv_missing() is not 0 (nothing changed).
 */
int __must_check tm_kv_alloc(struct tm_kv_pool *pool, const u32 *count,
			     struct tm_kv_block *blocks);

/**
 * tm_kv_free - free a block
 * @pool: the pool
 * @block: from tm_kv_alloc()
 *
 * Chunks that fall empty stay until tm_kv_remove_chunk().
 *
 * Return: 0, or -EINVAL when there is no such block (nothing changed).
 */
int __must_check tm_kv_free(struct tm_kv_pool *pool, struct tm_kv_block block);

/* Pages a block has now; 0 when there is no such block. */
u32 tm_kv_pages(const struct tm_kv_pool *pool, struct tm_kv_block block);

/**
 * tm_kv_shrink - keep only the first pages of a block
 * @pool: the pool
 * @block: the block
 * @pages: how many; at least 1, fewer than it has
 *
 * A move of one of the others is over: tm_kv_move_end() says so.
 * Return: 0, or -EINVAL when there is no such block or @pages is none of these.
 */
int __must_check tm_kv_shrink(struct tm_kv_pool *pool,
			      struct tm_kv_block block, u32 pages);

/**
 * tm_kv_regrow - give a shrunk block all its pages again, behind those it has
 * @pool: the pool
 * @block: the block
 *
 * Return: 0, -EINVAL when there is no such block or it is not shrunk, -ENOMEM when the
 * pool has not enough free pages (nothing changed).
 */
int __must_check tm_kv_regrow(struct tm_kv_pool *pool,
			      struct tm_kv_block block);

/**
 * tm_kv_page - one page of a block
 * @pool: the pool
 * @block: the block
 * @index: which, from 0, in the order of tm_kv_walk_next()
 * @page: the page
 *
 * Steps: as tm_kv_walk_at(), which is for who wants more than one.
 * Return: 0, or -EINVAL when there is no such block or page.
 */
int __must_check tm_kv_page(const struct tm_kv_pool *pool,
			    struct tm_kv_block block, u32 index,
			    struct tm_page_id *page);

/**
 * struct tm_kv_walk - a place in a block
 * @link: to the next page
 */
struct tm_kv_walk {
	u32 link;
};

/**
 * tm_kv_walk_start - go to the first page of a block
 * @pool: the pool
 * @block: the block
 * @walk: for tm_kv_walk_next()
 *
 * Return: 0, or -EINVAL when there is no such block.
 */
int __must_check tm_kv_walk_start(const struct tm_kv_pool *pool,
				  struct tm_kv_block block,
				  struct tm_kv_walk *walk);

/**
 * tm_kv_walk_at - go to any page of a block
 * @pool: the pool
 * @block: the block
 * @index: which, from 0, in the order of tm_kv_walk_next()
 * @walk: for tm_kv_walk_next()
 *
 * One step for a block in one run, else about a hundred at most.
 * Return: 0, or -EINVAL when there is no such block or page.
 */
int __must_check tm_kv_walk_at(const struct tm_kv_pool *pool,
			       struct tm_kv_block block, u32 index,
			       struct tm_kv_walk *walk);

/**
 * tm_kv_walk_next - the next page of a block
 * @pool: the pool
 * @walk: the place; good until the block is freed
 * @page: the page
 *
 * The pages come in the order they are mapped in: plane after plane.
 *
 * Return: false when there is no page left.
 */
bool tm_kv_walk_next(const struct tm_kv_pool *pool, struct tm_kv_walk *walk,
		     struct tm_page_id *page);

/**
 * struct tm_kv_move - a page to move so that a chunk falls empty
 * @block: the block it is of
 * @index: which page of the block, from 0, in the order of tm_kv_walk_next()
 * @from: where it is
 * @to: where it is to go
 */
struct tm_kv_move {
	struct tm_kv_block block;
	u32 index;
	struct tm_page_id from;
	struct tm_page_id to;
};

/**
 * tm_kv_move_begin - choose a page to move, and set a place aside for it
 * @pool: the pool
 * @move: the page
 *
 * Out of the chunk with the fewest pages used, into the one with the most. The
 * caller drops the lock, keeps the page from being written, copies it, and calls
 * tm_kv_move_end(). Meanwhile blocks may come and go, this one too. Nothing marks
 * a chunk as being emptied: the fewer pages it has, the less is allocated from it.
 *
 * Steps: as many as take it to a page, whatever the size of the block; some for each
 * chunk that is stuck.
 *
 * Return: 0; -EBUSY while a move is under way; -ENOENT when no chunk would fall
 * empty: the free pages do not make up a chunk, or every chunk to empty is stuck,
 * or one is empty already and has to be taken out first.
 */
int __must_check tm_kv_move_begin(struct tm_kv_pool *pool,
				  struct tm_kv_move *move);

/**
 * tm_kv_move_end - conclude a move
 * @pool: the pool
 * @copied: the page is in its new place: the block has that now. Otherwise all is
 *          as before, and its chunk is left alone until some page of it is freed
 *
 * Return: 0; -ENOENT when the page was freed meanwhile (there is nothing to map);
 * -EINVAL when no move is under way.
 */
int __must_check tm_kv_move_end(struct tm_kv_pool *pool, bool copied);

#endif
