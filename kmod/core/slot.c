// SPDX-License-Identifier: GPL-2.0-only
#include "core/slot.h"

void tm_slot_init(struct tm_slot *slot, tm_sleep_lock_t *lock)
{
	*slot = (struct tm_slot){ .lock = lock };
}

void tm_generation_init(struct tm_generation *gen, struct tm_piece **piece,
			u32 max_pieces)
{
	*gen = (struct tm_generation){
		.piece = piece,
		.max_pieces = max_pieces,
	};
}

void tm_piece_init(struct tm_piece *piece, u32 pages)
{
	*piece = (struct tm_piece){ .pages = pages };
}

/* The generation has no pieces any more. */
static void tm_slot_drop_pieces(struct tm_generation *gen,
				struct tm_slot_dead *dead)
{
	for (u32 i = 0; i < gen->nr_pieces; i++) {
		struct tm_piece *piece = gen->piece[i];

		if (--piece->users)
			continue;
		piece->next = dead->pieces;
		dead->pieces = piece;
	}
	gen->nr_pieces = 0;
}

/* It is in no place of the slot any more; its readers have it as before. */
static void tm_slot_retire(struct tm_slot *slot, struct tm_generation *gen,
			   struct tm_slot_dead *dead)
{
	if (gen->state == TM_GENERATION_LOADING) {
		gen->error = -ECANCELED;
		tm_slot_drop_pieces(gen, dead);
	}
	gen->state = TM_GENERATION_RETIRED;
	tm_slot_release(slot, gen, dead);
}

int tm_slot_stage(struct tm_slot *slot, struct tm_generation *gen)
{
	tm_assert_sleep_locked(slot->lock);
	if (slot->removed)
		return -ENOENT;
	if (slot->staged)
		return -EBUSY;
	gen->number = ++slot->last;
	gen->state = TM_GENERATION_LOADING;
	gen->holders = 1;
	slot->staged = gen;
	slot->generations++;
	return 0;
}

/* A generation may be aborted at any time: its loader learns of it here. */
static int tm_slot_may_add(const struct tm_slot *slot,
			   const struct tm_generation *gen)
{
	tm_assert_sleep_locked(slot->lock);
	if (gen->state != TM_GENERATION_LOADING)
		return -ECANCELED;
	return tm_warn_on(gen->nr_pieces == gen->max_pieces) ? -EINVAL : 0;
}

static void tm_slot_append(struct tm_generation *gen, struct tm_piece *piece)
{
	piece->users++;
	gen->piece[gen->nr_pieces++] = piece;
}

int tm_slot_add(struct tm_slot *slot, struct tm_generation *gen,
		struct tm_piece *piece)
{
	int err = tm_slot_may_add(slot, gen);

	if (err)
		return err;
	if (tm_warn_on(piece->users))
		return -EINVAL;
	tm_slot_append(gen, piece);
	return 0;
}

int tm_slot_share(struct tm_slot *slot, struct tm_generation *gen,
		  const struct tm_generation *from)
{
	int err = tm_slot_may_add(slot, gen);

	if (err)
		return err;
	if (tm_warn_on(gen->nr_pieces >= from->nr_pieces))
		return -EINVAL;
	tm_slot_append(gen, from->piece[gen->nr_pieces]);
	return 0;
}

int tm_slot_loaded(struct tm_slot *slot, struct tm_generation *gen)
{
	tm_assert_sleep_locked(slot->lock);
	if (gen->state != TM_GENERATION_LOADING)
		return -ECANCELED;
	if (tm_warn_on(gen->nr_pieces != gen->max_pieces))
		return -EINVAL;
	gen->state = TM_GENERATION_STAGED;
	return 0;
}

void tm_slot_fail(struct tm_slot *slot, struct tm_generation *gen, int error,
		  struct tm_slot_dead *dead)
{
	tm_assert_sleep_locked(slot->lock);
	if (gen->error)
		return;
	gen->error = error;
	if (gen->state == TM_GENERATION_RETIRED)
		return;
	if (gen->state == TM_GENERATION_LOADING)
		tm_slot_drop_pieces(gen, dead);
	gen->state = TM_GENERATION_FAILED;
}

static void tm_slot_activate(struct tm_slot *slot, struct tm_generation *gen)
{
	gen->state = TM_GENERATION_ACTIVE;
	slot->active = gen;
}

int tm_slot_commit(struct tm_slot *slot, u64 number, struct tm_slot_dead *dead)
{
	struct tm_generation *gen = slot->staged, *old = slot->active;

	tm_assert_sleep_locked(slot->lock);
	if (!gen || gen->number != number)
		return -ENOENT;
	if (gen->state == TM_GENERATION_LOADING)
		return -EAGAIN;
	if (gen->state == TM_GENERATION_FAILED)
		return -ESTALE;
	slot->staged = NULL;
	tm_slot_activate(slot, gen);
	if (old && old->state == TM_GENERATION_FAILED) {
		/* Nobody can go back to it: the one before it stays. */
		tm_slot_retire(slot, old, dead);
	} else if (old) {
		tm_slot_forget(slot, dead);
		old->state = TM_GENERATION_PREVIOUS;
		slot->previous = old;
	}
	return 0;
}

int tm_slot_abort(struct tm_slot *slot, u64 number, struct tm_slot_dead *dead)
{
	struct tm_generation *gen = slot->staged;

	tm_assert_sleep_locked(slot->lock);
	if (!gen || gen->number != number)
		return -ENOENT;
	slot->staged = NULL;
	tm_slot_retire(slot, gen, dead);
	return 0;
}

int tm_slot_rollback(struct tm_slot *slot, u64 number,
		     struct tm_slot_dead *dead)
{
	struct tm_generation *gen = slot->previous, *old = slot->active;

