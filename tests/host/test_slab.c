// SPDX-License-Identifier: GPL-2.0-only
/* Slabs: size classes, layouts, and the pool of one class. */
#include "slab_model.h"

static const u32 cache_lines[] = { 8, 16, 32, 64, 128, 256 };

#define for_each_line(line)						\
	for (u32 i_ = 0, line; i_ < 6 && (line = cache_lines[i_], 1); i_++)

/* By hand, for the lines that ARM64 boards have. */
TEST(slab_classes_are_these)
{
	static const u32 with_64[] = {
		8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704,
		768, 832, 896, 960, 1024, 1152, 1280, 1408, 1536, 1664, 1792,
		1920, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096,
	};
	static const u32 with_128[] = {
		8, 16, 32, 64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152,
		1280, 1408, 1536, 1664, 1792, 1920, 2048, 2304, 2560, 2816,
		3072, 3328, 3584, 3840, 4096, 4608,
	};

	for (u32 i = 0; i < sizeof(with_64) / sizeof(*with_64); i++)
		CHECK_EQ(tm_slab_class_size(i, 64), with_64[i]);
	for (u32 i = 0; i < sizeof(with_128) / sizeof(*with_128); i++)
		CHECK_EQ(tm_slab_class_size(i, 128), with_128[i]);
	CHECK_EQ(tm_slab_classes(tm_geometry(12), 64), 34);
	CHECK_EQ(tm_slab_classes(tm_geometry(12), 128), 27);
	CHECK_EQ(tm_slab_classes(tm_geometry(16), 64), 34 + 4 * 8);
}

/* Every size has the smallest class that holds it, and little is wasted. */
TEST(slab_class_of_each_size)
{
	for_each_line(line) {
		CHECK_EQ(tm_slab_class(0, line), 0);
		for (u32 size = 1; size <= 65536; size++) {
			u32 class = tm_slab_class(size, line);
			u32 bytes = tm_slab_class_size(class, line);

			tm_op("size %u, line %u", size, line);
			CHECK(bytes >= size);
			if (class)
				CHECK(tm_slab_class_size(class - 1, line) <
				      size);
			else
				CHECK_EQ(bytes, 8);
			CHECK_EQ(tm_slab_class(bytes, line), class);
			/* Tiles a line, or is made of lines. */
			CHECK(bytes < line ? line % bytes == 0 :
					     bytes % line == 0);
			if (size > 8 * line)
				CHECK((bytes - size) * 8 < bytes);
			else if (size > line)
				CHECK(bytes - size < line);
			else if (size > 8)
				CHECK(bytes < 2 * size);
		}
	}
}

TEST_PAGE_SIZES(slab_layout_of_each_class)
{
	struct tm_geometry g = tm_geometry(page_shift);
	u32 page = 1u << page_shift;

	for_each_line(line) {
		u32 classes = tm_slab_classes(g, line);

		CHECK_EQ(tm_slab_class_size(classes, line), page);
		CHECK(tm_slab_class_size(classes - 1, line) < page);
		for (u32 class = 0; class < classes; class++) {
			u32 size = tm_slab_class_size(class, line);
			struct tm_slab_layout l = tm_slab_layout(g, size);
			u32 bytes = page << l.order;
			u32 tail = bytes - l.nr_objects * size;

			tm_op("class %u of %u, line %u", class, size, line);
			CHECK_EQ(l.size, size);
			CHECK(l.order <= TM_SLAB_MAX_ORDER);
			CHECK(l.nr_objects >= 1);
			CHECK(l.nr_objects <= TM_SLAB_MAX_OBJECTS);
			CHECK(bytes >= l.nr_objects * size && tail < size);
			/* Measured: the worst is 3328 in 32 KiB. */
			CHECK(tail * 100 < bytes * 9);
			for (u32 o = 0; o <= TM_SLAB_MAX_ORDER; o++) {
				u32 other = (page << o) % size;

				/* Fewer pages would waste too much, */
				if (o < l.order)
					CHECK(other * 16 > page << o);
				/* no order less, if this one does too. */
				if (tail * 16 > bytes)
					CHECK((u64)other << l.order >=
					      (u64)tail << o);
			}
		}
	}
}

static tm_lock_t lock;
static struct tm_slab_pool pool;
static struct slab_model model;

/* Another owner's pool of the same class, with one slab. */
static struct tm_slab_pool foreign;
static struct slab_model foreign_model;

