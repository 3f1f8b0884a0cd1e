// SPDX-License-Identifier: GPL-2.0-only
/*
 * Threads of several processes allocate from arenas of the RT pool, some are killed at it, and
 * every byte of every block is its owner's.
 *
 *	rt_stress [--deeds N] [--workers W] [--victims V] [--threads T] [--arenas A] [--seed S]
 *
 * Each thread is a client of one arena. It fills each block it gets with a pattern that no other block
 * has, and looks for it before it frees the block, after it was moved, too. Workers do so many deeds; victims do
 * the same until they are killed, and others take their place. On any byte that is not its owner's, any errno
 * that has no reason, any refusal of what was reserved, it says so and exits with 1; else it prints its counts.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

typedef uint32_t u32;
typedef uint64_t u64;

#define MAX_ARENAS	4
#define MAX_THREADS	8
#define MAX_PROCESSES	8
#define HELD		40
#define CLASSES		3
#define MOVABLE_BLOCKS	256
#define RETRIES		500	/* looks at an arena, 10 ms apart, until who was killed is gone */

enum count {
	DEEDS, ALLOCS, RESERVED, MOVABLE, BATCHES, REFUSED, TIMED_OUT, IN_TIME, PINS, MOVED,
	ADMITTED, REJOINED, KILLED, COUNTS
};

static const char * const count_names[COUNTS] = {
	"deeds", "allocs", "reserved", "movable", "batches", "refused", "timed_out", "in_time", "pins",
	"moved", "admitted", "rejoined", "killed",
};

/* What all processes share. */
struct common {
	atomic_bool failed;
	atomic_bool stop;
	atomic_uint next;	/* number of a thread: what its patterns begin with */
	atomic_ullong count[COUNTS];
};

struct arena {
	int fd;
	char *map;
	size_t size;
};

struct block {
	u32 handle;
	u32 size;
	u64 offset;	/* where it was when it was pinned last */
	u64 tag;
	u32 class;	/* + 1; 0: none */
	bool movable;
	bool pinned;
};

struct class {
	u32 size;
	u32 count;
	u32 used;
};

struct thread {
	struct arena *arena;
	int fd;
	bool victim;	/* has no end of its own */
	u32 number;
	u32 serial;
	u64 dice;
	struct block block[HELD];
	u32 nr_blocks;
	struct class class[CLASSES];
};

static struct common *common;
static struct arena arena[MAX_ARENAS];
static u32 nr_arenas = 2;
static u32 nr_threads = 2;
static u32 granule;
static u64 deeds = 2000;
static int device;

