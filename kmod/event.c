// SPDX-License-Identifier: GPL-2.0-only
/*
 * Events for programs, by generic netlink; the UAPI header says what they are.
 *
 * An event may happen where nothing may be allocated or waited for. So it goes into a ring of fixed size that takes no lock,
 * and a worker makes a message of it and sends it. An interrupt of its own (irq_work) wakes the worker, because
 * whoever has an event may hold any lock.
 *
 *	tm_event_put()    any context: claim a cell, fill it, publish it
 *	tm_event_work()   the only one who takes out; tm_event_mutex
 *
 * Events are numbered when they are taken out. Who found the ring full has counted that for its group, and each event
 * carries what that count was when it was put: so whoever reads it knows how many were lost before it.
 *
 * Nothing of this is done for a group without listeners. Kernels that tell when a group is joined have that in
 * tm_event_groups; the others are asked for each event.
 */
#include <linux/atomic.h>
#include <linux/build_bug.h>
#include <linux/export.h>
#include <linux/irq_work.h>
#include <linux/irqflags.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/nospec.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "event.h"

#define TM_EVENT_GROUPS		(TENSORMEM_NL_GROUP_BANDWIDTH + 1)

/* Events that wait for the worker; a power of two. */
#define TM_EVENT_RING		256

/* Most values of an event beside a slot's name: as many as tm_event_put() is given. */
#define TM_EVENT_VALUES		6

/*
 * So long after it was joined a group may lie without a listener in the kernel's books: it tells us before it
 * notes it down.
 */
#define TM_EVENT_GRACE		(10 * HZ)

/**
 * struct tm_event - what happened
 * @time: when
 * @value: what the kind has, in the order of tm_event_kinds
 * @lost: events of its group that had found the ring full by then
 * @kind: enum tensormem_nl_command
 * @slot: a slot's name, or empty
 */
struct tm_event {
	u64 time;
	u64 value[TM_EVENT_VALUES];
	u32 lost;
	u32 kind;
	char slot[TENSORMEM_MODEL_NAME];
};

/**
 * struct tm_event_cell - a place in the ring
 * @turn: one more than the count of events before the one that it has, once that can be read
 * @event: it
 */
struct tm_event_cell {
	u32 turn;
	struct tm_event event;
};

/**
 * struct tm_event_group - what a group's readers have been told
 * @seq: the number given last
 * @missed: lost by us and not told yet
 * @missed_ever: lost by us
 * @lost: what of tm_event_lost is in these
 */
struct tm_event_group {
	u64 seq;
	u64 missed;
	u64 missed_ever;
	u32 lost;
};

/* What a kind of event is made of: its group, and an attribute for each value. */
struct tm_event_kind {
	u8 group;
	bool slot;
	u8 attr[TM_EVENT_VALUES];
};

#define TM_SLOT(...)							\
	{ TENSORMEM_NL_GROUP_SLOTS, true, { __VA_ARGS__ } }
