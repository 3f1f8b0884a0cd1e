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
	if (cache_do_pack(&m, place, group, index, pages))
		return;
	/* Not a second time; but what is cached can be, too. */
	CHECK_EQ(cache_do_pack_block(&m, m.seq[place].block[group][index], 1),
		 -EINVAL);
	if (m.nr_lru && one_in(4))
		cache_do_pack_block(&m, m.lru[below(m.nr_lru)], pages);
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
	if (!m.block[block].used)
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

static void random_round(struct tm_round *round, unsigned int page_shift,
			 bool publishing)
{
	struct tm_cache_config config = { 0 };
	u32 weights[OPS], pages = 0, blocks;

	rng = &round->rng;
	caching = publishing;
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
	cache_setup(&m, &config, config.max_chunks);
	m.rng.state = tm_rand(rng);
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
	if (!caching)
		CHECK(!m.cache.stats.hits && !m.cache.stats.evictions);
	cache_teardown(&m);
}

/*
 * A million operations: 700,000 on pages of 64K, where a chunk has 32 and so a comparison
 * of everything costs least, 200,000 of 16K and 100,000 of 4K. It takes some 20 seconds of
 * processor time with the sanitizers.
 */
TEST_PAGE_SIZES(cache_random)
{
	u32 rounds = page_shift == 16 ? 360 : page_shift == 14 ? 105 : 55;
	struct tm_round round;

	tm_for_each_round(&round, rounds, 2000)
		random_round(&round, page_shift, true);
}

/* Nothing is ever found or kept, and all else is as it was. */
TEST_PAGE_SIZES(cache_random_without_names)
{
	struct tm_round round;

	tm_for_each_round(&round, 10, 1000)
		random_round(&round, page_shift, false);
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

static void setup_two(struct tm_kv_group second, u32 max_blocks, u32 max_seqs,
		      u32 chunks)
{
	struct tm_kv_group groups[2] = {
		cache_full(tm_geometry(18), TOKENS, 1, 1), second,
	};

	setup(18, groups, 2, TOKENS, max_blocks * TOKENS, max_seqs, chunks);
}

/* Whether the cached blocks, oldest first, had these places in their sequence. */
static bool cached_are(const u32 *blocks, u32 nr)
{
	if (m.nr_lru != nr)
		return false;
	for (u32 i = 0; i < nr; i++)
		if (m.lru[i] != blocks[i])
			return false;
	return true;
}

/* A block is of use with all before it and all groups: so the end of all goes first. */
TEST(cache_suffix_before_prefix)
{
	struct tm_kv_group second = cache_window(tm_geometry(18), TOKENS, 1, 1,
						 3 * TOKENS);
	u32 full[4], window[4];
	struct tm_seq_id a;

	setup_two(second, 4, 2, 2);
	add_chunks(2);
	a = write_seq(1, 3);
	publish_all(a, 1);
	for (u32 i = 0; i < 3; i++) {
		full[i] = block_of(a, 0, i);
		window[i] = block_of(a, 1, i);
	}
	CHECK_EQ(cache_do_truncate(&m, a, TOKENS), 0);
	CHECK(cached_are((u32[]){ full[2], window[2], full[1], window[1] },
			 4));
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK(cached_are((u32[]){ full[2], window[2], full[1], window[1],
				  full[0], window[0] }, 6));
	/* Half of it is gone: what is left is of use still. */
	for (u32 i = 0; i < 4; i++) {
		CHECK_EQ(match(1, 1, 3), 3 - (i + 1) / 2);
		CHECK_EQ(cache_do_evict(&m), 0);
	}
	CHECK_EQ(match(1, 1, 3), 1);
	cache_teardown(&m);
}

/* What leaves a window goes the last first as well, and before what is let go later. */
TEST(cache_windows_let_go)
{
	struct tm_kv_group second = cache_window(tm_geometry(18), TOKENS, 1, 1,
						 TOKENS);
	u32 window[3];
	struct tm_seq_id a;

	setup_two(second, 8, 2, 2);
	add_chunks(2);
	a = open_seq(1);
	for (u32 i = 0; i < 2; i++)
		CHECK_EQ(cache_do_extend(&m, a, TOKENS, false), 0);
	CHECK_EQ(block_of(a, 1, 0), TM_NONE);
	CHECK_EQ(cache_do_truncate(&m, a, 0), 0);
	CHECK_EQ(cache_do_extend(&m, a, TOKENS + 1, false), 0);
	window[0] = block_of(a, 1, 0);
	window[1] = block_of(a, 1, 1);
	CHECK_EQ(cache_do_seal(&m, a, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false), 0);
	CHECK_EQ(cache_do_extend(&m, a, TOKENS - 1, false), 0);
	CHECK(cached_are(&window[0], 1));
	CHECK_EQ(cache_do_seal(&m, a, 2), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 2), 2, false), 0);
	CHECK_EQ(cache_do_extend(&m, a, 3 * TOKENS, false), 0);
	/* The three that came are not needed but for the last. */
	for (u32 i = 0; i < 4; i++)
		CHECK_EQ(block_of(a, 1, i), TM_NONE);
	CHECK(block_of(a, 1, 4) != TM_NONE);
	CHECK(cached_are(window, 2));
	/* The window is enough for a match; a full group is not. */
	CHECK_EQ(match(1, 1, 2), 2);
	CHECK_EQ(cache_do_evict(&m), 0);
	CHECK_EQ(match(1, 1, 2), 2);
	CHECK_EQ(cache_do_evict(&m), 0);
	CHECK_EQ(match(1, 1, 2), 0);
	cache_teardown(&m);
}

TEST(cache_shared_blocks_are_counted)
{
	struct tm_seq_id a, b, c, d;
	u32 block[2];

	setup_full(1, 4, 4, 2);
	add_chunks(2);
	a = write_seq(1, 2);
	for (u32 i = 0; i < 2; i++)
		block[i] = block_of(a, 0, i);
	CHECK_EQ(cache_do_seal(&m, a, 2), 0);
	CHECK_EQ(cache_do_fork(&m, a, 2 * TOKENS, false, &b), 0);
	CHECK_EQ(cache_do_fork(&m, b, TOKENS + 1, false, &c), 0);
	CHECK_EQ(cache_refs(&m, block[0]), 3);
	CHECK_EQ(cache_refs(&m, block[1]), 2);
	CHECK_EQ(m.used_pages, 3);
	publish_all(b, 1);
	d = open_seq(1);
	CHECK_EQ(lookup(d, 1, 2, false), 2);
	CHECK_EQ(cache_refs(&m, block[0]), 4);
	CHECK_EQ(cache_refs(&m, block[1]), 3);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(cache_refs(&m, block[0]), 2);
	CHECK_EQ(cache_refs(&m, block[1]), 1);
	CHECK_EQ(m.nr_lru, 0);
	CHECK_EQ(cache_do_close(&m, d), 0);
	CHECK(cached_are(&block[1], 1));
	CHECK_EQ(cache_do_close(&m, c), 0);
	CHECK(cached_are((u32[]){ block[1], block[0] }, 2));
	cache_teardown(&m);
}

TEST(cache_no_block_before_the_last_is_full)
{
	struct tm_seq_id a;

	setup_full(2, 4, 1, 1);
	add_chunks(1);
	a = open_seq(1);
	CHECK_EQ(m.used_pages, 0);
	for (u32 tokens = 1; tokens <= 4 * TOKENS; tokens++) {
		CHECK_EQ(cache_do_extend(&m, a, 1, false), 0);
		CHECK_EQ(m.used_pages, 2 * ((tokens - 1) / TOKENS + 1));
		CHECK_EQ(m.cache.pool.allocs, (tokens - 1) / TOKENS + 1);
	}
	CHECK_EQ(cache_do_extend(&m, a, 1, true), -ERANGE);
	cache_teardown(&m);
}

TEST(cache_named_only_when_full)
{
	struct tm_cache_event event;
	struct tm_seq_id a;
	u32 block;

	setup_full(1, 4, 2, 1);
	add_chunks(1);
	a = open_seq(1);
	for (u32 tokens = 1; tokens < TOKENS; tokens++) {
		CHECK_EQ(cache_do_extend(&m, a, 1, false), 0);
		CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false),
			 -EINVAL);
		CHECK_EQ(cache_do_seal(&m, a, 1), -EINVAL);
	}
	CHECK_EQ(cache_do_extend(&m, a, 2, false), 0);
	CHECK_EQ(match(1, 1, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false), -EBUSY);
	CHECK_EQ(cache_do_seal(&m, a, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 2), 2, false),
		 -EINVAL);
	CHECK_EQ(match(1, 1, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false), 0);
	CHECK_EQ(match(1, 1, 2), 1);
	CHECK(cache_do_next_event(&m, &event));
	/* Again under its name is nothing, under another is wrong. */
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false), 0);
	CHECK(!cache_do_next_event(&m, &event));
	CHECK_EQ(cache_do_publish(&m, a, 0, names(2, 0, 1), 1, false),
		 -EINVAL);
	CHECK_EQ(match(1, 2, 1), 0);
	/* Cut and written on, it is another block; the named one stays. */
	block = block_of(a, 0, 0);
	CHECK_EQ(cache_do_truncate(&m, a, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false),
		 -EINVAL);
	CHECK_EQ(cache_do_extend(&m, a, TOKENS - 1, false), 0);
	CHECK(block_of(a, 0, 0) != block);
	CHECK(cached_are(&block, 1));
	publish_all(a, 2);
	CHECK_EQ(match(1, 1, 1), 1);
	CHECK_EQ(match(1, 2, 1), 1);
	cache_teardown(&m);
}

