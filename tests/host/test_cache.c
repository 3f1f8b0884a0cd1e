// SPDX-License-Identifier: GPL-2.0-only
/* KV caches: sequences over shared blocks, and which of them go when room is short. */
#include "cache_model.h"
#include "kv_model.h"

static struct cache_model m;

static struct tm_hash hash(u64 n)
{
	return (struct tm_hash){ { n, ~n } };
}

/* Names of the blocks @first and on of a text: every text has names of its own. */
static const struct tm_hash *names(u32 text, u32 first, u32 nr)
{
	static struct tm_hash list[64];

	for (u32 i = 0; i < nr; i++)
		list[i] = hash(text * 1000 + first + i);
	return list;
}

static void setup(unsigned int page_shift, const struct tm_kv_group *groups,
		  u32 nr_groups, u32 block_tokens, u32 max_tokens, u32 max_seqs,
		  u32 chunks)
{
	struct tm_cache_config config = {
		.max_tokens = max_tokens,
		.max_seqs = max_seqs,
		.max_chunks = chunks,
		.nr_events = CACHE_EVENTS,
	};

	CHECK_EQ(tm_kv_geometry_init(&config.geo, tm_geometry(page_shift),
				     groups, nr_groups, block_tokens), 0);
	cache_setup(&m, &config, chunks);
}

/* Four tokens a block; @pages pages in it, so that a chunk holds few. */
#define TOKENS	4u

static void setup_full(u32 pages, u32 max_blocks, u32 max_seqs, u32 chunks)
{
	struct tm_kv_group group = cache_full(tm_geometry(18), TOKENS, 1,
					      pages);

	setup(18, &group, 1, TOKENS, max_blocks * TOKENS, max_seqs, chunks);
}

static struct tm_seq_id open_seq(u64 tenant)
{
	struct tm_seq_id id;

	CHECK_EQ(cache_do_open(&m, tenant, &id), 0);
	return id;
}

static u32 place_of(struct tm_seq_id id)
{
	return cache_place(&m, cache_seq(&m, id));
}

static u32 block_of(struct tm_seq_id id, u32 group, u32 index)
{
	return cache_seq(&m, id)->block[group][index];
}

static void add_chunks(u32 nr)
{
	while (nr--)
		CHECK_EQ(cache_do_add(&m), 0);
}

/* A sequence of @blocks written blocks. */
static struct tm_seq_id write_seq(u64 tenant, u32 blocks)
{
	struct tm_seq_id id = open_seq(tenant);
	u32 tokens = m.geo.block_tokens;

	CHECK_EQ(cache_do_extend(&m, id, blocks * tokens, false), 0);
	for (u32 g = 0; g < m.geo.nr_groups; g++)
		for (u32 i = 0; i < blocks; i++)
			if (block_of(id, g, i) != TM_NONE)
				CHECK_EQ(cache_do_touch(&m, place_of(id), g, i,
							0, true), 0);
	return id;
}

/* Seal and publish all full blocks as those of @text. */
static void publish_all(struct tm_seq_id id, u32 text)
{
	u32 nr = cache_nr_full(&m, cache_seq(&m, id));

	CHECK_EQ(cache_do_seal(&m, id, nr), 0);
	CHECK_EQ(cache_do_publish(&m, id, 0, names(text, 0, nr), nr, false), 0);
}

static u32 match(u64 tenant, u32 text, u32 nr)
{
	return cache_do_match(&m, tenant, names(text, 0, nr), nr);
}

static u32 lookup(struct tm_seq_id id, u32 text, u32 nr, bool evict)
{
	u32 matched;

	CHECK_EQ(cache_do_lookup(&m, id, names(text, 0, nr), nr, evict,
				 &matched), 0);
	return matched;
}

/* Random operations */

enum op {
	OP_OPEN,
	OP_CLOSE,
	OP_EXTEND,
	OP_EXTEND_MANY,
	OP_TRUNCATE,
	OP_SEAL,
	OP_FORK,
	OP_READ,
	OP_WRITE,
	OP_PUBLISH,
	OP_MATCH,
	OP_LOOKUP,
	OP_ADOPT,
	OP_RESET,
	OP_EVICT,
	OP_PACK,
	OP_PACK_ALL,
	OP_UNPACK,
	OP_EVENTS,
	OP_ADD,
	OP_REMOVE,
	OP_MOVE_BEGIN,
	OP_MOVE_END,
	OP_MOVE_ALL,
	OPS,
};

