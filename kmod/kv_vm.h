/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_KV_VM_H
#define TM_KV_VM_H

struct file;
struct tm_cache_extend;
struct tm_kv;
struct vm_area_struct;

int tm_kv_vm_mmap(struct file *file, struct vm_area_struct *vma);
void tm_kv_vm_map_ahead(struct tm_kv *kv, const struct tm_cache_extend *done);

#endif
