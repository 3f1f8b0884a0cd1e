// SPDX-License-Identifier: GPL-2.0-only
#include "core/slab.h"

/* Steps between two powers of two: an 8th is what rounding up may waste. */
#define TM_SLAB_STEP_SHIFT	3
#define TM_SLAB_STEPS		(1u << TM_SLAB_STEP_SHIFT)
/* A tail that is no larger than this part of the slab is small enough. */
#define TM_SLAB_TAIL_PART	16

tm_static_assert(TM_SLAB_MAX_OBJECTS == 1u << TM_SLAB_EMPTY,
		 "a partly used slab has its list below those all free");
tm_static_assert(TM_SLAB_LISTS <= 32, "lists are bits of a u32");

/* Classes below a cache line: 8, 16, ... */
static u32 tm_slab_small_classes(u32 cache_line)
{
	return tm_fls32(cache_line / TM_SLAB_MIN_SIZE);
}

u32 tm_slab_class(u32 size, u32 cache_line)
{
	u32 lines, shift;

	if (size <= TM_SLAB_MIN_SIZE)
		return 0;
	if (size <= cache_line)
		return tm_fls32((size - 1) / TM_SLAB_MIN_SIZE) + 1;
	lines = (size - 1) / cache_line;
	shift = lines < TM_SLAB_STEPS ? 0 :
		tm_fls32(lines) - TM_SLAB_STEP_SHIFT;
	return tm_slab_small_classes(cache_line) + shift * TM_SLAB_STEPS +
	       (lines >> shift);
}

u32 tm_slab_class_size(u32 class, u32 cache_line)
{
	u32 small = tm_slab_small_classes(cache_line);
	u32 shift, step;

	if (class < small)
		return TM_SLAB_MIN_SIZE << class;
	class -= small;
	shift = class < TM_SLAB_STEPS ? 0 : class / TM_SLAB_STEPS - 1;
	step = class - shift * TM_SLAB_STEPS + 1;
	return (step << shift) * cache_line;
}

struct tm_slab_layout tm_slab_layout(struct tm_geometry g, u32 size)
{
	u32 bytes = 1u << g.page_shift;
	u8 order = 0;

	/* Twice the bytes have at most twice the tail. */
	while (order < TM_SLAB_MAX_ORDER &&
	       bytes % size > bytes / TM_SLAB_TAIL_PART) {
		bytes *= 2;
		order++;
	}
	return (struct tm_slab_layout){
		.size = size,
		.nr_objects = bytes / size,
		.order = order,
	};
}

/* The list of a slab with @nr_free free objects, not 0. */
static u32 tm_slab_list(const struct tm_slab_pool *pool, u32 nr_free)
{
	return nr_free == pool->layout.nr_objects ? TM_SLAB_EMPTY :
						    tm_fls32(nr_free);
}

static void tm_slab_list_add(struct tm_slab_pool *pool, struct tm_slab *slab,
			     u32 list)
{
	slab->prev = NULL;
	slab->next = pool->head[list];
	if (slab->next)
		slab->next->prev = slab;
	pool->head[list] = slab;
	pool->lists |= 1u << list;
	pool->nr_empty += list == TM_SLAB_EMPTY;
}

static void tm_slab_list_del(struct tm_slab_pool *pool, struct tm_slab *slab,
			     u32 list)
{
	pool->nr_empty -= list == TM_SLAB_EMPTY;
	if (slab->next)
		slab->next->prev = slab->prev;
	if (slab->prev) {
		slab->prev->next = slab->next;
		return;
	}
	pool->head[list] = slab->next;
	if (!slab->next)
		pool->lists &= ~(1u << list);
}

/* The slab had @was free objects: move it to the list of what it has now. */
static void tm_slab_relist(struct tm_slab_pool *pool, struct tm_slab *slab,
			   u32 was)
{
	u32 from = was ? tm_slab_list(pool, was) : TM_NONE;
	u32 to = slab->nr_free ? tm_slab_list(pool, slab->nr_free) : TM_NONE;

	if (from == to)
		return;
	if (from != TM_NONE)
		tm_slab_list_del(pool, slab, from);
	if (to != TM_NONE)
		tm_slab_list_add(pool, slab, to);
}

