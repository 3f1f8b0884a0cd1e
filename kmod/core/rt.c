// SPDX-License-Identifier: GPL-2.0-only
#include "core/rt.h"

/* A used block's note: what it is, whose, and the entry or class that it belongs to. */
enum tm_rt_kind {
	TM_RT_NOTHING,		/* a hole that a block is being moved to */
	TM_RT_FIXED,
	TM_RT_MOVABLE_BLOCK,
	TM_RT_RUN,
};

#define TM_RT_NOTE_CLIENT_SHIFT	16
#define TM_RT_NOTE_KIND_SHIFT	24
#define TM_RT_NOTE_INDEX_MASK	0xffffu
#define TM_RT_NOTE_CLIENT_MASK	0xffu

/* The value of an item's tag: its client, its class. */
#define TM_RT_ITEM_CLIENT_SHIFT	4
#define TM_RT_ITEM_CLASS_MASK	0xfu

tm_static_assert(TM_RT_MOVABLE - 1 <= TM_RT_NOTE_INDEX_MASK,
		 "an entry's index fits in a note");
tm_static_assert(TM_RT_CLIENTS - 1 <= TM_RT_NOTE_CLIENT_MASK,
		 "a client's index fits in a note, and in an entry");
tm_static_assert(TM_RT_CLASSES - 1 <= TM_RT_ITEM_CLASS_MASK,
		 "a class's index fits in an item's tag");
tm_static_assert(TM_HEAP_MAX < TM_RT_HANDLE_MOVABLE,
		 "a fixed block's handle is no movable one's");

static struct tm_heap_node *tm_rt_node(struct tm_rt *rt, u32 i)
{
	tm_step();
	return &rt->heap.node[i];
}

static u32 tm_rt_tag_value(const struct tm_rt *rt, u32 i)
{
	tm_step();
	return rt->heap.node[i].tag & TM_HEAP_VALUE_MASK;
}

static u32 tm_rt_tag_type(const struct tm_rt *rt, u32 i)
{
	tm_step();
	return rt->heap.node[i].tag >> TM_HEAP_TYPE_SHIFT;
}

/* Granules of a used block. */
static u32 tm_rt_granules(const struct tm_rt *rt, u32 start)
{
	return tm_rt_tag_value(rt, start);
}

static u32 tm_rt_last(const struct tm_rt *rt, u32 start)
{
	return start + tm_rt_granules(rt, start) - 1;
}

static u32 tm_rt_note(const struct tm_rt *rt, u32 start)
{
	return tm_rt_tag_value(rt, tm_rt_last(rt, start));
}

static u32 tm_rt_make_note(u32 kind, u32 client, u32 index)
{
	return kind << TM_RT_NOTE_KIND_SHIFT |
	       client << TM_RT_NOTE_CLIENT_SHIFT | index;
}

static u32 tm_rt_note_kind(u32 note)
{
	return note >> TM_RT_NOTE_KIND_SHIFT;
}

static u32 tm_rt_note_client(u32 note)
{
	return note >> TM_RT_NOTE_CLIENT_SHIFT & TM_RT_NOTE_CLIENT_MASK;
}

static u32 tm_rt_note_index(u32 note)
{
	return note & TM_RT_NOTE_INDEX_MASK;
}

/* A block that the heap has just given out becomes a client's. */
static void tm_rt_attach(struct tm_rt *rt, struct tm_rt_client *client,
			 u32 start, u32 n, u32 kind, u32 index)
{
	u32 next = client->blocks;
	struct tm_heap_node *last = tm_rt_node(rt, start + n - 1);

	last->tag |= tm_rt_make_note(kind, client->index, index);
	tm_rt_node(rt, start)->link = next;
	if (next != TM_HEAP_NONE)
		tm_rt_node(rt, tm_rt_last(rt, next))->link = start;
	client->blocks = start;
}

/* A client's block of @n granules becomes nobody's. */
static void tm_rt_detach(struct tm_rt *rt, struct tm_rt_client *client,
			 u32 start, u32 n)
{
	u32 next = tm_rt_node(rt, start)->link;
	u32 prev = tm_rt_node(rt, start + n - 1)->link;

	if (next != TM_HEAP_NONE)
		tm_rt_node(rt, tm_rt_last(rt, next))->link = prev;
	if (prev != TM_HEAP_NONE)
		tm_rt_node(rt, prev)->link = next;
	else
		client->blocks = next;
}

/* A client's block has moved to @start, its links with it. */
static void tm_rt_reattach(struct tm_rt *rt, struct tm_rt_client *client,
			   u32 start)
{
	u32 next = tm_rt_node(rt, start)->link;
	u32 prev = tm_rt_node(rt, tm_rt_last(rt, start))->link;

	if (next != TM_HEAP_NONE)
		tm_rt_node(rt, tm_rt_last(rt, next))->link = start;
	if (prev != TM_HEAP_NONE)
		tm_rt_node(rt, prev)->link = start;
	else
		client->blocks = start;
}