static struct tm_rng *rng;
static struct tm_hash text[CACHE_SEQS][CACHE_BLOCKS];
static u64 tenants[2];
static bool caching;

static u32 below(u32 n)
{
	return tm_rand_below(rng, n);
}

static bool one_in(u32 n)
{
	return tm_rand_one_in(rng, n);
}

/* Names from @first on, as of a text that others may begin with too. */
static void random_text(struct tm_hash *list, u32 first)
{
	for (u32 i = first; i < CACHE_BLOCKS; i++) {
		struct tm_rng mix = { i ? list[i - 1].v[0] : 1 };

		mix.state += one_in(6);
		list[i].v[0] = tm_rand(&mix);
		list[i].v[1] = tm_rand(&mix) & 1;
	}
}

/* A new sequence, where another is closed for it if need be; mostly. */
static bool random_open(struct tm_seq_id *id)
{
	if (m.nr_open == m.max_seqs && !one_in(8))
		CHECK_EQ(cache_do_close(&m, m.seq[below(m.max_seqs)].id), 0);
	if (cache_do_open(&m, tenants[one_in(4)], id))
		return false;
	random_text(text[place_of(*id)], 0);
	return true;
}

/* An open sequence; rarely none, or one that is closed. */
static struct tm_seq_id random_seq(void)
{
	u32 place = below(m.max_seqs);

	if (one_in(64))
		return (struct tm_seq_id){ (u32)tm_rand(rng) };
	for (u32 i = 0; i < m.max_seqs && !m.seq[place].open; i++)
		place = (place + 1) % m.max_seqs;
	return m.seq[place].id;
}

/*
 * What a caller does without room: adds chunks, unless there are no more to be had,
 * then has blocks evicted.
 */
static bool again(int err, bool *evict)
{
	u64 wanting = m.cache.wanting;

	if (err != -ENOMEM || *evict)
		return false;
	if (wanting != TM_KV_NEVER && !one_in(8))
		while (wanting && !cache_do_add(&m))
			wanting--;
	*evict = wanting;
	return true;
}

/* What a fault does first, after @err of a touch. */
static int prepare(u32 place, u32 group, u32 index, int err)
{
	u32 block = m.seq[place].block[group][index];
	bool evict = false, packed = err == -EAGAIN;

	do {
		err = packed ? cache_do_unpack(&m, block, evict) :
			       cache_do_write(&m, place, group, index, evict);
	} while (again(err, &evict));
	return err;
}

/* A fault: until the page is there, or there is no room. */
static void touch(u32 place, u32 group, u32 index, u32 page, bool write)
{
	for (u32 tries = 0; tries < 3; tries++) {
		int err = cache_do_touch(&m, place, group, index, page, write);

		if (!err || err == -ENOENT ||
		    prepare(place, group, index, err))
			return;
	}
	CHECK(false);
}

/* Write to some of the last blocks, as whoever extends a sequence does. */
static void write_last(struct tm_seq_id id)
{
	struct cache_model_seq *s = cache_seq(&m, id);

	for (u32 g = 0; s && s->length && g < m.geo.nr_groups; g++) {
		bool state = m.geo.group[g].rule == TM_KV_STATE;
		u32 last = state ? 0 : (s->length - 1) / m.geo.block_tokens;

		touch(cache_place(&m, s), g, last, below(m.geo.block_pages[g]),
		      true);
	}
}

static u32 random_tokens(void)
{
	u32 tokens = m.geo.block_tokens;

	switch (below(8)) {
	case 0:
		return below(3 * tokens);
	case 1:
		return below(m.max_tokens + 2);
	case 2:
		return one_in(16) ? ~0u - below(m.max_tokens) : tokens;
	default:
		return 1 + below(tokens);
	}
}

