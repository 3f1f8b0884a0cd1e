// SPDX-License-Identifier: GPL-2.0-only
/*
 * An evictable generation: in chunks like any resident one, but a piece may go when memory
 * is wanted, and comes back from the file when somebody touches or reads it.
 *
 * All pieces that could go are on one list in order of use. Use is what we see: faults
 * and reads. What is mapped may be used without being seen; so whoever evicts also unmaps what
 * would be next, and what is used faults again, and is last then.
 *
 * That no fault maps what is going is seen to by the invalidate_lock of the generation's
 * inode, which faults hold for reading and who evicts for writing, as for tensors (client.c). A
 * child of fork() gets none of the parent's entries: it faults for itself. A piece that
 * somebody holds besides (O_DIRECT, pipes, a read that is copying) stays.
 *
 * A piece comes back in the hands of the first who wants it; others wait for him. It is read under no
 * lock but the piece's bit, and its bytes have to be those of the load (a CRC) in a file that
 * looks as it did, or the generation fails. Before somebody may write to the file all
 * comes back, and stays.
 */
#include <linux/atomic.h>
#include <linux/crc32.h>
#include <linux/cred.h>
#include <linux/err.h>
#include <linux/fadvise.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/wait_bit.h>

#include "bandwidth.h"
#include "client.h"
#include "compat.h"
#include "memory.h"
#include "model.h"
#include "model_evict.h"
#include "model_load.h"
#include "model_watch.h"
#include "pages.h"
#include "quarantine.h"
#include "trace.h"
#include "vm.h"

/* How often, and how many times, a touch that finds no memory looks again: two seconds. */
#define TM_MODEL_EVICT_PERIOD	(HZ / 10)
#define TM_MODEL_EVICT_TRIES	20

/* How long who wants to write to the file waits for what is missing: half of what fcntl(2) lets him. */
#define TM_MODEL_EVICT_SETTLE	(20 * HZ)

/* Bytes read at a time: a fatal signal is seen between two. */
#define TM_MODEL_EVICT_STEP	(256 * 1024)

/* Of tm_model_piece::coming. */
#define TM_MODEL_EVICT_COMING	0

/**
 * struct tm_model_evict - what makes a generation evictable
 * @watch: its file
 * @memcg: the stager's memory cgroup: what comes back is on its bill
 * @ended: @watch has ended
 * @settled: all stays from now on; under tm_model_evict_lock
 * @error: what has been read from the file, or is to be, is not what it was: why
 * @evictable: pages that could go
 * @evicted: pages that are gone
 * @reloads: pieces that came back
 */
struct tm_model_evict {
	struct tm_model_watch watch;
	struct mem_cgroup *memcg;
	bool ended;
	bool settled;
	int error;
	atomic64_t evictable;
	atomic64_t evicted;
	atomic64_t reloads;
};

/* What who brings a piece in may do for memory. */
enum tm_model_evict_haste {
	TM_MODEL_EVICT_HASTY,	/* no more than any allocation: mmap_lock is held */
	TM_MODEL_EVICT_SETTLING,	/* wait for some; no generation may be freed */
	TM_MODEL_EVICT_PATIENT,	/* give up the previous generation, and wait */
};

/* Which pieces may go; unset: any. */
struct tm_model_evict_scope {
	const struct tm_model_gen *gen;
	const struct tm_client *client;
	u64 nodes;
};

/* One piece goes at a time, and a piece is not freed meanwhile. Nothing is allocated under it. */
static DEFINE_MUTEX(tm_model_evict_mutex);
/* The list below, least recently used first, and who is on it. */
static DEFINE_SPINLOCK(tm_model_evict_lock);
static LIST_HEAD(tm_model_evict_list);

static atomic64_t tm_model_evictable_pages = ATOMIC64_INIT(0);
static atomic64_t tm_model_evicted_pages = ATOMIC64_INIT(0);
static atomic64_t tm_model_reloads = ATOMIC64_INIT(0);
static atomic64_t tm_model_reloads_failed = ATOMIC64_INIT(0);