static void tm_rt_give(struct tm_rt *rt, u32 start)
{
	tm_heap_free(&rt->heap, start);
	rt->frees++;
}

/* The table of movable blocks. */

static u32 tm_rt_entry_take(struct tm_rt *rt)
{
	u32 entry = rt->movable[rt->unused].start;

	tm_step();
	rt->movable[rt->unused].start = rt->movable[entry].start;
	rt->nr_movable++;
	return entry;
}

static void tm_rt_entry_put(struct tm_rt *rt, u32 entry)
{
	struct tm_rt_movable *m = &rt->movable[entry];

	tm_step();
	m->state = TM_RT_UNUSED;
	if (rt->nr_movable-- == rt->max_movable) {
		m->start = entry;
	} else {
		m->start = rt->movable[rt->unused].start;
		tm_step();
		rt->movable[rt->unused].start = entry;
	}
	rt->unused = entry;
}

int tm_rt_init(struct tm_rt *rt, tm_raw_lock_t *lock, u32 size, u32 max_movable)
{
	int err;

	/* Too large for a literal on a kernel stack. */
	memset(rt, 0, sizeof(*rt));
	if (max_movable > TM_RT_MOVABLE)
		return -EINVAL;
	err = tm_heap_init(&rt->heap, lock, size);
	if (err || !max_movable)
		return err;
	rt->movable = tm_table_alloc(max_movable, sizeof(*rt->movable));
	if (!rt->movable) {
		tm_heap_exit(&rt->heap);
		return -ENOMEM;
	}
	rt->max_movable = max_movable;
	for (u32 i = 0; i < max_movable; i++)
		rt->movable[i].start = i + 1;
	rt->unused = max_movable - 1;
	rt->movable[rt->unused].start = 0;
	return 0;
}

void tm_rt_exit(struct tm_rt *rt)
{
	tm_table_free(rt->movable);
	rt->movable = NULL;
	tm_heap_exit(&rt->heap);
}

int tm_rt_join(struct tm_rt *rt, struct tm_rt_client *client, u32 priority)
{
	u32 word = 0, index;

	tm_assert_raw_locked(rt->heap.lock);
	if (priority >= TM_RT_PRIORITIES)
		return -EINVAL;
	while (word < TM_RT_CLIENTS / 64 && !~rt->places[word]) {
		tm_step();
		word++;
	}
	tm_step();
	/* The last word has a bit more than there are places. */
	index = word * 64 + tm_ctz64(~rt->places[word]);
	if (index >= TM_RT_CLIENTS)
		return -ENOSPC;
	memset(client, 0, sizeof(*client));
	client->index = index;
	client->priority = priority;
	client->blocks = TM_HEAP_NONE;
	for (u32 i = 0; i < TM_RT_CLASSES; i++) {
		client->sizes[i] = ~0u;
		client->order[i] = (u8)i;
	}
	rt->client[index] = client;
	rt->places[word] |= 1ull << index % 64;
	return 0;
}

/* Reservations. */

/* Whether somebody waits whom a client must not overtake. */
static bool tm_rt_must_wait(const struct tm_rt *rt, u32 priority)
{
	u32 word = priority / 64;

	tm_step();
	return rt->levels[word] >> priority % 64 || (!word && rt->levels[1]);
}

/*
 * The first of a client's sizes that is not below @size: a binary search that takes the same steps for
 * any number of classes. TM_RT_CLASSES - 1 also if there is none.
 */
static u32 tm_rt_size_place(const struct tm_rt_client *client, u32 size)
{
	u32 place = 0;

	tm_static_assert(TM_RT_CLASSES == 16, "a power of two, halved to 1");
	for (u32 half = TM_RT_CLASSES / 2; half; half /= 2) {
		tm_step();
		place += client->sizes[place + half - 1] < size ? half : 0;
	}
	return place;
}

/* The place at @at is for a class of @size now; those behind it move up. Return: the class. */
static struct tm_rt_class *tm_rt_class_add(struct tm_rt_client *client, u32 at,
					   u32 size)
{
	u32 i = client->nr_classes++;
	u8 class = client->order[i];

	for (; i > at; i--) {
		tm_step();
		client->sizes[i] = client->sizes[i - 1];
		client->order[i] = client->order[i - 1];
	}
	client->sizes[at] = size;
	client->order[at] = class;
	return &client->class[class];
}