static void random_extend(u32 nr)
{
	struct tm_cache_extend items[CACHE_ITEMS];
	bool evict = false;
	int err;

	for (u32 i = 0; i < nr; i++) {
		struct tm_seq_id id = random_seq();
		struct cache_model_seq *s = cache_seq(&m, id);
		u32 tokens = random_tokens();

		if (s && tokens > m.max_tokens - s->length && !one_in(8))
			tokens = 1 + below(m.max_tokens - s->length + 1);
		items[i] = (struct tm_cache_extend){
			.id = id, .tokens = tokens,
		};
	}
	tm_op("extend %u: %x by %u, free %u", nr, items[0].id.v,
	      items[0].tokens, cache_free_pages(&m));
	do {
		err = cache_do_extend_many(&m, items, nr, evict);
	} while (again(err, &evict));
	for (u32 i = 0; !err && i < nr; i++)
		write_last(items[i].id);
}

static void random_truncate(void)
{
	struct tm_seq_id id = random_seq();
	struct cache_model_seq *s = cache_seq(&m, id);
	u32 length = s ? s->length : 1;

	/* Far back rarely, and beyond the end. */
	length -= below((one_in(4) ? length : m.geo.block_tokens) + 1) %
		  (length + 1);
	length += one_in(32) ? 1 + below(1000) : 0;
	tm_op("truncate %x to %u", id.v, length);
	cache_do_truncate(&m, id, length);
}

static void random_seal(void)
{
	struct tm_seq_id id = random_seq();
	struct cache_model_seq *s = cache_seq(&m, id);
	u32 index = s ? below(cache_nr_full(&m, s) + 1) : 0;

	index += one_in(32) ? 1 + below(~0u) : 0;
	tm_op("seal %x below %u", id.v, index);
	cache_do_seal(&m, id, index);
}

static void random_fork(void)
{
	struct tm_seq_id id = random_seq(), child;
	struct cache_model_seq *s = cache_seq(&m, id);
	u32 at = s ? s->length : 0, tokens = m.geo.block_tokens;
	bool evict = false;
	int err;

	if (!one_in(3))
		at -= below(at + 1);
	at += one_in(32) ? 1 + below(~0u - at) : 0;
	tm_op("fork %x at %u", id.v, at);
	if (m.nr_open == m.max_seqs && !one_in(8)) {
		struct tm_seq_id other = m.seq[below(m.max_seqs)].id;

		if (other.v != id.v)
			CHECK_EQ(cache_do_close(&m, other), 0);
	}
	if (s && at <= s->length && !one_in(16))
		CHECK_EQ(cache_do_seal(&m, id, at / tokens), 0);
	do {
		err = cache_do_fork(&m, id, at, evict, &child);
	} while (again(err, &evict));
	if (err)
		return;
	memcpy(text[place_of(child)], text[cache_place(&m, s)],
	       sizeof(*text));
	random_text(text[place_of(child)], at / tokens);
}

/* A block of a sequence; or rarely none. */
static void random_block(u32 *place, u32 *group, u32 *index)
{
	*group = below(m.geo.nr_groups);
	*place = below(m.max_seqs);
	*index = m.max_blocks;
	for (u32 i = 0; i < 32 && (*index == m.max_blocks ||
				   m.seq[*place].block[*group][*index] ==
				   TM_NONE); i++) {
		*place = below(m.max_seqs);
		*index = below(m.max_blocks + 1);
	}
}

static void random_touch(bool write)
{
	u32 place, group, index, page;

	random_block(&place, &group, &index);
	page = below(m.geo.block_pages[group]);
	if (one_in(64))
		index = ~0u / m.geo.plane_pages[group] - 1 - below(3);
	tm_op("%s place %u group %u block %u page %u",
	      write ? "write" : "read", place, group, index, page);
	touch(place, group, index, page, write);
	if (write && one_in(8))
		cache_do_write(&m, place, group, index, one_in(2));
}

static void random_publish(void)
{
	struct tm_hash list[CACHE_BLOCKS];
	struct cache_model_seq *s = NULL;
	struct tm_seq_id id = { 0 };
	u32 full = 0, first, nr;
	bool evict = false;
	int err;

	if (!caching)
		return;
	for (u32 i = 0; i < 4 && !full; i++) {
		id = random_seq();
		s = cache_seq(&m, id);
		full = s ? cache_nr_full(&m, s) : 0;
	}
	first = one_in(3) ? below(full + 1) : 0;
	nr = full > first ? full - first : 1;
	if (one_in(4))
		nr = 1 + below(nr + 1);
	tm_op("publish %x from %u, %u blocks", id.v, first, nr);
	for (u32 i = 0; i < nr; i++)
		list[i] = s && first + i < CACHE_BLOCKS ?
			  text[cache_place(&m, s)][first + i] : hash(i);
	if (one_in(16))
		list[below(nr)] = hash(7);
	if (one_in(64))
		first = ~0u - below(nr + 1);
	if (s && !one_in(16))
		CHECK_EQ(cache_do_seal(&m, id, full), 0);
	do {
		err = cache_do_publish(&m, id, first, list, nr, evict);
	} while (again(err, &evict));
}