static struct address_space *tm_model_evict_mapping(struct tm_model_gen *gen)
{
	return gen->inode->i_mapping;
}

/* The list. */

static void tm_model_evict_enlist(struct tm_model_piece *piece)
{
	struct tm_model_evict *evict = piece->gen->evict;

	lockdep_assert_held(&tm_model_evict_lock);
	list_add_tail(&piece->lru, &tm_model_evict_list);
	atomic64_add(piece->core.pages, &evict->evictable);
	atomic64_add(piece->core.pages, &tm_model_evictable_pages);
}

static void tm_model_evict_delist(struct tm_model_piece *piece)
{
	lockdep_assert_held(&tm_model_evict_lock);
	if (list_empty(&piece->lru))
		return;
	list_del_init(&piece->lru);
	atomic64_sub(piece->core.pages, &piece->gen->evict->evictable);
	atomic64_sub(piece->core.pages, &tm_model_evictable_pages);
}

/* It was used. */
static void tm_model_evict_touch(struct tm_model_piece *piece)
{
	spin_lock(&tm_model_evict_lock);
	if (!list_empty(&piece->lru))
		list_move_tail(&piece->lru, &tm_model_evict_list);
	spin_unlock(&tm_model_evict_lock);
}

static bool tm_model_evict_matches(const struct tm_model_piece *piece,
				   const struct tm_model_evict_scope *scope)
{
	/* On the list it has memory, and who takes that takes it off first. */
	u64 node = BIT_ULL(piece->memory->extent[0].run.node);

	return (!scope->gen || piece->gen == scope->gen) &&
	       (!scope->client || piece->client == scope->client) &&
	       (!scope->nodes || scope->nodes & node);
}

/* The least recently used piece that may go, or NULL. */
static struct tm_model_piece *
tm_model_evict_pick(const struct tm_model_evict_scope *scope)
{
	struct tm_model_piece *piece;

	lockdep_assert_held(&tm_model_evict_mutex);
	spin_lock(&tm_model_evict_lock);
	list_for_each_entry(piece, &tm_model_evict_list, lru)
		if (tm_model_evict_matches(piece, scope))
			goto out;
	piece = NULL;
out:
	spin_unlock(&tm_model_evict_lock);
	return piece;
}

static u32 tm_model_evict_count_matches(const struct tm_model_evict_scope *scope)
{
	struct tm_model_piece *piece;
	u32 count = 0;

	spin_lock(&tm_model_evict_lock);
	list_for_each_entry(piece, &tm_model_evict_list, lru)
		count += tm_model_evict_matches(piece, scope);
	spin_unlock(&tm_model_evict_lock);
	return count;
}

/* The first piece of the next @bytes on the list that is mapped, or NULL. */
static struct tm_model_piece *tm_model_evict_pick_mapped(u64 bytes)
{
	u64 pages = bytes >> PAGE_SHIFT, seen = 0;
	struct tm_model_piece *piece;

	lockdep_assert_held(&tm_model_evict_mutex);
	spin_lock(&tm_model_evict_lock);
	list_for_each_entry(piece, &tm_model_evict_list, lru) {
		if (seen >= pages)
			break;
		if (READ_ONCE(piece->mapped))
			goto out;
		seen += piece->core.pages;
	}
	piece = NULL;
out:
	spin_unlock(&tm_model_evict_lock);
	return piece;
}

/* Going. */

/* Empty its mappings. Nobody maps it while the lock is held. */
static void tm_model_evict_unmap(struct tm_model_piece *piece)
{
	struct address_space *mapping = tm_model_evict_mapping(piece->gen);
	u64 first = (u64)piece->index << (TM_CHUNK_SHIFT - PAGE_SHIFT);

	lockdep_assert_held_write(&mapping->invalidate_lock);
	unmap_mapping_pages(mapping, first, piece->core.pages, true);
	piece->mapped = false;
}

