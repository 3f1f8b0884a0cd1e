// SPDX-License-Identifier: GPL-2.0-only
/*
 * The descriptor of a KV cache: checks and copies what user space hands over. The
 * semantics are in the UAPI header.
 */
#include <linux/anon_inodes.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/stddef.h>
#include <linux/uaccess.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "bandwidth.h"
#include "client.h"
#include "kv.h"
#include "kv_file.h"
#include "kv_ops.h"
#include "kv_pack.h"
#include "kv_vm.h"
#include "pages.h"
#include "trace.h"

/* The parts every version of a struct has had. */
#define TM_MIN_GROUP	offsetofend(struct tensormem_kv_group, window)
#define TM_MIN_CREATE	offsetofend(struct tensormem_kv_create, fd)
#define TM_MIN_OPEN	offsetofend(struct tensormem_kv_open, offset)
#define TM_MIN_CLOSE	offsetofend(struct tensormem_kv_close, flags)
#define TM_MIN_EXTEND	offsetofend(struct tensormem_kv_extend, length)
#define TM_MIN_TRUNCATE	offsetofend(struct tensormem_kv_truncate, flags)
#define TM_MIN_FORK	offsetofend(struct tensormem_kv_fork, offset)
#define TM_MIN_HASHES	offsetofend(struct tensormem_kv_hashes, matched)
#define TM_MIN_ADOPT	offsetofend(struct tensormem_kv_adopt, length)
#define TM_MIN_QUERY	offsetofend(struct tensormem_kv_query, flags)
#define TM_MIN_PACK	offsetofend(struct tensormem_kv_pack, blocks)
#define TM_MIN_RESET	offsetofend(struct tensormem_kv_reset, flags)

static_assert(TENSORMEM_KV_MAX_GROUPS == TM_KV_GROUPS);
static_assert(sizeof(struct tensormem_kv_hash) == sizeof(struct tm_hash));
static_assert((u32)TENSORMEM_KV_STORED == (u32)TM_CACHE_STORED);
static_assert((u32)TENSORMEM_KV_REMOVED == (u32)TM_CACHE_REMOVED);
static_assert((u32)TENSORMEM_KV_CLEARED == (u32)TM_CACHE_CLEARED);

static u64 tm_kv_place_offset(const struct tm_kv *kv, struct tm_seq_id id)
{
	return ((id.v & U16_MAX) * kv->place_pages) << PAGE_SHIFT;
}

static void tm_kv_fill_info(struct tm_kv *kv, struct tensormem_kv_info *info)
{
	const struct tm_cache *cache = &kv->cache;
	const struct tm_kv_pool *pool = &cache->pool;
	u64 held;

	down_read(&kv->lock);
	held = (u64)pool->nr_chunks << TM_CHUNK_SHIFT;
	info->nr_groups = pool->geo.nr_groups;
	info->max_tokens = cache->max_tokens;
	info->max_sequences = cache->max_seqs;
	info->block_tokens = pool->geo.block_tokens;
	info->sequences = cache->nr_open;
	info->window_size = tm_kv_window_pages(kv) << PAGE_SHIFT;
	info->sequence_size = kv->place_pages << PAGE_SHIFT;
	info->limit = (u64)pool->nr_slots << TM_CHUNK_SHIFT;
	info->held = held;
	info->used = held - ((u64)pool->free_pages << PAGE_SHIFT);
	info->cached = tm_cache_evictable(cache) << PAGE_SHIFT;
	info->packed = cache->packed_pages << PAGE_SHIFT;
	info->unpacked = cache->unpacked_pages << PAGE_SHIFT;
	info->lookups = cache->stats.lookups;
	info->hits = cache->stats.hits;
	info->copies = cache->stats.copies;
	info->evictions = cache->stats.evictions;
	info->packs = cache->stats.packs;
	info->unpacks = cache->stats.unpacks;
	info->events_lost = cache->stats.events_lost;
	info->moved = pool->moved;
	up_read(&kv->lock);
}

