/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_RT_VM_H
#define TM_RT_VM_H

struct file;
struct vm_area_struct;

int tm_rt_vm_mmap(struct file *file, struct vm_area_struct *vma);

#endif
