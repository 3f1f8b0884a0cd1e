// SPDX-License-Identifier: GPL-2.0-only
#include <stdlib.h>

#include "slot_model.h"

#define NR_PIECES	(SLOT_MODEL_GENS * SLOT_MODEL_PIECES)

static void *take(struct slot_model *m, size_t size)
{
	void *p = m->in_arena ? (char *)m->arena + m->arena_used : malloc(size);

	if (m->in_arena) {
		m->arena_used += (size + 15) / 16 * 16;
		CHECK(m->arena_used <= sizeof(m->arena));
	}
	CHECK(p);
	memset(p, 0xa5, size);
	return p;
}

static void give(struct slot_model *m, void *p, size_t size)
{
	memset(p, 0xa5, size);
	if (!m->in_arena)
		free(p);
}

void slot_model_init(struct slot_model *m, bool in_arena)
{
	memset(m, 0, sizeof(*m));
	m->in_arena = in_arena;
	for (u32 s = 0; s < SLOT_MODEL_SLOTS; s++) {
		struct model_slot *slot = &m->slot[s];

		memset(&slot->core, 0xa5, sizeof(slot->core));
		tm_slot_init(&slot->core, &m->lock);
		slot->active = slot->previous = slot->staged = SLOT_NONE;
	}
	tm_host_lock(&m->lock);
}

static bool used(const struct slot_model *m, u32 g)
{
	return m->gen[g].gen && !m->gen[g].dead;
}

bool slot_model_placed(const struct slot_model *m, u32 g)
{
	const struct model_slot *slot = &m->slot[m->gen[g].slot];

	return slot->active == g || slot->previous == g || slot->staged == g;
}

bool slot_model_alive(const struct slot_model *m, u32 g)
{
	return used(m, g) && (m->gen[g].readers || slot_model_placed(m, g));
}

static u32 free_gen(const struct slot_model *m)
{
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		if (!m->gen[g].gen)
			return g;
	return SLOT_NONE;
}

bool slot_model_has_room(const struct slot_model *m)
{
	return free_gen(m) != SLOT_NONE;
}

/* Generations that list a piece, the dead that are not buried among them. */
static u32 users(const struct slot_model *m, u32 p)
{
	u32 n = 0;

	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		for (u32 i = 0; m->gen[g].gen && i < m->gen[g].nr; i++)
			n += m->gen[g].piece[i] == p;
	return n;
}

/* After each call: what nobody has any more is dead. */
static void settle(struct slot_model *m)
{
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		if (used(m, g) && !slot_model_alive(m, g))
			m->gen[g].dead = true;
	for (u32 p = 0; p < NR_PIECES; p++)
		if (m->piece[p].piece && !users(m, p))
			m->piece[p].dead = true;
}

static struct tm_generation *core_of(const struct slot_model *m, u32 g)
{
	return g == SLOT_NONE ? NULL : m->gen[g].gen;
}

static void compare_gen(struct slot_model *m, u32 g)
{
	const struct model_gen *want = &m->gen[g];
	const struct tm_generation *gen = want->gen;
	struct tm_slot_usage usage = { 77, 77 };
	u64 own = 0, shared = 0;

	CHECK_EQ(gen->number, want->number);
	CHECK_EQ(gen->state, want->state);
	CHECK_EQ(gen->error, want->error);
	CHECK_EQ(gen->holders, want->readers + slot_model_placed(m, g));
	CHECK_EQ(gen->max_pieces, want->max);
	CHECK_EQ(gen->nr_pieces, want->nr);
	for (u32 i = 0; i < want->nr; i++) {
		const struct model_piece *p = &m->piece[want->piece[i]];

		CHECK(gen->piece[i] == p->piece);
		if (users(m, want->piece[i]) > 1)
			shared += p->pages;
		else
			own += p->pages;
	}
	tm_slot_usage(&m->slot[want->slot].core, gen, &usage);
	CHECK_EQ(usage.own, own);
	CHECK_EQ(usage.shared, shared);
}

static struct tm_generation *found(const struct slot_model *m, u32 s, u64 number)
{
	const struct model_slot *slot = &m->slot[s];

	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		if (used(m, g) && m->gen[g].slot == s &&
		    m->gen[g].number == number && slot_model_placed(m, g))
			return m->gen[g].gen;
	return number ? NULL : core_of(m, slot->active);
}

