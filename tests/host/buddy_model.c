// SPDX-License-Identifier: GPL-2.0-only
#include "buddy_model.h"

void buddy_model_init(struct buddy_model *model, struct tm_geometry g,
		      u32 nr_slots)
{
	CHECK(nr_slots <= BUDDY_MODEL_SLOTS);
	memset(model, 0, sizeof(*model));
	model->geometry = g;
	model->nr_slots = nr_slots;
}

u32 buddy_model_pages(const struct buddy_model *model)
{
	return TM_CHUNK_SIZE >> model->geometry.page_shift;
}

u32 buddy_model_chunks(const struct buddy_model *model)
{
	u32 n = 0;

	for (u32 v = 0; v < model->nr_slots; v++)
		n += model->in_pool[v];
	return n;
}

u32 buddy_model_used(const struct buddy_model *model)
{
	u32 n = 0;

	for (u32 v = 0; v < model->nr_slots; v++)
		for (u32 p = 0; p < buddy_model_pages(model); p++)
			n += model->used[v][p];
	return n;
}

bool buddy_model_empty(const struct buddy_model *model, struct tm_chunk_id id)
{
	for (u32 p = 0; p < buddy_model_pages(model); p++)
		if (model->used[id.v][p])
			return false;
	return model->in_pool[id.v];
}

enum tm_buddy_class buddy_model_class(const struct buddy_model *model, u32 v)
{
	if (model->drain[v])
		return TM_BUDDY_DRAINING;
	for (u32 p = 0; p < buddy_model_pages(model); p++)
		if (model->run[v][p] & 0x80)
			return TM_BUDDY_UNMOVABLE;
	return TM_BUDDY_MOVABLE;
}

bool buddy_model_arriving(const struct buddy_model *model, u32 v)
{
	for (u32 p = 0; p < buddy_model_pages(model); p++)
		if (model->run[v][p] & 0x40)
			return true;
	return false;
}

u32 buddy_model_find(const struct buddy_model *model, struct tm_page_id page)
{
	u32 i = 0;

	while (i < model->nr_runs && model->runs[i].page.v != page.v)
		i++;
	return i;
}

/* Order of the free run that page @p is in, -1 when it is not free. */
static int free_order(const struct buddy_model *model, u32 v, u32 p)
{
	int order = -1;

	if (!model->in_pool[v])
		return -1;
	for (u32 size = 1; size <= buddy_model_pages(model); size *= 2) {
		u32 start = p / size * size;

		for (u32 q = start; q < start + size; q++)
			if (model->used[v][q])
				return order;
		order++;
	}
	return order;
}

int buddy_model_largest(const struct buddy_model *model, struct tm_chunk_id id)
{
	int largest = -1;

	for (u32 p = 0; p < buddy_model_pages(model);) {
		int order = free_order(model, id.v, p);

		if (order > largest)
			largest = order;
		p += order > 0 ? 1u << order : 1;
	}
	return largest;
}

/* Order of the smallest free run of @order or more, -1 for none. */
static int smallest_fit(const struct buddy_model *model, u32 v,
			unsigned int order)
{
	int fit = -1;

	for (u32 p = 0; p < buddy_model_pages(model);) {
		int o = free_order(model, v, p);

		if (o >= (int)order && (fit < 0 || o < fit))
			fit = o;
		p += o > 0 ? 1u << o : 1;
	}
	return fit;
}

static void compare_chunk(const struct buddy_model *model,
			  const struct tm_buddy *buddy, u32 v)
{
	const struct tm_buddy_chunk *c = &buddy->chunks[v];
	struct tm_buddy_chunk want = { .in_pool = model->in_pool[v] };

	for (u32 p = 0; p < buddy_model_pages(model); p++) {
		if (model->run[v][p])
			want.used[(model->run[v][p] & 0x3f) - 1]++;
		want.unmovable += model->run[v][p] >= 0x80;
		want.arriving += model->run[v][p] >> 6 & 1;
	}
	CHECK(!memcmp(c->used, want.used, sizeof(want.used)));
	CHECK_EQ(c->unmovable, want.unmovable);
	CHECK_EQ(c->arriving, want.arriving);
	CHECK_EQ(c->class, buddy_model_class(model, v));
	CHECK_EQ(c->drain, model->drain[v]);
	CHECK_EQ(c->rest, model->rest[v]);

	for (u32 p = 0; p < buddy_model_pages(model);) {
		int o = free_order(model, v, p);
		u32 i;

		if (o < 0) {
			p++;
			continue;
		}
		i = p >> o;
		want.bits[buddy->word[o] + i / 64] |= 1ull << (i % 64);
		want.nr[o]++;
		want.orders |= 1u << o;
		p += 1u << o;
	}
	CHECK_EQ(c->in_pool, want.in_pool);
	CHECK_EQ(c->orders, want.orders);
	CHECK(!memcmp(c->nr, want.nr, sizeof(want.nr)));
	CHECK(!memcmp(c->bits, want.bits, sizeof(want.bits)));
	CHECK(!memcmp(c->run, model->run[v], sizeof(c->run)));
}

