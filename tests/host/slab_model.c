// SPDX-License-Identifier: GPL-2.0-only
#include <stdlib.h>

#include "slab_model.h"

void slab_model_init(struct slab_model *model, const struct tm_slab_pool *pool)
{
	memset(model, 0, sizeof(*model));
	model->nr_objects = pool->layout.nr_objects;
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++) {
		model->slab[s] = malloc(tm_slab_bytes(pool));
		CHECK(model->slab[s]);
		/* What a descriptor held before must not matter, but its pool. */
		memset(model->slab[s], 0xa5, tm_slab_bytes(pool));
		model->slab[s]->pool = NULL;
	}
}

void slab_model_destroy(struct slab_model *model)
{
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++)
		free(model->slab[s]);
}

/* The number of a slab, SLAB_MODEL_SLABS when it is none of the model's. */
static u32 number(const struct slab_model *model, const struct tm_slab *slab)
{
	u32 s = 0;

	while (s < SLAB_MODEL_SLABS && model->slab[s] != slab)
		s++;
	return s;
}

u32 slab_model_free(const struct slab_model *model, u32 s)
{
	u32 n = 0;

	for (u32 i = 0; i < model->nr_objects; i++)
		n += !model->used[s][i];
	return n;
}

u32 slab_model_room(const struct slab_model *model)
{
	u32 n = 0;

	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++)
		if (model->in_pool[s])
			n += slab_model_free(model, s);
	return n;
}

bool slab_model_allocated(const struct slab_model *model,
			  struct tm_slab_object object)
{
	u32 s = number(model, object.slab);

	return s < SLAB_MODEL_SLABS && model->in_pool[s] &&
	       object.index < model->nr_objects && model->used[s][object.index];
}

/* The list that a slab with @nr_free free objects has to be on, -1 for none. */
static int list_of(const struct slab_model *model, u32 nr_free)
{
	int list = -1;

	if (nr_free == model->nr_objects)
		return TM_SLAB_EMPTY;
	for (; nr_free; nr_free /= 2)
		list++;
	return list;
}

static void compare_slab(const struct slab_model *model,
			 const struct tm_slab_pool *pool, u32 s)
{
	const struct tm_slab *slab = model->slab[s];
	u32 words = (model->nr_objects + 63) / 64;
	u64 summary[TM_SLAB_SUMMARY] = { 0 };
	u32 found = 0;

	CHECK(slab->pool == (model->in_pool[s] ? pool : NULL));
	for (u32 list = 0; list < TM_SLAB_LISTS; list++)
		for (const struct tm_slab *l = pool->head[list]; l; l = l->next)
			if (l == slab) {
				CHECK_EQ(list, list_of(model, slab->nr_free));
				found++;
			}
	if (!model->in_pool[s]) {
		CHECK_EQ(found, 0);
		return;
	}
	CHECK_EQ(slab->nr_free, slab_model_free(model, s));
	CHECK_EQ(found, slab->nr_free != 0);
	for (u32 w = 0; w < words; w++) {
		u64 word = 0;

		for (u32 i = w * 64; i < w * 64 + 64; i++)
			if (i < model->nr_objects && !model->used[s][i])
				word |= 1ull << (i % 64);
		CHECK(slab->free[w] == word);
		if (word)
			summary[w / 64] |= 1ull << (w % 64);
	}
	CHECK(!memcmp(slab->summary, summary, sizeof(summary)));
}

void slab_model_compare(const struct slab_model *model,
			const struct tm_slab_pool *pool)
{
	u32 slabs = 0, empty = 0;

	for (u32 list = 0; list < TM_SLAB_LISTS; list++) {
		const struct tm_slab *prev = NULL;
		u32 n = 0;

		CHECK_EQ(pool->lists >> list & 1, pool->head[list] != NULL);
		for (const struct tm_slab *l = pool->head[list]; l;
		     l = l->next) {
			CHECK(l->prev == prev);
			CHECK(number(model, l) < SLAB_MODEL_SLABS);
			CHECK(++n <= SLAB_MODEL_SLABS);
			prev = l;
		}
	}
	CHECK(!(pool->lists >> TM_SLAB_LISTS));
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++) {
		compare_slab(model, pool, s);
		slabs += model->in_pool[s];
		empty += model->in_pool[s] &&
			 slab_model_free(model, s) == model->nr_objects;
	}
	CHECK_EQ(pool->nr_slabs, slabs);
	CHECK_EQ(pool->nr_empty, empty);
	CHECK_EQ(pool->nr_free, slab_model_room(model));
	CHECK_EQ(pool->allocs, model->allocs);
	CHECK_EQ(pool->frees, model->frees);
	CHECK_EQ(pool->allocs - pool->frees, model->nr);
}

void slab_snapshot_take(struct slab_snapshot *snapshot,
			const struct slab_model *model,
			const struct tm_slab_pool *pool)
{
	snapshot->pool = *pool;
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++) {
		snapshot->slab[s] = malloc(tm_slab_bytes(pool));
		CHECK(snapshot->slab[s]);
		memcpy(snapshot->slab[s], model->slab[s], tm_slab_bytes(pool));
	}
}