TEST(cache_reuse_clears_the_name)
{
	struct tm_cache_event event;
	struct tm_seq_id a, b;
	u32 was[2];

	setup_full(1, 8, 2, 1);
	add_chunks(1);
	a = write_seq(1, 2);
	publish_all(a, 1);
	was[0] = block_of(a, 0, 0);
	was[1] = block_of(a, 0, 1);
	CHECK_EQ(cache_do_close(&m, a), 0);
	b = open_seq(1);
	CHECK_EQ(cache_do_extend(&m, b, 7 * TOKENS, false), -ENOMEM);
	CHECK_EQ(cache_do_extend(&m, b, 7 * TOKENS, true), 0);
	/* One had to go, and no more than that. */
	CHECK_EQ(match(1, 1, 2), 1);
	CHECK_EQ(cache_do_extend(&m, b, TOKENS, true), 0);
	CHECK_EQ(match(1, 1, 2), 0);
	CHECK_EQ(m.stats.evictions, 2);
	for (u32 i = 0; i < 4; i++) {
		CHECK(cache_do_next_event(&m, &event));
		CHECK_EQ(event.type, i < 2 ? TM_CACHE_STORED :
					     TM_CACHE_REMOVED);
		CHECK_EQ(event.hash.v[0], 1000 + (i == 1 || i == 2));
	}
	CHECK(!cache_do_next_event(&m, &event));
	/* They have other owners and no name: freed, they are gone. */
	CHECK(m.block[was[0]].used && m.block[was[1]].used);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(m.nr_lru, 0);
	CHECK_EQ(m.used_pages, 0);
	CHECK_EQ(match(1, 1, 2), 0);
	cache_teardown(&m);
}

/* What is to be copied, or shared, does not make room for the copy. */
TEST(cache_a_hit_is_no_victim)
{
	struct tm_kv_group second = cache_state(tm_geometry(18), 1, 1);
	struct tm_seq_id a, b, c;
	u32 matched, block;

	/* Of a part: the block itself is all that could go. */
	setup_full(1, 8, 3, 1);
	add_chunks(1);
	a = write_seq(1, 1);
	publish_all(a, 1);
	block = block_of(a, 0, 0);
	CHECK_EQ(cache_do_close(&m, a), 0);
	b = write_seq(1, 7);
	CHECK_EQ(cache_do_truncate(&m, b, 6 * TOKENS), 0);
	c = open_seq(1);
	CHECK_EQ(cache_do_extend(&m, c, TOKENS, false), 0);
	CHECK_EQ(cache_do_adopt(&m, b, 6, names(1, 0, 1), 1, true), -ENOMEM);
	CHECK(cached_are(&block, 1));
	CHECK_EQ(match(1, 1, 1), 1);
	/* All of it takes no room; now it is in use. */
	CHECK_EQ(cache_do_adopt(&m, b, 6, names(1, 0, 1), TOKENS, true), 0);
	CHECK_EQ(block_of(b, 0, 6), block);
	CHECK_EQ(cache_do_evict(&m), -ENOENT);
	cache_teardown(&m);

	/* With a state: two blocks of the prefix and its state are cached. */
	setup_two(second, 5, 3, 1);
	add_chunks(1);
	a = write_seq(1, 2);
	publish_all(a, 1);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(m.nr_lru, 3);
	b = open_seq(1);
	CHECK_EQ(cache_do_extend(&m, b, 4 * TOKENS, false), 0);
	c = open_seq(1);
	for (u32 evict = 0; evict < 2; evict++)
		CHECK_EQ(cache_do_lookup(&m, c, names(1, 0, 2), 2, evict,
					 &matched), -ENOMEM);
	CHECK_EQ(m.nr_lru, 3);
	CHECK_EQ(match(1, 1, 2), 2);
	/* Something else that is cached goes, though it was used last. */
	CHECK_EQ(cache_do_seal(&m, b, 1), 0);
	CHECK_EQ(cache_do_publish(&m, b, 0, names(2, 0, 1), 1, false), 0);
	block = block_of(b, 0, 0);
	CHECK_EQ(cache_do_truncate(&m, b, 0), 0);
	CHECK_EQ(cache_do_extend(&m, b, 3 * TOKENS, false), 0);
	CHECK_EQ(m.lru[3], block);
	CHECK_EQ(cache_do_lookup(&m, c, names(1, 0, 2), 2, false, &matched),
		 -ENOMEM);
	CHECK_EQ(lookup(c, 1, 2, true), 2);
	CHECK_EQ(match(1, 2, 1), 0);
	CHECK_EQ(match(1, 1, 2), 2);
	cache_teardown(&m);
}

/* Every call that takes memory, without any: the model sees that nothing changed. */
TEST(cache_failed_calls_change_nothing)
{
	struct tm_kv_group second = cache_state(tm_geometry(18), 1, 1);
	struct tm_cache_extend items[2];
	struct tm_seq_id a, b, c, child;
	u32 matched, block;

	setup_two(second, 6, 4, 2);
	add_chunks(1);
	a = write_seq(1, 1);
	publish_all(a, 1);
	b = open_seq(1);
	/* Of 8 pages: a block and a state here and there, and a state cached. */
	CHECK_EQ(cache_do_extend(&m, b, TOKENS + 1, false), 0);
	CHECK_EQ(cache_do_seal(&m, b, 1), 0);
	CHECK_EQ(cache_do_extend(&m, a, 2 * TOKENS, false), 0);
	CHECK_EQ(cache_free_pages(&m), 0);
	CHECK_EQ(m.nr_lru, 1);
	CHECK_EQ(cache_do_seal(&m, a, 3), 0);
	c = open_seq(1);
	block = block_of(a, 0, 2);
	for (u32 evict = 0; evict < 2; evict++) {
		items[0] = (struct tm_cache_extend){ .id = b,
						     .tokens = TOKENS };
		items[1] = (struct tm_cache_extend){ .id = c, .tokens = 1 };
		CHECK_EQ(cache_do_extend_many(&m, items, 2, evict), -ENOMEM);
		CHECK_EQ(cache_do_extend(&m, c, 1, evict), -ENOMEM);
		CHECK_EQ(cache_do_fork(&m, b, TOKENS + 1, evict, &child),
			 -ENOMEM);
		/* The state would be copied, and is what could go. */
		CHECK_EQ(cache_do_lookup(&m, c, names(1, 0, 1), 1, evict,
					 &matched), -ENOMEM);
		CHECK_EQ(cache_do_adopt(&m, c, 0, names(1, 0, 1), TOKENS,
					evict), -ENOMEM);
		if (evict)
			continue;
		CHECK_EQ(cache_do_publish(&m, a, 2, names(2, 2, 1), 1, false),
			 -ENOMEM);
		CHECK_EQ(cache_do_write(&m, place_of(a), 0, 0, false),
			 -ENOMEM);
		CHECK_EQ(cache_do_fork(&m, a, 3 * TOKENS, false, &child),
			 -ENOMEM);
	}
	CHECK_EQ(block_of(a, 0, 2), block);
	CHECK_EQ(m.cache.wanting, 1);
	CHECK_EQ(m.stats.copies, 1);
	CHECK_EQ(m.stats.evictions, 0);
	CHECK_EQ(m.nr_lru, 1);
	/* With a little more each would have done. */
	CHECK_EQ(cache_do_write(&m, place_of(a), 0, 0, true), 0);
	CHECK_EQ(m.stats.evictions, 1);
	cache_teardown(&m);
}

/* Of several blocks by one name each comes and goes by itself. */
TEST(cache_duplicates_go_one_by_one)
{
	struct tm_cache_event event;
	struct tm_seq_id a[3], b;
	u32 block[3];

	setup_full(1, 4, 4, 1);
	add_chunks(1);
	for (u32 i = 0; i < 3; i++) {
		a[i] = write_seq(1, 1);
		publish_all(a[i], 1);
		block[i] = block_of(a[i], 0, 0);
	}
	CHECK(block[0] != block[1] && block[1] != block[2]);
	CHECK_EQ(cache_do_close(&m, a[1]), 0);
	CHECK_EQ(cache_do_close(&m, a[0]), 0);
	/* Rather one that is in use than one that would have to come back. */
	b = open_seq(1);
	CHECK_EQ(lookup(b, 1, 1, false), 1);
	CHECK_EQ(block_of(b, 0, 0), block[2]);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(cache_do_close(&m, a[2]), 0);
	/* Told is what can be found, and that is one name. */
	CHECK(cache_do_next_event(&m, &event));
	CHECK_EQ(event.type, TM_CACHE_STORED);
	for (u32 i = 0; i < 3; i++) {
		u32 want[3] = { block[1], block[0], block[2] };

		CHECK(!cache_do_next_event(&m, &event));
		CHECK_EQ(match(1, 1, 1), 1);
		expect_evicted(&want[i], 1);
	}
	CHECK(cache_do_next_event(&m, &event));
	CHECK_EQ(event.type, TM_CACHE_REMOVED);
	CHECK(!cache_do_next_event(&m, &event));
	CHECK_EQ(match(1, 1, 1), 0);
	cache_teardown(&m);
}

TEST(cache_reset_not_while_in_use)
{
	struct tm_cache_event event;
	struct tm_seq_id a, b;

	setup_full(1, 4, 3, 1);
	add_chunks(1);
	/* An empty sequence holds nothing. */
	b = open_seq(1);
	CHECK_EQ(cache_do_reset(&m), 0);
	CHECK(cache_do_next_event(&m, &event));
	a = write_seq(1, 2);
	CHECK_EQ(cache_do_reset(&m), -EBUSY);
	publish_all(a, 1);
	CHECK_EQ(cache_do_reset(&m), -EBUSY);
	CHECK_EQ(match(1, 1, 2), 2);
	CHECK_EQ(cache_do_truncate(&m, a, TOKENS), 0);
	CHECK_EQ(cache_do_reset(&m), -EBUSY);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(m.nr_lru, 2);
	CHECK_EQ(cache_do_reset(&m), 0);
	CHECK_EQ(m.nr_lru, 0);
	CHECK_EQ(match(1, 1, 2), 0);
	CHECK_EQ(lookup(b, 1, 2, false), 0);
	CHECK(cache_do_next_event(&m, &event));
	CHECK(cache_do_next_event(&m, &event));
	CHECK_EQ(event.type, TM_CACHE_STORED);
	CHECK(cache_do_next_event(&m, &event));
	CHECK_EQ(event.type, TM_CACHE_CLEARED);
	CHECK(!cache_do_next_event(&m, &event));
	CHECK_EQ(m.stats.evictions, 0);
	cache_teardown(&m);
}