static void setup(struct tm_slab_layout layout)
{
	lock.held = false;
	CHECK_EQ(tm_slab_pool_init(&pool, layout, &lock), 0);
	CHECK_EQ(tm_slab_pool_init(&foreign, layout, &lock), 0);
	slab_model_init(&model, &pool);
	slab_model_init(&foreign_model, &foreign);
	slab_model_compare(&model, &pool);
	tm_host_lock(&lock);
	slab_do_add(&foreign_model, &foreign, 0);
	CHECK_EQ(slab_do_alloc(&foreign_model, &foreign, 1), 0);
}

static void teardown(void)
{
	while (model.nr)
		CHECK_EQ(slab_do_free(&model, &pool, model.objects, 1), 0);
	while (slab_do_take_empty(&model, &pool) >= 0)
		;
	slab_model_compare(&model, &pool);
	CHECK_EQ(pool.nr_slabs, 0);
	/* Whatever the other pool was offered, its object is there. */
	slab_model_compare(&foreign_model, &foreign);
	CHECK_EQ(slab_do_free(&foreign_model, &foreign, foreign_model.objects,
			      1), 0);
	CHECK_EQ(slab_do_take_empty(&foreign_model, &foreign), 0);
	tm_host_unlock(&lock);
	tm_slab_pool_destroy(&pool);
	tm_slab_pool_destroy(&foreign);
	slab_model_destroy(&model);
	slab_model_destroy(&foreign_model);
}

static struct tm_slab_layout of_objects(u32 nr_objects)
{
	return (struct tm_slab_layout){ .size = 8, .nr_objects = nr_objects };
}

TEST(slab_init_refuses_impossible_layouts)
{
	CHECK_EQ(tm_slab_pool_init(&pool, of_objects(0), &lock), -EINVAL);
	CHECK_EQ(tm_slab_pool_init(&pool, of_objects(TM_SLAB_MAX_OBJECTS + 1),
				   &lock), -EINVAL);
	CHECK_EQ(tm_slab_pool_init(&pool, of_objects(TM_SLAB_MAX_OBJECTS),
				   &lock), 0);
	CHECK_EQ(tm_slab_bytes(&pool), sizeof(struct tm_slab) + 1024);
	CHECK_EQ(tm_slab_pool_init(&pool, of_objects(1), &lock), 0);
	CHECK_EQ(tm_slab_bytes(&pool), sizeof(struct tm_slab) + 8);
}

TEST(slab_destroy_warns_of_slabs)
{
	setup(of_objects(4));
	slab_do_add(&model, &pool, 0);
	tm_host_expect_warnings(1);
	tm_slab_pool_destroy(&pool);
	CHECK_EQ(tm_host_missing_warnings(), 0);
	teardown();
}

/* Every number of objects from 1 up: fill slabs, empty them in another order. */
TEST(slab_fill_each_count)
{
	for (u32 n = 1; n <= 300; n++) {
		setup(of_objects(n));
		CHECK_EQ(slab_do_alloc(&model, &pool, 1), -ENOMEM);
		CHECK_EQ(slab_do_alloc(&model, &pool, 0), 0);
		for (u32 s = 0; s < 3; s++)
			slab_do_add(&model, &pool, s);
		slab_model_compare(&model, &pool);
		CHECK_EQ(slab_do_alloc(&model, &pool, 3 * n + 1), -ENOMEM);
		CHECK_EQ(slab_do_alloc(&model, &pool, 3 * n), 0);
		slab_model_compare(&model, &pool);
		CHECK_EQ(slab_do_alloc(&model, &pool, 1), -ENOMEM);
		CHECK_EQ(slab_do_take_empty(&model, &pool), -1);
		for (u32 i = 0; model.nr; i++) {
			u32 at = i % 2 ? 0 : model.nr - 1;

			tm_op("%u objects: free %u", n, i);
			CHECK_EQ(slab_do_free(&model, &pool, &model.objects[at],
					      1), 0);
		}
		slab_model_compare(&model, &pool);
		teardown();
	}
}

