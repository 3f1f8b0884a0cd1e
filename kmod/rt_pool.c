// SPDX-License-Identifier: GPL-2.0-only
/*
 * How much memory the RT pool may have, and the chunks that its arenas are made of. What is
 * set aside beforehand stays here when no arena uses it; else chunks come from level 1 with an arena
 * and go back with it.
 */
#include <linux/err.h>
#include <linux/list.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/printk.h>
#include <linux/workqueue.h>

#include "board.h"
#include "client.h"
#include "memory.h"
#include "numa.h"
#include "quarantine.h"
#include "rt_pool.h"
#include "supply.h"

static unsigned long long rt_size;
module_param(rt_size, ullong, 0444);
MODULE_PARM_DESC(rt_size, "bytes that arenas of the RT pool may have (0: by the board)");

static unsigned long long rt_ready;
module_param(rt_ready, ullong, 0444);
MODULE_PARM_DESC(rt_ready, "bytes of it that are set aside at once and kept");

/* How often what is missing is asked for: it costs others what makes room. */
#define TM_RT_POOL_PERIOD	HZ

static void tm_rt_pool_refill(struct work_struct *work);

/* One who changes a setting at a time; the other is taken inside of it. */
static DEFINE_MUTEX(tm_rt_pool_setting);
static DEFINE_MUTEX(tm_rt_pool_mutex);
static DECLARE_DELAYED_WORK(tm_rt_pool_work, tm_rt_pool_refill);

/* In chunks; all under the mutex. */
static struct {
	u64 size;
	u64 ready;
	u64 held;	/* in arenas, idle, or being taken from level 1 */
	u64 used;	/* what arenas were admitted for: at most @size */
	u64 nr_idle;
	struct list_head idle;
	u32 arenas;
} tm_rt_pool = {
	.idle = LIST_HEAD_INIT(tm_rt_pool.idle),
};

/* On nobody's bill: an arena's client pays for all of it at once, and nobody for what is idle. */
static struct tm_memory *tm_rt_pool_supply(void)
{
	struct tm_memory_request request = {
		.nr_pages = TM_CHUNK_SIZE >> PAGE_SHIFT,
		.policy = TM_MEMORY_CHUNKS,
		.flags = TM_PAGES_FOR(TM_FOR_RT),
		.numa = tm_numa_local(),
	};
	struct tm_memory *memory = tm_supply(NULL, &request);

	if (!IS_ERR(memory))
		memory->extent[0].run.zeroed = true;
	return memory;
}

/* Get a chunk that is counted as held already. */
static struct tm_memory *tm_rt_pool_grow(void)
{
	struct tm_memory *memory = tm_rt_pool_supply();

	if (IS_ERR(memory)) {
		mutex_lock(&tm_rt_pool_mutex);
		tm_rt_pool.held--;
		mutex_unlock(&tm_rt_pool_mutex);
	}
	return memory;
}

static void tm_rt_pool_add_idle(struct tm_memory *memory)
{
	lockdep_assert_held(&tm_rt_pool_mutex);
	list_add(&memory->held, &tm_rt_pool.idle);
	tm_rt_pool.nr_idle++;
}

static struct tm_memory *tm_rt_pool_take_idle(void)
{
	struct tm_memory *memory;

	lockdep_assert_held(&tm_rt_pool_mutex);
	memory = list_first_entry_or_null(&tm_rt_pool.idle, struct tm_memory,
					  held);
	if (memory) {
		list_del(&memory->held);
		tm_rt_pool.nr_idle--;
	}
	return memory;
}

/* Take what is missing from level 1. Return: 0, or why some of it is missing still. */
static int tm_rt_pool_fill(void)
{
	for (;;) {
		struct tm_memory *memory;
		bool enough;

		mutex_lock(&tm_rt_pool_mutex);
		enough = tm_rt_pool.held >= tm_rt_pool.ready;
		if (!enough)
			tm_rt_pool.held++;
		mutex_unlock(&tm_rt_pool_mutex);
		if (enough)
			return 0;
		memory = tm_rt_pool_grow();
		if (IS_ERR(memory))
			return PTR_ERR(memory);
		mutex_lock(&tm_rt_pool_mutex);
		tm_rt_pool_add_idle(memory);
		mutex_unlock(&tm_rt_pool_mutex);
	}
}