/* Same names, another tenant: nothing to find, and nothing to tell it from. */
TEST(cache_tenants_are_apart)
{
	static const u64 tenant[] = { 0, 1, 1ull << 32, ~0ull };
	struct tm_seq_id a[4], b;

	setup_full(1, 4, 5, 2);
	add_chunks(2);
	for (u32 i = 0; i < 4; i++) {
		a[i] = write_seq(tenant[i], 1 + i % 2);
		for (u32 o = 0; o < 4; o++)
			CHECK_EQ(match(tenant[o], 1, 2), o < i ? 1 + o % 2 : 0);
		publish_all(a[i], 1);
	}
	for (u32 i = 0; i < 4; i++) {
		b = open_seq(tenant[i]);
		CHECK_EQ(lookup(b, 1, 2, false), 1 + i % 2);
		CHECK_EQ(block_of(b, 0, 0), block_of(a[i], 0, 0));
		CHECK_EQ(cache_do_close(&m, b), 0);
	}
	b = open_seq(2);
	CHECK_EQ(lookup(b, 1, 2, false), 0);
	CHECK_EQ(cache_do_adopt(&m, b, 0, names(1, 0, 1), TOKENS, true),
		 -ENODATA);
	CHECK_EQ(cache_do_adopt(&m, b, 0, names(1, 0, 1), 1, true), -ENODATA);
	cache_teardown(&m);
}

static void expect_event(u32 type, u32 group, u32 block, u64 name, u64 parent)
{
	struct tm_cache_event event;

	CHECK(cache_do_next_event(&m, &event));
	CHECK_EQ(event.type, type);
	CHECK_EQ(event.group, group);
	CHECK_EQ(event.tenant, 1);
	CHECK_EQ(event.hash.v[0], name);
	CHECK_EQ(event.hash.v[1], ~name);
	if (type != TM_CACHE_STORED)
		return;
	CHECK_EQ(event.block, block);
	CHECK_EQ(event.parent.v[0], parent);
	CHECK_EQ(event.parent.v[1], parent ? ~parent : 0);
}

/* Stored with the true parent and after it; removed when it goes, the end first. */
TEST(cache_events_in_order)
{
	struct tm_cache_event event;
	struct tm_seq_id a, b;

	setup_full(1, 6, 3, 1);
	add_chunks(1);
	a = write_seq(1, 5);
	CHECK_EQ(cache_do_seal(&m, a, 5), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 2), 2, false), 0);
	expect_event(TM_CACHE_STORED, 0, 0, 1000, 0);
	expect_event(TM_CACHE_STORED, 0, 1, 1001, 1000);
	/* In pieces: the parent is the one before, as it is named. */
	CHECK_EQ(cache_do_publish(&m, a, 2, names(1, 2, 1), 1, false), 0);
	expect_event(TM_CACHE_STORED, 0, 2, 1002, 1001);
	/* Before what comes after it: no parent yet. */
	CHECK_EQ(cache_do_publish(&m, a, 4, names(1, 4, 1), 1, false), 0);
	expect_event(TM_CACHE_STORED, 0, 4, 1004, 0);
	/* Only what is new is told, with the names given before it. */
	CHECK_EQ(cache_do_publish(&m, a, 1, names(1, 1, 4), 4, false), 0);
	expect_event(TM_CACHE_STORED, 0, 3, 1003, 1002);
	CHECK(!cache_do_next_event(&m, &event));
	/* A fork goes on from a block it shares. */
	CHECK_EQ(cache_do_fork(&m, a, 2 * TOKENS, false, &b), 0);
	CHECK_EQ(cache_do_extend(&m, b, TOKENS, false), 0);
	CHECK_EQ(cache_do_seal(&m, b, 3), 0);
	CHECK_EQ(cache_do_publish(&m, b, 2, names(2, 2, 1), 1, false), 0);
	expect_event(TM_CACHE_STORED, 0, 2, 2002, 1001);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK(!cache_do_next_event(&m, &event));
	while (!cache_do_evict(&m))
		;
	for (u32 i = 4; i >= 2; i--)
		expect_event(TM_CACHE_REMOVED, 0, 0, 1000 + i, 0);
	expect_event(TM_CACHE_REMOVED, 0, 0, 2002, 0);
	expect_event(TM_CACHE_REMOVED, 0, 0, 1001, 0);
	expect_event(TM_CACHE_REMOVED, 0, 0, 1000, 0);
	CHECK(!cache_do_next_event(&m, &event));
	cache_teardown(&m);
}

/* A window group tells of what it holds; a state of its place in the sequence. */
TEST(cache_events_of_groups)
{
	struct tm_geometry g = tm_geometry(18);
	struct tm_kv_group groups[3] = {
		cache_window(g, TOKENS, 1, 1, TOKENS),
		cache_full(g, TOKENS, 1, 1),
		cache_state(g, 1, 1),
	};
	struct tm_cache_event event;
	struct tm_seq_id a;

	setup(18, groups, 3, TOKENS, 4 * TOKENS, 2, 2);
	add_chunks(2);
	a = write_seq(1, 3);
	CHECK_EQ(cache_do_seal(&m, a, 3), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 2), 2, false), 0);
	expect_event(TM_CACHE_STORED, 1, 0, 1000, 0);
	expect_event(TM_CACHE_STORED, 1, 1, 1001, 1000);
	CHECK(!cache_do_next_event(&m, &event));
	CHECK_EQ(cache_do_publish(&m, a, 2, names(1, 2, 1), 1, false), 0);
	expect_event(TM_CACHE_STORED, 0, 2, 1002, 1001);
	expect_event(TM_CACHE_STORED, 1, 2, 1002, 1001);
	expect_event(TM_CACHE_STORED, 2, 2, 1002, 1001);
	CHECK(!cache_do_next_event(&m, &event));
	/* All there is at 3, and at no other length. */
	CHECK_EQ(match(1, 1, 2), 0);
	CHECK_EQ(match(1, 1, 3), 3);
	/* Again is nothing, for a state too. */
	CHECK_EQ(cache_do_publish(&m, a, 2, names(1, 2, 1), 1, false), 0);
	CHECK(!cache_do_next_event(&m, &event));
	cache_teardown(&m);
}

TEST(cache_events_nobody_reads)
{
	struct tm_kv_group group = cache_full(tm_geometry(18), TOKENS, 1, 1);
	struct tm_cache_config config = {
		.max_tokens = 8 * TOKENS, .max_seqs = 2, .max_chunks = 1,
		.nr_events = 4,
	};
	struct tm_cache_event event;
	struct tm_seq_id a;

	CHECK_EQ(tm_kv_geometry_init(&config.geo, tm_geometry(18), &group, 1,
				     TOKENS), 0);
	cache_setup(&m, &config, 1);
	add_chunks(1);
	a = write_seq(1, 6);
	publish_all(a, 1);
	CHECK_EQ(m.stats.events_lost, 2);
	for (u32 i = 2; i < 6; i++)
		expect_event(TM_CACHE_STORED, 0, i, 1000 + i, 999 + i);
	CHECK(!cache_do_next_event(&m, &event));
	cache_teardown(&m);
	/* Nobody would ever read them: none are lost. */
	config.nr_events = 0;
	cache_setup(&m, &config, 1);
	add_chunks(1);
	a = write_seq(1, 6);
	publish_all(a, 1);
	CHECK(!cache_do_next_event(&m, &event));
	CHECK_EQ(m.cache.stats.events_lost, 0);
	cache_teardown(&m);
}

TEST(cache_partial_hit_is_copied)
{
	struct tm_seq_id a, b;
	u32 block, other;

	setup_full(1, 4, 3, 1);
	add_chunks(1);
	a = write_seq(1, 2);
	publish_all(a, 1);
	block = block_of(a, 0, 1);
	other = block_of(a, 0, 0);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK(cached_are((u32[]){ block, other }, 2));
	b = open_seq(1);
	CHECK_EQ(lookup(b, 1, 1, false), 1);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 1, 1), 3, false), 0);
	CHECK_EQ(cache_seq(&m, b)->length, TOKENS + 3);
	CHECK_EQ(block_of(b, 0, 0), other);
	CHECK(block_of(b, 0, 1) != block);
	CHECK_EQ(m.stats.copies, 1);
	/* It is there still; its own may be written to, and has no name. */
	CHECK(cached_are(&block, 1));
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 1, 0, true), 0);
	CHECK_EQ(match(1, 1, 2), 2);
	CHECK_EQ(cache_do_extend(&m, b, 1, false), 0);
	CHECK_EQ(m.stats.copies, 1);
	publish_all(b, 1);
	CHECK_EQ(cache_refs(&m, block), 0);
	cache_teardown(&m);
}

/* A block that is hit in part is used: others go before it. */
TEST(cache_partial_hit_is_a_use)
{
	struct tm_seq_id a[2], b;
	u32 block[2];

	setup_full(1, 4, 3, 1);
	add_chunks(1);
	for (u32 i = 0; i < 2; i++) {
		a[i] = write_seq(1, 1);
		publish_all(a[i], 1 + i);
		block[i] = block_of(a[i], 0, 0);
	}
	for (u32 i = 0; i < 2; i++)
		CHECK_EQ(cache_do_close(&m, a[i]), 0);
	b = open_seq(1);
	CHECK_EQ(cache_do_adopt(&m, b, 0, names(1, 0, 1), 1, false), 0);
	CHECK(cached_are((u32[]){ block[1], block[0] }, 2));
	cache_teardown(&m);
}

