/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A model slot: which generations it has, what becomes of each, and which of them share
 * memory. Like RCU: what is replaced lives on until its last reader lets go.
 *
 *                 tm_slot_loaded          tm_slot_commit
 *       LOADING -----------------> STAGED --------------> ACTIVE
 *          |                         |                    |    ^
 *          |                         |      another is    |    | tm_slot_rollback:
 *          |                         |      committed     v    v they change places
 *          |                         |                   PREVIOUS
 *          | tm_slot_abort           | tm_slot_abort        | another is committed,
 *          v                         v                      v tm_slot_forget
 *       RETIRED                   RETIRED                RETIRED
 *
 * tm_slot_fail() makes any of the upper four FAILED, in the place it has: it can be let go of
 * (RETIRED) and nothing else. tm_slot_remove() retires all.
 *
 * A generation is held by its place in the slot and by everyone who has called tm_slot_hold();
 * when nobody holds it, it is handed back, and tm_slot_bury() hands back those of its pieces
 * that no other has. That is a call of its own, so that no commit has to wait for it.
 *
 * A generation is made up of pieces, in the order of the model's bytes. A piece is the memory of one
 * chunk's worth, or of the tail; what it is made of is the caller's business. Equal pieces of two
 * generations are one, with a count of its users. Pieces do not change once they are added.
 *
 * The memory of the structs is the caller's. Nothing here allocates, so nothing here fails
 * for want of memory. Each call takes a constant number of steps, and one for each piece of a
 * generation that it ends while that is LOADING. tm_slot_bury(), tm_slot_usage() and
 * tm_slot_check() look at each piece.
 *
 * Context: all functions but the three that initialize need the lock and never sleep.
 */
#ifndef TM_CORE_SLOT_H
#define TM_CORE_SLOT_H

#include "core/platform.h"

enum tm_generation_state {
	TM_GENERATION_LOADING,
	TM_GENERATION_STAGED,
	TM_GENERATION_ACTIVE,
	TM_GENERATION_PREVIOUS,
	TM_GENERATION_RETIRED,
	TM_GENERATION_FAILED,
};

/**
 * struct tm_piece - memory that generations of a slot may share; embedded in what has it
 * @users: generations that have it
 * @pages: how many it takes
 * @next: links those handed back
 */
struct tm_piece {
	u32 users;
	u32 pages;
	struct tm_piece *next;
};

/**
 * struct tm_generation - one version of the model; embedded in what has it
 * @number: its name in the slot, from 1 on; never used twice
 * @state: enum tm_generation_state
 * @error: why it cannot be read any more, a negative errno, or 0. FAILED: why. RETIRED before
 *         it was loaded: -ECANCELED
 * @holders: who keeps it: its place in the slot, and calls of tm_slot_hold()
 * @piece: its pieces, @nr_pieces of them; room for @max_pieces
 * @nr_pieces: pieces it has
 * @max_pieces: pieces it will have
 * @next: links those handed back
 */
struct tm_generation {
	u64 number;
	u32 state;
	int error;
	u32 holders;
	struct tm_piece **piece;
	u32 nr_pieces;
	u32 max_pieces;
	struct tm_generation *next;
};

/**
 * struct tm_slot - the generations of one model
 * @lock: what the caller holds around every call, for writing unless the call changes nothing
 * @active: who acquires gets this; or NULL
 * @previous: a rollback would make this active; or NULL
 * @staged: being loaded, loaded or failed; or NULL
 * @last: the number given out last
 * @generations: how many exist, readers' ones too
 * @removed: nothing can be staged any more
 */
struct tm_slot {
	tm_sleep_lock_t *lock;
	struct tm_generation *active;
	struct tm_generation *previous;
	struct tm_generation *staged;
	u64 last;
	u32 generations;
	bool removed;
};

/**
 * struct tm_slot_dead - what nobody has any more, for the caller to free after tm_slot_bury()
 * @generations: linked by @next
 * @pieces: linked by @next
 */
struct tm_slot_dead {
	struct tm_generation *generations;
	struct tm_piece *pieces;
};

/* Memory of a generation, in pages. */
struct tm_slot_usage {
	u64 own;	/* that no other generation has */
	u64 shared;
};

/* An empty slot. @lock is for assertions only. */
void tm_slot_init(struct tm_slot *slot, tm_sleep_lock_t *lock);

/* A generation in no slot. @piece has room for @max_pieces; 0 when it has none of its own. */
void tm_generation_init(struct tm_generation *gen, struct tm_piece **piece,
			u32 max_pieces);

/* A piece of @pages pages that no generation has. */
void tm_piece_init(struct tm_piece *piece, u32 pages);

/**
 * tm_slot_stage - a new generation, LOADING, with the next number
 * @slot: the slot
 * @gen: it, fresh from tm_generation_init()
 *
 * Its place holds it: who goes on using it after the lock is dropped holds it too.
 *
 * Return: 0; -ENOENT when the slot was removed; -EBUSY while another is staged.
 */