static void compare_slot(struct slot_model *m, u32 s)
{
	struct model_slot *slot = &m->slot[s];
	u64 from = slot->last > 12 ? slot->last - 12 : 0;
	u32 alive = 0;

	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		alive += used(m, g) && m->gen[g].slot == s;
	CHECK(slot->core.lock == &m->lock);
	CHECK(slot->core.active == core_of(m, slot->active));
	CHECK(slot->core.previous == core_of(m, slot->previous));
	CHECK(slot->core.staged == core_of(m, slot->staged));
	CHECK_EQ(slot->core.last, slot->last);
	CHECK_EQ(slot->core.generations, alive);
	CHECK_EQ(slot->core.removed, slot->removed);
	CHECK(tm_slot_find(&slot->core, 0) == found(m, s, 0));
	for (u64 number = from; number <= slot->last + 1; number++)
		CHECK(tm_slot_find(&slot->core, number) == found(m, s, number));
	tm_slot_check(&slot->core);
}

/* The dead are those of the model, each once. */
static void compare_dead(const struct slot_model *m)
{
	u32 gens = 0, pieces = 0;

	for (u32 g = 0; g < SLOT_MODEL_GENS; g++) {
		u32 n = 0;

		if (!m->gen[g].gen)
			continue;
		for (struct tm_generation *d = m->dead.generations; d;
		     d = d->next)
			n += d == m->gen[g].gen;
		CHECK_EQ(n, m->gen[g].dead);
		if (n)
			CHECK_EQ(m->gen[g].gen->nr_pieces, m->gen[g].nr);
		gens += n;
	}
	for (u32 p = 0; p < NR_PIECES; p++) {
		u32 n = 0;

		if (!m->piece[p].piece)
			continue;
		for (struct tm_piece *d = m->dead.pieces; d; d = d->next)
			n += d == m->piece[p].piece;
		CHECK_EQ(n, m->piece[p].dead);
		pieces += n;
	}
	for (struct tm_generation *d = m->dead.generations; d; d = d->next)
		CHECK(gens--);
	for (struct tm_piece *d = m->dead.pieces; d; d = d->next)
		CHECK(pieces--);
	CHECK(!gens && !pieces);
}

void slot_model_compare(struct slot_model *m)
{
	for (u32 s = 0; s < SLOT_MODEL_SLOTS; s++)
		compare_slot(m, s);
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		if (used(m, g))
			compare_gen(m, g);
	for (u32 p = 0; p < NR_PIECES; p++)
		if (m->piece[p].piece) {
			CHECK_EQ(m->piece[p].piece->users, users(m, p));
			CHECK_EQ(m->piece[p].piece->pages, m->piece[p].pages);
		}
	compare_dead(m);
}

void slot_do_bury(struct slot_model *m)
{
	/* Whichever slot: there is one lock, and one list of the dead. */
	tm_slot_bury(&m->slot[0].core, &m->dead);
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		if (m->gen[g].dead)
			m->gen[g].nr = 0;
	settle(m);
}

void slot_model_free(struct slot_model *m)
{
	slot_do_bury(m);
	compare_dead(m);
	m->dead = (struct tm_slot_dead){ 0 };
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++) {
		struct model_gen *gen = &m->gen[g];

		if (!gen->gen || !gen->dead)
			continue;
		give(m, gen->gen->piece, gen->max * sizeof(*gen->gen->piece));
		give(m, gen->gen, sizeof(*gen->gen));
		*gen = (struct model_gen){ 0 };
	}
	for (u32 p = 0; p < NR_PIECES; p++)
		if (m->piece[p].piece && m->piece[p].dead) {
			give(m, m->piece[p].piece, sizeof(struct tm_piece));
			m->piece[p] = (struct model_piece){ 0 };
		}
}

