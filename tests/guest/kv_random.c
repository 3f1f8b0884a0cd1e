// SPDX-License-Identifier: GPL-2.0-only
/*
 * Random operations on a KV cache through the device, against a model: what every
 * sequence is to hold, byte for byte, what every call is to return, and what can be
 * found under which hash. Each operation verifies what it may have touched by the CRC
 * of its pages, and one more block of its worker's, so that all come around.
 *
 *	kv_random --shape NAME [--tight | --quota] [--seed S] [--steps N]
 *	          [--threads T] [--processes P] [--reader] [--maps M] [--private]
 *
 * One worker (the default) has the cache to itself. The model is exact then: the events
 * say what can be found, and a call may be refused memory only if KV_INFO says that
 * there is none. Several, which are threads of several processes that share the
 * descriptor, have sequences of their own, and fork each other's, too; the model knows
 * bounds where the others decide. A reader begins sequences with what others have
 * published, and reads them over and over.
 *
 * --tight: a limit of a third of what the sequences can want; --quota: the client's
 * quota is that instead; --private: nothing is published, so that what is given up is
 * free, and pages are moved together. On a mismatch it says what led to it and exits with 1.
 */
#define _GNU_SOURCE
#include "kv_random.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define RECENT		30
#define MAX_WORKERS	8
#define MAX_PLACES	64	/* sequences of one worker */
#define PROMPTS		4
#define MAX_RECORDS	32768
#define RECORDS_BYTES	(32u << 20)
#define BUCKETS		16384
#define MAX_STORED	256
#define MAX_MAPS	2
#define ROUND		1000	/* steps between meetings of several workers */
#define RETRIES		8

struct shape shape;

enum operation {
	OP_OPEN, OP_CLOSE, OP_EXTEND, OP_BATCH, OP_TRUNCATE, OP_FORK, OP_PUBLISH,
	OP_LOOKUP, OP_PEEK, OP_ADOPT, OP_REWRITE, OP_STATE, OP_PACK, OP_UNPACK,
	OP_POKE, OP_BAD, OP_PROTECT, OP_QUERY, OP_RESET, OP_WANE, OPS,
};

static const char * const op_names[OPS] = {
	"open", "close", "extend", "batch", "truncate", "fork", "publish",
	"lookup", "peek", "adopt", "rewrite", "state", "pack", "unpack",
	"poke", "bad", "protect", "query", "reset", "wane",
};

static const unsigned char writer_weights[OPS] = {
	6, 2, 56, 16, 10, 10, 20, 14, 6, 16, 24, 6, 4, 2, 4, 6, 2, 4, 1, 1,
};

static const unsigned char reader_weights[OPS] = {
	[OP_LOOKUP] = 10, [OP_CLOSE] = 8, [OP_PEEK] = 1,
};

/* Something that was done. */
struct deed {
	u64 step;
	enum operation op;
	u32 id;
	u64 a;
	u64 b;
	int result;
};

/* What has been published, by name: its contents, by which what is found is judged. */
struct record {
	struct name name;
	struct name parent;
	bool root;
	bool state;
	u32 next;
	/* By tenant, groups: somebody may have published it; somebody has. */
	unsigned char may[TENANTS];
	unsigned char must[TENANTS];
	u64 pats[];
};

struct registry {
	pthread_mutex_t lock;
	u32 size;
	u32 turn;
	u32 bucket[BUCKETS];
	char *records;
	size_t record_bytes;
};

/* A name that can be found, or a block that is: one worker only. */
struct key {
	struct key *chain;
	struct name name;
	u32 tenant;
	u32 group;
	u32 found;
	struct ident *ids;
	u32 unsure;
};

/* A block that sequences have. @unsure: one of several; it is not known which. */
struct ident {
	struct ident *next;
	struct key *key;
	u32 group;
	u32 refs;
	bool unsure;
};

enum count {
	STEPS, REFUSED, FAULTS, DARK, COPIED, MATCHED, HITS, PACKED, FORKED,
	FOREIGN, PAGES, SIGNALS, ADOPTED, RESETS, COUNTS,
};

static const char * const count_names[COUNTS] = {
	"steps", "refused", "faults", "dark", "copied", "matched", "hits",
	"packed", "forked", "foreign", "pages", "signals", "adopted", "resets",
};

struct worker {
	u32 number;
	bool reader;
	u64 dice;
	u64 step;
	u64 nr_deeds;
	struct deed deed[RECENT];
	struct seq seq[MAX_PLACES];
	u32 turn_seq;
	u32 turn_block;
	u64 counts[COUNTS];
};

/* What all workers share. */
struct common {
	pthread_barrier_t barrier;
	atomic_bool failed;
	u32 nr_workers;
	u32 per_worker;
	struct worker worker[MAX_WORKERS];
};

static struct common *common;
static struct registry *registry;
static bool exact, tight, private;
static int full_errno = ENOSPC;
static u64 seed = 1, steps = 10000;
static int client, kv;
static char *maps[MAX_MAPS];
static u32 nr_maps = 1;
static u64 window_size, place_size, most_pages, most_blocks;

/* Of one worker that has the cache to itself. */
static struct key *keys[BUCKETS];
static struct tensormem_kv_event stored[MAX_STORED];
static u32 nr_stored;
static u64 evicted, asked, hit;
static u64 in_use, in_use_unsure, blocks_in_use;

static __thread struct worker *current;
/* Where a signal leads, if anywhere. */
static __thread volatile struct {
	sigjmp_buf *buf;
} trap;
static __thread volatile u32 stored_words;

static void say_deed(const struct deed *deed)
{
	printf("  step %llu %s sequence %#x, %llu, %llu: %s\n",
	       (unsigned long long)deed->step, op_names[deed->op], deed->id,
	       (unsigned long long)deed->a, (unsigned long long)deed->b,
	       deed->result ? strerror(deed->result) : "done");
}

static void fail(struct worker *w, const char *format, ...)
	__attribute__((format(printf, 2, 3), noreturn));

static void fail(struct worker *w, const char *format, ...)
{
	u64 first = w->nr_deeds > RECENT ? w->nr_deeds - RECENT : 0;
	va_list list;

	/* The first one tells; what others find now may be its consequence. */
	while (atomic_exchange(&common->failed, true))
		pause();
	printf("kv_random: shape %s seed %llu worker %u step %llu: ", shape.name,
	       (unsigned long long)seed, w->number, (unsigned long long)w->step);
	va_start(list, format);
	vprintf(format, list);
	va_end(list);
	printf("\n");
	for (u64 i = first; i < w->nr_deeds; i++)
		say_deed(&w->deed[i % RECENT]);
	fflush(stdout);
	_exit(1);
}

static int done(struct worker *w, enum operation op, const struct seq *s, u64 a, u64 b,
		int result)
{
	w->deed[w->nr_deeds++ % RECENT] = (struct deed){
		.step = w->step, .op = op, .id = s ? s->id : 0, .a = a, .b = b,
		.result = result,
	};
	return result;
}

static u64 roll(struct worker *w)
{
	return mix(w->dice++);
}

static u32 below(struct worker *w, u32 n)
{
	return (roll(w) >> 32) * n >> 32;
}

static bool one_in(struct worker *w, u32 n)
{
	return !below(w, n);
}

/* Return: 0 or the errno. */
static int call(unsigned long request, void *arg)
{
	return ioctl(kv, request, arg) ? errno : 0;
}

static struct tensormem_kv_info info(struct worker *w)
{
	struct tensormem_kv_info info = { 0 };

	if (call(TENSORMEM_IOC_KV_INFO, &info))
		fail(w, "KV_INFO: %s", strerror(errno));
	return info;
}

/* Registry */

static struct record *record(u32 i)
{
	return (struct record *)(registry->records + i * registry->record_bytes);
}

static void registry_init(void)
{
	registry = shared(sizeof(*registry));
	lock_init(&registry->lock);
	registry->record_bytes = sizeof(struct record) + shape.pats * sizeof(u64);
	registry->size = RECORDS_BYTES / registry->record_bytes;
	if (registry->size > MAX_RECORDS)
		registry->size = MAX_RECORDS;
	registry->records = shared(registry->record_bytes * registry->size);
	memset(registry->bucket, 0xff, sizeof(registry->bucket));
}

static u32 *registry_bucket(const struct name *name)
{
	return &registry->bucket[name->v[1] % BUCKETS];
}

static struct record *registry_find(const struct name *name)
{
	u32 i = *registry_bucket(name);

	while (i != ~0u && !same_name(&record(i)->name, name))
		i = record(i)->next;
	return i == ~0u ? NULL : record(i);
}

/* A name's record, made if need be in place of the one that was made longest ago. */
static struct record *registry_get(struct seq *s, u32 i)
{
	struct name name = *seq_name(s, i);
	struct record *r = registry_find(&name);
	u32 turn, *link;

	if (r)
		return r;
	turn = registry->turn % registry->size;
	r = record(turn);
	if (registry->turn++ >= registry->size) {
		link = registry_bucket(&r->name);
		while (*link != turn)
			link = &record(*link)->next;
		*link = r->next;
	}
	memset(r, 0, sizeof(*r));
	r->name = name;
	r->root = !i;
	if (i)
		r->parent = *seq_name(s, i - 1);
	memcpy(r->pats, s->pats + (size_t)i * shape.pats,
	       shape.pats * sizeof(u64));
	link = registry_bucket(&name);
	r->next = *link;
	*link = turn;
	return r;
}

/* Names to look up, and what is known of them when they were chosen. */
struct wish {
	u32 nr;
	struct name *name;
	u64 *pats;
	unsigned char *must;
};

static __thread struct wish wish;

static void wish_init(void)
{
	wish.name = calloc(shape.max_blocks + 1, sizeof(*wish.name));
	wish.must = calloc(shape.max_blocks + 1, TENANTS);
	wish.pats = calloc(shape.max_blocks + 1, shape.pats * sizeof(u64));
}

static void wish_set(u32 i, const struct record *r)
{
	wish.name[i] = r->name;
	memcpy(wish.must + i * TENANTS, r->must, TENANTS);
	memcpy(wish.pats + (size_t)i * shape.pats, r->pats,
	       shape.pats * sizeof(u64));
}