/* All of that without names: counts, blocks when they are full, copies, refusals. */
TEST(cache_without_publishing)
{
	struct tm_cache_event event;
	struct tm_seq_id a, b, c;
	u32 matched;

	setup_full(1, 8, 3, 1);
	add_chunks(1);
	a = write_seq(1, 2);
	CHECK_EQ(cache_do_seal(&m, a, 2), 0);
	CHECK_EQ(cache_do_fork(&m, a, TOKENS + 1, false, &b), 0);
	CHECK_EQ(cache_refs(&m, block_of(a, 0, 0)), 2);
	CHECK_EQ(cache_refs(&m, block_of(a, 0, 1)), 1);
	CHECK_EQ(m.used_pages, 3);
	c = open_seq(1);
	CHECK_EQ(cache_do_lookup(&m, c, names(1, 0, 2), 2, true, &matched), 0);
	CHECK_EQ(matched, 0);
	CHECK_EQ(cache_do_adopt(&m, c, 0, names(1, 0, 1), TOKENS, true),
		 -ENODATA);
	CHECK_EQ(cache_do_extend(&m, c, 6 * TOKENS, true), -ENOMEM);
	CHECK_EQ(cache_do_reset(&m), -EBUSY);
	CHECK_EQ(cache_do_evict(&m), -ENOENT);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(m.used_pages, 2);
	CHECK_EQ(cache_do_extend(&m, c, 6 * TOKENS, false), 0);
	CHECK_EQ(cache_do_truncate(&m, c, 0), 0);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(m.used_pages, 0);
	CHECK_EQ(m.nr_lru, 0);
	CHECK(!cache_do_next_event(&m, &event));
	CHECK_EQ(m.stats.evictions, 0);
	cache_teardown(&m);
}

/* What the calls promise beyond that */

/* Block by block, token by token: which have a token that the group keeps. */
TEST(cache_span_is_what_is_held)
{
	static const u32 tokens[] = { 1, 3, 8 };
	static const u32 windows[] = { 1, 2, 7, 8, 9, 40, 1000 };
	struct tm_geometry g = tm_geometry(12);

	for (u32 t = 0; t < 3; t++)
		for (u32 w = 0; w < 7; w++) {
			struct tm_kv_group groups[3] = {
				cache_full(g, tokens[t], 1, tokens[t]),
				cache_state(g, 1, 1),
				cache_window(g, tokens[t], 1, tokens[t],
					     windows[w]),
			};
			u32 first, end;

			setup(12, groups, 3, tokens[t], 16 * tokens[t], 1, 1);
			for (u32 n = 0; n <= 16 * tokens[t]; n++) {
				u32 low = n ? (n - 1) / tokens[t] : 0;

				tm_op("%u tokens, window %u, block %u", n,
				      windows[w], tokens[t]);
				tm_cache_span(&m.cache, 0, n, &first, &end);
				CHECK_EQ(end - first, n ? low + 1 : 0);
				CHECK_EQ(first, 0);
				tm_cache_span(&m.cache, 1, n, &first, &end);
				CHECK_EQ(end - first, n ? 1 : 0);
				CHECK_EQ(first, 0);
				while (low && n - low * tokens[t] < windows[w])
					low--;
				tm_cache_span(&m.cache, 2, n, &first, &end);
				CHECK_EQ(end, n ? (n - 1) / tokens[t] + 1 : 0);
				if (n)
					CHECK_EQ(first, low);
			}
			cache_teardown(&m);
		}
}

/* A name is never 0 and comes back after 65535 others, whatever was closed before. */
TEST(cache_names_of_sequences)
{
	static bool seen[1u << 16];
	struct tm_seq_id a, b, id, first = { 0 };

	setup_full(1, 1, 2, 1);
	a = open_seq(1);
	CHECK_EQ(tm_cache_find(&m.cache, (struct tm_seq_id){ 0 }), TM_NONE);
	CHECK_EQ(tm_cache_find(&m.cache, (struct tm_seq_id){ ~0u }), TM_NONE);
	CHECK_EQ(tm_cache_find(&m.cache, (struct tm_seq_id){ a.v | 0xffff }),
		 TM_NONE);
	for (u32 place = 1; place < 4; place++)
		CHECK_EQ(tm_cache_find(&m.cache, (struct tm_seq_id){
				       a.v | place }), TM_NONE);
	for (u32 i = 0; i < 65535; i++) {
		CHECK_EQ(cache_do_open(&m, 2, &id), 0);
		CHECK_EQ(cache_do_open(&m, 3, &b), -ENOBUFS);
		CHECK_EQ(id.v & 0xffff, 1);
		CHECK(id.v >> 16 && !seen[id.v >> 16]);
		seen[id.v >> 16] = true;
		if (!i)
			first = id;
		CHECK_EQ(cache_do_close(&m, id), 0);
		CHECK_EQ(cache_do_close(&m, id), -ENOENT);
	}
	CHECK_EQ(cache_do_open(&m, 2, &id), 0);
	CHECK_EQ(id.v, first.v);
	cache_teardown(&m);
}

/* Places are taken in turn: one just closed is the last to come again. */
TEST(cache_places_in_turn)
{
	struct tm_seq_id id[3];

	setup_full(1, 1, 3, 1);
	for (u32 i = 0; i < 2; i++) {
		id[i] = open_seq(1);
		CHECK_EQ(place_of(id[i]), i);
	}
	CHECK_EQ(cache_do_close(&m, id[0]), 0);
	id[2] = open_seq(1);
	CHECK_EQ(place_of(id[2]), 2);
	id[0] = open_seq(1);
	CHECK_EQ(place_of(id[0]), 0);
	CHECK_EQ(cache_do_close(&m, id[1]), 0);
	CHECK_EQ(cache_do_close(&m, id[2]), 0);
	id[1] = open_seq(1);
	CHECK_EQ(place_of(id[1]), 1);
	cache_teardown(&m);
}

/* What is wanted is enough, and one less is not. */
TEST(cache_wants_as_many_chunks_as_do)
{
	struct tm_seq_id a;

	setup_full(3, 10, 1, 5);
	a = open_seq(1);
	CHECK_EQ(cache_do_extend(&m, a, 9 * TOKENS, false), -ENOMEM);
	CHECK_EQ(m.cache.wanting, 4);
	add_chunks(3);
	CHECK_EQ(cache_do_extend(&m, a, 9 * TOKENS, false), -ENOMEM);
	CHECK_EQ(m.cache.wanting, 1);
	add_chunks(1);
	CHECK_EQ(cache_do_extend(&m, a, 9 * TOKENS, false), 0);
	CHECK_EQ(cache_free_pages(&m), 5);
	/* Cached blocks make room for those who say so; the others get chunks. */
	publish_all(a, 1);
	CHECK_EQ(cache_do_close(&m, a), 0);
	a = open_seq(1);
	CHECK_EQ(cache_do_extend(&m, a, 5 * TOKENS, false), -ENOMEM);
	CHECK_EQ(m.cache.wanting, 2);
	CHECK_EQ(cache_do_extend(&m, a, 5 * TOKENS, true), 0);
	CHECK_EQ(m.stats.evictions, 4);
	CHECK_EQ(cache_free_pages(&m), 2);
	cache_teardown(&m);
}

/* All of several sequences or none; the one to blame is named. */
TEST(cache_extend_all_or_none)
{
	struct tm_cache_extend items[3];
	struct tm_seq_id a, b, c;

	setup_full(1, 6, 3, 1);
	add_chunks(1);
	a = write_seq(1, 1);
	b = open_seq(1);
	c = open_seq(1);
	/* The model checks which item is named. */
	for (u32 bad = 0; bad < 3; bad++) {
		static const struct {
			u32 tokens;
			int err;
		} wrong[] = {
			{ 0, -EINVAL }, { 6 * TOKENS + 1, -ERANGE },
			{ ~0u, -ERANGE }, { ~0u - TOKENS + 1, -ERANGE },
		};

		for (u32 w = 0; w < 4; w++) {
			items[0] = (struct tm_cache_extend){ a, .tokens = 1 };
			items[1] = (struct tm_cache_extend){ b, .tokens = 1 };
			items[2] = (struct tm_cache_extend){ c, .tokens = 1 };
			items[bad].tokens = wrong[w].tokens;
			CHECK_EQ(cache_do_extend_many(&m, items, 3, true),
				 wrong[w].err);
		}
		items[bad] = (struct tm_cache_extend){ { 0 }, .tokens = 1 };
		CHECK_EQ(cache_do_extend_many(&m, items, 3, true), -ENOENT);
	}
	items[2] = items[0];
	items[1] = (struct tm_cache_extend){ b, .tokens = 1 };
	CHECK_EQ(cache_do_extend_many(&m, items, 3, true), -EINVAL);
	/* Seven are free: 4 and 3 do, 4 and 4 do not. */
	items[0] = (struct tm_cache_extend){ a, .tokens = 4 * TOKENS };
	items[1] = (struct tm_cache_extend){ b, .tokens = 4 * TOKENS };
	CHECK_EQ(cache_do_extend_many(&m, items, 2, true), -ENOMEM);
	items[1].tokens = 3 * TOKENS;
	CHECK_EQ(cache_do_extend_many(&m, items, 2, true), 0);
	CHECK_EQ(cache_free_pages(&m), 0);
	CHECK_EQ(cache_do_extend_many(&m, items, 0, false), 0);
	cache_teardown(&m);
}

