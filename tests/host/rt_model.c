// SPDX-License-Identifier: GPL-2.0-only
#include "rt_model.h"

/* The call, and the steps that it took. */
#define STEPS(m, call)							\
	({								\
		u64 before_ = tm_host_steps;				\
		__auto_type result_ = (call);				\
									\
		(m)->steps = (u32)(tm_host_steps - before_);		\
		result_;						\
	})

/*
 * Lists by the words of core/heap.h: one for each length below 32, 32 for each power of two
 * from there. Return: the shortest length of the list that has blocks of @n.
 */
static u32 list_of(u32 n)
{
	u32 power = 32;

	if (n < 32)
		return n;
	while (power * 2 <= n)
		power *= 2;
	return n / (power / 32) * (power / 32);
}

/* The gaps as they are now; those that are not as before are the youngest. */
static void find_gaps(struct rt_model *m)
{
	u32 n;

	for (u32 i = 0; i < m->size; i += n) {
		n = 1;
		if (m->owner[i]) {
			m->gap[i] = 0;
			continue;
		}
		while (i + n < m->size && !m->owner[i + n])
			m->gap[i + n++] = 0;
		if (m->gap[i] != n)
			m->since[i] = ++m->now;
		m->gap[i] = n;
	}
}

/* Where a block of @n has to be put; TM_HEAP_NONE: nowhere. */
static u32 place(const struct rt_model *m, u32 n)
{
	u32 best = TM_HEAP_NONE, own = TM_HEAP_NONE;

	for (u32 i = 0; i < m->size; i++) {
		u32 list = list_of(m->gap[i]);

		if (!m->gap[i])
			continue;
		if (list == list_of(n) &&
		    (own == TM_HEAP_NONE || m->since[i] > m->since[own]))
			own = i;
		if (list < n)
			continue;
		if (best == TM_HEAP_NONE || list < list_of(m->gap[best]) ||
		    (list == list_of(m->gap[best]) &&
		     m->since[i] > m->since[best]))
			best = i;
	}
	if (best == TM_HEAP_NONE && own != TM_HEAP_NONE && m->gap[own] >= n)
		return own;
	return best;
}

static u32 heap_granules(u32 size)
{
	return size < 2 ? 2 : size;
}

static u32 new_thing(struct rt_model *m, struct model_thing thing)
{
	u32 t = 0;

	while (t < m->nr_things && m->thing[t].kind)
		t++;
	CHECK(t < RT_MODEL_BLOCKS);
	if (t == m->nr_things)
		m->nr_things++;
	m->thing[t] = thing;
	m->thing[t].pattern = ++m->pattern;
	return t;
}

static void write_memory(struct rt_model *m, u32 t)
{
	const struct model_thing *thing = &m->thing[t];

	for (u32 i = 0; i < thing->length; i++)
		m->memory[thing->start + i] = thing->pattern * 4096 + i;
}

static void check_memory(const struct rt_model *m, u32 t)
{
	const struct model_thing *thing = &m->thing[t];

	for (u32 i = 0; i < thing->length; i++)
		CHECK_EQ(m->memory[thing->start + i],
			 thing->pattern * 4096 + i);
}

static void own(struct rt_model *m, u32 start, u32 n, u32 owner)
{
	for (u32 i = 0; i < n; i++) {
		CHECK(!m->owner[start + i] != !owner);
		m->owner[start + i] = owner;
	}
}

/* A thing takes the gap at @start; a rest of one granule is its own, too. */
static u32 take(struct rt_model *m, u32 start, u32 n, struct model_thing thing)
{
	u32 t;

	CHECK(m->gap[start] >= n);
	if (m->gap[start] == n + 1)
		n++;
	thing.start = start;
	thing.granules = n;
	t = new_thing(m, thing);
	own(m, start, n, t + 1);
	find_gaps(m);
	return t;
}

