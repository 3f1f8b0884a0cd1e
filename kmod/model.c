// SPDX-License-Identifier: GPL-2.0-only
/*
 * Model slots: names, and what becomes of their generations. The core decides; what
 * a generation is made of, and whom to tell, is here. What it hands back is freed
 * after its lock has been dropped.
 */
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/workqueue.h>
#include <uapi/linux/tensormem.h>

#include "client.h"
#include "event.h"
#include "memory.h"
#include "model.h"
#include "model_cached.h"
#include "model_evict.h"
#include "model_inode.h"
#include "model_sysfs.h"
#include "model_watch.h"
#include "pages.h"
#include "quarantine.h"
#include "trace.h"

/* What users can leave behind is bounded. */
#define TM_MODELS_MAX	4096

/* Of our own: a slot may end in its work, and until that returns the module stays. */
static struct workqueue_struct *tm_model_queue;
static DEFINE_MUTEX(tm_models_mutex);
static LIST_HEAD(tm_models);
static atomic64_t tm_nr_models = ATOMIC64_INIT(0);
static atomic64_t tm_nr_gens = ATOMIC64_INIT(0);
static atomic64_t tm_nr_model_pages = ATOMIC64_INIT(0);

/* What all slots hold together; each value is exact. */
void tm_model_totals(struct tm_model_totals *totals)
{
	totals->slots = atomic64_read(&tm_nr_models);
	totals->generations = atomic64_read(&tm_nr_gens);
	totals->held = (u64)atomic64_read(&tm_nr_model_pages) << PAGE_SHIFT;
}

/* Pages of pieces have been taken, or given back. Context: any. */
void tm_model_count_held(s64 pages)
{
	atomic64_add(pages, &tm_nr_model_pages);
}

/**
 * tm_model_piece_create - make a piece of memory that has been filled
 * @client: who is charged for it
 * @memory: it; consumed unless this fails
 *
 * Context: may sleep. Return: the piece, or NULL when memory is short.
 */
struct tm_model_piece *tm_model_piece_create(struct tm_client *client,
					     struct tm_memory *memory)
{
	struct tm_model_piece *piece = kzalloc(sizeof(*piece), TM_GFP);

	if (!piece)
		return NULL;
	tm_piece_init(&piece->core, memory->nr_pages);
	piece->memory = memory;
	piece->client = tm_client_get(client);
	INIT_LIST_HEAD(&piece->lru);
	tm_model_count_held(memory->nr_pages);
	return piece;
}

/* Context: may sleep; no generation has it, so none of its pages is mapped. */
void tm_model_piece_destroy(struct tm_model_piece *piece)
{
	tm_model_evict_leave(piece);
	if (piece->memory) {
		tm_model_count_held(-(s64)piece->core.pages);
		tm_quarantine_put(piece->client, piece->memory);
	}
	tm_client_put(piece->client);
	kfree(piece);
}

/* A cached one has none: it stays in its file. */
static u32 tm_model_pieces(u64 size, u32 flags)
{
	return flags & TENSORMEM_MODEL_CACHED ?
	       0 : DIV_ROUND_UP_ULL(size, TM_CHUNK_SIZE);
}

/**
 * tm_model_gen_create - make a generation that nobody knows of yet
 * @model: of which slot
 * @client: who pays
 * @size: bytes; what is loaded whole is no more than the pools could hold
 * @flags: TENSORMEM_MODEL_CACHED and the others
 *
 * Context: may sleep. Return: it, or an ERR_PTR: -ENOMEM.
 */
struct tm_model_gen *tm_model_gen_create(struct tm_model *model,
					 struct tm_client *client, u64 size,
					 u32 flags)
{
	u32 pieces = tm_model_pieces(size, flags);
	struct tm_model_gen *gen = kzalloc(sizeof(*gen), TM_GFP);
	struct tm_piece **piece = NULL;
	int err = -ENOMEM;

	if (!gen)
		return ERR_PTR(-ENOMEM);
	if (pieces) {
		piece = kvcalloc(pieces, sizeof(struct tm_piece *), TM_GFP);
		if (!piece)
			goto err;
	}
	gen->inode = tm_model_inode(0444, &tm_model_gen_inode);
	if (IS_ERR(gen->inode)) {
		err = PTR_ERR(gen->inode);
		goto err;
	}
	i_size_write(gen->inode, size);
	tm_generation_init(&gen->core, piece, pieces);
	tm_model_sysfs_gen(&gen->kobj);
	kobject_get(&model->kobj);
	gen->model = model;
	gen->client = tm_client_get(client);
	gen->size = size;
	gen->flags = flags;
	gen->usable = -EAGAIN;
	atomic64_inc(&tm_nr_gens);
	return gen;
err:
	kvfree(piece);
	kfree(gen);
	return ERR_PTR(err);
}

