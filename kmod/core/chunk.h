/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Level 1: the chunk pool, a table of 2 MiB chunks and who holds each.
 *
 * The pool decides; it never touches memory. Where a decision takes work that
 * may sleep (asking the system for a chunk, zeroing one), it comes as a pair:
 * _begin moves the chunk to a state in which nobody else can have it and the
 * caller drops the lock; _end or _abort concludes.
 *
 *             grow_begin           grow_end                  take
 *     ABSENT ------------> GROWING --------> FREE --------------------> OWNED
 *        ^  <------------   |  ^     zeroed | dirty | split <----------  ^ |
 *        |    grow_abort    |  |            | ^     |           put      | |
 *        |                  |  |  zero_begin v | zero_end                | |
 *        |                  |  |          ZEROING   |                    | |
 *        |                  |  +--------------------+ recast_begin       | |
 *        |                  +------------------------------ grow_take ---+ |
 *        +---------------- remove ----------------- put of a charged one --+
 *
 * A chunk has one of two forms, fixed when the system hands it out: *whole*, one
 * object with one reference count, which can be mapped as one block; or *split*,
 * a count for each page, which tells who still holds which run. When the wrong
 * form is free, the chunk is recast: given back and asked for again.
 *
 * A *charged* chunk is on the bill of the memory cgroup it was grown for. It is never
 * free in the pool: nobody else may have it while that cgroup pays.
 *
 * The two-level scheme is Jenga's (arXiv:2503.18292): memory moves between uses
 * a chunk at a time, so that no static split strands it.
 *
 * Context: all functions but init and destroy need pool->lock and never sleep.
 */
#ifndef TM_CORE_CHUNK_H
#define TM_CORE_CHUNK_H

#include "core/geometry.h"

enum tm_chunk_state {
	TM_CHUNK_ABSENT,	/* the slot holds no memory */
	TM_CHUNK_GROWING,	/* asked of the system */
	TM_CHUNK_FREE_ZEROED,	/* whole */
	TM_CHUNK_FREE_DIRTY,	/* whole */
	TM_CHUNK_FREE_SPLIT,	/* dirty as well */
	TM_CHUNK_ZEROING,
	TM_CHUNK_OWNED,
	TM_CHUNK_STATES,
};

/* Who holds an OWNED chunk. */
enum tm_owner {
	TM_OWNER_TENSOR,	/* a tensor, as a whole chunk */
	TM_OWNER_BUDDY,
	TM_OWNERS,
};

/* What a chunk is grown as. */
struct tm_chunk_form {
	bool split;
	bool charged;
};

/* @form describes the memory last had; it outlasts tm_chunk_remove() and recasts. */
struct tm_chunk {
	u32 next;
	u8 state;
	u8 owner;
	struct tm_chunk_form form;
};

/**
 * struct tm_chunk_pool - level 1
 * @chunks: the table, @nr_slots long
 * @nr_slots: most chunks there can ever be
 * @capacity: most chunks the pool may hold now
 * @reserve: free zeroed chunks the caller should keep ready
 * @head: stacks by state; only ABSENT and the FREE states have one
 * @count: chunks by state
 * @owned: OWNED chunks by owner
 * @taken: chunks ever handed out, by owner
 * @grown: chunks ever taken from the system
 * @shrunk: chunks ever given back
 * @grow_failed: times the system had none
 * @recast: times a chunk was given back to be had in another form
 * @lock: the caller's lock, for assertions only
 */
struct tm_chunk_pool {
	struct tm_chunk *chunks;
	u32 nr_slots;
	u32 capacity;
	u32 reserve;
	u32 head[TM_CHUNK_STATES];
	u32 count[TM_CHUNK_STATES];
	u32 owned[TM_OWNERS];
	u64 taken[TM_OWNERS];
	u64 grown;
	u64 shrunk;
	u64 grow_failed;
	u64 recast;
	tm_lock_t *lock;
};

/**
 * tm_chunk_pool_init - make an empty pool of @nr_slots slots
 * @pool: the pool
 * @nr_slots: most chunks there can ever be
 * @lock: what the caller holds around every other call
 *
 * Context: may sleep; no lock. Return: 0, -EINVAL for no or too many slots,
 * -ENOMEM.
 */
int __must_check tm_chunk_pool_init(struct tm_chunk_pool *pool, u32 nr_slots,
				    tm_lock_t *lock);