static int tm_kv_out_groups(const struct tm_kv *kv,
			    const struct tensormem_kv_info *info)
{
	static const u32 rules[] = {
		[TM_KV_FULL] = TENSORMEM_KV_FULL,
		[TM_KV_WINDOW] = TENSORMEM_KV_WINDOW,
		[TM_KV_STATE] = TENSORMEM_KV_STATE,
	};
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;
	void __user *to = u64_to_user_ptr(info->groups);

	for (u32 i = 0; i < geo->nr_groups; i++) {
		const struct tensormem_kv_group group = {
			.rule = rules[geo->group[i].rule],
			.planes = geo->group[i].planes,
			.token_bytes = geo->group[i].token_bytes,
			.window = geo->group[i].window,
			.element = kv->layout[i].element,
			.offset = kv->layout[i].offset << PAGE_SHIFT,
			.stride = kv->layout[i].stride << PAGE_SHIFT,
		};
		int err = tm_args_out(to + (size_t)i * info->group_size,
				      info->group_size, &group, sizeof(group));

		if (err)
			return err;
	}
	return 0;
}

static int tm_kv_file_info(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_info info;
	u32 room;
	int err;

	err = tm_args_in(&info, sizeof(info), 0, arg, size);
	if (err)
		return err;
	room = info.nr_groups;
	if (info.groups && (room < kv->cache.pool.geo.nr_groups ||
			    info.group_size < TM_MIN_GROUP ||
			    info.group_size > PAGE_SIZE))
		return -EINVAL;
	tm_kv_fill_info(kv, &info);
	if (info.groups)
		err = tm_kv_out_groups(kv, &info);
	return err ?: tm_args_out(arg, size, &info, sizeof(info));
}

/* The caller could not be told of a sequence. */
static void tm_kv_undo_open(struct tm_kv *kv, struct tm_seq_id id)
{
	/* Another thread may have guessed the name and closed it: fine as well. */
	if (tm_kv_close(kv, id))
		return;
}

static int tm_kv_file_open(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_open open;
	struct tm_seq_id id;
	int err;

	err = tm_args_in(&open, sizeof(open), TM_MIN_OPEN, arg, size);
	if (err)
		return err;
	if (open.flags)
		return -EINVAL;
	err = tm_kv_open(kv, open.tenant, &id);
	if (err)
		return err;
	open.sequence = id.v;
	open.offset = tm_kv_place_offset(kv, id);
	err = tm_args_out(arg, size, &open, sizeof(open));
	if (err)
		tm_kv_undo_open(kv, id);
	return err;
}

static int tm_kv_file_close(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_close close;
	int err;

	err = tm_args_in(&close, sizeof(close), TM_MIN_CLOSE, arg, size);
	if (err)
		return err;
	if (close.flags)
		return -EINVAL;
	return tm_kv_close(kv, (struct tm_seq_id){ close.sequence });
}

/*
 * Tell the caller the lengths before the sequences have them, so that nothing is left to
 * write once the call has succeeded. It goes through only if they are right still.
 */
static int tm_kv_file_foretell(struct tm_kv *kv, const struct tm_items *items,
			       struct tm_cache_extend *extend, u32 *failed)
{
	int err = 0;

	for (u32 i = 0; !err && i < items->count; i++) {
		struct tensormem_kv_extend result = {
			.sequence = extend[i].id.v,
			.tokens = extend[i].tokens,
		};

		*failed = i;
		extend[i].length = tm_kv_length(kv, extend[i].id);
		result.length = extend[i].length + result.tokens;
		err = tm_args_out(tm_item(items, i), items->size, &result,
				  sizeof(result));
	}
	return err;
}

static int tm_kv_file_extend(void *object, const struct tm_items *items,
			     u32 *failed)
{
	struct tensormem_kv_extend request;
	struct tm_cache_extend *extend;
	struct tm_kv *kv = object;
	int err = 0;

	*failed = 0;
	extend = kvcalloc(items->count, sizeof(*extend), TM_GFP);
	if (!extend)
		return -ENOMEM;
	for (u32 i = 0; i < items->count; i++) {
		*failed = i;
		err = tm_args_in(&request, sizeof(request), TM_MIN_EXTEND,
				 tm_item(items, i), items->size);
		if (!err && request.flags)
			err = -EINVAL;
		if (err)
			goto out;
		extend[i].id = (struct tm_seq_id){ request.sequence };
		extend[i].tokens = request.tokens;
	}
	do {
		err = tm_kv_file_foretell(kv, items, extend, failed);
		if (!err)
			err = tm_kv_extend(kv, extend, items->count, failed);
	} while (err == -ESTALE);
out:
	kvfree(extend);
	return err;
}

static int tm_kv_file_truncate(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_truncate truncate;
	int err;

	err = tm_args_in(&truncate, sizeof(truncate), TM_MIN_TRUNCATE, arg,
			 size);
	if (err)
		return err;
	if (truncate.flags || truncate.pad)
		return -EINVAL;
	return tm_kv_truncate(kv, (struct tm_seq_id){ truncate.sequence },
			      truncate.length);
}