static u64 mix(u64 x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static u64 roll(struct thread *t)
{
	return mix(t->dice += 0x9e3779b97f4a7c15ull);
}

static void did(enum count what)
{
	atomic_fetch_add_explicit(&common->count[what], 1, memory_order_relaxed);
}

__attribute__((format(printf, 2, 3), noreturn))
static void fail(const struct thread *t, const char *format, ...)
{
	va_list list;

	atomic_store(&common->failed, true);
	atomic_store(&common->stop, true);
	fprintf(stderr, "thread %u, block %u: ", t ? t->number : 0, t ? t->serial : 0);
	va_start(list, format);
	vfprintf(stderr, format, list);
	va_end(list);
	fputc('\n', stderr);
	_exit(1);
}

static u64 now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* Patterns. */

static u64 word(const struct block *b, u32 i)
{
	return mix(b->tag + i);
}

static void fill(struct thread *t, struct block *b)
{
	u64 *at = (u64 *)(t->arena->map + b->offset);

	for (u32 i = 0; i < b->size / 8; i++)
		at[i] = word(b, i);
}

static void check(struct thread *t, const struct block *b)
{
	const u64 *at = (const u64 *)(t->arena->map + b->offset);

	for (u32 i = 0; i < b->size / 8; i++)
		if (at[i] != word(b, i))
			fail(t, "handle %#x at %#llx: word %u of %u is %#llx and not %#llx (%s, %s)",
			     b->handle, (unsigned long long)b->offset, i, b->size / 8,
			     (unsigned long long)at[i], (unsigned long long)word(b, i),
			     b->movable ? "movable" : "fixed", b->class ? "reserved" : "heap");
}

/* Clients. */

static void join(struct thread *t)
{
	struct tensormem_rt_open item = {
		.arena = t->arena->fd, .priority = roll(t) % 100,
	};

	if (ioctl(device, TENSORMEM_IOC_RT_OPEN, &item))
		fail(t, "joining: %s", strerror(errno));
	t->fd = item.fd;
	t->nr_blocks = 0;
	memset(t->class, 0, sizeof(t->class));
}

/* With whatever it has. */
static void rejoin(struct thread *t)
{
	close(t->fd);
	join(t);
	did(REJOINED);
}

/* Blocks. */

static struct block *keep(struct thread *t, const struct tensormem_rt_alloc *item, u32 class)
{
	struct block *b = &t->block[t->nr_blocks++];

	*b = (struct block){
		.handle = item->handle, .size = item->size, .offset = item->offset,
		.tag = (u64)t->number << 40 | (u64)t->serial++ << 16,
		.class = class, .movable = item->flags & TENSORMEM_RT_MOVABLE, .pinned = true,
	};
	if (!b->handle || b->offset + b->size > t->arena->size || b->offset % granule)
		fail(t, "handle %#x, offset %#llx", b->handle, (unsigned long long)b->offset);
	if (class)
		t->class[class - 1].used++;
	fill(t, b);
	did(ALLOCS);
	return b;
}

static void let_move(struct thread *t, struct block *b)
{
	struct tensormem_rt_block item = { .handle = b->handle };

	if (!b->movable || !b->pinned || roll(t) % 8 == 0)
		return;
	if (ioctl(t->fd, TENSORMEM_IOC_RT_UNPIN, &item))
		fail(t, "unpin: %s", strerror(errno));
	b->pinned = false;
}

static void hold(struct thread *t, struct block *b)
{
	struct tensormem_rt_block item = { .handle = b->handle };

	if (b->pinned)
		return;
	if (ioctl(t->fd, TENSORMEM_IOC_RT_PIN, &item))
		fail(t, "pin: %s", strerror(errno));
	if (item.offset != b->offset)
		did(MOVED);
	b->offset = item.offset;
	b->pinned = true;
	did(PINS);
}

/* The class with the smallest blocks that serves a size; + 1. */
static u32 class_of(const struct thread *t, u32 size)
{
	u32 best = 0;

	for (u32 i = 0; i < CLASSES; i++)
		if (t->class[i].count && t->class[i].size >= size &&
		    (!best || t->class[i].size < t->class[best - 1].size))
			best = i + 1;
	return best;
}

static u32 any_size(struct thread *t, bool movable)
{
	static const u32 limits[] = { 64, 256, 4096, 16000, 60000, 250000 };
	u32 limit = limits[roll(t) % (movable ? 4 : 6)];

	return 8 + roll(t) % (limit / 8) * 8;
}

static u64 any_deadline(struct thread *t)
{
	static const u32 limits[] = { 1, 1, 20000, 1000000, 10000000 };

	return roll(t) % limits[roll(t) % 5];
}

static void allocate(struct thread *t)
{
	bool movable = roll(t) % 3 == 0;
	struct tensormem_rt_alloc item = {
		.size = any_size(t, movable), .deadline_ns = any_deadline(t),
		.flags = movable ? TENSORMEM_RT_MOVABLE : 0,
	};
	u32 class = movable ? 0 : class_of(t, item.size);
	bool promised = class && t->class[class - 1].used < t->class[class - 1].count;
	u64 end;

	if (t->nr_blocks == HELD)
		return;
	if (class && roll(t) % 2) {
		item.flags |= TENSORMEM_RT_RESERVED;
	} else if (item.deadline_ns && roll(t) % 2) {
		item.flags |= TENSORMEM_RT_ABSOLUTE;
		item.deadline_ns += now();
	}
	end = item.flags & TENSORMEM_RT_ABSOLUTE ? item.deadline_ns : now() + item.deadline_ns;
	if (!ioctl(t->fd, TENSORMEM_IOC_RT_ALLOC, &item)) {
		if (item.deadline_ns)
			did(IN_TIME);
		if (promised)
			did(RESERVED);
		else if (item.flags & TENSORMEM_RT_RESERVED)
			fail(t, "more is reserved than there is");
		if (movable)
			did(MOVABLE);
		let_move(t, keep(t, &item, promised ? class : 0));
		return;
	}
	if (promised)
		fail(t, "a reserved block is refused: %s", strerror(errno));
	if (errno == ETIMEDOUT && item.deadline_ns && !(item.flags & TENSORMEM_RT_RESERVED)) {
		if (now() < end)
			fail(t, "ETIMEDOUT before the deadline");
		did(TIMED_OUT);
	} else if (errno == ENOSPC && (!item.deadline_ns || item.flags & TENSORMEM_RT_RESERVED)) {
		did(REFUSED);
	} else if (errno == ENFILE && movable) {
		did(REFUSED);
	} else {
		fail(t, "allocating: %s", strerror(errno));
	}
}

/* All or none; outside of what is reserved, so that the books stay simple. */
static void allocate_batch(struct thread *t)
{
	struct tensormem_rt_alloc item[6] = { 0 };
	struct tensormem_batch batch = {
		.items = (uintptr_t)item, .count = 2 + roll(t) % 5, .item_size = sizeof(item[0]),
	};
	u64 deadline = any_deadline(t);

	if (t->nr_blocks + batch.count > HELD)
		return;
	for (u32 i = 0; i < batch.count; i++) {
		item[i].size = any_size(t, true);
		item[i].deadline_ns = deadline;
		item[i].flags = TENSORMEM_RT_MOVABLE;
	}
	if (!ioctl(t->fd, TENSORMEM_IOC_RT_ALLOC_BATCH, &batch)) {
		for (u32 i = 0; i < batch.count; i++)
			let_move(t, keep(t, &item[i], 0));
		did(BATCHES);
	} else if (errno != ENFILE && errno != (deadline ? ETIMEDOUT : ENOSPC)) {
		fail(t, "allocating a batch: %s", strerror(errno));
	}
}

static void release(struct thread *t)
{
	struct tensormem_rt_block item = { 0 };
	struct block *b;

	if (!t->nr_blocks)
		return;
	b = &t->block[roll(t) % t->nr_blocks];
	/* Some are freed where they are, without a look: while they are moved, perhaps. */
	if (b->pinned || roll(t) % 4) {
		hold(t, b);
		check(t, b);
	}
	item.handle = b->handle;
	if (ioctl(t->fd, TENSORMEM_IOC_RT_FREE, &item))
		fail(t, "freeing %#x: %s", b->handle, strerror(errno));
	/* It may be somebody's again by now, but not ours. */
	if (!ioctl(t->fd, TENSORMEM_IOC_RT_FREE, &item) || errno != ENOENT)
		fail(t, "freeing %#x twice: %s", b->handle, strerror(errno));
	if (b->class)
		t->class[b->class - 1].used--;
	*b = t->block[--t->nr_blocks];
}

static void look(struct thread *t)
{
	struct block *b;

	if (!t->nr_blocks)
		return;
	b = &t->block[roll(t) % t->nr_blocks];
	hold(t, b);
	check(t, b);
	let_move(t, b);
}

static void reserve(struct thread *t)
{
	u32 i = roll(t) % CLASSES;
	struct class *c = &t->class[i];
	struct tensormem_rt_reserve item = { .size = c->size };
	int reason = c->used ? EBUSY : 0;

	if (!c->count) {
		/* No two are the same in granules. */
		item.size = 8 + 300 * (1 + 3 * (roll(t) % 10) + i);
		item.count = 1 + roll(t) % 6;
		reason = ENOSPC;
	}
	if (ioctl(t->fd, TENSORMEM_IOC_RT_RESERVE, &item)) {
		if (errno != reason)
			fail(t, "reserving: %s", strerror(errno));
		return;
	}
	if (c->used)
		fail(t, "what is in use is not reserved any more");
	if (item.count)
		did(ADMITTED);
	c->size = (item.size + granule - 1) / granule * granule;
	c->count = item.count;
}

static void do_deed(struct thread *t)
{
	u32 kind = roll(t) % 32;

	if (kind < 12)
		allocate(t);
	else if (kind < 14)
		allocate_batch(t);
	else if (kind < 24)
		release(t);
	else if (kind < 29)
		look(t);
	else if (kind < 31)
		reserve(t);
	else if (roll(t) % 16 == 0)
		rejoin(t);
	did(DEEDS);
}

static void *work(void *argument)
{
	struct thread *t = argument;

	join(t);
	for (u64 i = 0; (t->victim || i < deeds) && !atomic_load(&common->stop); i++)
		do_deed(t);
	for (u32 i = 0; i < t->nr_blocks; i++) {
		hold(t, &t->block[i]);
		check(t, &t->block[i]);
	}
	close(t->fd);
	return NULL;
}

static pid_t start(bool victim, u64 seed)
{
	static struct thread thread[MAX_THREADS];
	pthread_t id[MAX_THREADS];
	pid_t pid = fork();

	if (pid < 0)
		err(1, "fork");
	if (pid)
		return pid;
	for (u32 i = 0; i < nr_threads; i++) {
		struct thread *t = &thread[i];

		t->number = atomic_fetch_add(&common->next, 1);
		t->arena = &arena[t->number % nr_arenas];
		t->dice = mix(seed * 1000 + t->number);
		t->victim = victim;
		if (pthread_create(&id[i], NULL, work, t))
			err(1, "a thread");
	}
	for (u32 i = 0; i < nr_threads; i++)
		pthread_join(id[i], NULL);
	_exit(0);
}

static void open_arenas(void)
{
	for (u32 i = 0; i < nr_arenas; i++) {
		struct tensormem_rt_open item = {
			.size = 1, .arena = -1, .movable = MOVABLE_BLOCKS,
		};
		struct tensormem_rt_info info = { 0 };

		if (ioctl(device, TENSORMEM_IOC_RT_OPEN, &item) ||
		    ioctl(item.fd, TENSORMEM_IOC_RT_INFO, &info))
			err(1, "no arena");
		arena[i].fd = item.fd;
		arena[i].size = info.size;
		granule = info.granule;
		arena[i].map = mmap(NULL, info.size, PROT_READ | PROT_WRITE, MAP_SHARED, item.fd, 0);
		if (arena[i].map == MAP_FAILED)
			err(1, "mmap");
	}
}

static bool ended_well(int status)
{
	return WIFEXITED(status) && !WEXITSTATUS(status);
}

/* Kill one victim after the other until all workers are done. */
static bool watch(u32 workers, u32 victims, u64 seed)
{
	struct thread t = { .dice = mix(~seed) };
	pid_t victim[MAX_PROCESSES];
	u32 left = workers;
	bool good = true;
	int status;

	for (u32 i = 0; i < workers; i++)
		start(false, seed);
	for (u32 i = 0; i < victims; i++)
		victim[i] = start(true, seed);
	while (left && !atomic_load(&common->failed)) {
		u32 which = roll(&t) % (victims ?: 1);
		pid_t pid;

		usleep(50000 + roll(&t) % 200000);
		if (victims) {
			kill(victim[which], SIGKILL);
			if (waitpid(victim[which], &status, 0) < 0 || !WIFSIGNALED(status))
				return false;
			victim[which] = start(true, seed);
			did(KILLED);
		}
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
			good &= ended_well(status);
			left--;
		}
	}
	for (u32 i = 0; i < victims; i++)
		kill(victim[i], SIGKILL);
	while (wait(&status) > 0)
		good &= WIFSIGNALED(status) || ended_well(status);
	return good && !left;
}

