/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_CACHED_H
#define TM_MODEL_CACHED_H

#include <linux/types.h>

struct file;
struct iov_iter;
struct tm_model_cached;
struct tm_model_gen;
struct vm_area_struct;

struct tm_model_cached *tm_model_cached_create(struct tm_model_gen *gen,
					       const struct file *from,
					       u64 offset);
void tm_model_cached_destroy(struct tm_model_cached *cached);
int __must_check tm_model_cached_check(const struct tm_model_cached *cached);
ssize_t tm_model_cached_read(struct tm_model_cached *cached, u64 pos,
			     struct iov_iter *to);
int tm_model_cached_mmap(struct tm_model_cached *cached, struct file *reader,
			 struct vm_area_struct *vma);

#endif
