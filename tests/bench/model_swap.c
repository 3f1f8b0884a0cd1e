// SPDX-License-Identifier: GPL-2.0-only
/*
 * What it takes to load a model, to swap it and to read it for the first time: in a slot,
 * and with a file that is read or mapped.
 *
 *   model_swap FOLDER    of a file system in memory, so that no disk is waited for
 *
 * Prints "NAME OURS PEER" in nanoseconds, which count instructions under icount, in page
 * faults or in bytes; and lines that start with # for the reader.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define MIB		(1ul << 20)
#define CHUNK		(2 * MIB)
#define SMALL		(16 * MIB)
#define LARGE		(1024 * MIB)
#define LOADED		(256 * MIB)
#define WEIGHTS		(64 * MIB)
/* Commits in a row; from the third on each lets go of a generation. */
#define COMMITS		7
#define PASSES		5
/* A twentieth, rounded up: of 128 chunks 7, of 8 chunks 1. */
#define CHANGED(chunks)	(((chunks) + 19) / 20)

static int device;
static unsigned long page;

static unsigned long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	unsigned long long x = *(const unsigned long long *)a;
	unsigned long long y = *(const unsigned long long *)b;

	return (x > y) - (x < y);
}

/*
 * The mean without the least and the most: a tick of the clock counts for neither, and its
 * steps, of 16 ns, for little. Sorts them.
 */
static unsigned long long middle(unsigned long long *times, unsigned int n)
{
	unsigned long long sum = 0;

	qsort(times, n, sizeof(*times), compare);
	for (unsigned int i = 1; i < n - 1; i++)
		sum += times[i];
	return sum / (n - 2);
}

/*
 * --- files
 */

/* Without blocks: it reads as zeros, and takes no memory. */
static int sparse(const char *name, unsigned long size)
{
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd < 0 || ftruncate(fd, (off_t)size))
		err(1, "%s", name);
	return fd;
}

static void put(int fd, const void *from, unsigned long size, unsigned long at)
{
	if (pwrite(fd, from, size, (off_t)at) != (ssize_t)size)
		err(1, "writing a model");
}

/* Each page its own, so that no two chunks are alike. */
static int dense(const char *name, unsigned long size)
{
	int fd = sparse(name, size);
	uint64_t *chunk = malloc(CHUNK);

	if (!chunk)
		err(1, "a buffer");
	for (unsigned long at = 0; at < size; at += CHUNK) {
		for (unsigned long i = 0; i < CHUNK / sizeof(*chunk); i++)
			chunk[i] = at + i * 0x9e3779b97f4a7c15;
		put(fd, chunk, CHUNK, at);
	}
	free(chunk);
	return fd;
}

/* One number in every twentieth chunk, at a place of its own. */
static void change(int fd, unsigned long size, uint64_t mark)
{
	unsigned long chunks = size / CHUNK, nr = CHANGED(chunks);

	for (unsigned long i = 0; i < nr; i++)
		put(fd, &mark, sizeof(mark),
		    i * chunks / nr * CHUNK + i * 40961 % CHUNK / 8 * 8);
}

/*
 * --- slots
 */

static int slot(const char *name)
{
	struct tensormem_model_open open = {
		.flags = TENSORMEM_MODEL_CREATE | TENSORMEM_MODEL_EXCL |
			 TENSORMEM_MODEL_WRITE,
		.mode = 0600,
	};

	memcpy(open.name, name, strlen(name));
	if (ioctl(device, TENSORMEM_IOC_MODEL_OPEN, &open))
		err(1, "slot %s", name);
	return open.fd;
}

static void drop(int fd)
{
	struct tensormem_model_remove remove = { 0 };

	if (ioctl(fd, TENSORMEM_IOC_MODEL_REMOVE, &remove))
		err(1, "removing a slot");
	close(fd);
}

static struct tensormem_model_info info(int fd)
{
	struct tensormem_model_info info = { 0 };

	if (ioctl(fd, TENSORMEM_IOC_MODEL_INFO, &info))
		err(1, "info");
	return info;
}