/* What leads to a random record, or nothing if that is not known any more. */
static void wish_random(struct worker *w)
{
	struct record *r, *last;
	u32 depth = 0, used;

	wish.nr = 0;
	pthread_mutex_lock(&registry->lock);
	used = registry->turn < registry->size ? registry->turn : registry->size;
	if (used) {
		/* Preferably one that ends with a state. */
		for (u32 i = 0; i < 8; i++) {
			last = record(below(w, used));
			if (!shape.state_pats || last->state)
				break;
		}
		for (r = last; r && !r->root && depth < shape.max_blocks; depth++)
			r = registry_find(&r->parent);
		if (r && r->root && depth < shape.max_blocks) {
			wish.nr = depth + 1;
			for (r = last; ; r = registry_find(&r->parent)) {
				wish_set(depth, r);
				if (!depth--)
					break;
			}
		}
	}
	pthread_mutex_unlock(&registry->lock);
}

/* What a sequence begins with, as far as it was published once. */
static void wish_like(struct seq *s)
{
	u32 full = s->length / shape.block_tokens;
	struct record *r;

	pthread_mutex_lock(&registry->lock);
	for (wish.nr = 0; wish.nr < full; wish.nr++) {
		r = registry_find(seq_name(s, wish.nr));
		if (!r)
			break;
		wish_set(wish.nr, r);
	}
	pthread_mutex_unlock(&registry->lock);
}

/* The names of what is wished for are noise from here on: nothing is found. */
static void wish_spoil(struct worker *w, u32 from)
{
	for (; from < wish.nr; from++) {
		wish.name[from].v[0] = roll(w) & ~1ull;
		memset(wish.must + from * TENANTS, 0, TENANTS);
	}
}

/* The groups in which somebody may have published a name: all, where it is forgotten. */
static u32 record_may(const struct name *name, u32 tenant)
{
	struct record *r;
	u32 may = 0;

	pthread_mutex_lock(&registry->lock);
	r = registry_find(name);
	if (registry->turn > registry->size)
		may = ~0u;
	else if (r)
		may = r->may[tenant];
	pthread_mutex_unlock(&registry->lock);
	return may;
}

/* Which blocks are which, and what can be found: one worker only */

static struct key *key_get(const struct name *name, u32 tenant, u32 g)
{
	struct key **bucket = &keys[mix(name->v[0] + tenant * 64 + g) % BUCKETS];
	struct key *key;

	for (key = *bucket; key; key = key->chain)
		if (same_name(&key->name, name) && key->tenant == tenant &&
		    key->group == g)
			return key;
	key = calloc(1, sizeof(*key));
	if (!key)
		err(1, "memory for a name");
	*key = (struct key){
		.chain = *bucket, .name = *name, .tenant = tenant, .group = g,
	};
	*bucket = key;
	return key;
}

static void ident_count(const struct ident *id, int by)
{
	u32 pages = shape.group[id->group].pages;

	blocks_in_use += by;
	if (id->unsure) {
		in_use_unsure += by * (int)pages;
		id->key->unsure += by;
	} else {
		in_use += by * (int)pages;
	}
}

static struct ident *ident_new(u32 g)
{
	struct ident *id;

	if (!exact)
		return NULL;
	id = calloc(1, sizeof(*id));
	if (!id)
		err(1, "memory for a block");
	*id = (struct ident){ .group = g, .refs = 1 };
	ident_count(id, 1);
	return id;
}

static void ident_link(struct ident *id, struct key *key)
{
	id->key = key;
	id->next = key->ids;
	key->ids = id;
}

/* What a lookup gets. A block in use comes before one that is not. */
static struct ident *ident_found(const struct name *name, u32 tenant, u32 g)
{
	struct key *key;
	struct ident *id;

	if (!exact)
		return NULL;
	key = key_get(name, tenant, g);
	if (key->ids && !key->ids->next && !key->unsure) {
		key->ids->refs++;
		return key->ids;
	}
	id = ident_new(g);
	if (!key->ids && !key->unsure) {
		ident_link(id, key);
		return id;
	}
	ident_count(id, -1);
	id->key = key;
	id->unsure = true;
	ident_count(id, 1);
	return id;
}

static void ident_put(struct ident *id)
{
	struct ident **link;

	if (!id || --id->refs)
		return;
	ident_count(id, -1);
	if (id->key && !id->unsure) {
		link = &id->key->ids;
		while (*link != id)
			link = &(*link)->next;
		*link = id->next;
	}
	free(id);
}

/* What the model says of a block in a table. */

static bool published(const struct seq *s, u32 g, u32 i)
{
	const struct entry *e = entry(s, g, i);

	return exact ? !!e->id->key : e->published;
}

static const struct name *published_name(const struct seq *s, u32 g, u32 i)
{
	const struct entry *e = entry(s, g, i);

	return exact ? &e->id->key->name : &e->name;
}

static bool shared_block(const struct seq *s, u32 g, u32 i)
{
	return !exact || published(s, g, i) || entry(s, g, i)->id->refs > 1;
}

static void drop(struct seq *s, u32 g, u32 i)
{
	struct entry *e = entry(s, g, i);

	ident_put(e->id);
	*e = (struct entry){ 0 };
}

static void own(struct seq *s, u32 g, u32 i)
{
	*entry(s, g, i) = (struct entry){ .id = ident_new(g) };
}

static void own_found(struct seq *s, u32 g, u32 i, const struct name *name)
{
	*entry(s, g, i) = (struct entry){
		.id = ident_found(name, s->tenant, g),
		.published = true,
		.name = *name,
	};
}

/* The sequence is alone with the block from here on. */
static void privatize(struct worker *w, struct seq *s, u32 g, u32 i)
{
	if (shared_block(s, g, i)) {
		drop(s, g, i);
		own(s, g, i);
		w->counts[COPIED]++;
	}
}

/* Events */

static void take_event(struct worker *w, const struct tensormem_kv_event *event)
{
	struct name name;
	struct key *key;

	memcpy(&name, &event->hash, sizeof(name));
	if (event->type == TENSORMEM_KV_CLEARED) {
		for (u32 i = 0; i < BUCKETS; i++)
			for (key = keys[i]; key; key = key->chain)
				key->found = 0;
		return;
	}
	if (event->group >= shape.nr_groups || !event->tenant ||
	    event->tenant > TENANTS)
		fail(w, "an event of group %u, tenant %llu", event->group,
		     (unsigned long long)event->tenant);
	key = key_get(&name, event->tenant - 1, event->group);
	if (event->type == TENSORMEM_KV_REMOVED) {
		if (!key->found)
			fail(w, "removed what cannot be found: %llx",
			     (unsigned long long)name.v[0]);
		key->found--;
		evicted++;
		return;
	}
	if (event->type != TENSORMEM_KV_STORED || !nr_stored ||
	    memcmp(event, &stored[0], sizeof(*event)))
		fail(w, "event %u: block %u group %u tenant %llu %llx after %llx, expected %u %u %llu %llx after %llx (of %u)",
		     event->type, event->block, event->group,
		     (unsigned long long)event->tenant,
		     (unsigned long long)name.v[0],
		     *(unsigned long long *)&event->parent, stored[0].block,
		     stored[0].group, (unsigned long long)stored[0].tenant,
		     *(unsigned long long *)&stored[0].hash,
		     *(unsigned long long *)&stored[0].parent, nr_stored);
	key->found++;
	memmove(&stored[0], &stored[1], --nr_stored * sizeof(stored[0]));
}

/* Read all there are. */
static void take_events(struct worker *w)
{
	struct tensormem_kv_event event[32];
	ssize_t got;

	if (!exact)
		return;
	while ((got = read(kv, event, sizeof(event))) > 0)
		for (u32 i = 0; i < got / sizeof(event[0]); i++)
			take_event(w, &event[i]);
	if (got != -1 || errno != EAGAIN)
		fail(w, "reading events: %zd, errno %d", got, errno);
	if (nr_stored)
		fail(w, "%u blocks were published without an event", nr_stored);
}

static void expect_stored(struct worker *w, const struct seq *s, u32 g, u32 i,
			  const struct name *name, const struct name *parent)
{
	struct tensormem_kv_event *event = &stored[nr_stored++];

	if (nr_stored == MAX_STORED)
		fail(w, "too many blocks published at once");
	*event = (struct tensormem_kv_event){
		.type = TENSORMEM_KV_STORED,
		.block = i,
		.group = g,
		.tenant = s->tenant + 1,
	};
	memcpy(&event->hash, name, sizeof(*name));
	memcpy(&event->parent, parent, sizeof(*parent));
}

/* Memory */

/*
 * Whether there is no room for so many more pages and blocks, when all cached blocks
 * are given up but so many pages of them.
 */
static bool no_room(struct worker *w, u64 pages, u64 blocks, u64 keep)
{
	struct tensormem_kv_info i = info(w);
	u64 used = (i.used - i.cached) / shape.page;

	if (!exact)
		return tight;
	return used + keep + pages > most_pages ||
	       blocks_in_use + blocks > most_blocks;
}

/* What a call needs at most. */
struct need {
	u64 pages;
	u64 blocks;
	u64 keep;
};

static void need(struct need *n, u32 g, u32 blocks)
{
	n->pages += (u64)blocks * shape.group[g].pages;
	n->blocks += blocks;
}

/* A call that may be refused memory, if there is none. Return: 0 or the errno. */
static int call_with(struct worker *w, unsigned long request, void *arg,
		     const struct need *n)
{
	for (u32 i = 0; ; i++) {
		int error = call(request, arg);

		if (error != full_errno)
			return error;
		w->counts[REFUSED]++;
		if (no_room(w, n->pages, n->blocks, n->keep))
			return error;
		/* Something may have been packed meanwhile. */
		if (i == RETRIES)
			fail(w, "refused %llu pages, %llu blocks: there is room",
			     (unsigned long long)n->pages,
			     (unsigned long long)n->blocks);
	}
}

static void on_signal(int number, siginfo_t *what, void *context)
{
	(void)context;
	if (trap.buf)
		siglongjmp(*trap.buf, number);
	signal(number, SIG_DFL);
	fail(current, "signal %d at %p", number, what->si_addr);
}