/*
 * Two that share a block neither has filled, in one call: one gets a copy and the other
 * is alone then. Nobody reads a block that is free.
 */
TEST(cache_extend_of_those_who_share)
{
	struct tm_kv_group group = cache_window(tm_geometry(18), TOKENS, 1, 1,
						TOKENS);
	struct tm_cache_extend items[2];
	struct tm_seq_id a, b;
	u32 block;

	for (u32 leave = 0; leave < 3; leave++) {
		setup(18, &group, 1, TOKENS, 8 * TOKENS, 2, 1);
		add_chunks(1);
		a = write_seq(1, 1);
		CHECK_EQ(cache_do_seal(&m, a, 1), 0);
		CHECK_EQ(cache_do_fork(&m, a, TOKENS, false, &b), 0);
		block = block_of(a, 0, 0);
		CHECK_EQ(cache_do_truncate(&m, a, 2), 0);
		CHECK_EQ(cache_do_truncate(&m, b, 3), 0);
		CHECK_EQ(cache_refs(&m, block), 2);
		/* One of them may leave it behind instead. */
		items[0] = (struct tm_cache_extend){
			a, .tokens = leave == 1 ? 4 * TOKENS : 1
		};
		items[1] = (struct tm_cache_extend){
			b, .tokens = leave == 2 ? 4 * TOKENS : 1
		};
		CHECK_EQ(cache_do_extend_many(&m, items, 2, false), 0);
		CHECK_EQ(cache_refs(&m, block), 1);
		CHECK_EQ(m.stats.copies, !leave);
		cache_teardown(&m);
	}
}

TEST(cache_truncate_and_fork_refuse)
{
	struct tm_geometry g = tm_geometry(18);
	struct tm_kv_group second = cache_window(g, TOKENS, 1, 1, TOKENS);
	struct tm_seq_id a, child;

	setup_two(second, 8, 3, 4);
	add_chunks(4);
	a = write_seq(1, 3);
	CHECK_EQ(cache_do_truncate(&m, a, 3 * TOKENS + 1), -EINVAL);
	CHECK_EQ(cache_do_truncate(&m, a, ~0u), -EINVAL);
	/* Of 12 tokens the window has the last 4; 11 need one more block. */
	CHECK_EQ(cache_do_truncate(&m, a, 3 * TOKENS - 1), -ENODATA);
	CHECK_EQ(cache_do_truncate(&m, a, 1), -ENODATA);
	CHECK_EQ(cache_do_seal(&m, a, 3), 0);
	CHECK_EQ(cache_do_fork(&m, a, 3 * TOKENS - 1, false, &child),
		 -ENODATA);
	CHECK_EQ(cache_do_fork(&m, a, 3 * TOKENS + 1, false, &child),
		 -EINVAL);
	CHECK_EQ(cache_do_fork(&m, a, ~0u, false, &child), -EINVAL);
	CHECK_EQ(cache_do_fork(&m, (struct tm_seq_id){ 0 }, 0, false, &child),
		 -ENOENT);
	CHECK_EQ(cache_do_truncate(&m, (struct tm_seq_id){ 0 }, 0), -ENOENT);
	CHECK_EQ(cache_do_seal(&m, (struct tm_seq_id){ 0 }, 0), -ENOENT);
	CHECK_EQ(cache_do_seal(&m, a, 4), -EINVAL);
	CHECK_EQ(cache_do_seal(&m, a, ~0u), -EINVAL);
	CHECK_EQ(cache_do_fork(&m, a, 3 * TOKENS, false, &child), 0);
	CHECK_EQ(cache_seq(&m, child)->sealed, 3);
	/* Nothing is what no window lacks. */
	CHECK_EQ(cache_do_fork(&m, a, 0, false, &child), 0);
	CHECK_EQ(cache_do_fork(&m, a, 0, false, &child), -ENOBUFS);
	CHECK_EQ(cache_do_truncate(&m, a, 3 * TOKENS), 0);
	CHECK_EQ(cache_do_truncate(&m, a, 0), 0);
	CHECK_EQ(cache_do_truncate(&m, a, 1), -EINVAL);
	cache_teardown(&m);

	/* A fork takes what has no writable mapping. */
	setup_full(1, 4, 2, 1);
	add_chunks(1);
	a = write_seq(1, 2);
	CHECK_EQ(cache_do_fork(&m, a, TOKENS, false, &child), -EBUSY);
	CHECK_EQ(cache_do_seal(&m, a, 1), 0);
	CHECK_EQ(cache_do_fork(&m, a, 2 * TOKENS, false, &child), -EBUSY);
	CHECK_EQ(cache_do_fork(&m, a, 2 * TOKENS - 1, false, &child), 0);
	cache_teardown(&m);
}

/* Children and parents, and who writes what: nobody sees the other's. */
TEST(cache_writes_are_ones_own)
{
	struct tm_seq_id a, b;
	u32 block;

	setup_full(2, 4, 3, 3);
	add_chunks(3);
	a = write_seq(1, 3);
	CHECK_EQ(cache_do_seal(&m, a, 3), 0);
	CHECK_EQ(cache_do_fork(&m, a, 3 * TOKENS, false, &b), 0);
	block = block_of(a, 0, 1);
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 1, 0, false), 0);
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 1, 0, true), -EACCES);
	CHECK_EQ(cache_do_write(&m, place_of(b), 0, 1, false), 0);
	CHECK(block_of(b, 0, 1) != block);
	CHECK_EQ(cache_refs(&m, block), 1);
	/* The seal is open from there on; what is shared stays as it is. */
	CHECK_EQ(cache_seq(&m, b)->sealed, 1);
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 1, 1, true), 0);
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 2, 1, true), -EACCES);
	/* The other is alone with its own, but has to say that it writes. */
	CHECK_EQ(cache_do_touch(&m, place_of(a), 0, 1, 1, true), -EACCES);
	CHECK_EQ(cache_do_write(&m, place_of(a), 0, 1, false), 0);
	CHECK_EQ(block_of(a, 0, 1), block);
	CHECK_EQ(m.stats.copies, 1);
	CHECK_EQ(cache_do_touch(&m, place_of(a), 0, 1, 1, true), 0);
	/* Again, of one that is one's own: nothing. */
	CHECK_EQ(cache_do_write(&m, place_of(a), 0, 2, false), 0);
	CHECK_EQ(cache_seq(&m, a)->sealed, 1);
	CHECK_EQ(m.stats.copies, 2);
	/* A seal is never lowered by sealing. */
	CHECK_EQ(cache_do_seal(&m, a, 0), 0);
	CHECK_EQ(cache_seq(&m, a)->sealed, 1);
	CHECK_EQ(cache_do_write(&m, place_of(a), 0, 3, false), -ENOENT);
	CHECK_EQ(cache_do_write(&m, place_of(a), 0, ~0u, false), -ENOENT);
	CHECK_EQ(cache_do_write(&m, 2, 0, 0, false), -ENOENT);
	/* A place that no sequence has, or can have. */
	for (u32 i = 0; i < 3; i++) {
		u32 place = ((u32[]){ 2, m.max_seqs, ~0u })[i];
		struct tm_cache_copies copies;
		struct tm_kv_block none;
		struct tm_cache_page page;

		CHECK_EQ(tm_cache_page(&m.cache, place, 0, 0, 0, &page),
			 -ENOENT);
		CHECK_EQ(tm_cache_packable(&m.cache, place, 0, 0, &none),
			 -ENOENT);
		CHECK_EQ(tm_cache_write(&m.cache, place, 0, 0, false, &copies),
			 -ENOENT);
	}
	cache_teardown(&m);
}

/* What is cut back into a block that was sealed is written on without a word. */
TEST(cache_truncate_opens_the_seal)
{
	struct tm_seq_id a;

	setup_full(1, 4, 1, 1);
	add_chunks(1);
	a = write_seq(1, 3);
	CHECK_EQ(cache_do_seal(&m, a, 3), 0);
	CHECK_EQ(cache_do_truncate(&m, a, 2 * TOKENS), 0);
	CHECK_EQ(cache_seq(&m, a)->sealed, 2);
	CHECK_EQ(cache_do_truncate(&m, a, TOKENS + 2), 0);
	CHECK_EQ(cache_seq(&m, a)->sealed, 1);
	CHECK_EQ(cache_do_touch(&m, place_of(a), 0, 1, 0, true), 0);
	CHECK_EQ(cache_do_extend(&m, a, TOKENS, false), 0);
	CHECK_EQ(m.stats.copies, 0);
	cache_teardown(&m);
}