static void random_match(void)
{
	struct tm_hash list[CACHE_BLOCKS];
	u32 nr = 1 + below(CACHE_BLOCKS);

	random_text(list, 0);
	tm_op("match %u", nr);
	cache_do_match(&m, tenants[below(2)], list, nr);
}

static void random_lookup(void)
{
	struct tm_seq_id id = random_seq();
	struct tm_hash list[CACHE_BLOCKS];
	u32 nr = 1 + below(CACHE_BLOCKS), matched;
	bool evict = false;
	int err;

	if (!one_in(8) && !random_open(&id))
		return;
	tm_op("lookup %x, %u blocks", id.v, nr);
	random_text(list, 0);
	/* A text that goes round in circles. */
	if (one_in(16))
		for (u32 i = 1; i < nr; i++)
			list[i] = list[i - 1];
	do {
		err = cache_do_lookup(&m, id, list, nr, evict, &matched);
	} while (again(err, &evict));
	if (!err)
		memcpy(text[place_of(id)], list, sizeof(list));
}

static void random_adopt(void)
{
	struct tm_seq_id id = random_seq();
	struct cache_model_seq *s = cache_seq(&m, id);
	u32 full = s ? cache_nr_full(&m, s) : 0;
	u32 index = one_in(2) ? full : below(full + 2);
	u32 tokens = m.geo.block_tokens;
	struct tm_hash list[CACHE_BLOCKS], *name = &list[index % CACHE_BLOCKS];
	bool evict = false;
	int err;

	if (one_in(2))
		random_text(list, 0);
	else
		memcpy(list, text[below(m.max_seqs)], sizeof(list));
	/* Any published block does, wherever it was. */
	if (m.nr_lru && one_in(4))
		*name = m.block[m.lru[below(m.nr_lru)]].key.hash;
	if (one_in(3))
		tokens = below(tokens + 1) + one_in(16);
	if (one_in(64))
		index = ~0u - below(2);
	tm_op("adopt %x block %u, %u tokens", id.v, index, tokens);
	/* At the end, where the sequence does not end with a block. */
	if (s && index == full && !one_in(8))
		cache_do_truncate(&m, id, full * m.geo.block_tokens);
	do {
		err = cache_do_adopt(&m, id, index, name, tokens, evict);
	} while (again(err, &evict));
}

static void random_pack(void)
{
	u32 place, group, index, pages;

	random_block(&place, &group, &index);
	pages = m.geo.block_pages[group];
	pages = one_in(8) ? below(pages + 2) : 1 + below(pages);
	tm_op("pack place %u group %u block %u to %u", place, group, index,
	      pages);
	cache_do_pack(&m, place, group, index, pages);
}

static void random_pack_all(void)
{
	u32 place = below(m.max_seqs);

	tm_op("pack place %u", place);
	for (u32 g = 0; g < m.geo.nr_groups; g++)
		for (u32 i = 0; i < m.max_blocks; i++)
			cache_do_pack(&m, place, g, i, 1);
}

static void random_unpack(void)
{
	u32 block = below(m.cache.pool.nr_blocks);
	bool evict = false;

	for (u32 i = 0; i < m.cache.pool.nr_blocks && !m.block[block].packed;
	     i++)
		block = (block + 1) % m.cache.pool.nr_blocks;
	if (!m.block[block].used ||
	    (m.block[block].packed && !m.block[block].refs))
		return;
	tm_op("unpack block %u", block);
	while (again(cache_do_unpack(&m, block, evict), &evict))
		;
}