void buddy_model_compare(const struct buddy_model *model,
			 const struct tm_buddy *buddy)
{
	u32 chunks = buddy_model_chunks(model);
	u32 used = buddy_model_used(model);

	for (u32 v = 0; v < model->nr_slots; v++)
		compare_chunk(model, buddy, v);
	CHECK_EQ(buddy->nr_chunks, chunks);
	CHECK_EQ(buddy->free_pages, chunks * buddy_model_pages(model) - used);
	CHECK_EQ(tm_buddy_used_pages(buddy), used);
	CHECK_EQ(buddy->allocs, model->allocs);
	CHECK_EQ(buddy->frees, model->frees);
	CHECK_EQ(buddy->splits, model->splits);
	CHECK_EQ(buddy->merges, model->merges);
	CHECK_EQ(buddy->allocs - buddy->frees, model->nr_runs);
	CHECK_EQ(buddy->pass, model->pass);
	CHECK_EQ(buddy->drains, model->drains);
	CHECK_EQ(buddy->emptied, model->emptied);
	CHECK_EQ(buddy->halved, model->halved);
	CHECK_EQ(buddy->given_up, model->given_up);
	CHECK_EQ(buddy->starved, model->starved);
	CHECK_EQ(buddy->moved_runs, model->moved_runs);
	CHECK_EQ(buddy->moved_pages, model->moved_pages);
	CHECK_OK(tm_buddy_check(buddy));
}

void buddy_snapshot_take(struct buddy_snapshot *snapshot,
			 const struct tm_buddy *buddy)
{
	memcpy(&snapshot->buddy, buddy, sizeof(*buddy));
	memcpy(snapshot->chunks, buddy->chunks,
	       buddy->nr_slots * sizeof(*buddy->chunks));
}

bool buddy_snapshot_same(const struct buddy_snapshot *snapshot,
			 const struct tm_buddy *buddy)
{
	return !memcmp(&snapshot->buddy, buddy, sizeof(*buddy)) &&
	       !memcmp(snapshot->chunks, buddy->chunks,
		       buddy->nr_slots * sizeof(*buddy->chunks));
}

void buddy_snapshot_restore(const struct buddy_snapshot *snapshot,
			    struct tm_buddy *buddy)
{
	memcpy(buddy, &snapshot->buddy, sizeof(*buddy));
	memcpy(buddy->chunks, snapshot->chunks,
	       buddy->nr_slots * sizeof(*buddy->chunks));
}

void buddy_do_add(struct buddy_model *model, struct tm_buddy *buddy,
		  struct tm_chunk_id id)
{
	struct buddy_snapshot before;

	if (model->in_pool[id.v]) {
		buddy_snapshot_take(&before, buddy);
		tm_host_expect_warnings(1);
		tm_buddy_add_chunk(buddy, id);
		CHECK_EQ(tm_host_missing_warnings(), 0);
		CHECK(buddy_snapshot_same(&before, buddy));
		return;
	}
	tm_buddy_add_chunk(buddy, id);
	model->in_pool[id.v] = true;
}

int buddy_do_remove(struct buddy_model *model, struct tm_buddy *buddy,
		    struct tm_chunk_id id)
{
	bool empty = buddy_model_empty(model, id);
	struct buddy_snapshot before;
	int err;

	buddy_snapshot_take(&before, buddy);
	err = tm_buddy_remove_chunk(buddy, id);
	CHECK_EQ(err, empty ? 0 : -EBUSY);
	if (err) {
		CHECK(buddy_snapshot_same(&before, buddy));
	} else {
		model->in_pool[id.v] = false;
		model->emptied += model->drain[id.v] != 0;
		model->drain[id.v] = 0;
		model->rest[id.v] = 0;
	}
	return err;
}