static void tm_rt_class_del(struct tm_rt_client *client, u32 size)
{
	u32 i = tm_rt_size_place(client, size), last = --client->nr_classes;
	u8 class = client->order[i];

	for (; i < last; i++) {
		tm_step();
		client->sizes[i] = client->sizes[i + 1];
		client->order[i] = client->order[i + 1];
	}
	client->sizes[last] = ~0u;
	client->order[last] = class;
}

/* The class that serves a size, or NULL. */
static struct tm_rt_class *tm_rt_class_for(struct tm_rt_client *client,
					   u32 size)
{
	u32 place = tm_rt_size_place(client, size);

	if (place >= client->nr_classes || client->sizes[place] < size)
		return NULL;
	return &client->class[client->order[place]];
}

int tm_rt_reserve(struct tm_rt *rt, struct tm_rt_client *client, u32 size,
		  u32 count)
{
	/* Its first granule and its last are the heap's. */
	u64 n = (u64)size * count + 2;
	struct tm_rt_class *class;
	u32 run, granules, place;

	tm_assert_raw_locked(rt->heap.lock);
	if (!size || size > rt->heap.size || !count)
		return -EINVAL;
	place = tm_rt_size_place(client, size);
	if (client->sizes[place] == size)
		return -EEXIST;
	if (client->nr_classes == TM_RT_CLASSES || n > rt->heap.size ||
	    tm_rt_must_wait(rt, client->priority))
		return -ENOSPC;
	run = tm_heap_alloc(&rt->heap, (u32)n);
	if (run == TM_HEAP_NONE)
		return -ENOSPC;
	class = tm_rt_class_add(client, place, size);
	granules = tm_rt_granules(rt, run);
	tm_rt_attach(rt, client, run, granules, TM_RT_RUN,
		     (u32)(class - client->class));
	*class = (struct tm_rt_class){
		.size = size,
		.count = count,
		.run = run,
		.free = TM_HEAP_NONE,
	};
	client->reserved += granules;
	return 0;
}

/* Take a run back, with all of its items. */
static void tm_rt_drop_class(struct tm_rt *rt, struct tm_rt_client *client,
			     struct tm_rt_class *class)
{
	u32 n = tm_rt_granules(rt, class->run);

	client->nr_blocks -= class->used;
	client->used -= class->used * class->size;
	client->reserved -= n;
	tm_rt_class_del(client, class->size);
	class->size = 0;
	tm_rt_detach(rt, client, class->run, n);
	tm_rt_give(rt, class->run);
}

int tm_rt_unreserve(struct tm_rt *rt, struct tm_rt_client *client, u32 size)
{
	struct tm_rt_class *class = tm_rt_class_for(client, size);

	tm_assert_raw_locked(rt->heap.lock);
	if (!class || class->size != size)
		return -ENOENT;
	if (class->used)
		return -EBUSY;
	tm_rt_drop_class(rt, client, class);
	return 0;
}

/* An item of a class that has one left. */
static void tm_rt_item_take(struct tm_rt *rt, struct tm_rt_client *client,
			    struct tm_rt_class *class,
			    struct tm_rt_block *block)
{
	u32 start = class->free;
	struct tm_heap_node *node;

	if (start != TM_HEAP_NONE)
		class->free = tm_rt_node(rt, start)->link;
	else
		start = class->run + 1 + class->fresh++ * class->size;
	class->used++;
	node = tm_rt_node(rt, start);
	node->tag = tm_heap_tag(TM_HEAP_ITEM_USED,
				client->index << TM_RT_ITEM_CLIENT_SHIFT |
				(u32)(class - client->class));
	client->nr_blocks++;
	client->used += class->size;
	*block = (struct tm_rt_block){
		.handle = start + 1,
		.start = start,
		.length = class->size,
	};
}

/* Rings of those who wait. */

static void tm_rt_ring_add(struct tm_rt_waiter **first, enum tm_rt_ring ring,
			   struct tm_rt_waiter *waiter)
{
	struct tm_rt_waiter *next = *first ? *first : waiter;
	struct tm_rt_waiter *prev = *first ? next->prev[ring] : waiter;

	waiter->next[ring] = next;
	waiter->prev[ring] = prev;
	tm_step();
	next->prev[ring] = waiter;
	tm_step();
	prev->next[ring] = waiter;
	if (!*first)
		*first = waiter;
}

static void tm_rt_ring_del(struct tm_rt_waiter **first, enum tm_rt_ring ring,
			   struct tm_rt_waiter *waiter)
{
	struct tm_rt_waiter *next = waiter->next[ring];

	tm_step();
	next->prev[ring] = waiter->prev[ring];
	tm_step();
	waiter->prev[ring]->next[ring] = next;
	if (*first == waiter)
		*first = next == waiter ? NULL : next;
}