void slot_model_destroy(struct slot_model *m)
{
	for (u32 s = 0; s < SLOT_MODEL_SLOTS; s++)
		slot_do_remove(m, s);
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		while (used(m, g) && m->gen[g].readers)
			slot_do_release(m, g);
	slot_model_compare(m);
	slot_model_free(m);
	for (u32 g = 0; g < SLOT_MODEL_GENS; g++)
		CHECK(!m->gen[g].gen);
	for (u32 p = 0; p < NR_PIECES; p++)
		CHECK(!m->piece[p].piece);
	for (u32 s = 0; s < SLOT_MODEL_SLOTS; s++)
		CHECK_EQ(m->slot[s].core.generations, 0);
	tm_host_unlock(&m->lock);
}

static struct tm_slot *slot_of(struct slot_model *m, u32 g)
{
	return &m->slot[m->gen[g].slot].core;
}

/* A generation that left its place. */
static void retire(struct slot_model *m, u32 g)
{
	struct model_gen *gen = &m->gen[g];

	if (gen->state == TM_GENERATION_LOADING) {
		gen->nr = 0;
		gen->error = -ECANCELED;
	}
	gen->state = TM_GENERATION_RETIRED;
}

static void leave(struct slot_model *m, u32 *place)
{
	u32 g = *place;

	*place = SLOT_NONE;
	if (g != SLOT_NONE)
		retire(m, g);
}

int slot_do_stage(struct slot_model *m, u32 s, u32 max)
{
	struct model_slot *slot = &m->slot[s];
	u32 g = free_gen(m);
	struct tm_generation *gen;
	struct tm_piece **array;
	int err, want = 0;

	CHECK(g != SLOT_NONE);
	if (slot->removed)
		want = -ENOENT;
	else if (slot->staged != SLOT_NONE)
		want = -EBUSY;
	gen = take(m, sizeof(*gen));
	array = take(m, max * sizeof(*array));
	tm_generation_init(gen, array, max);
	err = tm_slot_stage(&slot->core, gen);
	CHECK_EQ(err, want);
	if (err) {
		CHECK_EQ(gen->holders, 0);
		give(m, array, max * sizeof(*array));
		give(m, gen, sizeof(*gen));
		return err;
	}
	m->gen[g] = (struct model_gen){
		.gen = gen,
		.slot = s,
		.number = ++slot->last,
		.state = TM_GENERATION_LOADING,
		.max = max,
	};
	slot->staged = g;
	return (int)g;
}

/* What add and share have in common: whether they may, warnings expected. */
static int may_add(const struct model_gen *gen)
{
	if (gen->state != TM_GENERATION_LOADING)
		return -ECANCELED;
	if (gen->nr < gen->max)
		return 0;
	tm_host_expect_warnings(1);
	return -EINVAL;
}

int slot_do_add(struct slot_model *m, u32 g, u32 pages)
{
	struct model_gen *gen = &m->gen[g];
	struct tm_piece *piece = take(m, sizeof(*piece));
	int err, want = may_add(gen);
	u32 p = 0;

	tm_piece_init(piece, pages);
	err = tm_slot_add(slot_of(m, g), gen->gen, piece);
	CHECK_EQ(err, want);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	if (err) {
		CHECK_EQ(piece->users, 0);
		give(m, piece, sizeof(*piece));
		return err;
	}
	while (m->piece[p].piece)
		p++;
	CHECK(p < NR_PIECES);
	m->piece[p] = (struct model_piece){ .piece = piece, .pages = pages };
	gen->piece[gen->nr++] = p;
	return 0;
}

int slot_do_share(struct slot_model *m, u32 g, u32 from)
{
	struct model_gen *gen = &m->gen[g];
	int err, want = may_add(gen);

	if (!want && gen->nr >= m->gen[from].nr) {
		tm_host_expect_warnings(1);
		want = -EINVAL;
	}
	err = tm_slot_share(slot_of(m, g), gen->gen, m->gen[from].gen);
	CHECK_EQ(err, want);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	if (!err) {
		gen->piece[gen->nr] = m->gen[from].piece[gen->nr];
		gen->nr++;
	}
	return err;
}

int slot_do_loaded(struct slot_model *m, u32 g)
{
	struct model_gen *gen = &m->gen[g];
	int err, want = 0;

	if (gen->state != TM_GENERATION_LOADING) {
		want = -ECANCELED;
	} else if (gen->nr < gen->max) {
		tm_host_expect_warnings(1);
		want = -EINVAL;
	}
	err = tm_slot_loaded(slot_of(m, g), gen->gen);
	CHECK_EQ(err, want);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	if (!err)
		gen->state = TM_GENERATION_STAGED;
	return err;
}