static char *address(struct worker *w, const struct seq *s, u32 g, u32 plane, u32 i)
{
	const struct group *group = &shape.group[g];

	return maps[below(w, nr_maps)] + s->offset + group->offset + plane * group->stride +
	       (u64)i * group->plane_pages * shape.page;
}

/* Return: 0 or the signal it raised. */
static int read_page(const char *at, u32 *crc)
{
	sigjmp_buf buf;
	int number = sigsetjmp(buf, 0);

	if (!number) {
		trap.buf = &buf;
		*crc = crc_memory((const u64 *)at, shape.page / 8);
	}
	trap.buf = NULL;
	return number;
}

static int read_byte(const volatile char *at)
{
	sigjmp_buf buf;
	int number = sigsetjmp(buf, 0);

	if (!number) {
		trap.buf = &buf;
		(void)*at;
	}
	trap.buf = NULL;
	return number;
}

static int write_words(volatile u64 *at, u32 words, u64 pat)
{
	sigjmp_buf buf;
	int number = sigsetjmp(buf, 0);

	if (!number) {
		trap.buf = &buf;
		for (stored_words = 0; stored_words < words; stored_words++)
			at[stored_words] = word(pat, stored_words);
	}
	trap.buf = NULL;
	return number;
}

static void mismatch(struct worker *w, const struct seq *s, u32 g, u32 plane, u32 i,
		     u32 page, const char *at) __attribute__((noreturn));

static void mismatch(struct worker *w, const struct seq *s, u32 g, u32 plane, u32 i,
		     u32 page, const char *at)
{
	const struct group *group = &shape.group[g];
	const u64 *pats = block_pats(s, g, i) + plane * group->slots;
	const u64 *found = (const u64 *)at;
	u32 words = shape.page / 8, first = words, bad = 0;
	u64 expected = 0, value = 0;

	for (u32 n = words; n--;) {
		u64 want = expected_word(group, pats, page * words + n);

		if (found[n] != want) {
			first = n;
			expected = want;
			value = found[n];
			bad++;
		}
	}
	fail(w, "sequence %#x (place %llu, length %u, tenant %u) group %u plane %u block %u page %u: %u words differ, first %u: expected %llx, found %llx%s",
	     s->id, (unsigned long long)(s->offset / place_size), s->length,
	     s->tenant, g, plane, i, page, bad, first,
	     (unsigned long long)expected, (unsigned long long)value,
	     bad ? "" : " (right when read again)");
}

/* A touch raised SIGBUS. It may, if it needs memory and there is none. */
static bool touch_refused(struct worker *w, u32 g, bool write)
{
	struct tensormem_kv_info i = info(w);
	struct need n = { 0 };

	w->counts[FAULTS]++;
	if (i.packed)
		need(&n, g, 1);
	if (write)
		need(&n, g, 1);
	if (exact && !n.pages)
		return false;
	return no_room(w, n.pages, n.blocks, 0);
}

/* Verify block @i of a group, which the sequence holds. */
static void check_block(struct worker *w, struct seq *s, u32 g, u32 i)
{
	const struct group *group = &shape.group[g];
	u64 *crcs = block_crcs(s, g, i);
	u32 tries = 0;

	for (u32 n = 0; n < group->pages; n++) {
		u32 plane = n / group->plane_pages, page = n % group->plane_pages;
		char *at = address(w, s, g, plane, i) + (u64)page * shape.page;
		u32 crc;
		int number;

		if (!crcs[n])
			crcs[n] = 1ull << 32 |
				  crc_expected(group, block_pats(s, g, i) +
					       plane * group->slots, page);
		number = read_page(at, &crc);
		if (number) {
			if (number == SIGBUS && touch_refused(w, g, false)) {
				w->counts[DARK]++;
				return;
			}
			if (number != SIGBUS || ++tries == RETRIES)
				fail(w, "sequence %#x length %u group %u plane %u block %u page %u: signal %d",
				     s->id, s->length, g, plane, i, page, number);
			n--;
			continue;
		}
		w->counts[PAGES]++;
		if (crc != (u32)crcs[n])
			mismatch(w, s, g, plane, i, page, at);
	}
}

static void check_seq(struct worker *w, struct seq *s)
{
	for (u32 g = 0; g < shape.nr_groups && !s->torn; g++) {
		u32 first, end;

		span(g, s->length, &first, &end);
		for (; first < end; first++)
			check_block(w, s, g, first);
	}
}

/* Write a token in a plane. Return: whether there was memory to. */
static bool store(struct worker *w, struct seq *s, u32 g, u32 i, u32 plane, u32 slot,
		  u64 pat)
{
	const struct group *group = &shape.group[g];
	u32 at = slot * group->token_bytes;
	u32 tries = 0;

	for (;;) {
		int number = write_words((u64 *)(address(w, s, g, plane, i) + at),
					 group->token_bytes / 8, pat);

		if (!number)
			break;
		if (number == SIGBUS && touch_refused(w, g, true)) {
			/* Packed while we were at it: nobody knows what is there. */
			s->torn = stored_words;
			return false;
		}
		if (number != SIGBUS || ++tries == RETRIES)
			fail(w, "writing sequence %#x length %u group %u plane %u block %u slot %u: signal %d",
			     s->id, s->length, g, plane, i, slot, number);
	}
	privatize(w, s, g, i);
	block_pats(s, g, i)[plane * group->slots + slot] = pat;
	for (u32 page = at / shape.page;
	     page <= (at + group->token_bytes - 1) / shape.page; page++)
		block_crcs(s, g, i)[plane * group->plane_pages + page] = 0;
	if (!is_state(g))
		s->named[i] = false;
	return true;
}

/* A sequence does not have this block, or not any more. */
static void check_gone(struct worker *w, const struct seq *s, u32 g, u32 i)
{
	int number = read_byte(address(w, s, g, below(w, shape.group[g].planes), i));

	w->counts[SIGNALS]++;
	if (number != SIGBUS)
		fail(w, "sequence %#x has %u tokens and can be read at group %u block %u",
		     s->id, s->length, g, i);
}

/* Blocks that it had when it was of @had tokens have left windows, or the end. */
static void check_left(struct worker *w, const struct seq *s, u32 had)
{
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end, had_first, had_end;

		span(g, had, &had_first, &had_end);
		span(g, s->length, &first, &end);
		if (had_first < had_end && had_first < first)
			check_gone(w, s, g, first < had_end ? first - 1 : had_first);
		if (had_end > end && end)
			check_gone(w, s, g, had_end - 1);
	}
}

/* Sequences */

static struct seq *pick(struct worker *w)
{
	u32 from = below(w, common->per_worker);

	for (u32 i = 0; i < common->per_worker; i++) {
		struct seq *s = &w->seq[(from + i) % common->per_worker];

		if (s->open)
			return s;
	}
	return NULL;
}

static struct seq *unused(struct worker *w)
{
	for (u32 i = 0; i < common->per_worker; i++)
		if (!w->seq[i].open)
			return &w->seq[i];
	return NULL;
}

static void begin(struct worker *w, struct seq *s, u32 id, u64 offset, u32 tenant)
{
	if (!id || offset % place_size || offset >= window_size)
		fail(w, "a new sequence %#x at %#llx", id,
		     (unsigned long long)offset);
	s->id = id;
	s->offset = offset;
	s->tenant = tenant;
	s->length = 0;
	s->torn = false;
	s->prompt = below(w, PROMPTS);
	s->on_prompt = true;
	s->open = true;
}

/* Let go of what @length tokens do not need. */
static void cut(struct seq *s, u32 length)
{
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end, keep_first, keep;

		span(g, s->length, &first, &end);
		span(g, length, &keep_first, &keep);
		for (u32 i = keep > first ? keep : first; i < end; i++)
			drop(s, g, i);
	}
	s->length = length;
}

/* The worker is done with what it has locked. A torn sequence goes. */
static void let_go(struct worker *w, struct seq *s)
{
	if (s->torn) {
		struct tensormem_kv_close request = { .sequence = s->id };
		int error = done(w, OP_CLOSE, s, 0, 0,
				 call(TENSORMEM_IOC_KV_CLOSE, &request));

		if (error)
			fail(w, "close: %s", strerror(error));
		cut(s, 0);
		s->open = false;
		s->torn = false;
	}
	pthread_mutex_unlock(&s->lock);
}

static void expect(struct worker *w, int error, int expected)
{
	if (error != expected)
		fail(w, "%s, expected %s", error ? strerror(error) : "done",
		     expected ? strerror(expected) : "done");
}

static struct seq *do_open(struct worker *w)
{
	struct tensormem_kv_open request = { .tenant = 1 + one_in(w, 4) };
	struct seq *s = unused(w);
	int error;

	/* The cache is full only if no other worker leaves some out. */
	if (!s && common->nr_workers > 1)
		return NULL;
	error = done(w, OP_OPEN, NULL, request.tenant, 0,
		     call(TENSORMEM_IOC_KV_OPEN, &request));
	expect(w, error, s ? 0 : ENOBUFS);
	if (!s)
		return NULL;
	pthread_mutex_lock(&s->lock);
	begin(w, s, request.sequence, request.offset, request.tenant - 1);
	pthread_mutex_unlock(&s->lock);
	return s;
}

static void do_close(struct worker *w, struct seq *s)
{
	struct tensormem_kv_close request = { .sequence = s->id };
	char *at;

	pthread_mutex_lock(&s->lock);
	at = address(w, s, 0, 0, 0);
	expect(w, done(w, OP_CLOSE, s, 0, 0,
		       call(TENSORMEM_IOC_KV_CLOSE, &request)), 0);
	cut(s, 0);
	s->open = false;
	if (exact && one_in(w, 8)) {
		w->counts[SIGNALS]++;
		if (read_byte(at) != SIGBUS)
			fail(w, "a closed sequence can be read");
	}
	expect(w, call(TENSORMEM_IOC_KV_CLOSE, &request), ENOENT);
	pthread_mutex_unlock(&s->lock);
}

/* What a token is in a plane: as everybody's with this prompt, or like no other. */
static u64 token(struct worker *w, const struct seq *s, u32 t, u32 g, u32 plane)
{
	if (!s->on_prompt)
		return roll(w) | 4;
	return mix((u64)s->prompt << 48 | (u64)t << 16 | g << 8 | plane) | 4;
}

