// SPDX-License-Identifier: GPL-2.0-only
/*
 * Model slots: the drawing of core/slot.h row by row, every short sequence of calls,
 * random ones, loads that end at each piece, and what each call touches.
 */
#include <sanitizer/asan_interface.h>
#include <stdlib.h>

#include "slot_model.h"

static struct slot_model m;

/* A staged generation of slot @s, loaded with @max pieces of its own. */
static u32 staged(u32 s, u32 max)
{
	int g = slot_do_stage(&m, s, max);

	CHECK(g >= 0);
	for (u32 i = 0; i < max; i++)
		CHECK_EQ(slot_do_add(&m, (u32)g, 1 + i), 0);
	CHECK_EQ(slot_do_loaded(&m, (u32)g), 0);
	slot_model_compare(&m);
	return (u32)g;
}

static u32 committed(u32 s, u32 max)
{
	u32 g = staged(s, max);

	CHECK_EQ(slot_do_commit(&m, s, m.gen[g].number), 0);
	slot_model_compare(&m);
	return g;
}

static u32 dead_pieces(void)
{
	u32 n = 0;

	slot_do_bury(&m);
	for (struct tm_piece *p = m.dead.pieces; p; p = p->next)
		n++;
	return n;
}

static u32 dead_generations(void)
{
	u32 n = 0;

	for (struct tm_generation *g = m.dead.generations; g; g = g->next)
		n++;
	return n;
}

/* Nobody fails or lets go too early: the arrows of the drawing. */
TEST(slot_life_of_a_generation)
{
	u32 a, b, c;

	slot_model_init(&m, false);
	a = (u32)slot_do_stage(&m, 0, 2);
	CHECK_EQ(m.gen[a].gen->number, 1);
	CHECK_EQ(m.gen[a].gen->state, TM_GENERATION_LOADING);
	CHECK_EQ(slot_do_stage(&m, 0, 2), -EBUSY);
	CHECK_EQ(slot_do_commit(&m, 0, 1), -EAGAIN);
	CHECK_EQ(slot_do_add(&m, a, 5), 0);
	CHECK_EQ(slot_do_add(&m, a, 7), 0);
	CHECK_EQ(slot_do_loaded(&m, a), 0);
	CHECK_EQ(m.gen[a].gen->state, TM_GENERATION_STAGED);
	CHECK_EQ(slot_do_loaded(&m, a), -ECANCELED);
	CHECK_EQ(slot_do_add(&m, a, 7), -ECANCELED);
	CHECK_EQ(slot_do_stage(&m, 0, 2), -EBUSY);
	CHECK_EQ(slot_do_rollback(&m, 0, 0), -ENOENT);
	CHECK_EQ(slot_do_commit(&m, 0, 1), 0);
	CHECK_EQ(m.gen[a].gen->state, TM_GENERATION_ACTIVE);
	CHECK_EQ(slot_do_commit(&m, 0, 1), -ENOENT);
	CHECK_EQ(slot_do_rollback(&m, 0, 0), -ENOENT);
	slot_model_compare(&m);

	b = committed(0, 2);
	CHECK_EQ(m.gen[a].gen->state, TM_GENERATION_PREVIOUS);
	CHECK_EQ(m.gen[b].gen->state, TM_GENERATION_ACTIVE);
	CHECK_EQ(slot_do_rollback(&m, 0, 2), -ENOENT);
	CHECK_EQ(slot_do_rollback(&m, 0, 1), 0);
	CHECK_EQ(m.gen[a].gen->state, TM_GENERATION_ACTIVE);
	CHECK_EQ(m.gen[b].gen->state, TM_GENERATION_PREVIOUS);
	CHECK_EQ(slot_do_rollback(&m, 0, 0), 0);
	CHECK_EQ(m.gen[b].gen->state, TM_GENERATION_ACTIVE);
	slot_model_compare(&m);

	/* Another is committed: the previous one goes, but not from its reader. */
	slot_do_hold(&m, a);
	c = committed(0, 2);
	CHECK_EQ(m.gen[c].gen->number, 3);
	CHECK_EQ(m.gen[a].gen->state, TM_GENERATION_RETIRED);
	CHECK_EQ(dead_generations() + dead_pieces(), 0);
	CHECK_EQ(m.slot[0].core.generations, 3);
	slot_do_release(&m, a);
	CHECK_EQ(dead_generations(), 1);
	CHECK_EQ(dead_pieces(), 2);
	CHECK(slot_do_forget(&m, 0));
	CHECK(!slot_do_forget(&m, 0));
	CHECK_EQ(dead_generations(), 2);
	slot_model_compare(&m);
	slot_model_free(&m);

	/* A number is never used twice, of an aborted one either. */
	a = (u32)slot_do_stage(&m, 0, 1);
	CHECK_EQ(slot_do_abort(&m, 0, 3), -ENOENT);
	CHECK_EQ(slot_do_abort(&m, 0, 4), 0);
	CHECK_EQ(slot_do_abort(&m, 0, 4), -ENOENT);
	b = staged(0, 1);
	CHECK_EQ(m.gen[b].gen->number, 5);
	CHECK_EQ(slot_do_abort(&m, 0, 5), 0);
	slot_model_compare(&m);
	slot_model_destroy(&m);
}

/* One of each state, which slot_fail_in_each_state() and others go on from. */
enum situation {
	IS_LOADING,
	IS_STAGED,
	IS_ACTIVE,
	IS_PREVIOUS,
	IS_RETIRED,
	IS_ABORTED,
	FAILED_LOADING,
	FAILED_STAGED,
	FAILED_ACTIVE,
	FAILED_PREVIOUS,
	SITUATIONS,
};

