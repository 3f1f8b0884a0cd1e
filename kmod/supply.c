// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory for a client: on its bill, and, when there is none, at the cost of what is
 * parked, after compaction, or at the cost of evictable weights. The way back is tm_quarantine_free().
 */
#include <linux/atomic.h>
#include <linux/err.h>
#include <linux/math.h>
#include <linux/mm.h>

#include "bandwidth.h"
#include "client.h"
#include "compact.h"
#include "limits.h"
#include "memory.h"
#include "model_evict.h"
#include "park.h"
#include "pressure.h"
#include "quarantine.h"
#include "runcache.h"
#include "supply.h"

static atomic_t tm_supply_turn = ATOMIC_INIT(0);

static struct tm_memory *
tm_supply_try(struct tm_client *client, const struct tm_memory_request *request)
{
	u64 bytes = (u64)request->nr_pages << PAGE_SHIFT;
	struct tm_memory *memory;
	int err;

	if (!client)
		return tm_memory_alloc(request);
	/* Charged before it is taken: a quota is never exceeded, not even briefly. */
	err = tm_client_charge(client, bytes);
	if (err)
		return ERR_PTR(err);
	memory = tm_memory_alloc(request);
	if (IS_ERR(memory))
		tm_client_uncharge(client, bytes);
	else
		tm_bandwidth_charge(client, bytes);
	return memory;
}

/* Whether what was asked for could be had if only there were room. */
static bool tm_supply_possible(struct tm_client *client,
			       const struct tm_memory_request *request)
{
	struct tm_client_usage usage = { .quota = U64_MAX };

	if (client)
		tm_client_usage(client, &usage);
	return (u64)request->nr_pages << PAGE_SHIFT <= usage.quota &&
	       (request->policy == TM_MEMORY_DMA ||
		tm_pages_could_hold(request->numa.nodes, request->nr_pages));
}

/* Make room for what failed with @err. Return: whether to try again. */
static bool tm_supply_relieve(struct tm_client *client,
			      const struct tm_memory_request *request, int err,
			      bool *compacted)
{
	u64 bytes = (u64)request->nr_pages << PAGE_SHIFT;
	u32 emptied;

	/* Nobody can give what only a region has; its memory is never parked. */
	if (request->policy == TM_MEMORY_DMA && err != -EDQUOT)
		return false;
	if (err != -EDQUOT && err != -ENOSPC && err != -ENOMEM)
		return false;
	if (err == -ENOMEM)
		tm_pressure_wake();
	/* What can never be had is to cost nobody anything. */
	if (!tm_supply_possible(client, request))
		return false;
	/* Others cannot help a client at its quota or in a cgroup at its limit. */
	if (err == -EDQUOT ||
	    (err == -ENOMEM && request->flags & TM_PAGES_CHARGED))
		return tm_park_relieve_client(client) ||
		       tm_model_evict_client(client, bytes);
	if (tm_runcache_drain() || tm_park_relieve(bytes, true))
		return true;
	/* Once: what it frees may be taken by others, who compact as well. */
	if (!*compacted) {
		*compacted = true;
		if (tm_quarantine_flush() ||
		    (!tm_compact(request->numa.nodes, &emptied) && emptied))
			return true;
	}
	return tm_model_evict_nodes(request->numa.nodes, bytes);
}

/**
 * tm_supply - allocate and charge memory for a client
 * @client: who is charged; NULL: nobody, and no cgroup either
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
	bool compacted = false;

	if (request->policy == TM_MEMORY_CHUNKS ||
	    request->policy == TM_MEMORY_DMA)
		request->nr_pages = round_up(request->nr_pages,
					     TM_CHUNK_SIZE >> PAGE_SHIFT);
	if (client && tm_limits_in_cgroup())
		request->flags |= TM_PAGES_CHARGED;
	request->turn = client ? &client->turn : &tm_supply_turn;

	do {
		memory = tm_supply_try(client, request);
	} while (IS_ERR(memory) &&
		 tm_supply_relieve(client, request, PTR_ERR(memory),
				   &compacted));
	return memory;
}
