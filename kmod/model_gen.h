/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_GEN_H
#define TM_MODEL_GEN_H

struct file;
struct tm_model_gen;

struct file *tm_model_gen_file(struct tm_model_gen *gen);

#endif