/* A generation that is so, numbered 3 in slot 0, and held by a reader; of two pieces. */
static u32 situation(enum situation how)
{
	u32 g;

	slot_model_init(&m, false);
	committed(0, 2);
	committed(0, 2);
	g = (u32)slot_do_stage(&m, 0, 2);
	slot_do_hold(&m, g);
	CHECK_EQ(slot_do_add(&m, g, 1), 0);
	if (how == IS_ABORTED)
		CHECK_EQ(slot_do_abort(&m, 0, 3), 0);
	if (how == FAILED_LOADING)
		slot_do_fail(&m, g, -EIO);
	if (how == IS_LOADING || how == IS_ABORTED || how == FAILED_LOADING)
		return g;
	CHECK_EQ(slot_do_add(&m, g, 1), 0);
	CHECK_EQ(slot_do_loaded(&m, g), 0);
	if (how != IS_STAGED && how != FAILED_STAGED)
		CHECK_EQ(slot_do_commit(&m, 0, 3), 0);
	if (how == IS_PREVIOUS || how == FAILED_PREVIOUS || how == IS_RETIRED)
		CHECK_EQ(slot_do_rollback(&m, 0, 0), 0);
	if (how == IS_RETIRED)
		CHECK(slot_do_forget(&m, 0));
	if (how >= FAILED_STAGED)
		slot_do_fail(&m, g, -EIO);
	slot_model_compare(&m);
	return g;
}

TEST(slot_fail_in_each_state)
{
	static const struct {
		u32 state;
		int error;
		u32 pieces;
	} want[SITUATIONS] = {
		[IS_LOADING] = { TM_GENERATION_FAILED, -ESTALE, 0 },
		[IS_STAGED] = { TM_GENERATION_FAILED, -ESTALE, 2 },
		[IS_ACTIVE] = { TM_GENERATION_FAILED, -ESTALE, 2 },
		[IS_PREVIOUS] = { TM_GENERATION_FAILED, -ESTALE, 2 },
		[IS_RETIRED] = { TM_GENERATION_RETIRED, -ESTALE, 2 },
		[IS_ABORTED] = { TM_GENERATION_RETIRED, -ECANCELED, 0 },
		[FAILED_LOADING] = { TM_GENERATION_FAILED, -EIO, 0 },
		[FAILED_STAGED] = { TM_GENERATION_FAILED, -EIO, 2 },
		[FAILED_ACTIVE] = { TM_GENERATION_FAILED, -EIO, 2 },
		[FAILED_PREVIOUS] = { TM_GENERATION_FAILED, -EIO, 2 },
	};

	for (u32 how = 0; how < SITUATIONS; how++) {
		u32 g = situation(how);
		const struct tm_generation *gen = m.gen[g].gen;
		bool placed = slot_model_placed(&m, g);

		tm_op("fail in situation %u", how);
		slot_do_fail(&m, g, -ESTALE);
		slot_model_compare(&m);
		CHECK_EQ(gen->state, want[how].state);
		CHECK_EQ(gen->error, want[how].error);
		CHECK_EQ(gen->nr_pieces, want[how].pieces);
		/* In its place it can still be found. */
		CHECK_EQ(tm_slot_find(&m.slot[0].core, 3) == gen, placed);
		slot_model_destroy(&m);
	}
}

/* What each call on the generation says, and what becomes of it. */
TEST(slot_calls_in_each_state)
{
	enum { COMMIT, ABORT, ROLLBACK, LOADED, ADD, CALLS };
	static const int want[SITUATIONS][CALLS] = {
		[IS_LOADING] = { -EAGAIN, 0, -ENOENT, 1, 0 },
		[IS_STAGED] = { 0, 0, -ENOENT, -ECANCELED, -ECANCELED },
		[IS_ACTIVE] = { -ENOENT, -ENOENT, -ENOENT, -ECANCELED,
				-ECANCELED },
		[IS_PREVIOUS] = { -ENOENT, -ENOENT, 0, -ECANCELED, -ECANCELED },
		[IS_RETIRED] = { -ENOENT, -ENOENT, -ENOENT, -ECANCELED,
				 -ECANCELED },
		[IS_ABORTED] = { -ENOENT, -ENOENT, -ENOENT, -ECANCELED,
				 -ECANCELED },
		[FAILED_LOADING] = { -ESTALE, 0, -ENOENT, -ECANCELED,
				     -ECANCELED },
		[FAILED_STAGED] = { -ESTALE, 0, -ENOENT, -ECANCELED,
				    -ECANCELED },
		[FAILED_ACTIVE] = { -ENOENT, -ENOENT, -ENOENT, -ECANCELED,
				    -ECANCELED },
		[FAILED_PREVIOUS] = { -ENOENT, -ENOENT, -ESTALE, -ECANCELED,
				      -ECANCELED },
	};

	for (u32 how = 0; how < SITUATIONS; how++)
		for (u32 call = 0; call < CALLS; call++) {
			u32 g = situation(how);
			int err = want[how][call];

			tm_op("call %u in situation %u", call, how);
			if (call == COMMIT)
				CHECK_EQ(slot_do_commit(&m, 0, 3), err);
			else if (call == ABORT)
				CHECK_EQ(slot_do_abort(&m, 0, 3), err);
			else if (call == ROLLBACK)
				CHECK_EQ(slot_do_rollback(&m, 0, 3), err);
			else if (call == LOADED && err <= 0)
				CHECK_EQ(slot_do_loaded(&m, g), err);
			else if (call == LOADED)
				/* A piece is missing, and it goes on loading. */
				CHECK_EQ(slot_do_loaded(&m, g), -EINVAL);
			else
				CHECK_EQ(slot_do_add(&m, g, 1), err);
			slot_model_compare(&m);
			slot_model_destroy(&m);
		}
}

