// SPDX-License-Identifier: GPL-2.0-only
/*
 * Loading a generation: a thread for each, which reads the file once, a chunk at a time.
 * A chunk that turns out to be the active generation's is shared, and its memory serves
 * the next one; so what is private is never more than what has changed, and one chunk.
 *
 * The thread works for the one who stages: on the bill of his client and of his memory
 * cgroup. Who aborts the load sends it a signal, which ends its reads and its search for
 * memory, and does not wait for it.
 */
#include <crypto/hash.h>
#include <linux/crc32.h>
#include <linux/cred.h>
#include <linux/err.h>
#include <linux/fadvise.h>
#include <linux/file.h>
#include <linux/freezer.h>
#include <linux/fs.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <uapi/linux/tensormem.h>

#include "bandwidth.h"
#include "client.h"
#include "memory.h"
#include "model.h"
#include "model_cached.h"
#include "model_evict.h"
#include "model_load.h"
#include "pages.h"
#include "quarantine.h"
#include "supply.h"

/* Bytes read at a time: what is compared and hashed next is in the cache still. */
#define TM_MODEL_STEP	(256 * 1024)

/**
 * struct tm_model_load - a load, from its preparation to its end
 * @gen: what is loaded
 * @base: the active generation when it began, or NULL; held
 * @file: from where
 * @offset: of the model in it
 * @hash: VERIFY: the SHA-256 of what was read so far, or NULL
 * @sha256: what it is to be
 * @memcg: the stager's memory cgroup
 * @task: the thread, or NULL when there is nothing to do
 * @spare: a chunk that was read and found to be the base's, or NULL
 * @crc: of the piece that was read last, if it is to be evictable
 */
struct tm_model_load {
	struct tm_model_gen *gen;
	struct tm_model_gen *base;
	struct file *file;
	u64 offset;
	struct shash_desc *hash;
	u8 sha256[TENSORMEM_SHA256];
	struct mem_cgroup *memcg;
	struct task_struct *task;
	struct tm_memory *spare;
	u32 crc;
};

/**
 * tm_model_span - where a byte of a memory is, and how many follow it there
 * @memory: the memory
 * @offset: of the byte
 * @room: so many
 *
 * Context: any; the caller keeps @memory alive.
 */
void *tm_model_span(const struct tm_memory *memory, u64 offset, size_t *room)
{
	const struct tm_extent *extent =
		tm_memory_find(memory, offset >> PAGE_SHIFT);
	u64 within = offset - ((u64)extent->first << PAGE_SHIFT);

	*room = (PAGE_SIZE << extent->run.order) - within;
	return page_address(tm_pages_page(&extent->run)) + within;
}

static struct shash_desc *tm_model_hash(void)
{
	struct crypto_shash *tfm = crypto_alloc_shash("sha256", 0, 0);
	struct shash_desc *hash;
	int err;

	if (IS_ERR(tfm))
		return ERR_PTR(PTR_ERR(tfm) == -ENOENT ? -EOPNOTSUPP :
							 PTR_ERR(tfm));
	hash = kzalloc(sizeof(*hash) + crypto_shash_descsize(tfm), TM_GFP);
	if (!hash) {
		crypto_free_shash(tfm);
		return ERR_PTR(-ENOMEM);
	}
	hash->tfm = tfm;
	err = crypto_shash_init(hash);
	if (err) {
		kfree(hash);
		crypto_free_shash(tfm);
		return ERR_PTR(err);
	}
	return hash;
}

static void tm_model_hash_free(struct shash_desc *hash)
{
	struct crypto_shash *tfm;

	if (!hash)
		return;
	tfm = hash->tfm;
	kfree_sensitive(hash);
	crypto_free_shash(tfm);
}

/* Whether the load has been given up. The signal says it too, unless it came too early. */
static bool tm_model_given_up(const struct tm_model_load *load)
{
	return READ_ONCE(load->gen->usable) != -EAGAIN;
}

