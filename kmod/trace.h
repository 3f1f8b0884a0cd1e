/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM tensormem

#if !defined(TM_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define TM_TRACE_H

#include <linux/tracepoint.h>

#include <uapi/linux/tensormem.h>

/*
 * Monitors take the arguments themselves (raw tracepoints): each event has them in the order in
 * which it prints its fields, one for each, of the same type.
 */

/* Symbols instead of numbers; the numbers are those of the UAPI header. */
#define tm_show_kind(kind)						\
	__print_symbolic(kind,						\
			 { 1, "weights" },				\
			 { 2, "kv" },					\
			 { 3, "activations" },				\
			 { 4, "protocol" })

#define tm_show_pool(pool)						\
	__print_symbolic(pool,						\
			 { 1, "chunk" },				\
			 { 2, "buddy" },				\
			 { 3, "slab" },					\
			 { 4, "dma" })

DECLARE_EVENT_CLASS(tensormem_tensor,
	TP_PROTO(u32 client, u32 handle, u8 kind, u8 pool, u64 size, u64 held,
		 u64 offset, u64 latency_ns),
	TP_ARGS(client, handle, kind, pool, size, held, offset, latency_ns),
	TP_STRUCT__entry(
		__field(u64, size)
		__field(u64, held)
		__field(u64, offset)
		__field(u64, latency_ns)
		__field(u32, client)
		__field(u32, handle)
		__field(u8, kind)
		__field(u8, pool)
	),
	TP_fast_assign(
		__entry->size = size;
		__entry->held = held;
		__entry->offset = offset;
		__entry->latency_ns = latency_ns;
		__entry->client = client;
		__entry->handle = handle;
		__entry->kind = kind;
		__entry->pool = pool;
	),
	TP_printk("client=%u handle=%u kind=%s pool=%s size=%llu held=%llu offset=%#llx latency_ns=%llu",
		  __entry->client, __entry->handle,
		  tm_show_kind(__entry->kind), tm_show_pool(__entry->pool),
		  __entry->size, __entry->held, __entry->offset,
		  __entry->latency_ns)
);

/* latency_ns: from the request for its memory until the tensor has a handle. */
DEFINE_EVENT(tensormem_tensor, tensormem_alloc,
	TP_PROTO(u32 client, u32 handle, u8 kind, u8 pool, u64 size, u64 held,
		 u64 offset, u64 latency_ns),
	TP_ARGS(client, handle, kind, pool, size, held, offset, latency_ns)
);

/* latency_ns: how long the tensor lived. */
DEFINE_EVENT(tensormem_tensor, tensormem_free,
	TP_PROTO(u32 client, u32 handle, u8 kind, u8 pool, u64 size, u64 held,
		 u64 offset, u64 latency_ns),
	TP_ARGS(client, handle, kind, pool, size, held, offset, latency_ns)
);

TRACE_EVENT(tensormem_chunk_grow,
	TP_PROTO(u32 node, u32 chunk, bool ok, u64 latency_ns),
	TP_ARGS(node, chunk, ok, latency_ns),
	TP_STRUCT__entry(
		__field(u64, latency_ns)
		__field(u32, node)
		__field(u32, chunk)
		__field(bool, ok)
	),
	TP_fast_assign(
		__entry->latency_ns = latency_ns;
		__entry->node = node;
		__entry->chunk = chunk;
		__entry->ok = ok;
	),
	TP_printk("node=%u chunk=%u ok=%d latency_ns=%llu", __entry->node,
		  __entry->chunk, __entry->ok, __entry->latency_ns)
);

TRACE_EVENT(tensormem_chunk_shrink,
	TP_PROTO(u32 node, u32 chunk),
	TP_ARGS(node, chunk),
	TP_STRUCT__entry(
		__field(u32, node)
		__field(u32, chunk)
	),
	TP_fast_assign(
		__entry->node = node;
		__entry->chunk = chunk;
	),
	TP_printk("node=%u chunk=%u", __entry->node, __entry->chunk)
);

