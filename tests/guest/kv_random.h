/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The reference model of kv_random.c: what every byte of every sequence is to be.
 *
 * A token has one 64-bit number for each plane, and its bytes follow from that: so
 * contents are small, are copied in place of being shared, and a page's CRC can be had
 * without the page. Everything lies in memory that processes share.
 */
#ifndef KV_RANDOM_H
#define KV_RANDOM_H

#pragma GCC target("+crc")

#include <arm_acle.h>
#include <err.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <linux/tensormem.h>

typedef uint32_t u32;
typedef uint64_t u64;

#define GROUPS		5
#define TENANTS		2

struct name {
	u64 v[2];
};

/**
 * struct group - a group of the cache, and what follows from it
 * @rule: to @element: as in struct tensormem_kv_group
 * @slots: numbers for each plane of a block: its tokens, or one for a state
 * @plane_pages: pages of a plane of a block
 * @pages: pages of a block
 * @pats: where its numbers lie among those of all groups' blocks of one index
 * @crcs: the same for its CRCs
 * @offset: @stride: as KV_INFO has to say
 */
struct group {
	u32 rule;
	u32 planes;
	u32 token_bytes;
	u32 window;
	u32 element;
	u32 slots;
	u32 plane_pages;
	u32 pages;
	u32 pats;
	u32 crcs;
	u64 offset;
	u64 stride;
};

/**
 * struct shape - a cache and how it is used
 * @name: it
 * @page: bytes of a page
 * @chunk: bytes of a chunk
 * @nr_groups: of @group
 * @block_tokens: of a block
 * @ask_tokens: what to ask for: the same, or 0 when it should come out like this
 * @max_blocks: @max_tokens: of a sequence
 * @max_seqs: of the cache
 * @limit: bytes; 0 for all that sequences may want
 * @quota: of the client, if it is to be less than the limit
 * @pats: numbers of the blocks of one index, all groups but states
 * @crcs: their pages
 * @state_pats: @state_crcs: of the states
 */
struct shape {
	const char *name;
	u32 page;
	u64 chunk;
	u32 nr_groups;
	struct group group[GROUPS];
	u32 block_tokens;
	u32 ask_tokens;
	u32 max_blocks;
	u32 max_tokens;
	u32 max_seqs;
	u64 limit;
	u64 quota;
	u32 pats;
	u32 crcs;
	u32 state_pats;
	u32 state_crcs;
};

extern struct shape shape;

static inline bool is_state(u32 g)
{
	return shape.group[g].rule == TENSORMEM_KV_STATE;
}

/* Work out what follows from the groups, by the rules of the UAPI header. */
static inline void shape_finish(void)
{
	u64 offset = 0;

	for (u32 i = 0; i < shape.nr_groups; i++) {
		struct group *g = &shape.group[i];
		bool state = g->rule == TENSORMEM_KV_STATE;
		u32 *pats = state ? &shape.state_pats : &shape.pats;
		u32 *crcs = state ? &shape.state_crcs : &shape.crcs;
		u64 bytes = (u64)g->token_bytes *
			    (state ? 1 : shape.block_tokens);

		if (!state && bytes % shape.page)
			errx(1, "%s: blocks that are not whole pages", shape.name);
		g->slots = state ? 1 : shape.block_tokens;
		g->plane_pages = (bytes + shape.page - 1) / shape.page;
		g->pages = g->plane_pages * g->planes;
		g->pats = *pats;
		g->crcs = *crcs;
		*pats += g->slots * g->planes;
		*crcs += g->pages;
		g->offset = offset;
		g->stride = (u64)(state ? 1 : shape.max_blocks) *
			    g->plane_pages * shape.page;
		offset += g->stride * g->planes;
	}
}