/* What decides who serves an allocation. */
struct view {
	int class[BUDDY_MODEL_SLOTS];
	int largest[BUDDY_MODEL_SLOTS];
};

static void look(const struct buddy_model *model, struct view *view)
{
	for (u32 v = 0; v < model->nr_slots; v++) {
		view->class[v] = (int)buddy_model_class(model, v);
		view->largest[v] = buddy_model_largest(
			model, (struct tm_chunk_id){ v });
	}
}

/* Chunk @v is of @class, and its largest free run has @order to @most. */
static bool can_serve(const struct view *view, u32 v, int class,
		      unsigned int order, int most)
{
	return view->class[v] == class && view->largest[v] >= (int)order &&
	       view->largest[v] <= most;
}

/* The class that has to serve: the first of @classes that can; -1 for none. */
static int serving_class(const struct buddy_model *model,
			 const struct view *view, const int *classes, u32 nr,
			 unsigned int order, int most)
{
	for (u32 i = 0; i < nr; i++)
		for (u32 v = 0; v < model->nr_slots; v++)
			if (can_serve(view, v, classes[i], order, most))
				return classes[i];
	return -1;
}

static int chunk_order(const struct buddy_model *model)
{
	int order = 0;

	while (1u << order < buddy_model_pages(model))
		order++;
	return order;
}

/*
 * Of all chunks that may serve it, the one whose largest free run is smallest; but
 * a run that stays and comes to those that move takes of the largest.
 */
static int wanted_largest(const struct buddy_model *model,
			  const struct view *view, int class, int most,
			  unsigned int order, bool unmovable)
{
	bool intrudes = unmovable && class == TM_BUDDY_MOVABLE;
	int want = -1;

	for (u32 v = 0; v < model->nr_slots; v++) {
		if (!can_serve(view, v, class, order, most))
			continue;
		if (want < 0 || (intrudes ? view->largest[v] > want :
					    view->largest[v] < want))
			want = view->largest[v];
	}
	return want;
}

/* @view is what was before, and @class the one that has to serve. */
static void alloc_succeeded(struct buddy_model *model, const struct view *view,
			    int class, int most, unsigned int order,
			    bool unmovable, struct tm_page_id page)
{
	u32 pages = buddy_model_pages(model);
	u32 v = page.v / pages, first = page.v % pages;
	int found;

	CHECK(v < model->nr_slots);
	CHECK(model->in_pool[v]);
	CHECK(!(first & ((1u << order) - 1)));

	CHECK(can_serve(view, v, class, order, most));
	CHECK_EQ(view->largest[v], wanted_largest(model, view, class, most,
						  order, unmovable));
	if (class == TM_BUDDY_DRAINING) {
		model->drain[v] = 0;
		model->rest[v] = model->pass + 1;
		model->starved++;
	}
	/* In that chunk the smallest run that fits. */
	found = free_order(model, v, first);
	CHECK(found >= (int)order);
	CHECK_EQ(found, smallest_fit(model, v, order));

	for (u32 p = first; p < first + (1u << order); p++) {
		CHECK(!model->used[v][p]);
		model->used[v][p] = true;
	}
	model->run[v][first] = (u8)(order + 1 + (unmovable ? 0x80 : 0));
	CHECK(model->nr_runs < BUDDY_MODEL_RUNS);
	model->runs[model->nr_runs++] = (struct buddy_run){
		page, order, unmovable, false, ++model->last_id,
	};
	model->allocs++;
	model->splits += (u32)found - order;
}

static int do_alloc(struct buddy_model *model, struct tm_buddy *buddy,
		    unsigned int order, bool unmovable, struct tm_page_id *page)
{
	const int classes[] = {
		unmovable ? TM_BUDDY_UNMOVABLE : TM_BUDDY_MOVABLE,
		unmovable ? TM_BUDDY_MOVABLE : TM_BUDDY_UNMOVABLE,
		TM_BUDDY_DRAINING,
	};
	int most = chunk_order(model);
	struct buddy_snapshot before;
	int class, want = -ENOMEM, err;
	struct view view;

	look(model, &view);
	class = serving_class(model, &view, classes, 3, order, most);
	/* Whoever has a run of that order, draining or not, has to give it. */
	for (u32 v = 0; v < model->nr_slots; v++)
		if (view.largest[v] >= (int)order)
			want = 0;
	/* The largest run is half a chunk. */
	if (order >= 32 || 2ull << order > buddy_model_pages(model))
		want = -EINVAL;

	buddy_snapshot_take(&before, buddy);
	err = unmovable ? tm_buddy_alloc_unmovable(buddy, order, page) :
			  tm_buddy_alloc(buddy, order, page);
	CHECK_EQ(err, want);
	if (err)
		CHECK(buddy_snapshot_same(&before, buddy));
	else
		alloc_succeeded(model, &view, class, most, order, unmovable,
				*page);
	return err;
}