/* Return: the staged generation's number, when it is loaded; @took: how long that took. */
static uint64_t stage(int slot, int file, unsigned int flags,
		      struct tensormem_model_info *found,
		      unsigned long long *took)
{
	struct tensormem_model_stage stage = {
		.file = file,
		.flags = flags | TENSORMEM_MODEL_KEEP,
	};
	unsigned long long start = now();
	struct pollfd loaded;

	if (ioctl(slot, TENSORMEM_IOC_MODEL_STAGE, &stage))
		err(1, "stage");
	loaded = (struct pollfd){ .fd = stage.fd, .events = POLLIN };
	while (poll(&loaded, 1, -1) != 1)
		if (errno != EINTR)
			err(1, "poll");
	*took = now() - start;
	*found = info(stage.fd);
	if (found->state != TENSORMEM_MODEL_STAGED) {
		errno = (int)found->error;
		err(1, "the load ended in state %u", found->state);
	}
	close(stage.fd);
	return stage.generation;
}

static unsigned long long commit(int slot, uint64_t generation)
{
	struct tensormem_model_which which = { .generation = generation };
	unsigned long long start = now();

	if (ioctl(slot, TENSORMEM_IOC_MODEL_COMMIT, &which))
		err(1, "commit");
	return now() - start;
}

static int acquire(int slot)
{
	struct tensormem_model_acquire acquire = { 0 };

	if (ioctl(slot, TENSORMEM_IOC_MODEL_ACQUIRE, &acquire))
		err(1, "acquire");
	return acquire.fd;
}

/*
 * --- commit-scaling, commit-cost
 */

/*
 * Each of them while a reader has the active generation open, as one will. Generations
 * differ in a twentieth of their chunks; what does not change is shared, else memory would
 * have to hold three models.
 */
static void commits(const char *name, unsigned long size,
		    unsigned long long *times)
{
	int file = sparse(name, size), into = slot(name), reader = -1;

	for (unsigned int i = 0; i < COMMITS; i++) {
		struct tensormem_model_info found;
		unsigned long long took;
		uint64_t generation;

		change(file, size, i + 1);
		generation = stage(into, file, 0, &found, &took);
		times[i] = commit(into, generation);
		if (reader >= 0)
			close(reader);
		reader = acquire(into);
		printf("# commit %u of %lu MiB, %llu of them its own: %llu\n",
		       i + 1, size / MIB,
		       (unsigned long long)found.private_bytes / MIB, times[i]);
	}
	close(reader);
	drop(into);
	close(file);
	unlink(name);
}

/* How programs do it with files: the new one takes the old one's name. */
static unsigned long long renames(unsigned long size)
{
	unsigned long long times[COMMITS];

	close(sparse("model", size));
	for (unsigned int i = 0; i < COMMITS; i++) {
		unsigned long long start;

		close(sparse("model.new", size));
		start = now();
		if (rename("model.new", "model"))
			err(1, "rename");
		times[i] = now() - start;
	}
	unlink("model");
	return middle(times, COMMITS);
}

static void commit_rows(void)
{
	unsigned long long times[COMMITS], small, large;

	commits("small", SMALL, times);
	small = middle(times, COMMITS);
	commits("large", LARGE, times);
	large = middle(times, COMMITS);
	printf("commit-scaling %llu %llu\n", large, small);
	printf("commit-cost %llu %llu\n", large, renames(LARGE));
}

/*
 * --- stage, delta-memory
 */

/* All of a file into fresh memory: the fastest of some ways. */
static unsigned long long read_all(int file, unsigned long size)
{
	static const struct {
		const char *name;
		int flags;
		int advice;
	} ways[] = {
		{ "touched", 0, MADV_NOHUGEPAGE },
		{ "populated", MAP_POPULATE, MADV_NOHUGEPAGE },
		{ "huge pages", 0, MADV_HUGEPAGE },
	};
	unsigned long long best = ~0ull;

	for (unsigned long i = 0; i < sizeof(ways) / sizeof(*ways); i++) {
		unsigned long long start = now();
		char *to = mmap(NULL, size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | ways[i].flags,
				-1, 0);

		if (to == MAP_FAILED)
			err(1, "memory for a copy");
		/* A kernel without huge pages has none to give. */
		madvise(to, size, ways[i].advice);
		for (unsigned long at = 0; at < size;) {
			ssize_t n = pread(file, to + at, size - at, (off_t)at);

			if (n <= 0)
				err(1, "reading a model");
			at += (unsigned long)n;
		}
		start = now() - start;
		printf("# read, %s: %llu\n", ways[i].name, start);
		if (start < best)
			best = start;
		munmap(to, size);
	}
	return best;
}

static unsigned long used_chunks(void)
{
	const char *name = "/sys/class/misc/tensormem/chunk/used";
	FILE *f = fopen(name, "r");
	unsigned long n;

	if (!f || fscanf(f, "%lu", &n) != 1)
		err(1, "%s", name);
	fclose(f);
	return n;
}