static bool tm_model_evict_held(const struct tm_model_piece *piece)
{
	const struct tm_memory *memory = piece->memory;

	if (atomic_read(&piece->pins))
		return true;
	for (u32 i = 0; i < memory->nr_extents; i++)
		if (tm_memory_held(&memory->extent[i].run))
			return true;
	return false;
}

/*
 * Take the memory out of a piece that nobody holds. @any: also out of one that is to stay.
 * Return: it or NULL.
 */
static struct tm_memory *tm_model_evict_take(struct tm_model_piece *piece,
					     bool any)
{
	struct address_space *mapping = tm_model_evict_mapping(piece->gen);
	struct tm_memory *memory = NULL;
	bool held;

	filemap_invalidate_lock(mapping);
	if (!piece->memory)
		goto out;
	tm_model_evict_unmap(piece);
	held = tm_model_evict_held(piece);
	spin_lock(&tm_model_evict_lock);
	if (held) {
		if (!list_empty(&piece->lru))
			list_move_tail(&piece->lru, &tm_model_evict_list);
	} else if (any || !list_empty(&piece->lru)) {
		tm_model_evict_delist(piece);
		memory = piece->memory;
		WRITE_ONCE(piece->memory, NULL);
	}
	spin_unlock(&tm_model_evict_lock);
	/* Before it can come back. */
	if (memory) {
		atomic64_add(piece->core.pages, &piece->gen->evict->evicted);
		atomic64_add(piece->core.pages, &tm_model_evicted_pages);
		tm_model_count_held(-(s64)piece->core.pages);
	}
out:
	filemap_invalidate_unlock(mapping);
	return memory;
}

/* Evict a piece, unless somebody holds it. @any: as above. Return: bytes given back. */
static u64 tm_model_evict_piece(struct tm_model_piece *piece, bool any)
{
	struct tm_model_gen *gen = piece->gen;
	struct tm_memory *memory;
	u64 bytes;

	lockdep_assert_held(&tm_model_evict_mutex);
	memory = tm_model_evict_take(piece, any);
	if (!memory)
		return 0;
	bytes = (u64)memory->nr_pages << PAGE_SHIFT;
	trace_tensormem_model_evict(kobject_name(&gen->model->kobj),
				    gen->core.number,
				    (u64)piece->index << TM_CHUNK_SHIFT, bytes);
	return tm_quarantine_put(piece->client, memory) ? bytes : 0;
}

static u64 tm_model_evict_some(const struct tm_model_evict_scope *scope,
			       u64 bytes)
{
	struct tm_model_piece *piece;
	u32 tries = tm_model_evict_count_matches(scope);
	u64 given = 0;

	/* What is held goes to the end of the list: once around. */
	while (given < bytes && tries--) {
		mutex_lock(&tm_model_evict_mutex);
		piece = tm_model_evict_pick(scope);
		if (piece)
			given += tm_model_evict_piece(piece, false);
		mutex_unlock(&tm_model_evict_mutex);
		if (!piece)
			break;
		cond_resched();
	}
	return given;
}

/* Unmap what would be next, so that its use is seen. */
static void tm_model_evict_age(u64 bytes)
{
	const struct tm_model_evict_scope any = { 0 };
	/* What faults meanwhile makes others the next: not for ever. */
	u64 rounds = min_t(u64, bytes >> TM_CHUNK_SHIFT,
			   tm_model_evict_count_matches(&any)) + 1;
	struct tm_model_piece *piece;

	do {
		mutex_lock(&tm_model_evict_mutex);
		piece = tm_model_evict_pick_mapped(bytes);
		if (piece) {
			struct address_space *mapping =
				tm_model_evict_mapping(piece->gen);

			filemap_invalidate_lock(mapping);
			tm_model_evict_unmap(piece);
			filemap_invalidate_unlock(mapping);
		}
		mutex_unlock(&tm_model_evict_mutex);
		cond_resched();
	} while (piece && --rounds && !fatal_signal_pending(current));
}