static int tm_kv_file_fork(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_fork fork;
	struct tm_seq_id child;
	int err;

	err = tm_args_in(&fork, sizeof(fork), TM_MIN_FORK, arg, size);
	if (err)
		return err;
	if (fork.flags)
		return -EINVAL;
	err = tm_kv_fork(kv, (struct tm_seq_id){ fork.sequence }, fork.at,
			 &child);
	if (err)
		return err;
	fork.child = child.v;
	fork.offset = tm_kv_place_offset(kv, child);
	err = tm_args_out(arg, size, &fork, sizeof(fork));
	if (err)
		tm_kv_undo_open(kv, child);
	return err;
}

typedef int (*tm_kv_hashes_fn)(struct tm_kv *kv,
			       struct tensormem_kv_hashes *request,
			       const struct tm_hash *hashes);

static int tm_kv_file_publish(struct tm_kv *kv,
			      struct tensormem_kv_hashes *request,
			      const struct tm_hash *hashes)
{
	if (request->flags)
		return -EINVAL;
	return tm_kv_publish(kv, (struct tm_seq_id){ request->sequence },
			     request->first, hashes, request->count);
}

static int tm_kv_file_lookup(struct tm_kv *kv,
			     struct tensormem_kv_hashes *request,
			     const struct tm_hash *hashes)
{
	if (request->flags & ~TENSORMEM_KV_PEEK || request->first)
		return -EINVAL;
	if (request->flags & TENSORMEM_KV_PEEK)
		return tm_kv_peek(kv, (struct tm_seq_id){ request->sequence },
				  hashes, request->count, &request->matched);
	return tm_kv_lookup(kv, (struct tm_seq_id){ request->sequence }, hashes,
			    request->count, &request->matched);
}

static int tm_kv_file_hashes(struct tm_kv *kv, void __user *arg, size_t size,
			     tm_kv_hashes_fn call)
{
	struct tensormem_kv_hashes request;
	struct tm_hash *hashes;
	int err;

	err = tm_args_in(&request, sizeof(request), TM_MIN_HASHES, arg, size);
	if (err)
		return err;
	if (!request.count || request.count > TM_MAX_BATCH || request.pad)
		return -EINVAL;
	/* Writable, or there is no telling what the sequence begins with now. */
	request.matched = 0;
	err = tm_args_out(arg, size, &request, sizeof(request));
	if (err)
		return err;
	hashes = kvmalloc_array(request.count, sizeof(*hashes), TM_GFP);
	if (!hashes)
		return -ENOMEM;
	if (copy_from_user(hashes, u64_to_user_ptr(request.hashes),
			   request.count * sizeof(*hashes)))
		err = -EFAULT;
	else
		err = call(kv, &request, hashes);
	kvfree(hashes);
	if (err)
		return err;
	err = tm_args_out(arg, size, &request, sizeof(request));
	if (err && request.matched && !(request.flags & TENSORMEM_KV_PEEK))
		return tm_kv_truncate(kv, (struct tm_seq_id){ request.sequence },
				      0) ?: err;
	return err;
}

static int tm_kv_file_adopt(struct tm_kv *kv, void __user *arg, size_t size)
{
	u32 bt = kv->cache.pool.geo.block_tokens;
	struct tensormem_kv_adopt adopt;
	struct tm_hash hash;
	struct tm_seq_id id;
	int err;

	err = tm_args_in(&adopt, sizeof(adopt), TM_MIN_ADOPT, arg, size);
	if (err)
		return err;
	if (adopt.flags || adopt.pad)
		return -EINVAL;
	memcpy(&hash, &adopt.hash, sizeof(hash));
	id.v = adopt.sequence;
	do {
		/* Foretold, as an extension's. */
		u32 length = tm_kv_length(kv, id);
		u64 before = (u64)adopt.block * bt;

		adopt.length = length == before ?
			       length + (adopt.tokens ?: bt) : length;
		err = tm_args_out(arg, size, &adopt, sizeof(adopt));
		if (!err)
			err = tm_kv_adopt(kv, id, adopt.block, &hash,
					  adopt.tokens, length);
	} while (err == -ESTALE);
	return err;
}

static void tm_kv_describe(const struct tm_kv *kv, u32 place,
			   struct tensormem_kv_query *query)
{
	const struct tm_kv_geometry *geo = &kv->cache.pool.geo;

