/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_VM_H
#define TM_VM_H

#include <linux/mm_types.h>
#include <linux/types.h>

struct file;
struct tm_region;
struct vm_area_struct;
struct vm_fault;

u32 tm_vm_mapping_chunk(bool block);
u32 tm_vm_mapping(const struct tm_region *region);
void tm_vm_born_dirty(struct vm_area_struct *vma);
bool tm_vm_marked(const struct vm_fault *vmf);
vm_fault_t tm_vm_map(struct vm_fault *vmf, const struct tm_region *region,
		     u32 *mapped);
int tm_vm_mremap(struct vm_area_struct *vma);
unsigned long tm_vm_unmapped_area(struct file *file, unsigned long address,
				  unsigned long length, unsigned long pgoff,
				  unsigned long flags);
int tm_vm_mmap(struct file *file, struct vm_area_struct *vma);

#endif