/* Compute tokens: what an inference engine does after it has extended a sequence. */
static void compute(struct worker *w, struct seq *s, u32 from, u32 to)
{
	if (one_in(w, 8))
		s->on_prompt = false;
	for (u32 t = from; t < to; t++) {
		for (u32 g = 0; g < shape.nr_groups; g++) {
			u32 i = t / shape.block_tokens;

			if (is_state(g) || !holds(s, g, i))
				continue;
			for (u32 p = 0; p < shape.group[g].planes; p++)
				if (!store(w, s, g, i, p, t % shape.block_tokens,
					   token(w, s, t, g, p)))
					return;
		}
	}
	for (u32 g = 0; g < shape.nr_groups; g++)
		for (u32 p = 0; is_state(g) && p < shape.group[g].planes; p++)
			if (!store(w, s, g, 0, p, 0, roll(w) | 4))
				return;
}

/* What an extension to @length needs, beside what it gives back. */
static void need_extend(const struct seq *s, u32 length, struct need *n)
{
	u32 last = s->length / shape.block_tokens;

	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end, had, had_end;

		span(g, s->length, &had, &had_end);
		span(g, length, &first, &end);
		need(n, g, end - (first > had_end ? first : had_end));
		if (!is_state(g) && s->length % shape.block_tokens &&
		    last >= first && shared_block(s, g, last))
			need(n, g, 1);
	}
}

static void leave(struct seq *s, u32 length)
{
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end, keep, unused;

		span(g, s->length, &first, &end);
		span(g, length, &keep, &unused);
		for (; first < keep && first < end; first++)
			drop(s, g, first);
	}
}

/* The blocks that come; @leave() has been called. */
static void grow(struct worker *w, struct seq *s, u32 length)
{
	u32 had = s->length, last = had / shape.block_tokens;

	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end, unused, had_end;

		span(g, had, &unused, &had_end);
		span(g, length, &first, &end);
		if (!is_state(g) && had % shape.block_tokens && last >= first)
			privatize(w, s, g, last);
		for (u32 i = had_end; i < end; i++) {
			block_clear(s, g, i);
			if (!is_state(g))
				s->named[i] = false;
			if (i >= first)
				own(s, g, i);
		}
	}
	s->length = length;
}

#define BATCH	6

static u32 some_tokens(struct worker *w, const struct seq *s)
{
	u32 left = shape.max_tokens - s->length, most = shape.block_tokens * 4;
	u32 n = 1 + below(w, one_in(w, 3) ? 3 : most);

	/* The end of a block is where states are published, and blocks adopted. */
	if (one_in(w, 2))
		n += (shape.block_tokens - (s->length + n) % shape.block_tokens) %
		     shape.block_tokens;
	return n < left ? n : left;
}

/* Extend sequences, all locked. */
static void do_extend(struct worker *w, enum operation op, struct seq **seq, u32 nr)
{
	struct tensormem_kv_extend item[BATCH] = { 0 };
	struct tensormem_batch batch = {
		.items = (uintptr_t)item, .count = nr, .item_size = sizeof(item[0]),
	};
	struct need n = { 0 };
	u32 had[BATCH], bad = nr;
	int error, expected = 0;

	for (u32 i = 0; i < nr; i++) {
		item[i].sequence = seq[i]->id;
		item[i].tokens = some_tokens(w, seq[i]);
		had[i] = seq[i]->length;
		if (!item[i].tokens) {
			item[i].tokens = 1;
			bad = bad < i ? bad : i;
			expected = bad == i ? ERANGE : expected;
		}
	}
	if (nr > 1 && bad == nr && one_in(w, 12)) {
		bad = nr - 1;
		if (one_in(w, 2)) {
			item[bad].sequence = item[0].sequence;
			item[bad].tokens = 1;
			expected = EINVAL;
		} else {
			item[bad].sequence ^= 1 << 31;
			expected = ENOENT;
		}
	}
	for (u32 i = 0; i < bad; i++)
		need_extend(seq[i], seq[i]->length + item[i].tokens, &n);
	if (op == OP_EXTEND)
		error = call_with(w, TENSORMEM_IOC_KV_EXTEND, item, &n);
	else
		error = call_with(w, TENSORMEM_IOC_KV_EXTEND_BATCH, &batch, &n);
	done(w, op, seq[0], had[0], item[0].tokens, error);
	if (expected) {
		expect(w, error, expected);
		if (op == OP_BATCH && batch.failed != bad)
			fail(w, "item %u failed, expected %u", batch.failed, bad);
		return;
	}
	if (error == full_errno)
		return;
	expect(w, error, 0);
	for (u32 i = 0; i < nr; i++)
		leave(seq[i], had[i] + item[i].tokens);
	for (u32 i = 0; i < nr; i++) {
		grow(w, seq[i], had[i] + item[i].tokens);
		if (item[i].length != seq[i]->length)
			fail(w, "sequence %#x has %u tokens, expected %u",
			     seq[i]->id, item[i].length, seq[i]->length);
	}
	for (u32 i = 0; i < nr; i++) {
		struct seq *s = seq[i];
		u32 last = had[i] / shape.block_tokens;

		check_left(w, s, had[i]);
		for (u32 g = 0; g < shape.nr_groups; g++) {
			u32 first, end;

			span(g, s->length, &first, &end);
			if (!is_state(g) && first < last)
				first = last;
			for (; first < end; first++)
				check_block(w, s, g, first);
		}
		if (!one_in(w, 4))
			compute(w, s, had[i], s->length);
		else
			s->on_prompt = false;
	}
}

static void op_extend(struct worker *w, struct seq *s)
{
	do_extend(w, OP_EXTEND, &s, 1);
}

static void op_batch(struct worker *w)
{
	struct seq *seq[BATCH];
	u32 nr = 0, most = 2 + below(w, BATCH - 1);
	u32 step = 1 + below(w, 3);

	for (u32 i = 0; i < common->per_worker && nr < most; i += step)
		if (w->seq[i].open && (w->seq[i].length < shape.max_tokens ||
				       one_in(w, 16))) {
			seq[nr] = &w->seq[i];
			pthread_mutex_lock(&seq[nr++]->lock);
		}
	if (nr > 1)
		do_extend(w, OP_BATCH, seq, nr);
	while (nr--)
		let_go(w, seq[nr]);
}

/* Whether a sequence has all that its first @length tokens need. */
static bool has(const struct seq *s, u32 length)
{
	if (!length || length == s->length)
		return true;
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, had, end;

		span(g, length, &first, &end);
		span(g, s->length, &had, &end);
		if (is_state(g) || first < had)
			return false;
	}
	return true;
}

/* Some number of tokens: most often near the end, or at the end of a block. */
static u32 some_length(struct worker *w, const struct seq *s)
{
	u32 n = below(w, s->length + 1);

	if (one_in(w, 3))
		n = s->length;
	else if (one_in(w, 2) && s->length)
		n = s->length - below(w, s->length < 12 ? s->length : 12);
	return one_in(w, 3) ? n - n % shape.block_tokens : n;
}

static void op_truncate(struct worker *w, struct seq *s)
{
	u32 had = s->length, length = some_length(w, s);
	struct tensormem_kv_truncate request = {
		.sequence = s->id, .length = length,
	};
	int error = done(w, OP_TRUNCATE, s, s->length, length,
			 call(TENSORMEM_IOC_KV_TRUNCATE, &request));

	expect(w, error, has(s, length) ? 0 : ENODATA);
	if (error)
		return;
	cut(s, length);
	check_left(w, s, had);
	if (length % shape.block_tokens)
		for (u32 g = 0; g < shape.nr_groups; g++)
			if (!is_state(g))
				check_block(w, s, g, length / shape.block_tokens);
}

/* Fork @from, which is locked and of this worker or another. */
static void op_fork(struct worker *w, struct seq *from)
{
	struct seq *s = unused(w);
	u32 at = some_length(w, from), full = at / shape.block_tokens;
	struct tensormem_kv_fork request = { .sequence = from->id, .at = at };
	struct need n = { 0 };
	int error;

	if (!s && common->nr_workers > 1)
		return;
	for (u32 g = 0; g < shape.nr_groups; g++)
		if (is_state(g) ? at : at % shape.block_tokens)
			need(&n, g, 1);
	error = done(w, OP_FORK, from, from->length, at,
		     call_with(w, TENSORMEM_IOC_KV_FORK, &request, &n));
	if (!has(from, at)) {
		expect(w, error, ENODATA);
		return;
	}
	if (!s) {
		expect(w, error, ENOBUFS);
		return;
	}
	if (error == full_errno)
		return;
	expect(w, error, 0);
	w->counts[FORKED]++;
	pthread_mutex_lock(&s->lock);
	begin(w, s, request.child, request.offset, from->tenant);
	s->prompt = from->prompt;
	s->on_prompt = from->on_prompt;
	s->length = at;
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end;

		span(g, at, &first, &end);
		for (u32 i = 0; i < end; i++)
			block_copy(s, from, g, i);
		for (u32 i = first; i < end; i++) {
			struct entry *e = entry(from, g, i);

			if (is_state(g) || i == full) {
				own(s, g, i);
				continue;
			}
			e->kin = true;
			*entry(s, g, i) = *e;
			if (exact)
				e->id->refs++;
		}
	}
	for (u32 i = 0; i <= at / shape.block_tokens && i < shape.max_blocks; i++) {
		s->named[i] = i < full && from->named[i];
		s->name[i] = from->name[i];
	}
	check_seq(w, from);
	check_seq(w, s);
	let_go(w, s);
}

/* Fork what another worker has. */
static void fork_foreign(struct worker *w)
{
	struct worker *other = &common->worker[below(w, common->nr_workers)];
	struct seq *s = &other->seq[below(w, common->per_worker)];

	pthread_mutex_lock(&s->lock);
	if (s->open) {
		w->counts[FOREIGN] += other != w;
		op_fork(w, s);
	}
	/* Torn it is only in the hands of its worker. */
	pthread_mutex_unlock(&s->lock);
}

/* Prefixes */