/* Nobody is left but us, and the arena is one free block. */
static void look_at_arenas(void)
{
	for (u32 i = 0; i < nr_arenas; i++) {
		struct tensormem_rt_info info = { 0 };
		u32 tries = 0;

		do {
			if (tries)
				usleep(10000);
			if (ioctl(arena[i].fd, TENSORMEM_IOC_RT_INFO, &info))
				err(1, "info");
		} while (info.clients != 1 && ++tries < RETRIES);
		if (info.clients != 1 || info.free != info.size || info.largest != info.size ||
		    info.used || info.blocks || info.reserved || info.waiting)
			fail(NULL, "arena %u: %u clients, %llu free, %llu in one piece", i, info.clients,
			     (unsigned long long)info.free, (unsigned long long)info.largest);
	}
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
		{ "deeds", required_argument, NULL, 'd' },
		{ "workers", required_argument, NULL, 'w' },
		{ "victims", required_argument, NULL, 'v' },
		{ "threads", required_argument, NULL, 't' },
		{ "arenas", required_argument, NULL, 'a' },
		{ "seed", required_argument, NULL, 's' },
		{ 0 },
	};
	u64 workers = 2, victims = 1, seed = 1;
	bool good;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		u64 value = c == '?' ? 0 : number(optarg);

		switch (c) {
		case 'd':
			deeds = value;
			break;
		case 'w':
			workers = value;
			break;
		case 'v':
			victims = value;
			break;
		case 't':
			nr_threads = value;
			break;
		case 'a':
			nr_arenas = value;
			break;
		case 's':
			seed = value;
			break;
		default:
			return 2;
		}
	}
	if (!workers || workers > MAX_PROCESSES || victims > MAX_PROCESSES || !nr_threads ||
	    nr_threads > MAX_THREADS || !nr_arenas || nr_arenas > MAX_ARENAS)
		errx(2, "too many, or none");
	device = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0)
		err(1, "%s", TENSORMEM_DEVICE);
	common = mmap(NULL, sizeof(*common), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	if (common == MAP_FAILED)
		err(1, "no memory");
	open_arenas();
	good = watch(workers, victims, seed);
	if (atomic_load(&common->failed) || !good)
		return 1;
	look_at_arenas();
	for (u32 i = 0; i < COUNTS; i++)
		printf("%s\"%s\": %llu", i ? ", " : "{", count_names[i],
		       (unsigned long long)common->count[i]);
	printf("}\n");
	return 0;
}