/* A state goes along: at a fork, into the cache, and back at that very length. */
TEST(cache_states)
{
	struct tm_kv_group second = cache_state(tm_geometry(18), 2, 1);
	struct tm_seq_id a, b, child;
	u32 state;

	setup_two(second, 4, 3, 4);
	add_chunks(4);
	a = write_seq(1, 2);
	state = block_of(a, 1, 0);
	/* A seal is no matter for it, nor is writing to it one for a seal. */
	CHECK_EQ(cache_do_seal(&m, a, 2), 0);
	CHECK_EQ(cache_do_touch(&m, place_of(a), 1, 0, 1, true), 0);
	CHECK_EQ(cache_do_write(&m, place_of(a), 1, 0, false), 0);
	CHECK_EQ(cache_seq(&m, a)->sealed, 2);
	CHECK_EQ(cache_do_touch(&m, place_of(a), 1, 1, 0, false), -ENOENT);
	/* Not in the middle: there is no state for that. */
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 1, false), 0);
	CHECK_EQ(m.nr_lru, 0);
	CHECK_EQ(match(1, 1, 2), 0);
	CHECK_EQ(cache_do_publish(&m, a, 1, names(1, 1, 1), 1, false), 0);
	CHECK_EQ(m.nr_lru, 1);
	CHECK(m.lru[0] != state);
	CHECK_EQ(match(1, 1, 2), 2);
	CHECK_EQ(match(1, 1, 1), 0);
	CHECK_EQ(cache_do_truncate(&m, a, TOKENS), -ENODATA);
	CHECK_EQ(cache_do_fork(&m, a, TOKENS, false, &child), -ENODATA);
	/* It goes on and is written: what was put aside is as it was. */
	CHECK_EQ(cache_do_extend(&m, a, 1, false), 0);
	CHECK_EQ(block_of(a, 1, 0), state);
	CHECK_EQ(cache_do_touch(&m, place_of(a), 1, 0, 0, true), 0);
	b = open_seq(1);
	CHECK_EQ(lookup(b, 1, 2, false), 2);
	CHECK(block_of(b, 1, 0) != state && block_of(b, 1, 0) != m.lru[0]);
	CHECK_EQ(cache_do_fork(&m, b, 2 * TOKENS, false, &child), 0);
	CHECK(block_of(child, 1, 0) != block_of(b, 1, 0));
	CHECK_EQ(m.stats.copies, 3);
	/* One by the name of another place, where it is at the end: with its state. */
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 1, 1), 1, false), -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 0, 1), TOKENS, false),
		 -ENODATA);
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 1, 1), TOKENS, false), 0);
	CHECK_EQ(m.stats.copies, 4);
	/* In place of the block it ends with too, and of no other. */
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 0, 1), TOKENS, false),
		 -ENODATA);
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 1, 1), TOKENS, false), 0);
	CHECK_EQ(m.stats.copies, 5);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 0, 1), TOKENS, false), 0);
	CHECK_EQ(m.stats.copies, 5);
	cache_teardown(&m);
}

/* As many groups as there can be, of all rules: each goes its own way. */
TEST(cache_of_the_most_groups)
{
	struct tm_kv_group groups[TM_KV_GROUPS];
	struct tm_geometry g = tm_geometry(16);
	struct tm_seq_id a, b, child;

	for (u32 i = 0; i < TM_KV_GROUPS; i++)
		groups[i] = i % 3 == 0 ? cache_full(g, TOKENS, 1, 1) :
			    i % 3 == 1 ? cache_window(g, TOKENS, 1, 1, i) :
					 cache_state(g, 1, 1);
	setup(16, groups, TM_KV_GROUPS, TOKENS, 4 * TOKENS, 3, 6);
	add_chunks(6);
	a = write_seq(1, 2);
	publish_all(a, 1);
	b = open_seq(1);
	CHECK_EQ(lookup(b, 1, 2, false), 2);
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 1, 1), TOKENS, false), 0);
	CHECK_EQ(cache_do_extend(&m, b, 2, false), 0);
	CHECK_EQ(cache_do_seal(&m, b, 3), 0);
	CHECK_EQ(cache_do_fork(&m, b, 3 * TOKENS + 2, false, &child), 0);
	CHECK_EQ(cache_do_truncate(&m, b, 0), 0);
	CHECK_EQ(cache_do_truncate(&m, a, TOKENS), -ENODATA);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK(!cache_do_evict(&m));
	cache_teardown(&m);

	/* Without states one can be cut anywhere. */
	for (u32 i = 2; i < TM_KV_GROUPS; i += 3)
		groups[i] = groups[0];
	setup(16, groups, TM_KV_GROUPS, TOKENS, 4 * TOKENS, 3, 6);
	add_chunks(6);
	a = write_seq(1, 1);
	CHECK_EQ(cache_do_truncate(&m, a, 2), 0);
	CHECK_EQ(cache_do_fork(&m, a, 1, false, &child), 0);
	cache_teardown(&m);
}

/* A state that was packed has not the pages for another one. */
TEST(cache_adopts_over_a_packed_state)
{
	struct tm_kv_group second = cache_state(tm_geometry(18), 2, 1);
	struct tm_seq_id a, b;

	setup_two(second, 4, 2, 4);
	add_chunks(4);
	a = write_seq(1, 1);
	publish_all(a, 1);
	b = write_seq(1, 1);
	CHECK_EQ(cache_do_pack(&m, place_of(b), 1, 0, 1), 0);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 0, 1), TOKENS, false), 0);
	CHECK_EQ(m.cache.packed, 0);
	cache_teardown(&m);
}

/* The longest of several; never more than a sequence can have. */
TEST(cache_lookup_takes_the_longest)
{
	struct tm_kv_group second = cache_window(tm_geometry(18), TOKENS, 1, 1,
						 TOKENS + 1);
	struct tm_hash same[40];
	struct tm_seq_id a, b;
	u32 matched;

	setup_two(second, 8, 3, 4);
	add_chunks(4);
	a = open_seq(1);
	/* Named at 2 and at 5, of a window of two blocks. */
	CHECK_EQ(cache_do_extend(&m, a, 2 * TOKENS, false), 0);
	publish_all(a, 1);
	CHECK_EQ(cache_do_extend(&m, a, TOKENS, false), 0);
	CHECK_EQ(cache_do_extend(&m, a, 2 * TOKENS, false), 0);
	publish_all(a, 1);
	CHECK_EQ(match(1, 1, 8), 5);
	/* The third block of the window was gone before it had a name. */
	CHECK_EQ(match(1, 1, 4), 2);
	CHECK_EQ(match(1, 1, 3), 2);
	CHECK_EQ(match(1, 1, 1), 1);
	b = open_seq(1);
	CHECK_EQ(lookup(b, 1, 4, false), 2);
	CHECK_EQ(cache_do_lookup(&m, b, names(1, 0, 1), 1, false, &matched),
		 -EINVAL);
	CHECK_EQ(cache_do_truncate(&m, b, 0), 0);
	CHECK_EQ(cache_do_lookup(&m, b, names(1, 0, 1), 0, false, &matched),
		 -EINVAL);
	CHECK_EQ(lookup(b, 1, 8, false), 5);
	CHECK_EQ(block_of(b, 1, 2), TM_NONE);
	CHECK_EQ(cache_seq(&m, b)->sealed, 5);
	CHECK_EQ(m.stats.lookups, 12);
	CHECK_EQ(m.stats.hits, 7);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(cache_do_lookup(&m, b, names(1, 0, 1), 1, false, &matched),
		 -ENOENT);
	/* A text of one block over and over, longer than fits. */
	for (u32 i = 0; i < 40; i++)
		same[i] = hash(1004);
	b = open_seq(1);
	CHECK_EQ(cache_do_match(&m, 1, same, 40), 8);
	CHECK_EQ(cache_do_lookup(&m, b, same, 40, false, &matched), 0);
	CHECK_EQ(matched, 8);
	CHECK_EQ(cache_refs(&m, block_of(b, 0, 0)), 9);
	CHECK_EQ(cache_do_write(&m, place_of(b), 0, 3, false), 0);
	cache_teardown(&m);
}

TEST(cache_adopt_anywhere)
{
	struct tm_kv_group second = cache_window(tm_geometry(18), TOKENS, 1, 1,
						 TOKENS);
	struct tm_seq_id a, b;
	u32 block;

	setup_two(second, 4, 3, 4);
	add_chunks(4);
	a = write_seq(1, 1);
	publish_all(a, 1);
	b = write_seq(1, 3);
	/* In the middle, where the window has moved on: the full group alone. */
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 0, 1), TOKENS, false), 0);
	CHECK_EQ(block_of(b, 0, 1), block_of(a, 0, 0));
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 0, 1), TOKENS, false), 0);
	CHECK_EQ(block_of(b, 1, 2), block_of(a, 1, 0));
	CHECK_EQ(cache_seq(&m, b)->length, 3 * TOKENS);
	/* At the end, and the window moves on. */
	CHECK_EQ(cache_do_adopt(&m, b, 3, names(1, 0, 1), TOKENS, false), 0);
	CHECK_EQ(cache_seq(&m, b)->length, 4 * TOKENS);
	CHECK_EQ(block_of(b, 1, 2), TM_NONE);
	CHECK_EQ(cache_refs(&m, block_of(a, 0, 0)), 4);
	CHECK_EQ(cache_refs(&m, block_of(a, 1, 0)), 2);
	CHECK_EQ(m.stats.copies, 0);
	/* What is there no more, or not yet; too much, too little. */
	CHECK_EQ(cache_do_adopt(&m, b, 4, names(1, 0, 1), TOKENS, false),
		 -ERANGE);
	CHECK_EQ(cache_do_adopt(&m, b, 4, names(1, 0, 1), 1, false), -ERANGE);
	CHECK_EQ(cache_do_truncate(&m, b, 4 * TOKENS - 1), -ENODATA);
	CHECK_EQ(cache_do_close(&m, b), 0);
	b = write_seq(1, 2);
	CHECK_EQ(cache_do_extend(&m, b, 1, false), 0);
	CHECK_EQ(cache_do_adopt(&m, b, 2, names(1, 0, 1), TOKENS, false),
		 -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, 3, names(1, 0, 1), TOKENS, false),
		 -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, ~0u, names(1, 0, 1), TOKENS, false),
		 -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 0, 1), 0, false), -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 0, 1), TOKENS - 1, false),
		 -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(1, 0, 1), TOKENS + 1, false),
		 -EINVAL);
	CHECK_EQ(cache_do_adopt(&m, b, 1, names(2, 0, 1), TOKENS, false),
		 -ENODATA);
	CHECK_EQ(cache_do_adopt(&m, (struct tm_seq_id){ 0 }, 0, names(1, 0, 1),
				TOKENS, false), -ENOENT);
	/* Itself in its own place: nothing. */
	block = block_of(a, 0, 0);
	CHECK_EQ(cache_do_adopt(&m, a, 0, names(1, 0, 1), TOKENS, false), 0);
	CHECK_EQ(block_of(a, 0, 0), block);
	CHECK_EQ(cache_refs(&m, block), 1);
	cache_teardown(&m);
}

