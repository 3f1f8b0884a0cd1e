// SPDX-License-Identifier: MIT
/*
 * One allocator at work on one shape of objects, for `tensormem bench allocators`:
 *
 *   allocators METHOD SHAPE COUNT
 *   allocators has SYMBOL
 *
 * METHOD malloc is whatever malloc() this process has, by LD_PRELOAD; the others take
 * memory from the module: bump (one tensor, addresses counted up), slab (calls of many
 * objects), single (slab, a call for each object), buddy, chunk, reuse (the pool by size, and
 * memory that comes back unzeroed). SHAPE is fixed (64 bytes), mixed (16 to 256 bytes) or
 * tensors (64 KiB to 4 MiB, coming and going at random, at most SLOTS at a time).
 *
 * Prints lines "NAME VALUE": what was done, in nanoseconds, and the memory taken. Nothing
 * of its own comes from malloc(). Exits with 3, and the reason on stderr, where METHOD
 * is not to be had here.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define NOT_HERE	3
#define BATCH		256
#define SLOTS		64
#define SEED		20260101ull
#define SMALLEST	(64u << 10)
#define OCTAVES		6	/* from 64 KiB to 4 MiB */

struct object {
	char *at;
	uint32_t handle;
	uint32_t size;
};

/* Allocate or free @count objects, @step places apart from each other. */
struct method {
	const char *name;
	uint32_t pool;
	uint32_t flags;
	uint32_t batch;
	void (*get)(const struct method *how, struct object *first, size_t count, size_t step);
	void (*put)(const struct method *how, struct object *first, size_t count, size_t step);
};

struct memory {
	uint64_t anonymous;	/* of this process, without own() */
	uint64_t held;		/* of its client */
	uint64_t kernel;	/* of the kernel's own objects */
};

static int device = -1;
static char *window;
static size_t page;
static uint64_t mine;
static uint64_t dice = SEED;
static char *bump_at;
static uint32_t bump_handle;