int buddy_do_alloc(struct buddy_model *model, struct tm_buddy *buddy,
		   unsigned int order, struct tm_page_id *page)
{
	return do_alloc(model, buddy, order, false, page);
}

int buddy_do_alloc_unmovable(struct buddy_model *model, struct tm_buddy *buddy,
			     unsigned int order, struct tm_page_id *page)
{
	return do_alloc(model, buddy, order, true, page);
}

/* Free the @nth run; @to is where it was moved, if it was. */
static bool do_free(struct buddy_model *model, struct tm_buddy *buddy, u32 nth,
		    const struct tm_page_id *to)
{
	struct buddy_run run = model->runs[nth];
	u32 pages = buddy_model_pages(model);
	u32 v = run.page.v / pages, first = run.page.v % pages;
	struct tm_chunk_id id = { v };
	bool empty;

	/* Set wrong beforehand, to see that it is written. */
	for (u32 p = first; p < first + (1u << run.order); p++)
		model->used[v][p] = false;
	empty = !buddy_model_empty(model, id);
	CHECK_EQ(to ? tm_buddy_drain_moved(buddy, run.page, *to, run.order,
					   &empty) :
		      tm_buddy_free(buddy, run.page, run.order, &empty), 0);
	CHECK_EQ(empty, buddy_model_empty(model, id));

	model->run[v][first] = 0;
	model->frees++;
	model->merges += (u32)free_order(model, v, first) - run.order;
	model->nr_runs--;
	memmove(&model->runs[nth], &model->runs[nth + 1],
		(model->nr_runs - nth) * sizeof(*model->runs));
	return empty;
}

bool buddy_do_free(struct buddy_model *model, struct tm_buddy *buddy, u32 nth)
{
	return do_free(model, buddy, nth, NULL);
}

void buddy_do_bad_free(const struct buddy_model *model, struct tm_buddy *buddy,
		       struct tm_page_id page, unsigned int order)
{
	struct buddy_snapshot before;
	bool empty = true;

	for (u32 i = 0; i < model->nr_runs; i++)
		CHECK(model->runs[i].page.v != page.v ||
		      model->runs[i].order != order);
	buddy_snapshot_take(&before, buddy);
	CHECK_EQ(tm_buddy_free(buddy, page, order, &empty), -EINVAL);
	CHECK(empty);
	CHECK(buddy_snapshot_same(&before, buddy));
}

int buddy_do_drain_begin(struct buddy_model *model, struct tm_buddy *buddy,
			 struct tm_chunk_id id, struct tm_buddy_drain *drain)
{
	struct buddy_snapshot before;
	int want = 0, err;

	if (id.v >= model->nr_slots || !model->in_pool[id.v] ||
	    buddy_model_empty(model, id))
		want = -EINVAL;
	else if (buddy_model_class(model, id.v) != TM_BUDDY_MOVABLE ||
		 buddy_model_arriving(model, id.v))
		want = -EBUSY;
	buddy_snapshot_take(&before, buddy);
	err = tm_buddy_drain_begin(buddy, id, drain);
	CHECK_EQ(err, want);
	if (err) {
		CHECK(buddy_snapshot_same(&before, buddy));
		return err;
	}
	CHECK_EQ(drain->id.v, id.v);
	model->drain[id.v] = ++model->drains;
	CHECK_EQ(drain->nr, model->drains);
	memset(model->named[id.v], 0, sizeof(model->named[id.v]));
	return 0;
}

static bool in_force(const struct buddy_model *model,
		     const struct tm_buddy_drain *drain)
{
	return model->drain[drain->id.v] == drain->nr;
}