TEST(cache_publish_refuses)
{
	struct tm_seq_id a;

	setup_full(1, 4, 1, 1);
	add_chunks(1);
	a = write_seq(1, 3);
	CHECK_EQ(cache_do_seal(&m, a, 2), 0);
	CHECK_EQ(cache_do_publish(&m, (struct tm_seq_id){ 0 }, 0,
				  names(1, 0, 1), 1, false), -ENOENT);
	CHECK_EQ(cache_do_publish(&m, a, 3, names(1, 3, 1), 1, false),
		 -EINVAL);
	CHECK_EQ(cache_do_publish(&m, a, ~0u, names(1, 0, 1), 1, false),
		 -EINVAL);
	CHECK_EQ(cache_do_publish(&m, a, ~0u, names(1, 0, 2), 2, false),
		 -EINVAL);
	CHECK_EQ(cache_do_publish(&m, a, 1, names(1, 1, 2), 2, false), -EBUSY);
	CHECK_EQ(match(1, 1, 3), 0);
	CHECK_EQ(cache_do_publish(&m, a, 1, names(1, 1, 1), 1, false), 0);
	/* The last of three has another name: none of them gets one. */
	CHECK_EQ(cache_do_seal(&m, a, 3), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(2, 0, 2), 2, false),
		 -EINVAL);
	CHECK_EQ(match(1, 2, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 3), 3, false), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, names(1, 0, 1), 0, false),
		 -EINVAL);
	cache_teardown(&m);
}

/* All 128 bits of a name count. */
TEST(cache_names_alike)
{
	struct tm_hash name = { { 1, 2 } }, alike[3] = {
		{ { 1, 3 } }, { { 3, 2 } }, { { 2, 1 } },
	};
	struct tm_seq_id a, b;

	setup_full(1, 4, 2, 1);
	add_chunks(1);
	a = write_seq(1, 1);
	CHECK_EQ(cache_do_seal(&m, a, 1), 0);
	CHECK_EQ(cache_do_publish(&m, a, 0, &name, 1, false), 0);
	for (u32 i = 0; i < 3; i++) {
		CHECK_EQ(cache_do_match(&m, 1, &alike[i], 1), 0);
		CHECK_EQ(cache_do_publish(&m, a, 0, &alike[i], 1, false),
			 -EINVAL);
	}
	b = open_seq(1);
	CHECK_EQ(cache_do_adopt(&m, b, 0, &name, TOKENS, false), 0);
	cache_teardown(&m);
}

/* Packed, it takes less room and is the same block; it comes back as it was. */
TEST(cache_packed_blocks)
{
	struct tm_seq_id a, b, c;
	u32 block;

	setup_full(4, 4, 3, 2);
	add_chunks(2);
	a = write_seq(1, 3);
	block = block_of(a, 0, 0);
	CHECK_EQ(cache_do_extend(&m, a, 1, false), 0);
	CHECK_EQ(cache_free_pages(&m), 0);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, 0), -EINVAL);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, 4), -EINVAL);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, ~0u), -EINVAL);
	/* What is written next is not packed, nor what is not there. */
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 3, 1), -ENOENT);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 4, 1), -ENOENT);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, ~0u, 1), -ENOENT);
	CHECK_EQ(cache_do_pack(&m, place_of(a) + 1, 0, 0, 1), -ENOENT);
	CHECK(!tm_cache_packed(&m.cache, (struct tm_kv_block){ 9 }));
	CHECK(!tm_cache_packed(&m.cache, (struct tm_kv_block){ ~0u }));
	for (u32 i = 0; i < 3; i++)
		CHECK_EQ(cache_do_pack(&m, place_of(a), 0, i, 1 + i), 0);
	CHECK_EQ(m.cache.packed, 3);
	CHECK_EQ(m.cache.packed_pages, 6);
	CHECK_EQ(m.cache.unpacked_pages, 12);
	CHECK_EQ(cache_free_pages(&m), 6);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, 1), -ENOENT);
	/* Shared and kept as it is; a copy of it is not packed. */
	publish_all(a, 1);
	CHECK_EQ(cache_do_fork(&m, a, TOKENS, false, &b), 0);
	CHECK_EQ(block_of(b, 0, 0), block);
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 0, 0, false), -EAGAIN);
	CHECK_EQ(cache_do_write(&m, place_of(b), 0, 0, false), 0);
	CHECK_EQ(cache_do_touch(&m, place_of(b), 0, 0, 0, true), 0);
	CHECK_EQ(m.cache.packed, 3);
	CHECK_EQ(cache_do_close(&m, b), 0);
	/* One that is shared is not packed. */
	CHECK_EQ(cache_do_unpack(&m, block_of(a, 0, 1), false), 0);
	CHECK_EQ(cache_do_unpack(&m, block_of(a, 0, 1), false), -EINVAL);
	CHECK_EQ(cache_do_fork(&m, a, 2 * TOKENS, false, &b), 0);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 1, 1), -ENOENT);
	CHECK_EQ(cache_do_close(&m, b), 0);
	/* Cached while packed: that much less to evict, and still to be found. */
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(tm_cache_evictable(&m.cache), 1 + 4 + 3);
	c = open_seq(1);
	CHECK_EQ(lookup(c, 1, 1, false), 1);
	CHECK_EQ(block_of(c, 0, 0), block);
	CHECK_EQ(tm_cache_evictable(&m.cache), 4 + 3);
	/* Evicting takes it with the rest. */
	CHECK_EQ(cache_do_pack_block(&m, m.lru[1], 2), 0);
	CHECK_EQ(tm_cache_evictable(&m.cache), 2 + 3);
	CHECK_EQ(cache_do_evict(&m), 0);
	CHECK_EQ(m.cache.packed, 2);
	CHECK_EQ(cache_do_evict(&m), 0);
	CHECK_EQ(m.cache.packed, 1);
	b = open_seq(1);
	CHECK_EQ(cache_do_extend(&m, b, 3 * TOKENS, false), 0);
	/* Free are 3; it needs 3, and one more chunk or another block otherwise. */
	CHECK_EQ(cache_do_extend(&m, c, 1, false), -ENOMEM);
	CHECK_EQ(cache_do_unpack(&m, block, false), 0);
	CHECK_EQ(cache_do_touch(&m, place_of(c), 0, 0, 3, false), 0);
	cache_teardown(&m);
}

/* It is not evicted to make room for itself. */
TEST(cache_unpack_spares_the_block)
{
	struct tm_seq_id a, b, c;
	u32 block[2];

	setup_full(4, 4, 3, 1);
	add_chunks(1);
	a = write_seq(1, 1);
	b = write_seq(1, 1);
	block[0] = block_of(a, 0, 0);
	block[1] = block_of(b, 0, 0);
	publish_all(a, 1);
	publish_all(b, 2);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, 1), 0);
	CHECK_EQ(cache_do_pack(&m, place_of(b), 0, 0, 3), 0);
	c = write_seq(1, 1);
	CHECK_EQ(cache_free_pages(&m), 0);
	CHECK_EQ(cache_do_unpack(&m, block[0], true), -ENOMEM);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(cache_do_unpack(&m, block[0], false), -ENOMEM);
	CHECK_EQ(m.cache.wanting, 1);
	CHECK_EQ(cache_do_unpack(&m, block[0], true), 0);
	CHECK(!m.block[block[1]].used);
	/* The source of a copy may be cached, and be the one to go first. */
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, 1), 0);
	CHECK_EQ(cache_do_close(&m, c), 0);
	b = write_seq(1, 1);
	CHECK_EQ(cache_do_pack(&m, place_of(b), 0, 0, 1), 0);
	c = write_seq(1, 1);
	publish_all(c, 3);
	block[1] = block_of(c, 0, 0);
	CHECK_EQ(cache_do_close(&m, a), 0);
	CHECK_EQ(cache_do_close(&m, c), 0);
	CHECK(cached_are(block, 2));
	CHECK_EQ(cache_do_unpack(&m, block[0], true), 0);
	CHECK(cached_are(block, 1));
	CHECK_EQ(tm_cache_evictable(&m.cache), 4);
	cache_teardown(&m);
}

/* There are not as many numbers as blocks of a page would fit: that is no room either. */
TEST(cache_numbers_run_out)
{
	struct tm_seq_id a[4];
	u32 nr;

	setup_full(4, 16, 4, 4);
	add_chunks(4);
	for (u32 i = 0; i < 4; i++) {
		a[i] = open_seq(1);
		for (nr = 0; nr < 4 && m.nr_used < m.cache.pool.nr_blocks;
		     nr++) {
			CHECK_EQ(cache_do_extend(&m, a[i], TOKENS, false), 0);
			CHECK_EQ(cache_do_pack(&m, place_of(a[i]), 0, nr, 1),
				 0);
		}
	}
	CHECK_EQ(m.nr_used, m.cache.pool.nr_blocks);
	CHECK(cache_free_pages(&m) > 4);
	CHECK_EQ(cache_do_extend(&m, a[0], 1, true), -ENOMEM);
	CHECK(m.cache.wanting == TM_KV_NEVER);
	/* A cached block has one, too. */
	publish_all(a[1], 1);
	CHECK_EQ(cache_do_close(&m, a[1]), 0);
	CHECK_EQ(cache_do_extend(&m, a[0], 1, false), -ENOMEM);
	CHECK_EQ(cache_do_extend(&m, a[0], 1, true), 0);
	CHECK_EQ(m.stats.evictions, 1);
	cache_teardown(&m);
}

