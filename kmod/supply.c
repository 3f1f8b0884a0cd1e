// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory for a client: on its bill, and, when there is none, at the cost of what is
 * parked, or after compaction. The way back is tm_quarantine_free().
 */
#include <linux/err.h>
#include <linux/math.h>
#include <linux/mm.h>

#include "client.h"
#include "compact.h"
#include "limits.h"
#include "memory.h"
#include "park.h"
#include "runcache.h"
#include "supply.h"

static struct tm_memory *
tm_supply_try(struct tm_client *client, const struct tm_memory_request *request)
{
	u64 bytes = (u64)request->nr_pages << PAGE_SHIFT;
	struct tm_memory *memory;
	int err;

	/* Charged before it is taken: a quota is never exceeded, not even briefly. */
	err = tm_client_charge(client, bytes);
	if (err)
		return ERR_PTR(err);
	memory = tm_memory_alloc(request);
	if (IS_ERR(memory))
		tm_client_uncharge(client, bytes);
	return memory;
}

/* Make room for what failed with @err. Return: whether to try again. */
static bool tm_supply_relieve(struct tm_client *client, u64 bytes, int err)
{
	u32 emptied;

	switch (err) {
	case -EDQUOT:
		return tm_park_relieve_client(client);
	case -ENOSPC:
	case -ENOMEM:
		if (tm_runcache_drain() || tm_park_relieve(bytes))
			return true;
		return !tm_compact(&emptied) && emptied;
	default:
		return false;
	}
}

/**
 * tm_supply - allocate and charge memory for a client
 * @client: who is charged
 * @request: pages, policy, placement; whose turn it is and what cgroup pays are
 *           filled in here
 *
 * Context: may sleep; takes invalidate_locks.
 * Return: the memory or an ERR_PTR: -EDQUOT, or as tm_memory_alloc().
 */
struct tm_memory *tm_supply(struct tm_client *client,
			    struct tm_memory_request *request)
{
	struct tm_memory *memory;

	if (request->policy == TM_MEMORY_CHUNKS)
		request->nr_pages = round_up(request->nr_pages,
					     TM_CHUNK_SIZE >> PAGE_SHIFT);
	if (tm_limits_in_cgroup())
		request->flags |= TM_PAGES_CHARGED;
	request->turn = &client->turn;

	/* Each round gives up something that there was: the loop ends. */
	do {
		memory = tm_supply_try(client, request);
	} while (IS_ERR(memory) &&
		 tm_supply_relieve(client,
				   (u64)request->nr_pages << PAGE_SHIFT,
				   PTR_ERR(memory)));
	return memory;
}
