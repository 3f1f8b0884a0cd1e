// SPDX-License-Identifier: GPL-2.0-only
/*
 * How much of the memory that the kv pool holds is of no use: requests run through
 * the allocator, for models as they are.
 *
 *   waste PAGE_SHIFT apart|together
 *
 * prints for each row: its name, our waste, the peer's, tokens of our blocks, our
 * waste at the worst moment, our waste if no page is ever moved, and pages moved
 * for each page allocated. "apart" maps the K and the V of each layer as an array
 * of its own, "together" interleaves the layers of a group.
 *
 * Waste is 1 - useful / held. Held are the chunks that the pool has from level 1.
 * Useful are the bytes of the tokens that layers still have to read: all of them
 * for full attention, the last W for a sliding window, the image's for
 * cross-attention, the text's for self-attention beside it, and the state.
 *
 * The peer is one size for all, as vLLM had it when the Jenga authors measured it
 * (arXiv:2503.18292): blocks of 16 tokens (or as many more as make up whole pages)
 * in which every layer of every group has a slot, for every token of the sequence,
 * kept until the sequence ends. A layer with a fixed state has no slots for
 * tokens; there the peer is what vLLM does today: blocks of so many tokens that
 * one layer's part of a block is as large as the state of one layer, which is
 * padded to it. The peer's blocks come from the same allocator and its pages are
 * moved as ours are, so that the difference is the geometry's alone: where all
 * layers are alike there is none to speak of.
 */
#include <stdio.h>
#include <stdlib.h>

#include "core/kv.h"

#define MAX_RUNNING	256
#define MAX_CHUNKS	1024
/* Tokens of a prompt that are worked on between two tokens of the others. */
#define PREFILL		512
#define STEPS		24000
/* Pages to be moved between two tokens: 1 MiB. A token reads all weights. */
#define MOVE_BYTES	(1u << 20)
#define PEER_TOKENS	16

enum stream {
	TEXT,
	IMAGE,
	STREAMS,
};

struct layers {
	u32 rule;
	u32 layers;
	/* Of K, and of V; or of the state. */
	u32 token_bytes;
	u32 window;
	enum stream stream;
};

struct range {
	u32 least;
	u32 most;
};

struct model {
	const char *name;
	u32 megabytes;
	struct range prompt;
	struct range image;
	struct range output;
	u32 nr;
	struct layers group[4];
};

static const struct model models[] = {
	{
		/* 11B: 8 KV heads of 128. */
		"llama-3.2-vision", 2048, { 16, 256 }, { 1601, 6404 },
		{ 16, 256 }, 2, {
			{ TM_KV_FULL, 32, 2048, 0, TEXT },
			{ TM_KV_FULL, 8, 2048, 0, IMAGE },
		},
	}, {
		/* 2B: 4 KV heads of 256. */
		"gemma-2", 2048, { 512, 8192 }, { 0, 0 }, { 32, 512 }, 2, {
			{ TM_KV_FULL, 13, 2048, 0, TEXT },
			{ TM_KV_WINDOW, 13, 2048, 4096, TEXT },
		},
	}, {
		/* 8B with a smaller window, so that a board can hold it. */
		"ministral", 2048, { 256, 4096 }, { 0, 0 }, { 32, 512 }, 2, {
			{ TM_KV_FULL, 9, 2048, 0, TEXT },
			{ TM_KV_WINDOW, 27, 2048, 1024, TEXT },
		},
	}, {
		"tinyllama-1.1b", 512, { 32, 1024 }, { 0, 0 }, { 16, 512 }, 1, {
			{ TM_KV_FULL, 22, 512, 0, TEXT },
		},
	}, {
		"qwen2.5-0.5b", 256, { 32, 2048 }, { 0, 0 }, { 16, 512 }, 1, {
			{ TM_KV_FULL, 24, 256, 0, TEXT },
		},
	}, {
		"gemma-3-1b", 512, { 32, 4096 }, { 0, 0 }, { 16, 512 }, 2, {
			{ TM_KV_FULL, 4, 512, 0, TEXT },
			{ TM_KV_WINDOW, 22, 512, 512, TEXT },
		},
	}, {
		/* State: 16 x 4096 of fp32 and a convolution of 3 x 4096 of fp16. */
		"jamba-like", 1024, { 32, 4096 }, { 0, 0 }, { 16, 512 }, 2, {
			{ TM_KV_FULL, 4, 2048, 0, TEXT },
			{ TM_KV_STATE, 28, 16 * 4096 * 4 + 3 * 4096 * 2, 0,
			  TEXT },
		},
	},
};