/* Pages move under everybody who has them. */
TEST(cache_pages_move)
{
	struct tm_seq_id a, b, c;
	u32 moved = 0;

	setup_full(3, 8, 3, 4);
	add_chunks(4);
	a = write_seq(1, 5);
	b = write_seq(1, 5);
	publish_all(b, 1);
	CHECK_EQ(cache_do_fork(&m, b, 5 * TOKENS, false, &c), 0);
	CHECK_EQ(cache_do_pack(&m, place_of(a), 0, 0, 2), 0);
	CHECK_EQ(cache_do_truncate(&m, a, 2 * TOKENS), 0);
	CHECK_EQ(cache_do_close(&m, b), 0);
	CHECK_EQ(cache_do_truncate(&m, c, 3 * TOKENS), 0);
	while (!cache_do_remove(&m))
		;
	while (!cache_do_move_begin(&m)) {
		CHECK_EQ(cache_do_move_end(&m, true), 0);
		while (!cache_do_remove(&m))
			;
		moved++;
	}
	CHECK(moved);
	CHECK(cache_free_pages(&m) < 8);
	CHECK_EQ(cache_do_touch(&m, place_of(c), 0, 2, 1, false), 0);
	cache_teardown(&m);
}

static struct tm_cache_config config_of(struct tm_kv_group group)
{
	struct tm_cache_config config = {
		.max_tokens = 8 * TOKENS, .max_seqs = 2, .max_chunks = 2,
		.nr_events = 4,
	};

	CHECK_EQ(tm_kv_geometry_init(&config.geo, tm_geometry(18), &group, 1,
				     TOKENS), 0);
	return config;
}

TEST(cache_init_refuses)
{
	struct tm_geometry g = tm_geometry(18);
	const struct tm_cache_config good = config_of(cache_full(g, TOKENS, 1,
								 9));
	struct tm_kv_group groups[2] = {
		cache_full(g, TOKENS, 1, 4), cache_full(g, TOKENS, 1, 5),
	};
	struct tm_kv_group most[TM_KV_GROUPS];
	static struct tm_cache cache;
	tm_sleep_lock_t lock = { false };
	struct tm_cache_config config;

#define REFUSED(change)							\
	do {								\
		config = good;						\
		change;							\
		CHECK_EQ(tm_cache_init(&cache, &config, &lock), -EINVAL);	\
		CHECK_EQ(tm_host_tables(), 0);				\
	} while (0)

	REFUSED(config.max_tokens = 0);
	REFUSED(config.max_seqs = 0);
	REFUSED(config.max_seqs = TM_CACHE_MAX_SEQS + 1);
	REFUSED(config.max_seqs = ~0u);
	REFUSED(config.max_tokens = ~0u);
	REFUSED((config.max_seqs = TM_CACHE_MAX_SEQS,
		 config.max_tokens = 1025 * TOKENS));
	/* 2^32 entries, which in 32 bits are none. */
	REFUSED((config.max_seqs = 1u << 15,
		 config.max_tokens = (1u << 17) * TOKENS));
	REFUSED((config.max_seqs = 1,
		 config.max_tokens = TM_CACHE_MAX_ENTRIES * TOKENS + 1));
	REFUSED(config.nr_events = 3);
	REFUSED(config.max_chunks = 0);
	REFUSED(config.max_chunks = 1);
	REFUSED(config.max_chunks = ~0u);
	/* One chunk has room for each of two, and not for both. */
	CHECK_EQ(tm_kv_geometry_init(&config.geo, g, groups, 2, TOKENS), 0);
	config.max_chunks = 1;
	CHECK_EQ(tm_cache_init(&cache, &config, &lock), -EINVAL);
	CHECK_EQ(tm_host_tables(), 0);
#undef REFUSED
	/* The most entries there can be: refused for want of memory only. */
	config = good;
	config.max_seqs = 1;
	config.max_tokens = TM_CACHE_MAX_ENTRIES * TOKENS;
	tm_host_fail_table(1);
	CHECK_EQ(tm_cache_init(&cache, &config, &lock), -ENOMEM);
	/* Just enough for one of each, of as many as there can be. */
	for (u32 i = 0; i < TM_KV_GROUPS; i++)
		most[i] = cache_state(g, 1, 1);
	config = good;
	CHECK_EQ(tm_kv_geometry_init(&config.geo, g, most, TM_KV_GROUPS,
				     TOKENS), 0);
	config.max_chunks = 1;
	CHECK_EQ(tm_cache_init(&cache, &config, &lock), -EINVAL);
	config.max_chunks = TM_KV_GROUPS / 8;
	CHECK_EQ(tm_cache_init(&cache, &config, &lock), 0);
	tm_cache_destroy(&cache);
	config = good;
	config.max_seqs = TM_CACHE_MAX_SEQS;
	CHECK_EQ(tm_cache_init(&cache, &config, &lock), 0);
	CHECK_EQ(cache.max_blocks, 8);
	tm_cache_destroy(&cache);
}

TEST(cache_init_without_memory)
{
	struct tm_cache_config config = config_of(cache_full(tm_geometry(18),
							     TOKENS, 1, 1));
	static struct tm_cache cache;
	tm_sleep_lock_t lock = { false };
	u32 nth = 0;
	int err;

	for (u32 events = 0; events < 2; events++) {
		config.nr_events = 4 * events;
		nth = 0;
		do {
			memset(&cache, 0xa5, sizeof(cache));
			tm_host_fail_table(++nth);
			err = tm_cache_init(&cache, &config, &lock);
			if (!err)
				break;
			CHECK_EQ(err, -ENOMEM);
			CHECK_EQ(tm_host_tables(), 0);
			/* A failed init leaves what destroy accepts. */
			tm_cache_destroy(&cache);
			CHECK_EQ(tm_host_tables(), 0);
		} while (nth < 20);
		tm_host_fail_table(0);
		CHECK_EQ(err, 0);
		/* Three of the pool, two of the index, sequences and entries. */
		CHECK_EQ(nth - 1, 7 + events);
		CHECK_EQ(tm_host_tables(), 7 + events);
		tm_cache_destroy(&cache);
		CHECK_EQ(tm_host_tables(), 0);
		CHECK(!cache.seqs && !cache.tables && !cache.events);
		CHECK(!cache.pool.blocks && !cache.prefix.blocks);
	}
}

TEST(cache_destroy_warns_of_chunks)
{
	setup_full(1, 1, 1, 1);
	add_chunks(1);
	tm_host_unlock(&m.lock);
	tm_host_expect_warnings(1);
	tm_cache_destroy(&m.cache);
	CHECK_EQ(tm_host_missing_warnings(), 0);
}

static void unlocked(void *which)
{
	struct tm_cache_extend item = { .tokens = 1 };
	struct tm_cache_copies copies;
	struct tm_cache_event event;
	struct tm_cache_page page;
	struct tm_cache_run run;
	struct tm_hash name = hash(1);
	struct tm_kv_block block = { 0 };
	struct tm_seq_id id = m.seq[0].id;
	u32 failed;

	item.id = id;
	m.lock.held = false;
	switch (*(int *)which) {
	case 0:
		(void)tm_cache_find(&m.cache, id);
		break;
	case 1:
		(void)!tm_cache_open(&m.cache, 1, &id);
		break;
	case 2:
		(void)!tm_cache_close(&m.cache, id);
		break;
	case 3:
		(void)!tm_cache_extend(&m.cache, &item, 1, false, &failed);
		break;
	case 4:
		(void)!tm_cache_truncate(&m.cache, id, 0);
		break;
	case 5:
		(void)!tm_cache_seal(&m.cache, id, 0);
		break;
	case 6:
		(void)!tm_cache_fork(&m.cache, id, 0, false, &id, &copies);
		break;
	case 7:
		(void)!tm_cache_page(&m.cache, 0, 0, 0, 0, &page);
		break;
	case 8:
		(void)!tm_cache_write(&m.cache, 0, 0, 0, false, &copies);
		break;
	case 9:
		(void)tm_cache_shared(&m.cache, block);
		break;
	case 10:
		(void)!tm_cache_publish(&m.cache, id, 0, &name, 1, false,
					&copies);
		break;
	case 11:
		(void)tm_cache_match(&m.cache, 1, &name, 1);
		break;
	case 12:
		(void)!tm_cache_lookup(&m.cache, id, &name, 1, false, &failed,
				       &copies);
		break;
	case 13:
		(void)!tm_cache_adopt(&m.cache, id, 0, &name, 1, false,
				      &copies);
		break;
	case 14:
		(void)!tm_cache_reset(&m.cache);
		break;
	case 15:
		(void)!tm_cache_evict(&m.cache);
		break;
	case 16:
		(void)tm_cache_evictable(&m.cache);
		break;
	case 17:
		(void)tm_cache_packed(&m.cache, block);
		break;
	case 18:
		(void)!tm_cache_packable(&m.cache, 0, 0, 0, &block);
		break;
	case 19:
		(void)!tm_cache_pack(&m.cache, block, 1);
		break;
	case 20:
		(void)!tm_cache_unpack(&m.cache, block, false);
		break;
	case 21:
		(void)tm_cache_next_event(&m.cache, &event);
		break;
	case 22:
		tm_cache_span(&m.cache, 0, 1, &failed, &failed);
		break;
	case 23:
		(void)!tm_cache_pages(&m.cache, 0, 0, 0, 0, 1, &run);
		break;
	case 24:
		tm_cache_leaving(&m.cache, 0, 0, 1, &failed, &failed);
		break;
	}
}

TEST(cache_calls_need_the_lock)
{
	static const char *const calls[] = {
		"find", "open", "close", "extend", "truncate", "seal", "fork",
		"page", "write", "shared", "publish", "match", "lookup",
		"adopt", "reset", "evict", "evictable", "packed", "packable",
		"pack", "unpack", "next_event", "span", "pages",
		"leaving",
	};

	setup_full(2, 4, 2, 1);
	add_chunks(1);
	write_seq(1, 1);
	for (int i = 0; i < 25; i++)
		tm_check_aborts(calls[i], unlocked, &i);
	cache_teardown(&m);
}