/**
 * tm_model_gen_discard - free a generation that has no pieces and no descriptor
 * @gen: what to free; consumed
 *
 * Context: may sleep; under no lock of a slot's, which who reads its files takes.
 */
void tm_model_gen_discard(struct tm_model_gen *gen)
{
	if (gen->kobj.state_in_sysfs)
		kobject_del(&gen->kobj);
	if (gen->cached)
		tm_model_cached_destroy(gen->cached);
	if (gen->evict)
		tm_model_evict_destroy(gen->evict);
	kvfree(gen->core.piece);
	tm_model_inode_put(gen->inode);
	tm_client_put(gen->client);
	atomic64_dec(&tm_nr_gens);
	kobject_put(&gen->kobj);
}

/* Tell who listens. Under the slot's lock the order is that of what happened. */
static void tm_model_tell(const struct tm_model *model,
			  enum tensormem_nl_command kind, u64 number, u64 size,
			  int error)
{
	tm_event_slot(kind, kobject_name(&model->kobj), number, size, error);
}

static void tm_model_free(struct tm_model *model, struct tm_slot_dead dead)
{
	/* Before its pieces go: nobody is to bring one in. */
	for (struct tm_generation *core = dead.generations; core;
	     core = core->next)
		if (tm_model_gen(core)->evict)
			tm_model_evict_end(tm_model_gen(core)->evict);
	while (dead.pieces) {
		struct tm_piece *piece = dead.pieces;

		dead.pieces = piece->next;
		tm_model_piece_destroy(container_of(piece, struct tm_model_piece,
						    core));
	}
	while (dead.generations) {
		struct tm_model_gen *gen = tm_model_gen(dead.generations);

		u64 number = gen->core.number;

		dead.generations = gen->core.next;
		trace_tensormem_model_retire(kobject_name(&model->kobj),
					     number);
		tm_model_gen_discard(gen);
		tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_RETIRED, number,
			      0, 0);
	}
}

/* Unlock @model and free what nobody has any more. Return: whether there was any. */
static bool tm_model_unlock(struct tm_model *model)
{
	struct tm_slot_dead dead;

	tm_slot_bury(&model->slot, &model->dead);
	dead = model->dead;
	model->dead = (struct tm_slot_dead){ 0 };
	up_write(&model->lock);
	tm_model_free(model, dead);
	return dead.generations || dead.pieces;
}

/* A commit has left what it let go of to this: it is to be as fast for any model. */
static void tm_model_reap(struct work_struct *work)
{
	struct tm_model *model = container_of(work, struct tm_model, reap.work);

	down_write(&model->lock);
	tm_model_unlock(model);
	tm_model_put(model);
}

/* Unlock @model and free what nobody has any more when the caller has gone on. */
static void tm_model_unlock_later(struct tm_model *model)
{
	bool any = model->dead.generations || model->dead.pieces;

	if (any)
		kobject_get(&model->kobj);
	up_write(&model->lock);
	if (any && !queue_delayed_work(tm_model_queue, &model->reap, 1))
		tm_model_put(model);
}

/* Tell everybody that something has become of a generation. */
static void tm_model_wake(struct tm_model *model)
{
	wake_up_poll(&model->wait, EPOLLIN | EPOLLPRI | EPOLLERR | EPOLLHUP);
}

/**
 * tm_models_init - before any slot is opened
 *
 * Context: may sleep. Return: 0 or -ENOMEM.
 */
int __init tm_models_init(void)
{
	int err = tm_model_watch_init();

	if (err)
		return err;
	tm_model_queue = alloc_workqueue("tensormem-model", WQ_UNBOUND, 0);
	if (tm_model_queue)
		return 0;
	tm_model_watch_exit();
	return -ENOMEM;
}

/* Context: may sleep; there is no slot any more. */
void tm_models_exit(void)
{
	destroy_workqueue(tm_model_queue);
	tm_model_watch_exit();
}

/**
 * tm_models_start - make the folder of all slots
 * @device: the device's
 *
 * Without memory for it the first slot tries again: the device cannot be taken back,
 * it may be open by now.
 *
 * Context: may sleep.
 */
