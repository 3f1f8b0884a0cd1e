// SPDX-License-Identifier: GPL-2.0-only
/*
 * Arenas of the RT pool and their clients: what comes and goes, outside of what must
 * not wait.
 */
#include <linux/cache.h>
#include <linux/cred.h>
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
#include "pages.h"
#include "park.h"
#include "rt.h"
#include "rt_pool.h"
#include "rt_sysfs.h"

static atomic_t tm_arena_ids = ATOMIC_INIT(0);
static atomic_t tm_rt_user_ids = ATOMIC_INIT(0);

u32 tm_rt_shift __ro_after_init;

void __init tm_arenas_init(void)
{
	tm_rt_shift = order_base_2(max_t(u32, cache_line_size(),
					 ARCH_DMA_MINALIGN));
}

u64 tm_arena_bytes(const struct tm_arena *arena)
{
	return (u64)arena->nr_chunks << TM_CHUNK_SHIFT;
}

/* Where the kernel sees a granule. Context: any. */
void *tm_arena_address(const struct tm_arena *arena, u32 granule)
{
	return arena->base + tm_rt_bytes(granule);
}

static void tm_arena_end(struct kref *ref)
{
	struct tm_arena *arena = container_of(ref, struct tm_arena, ref);

	if (arena->payer)
		put_cred(arena->payer);
	tm_client_put(arena->client);
	kvfree(arena);
}

/* @chunks of it are nobody's any more. */
static void tm_arena_settle(struct tm_arena *arena, u32 chunks, bool last)
{
	u64 pages = (u64)chunks << (TM_CHUNK_SHIFT - PAGE_SHIFT);

	tm_rt_pool_dismiss(chunks, last);
	/* It puts what it is given. */
	if (arena->payer)
		tm_limits_unpin(pages, get_cred(arena->payer));
	tm_rt_pool_settle();
}

/* A chunk that somebody held when its arena went has been let go. */
static void tm_arena_chunk_gone(void *owner)
{
	struct tm_arena *arena = owner;

	tm_arena_settle(arena, 1, false);
	kref_put(&arena->ref, tm_arena_end);
}

/*
 * Give all chunks back. One that somebody holds counts as the arena's until it is let go; or who leaves a page of each
 * in a pipe would have had all of them.
 */
static void tm_arena_put_chunks(struct tm_arena *arena)
{
	u32 free = arena->nr_chunks - arena->taken;

	while (arena->taken--) {
		struct tm_memory *memory = arena->chunk[arena->taken];

		memory->gone = tm_arena_chunk_gone;
		memory->owner = arena;
		kref_get(&arena->ref);
		if (tm_rt_pool_put(arena->client, memory)) {
			kref_put(&arena->ref, tm_arena_end);
			free++;
		}
	}
	tm_arena_settle(arena, free, true);
}

static int tm_arena_charge(struct tm_arena *arena)
{
	int err;

	do {
		err = tm_client_charge(arena->client, tm_arena_bytes(arena));
	} while (err && tm_park_relieve_client(arena->client));
	return err;
}

/* Charge for all chunks and take them. Return: 0, -EDQUOT, or as tm_rt_pool_take(). */
static int tm_arena_take_chunks(struct tm_arena *arena)
{
	u32 pages = TM_CHUNK_SIZE >> PAGE_SHIFT;
	int err = tm_arena_charge(arena);

	while (!err && arena->taken < arena->nr_chunks) {
		struct tm_memory *memory =
			fatal_signal_pending(current) ? ERR_PTR(-EINTR) :
							tm_rt_pool_take();
		struct page *page;

		if (IS_ERR(memory)) {
			err = PTR_ERR(memory);
			tm_client_uncharge(arena->client,
					   (u64)(arena->nr_chunks - arena->taken)
					   << TM_CHUNK_SHIFT);
			break;
		}
		page = tm_pages_page(&memory->extent[0].run);
		for (u32 i = 0; i < pages; i++)
			arena->page[arena->taken * pages + i] = page + i;
		arena->chunk[arena->taken++] = memory;
	}
	return err;
}

