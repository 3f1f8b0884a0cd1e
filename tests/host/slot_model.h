/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Slots against lists: a generation is alive while a place or a reader has it, a piece
 * while a generation lists it, and both are looked up by looking at all of them. Each
 * slot_do_*() makes a call and checks its result; slot_model_compare() checks all else.
 */
#ifndef TM_TEST_SLOT_MODEL_H
#define TM_TEST_SLOT_MODEL_H

#include "core/slot.h"
#include "harness.h"

#define SLOT_MODEL_SLOTS	3
#define SLOT_MODEL_GENS		24
#define SLOT_MODEL_PIECES	8	/* of a generation */
#define SLOT_MODEL_ARENA	6144
#define SLOT_NONE		(~0u)

struct model_piece {
	struct tm_piece *piece;		/* NULL: this entry is not used */
	u32 pages;
	bool dead;
};

struct model_gen {
	struct tm_generation *gen;	/* NULL: this entry is not used */
	u32 slot;
	u64 number;
	u32 state;
	int error;
	u32 readers;
	u32 max;
	u32 nr;
	u32 piece[SLOT_MODEL_PIECES];	/* indexes of model pieces */
	bool dead;
};

struct model_slot {
	struct tm_slot core;
	u32 active, previous, staged;	/* indexes of model generations or SLOT_NONE */
	u64 last;
	bool removed;
};

/* All that a test has; without @in_arena some of it is allocated piece by piece. */
struct slot_model {
	tm_sleep_lock_t lock;
	struct tm_slot_dead dead;
	struct model_slot slot[SLOT_MODEL_SLOTS];
	struct model_gen gen[SLOT_MODEL_GENS];
	struct model_piece piece[SLOT_MODEL_GENS * SLOT_MODEL_PIECES];
	bool in_arena;
	u32 arena_used;
	u64 arena[SLOT_MODEL_ARENA / sizeof(u64)];
};

/* With @in_arena a copy of the struct is a snapshot, and nothing is ever freed. */
void slot_model_init(struct slot_model *m, bool in_arena);
/* Everybody lets go: all must come back, and be freed. */
void slot_model_destroy(struct slot_model *m);
/* Whether a place or a reader has it, so that calls about it are allowed. */
bool slot_model_alive(const struct slot_model *m, u32 g);
bool slot_model_placed(const struct slot_model *m, u32 g);
/* Whether slot_do_stage() can be called; freeing may help. */
bool slot_model_has_room(const struct slot_model *m);
void slot_model_compare(struct slot_model *m);
/* Buries the dead and frees them, after checking that it is they. */
void slot_model_free(struct slot_model *m);

/* The new generation's index, or a negative errno. */
int slot_do_stage(struct slot_model *m, u32 s, u32 max);
int slot_do_add(struct slot_model *m, u32 g, u32 pages);
int slot_do_share(struct slot_model *m, u32 g, u32 from);
int slot_do_loaded(struct slot_model *m, u32 g);
void slot_do_fail(struct slot_model *m, u32 g, int error);
int slot_do_commit(struct slot_model *m, u32 s, u64 number);
int slot_do_abort(struct slot_model *m, u32 s, u64 number);
int slot_do_rollback(struct slot_model *m, u32 s, u64 number);
bool slot_do_forget(struct slot_model *m, u32 s);
void slot_do_remove(struct slot_model *m, u32 s);
void slot_do_hold(struct slot_model *m, u32 g);
void slot_do_release(struct slot_model *m, u32 g);
void slot_do_bury(struct slot_model *m);

#endif
