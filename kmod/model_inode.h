/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_INODE_H
#define TM_MODEL_INODE_H

#include <linux/fs.h>

extern const struct inode_operations tm_model_slot_inode;
extern const struct inode_operations tm_model_gen_inode;

struct inode *tm_model_inode(umode_t mode, const struct inode_operations *ops);
void tm_model_inode_put(struct inode *inode);
struct file *tm_model_inode_file(struct inode *inode, const char *name,
				 int flags, const struct file_operations *fops,
				 void *data);

#endif