/* The largest slab: both words of the summary count. */
TEST(slab_of_8192_objects)
{
	struct tm_slab_object first, last;

	setup(of_objects(TM_SLAB_MAX_OBJECTS));
	slab_do_add(&model, &pool, 0);
	CHECK_EQ(slab_do_alloc(&model, &pool, TM_SLAB_MAX_OBJECTS), 0);
	slab_model_compare(&model, &pool);
	for (u32 i = 63; i < TM_SLAB_MAX_OBJECTS; i += 64) {
		struct tm_slab_object object = { model.slab[0], i };

		CHECK_EQ(slab_do_free(&model, &pool, &object, 1), 0);
		slab_model_compare(&model, &pool);
		CHECK_EQ(slab_do_alloc(&model, &pool, 1), 0);
	}
	first = model.objects[0];
	last = model.objects[model.nr - 1];
	CHECK_EQ(last.index, TM_SLAB_MAX_OBJECTS - 1);
	CHECK_EQ(slab_do_free(&model, &pool, &last, 1), 0);
	CHECK_EQ(slab_do_free(&model, &pool, &first, 1), 0);
	CHECK_EQ(slab_do_alloc(&model, &pool, 2), 0);
	slab_model_compare(&model, &pool);
	teardown();
}

/* The emptier slabs are left alone, and so fall empty. */
TEST(slab_prefers_the_fullest)
{
	struct tm_slab_object object;

	setup(of_objects(16));
	for (u32 s = 0; s < 4; s++)
		slab_do_add(&model, &pool, s);
	CHECK_EQ(slab_do_alloc(&model, &pool, 64), 0);
	/* 1, 2, 4 and 16 free. */
	for (u32 s = 0; s < 4; s++)
		for (u32 i = 0; i < (s < 3 ? 1u << s : 16u); i++) {
			object = (struct tm_slab_object){ model.slab[s], i };
			CHECK_EQ(slab_do_free(&model, &pool, &object, 1), 0);
		}
	for (u32 s = 0; s < 4; s++)
		for (u32 i = 0; i < (s < 3 ? 1u << s : 16u); i++) {
			CHECK_EQ(slab_do_alloc(&model, &pool, 1), 0);
			object = model.objects[model.nr - 1];
			CHECK(object.slab == model.slab[s]);
			CHECK_EQ(object.index, i);
		}
	slab_model_compare(&model, &pool);
	teardown();
}

/* A batch with one bad object, of each sort and at each place, frees nothing. */
TEST(slab_bad_batches_change_nothing)
{
	struct tm_slab_object batch[9], bad[7];

	for (u32 n = 1; n <= 70; n += n < 10 ? 1 : 20) {
		u32 live = n < 3 ? 1 : 2 * n - 2;

		setup(of_objects(n));
		for (u32 s = 0; s < 3; s++)
			slab_do_add(&model, &pool, s);
		CHECK_EQ(slab_do_alloc(&model, &pool, live + 1), 0);
		/* One that was allocated, before the others move up. */
		bad[0] = model.objects[live];
		CHECK_EQ(slab_do_free(&model, &pool, &bad[0], 1), 0);
		bad[1] = (struct tm_slab_object){ model.slab[0], n };
		bad[2] = (struct tm_slab_object){ model.slab[0], TM_NONE };
		bad[3] = (struct tm_slab_object){ model.slab[0], n + 64 };
		bad[4] = foreign_model.objects[0];
		/* A slab that was in the pool. */
		bad[5].slab = model.slab[slab_do_take_empty(&model, &pool)];
		bad[5].index = 0;
		/* A slab that never was. */
		bad[6] = (struct tm_slab_object){ model.slab[5], 0 };
		for (u32 b = 0; b < 7; b++)
			for (u32 at = 0; at < 9 && at <= live; at++) {
				for (u32 i = 0; i < at; i++)
					batch[i] = model.objects[i];
				batch[at] = bad[b];
				tm_op("%u objects: bad %u at %u", n, b, at);
				CHECK_EQ(slab_do_free(&model, &pool, batch,
						      at + 1), -EINVAL);
				slab_model_compare(&model, &pool);
			}
		/* The same object twice in one batch. */
		for (u32 at = 1; at < 9 && at <= live; at++) {
			for (u32 i = 0; i < at; i++)
				batch[i] = model.objects[i];
			batch[at] = batch[at / 2];
			tm_op("%u objects: twice, at %u", n, at);
			CHECK_EQ(slab_do_free(&model, &pool, batch, at + 1),
				 -EINVAL);
			slab_model_compare(&model, &pool);
		}
		teardown();
	}
}

enum op {
	OP_ALLOC,
	OP_ALLOC_BATCH,
	OP_ALLOC_TOO_MANY,
	OP_FREE,
	OP_FREE_BATCH,
	OP_FREE_ALL,
	OP_DOUBLE_FREE,
	OP_BAD_BATCH,
	OP_ADD,
	OP_TAKE_EMPTY,
	OPS,
};

#define BATCH	48