/* The states are what goes with the tokens. Return: whether there was memory. */
static bool settle_state(struct worker *w, struct seq *s, const struct name *name)
{
	for (u32 g = 0; g < shape.nr_groups; g++)
		for (u32 p = 0; is_state(g) && p < shape.group[g].planes; p++)
			if (!store(w, s, g, 0, p, 0, state_pat(name, g, p)))
				return false;
	return true;
}

/* Blocks may be found from before they are published, and surely are from after. */
static void publish_records(struct seq *s, u32 first, u32 nr, bool at_end, bool done)
{
	pthread_mutex_lock(&registry->lock);
	for (u32 i = first; i < first + nr; i++) {
		struct record *r = registry_get(s, i);

		for (u32 g = 0; g < shape.nr_groups; g++) {
			bool state = at_end && i == first + nr - 1;

			if (!is_state(g) ? !holds(s, g, i) : !state)
				continue;
			r->state |= state;
			r->may[s->tenant] |= 1 << g;
			if (done)
				r->must[s->tenant] |= 1 << g;
		}
	}
	pthread_mutex_unlock(&registry->lock);
}

/* The blocks can be found now. */
static void publish_blocks(struct worker *w, struct seq *s, u32 first, u32 nr,
			   bool at_end)
{
	struct name parent = { 0 };

	for (u32 g = shape.nr_groups; first && g--;)
		if (!is_state(g) && holds(s, g, first - 1) &&
		    published(s, g, first - 1))
			parent = *published_name(s, g, first - 1);
	for (u32 i = first; i < first + nr; i++) {
		const struct name *name = &s->name[i];

		for (u32 g = 0; g < shape.nr_groups; g++) {
			struct entry *e = entry(s, g, i);
			struct key *key;

			if (exact)
				key = key_get(name, s->tenant, g);
			if (is_state(g)) {
				if (exact && at_end && i == first + nr - 1 &&
				    !key->found)
					expect_stored(w, s, g, i, name, &parent);
			} else if (holds(s, g, i) && !published(s, g, i)) {
				if (exact) {
					ident_link(e->id, key);
					expect_stored(w, s, g, i, name, &parent);
				}
				e->published = true;
				e->name = *name;
			}
		}
		parent = *name;
	}
}

static void op_publish(struct worker *w, struct seq *s)
{
	u32 full = s->length / shape.block_tokens, first, nr;
	struct tensormem_kv_hashes request = { .sequence = s->id };
	bool at_end, kin = false;
	struct need n = { 0 };
	int error, expected = 0;

	if (!full || private)
		return;
	first = one_in(w, 3) ? below(w, full) : 0;
	nr = one_in(w, 3) ? 1 + below(w, full - first) : full - first;
	at_end = (first + nr) * shape.block_tokens == s->length;
	for (u32 i = 0; i < first + nr; i++)
		seq_name(s, i);
	for (u32 i = first; i < first + nr; i++)
		for (u32 g = 0; g < shape.nr_groups; g++) {
			if (is_state(g) || !holds(s, g, i))
				continue;
			kin |= !exact && entry(s, g, i)->kin;
			if (published(s, g, i) &&
			    !same_name(published_name(s, g, i), &s->name[i]))
				expected = EINVAL;
		}
	if (at_end && !settle_state(w, s, &s->name[first + nr - 1]))
		return;
	take_events(w);
	for (u32 g = 0; g < shape.nr_groups; g++)
		if (at_end && is_state(g))
			need(&n, g, 1);
	if (!expected)
		publish_records(s, first, nr, at_end, false);
	request.first = first;
	request.count = nr;
	request.hashes = (uintptr_t)&s->name[first];
	error = done(w, OP_PUBLISH, s, first, nr,
		     call_with(w, TENSORMEM_IOC_KV_PUBLISH, &request, &n));
	if (error == full_errno || (error == EINVAL && kin))
		return;
	expect(w, error, expected);
	if (error)
		return;
	publish_blocks(w, s, first, nr, at_end);
	publish_records(s, first, nr, at_end, true);
	take_events(w);
	check_seq(w, s);
}

/* Whether each group has what the first @k blocks of the wish need. */
static bool can_match(u32 tenant, u32 k, bool (*found)(u32 tenant, u32 i, u32 g))
{
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end;

		span(g, k * shape.block_tokens, &first, &end);
		if (is_state(g)) {
			first = k - 1;
			end = k;
		}
		for (; first < end; first++)
			if (!found(tenant, first, g))
				return false;
	}
	return true;
}

static bool found_surely(u32 tenant, u32 i, u32 g)
{
	if (exact)
		return key_get(&wish.name[i], tenant, g)->found;
	return wish.must[i * TENANTS + tenant] >> g & 1;
}

static bool found_maybe(u32 tenant, u32 i, u32 g)
{
	if (exact)
		return found_surely(tenant, i, g);
	return record_may(&wish.name[i], tenant) >> g & 1;
}

static u32 longest_match(u32 tenant, u32 nr)
{
	u32 most = shape.max_tokens / shape.block_tokens;

	for (u32 k = nr < most ? nr : most; k; k--)
		if (can_match(tenant, k, found_surely))
			return k;
	return 0;
}

/* Several workers: what was published must be found while nothing was given up. */
static void check_match(struct worker *w, const struct seq *s, u32 matched,
			u32 least)
{
	if (exact && matched != least)
		fail(w, "%u blocks of %u match, expected %u", matched, wish.nr,
		     least);
	if (matched > wish.nr || (matched && !can_match(s->tenant, matched, found_maybe)))
		fail(w, "%u blocks of %u match: they were never published", matched,
		     wish.nr);
	if (matched < least && !info(w).evictions)
		fail(w, "%u blocks of %u match, expected %u", matched, wish.nr,
		     least);
}

/* A wish for a sequence: what another one is, or anything, or what nobody has. */
static void make_wish(struct worker *w)
{
	struct seq *like = one_in(w, 3) ? pick(w) : NULL;

	take_events(w);
	if (like) {
		pthread_mutex_lock(&like->lock);
		wish_like(like);
		pthread_mutex_unlock(&like->lock);
	} else {
		wish_random(w);
	}
	if (wish.nr && one_in(w, 8))
		wish_spoil(w, below(w, wish.nr));
}

static void op_peek(struct worker *w, struct seq *s)
{
	struct tensormem_kv_hashes request = {
		.sequence = s->id, .flags = TENSORMEM_KV_PEEK,
	};
	u32 least;

	make_wish(w);
	if (!wish.nr)
		return;
	request.count = wish.nr;
	request.hashes = (uintptr_t)wish.name;
	least = longest_match(s->tenant, wish.nr);
	expect(w, done(w, OP_PEEK, s, wish.nr, least,
		       call(TENSORMEM_IOC_KV_LOOKUP, &request)), 0);
	check_match(w, s, request.matched, least);
}

/* The sequence begins with @matched blocks of the wish now. */
static void begin_with(struct seq *s, u32 matched)
{
	s->length = matched * shape.block_tokens;
	s->on_prompt = false;
	for (u32 i = 0; i < matched; i++) {
		block_set(s, i, wish.pats + (size_t)i * shape.pats);
		s->name[i] = wish.name[i];
		s->named[i] = true;
	}
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end;

		span(g, s->length, &first, &end);
		for (u32 i = first; i < end; i++) {
			if (is_state(g)) {
				own(s, g, 0);
				state_set(s, g, &wish.name[matched - 1]);
			} else {
				own_found(s, g, i, &wish.name[i]);
			}
		}
	}
}

static void op_lookup(struct worker *w)
{
	struct tensormem_kv_hashes request = { 0 };
	struct need n = { 0 };
	struct seq *s;
	u32 least;
	int error;

	make_wish(w);
	if (!wish.nr)
		return;
	s = do_open(w);
	if (!s)
		return;
	pthread_mutex_lock(&s->lock);
	request.sequence = s->id;
	request.count = wish.nr;
	request.hashes = (uintptr_t)wish.name;
	least = longest_match(s->tenant, wish.nr);
	for (u32 g = 0; least && g < shape.nr_groups; g++) {
		u32 first, end;

		/* What is found is not given up; a state is found and copied. */
		span(g, least * shape.block_tokens, &first, &end);
		n.keep += (end - first) * shape.group[g].pages;
		if (is_state(g))
			need(&n, g, 1);
	}
	error = done(w, OP_LOOKUP, s, wish.nr, least,
		     call_with(w, TENSORMEM_IOC_KV_LOOKUP, &request, &n));
	if (error != full_errno) {
		expect(w, error, 0);
		check_match(w, s, request.matched, least);
		asked += wish.nr;
		hit += request.matched;
		w->counts[HITS] += request.matched;
		w->counts[MATCHED] += !!request.matched;
		begin_with(s, request.matched);
		for (u32 n = 1 + (w->reader ? below(w, 6) : 0); n--;)
			check_seq(w, s);
	}
	let_go(w, s);
}

/* What adopting block @i of the wish for all of a block's tokens or some returns. */
static int adopt_errno(const struct seq *s, u32 at, u32 i, u32 tokens)
{
	u32 full = s->length / shape.block_tokens;
	bool append = at == full && !(s->length % shape.block_tokens);
	bool partial = tokens < shape.block_tokens;
	u32 length = s->length + (append ? tokens : 0);

	if ((!append && at >= full) || (partial && !append))
		return -EINVAL;
	if (length > shape.max_tokens)
		return -ERANGE;
	for (u32 g = 0; g < shape.nr_groups; g++)
		if (is_state(g) && partial)
			return -EINVAL;
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end;

		/* A state goes with the block that is the last then. */
		span(g, length, &first, &end);
		if (is_state(g) ? at == (length - 1) / shape.block_tokens : at >= first)
			if (!found_surely(s->tenant, i, g))
				return -ENODATA;
	}
	return 0;
}