/* It waits no longer. */
static void tm_rt_stop(struct tm_rt *rt, struct tm_rt_waiter *waiter, u32 state)
{
	u32 priority = waiter->priority;

	waiter->state = state;
	tm_rt_ring_del(&rt->waiting[priority], TM_RT_BY_PRIORITY, waiter);
	if (!rt->waiting[priority])
		rt->levels[priority / 64] &= ~(1ull << priority % 64);
	if (waiter->class)
		tm_rt_ring_del(&waiter->class->waiting, TM_RT_BY_CLASS, waiter);
}

/* The first who waits for an item of a class gets one; tm_rt_serve() will tell. */
static void tm_rt_hand(struct tm_rt *rt, struct tm_rt_class *class)
{
	struct tm_rt_waiter *waiter = class->waiting;

	tm_rt_stop(rt, waiter, TM_RT_SERVED);
	tm_rt_item_take(rt, waiter->client, class, &waiter->block);
	tm_rt_ring_add(&rt->handed, TM_RT_BY_PRIORITY, waiter);
}

static void tm_rt_item_put(struct tm_rt *rt, struct tm_rt_client *client,
			   u32 start)
{
	struct tm_heap_node *node = tm_rt_node(rt, start);
	struct tm_rt_class *class =
		&client->class[node->tag & TM_RT_ITEM_CLASS_MASK];

	tm_step();
	node->tag = tm_heap_tag(TM_HEAP_ITEM_FREE,
				node->tag & TM_HEAP_VALUE_MASK);
	node->link = class->free;
	class->free = start;
	class->used--;
	client->nr_blocks--;
	client->used -= class->size;
	if (class->waiting)
		tm_rt_hand(rt, class);
}

/*
 * The length of the allocated item of this client at @start, whose tag says that there is one; 0 if that
 * is an old tag. Where the class has an item that was ever allocated, the tag is its own.
 */
static u32 tm_rt_item_length(const struct tm_rt *rt,
			     const struct tm_rt_client *client, u32 start)
{
	u32 value = tm_rt_tag_value(rt, start);
	const struct tm_rt_class *class =
		&client->class[value & TM_RT_ITEM_CLASS_MASK];
	/* Before the run it wraps around. */
	u32 offset = start - class->run - 1;

	tm_step();
	if (value >> TM_RT_ITEM_CLIENT_SHIFT != client->index || !class->size)
		return 0;
	if (offset >= class->fresh * class->size || offset % class->size)
		return 0;
	return class->size;
}

/* Blocks in the heap. */

static u32 tm_rt_min(u32 a, u32 b)
{
	return a < b ? a : b;
}

static void tm_rt_movable_block(const struct tm_rt *rt, u32 entry,
				struct tm_rt_block *block)
{
	u32 start = rt->movable[entry].start;

	tm_step();
	*block = (struct tm_rt_block){
		.handle = TM_RT_HANDLE_MOVABLE | entry,
		.start = start,
		/* A granule too many is nobody's: it is not copied. */
		.length = tm_rt_min(tm_rt_granules(rt, start), TM_RT_STEP),
	};
}

static int tm_rt_from_heap(struct tm_rt *rt, struct tm_rt_client *client,
			   u32 size, u32 flags, struct tm_rt_block *block)
{
	bool movable = flags & TM_RT_ALLOC_MOVABLE;
	u32 entry, start, n;

	if (movable && rt->nr_movable == rt->max_movable)
		return -ENFILE;
	start = tm_heap_alloc(&rt->heap, size < TM_HEAP_MIN ? TM_HEAP_MIN :
							      size);
	if (start == TM_HEAP_NONE)
		return -ENOSPC;
	n = tm_rt_granules(rt, start);
	client->nr_blocks++;
	client->used += n;
	if (movable) {
		entry = tm_rt_entry_take(rt);
		rt->movable[entry] = (struct tm_rt_movable){
			.start = start,
			.pins = 1,
			.state = TM_RT_RESTING,
			.client = (u8)client->index,
		};
		tm_rt_attach(rt, client, start, n, TM_RT_MOVABLE_BLOCK, entry);
		tm_rt_movable_block(rt, entry, block);
		return 0;
	}
	tm_rt_attach(rt, client, start, n, TM_RT_FIXED, 0);
	*block = (struct tm_rt_block){
		.handle = start + 1,
		.start = start,
		.length = n,
	};
	return 0;
}