/* The cursor is the start of the block that it is in, after whatever has happened. */
static void settle_cursor(struct rt_model *m)
{
	if (!m->owner[m->cursor])
		while (m->cursor && !m->owner[m->cursor - 1])
			m->cursor--;
}

static void give(struct rt_model *m, u32 t)
{
	own(m, m->thing[t].start, m->thing[t].granules, 0);
	m->thing[t].kind = MODEL_NONE;
	m->frees++;
	find_gaps(m);
	settle_cursor(m);
}

void rt_model_init(struct rt_model *m, u32 size, u32 max_movable)
{
	CHECK(size <= RT_MODEL_SIZE && max_movable <= RT_MODEL_MOVABLE);
	memset(m, 0, sizeof(*m));
	memset(&m->rt, 0xa5, sizeof(m->rt));
	m->size = size;
	m->max_movable = max_movable;
	CHECK_EQ(tm_rt_init(&m->rt, &m->lock, size, max_movable), 0);
	for (u32 i = 0; i < max_movable; i++)
		m->entry[m->nr_entries++] = i;
	find_gaps(m);
	tm_host_lock(&m->lock);
	rt_model_compare(m);
}

void rt_model_destroy(struct rt_model *m)
{
	if (m->moving)
		rt_do_move_end(m);
	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		if (m->waiter[w].waiting)
			CHECK(!rt_do_cancel(m, w));
	for (u32 c = 0; c < RT_MODEL_CLIENTS; c++)
		while (m->client[c].joined)
			rt_do_leave(m, c);
	rt_model_compare(m);
	CHECK_EQ(m->rt.heap.nr_free, 1);
	CHECK_EQ(m->rt.heap.nr_used, 0);
	CHECK_EQ(m->rt.heap.free, m->size);
	CHECK_EQ(tm_heap_largest(&m->rt.heap), m->size);
	tm_host_unlock(&m->lock);
	tm_rt_exit(&m->rt);
}

void rt_model_save(const struct rt_model *m, struct rt_snapshot *s)
{
	s->model = *m;
	memcpy(s->node, m->rt.heap.node, m->size * sizeof(*s->node));
	if (m->max_movable)
		memcpy(s->movable, m->rt.movable,
		       m->max_movable * sizeof(*s->movable));
}

void rt_model_restore(struct rt_model *m, const struct rt_snapshot *s)
{
	*m = s->model;
	memcpy(m->rt.heap.node, s->node, m->size * sizeof(*s->node));
	if (m->max_movable)
		memcpy(m->rt.movable, s->movable,
		       m->max_movable * sizeof(*s->movable));
}

int rt_model_nth(const struct rt_model *m, u32 kind, u32 nth)
{
	for (u32 t = 0; t < m->nr_things; t++)
		if (m->thing[t].kind == kind && !m->thing[t].abandoned &&
		    !nth--)
			return (int)t;
	return -1;
}

u32 rt_model_count(const struct rt_model *m, u32 kind)
{
	u32 n = 0;

	for (u32 t = 0; t < m->nr_things; t++)
		n += m->thing[t].kind == kind && !m->thing[t].abandoned;
	return n;
}

/* The thing that a handle names for a client, or -1. */
static int named(const struct rt_model *m, u32 c, u32 handle)
{
	for (u32 t = 0; t < m->nr_things; t++)
		if (m->thing[t].kind && m->thing[t].kind != MODEL_RUN &&
		    !m->thing[t].abandoned && m->thing[t].client == c &&
		    m->thing[t].handle == handle)
			return (int)t;
	return -1;
}

/* The run of the class that serves a size, or of that very size; or -1. */
static int run_for(const struct rt_model *m, u32 c, u32 size, bool exact)
{
	int best = -1;

	for (u32 t = 0; t < m->nr_things; t++) {
		const struct model_thing *run = &m->thing[t];

		if (run->kind != MODEL_RUN || run->client != c ||
		    (exact ? run->size != size : run->size < size))
			continue;
		if (best < 0 || run->size < m->thing[best].size)
			best = (int)t;
	}
	return best;
}