	for (u32 i = 0; i < geo->nr_groups; i++) {
		u32 first, end;

		tm_cache_span(&kv->cache, i, query->length, &first, &end);
		for (u32 b = first; b < end; b++) {
			struct tm_cache_page page;
			u64 bytes;
			int err = tm_cache_page(&kv->cache, place, i, 0,
						b * geo->plane_pages[i], &page);

			cond_resched();
			if (err == -ENOENT)
				continue;
			bytes = (u64)tm_kv_pages(&kv->cache.pool, page.block)
				<< PAGE_SHIFT;
			query->held += bytes;
			if (tm_prefix_refs(&kv->cache.prefix,
					   page.block.v) > 1)
				query->shared += bytes;
			if (err != -EAGAIN)
				continue;
			query->packed += bytes;
			query->unpacked += (u64)geo->block_pages[i]
					   << PAGE_SHIFT;
		}
	}
}

static int tm_kv_file_query(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_query query;
	struct tm_seq_id id;
	u32 place;
	int err;

	err = tm_args_in(&query, sizeof(query), TM_MIN_QUERY, arg, size);
	if (err)
		return err;
	if (query.flags || query.pad)
		return -EINVAL;
	id.v = query.sequence;
	query = (struct tensormem_kv_query){ .sequence = id.v };
	if (down_read_killable(&kv->lock))
		return -EINTR;
	place = tm_cache_find(&kv->cache, id);
	if (place != TM_NONE) {
		query.length = tm_cache_seq(&kv->cache, place)->length;
		query.offset = tm_kv_place_offset(kv, id);
		tm_kv_describe(kv, place, &query);
	}
	up_read(&kv->lock);
	if (place == TM_NONE)
		return -ENOENT;
	return tm_args_out(arg, size, &query, sizeof(query));
}

static int tm_kv_file_pack(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_pack pack;
	struct tm_kv_packed packed;
	struct tm_seq_id id;
	int err;

	err = tm_args_in(&pack, sizeof(pack), TM_MIN_PACK, arg, size);
	if (err)
		return err;
	if (pack.flags & ~TENSORMEM_KV_UNPACK || pack.pad)
		return -EINVAL;
	/* Writable, or there is no telling what has been done. */
	err = tm_args_out(arg, size, &pack, sizeof(pack));
	if (err)
		return err;
	id.v = pack.sequence;
	if (pack.flags & TENSORMEM_KV_UNPACK)
		err = tm_kv_unpack_all(kv, id, &packed);
	else
		err = tm_kv_pack(kv, id, &packed);
	if (err)
		return err;
	pack.blocks = packed.blocks;
	pack.before = packed.before;
	pack.after = packed.after;
	return tm_args_out(arg, size, &pack, sizeof(pack));
}

static int tm_kv_file_reset(struct tm_kv *kv, void __user *arg, size_t size)
{
	struct tensormem_kv_reset reset;
	int err;

	err = tm_args_in(&reset, sizeof(reset), TM_MIN_RESET, arg, size);
	if (err)
		return err;
	if (reset.flags || reset.pad)
		return -EINVAL;
	return tm_kv_reset(kv);
}

/* Whether a call may move bytes, and so has to wait for the client's budget. */
static bool tm_kv_file_moves(unsigned int cmd)
{
	switch (_IOC_NR(cmd)) {
	case _IOC_NR(TENSORMEM_IOC_KV_EXTEND):
	case _IOC_NR(TENSORMEM_IOC_KV_EXTEND_BATCH):
	case _IOC_NR(TENSORMEM_IOC_KV_FORK):
	case _IOC_NR(TENSORMEM_IOC_KV_LOOKUP):
	case _IOC_NR(TENSORMEM_IOC_KV_ADOPT):
	case _IOC_NR(TENSORMEM_IOC_KV_PACK):
		return true;
	default:
		return false;
	}
}