static u64 tm_model_evict_and_age(const struct tm_model_evict_scope *scope,
				  u64 bytes)
{
	u64 given = tm_model_evict_some(scope, bytes);

	if (given)
		tm_model_evict_age(bytes);
	return given;
}

/* Bytes that tm_model_evict() could give back, but for what is held. Context: any. */
u64 tm_model_evictable(void)
{
	return (u64)atomic64_read(&tm_model_evictable_pages) << PAGE_SHIFT;
}

/**
 * tm_model_evict - have evictable weights go, least recently used first
 * @bytes: how many at least; pieces go whole
 *
 * Context: may sleep; not in reclaim, and not with a generation's invalidate_lock held.
 * Return: bytes given back to the pools; less than @bytes when there is no more.
 */
u64 tm_model_evict(u64 bytes)
{
	const struct tm_model_evict_scope any = { 0 };

	return tm_model_evict_and_age(&any, bytes);
}

/* The same of one client's weights. */
u64 tm_model_evict_client(const struct tm_client *client, u64 bytes)
{
	const struct tm_model_evict_scope scope = { .client = client };

	return tm_model_evict_and_age(&scope, bytes);
}

/* The same of what is on some nodes. */
u64 tm_model_evict_nodes(u64 nodes, u64 bytes)
{
	const struct tm_model_evict_scope scope = { .nodes = nodes };

	return tm_model_evict_and_age(&scope, bytes);
}

/* The same of one generation, which the caller holds. */
u64 tm_model_evict_gen(struct tm_model_gen *gen, u64 bytes)
{
	const struct tm_model_evict_scope scope = { .gen = gen };

	return tm_model_evict_some(&scope, bytes);
}

/* Coming back. */

/* Read a piece into @memory. Return: 0, -EBADMSG for other bytes, or why not. */
static int tm_model_evict_read(const struct tm_model_piece *piece,
			       struct tm_memory *memory)
{
	const struct tm_model_watch *watch = &piece->gen->evict->watch;
	u64 start = (u64)piece->index << TM_CHUNK_SHIFT, done = 0;
	u64 size = min_t(u64, watch->size - start, TM_CHUNK_SIZE);
	loff_t pos = watch->offset + start;
	u32 crc = ~0u;

	vfs_fadvise(watch->file, pos, size, POSIX_FADV_WILLNEED);
	while (done < size) {
		size_t room;
		void *to = tm_model_span(memory, done, &room);
		size_t step = min3((u64)room, size - done,
				   (u64)TM_MODEL_EVICT_STEP);
		ssize_t got;

		if (fatal_signal_pending(current))
			return -EINTR;
		got = kernel_read(watch->file, to, step, &pos);
		if (got <= 0)
			return got ?: -EBADMSG;
		crc = crc32_le(crc, to, got);
		tm_bandwidth_move(piece->client, TM_MOVER_MODEL, got);
		done += got;
		cond_resched();
	}
	return crc == piece->crc ? 0 : -EBADMSG;
}

/* Memory for a piece. */
static struct tm_memory *
tm_model_evict_memory(const struct tm_model_piece *piece,
		      enum tm_model_evict_haste haste)
{
	u32 tries = haste == TM_MODEL_EVICT_HASTY ? 0 : TM_MODEL_EVICT_TRIES;
	struct tm_model_gen *gen = piece->gen;
	u64 start = (u64)piece->index << TM_CHUNK_SHIFT;
	u64 size = min_t(u64, gen->size - start, TM_CHUNK_SIZE);
	struct tm_memory *memory;