/* @nr different allocated objects to the front of the model's; at most all. */
static u32 pick(struct tm_rng *rng, u32 nr)
{
	if (nr > model.nr)
		nr = model.nr;
	for (u32 i = 0; i < nr; i++) {
		u32 j = i + tm_rand_below(rng, model.nr - i);
		struct tm_slab_object object = model.objects[i];

		model.objects[i] = model.objects[j];
		model.objects[j] = object;
	}
	return nr;
}

static struct tm_slab_object bad_object(struct tm_rng *rng)
{
	struct tm_slab_object bad;

	do {
		bad.slab = model.slab[tm_rand_below(rng, SLAB_MODEL_SLABS)];
		bad.index = tm_rand_below(rng, model.nr_objects + 70);
	} while (slab_model_allocated(&model, bad));
	return tm_rand_one_in(rng, 4) ? foreign_model.objects[0] : bad;
}

static void random_op(enum op op, struct tm_rng *rng)
{
	struct tm_slab_object batch[BATCH + 1];
	u32 nr = 1, s;

	switch (op) {
	case OP_ALLOC_BATCH:
		nr = tm_rand_below(rng, BATCH + 1);
		/* fall through */
	case OP_ALLOC:
		tm_op("alloc %u", nr);
		slab_do_alloc(&model, &pool, nr);
		break;
	case OP_ALLOC_TOO_MANY:
		nr = slab_model_room(&model) + 1 + tm_rand_below(rng, 9);
		tm_op("alloc %u, too many", nr);
		CHECK_EQ(slab_do_alloc(&model, &pool, nr), -ENOMEM);
		break;
	case OP_FREE_BATCH:
		nr = tm_rand_below(rng, BATCH + 1);
		/* fall through */
	case OP_FREE:
		nr = pick(rng, nr);
		memcpy(batch, model.objects, nr * sizeof(*batch));
		tm_op("free %u", nr);
		CHECK_EQ(slab_do_free(&model, &pool, batch, nr), 0);
		break;
	case OP_FREE_ALL:
		tm_op("free all");
		while (model.nr) {
			nr = pick(rng, BATCH);
			memcpy(batch, model.objects, nr * sizeof(*batch));
			CHECK_EQ(slab_do_free(&model, &pool, batch, nr), 0);
		}
		break;
	case OP_DOUBLE_FREE:
		if (!pick(rng, 1))
			break;
		batch[0] = model.objects[0];
		tm_op("double free of index %u", batch[0].index);
		CHECK_EQ(slab_do_free(&model, &pool, batch, 1), 0);
		CHECK_EQ(slab_do_free(&model, &pool, batch, 1), -EINVAL);
		break;
	case OP_BAD_BATCH:
		nr = pick(rng, tm_rand_below(rng, BATCH));
		memcpy(batch, model.objects, nr * sizeof(*batch));
		s = tm_rand_below(rng, nr + 1);
		batch[nr] = batch[s];
		batch[s] = bad_object(rng);
		tm_op("free %u with a bad one at %u", nr + 1, s);
		CHECK_EQ(slab_do_free(&model, &pool, batch, nr + 1), -EINVAL);
		break;
	case OP_ADD:
		/* The last slab stays outside: what was never in the pool. */
		s = tm_rand_below(rng, SLAB_MODEL_SLABS - 1);
		if (model.in_pool[s])
			break;
		tm_op("add slab %u", s);
		slab_do_add(&model, &pool, s);
		break;
	case OP_TAKE_EMPTY:
		tm_op("take an empty slab out");
		slab_do_take_empty(&model, &pool);
		break;
	case OPS:
		break;
	}
}

static void random_rounds(struct tm_slab_layout layout, u32 rounds, u32 steps)
{
	struct tm_round round;

	tm_for_each_round(&round, rounds, steps) {
		u32 weights[OPS] = { 0 };

		setup(layout);
		for (u32 step = 0; step < round.steps; step++) {
			if (step % 64 == 0) {
				for (u32 op = 0; op < OPS; op++)
					weights[op] = 1 + tm_rand_below(
						&round.rng, 6);
				weights[tm_rand_one_in(&round.rng, 2) ?
					OP_FREE_BATCH : OP_ALLOC_BATCH] += 10;
				weights[OP_FREE_ALL] =
					tm_rand_one_in(&round.rng, 3);
			}
			random_op(tm_rand_weighted(&round.rng, weights, OPS),
				  &round.rng);
			slab_model_compare(&model, &pool);
		}
		teardown();
	}
}