/*
 * The shapes for which the peer's waste is known, every sequence at the same point:
 * 79.6 %, 25 % and 56.25 %.
 */
struct shape {
	const char *name;
	u32 model;
	u32 sequences;
	u32 tokens[STREAMS];
};

static const struct shape shapes[] = {
	{ "shape-llama-3.2-vision", 0, 8, { 43, 6193 } },
	{ "shape-gemma-2", 1, 3, { 8192, 0 } },
	{ "shape-ministral", 2, 7, { 4096, 0 } },
};

struct sequence {
	u32 prompt;
	u32 image;
	u32 output;
	u32 tokens;
	struct {
		u32 first;
		u32 end;
		/* By number in the sequence. */
		struct tm_kv_block *blocks;
	} held[TM_KV_GROUPS];
};

static u64 rng_state;

/* splitmix64 */
static u32 below(u32 n)
{
	u64 z = rng_state += 0x9e3779b97f4a7c15;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return (u32)((z ^ (z >> 31)) % n);
}

/* As often from 32 to 64 as from 1024 to 2048: many short, few long. */
static u32 pick(struct range range)
{
	u32 octaves = 0, low;

	if (!range.most)
		return 0;
	while (range.least << (octaves + 1) <= range.most)
		octaves++;
	low = range.least << below(octaves ? octaves : 1);
	return low + below((low * 2 < range.most ? low * 2 : range.most) -
			   low + 1);
}

static tm_lock_t lock;
static struct tm_kv_pool pool;
static struct sequence running[MAX_RUNNING];
static u32 nr_running;
static u32 budget;
static u32 next_chunk;
static u32 free_chunk[MAX_CHUNKS];
static u32 nr_free_chunks;
/* Which tokens a group of the pool sees. */
static bool sees[TM_KV_GROUPS][STREAMS];
/* Blocks ever allocated, by group. */
static u64 allocated[TM_KV_GROUPS];

static void die(const char *what)
{
	fprintf(stderr, "waste: %s\n", what);
	exit(1);
}

/* One size for all: one group is left, and those that keep a state. */
static u32 peer_groups(struct tm_kv_group *group, u32 nr, u32 page_shift,
		       u32 *tokens)
{
	u32 left = 1;

	*tokens = PEER_TOKENS;
	while (*tokens * group[0].token_bytes % (1u << page_shift))
		*tokens += PEER_TOKENS;
	for (u32 i = 1; i < nr; i++) {
		if (group[i].rule != TM_KV_STATE) {
			group[0].planes += group[i].planes;
			sees[0][TEXT] |= sees[i][TEXT];
			sees[0][IMAGE] |= sees[i][IMAGE];
			continue;
		}
		while (*tokens * 2 * group[0].token_bytes <
		       group[i].token_bytes)
			*tokens += PEER_TOKENS;
		group[left] = group[i];
		group[left++].token_bytes = *tokens * 2 * group[0].token_bytes;
	}
	return left;
}

static void setup(const struct model *model, u32 page_shift, bool together,
		  bool peer)
{
	struct tm_kv_group group[TM_KV_GROUPS] = { 0 };
	struct tm_kv_geometry geo;
	u32 tokens = 0, nr = model->nr;

	memset(sees, 0, sizeof(sees));
	for (u32 i = 0; i < nr; i++) {
		const struct layers *l = &model->group[i];
		bool state = l->rule == TM_KV_STATE;

		group[i] = (struct tm_kv_group){
			.rule = l->rule,
			.planes = state ? l->layers : 2 * l->layers,
			.token_bytes = l->token_bytes,
			.window = l->window,
		};
		sees[i][l->stream] = !state;
	}
	if (peer)
		nr = peer_groups(group, nr, page_shift, &tokens);
	for (u32 i = 0; together && i < nr; i++) {
		group[i].token_bytes *= group[i].planes;
		group[i].planes = 1;
	}
	if (tm_kv_geometry_init(&geo, tm_geometry(page_shift), group, nr,
				tokens))
		die("no geometry");
	budget = model->megabytes / 2;
	if (tm_kv_pool_init(&pool, &geo, budget, &lock))
		die("no pool");
	next_chunk = 0;
	nr_free_chunks = 0;
	memset(allocated, 0, sizeof(allocated));
}

static void take_back(void)
{
	struct tm_chunk_id id;

	while (!tm_kv_remove_chunk(&pool, &id))
		free_chunk[nr_free_chunks++] = id.v;
}

static u32 seen(u32 group, u32 tokens, u32 image)
{
	return (sees[group][TEXT] ? tokens : 0) +
	       (sees[group][IMAGE] ? image : 0);
}