void tm_models_start(struct kobject *device)
{
	mutex_lock(&tm_models_mutex);
	if (tm_model_sysfs_start(device))
		pr_warn("tensormem: no memory for the folder of model slots\n");
	mutex_unlock(&tm_models_mutex);
}

static struct tm_model *tm_model_find(const char *name)
{
	struct tm_model *model;

	lockdep_assert_held(&tm_models_mutex);
	list_for_each_entry(model, &tm_models, all)
		if (!strcmp(kobject_name(&model->kobj), name))
			return model;
	return NULL;
}

/* A slot that is on no list yet, and its folder. Return: it or an ERR_PTR. */
static struct tm_model *tm_model_create(struct kobject *device,
					const char *name, umode_t mode)
{
	struct tm_model *model;
	int err;

	err = tm_model_sysfs_start(device);
	if (err)
		return ERR_PTR(err);
	model = kzalloc(sizeof(*model), TM_GFP);
	if (!model)
		return ERR_PTR(-ENOMEM);
	model->inode = tm_model_inode(mode, &tm_model_slot_inode);
	if (IS_ERR(model->inode)) {
		err = PTR_ERR(model->inode);
		kfree(model);
		return ERR_PTR(err);
	}
	mutex_init(&model->staging);
	init_rwsem(&model->lock);
	tm_slot_init(&model->slot, &model->lock);
	init_waitqueue_head(&model->wait);
	INIT_DELAYED_WORK(&model->reap, tm_model_reap);
	err = tm_model_sysfs_add(&model->kobj, name);
	if (err) {
		tm_model_put(model);
		return ERR_PTR(err);
	}
	return model;
}

/* Context: may sleep when it was the last reference. */
void tm_model_put(struct tm_model *model)
{
	kobject_put(&model->kobj);
}

static struct file *tm_model_make(struct kobject *device, const char *name,
				  umode_t mode, tm_model_opener opener,
				  void *data)
{
	struct tm_model *model;
	struct file *file;

	if (atomic64_read(&tm_nr_models) >= TM_MODELS_MAX)
		return ERR_PTR(-ENOSPC);
	model = tm_model_create(device, name, mode);
	if (IS_ERR(model))
		return ERR_CAST(model);
	file = opener(model, data, true);
	if (IS_ERR(file)) {
		kobject_del(&model->kobj);
		tm_model_put(model);
		return file;
	}
	list_add_tail(&model->all, &tm_models);
	atomic64_inc(&tm_nr_models);
	return file;
}

/**
 * tm_model_open - open a slot, or make it
 * @device: the device; its folder is where slots have theirs
 * @name: the slot's
 * @flags: TENSORMEM_MODEL_CREATE, _EXCL
 * @mode: its permissions if it is made
 * @opener: makes the descriptor; it gets no reference of its own
 * @data: for @opener
 *
 * Context: may sleep. Return: the descriptor or an ERR_PTR: -ENOENT, -EEXIST, -EINTR,
 * -ENOMEM, -ENOSPC for too many slots, or what @opener returned.
 */
struct file *tm_model_open(struct kobject *device, const char *name, u32 flags,
			   umode_t mode, tm_model_opener opener, void *data)
{
	struct tm_model *model;
	struct file *file;

	if (mutex_lock_killable(&tm_models_mutex))
		return ERR_PTR(-EINTR);
	model = tm_model_find(name);
	if (model)
		file = flags & TENSORMEM_MODEL_EXCL ?
		       ERR_PTR(-EEXIST) : opener(model, data, false);
	else
		file = flags & TENSORMEM_MODEL_CREATE ?
		       tm_model_make(device, name, mode, opener, data) :
		       ERR_PTR(-ENOENT);
	mutex_unlock(&tm_models_mutex);
	return file;
}

/* What was not loaded never will be. */
static void tm_model_spoil(struct tm_model_gen *gen)
{
	lockdep_assert_held_write(&gen->model->lock);
	if (gen->usable)
		WRITE_ONCE(gen->usable, -ESTALE);
	if (gen->loader)
		send_sig(SIGKILL, gen->loader, 1);
}

/**
 * tm_model_next - the number that the next generation will have
 * @model: the slot
 *
 * Context: may sleep.
 */
u64 tm_model_next(struct tm_model *model)
{
	u64 number;

	down_read(&model->lock);
	number = model->slot.last + 1;
	up_read(&model->lock);
	return number;
}

