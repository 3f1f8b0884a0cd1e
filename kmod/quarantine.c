// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory that its client freed and somebody else still holds (O_DIRECT in flight,
 * a pipe, a registered buffer): kept aside, on the client's bill, until they let go.
 */
#include <linux/atomic.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "client.h"
#include "memory.h"
#include "quarantine.h"

/* How often held pages are looked at: about as long as an I/O takes. */
#define TM_QUARANTINE_PERIOD	(HZ / 10)

static void tm_quarantine_poll(struct work_struct *work);

static DEFINE_SPINLOCK(tm_quarantine_lock);
static LIST_HEAD(tm_quarantine);
static DECLARE_DELAYED_WORK(tm_quarantine_work, tm_quarantine_poll);
static atomic64_t tm_quarantine_nr_pages = ATOMIC64_INIT(0);

/* Pages freed by their owner and still held by somebody else. */
u64 tm_quarantine_pages(void)
{
	return atomic64_read(&tm_quarantine_nr_pages);
}

static void tm_quarantine_settle(struct tm_client *client, u32 nr_pages)
{
	atomic64_sub(nr_pages, &tm_quarantine_nr_pages);
	tm_client_keep(client, -((s64)nr_pages << PAGE_SHIFT));
	tm_client_uncharge(client, (u64)nr_pages << PAGE_SHIFT);
}

/* Give back what nobody holds any more. Return: whether that was all. */
static bool tm_quarantine_try(struct tm_memory *memory)
{
	struct tm_client *client = memory->debtor;
	u32 before = memory->nr_pages;
	bool all = tm_memory_free(memory);

	tm_quarantine_settle(client, all ? before : before - memory->nr_pages);
	return all;
}

/**
 * tm_quarantine_free - give back memory that was mapped, now or when it is let go
 * @client: who is charged for it until then
 * @memory: what to give back; consumed
 *
 * Every mapping is gone.
 *
 * Context: may sleep.
 */
void tm_quarantine_free(struct tm_client *client, struct tm_memory *memory)
{
	u32 before = memory->nr_pages;

	if (tm_memory_free(memory)) {
		tm_client_uncharge(client, (u64)before << PAGE_SHIFT);
		return;
	}
	tm_client_uncharge(client,
			   (u64)(before - memory->nr_pages) << PAGE_SHIFT);
	tm_client_keep(client, (s64)memory->nr_pages << PAGE_SHIFT);
	atomic64_add(memory->nr_pages, &tm_quarantine_nr_pages);
	memory->debtor = tm_client_get(client);
	spin_lock(&tm_quarantine_lock);
	list_add_tail(&memory->held, &tm_quarantine);
	spin_unlock(&tm_quarantine_lock);
	schedule_delayed_work(&tm_quarantine_work, TM_QUARANTINE_PERIOD);
}

static void tm_quarantine_poll(struct work_struct *work)
{
	struct tm_memory *memory, *next;
	LIST_HEAD(still);
	LIST_HEAD(list);
	bool again;

	spin_lock(&tm_quarantine_lock);
	list_splice_init(&tm_quarantine, &list);
	spin_unlock(&tm_quarantine_lock);

	list_for_each_entry_safe(memory, next, &list, held) {
		struct tm_client *client = memory->debtor;

		list_del(&memory->held);
		if (tm_quarantine_try(memory))
			tm_client_put(client);
		else
			list_add_tail(&memory->held, &still);
	}

	spin_lock(&tm_quarantine_lock);
	list_splice(&still, &tm_quarantine);
	again = !list_empty(&tm_quarantine);
	spin_unlock(&tm_quarantine_lock);
	if (again)
		schedule_delayed_work(&tm_quarantine_work,
				      TM_QUARANTINE_PERIOD);
}

/*
 * At unload nobody can wait for the last holder any longer. What is still held
 * is handed to it: our reference goes, and the holder's last put frees the page.
 */
void tm_quarantine_exit(void)
{
	struct tm_memory *memory, *next;

	cancel_delayed_work_sync(&tm_quarantine_work);
	tm_quarantine_poll(NULL);
	cancel_delayed_work_sync(&tm_quarantine_work);
	list_for_each_entry_safe(memory, next, &tm_quarantine, held) {
		struct tm_client *client = memory->debtor;

		list_del(&memory->held);
		tm_quarantine_settle(client, memory->nr_pages);
		tm_memory_abandon(memory);
		tm_client_put(client);
	}
}