int tm_rt_alloc(struct tm_rt *rt, struct tm_rt_client *client, u32 size,
		u32 flags, struct tm_rt_block *block)
{
	struct tm_rt_class *class;

	tm_assert_raw_locked(rt->heap.lock);
	if (!size || size > rt->heap.size)
		return -EINVAL;
	if (flags & TM_RT_ALLOC_MOVABLE) {
		if (flags != TM_RT_ALLOC_MOVABLE || size > TM_RT_STEP)
			return -EINVAL;
	} else {
		if (flags & ~TM_RT_ALLOC_RESERVED)
			return -EINVAL;
		class = tm_rt_class_for(client, size);
		if (class && class->used < class->count) {
			tm_rt_item_take(rt, client, class, block);
			return 0;
		}
		if (flags)
			return -ENOSPC;
	}
	if (tm_rt_must_wait(rt, client->priority))
		return -ENOSPC;
	return tm_rt_from_heap(rt, client, size, flags, block);
}

/*
 * A client's block in the heap goes. One that is being moved must not be merged with anything: it
 * is nobody's until the move ends.
 */
static void tm_rt_drop_block(struct tm_rt *rt, struct tm_rt_client *client,
			     u32 start)
{
	u32 n = tm_rt_granules(rt, start);
	u32 note = tm_rt_tag_value(rt, start + n - 1);

	client->nr_blocks--;
	client->used -= n;
	tm_rt_detach(rt, client, start, n);
	if (tm_rt_note_kind(note) == TM_RT_MOVABLE_BLOCK) {
		u32 entry = tm_rt_note_index(note);

		tm_step();
		if (rt->movable[entry].state == TM_RT_MOVING) {
			rt->movable[entry].state = TM_RT_ABANDONED;
			return;
		}
		tm_rt_entry_put(rt, entry);
	}
	tm_rt_give(rt, start);
}

bool tm_rt_leave(struct tm_rt *rt, struct tm_rt_client *client)
{
	u32 start = client->blocks, note;

	tm_assert_raw_locked(rt->heap.lock);
	if (start == TM_HEAP_NONE) {
		rt->client[client->index] = NULL;
		rt->places[client->index / 64] &= ~(1ull << client->index % 64);
		return false;
	}
	note = tm_rt_note(rt, start);
	if (tm_rt_note_kind(note) == TM_RT_RUN)
		tm_rt_drop_class(rt, client,
				 &client->class[tm_rt_note_index(note)]);
	else
		tm_rt_drop_block(rt, client, start);
	return true;
}

/* The entry of a handle that has TM_RT_HANDLE_MOVABLE, or NULL for none of this client's. */
static struct tm_rt_movable *tm_rt_entry(struct tm_rt *rt,
					 const struct tm_rt_client *client,
					 u32 handle)
{
	u32 entry = handle & ~TM_RT_HANDLE_MOVABLE;
	struct tm_rt_movable *m;

	if (entry >= rt->max_movable)
		return NULL;
	m = &rt->movable[tm_index(entry, rt->max_movable)];
	tm_step();
	if (m->state != TM_RT_RESTING && m->state != TM_RT_MOVING)
		return NULL;
	return m->client == client->index ? m : NULL;
}

/* Where the fixed block or the item of this client is that a handle names. Return: its length, or 0. */
static u32 tm_rt_fixed(const struct tm_rt *rt,
		       const struct tm_rt_client *client, u32 handle,
		       u32 *start, bool *item)
{
	u32 type, n, note;

	/* That of 0 wraps around to beyond any arena. */
	*start = handle - 1;
	if (*start >= rt->heap.size)
		return 0;
	*start = tm_index(*start, rt->heap.size);
	type = tm_rt_tag_type(rt, *start);
	*item = type == TM_HEAP_ITEM_USED;
	if (*item)
		return tm_rt_item_length(rt, client, *start);
	if (type != TM_HEAP_USED_FIRST)
		return 0;
	n = tm_rt_granules(rt, *start);
	note = tm_rt_tag_value(rt, *start + n - 1);
	/* A fixed block has no index: the whole note is known. */
	return note == tm_rt_make_note(TM_RT_FIXED, client->index, 0) ? n : 0;
}

int tm_rt_free(struct tm_rt *rt, struct tm_rt_client *client, u32 handle)
{
	struct tm_rt_movable *m;
	u32 start;
	bool item;

	tm_assert_raw_locked(rt->heap.lock);
	if (handle & TM_RT_HANDLE_MOVABLE) {
		m = tm_rt_entry(rt, client, handle);
		if (!m)
			return -ENOENT;
		tm_rt_drop_block(rt, client, m->start);
		return 0;
	}
	if (!tm_rt_fixed(rt, client, handle, &start, &item))
		return -ENOENT;
	if (item)
		tm_rt_item_put(rt, client, start);
	else
		tm_rt_drop_block(rt, client, start);
	return 0;
}

int tm_rt_pin(struct tm_rt *rt, struct tm_rt_client *client, u32 handle,
	      struct tm_rt_block *block)
{
	struct tm_rt_movable *m;
	u32 start, length;
	bool item;