void buddy_model_drain_half(struct buddy_model *model, u32 v)
{
	for (u32 p = 0; p < buddy_model_pages(model); p++)
		if (model->run[v][p] == chunk_order(model))
			model->named[v][p] = true;
}

void buddy_do_drain_half(struct buddy_model *model, struct tm_buddy *buddy,
			 struct tm_buddy_drain *drain)
{
	struct buddy_snapshot before;

	buddy_snapshot_take(&before, buddy);
	tm_buddy_drain_half(buddy, drain);
	CHECK(buddy_snapshot_same(&before, buddy));
	CHECK(drain->half);
	buddy_model_drain_half(model, drain->id.v);
}

int buddy_do_drain_next(struct buddy_model *model, struct tm_buddy *buddy,
			struct tm_buddy_drain *drain, struct tm_page_id *page,
			unsigned int *order)
{
	u32 v = drain->id.v, best = 0, first = 0;
	struct buddy_snapshot before;
	int err;

	/* The first of the largest that was not named. */
	for (u32 p = 0; p < buddy_model_pages(model); p++)
		if (!model->named[v][p] && model->run[v][p] > best) {
			best = model->run[v][p];
			first = p;
		}
	if (!in_force(model, drain))
		best = 0;
	buddy_snapshot_take(&before, buddy);
	err = tm_buddy_drain_next(buddy, drain, page, order);
	CHECK_EQ(err, best ? 0 : -ENOENT);
	if (err && in_force(model, drain) && drain->half) {
		model->halved++;
		model->drain[v] = 0;
		model->rest[v] = model->pass + 1;
		return err;
	}
	CHECK(buddy_snapshot_same(&before, buddy));
	if (err)
		return err;
	CHECK_EQ(page->v, v * buddy_model_pages(model) + first);
	CHECK_EQ(*order, best - 1);
	model->named[v][first] = true;
	return 0;
}

int buddy_do_drain_alloc(struct buddy_model *model, struct tm_buddy *buddy,
			 const struct tm_buddy_drain *drain,
			 unsigned int order, struct tm_page_id *page)
{
	const int classes[] = { TM_BUDDY_MOVABLE, TM_BUDDY_UNMOVABLE };
	int most = chunk_order(model) - 1;
	struct buddy_snapshot before;
	int class, want, err;
	struct view view;

	look(model, &view);
	class = serving_class(model, &view, classes, 2, order, most);
	want = class < 0 ? -ENOMEM : 0;
	if (!in_force(model, drain))
		want = -ENOENT;
	if (order > (unsigned int)most)
		want = -EINVAL;
	buddy_snapshot_take(&before, buddy);
	err = tm_buddy_drain_alloc(buddy, drain, order, page);
	CHECK_EQ(err, want);
	if (!err) {
		struct buddy_run *run = &model->runs[model->nr_runs];
		u32 pages = buddy_model_pages(model);

		alloc_succeeded(model, &view, class, most, order, false, *page);
		run->arriving = true;
		model->run[page->v / pages][page->v % pages] |= 0x40;
	} else if (err == -ENOMEM) {
		model->starved++;
		model->drain[drain->id.v] = 0;
		model->rest[drain->id.v] = model->pass + 1;
	} else {
		CHECK(buddy_snapshot_same(&before, buddy));
	}
	return err;
}

bool buddy_do_drain_moved(struct buddy_model *model, struct tm_buddy *buddy,
			  u32 from, u32 to)
{
	u32 pages = buddy_model_pages(model);
	struct tm_page_id page = model->runs[to].page;

	CHECK(model->runs[to].arriving);
	CHECK_EQ(model->runs[to].order, model->runs[from].order);
	model->runs[to].arriving = false;
	model->run[page.v / pages][page.v % pages] &= 0x3f;
	model->moved_runs++;
	model->moved_pages += 1u << model->runs[from].order;
	return do_free(model, buddy, from, &page);
}

void buddy_do_drain_cancel(struct buddy_model *model, struct tm_buddy *buddy,
			   const struct tm_buddy_drain *drain)
{
	struct buddy_snapshot before;

	buddy_snapshot_take(&before, buddy);
	tm_buddy_drain_cancel(buddy, drain);
	if (!in_force(model, drain)) {
		CHECK(buddy_snapshot_same(&before, buddy));
		return;
	}
	model->given_up++;
	model->drain[drain->id.v] = 0;
	model->rest[drain->id.v] = model->pass + 8;
}
