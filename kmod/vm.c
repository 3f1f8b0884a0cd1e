// SPDX-License-Identifier: GPL-2.0-only
/*
 * Mappings of a client's window, and the faults that fill them.
 *
 * Tensors are mapped page by page as page-backed entries of a VM_MIXEDMAP area:
 * they can be pinned (O_DIRECT, io_uring) and count as RSS. A fault maps all of
 * the tensor that shares the faulting address's page table, so a megabyte costs
 * one fault.
 */
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/minmax.h>
#include <linux/mm.h>

#include "client.h"
#include "compat.h"
#include "memory.h"
#include "pages.h"
#include "tensor.h"
#include "trace.h"
#include "vm.h"

/* Pages handed to the kernel at a time: half a KiB of stack. */
#define TM_VM_BATCH	64

/*
 * CPUs without hardware dirty tracking (Cortex-A53, A72) fault once more on the
 * first write to a clean entry. Nobody writes tensor pages back, so a writable
 * entry is born dirty. vm_page_prot is recomputed after ->mmap and by mprotect(),
 * hence here; racing faults store the same value.
 */
static void tm_vm_born_dirty(struct vm_area_struct *vma)
{
	pte_t entry = pte_mkdirty(__pte(pgprot_val(vma->vm_page_prot)));

	if (vma->vm_flags & VM_WRITE)
		WRITE_ONCE(vma->vm_page_prot, __pgprot(pte_val(entry)));
}

/* Map @count pages of @memory from @index on; entries already there stay. */
static int tm_vm_insert(struct vm_area_struct *vma, unsigned long address,
			const struct tm_memory *memory, u32 index, u32 count)
{
	struct page *pages[TM_VM_BATCH];

	while (count) {
		const struct tm_extent *extent = tm_memory_find(memory, index);
		unsigned long want = min_t(u32, count, TM_VM_BATCH);
		unsigned long left = want;
		int err;

		for (u32 i = 0; i < want; i++) {
			u32 offset = index + i - extent->first;

			if (offset >> extent->order) {
				extent++;
				offset = 0;
			}
			pages[i] = tm_pages_page(extent->page) + offset;
		}
		err = vm_insert_pages(vma, address, pages, &left);
		if (err == -EBUSY)
			left--;
		else if (err)
			return err;
		index += want - left;
		address += (want - left) << PAGE_SHIFT;
		count -= want - left;
	}
	return 0;
}

/* Map the part of @tensor around @vmf that the area and one page table hold. */
static int tm_vm_map_around(struct vm_fault *vmf, struct tm_tensor *tensor,
			    u32 *mapped)
{
	struct vm_area_struct *vma = vmf->vma;
	unsigned long table = vmf->address & PMD_MASK;
	unsigned long start = max(vma->vm_start, table);
	unsigned long end = min(vma->vm_end, table + PMD_SIZE);
	u64 first = vma->vm_pgoff + ((start - vma->vm_start) >> PAGE_SHIFT);
	u64 last = first + ((end - start) >> PAGE_SHIFT);

	first = max(first, tensor->range.start);
	last = min(last, tensor->range.start + tensor->range.length);
	*mapped = last - first;
	return tm_vm_insert(vma, vma->vm_start +
			    ((first - vma->vm_pgoff) << PAGE_SHIFT),
			    tensor->memory, first - tensor->range.start,
			    last - first);
}

static vm_fault_t tm_vm_fault(struct vm_fault *vmf)
{
	u64 start = trace_tensormem_fault_enabled() ? ktime_get_ns() : 0;
	struct tm_client *client = vmf->vma->vm_file->private_data;
	struct address_space *mapping = client->inode->i_mapping;
	vm_fault_t result = VM_FAULT_SIGBUS;
	struct tm_range *range;
	u32 mapped = 0;
	int err;

	/* A userfaultfd marker is no hole: to map around it would fault for ever. */
	if (vmf->flags & FAULT_FLAG_ORIG_PTE_VALID && !pte_none(vmf->orig_pte))
		return VM_FAULT_SIGBUS;

	tm_vm_born_dirty(vmf->vma);
	filemap_invalidate_lock_shared(mapping);
	range = tm_window_find(&client->window, vmf->pgoff);
	if (range) {
		err = tm_vm_map_around(vmf, tm_range_tensor(range), &mapped);
		result = VM_FAULT_NOPAGE;
		/*
		 * EFAULT: MADV_DONTNEED took the page table away meanwhile
		 * (PT_RECLAIM, 6.14). The fault comes again and makes a new one.
		 */
		if (err && err != -EFAULT)
			result = vmf_error(err);
	}
	filemap_invalidate_unlock_shared(mapping);

	if (start)
		trace_tensormem_fault(client->id, vmf->pgoff, mapped,
				      ktime_get_ns() - start);
	return result;
}

/* A moved mapping would leave the addresses that the window promises. */
static int tm_vm_mremap(struct vm_area_struct *vma)
{
	return -EINVAL;
}

static const struct vm_operations_struct tm_vm_ops = {
	.fault = tm_vm_fault,
	.mremap = tm_vm_mremap,
};

/* Return: 0, -ENOENT for no tensor at @first, -EINVAL for past its end. */
static int tm_vm_check_range(struct tm_client *client, u64 first, u64 pages)
{
	struct address_space *mapping = client->inode->i_mapping;
	struct tm_range *range;
	int err = 0;

	if (!first && pages == client->window.size)
		return 0;
	filemap_invalidate_lock_shared(mapping);
	range = tm_window_find(&client->window, first);
	if (!range)
		err = first < client->window.size ? -ENOENT : -EINVAL;
	else if (pages > range->length - (first - range->start))
		err = -EINVAL;
	filemap_invalidate_unlock_shared(mapping);
	return err;
}

/**
 * tm_vm_mmap - map the window, one tensor or a part of one
 * @file: the client's descriptor
 * @vma: what the kernel is about to map
 *
 * Context: process context with mmap_lock held for writing; may sleep.
 * Return: 0, -EINVAL, -ENOENT or -EPERM as in the UAPI header.
 */
int tm_vm_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct tm_client *client = file->private_data;
	int err;

	/* Not VM_SHARED, which a read-only descriptor never gets. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	err = tm_vm_check_range(client, vma->vm_pgoff, vma_pages(vma));
	if (err)
		return err;
	vm_flags_mod(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYEXEC);
	vma->vm_ops = &tm_vm_ops;
	return 0;
}