	tm_assert_raw_locked(rt->heap.lock);
	if (handle & TM_RT_HANDLE_MOVABLE) {
		m = tm_rt_entry(rt, client, handle);
		if (!m)
			return -ENOENT;
		if (m->state == TM_RT_MOVING)
			return -EAGAIN;
		if (m->pins == 0xffff)
			return -EOVERFLOW;
		m->pins++;
		tm_rt_movable_block(rt, (u32)(m - rt->movable), block);
		return 0;
	}
	length = tm_rt_fixed(rt, client, handle, &start, &item);
	if (!length)
		return -ENOENT;
	*block = (struct tm_rt_block){
		.handle = handle,
		.start = start,
		.length = length,
	};
	return 0;
}

int tm_rt_unpin(struct tm_rt *rt, struct tm_rt_client *client, u32 handle)
{
	struct tm_rt_movable *m = NULL;

	tm_assert_raw_locked(rt->heap.lock);
	if (handle & TM_RT_HANDLE_MOVABLE)
		m = tm_rt_entry(rt, client, handle);
	if (!m)
		return -ENOENT;
	if (!m->pins)
		return -EINVAL;
	if (!--m->pins)
		rt->frees++;
	return 0;
}

/* Waiting. */

void tm_rt_wait(struct tm_rt *rt, struct tm_rt_waiter *waiter)
{
	struct tm_rt_client *client = waiter->client;
	u32 priority = client->priority;
	struct tm_rt_class *class = NULL;

	tm_assert_raw_locked(rt->heap.lock);
	if (!waiter->flags)
		class = tm_rt_class_for(client, waiter->size);
	waiter->state = TM_RT_WAITING;
	waiter->priority = priority;
	waiter->class = class;
	/* It has not been told to compact yet. */
	waiter->frees = rt->frees - 1;
	tm_rt_ring_add(&rt->waiting[priority], TM_RT_BY_PRIORITY, waiter);
	rt->levels[priority / 64] |= 1ull << priority % 64;
	if (!class)
		return;
	tm_rt_ring_add(&class->waiting, TM_RT_BY_CLASS, waiter);
	/* One may have been freed since it was refused. */
	if (class->used < class->count)
		tm_rt_hand(rt, class);
}

bool tm_rt_cancel(struct tm_rt *rt, struct tm_rt_waiter *waiter)
{
	bool served = waiter->state == TM_RT_SERVED;

	tm_assert_raw_locked(rt->heap.lock);
	if (waiter->state == TM_RT_WAITING)
		tm_rt_stop(rt, waiter, TM_RT_IDLE);
	return served;
}

static struct tm_rt_waiter *tm_rt_first(const struct tm_rt *rt)
{
	u32 word = !!rt->levels[1];
	u64 level = rt->levels[word];

	tm_step();
	if (!level)
		return NULL;
	/* The highest bit, in two halves. */
	if (level >> 32)
		return rt->waiting[word * 64 + 32 + tm_fls32(level >> 32)];
	return rt->waiting[word * 64 + tm_fls32((u32)level)];
}

struct tm_rt_waiter *tm_rt_serve(struct tm_rt *rt)
{
	struct tm_rt_waiter *waiter;
	int err;

	tm_assert_raw_locked(rt->heap.lock);
	waiter = rt->handed;
	if (waiter) {
		tm_rt_ring_del(&rt->handed, TM_RT_BY_PRIORITY, waiter);
		return waiter;
	}
	waiter = tm_rt_first(rt);
	if (!waiter)
		return NULL;
	err = tm_rt_from_heap(rt, waiter->client, waiter->size, waiter->flags,
			      &waiter->block);
	if (!err) {
		tm_rt_stop(rt, waiter, TM_RT_SERVED);
		return waiter;
	}
	if (err != -ENOSPC || rt->heap.free < waiter->size ||
	    waiter->frees == rt->frees)
		return NULL;
	waiter->frees = rt->frees;
	return waiter;
}

/* Compaction. */

/* The entry of the block at @start if it can be moved now, or NULL. */
static struct tm_rt_movable *tm_rt_may_move(struct tm_rt *rt, u32 start)
{
	u32 note = tm_rt_note(rt, start);
	struct tm_rt_movable *m;

	if (tm_rt_note_kind(note) != TM_RT_MOVABLE_BLOCK)
		return NULL;
	m = &rt->movable[tm_rt_note_index(note)];
	tm_step();
	return m->pins ? NULL : m;
}

enum tm_rt_step tm_rt_move_begin(struct tm_rt *rt, struct tm_rt_move *move)
{
	u32 block = rt->heap.cursor;
	struct tm_rt_movable *m;
	bool hole;