/* xorshift64*, Marsaglia and Vigna: the same sizes everywhere, and in the tests. */
static uint32_t roll(void)
{
	dice ^= dice >> 12;
	dice ^= dice << 25;
	dice ^= dice >> 27;
	return (dice * 2685821657736338717ull) >> 32;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Memory for the program's own books, all there from the beginning. */
static void *own(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	mine += (size + page - 1) & ~(page - 1);
	return p;
}

/* Bytes that a file of /proc says of @name. */
static uint64_t kilobytes(const char *file, const char *name)
{
	char text[8192];
	const char *at;
	ssize_t length;
	int fd = open(file, O_RDONLY);

	if (fd < 0)
		err(1, "%s", file);
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (length < 0)
		err(1, "%s", file);
	text[length] = 0;
	at = strstr(text, name);
	if (!at)
		errx(1, "%s has no %s", file, name);
	return strtoull(at + strlen(name), NULL, 10) << 10;
}

static struct memory taken(void)
{
	struct memory m = { .anonymous = kilobytes("/proc/self/smaps_rollup", "Anonymous:") - mine };
	struct tensormem_info info = { 0 };

	if (device < 0)
		return m;
	if (ioctl(device, TENSORMEM_IOC_INFO, &info))
		err(1, "info");
	m.held = info.used;
	m.kernel = kilobytes("/proc/meminfo", "Slab:");
	return m;
}

static void malloc_get(const struct method *how, struct object *o, size_t count, size_t step)
{
	(void)how;
	for (size_t i = 0; i < count; i++) {
		char *p = malloc(o[i * step].size);

		if (!p)
			err(1, "malloc");
		o[i * step].at = p;
	}
}

static void malloc_put(const struct method *how, struct object *o, size_t count, size_t step)
{
	(void)how;
	for (size_t i = 0; i < count; i++)
		free(o[i * step].at);
}

static size_t bumped(const struct object *o)
{
	return (o->size + 15) & ~15u;
}

static void bump_get(const struct method *how, struct object *o, size_t count, size_t step)
{
	(void)how;
	for (size_t i = 0; i < count; i++) {
		o[i * step].at = bump_at;
		bump_at += bumped(o + i * step);
	}
}

/* All at once, by who resets it: there is nothing to do for one object. */
static void bump_put(const struct method *how, struct object *o, size_t count, size_t step)
{
	(void)how;
	(void)o;
	(void)count;
	(void)step;
}

static void batch(unsigned long call, const char *what, void *items, uint32_t count, uint32_t size)
{
	struct tensormem_batch b = { .items = (uintptr_t)items, .count = count, .item_size = size };

	if (ioctl(device, call, &b))
		err(1, "%s", what);
}

static void tensor_get(const struct method *how, struct object *o, size_t count, size_t step)
{
	struct tensormem_alloc a[BATCH];

	for (size_t i = 0; i < count; i++)
		a[i] = (struct tensormem_alloc){
			.size = o[i * step].size,
			.kind = TENSORMEM_KIND_ACTIVATIONS,
			.pool = how->pool,
			.flags = how->flags,
		};
	if (how->batch > 1)
		batch(TENSORMEM_IOC_ALLOC_BATCH, "allocate", a, count, sizeof(*a));
	else if (ioctl(device, TENSORMEM_IOC_ALLOC, a))
		err(1, "allocate");
	for (size_t i = 0; i < count; i++) {
		o[i * step].at = window + a[i].offset;
		o[i * step].handle = a[i].handle;
	}
}

static void tensor_put(const struct method *how, struct object *o, size_t count, size_t step)
{
	struct tensormem_free f[BATCH];

	for (size_t i = 0; i < count; i++)
		f[i] = (struct tensormem_free){ .handle = o[i * step].handle };
	if (how->batch > 1)
		batch(TENSORMEM_IOC_FREE_BATCH, "free", f, count, sizeof(*f));
	else if (ioctl(device, TENSORMEM_IOC_FREE, f))
		err(1, "free");
}

static const struct method methods[] = {
	{ "malloc", 0, 0, BATCH, malloc_get, malloc_put },
	{ "bump", 0, 0, BATCH, bump_get, bump_put },
	{ "slab", TENSORMEM_POOL_SLAB, 0, BATCH, tensor_get, tensor_put },
	{ "single", TENSORMEM_POOL_SLAB, 0, 1, tensor_get, tensor_put },
	{ "buddy", TENSORMEM_POOL_BUDDY, 0, 1, tensor_get, tensor_put },
	{ "chunk", TENSORMEM_POOL_CHUNK, 0, 1, tensor_get, tensor_put },
	{ "reuse", TENSORMEM_POOL_AUTO, TENSORMEM_NOZERO, 1, tensor_get, tensor_put },
};

static void touch(const struct object *o)
{
	for (size_t at = 0; at < o->size; at += page)
		*(volatile char *)(o->at + at) = 1;
}

static uint64_t get(const struct method *how, struct object *first, size_t count, size_t step)
{
	uint64_t begin = now();

	for (size_t done = 0; done < count; done += how->batch) {
		size_t n = count - done < how->batch ? count - done : how->batch;
		struct object *o = first + done * step;

		how->get(how, o, n, step);
		for (size_t i = 0; i < n; i++)
			touch(o + i * step);
	}
	return now() - begin;
}

static uint64_t put(const struct method *how, struct object *first, size_t count, size_t step)
{
	uint64_t begin = now();

	for (size_t done = 0; done < count; done += how->batch) {
		size_t n = count - done < how->batch ? count - done : how->batch;

		how->put(how, first + done * step, n, step);
	}
	return now() - begin;
}

static void say(const char *name, uint64_t value)
{
	printf("%s %llu\n", name, (unsigned long long)value);
}

static void say_memory(const char *when, uint64_t kernel_before, uint64_t live)
{
	struct memory m = taken();
	/* What others in the system gave back meanwhile is not ours to subtract. */
	uint64_t kernel = m.kernel > kernel_before ? m.kernel - kernel_before : 0;

	printf("%s_live %llu\n%s_anonymous %llu\n%s_held %llu\n%s_kernel %llu\n",
	       when, (unsigned long long)live,
	       when, (unsigned long long)m.anonymous,
	       when, (unsigned long long)m.held,
	       when, (unsigned long long)kernel);
}

static uint64_t bytes(const struct object *o, size_t count, size_t step)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < count; i += step)
		sum += o[i].at ? o[i].size : 0;
	return sum;
}

