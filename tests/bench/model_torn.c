// SPDX-License-Identifier: GPL-2.0-only
/*
 * Readers that check what they read while the model is replaced: in a slot, and in a file
 * that is written over, which they have mapped.
 *
 *   model_torn FOLDER [SWAPS CHECKS]
 *
 * Every version of the model has its number in three places and one of two contents, a
 * chunk of which is the same in both. A reader knows from its generation's number which
 * version it has to be; of the file it can only demand that it is one. It keeps a generation
 * over several checks, through whatever replaces it. A check looks at the three places
 * and at some others, in a mapping or with pread(2).
 *
 * Prints "torn-reads OURS PEER": checks that found something else, or could not read.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
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

#define CHUNK		(2ul << 20)
#define WORD		sizeof(uint64_t)
#define WORDS		((3 * CHUNK + 300000) / WORD)
#define SIZE		(WORDS * WORD)
#define READERS		4
#define MARKS		3
#define SAMPLES		16
/* Generations that a slot may give numbers to here. */
#define NUMBERS		65536

static const unsigned long marks[MARKS] = {
	0, 2 * CHUNK / WORD + 1234, WORDS - 1,
};

struct shared {
	atomic_ulong checks;
	atomic_ulong torn;
	atomic_ulong failed;
	atomic_bool stop;
	atomic_uint version[NUMBERS];	/* by generation */
};

static struct shared *shared;
static int device;
static int slot = -1;
/* A version of either contents. */
static uint64_t *contents[2];

static uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static bool is_mark(unsigned long i)
{
	for (unsigned int m = 0; m < MARKS; m++)
		if (marks[m] == i)
			return true;
	return false;
}

/* The second chunk is the same in all versions. */
static uint64_t word(uint32_t version, unsigned long i)
{
	if (is_mark(i))
		return version;
	return mix(i + (i * WORD / CHUNK == 1 ? 0 : (version & 1) + 1) * WORDS);
}

/* All of a version to a file, in pieces, as programs write. */
static void write_version(int fd, uint32_t version)
{
	const unsigned long piece = CHUNK / 4;
	uint64_t *from = contents[version & 1];

	for (unsigned int m = 0; m < MARKS; m++)
		from[marks[m]] = version;
	for (unsigned long at = 0; at < SIZE; at += piece) {
		unsigned long n = SIZE - at < piece ? SIZE - at : piece;

		if (pwrite(fd, (char *)from + at, n, (off_t)at) != (ssize_t)n)
			err(1, "writing a model");
	}
}

static void write_marks(int fd, uint32_t version)
{
	for (unsigned int m = 0; m < MARKS; m++) {
		uint64_t mark = version;

		if (pwrite(fd, &mark, WORD, (off_t)(marks[m] * WORD)) != WORD)
			err(1, "writing a mark");
	}
}

/*
 * --- readers
 */

struct reader {
	uint64_t random;
	int fd;
	const volatile uint64_t *map;
	bool known;		/* which version it has to be */
	uint32_t version;
};

static unsigned long draw(struct reader *r, unsigned long below)
{
	r->random += 0x9e3779b97f4a7c15;
	return mix(r->random) % below;
}

static void let_go(struct reader *r)
{
	if (r->map)
		munmap((void *)r->map, SIZE);
	if (r->fd >= 0)
		close(r->fd);
	r->map = NULL;
	r->fd = -1;
}

static bool map(struct reader *r)
{
	void *base = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, r->fd, 0);

	if (base == MAP_FAILED)
		return false;
	r->map = base;
	return true;
}

/* The generation that is active now. */
static bool renew(struct reader *r)
{
	struct tensormem_model_acquire acquire = { 0 };

	let_go(r);
	if (ioctl(slot, TENSORMEM_IOC_MODEL_ACQUIRE, &acquire))
		return false;
	r->fd = acquire.fd;
	r->known = true;
	r->version = shared->version[acquire.generation];
	return map(r);
}

static bool get(struct reader *r, unsigned long i, bool by_call, uint64_t *value)
{
	if (by_call)
		return pread(r->fd, value, WORD, (off_t)(i * WORD)) == WORD;
	*value = r->map[i];
	return true;
}

/* Return: 0, 1 when it is torn, -1 when something failed. */
static int check(struct reader *r)
{
	bool by_call = draw(r, 8) == 0;
	uint32_t version = r->version;

	for (unsigned int n = 0; n < MARKS + SAMPLES; n++) {
		unsigned long i = n < MARKS ? marks[n] : draw(r, WORDS);
		uint64_t value;

		if (!get(r, i, by_call, &value))
			return -1;
		if (!n && !r->known)
			version = (uint32_t)value;
		if (value != word(version, i))
			return 1;
	}
	return 0;
}

static void read_on(struct reader *r)
{
	while (!shared->stop) {
		int found = 0;

		if (slot >= 0 && (r->fd < 0 || !draw(r, 6)) && !renew(r))
			found = -1;
		if (!found)
			found = check(r);
		shared->torn += found > 0;
		shared->failed += found < 0;
		shared->checks++;
	}
	let_go(r);
}

/* Of the slot, or of @file, which nobody tells it the version of. */
static void start_readers(pid_t *pids, int file)
{
	for (unsigned int i = 0; i < READERS; i++) {
		pids[i] = fork();
		if (pids[i] < 0)
			err(1, "fork");
		if (!pids[i]) {
			struct reader r = { .random = i, .fd = file };

			if (file >= 0 && !map(&r))
				err(1, "mmap of a file");
			read_on(&r);
			_exit(0);
		}
	}
}