	for (;;) {
		memory = tm_model_supply(piece->client, size);
		if (!IS_ERR(memory) || !tm_model_short(PTR_ERR(memory)) ||
		    !tries--)
			return memory;
		if (haste == TM_MODEL_EVICT_PATIENT &&
		    tm_model_forget(gen->model))
			continue;
		schedule_timeout_killable(TM_MODEL_EVICT_PERIOD);
		if (fatal_signal_pending(current))
			return ERR_PTR(-EINTR);
	}
}

/* @memory is the piece's again. Return: 0, or -ESTALE when nobody can want it any more. */
static int tm_model_evict_give(struct tm_model_piece *piece,
			       struct tm_memory *memory)
{
	struct tm_model_gen *gen = piece->gen;
	struct tm_model_evict *evict = gen->evict;
	struct address_space *mapping = tm_model_evict_mapping(gen);
	int err;

	filemap_invalidate_lock(mapping);
	err = tm_model_usable(gen);
	if (!err) {
		atomic64_sub(piece->core.pages, &evict->evicted);
		atomic64_sub(piece->core.pages, &tm_model_evicted_pages);
		tm_model_count_held(piece->core.pages);
		spin_lock(&tm_model_evict_lock);
		WRITE_ONCE(piece->memory, memory);
		if (!evict->settled)
			tm_model_evict_enlist(piece);
		spin_unlock(&tm_model_evict_lock);
	}
	filemap_invalidate_unlock(mapping);
	return err;
}

/* The file is not what it was: the generation fails, soon. */
static void tm_model_evict_spoil(struct tm_model_evict *evict, int error)
{
	/* Pairs with tm_model_evict_broke(). */
	cmpxchg(&evict->error, 0, error);
	tm_model_watch_spoil(&evict->watch);
}

/* Bring in a piece that is gone and that nobody else brings in. */
static int tm_model_evict_reload(struct tm_model_piece *piece,
				 enum tm_model_evict_haste haste)
{
	struct tm_model_evict *evict = piece->gen->evict;
	struct mem_cgroup *memcg = set_active_memcg(evict->memcg);
	struct tm_memory *memory = tm_model_evict_memory(piece, haste);
	const struct cred *cred;
	int err;

	set_active_memcg(memcg);
	if (IS_ERR(memory))
		return PTR_ERR(memory);
	cred = override_creds(evict->watch.file->f_cred);
	err = tm_model_evict_read(piece, memory);
	revert_creds(cred);
	/* What was read while the file held is as it was promised. */
	smp_rmb();
	if (!tm_model_watch_unchanged(&evict->watch))
		err = -ETXTBSY;
	if (err == -ETXTBSY || err == -EBADMSG) {
		tm_model_evict_spoil(evict, err);
		err = -ESTALE;
	}
	if (!err)
		err = tm_model_evict_give(piece, memory);
	if (err)
		tm_quarantine_put(piece->client, memory);
	return err;
}

static void tm_model_evict_count(struct tm_model_piece *piece, int err,
				 u64 start)
{
	struct tm_model_gen *gen = piece->gen;

	if (!err) {
		atomic64_inc(&gen->evict->reloads);
		atomic64_inc(&tm_model_reloads);
	} else if (err != -EINTR) {
		atomic64_inc(&tm_model_reloads_failed);
	}
	if (start)
		trace_tensormem_model_reload(kobject_name(&gen->model->kobj),
					     gen->core.number,
					     (u64)piece->index << TM_CHUNK_SHIFT,
					     err, ktime_get_ns() - start);
}

/*
 * Bring in a piece that is gone; it may go again before anybody looks. Return: 0, -EINTR on a
 * fatal signal, -ESTALE when the generation fails, -EDQUOT, -ENOSPC, -ENOMEM, or what the file
 * system says.
 */
static int tm_model_evict_bring(struct tm_model_piece *piece,
				enum tm_model_evict_haste haste)
{
	u64 start = trace_tensormem_model_reload_enabled() ? ktime_get_ns() : 0;
	int err = 0;