static void load_rows(void)
{
	int file = dense("loaded", LOADED), into = slot("loaded");
	unsigned long long took, peer = read_all(file, LOADED), memory;
	unsigned long before, after;
	struct tensormem_model_info found;
	uint64_t generation;

	generation = stage(into, file, 0, &found, &took);
	if (found.private_bytes < LOADED)
		errx(1, "a first generation shares memory");
	printf("stage %llu %llu\n", took, peer);
	commit(into, generation);

	before = used_chunks();
	change(file, LOADED, 1);
	generation = stage(into, file, 0, &found, &took);
	after = used_chunks();
	printf("# stage with %lu of %lu chunks changed: %llu, %.3f of a read\n",
	       CHANGED(LOADED / CHUNK), LOADED / CHUNK, took,
	       (double)took / (double)peer);
	/* What it says it takes, and what the pools say. */
	memory = found.private_bytes;
	if (after > before && (after - before) * CHUNK > memory)
		memory = (after - before) * CHUNK;
	if (memory < CHANGED(LOADED / CHUNK) * CHUNK)
		errx(1, "less memory than what changed");
	if (found.shared_bytes + found.private_bytes != LOADED)
		errx(1, "shared and private memory are not all of it");
	printf("delta-memory %llu %lu\n", memory, LOADED);
	commit(into, generation);

	stage(into, file, 0, &found, &took);
	printf("# stage with nothing changed: %llu, %.3f of a read\n", took,
	       (double)took / (double)peer);
	drop(into);
	close(file);
	unlink("loaded");
}

/*
 * --- first-pass-faults, first-pass-insns
 */

struct pass {
	unsigned long long map;
	unsigned long long touch;
	long faults;
};

static struct pass first_pass(int fd, uint64_t *sum)
{
	struct rusage before, after;
	struct pass pass;
	const char *base;

	pass.map = now();
	base = mmap(NULL, WEIGHTS, PROT_READ, MAP_SHARED, fd, 0);
	if (base == MAP_FAILED)
		err(1, "mmap of a model");
	pass.map = now() - pass.map;
	getrusage(RUSAGE_SELF, &before);
	pass.touch = now();
	for (unsigned long at = 0; at < WEIGHTS; at += page)
		*sum += *(const volatile uint64_t *)(base + at);
	pass.touch = now() - pass.touch;
	getrusage(RUSAGE_SELF, &after);
	pass.faults = after.ru_minflt - before.ru_minflt +
		      after.ru_majflt - before.ru_majflt;
	munmap((void *)base, WEIGHTS);
	return pass;
}

/* Each after a swap, so that its generation is one that nobody has read. */
static void pass_rows(void)
{
	int file = dense("weights", WEIGHTS), into = slot("weights");
	unsigned long long ours[PASSES], peer[PASSES], took;
	struct tensormem_model_info found;
	struct pass a, b;
	long most = 0, least = 0;

	for (unsigned int i = 0; i < PASSES; i++) {
		uint64_t sum_ours = 0, sum_peer = 0;
		int reader;

		change(file, WEIGHTS, i + 1);
		commit(into, stage(into, file, 0, &found, &took));
		reader = acquire(into);
		a = first_pass(reader, &sum_ours);
		b = first_pass(file, &sum_peer);
		close(reader);
		if (sum_ours != sum_peer)
			errx(1, "the generation is not its file");
		printf("# first pass: mmap %llu and touch %llu, the file's %llu and %llu\n",
		       a.map, a.touch, b.map, b.touch);
		ours[i] = a.touch;
		peer[i] = b.touch;
		if (a.faults > most)
			most = a.faults;
		if (!i || b.faults < least)
			least = b.faults;
	}
	printf("first-pass-faults %ld %ld\n", most, least);
	printf("first-pass-insns %llu %llu\n", middle(ours, PASSES),
	       middle(peer, PASSES));
	drop(into);
	close(file);
	unlink("weights");
}

int main(int argc, char **argv)
{
	if (argc != 2)
		errx(2, "usage: model_swap FOLDER");
	if (chdir(argv[1]))
		err(1, "%s", argv[1]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	page = (unsigned long)sysconf(_SC_PAGESIZE);
	device = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0)
		err(1, "%s", TENSORMEM_DEVICE);
	commit_rows();
	load_rows();
	pass_rows();
	return 0;
}