/* A failed active generation stands in nobody's way, and is nobody's way back. */
TEST(slot_failed_active)
{
	u32 a, b, c;

	/* Committing another: the previous one stays. */
	slot_model_init(&m, false);
	a = committed(0, 1);
	b = committed(0, 1);
	slot_do_fail(&m, b, -EIO);
	c = committed(0, 1);
	CHECK(m.slot[0].core.active == m.gen[c].gen);
	CHECK(m.slot[0].core.previous == m.gen[a].gen);
	CHECK_EQ(dead_generations(), 1);
	CHECK_EQ(slot_do_rollback(&m, 0, 1), 0);
	slot_model_compare(&m);
	slot_model_destroy(&m);

	/* Rolling back: it goes, and nothing is previous. */
	slot_model_init(&m, false);
	a = committed(0, 1);
	b = committed(0, 1);
	slot_do_hold(&m, b);
	slot_do_fail(&m, b, -EIO);
	CHECK_EQ(slot_do_rollback(&m, 0, 0), 0);
	CHECK(m.slot[0].core.active == m.gen[a].gen);
	CHECK(!m.slot[0].core.previous);
	CHECK_EQ(m.gen[b].gen->state, TM_GENERATION_RETIRED);
	CHECK_EQ(m.gen[b].gen->error, -EIO);
	CHECK_EQ(slot_do_rollback(&m, 0, 0), -ENOENT);
	slot_do_release(&m, b);
	CHECK_EQ(dead_pieces(), 1);
	slot_model_compare(&m);

	/* The first one of all. */
	slot_do_fail(&m, a, -EIO);
	c = committed(0, 1);
	CHECK(!m.slot[0].core.previous);
	slot_model_compare(&m);
	slot_model_destroy(&m);
}

TEST(slot_removed)
{
	for (u32 how = 0; how < SITUATIONS; how++) {
		u32 g = situation(how);

		tm_op("remove in situation %u", how);
		slot_do_remove(&m, 0);
		slot_model_compare(&m);
		CHECK_EQ(m.gen[g].gen->state, TM_GENERATION_RETIRED);
		CHECK_EQ(m.slot[0].core.generations, 1);
		CHECK_EQ(slot_do_stage(&m, 0, 1), -ENOENT);
		CHECK_EQ(slot_do_commit(&m, 0, 3), -ENOENT);
		CHECK_EQ(slot_do_abort(&m, 0, 3), -ENOENT);
		CHECK_EQ(slot_do_rollback(&m, 0, 0), -ENOENT);
		CHECK(!slot_do_forget(&m, 0));
		CHECK(!tm_slot_find(&m.slot[0].core, 0));
		CHECK(!tm_slot_find(&m.slot[0].core, 3));
		slot_do_remove(&m, 0);
		slot_model_compare(&m);
		slot_do_release(&m, g);
		CHECK_EQ(m.slot[0].core.generations, 0);
		/* The others go on. */
		committed(1, 2);
		slot_model_destroy(&m);
	}
}

/* Three generations share what did not change; a piece goes with the last that has it. */
TEST(slot_shared_pieces)
{
	u32 a, b, c;

	slot_model_init(&m, false);
	a = committed(0, 4);
	slot_do_hold(&m, a);
	b = (u32)slot_do_stage(&m, 0, 4);
	for (u32 i = 0; i < 4; i++)
		CHECK_EQ(i == 2 ? slot_do_add(&m, b, 9) :
			 slot_do_share(&m, b, a), 0);
	CHECK_EQ(slot_do_loaded(&m, b), 0);
	CHECK_EQ(slot_do_commit(&m, 0, 2), 0);
	slot_model_compare(&m);
	c = (u32)slot_do_stage(&m, 0, 3);
	for (u32 i = 0; i < 3; i++)
		CHECK_EQ(slot_do_share(&m, c, b), 0);
	CHECK_EQ(slot_do_loaded(&m, c), 0);
	slot_model_compare(&m);
	CHECK_EQ(m.gen[a].gen->piece[0]->users, 3);
	CHECK_EQ(m.gen[b].gen->piece[2]->users, 2);
	CHECK_EQ(slot_do_commit(&m, 0, 3), 0);
	slot_model_compare(&m);
	CHECK_EQ(dead_pieces(), 0);
	slot_do_release(&m, a);
	CHECK_EQ(dead_pieces(), 1);
	CHECK(slot_do_forget(&m, 0));
	/* Generation 2's last piece; the other three are in generation 3. */
	CHECK_EQ(dead_pieces(), 2);
	slot_model_compare(&m);
	slot_do_remove(&m, 0);
	CHECK_EQ(dead_pieces(), 5);
	slot_model_destroy(&m);
}

/* What the caller must not do is noticed and changes nothing. */
TEST(slot_misuse)
{
	struct tm_piece used;
	u32 a, b;

	slot_model_init(&m, false);
	a = committed(0, 2);
	b = (u32)slot_do_stage(&m, 0, 3);
	/* It has no piece of that index itself. */
	CHECK_EQ(slot_do_share(&m, b, b), -EINVAL);
	CHECK_EQ(slot_do_share(&m, b, a), 0);
	CHECK_EQ(slot_do_share(&m, b, a), 0);
	CHECK_EQ(slot_do_share(&m, b, a), -EINVAL);
	CHECK_EQ(slot_do_loaded(&m, b), -EINVAL);
	slot_model_compare(&m);
	tm_piece_init(&used, 1);
	used.users = 1;
	tm_host_expect_warnings(1);
	CHECK_EQ(tm_slot_add(&m.slot[0].core, m.gen[b].gen, &used), -EINVAL);
	CHECK_EQ(used.users, 1);
	slot_model_compare(&m);
	CHECK_EQ(slot_do_add(&m, b, 1), 0);
	CHECK_EQ(slot_do_add(&m, b, 1), -EINVAL);
	CHECK_EQ(slot_do_share(&m, b, a), -EINVAL);
	slot_model_compare(&m);
	CHECK_EQ(slot_do_abort(&m, 0, 2), 0);
	/* Nobody holds it. */
	tm_host_expect_warnings(1);
	tm_slot_release(&m.slot[0].core, m.gen[b].gen, &m.dead);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	slot_model_compare(&m);
	tm_host_expect_warnings(1);
	tm_slot_hold(&m.slot[0].core, m.gen[b].gen);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	m.gen[b].gen->holders = 0;
	slot_model_destroy(&m);
}