int __must_check tm_slot_stage(struct tm_slot *slot, struct tm_generation *gen);

/**
 * tm_slot_add - give a generation that is LOADING its next piece
 * @slot: the slot
 * @gen: the generation; it has room
 * @piece: the piece; no generation has it
 *
 * Return: 0; -ECANCELED when it is not LOADING any more: the piece is still the caller's.
 */
int __must_check tm_slot_add(struct tm_slot *slot, struct tm_generation *gen,
			     struct tm_piece *piece);

/**
 * tm_slot_share - its next piece is the one that another generation has there
 * @slot: the slot
 * @gen: the generation; it has room
 * @from: the other, held by the caller; it has a piece of that index
 *
 * Return: 0; -ECANCELED when @gen is not LOADING any more.
 */
int __must_check tm_slot_share(struct tm_slot *slot, struct tm_generation *gen,
			       const struct tm_generation *from);

/**
 * tm_slot_loaded - a generation has all its pieces: LOADING to STAGED
 * @slot: the slot
 * @gen: the generation
 *
 * Return: 0; -ECANCELED when it is not LOADING any more.
 */
int __must_check tm_slot_loaded(struct tm_slot *slot, struct tm_generation *gen);

/**
 * tm_slot_fail - a generation cannot be used (any more)
 * @slot: the slot
 * @gen: the generation, held by the caller
 * @error: why, a negative errno
 * @dead: what is handed back is added here
 *
 * It keeps its place. One that is LOADING loses its pieces, which nobody can have seen; of
 * any other they stay until nobody holds it. One that is RETIRED stays so and has the error.
 * The first error stands: after one, nothing changes.
 */
void tm_slot_fail(struct tm_slot *slot, struct tm_generation *gen, int error,
		  struct tm_slot_dead *dead);

/**
 * tm_slot_commit - the staged generation becomes the active one
 * @slot: the slot
 * @number: the staged one's
 * @dead: what is handed back is added here
 *
 * The active one becomes the previous one, and what was that is let go of. But when the active
 * one is FAILED, it is let go of itself and the previous one stays.
 *
 * Return: 0; -ENOENT when it is not the staged one; -EAGAIN while it is LOADING;
 * -ESTALE when it is FAILED.
 */
int __must_check tm_slot_commit(struct tm_slot *slot, u64 number,
				struct tm_slot_dead *dead);

/**
 * tm_slot_abort - let go of the staged generation
 * @slot: the slot
 * @number: the staged one's
 * @dead: what is handed back is added here
 *
 * One that is LOADING loses its pieces at once, which nobody can have seen.
 *
 * Return: 0; -ENOENT when it is not the staged one.
 */
int __must_check tm_slot_abort(struct tm_slot *slot, u64 number,
			       struct tm_slot_dead *dead);

/**
 * tm_slot_rollback - the previous generation and the active one change places
 * @slot: the slot
 * @number: the previous one's; 0: whichever it is
 * @dead: what is handed back is added here
 *
 * An active one that is FAILED is let go of instead of becoming the previous one.
 *
 * Return: 0; -ENOENT when it is not the previous one; -ESTALE when it is FAILED.
 */
int __must_check tm_slot_rollback(struct tm_slot *slot, u64 number,
				  struct tm_slot_dead *dead);

/* Let go of the previous generation. Return: whether there was one. */
bool tm_slot_forget(struct tm_slot *slot, struct tm_slot_dead *dead);

/* Let go of all generations; from now on the slot stays empty. As often as one likes. */
void tm_slot_remove(struct tm_slot *slot, struct tm_slot_dead *dead);

/* Return: the generation of this number, in whatever place, or NULL; 0: the active one. */
struct tm_generation *tm_slot_find(struct tm_slot *slot, u64 number);

/* Keep a generation, which somebody holds, until tm_slot_release(). */
void tm_slot_hold(struct tm_slot *slot, struct tm_generation *gen);

/* Undo tm_slot_hold(). What nobody holds any more is added to @dead. */
void tm_slot_release(struct tm_slot *slot, struct tm_generation *gen,
		     struct tm_slot_dead *dead);

/*
 * Take the pieces of the dead generations from them; those that no other has are added to
 * @dead. Until then they count as shared. As often as one likes.
 */
void tm_slot_bury(struct tm_slot *slot, struct tm_slot_dead *dead);

/* What a generation takes, in pages. */
void tm_slot_usage(const struct tm_slot *slot, const struct tm_generation *gen,
		   struct tm_slot_usage *usage);

/* Warns (tm_warn_on()) of whatever cannot be, as far as the places and what is in them show. */
void tm_slot_check(const struct tm_slot *slot);

#endif