/* Read all of @size bytes into @to. Return: 0 or why not. */
static int tm_model_read(struct tm_model_load *load, u64 pos, void *to,
			 size_t size)
{
	loff_t from = load->offset + pos;

	while (size) {
		ssize_t got;

		try_to_freeze();
		if (tm_model_given_up(load) || fatal_signal_pending(current) ||
		    tm_bandwidth_wait(load->gen->client))
			return -EINTR;
		got = kernel_read(load->file, to, size, &from);
		if (got < 0)
			return got;
		if (!got)
			return -EBADMSG;
		tm_bandwidth_move(load->gen->client, TM_MOVER_MODEL, got);
		to += got;
		size -= got;
	}
	return 0;
}

/* Whether @size bytes at @data are those of @piece at @offset; of one extent. */
static bool tm_model_same(const struct tm_model_piece *piece, u64 offset,
			  const void *data, size_t size)
{
	while (size) {
		size_t room;
		const void *other = tm_model_span(piece->memory, offset, &room);
		size_t part = min(size, room);

		if (memcmp(other, data, part))
			return false;
		data += part;
		offset += part;
		size -= part;
	}
	return true;
}

/*
 * Fill @memory with @size bytes of the model from @pos on. @same: the piece that it may
 * be equal to; NULL when it is not, or not any more.
 */
static int tm_model_fill(struct tm_model_load *load, u64 pos, u64 size,
			 struct tm_memory *memory,
			 const struct tm_model_piece **same)
{
	u64 done = 0;

	load->crc = ~0u;
	while (done < size) {
		size_t room;
		void *to = tm_model_span(memory, done, &room);
		size_t step = min3((u64)room, size - done, (u64)TM_MODEL_STEP);
		int err = tm_model_read(load, pos + done, to, step);

		if (!err && load->hash)
			err = crypto_shash_update(load->hash, to, step);
		if (err)
			return err;
		if (load->gen->evict)
			load->crc = crc32_le(load->crc, to, step);
		/* To the end of the page: behind the model there are zeros. */
		if (*same) {
			tm_bandwidth_move(load->gen->client, TM_MOVER_MODEL,
					  PAGE_ALIGN(step));
			if (!tm_model_same(*same, done, to, PAGE_ALIGN(step)))
				*same = NULL;
		}
		done += step;
		WRITE_ONCE(load->gen->loaded, pos + done);
		cond_resched();
	}
	return 0;
}

/* Whether @err says that there was no memory. */
bool tm_model_short(int err)
{
	return err == -EDQUOT || err == -ENOSPC || err == -ENOMEM;
}

/* Memory for a piece of @size bytes. Return: it or an ERR_PTR as tm_supply(). */
struct tm_memory *tm_model_supply(struct tm_client *client, u64 size)
{
	/* The runs of a tail are in no window, where compaction looks. */
	struct tm_memory_request request = {
		.nr_pages = PFN_UP(size),
		.policy = size == TM_CHUNK_SIZE ? TM_MEMORY_CHUNKS :
						  TM_MEMORY_AUTO,
		.flags = TM_PAGES_UNMOVABLE | TM_PAGES_FOR(TM_FOR_MODEL),
		.numa = tm_client_numa(client),
	};

	return tm_supply(client, &request);
}

/* Whether there may be memory now that the previous generation has gone. */
static bool tm_model_relieve(struct tm_model_load *load, int err)
{
	if (!tm_model_short(err))
		return false;
	return tm_model_forget(load->gen->model);
}

/* Memory for @size bytes: the spare chunk, or new. Return: it or an ERR_PTR. */
static struct tm_memory *tm_model_memory(struct tm_model_load *load, u64 size)
{
	struct tm_client *client = load->gen->client;
	struct tm_memory *memory = load->spare;

	if (memory && size == TM_CHUNK_SIZE) {
		load->spare = NULL;
		return memory;
	}
	do {
		memory = tm_model_supply(client, size);
	} while (IS_ERR(memory) && tm_model_relieve(load, PTR_ERR(memory)));
	return memory;
}