/* How a load may end. */
enum end {
	END_FAIL,
	END_ABORT,
	END_REMOVE,
	END_FAIL_THEN_ABORT,
	END_ABORT_THEN_FAIL,
	ENDS,
};

static void end_load(u32 g, enum end end)
{
	u64 number = m.gen[g].number;

	if (end == END_FAIL || end == END_FAIL_THEN_ABORT)
		slot_do_fail(&m, g, -EIO);
	if (end == END_REMOVE)
		slot_do_remove(&m, 0);
	if (end == END_ABORT || end == END_FAIL_THEN_ABORT ||
	    end == END_ABORT_THEN_FAIL)
		CHECK_EQ(slot_do_abort(&m, 0, number), 0);
	if (end == END_ABORT_THEN_FAIL)
		slot_do_fail(&m, g, -EINTR);
}

/*
 * After each possible piece, with every choice of new and shared ones: what is new comes
 * back at once, and the active generation has what it had.
 */
TEST(slot_load_ends_at_each_piece)
{
	enum { MAX = 5 };

	for (u32 end = 0; end < ENDS; end++)
		for (u32 mix = 0; mix < 1 << MAX; mix++)
			for (u32 at = 0; at <= MAX; at++) {
				u32 active, g, fresh = 0;

				tm_op("end %u after %u of mix %x", end, at, mix);
				slot_model_init(&m, false);
				active = committed(0, MAX);
				slot_do_hold(&m, active);
				g = (u32)slot_do_stage(&m, 0, MAX);
				slot_do_hold(&m, g);
				for (u32 i = 0; i < at; i++) {
					bool new = mix >> i & 1;

					CHECK_EQ(new ? slot_do_add(&m, g, 3) :
						 slot_do_share(&m, g, active),
						 0);
					fresh += new;
				}
				end_load(g, end);
				slot_model_compare(&m);
				CHECK_EQ(dead_pieces(), fresh);
				CHECK_EQ(dead_generations(), 0);
				CHECK_EQ(m.gen[active].gen->nr_pieces, MAX);
				/* The loader learns of it whatever it does next. */
				CHECK_EQ(slot_do_add(&m, g, 1), -ECANCELED);
				CHECK_EQ(slot_do_share(&m, g, active),
					 -ECANCELED);
				CHECK_EQ(slot_do_loaded(&m, g), -ECANCELED);
				slot_do_release(&m, g);
				CHECK_EQ(dead_generations(), end != END_FAIL);
				slot_model_compare(&m);
				slot_model_destroy(&m);
			}
}

enum op {
	OP_STAGE,
	OP_ADD,
	OP_SHARE,
	OP_FILL,
	OP_LOADED,
	OP_FAIL,
	OP_COMMIT,
	OP_ABORT,
	OP_ROLLBACK,
	OP_FORGET,
	OP_REMOVE,
	OP_HOLD,
	OP_RELEASE,
	OP_BURY,
	OP_FREE,
	OPS,
};

/* A generation somebody has, in any slot; SLOT_NONE when there is none. */
static u32 any_gen(struct tm_rng *rng)
{
	u32 from = tm_rand_below(rng, SLOT_MODEL_GENS);

	for (u32 i = 0; i < SLOT_MODEL_GENS; i++) {
		u32 g = (from + i) % SLOT_MODEL_GENS;

		if (slot_model_alive(&m, g))
			return g;
	}
	return SLOT_NONE;
}

/* A number of the slot: of one of its places, or one that was or will be. */
static u64 any_number(struct tm_rng *rng, u32 s)
{
	const struct tm_slot *slot = &m.slot[s].core;
	const struct tm_generation *place[] = {
		slot->active, slot->previous, slot->staged, slot->staged,
	};
	u32 i = tm_rand_below(rng, 5);

	if (i < 4)
		return place[i] ? place[i]->number : 0;
	return tm_rand_below(rng, (u32)slot->last + 2);
}

/* Of its own or of the active one's, as it comes. */
static void fill(struct tm_rng *rng, u32 g, u32 nr)
{
	u32 active = m.slot[m.gen[g].slot].active;

	while (nr-- && m.gen[g].nr < m.gen[g].max) {
		if (active != SLOT_NONE && m.gen[active].nr > m.gen[g].nr &&
		    tm_rand_one_in(rng, 2))
			CHECK_EQ(slot_do_share(&m, g, active), 0);
		else
			CHECK_EQ(slot_do_add(&m, g, 1 + tm_rand_below(rng, 512)),
				 0);
	}
}