/* Free the table. Every slot must be ABSENT. Context: may sleep; no lock. */
void tm_chunk_pool_destroy(struct tm_chunk_pool *pool);

/**
 * tm_chunk_grow_begin - reserve a slot for a chunk from the system
 * @pool: the pool
 * @id: the slot
 *
 * Return: 0, or -ENOSPC when the pool is at its capacity.
 */
int __must_check tm_chunk_grow_begin(struct tm_chunk_pool *pool,
				     struct tm_chunk_id *id);
/* The system gave whole memory for @id: it is free now. */
void tm_chunk_grow_end(struct tm_chunk_pool *pool, struct tm_chunk_id id,
		       bool zeroed);
/* The system gave memory of @form for @id: @owner has it at once. */
void tm_chunk_grow_take(struct tm_chunk_pool *pool, struct tm_chunk_id id,
			enum tm_owner owner, struct tm_chunk_form form);
/* The system had none: the slot is absent again. */
void tm_chunk_grow_abort(struct tm_chunk_pool *pool, struct tm_chunk_id id);

/**
 * tm_chunk_recast_begin - take a free chunk to have it in another form
 * @pool: the pool
 * @id: the chunk
 *
 * For when tm_chunk_take() had none of the form wanted and the pool may not grow.
 * The chunk is GROWING when this returns: the caller gives its memory back, asks for
 * other memory and concludes as after tm_chunk_grow_begin(). Zeroed ones go last.
 *
 * Return: 0, or -ENOENT when no chunk is free.
 */
int __must_check tm_chunk_recast_begin(struct tm_chunk_pool *pool,
				       struct tm_chunk_id *id);

/**
 * tm_chunk_take - hand a free, uncharged chunk to @owner
 * @pool: the pool
 * @owner: who gets it
 * @split: a split one; else a whole one
 * @want_zeroed: prefer a zeroed chunk; otherwise zeroed ones are spared
 * @id: the chunk
 * @zeroed: whether the chunk handed out is zeroed
 *
 * Return: 0, or -ENOMEM when no chunk of that form is free.
 */
int __must_check tm_chunk_take(struct tm_chunk_pool *pool, enum tm_owner owner,
			       bool split, bool want_zeroed,
			       struct tm_chunk_id *id, bool *zeroed);

/**
 * tm_chunk_put - an owner lets go of a chunk
 * @pool: the pool
 * @id: the chunk
 * @zeroed: it is whole and nobody wrote to it
 *
 * Return: whether the chunk left the pool because it was charged: the slot is ABSENT
 * and the caller gives the memory to the system.
 */
bool __must_check tm_chunk_put(struct tm_chunk_pool *pool,
			       struct tm_chunk_id id, bool zeroed);

/* Take a dirty whole chunk aside for zeroing. Return: 0, -ENOENT for none. */
int __must_check tm_chunk_zero_begin(struct tm_chunk_pool *pool,
				     struct tm_chunk_id *id);
void tm_chunk_zero_end(struct tm_chunk_pool *pool, struct tm_chunk_id id);

/**
 * tm_chunk_remove - take a free chunk out of the pool, for the system
 * @pool: the pool
 * @id: the chunk
 *
 * Split ones go first, zeroed ones last. The slot is ABSENT when this returns; the caller picks
 * up what belongs to the slot before it drops the lock.
 *
 * Return: 0, or -ENOENT when no chunk is free.
 */
int __must_check tm_chunk_remove(struct tm_chunk_pool *pool,
				 struct tm_chunk_id *id);

/* Chunks the pool holds or has asked for: what @capacity bounds. */
static inline u32 tm_chunk_total(const struct tm_chunk_pool *pool)
{
	return pool->nr_slots - pool->count[TM_CHUNK_ABSENT];
}

static inline u32 tm_chunk_free_count(const struct tm_chunk_pool *pool)
{
	return pool->count[TM_CHUNK_FREE_ZEROED] +
	       pool->count[TM_CHUNK_FREE_DIRTY] +
	       pool->count[TM_CHUNK_FREE_SPLIT];
}

/* Free chunks the system may have: those above the reserve or the capacity. */
u32 tm_chunk_excess(const struct tm_chunk_pool *pool);

/* Chunks to zero, to grow or to recast until the reserve is full. */
u32 tm_chunk_deficit(const struct tm_chunk_pool *pool);

#endif
