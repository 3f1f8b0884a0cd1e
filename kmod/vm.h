/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_VM_H
#define TM_VM_H

#include <linux/types.h>

struct file;
struct tm_region;
struct vm_area_struct;

u32 tm_vm_mapping(const struct tm_region *region);
unsigned long tm_vm_unmapped_area(struct file *file, unsigned long address,
				  unsigned long length, unsigned long pgoff,
				  unsigned long flags);
int tm_vm_mmap(struct file *file, struct vm_area_struct *vma);

#endif