static void random_op(enum op op, struct tm_rng *rng)
{
	u32 s = tm_rand_below(rng, SLOT_MODEL_SLOTS), g = any_gen(rng), from;
	u64 number = any_number(rng, s);

	tm_op("op %u: slot %u, generation %u, number %llu", op, s, g, number);
	if (g == SLOT_NONE && op != OP_STAGE && op < OP_BURY)
		return;
	switch (op) {
	case OP_STAGE:
		if (!slot_model_has_room(&m))
			slot_model_free(&m);
		if (slot_model_has_room(&m))
			slot_do_stage(&m, s, tm_rand_below(
					rng, SLOT_MODEL_PIECES + 1));
		break;
	case OP_ADD:
		slot_do_add(&m, g, 1 + tm_rand_below(rng, 512));
		break;
	case OP_SHARE:
		from = any_gen(rng);
		if (m.gen[from].slot == m.gen[g].slot)
			slot_do_share(&m, g, from);
		break;
	case OP_FILL:
		g = m.slot[s].staged;
		if (g != SLOT_NONE && m.gen[g].state == TM_GENERATION_LOADING)
			fill(rng, g, 1 + tm_rand_below(
				     rng, SLOT_MODEL_PIECES));
		break;
	case OP_LOADED:
		slot_do_loaded(&m, g);
		break;
	case OP_FAIL:
		slot_do_fail(&m, g, -1 - (int)tm_rand_below(rng, 130));
		break;
	case OP_COMMIT:
		slot_do_commit(&m, s, number);
		break;
	case OP_ABORT:
		slot_do_abort(&m, s, number);
		break;
	case OP_ROLLBACK:
		slot_do_rollback(&m, s, number);
		break;
	case OP_FORGET:
		slot_do_forget(&m, s);
		break;
	case OP_REMOVE:
		slot_do_remove(&m, s);
		break;
	case OP_HOLD:
		slot_do_hold(&m, g);
		break;
	case OP_RELEASE:
		if (m.gen[g].readers)
			slot_do_release(&m, g);
		break;
	case OP_BURY:
		slot_do_bury(&m);
		break;
	case OP_FREE:
		slot_model_free(&m);
		break;
	case OPS:
		break;
	}
}

TEST(slot_random)
{
	static const u32 base[OPS] = {
		[OP_STAGE] = 10, [OP_ADD] = 4, [OP_SHARE] = 4, [OP_FILL] = 10,
		[OP_LOADED] = 14, [OP_FAIL] = 1, [OP_COMMIT] = 14,
		[OP_ABORT] = 3, [OP_ROLLBACK] = 4, [OP_FORGET] = 2,
		[OP_HOLD] = 6, [OP_RELEASE] = 8, [OP_BURY] = 3,
		[OP_FREE] = 4,
	};
	struct tm_round round;

	tm_for_each_round(&round, 24, 4000) {
		u32 weights[OPS];

		slot_model_init(&m, false);
		memcpy(weights, base, sizeof(base));
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = base[op] *
						tm_rand_below(&round.rng, 4);
				weights[OP_STAGE] += 2;
				weights[OP_RELEASE] += 2;
			}
			/* A removed slot stays empty: not too early. */
			weights[OP_REMOVE] = step > round.steps / 2 &&
					     step % 512 == 0 ? 40 : 0;
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng);
			slot_model_compare(&m);
		}
		slot_model_destroy(&m);
	}
}

/*
 * Every sequence of calls up to a depth, on one slot. A fine one stages, adds, shares and
 * ends a load by calls of their own, with two pieces at most. In a coarse one a load is one
 * step, so that the same depth sees many generations.
 */
enum step {
	STEP_COMMIT,
	STEP_COMMIT_WRONG,
	STEP_ABORT,
	STEP_ROLLBACK,
	STEP_ROLLBACK_NUMBER,
	STEP_FORGET,
	STEP_REMOVE,
	STEP_FAIL_ACTIVE,
	STEP_FAIL_PREVIOUS,
	STEP_FAIL_STAGED,
	STEP_FAIL_HELD,
	STEP_HOLD_ACTIVE,
	STEP_HOLD_STAGED,
	STEP_RELEASE_FIRST,
	STEP_RELEASE_LAST,
	STEP_BURY,
	STEP_FREE,
	STEPS_COMMON,
	/* Fine. */
	STEP_STAGE_NONE = STEPS_COMMON,
	STEP_STAGE_TWO,
	STEP_ADD,
	STEP_SHARE,
	STEP_LOADED,
	STEPS_FINE,
	/* Coarse. */
	STEP_LOAD_NEW = STEPS_COMMON,
	STEP_LOAD_HALF_SHARED,
	STEP_LOAD_SHARED,
	STEP_LOAD_ENDED,
	STEPS_COARSE,
};

static u64 sequences;

/* The first or last generation that a reader has. */
static u32 held(bool last)
{
	u32 found = SLOT_NONE;

	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		if (slot_model_alive(&m, g) && m.gen[g].readers) {
			found = g;
			if (!last)
				break;
		}
	return found;
}

/* All of a load but its last step: with @shared of two pieces from the active one. */
static int load(u32 shared)
{
	u32 active = m.slot[0].active;
	int g;

	if (shared && active == SLOT_NONE)
		return -ENOENT;
	g = slot_do_stage(&m, 0, 2);
	if (g < 0)
		return g;
	for (u32 i = 0; i < 2; i++) {
		int err = i < shared ? slot_do_share(&m, (u32)g, active) :
			  slot_do_add(&m, (u32)g, 1);

		CHECK_EQ(err, 0);
	}
	return slot_do_loaded(&m, (u32)g);
}

/* Return: whether something changed. */
static bool fail_one(u32 g)
{
	bool changes = g != SLOT_NONE && !m.gen[g].error;

	if (g != SLOT_NONE)
		slot_do_fail(&m, g, -EIO);
	return changes;
}

static bool hold_one(u32 g)
{
	if (g == SLOT_NONE || m.gen[g].readers == 2)
		return false;
	slot_do_hold(&m, g);
	return true;
}

static bool release_one(u32 g)
{
	if (g == SLOT_NONE)
		return false;
	slot_do_release(&m, g);
	return true;
}