/* The blocks [@first, @end) of a group that a sequence of @tokens has. */
static inline void span(u32 g, u32 tokens, u32 *first, u32 *end)
{
	const struct group *group = &shape.group[g];

	*first = 0;
	if (is_state(g)) {
		*end = !!tokens;
		return;
	}
	if (group->rule == TENSORMEM_KV_WINDOW && tokens > group->window)
		*first = (tokens - group->window) / shape.block_tokens;
	*end = (tokens + shape.block_tokens - 1) / shape.block_tokens;
}

static inline u64 mix(u64 x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/*
 * The words of a token in a plane. 0 is what was never written. Most kinds can be
 * packed: one number over and over, a ramp, and something with few high bits.
 */
static inline u64 word(u64 pat, u64 i)
{
	switch (pat & 3) {
	case 0:
		return pat;
	case 1:
		return pat + i;
	case 2:
		return (pat ^ i * 0x9e3779b97f4a7c15) & 0x00ff00ff00ff00ff;
	default:
		return pat + i * 0x9e3779b97f4a7c15;
	}
}

static inline u32 crc_word(u32 crc, u64 value)
{
	return __crc32cd(crc, value);
}

static inline u32 crc_memory(const volatile u64 *from, u32 words)
{
	u32 crc = ~0u;

	for (u32 i = 0; i < words; i++)
		crc = crc_word(crc, from[i]);
	return crc;
}

/* The word at @at of a plane of a block whose numbers are @pats. */
static inline u64 expected_word(const struct group *g, const u64 *pats, u32 at)
{
	u32 words = g->token_bytes / 8, slot = at / words;

	return slot < g->slots ? word(pats[slot], at % words) : 0;
}

/* The CRC of a page of a plane of a block whose numbers are @pats. */
static inline u32 crc_expected(const struct group *g, const u64 *pats, u32 page)
{
	u32 words = g->token_bytes / 8, left = shape.page / 8;
	u32 at = page * left, slot = at / words;
	u32 crc = ~0u;

	for (at %= words; left && slot < g->slots; slot++, at = 0)
		for (; left && at < words; at++, left--)
			crc = crc_word(crc, word(pats[slot], at));
	while (left--)
		crc = crc_word(crc, 0);
	return crc;
}

/* Memory that all workers see, zeroed. There is no giving it back. */
static inline void *shared(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		err(1, "memory for the model");
	return p;
}

static inline void lock_init(pthread_mutex_t *lock)
{
	pthread_mutexattr_t attr;

	pthread_mutexattr_init(&attr);
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
	pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_mutex_init(lock, &attr);
}

struct ident;

/**
 * struct entry - a block in a sequence's table
 * @id: which block that is, where one thread has the cache to itself
 * @published: it can be found by @name, as far as this sequence knows
 * @kin: another sequence may know more
 * @name: of @published
 */
struct entry {
	struct ident *id;
	bool published;
	bool kin;
	struct name name;
};

/**
 * struct seq - a sequence
 * @lock: its worker, or one that forks it
 * @open: there is one
 * @torn: a write was cut short by a lack of memory: to be closed
 * @on_prompt: it has been one of the prompts so far
 * @prompt: which
 * @tenant: whose
 * @id: its name
 * @length: tokens
 * @offset: of its place
 * @entry: [group][index]
 * @name: of what is in the blocks, where @named
 * @pats: [index][...]: see struct group; also of blocks that have left a window
 * @crcs: likewise; 0 where not worked out yet, else with bit 32 set
 */
struct seq {
	pthread_mutex_t lock;
	bool open;
	bool torn;
	bool on_prompt;
	u32 prompt;
	u32 tenant;
	u32 id;
	u32 length;
	u64 offset;
	struct entry *entry;
	struct name *name;
	bool *named;
	u64 *pats;
	u64 *crcs;
	u64 *state_pats;
	u64 *state_crcs;
};

static inline void seq_init(struct seq *s)
{
	u32 n = shape.max_blocks;

	lock_init(&s->lock);
	s->entry = shared(sizeof(*s->entry) * n * shape.nr_groups);
	s->name = shared(sizeof(*s->name) * n);
	s->named = shared(sizeof(*s->named) * n);
	s->pats = shared(sizeof(u64) * n * shape.pats + 1);
	s->crcs = shared(sizeof(u64) * n * shape.crcs + 1);
	s->state_pats = shared(sizeof(u64) * shape.state_pats + 1);
	s->state_crcs = shared(sizeof(u64) * shape.state_crcs + 1);
}

static inline struct entry *entry(const struct seq *s, u32 g, u32 i)
{
	return &s->entry[g * shape.max_blocks + i];
}

/* Whether the sequence has block @i of a group. */
static inline bool holds(const struct seq *s, u32 g, u32 i)
{
	u32 first, end;

	span(g, s->length, &first, &end);
	return i >= first && i < end;
}

static inline u64 *block_pats(const struct seq *s, u32 g, u32 i)
{
	return (is_state(g) ? s->state_pats : s->pats + (size_t)i * shape.pats) +
	       shape.group[g].pats;
}

static inline u64 *block_crcs(const struct seq *s, u32 g, u32 i)
{
	return (is_state(g) ? s->state_crcs : s->crcs + (size_t)i * shape.crcs) +
	       shape.group[g].crcs;
}

/* A block is zero. */
static inline void block_clear(struct seq *s, u32 g, u32 i)
{
	const struct group *group = &shape.group[g];

	memset(block_pats(s, g, i), 0, sizeof(u64) * group->planes * group->slots);
	memset(block_crcs(s, g, i), 0, sizeof(u64) * group->pages);
}

static inline void block_copy(struct seq *to, const struct seq *from, u32 g, u32 i)
{
	const struct group *group = &shape.group[g];

	memcpy(block_pats(to, g, i), block_pats(from, g, i),
	       sizeof(u64) * group->planes * group->slots);
	memcpy(block_crcs(to, g, i), block_crcs(from, g, i),
	       sizeof(u64) * group->pages);
}

/* The contents of block @i of all groups are @pats now. */
static inline void block_set(struct seq *s, u32 i, const u64 *pats)
{
	memcpy(s->pats + (size_t)i * shape.pats, pats, sizeof(u64) * shape.pats);
	memset(s->crcs + (size_t)i * shape.crcs, 0, sizeof(u64) * shape.crcs);
}

/* The state that goes with the tokens up to and with a block. */
static inline u64 state_pat(const struct name *name, u32 g, u32 plane)
{
	return mix(name->v[0] ^ mix(name->v[1] + g * 64 + plane)) | 1;
}

static inline void state_set(struct seq *s, u32 g, const struct name *name)
{
	for (u32 p = 0; p < shape.group[g].planes; p++)
		block_pats(s, g, 0)[p] = state_pat(name, g, p);
	memset(block_crcs(s, g, 0), 0, sizeof(u64) * shape.group[g].pages);
}

static inline bool same_name(const struct name *a, const struct name *b)
{
	return a->v[0] == b->v[0] && a->v[1] == b->v[1];
}

static inline struct name chain(const struct name *before, const u64 *pats)
{
	struct name name = { { mix(before->v[0]), mix(~before->v[1]) } };

	for (u32 i = 0; i < shape.pats; i++) {
		name.v[0] = mix(name.v[0] ^ pats[i]);
		name.v[1] = (name.v[1] + pats[i]) * 0xd6e8feb86659fd93;
		name.v[1] ^= name.v[1] >> 32;
	}
	name.v[0] |= 1;
	return name;
}

/* The name of a full block: of what is in it, and of the block before. */
static inline struct name *seq_name(struct seq *s, u32 i)
{
	static const struct name none;
	u32 from = i;

	while (from && !s->named[from])
		from--;
	for (; from <= i; from++) {
		if (s->named[from])
			continue;
		s->name[from] = chain(from ? &s->name[from - 1] : &none,
				      s->pats + (size_t)from * shape.pats);
		s->named[from] = true;
	}
	return &s->name[i];
}

#endif