/* emptied: chunks that went back to level 1. */
TRACE_EVENT(tensormem_compact,
	TP_PROTO(u32 emptied),
	TP_ARGS(emptied),
	TP_STRUCT__entry(
		__field(u32, emptied)
	),
	TP_fast_assign(
		__entry->emptied = emptied;
	),
	TP_printk("emptied=%u", __entry->emptied)
);

/* mapped: pages this fault saw to; 0 when there is no tensor (SIGBUS). */
TRACE_EVENT(tensormem_fault,
	TP_PROTO(u32 client, u64 page, u32 mapped, u64 latency_ns),
	TP_ARGS(client, page, mapped, latency_ns),
	TP_STRUCT__entry(
		__field(u64, page)
		__field(u64, latency_ns)
		__field(u32, client)
		__field(u32, mapped)
	),
	TP_fast_assign(
		__entry->page = page;
		__entry->latency_ns = latency_ns;
		__entry->client = client;
		__entry->mapped = mapped;
	),
	TP_printk("client=%u page=%llu mapped=%u latency_ns=%llu",
		  __entry->client, __entry->page, __entry->mapped,
		  __entry->latency_ns)
);

/* length: tokens now. latency_ns: until the new blocks are mapped. */
TRACE_EVENT(tensormem_kv_extend,
	TP_PROTO(u32 client, u32 cache, u32 sequence, u32 tokens, u32 length,
		 u64 latency_ns),
	TP_ARGS(client, cache, sequence, tokens, length, latency_ns),
	TP_STRUCT__entry(
		__field(u64, latency_ns)
		__field(u32, client)
		__field(u32, cache)
		__field(u32, sequence)
		__field(u32, tokens)
		__field(u32, length)
	),
	TP_fast_assign(
		__entry->latency_ns = latency_ns;
		__entry->client = client;
		__entry->cache = cache;
		__entry->sequence = sequence;
		__entry->tokens = tokens;
		__entry->length = length;
	),
	TP_printk("client=%u cache=%u sequence=%#x tokens=%u length=%u latency_ns=%llu",
		  __entry->client, __entry->cache, __entry->sequence,
		  __entry->tokens, __entry->length, __entry->latency_ns)
);

TRACE_EVENT(tensormem_kv_fork,
	TP_PROTO(u32 client, u32 cache, u32 sequence, u32 child, u32 at),
	TP_ARGS(client, cache, sequence, child, at),
	TP_STRUCT__entry(
		__field(u32, client)
		__field(u32, cache)
		__field(u32, sequence)
		__field(u32, child)
		__field(u32, at)
	),
	TP_fast_assign(
		__entry->client = client;
		__entry->cache = cache;
		__entry->sequence = sequence;
		__entry->child = child;
		__entry->at = at;
	),
	TP_printk("client=%u cache=%u sequence=%#x child=%#x at=%u",
		  __entry->client, __entry->cache, __entry->sequence,
		  __entry->child, __entry->at)
);

/* Blocks asked for by hash, and how many the sequence begins with. */
TRACE_EVENT(tensormem_kv_lookup,
	TP_PROTO(u32 client, u32 cache, u32 sequence, u32 asked, u32 matched),
	TP_ARGS(client, cache, sequence, asked, matched),
	TP_STRUCT__entry(
		__field(u32, client)
		__field(u32, cache)
		__field(u32, sequence)
		__field(u32, asked)
		__field(u32, matched)
	),
	TP_fast_assign(
		__entry->client = client;
		__entry->cache = cache;
		__entry->sequence = sequence;
		__entry->asked = asked;
		__entry->matched = matched;
	),
	TP_printk("client=%u cache=%u sequence=%#x asked=%u matched=%u",
		  __entry->client, __entry->cache, __entry->sequence,
		  __entry->asked, __entry->matched)
);