static long tm_kv_file_command(struct file *file, unsigned int cmd,
			       unsigned long arg)
{
	struct tm_kv *kv = file->private_data;
	void __user *user = (void __user *)arg;
	size_t size = _IOC_SIZE(cmd);
	int err;

	if (_IOC_TYPE(cmd) != TENSORMEM_IOC_MAGIC ||
	    _IOC_DIR(cmd) != (_IOC_READ | _IOC_WRITE))
		return -ENOTTY;
	if (tm_kv_file_moves(cmd)) {
		err = tm_bandwidth_wait(kv->client);
		if (err)
			return err;
	}

	/* By number: the size in a command is the caller's idea of the struct. */
	switch (_IOC_NR(cmd)) {
	case _IOC_NR(TENSORMEM_IOC_KV_INFO):
		return tm_kv_file_info(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_OPEN):
		return tm_kv_file_open(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_CLOSE):
		return tm_kv_file_close(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_EXTEND):
		return tm_args_single(kv, user, size, tm_kv_file_extend);
	case _IOC_NR(TENSORMEM_IOC_KV_EXTEND_BATCH):
		return tm_args_batch(kv, user, size, tm_kv_file_extend);
	case _IOC_NR(TENSORMEM_IOC_KV_TRUNCATE):
		return tm_kv_file_truncate(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_FORK):
		return tm_kv_file_fork(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_PUBLISH):
		return tm_kv_file_hashes(kv, user, size, tm_kv_file_publish);
	case _IOC_NR(TENSORMEM_IOC_KV_LOOKUP):
		return tm_kv_file_hashes(kv, user, size, tm_kv_file_lookup);
	case _IOC_NR(TENSORMEM_IOC_KV_ADOPT):
		return tm_kv_file_adopt(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_QUERY):
		return tm_kv_file_query(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_PACK):
		return tm_kv_file_pack(kv, user, size);
	case _IOC_NR(TENSORMEM_IOC_KV_RESET):
		return tm_kv_file_reset(kv, user, size);
	default:
		return -ENOTTY;
	}
}

static long tm_kv_file_ioctl(struct file *file, unsigned int cmd,
			     unsigned long arg)
{
	u64 start = trace_tensormem_ioctl_enabled() ? ktime_get_ns() : 0;
	const struct tm_kv *kv = file->private_data;
	long ret = tm_kv_file_command(file, cmd, arg);

	if (start)
		trace_tensormem_ioctl(kv->client->id, _IOC_NR(cmd),
				      ret, ktime_get_ns() - start);
	return ret;
}

/* Take events out of the ring; what is not delivered is kept for the next read. */
static void tm_kv_take_events(struct tm_kv *kv)
{
	lockdep_assert_held(&kv->readers);
	down_write(&kv->lock);
	while (kv->nr_unread < TM_KV_UNREAD &&
	       tm_cache_next_event(&kv->cache, &kv->unread[kv->nr_unread]))
		kv->nr_unread++;
	up_write(&kv->lock);
}

/* Deliver as many as fit. Return: bytes, or -EFAULT when not even one could be. */
static ssize_t tm_kv_deliver(struct tm_kv *kv, void __user *to, size_t room)
{
	u32 nr = 0;

	while (nr < kv->nr_unread && room >= sizeof(struct tensormem_kv_event)) {
		const struct tm_cache_event *from = &kv->unread[nr];
		struct tensormem_kv_event event = {
			.type = from->type,
			.block = from->block,
			.group = from->group,
			.tenant = from->tenant,
		};

		memcpy(&event.hash, &from->hash, sizeof(event.hash));
		memcpy(&event.parent, &from->parent, sizeof(event.parent));
		if (copy_to_user(to, &event, sizeof(event))) {
			if (!nr)
				return -EFAULT;
			break;
		}
		nr++;
		to += sizeof(event);
		room -= sizeof(event);
	}
	kv->nr_unread -= nr;
	memmove(kv->unread, kv->unread + nr,
		kv->nr_unread * sizeof(kv->unread[0]));
	return nr * sizeof(struct tensormem_kv_event);
}

static bool tm_kv_has_events(struct tm_kv *kv)
{
	return READ_ONCE(kv->nr_unread) ||
	       READ_ONCE(kv->cache.event_head) !=
	       READ_ONCE(kv->cache.event_tail);
}

