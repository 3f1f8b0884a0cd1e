// SPDX-License-Identifier: GPL-2.0-only
/*
 * Mappings of a client's window, and the faults that fill them.
 *
 * Page by page: page-backed entries of a VM_MIXEDMAP area, which can be pinned
 * (O_DIRECT, io_uring) and count as RSS. A fault maps all of the region that shares
 * the faulting address's page table, so a megabyte costs one fault. Where the pages
 * are a whole chunk's, arm64 folds contiguous entries by itself.
 *
 * Frame by frame: entries that nobody can pin, of what comes out of the DMA pool. To pin for long
 * means to get a page out of CMA first, which these cannot be: the kernel would try for ever.
 * And who pins memory that is set aside need not count it.
 *
 * As blocks: one PMD entry for a whole chunk, where a page table spans just one (4K
 * pages) and the area has all of it. The kernel does not count such an entry as
 * RSS; get_user_pages() can follow it because a whole chunk is one object.
 */
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/mman.h>

#include "client.h"
#include "compat.h"
#include "memory.h"
#include "pages.h"
#include "trace.h"
#include "vm.h"

/* A block is a PMD entry, and a chunk is what it has to be. */
#define TM_VM_BLOCKS	(IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE) && \
			 PMD_SIZE == TM_CHUNK_SIZE)

/* Pages handed to the kernel at a time: half a KiB of stack. */
#define TM_VM_BATCH	64

/**
 * tm_vm_born_dirty - let the entries that are made from now on be dirty
 * @vma: of which area
 *
 * CPUs without hardware dirty tracking (Cortex-A53, A72) fault once more on the
 * first write to a clean entry. Nobody writes our pages back, so a writable
 * entry is born dirty. vm_page_prot is recomputed after ->mmap and by mprotect(),
 * hence before each time that entries are made; racing faults store the same value.
 *
 * Context: of a fault or of ->mmap.
 */
void tm_vm_born_dirty(struct vm_area_struct *vma)
{
	pte_t entry = pte_mkdirty(__pte(pgprot_val(vma->vm_page_prot)));

	WRITE_ONCE(vma->vm_page_prot, __pgprot(pte_val(entry)));
}

/* Map @count pages of the DMA pool's @memory from @index on; entries already there stay. */
static int tm_vm_insert_frames(struct vm_area_struct *vma,
			       unsigned long address,
			       const struct tm_memory *memory, u32 index,
			       u32 count)
{
	unsigned long frame = index +
		page_to_pfn(tm_pages_page(&memory->extent[0].run));

	for (u32 i = 0; i < count; i++) {
		vm_fault_t result = tm_vmf_insert_frame(vma, address, frame);

		if (result != VM_FAULT_NOPAGE)
			return result & VM_FAULT_OOM ? -ENOMEM : -EIO;
		address += PAGE_SIZE;
		frame++;
	}
	return 0;
}