/* A block copied at a fork, before a write, of a partial match, or for a state. */
TRACE_EVENT(tensormem_kv_copy,
	TP_PROTO(u32 client, u32 cache, u32 group, u32 block, u64 bytes),
	TP_ARGS(client, cache, group, block, bytes),
	TP_STRUCT__entry(
		__field(u64, bytes)
		__field(u32, client)
		__field(u32, cache)
		__field(u32, group)
		__field(u32, block)
	),
	TP_fast_assign(
		__entry->bytes = bytes;
		__entry->client = client;
		__entry->cache = cache;
		__entry->group = group;
		__entry->block = block;
	),
	TP_printk("client=%u cache=%u group=%u block=%u bytes=%llu",
		  __entry->client, __entry->cache, __entry->group,
		  __entry->block, __entry->bytes)
);

/* Cached blocks given up for one call. */
TRACE_EVENT(tensormem_kv_evict,
	TP_PROTO(u32 client, u32 cache, u32 blocks),
	TP_ARGS(client, cache, blocks),
	TP_STRUCT__entry(
		__field(u32, client)
		__field(u32, cache)
		__field(u32, blocks)
	),
	TP_fast_assign(
		__entry->client = client;
		__entry->cache = cache;
		__entry->blocks = blocks;
	),
	TP_printk("client=%u cache=%u blocks=%u", __entry->client,
		  __entry->cache, __entry->blocks)
);

DECLARE_EVENT_CLASS(tensormem_kv_packing,
	TP_PROTO(u32 client, u32 cache, u32 group, u64 before, u64 after,
		 u64 latency_ns),
	TP_ARGS(client, cache, group, before, after, latency_ns),
	TP_STRUCT__entry(
		__field(u64, before)
		__field(u64, after)
		__field(u64, latency_ns)
		__field(u32, client)
		__field(u32, cache)
		__field(u32, group)
	),
	TP_fast_assign(
		__entry->before = before;
		__entry->after = after;
		__entry->latency_ns = latency_ns;
		__entry->client = client;
		__entry->cache = cache;
		__entry->group = group;
	),
	TP_printk("client=%u cache=%u group=%u before=%llu after=%llu latency_ns=%llu",
		  __entry->client, __entry->cache, __entry->group,
		  __entry->before, __entry->after, __entry->latency_ns)
);

/* One block, in bytes of pages. after equals before where it would not get smaller. */
DEFINE_EVENT(tensormem_kv_packing, tensormem_kv_pack,
	TP_PROTO(u32 client, u32 cache, u32 group, u64 before, u64 after,
		 u64 latency_ns),
	TP_ARGS(client, cache, group, before, after, latency_ns)
);

DEFINE_EVENT(tensormem_kv_packing, tensormem_kv_unpack,
	TP_PROTO(u32 client, u32 cache, u32 group, u64 before, u64 after,
		 u64 latency_ns),
	TP_ARGS(client, cache, group, before, after, latency_ns)
);

TRACE_EVENT(tensormem_model_stage,
	TP_PROTO(const char *slot, u64 generation, u64 size),
	TP_ARGS(slot, generation, size),
	TP_STRUCT__entry(
		__array(char, slot, TENSORMEM_MODEL_NAME)
		__field(u64, generation)
		__field(u64, size)
	),
	TP_fast_assign(
		strscpy(__entry->slot, slot, TENSORMEM_MODEL_NAME);
		__entry->generation = generation;
		__entry->size = size;
	),
	TP_printk("slot=%s generation=%llu size=%llu", __entry->slot,
		  __entry->generation, __entry->size)
);

/* The end of a load; error: 0, or why it failed: a negative errno. */
TRACE_EVENT(tensormem_model_load,
	TP_PROTO(const char *slot, u64 generation, u64 size, int error),
	TP_ARGS(slot, generation, size, error),
	TP_STRUCT__entry(
		__array(char, slot, TENSORMEM_MODEL_NAME)
		__field(u64, generation)
		__field(u64, size)
		__field(int, error)
	),
	TP_fast_assign(
		strscpy(__entry->slot, slot, TENSORMEM_MODEL_NAME);
		__entry->generation = generation;
		__entry->size = size;
		__entry->error = error;
	),
	TP_printk("slot=%s generation=%llu size=%llu error=%d",
		  __entry->slot, __entry->generation, __entry->size,
		  __entry->error)
);