/* Have blocks for @tokens and the image. Return: false for want of memory. */
static bool extend(struct sequence *s, u32 tokens)
{
	static struct tm_kv_block blocks[1 << 16];
	struct tm_kv_block *block = blocks;
	u32 count[TM_KV_GROUPS], end[TM_KV_GROUPS];
	u32 first;
	u64 missing;

	for (u32 g = 0; g < pool.geo.nr_groups; g++) {
		end[g] = tm_kv_held(&pool.geo, g, seen(g, tokens, s->image),
				    &first);
		count[g] = end[g] - s->held[g].end;
	}
	missing = tm_kv_missing(&pool, count);
	if (missing > budget - pool.nr_chunks)
		return false;
	while (missing--) {
		struct tm_chunk_id id = {
			nr_free_chunks ? free_chunk[--nr_free_chunks] :
					 next_chunk++
		};

		if (tm_kv_add_chunk(&pool, id))
			die("more chunks than the pool may have");
	}
	if (tm_kv_alloc(&pool, count, blocks))
		die("an allocation failed though nothing was missing");
	for (u32 g = 0; g < pool.geo.nr_groups; g++) {
		allocated[g] += count[g];
		s->held[g].blocks = realloc(s->held[g].blocks, (end[g] + 1) *
					    sizeof(*s->held[g].blocks));
		if (!s->held[g].blocks)
			die("no memory");
		while (s->held[g].end < end[g])
			s->held[g].blocks[s->held[g].end++] = *block++;
		tm_kv_held(&pool.geo, g, seen(g, tokens, s->image), &first);
		while (s->held[g].first < first)
			if (tm_kv_free(&pool, s->held[g].blocks[
						s->held[g].first++]))
				die("a block could not be freed");
	}
	s->tokens = tokens;
	take_back();
	return true;
}

/* Chunks that the prompt of @s takes, and its image. */
static u32 chunks_for(const struct sequence *s)
{
	u32 pages = 0, first, end;

	for (u32 g = 0; g < pool.geo.nr_groups; g++) {
		end = tm_kv_held(&pool.geo, g, seen(g, s->prompt, s->image),
				 &first);
		pages += (end - first) * pool.geo.block_pages[g];
	}
	return pages >> pool.geo.pages.chunk_order;
}

static void drop(u32 index)
{
	struct sequence *s = &running[index];

	for (u32 g = 0; g < pool.geo.nr_groups; g++) {
		for (u32 i = s->held[g].first; i < s->held[g].end; i++)
			if (tm_kv_free(&pool, s->held[g].blocks[i]))
				die("a block could not be freed");
		free(s->held[g].blocks);
	}
	take_back();
	memmove(s, s + 1, (--nr_running - index) * sizeof(*s));
}

static double waste_now(const struct model *model)
{
	u64 useful = 0;

	if (!pool.nr_chunks)
		return 0;
	for (u32 i = 0; i < nr_running; i++)
		for (u32 g = 0; g < model->nr; g++) {
			const struct layers *l = &model->group[g];
			u64 tokens = l->stream == IMAGE ? running[i].image :
							  running[i].tokens;

			if (l->rule == TM_KV_STATE) {
				useful += (u64)l->layers * l->token_bytes;
				continue;
			}
			if (l->window && tokens > l->window)
				tokens = l->window;
			useful += tokens * 2 * l->layers * l->token_bytes;
		}
	return 1 - (double)useful /
		   ((double)pool.nr_chunks * TM_CHUNK_SIZE);
}

/* As a thread would between two tokens, while over 1/64 of the memory is free. */
static void move_pages(u32 most)
{
	u32 pages = tm_chunk_pages(pool.geo.pages);
	struct tm_kv_move move;

	while (most-- && pool.free_pages > pool.nr_chunks * pages / 64 &&
	       !tm_kv_move_begin(&pool, &move)) {
		if (tm_kv_move_end(&pool, true))
			die("a move failed");
		take_back();
	}
}

struct result {
	double waste;
	double worst;
	double moved;
	u32 block_tokens;
};

static void finish(struct result *result)
{
	u64 pages = 0;

	result->block_tokens = pool.geo.block_tokens;
	while (nr_running)
		drop(0);
	for (u32 g = 0; g < pool.geo.nr_groups; g++)
		pages += allocated[g] * pool.geo.block_pages[g];
	result->moved = (double)pool.moved / (double)pages;
	tm_kv_pool_destroy(&pool);
}