bool slab_snapshot_same(const struct slab_snapshot *snapshot,
			const struct slab_model *model,
			const struct tm_slab_pool *pool)
{
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++)
		if (memcmp(snapshot->slab[s], model->slab[s],
			   tm_slab_bytes(pool)))
			return false;
	return !memcmp(&snapshot->pool, pool, sizeof(*pool));
}

void slab_snapshot_restore(const struct slab_snapshot *snapshot,
			   const struct slab_model *model,
			   struct tm_slab_pool *pool)
{
	memcpy(pool, &snapshot->pool, sizeof(*pool));
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++)
		memcpy(model->slab[s], snapshot->slab[s], tm_slab_bytes(pool));
}

void slab_snapshot_drop(struct slab_snapshot *snapshot)
{
	for (u32 s = 0; s < SLAB_MODEL_SLABS; s++)
		free(snapshot->slab[s]);
}

void slab_do_add(struct slab_model *model, struct tm_slab_pool *pool, u32 s)
{
	CHECK(!model->in_pool[s]);
	tm_slab_add(pool, model->slab[s]);
	model->in_pool[s] = true;
	memset(model->used[s], 0, sizeof(model->used[s]));
}

int slab_do_take_empty(struct slab_model *model, struct tm_slab_pool *pool)
{
	struct slab_snapshot before;
	struct tm_slab *slab;
	bool any = false;
	u32 s;

	for (s = 0; s < SLAB_MODEL_SLABS; s++)
		any |= model->in_pool[s] &&
		       slab_model_free(model, s) == model->nr_objects;
	slab_snapshot_take(&before, model, pool);
	slab = tm_slab_take_empty(pool);
	CHECK_EQ(slab != NULL, any);
	if (!slab)
		CHECK(slab_snapshot_same(&before, model, pool));
	slab_snapshot_drop(&before);
	if (!slab)
		return -1;
	s = number(model, slab);
	CHECK(s < SLAB_MODEL_SLABS && model->in_pool[s]);
	CHECK_EQ(slab_model_free(model, s), model->nr_objects);
	model->in_pool[s] = false;
	return (int)s;
}

/* May the next object come from slab @s, that one being free? */
static void check_choice(const struct slab_model *model, u32 s)
{
	u32 nr_free = slab_model_free(model, s);
	u32 fullest = 0;

	for (u32 t = 0; t < SLAB_MODEL_SLABS; t++) {
		u32 n = model->in_pool[t] ? slab_model_free(model, t) : 0;

		if (n && (!fullest || n < fullest))
			fullest = n;
	}
	/* An untouched slab comes last; of the others the fullest, or nearly. */
	if (nr_free == model->nr_objects)
		CHECK_EQ(fullest, model->nr_objects);
	else
		CHECK(nr_free < 2 * fullest);
}

int slab_do_alloc(struct slab_model *model, struct tm_slab_pool *pool, u32 nr)
{
	struct tm_slab_object *objects = malloc((nr + 1) * sizeof(*objects));
	int want = nr <= slab_model_room(model) ? 0 : -ENOMEM;
	struct slab_snapshot before;
	u32 current = SLAB_MODEL_SLABS;
	int err;

	CHECK(objects);
	slab_snapshot_take(&before, model, pool);
	err = tm_slab_alloc(pool, objects, nr);
	CHECK_EQ(err, want);
	if (err)
		CHECK(slab_snapshot_same(&before, model, pool));
	for (u32 i = 0; i < nr && !err; i++) {
		u32 s = number(model, objects[i].slab), index = objects[i].index;

		CHECK(s < SLAB_MODEL_SLABS && model->in_pool[s]);
		CHECK(index < model->nr_objects && !model->used[s][index]);
		for (u32 lower = 0; lower < index; lower++)
			CHECK(model->used[s][lower]);
		/* A batch leaves a slab only when that is full. */
		if (s != current) {
			CHECK(current == SLAB_MODEL_SLABS ||
			      !slab_model_free(model, current));
			check_choice(model, s);
		}
		current = s;
		model->used[s][index] = true;
		model->objects[model->nr++] = objects[i];
		model->allocs++;
	}
	slab_snapshot_drop(&before);
	free(objects);
	return err;
}

int slab_do_free(struct slab_model *model, struct tm_slab_pool *pool,
		 const struct tm_slab_object *objects, u32 nr)
{
	int want = 0, err;

	for (u32 i = 0; i < nr; i++) {
		if (!slab_model_allocated(model, objects[i]))
			want = -EINVAL;
		for (u32 j = 0; j < i; j++)
			if (objects[i].slab == objects[j].slab &&
			    objects[i].index == objects[j].index)
				want = -EINVAL;
	}
	err = tm_slab_free(pool, objects, nr);
	CHECK_EQ(err, want);
	/* After a failure the model is as before: so must the pool be. */
	for (u32 i = 0; i < nr && !err; i++) {
		struct tm_slab_object object = objects[i];
		u32 at = 0;

		while (model->objects[at].slab != object.slab ||
		       model->objects[at].index != object.index)
			at++;
		model->nr--;
		memmove(&model->objects[at], &model->objects[at + 1],
			(model->nr - at) * sizeof(*model->objects));
		model->used[number(model, object.slab)][object.index] = false;
		model->frees++;
	}
	return err;
}