DECLARE_EVENT_CLASS(tensormem_model,
	TP_PROTO(const char *slot, u64 generation),
	TP_ARGS(slot, generation),
	TP_STRUCT__entry(
		__array(char, slot, TENSORMEM_MODEL_NAME)
		__field(u64, generation)
	),
	TP_fast_assign(
		strscpy(__entry->slot, slot, TENSORMEM_MODEL_NAME);
		__entry->generation = generation;
	),
	TP_printk("slot=%s generation=%llu", __entry->slot,
		  __entry->generation)
);

DEFINE_EVENT(tensormem_model, tensormem_model_commit,
	TP_PROTO(const char *slot, u64 generation),
	TP_ARGS(slot, generation)
);

/* generation: the one that is active again. */
DEFINE_EVENT(tensormem_model, tensormem_model_rollback,
	TP_PROTO(const char *slot, u64 generation),
	TP_ARGS(slot, generation)
);

DEFINE_EVENT(tensormem_model, tensormem_model_abort,
	TP_PROTO(const char *slot, u64 generation),
	TP_ARGS(slot, generation)
);

/* Nobody has it any more: its memory goes. */
DEFINE_EVENT(tensormem_model, tensormem_model_retire,
	TP_PROTO(const char *slot, u64 generation),
	TP_ARGS(slot, generation)
);

/*
 * The RT pool. client: its folder in sysfs. size: bytes. latency_ns: from the call until the
 * block is there.
 */
TRACE_EVENT(tensormem_rt_alloc,
	TP_PROTO(u32 client, u64 size, u32 handle, u64 offset, u64 latency_ns),
	TP_ARGS(client, size, handle, offset, latency_ns),
	TP_STRUCT__entry(
		__field(u64, size)
		__field(u64, offset)
		__field(u64, latency_ns)
		__field(u32, client)
		__field(u32, handle)
	),
	TP_fast_assign(
		__entry->size = size;
		__entry->offset = offset;
		__entry->latency_ns = latency_ns;
		__entry->client = client;
		__entry->handle = handle;
	),
	TP_printk("client=%u size=%llu handle=%#x offset=%#llx latency_ns=%llu",
		  __entry->client, __entry->size, __entry->handle,
		  __entry->offset, __entry->latency_ns)
);

TRACE_EVENT(tensormem_rt_free,
	TP_PROTO(u32 client, u32 handle),
	TP_ARGS(client, handle),
	TP_STRUCT__entry(
		__field(u32, client)
		__field(u32, handle)
	),
	TP_fast_assign(
		__entry->client = client;
		__entry->handle = handle;
	),
	TP_printk("client=%u handle=%#x", __entry->client, __entry->handle)
);

DECLARE_EVENT_CLASS(tensormem_rt_deadline,
	TP_PROTO(u32 client, u64 size, u64 had_ns),
	TP_ARGS(client, size, had_ns),
	TP_STRUCT__entry(
		__field(u64, size)
		__field(u64, had_ns)
		__field(u32, client)
	),
	TP_fast_assign(
		__entry->size = size;
		__entry->had_ns = had_ns;
		__entry->client = client;
	),
	TP_printk("client=%u size=%llu had_ns=%llu", __entry->client,
		  __entry->size, __entry->had_ns)
);

/* There was no memory. had_ns: the time that the request has from its beginning on. */
DEFINE_EVENT(tensormem_rt_deadline, tensormem_rt_wait,
	TP_PROTO(u32 client, u64 size, u64 had_ns),
	TP_ARGS(client, size, had_ns)
);

/* There was none by the deadline. */
DEFINE_EVENT(tensormem_rt_deadline, tensormem_rt_miss,
	TP_PROTO(u32 client, u64 size, u64 had_ns),
	TP_ARGS(client, size, had_ns)
);

/* A signal came before memory and deadline. */
DEFINE_EVENT(tensormem_rt_deadline, tensormem_rt_interrupted,
	TP_PROTO(u32 client, u64 size, u64 had_ns),
	TP_ARGS(client, size, had_ns)
);