/* The tensor for all that is bumped off it, every other object a second time. */
static uint64_t open_bump(const struct object *o, size_t count)
{
	struct tensormem_alloc a = { .kind = TENSORMEM_KIND_ACTIVATIONS };
	uint64_t begin;

	for (size_t i = 0; i < count; i++)
		a.size += bumped(o + i) << (i & 1);
	begin = now();
	if (ioctl(device, TENSORMEM_IOC_ALLOC, &a))
		err(1, "allocate");
	bump_at = window + a.offset;
	bump_handle = a.handle;
	return now() - begin;
}

static uint64_t close_bump(void)
{
	struct tensormem_free f = { .handle = bump_handle };
	uint64_t begin = now();

	if (ioctl(device, TENSORMEM_IOC_FREE, &f))
		err(1, "free");
	return now() - begin;
}

/* All of them, every other one away, these again, all away: each is allocated, touched and freed. */
static void objects(const struct method *how, int mixed, size_t count)
{
	struct object *o = own(count * sizeof(*o));
	size_t odd = count / 2;
	uint64_t before;
	uint64_t ns = 0;

	for (size_t i = 0; i < count; i++)
		o[i].size = mixed ? 16 + roll() % 241 : 64;
	before = taken().kernel;
	if (how->get == bump_get)
		ns += open_bump(o, count);
	ns += get(how, o, count, 1);
	say_memory("full", before, bytes(o, count, 1));
	ns += put(how, o + 1, odd, 2);
	say_memory("half", before, bytes(o, count, 2));
	ns += get(how, o + 1, odd, 2);
	ns += put(how, o, count, 1);
	if (how->get == bump_get)
		ns += close_bump();
	say("allocations", count + odd);
	say("frees", odd + count);
	say("ns", ns);
}

static uint32_t tensor_size(void)
{
	uint32_t octave = roll() % OCTAVES, least = SMALLEST << octave;

	/* Even within an octave: what log-uniform is to a quarter, without libm. */
	return least + (uint32_t)(((uint64_t)roll() * least) >> 32);
}

/* Each turn replaces one of the tensors, whichever it hits. */
static void tensors(const struct method *how, size_t turns)
{
	struct object *o = own(SLOTS * sizeof(*o));
	uint64_t ns = 0, allocations = 0, frees = 0;
	uint64_t before = taken().kernel;

	for (size_t turn = 0; turn < turns; turn++) {
		struct object *at = o + roll() % SLOTS;
		uint32_t size = tensor_size();

		if (at->at) {
			ns += put(how, at, 1, 1);
			frees++;
		}
		at->size = size;
		ns += get(how, at, 1, 1);
		allocations++;
	}
	say_memory("full", before, bytes(o, SLOTS, 1));
	for (int last = 0; last < 2; last++) {
		for (size_t i = !last; i < SLOTS; i += 2) {
			if (!o[i].at)
				continue;
			ns += put(how, o + i, 1, 1);
			frees++;
		}
		if (!last)
			say_memory("half", before, bytes(o, SLOTS, 2));
	}
	say("allocations", allocations);
	say("frees", frees);
	say("ns", ns);
}

static void open_device(void)
{
	struct tensormem_info info = { 0 };

	device = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0)
		err(NOT_HERE, TENSORMEM_DEVICE);
	if (ioctl(device, TENSORMEM_IOC_INFO, &info))
		err(1, "info");
	window = mmap(NULL, info.window_size, PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);
	if (window == MAP_FAILED)
		err(1, "mmap of the window");
}

int main(int argc, char **argv)
{
	const struct method *how = NULL;
	size_t count;
	int mixed;

	if (argc == 3 && !strcmp(argv[1], "has"))
		return dlsym(RTLD_DEFAULT, argv[2]) ? 0 : NOT_HERE;
	if (argc != 4)
		errx(2, "usage: allocators METHOD SHAPE COUNT");
	for (size_t i = 0; i < sizeof(methods) / sizeof(*methods); i++)
		if (!strcmp(argv[1], methods[i].name))
			how = methods + i;
	count = strtoul(argv[3], NULL, 10);
	mixed = !strcmp(argv[2], "mixed");
	if (!how || !count)
		errx(2, "no such method or count");
	page = sysconf(_SC_PAGESIZE);
	if (how->get != malloc_get)
		open_device();
	if (!strcmp(argv[2], "tensors"))
		tensors(how, count);
	else
		objects(how, mixed, count);
	return 0;
}