	if (wait_on_bit_lock(&piece->coming, TM_MODEL_EVICT_COMING,
			     TASK_KILLABLE))
		return -EINTR;
	if (!READ_ONCE(piece->memory)) {
		err = tm_model_evict_reload(piece, haste);
		tm_model_evict_count(piece, err, start);
	}
	clear_and_wake_up_bit(TM_MODEL_EVICT_COMING, &piece->coming);
	return err;
}

/**
 * tm_model_evict_pin - have a piece in memory and keep it there, for a short time
 * @gen: the generation, held by the caller
 * @index: which piece
 *
 * Context: may sleep; under no lock. Return: 0, or as tm_model_usable() and
 * tm_model_evict_bring().
 */
int tm_model_evict_pin(struct tm_model_gen *gen, u32 index)
{
	struct tm_model_piece *piece = tm_model_piece(&gen->core, index);
	struct address_space *mapping = tm_model_evict_mapping(gen);
	bool there;
	int err;

	for (;;) {
		filemap_invalidate_lock_shared(mapping);
		err = tm_model_usable(gen);
		there = !err && piece->memory;
		if (there) {
			atomic_inc(&piece->pins);
			tm_model_evict_touch(piece);
		}
		filemap_invalidate_unlock_shared(mapping);
		if (there || err)
			return err;
		err = tm_model_evict_bring(piece, TM_MODEL_EVICT_PATIENT);
		if (err)
			return err;
	}
}

/* Undo tm_model_evict_pin(). Context: any. */
void tm_model_evict_unpin(struct tm_model_gen *gen, u32 index)
{
	/* What was read of it was read before it goes. */
	smp_mb__before_atomic();
	atomic_dec(&tm_model_piece(&gen->core, index)->pins);
}

/* Map what is there. Return: 0 when the piece is gone. */
static vm_fault_t tm_model_evict_map(struct tm_model_piece *piece,
				     struct vm_fault *vmf, u32 *mapped)
{
	struct address_space *mapping = tm_model_evict_mapping(piece->gen);
	vm_fault_t result = 0;
	struct tm_region region;

	filemap_invalidate_lock_shared(mapping);
	if (tm_model_usable(piece->gen)) {
		result = VM_FAULT_SIGBUS;
	} else if (piece->memory) {
		region = (struct tm_region){
			.range.start = (u64)piece->index <<
				       (TM_CHUNK_SHIFT - PAGE_SHIFT),
			.range.length = piece->core.pages,
			.memory = piece->memory,
			.huge = true,
		};
		WRITE_ONCE(piece->mapped, true);
		result = tm_vm_map(vmf, &region, mapped);
		tm_model_evict_touch(piece);
	}
	filemap_invalidate_unlock_shared(mapping);
	return result;
}

/*
 * Bring the piece in with no lock of the memory map held: a disk is slow, and file systems take
 * locks that writers hold while they touch memory. Why it cannot be done shows in the attempt
 * that follows.
 */
static vm_fault_t tm_model_evict_fault_unlocked(struct tm_model_piece *piece,
						struct vm_fault *vmf)
{
	struct file *file = vmf->vma->vm_file;

	/* Who must not wait asks again in another way. */
	if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT)
		return VM_FAULT_RETRY;
	/* It holds the generation, and after this nothing else does. */
	get_file(file);
	release_fault_lock(vmf);
	tm_model_evict_bring(piece, TM_MODEL_EVICT_PATIENT);
	fput(file);
	return VM_FAULT_RETRY;
}

/**
 * tm_model_evict_fault - map the piece that a fault is in; it may have to come back
 * @gen: the generation
 * @vmf: the fault, within the model
 * @mapped: how many pages that were
 *
 * Context: of a fault. Return: VM_FAULT_NOPAGE, VM_FAULT_RETRY with the fault's lock dropped,
 * or VM_FAULT_SIGBUS.
 */