static u32 items_of(const struct rt_model *m, u32 run)
{
	u32 n = 0;

	for (u32 t = 0; t < m->nr_things; t++)
		n += m->thing[t].kind == MODEL_ITEM &&
		     m->thing[t].run == m->thing[run].start;
	return n;
}

u32 rt_model_left(const struct rt_model *m, u32 c, u32 size)
{
	int run = run_for(m, c, size, false);

	return run < 0 ? 0 : m->thing[run].count - items_of(m, (u32)run);
}

static u32 classes_of(const struct rt_model *m, u32 c)
{
	u32 n = 0;

	for (u32 t = 0; t < m->nr_things; t++)
		n += m->thing[t].kind == MODEL_RUN && m->thing[t].client == c;
	return n;
}

/* Waiting. */

static bool before(const struct model_waiter *a, const struct model_waiter *b)
{
	return a->priority != b->priority ? a->priority > b->priority :
					    a->since < b->since;
}

int rt_model_first(const struct rt_model *m)
{
	int first = -1;

	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		if (m->waiter[w].waiting &&
		    (first < 0 || before(&m->waiter[w], &m->waiter[first])))
			first = (int)w;
	return first;
}

static bool must_wait(const struct rt_model *m, u32 c)
{
	int first = rt_model_first(m);

	return first >= 0 &&
	       m->waiter[first].priority >= m->client[c].priority;
}

static u32 free_granules(const struct rt_model *m)
{
	u32 n = 0;

	for (u32 i = 0; i < m->size; i++)
		n += !m->owner[i];
	return n;
}

/* Whether there is a block that compaction might move. */
static bool loose(const struct rt_model *m)
{
	for (u32 t = 0; t < m->nr_things; t++)
		if (m->thing[t].kind == MODEL_MOVABLE && !m->thing[t].pins &&
		    !m->thing[t].abandoned)
			return true;
	return false;
}

/* What a request that the heap has to serve comes to. */
static int heap_result(const struct rt_model *m, u32 size, u32 flags)
{
	if (flags & TM_RT_ALLOC_MOVABLE && !m->nr_entries)
		return -ENFILE;
	if (place(m, heap_granules(size)) == TM_HEAP_NONE)
		return -ENOSPC;
	return 0;
}

int rt_model_handed(const struct rt_model *m)
{
	int first = -1;

	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		if (m->waiter[w].handed &&
		    (first < 0 || m->waiter[w].handed < m->waiter[first].handed))
			first = (int)w;
	return first;
}

bool rt_model_could_serve(const struct rt_model *m)
{
	int w = rt_model_first(m);

	return w >= 0 &&
	       !heap_result(m, m->waiter[w].size, m->waiter[w].flags);
}

bool rt_model_should_tell(const struct rt_model *m)
{
	int w = rt_model_first(m);

	return w >= 0 &&
	       heap_result(m, m->waiter[w].size, m->waiter[w].flags) ==
		       -ENOSPC &&
	       free_granules(m) >= m->waiter[w].size && loose(m) &&
	       !(m->waiter[w].told && m->waiter[w].told_at == m->frees);
}

/* The heap has given a client a block: was it the right one? Return: the thing. */
static u32 given(struct rt_model *m, u32 c, u32 size, u32 flags,
		 const struct tm_rt_block *block)
{
	struct model_thing thing = { .kind = MODEL_FIXED, .client = c };
	u32 n = heap_granules(size), start = place(m, n), t;

	CHECK_EQ(block->start, start);
	if (flags & TM_RT_ALLOC_MOVABLE) {
		thing.kind = MODEL_MOVABLE;
		thing.pins = 1;
		thing.handle = 1u << 31 | m->entry[0];
		m->nr_entries--;
		memmove(m->entry, m->entry + 1,
			m->nr_entries * sizeof(*m->entry));
	} else {
		thing.handle = start + 1;
	}
	CHECK_EQ(block->handle, thing.handle);
	t = take(m, start, n, thing);
	m->thing[t].length = m->thing[t].granules;
	if (thing.kind == MODEL_MOVABLE && m->thing[t].length > TM_RT_STEP)
		m->thing[t].length = TM_RT_STEP;
	CHECK_EQ(block->length, m->thing[t].length);
	CHECK(block->length >= size);
	write_memory(m, t);
	return t;
}