/* Classes of few and of many objects, as they lie in pages of each size. */
TEST_PAGE_SIZES(slab_random)
{
	struct tm_geometry g = tm_geometry(page_shift);

	for (u32 line = 64; line <= 128; line *= 2) {
		u32 classes = tm_slab_classes(g, line);
		u32 some[] = { classes - 1, classes / 2, 4, 3 };

		for (u32 i = 0; i < 4; i++)
			random_rounds(tm_slab_layout(g, tm_slab_class_size(
					some[i], line)),
				      2, 4000 >> (page_shift - 12));
	}
}

TEST(slab_random_odd_counts)
{
	static const u32 counts[] = { 1, 2, 3, 5, 63, 64, 65, 127, 129 };

	for (u32 i = 0; i < sizeof(counts) / sizeof(*counts); i++)
		random_rounds(of_objects(counts[i]), 3, 2000);
}

/*
 * Two slabs of three objects: every sequence of calls up to a depth. Frees are of
 * each object alone, and of each pair, the same one twice among them.
 */
static u64 sequences;

static void descend(u32 depth);

static void free_and_descend(const struct tm_slab_object *objects, u32 nr,
			     u32 depth)
{
	int err;

	tm_op("depth left %u: free %u, index %u first", depth, nr,
	      objects[0].index);
	err = slab_do_free(&model, &pool, objects, nr);
	if (err)
		slab_model_compare(&model, &pool);
	else
		descend(depth - 1);
}

static void descend(u32 depth)
{
	/* What of the model changes. */
	struct tm_slab_object objects[6];
	struct slab_snapshot here;
	bool used[2][3], in_pool[2];
	u32 nr = model.nr;
	u64 allocs = model.allocs, frees = model.frees;

	slab_model_compare(&model, &pool);
	sequences++;
	if (!depth)
		return;
	slab_snapshot_take(&here, &model, &pool);
	memcpy(objects, model.objects, sizeof(objects));
	memcpy(in_pool, model.in_pool, sizeof(in_pool));
	for (u32 s = 0; s < 2; s++)
		memcpy(used[s], model.used[s], sizeof(used[s]));
	for (u32 call = 0; call < 4 + 2 + 1 + nr + nr * nr; call++) {
		u32 n = call - 7;

		if (call < 4) {
			tm_op("depth left %u: alloc %u", depth, call + 1);
			if (!slab_do_alloc(&model, &pool, call + 1))
				descend(depth - 1);
		} else if (call < 6) {
			tm_op("depth left %u: add slab %u", depth, call - 4);
			if (!in_pool[call - 4]) {
				slab_do_add(&model, &pool, call - 4);
				descend(depth - 1);
			}
		} else if (call == 6) {
			tm_op("depth left %u: take an empty slab", depth);
			if (slab_do_take_empty(&model, &pool) >= 0)
				descend(depth - 1);
		} else if (n < nr) {
			free_and_descend(&objects[n], 1, depth);
		} else {
			struct tm_slab_object pair[] = {
				objects[(n - nr) / nr], objects[(n - nr) % nr],
			};

			free_and_descend(pair, 2, depth);
		}
		slab_snapshot_restore(&here, &model, &pool);
		memcpy(model.objects, objects, sizeof(objects));
		memcpy(model.in_pool, in_pool, sizeof(in_pool));
		for (u32 s = 0; s < 2; s++)
			memcpy(model.used[s], used[s], sizeof(used[s]));
		model.nr = nr;
		model.allocs = allocs;
		model.frees = frees;
	}
	slab_snapshot_drop(&here);
}

TEST(slab_every_sequence)
{
	setup(of_objects(3));
	descend(7);
	CHECK(sequences > 100000);
	teardown();
}

static void unlocked(void *which)
{
	struct tm_slab_object object = model.objects[0];

	lock.held = false;
	switch (*(int *)which) {
	case 0:
		tm_slab_add(&pool, model.slab[1]);
		break;
	case 1:
		(void)!tm_slab_take_empty(&pool);
		break;
	case 2:
		(void)!tm_slab_alloc(&pool, &object, 1);
		break;
	case 3:
		(void)!tm_slab_free(&pool, &object, 1);
		break;
	}
}

TEST(slab_calls_need_the_lock)
{
	static const char *const calls[] = {
		"add", "take_empty", "alloc", "free",
	};

	setup(of_objects(2));
	slab_do_add(&model, &pool, 0);
	CHECK_EQ(slab_do_alloc(&model, &pool, 1), 0);
	for (int i = 0; i < 4; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	teardown();
}