vm_fault_t tm_model_evict_fault(struct tm_model_gen *gen, struct vm_fault *vmf,
				u32 *mapped)
{
	u32 index = vmf->pgoff >> (TM_CHUNK_SHIFT - PAGE_SHIFT);
	struct tm_model_piece *piece;
	vm_fault_t result;
	int err;

	if (tm_model_usable(gen) || index >= gen->core.nr_pieces)
		return VM_FAULT_SIGBUS;
	piece = tm_model_piece(&gen->core, index);
	result = tm_model_evict_map(piece, vmf, mapped);
	if (result)
		return result;
	if (fault_flag_allow_retry_first(vmf->flags))
		return tm_model_evict_fault_unlocked(piece, vmf);
	err = tm_model_evict_bring(piece, TM_MODEL_EVICT_HASTY);
	/* It may have gone already, or the signal ends the task: the fault comes again. */
	return err && err != -EINTR ? VM_FAULT_SIGBUS : VM_FAULT_NOPAGE;
}

/**
 * tm_model_evict_forked - a mapping is being made from another one
 * @vma: the new one
 *
 * What fork() copies of page tables may appear in the child after the parent's were
 * emptied (quarantine.c tells how). So it copies none: it asks after this call.
 *
 * Context: process context with mmap_lock of the new mapping held for writing.
 */
void tm_model_evict_forked(struct vm_area_struct *vma)
{
	/* One that is split in two keeps what it has. */
	if (vma->vm_mm != current->mm)
		vm_flags_mod(vma, VM_WIPEONFORK, 0);
}

/* The file. */

/* From now on all stays. */
static void tm_model_evict_stay(struct tm_model_gen *gen)
{
	spin_lock(&tm_model_evict_lock);
	gen->evict->settled = true;
	for (u32 i = 0; i < gen->core.nr_pieces; i++)
		tm_model_evict_delist(tm_model_piece(&gen->core, i));
	spin_unlock(&tm_model_evict_lock);
}

/* Bring in what is missing, for good. Return: 0, or why that cannot be done in time. */
static int tm_model_evict_settle(struct tm_model_gen *gen)
{
	const struct tm_model_watch *watch = &gen->evict->watch;
	unsigned long end = jiffies + TM_MODEL_EVICT_SETTLE;
	int err = 0;

	tm_model_evict_stay(gen);
	for (u32 i = 0; !err && i < gen->core.nr_pieces; i++) {
		struct tm_model_piece *piece = tm_model_piece(&gen->core, i);

		if (READ_ONCE(watch->ended))
			return 0;
		if (READ_ONCE(piece->memory))
			continue;
		err = time_after(jiffies, end) ? -ETXTBSY :
		      tm_model_evict_bring(piece, TM_MODEL_EVICT_SETTLING);
	}
	return err;
}

/* Nobody can read it any more: its memory goes as far as nobody holds it. */
static void tm_model_evict_ruin(struct tm_model_gen *gen, int error)
{
	tm_model_fail(gen, error);
	for (u32 i = 0; i < gen->core.nr_pieces; i++) {
		mutex_lock(&tm_model_evict_mutex);
		tm_model_evict_piece(tm_model_piece(&gen->core, i), true);
		mutex_unlock(&tm_model_evict_mutex);
		cond_resched();
	}
}

static void tm_model_evict_broke(struct tm_model_watch *watch,
				 struct tm_model_gen *gen)
{
	struct tm_model_evict *evict =
		container_of(watch, struct tm_model_evict, watch);
	int err = READ_ONCE(evict->error);

	switch (tm_model_usable(gen)) {
	case 0:
		if (!err)
			err = tm_model_evict_settle(gen);
		if (err)
			tm_model_evict_ruin(gen, READ_ONCE(evict->error) ?: err);
		break;
	case -EAGAIN:
		/* There is nothing to bring in yet, or it becomes usable just now: it is as good as its file. */
		tm_model_evict_ruin(gen, -ETXTBSY);
		break;
	}
}