/* Compaction has moved a block. from, to: offsets; length: bytes. */
TRACE_EVENT(tensormem_rt_move,
	TP_PROTO(u32 arena, u64 from, u64 to, u32 length),
	TP_ARGS(arena, from, to, length),
	TP_STRUCT__entry(
		__field(u64, from)
		__field(u64, to)
		__field(u32, arena)
		__field(u32, length)
	),
	TP_fast_assign(
		__entry->from = from;
		__entry->to = to;
		__entry->arena = arena;
		__entry->length = length;
	),
	TP_printk("arena=%u from=%#llx to=%#llx length=%u", __entry->arena,
		  __entry->from, __entry->to, __entry->length)
);

/* The numbers of enum tensormem_relief. */
#define tm_show_relief(step)						\
	__print_symbolic(step,						\
			 { 0, "chunks" },				\
			 { 1, "prefixes" },				\
			 { 2, "idle" },				\
			 { 3, "weights" })

#define tm_show_pressure(level)						\
	__print_symbolic(level,						\
			 { 0, "none" },					\
			 { 1, "low" },					\
			 { 2, "critical" })

/* A step of a relief is done. wanted, given: bytes; latency_ns: of the step. */
TRACE_EVENT(tensormem_pressure_step,
	TP_PROTO(u32 step, u64 wanted, u64 given, u64 latency_ns),
	TP_ARGS(step, wanted, given, latency_ns),
	TP_STRUCT__entry(
		__field(u64, wanted)
		__field(u64, given)
		__field(u64, latency_ns)
		__field(u32, step)
	),
	TP_fast_assign(
		__entry->wanted = wanted;
		__entry->given = given;
		__entry->latency_ns = latency_ns;
		__entry->step = step;
	),
	TP_printk("step=%s wanted=%llu given=%llu latency_ns=%llu",
		  tm_show_relief(__entry->step), __entry->wanted,
		  __entry->given, __entry->latency_ns)
);

/* The level has changed. available: bytes the system has; given: by the relief before. */
TRACE_EVENT(tensormem_pressure_level,
	TP_PROTO(u32 level, u64 available, u64 given),
	TP_ARGS(level, available, given),
	TP_STRUCT__entry(
		__field(u64, available)
		__field(u64, given)
		__field(u32, level)
	),
	TP_fast_assign(
		__entry->available = available;
		__entry->given = given;
		__entry->level = level;
	),
	TP_printk("level=%s available=%llu given=%llu",
		  tm_show_pressure(__entry->level), __entry->available,
		  __entry->given)
);

/*
 * A budget is exceeded, for the first time in its period. client: whose, cpu -1, used and
 * budget in bytes; or client 0: core cpu's, in events of bandwidth/event.
 */
TRACE_EVENT(tensormem_bandwidth,
	TP_PROTO(u32 client, s32 cpu, u64 used, u64 budget, bool throttled),
	TP_ARGS(client, cpu, used, budget, throttled),
	TP_STRUCT__entry(
		__field(u64, used)
		__field(u64, budget)
		__field(u32, client)
		__field(s32, cpu)
		__field(bool, throttled)
	),
	TP_fast_assign(
		__entry->used = used;
		__entry->budget = budget;
		__entry->client = client;
		__entry->cpu = cpu;
		__entry->throttled = throttled;
	),
	TP_printk("client=%u cpu=%d used=%llu budget=%llu throttled=%d",
		  __entry->client, __entry->cpu, __entry->used,
		  __entry->budget, __entry->throttled)
);

/* A piece of an evictable generation went. offset: of the piece in the model. */
TRACE_EVENT(tensormem_model_evict,
	TP_PROTO(const char *slot, u64 generation, u64 offset, u64 bytes),
	TP_ARGS(slot, generation, offset, bytes),
	TP_STRUCT__entry(
		__array(char, slot, TENSORMEM_MODEL_NAME)
		__field(u64, generation)
		__field(u64, offset)
		__field(u64, bytes)
	),
	TP_fast_assign(
		strscpy(__entry->slot, slot, TENSORMEM_MODEL_NAME);
		__entry->generation = generation;
		__entry->offset = offset;
		__entry->bytes = bytes;
	),
	TP_printk("slot=%s generation=%llu offset=%#llx bytes=%llu",
		  __entry->slot, __entry->generation, __entry->offset,
		  __entry->bytes)
);