void slot_do_fail(struct slot_model *m, u32 g, int error)
{
	struct model_gen *gen = &m->gen[g];

	tm_slot_fail(slot_of(m, g), gen->gen, error, &m->dead);
	if (!gen->error) {
		gen->error = error;
		if (gen->state == TM_GENERATION_LOADING)
			gen->nr = 0;
		if (slot_model_placed(m, g))
			gen->state = TM_GENERATION_FAILED;
	}
	settle(m);
}

int slot_do_commit(struct slot_model *m, u32 s, u64 number)
{
	struct model_slot *slot = &m->slot[s];
	int err, want = 0;
	u32 g = slot->staged;

	if (g == SLOT_NONE || m->gen[g].number != number)
		want = -ENOENT;
	else if (m->gen[g].state == TM_GENERATION_LOADING)
		want = -EAGAIN;
	else if (m->gen[g].error)
		want = -ESTALE;
	err = tm_slot_commit(&slot->core, number, &m->dead);
	CHECK_EQ(err, want);
	if (err)
		return err;
	if (slot->active != SLOT_NONE && m->gen[slot->active].error) {
		leave(m, &slot->active);
	} else if (slot->active != SLOT_NONE) {
		leave(m, &slot->previous);
		m->gen[slot->active].state = TM_GENERATION_PREVIOUS;
		slot->previous = slot->active;
	}
	m->gen[g].state = TM_GENERATION_ACTIVE;
	slot->active = g;
	slot->staged = SLOT_NONE;
	settle(m);
	return 0;
}

int slot_do_abort(struct slot_model *m, u32 s, u64 number)
{
	struct model_slot *slot = &m->slot[s];
	bool is_it = slot->staged != SLOT_NONE &&
		     m->gen[slot->staged].number == number;
	int err;

	err = tm_slot_abort(&slot->core, number, &m->dead);
	CHECK_EQ(err, is_it ? 0 : -ENOENT);
	if (err)
		return err;
	leave(m, &slot->staged);
	settle(m);
	return 0;
}

int slot_do_rollback(struct slot_model *m, u32 s, u64 number)
{
	struct model_slot *slot = &m->slot[s];
	u32 active = slot->active, previous = slot->previous;
	int err, want = 0;

	if (previous == SLOT_NONE ||
	    (number != 0 && m->gen[previous].number != number))
		want = -ENOENT;
	else if (m->gen[previous].error)
		want = -ESTALE;
	err = tm_slot_rollback(&slot->core, number, &m->dead);
	CHECK_EQ(err, want);
	if (err)
		return err;
	slot->active = previous;
	slot->previous = active;
	m->gen[previous].state = TM_GENERATION_ACTIVE;
	if (m->gen[active].error)
		leave(m, &slot->previous);
	else
		m->gen[active].state = TM_GENERATION_PREVIOUS;
	settle(m);
	return 0;
}

bool slot_do_forget(struct slot_model *m, u32 s)
{
	struct model_slot *slot = &m->slot[s];
	bool was = tm_slot_forget(&slot->core, &m->dead);

	CHECK_EQ(was, slot->previous != SLOT_NONE);
	leave(m, &slot->previous);
	settle(m);
	return was;
}

void slot_do_remove(struct slot_model *m, u32 s)
{
	struct model_slot *slot = &m->slot[s];

	tm_slot_remove(&slot->core, &m->dead);
	slot->removed = true;
	leave(m, &slot->active);
	leave(m, &slot->previous);
	leave(m, &slot->staged);
	settle(m);
}

void slot_do_hold(struct slot_model *m, u32 g)
{
	tm_slot_hold(slot_of(m, g), m->gen[g].gen);
	m->gen[g].readers++;
}

void slot_do_release(struct slot_model *m, u32 g)
{
	CHECK(m->gen[g].readers);
	tm_slot_release(slot_of(m, g), m->gen[g].gen, &m->dead);
	m->gen[g].readers--;
	settle(m);
}
