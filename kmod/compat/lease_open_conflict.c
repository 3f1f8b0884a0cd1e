// SPDX-License-Identifier: GPL-2.0-only
#include <linux/filelock.h>

int probe(const struct lease_manager_operations *ops, struct file *file);

int probe(const struct lease_manager_operations *ops, struct file *file)
{
	return ops->lm_open_conflict(file, 0);
}
