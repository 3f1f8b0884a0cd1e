// SPDX-License-Identifier: GPL-2.0-only
/*
 * The descriptor of a generation: a read-only file. Reads and faults take no lock of the
 * slot: the file holds the generation, and its pieces do not change once it is usable.
 */
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/uio.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "client.h"
#include "compat.h"
#include "memory.h"
#include "model.h"
#include "model_cached.h"
#include "model_evict.h"
#include "model_gen.h"
#include "model_inode.h"
#include "model_load.h"
#include "trace.h"
#include "vm.h"

static const u32 tm_model_states[] = {
	[TM_GENERATION_LOADING] = TENSORMEM_MODEL_LOADING,
	[TM_GENERATION_STAGED] = TENSORMEM_MODEL_STAGED,
	[TM_GENERATION_ACTIVE] = TENSORMEM_MODEL_ACTIVE,
	[TM_GENERATION_PREVIOUS] = TENSORMEM_MODEL_PREVIOUS,
	[TM_GENERATION_RETIRED] = TENSORMEM_MODEL_RETIRED,
	[TM_GENERATION_FAILED] = TENSORMEM_MODEL_FAILED,
};

static u32 tm_model_gen_mapping(const struct tm_model_gen *gen)
{
	if (gen->cached || gen->size < TM_CHUNK_SIZE)
		return TENSORMEM_MAPPING_PAGES;
	return tm_vm_mapping_chunk(true);
}

static void tm_model_gen_fill_info(struct tm_model_gen *gen,
				   struct tensormem_model_info *info)
{
	struct tm_model *model = gen->model;
	struct tm_model_evict_stats stats;
	struct tm_slot_usage usage;

	tm_model_usage(gen, &usage);
	tm_model_evict_gen_stats(gen, &stats);
	down_read(&model->lock);
	*info = (struct tensormem_model_info){
		.generation = gen->core.number,
		.state = tm_model_states[gen->core.state],
		.flags = gen->flags,
		.size = gen->size,
		.loaded = READ_ONCE(gen->loaded),
		.private_bytes = usage.own << PAGE_SHIFT,
		.shared_bytes = usage.shared << PAGE_SHIFT,
		.readers = atomic_read(&gen->readers),
		.error = -gen->core.error,
		.mapping = tm_model_gen_mapping(gen),
		.evicted_bytes = stats.evicted,
		.reloads = stats.reloads,
	};
	up_read(&model->lock);
}

static long tm_model_gen_command(struct file *file, unsigned int cmd,
				 unsigned long arg)
{
	void __user *user = (void __user *)arg;
	struct tensormem_model_info info;
	size_t size = _IOC_SIZE(cmd);
	int err;

	/* By number: the size in a command is the caller's idea of the struct. */
	if (_IOC_TYPE(cmd) != TENSORMEM_IOC_MAGIC ||
	    _IOC_DIR(cmd) != (_IOC_READ | _IOC_WRITE) ||
	    _IOC_NR(cmd) != _IOC_NR(TENSORMEM_IOC_MODEL_INFO))
		return -ENOTTY;
	err = tm_args_in(&info, sizeof(info), 0, user, size);
	if (err)
		return err;
	tm_model_gen_fill_info(file->private_data, &info);
	return tm_args_out(user, size, &info, sizeof(info));
}

static long tm_model_gen_ioctl(struct file *file, unsigned int cmd,
			       unsigned long arg)
{
	u64 start = trace_tensormem_ioctl_enabled() ? ktime_get_ns() : 0;
	const struct tm_model_gen *gen = file->private_data;
	long ret = tm_model_gen_command(file, cmd, arg);

	if (start)
		trace_tensormem_ioctl(gen->client->id, _IOC_NR(cmd),
				      ret, ktime_get_ns() - start);
	return ret;
}

/* Copy what of the model lies in one extent. Return: bytes copied, @want less a fault. */
static size_t tm_model_gen_copy(const struct tm_model_gen *gen, u64 pos,
				struct iov_iter *to, size_t *want)
{
	/* Any position may be asked for, and this is below the end but for speculation. */
	u32 index = array_index_nospec(pos >> TM_CHUNK_SHIFT,
				       gen->core.nr_pieces);
	const struct tm_model_piece *piece = tm_model_piece(&gen->core, index);
	size_t room;
	void *from = tm_model_span(piece->memory, pos & (TM_CHUNK_SIZE - 1),
				   &room);

