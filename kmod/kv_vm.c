// SPDX-License-Identifier: GPL-2.0-only
/*
 * Mappings of a KV cache. The block table is the page table: what a sequence has is
 * mapped page by page into contiguous addresses.
 *
 * The entries are by number (VM_PFNMAP), each with a protection of its own: a page that
 * somebody else can see, or that is sealed, is read-only whatever the area is. Pages
 * behind page-backed entries could be pinned, but then nobody knows who may write to
 * them, and a block could not be taken away from under its mappings.
 *
 * Read-only entries are never dirty: mprotect() gives a dirty one its write
 * permission back without asking.
 */
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>

#include "client.h"
#include "compat.h"
#include "kv.h"
#include "kv_ops.h"
#include "kv_pack.h"
#include "kv_vm.h"
#include "trace.h"

/*
 * Pages that a fault maps at most, aligned. It looks at each, also where something
 * is mapped already, so more would cost decoding more than it saves a new reader.
 */
#define TM_KV_AROUND		64

/* Pages of a group that an extension maps at most; the rest is for faults to map. */
#define TM_KV_AHEAD		4096

/* What lies at a page of the window. */
struct tm_kv_spot {
	u32 place;
	u32 group;
	u32 plane;
	u32 index;
};

/* Return: whether a plane of some sequence's place is there. */
static bool tm_kv_locate(const struct tm_kv *kv, u64 offset,
			 struct tm_kv_spot *spot)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	u64 rest;

	spot->place = div64_u64_rem(offset, kv->place_pages, &rest);
	if (spot->place >= kv->cache.max_seqs)
		return false;
	for (u32 i = 0; i < geo->nr_groups; i++) {
		const struct tm_kv_layout *layout = &kv->layout[i];
		u64 size = layout->stride * geo->group[i].planes;

		if (rest - layout->offset < size) {
			u64 index;

			spot->group = i;
			spot->plane = div64_u64_rem(rest - layout->offset,
						    layout->stride, &index);
			spot->index = index;
			return true;
		}
	}
	return false;
}

struct tm_kv_prots {
	pgprot_t read;
	pgprot_t write;
};

/* An area's entries, as mprotect() has left its flags. */
static struct tm_kv_prots tm_kv_prots(const struct vm_area_struct *vma)
{
	/* As the kernel makes a shared mapping one that it is told of writes to. */
	pgprot_t read = vm_get_page_prot(vma->vm_flags & ~VM_SHARED);
	pgprot_t write = vm_get_page_prot(vma->vm_flags);
	pte_t entry = pte_mkdirty(__pte(pgprot_val(write)));

	/* Born dirty: see vm.c. */
	if (vma->vm_flags & VM_WRITE)
		write = __pgprot(pte_val(entry));
	return (struct tm_kv_prots){ .read = read, .write = write };
}

/* Map the pages of @run from @address on; entries already there stay. */
static vm_fault_t tm_kv_map_run(struct tm_kv *kv, struct vm_area_struct *vma,
				unsigned long address, pgprot_t prot,
				struct tm_cache_run *run)
{
	vm_fault_t result = VM_FAULT_NOPAGE;
	struct tm_page_id page;

	for (u32 i = 0; i < run->nr && result == VM_FAULT_NOPAGE; i++) {
		if (WARN_ON_ONCE(!tm_kv_walk_next(&kv->cache.pool, &run->walk,
						  &page)))
			return VM_FAULT_SIGBUS;
		result = vmf_insert_pfn_prot(vma, address,
				PHYS_PFN(__pa(tm_kv_address(kv, page))), prot);
		address += PAGE_SIZE;
	}
	return result;
}

/*
 * Map what the sequence has of pages [@first, @end) of a plane that begins at
 * @address. Return: VM_FAULT_NOPAGE or an error.
 */
static vm_fault_t tm_kv_map(struct tm_kv *kv, struct vm_area_struct *vma,
			    unsigned long address,
			    const struct tm_kv_spot *plane, u32 first, u32 end)
{
	struct tm_kv_prots prots = tm_kv_prots(vma);
	vm_fault_t result = VM_FAULT_NOPAGE;
	struct tm_cache_run run;

	lockdep_assert_held(&kv->lock);
	for (u32 i = first; i < end && result == VM_FAULT_NOPAGE; i += run.nr) {
		if (tm_cache_pages(&kv->cache, plane->place, plane->group,
				   plane->plane, i, end - i, &run))
			continue;
		result = tm_kv_map_run(kv, vma, address +
				       ((unsigned long)i << PAGE_SHIFT),
				       run.writable ? prots.write : prots.read,
				       &run);
	}
	return result;
}