static void random_op(enum op op)
{
	struct tm_cache_event event;
	struct tm_seq_id id;

	switch (op) {
	case OP_OPEN:
		tm_op("open");
		random_open(&id);
		break;
	case OP_CLOSE:
		id = random_seq();
		tm_op("close %x", id.v);
		cache_do_close(&m, id);
		break;
	case OP_EXTEND:
		random_extend(1);
		break;
	case OP_EXTEND_MANY:
		random_extend(2 + below(CACHE_ITEMS - 1));
		break;
	case OP_TRUNCATE:
		random_truncate();
		break;
	case OP_SEAL:
		random_seal();
		break;
	case OP_FORK:
		random_fork();
		break;
	case OP_READ:
	case OP_WRITE:
		random_touch(op == OP_WRITE);
		break;
	case OP_PUBLISH:
		random_publish();
		break;
	case OP_MATCH:
		random_match();
		break;
	case OP_LOOKUP:
		random_lookup();
		break;
	case OP_ADOPT:
		random_adopt();
		break;
	case OP_RESET:
		tm_op("reset");
		cache_do_reset(&m);
		break;
	case OP_EVICT:
		tm_op("evict");
		cache_do_evict(&m);
		break;
	case OP_PACK:
		random_pack();
		break;
	case OP_PACK_ALL:
		random_pack_all();
		break;
	case OP_UNPACK:
		random_unpack();
		break;
	case OP_EVENTS:
		tm_op("read events");
		for (u32 n = below(CACHE_EVENTS);
		     n && cache_do_next_event(&m, &event); n--)
			;
		break;
	case OP_ADD:
		tm_op("add a chunk");
		cache_do_add(&m);
		break;
	case OP_REMOVE:
		tm_op("remove chunks");
		while (!cache_do_remove(&m))
			;
		break;
	case OP_MOVE_BEGIN:
		tm_op("begin a move");
		cache_do_move_begin(&m);
		break;
	case OP_MOVE_END:
		tm_op("end a move");
		cache_do_move_end(&m, !one_in(4));
		break;
	case OP_MOVE_ALL:
		tm_op("move all");
		while (!cache_do_move_begin(&m))
			cache_do_move_end(&m, true);
		break;
	case OPS:
		break;
	}
}

/* How often an operation comes, on average: a step is cheap or goes far. */
static const u32 usual[OPS] = {
	[OP_OPEN] = 3, [OP_CLOSE] = 2, [OP_EXTEND] = 20, [OP_EXTEND_MANY] = 6,
	[OP_TRUNCATE] = 4, [OP_SEAL] = 3, [OP_FORK] = 4, [OP_READ] = 6,
	[OP_WRITE] = 10, [OP_PUBLISH] = 8, [OP_MATCH] = 1, [OP_LOOKUP] = 5,
	[OP_ADOPT] = 6, [OP_EVICT] = 1, [OP_PACK] = 8, [OP_UNPACK] = 2,
	[OP_EVENTS] = 2, [OP_ADD] = 1, [OP_REMOVE] = 2, [OP_MOVE_BEGIN] = 4,
	[OP_MOVE_END] = 5,
};

enum kind {
	FULL,
	FULL_WINDOW,
	WINDOW,
	FULL_STATE,
	FULL_FULL_WINDOW,
	WINDOW_WINDOW,
	ALL,
	KINDS,
};

/* Blocks of at least an eighth of what @page_shift's chunk is measured in. */
static struct tm_kv_geometry random_geometry(unsigned int page_shift)
{
	static const u32 rules[KINDS][CACHE_GROUPS + 1] = {
		[FULL] = { 1, 0 },
		[FULL_WINDOW] = { 2, 0, 1 },
		[WINDOW] = { 1, 1 },
		[FULL_STATE] = { 2, 0, 2 },
		[FULL_FULL_WINDOW] = { 3, 0, 0, 1 },
		[WINDOW_WINDOW] = { 2, 1, 1 },
		[ALL] = { 5, 0, 1, 2, 1, 2 },
	};
	struct tm_geometry g = tm_geometry(page_shift);
	const u32 *rule = rules[below(KINDS)];
	/* Blocks of more pages where these are small: few fit as well. */
	u32 planes = page_shift == 12 ? 8 : page_shift == 14 ? 3 : 1;
	u32 tokens = one_in(4) ? 3 : 1u << below(4), nr = rule[0];
	struct tm_kv_group groups[CACHE_GROUPS];
	struct tm_kv_geometry geo;

