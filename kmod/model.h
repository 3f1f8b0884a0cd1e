/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_H
#define TM_MODEL_H

#include <linux/atomic.h>
#include <linux/kobject.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "core/slot.h"

struct file;
struct inode;
struct task_struct;
struct tm_client;
struct tm_memory;
struct tm_model_cached;
struct tm_model_evict;
struct tm_model_gen;

/**
 * struct tm_model - a model slot
 * @kobj: its name and its folder in sysfs; counts who has the struct: the list of
 *        all while the slot exists, each descriptor, each generation
 * @staging: one at a time, with a folder made for it; none once the slot is removed
 * @lock: guards @slot, and of its generations what says so
 * @slot: which generations it has
 * @dead: what nobody has any more and nobody has freed yet; under @lock
 * @reap: frees it
 * @inode: owner, group and mode; that of all descriptors
 * @wait: woken when something becomes of a generation
 * @all: on the list of all slots
 */
struct tm_model {
	struct kobject kobj;
	struct mutex staging;
	struct rw_semaphore lock;
	struct tm_slot slot;
	struct tm_slot_dead dead;
	struct delayed_work reap;
	struct inode *inode;
	wait_queue_head_t wait;
	struct list_head all;
};

/**
 * struct tm_model_piece - memory that generations of a slot may share
 * @core: who has it
 * @memory: a whole chunk, or the runs of a tail
 * @client: who pays for it
 *
 * Of an evictable generation (model_evict.c):
 * @gen: which, once it is loaded; else NULL
 * @index: where in it
 * @crc: of its bytes
 * @mapped: somebody may have it mapped; under the invalidate_lock of the generation's inode
 * @pins: who reads it right now; more only under that lock
 * @coming: a bit for who brings it in
 * @lru: in order of use while it is in memory and may go
 *
 * There @memory is NULL while the piece is in its file only, and changes under that lock.
 */
struct tm_model_piece {
	struct tm_piece core;
	struct tm_memory *memory;
	struct tm_client *client;
	struct tm_model_gen *gen;
	u32 index;
	u32 crc;
	bool mapped;
	atomic_t pins;
	unsigned long coming;
	struct list_head lru;
};

/**
 * struct tm_model_gen - a generation
 * @core: its number, state and pieces; under the slot's lock, the pieces of one
 *        that is usable under none
 * @kobj: its folder in sysfs; counts who has the struct
 * @model: its slot
 * @client: who pays for what it does not share
 * @inode: that of all its descriptors
 * @cached: its file, or NULL when it is resident
 * @evict: what makes it evictable, or NULL
 * @size: bytes of the model
 * @flags: TENSORMEM_MODEL_CACHED and the others it was staged with
 * @loaded: bytes of it that are loaded; written by its loader
 * @usable: 0 when it can be read, -EAGAIN while it is being loaded, -ESTALE when it
 *          cannot (any more); written under the slot's lock
 * @readers: its descriptors
 * @loader: the thread that loads it, or NULL; under the slot's lock
 * @stager: the descriptor whose end aborts it, until then; under the slot's lock
 */
struct tm_model_gen {
	struct tm_generation core;
	struct kobject kobj;
	struct tm_model *model;
	struct tm_client *client;
	struct inode *inode;
	struct tm_model_cached *cached;
	struct tm_model_evict *evict;
	u64 size;
	u32 flags;
	u64 loaded;
	int usable;
	atomic_t readers;
	struct task_struct *loader;
	const struct file *stager;
};

struct tm_model_totals {
	u64 slots;
	u64 generations;
	u64 held;
};

static inline struct tm_model_gen *tm_model_gen(struct tm_generation *core)
{
	return container_of(core, struct tm_model_gen, core);
}

static inline struct tm_model_piece *
tm_model_piece(const struct tm_generation *core, u32 index)
{
	return container_of(core->piece[index], struct tm_model_piece, core);
}

/* Whether @gen can be read. Context: any. Return: 0, -EAGAIN or -ESTALE. */
static inline int tm_model_usable(const struct tm_model_gen *gen)
{
	/* Pairs with tm_model_publish(): who reads 0 sees all pieces. */
	return smp_load_acquire(&gen->usable);
}

/* Makes a descriptor of a slot; @made: the slot is new. Return: it or an ERR_PTR. */
typedef struct file *(*tm_model_opener)(struct tm_model *model, void *data,
					bool made);

int __must_check tm_models_init(void);
void tm_models_exit(void);
void tm_models_start(struct kobject *device);
struct file *tm_model_open(struct kobject *device, const char *name, u32 flags,
			   umode_t mode, tm_model_opener opener, void *data);
void tm_model_put(struct tm_model *model);
void tm_model_totals(struct tm_model_totals *totals);

struct tm_model_piece *tm_model_piece_create(struct tm_client *client,
					     struct tm_memory *memory);
void tm_model_piece_destroy(struct tm_model_piece *piece);
void tm_model_count_held(s64 pages);
struct tm_model_gen *tm_model_gen_create(struct tm_model *model,
					 struct tm_client *client, u64 size,
					 u32 flags);
void tm_model_gen_discard(struct tm_model_gen *gen);

int __must_check tm_model_may_stage(struct tm_model *model);
u64 tm_model_next(struct tm_model *model);
int __must_check tm_model_stage(struct tm_model_gen *gen, u64 number,
				struct task_struct *loader,
				const struct file *stager,
				struct tm_model_gen **base);
int __must_check tm_model_add(struct tm_model_gen *gen,
			      struct tm_model_piece *piece);
int __must_check tm_model_share(struct tm_model_gen *gen,
				const struct tm_model_gen *base);
void tm_model_fail(struct tm_model_gen *gen, int error);
bool tm_model_forget(struct tm_model *model);
void tm_model_finish(struct tm_model_gen *gen, struct tm_model_gen *base,
		     int error);

struct tm_model_gen *tm_model_acquire(struct tm_model *model, u64 number,
				      bool staged);
void tm_model_release(struct tm_model_gen *gen, const struct file *file);

int __must_check tm_model_commit(struct tm_model *model, u64 number);
int __must_check tm_model_abort(struct tm_model *model, u64 number);
int __must_check tm_model_rollback(struct tm_model *model, u64 number);
int __must_check tm_model_remove(struct tm_model *model);
void tm_model_usage(struct tm_model_gen *gen, struct tm_slot_usage *usage);

#endif