static void adopted(struct worker *w, struct seq *s, u32 at, u32 i, u32 tokens)
{
	bool append = at * shape.block_tokens == s->length;
	bool whole = tokens == shape.block_tokens;
	const struct name *name = &wish.name[i];
	u32 length = s->length;

	if (append) {
		leave(s, s->length + tokens);
		s->length += tokens;
		s->on_prompt = false;
	}
	for (u32 g = 0; g < shape.nr_groups; g++) {
		struct ident *had;

		if (is_state(g)) {
			if (at != (s->length - 1) / shape.block_tokens)
				continue;
			if (!length)
				own(s, g, 0);
			state_set(s, g, name);
		} else if (holds(s, g, at)) {
			had = append ? NULL : entry(s, g, at)->id;
			if (whole)
				own_found(s, g, at, name);
			else
				own(s, g, at);
			ident_put(had);
		}
	}
	block_set(s, at, wish.pats + (size_t)i * shape.pats);
	s->named[at] = whole;
	s->name[at] = *name;
	check_left(w, s, length);
	w->counts[ADOPTED]++;
}

static void op_adopt(struct worker *w, struct seq *s)
{
	u32 full = s->length / shape.block_tokens, at = full, i;
	struct tensormem_kv_adopt request = { .sequence = s->id };
	u32 tokens = shape.block_tokens;
	int error, expected;
	struct need n = { 0 };

	wish_random(w);
	take_events(w);
	if (!wish.nr)
		return;
	if (one_in(w, 16))
		wish_spoil(w, 0);
	i = below(w, wish.nr);
	if (one_in(w, 8) || (s->length % shape.block_tokens && full))
		at = below(w, full + one_in(w, 8));
	if (one_in(w, 3))
		tokens = 1 + below(w, shape.block_tokens);
	request.block = at;
	request.tokens = tokens == shape.block_tokens && one_in(w, 2) ? 0 : tokens;
	memcpy(&request.hash, &wish.name[i], sizeof(request.hash));
	expected = -adopt_errno(s, at, i, tokens);
	for (u32 g = 0; g < shape.nr_groups; g++) {
		n.keep += shape.group[g].pages;
		if (is_state(g) || tokens < shape.block_tokens)
			need(&n, g, 1);
	}
	error = done(w, OP_ADOPT, s, at, tokens,
		     call_with(w, TENSORMEM_IOC_KV_ADOPT, &request, &n));
	if (error == full_errno && (!expected || !exact))
		return;
	if (exact || expected == EINVAL || expected == ERANGE)
		expect(w, error, expected);
	else if (error && (error != ENODATA || (!expected && !info(w).evictions)))
		expect(w, error, expected);
	if (error)
		return;
	for (u32 g = 0; g < shape.nr_groups && !exact; g++)
		if (!is_state(g) && holds(s, g, at) && !found_maybe(s->tenant, i, g))
			fail(w, "adopted what was never published");
	adopted(w, s, at, i, tokens);
	if (request.length != s->length)
		fail(w, "%u tokens now, expected %u", request.length, s->length);
	check_seq(w, s);
}

/* The rest */

/* Tokens written long ago change: a copy, if anybody else can see them. */
static void op_rewrite(struct worker *w, struct seq *s)
{
	u32 blocks = (s->length + shape.block_tokens - 1) / shape.block_tokens;
	u32 i, slot, only = below(w, 2 * shape.nr_groups);

	if (!blocks)
		return;
	/* Beyond the last token, too: the rest of the block is there. */
	slot = below(w, shape.block_tokens);
	i = below(w, blocks);
	done(w, OP_REWRITE, s, i, slot, 0);
	for (u32 g = 0; g < shape.nr_groups; g++) {
		if (is_state(g) || !holds(s, g, i) ||
		    (only < shape.nr_groups && only != g))
			continue;
		for (u32 p = 0; p < shape.group[g].planes; p++)
			if (!store(w, s, g, i, p, slot,
				   one_in(w, 16) ? 0 : roll(w) | 4))
				return;
		check_block(w, s, g, i);
	}
}

static void op_state(struct worker *w, struct seq *s)
{
	if (!s->length)
		return;
	done(w, OP_STATE, s, 0, 0, 0);
	for (u32 g = 0; g < shape.nr_groups; g++) {
		if (!is_state(g))
			continue;
		for (u32 p = 0; p < shape.group[g].planes; p++)
			if (!store(w, s, g, 0, p, 0, roll(w) | 4))
				return;
		check_block(w, s, g, 0);
	}
}

static void op_pack(struct worker *w, struct seq *s, u32 flags)
{
	struct tensormem_kv_pack request = { .sequence = s->id, .flags = flags };
	struct need n = { 0 };
	u32 held = 0;
	int error;

	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end;

		span(g, s->length, &first, &end);
		held += end - first;
		n.pages += (end - first) * shape.group[g].pages;
	}
	error = call_with(w, TENSORMEM_IOC_KV_PACK, &request, &n);
	done(w, flags ? OP_UNPACK : OP_PACK, s, request.blocks, request.after, error);
	if (flags && error == full_errno)
		return;
	expect(w, error, 0);
	if (request.blocks > held ||
	    (!flags && request.blocks && request.after >= request.before))
		fail(w, "%u blocks of %u packed from %llu to %llu bytes",
		     request.blocks, held, (unsigned long long)request.before,
		     (unsigned long long)request.after);
	if (!flags)
		w->counts[PACKED] += request.blocks;
	/* Else the next operation meets packed blocks. */
	if (flags || one_in(w, 2))
		check_seq(w, s);
}

/* Touch what a sequence does not have. */
static void op_poke(struct worker *w, struct seq *s)
{
	u32 g = below(w, shape.nr_groups), first, end, i;
	const struct group *last = &shape.group[shape.nr_groups - 1];
	u64 all = last->offset + last->stride * last->planes;
	const char *at = maps[0] + s->offset + all;

	span(g, s->length, &first, &end);
	i = first && one_in(w, 2) ? below(w, first) : end;
	if (i < (is_state(g) ? 1 : shape.max_blocks)) {
		done(w, OP_POKE, s, g, i, 0);
		check_gone(w, s, g, i);
		return;
	}
	if (all == place_size)
		return;
	done(w, OP_POKE, s, g, i, 0);
	w->counts[SIGNALS]++;
	if (read_byte(at) != SIGBUS)
		fail(w, "the rest of the place of sequence %#x can be read", s->id);
}

/* What is refused changes nothing. */
static void op_bad(struct worker *w, struct seq *s)
{
	u32 full = s->length / shape.block_tokens, kind = below(w, 11);
	struct tensormem_kv_extend extend = { .sequence = s->id, .tokens = 1 };
	struct tensormem_kv_truncate truncate = { .sequence = s->id };
	struct tensormem_kv_fork fork = { .sequence = s->id };
	struct tensormem_kv_close close = { .sequence = s->id };
	struct name noise[2] = { { { roll(w) & ~1ull } } };
	struct tensormem_kv_hashes hashes = {
		.sequence = s->id, .count = 1, .hashes = (uintptr_t)noise,
	};
	struct tensormem_kv_adopt adopt = { .sequence = s->id };
	int error, expected = EINVAL;

	switch (kind) {
	case 0:
		extend.tokens = 0;
		error = call(TENSORMEM_IOC_KV_EXTEND, &extend);
		break;
	case 1:
		extend.tokens = shape.max_tokens - s->length + 1 +
				(one_in(w, 2) ? 0 : roll(w) >> 33);
		error = call(TENSORMEM_IOC_KV_EXTEND, &extend);
		expected = ERANGE;
		break;
	case 2:
		extend.sequence += 1 << 16;
		error = call(TENSORMEM_IOC_KV_EXTEND, &extend);
		expected = ENOENT;
		break;
	case 3:
		truncate.length = s->length + 1;
		error = call(TENSORMEM_IOC_KV_TRUNCATE, &truncate);
		break;
	case 4:
		fork.at = s->length + 1 + below(w, 3);
		error = call(TENSORMEM_IOC_KV_FORK, &fork);
		break;
	case 5:
		fork.sequence = s->id & 0xffff;
		error = call(TENSORMEM_IOC_KV_FORK, &fork);
		expected = ENOENT;
		break;
	case 6:
		close.sequence += 1 << 16;
		error = call(TENSORMEM_IOC_KV_CLOSE, &close);
		expected = ENOENT;
		break;
	case 7:
		error = call(TENSORMEM_IOC_KV_LOOKUP, &hashes);
		asked += !s->length;
		expected = s->length ? EINVAL : 0;
		break;
	case 8:
		hashes.first = full;
		error = call(TENSORMEM_IOC_KV_PUBLISH, &hashes);
		break;
	case 9:
		hashes.count = 0;
		error = call(TENSORMEM_IOC_KV_PUBLISH, &hashes);
		break;
	default:
		adopt.block = full;
		memcpy(&adopt.hash, noise, sizeof(adopt.hash));
		error = call(TENSORMEM_IOC_KV_ADOPT, &adopt);
		if (!(s->length % shape.block_tokens))
			expected = shape.block_tokens > shape.max_tokens - s->length ?
					   ERANGE : ENODATA;
	}
	done(w, OP_BAD, s, kind, s->length, error);
	expect(w, error, expected);
}

/* A mapping that was read-only for a while must not give away what is shared. */
static void op_protect(struct worker *w, struct seq *s)
{
	char *at = maps[below(w, nr_maps)] + s->offset;

	done(w, OP_PROTECT, s, 0, 0, 0);
	check_seq(w, s);
	if (mprotect(at, place_size, PROT_READ))
		fail(w, "mprotect: %s", strerror(errno));
	check_seq(w, s);
	if (s->length && holds(s, 0, 0)) {
		w->counts[SIGNALS]++;
		if (write_words((u64 *)(at + shape.group[0].offset), 1, ~0ull) != SIGSEGV)
			fail(w, "a read-only mapping can be written");
	}
	if (mprotect(at, place_size, PROT_READ | PROT_WRITE))
		fail(w, "mprotect: %s", strerror(errno));
}