	tm_assert_raw_locked(rt->heap.lock);
	if (rt->moving)
		return TM_RT_STEP_BUSY;
	hole = tm_rt_tag_type(rt, block) == TM_HEAP_FREE_FIRST;
	if (hole)
		block += tm_rt_tag_value(rt, block);
	if (block == rt->heap.size) {
		rt->heap.cursor = 0;
		return TM_RT_STEP_ROUND;
	}
	m = hole ? tm_rt_may_move(rt, block) : NULL;
	if (!m) {
		block += tm_rt_granules(rt, block);
		rt->heap.cursor = block == rt->heap.size ? 0 : block;
		return block == rt->heap.size ? TM_RT_STEP_ROUND :
						TM_RT_STEP_NOTHING;
	}
	*move = (struct tm_rt_move){
		.from = block,
		.to = rt->heap.cursor,
		.length = tm_rt_min(tm_rt_granules(rt, block), TM_RT_STEP),
	};
	m->state = TM_RT_MOVING;
	rt->moving = true;
	tm_heap_slide_begin(&rt->heap, rt->heap.cursor);
	return TM_RT_STEP_MOVE;
}

void tm_rt_move_end(struct tm_rt *rt, const struct tm_rt_move *move)
{
	u32 note;
	struct tm_rt_movable *m;

	tm_assert_raw_locked(rt->heap.lock);
	tm_heap_slide_end(&rt->heap, move->to);
	rt->moving = false;
	rt->moves++;
	rt->heap.cursor = tm_rt_last(rt, move->to) + 1;
	note = tm_rt_note(rt, move->to);
	m = &rt->movable[tm_rt_note_index(note)];
	tm_step();
	if (m->state == TM_RT_ABANDONED) {
		tm_rt_entry_put(rt, tm_rt_note_index(note));
		tm_rt_give(rt, move->to);
		return;
	}
	m->state = TM_RT_RESTING;
	m->start = move->to;
	tm_rt_reattach(rt, rt->client[m->client], move->to);
}

/* Checks. */

/* The items of a class; Return: those that its client has. */
static u32 tm_rt_check_items(const struct tm_rt *rt,
			     const struct tm_rt_client *client, u32 index)
{
	const struct tm_rt_class *class = &client->class[index];
	u32 value = client->index << TM_RT_ITEM_CLIENT_SHIFT | index;
	u32 free = 0, used = 0, n = tm_rt_granules(rt, class->run);

	tm_warn_on(n < (u64)class->size * class->count + 2);
	tm_warn_on(class->used > class->fresh || class->fresh > class->count);
	for (u32 i = 0; i < class->fresh; i++) {
		u32 item = class->run + 1 + i * class->size;

		tm_warn_on(tm_rt_tag_value(rt, item) != value);
		used += tm_rt_tag_type(rt, item) == TM_HEAP_ITEM_USED;
	}
	for (u32 item = class->free; item != TM_HEAP_NONE;
	     item = rt->heap.node[item].link) {
		if (tm_warn_on(item >= rt->heap.size || free == class->fresh))
			break;
		tm_warn_on(item - class->run - 1 >= class->fresh * class->size);
		tm_warn_on((item - class->run - 1) % class->size);
		tm_warn_on(tm_rt_tag_type(rt, item) != TM_HEAP_ITEM_FREE);
		free++;
	}
	tm_warn_on(used != class->used || used + free != class->fresh);
	/* What is left would have been handed over. */
	tm_warn_on(class->waiting && class->used < class->count);
	for (u32 i = 0; class->waiting && i < 2; i++) {
		const struct tm_rt_waiter *w = class->waiting;

		w = i ? w->next[TM_RT_BY_CLASS] : w->prev[TM_RT_BY_CLASS];
		tm_warn_on(w->class != class || w->state != TM_RT_WAITING);
	}
	return used;
}

/* A block of a client. Return: whether it is a run. */
static bool tm_rt_check_owned(const struct tm_rt *rt,
			      const struct tm_rt_client *client, u32 start)
{
	u32 note = tm_rt_note(rt, start), index = tm_rt_note_index(note);
	const struct tm_rt_movable *m;

	tm_warn_on(tm_rt_note_client(note) != client->index);
	if (tm_rt_note_kind(note) == TM_RT_RUN) {
		if (!tm_warn_on(index >= TM_RT_CLASSES))
			tm_warn_on(client->class[index].run != start ||
				   !client->class[index].size);
		return true;
	}
	if (tm_rt_note_kind(note) == TM_RT_FIXED) {
		tm_warn_on(index);
		return false;
	}
	tm_warn_on(tm_rt_note_kind(note) != TM_RT_MOVABLE_BLOCK);
	if (tm_warn_on(index >= rt->max_movable))
		return false;
	m = &rt->movable[index];
	tm_warn_on(m->start != start || m->client != client->index);
	tm_warn_on(m->state != TM_RT_RESTING && m->state != TM_RT_MOVING);
	return false;
}

