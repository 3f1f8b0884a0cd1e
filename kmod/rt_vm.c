// SPDX-License-Identifier: GPL-2.0-only
/*
 * Mappings of an arena. All entries are made by mmap(), writable ones as they are after a
 * write, so that no access faults: neither the first, nor the first write on CPUs that do not mark
 * entries by themselves (Cortex-A53, A72).
 */
#include <linux/fs.h>
#include <linux/math64.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/sched/signal.h>

#include "client.h"
#include "compat.h"
#include "memory.h"
#include "rt.h"
#include "rt_vm.h"
#include "trace.h"
#include "vm.h"

/* Only for what MADV_DONTNEED has taken, and what mmap() was killed over. */
static vm_fault_t tm_rt_vm_fault(struct vm_fault *vmf)
{
	u64 start = trace_tensormem_fault_enabled() ? ktime_get_ns() : 0;
	struct tm_rt_user *user = vmf->vma->vm_file->private_data;
	u32 pages = TM_CHUNK_SIZE >> PAGE_SHIFT;
	u64 index = div_u64(vmf->pgoff, pages);
	struct tm_region region = {
		.range.start = index * pages,
		.range.length = pages,
	};
	vm_fault_t result = VM_FAULT_SIGBUS;
	u32 mapped = 0;

	if (!tm_vm_marked(vmf)) {
		region.memory = user->arena->chunk[index];
		tm_vm_born_dirty(vmf->vma);
		result = tm_vm_map(vmf, &region, &mapped);
	}
	if (start)
		trace_tensormem_fault(user->arena->client->id, vmf->pgoff,
				      mapped, ktime_get_ns() - start);
	return result;
}

static const struct vm_operations_struct tm_rt_vm_ops = {
	.fault = tm_rt_vm_fault,
	.mremap = tm_vm_mremap,
};

/* Make all entries. Return: 0, -ENOMEM, -EINTR. */
static int tm_rt_vm_populate(const struct tm_arena *arena,
			     struct vm_area_struct *vma)
{
	unsigned long step = TM_CHUNK_SIZE >> PAGE_SHIFT;
	unsigned long left = vma_pages(vma), address = vma->vm_start;
	u64 pages = tm_arena_bytes(arena) >> PAGE_SHIFT;
	struct page **page = arena->page +
			     array_index_nospec(vma->vm_pgoff, pages);
	int err = 0;

	while (left && !err) {
		unsigned long now = min(left, step), rest = now;

		/* EFAULT: no memory for a table. The range is the area's. */
		if (fatal_signal_pending(current))
			err = -EINTR;
		else if (vm_insert_pages(vma, address, page, &rest))
			err = -ENOMEM;
		address += now << PAGE_SHIFT;
		page += now;
		left -= now;
		cond_resched();
	}
	return err;
}

/**
 * tm_rt_vm_mmap - map an arena or whole pages of it
 * @file: an RT client's descriptor
 * @vma: what the kernel is about to map
 *
 * Context: process context with mmap_lock held for writing; may sleep.
 * Return: 0, -EINVAL, -EPERM as in the UAPI header; -ENOMEM for page tables, -EINTR.
 */
int tm_rt_vm_mmap(struct file *file, struct vm_area_struct *vma)
{
	const struct tm_rt_user *user = file->private_data;
	u64 pages = tm_arena_bytes(user->arena) >> PAGE_SHIFT;

	/* Not VM_SHARED, which a read-only descriptor never gets. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (vma->vm_pgoff >= pages || vma_pages(vma) > pages - vma->vm_pgoff)
		return -EINVAL;
	vm_flags_mod(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYEXEC);
	vma->vm_ops = &tm_rt_vm_ops;
	/* Read-only ones, too: mprotect() may make them writable. */
	tm_vm_born_dirty(vma);
	return tm_rt_vm_populate(user->arena, vma);
}