/* What it takes beside the chunks. Return: 0, -EINVAL for sizes that cannot be, -ENOMEM. */
static int tm_arena_tables(struct tm_arena *arena, u32 movable)
{
	u64 bytes = tm_arena_bytes(arena);
	int err;

	if (bytes >> tm_rt_shift > TM_HEAP_MAX)
		return -EINVAL;
	err = tm_rt_init(&arena->rt, &arena->lock, bytes >> tm_rt_shift,
			 movable);
	if (err)
		return err;
	arena->chunk = kvcalloc(arena->nr_chunks, sizeof(*arena->chunk),
				TM_GFP);
	arena->page = kvcalloc(bytes >> PAGE_SHIFT, sizeof(*arena->page),
			       TM_GFP);
	arena->inode = tm_client_inode();
	if (arena->chunk && arena->page && !IS_ERR(arena->inode))
		return 0;
	if (!IS_ERR(arena->inode))
		iput(arena->inode);
	kvfree(arena->page);
	kvfree(arena->chunk);
	tm_rt_exit(&arena->rt);
	return -ENOMEM;
}

/* All of it goes but what others hold of its chunks. */
static void tm_arena_empty(struct tm_arena *arena)
{
	vunmap(arena->base);
	tm_arena_put_chunks(arena);
	iput(arena->inode);
	kvfree(arena->page);
	kvfree(arena->chunk);
	tm_rt_exit(&arena->rt);
}

static int tm_arena_fill(struct tm_arena *arena, u32 movable)
{
	int err;

	err = tm_arena_tables(arena, movable);
	if (err) {
		tm_arena_settle(arena, arena->nr_chunks, true);
		return err;
	}
	err = tm_arena_take_chunks(arena);
	if (!err) {
		arena->base = vmap(arena->page,
				   tm_arena_bytes(arena) >> PAGE_SHIFT, VM_MAP,
				   PAGE_KERNEL);
		err = arena->base ? 0 : -ENOMEM;
	}
	if (err)
		tm_arena_empty(arena);
	return err;
}

/* An arena that was admitted and has nothing yet, or NULL. */
static struct tm_arena *tm_arena_new(struct tm_client *client, u32 chunks)
{
	struct tm_arena *arena = kvzalloc(sizeof(*arena), TM_GFP);

	if (!arena)
		return NULL;
	kref_init(&arena->users);
	kref_init(&arena->ref);
	raw_spin_lock_init(&arena->lock);
	arena->chain = IRQ_WORK_INIT_HARD(tm_rt_chain);
	arena->id = atomic_inc_return(&tm_arena_ids);
	arena->nr_chunks = chunks;
	arena->client = tm_client_get(client);
	return arena;
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
	struct tm_arena *arena;
	int err;

	if (!bytes || movable > TM_RT_MOVABLE)
		return ERR_PTR(-EINVAL);
	err = tm_rt_pool_admit(chunks);
	if (err)
		return ERR_PTR(err);
	arena = tm_arena_new(client, chunks);
	if (!arena) {
		tm_rt_pool_dismiss(chunks, true);
		return ERR_PTR(-ENOMEM);
	}
	if (pin)
		err = tm_limits_pin(chunks << (TM_CHUNK_SHIFT - PAGE_SHIFT),
				    &arena->payer);
	if (err)
		tm_rt_pool_dismiss(chunks, true);
	else
		err = tm_arena_fill(arena, movable);
	if (!err)
		return arena;
	kref_put(&arena->ref, tm_arena_end);
	return ERR_PTR(err);
}

/* The last client has gone. What others hold of its chunks keeps it in existence. */
static void tm_arena_close(struct kref *users)
{
	struct tm_arena *arena = container_of(users, struct tm_arena, users);

	irq_work_sync(&arena->chain);
	tm_arena_empty(arena);
	kref_put(&arena->ref, tm_arena_end);
}

struct tm_arena *tm_arena_get(struct tm_arena *arena)
{
	kref_get(&arena->users);
	return arena;
}

/* Context: may sleep when it was the last reference. */
void tm_arena_put(struct tm_arena *arena)
{
	kref_put(&arena->users, tm_arena_close);
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
	tm_arena_get(arena);
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