/* Calls. */

int rt_do_join(struct rt_model *m, u32 c, u32 priority)
{
	struct model_client *client = &m->client[c];
	int want = priority < 100 ? 0 : -EINVAL, got;

	tm_op("join %u priority %u", c, priority);
	CHECK(!client->joined);
	memset(&client->core, 0xa5, sizeof(client->core));
	got = STEPS(m, tm_rt_join(&m->rt, &client->core, priority));
	CHECK_EQ(got, want);
	if (!got) {
		client->joined = true;
		client->priority = priority;
	}
	return got;
}

static void drop(struct rt_model *m, u32 t)
{
	struct model_thing *thing = &m->thing[t];

	check_memory(m, t);
	if (thing->kind == MODEL_ITEM) {
		thing->kind = MODEL_NONE;
		return;
	}
	if (thing->moving) {
		thing->abandoned = true;
		return;
	}
	if (thing->kind == MODEL_MOVABLE)
		m->entry[m->nr_entries++] = thing->handle & ~(1u << 31);
	give(m, t);
}

bool rt_do_leave(struct rt_model *m, u32 c)
{
	struct model_client *client = &m->client[c];
	u32 start = client->core.blocks, left = 0;
	bool more;

	tm_op("leave %u", c);
	for (u32 t = 0; t < m->nr_things; t++)
		left += m->thing[t].kind && m->thing[t].client == c &&
			m->thing[t].kind != MODEL_ITEM &&
			!m->thing[t].abandoned;
	more = STEPS(m, tm_rt_leave(&m->rt, &client->core));
	CHECK_EQ(more, left != 0);
	if (!more) {
		client->joined = false;
		return false;
	}
	/* Which one it takes is its own affair; it must be one of them. */
	CHECK(start < m->size && m->owner[start]);
	left = m->owner[start] - 1;
	CHECK_EQ(m->thing[left].client, c);
	CHECK_EQ(m->thing[left].start, start);
	if (m->thing[left].kind == MODEL_RUN)
		for (u32 t = 0; t < m->nr_things; t++)
			if (m->thing[t].kind == MODEL_ITEM &&
			    m->thing[t].run == start)
				drop(m, t);
	drop(m, left);
	return true;
}

int rt_do_reserve(struct rt_model *m, u32 c, u32 size, u32 count)
{
	u64 n = (u64)size * count + 2;
	u32 start = TM_HEAP_NONE, t;
	int want = 0, got;

	tm_op("reserve %u: %u * %u", c, size, count);
	if (n <= m->size)
		start = place(m, (u32)n);
	if (!size || size > m->size || !count)
		want = -EINVAL;
	else if (run_for(m, c, size, true) >= 0)
		want = -EEXIST;
	else if (classes_of(m, c) == TM_RT_CLASSES || must_wait(m, c) ||
		 start == TM_HEAP_NONE)
		want = -ENOSPC;
	got = STEPS(m, tm_rt_reserve(&m->rt, &m->client[c].core, size, count));
	CHECK_EQ(got, want);
	if (got)
		return got;
	t = take(m, start, (u32)n, (struct model_thing){
		.kind = MODEL_RUN,
		.client = c,
		.size = size,
		.count = count,
	});
	CHECK_EQ(tm_heap_length(&m->rt.heap, start), m->thing[t].granules);
	return 0;
}