	*want = min3((u64)room, gen->size - pos, (u64)iov_iter_count(to));
	return copy_to_iter(from, *want, to);
}

/* As tm_model_gen_copy(), of a piece that may have to come back. Return: 0 or why not. */
static int tm_model_gen_copy_evictable(struct tm_model_gen *gen, u64 pos,
				       struct iov_iter *to, size_t *copied,
				       size_t *want)
{
	u32 index = pos >> TM_CHUNK_SHIFT;
	int err = tm_model_evict_pin(gen, index);

	if (err)
		return err;
	*copied = tm_model_gen_copy(gen, pos, to, want);
	tm_model_evict_unpin(gen, index);
	return 0;
}

static ssize_t tm_model_gen_read(struct kiocb *iocb, struct iov_iter *to)
{
	struct tm_model_gen *gen = iocb->ki_filp->private_data;
	size_t done = 0, copied, want;
	u64 pos = iocb->ki_pos;
	int err;

	err = tm_model_usable(gen);
	if (err)
		return err;
	if (gen->cached && pos < gen->size) {
		ssize_t got = tm_model_cached_read(gen->cached, pos, to);

		if (got > 0)
			iocb->ki_pos += got;
		return got;
	}
	while (iov_iter_count(to) && pos + done < gen->size) {
		if (!gen->evict)
			copied = tm_model_gen_copy(gen, pos + done, to, &want);
		else
			err = tm_model_gen_copy_evictable(gen, pos + done, to,
							  &copied, &want);
		if (err)
			break;
		done += copied;
		if (copied < want)
			err = -EFAULT;
		else if (fatal_signal_pending(current))
			err = -EINTR;
		if (err)
			break;
		cond_resched();
	}
	iocb->ki_pos += done;
	return done ?: err;
}

static __poll_t tm_model_gen_poll(struct file *file, poll_table *wait)
{
	struct tm_model_gen *gen = file->private_data;
	__poll_t events = 0;
	int usable;

	poll_wait(file, &gen->model->wait, wait);
	usable = tm_model_usable(gen);
	if (usable != -EAGAIN)
		events |= EPOLLIN | EPOLLRDNORM;
	if (usable == -ESTALE)
		events |= EPOLLERR;
	if (READ_ONCE(gen->core.state) != TM_GENERATION_ACTIVE)
		events |= EPOLLPRI;
	return events;
}

