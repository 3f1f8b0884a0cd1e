// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory that its client freed and somebody else still holds (O_DIRECT in flight,
 * a pipe, a registered buffer): kept aside, on the client's bill, until they let go.
 *
 * And memory that a fork() may still be about to map. Kernels with special PMD
 * entries copy them in two steps (copy_huge_pmd() reads the parent's entry without a
 * lock and then sets the child's), so that a block may be emptied in the parent and
 * afterwards appear in the child. Such memory waits until nobody is between the two
 * steps who was so when it had been emptied (a grace period of RCU tasks: none sleeps there),
 * its mappings are emptied once more, and only then is it free. That fork may go on
 * all the same: who has slept elsewhere has passed the grace period and not come to its end.
 * So each memory waits anew, once its client has ever been forked.
 */
#include <linux/atomic.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/workqueue.h>

#include "client.h"
#include "memory.h"
#include "quarantine.h"

/* How often held pages are looked at: about as long as an I/O takes. */
#define TM_QUARANTINE_PERIOD	(HZ / 10)

static void tm_quarantine_poll(struct work_struct *work);
static void tm_quarantine_pass(struct work_struct *work);

static DEFINE_SPINLOCK(tm_quarantine_lock);
static LIST_HEAD(tm_quarantine);
static DECLARE_DELAYED_WORK(tm_quarantine_work, tm_quarantine_poll);
/* Memory that waits for forks; under tm_quarantine_lock as well. */
static LIST_HEAD(tm_forking);
static DECLARE_WORK(tm_forking_work, tm_quarantine_pass);
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
	void (*gone)(void *owner) = memory->gone;
	void *owner = memory->owner;
	u32 before = memory->nr_pages;
	bool all = tm_memory_free(memory);

	tm_quarantine_settle(client, all ? before : before - memory->nr_pages);
	if (all && gone)
		gone(owner);
	return all;
}

static void tm_quarantine_hold(struct tm_memory *memory)
{
	spin_lock(&tm_quarantine_lock);
	list_add_tail(&memory->held, &tm_quarantine);
	spin_unlock(&tm_quarantine_lock);
	schedule_delayed_work(&tm_quarantine_work, TM_QUARANTINE_PERIOD);
}

/* From now on @memory is set aside, on the bill of @client. */
static void tm_quarantine_enter(struct tm_client *client,
				struct tm_memory *memory)
{
	tm_client_keep(client, (s64)memory->nr_pages << PAGE_SHIFT);
	atomic64_add(memory->nr_pages, &tm_quarantine_nr_pages);
	memory->debtor = tm_client_get(client);
}

/* Whether a fork may map a block of @region again: nobody tells when one is over. */
static bool tm_quarantine_forking(struct tm_client *client,
				  const struct tm_region *region)
{
	if (!IS_ENABLED(CONFIG_ARCH_SUPPORTS_PMD_PFNMAP) || client->closing ||
	    !region->huge || !region->memory->nr_chunks)
		return false;
	/* Pairs with tm_vm_open(): counted before it copies, or emptied after. */
	smp_mb();
	return atomic_read(&client->forks);
}

/**
 * tm_quarantine_put - give back memory that no window has, now or when nobody holds it
 * @client: who is charged for it until then
 * @memory: what to give back; consumed
 *
 * No mapping of it is left, nor can a fork make one.
 *
 * Context: may sleep. Return: whether it has been given back; if not, tm_memory::gone is called when it is.
 */
bool tm_quarantine_put(struct tm_client *client, struct tm_memory *memory)
{
	u32 before = memory->nr_pages;

	if (tm_memory_free(memory)) {
		tm_client_uncharge(client, (u64)before << PAGE_SHIFT);
		return true;
	}
	tm_client_uncharge(client,
			   (u64)(before - memory->nr_pages) << PAGE_SHIFT);
	tm_quarantine_enter(client, memory);
	tm_quarantine_hold(memory);
	return false;
}

/**
 * tm_quarantine_free - give back memory that was mapped, now or when it can be
 * @client: who is charged for it until then
 * @region: its memory, which is consumed, and the place that it had
 *
 * Every mapping has been emptied.
 *
 * Context: may sleep.
 */
void tm_quarantine_free(struct tm_client *client, struct tm_region *region)
{
	struct tm_memory *memory = region->memory;

	if (tm_quarantine_forking(client, region)) {
		memory->first = region->range.start;
		memory->length = region->range.length;
		tm_quarantine_enter(client, memory);
		spin_lock(&tm_quarantine_lock);
		list_add_tail(&memory->held, &tm_forking);
		spin_unlock(&tm_quarantine_lock);
		queue_work(system_unbound_wq, &tm_forking_work);
		return;
	}
	tm_quarantine_put(client, memory);
}

/* Nobody is half-way any more: empty what those may have mapped. */
static bool tm_quarantine_passed(struct tm_memory *memory)
{
	struct tm_client *client = memory->debtor;

	unmap_mapping_pages(client->inode->i_mapping, memory->first,
			    memory->length, true);
	/* A fork since then may have copied from one that had just mapped it. */
	smp_mb();
	return atomic_read(&client->forks) == memory->forks;
}

static void tm_quarantine_pass(struct work_struct *work)
{
	struct tm_memory *memory, *next;
	bool again = false;
	LIST_HEAD(list);

	spin_lock(&tm_quarantine_lock);
	list_splice_init(&tm_forking, &list);
	spin_unlock(&tm_quarantine_lock);
	if (list_empty(&list))
		return;
	list_for_each_entry(memory, &list, held)
		memory->forks = atomic_read(&memory->debtor->forks);
	synchronize_rcu_tasks();
	list_for_each_entry_safe(memory, next, &list, held) {
		struct tm_client *client = memory->debtor;

		list_del(&memory->held);
		if (!tm_quarantine_passed(memory)) {
			spin_lock(&tm_quarantine_lock);
			list_add_tail(&memory->held, &tm_forking);
			spin_unlock(&tm_quarantine_lock);
			again = true;
		} else if (tm_quarantine_try(memory)) {
			tm_client_put(client);
		} else {
			tm_quarantine_hold(memory);
		}
	}
	if (again)
		queue_work(system_unbound_wq, &tm_forking_work);
}

/**
 * tm_quarantine_flush - wait for the memory that only waits for forks
 *
 * Context: may sleep, for a grace period. Return: whether there was any.
 */
bool tm_quarantine_flush(void)
{
	bool any;

	spin_lock(&tm_quarantine_lock);
	any = !list_empty(&tm_forking);
	spin_unlock(&tm_quarantine_lock);
	return flush_work(&tm_forking_work) || any;
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

	/* Nobody forks what has no mapping: a round that began before is the last. */
	while (tm_quarantine_flush())
		cond_resched();
	cancel_delayed_work_sync(&tm_quarantine_work);
	tm_quarantine_poll(NULL);
	cancel_delayed_work_sync(&tm_quarantine_work);
	list_for_each_entry_safe(memory, next, &tm_quarantine, held) {
		struct tm_client *client = memory->debtor;
		void (*gone)(void *owner) = memory->gone;
		void *owner = memory->owner;

		list_del(&memory->held);
		tm_quarantine_settle(client, memory->nr_pages);
		tm_memory_abandon(memory);
		if (gone)
			gone(owner);
		tm_client_put(client);
	}
}