int rt_do_unreserve(struct rt_model *m, u32 c, u32 size)
{
	int run = run_for(m, c, size, true), want = 0, got;

	tm_op("unreserve %u: %u", c, size);
	if (run < 0)
		want = -ENOENT;
	else if (items_of(m, (u32)run))
		want = -EBUSY;
	got = STEPS(m, tm_rt_unreserve(&m->rt, &m->client[c].core, size));
	CHECK_EQ(got, want);
	if (!got)
		give(m, (u32)run);
	return got;
}

/* An item of the run was allocated: one that nobody has. Return: the thing. */
static u32 given_item(struct rt_model *m, u32 run,
		      const struct tm_rt_block *block)
{
	const struct model_thing *r = &m->thing[run];
	u32 offset = block->start - r->start - 1, t;

	CHECK_EQ(block->handle, block->start + 1);
	CHECK_EQ(block->length, r->size);
	CHECK(block->start > r->start);
	CHECK(offset < r->size * r->count && offset % r->size == 0);
	for (t = 0; t < m->nr_things; t++)
		CHECK(m->thing[t].kind != MODEL_ITEM ||
		      m->thing[t].start != block->start);
	t = new_thing(m, (struct model_thing){
		.kind = MODEL_ITEM,
		.client = r->client,
		.start = block->start,
		.granules = r->size,
		.length = r->size,
		.handle = block->handle,
		.run = r->start,
	});
	write_memory(m, t);
	return t;
}

int rt_do_alloc(struct rt_model *m, u32 c, u32 size, u32 flags, u32 *t)
{
	struct tm_rt_block block = { 77, 77, 77 };
	bool movable = flags & TM_RT_ALLOC_MOVABLE;
	int run = movable ? -1 : run_for(m, c, size, false), want, got;

	tm_op("alloc %u: %u flags %x", c, size, flags);
	if (run >= 0 && items_of(m, (u32)run) == m->thing[run].count)
		run = -1;
	if (!size || size > m->size || flags > 2 ||
	    (movable && size > TM_RT_STEP))
		want = -EINVAL;
	else if (run >= 0)
		want = 0;
	else if (movable && !m->nr_entries)
		want = -ENFILE;
	else if (flags & TM_RT_ALLOC_RESERVED || must_wait(m, c))
		want = -ENOSPC;
	else
		want = heap_result(m, size, flags);
	got = STEPS(m, tm_rt_alloc(&m->rt, &m->client[c].core, size, flags,
				   &block));
	CHECK_EQ(got, want);
	if (got) {
		CHECK(block.start == 77 && block.handle == 77);
		return got;
	}
	*t = run >= 0 ? given_item(m, (u32)run, &block) :
			given(m, c, size, flags, &block);
	return 0;
}

/* An item of the run is left: who has waited longest for one has it now. */
static void hand(struct rt_model *m, u32 run)
{
	int first = -1;

	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		if (m->waiter[w].waiting &&
		    m->waiter[w].run == m->thing[run].start &&
		    (first < 0 || m->waiter[w].since < m->waiter[first].since))
			first = (int)w;
	if (first < 0)
		return;
	m->waiter[first].waiting = false;
	m->waiter[first].handed = ++m->now;
	CHECK_EQ(m->waiter[first].core.state, TM_RT_SERVED);
	CHECK(m->waiter[first].core.block.length >= m->waiter[first].size);
	given_item(m, run, &m->waiter[first].core.block);
}

int rt_do_free(struct rt_model *m, u32 c, u32 handle)
{
	int t = named(m, c, handle), got;
	u32 run;

	tm_op("free %u: %x", c, handle);
	got = STEPS(m, tm_rt_free(&m->rt, &m->client[c].core, handle));
	CHECK_EQ(got, t < 0 ? -ENOENT : 0);
	if (got)
		return got;
	run = m->thing[t].kind == MODEL_ITEM ? m->thing[t].run : TM_HEAP_NONE;
	drop(m, (u32)t);
	if (run != TM_HEAP_NONE)
		hand(m, m->owner[run] - 1);
	return 0;
}

