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
 * and nothing else. tm_slot_remove() retires all.
 *
 * A generation is held by its place in the slot and by everyone who has called tm_slot_hold();
 * when nobody holds it, it is handed back with those of its pieces that no other has.
 *
 * A generation is made up of pieces, in the order of the model's bytes. A piece is the memory of one
 * chunk's worth, or of the tail; what it is made of is the caller's business. Equal pieces of two
 * generations are one, with a count of its users. Pieces do not change once they are added.
 *
 * The memory of the structs is the caller's. Nothing here allocates, so nothing here fails
 * for want of memory. Each call takes a constant number of steps, and one for each piece of a
 * generation that it hands back.
 */
#ifndef TM_CORE_SLOT_H
#define TM_CORE_SLOT_H

#include "platform.h"

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
 * @error: FAILED: why, a negative errno
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
 * @lock: what the caller holds around every call, for writing
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
 * struct tm_slot_dead - what nobody has any more, for the caller to free
 * @generations: linked by @next; they have no pieces any more
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

void tm_slot_init(struct tm_slot *slot, tm_sleep_lock_t *lock);
void tm_generation_init(struct tm_generation *gen, struct tm_piece **piece,
			u32 max_pieces);
void tm_piece_init(struct tm_piece *piece, u32 pages);

int __must_check tm_slot_stage(struct tm_slot *slot, struct tm_generation *gen);
int __must_check tm_slot_add(struct tm_slot *slot, struct tm_generation *gen,
			     struct tm_piece *piece);
int __must_check tm_slot_share(struct tm_slot *slot, struct tm_generation *gen,
			       const struct tm_generation *from);
int __must_check tm_slot_loaded(struct tm_slot *slot, struct tm_generation *gen);
void tm_slot_fail(struct tm_slot *slot, struct tm_generation *gen, int error,
		  struct tm_slot_dead *dead);

int __must_check tm_slot_commit(struct tm_slot *slot, u64 number,
				struct tm_slot_dead *dead);
int __must_check tm_slot_abort(struct tm_slot *slot, u64 number,
			       struct tm_slot_dead *dead);
int __must_check tm_slot_rollback(struct tm_slot *slot, u64 number);
bool tm_slot_forget(struct tm_slot *slot, struct tm_slot_dead *dead);
void tm_slot_remove(struct tm_slot *slot, struct tm_slot_dead *dead);

struct tm_generation *tm_slot_find(struct tm_slot *slot, u64 number);
void tm_slot_hold(struct tm_slot *slot, struct tm_generation *gen);
void tm_slot_release(struct tm_slot *slot, struct tm_generation *gen,
		     struct tm_slot_dead *dead);

void tm_slot_usage(const struct tm_slot *slot, const struct tm_generation *gen,
		   struct tm_slot_usage *usage);
void tm_slot_check(const struct tm_slot *slot);

#endif