static ssize_t tm_kv_file_read(struct file *file, char __user *to, size_t room,
			       loff_t *pos)
{
	struct tm_kv *kv = file->private_data;
	ssize_t got = 0;
	int err;

	if (!kv->cache.nr_events || room < sizeof(struct tensormem_kv_event))
		return -EINVAL;
	while (!got) {
		if (!tm_kv_has_events(kv) && file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		err = wait_event_interruptible(kv->events,
					       tm_kv_has_events(kv));
		if (err)
			return err;
		if (mutex_lock_interruptible(&kv->readers))
			return -ERESTARTSYS;
		tm_kv_take_events(kv);
		got = tm_kv_deliver(kv, to, room);
		mutex_unlock(&kv->readers);
	}
	return got;
}

static __poll_t tm_kv_file_poll(struct file *file, poll_table *wait)
{
	struct tm_kv *kv = file->private_data;

	poll_wait(file, &kv->events, wait);
	return tm_kv_has_events(kv) ? EPOLLIN | EPOLLRDNORM : 0;
}

static void tm_kv_file_fdinfo(struct seq_file *out, struct file *file)
{
	struct tm_kv *kv = file->private_data;
	struct tensormem_kv_info info = { 0 };

	tm_kv_fill_info(kv, &info);
	seq_printf(out, "tensormem-kv:\t%u\n", kv->id);
	seq_printf(out, "client:\t%u\n", kv->client->id);
#define TM_KV_LINE(field)						\
	seq_printf(out, #field ":\t%llu\n", (unsigned long long)info.field)
	TM_KV_LINE(max_tokens);
	TM_KV_LINE(max_sequences);
	TM_KV_LINE(block_tokens);
	TM_KV_LINE(sequences);
	TM_KV_LINE(limit);
	TM_KV_LINE(held);
	TM_KV_LINE(used);
	TM_KV_LINE(cached);
	TM_KV_LINE(packed);
	TM_KV_LINE(unpacked);
	TM_KV_LINE(lookups);
	TM_KV_LINE(hits);
	TM_KV_LINE(copies);
	TM_KV_LINE(evictions);
	TM_KV_LINE(packs);
	TM_KV_LINE(unpacks);
	TM_KV_LINE(events_lost);
	TM_KV_LINE(moved);
#undef TM_KV_LINE
}

static int tm_kv_file_release(struct inode *inode, struct file *file)
{
	tm_kv_put(file->private_data);
	return 0;
}

static const struct file_operations tm_kv_fops = {
	.owner = THIS_MODULE,
	.release = tm_kv_file_release,
	.read = tm_kv_file_read,
	.poll = tm_kv_file_poll,
	.unlocked_ioctl = tm_kv_file_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = tm_kv_vm_mmap,
	.show_fdinfo = tm_kv_file_fdinfo,
};

static int tm_kv_in_groups(const struct tensormem_kv_create *request,
			   struct tensormem_kv_group *groups)
{
	const void __user *from = u64_to_user_ptr(request->groups);
	int err = 0;

	if (!request->nr_groups ||
	    request->nr_groups > TENSORMEM_KV_MAX_GROUPS)
		return -EINVAL;
	for (u32 i = 0; i < request->nr_groups && !err; i++)
		err = tm_args_in(&groups[i], sizeof(groups[i]), TM_MIN_GROUP,
				 from + (size_t)i * request->group_size,
				 request->group_size);
	return err;
}

/* A descriptor for @kv, which it consumes. Return: the file or an ERR_PTR. */
static struct file *tm_kv_new_file(struct tm_kv *kv)
{
	struct file *file = anon_inode_getfile("[tensormem-kv]", &tm_kv_fops,
					       kv, O_RDWR | O_CLOEXEC);

	if (IS_ERR(file)) {
		tm_kv_put(kv);
		return file;
	}
	/* The mappings hang on an inode of its own: a window of its own. */
	file->f_mapping = kv->inode->i_mapping;
	return file;
}

/**
 * tm_kv_file_create - TENSORMEM_IOC_KV_CREATE
 * @client: who asks
 * @arg: its struct
 * @size: of that
 *
 * Context: may sleep. Return: 0 or an errno as in the UAPI header.
 */
int tm_kv_file_create(struct tm_client *client, void __user *arg, size_t size)
{
	struct tensormem_kv_group groups[TENSORMEM_KV_MAX_GROUPS];
	struct tensormem_kv_create create;
	struct file *file;
	struct tm_kv *kv;
	int err, fd;

	err = tm_args_in(&create, sizeof(create), TM_MIN_CREATE, arg, size);
	if (!err)
		err = tm_kv_in_groups(&create, groups);
	if (err)
		return err;
	kv = tm_kv_create(client, &create, groups);
	if (IS_ERR(kv))
		return PTR_ERR(kv);
	file = tm_kv_new_file(kv);
	if (IS_ERR(file))
		return PTR_ERR(file);
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0) {
		fput(file);
		return fd;
	}
	create.fd = fd;
	err = tm_args_out(arg, size, &create, sizeof(create));
	if (err) {
		put_unused_fd(fd);
		fput(file);
		return err;
	}
	fd_install(fd, file);
	return 0;
}