int rt_do_pin(struct rt_model *m, u32 c, u32 handle)
{
	struct tm_rt_block block = { 77, 77, 77 };
	int t = named(m, c, handle), want = 0, got;

	tm_op("pin %u: %x", c, handle);
	if (t < 0)
		want = -ENOENT;
	else if (m->thing[t].moving)
		want = -EAGAIN;
	else if (m->thing[t].pins == 65535)
		want = -EOVERFLOW;
	got = STEPS(m, tm_rt_pin(&m->rt, &m->client[c].core, handle, &block));
	CHECK_EQ(got, want);
	if (got)
		return got;
	CHECK_EQ(block.handle, handle);
	CHECK_EQ(block.start, m->thing[t].start);
	CHECK_EQ(block.length, m->thing[t].length);
	if (m->thing[t].kind == MODEL_MOVABLE)
		m->thing[t].pins++;
	return 0;
}

int rt_do_unpin(struct rt_model *m, u32 c, u32 handle)
{
	int t = named(m, c, handle), want = 0, got;

	tm_op("unpin %u: %x", c, handle);
	if (t < 0 || m->thing[t].kind != MODEL_MOVABLE)
		want = -ENOENT;
	else if (!m->thing[t].pins)
		want = -EINVAL;
	got = STEPS(m, tm_rt_unpin(&m->rt, &m->client[c].core, handle));
	CHECK_EQ(got, want);
	if (!got && !--m->thing[t].pins)
		m->frees++;
	return got;
}

void rt_do_wait(struct rt_model *m, u32 w, u32 c, u32 size, u32 flags)
{
	struct model_waiter *waiter = &m->waiter[w];
	int run = flags ? -1 : run_for(m, c, size, false);

	tm_op("wait %u: client %u size %u flags %x", w, c, size, flags);
	CHECK(!waiter->waiting);
	memset(waiter, 0xa5, sizeof(*waiter));
	waiter->waiting = true;
	waiter->client = c;
	waiter->size = size;
	waiter->flags = flags;
	waiter->priority = m->client[c].priority;
	waiter->since = ++m->now;
	waiter->told = false;
	waiter->handed = 0;
	waiter->run = run < 0 ? TM_HEAP_NONE : m->thing[run].start;
	waiter->core.client = &m->client[c].core;
	waiter->core.size = size;
	waiter->core.flags = flags;
	STEPS(m, (tm_rt_wait(&m->rt, &waiter->core), 0));
	if (run >= 0 && items_of(m, (u32)run) < m->thing[run].count)
		hand(m, (u32)run);
	CHECK_EQ(waiter->core.state,
		 waiter->waiting ? TM_RT_WAITING : TM_RT_SERVED);
}

bool rt_do_cancel(struct rt_model *m, u32 w)
{
	struct model_waiter *waiter = &m->waiter[w];
	bool served;

	tm_op("cancel %u", w);
	served = STEPS(m, tm_rt_cancel(&m->rt, &waiter->core));
	CHECK_EQ(served, !waiter->waiting);
	CHECK_EQ(waiter->core.state, served ? TM_RT_SERVED : TM_RT_IDLE);
	waiter->waiting = false;
	return served;
}

/* Somebody got an item and has not been told. */
static int serve_handed(struct rt_model *m, u32 w)
{
	tm_op("serve: %u got an item", w);
	CHECK(STEPS(m, tm_rt_serve(&m->rt)) == &m->waiter[w].core);
	CHECK_EQ(m->waiter[w].core.state, TM_RT_SERVED);
	m->waiter[w].handed = 0;
	return (int)w;
}