static void op_query(struct worker *w, struct seq *s)
{
	struct tensormem_kv_query query = { .sequence = s->id };
	u64 pages = 0, others = 0;
	bool unsure = !exact;

	expect(w, done(w, OP_QUERY, s, 0, 0, call(TENSORMEM_IOC_KV_QUERY, &query)), 0);
	for (u32 g = 0; g < shape.nr_groups; g++) {
		u32 first, end;

		span(g, s->length, &first, &end);
		for (; first < end; first++) {
			const struct ident *id = entry(s, g, first)->id;

			pages += shape.group[g].pages;
			if (exact && id->refs > 1)
				others += shape.group[g].pages;
			unsure |= exact && id->key && id->key->unsure;
		}
	}
	if (query.length != s->length || query.offset != s->offset ||
	    query.held - query.packed + query.unpacked != pages * shape.page)
		fail(w, "a query says length %u offset %#llx held %llu packed %llu unpacked %llu; expected %u, %#llx, %llu",
		     query.length, (unsigned long long)query.offset,
		     (unsigned long long)query.held,
		     (unsigned long long)query.packed,
		     (unsigned long long)query.unpacked, s->length,
		     (unsigned long long)s->offset,
		     (unsigned long long)pages * shape.page);
	if (query.shared > query.held ||
	    (!unsure && !query.packed && query.shared != others * shape.page))
		fail(w, "a query says shared %llu, expected %llu",
		     (unsigned long long)query.shared,
		     (unsigned long long)others * shape.page);
}

/* Return: whether there was one. */
static bool close_one(struct worker *w)
{
	struct seq *s = pick(w);

	if (s)
		do_close(w, s);
	return s;
}

static void close_all(struct worker *w)
{
	while (close_one(w))
		;
}

/* One worker: what counters say. */
static void check_counts(struct worker *w)
{
	struct tensormem_kv_info i;
	u64 used, least, most, open = 0;

	take_events(w);
	i = info(w);
	for (u32 n = 0; n < common->per_worker; n++)
		open += w->seq[n].open;
	if (i.sequences != open || i.lookups != asked || i.hits != hit ||
	    i.evictions != evicted || i.events_lost)
		fail(w, "%u sequences, %llu of %llu found, %llu evictions, %llu events lost; expected %llu, %llu of %llu, %llu, 0",
		     i.sequences, (unsigned long long)i.hits,
		     (unsigned long long)i.lookups, (unsigned long long)i.evictions,
		     (unsigned long long)i.events_lost, (unsigned long long)open,
		     (unsigned long long)hit, (unsigned long long)asked,
		     (unsigned long long)evicted);
	/* What is packed may be in use or cached. */
	used = i.used - i.cached;
	least = in_use * shape.page;
	most = (in_use + in_use_unsure) * shape.page;
	if (used > most || used + i.unpacked - i.packed < least ||
	    i.used > i.held || i.held > i.limit)
		fail(w, "%llu bytes used, %llu cached, %llu held of %llu, %llu packed from %llu; expected %llu to %llu in use",
		     (unsigned long long)i.used, (unsigned long long)i.cached,
		     (unsigned long long)i.held, (unsigned long long)i.limit,
		     (unsigned long long)i.packed, (unsigned long long)i.unpacked,
		     (unsigned long long)least, (unsigned long long)most);
}

/* Much is free then, here and there: pages are moved together. */
static void op_wane(struct worker *w)
{
	for (u32 i = 0; i < common->per_worker; i++)
		if (w->seq[i].open && !one_in(w, 4))
			do_close(w, &w->seq[i]);
}

static void op_reset(struct worker *w)
{
	struct tensormem_kv_reset request = { 0 };
	bool empty = true;
	int error;

	if (exact && one_in(w, 16))
		close_all(w);
	for (u32 i = 0; i < common->per_worker; i++)
		empty &= !w->seq[i].open || !w->seq[i].length;
	/* Of others' it would be the end. */
	if (empty && !exact)
		return;
	error = done(w, OP_RESET, NULL, 0, 0, call(TENSORMEM_IOC_KV_RESET, &request));
	expect(w, error, empty ? 0 : EBUSY);
	w->counts[RESETS] += !error;
	if (exact)
		check_counts(w);
}

static void with_one(struct worker *w, void (*op)(struct worker *w, struct seq *s))
{
	struct seq *s = pick(w);

	if (!s)
		return;
	pthread_mutex_lock(&s->lock);
	op(w, s);
	let_go(w, s);
}

static void pack(struct worker *w, struct seq *s)
{
	op_pack(w, s, 0);
}

static void unpack(struct worker *w, struct seq *s)
{
	op_pack(w, s, TENSORMEM_KV_UNPACK);
}

static void operate(struct worker *w, enum operation op)
{
	static void (* const ops[OPS])(struct worker *w, struct seq *s) = {
		[OP_EXTEND] = op_extend, [OP_TRUNCATE] = op_truncate,
		[OP_PUBLISH] = op_publish, [OP_PEEK] = op_peek,
		[OP_ADOPT] = op_adopt, [OP_REWRITE] = op_rewrite,
		[OP_STATE] = op_state, [OP_PACK] = pack, [OP_UNPACK] = unpack,
		[OP_POKE] = op_poke, [OP_BAD] = op_bad, [OP_PROTECT] = op_protect,
		[OP_QUERY] = op_query, [OP_FORK] = op_fork,
	};
	u64 refused = w->counts[REFUSED];

	/* Mostly there is a place for one more. */
	if ((op == OP_OPEN || op == OP_FORK || op == OP_LOOKUP) && !unused(w) &&
	    one_in(w, 2))
		close_one(w);

	if (op == OP_OPEN)
		do_open(w);
	else if (op == OP_CLOSE)
		close_one(w);
	else if (op == OP_BATCH)
		op_batch(w);
	else if (op == OP_LOOKUP)
		op_lookup(w);
	else if (op == OP_RESET)
		op_reset(w);
	else if (op == OP_WANE)
		op_wane(w);
	else if (op == OP_FORK && common->nr_workers > 1 && one_in(w, 2))
		fork_foreign(w);
	else if (ops[op])
		with_one(w, ops[op]);
	/* Room for the next ones. */
	if (refused != w->counts[REFUSED] && one_in(w, 4))
		close_one(w);
}

/* One block of the worker's, the next one each time. */
static void check_next(struct worker *w)
{
	struct seq *s = &w->seq[w->turn_seq];
	u32 i = w->turn_block++;

	if (!s->open || i * shape.block_tokens >= s->length) {
		w->turn_seq = (w->turn_seq + 1) % common->per_worker;
		w->turn_block = 0;
		return;
	}
	/* A state comes with the first block. */
	for (u32 g = 0; g < shape.nr_groups; g++)
		if (is_state(g) ? !i : holds(s, g, i))
			check_block(w, s, g, i);
}

/* Several workers have stopped: one looks at what all of them have. */
static void check_all(struct worker *w)
{
	struct tensormem_kv_info i = info(w);
	u64 open = 0, most = 0;

	for (u32 n = 0; n < common->nr_workers; n++) {
		struct worker *other = &common->worker[n];

		for (u32 k = 0; k < common->per_worker; k++) {
			struct seq *s = &other->seq[k];

			if (!s->open)
				continue;
			open++;
			check_seq(w, s);
			for (u32 g = 0; g < shape.nr_groups; g++) {
				u32 first, end;

				span(g, s->length, &first, &end);
				most += (u64)(end - first) * shape.group[g].pages;
			}
		}
	}
	if (i.sequences != open || i.used - i.cached > most * shape.page ||
	    i.used > i.held || i.held > i.limit)
		fail(w, "%u sequences, %llu bytes used, %llu cached, %llu held of %llu; expected %llu sequences, at most %llu bytes in use",
		     i.sequences, (unsigned long long)i.used,
		     (unsigned long long)i.cached, (unsigned long long)i.held,
		     (unsigned long long)i.limit, (unsigned long long)open,
		     (unsigned long long)most * shape.page);
}

static void meet(struct worker *w)
{
	if (common->nr_workers == 1)
		return;
	pthread_barrier_wait(&common->barrier);
	if (!w->number)
		check_all(w);
	pthread_barrier_wait(&common->barrier);
}

static enum operation some_op(struct worker *w)
{
	const unsigned char *weights = w->reader ? reader_weights : writer_weights;
	u32 sum = 0, at;

	for (u32 i = 0; i < OPS; i++)
		sum += weights[i];
	at = below(w, sum);
	for (u32 i = 0; ; i++) {
		if (at < weights[i])
			return i;
		at -= weights[i];
	}
}

static void *work(void *argument)
{
	struct worker *w = argument;

	current = w;
	wish_init();
	for (w->step = 0; w->step < steps; w->step++) {
		operate(w, some_op(w));
		check_next(w);
		w->counts[STEPS]++;
		if (exact && w->step % 64 == 63)
			check_counts(w);
		if (w->step % ROUND == ROUND - 1)
			meet(w);
	}
	meet(w);
	close_all(w);
	return NULL;
}

/* Shapes */

static void add_group(u32 rule, u32 planes, u32 token_bytes, u32 window, u32 element)
{
	shape.group[shape.nr_groups++] = (struct group){
		.rule = rule, .planes = planes, .token_bytes = token_bytes,
		.window = window, .element = element,
	};
}

static void shape_choose(const char *name)
{
	u32 eighth = shape.page / 8;

	shape.name = name;
	shape.block_tokens = 8;
	shape.ask_tokens = 8;
	shape.max_blocks = 16;
	if (!strcmp(name, "full")) {
		shape.ask_tokens = 0;
		add_group(TENSORMEM_KV_FULL, 2, eighth, 0, 2);
	} else if (!strcmp(name, "window")) {
		add_group(TENSORMEM_KV_FULL, 1, eighth, 0, 4);
		add_group(TENSORMEM_KV_WINDOW, 2, eighth, 20, 2);
	} else if (!strcmp(name, "state")) {
		add_group(TENSORMEM_KV_FULL, 2, eighth, 0, 2);
		add_group(TENSORMEM_KV_STATE, 1, shape.page * 3 / 2, 0, 4);
	} else if (!strcmp(name, "groups")) {
		add_group(TENSORMEM_KV_WINDOW, 1, eighth, 8, 1);
		add_group(TENSORMEM_KV_FULL, 1, 2 * eighth, 0, 2);
		add_group(TENSORMEM_KV_STATE, 2, 72, 0, 8);
		add_group(TENSORMEM_KV_WINDOW, 2, eighth, 33, 0);
	} else if (!strcmp(name, "large")) {
		add_group(TENSORMEM_KV_FULL, 4, 2 * eighth, 0, 4);
	} else if (!strcmp(name, "odd")) {
		/* No power of two but the tokens of a block: 3 pages a plane. */
		shape.block_tokens = 512;
		shape.ask_tokens = 0;
		shape.max_blocks = 5;
		add_group(TENSORMEM_KV_FULL, 1, shape.page / 512 * 3, 0, 8);
	} else {
		errx(2, "no such shape: %s", name);
	}
	/* The last block is never full. */
	shape.max_tokens = shape.max_blocks * shape.block_tokens - 3;
}