	tm_assert_sleep_locked(slot->lock);
	if (!gen || (number && gen->number != number))
		return -ENOENT;
	if (gen->state == TM_GENERATION_FAILED)
		return -ESTALE;
	slot->previous = NULL;
	tm_slot_activate(slot, gen);
	if (old->state == TM_GENERATION_FAILED) {
		tm_slot_retire(slot, old, dead);
	} else {
		old->state = TM_GENERATION_PREVIOUS;
		slot->previous = old;
	}
	return 0;
}

bool tm_slot_forget(struct tm_slot *slot, struct tm_slot_dead *dead)
{
	struct tm_generation *gen = slot->previous;

	tm_assert_sleep_locked(slot->lock);
	if (!gen)
		return false;
	slot->previous = NULL;
	tm_slot_retire(slot, gen, dead);
	return true;
}

void tm_slot_remove(struct tm_slot *slot, struct tm_slot_dead *dead)
{
	struct tm_generation *active = slot->active, *staged = slot->staged;

	tm_assert_sleep_locked(slot->lock);
	slot->removed = true;
	slot->active = NULL;
	slot->staged = NULL;
	tm_slot_forget(slot, dead);
	if (active)
		tm_slot_retire(slot, active, dead);
	if (staged)
		tm_slot_retire(slot, staged, dead);
}

struct tm_generation *tm_slot_find(struct tm_slot *slot, u64 number)
{
	struct tm_generation *place[] = {
		slot->active, slot->previous, slot->staged,
	};

	tm_assert_sleep_locked(slot->lock);
	if (!number)
		return slot->active;
	for (u32 i = 0; i < 3; i++)
		if (place[i] && place[i]->number == number)
			return place[i];
	return NULL;
}

void tm_slot_hold(struct tm_slot *slot, struct tm_generation *gen)
{
	tm_assert_sleep_locked(slot->lock);
	tm_warn_on(!gen->holders);
	gen->holders++;
}

void tm_slot_release(struct tm_slot *slot, struct tm_generation *gen,
		     struct tm_slot_dead *dead)
{
	tm_assert_sleep_locked(slot->lock);
	if (tm_warn_on(!gen->holders) || --gen->holders)
		return;
	gen->next = dead->generations;
	dead->generations = gen;
	slot->generations--;
}

void tm_slot_bury(struct tm_slot *slot, struct tm_slot_dead *dead)
{
	tm_assert_sleep_locked(slot->lock);
	for (struct tm_generation *gen = dead->generations; gen; gen = gen->next)
		tm_slot_drop_pieces(gen, dead);
}

void tm_slot_usage(const struct tm_slot *slot, const struct tm_generation *gen,
		   struct tm_slot_usage *usage)
{
	tm_assert_sleep_locked(slot->lock);
	*usage = (struct tm_slot_usage){ 0 };
	for (u32 i = 0; i < gen->nr_pieces; i++) {
		const struct tm_piece *piece = gen->piece[i];

		if (piece->users == 1)
			usage->own += piece->pages;
		else
			usage->shared += piece->pages;
	}
}

static bool tm_generation_has(const struct tm_generation *gen, u32 i,
			      const struct tm_piece *piece)
{
	return gen && i < gen->nr_pieces && gen->piece[i] == piece;
}

/* Pieces are shared at the same index only, so each is counted by looking there. */
static void tm_slot_check_pieces(const struct tm_slot *slot,
				 const struct tm_generation *gen)
{
	for (u32 i = 0; i < gen->nr_pieces; i++) {
		const struct tm_piece *piece = gen->piece[i];
		u32 users = 0;

		users += tm_generation_has(slot->active, i, piece);
		users += tm_generation_has(slot->previous, i, piece);
		users += tm_generation_has(slot->staged, i, piece);
		tm_warn_on(piece->users < users);
	}
}

/* A generation in a place where it would be in this state. */
static void tm_slot_check_place(const struct tm_slot *slot,
				const struct tm_generation *gen, u32 state)
{
	bool failed = gen->state == TM_GENERATION_FAILED;

	tm_warn_on(gen->state != state && !failed);
	tm_warn_on(failed ? gen->error >= 0 : gen->error);
	tm_warn_on(!gen->holders);
	tm_warn_on(!gen->number || gen->number > slot->last);
	/* Only what was whole can be read; what failed before that has nothing left. */
	tm_warn_on(gen->nr_pieces > gen->max_pieces);
	tm_warn_on(gen->state != TM_GENERATION_LOADING &&
		   gen->nr_pieces != gen->max_pieces &&
		   (!failed || gen->nr_pieces));
	tm_slot_check_pieces(slot, gen);
}

void tm_slot_check(const struct tm_slot *slot)
{
	const struct tm_generation *active = slot->active;
	const struct tm_generation *previous = slot->previous;
	const struct tm_generation *staged = slot->staged;

	tm_assert_sleep_locked(slot->lock);
	tm_warn_on(slot->removed && (active || previous || staged));
	tm_warn_on(previous &&
		   (!active || active->number == previous->number));
	tm_warn_on(slot->generations <
		   (u32)!!active + (u32)!!previous + (u32)!!staged);
	if (active)
		tm_slot_check_place(slot, active, TM_GENERATION_ACTIVE);
	if (previous)
		tm_slot_check_place(slot, previous, TM_GENERATION_PREVIOUS);
	if (!staged)
		return;
	tm_slot_check_place(slot, staged,
			    staged->state == TM_GENERATION_LOADING ?
			    TM_GENERATION_LOADING : TM_GENERATION_STAGED);
	tm_warn_on(staged->number != slot->last);
}
