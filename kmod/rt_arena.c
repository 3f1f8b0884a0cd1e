// SPDX-License-Identifier: GPL-2.0-only
/*
 * Arenas of the RT pool and their clients: what comes and goes, outside of what must
 * not wait.
 */
#include <linux/cache.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "client.h"
#include "limits.h"
#include "memory.h"
#include "park.h"
#include "rt.h"
#include "rt_pool.h"
#include "rt_sysfs.h"

static atomic_t tm_arena_ids = ATOMIC_INIT(0);
static atomic_t tm_rt_user_ids = ATOMIC_INIT(0);

/* Bytes: no two blocks share what a CPU or a device writes at once. Context: any. */
u32 tm_rt_granule(void)
{
	return roundup_pow_of_two(max_t(u32, cache_line_size(),
					ARCH_DMA_MINALIGN));
}

u64 tm_arena_bytes(const struct tm_arena *arena)
{
	return (u64)arena->nr_chunks << TM_CHUNK_SHIFT;
}

/* Where the kernel sees a granule. Context: any. */
void *tm_arena_address(const struct tm_arena *arena, u32 granule)
{
	return arena->base + (size_t)granule * tm_rt_granule();
}

static void tm_arena_put_chunks(struct tm_arena *arena, u32 taken)
{
	while (taken--)
		tm_rt_pool_put(arena->client, arena->chunk[taken]);
	tm_rt_pool_settle();
}

/* Charge for all chunks and take them. Return: 0, -EDQUOT, or as tm_rt_pool_take(). */
static int tm_arena_take_chunks(struct tm_arena *arena)
{
	u32 pages = TM_CHUNK_SIZE >> PAGE_SHIFT;
	u32 taken = 0;
	int err;

	do {
		err = tm_client_charge(arena->client, tm_arena_bytes(arena));
	} while (err && tm_park_relieve_client(arena->client));
	if (err)
		return err;
	while (taken < arena->nr_chunks) {
		struct tm_memory *memory =
			fatal_signal_pending(current) ? ERR_PTR(-EINTR) :
							tm_rt_pool_take();
		struct page *page;

		if (IS_ERR(memory)) {
			tm_client_uncharge(arena->client,
					   (u64)(arena->nr_chunks - taken)
					   << TM_CHUNK_SHIFT);
			tm_arena_put_chunks(arena, taken);
			return PTR_ERR(memory);
		}
		page = tm_pages_page(&memory->extent[0].run);
		for (u32 i = 0; i < pages; i++)
			arena->page[taken * pages + i] = page + i;
		arena->chunk[taken++] = memory;
	}
	return 0;
}

/* The tables of an arena whose size is known. Return: 0 or an errno. */
static int tm_arena_init(struct tm_arena *arena, u32 movable)
{
	u64 bytes = tm_arena_bytes(arena);
	int err;

	raw_spin_lock_init(&arena->lock);
	if (div_u64(bytes, tm_rt_granule()) > TM_HEAP_MAX)
		return -EINVAL;
	err = tm_rt_init(&arena->rt, &arena->lock,
			 div_u64(bytes, tm_rt_granule()), movable);
	if (err)
		return err;
	arena->inode = tm_client_inode();
	if (IS_ERR(arena->inode)) {
		err = PTR_ERR(arena->inode);
		goto err_core;
	}
	err = -ENOMEM;
	arena->chunk = kvcalloc(arena->nr_chunks, sizeof(*arena->chunk),
				TM_GFP);
	arena->page = kvcalloc(bytes >> PAGE_SHIFT, sizeof(*arena->page),
			       TM_GFP);
	if (arena->chunk && arena->page)
		return 0;
	kvfree(arena->page);
	kvfree(arena->chunk);
	iput(arena->inode);
err_core:
	tm_rt_exit(&arena->rt);
	return err;
}

static void tm_arena_exit(struct tm_arena *arena)
{
	kvfree(arena->page);
	kvfree(arena->chunk);
	iput(arena->inode);
	tm_rt_exit(&arena->rt);
}

static int tm_arena_fill(struct tm_arena *arena, u32 movable)
{
	int err;

	err = tm_arena_init(arena, movable);
	if (err)
		return err;
	err = tm_arena_take_chunks(arena);
	if (err)
		goto err_exit;
	arena->base = vmap(arena->page, tm_arena_bytes(arena) >> PAGE_SHIFT,
			   VM_MAP, PAGE_KERNEL);
	if (arena->base)
		return 0;
	err = -ENOMEM;
	tm_arena_put_chunks(arena, arena->nr_chunks);
err_exit:
	tm_arena_exit(arena);
	return err;
}