/**
 * tm_model_may_stage - whether a generation could be staged now
 * @model: the slot
 *
 * Context: may sleep. Return: 0, -ENOENT when it was removed, -EBUSY.
 */
int tm_model_may_stage(struct tm_model *model)
{
	int err = 0;

	down_read(&model->lock);
	if (model->slot.removed)
		err = -ENOENT;
	else if (model->slot.staged)
		err = -EBUSY;
	up_read(&model->lock);
	return err;
}

/*
 * What a load may share with, held for it; NULL: nothing. What is evictable neither takes nor
 * lends: a piece would have to come back for readers of a generation whose file has gone.
 */
static struct tm_model_gen *tm_model_base(struct tm_slot *slot,
					  const struct tm_model_gen *gen)
{
	if (!slot->active || !slot->active->nr_pieces ||
	    !gen->core.max_pieces || gen->evict ||
	    tm_model_gen(slot->active)->evict)
		return NULL;
	tm_slot_hold(slot, slot->active);
	return tm_model_gen(slot->active);
}

/**
 * tm_model_stage - put a generation into its slot
 * @gen: the generation; from now on held by its loader and by a descriptor as well
 * @number: what the caller has been told its number would be
 * @loader: the thread that will load it
 * @stager: the descriptor
 * @base: what it may share with, held for the loader, or NULL
 *
 * Context: may sleep. Return: 0, -ENOENT when the slot was removed, -EBUSY while another
 * is staged, -ESTALE when the number is another by now, -EINTR, -ENOMEM.
 */
int tm_model_stage(struct tm_model_gen *gen, u64 number,
		   struct task_struct *loader, const struct file *stager,
		   struct tm_model_gen **base)
{
	struct tm_model *model = gen->model;
	int err;

	/* Folders come and go without the slot's lock, which their readers take. */
	if (mutex_lock_killable(&model->staging))
		return -EINTR;
	err = tm_model_may_stage(model);
	if (!err && tm_model_next(model) != number)
		err = -ESTALE;
	if (!err)
		err = kobject_add(&gen->kobj, &model->kobj, "%llu", number);
	if (!err) {
		down_write(&model->lock);
		err = tm_slot_stage(&model->slot, &gen->core);
		if (!err) {
			tm_slot_hold(&model->slot, &gen->core);
			tm_slot_hold(&model->slot, &gen->core);
			gen->loader = loader;
			gen->stager = stager;
			*base = tm_model_base(&model->slot, gen);
			tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_STAGED,
				      number, gen->size, 0);
		}
		up_write(&model->lock);
	}
	mutex_unlock(&model->staging);
	if (!err)
		trace_tensormem_model_stage(kobject_name(&model->kobj), number,
					    gen->size);
	return err;
}

/* Give @gen its next piece. Context: may sleep. Return: 0, -ECANCELED when it is aborted. */
int tm_model_add(struct tm_model_gen *gen, struct tm_model_piece *piece)
{
	int err;

	down_write(&gen->model->lock);
	err = tm_slot_add(&gen->model->slot, &gen->core, &piece->core);
	up_write(&gen->model->lock);
	return err;
}

/* Its next piece is that of @base. Context, Return: as tm_model_add(). */
int tm_model_share(struct tm_model_gen *gen, const struct tm_model_gen *base)
{
	int err;

	down_write(&gen->model->lock);
	err = tm_slot_share(&gen->model->slot, &gen->core, &base->core);
	up_write(&gen->model->lock);
	return err;
}

/**
 * tm_model_forget - let the previous generation go, for its memory
 * @model: the slot
 *
 * Context: may sleep. Return: whether there may be more memory now.
 */
bool tm_model_forget(struct tm_model *model)
{
	bool any;

	down_write(&model->lock);
	any = tm_slot_forget(&model->slot, &model->dead);
	any |= tm_model_unlock(model);
	tm_model_wake(model);
	return any;
}

/**
 * tm_model_fail - a generation cannot be used any more
 * @gen: the generation; it may not have been staged yet
 * @error: why
 *
 * Context: may sleep.
 */
void tm_model_fail(struct tm_model_gen *gen, int error)
{
	struct tm_model *model = gen->model;

	down_write(&model->lock);
	/* Who stages it will find out. */
	if (gen->core.number) {
		/* What fails while it is loaded is told at the end of that. */
		bool tell = !gen->core.error && !gen->loader;

		tm_slot_fail(&model->slot, &gen->core, error, &model->dead);
		WRITE_ONCE(gen->usable, -ESTALE);
		if (tell)
			tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_FAILED,
				      gen->core.number, gen->size, error);
	}
	up_write(&model->lock);
	tm_model_wake(model);
}