static void tm_slab_set(struct tm_slab *slab, u32 index)
{
	u32 word = index / 64;

	slab->free[word] |= (u64)1 << (index % 64);
	slab->summary[word / 64] |= (u64)1 << (word % 64);
	slab->nr_free++;
}

static void tm_slab_clear(struct tm_slab *slab, u32 index)
{
	u32 word = index / 64;

	slab->free[word] &= ~((u64)1 << (index % 64));
	if (!slab->free[word])
		slab->summary[word / 64] &= ~((u64)1 << (word % 64));
	slab->nr_free--;
}

/* The first free object; the caller knows that there is one. */
static u32 tm_slab_first(const struct tm_slab *slab)
{
	u32 word = 0;

	while (!slab->summary[word / 64])
		word += 64;
	word += tm_ctz64(slab->summary[word / 64]);
	return word * 64 + tm_ctz64(slab->free[word]);
}

int tm_slab_pool_init(struct tm_slab_pool *pool, struct tm_slab_layout layout,
		      tm_lock_t *lock)
{
	if (!layout.nr_objects || layout.nr_objects > TM_SLAB_MAX_OBJECTS)
		return -EINVAL;
	*pool = (struct tm_slab_pool){ .layout = layout, .lock = lock };
	return 0;
}

void tm_slab_pool_destroy(const struct tm_slab_pool *pool)
{
	tm_warn_on(pool->nr_slabs);
}

void tm_slab_add(struct tm_slab_pool *pool, struct tm_slab *slab)
{
	u32 nr = pool->layout.nr_objects;

	tm_assert_locked(pool->lock);
	memset(slab, 0, tm_slab_bytes(pool));
	slab->pool = pool;
	for (u32 word = 0; word <= (nr - 1) / 64; word++) {
		slab->free[word] = ~(u64)0;
		slab->summary[word / 64] |= (u64)1 << (word % 64);
	}
	slab->free[(nr - 1) / 64] >>= 63 - (nr - 1) % 64;
	slab->nr_free = nr;
	tm_slab_relist(pool, slab, 0);
	pool->nr_slabs++;
	pool->nr_free += nr;
}

struct tm_slab *tm_slab_take_empty(struct tm_slab_pool *pool)
{
	struct tm_slab *slab = pool->head[TM_SLAB_EMPTY];

	tm_assert_locked(pool->lock);
	if (!slab)
		return NULL;
	tm_slab_list_del(pool, slab, TM_SLAB_EMPTY);
	slab->pool = NULL;
	pool->nr_slabs--;
	pool->nr_free -= slab->nr_free;
	return slab;
}

int tm_slab_alloc(struct tm_slab_pool *pool, struct tm_slab_object *objects,
		  u32 nr)
{
	tm_assert_locked(pool->lock);
	if (nr > pool->nr_free)
		return -ENOMEM;
	pool->nr_free -= nr;
	pool->allocs += nr;
	while (nr) {
		struct tm_slab *slab = pool->head[tm_ctz64(pool->lists)];
		u32 was = slab->nr_free;

		for (; nr && slab->nr_free; nr--) {
			u32 index = tm_slab_first(slab);

			tm_slab_clear(slab, index);
			*objects++ = (struct tm_slab_object){ slab, index };
		}
		tm_slab_relist(pool, slab, was);
	}
	return 0;
}

static bool tm_slab_allocated(const struct tm_slab_pool *pool,
			      struct tm_slab_object object)
{
	const struct tm_slab *slab = object.slab;

	return slab->pool == pool && object.index < pool->layout.nr_objects &&
	       !(slab->free[object.index / 64] >> (object.index % 64) & 1);
}

int tm_slab_free(struct tm_slab_pool *pool,
		 const struct tm_slab_object *objects, u32 nr)
{
	u32 i;

	tm_assert_locked(pool->lock);
	for (i = 0; i < nr; i++) {
		if (!tm_slab_allocated(pool, objects[i]))
			goto undo;
		tm_slab_set(objects[i].slab, objects[i].index);
		tm_slab_relist(pool, objects[i].slab,
			       objects[i].slab->nr_free - 1);
	}
	pool->nr_free += nr;
	pool->frees += nr;
	return 0;

undo:
	while (i--) {
		tm_slab_clear(objects[i].slab, objects[i].index);
		tm_slab_relist(pool, objects[i].slab,
			       objects[i].slab->nr_free + 1);
	}
	return -EINVAL;
}