/* The pages that a sequence can have. */
static u64 seq_pages(void)
{
	u64 pages = 0;

	for (u32 i = 0; i < shape.nr_groups; i++) {
		u32 first, end;

		span(i, shape.max_tokens, &first, &end);
		pages += (end - first) * shape.group[i].pages;
	}
	return pages;
}

static void create(bool quota)
{
	struct tensormem_kv_group groups[GROUPS] = { 0 };
	struct tensormem_kv_create request = {
		.groups = (uintptr_t)groups,
		.nr_groups = shape.nr_groups,
		.group_size = sizeof(groups[0]),
		.max_tokens = shape.max_tokens,
		.max_sequences = shape.max_seqs,
		.block_tokens = shape.ask_tokens,
		.flags = TENSORMEM_KV_EVENTS,
		.limit = shape.limit,
	};
	struct tensormem_quota bytes = { .bytes = shape.quota };
	struct tensormem_kv_info i = {
		.groups = (uintptr_t)groups,
		.nr_groups = GROUPS,
		.group_size = sizeof(groups[0]),
	};
	u32 smallest = ~0u;

	if (quota && ioctl(client, TENSORMEM_IOC_SET_QUOTA, &bytes))
		err(1, "quota");
	for (u32 n = 0; n < shape.nr_groups; n++) {
		const struct group *g = &shape.group[n];

		groups[n] = (struct tensormem_kv_group){
			.rule = g->rule, .planes = g->planes,
			.token_bytes = g->token_bytes, .window = g->window,
			.element = g->element,
		};
		smallest = g->pages < smallest ? g->pages : smallest;
	}
	if (ioctl(client, TENSORMEM_IOC_KV_CREATE, &request))
		err(1, "create");
	kv = request.fd;
	if (fcntl(kv, F_SETFL, O_NONBLOCK))
		err(1, "O_NONBLOCK");
	memset(groups, 0, sizeof(groups));
	if (ioctl(kv, TENSORMEM_IOC_KV_INFO, &i))
		err(1, "info");
	if (i.nr_groups != shape.nr_groups || i.block_tokens != shape.block_tokens ||
	    i.max_tokens != shape.max_tokens || i.max_sequences != shape.max_seqs ||
	    i.used || i.held || i.sequences)
		errx(1, "the cache is not as created");
	for (u32 n = 0; n < shape.nr_groups; n++)
		if (groups[n].offset != shape.group[n].offset ||
		    groups[n].stride != shape.group[n].stride)
			errx(1, "group %u lies at %llu, %llu apart; expected %llu, %llu",
			     n, (unsigned long long)groups[n].offset,
			     (unsigned long long)groups[n].stride,
			     (unsigned long long)shape.group[n].offset,
			     (unsigned long long)shape.group[n].stride);
	window_size = i.window_size;
	place_size = i.sequence_size;
	most_pages = (quota ? shape.quota : i.limit) / shape.page;
	/* Packed blocks leave room for others: twice as many, but not more than pages. */
	most_blocks = i.limit / shape.page / smallest * (smallest > 1 ? 2 : 1);
}

static void map(void)
{
	for (u32 n = 0; n < nr_maps; n++) {
		maps[n] = mmap(NULL, window_size, PROT_READ | PROT_WRITE, MAP_SHARED,
			       kv, 0);
		if (maps[n] == MAP_FAILED)
			err(1, "mmap");
	}
}

/* Threads of one process; those of others came before. */
static void run_threads(u32 first, u32 nr)
{
	pthread_t thread[MAX_WORKERS];

	for (u32 i = 0; i < nr; i++)
		if (pthread_create(&thread[i], NULL, work, &common->worker[first + i]))
			errx(1, "pthread_create");
	for (u32 i = 0; i < nr; i++)
		pthread_join(thread[i], NULL);
}

static void run(u32 processes, u32 threads)
{
	bool good = true;
	int status;

	for (u32 p = 0; p < processes; p++) {
		pid_t pid = fork();

		if (pid < 0)
			err(1, "fork");
		if (pid)
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* What is inherited works as well; the last one has its own. */
		if (p)
			map();
		run_threads(p * threads, threads);
		exit(0);
	}
	while (wait(&status) > 0) {
		if (!status)
			continue;
		good = false;
		/* The others wait for it in vain. */
		signal(SIGTERM, SIG_IGN);
		kill(0, SIGTERM);
	}
	if (!good)
		exit(1);
}

/* Nothing is left when all sequences are closed and all names forgotten. */
static void check_end(void)
{
	struct tensormem_kv_reset reset = { 0 };
	struct worker *w = &common->worker[0];
	struct tensormem_kv_info i = info(w);
	struct tensormem_info all;

	if (i.sequences || i.used != i.cached)
		fail(w, "in the end: %u sequences, %llu bytes used, %llu cached",
		     i.sequences, (unsigned long long)i.used,
		     (unsigned long long)i.cached);
	expect(w, call(TENSORMEM_IOC_KV_RESET, &reset), 0);
	i = info(w);
	if (i.used || i.held || i.packed || i.unpacked)
		fail(w, "after a reset: %llu bytes used, %llu held, %llu packed from %llu",
		     (unsigned long long)i.used, (unsigned long long)i.held,
		     (unsigned long long)i.packed, (unsigned long long)i.unpacked);
	if (ioctl(client, TENSORMEM_IOC_INFO, &all) || all.used)
		fail(w, "the client still holds %llu bytes",
		     (unsigned long long)all.used);
}

static void report(void)
{
	struct tensormem_kv_info i = info(&common->worker[0]);
	u64 sum[COUNTS] = { 0 };

	for (u32 w = 0; w < common->nr_workers; w++)
		for (u32 n = 0; n < COUNTS; n++)
			sum[n] += common->worker[w].counts[n];
	printf("{");
	for (u32 n = 0; n < COUNTS; n++)
		printf("\"%s\": %llu, ", count_names[n], (unsigned long long)sum[n]);
	printf("\"copies\": %llu, \"evictions\": %llu, \"packs\": %llu, \"unpacks\": %llu, \"moved\": %llu}\n",
	       (unsigned long long)i.copies, (unsigned long long)i.evictions,
	       (unsigned long long)i.packs, (unsigned long long)i.unpacks,
	       (unsigned long long)i.moved);
}

static u64 number(const char *text)
{
	char *end;
	u64 value = strtoull(text, &end, 0);

	if (!*text || *end)
		errx(2, "not a number: %s", text);
	return value;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "shape", required_argument, NULL, 'n' },
		{ "seed", required_argument, NULL, 's' },
		{ "steps", required_argument, NULL, 'c' },
		{ "threads", required_argument, NULL, 't' },
		{ "processes", required_argument, NULL, 'p' },
		{ "maps", required_argument, NULL, 'm' },
		{ "reader", no_argument, NULL, 'r' },
		{ "private", no_argument, NULL, 'v' },
		{ "tight", no_argument, NULL, 'l' },
		{ "quota", no_argument, NULL, 'q' },
		{ 0 },
	};
	struct sigaction action = {
		.sa_sigaction = on_signal, .sa_flags = SA_NODEFER | SA_SIGINFO,
	};
	u32 processes = 1, threads = 1;
	const char *name = "full";
	bool reader = false, quota = false;
	struct tensormem_info i;
	u64 pages, chunk;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'n')
			name = optarg;
		else if (c == 's')
			seed = number(optarg);
		else if (c == 'c')
			steps = number(optarg);
		else if (c == 't')
			threads = number(optarg);
		else if (c == 'p')
			processes = number(optarg);
		else if (c == 'm')
			nr_maps = number(optarg);
		else if (c == 'r')
			reader = true;
		else if (c == 'v')
			private = true;
		else if (c == 'l')
			tight = true;
		else if (c == 'q')
			quota = true;
		else
			return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	setpgid(0, 0);
	client = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	if (client < 0 || ioctl(client, TENSORMEM_IOC_INFO, &i))
		err(1, "%s", TENSORMEM_DEVICE);
	shape.page = i.page_size;
	shape.chunk = i.chunk_size;
	shape_choose(name);
	shape_finish();

	if (!nr_maps || nr_maps > MAX_MAPS)
		errx(2, "1 to %u mappings", MAX_MAPS);
	common = shared(sizeof(*common));
	common->nr_workers = processes * threads;
	if (!common->nr_workers || common->nr_workers > MAX_WORKERS)
		errx(2, "1 to %u workers", MAX_WORKERS);
	exact = common->nr_workers == 1;
	/* Sequences that want three times the chunks that there are. */
	pages = seq_pages();
	chunk = shape.chunk / shape.page;
	common->per_worker = 3 * chunk / pages / common->nr_workers;
	if (common->per_worker > MAX_PLACES || !(tight || quota))
		common->per_worker = MAX_PLACES / common->nr_workers;
	if (common->per_worker < 6)
		common->per_worker = 6;
	shape.max_seqs = common->per_worker * common->nr_workers;
	pages = pages * shape.max_seqs / 3 / chunk;
	shape.quota = (pages ? pages : 1) * shape.chunk;
	if (tight)
		shape.limit = shape.quota;
	if (quota) {
		tight = true;
		full_errno = EDQUOT;
	}

	pthread_barrierattr_t attr;

	pthread_barrierattr_init(&attr);
	pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_barrier_init(&common->barrier, &attr, common->nr_workers);
	registry_init();
	for (u32 n = 0; n < common->nr_workers; n++) {
		struct worker *w = &common->worker[n];

		w->number = n;
		w->dice = mix(seed * MAX_WORKERS + n);
		w->reader = reader && n && n == common->nr_workers - 1;
		for (u32 k = 0; k < common->per_worker; k++)
			seq_init(&w->seq[k]);
	}
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	create(quota);
	map();
	run(processes, threads);
	check_end();
	report();
	return 0;
}