#define TM_KIND(of, ...)						\
	{ TENSORMEM_NL_GROUP_##of, false, { __VA_ARGS__ } }
#define TM_A(name) TENSORMEM_NL_A_##name

static const struct tm_event_kind tm_event_kinds[] = {
	[TENSORMEM_NL_EVENT_SLOT_STAGED] = TM_SLOT(TM_A(GENERATION), TM_A(SIZE)),
	[TENSORMEM_NL_EVENT_SLOT_READY] = TM_SLOT(TM_A(GENERATION), TM_A(SIZE)),
	[TENSORMEM_NL_EVENT_SLOT_FAILED] =
		TM_SLOT(TM_A(GENERATION), TM_A(SIZE), TM_A(ERROR)),
	[TENSORMEM_NL_EVENT_SLOT_COMMITTED] = TM_SLOT(TM_A(GENERATION)),
	[TENSORMEM_NL_EVENT_SLOT_ROLLED_BACK] = TM_SLOT(TM_A(GENERATION)),
	[TENSORMEM_NL_EVENT_SLOT_ABORTED] = TM_SLOT(TM_A(GENERATION)),
	[TENSORMEM_NL_EVENT_SLOT_RETIRED] = TM_SLOT(TM_A(GENERATION)),
	[TENSORMEM_NL_EVENT_SLOT_REMOVED] = TM_SLOT(0),
	[TENSORMEM_NL_EVENT_RT_MISS] =
		TM_KIND(RT, TM_A(CLIENT), TM_A(PID), TM_A(SIZE), TM_A(HAD)),
	[TENSORMEM_NL_EVENT_KV_EVICTED] =
		TM_KIND(KV, TM_A(CLIENT), TM_A(CACHE), TM_A(BLOCKS)),
	[TENSORMEM_NL_EVENT_KV_PACKED] =
		TM_KIND(KV, TM_A(CLIENT), TM_A(CACHE), TM_A(SEQUENCE),
			TM_A(BLOCKS), TM_A(BEFORE), TM_A(AFTER)),
	[TENSORMEM_NL_EVENT_KV_UNPACKED] =
		TM_KIND(KV, TM_A(CLIENT), TM_A(CACHE), TM_A(SEQUENCE),
			TM_A(BLOCKS), TM_A(BEFORE), TM_A(AFTER)),
	[TENSORMEM_NL_EVENT_KV_FULL] =
		TM_KIND(KV, TM_A(CLIENT), TM_A(CACHE), TM_A(ERROR)),
	[TENSORMEM_NL_EVENT_PRESSURE] =
		TM_KIND(PRESSURE, TM_A(LEVEL), TM_A(AVAILABLE), TM_A(GIVEN)),
	[TENSORMEM_NL_EVENT_BANDWIDTH] =
		TM_KIND(BANDWIDTH, TM_A(CLIENT), TM_A(CPU), TM_A(USED),
			TM_A(BUDGET), TM_A(THROTTLED)),
};

static struct tm_event_cell tm_event_ring[TM_EVENT_RING];
static atomic_t tm_event_head = ATOMIC_INIT(0);
static u32 tm_event_tail;
static atomic_t tm_event_lost[TM_EVENT_GROUPS];

/* One that sends at a time; guards tm_event_tail and tm_event_told. */
static DEFINE_MUTEX(tm_event_mutex);
static struct tm_event_group tm_event_told[TM_EVENT_GROUPS];

/* Bits of the groups that may have listeners, and when they were joined last; written under tm_event_lock. */
static DEFINE_SPINLOCK(tm_event_lock);
static unsigned long tm_event_groups __read_mostly;
static unsigned long tm_event_joined[TM_EVENT_GROUPS];

static u32 tm_event_level = TENSORMEM_PRESSURE_NONE;

static struct genl_family tm_event_family;

/* Context: any. */
static bool tm_event_heard(u32 group)
{
	if (!TM_GENL_TELLS)
		return genl_has_listeners(&tm_event_family, &init_net, group);
	return READ_ONCE(tm_event_groups) & BIT(group);
}

/* Ask the kernel who listens. Return: whether there are groups to ask for again. */
static bool tm_event_look(void)
{
	bool again = false;

	if (!TM_GENL_TELLS)
		return false;
	spin_lock(&tm_event_lock);
	for (u32 i = 0; i < TM_EVENT_GROUPS; i++) {
		unsigned long bits = tm_event_groups;

		if (genl_has_listeners(&tm_event_family, &init_net, i)) {
			bits |= BIT(i);
		} else if (time_after(jiffies,
				      tm_event_joined[i] + TM_EVENT_GRACE)) {
			bits &= ~BIT(i);
		} else if (bits & BIT(i)) {
			again = true;
		}
		WRITE_ONCE(tm_event_groups, bits);
	}
	spin_unlock(&tm_event_lock);
	return again;
}

static void tm_event_review_work(struct work_struct *work);
static DECLARE_DELAYED_WORK(tm_event_review, tm_event_review_work);

static void tm_event_review_work(struct work_struct *work)
{
	if (tm_event_look())
		queue_delayed_work(system_unbound_wq, &tm_event_review,
				   TM_EVENT_GRACE);
}

/* Somebody is about to join a group. */
static int tm_event_join(int group)
{
	spin_lock(&tm_event_lock);
	tm_event_joined[group] = jiffies;
	WRITE_ONCE(tm_event_groups, tm_event_groups | BIT(group));
	spin_unlock(&tm_event_lock);
	return 0;
}

/* Somebody has left a group. There may be others, or those who come back soon. */
static void tm_event_leave(int group)
{
	queue_delayed_work(system_unbound_wq, &tm_event_review, TM_EVENT_GRACE);
}

/* Claim a cell. Return: false: there is none. */
static bool tm_event_claim(u32 *at)
{
	int head = atomic_read(&tm_event_head);

	do {
		/*
		 * Pairs with tm_event_take(): what was in the cell has been read. A head that is old by now may be
		 * behind the tail; then it is not exchanged.
		 */
		s32 used = head - smp_load_acquire(&tm_event_tail);

		if (used >= TM_EVENT_RING)
			return false;
	} while (!atomic_try_cmpxchg(&tm_event_head, &head, head + 1));
	*at = head;
	return true;
}

/* Context: hard interrupt. */
static void tm_event_kick_work(struct irq_work *kick);
static struct irq_work tm_event_kick = IRQ_WORK_INIT_HARD(tm_event_kick_work);

/*
 * Context: any. @a to @f: what the kind has, then zeros. They are in registers, so that nothing has been stored when nobody
 * listens. Interrupts are off between claim and publication: the worker would wait at this cell for a task that somebody
 * has preempted.
 */
static noinline void tm_event_put(enum tensormem_nl_command kind,
				  const char *slot, u64 a, u64 b, u64 c, u64 d,
				  u64 e, u64 f)
{
	atomic_t *lost = &tm_event_lost[tm_event_kinds[kind].group];
	struct tm_event_cell *cell;
	struct tm_event *event;
	unsigned long flags;
	u32 at;

	local_irq_save(flags);
	if (tm_event_claim(&at)) {
		cell = &tm_event_ring[at % TM_EVENT_RING];
		event = &cell->event;
		event->time = ktime_get_ns();
		event->lost = atomic_read(lost);
		event->kind = kind;
		event->value[0] = a;
		event->value[1] = b;
		event->value[2] = c;
		event->value[3] = d;
		event->value[4] = e;
		event->value[5] = f;
		strscpy(event->slot, slot, sizeof(event->slot));
		/* Pairs with tm_event_take(). */
		smp_store_release(&cell->turn, at + 1);
	} else {
		atomic_inc(lost);
	}
	local_irq_restore(flags);
	irq_work_queue(&tm_event_kick);
}

static bool tm_event_take(struct tm_event *event)
{
	u32 at = tm_event_tail;
	struct tm_event_cell *cell = &tm_event_ring[at % TM_EVENT_RING];

	lockdep_assert_held(&tm_event_mutex);
	/* Pairs with tm_event_put(). */
	if (smp_load_acquire(&cell->turn) != at + 1)
		return false;
	*event = cell->event;
	/* Pairs with tm_event_claim(). */
	smp_store_release(&tm_event_tail, at + 1);
	return true;
}

static int tm_event_put_attr(struct sk_buff *skb, u32 attr, u64 value)
{
	switch (attr) {
	case TENSORMEM_NL_A_ERROR:
	case TENSORMEM_NL_A_CLIENT:
	case TENSORMEM_NL_A_PID:
	case TENSORMEM_NL_A_CACHE:
	case TENSORMEM_NL_A_SEQUENCE:
	case TENSORMEM_NL_A_GROUP:
	case TENSORMEM_NL_A_LEVEL:
	case TENSORMEM_NL_A_THROTTLED:
		return nla_put_u32(skb, attr, value);
	case TENSORMEM_NL_A_CPU:
		return nla_put_s32(skb, attr, value);
	default:
		return nla_put_u64_64bit(skb, attr, value, TENSORMEM_NL_A_PAD);
	}
}

/* Room for the largest message: number, time, what was missed, the values, a name. */
static size_t tm_event_room(void)
{
	return (3 + TM_EVENT_VALUES) * nla_total_size_64bit(sizeof(u64)) +
	       nla_total_size(TENSORMEM_MODEL_NAME);
}

static int tm_event_fill(struct sk_buff *skb, const struct tm_event *event,
			 u32 group, const struct tm_event_group *told)
{
	const struct tm_event_kind *kind = &tm_event_kinds[event->kind];
	int err;

	err = tm_event_put_attr(skb, TENSORMEM_NL_A_SEQ, told->seq);
	if (!err)
		err = tm_event_put_attr(skb, TENSORMEM_NL_A_TIME, event->time);
	if (!err && told->missed)
		err = tm_event_put_attr(skb, TENSORMEM_NL_A_MISSED,
					told->missed);
	if (!err && event->kind == TENSORMEM_NL_EVENT_MISSED)
		return tm_event_put_attr(skb, TENSORMEM_NL_A_GROUP, group);
	if (!err && kind->slot)
		err = nla_put_string(skb, TENSORMEM_NL_A_SLOT, event->slot);
	for (u32 i = 0; !err && i < TM_EVENT_VALUES && kind->attr[i]; i++)
		err = tm_event_put_attr(skb, kind->attr[i], event->value[i]);
	return err;
}

/* Send to those who listen. Return: false: there was no memory for it. */
static bool tm_event_tell(const struct tm_event *event, u32 group,
			  const struct tm_event_group *told)
{
	struct sk_buff *skb;
	void *head;

	if (!genl_has_listeners(&tm_event_family, &init_net, group))
		return true;
	skb = genlmsg_new(tm_event_room(), GFP_KERNEL);
	if (!skb)
		return false;
	head = genlmsg_put(skb, 0, 0, &tm_event_family, 0, event->kind);
	if (!head || WARN_ON_ONCE(tm_event_fill(skb, event, group, told))) {
		nlmsg_free(skb);
		return false;
	}
	genlmsg_end(skb, head);
	/* Whose socket is full finds out by the number of the next. */
	genlmsg_multicast(&tm_event_family, skb, 0, group, GFP_KERNEL);
	return true;
}

/* Number those of a group that found the ring full until it had counted @lost. */
static void tm_event_number_lost(struct tm_event_group *told, u32 lost)
{
	s32 more = lost - told->lost;

	if (more <= 0)
		return;
	told->lost = lost;
	told->seq += more;
	told->missed += more;
	told->missed_ever += more;
}

static void tm_event_send(const struct tm_event *event)
{
	u32 group = tm_event_kinds[event->kind].group;
	struct tm_event_group *told = &tm_event_told[group];

	tm_event_number_lost(told, event->lost);
	told->seq++;
	if (tm_event_tell(event, group, told)) {
		told->missed = 0;
	} else {
		told->missed++;
		told->missed_ever++;
	}
}

/* What was lost is not to wait for the next event. */
static void tm_event_send_missed(u32 group)
{
	struct tm_event_group *told = &tm_event_told[group];
	struct tm_event event = { .kind = TENSORMEM_NL_EVENT_MISSED };

	tm_event_number_lost(told, atomic_read(&tm_event_lost[group]));
	if (!told->missed)
		return;
	event.time = ktime_get_ns();
	if (tm_event_tell(&event, group, told))
		told->missed = 0;
}

static void tm_event_work(struct work_struct *work)
{
	struct tm_event event;

	mutex_lock(&tm_event_mutex);
	while (tm_event_take(&event)) {
		tm_event_send(&event);
		cond_resched();
	}
	for (u32 i = 0; i < TM_EVENT_GROUPS; i++)
		tm_event_send_missed(i);
	mutex_unlock(&tm_event_mutex);
}
static DECLARE_WORK(tm_event_worker, tm_event_work);

static void tm_event_kick_work(struct irq_work *kick)
{
	queue_work(system_unbound_wq, &tm_event_worker);
}

/* Context: any, like all that follow. */
void tm_event_slot(enum tensormem_nl_command kind, const char *slot,
		   u64 generation, u64 size, int error)
{
	if (tm_event_heard(TENSORMEM_NL_GROUP_SLOTS))
		tm_event_put(kind, slot, generation, size, -error, 0, 0, 0);
}

void tm_event_rt_miss(u32 client, u32 pid, u64 size, u64 had_ns)
{
	if (tm_event_heard(TENSORMEM_NL_GROUP_RT))
		tm_event_put(TENSORMEM_NL_EVENT_RT_MISS, "", client, pid, size,
			     had_ns, 0, 0);
}

void tm_event_kv_evicted(u32 client, u32 cache, u64 blocks)
{
	if (tm_event_heard(TENSORMEM_NL_GROUP_KV))
		tm_event_put(TENSORMEM_NL_EVENT_KV_EVICTED, "", client, cache,
			     blocks, 0, 0, 0);
}

void tm_event_kv_packing(enum tensormem_nl_command kind, u32 client, u32 cache,
			 u32 sequence, u64 blocks, u64 before, u64 after)
{
	if (tm_event_heard(TENSORMEM_NL_GROUP_KV))
		tm_event_put(kind, "", client, cache, sequence, blocks, before,
			     after);
}

void tm_event_kv_full(u32 client, u32 cache, int error)
{
	if (tm_event_heard(TENSORMEM_NL_GROUP_KV))
		tm_event_put(TENSORMEM_NL_EVENT_KV_FULL, "", client, cache,
			     -error, 0, 0, 0);
}

/**
 * tm_event_pressure - the level of memory pressure has changed
 * @level: enum tensormem_pressure_level; CMD_GET says it from now on
 * @available: bytes that the system has left
 * @given: bytes that were given back for it
 */
void tm_event_pressure(u32 level, u64 available, u64 given)
{
	WRITE_ONCE(tm_event_level, level);
	if (tm_event_heard(TENSORMEM_NL_GROUP_PRESSURE))
		tm_event_put(TENSORMEM_NL_EVENT_PRESSURE, "", level, available,
			     given, 0, 0, 0);
}
EXPORT_SYMBOL_GPL(tm_event_pressure); /* for tests/tm_bench_event.c, like the next */

/**
 * tm_event_bandwidth - more bytes were moved than the budget has
 * @client: whose they are; 0: a core's
 * @cpu: the core's number; -1: a client's
 * @used: bytes
 * @budget: bytes
 * @throttled: whether it is made to wait
 */
void tm_event_bandwidth(u32 client, s32 cpu, u64 used, u64 budget,
			bool throttled)
{
	if (tm_event_heard(TENSORMEM_NL_GROUP_BANDWIDTH))
		tm_event_put(TENSORMEM_NL_EVENT_BANDWIDTH, "", client, cpu,
			     used, budget, throttled, 0);
}
EXPORT_SYMBOL_GPL(tm_event_bandwidth);

/* Answer with the state of @group. Return: 0 or -EMSGSIZE. */
static int tm_event_put_state(struct sk_buff *skb, u32 portid, u32 seq,
			      int flags, u32 group)
{
	void *head = genlmsg_put(skb, portid, seq, &tm_event_family, flags,
				 TENSORMEM_NL_CMD_GET);
	struct tm_event_group told;

	if (!head)
		return -EMSGSIZE;
	mutex_lock(&tm_event_mutex);
	told = tm_event_told[group];
	mutex_unlock(&tm_event_mutex);
	if (tm_event_put_attr(skb, TENSORMEM_NL_A_GROUP, group) ||
	    tm_event_put_attr(skb, TENSORMEM_NL_A_SEQ, told.seq) ||
	    tm_event_put_attr(skb, TENSORMEM_NL_A_MISSED, told.missed_ever) ||
	    (group == TENSORMEM_NL_GROUP_PRESSURE &&
	     tm_event_put_attr(skb, TENSORMEM_NL_A_LEVEL,
			       READ_ONCE(tm_event_level)))) {
		genlmsg_cancel(skb, head);
		return -EMSGSIZE;
	}
	genlmsg_end(skb, head);
	return 0;
}

static int tm_event_get(struct sk_buff *request, struct genl_info *info)
{
	struct sk_buff *skb;
	u32 group;
	int err;

	if (!info->attrs[TENSORMEM_NL_A_GROUP]) {
		GENL_SET_ERR_MSG(info, "which group is missing");
		return -EINVAL;
	}
	group = nla_get_u32(info->attrs[TENSORMEM_NL_A_GROUP]);
	group = array_index_nospec(group, TM_EVENT_GROUPS);
	tm_event_look();
	skb = genlmsg_new(tm_event_room(), GFP_KERNEL);
	if (!skb)
		return -ENOMEM;
	err = tm_event_put_state(skb, info->snd_portid, info->snd_seq, 0,
				 group);
	if (err) {
		nlmsg_free(skb);
		return err;
	}
	return genlmsg_reply(skb, info);
}

static int tm_event_dump_start(struct netlink_callback *cb)
{
	if (tm_genl_dump_attrs(cb)[TENSORMEM_NL_A_GROUP]) {
		NL_SET_ERR_MSG(cb->extack, "a dump is of all groups");
		return -EINVAL;
	}
	tm_event_look();
	return 0;
}

static int tm_event_dump(struct sk_buff *skb, struct netlink_callback *cb)
{
	for (; cb->args[0] < TM_EVENT_GROUPS; cb->args[0]++)
		if (tm_event_put_state(skb, NETLINK_CB(cb->skb).portid,
				       cb->nlh->nlmsg_seq, NLM_F_MULTI,
				       cb->args[0]))
			break;
	return skb->len;
}

static const struct nla_policy tm_event_get_policy[] = {
	[TENSORMEM_NL_A_GROUP] = NLA_POLICY_MAX(NLA_U32, TM_EVENT_GROUPS - 1),
};

static const struct genl_ops tm_event_ops[] = {
	{
		.cmd = TENSORMEM_NL_CMD_GET,
		.doit = tm_event_get,
		.start = tm_event_dump_start,
		.dumpit = tm_event_dump,
		.policy = tm_event_get_policy,
		.maxattr = ARRAY_SIZE(tm_event_get_policy) - 1,
	},
};

static const struct genl_multicast_group tm_event_mcgrps[] = {
	[TENSORMEM_NL_GROUP_SLOTS] = { "slots", TM_GENL_ADMIN },
	[TENSORMEM_NL_GROUP_RT] = { "rt", TM_GENL_ADMIN },
	[TENSORMEM_NL_GROUP_KV] = { "kv", TM_GENL_ADMIN },
	[TENSORMEM_NL_GROUP_PRESSURE] = { "pressure" },
	[TENSORMEM_NL_GROUP_BANDWIDTH] = { "bandwidth" },
};
static_assert(ARRAY_SIZE(tm_event_mcgrps) == TM_EVENT_GROUPS);

static struct genl_family tm_event_family __ro_after_init = {
	.name = TENSORMEM_NL_FAMILY,
	.version = TENSORMEM_NL_VERSION,
	.parallel_ops = true,
	.module = THIS_MODULE,
	.ops = tm_event_ops,
	.n_ops = ARRAY_SIZE(tm_event_ops),
	.resv_start_op = TENSORMEM_NL_CMD_GET,
	.mcgrps = tm_event_mcgrps,
	.n_mcgrps = ARRAY_SIZE(tm_event_mcgrps),
};

/* Context: may sleep. Return: 0 or why there is no such family. */
int __init tm_events_init(void)
{
	tm_genl_bind(&tm_event_family, tm_event_join, tm_event_leave);
	return genl_register_family(&tm_event_family);
}

/* Context: may sleep; nothing happens any more. What has is sent. */
void tm_events_exit(void)
{
	irq_work_sync(&tm_event_kick);
	flush_work(&tm_event_worker);
	genl_unregister_family(&tm_event_family);
	cancel_delayed_work_sync(&tm_event_review);
}