	for (u32 i = 0; i < nr; i++) {
		u32 pages = tokens == 3 ? 3 : 1 + one_in(3);
		u32 n = planes + below(planes + 1);

		if (rule[i + 1] == 0)
			groups[i] = cache_full(g, tokens, n, pages);
		else if (rule[i + 1] == 1)
			groups[i] = cache_window(g, tokens, n, pages, 1 +
						 below(4 * tokens));
		else
			groups[i] = cache_state(g, n, pages);
	}
	CHECK_EQ(tm_kv_geometry_init(&geo, g, groups, nr, tokens), 0);
	return geo;
}

static void random_round(struct tm_round *round, unsigned int page_shift)
{
	struct tm_cache_config config = { 0 };
	u32 weights[OPS], pages = 0, blocks;

	rng = &round->rng;
	config.geo = random_geometry(page_shift);
	for (u32 g = 0; g < config.geo.nr_groups; g++)
		pages += config.geo.block_pages[g];
	blocks = 2 + below(7);
	config.max_tokens = blocks * config.geo.block_tokens;
	config.max_tokens -= below(config.geo.block_tokens);
	config.max_seqs = 2 + below(CACHE_SEQS - 2);
	/* Room for a few sequences at most. */
	config.max_chunks = (pages - 1) / tm_chunk_pages(config.geo.pages) + 1;
	config.max_chunks += below(4);
	config.nr_events = one_in(4) ? 0 : 1u << below(7);
	tenants[0] = one_in(2) ? 0 : tm_rand(rng);
	tenants[1] = tm_rand(rng);
	caching = !one_in(6);
	cache_setup(&m, &config, config.max_chunks);
	m.rng.state = tm_rand(rng);
	m.look = page_shift == 12 ? 8 : page_shift == 14 ? 4 : 2;
	for (u32 step = 0; step < round->steps; step++) {
		if (step % 64 == 0) {
			for (u32 op = 0; op < OPS; op++)
				weights[op] = usual[op] * (1 + below(6));
			weights[OP_RESET] = one_in(4);
			weights[OP_PACK_ALL] = 4 * one_in(3);
			weights[OP_MOVE_ALL] = 2 * one_in(3);
			weights[OP_CLOSE] *= one_in(4) ? 4 : 1;
		}
		random_op(tm_rand_weighted(rng, weights, OPS));
	}
	cache_teardown(&m);
}

/*
 * A million operations: 700,000 on pages of 64K, where a chunk has 32 and so a comparison
 * of everything costs least, 200,000 of 16K and 100,000 of 4K.
 */
TEST_PAGE_SIZES(cache_random)
{
	u32 rounds = page_shift == 16 ? 360 : page_shift == 14 ? 105 : 55;
	struct tm_round round;

	tm_for_each_round(&round, rounds, 2000)
		random_round(&round, page_shift);
}

/* One behaviour each, of those that caches of other projects have tests for */

/* The next to go, by eviction, are the blocks of @want, in this order. */
static void expect_evicted(const u32 *want, u32 nr)
{
	for (u32 i = 0; i < nr; i++) {
		CHECK(m.block[want[i]].used);
		CHECK_EQ(m.lru[0], want[i]);
		CHECK_EQ(cache_do_evict(&m), 0);
		CHECK(!m.block[want[i]].used);
	}
}

/* Least recently used first, and of one sequence the last block first. */
TEST(cache_eviction_order)
{
	struct tm_seq_id a, b, c;
	u32 was_a[3], was_b[2];

	setup_full(1, 4, 4, 1);
	add_chunks(1);
	a = write_seq(1, 3);
	b = write_seq(1, 2);
	publish_all(b, 2);
	publish_all(a, 1);
	for (u32 i = 0; i < 3; i++)
		was_a[i] = block_of(a, 0, i);
	for (u32 i = 0; i < 2; i++)
		was_b[i] = block_of(b, 0, i);
	/* What counts is when they were let go, not when they were made. */
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(cache_do_close(&m, b), 0);
	/* Used again: the first two of the older. */
	c = open_seq(1);
	CHECK_EQ(lookup(c, 1, 2, false), 2);
	CHECK_EQ(cache_do_close(&m, c), 0);
	CHECK_EQ(match(1, 1, 3), 3);
	expect_evicted((u32[]){ was_a[2], was_b[1], was_b[0], was_a[1],
				was_a[0] }, 5);
	CHECK_EQ(cache_do_evict(&m), -ENOENT);
	cache_teardown(&m);
}