static void tm_model_gen_fdinfo(struct seq_file *out, struct file *file)
{
	struct tm_model_gen *gen = file->private_data;
	struct tensormem_model_info info;

	tm_model_gen_fill_info(gen, &info);
	seq_printf(out, "tensormem-model:\t%s\n",
		   kobject_name(&gen->model->kobj));
	seq_printf(out, "client:\t%u\n", gen->client->id);
#define TM_MODEL_LINE(field)						\
	seq_printf(out, #field ":\t%llu\n", (unsigned long long)info.field)
	TM_MODEL_LINE(generation);
	TM_MODEL_LINE(state);
	TM_MODEL_LINE(flags);
	TM_MODEL_LINE(size);
	TM_MODEL_LINE(loaded);
	TM_MODEL_LINE(private_bytes);
	TM_MODEL_LINE(shared_bytes);
	TM_MODEL_LINE(readers);
	TM_MODEL_LINE(error);
	TM_MODEL_LINE(evicted_bytes);
	TM_MODEL_LINE(reloads);
#undef TM_MODEL_LINE
}

/* Where page @page of the model is. Return: false past its end. */
static bool tm_model_gen_region(const struct tm_model_gen *gen, u64 page,
				struct tm_region *region)
{
	u32 pages = TM_CHUNK_SIZE >> PAGE_SHIFT;
	u64 index = div_u64(page, pages);
	const struct tm_model_piece *piece;

	if (index >= gen->core.nr_pieces)
		return false;
	piece = tm_model_piece(&gen->core, index);
	*region = (struct tm_region){
		.range.start = index * pages,
		.range.length = piece->core.pages,
		.memory = piece->memory,
		.huge = true,
	};
	return page - region->range.start < region->range.length;
}

static vm_fault_t tm_model_gen_fault(struct vm_fault *vmf)
{
	u64 start = trace_tensormem_model_fault_enabled() ? ktime_get_ns() : 0;
	struct tm_model_gen *gen = vmf->vma->vm_file->private_data;
	vm_fault_t result = VM_FAULT_SIGBUS;
	struct tm_region region;
	u32 mapped = 0;

	if (!tm_vm_marked(vmf) && !tm_model_usable(gen) &&
	    tm_model_gen_region(gen, vmf->pgoff, &region))
		result = tm_vm_map(vmf, &region, &mapped);
	if (start)
		trace_tensormem_model_fault(kobject_name(&gen->model->kobj),
					    gen->core.number, vmf->pgoff,
					    mapped, ktime_get_ns() - start);
	return result;
}

static vm_fault_t tm_model_gen_fault_evictable(struct vm_fault *vmf)
{
	u64 start = trace_tensormem_model_fault_enabled() ? ktime_get_ns() : 0;
	struct tm_model_gen *gen = vmf->vma->vm_file->private_data;
	vm_fault_t result = VM_FAULT_SIGBUS;
	u32 mapped = 0;

	if (!tm_vm_marked(vmf))
		result = tm_model_evict_fault(gen, vmf, &mapped);
	/* With VM_FAULT_RETRY neither the area nor the generation is ours any more; it comes again. */
	if (start && !(result & VM_FAULT_RETRY))
		trace_tensormem_model_fault(kobject_name(&gen->model->kobj),
					    gen->core.number, vmf->pgoff,
					    mapped, ktime_get_ns() - start);
	return result;
}

static const struct vm_operations_struct tm_model_gen_vm_ops = {
	.fault = tm_model_gen_fault,
	.mremap = tm_vm_mremap,
};

static const struct vm_operations_struct tm_model_gen_evictable_vm_ops = {
	.open = tm_model_evict_forked,
	.fault = tm_model_gen_fault_evictable,
	.mremap = tm_vm_mremap,
};

static int tm_model_gen_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct tm_model_gen *gen = file->private_data;
	u64 pages = PFN_UP(gen->size);

	if (vma->vm_flags & VM_WRITE)
		return -EACCES;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (vma->vm_pgoff >= pages || vma_pages(vma) > pages - vma->vm_pgoff)
		return -EINVAL;
	/* Never to be writable: a private mapping is then no different from a shared one. */
	vm_flags_mod(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYWRITE | VM_MAYEXEC);
	if (gen->cached)
		return tm_model_cached_mmap(gen->cached, file, vma);
	vma->vm_ops = gen->evict ? &tm_model_gen_evictable_vm_ops :
				   &tm_model_gen_vm_ops;
	return 0;
}

static int tm_model_gen_release(struct inode *inode, struct file *file)
{
	struct tm_model_gen *gen = file->private_data;

	/* NULL: it has not come to be a descriptor of anything. */
	if (gen) {
		atomic_dec(&gen->readers);
		tm_model_release(gen, file);
	}
	return 0;
}

static const struct file_operations tm_model_gen_fops = {
	.owner = THIS_MODULE,
	.release = tm_model_gen_release,
	.llseek = generic_file_llseek,
	.read_iter = tm_model_gen_read,
	.poll = tm_model_gen_poll,
	.unlocked_ioctl = tm_model_gen_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = tm_model_gen_mmap,
	.get_unmapped_area = tm_vm_unmapped_area,
	.show_fdinfo = tm_model_gen_fdinfo,
};

/**
 * tm_model_gen_file - open a descriptor of a generation
 * @gen: the generation
 *
 * It consumes one hold when it is closed, unless its private_data is NULL by then.
 *
 * Context: may sleep. Return: the file or an ERR_PTR: -ENOMEM, -ENFILE.
 */
struct file *tm_model_gen_file(struct tm_model_gen *gen)
{
	struct file *file;

	file = tm_model_inode_file(gen->inode, "tensormem-model", O_RDONLY,
				   &tm_model_gen_fops, gen);
	if (!IS_ERR(file))
		atomic_inc(&gen->readers);
	return file;
}