/* What the base has where the generation gets its next piece, of as many pages. */
static const struct tm_model_piece *
tm_model_candidate(const struct tm_model_load *load, u32 index, u64 size)
{
	const struct tm_model_piece *piece;

	if (!load->base || index >= load->base->core.nr_pieces)
		return NULL;
	piece = tm_model_piece(&load->base->core, index);
	return piece->core.pages == PFN_UP(size) ? piece : NULL;
}

/* Make a piece of @memory, which is consumed. */
static int tm_model_keep(struct tm_model_load *load, struct tm_memory *memory)
{
	struct tm_model_gen *gen = load->gen;
	struct tm_model_piece *piece = tm_model_piece_create(gen->client,
							     memory);
	int err;

	if (!piece) {
		tm_quarantine_put(gen->client, memory);
		return -ENOMEM;
	}
	piece->crc = load->crc;
	err = tm_model_add(gen, piece);
	if (err)
		tm_model_piece_destroy(piece);
	return err;
}

/* Load the next piece: @size bytes from @pos on. */
static int tm_model_load_piece(struct tm_model_load *load, u64 pos, u64 size)
{
	const struct tm_model_piece *same =
		tm_model_candidate(load, pos >> TM_CHUNK_SHIFT, size);
	struct tm_memory *memory = tm_model_memory(load, size);
	int err;

	if (IS_ERR(memory))
		return PTR_ERR(memory);
	err = tm_model_fill(load, pos, size, memory, &same);
	if (!err && !same)
		return tm_model_keep(load, memory);
	if (!err)
		err = tm_model_share(load->gen, load->base);
	if (!err && size == TM_CHUNK_SIZE)
		load->spare = memory;
	else
		tm_quarantine_put(load->gen->client, memory);
	return err;
}

/* Return: 0, or -EBADMSG when what was read is not what was promised. */
static int tm_model_verify(struct tm_model_load *load)
{
	u8 digest[TENSORMEM_SHA256];
	int err;

	if (!load->hash)
		return 0;
	err = crypto_shash_final(load->hash, digest);
	if (err)
		return err;
	return memcmp(digest, load->sha256, sizeof(digest)) ? -EBADMSG : 0;
}

static int tm_model_load_all(struct tm_model_load *load)
{
	const struct tm_model_evict *evict = load->gen->evict;
	u64 size = load->gen->size, pos = 0;
	int err = evict ? tm_model_evict_check(evict) : 0;

	while (!err && pos < size) {
		u64 part = min_t(u64, size - pos, TM_CHUNK_SIZE);

		/* The next chunk is on its way while this one is looked at. */
		vfs_fadvise(load->file, load->offset + pos,
			    min(size - pos, part + TM_CHUNK_SIZE),
			    POSIX_FADV_WILLNEED);
		err = tm_model_load_piece(load, pos, part);
		pos += part;
	}
	if (load->spare)
		tm_quarantine_put(load->gen->client, load->spare);
	if (!err)
		err = tm_model_verify(load);
	/* What was read is the file's still: it can be read again. */
	return !err && evict ? tm_model_evict_check(evict) : err;
}

/* Read all of it once, for its sum; what is read is in the page cache then. */
static int tm_model_load_sum(struct tm_model_load *load)
{
	u64 size = load->gen->size, pos = 0;
	void *buffer = kvmalloc(TM_MODEL_STEP, TM_GFP);
	int err = buffer ? 0 : -ENOMEM;

	while (!err && pos < size) {
		size_t step = min_t(u64, size - pos, TM_MODEL_STEP);

		vfs_fadvise(load->file, load->offset + pos,
			    min_t(u64, size - pos, TM_CHUNK_SIZE),
			    POSIX_FADV_WILLNEED);
		err = tm_model_read(load, pos, buffer, step);
		if (!err)
			err = crypto_shash_update(load->hash, buffer, step);
		pos += step;
		if (!err)
			WRITE_ONCE(load->gen->loaded, pos);
		cond_resched();
	}
	kvfree(buffer);
	return err ?: tm_model_verify(load);
}

