/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_WATCH_H
#define TM_MODEL_WATCH_H

#include <linux/mutex.h>
#include <linux/time64.h>
#include <linux/types.h>
#include <linux/workqueue.h>

struct file;
struct tm_model_gen;
struct tm_model_watch;

/* What becomes of @gen when its file is about to change. May sleep. */
typedef void (*tm_model_watcher)(struct tm_model_watch *watch,
				 struct tm_model_gen *gen);

/**
 * struct tm_model_watch - the file behind a generation, which nobody may change unnoticed
 * @file: our own descriptor of it: the stager's locks and modes are not ours
 * @offset: of the model in it
 * @size: bytes of the model
 * @file_size: bytes of the file when it was staged
 * @mtime: when it had been changed last by then
 * @broken: somebody waits to write, or has; set once
 * @ended: the generation is going; set once
 * @broke: called when it is broken
 * @breaking: lets go of the file
 * @closing: the same, for good
 * @lock: guards @gen
 * @gen: the generation, or NULL when it is gone
 */
struct tm_model_watch {
	struct file *file;
	u64 offset;
	u64 size;
	loff_t file_size;
	struct timespec64 mtime;
	bool broken;
	bool ended;
	tm_model_watcher broke;
	struct work_struct breaking;
	struct work_struct closing;
	struct mutex lock;
	struct tm_model_gen *gen;
};

int __must_check tm_model_watch_init(void);
void tm_model_watch_exit(void);
int __must_check tm_model_watch_begin(struct tm_model_watch *watch,
				      struct tm_model_gen *gen,
				      const struct file *from, u64 offset,
				      unsigned int flags,
				      tm_model_watcher broke);
void tm_model_watch_end(struct tm_model_watch *watch);
bool tm_model_watch_unchanged(const struct tm_model_watch *watch);
bool tm_model_watch_intact(const struct tm_model_watch *watch);
void tm_model_watch_spoil(struct tm_model_watch *watch);
int __must_check tm_model_watch_check(const struct tm_model_watch *watch);

#endif
