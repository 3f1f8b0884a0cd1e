/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_LOAD_H
#define TM_MODEL_LOAD_H

#include <linux/types.h>

struct file;
struct task_struct;
struct tm_client;
struct tm_memory;
struct tm_model_gen;
struct tm_model_load;

void *tm_model_span(const struct tm_memory *memory, u64 offset, size_t *room);
struct tm_memory *tm_model_supply(struct tm_client *client, u64 size);
bool tm_model_short(int err);

struct tm_model_load *tm_model_load_create(struct tm_model_gen *gen,
					   struct file *file, u64 offset,
					   const u8 *sha256);
void tm_model_load_discard(struct tm_model_load *load);
int __must_check tm_model_load_stage(struct tm_model_load *load, u64 number,
				     const struct file *stager);
void tm_model_load_start(struct tm_model_load *load);

#endif