/* Map around @vmf, in the plane it is in. */
static vm_fault_t tm_kv_map_around(struct tm_kv *kv, struct vm_fault *vmf,
				   const struct tm_kv_spot *spot)
{
	const struct vm_area_struct *vma = vmf->vma;
	unsigned long plane = vmf->address -
			      ((unsigned long)spot->index << PAGE_SHIFT);
	u64 behind = (vmf->address - vma->vm_start) >> PAGE_SHIFT;
	u64 ahead = (vma->vm_end - vmf->address) >> PAGE_SHIFT;
	u32 first = round_down(spot->index, TM_KV_AROUND);
	u64 end = min(first + (u64)TM_KV_AROUND,
		      kv->layout[spot->group].stride);

	first = max_t(s64, first, (s64)spot->index - (s64)behind);
	end = min(end, spot->index + ahead);
	return tm_kv_map(kv, vmf->vma, plane & PAGE_MASK, spot, first, end);
}

static vm_fault_t tm_kv_vm_serve(struct vm_fault *vmf)
{
	struct tm_kv *kv = vmf->vma->vm_private_data;
	bool write = vmf->flags & FAULT_FLAG_WRITE;
	struct tm_cache_page page;
	struct tm_kv_spot spot;
	vm_fault_t result;
	u32 index;
	int err;

	/* A userfaultfd marker is no hole: to map around it would fault for ever. */
	if (vmf->flags & FAULT_FLAG_ORIG_PTE_VALID && !pte_none(vmf->orig_pte))
		return VM_FAULT_SIGBUS;
	if (!tm_kv_locate(kv, vmf->pgoff, &spot))
		return VM_FAULT_SIGBUS;
	index = spot.index / kv->cache.pool.geo.plane_pages[spot.group];
	do {
		down_read(&kv->lock);
		err = tm_cache_page(&kv->cache, spot.place, spot.group,
				    spot.plane, spot.index, &page);
		if (!err && (page.writable || !write)) {
			tm_kv_touch(kv, spot.place);
			result = tm_kv_map_around(kv, vmf, &spot);
			up_read(&kv->lock);
			return result;
		}
		up_read(&kv->lock);
		if (err == -EAGAIN)
			err = tm_kv_unpack(kv, spot.place, spot.group, index,
					   NULL);
		else if (!err)
			err = tm_kv_write(kv, spot.place, spot.group, index);
	} while (!err && !fatal_signal_pending(current));
	return VM_FAULT_SIGBUS;
}

/* A write to a read-only entry. */
static vm_fault_t tm_kv_vm_own(struct vm_fault *vmf)
{
	struct tm_kv *kv = vmf->vma->vm_private_data;
	struct tm_kv_spot spot;
	int err;

	if (!tm_kv_locate(kv, vmf->pgoff, &spot))
		return VM_FAULT_SIGBUS;
	err = tm_kv_write(kv, spot.place, spot.group,
			  spot.index /
			  kv->cache.pool.geo.plane_pages[spot.group]);
	return err ? VM_FAULT_SIGBUS : VM_FAULT_NOPAGE;
}

static vm_fault_t tm_kv_vm_told(struct vm_fault *vmf, bool write,
				vm_fault_t (*serve)(struct vm_fault *vmf))
{
	u64 start = trace_tensormem_kv_fault_enabled() ? ktime_get_ns() : 0;
	const struct tm_kv *kv = vmf->vma->vm_private_data;
	vm_fault_t result = serve(vmf);

	if (start)
		trace_tensormem_kv_fault(kv->client->id, kv->id, vmf->pgoff,
					 write, !(result & VM_FAULT_ERROR),
					 ktime_get_ns() - start);
	return result;
}

static vm_fault_t tm_kv_vm_fault(struct vm_fault *vmf)
{
	return tm_kv_vm_told(vmf, vmf->flags & FAULT_FLAG_WRITE,
			     tm_kv_vm_serve);
}

static vm_fault_t tm_kv_vm_mkwrite(struct vm_fault *vmf)
{
	return tm_kv_vm_told(vmf, true, tm_kv_vm_own);
}

/* A moved mapping would leave the addresses that a sequence's place promises. */
static int tm_kv_vm_mremap(struct vm_area_struct *vma)
{
	return -EINVAL;
}

static const struct vm_operations_struct tm_kv_vm_ops = {
	.fault = tm_kv_vm_fault,
	.pfn_mkwrite = tm_kv_vm_mkwrite,
	.mremap = tm_kv_vm_mremap,
};