/* All of @gen is loaded. */
static void tm_model_publish(struct tm_model_gen *gen)
{
	if (tm_slot_loaded(&gen->model->slot, &gen->core))
		return;
	if (gen->evict)
		tm_model_evict_join(gen);
	/* Pairs with tm_model_usable(). */
	smp_store_release(&gen->usable, 0);
}

/* Who aborted it has told that. */
static void tm_model_tell_load(const struct tm_model_gen *gen)
{
	int error = gen->core.error;

	if (error != -ECANCELED)
		tm_model_tell(gen->model,
			      error ? TENSORMEM_NL_EVENT_SLOT_FAILED :
				      TENSORMEM_NL_EVENT_SLOT_READY,
			      gen->core.number, gen->size, error);
}

/**
 * tm_model_finish - a load has ended
 * @gen: what was loaded; the loader has it no more
 * @base: what it shared with; the loader has it no more; or NULL
 * @error: 0 or why it failed
 *
 * Context: may sleep.
 */
void tm_model_finish(struct tm_model_gen *gen, struct tm_model_gen *base,
		     int error)
{
	struct tm_model *model = gen->model;

	/* The generation may be the last that has the slot. */
	kobject_get(&model->kobj);
	down_write(&model->lock);
	gen->loader = NULL;
	if (error)
		tm_slot_fail(&model->slot, &gen->core, error, &model->dead);
	else
		tm_model_publish(gen);
	tm_model_spoil(gen);
	trace_tensormem_model_load(kobject_name(&model->kobj), gen->core.number,
				   gen->size, gen->core.error);
	tm_model_tell_load(gen);
	if (base)
		tm_slot_release(&model->slot, &base->core, &model->dead);
	tm_slot_release(&model->slot, &gen->core, &model->dead);
	tm_model_unlock(model);
	tm_model_wake(model);
	tm_model_put(model);
}

/**
 * tm_model_acquire - find a generation and hold it
 * @model: the slot
 * @number: which; 0: the active one
 * @staged: it may be the staged one
 *
 * Context: may sleep. Return: it, for tm_model_release(), or an ERR_PTR: -ENOENT,
 * -EACCES, -EINTR.
 */
struct tm_model_gen *tm_model_acquire(struct tm_model *model, u64 number,
				      bool staged)
{
	struct tm_generation *core;
	int err = 0;

	if (down_write_killable(&model->lock))
		return ERR_PTR(-EINTR);
	core = tm_slot_find(&model->slot, number);
	if (!core)
		err = -ENOENT;
	else if (core == model->slot.staged && !staged)
		err = -EACCES;
	else
		tm_slot_hold(&model->slot, core);
	up_write(&model->lock);
	return err ? ERR_PTR(err) : tm_model_gen(core);
}

/* Whether @gen goes with its stager: what KEEP keeps is loaded. */
static bool tm_model_forsaken(const struct tm_model_gen *gen)
{
	return &gen->core == gen->model->slot.staged &&
	       !(gen->core.state == TM_GENERATION_STAGED &&
		 gen->flags & TENSORMEM_MODEL_KEEP);
}

/**
 * tm_model_release - undo tm_model_acquire(), or end a descriptor of tm_model_stage()
 * @gen: the generation
 * @file: the descriptor that ends, or NULL; that of its stager aborts it
 *
 * Context: may sleep.
 */
void tm_model_release(struct tm_model_gen *gen, const struct file *file)
{
	struct tm_model *model = gen->model;
	u64 number = gen->core.number;
	bool abort = false;

	kobject_get(&model->kobj);
	down_write(&model->lock);
	if (file && file == gen->stager) {
		/* Another descriptor may get its address. */
		gen->stager = NULL;
		abort = tm_model_forsaken(gen) &&
			!tm_slot_abort(&model->slot, number, &model->dead);
	}
	if (abort) {
		tm_model_spoil(gen);
		tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_ABORTED, number,
			      0, 0);
	}
	tm_slot_release(&model->slot, &gen->core, &model->dead);
	tm_model_unlock(model);
	if (abort) {
		trace_tensormem_model_abort(kobject_name(&model->kobj), number);
		tm_model_wake(model);
	}
	tm_model_put(model);
}