/**
 * tm_arena_create - make an arena that has no client
 * @client: on whose bill
 * @bytes: rounded up to chunks
 * @movable: movable blocks that there may be at a time
 * @pin: count it against current's RLIMIT_MEMLOCK
 *
 * Context: may sleep.
 * Return: the arena, or an ERR_PTR: -EINVAL for sizes that cannot be, -ENOSPC when the
 * pool or level 1 has no such room, -EDQUOT, -EPERM beyond RLIMIT_MEMLOCK, -ENOMEM, -EINTR.
 */
struct tm_arena *tm_arena_create(struct tm_client *client, u64 bytes,
				 u32 movable, bool pin)
{
	u64 chunks = (bytes >> TM_CHUNK_SHIFT) +
		     !!(bytes & (TM_CHUNK_SIZE - 1));
	u64 pages = chunks << (TM_CHUNK_SHIFT - PAGE_SHIFT);
	struct tm_arena *arena;
	int err;

	if (!bytes || movable > TM_RT_MOVABLE)
		return ERR_PTR(-EINVAL);
	err = tm_rt_pool_admit(chunks);
	if (err)
		return ERR_PTR(err);
	arena = kvzalloc(sizeof(*arena), TM_GFP);
	if (!arena) {
		err = -ENOMEM;
		goto err_admit;
	}
	kref_init(&arena->ref);
	arena->id = atomic_inc_return(&tm_arena_ids);
	arena->nr_chunks = chunks;
	arena->client = tm_client_get(client);
	if (pin)
		err = tm_limits_pin(pages, &arena->payer);
	if (err)
		goto err_arena;
	err = tm_arena_fill(arena, movable);
	if (!err)
		return arena;
	tm_limits_unpin(pages, arena->payer);
err_arena:
	tm_client_put(client);
	kvfree(arena);
err_admit:
	tm_rt_pool_dismiss(chunks);
	return ERR_PTR(err);
}

static void tm_arena_release(struct kref *ref)
{
	struct tm_arena *arena = container_of(ref, struct tm_arena, ref);

	vunmap(arena->base);
	tm_arena_put_chunks(arena, arena->nr_chunks);
	tm_arena_exit(arena);
	tm_limits_unpin(tm_arena_bytes(arena) >> PAGE_SHIFT, arena->payer);
	tm_rt_pool_dismiss(arena->nr_chunks);
	tm_client_put(arena->client);
	kvfree(arena);
}

/* Context: may sleep when it was the last reference. */
void tm_arena_put(struct tm_arena *arena)
{
	kref_put(&arena->ref, tm_arena_release);
}

/* Take everything from a client that is going. */
static void tm_rt_user_leave(struct tm_rt_user *user)
{
	struct tm_arena *arena = user->arena;
	struct task_struct *task;
	unsigned long flags;
	bool more;

	do {
		flags = tm_arena_lock(arena);
		more = tm_rt_leave(&arena->rt, &user->core);
		if (!more)
			arena->nr_users--;
		task = tm_rt_serve_next(arena);
		tm_arena_unlock(arena, flags, task);
		cond_resched();
	} while (more);
	tm_arena_put(arena);
}

/**
 * tm_rt_user_create - make an RT client
 * @arena: of which arena; it gets a reference of its own
 * @priority: below TM_RT_PRIORITIES
 *
 * Context: may sleep.
 * Return: the client or an ERR_PTR: -ENOSPC when the arena has too many, -ENOMEM.
 */
struct tm_rt_user *tm_rt_user_create(struct tm_arena *arena, u32 priority)
{
	struct tm_rt_user *user = kzalloc(sizeof(*user), TM_GFP);
	unsigned long flags;
	int err;

	if (!user)
		return ERR_PTR(-ENOMEM);
	user->id = atomic_inc_return(&tm_rt_user_ids);
	user->arena = arena;
	flags = tm_arena_lock(arena);
	err = tm_rt_join(&arena->rt, &user->core, priority);
	if (!err)
		arena->nr_users++;
	tm_arena_unlock(arena, flags, NULL);
	if (err) {
		kfree(user);
		return ERR_PTR(err);
	}
	kref_get(&arena->ref);
	err = tm_rt_sysfs_add(user);
	if (!err)
		return user;
	tm_rt_user_leave(user);
	kobject_put(&user->kobj);
	return ERR_PTR(err);
}

/**
 * tm_rt_user_destroy - free all that an RT client has
 * @user: the client; consumed
 *
 * Context: may sleep; no call of it is under way.
 */
void tm_rt_user_destroy(struct tm_rt_user *user)
{
	/* First: who reads a file there looks at the arena. */
	tm_rt_sysfs_remove(user);
	tm_rt_user_leave(user);
	kobject_put(&user->kobj);
}