int rt_do_serve(struct rt_model *m)
{
	int first = rt_model_first(m);
	bool serve = rt_model_could_serve(m), tell = rt_model_should_tell(m);
	struct model_waiter *waiter = &m->waiter[first < 0 ? 0 : first];
	struct tm_rt_waiter *got;

	if (rt_model_handed(m) >= 0)
		return serve_handed(m, (u32)rt_model_handed(m));
	tm_op("serve: %d %s", first, serve ? "gets it" : tell ? "is told" : "");
	got = STEPS(m, tm_rt_serve(&m->rt));
	if (!serve && !tell) {
		CHECK(!got);
		return -1;
	}
	CHECK(got == &waiter->core);
	if (tell) {
		CHECK_EQ(got->state, TM_RT_WAITING);
		waiter->told = true;
		waiter->told_at = m->frees;
		return first;
	}
	CHECK_EQ(got->state, TM_RT_SERVED);
	waiter->waiting = false;
	given(m, waiter->client, waiter->size, waiter->flags, &got->block);
	return first;
}

/* Granules of whatever block starts here. */
static u32 block_at(const struct rt_model *m, u32 start)
{
	return m->owner[start] ? m->thing[m->owner[start] - 1].granules :
				 m->gap[start];
}

enum tm_rt_step rt_do_move_begin(struct rt_model *m)
{
	struct tm_rt_move move = { 77, 77, 77 };
	enum tm_rt_step want = TM_RT_STEP_NOTHING, got;
	u32 at = m->cursor, next = at;
	struct model_thing *thing = NULL;

	tm_op("move: at %u", at);
	if (m->moving)
		want = TM_RT_STEP_BUSY;
	else
		next += block_at(m, at);
	if (!m->moving && !m->owner[at] && next < m->size) {
		thing = &m->thing[m->owner[next] - 1];
		if (thing->kind == MODEL_MOVABLE && !thing->pins)
			want = TM_RT_STEP_MOVE;
		else
			next += thing->granules;
	}
	if (next == m->size) {
		want = TM_RT_STEP_ROUND;
		next = 0;
	}
	got = STEPS(m, tm_rt_move_begin(&m->rt, &move));
	CHECK_EQ(got, want);
	if (got != TM_RT_STEP_MOVE) {
		CHECK_EQ(move.length, 77);
		m->cursor = next;
		return got;
	}
	CHECK_EQ(move.to, at);
	CHECK_EQ(move.from, next);
	CHECK_EQ(move.length, thing->length);
	CHECK(move.length <= TM_RT_STEP);
	thing->moving = true;
	m->moving = true;
	m->move = move;
	/* As much as the block will take; all, where the rest would be no block. */
	m->gap_moved = m->gap[at];
	if (m->gap_moved >= thing->granules + 2)
		m->gap_moved = thing->granules;
	/* Nobody's thing, so that nobody finds a gap there. */
	own(m, at, m->gap_moved, RT_MODEL_BLOCKS + 1);
	find_gaps(m);
	return got;
}

void rt_do_move_end(struct rt_model *m)
{
	u32 t = m->owner[m->move.from] - 1;
	struct model_thing *thing = &m->thing[t];

	tm_op("moved: %u to %u", m->move.from, m->move.to);
	CHECK(m->moving);
	memmove(m->memory + m->move.to, m->memory + m->move.from,
		m->move.length * sizeof(*m->memory));
	STEPS(m, (tm_rt_move_end(&m->rt, &m->move), 0));
	own(m, m->move.to, m->gap_moved, 0);
	own(m, thing->start, thing->granules, 0);
	thing->start = m->move.to;
	own(m, thing->start, thing->granules, t + 1);
	find_gaps(m);
	thing->moving = false;
	m->moving = false;
	m->moves++;
	m->cursor = thing->start + thing->granules;
	if (thing->abandoned) {
		m->entry[m->nr_entries++] = thing->handle & ~(1u << 31);
		thing->abandoned = false;
		give(m, t);
	}
}