static bool common_step(enum step step)
{
	const struct model_slot *slot = &m.slot[0];
	u64 staged = slot->staged == SLOT_NONE ? 0 : m.gen[slot->staged].number;
	bool was;

	switch (step) {
	case STEP_COMMIT:
		return !slot_do_commit(&m, 0, staged);
	case STEP_COMMIT_WRONG:
		return !slot_do_commit(&m, 0, slot->last + !!staged);
	case STEP_ABORT:
		return !slot_do_abort(&m, 0, staged);
	case STEP_ROLLBACK:
		return !slot_do_rollback(&m, 0, 0);
	case STEP_ROLLBACK_NUMBER:
		/* Now and then it is the previous one's. */
		return !slot_do_rollback(&m, 0, 1);
	case STEP_FORGET:
		return slot_do_forget(&m, 0);
	case STEP_REMOVE:
		was = slot->removed;
		slot_do_remove(&m, 0);
		return !was;
	case STEP_FAIL_ACTIVE:
		return fail_one(slot->active);
	case STEP_FAIL_PREVIOUS:
		return fail_one(slot->previous);
	case STEP_FAIL_STAGED:
		return fail_one(slot->staged);
	case STEP_FAIL_HELD:
		return fail_one(held(false));
	case STEP_HOLD_ACTIVE:
		return hold_one(slot->active);
	case STEP_HOLD_STAGED:
		return hold_one(slot->staged);
	case STEP_RELEASE_FIRST:
		return release_one(held(false));
	case STEP_RELEASE_LAST:
		return held(true) != held(false) && release_one(held(true));
	case STEP_BURY:
		was = false;
		for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
			was |= m.gen[g].dead && m.gen[g].nr;
		slot_do_bury(&m);
		return was;
	default:
		was = m.dead.generations || m.dead.pieces;
		slot_model_free(&m);
		return was;
	}
}

/* The generation that is loaded: the staged one, or one that was aborted. */
static u32 loading(void)
{
	u32 g = m.slot[0].staged;

	return g == SLOT_NONE ? held(true) : g;
}

static bool fine_step(enum step step)
{
	u32 g = loading(), active = m.slot[0].active;

	switch (step) {
	case STEP_STAGE_NONE:
		return slot_do_stage(&m, 0, 0) >= 0;
	case STEP_STAGE_TWO:
		return slot_do_stage(&m, 0, 2) >= 0;
	case STEP_ADD:
		return g != SLOT_NONE && !slot_do_add(&m, g, 1);
	case STEP_SHARE:
		return g != SLOT_NONE && active != SLOT_NONE &&
		       !slot_do_share(&m, g, active);
	default:
		return g != SLOT_NONE && !slot_do_loaded(&m, g);
	}
}

static bool coarse_step(enum step step)
{
	int g;

	if (step < STEP_LOAD_ENDED)
		return !load(step - STEP_LOAD_NEW);
	g = slot_do_stage(&m, 0, 2);
	if (g < 0)
		return false;
	CHECK_EQ(slot_do_add(&m, (u32)g, 1), 0);
	slot_do_fail(&m, (u32)g, -EIO);
	return true;
}

static void descend(bool coarse, u32 depth)
{
	struct slot_model *here;
	u32 nr = coarse ? STEPS_COARSE : STEPS_FINE;
	size_t size = offsetof(struct slot_model, arena) + m.arena_used;

	slot_model_compare(&m);
	sequences++;
	if (!depth)
		return;
	here = malloc(size);
	CHECK(here);
	memcpy(here, &m, size);
	for (u32 step = 0; step < nr; step++) {
		bool changed;

		tm_op("depth left %u: step %u", depth, step);
		if (step < STEPS_COMMON)
			changed = common_step(step);
		else
			changed = coarse ? coarse_step(step) : fine_step(step);
		if (changed) {
			descend(coarse, depth - 1);
		} else {
			/* What fails changes nothing. */
			slot_model_compare(&m);
		}
		memcpy(&m, here, size);
	}
	free(here);
}

static void every_sequence(bool coarse, u32 depth)
{
	sequences = 0;
	slot_model_init(&m, true);
	descend(coarse, depth);
	tm_op("%llu sequences", sequences);
	CHECK(sequences > 100000);
	slot_model_destroy(&m);
}

TEST(slot_every_sequence)
{
	every_sequence(false, 9);
}

TEST(slot_every_sequence_of_loads)
{
	every_sequence(true, 8);
}

/*
 * Generations of many pieces, none of which may be looked at: the sanitizer ends the test
 * at the first one that is.
 */
#define MANY	4096

static struct tm_piece many_pieces[5][MANY];
static struct tm_piece *many[5][MANY];
static struct tm_generation many_gens[5];

static void hide_pieces(bool hidden)
{
	if (hidden) {
		ASAN_POISON_MEMORY_REGION(many_pieces, sizeof(many_pieces));
		ASAN_POISON_MEMORY_REGION(many, sizeof(many));
	} else {
		ASAN_UNPOISON_MEMORY_REGION(many_pieces, sizeof(many_pieces));
		ASAN_UNPOISON_MEMORY_REGION(many, sizeof(many));
	}
}

/* A third of the pieces is the same in all of them. */
static void load_many(struct tm_slot *slot, u32 g, u32 nr)
{
	struct tm_generation *gen = &many_gens[g];

	tm_generation_init(gen, many[g], nr);
	CHECK_EQ(tm_slot_stage(slot, gen), 0);
	for (u32 i = 0; i < nr; i++) {
		struct tm_piece *piece = &many_pieces[g][i];

		if (g && i % 3 == 0) {
			CHECK_EQ(tm_slot_share(slot, gen, &many_gens[g - 1]), 0);
			continue;
		}
		tm_piece_init(piece, 512);
		CHECK_EQ(tm_slot_add(slot, gen, piece), 0);
	}
}