/* Give back what is idle and in excess. */
static void tm_rt_pool_trim(void)
{
	struct tm_memory *memory;

	do {
		memory = NULL;
		mutex_lock(&tm_rt_pool_mutex);
		if (tm_rt_pool.held > tm_rt_pool.ready)
			memory = tm_rt_pool_take_idle();
		if (memory)
			tm_rt_pool.held--;
		mutex_unlock(&tm_rt_pool_mutex);
		/* Idle ones were nobody's when they came to be so. */
		if (memory)
			tm_memory_abandon(memory);
	} while (memory);
}

static void tm_rt_pool_refill(struct work_struct *work)
{
	bool missing = tm_rt_pool_fill();

	/* Less may have been asked for meanwhile. */
	tm_rt_pool_trim();
	if (missing)
		schedule_delayed_work(&tm_rt_pool_work, TM_RT_POOL_PERIOD);
}

static u64 tm_rt_pool_chunks(u64 bytes)
{
	return (bytes >> TM_CHUNK_SHIFT) + !!(bytes & (TM_CHUNK_SIZE - 1));
}

/**
 * tm_rt_pool_init - learn how much there may be, and set aside what is asked for
 *
 * Context: may sleep.
 */
void __init tm_rt_pool_init(void)
{
	u64 bytes = rt_size ?: tm_board()->protocol;

	bytes = min(bytes, (u64)totalram_pages() << PAGE_SHIFT);
	tm_rt_pool.size = bytes >> TM_CHUNK_SHIFT;
	tm_rt_pool.ready = min(tm_rt_pool_chunks(rt_ready), tm_rt_pool.size);
	if (!tm_rt_pool_fill())
		return;
	pr_warn("tensormem: rt_ready: cannot set aside %llu bytes yet\n",
		rt_ready);
	schedule_delayed_work(&tm_rt_pool_work, TM_RT_POOL_PERIOD);
}

/* Context: may sleep; there is no arena. */
void tm_rt_pool_exit(void)
{
	mutex_lock(&tm_rt_pool_mutex);
	tm_rt_pool.ready = 0;
	mutex_unlock(&tm_rt_pool_mutex);
	cancel_delayed_work_sync(&tm_rt_pool_work);
	tm_rt_pool_trim();
}

/**
 * tm_rt_pool_admit - let there be an arena
 * @chunks: of how many
 *
 * Context: may sleep. Return: 0, -ENOSPC when there is no such room.
 */
int tm_rt_pool_admit(u64 chunks)
{
	int err = 0;

	mutex_lock(&tm_rt_pool_mutex);
	if (chunks > tm_rt_pool.size - tm_rt_pool.used) {
		err = -ENOSPC;
	} else {
		tm_rt_pool.used += chunks;
		tm_rt_pool.arenas++;
	}
	mutex_unlock(&tm_rt_pool_mutex);
	return err;
}

/**
 * tm_rt_pool_dismiss - undo tm_rt_pool_admit(), or a part of it
 * @chunks: that have been put and given back
 * @arena: there is no such arena any more
 *
 * Context: may sleep.
 */
void tm_rt_pool_dismiss(u64 chunks, bool arena)
{
	mutex_lock(&tm_rt_pool_mutex);
	tm_rt_pool.used -= chunks;
	tm_rt_pool.arenas -= arena;
	mutex_unlock(&tm_rt_pool_mutex);
}

/**
 * tm_rt_pool_take - a chunk for an arena that was admitted
 *
 * Context: may sleep.
 * Return: zeroed memory, or an ERR_PTR: as tm_supply() without a client.
 */
struct tm_memory *tm_rt_pool_take(void)
{
	struct tm_memory *memory;

	mutex_lock(&tm_rt_pool_mutex);
	memory = tm_rt_pool_take_idle();
	if (!memory)
		tm_rt_pool.held++;
	mutex_unlock(&tm_rt_pool_mutex);
	if (!memory)
		return tm_rt_pool_grow();
	if (!memory->extent[0].run.zeroed)
		tm_pages_zero(&memory->extent[0].run);
	return memory;
}