/* A client and its list. Return: its blocks in the heap. */
static u32 tm_rt_check_client(const struct tm_rt *rt,
			      const struct tm_rt_client *client)
{
	u32 nr = 0, runs = 0, blocks = 0, used = 0, reserved = 0, classes = 0;
	u32 prev = TM_HEAP_NONE, places = 0;

	for (u32 start = client->blocks; start != TM_HEAP_NONE;
	     start = rt->heap.node[start].link) {
		if (tm_warn_on(!tm_heap_length(&rt->heap, start) ||
			       nr == rt->heap.nr_used))
			break;
		nr++;
		tm_warn_on(rt->heap.node[tm_rt_last(rt, start)].link != prev);
		prev = start;
		if (tm_rt_check_owned(rt, client, start)) {
			runs++;
			reserved += tm_rt_granules(rt, start);
			continue;
		}
		blocks++;
		used += tm_rt_granules(rt, start);
	}
	for (u32 i = 0; i < TM_RT_CLASSES; i++) {
		u32 items;

		if (!client->class[i].size)
			continue;
		classes++;
		items = tm_rt_check_items(rt, client, i);
		blocks += items;
		used += items * client->class[i].size;
	}
	for (u32 i = 0; i < TM_RT_CLASSES; i++) {
		u32 size = client->sizes[i], place = client->order[i];

		places |= 1u << place % TM_RT_CLASSES;
		if (i >= client->nr_classes)
			tm_warn_on(size != ~0u || client->class[place].size);
		else
			tm_warn_on(client->class[place].size != size ||
				   (i && client->sizes[i - 1] >= size));
	}
	tm_warn_on(places != (1u << TM_RT_CLASSES) - 1);
	tm_warn_on(classes != runs || classes != client->nr_classes);
	tm_warn_on(blocks != client->nr_blocks);
	tm_warn_on(used != client->used);
	tm_warn_on(reserved != client->reserved);
	return nr;
}

/* The table. Return: entries of blocks that nobody has. */
static u32 tm_rt_check_movable(const struct tm_rt *rt)
{
	u32 unused = 0, moving = 0, abandoned = 0, entry = rt->unused;

	for (u32 i = 0; i < rt->max_movable; i++) {
		const struct tm_rt_movable *m = &rt->movable[i];

		unused += m->state == TM_RT_UNUSED;
		moving += m->state == TM_RT_MOVING;
		abandoned += m->state == TM_RT_ABANDONED;
		tm_warn_on(m->state != TM_RT_UNUSED &&
			   m->state != TM_RT_RESTING && m->pins);
	}
	tm_warn_on(moving + abandoned != rt->moving);
	tm_warn_on(rt->nr_movable + unused != rt->max_movable);
	for (u32 i = 0; i < unused; i++) {
		if (tm_warn_on(entry >= rt->max_movable))
			return abandoned;
		tm_warn_on(rt->movable[entry].state != TM_RT_UNUSED);
		entry = rt->movable[entry].start;
		/* All of them, once. */
		tm_warn_on((entry == rt->unused) != (i == unused - 1));
	}
	return abandoned;
}

static void tm_rt_check_level(const struct tm_rt *rt, u32 priority)
{
	const struct tm_rt_waiter *first = rt->waiting[priority], *w = first;

	tm_warn_on((rt->levels[priority / 64] >> priority % 64 & 1) != !!first);
	if (!first)
		return;
	do {
		tm_warn_on(w->state != TM_RT_WAITING);
		tm_warn_on(w->priority != priority);
		tm_warn_on(w->next[TM_RT_BY_PRIORITY]->prev[TM_RT_BY_PRIORITY] !=
			   w);
		tm_warn_on(rt->client[w->client->index] != w->client);
		w = w->next[TM_RT_BY_PRIORITY];
	} while (w != first);
}

void tm_rt_check(const struct tm_rt *rt)
{
	u32 blocks = 0;

	tm_heap_check(&rt->heap);
	for (u32 i = 0; i < TM_RT_CLIENTS; i++) {
		const struct tm_rt_client *client = rt->client[i];

		tm_warn_on((rt->places[i / 64] >> i % 64 & 1) != !!client);
		if (!client)
			continue;
		tm_warn_on(client->index != i);
		blocks += tm_rt_check_client(rt, client);
	}
	/* The hole that is being moved to is nobody's. */
	blocks += rt->moving + tm_rt_check_movable(rt);
	tm_warn_on(blocks != rt->heap.nr_used);
	for (u32 i = 0; i < TM_RT_PRIORITIES; i++)
		tm_rt_check_level(rt, i);
}