/* One came back, or could not (error). latency_ns: with the wait for memory and for the disk. */
TRACE_EVENT(tensormem_model_reload,
	TP_PROTO(const char *slot, u64 generation, u64 offset, int error,
		 u64 latency_ns),
	TP_ARGS(slot, generation, offset, error, latency_ns),
	TP_STRUCT__entry(
		__array(char, slot, TENSORMEM_MODEL_NAME)
		__field(u64, generation)
		__field(u64, offset)
		__field(u64, latency_ns)
		__field(int, error)
	),
	TP_fast_assign(
		strscpy(__entry->slot, slot, TENSORMEM_MODEL_NAME);
		__entry->generation = generation;
		__entry->offset = offset;
		__entry->error = error;
		__entry->latency_ns = latency_ns;
	),
	TP_printk("slot=%s generation=%llu offset=%#llx error=%d latency_ns=%llu",
		  __entry->slot, __entry->generation, __entry->offset,
		  __entry->error, __entry->latency_ns)
);

/*
 * A call to any of our descriptors. client: who pays for what it stands for. cmd: the number in
 * the command. ret: 0 or more, or a negative errno.
 */
TRACE_EVENT(tensormem_ioctl,
	TP_PROTO(u32 client, u32 cmd, s64 ret, u64 latency_ns),
	TP_ARGS(client, cmd, ret, latency_ns),
	TP_STRUCT__entry(
		__field(u64, latency_ns)
		__field(s64, ret)
		__field(u32, client)
		__field(u32, cmd)
	),
	TP_fast_assign(
		__entry->latency_ns = latency_ns;
		__entry->ret = ret;
		__entry->client = client;
		__entry->cmd = cmd;
	),
	TP_printk("client=%u cmd=%#x ret=%lld latency_ns=%llu",
		  __entry->client, __entry->cmd, __entry->ret,
		  __entry->latency_ns)
);

/* page: in the window. write: to what was read-only, or not there. ok: not SIGBUS. */
TRACE_EVENT(tensormem_kv_fault,
	TP_PROTO(u32 client, u32 cache, u64 page, bool write, bool ok,
		 u64 latency_ns),
	TP_ARGS(client, cache, page, write, ok, latency_ns),
	TP_STRUCT__entry(
		__field(u64, page)
		__field(u64, latency_ns)
		__field(u32, client)
		__field(u32, cache)
		__field(bool, write)
		__field(bool, ok)
	),
	TP_fast_assign(
		__entry->page = page;
		__entry->latency_ns = latency_ns;
		__entry->client = client;
		__entry->cache = cache;
		__entry->write = write;
		__entry->ok = ok;
	),
	TP_printk("client=%u cache=%u page=%llu write=%d ok=%d latency_ns=%llu",
		  __entry->client, __entry->cache, __entry->page,
		  __entry->write, __entry->ok, __entry->latency_ns)
);

/* page: of the model. mapped: pages this fault saw to; 0 for SIGBUS. */
TRACE_EVENT(tensormem_model_fault,
	TP_PROTO(const char *slot, u64 generation, u64 page, u32 mapped,
		 u64 latency_ns),
	TP_ARGS(slot, generation, page, mapped, latency_ns),
	TP_STRUCT__entry(
		__array(char, slot, TENSORMEM_MODEL_NAME)
		__field(u64, generation)
		__field(u64, page)
		__field(u64, latency_ns)
		__field(u32, mapped)
	),
	TP_fast_assign(
		strscpy(__entry->slot, slot, TENSORMEM_MODEL_NAME);
		__entry->generation = generation;
		__entry->page = page;
		__entry->latency_ns = latency_ns;
		__entry->mapped = mapped;
	),
	TP_printk("slot=%s generation=%llu page=%llu mapped=%u latency_ns=%llu",
		  __entry->slot, __entry->generation, __entry->page,
		  __entry->mapped, __entry->latency_ns)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