/* The same of any @memory. */
static int tm_vm_insert(struct vm_area_struct *vma, unsigned long address,
			const struct tm_memory *memory, u32 index, u32 count)
{
	struct page *pages[TM_VM_BATCH];

	if (tm_memory_is_dma(memory))
		return tm_vm_insert_frames(vma, address, memory, index, count);
	while (count) {
		const struct tm_extent *extent = tm_memory_find(memory, index);
		unsigned long want = min_t(u32, count, TM_VM_BATCH);
		unsigned long left = want;
		int err;

		for (u32 i = 0; i < want; i++) {
			u32 offset = index + i - extent->first;

			if (offset >> extent->run.order) {
				extent++;
				offset = 0;
			}
			pages[i] = tm_pages_page(&extent->run) + offset;
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

/* Map the part of @region around @vmf that the area and one page table hold. */
static int tm_vm_map_around(struct vm_fault *vmf,
			    const struct tm_region *region, u32 *mapped)
{
	struct vm_area_struct *vma = vmf->vma;
	const struct tm_range *range = &region->range;
	unsigned long table = vmf->address & PMD_MASK;
	unsigned long start = max(vma->vm_start, table);
	unsigned long end = min(vma->vm_end, table + PMD_SIZE);
	u64 first = vma->vm_pgoff + ((start - vma->vm_start) >> PAGE_SHIFT);
	u64 last = first + ((end - start) >> PAGE_SHIFT);

	first = max(first, range->start);
	last = min(last, range->start + range->length);
	*mapped = last - first;
	start = vma->vm_start + ((first - vma->vm_pgoff) << PAGE_SHIFT);
	return tm_vm_insert(vma, start, region->memory, first - range->start,
			    last - first);
}

/*
 * Whether @region has all of the extent, a whole chunk, at an offset where it can be
 * a block. A chunk that is only part used is not: the rest of it is not the region's.
 */
static bool tm_vm_block_whole(const struct tm_region *region,
			      const struct tm_extent *extent)
{
	u64 pages = tm_chunk_pages(tm_pages_geometry());

	return IS_ALIGNED(region->range.start + extent->first, pages) &&
	       extent->first + pages <= region->range.length;
}

/* Whether the area has all of the block that begins @first pages into the window. */
static bool tm_vm_block_fits(const struct vm_fault *vmf, u64 first)
{
	const struct vm_area_struct *vma = vmf->vma;
	unsigned long start = vmf->address & PMD_MASK;
	u64 behind = (vmf->address - start) >> PAGE_SHIFT;

	return start >= vma->vm_start && vma->vm_end - start >= PMD_SIZE &&
	       vmf->pgoff - behind == first;
}

/*
 * Map the chunk at @vmf as a block. Return: whether that is done; if not, it has to
 * be mapped page by page: the tail of a tensor, or an address that has a page table.
 */
static bool tm_vm_map_block(struct vm_fault *vmf,
			    const struct tm_region *region, u32 *mapped)
{
	const struct tm_extent *extent;
	pmd_t pmd;

	if (!TM_VM_BLOCKS || !region->huge)
		return false;
	extent = tm_memory_find(region->memory,
				vmf->pgoff - region->range.start);
	if (extent->run.order != tm_pages_geometry().chunk_order ||
	    !tm_vm_block_whole(region, extent) ||
	    !tm_vm_block_fits(vmf, region->range.start + extent->first))
		return false;
	pmd = READ_ONCE(*vmf->pmd);
	if (pmd_none(pmd)) {
		*mapped = 1u << extent->run.order;
		return tm_vmf_insert_block(vmf, tm_pages_page(&extent->run)) ==
		       VM_FAULT_NOPAGE;
	}
	/* Somebody else was here first. */
	return pmd_trans_huge(pmd);
}

/**
 * tm_vm_mapping_chunk - how a whole chunk is mapped
 * @block: as a block where the kernel can
 *
 * Context: any. Return: enum tensormem_mapping.
 */
u32 tm_vm_mapping_chunk(bool block)
{
	if (TM_VM_BLOCKS && block)
		return TENSORMEM_MAPPING_BLOCK;
	return IS_ENABLED(CONFIG_ARM64_CONTPTE) ? TENSORMEM_MAPPING_CONT :
						  TENSORMEM_MAPPING_PAGES;
}

/**
 * tm_vm_mapping - how the whole chunks of a region are mapped
 * @region: the region; it has memory
 *
 * Context: any. Return: enum tensormem_mapping.
 */
u32 tm_vm_mapping(const struct tm_region *region)
{
	if (!region->memory->nr_chunks || tm_memory_is_dma(region->memory))
		return TENSORMEM_MAPPING_PAGES;
	return tm_vm_mapping_chunk(region->huge &&
				   tm_vm_block_whole(region,
						     &region->memory->extent[0]));
}

/**
 * tm_vm_marked - whether what faulted is a marker and no hole
 * @vmf: the fault
 *
 * userfaultfd leaves markers: to map around one would fault for ever.
 *
 * Context: of a fault.
 */
bool tm_vm_marked(const struct vm_fault *vmf)
{
	return vmf->flags & FAULT_FLAG_ORIG_PTE_VALID &&
	       !pte_none(vmf->orig_pte);
}

/**
 * tm_vm_map - map the part of a region that a fault is in
 * @vmf: the fault
 * @region: the region; it has memory at the faulting page
 * @mapped: how many pages that were
 *
 * Context: of a fault; the caller keeps the region as it is.
 * Return: VM_FAULT_NOPAGE or an error.
 */
vm_fault_t tm_vm_map(struct vm_fault *vmf, const struct tm_region *region,
		     u32 *mapped)
{
	int err = 0;

	if (!tm_vm_map_block(vmf, region, mapped))
		err = tm_vm_map_around(vmf, region, mapped);
	/*
	 * EFAULT: MADV_DONTNEED took the page table away meanwhile
	 * (PT_RECLAIM, 6.14). The fault comes again and makes a new one.
	 */
	return err && err != -EFAULT ? vmf_error(err) : VM_FAULT_NOPAGE;
}

static vm_fault_t tm_vm_fault(struct vm_fault *vmf)
{
	u64 start = trace_tensormem_fault_enabled() ? ktime_get_ns() : 0;
	struct tm_client *client = vmf->vma->vm_file->private_data;
	struct address_space *mapping = client->inode->i_mapping;
	vm_fault_t result = VM_FAULT_SIGBUS;
	struct tm_range *range;
	u32 mapped = 0;

	if (tm_vm_marked(vmf))
		return VM_FAULT_SIGBUS;

	if (vmf->vma->vm_flags & VM_WRITE)
		tm_vm_born_dirty(vmf->vma);
	filemap_invalidate_lock_shared(mapping);
	range = tm_window_find(&client->window, vmf->pgoff);
	if (range)
		result = tm_vm_map(vmf,
				   container_of(range, struct tm_region, range),
				   &mapped);
	filemap_invalidate_unlock_shared(mapping);

	if (start)
		trace_tensormem_fault(client->id, vmf->pgoff, mapped,
				      ktime_get_ns() - start);
	return result;
}

/* fork() is about to copy a mapping: quarantine.c wants to know. */
static void tm_vm_open(struct vm_area_struct *vma)
{
	struct tm_client *client = vma->vm_file->private_data;

	/* One that is split in two. */
	if (vma->vm_mm == current->mm)
		return;
	atomic_inc(&client->forks);
	/* Pairs with tm_quarantine_forking(): counted before anything is copied. */
	smp_mb__after_atomic();
}

/* A moved mapping would leave the addresses that the window promises. */
int tm_vm_mremap(struct vm_area_struct *vma)
{
	return -EINVAL;
}

static const struct vm_operations_struct tm_vm_ops = {
	.open = tm_vm_open,
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
 * tm_vm_unmapped_area - choose where to map: so that blocks and runs line up
 * @file: the client's descriptor
 * @address: hint, as the parameters that follow what mmap(2) was given
 * @length: bytes
 * @pgoff: first page of the window
 * @flags: MAP_ flags
 *
 * Context: process context with mmap_lock held for writing.
 * Return: an address, congruent to the offset modulo a chunk if there is such a one
 * and the length makes it matter; or an errno.
 */
unsigned long tm_vm_unmapped_area(struct file *file, unsigned long address,
				  unsigned long length, unsigned long pgoff,
				  unsigned long flags)
{
	unsigned long offset = (pgoff << PAGE_SHIFT) & (TM_CHUNK_SIZE - 1);
	unsigned long found;

	if (!(flags & MAP_FIXED) && length >= TM_CHUNK_SIZE &&
	    length + TM_CHUNK_SIZE > length) {
		found = tm_get_unmapped_area(file, 0, length + TM_CHUNK_SIZE,
					     0, flags);
		if (!IS_ERR_VALUE(found) && !address)
			return found +
			       ((offset - found) & (TM_CHUNK_SIZE - 1));
	}
	return tm_get_unmapped_area(file, address, length, pgoff, flags);
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