/**
 * tm_model_evict_create - make a generation evictable
 * @gen: the generation, before it is staged
 * @from: a descriptor of its file
 * @offset: of the model in it
 *
 * Context: may sleep. Return: what it needs, or an ERR_PTR as tm_model_watch_begin().
 */
struct tm_model_evict *tm_model_evict_create(struct tm_model_gen *gen,
					     const struct file *from,
					     u64 offset)
{
	struct tm_model_evict *evict = kzalloc(sizeof(*evict), TM_GFP);
	int err;

	if (!evict)
		return ERR_PTR(-ENOMEM);
	/* What comes back is nobody's access: a fault is not to write to the disk. */
	err = tm_model_watch_begin(&evict->watch, gen, from, offset, O_NOATIME,
				   tm_model_evict_broke);
	if (err) {
		kfree(evict);
		return ERR_PTR(err);
	}
	evict->memcg = get_mem_cgroup_from_mm(current->mm);
	return evict;
}

/* Nothing comes back any more. Context: may sleep; nobody has the generation. */
void tm_model_evict_end(struct tm_model_evict *evict)
{
	if (evict->ended)
		return;
	evict->ended = true;
	tm_model_watch_end(&evict->watch);
}

/* Context: may sleep; there is no piece of the generation any more. */
void tm_model_evict_destroy(struct tm_model_evict *evict)
{
	tm_model_evict_end(evict);
	mem_cgroup_put(evict->memcg);
	kfree(evict);
}

/* As tm_model_watch_check(). */
int tm_model_evict_check(const struct tm_model_evict *evict)
{
	return tm_model_watch_check(&evict->watch);
}

/* @gen is loaded: its pieces may go. Context: under its slot's lock. */
void tm_model_evict_join(struct tm_model_gen *gen)
{
	lockdep_assert_held_write(&gen->model->lock);
	spin_lock(&tm_model_evict_lock);
	for (u32 i = 0; i < gen->core.nr_pieces; i++) {
		struct tm_model_piece *piece = tm_model_piece(&gen->core, i);

		piece->gen = gen;
		piece->index = i;
		tm_model_evict_enlist(piece);
	}
	spin_unlock(&tm_model_evict_lock);
}

/* A piece is about to be freed. Context: may sleep; no generation has it. */
void tm_model_evict_leave(struct tm_model_piece *piece)
{
	/* Of one that never was loaded, or is not evictable. */
	if (!piece->gen)
		return;
	mutex_lock(&tm_model_evict_mutex);
	spin_lock(&tm_model_evict_lock);
	tm_model_evict_delist(piece);
	spin_unlock(&tm_model_evict_lock);
	mutex_unlock(&tm_model_evict_mutex);
	if (!piece->memory)
		atomic64_sub(piece->core.pages, &tm_model_evicted_pages);
}

void tm_model_evict_stats(struct tm_model_evict_stats *stats)
{
	*stats = (struct tm_model_evict_stats){
		.evictable = tm_model_evictable(),
		.evicted = (u64)atomic64_read(&tm_model_evicted_pages) <<
			   PAGE_SHIFT,
		.reloads = atomic64_read(&tm_model_reloads),
		.failed = atomic64_read(&tm_model_reloads_failed),
	};
}

/* Of one generation; @failed is not counted there. All zero for one that is not evictable. */
void tm_model_evict_gen_stats(struct tm_model_gen *gen,
			      struct tm_model_evict_stats *stats)
{
	struct tm_model_evict *evict = gen->evict;

	*stats = (struct tm_model_evict_stats){ 0 };
	if (!evict)
		return;
	stats->evictable = (u64)atomic64_read(&evict->evictable) << PAGE_SHIFT;
	stats->evicted = (u64)atomic64_read(&evict->evicted) << PAGE_SHIFT;
	stats->reloads = atomic64_read(&evict->reloads);
}
