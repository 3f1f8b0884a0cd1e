// SPDX-License-Identifier: GPL-2.0-only
/* The RT pool for other modules: include/linux/tensormem.h describes it. */
#include <linux/bug.h>
#include <linux/err.h>
#include <linux/export.h>
#include <linux/tensormem.h>

#include "client.h"
#include "rt.h"

struct tensormem_rt {
	struct tm_rt_user user;
};

static struct tm_rt_user *tm_rt_api_user(struct tensormem_rt *rt)
{
	return &rt->user;
}

/* A client that nobody bounds: the pool's size does. Return: it or an ERR_PTR. */
static struct tm_client *tm_rt_api_client(void)
{
	struct tm_client *client = tm_client_create();

	if (!IS_ERR(client))
		client->quota = U64_MAX;
	return client;
}

struct tensormem_rt *tensormem_rt_open(size_t size, unsigned int priority)
{
	struct tm_client *client;
	struct tm_rt_user *user;
	struct tm_arena *arena;

	if (priority >= TM_RT_PRIORITIES)
		return ERR_PTR(-EINVAL);
	client = tm_rt_api_client();
	if (IS_ERR(client))
		return ERR_CAST(client);
	arena = tm_arena_create(client, size, 0, false);
	if (IS_ERR(arena)) {
		tm_client_destroy(client);
		return ERR_CAST(arena);
	}
	user = tm_rt_user_create(arena, priority);
	tm_arena_put(arena);
	if (IS_ERR(user)) {
		tm_client_destroy(client);
		return ERR_CAST(user);
	}
	user->kernel = client;
	return container_of(user, struct tensormem_rt, user);
}
EXPORT_SYMBOL_GPL(tensormem_rt_open);

void tensormem_rt_close(struct tensormem_rt *rt)
{
	struct tm_rt_user *user = tm_rt_api_user(rt);
	struct tm_client *client = user->kernel;

	tm_rt_user_destroy(user);
	tm_client_destroy(client);
}
EXPORT_SYMBOL_GPL(tensormem_rt_close);

int tensormem_rt_reserve(struct tensormem_rt *rt, size_t size,
			 unsigned int count)
{
	return tm_rt_user_reserve(tm_rt_api_user(rt), size, count);
}
EXPORT_SYMBOL_GPL(tensormem_rt_reserve);

void *tensormem_rt_alloc(struct tensormem_rt *rt, size_t size, ktime_t deadline)
{
	struct tm_rt_user *user = tm_rt_api_user(rt);
	struct tm_rt_block block;
	int err;

	err = tm_rt_user_alloc(user, size, 0, deadline, &block);
	return err ? ERR_PTR(err) : tm_arena_address(user->arena, block.start);
}
EXPORT_SYMBOL_GPL(tensormem_rt_alloc);

void tensormem_rt_free(struct tensormem_rt *rt, void *block)
{
	struct tm_rt_user *user = tm_rt_api_user(rt);
	size_t offset = block - user->arena->base;
	int err = -EINVAL;

	/* One before the arena wraps around to beyond it. */
	if (offset < tm_arena_bytes(user->arena) &&
	    IS_ALIGNED(offset, tm_rt_granule()))
		err = tm_rt_user_free(user, (offset >> tm_rt_shift) + 1);
	WARN_ONCE(err, "tensormem: not a block of this RT client's\n");
}
EXPORT_SYMBOL_GPL(tensormem_rt_free);