static struct result at_shape(const struct shape *shape, u32 page_shift,
			      bool together, bool peer)
{
	const struct model *model = &models[shape->model];
	struct result result;

	setup(model, page_shift, together, peer);
	/* As many sequences as there is room for, grown in turn. */
	for (u32 i = 0; i < shape->sequences; i++)
		running[nr_running++] = (struct sequence){
			.image = shape->tokens[IMAGE],
		};
	for (u32 t = 0; t < shape->tokens[TEXT];) {
		t += PREFILL;
		if (t > shape->tokens[TEXT])
			t = shape->tokens[TEXT];
		for (u32 i = 0; i < nr_running; i++)
			while (i < nr_running && !extend(&running[i], t))
				drop(nr_running - 1);
	}
	result.waste = result.worst = waste_now(model);
	finish(&result);
	return result;
}

/* Start what there is room for below @limit chunks. */
static void admit(const struct model *model, struct sequence *next, u32 limit)
{
	while (nr_running < MAX_RUNNING) {
		/* One prompt at a time. */
		if (nr_running && running[nr_running - 1].tokens <
				  running[nr_running - 1].prompt)
			return;
		if (!next->prompt)
			*next = (struct sequence){
				.prompt = pick(model->prompt),
				.image = pick(model->image),
				.output = pick(model->output),
			};
		if (nr_running && pool.nr_chunks + chunks_for(next) > limit)
			return;
		running[nr_running] = *next;
		if (!extend(&running[nr_running], next->prompt < PREFILL ?
						  next->prompt : PREFILL))
			return;
		nr_running++;
		next->prompt = 0;
	}
}

/* One token for every sequence, or the next part of its prompt. */
static void step_all(void)
{
	for (u32 i = 0; i < nr_running; i++) {
		struct sequence *s = &running[i];
		u32 to = s->tokens + 1;

		if (s->tokens == s->prompt + s->output) {
			drop(i--);
			continue;
		}
		if (s->tokens < s->prompt)
			to = s->prompt - s->tokens < PREFILL ?
			     s->prompt : s->tokens + PREFILL;
		/* The newest makes room, and does not come back. */
		while (i < nr_running && !extend(s, to))
			drop(nr_running - 1);
	}
}

/*
 * There is always somebody waiting, but each thousand steps another part of the
 * memory may be used, from 40 % to all of it: as others on the board come and go.
 */
static struct result over_trace(const struct model *model, u32 page_shift,
				bool together, bool peer, bool moves)
{
	struct sequence next = { 0 };
	struct result result = { 0 };
	u32 limit = 0, samples = 0;

	setup(model, page_shift, together, peer);
	rng_state = 1;
	for (u32 step = 0; step < STEPS; step++) {
		if (step % 1000 == 0)
			limit = budget * (4 + below(7)) / 10;
		admit(model, &next, limit - budget / 20);
		step_all();
		if (moves)
			move_pages(MOVE_BYTES >> page_shift);
		if (step >= STEPS / 4 && step % 8 == 0 && nr_running) {
			double waste = waste_now(model);

			result.waste += waste;
			samples++;
			if (waste > result.worst)
				result.worst = waste;
		}
	}
	result.waste /= samples;
	finish(&result);
	return result;
}

int main(int argc, char **argv)
{
	u32 page_shift = argc == 3 ? (u32)atoi(argv[1]) : 0;
	bool together = argc == 3 && !strcmp(argv[2], "together");

	if (page_shift < TM_MIN_PAGE_SHIFT || page_shift > 16)
		die("usage: waste PAGE_SHIFT apart|together");
	lock.held = true;
	for (u32 i = 0; i < sizeof(shapes) / sizeof(*shapes); i++) {
		struct result ours = at_shape(&shapes[i], page_shift, together,
					      false);
		struct result peer = at_shape(&shapes[i], page_shift, together,
					      true);

		printf("%s %.4f %.4f %u %.4f %.4f %.3f\n", shapes[i].name,
		       ours.waste, peer.waste, ours.block_tokens, ours.worst,
		       ours.waste, ours.moved);
	}
	for (u32 i = 0; i < sizeof(models) / sizeof(*models); i++) {
		struct result ours = over_trace(&models[i], page_shift,
						together, false, true);
		struct result still = over_trace(&models[i], page_shift,
						 together, false, false);
		struct result peer = over_trace(&models[i], page_shift,
						together, true, true);

		printf("%s %.4f %.4f %u %.4f %.4f %.3f\n", models[i].name,
		       ours.waste, peer.waste, ours.block_tokens, ours.worst,
		       still.waste, ours.moved);
	}
	return 0;
}