/* Comparison. */

static void compare_clients(struct rt_model *m)
{
	u32 nr[RT_MODEL_CLIENTS] = { 0 }, used[RT_MODEL_CLIENTS] = { 0 };
	u32 reserved[RT_MODEL_CLIENTS] = { 0 };

	for (u32 t = 0; t < m->nr_things; t++) {
		const struct model_thing *thing = &m->thing[t];

		if (!thing->kind || thing->abandoned)
			continue;
		if (thing->kind == MODEL_RUN) {
			reserved[thing->client] += thing->granules;
			continue;
		}
		nr[thing->client]++;
		used[thing->client] += thing->granules;
		check_memory(m, t);
	}
	for (u32 c = 0; c < RT_MODEL_CLIENTS; c++) {
		const struct tm_rt_client *client = &m->client[c].core;

		CHECK_EQ(m->client[c].joined,
			 m->rt.client[client->index % TM_RT_CLIENTS] == client);
		if (!m->client[c].joined)
			continue;
		CHECK_EQ(client->nr_blocks, nr[c]);
		CHECK_EQ(client->used, used[c]);
		CHECK_EQ(client->reserved, reserved[c]);
	}
}

static void compare_heap(const struct rt_model *m)
{
	const struct tm_heap *heap = &m->rt.heap;
	u32 largest = TM_HEAP_NONE;

	for (u32 i = 0; i < m->size; i++) {
		u32 owner = m->owner[i], length = 0;

		if (owner == RT_MODEL_BLOCKS + 1)
			length = i == m->move.to ? m->gap_moved : 0;
		else if (owner && m->thing[owner - 1].start == i)
			length = m->thing[owner - 1].granules;
		CHECK_EQ(tm_heap_length(heap, i), length);
		if (!m->gap[i])
			continue;
		if (largest == TM_HEAP_NONE ||
		    list_of(m->gap[i]) > list_of(m->gap[largest]) ||
		    (list_of(m->gap[i]) == list_of(m->gap[largest]) &&
		     m->since[i] > m->since[largest]))
			largest = i;
	}
	CHECK_EQ(tm_heap_largest(heap),
		 largest == TM_HEAP_NONE ? 0 : m->gap[largest]);
	CHECK_EQ(tm_heap_length(heap, m->size), 0);
	CHECK_EQ(tm_heap_length(heap, ~0u), 0);
	CHECK_EQ(heap->free, free_granules(m));
	CHECK_EQ(heap->cursor, m->cursor);
}

static void compare_waiters(const struct rt_model *m)
{
	u32 nr = 0, found = 0;

	for (u32 w = 0; w < RT_MODEL_WAITERS; w++)
		nr += m->waiter[w].waiting;
	for (u32 p = TM_RT_PRIORITIES; p--;) {
		const struct tm_rt_waiter *first = m->rt.waiting[p], *w = first;
		u32 since = 0;

		while (w) {
			const struct model_waiter *waiter = (const void *)
				((const char *)w -
				 offsetof(struct model_waiter, core));

			CHECK(waiter->waiting);
			CHECK_EQ(waiter->priority, p);
			CHECK(waiter->since > since);
			since = waiter->since;
			found++;
			w = w->next[0] == first ? NULL : w->next[0];
		}
	}
	CHECK_EQ(found, nr);
}

void rt_model_compare(struct rt_model *m)
{
	CHECK(m->rt.heap.lock == &m->lock);
	CHECK_EQ(m->rt.frees, m->frees);
	CHECK_EQ(m->rt.moves, m->moves);
	CHECK_EQ(m->rt.moving, m->moving);
	CHECK_EQ(m->rt.nr_movable, m->max_movable - m->nr_entries);
	compare_heap(m);
	compare_clients(m);
	compare_waiters(m);
	tm_rt_check(&m->rt);
}