/**
 * tm_rt_pool_put - a chunk is no arena's any more
 * @client: on whose bill it was
 * @memory: the chunk; consumed
 *
 * Context: may sleep; nobody has it mapped.
 * Return: whether nobody held it; else tm_memory::gone is called when that is so.
 */
bool tm_rt_pool_put(struct tm_client *client, struct tm_memory *memory)
{
	bool keep = !tm_memory_held(&memory->extent[0].run);

	mutex_lock(&tm_rt_pool_mutex);
	keep = keep && tm_rt_pool.held <= tm_rt_pool.ready;
	if (keep) {
		memory->extent[0].run.zeroed = false;
		tm_rt_pool_add_idle(memory);
	} else {
		tm_rt_pool.held--;
	}
	mutex_unlock(&tm_rt_pool_mutex);
	if (!keep)
		return tm_quarantine_put(client, memory);
	tm_client_uncharge(client, TM_CHUNK_SIZE);
	return true;
}

/* Replace what was put and not kept, because somebody held it. Context: may sleep. */
void tm_rt_pool_settle(void)
{
	bool missing;

	mutex_lock(&tm_rt_pool_mutex);
	missing = tm_rt_pool.held < tm_rt_pool.ready;
	mutex_unlock(&tm_rt_pool_mutex);
	/* Elsewhere: who closes an arena may have been killed, and gets no memory. */
	if (missing)
		mod_delayed_work(system_wq, &tm_rt_pool_work, 0);
}

/* Context: may sleep. @stats: a consistent set. */
void tm_rt_pool_stats(struct tm_rt_pool_stats *stats)
{
	mutex_lock(&tm_rt_pool_mutex);
	*stats = (struct tm_rt_pool_stats){
		.size = tm_rt_pool.size << TM_CHUNK_SHIFT,
		.ready = tm_rt_pool.ready << TM_CHUNK_SHIFT,
		.held = tm_rt_pool.held << TM_CHUNK_SHIFT,
		.used = tm_rt_pool.used << TM_CHUNK_SHIFT,
		.arenas = tm_rt_pool.arenas,
	};
	mutex_unlock(&tm_rt_pool_mutex);
}

/**
 * tm_rt_pool_set_size - bound what arenas may have
 * @bytes: the new bound, rounded down to chunks
 *
 * Context: may sleep.
 * Return: 0, -EINVAL above the machine's RAM, -EBUSY below what is used or set aside.
 */
int tm_rt_pool_set_size(u64 bytes)
{
	u64 chunks = bytes >> TM_CHUNK_SHIFT;
	int err = 0;

	if (bytes > (u64)totalram_pages() << PAGE_SHIFT)
		return -EINVAL;
	mutex_lock(&tm_rt_pool_setting);
	mutex_lock(&tm_rt_pool_mutex);
	if (chunks < max(tm_rt_pool.used, tm_rt_pool.ready))
		err = -EBUSY;
	else
		tm_rt_pool.size = chunks;
	mutex_unlock(&tm_rt_pool_mutex);
	mutex_unlock(&tm_rt_pool_setting);
	return err;
}

static void tm_rt_pool_put_ready(u64 chunks)
{
	mutex_lock(&tm_rt_pool_mutex);
	tm_rt_pool.ready = chunks;
	mutex_unlock(&tm_rt_pool_mutex);
}

/**
 * tm_rt_pool_set_ready - how much to set aside, whether arenas use it or not
 * @bytes: rounded up to chunks
 *
 * Context: may sleep.
 * Return: 0, -EINVAL above the pool's size, or why it cannot be had: -ENOSPC at the
 * capacity, -ENOMEM, -EINTR; it is then what it was before.
 */
int tm_rt_pool_set_ready(u64 bytes)
{
	u64 chunks = tm_rt_pool_chunks(bytes);
	int err = -EINVAL;
	u64 old;

	mutex_lock(&tm_rt_pool_setting);
	old = tm_rt_pool.ready;
	if (chunks <= tm_rt_pool.size) {
		tm_rt_pool_put_ready(chunks);
		err = tm_rt_pool_fill();
		if (err)
			tm_rt_pool_put_ready(old);
		tm_rt_pool_trim();
	}
	mutex_unlock(&tm_rt_pool_setting);
	return err;
}