/* Different pieces that five such generations have. */
static u32 nr_many(u32 nr)
{
	u32 same = (nr + 2) / 3;

	return same + 5 * (nr - same);
}

/* Also when a generation dies. */
TEST(slot_steps_do_not_depend_on_size)
{
	for (u32 nr = 4; nr <= MANY; nr *= MANY / 4) {
		tm_sleep_lock_t lock = { 0 };
		struct tm_slot_dead dead = { 0 };
		struct tm_slot slot;
		u32 pieces = 0;

		tm_op("%u pieces", nr);
		tm_slot_init(&slot, &lock);
		tm_host_lock(&lock);
		for (u32 g = 0; g < 4; g++) {
			load_many(&slot, g, nr);
			hide_pieces(true);
			CHECK_EQ(tm_slot_loaded(&slot, &many_gens[g]), 0);
			tm_slot_hold(&slot, &many_gens[g]);
			CHECK_EQ(tm_slot_commit(&slot, g + 1, &dead), 0);
			for (u32 twice = 0; twice < 2; twice++)
				CHECK_EQ(tm_slot_rollback(&slot, 0, &dead),
					 g ? 0 : -ENOENT);
			CHECK(tm_slot_find(&slot, g + 1) == &many_gens[g]);
			tm_slot_release(&slot, &many_gens[g], &dead);
			hide_pieces(false);
		}
		CHECK(dead.generations == &many_gens[1]);
		CHECK(many_gens[1].next == &many_gens[0]);
		load_many(&slot, 4, nr);
		hide_pieces(true);
		CHECK_EQ(tm_slot_loaded(&slot, &many_gens[4]), 0);
		CHECK_EQ(tm_slot_abort(&slot, 5, &dead), 0);
		tm_slot_fail(&slot, slot.active, -EIO, &dead);
		CHECK_EQ(tm_slot_rollback(&slot, 0, &dead), 0);
		tm_slot_remove(&slot, &dead);
		CHECK_EQ(slot.generations, 0);
		CHECK(!dead.pieces);
		hide_pieces(false);
		tm_slot_bury(&slot, &dead);
		for (struct tm_piece *p = dead.pieces; p; p = p->next)
			pieces++;
		CHECK_EQ(pieces, nr_many(nr));
		tm_host_unlock(&lock);
	}
}

/* To bury one takes a look at its pieces, and at no other's. */
TEST(slot_steps_of_a_burial)
{
	tm_sleep_lock_t lock = { 0 };
	struct tm_slot_dead dead = { 0 };
	struct tm_slot slot;
	u32 n = 0;

	tm_slot_init(&slot, &lock);
	tm_host_lock(&lock);
	for (u32 g = 0; g < 3; g++) {
		tm_generation_init(&many_gens[g], many[g], MANY);
		CHECK_EQ(tm_slot_stage(&slot, &many_gens[g]), 0);
		for (u32 i = 0; i < MANY; i++) {
			tm_piece_init(&many_pieces[g][i], 512);
			CHECK_EQ(tm_slot_add(&slot, &many_gens[g],
					     &many_pieces[g][i]), 0);
		}
		CHECK_EQ(tm_slot_loaded(&slot, &many_gens[g]), 0);
		CHECK_EQ(tm_slot_commit(&slot, g + 1, &dead), 0);
	}
	CHECK(dead.generations == &many_gens[0] && !many_gens[0].next);
	CHECK(!dead.pieces);
	hide_pieces(true);
	ASAN_UNPOISON_MEMORY_REGION(many_pieces[0], sizeof(many_pieces[0]));
	ASAN_UNPOISON_MEMORY_REGION(many[0], sizeof(many[0]));
	tm_slot_bury(&slot, &dead);
	hide_pieces(false);
	for (struct tm_piece *p = dead.pieces; p; p = p->next)
		n++;
	CHECK_EQ(n, MANY);
	tm_slot_remove(&slot, &dead);
	tm_slot_bury(&slot, &dead);
	tm_host_unlock(&lock);
}

/* A slot with a generation in each place: the previous one's piece is the active one's. */
static void three_places(void)
{
	u32 a, b;

	slot_model_init(&m, false);
	a = committed(0, 2);
	b = (u32)slot_do_stage(&m, 0, 2);
	CHECK_EQ(slot_do_share(&m, b, a), 0);
	CHECK_EQ(slot_do_add(&m, b, 1), 0);
	CHECK_EQ(slot_do_loaded(&m, b), 0);
	CHECK_EQ(slot_do_commit(&m, 0, 2), 0);
	staged(0, 2);
}

struct corruption {
	const char *what;
	void (*make)(struct tm_slot *slot);
	u32 warnings;
};

static void wrong_active_state(struct tm_slot *slot)
{
	slot->active->state = TM_GENERATION_STAGED;
}

static void wrong_previous_state(struct tm_slot *slot)
{
	slot->previous->state = TM_GENERATION_RETIRED;
}

static void wrong_staged_state(struct tm_slot *slot)
{
	slot->staged->state = TM_GENERATION_ACTIVE;
}

static void error_without_failure(struct tm_slot *slot)
{
	slot->previous->error = -EIO;
}

static void failure_without_error(struct tm_slot *slot)
{
	slot->staged->state = TM_GENERATION_FAILED;
}

static void failure_with_a_positive_error(struct tm_slot *slot)
{
	slot->staged->state = TM_GENERATION_FAILED;
	slot->staged->error = EIO;
}

static void no_holder(struct tm_slot *slot)
{
	slot->active->holders = 0;
}

static void no_number(struct tm_slot *slot)
{
	slot->active->number = 0;
}