/**
 * tm_model_commit - make the staged generation the active one
 * @model: the slot
 * @number: which it is
 *
 * In the same time for any model: what it lets go of is freed by others.
 *
 * Context: may sleep. Return: 0, -ENOENT, -EAGAIN, -ESTALE, -EINTR.
 */
int tm_model_commit(struct tm_model *model, u64 number)
{
	int err;

	if (down_write_killable(&model->lock))
		return -EINTR;
	err = tm_slot_commit(&model->slot, number, &model->dead);
	if (!err)
		tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_COMMITTED, number,
			      0, 0);
	tm_model_unlock_later(model);
	if (err)
		return err;
	trace_tensormem_model_commit(kobject_name(&model->kobj), number);
	tm_model_wake(model);
	return 0;
}

/**
 * tm_model_abort - give up the staged generation
 * @model: the slot
 * @number: which it is
 *
 * Its loader is told to stop, and not waited for.
 *
 * Context: may sleep. Return: 0, -ENOENT, -EINTR.
 */
int tm_model_abort(struct tm_model *model, u64 number)
{
	struct tm_generation *staged;
	int err;

	if (down_write_killable(&model->lock))
		return -EINTR;
	staged = model->slot.staged;
	err = tm_slot_abort(&model->slot, number, &model->dead);
	if (!err) {
		tm_model_spoil(tm_model_gen(staged));
		tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_ABORTED, number,
			      0, 0);
	}
	tm_model_unlock(model);
	if (err)
		return err;
	trace_tensormem_model_abort(kobject_name(&model->kobj), number);
	tm_model_wake(model);
	return 0;
}

/**
 * tm_model_rollback - make the previous generation the active one again
 * @model: the slot
 * @number: which it is
 *
 * Context: may sleep. Return: 0, -ENOENT, -ESTALE, -EINTR.
 */
int tm_model_rollback(struct tm_model *model, u64 number)
{
	int err;

	if (down_write_killable(&model->lock))
		return -EINTR;
	err = tm_slot_rollback(&model->slot, number, &model->dead);
	if (!err)
		tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_ROLLED_BACK,
			      model->slot.active->number, 0, 0);
	tm_model_unlock_later(model);
	if (err)
		return err;
	trace_tensormem_model_rollback(kobject_name(&model->kobj), number);
	tm_model_wake(model);
	return 0;
}

/**
 * tm_model_remove - take a slot away
 * @model: the slot; the caller has a reference of its own
 *
 * Context: may sleep. Return: 0, -ENOENT when it was removed, -EINTR.
 */
int tm_model_remove(struct tm_model *model)
{
	struct tm_generation *staged;
	int err = 0;

	if (mutex_lock_killable(&tm_models_mutex))
		return -EINTR;
	mutex_lock(&model->staging);
	down_write(&model->lock);
	staged = model->slot.staged;
	if (model->slot.removed)
		err = -ENOENT;
	else
		tm_slot_remove(&model->slot, &model->dead);
	if (!err)
		tm_model_tell(model, TENSORMEM_NL_EVENT_SLOT_REMOVED, 0, 0, 0);
	if (!err && staged)
		tm_model_spoil(tm_model_gen(staged));
	up_write(&model->lock);
	if (!err) {
		list_del(&model->all);
		kobject_del(&model->kobj);
	}
	mutex_unlock(&model->staging);
	mutex_unlock(&tm_models_mutex);
	if (err)
		return err;
	/* Now: nothing of a slot that is gone is to keep the module. */
	if (cancel_delayed_work_sync(&model->reap))
		tm_model_put(model);
	down_write(&model->lock);
	tm_model_unlock(model);
	atomic64_dec(&tm_nr_models);
	tm_model_wake(model);
	tm_model_put(model);
	return 0;
}

/**
 * tm_model_usage - what a generation takes
 * @gen: the generation
 * @usage: in pages
 *
 * Context: may sleep.
 */
void tm_model_usage(struct tm_model_gen *gen, struct tm_slot_usage *usage)
{
	struct tm_model *model = gen->model;
	struct tm_model_evict_stats stats;

	down_write(&model->lock);
	/* What nobody has any more is nobody's share either. */
	tm_slot_bury(&model->slot, &model->dead);
	downgrade_write(&model->lock);
	tm_slot_usage(&model->slot, &gen->core, usage);
	up_read(&model->lock);
	tm_model_evict_gen_stats(gen, &stats);
	usage->own -= min(usage->own, stats.evicted >> PAGE_SHIFT);
}