static void stop_readers(const pid_t *pids)
{
	shared->stop = true;
	for (unsigned int i = 0; i < READERS; i++) {
		int status;

		if (waitpid(pids[i], &status, 0) != pids[i])
			err(1, "waiting for a reader");
		/* One that died has failed, and checked nothing since. */
		if (status)
			errx(1, "a reader ended with status %x", status);
	}
}

static void wait_for_checks(unsigned long n)
{
	while (shared->checks < n)
		nanosleep(&(struct timespec){ .tv_nsec = 100000 }, NULL);
}

/*
 * --- who swaps
 */

static void open_slot(void)
{
	struct tensormem_model_open open = {
		.name = "torn",
		.flags = TENSORMEM_MODEL_CREATE | TENSORMEM_MODEL_EXCL |
			 TENSORMEM_MODEL_WRITE,
		.mode = 0600,
	};

	if (ioctl(device, TENSORMEM_IOC_MODEL_OPEN, &open))
		err(1, "a slot");
	slot = open.fd;
}

static void drop_slot(void)
{
	struct tensormem_model_remove remove = { 0 };

	if (ioctl(slot, TENSORMEM_IOC_MODEL_REMOVE, &remove))
		err(1, "removing a slot");
	close(slot);
	slot = -1;
}

/* Staging has begun; @fd: whose closing ends it. */
static uint64_t stage(int file, int *fd)
{
	struct tensormem_model_stage stage = { .file = file };

	if (ioctl(slot, TENSORMEM_IOC_MODEL_STAGE, &stage))
		err(1, "stage");
	if (stage.generation >= NUMBERS)
		errx(1, "too many generations");
	*fd = stage.fd;
	return stage.generation;
}

static void swap(int file, uint32_t version)
{
	struct tensormem_model_which which = { 0 };
	struct pollfd loaded = { .events = POLLIN };

	which.generation = stage(file, &loaded.fd);
	while (poll(&loaded, 1, -1) != 1)
		if (errno != EINTR)
			err(1, "poll");
	shared->version[which.generation] = version;
	if (ioctl(slot, TENSORMEM_IOC_MODEL_COMMIT, &which))
		err(1, "commit");
	close(loaded.fd);
}

/* A load that is ended, early or late. */
static void swap_not(int file, struct reader *r)
{
	int fd;

	stage(file, &fd);
	nanosleep(&(struct timespec){ .tv_nsec = (long)draw(r, 2000000) }, NULL);
	close(fd);
}

static void roll_back(void)
{
	struct tensormem_model_which which = { 0 };

	if (ioctl(slot, TENSORMEM_IOC_MODEL_ROLLBACK, &which))
		err(1, "rollback");
}

static unsigned long through_slot(unsigned long swaps, unsigned long checks)
{
	struct reader chance = { .random = 99 };
	pid_t pids[READERS];
	int files[2];

	open_slot();
	for (uint32_t i = 0; i < 2; i++) {
		files[i] = memfd_create("version", MFD_CLOEXEC);
		if (files[i] < 0)
			err(1, "memfd");
		write_version(files[i], i);
	}
	swap(files[0], 0);
	start_readers(pids, -1);
	for (unsigned long i = 1; i <= swaps; i++) {
		uint32_t version = (uint32_t)i;

		wait_for_checks(i * checks / swaps);
		if (i % 16 == 3)
			swap_not(files[version & 1], &chance);
		if (i % 8 == 7) {
			roll_back();
			continue;
		}
		write_marks(files[version & 1], version);
		swap(files[version & 1], version);
	}
	wait_for_checks(checks);
	stop_readers(pids);
	drop_slot();
	close(files[0]);
	close(files[1]);
	printf("# torn-reads: %lu checks of a slot, %lu torn, %lu failed\n",
	       shared->checks, shared->torn, shared->failed);
	return shared->torn + shared->failed;
}

static unsigned long in_place(unsigned long swaps, unsigned long checks)
{
	int file = open("torn", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	pid_t pids[READERS];

	if (file < 0)
		err(1, "a file");
	write_version(file, 0);
	start_readers(pids, file);
	for (unsigned long i = 1; i <= swaps; i++) {
		wait_for_checks(i * checks / swaps);
		write_version(file, (uint32_t)i);
	}
	wait_for_checks(checks);
	stop_readers(pids);
	close(file);
	unlink("torn");
	printf("# torn-reads: %lu checks of a file, %lu torn, %lu failed\n",
	       shared->checks, shared->torn, shared->failed);
	return shared->torn + shared->failed;
}

int main(int argc, char **argv)
{
	unsigned long swaps = 1000, checks = 100000, ours, peer;

	if (argc != 2 && argc != 4)
		errx(2, "usage: model_torn FOLDER [SWAPS CHECKS]");
	if (argc == 4) {
		swaps = strtoul(argv[2], NULL, 0);
		checks = strtoul(argv[3], NULL, 0);
	}
	if (chdir(argv[1]))
		err(1, "%s", argv[1]);
	/* Lines of before a fork are not printed twice. */
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (uint32_t v = 0; v < 2; v++) {
		contents[v] = malloc(SIZE);
		if (!contents[v])
			err(1, "memory");
		for (unsigned long i = 0; i < WORDS; i++)
			contents[v][i] = word(v, i);
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		err(1, "memory");
	device = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	if (device < 0)
		err(1, "%s", TENSORMEM_DEVICE);
	peer = in_place(swaps, checks);
	if (!peer)
		errx(1, "these checks find nothing where there is something");
	memset((void *)shared, 0, sizeof(*shared));
	ours = through_slot(swaps, checks);
	printf("torn-reads %lu %lu\n", ours, peer);
	return ours != 0;
}