static void number_to_come(struct tm_slot *slot)
{
	slot->active->number = slot->last + 1;
}

static void same_number(struct tm_slot *slot)
{
	slot->previous->number = slot->active->number;
}

static void staged_is_not_the_last(struct tm_slot *slot)
{
	slot->last++;
}

static void too_many_pieces(struct tm_slot *slot)
{
	slot->staged->max_pieces--;
	slot->staged->state = TM_GENERATION_LOADING;
}

static void piece_missing(struct tm_slot *slot)
{
	slot->active->max_pieces++;
}

static void failed_with_some_pieces(struct tm_slot *slot)
{
	slot->staged->max_pieces++;
	slot->staged->state = TM_GENERATION_FAILED;
	slot->staged->error = -EIO;
}

static void shared_piece_has_one_user(struct tm_slot *slot)
{
	slot->active->piece[0]->users = 1;
}

static void piece_has_no_user(struct tm_slot *slot)
{
	slot->staged->piece[1]->users = 0;
}

static void too_few_generations(struct tm_slot *slot)
{
	slot->generations = 2;
}

static void removed_with_places(struct tm_slot *slot)
{
	slot->removed = true;
}

static void previous_without_active(struct tm_slot *slot)
{
	slot->active = NULL;
}

static const struct corruption corruptions[] = {
	{ "active state", wrong_active_state, 1 },
	{ "previous state", wrong_previous_state, 1 },
	{ "staged state", wrong_staged_state, 1 },
	{ "error without failure", error_without_failure, 1 },
	{ "failure without error", failure_without_error, 1 },
	{ "positive error", failure_with_a_positive_error, 1 },
	{ "no holder", no_holder, 1 },
	{ "no number", no_number, 1 },
	{ "number to come", number_to_come, 1 },
	{ "same number", same_number, 1 },
	{ "staged is not the last", staged_is_not_the_last, 1 },
	{ "too many pieces", too_many_pieces, 1 },
	{ "piece missing", piece_missing, 1 },
	{ "failed with some pieces", failed_with_some_pieces, 1 },
	/* Seen from both. */
	{ "shared piece with one user", shared_piece_has_one_user, 2 },
	{ "piece without user", piece_has_no_user, 1 },
	{ "too few generations", too_few_generations, 1 },
	{ "removed with places", removed_with_places, 1 },
	{ "previous without active", previous_without_active, 1 },
};

TEST(slot_check_sees_what_cannot_be)
{
	for (u32 i = 0; i < sizeof(corruptions) / sizeof(*corruptions); i++) {
		const struct corruption *c = &corruptions[i];
		struct slot_model good;
		struct tm_generation gens[3], *gen[3];
		struct tm_piece pieces[3], *piece[3];
		struct tm_slot *slot = &m.slot[0].core;

		tm_op("%s", c->what);
		three_places();
		good = m;
		gen[0] = slot->active;
		gen[1] = slot->previous;
		gen[2] = slot->staged;
		piece[0] = gen[0]->piece[0];
		piece[1] = gen[0]->piece[1];
		piece[2] = gen[2]->piece[1];
		for (u32 n = 0; n < 3; n++) {
			gens[n] = *gen[n];
			pieces[n] = *piece[n];
		}
		tm_slot_check(slot);
		c->make(slot);
		tm_host_expect_warnings(c->warnings);
		tm_slot_check(slot);
		CHECK_EQ(tm_host_missing_warnings(), 0);
		m = good;
		for (u32 n = 0; n < 3; n++) {
			*gen[n] = gens[n];
			*piece[n] = pieces[n];
		}
		slot_model_destroy(&m);
	}
}

static void unlocked(void *which)
{
	struct tm_slot *slot = &m.slot[0].core;
	struct tm_generation *gen = slot->active, fresh;
	struct tm_slot_usage usage;
	struct tm_piece piece;

	m.lock.held = false;
	tm_generation_init(&fresh, NULL, 0);
	tm_piece_init(&piece, 1);
	switch (*(int *)which) {
	case 0:
		(void)!tm_slot_stage(slot, &fresh);
		break;
	case 1:
		(void)!tm_slot_add(slot, gen, &piece);
		break;
	case 2:
		(void)!tm_slot_share(slot, gen, gen);
		break;
	case 3:
		(void)!tm_slot_loaded(slot, gen);
		break;
	case 4:
		tm_slot_fail(slot, gen, -EIO, &m.dead);
		break;
	case 5:
		(void)!tm_slot_commit(slot, 77, &m.dead);
		break;
	case 6:
		(void)!tm_slot_abort(slot, 77, &m.dead);
		break;
	case 7:
		(void)!tm_slot_rollback(slot, 77, &m.dead);
		break;
	case 8:
		slot->previous = NULL;
		tm_slot_forget(slot, &m.dead);
		break;
	case 9:
		slot->active = NULL;
		slot->previous = NULL;
		slot->staged = NULL;
		tm_slot_remove(slot, &m.dead);
		break;
	case 10:
		tm_slot_find(slot, 1);
		break;
	case 11:
		tm_slot_hold(slot, gen);
		break;
	case 12:
		gen->holders = 2;
		tm_slot_release(slot, gen, &m.dead);
		break;
	case 13:
		tm_slot_usage(slot, gen, &usage);
		break;
	case 14:
		tm_slot_check(slot);
		break;
	case 15:
		tm_slot_bury(slot, &m.dead);
		break;
	}
}

TEST(slot_calls_need_the_lock)
{
	static const char *const calls[] = {
		"stage", "add", "share", "loaded", "fail", "commit", "abort",
		"rollback", "forget", "remove", "find", "hold", "release",
		"usage", "check", "bury",
	};

	three_places();
	for (int i = 0; i < 16; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	slot_model_destroy(&m);
}