static int tm_model_load_cached(struct tm_model_load *load)
{
	struct tm_model_gen *gen = load->gen;
	int err = tm_model_cached_check(gen->cached);

	if (!err && load->hash)
		err = tm_model_load_sum(load);
	if (!err)
		WRITE_ONCE(gen->loaded, gen->size);
	/* And once more: it is to be whole now that all can see it. */
	return err ?: tm_model_cached_check(gen->cached);
}

static void tm_model_load_free(struct tm_model_load *load)
{
	tm_model_hash_free(load->hash);
	mem_cgroup_put(load->memcg);
	kfree(load);
}

static int tm_model_thread(void *data)
{
	struct tm_model_load *load = data;
	const struct cred *cred;
	struct mem_cgroup *memcg;
	int err;

	allow_kernel_signal(SIGKILL);
	set_freezable();
	/* What the one who opened the file may not read, we do not read for him. */
	cred = override_creds(load->file->f_cred);
	memcg = set_active_memcg(load->memcg);
	err = load->gen->cached ? tm_model_load_cached(load) :
				  tm_model_load_all(load);
	set_active_memcg(memcg);
	revert_creds(cred);
	/* Now: a file that was loaded is not to keep its mount busy. */
	__fput_sync(load->file);
	tm_model_finish(load->gen, load->base, err);
	tm_model_load_free(load);
	module_put_and_kthread_exit(0);
}

/**
 * tm_model_load_create - prepare to load a generation
 * @gen: the generation
 * @file: from where; the load gets a reference of its own
 * @offset: where the model begins in it
 * @sha256: what its SHA-256 is to be, or NULL
 *
 * Context: may sleep. Return: it, for tm_model_load_stage() or tm_model_load_discard(),
 * or an ERR_PTR: -ENOMEM, -EINTR, -EOPNOTSUPP when the kernel has no SHA-256.
 */
struct tm_model_load *tm_model_load_create(struct tm_model_gen *gen,
					   struct file *file, u64 offset,
					   const u8 *sha256)
{
	struct tm_model_load *load = kzalloc(sizeof(*load), TM_GFP);
	int err;

	if (!load)
		return ERR_PTR(-ENOMEM);
	load->gen = gen;
	load->offset = offset;
	load->memcg = get_mem_cgroup_from_mm(current->mm);
	if (sha256) {
		memcpy(load->sha256, sha256, sizeof(load->sha256));
		load->hash = tm_model_hash();
		if (IS_ERR(load->hash)) {
			err = PTR_ERR(load->hash);
			load->hash = NULL;
			goto err;
		}
	}
	/* What is neither read nor copied needs no thread. */
	if (gen->cached && !sha256)
		goto out;
	load->task = kthread_create(tm_model_thread, load, "tm-load/%s",
				    kobject_name(&gen->model->kobj));
	if (IS_ERR(load->task)) {
		err = PTR_ERR(load->task);
		goto err;
	}
out:
	load->file = get_file(file);
	return load;
err:
	tm_model_load_free(load);
	return ERR_PTR(err);
}

/* Undo tm_model_load_create(). Context: may sleep. */
void tm_model_load_discard(struct tm_model_load *load)
{
	/* It has not run, so it has nothing to say. */
	if (load->task)
		kthread_stop(load->task);
	fput(load->file);
	tm_model_load_free(load);
}

/* As tm_model_stage(), with the load's thread. */
int tm_model_load_stage(struct tm_model_load *load, u64 number,
			const struct file *stager)
{
	return tm_model_stage(load->gen, number, load->task, stager,
			      &load->base);
}

/* Let the load begin, which has been staged; it is not the caller's any more. */
void tm_model_load_start(struct tm_model_load *load)
{
	if (!load->task) {
		tm_model_finish(load->gen, load->base,
				tm_model_load_cached(load));
		tm_model_load_discard(load);
		return;
	}
	/* Until the thread's last instruction. */
	__module_get(THIS_MODULE);
	wake_up_process(load->task);
}
