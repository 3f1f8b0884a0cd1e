/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_WALK_H
#define TM_WALK_H

#include <linux/fs.h>

extern const struct file_operations tm_walk_fops;

#endif