/* Map blocks [@first, @end) of a group where the area at @vma has its sequence's place. */
static vm_fault_t tm_kv_map_group(struct tm_kv *kv, struct vm_area_struct *vma,
				  u32 place, u32 group, u32 first, u32 end)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	const struct tm_kv_layout *layout = &kv->layout[group];
	struct tm_kv_spot spot = { .place = place, .group = group };
	u64 base = place * kv->place_pages + layout->offset;

	first *= geo->plane_pages[group];
	end *= geo->plane_pages[group];
	for (; spot.plane < geo->group[group].planes; spot.plane++) {
		vm_fault_t result;

		/* Somebody has unmapped a part of the window. */
		if (base + first < vma->vm_pgoff ||
		    base + end > vma->vm_pgoff + vma_pages(vma))
			return VM_FAULT_NOPAGE;
		result = tm_kv_map(kv, vma, vma->vm_start +
				   ((base - vma->vm_pgoff) << PAGE_SHIFT),
				   &spot, first, end);
		if (result != VM_FAULT_NOPAGE)
			return result;
		base += layout->stride;
	}
	return VM_FAULT_NOPAGE;
}

/* Map blocks of a sequence from @first on, but not more than a fault may wait for. */
static void tm_kv_map_blocks(struct tm_kv *kv, struct vm_area_struct *vma,
			     u32 place, u32 first)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	const struct tm_cache_seq *seq = tm_cache_seq(&kv->cache, place);

	for (u32 i = 0; i < geo->nr_groups; i++) {
		u32 start, end;

		/* A state has its pages from the first token on. */
		if (geo->group[i].rule == TM_KV_STATE && first)
			continue;
		tm_cache_span(&kv->cache, i, seq->length, &start, &end);
		start = max(start, first);
		end = min(end, start + TM_KV_AHEAD / geo->block_pages[i]);
		if (start < end &&
		    tm_kv_map_group(kv, vma, place, i, start, end) !=
		    VM_FAULT_NOPAGE)
			return;
	}
}

/**
 * tm_kv_vm_map_ahead - map what an extension has brought, before it is touched
 * @kv: the cache
 * @done: the sequence and its length before
 *
 * Only where the caller has mapped the window, and only an attempt: what is not
 * mapped here is by a fault. What was sealed just now is mapped again.
 *
 * Context: may sleep; takes mmap_lock and kv->lock for reading.
 */
void tm_kv_vm_map_ahead(struct tm_kv *kv, const struct tm_cache_extend *done)
{
	u32 block_tokens = kv->cache.pool.geo.block_tokens;
	u32 first = done->length / block_tokens;
	struct mm_struct *mm = current->mm;
	struct vm_area_struct *vma;
	u32 place;

	if (READ_ONCE(kv->mapped_mm) != mm)
		return;
	/* Within one block, which its first token has brought and had mapped. */
	if ((u64)done->length % block_tokens + done->tokens <= block_tokens &&
	    done->length % block_tokens && !done->copies.nr)
		return;
	if (mmap_read_lock_killable(mm))
		return;
	vma = vma_lookup(mm, READ_ONCE(kv->mapped_at));
	if (!vma || vma->vm_ops != &tm_kv_vm_ops || vma->vm_private_data != kv)
		goto out;
	down_read(&kv->lock);
	place = tm_cache_find(&kv->cache, done->id);
	if (place != TM_NONE) {
		if (tm_cache_seq(&kv->cache, place)->sealed == first)
			first -= min_t(u32, first, TM_KV_SEAL_BLOCKS);
		tm_kv_map_blocks(kv, vma, place, first);
	}
	up_read(&kv->lock);
out:
	mmap_read_unlock(mm);
}

/* Return: 0, -ENOENT for a sequence that is not open, -EINVAL for another range. */
static int tm_kv_vm_check_range(struct tm_kv *kv, u64 first, u64 pages)
{
	u64 place, rest;
	int err = 0;

	if (!first && pages == tm_kv_window_pages(kv))
		return 0;
	place = div64_u64_rem(first, kv->place_pages, &rest);
	if (place >= kv->cache.max_seqs || pages > kv->place_pages - rest)
		return -EINVAL;
	down_read(&kv->lock);
	if (!tm_cache_seq(&kv->cache, place)->open)
		err = -ENOENT;
	up_read(&kv->lock);
	return err;
}

/**
 * tm_kv_vm_mmap - map the window, or a part of one sequence's place
 * @file: the cache's descriptor
 * @vma: what the kernel is about to map
 *
 * Context: process context with mmap_lock held for writing; may sleep.
 * Return: 0, -EINVAL, -ENOENT or -EPERM as in the UAPI header.
 */
int tm_kv_vm_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct tm_kv *kv = file->private_data;
	int err;

	/* Not VM_SHARED, which a read-only descriptor never gets. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	err = tm_kv_vm_check_range(kv, vma->vm_pgoff, vma_pages(vma));
	if (err)
		return err;
	vm_flags_mod(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP, VM_MAYEXEC);
	vma->vm_private_data = kv;
	vma->vm_ops = &tm_kv_vm_ops;
	if (!vma->vm_pgoff && vma_pages(vma) == tm_kv_window_pages(kv)) {
		WRITE_ONCE(kv->mapped_at, vma->vm_start);
		WRITE_ONCE(kv->mapped_mm, current->mm);
	}
	return 0;
}
