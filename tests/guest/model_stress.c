// SPDX-License-Identifier: GPL-2.0-only
/*
 * Readers of a model slot verify what they hold while it is swapped, rolled back and
 * aborted under them.
 *
 *	model_stress [--deeds N] [--readers R] [--seed S]
 *
 * A model is a chunk and a tail. Its variants differ in the chunk, in the tail, in both; its last
 * page says which variant it is and which load it came with, so that no two generations
 * are alike. The writer notes both by the generation's number before it commits.
 * A reader holds some generations, old ones for long, and looks through mappings and by
 * pread() whether a page's checksum is that of what it acquired: parts of two
 * generations, or one that changes, are found. On any mismatch or errno that has
 * no reason it says so and exits with 1; else it prints its counts.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
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
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/tensormem.h>

typedef uint32_t u32;
typedef uint64_t u64;

#define VARIANTS	4
#define TAIL_PAGES	5	/* the last is the label */
#define MAX_READERS	32
#define MAX_GENERATIONS	65536
#define HELD		3
#define MAGIC		0x6c65646f6d2d6d74ull

/* The last page of a model; the rest of it is noise that both are the seed of. */
struct label {
	u64 magic;
	u64 variant;
	u64 serial;
	u64 noise[];
};

enum count { SWAPS, ROLLBACKS, ABORTS, CLOSED, COUNTS };

static const char * const count_names[COUNTS] = { "swaps", "rollbacks", "aborts", "closed" };

struct reader {
	u64 acquired;
	u64 checks;
	u64 reads;
	u64 old;	/* looks at what was not the active one any more */
};

/* What all processes share. */
struct common {
	atomic_bool stop;
	atomic_bool failed;
	atomic_uint variant[MAX_GENERATIONS];	/* + 1, by number */
	atomic_uint serial[MAX_GENERATIONS];
	struct reader reader[MAX_READERS];
};

struct held {
	int fd;
	u64 number;
	u32 variant;
	u32 serial;
	const char *map;
};

static struct common *common;
static u64 *sums[VARIANTS];	/* of every page but the label */
static size_t page, chunk, size;
static u32 pages;
static u64 counts[COUNTS];
static int slot;

static u64 mix(u64 x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static u64 roll(u64 *dice)
{
	return mix(*dice += 0x9e3779b97f4a7c15ull);
}

/* Every bit of a page counts, and where it stands. */
static u64 sum_of(const void *data)
{
	const u64 *word = data;
	u64 a = 1, b = 2;

	for (u32 i = 0; i < page / 8; i += 2) {
		a = (a ^ word[i]) * 0x9e3779b97f4a7c15ull;
		b = (b ^ word[i + 1]) * 0xc2b2ae3d27d4eb4full;
		a ^= a >> 29;
		b ^= b >> 31;
	}
	return mix(a ^ mix(b));
}

static void fill(u64 *data, u64 tag)
{
	for (u32 i = 0; i < page / 8; i++)
		data[i] = mix(tag * 0x10001 + i);
}

static void fill_label(struct label *label, u32 variant, u32 serial)
{
	fill((u64 *)label, (u64)serial << 32 | variant);
	label->magic = MAGIC;
	label->variant = variant;
	label->serial = serial;
}

__attribute__((format(printf, 2, 3), noreturn))
static void fail(const struct held *h, const char *format, ...)
{
	va_list list;

	atomic_store(&common->failed, true);
	atomic_store(&common->stop, true);
	fprintf(stderr, "generation %llu (variant %u, load %u): ",
		h ? (unsigned long long)h->number : 0, h ? h->variant : 0, h ? h->serial : 0);
	va_start(list, format);
	vfprintf(stderr, format, list);
	va_end(list);
	fputc('\n', stderr);
	_exit(1);
}

/* A file of a variant; what its label says changes with each load. */
static int make(u32 variant)
{
	int fd = memfd_create("model", 0);
	char *data = malloc(page);

	if (fd < 0 || !data)
		err(1, "no file for a model");
	sums[variant] = calloc(pages, sizeof(u64));
	for (u32 i = 0; i < pages - 1; i++) {
		bool in_tail = i >= chunk / page;
		u32 own = in_tail ? variant & 1 : variant >> 1;

		fill((u64 *)data, (u64)(own + 1) << 32 | i);
		sums[variant][i] = sum_of(data);
		if (pwrite(fd, data, page, (off_t)i * page) != (ssize_t)page)
			err(1, "writing a model");
	}
	free(data);
	return fd;
}

/* One page, as it was read or is mapped. */
static void check(const struct held *h, const char *data, u32 i, const char *how)
{
	static struct label *label;

	if (i < pages - 1) {
		if (sum_of(data) != sums[h->variant][i])
			fail(h, "page %u is torn (%s)", i, how);
		return;
	}
	if (!label)
		label = malloc(page);
	fill_label(label, h->variant, h->serial);
	if (memcmp(label, data, page))
		fail(h, "its label says variant %llu, load %llu (%s)",
		     (unsigned long long)((struct label *)data)->variant,
		     (unsigned long long)((struct label *)data)->serial, how);
}

static void look(struct reader *r, struct held *h, u64 *dice)
{
	static char *copy;
	u32 first = roll(dice) % pages, end = first + 1 + roll(dice) % (pages - first);
	struct pollfd events = { .fd = h->fd, .events = POLLIN | POLLPRI };

	if (roll(dice) % 4 == 0) {
		first = 0;
		end = pages;
	}
	if (!copy)
		copy = malloc(size);
	if (roll(dice) % 4 == 0) {
		size_t length = (size_t)(end - first) * page;

		if (pread(h->fd, copy, length, (off_t)first * page) != (ssize_t)length)
			fail(h, "pread of %u pages at %u: %s", end - first, first, strerror(errno));
		for (u32 i = first; i < end; i++)
			check(h, copy + (size_t)(i - first) * page, i, "read");
		r->reads++;
	} else {
		for (u32 i = first; i < end; i++)
			check(h, h->map + (size_t)i * page, i, "mapped");
	}
	/* Whichever part it was, it is of this generation. */
	check(h, h->map + (size_t)(pages - 1) * page, pages - 1, "mapped");
	r->checks += end - first + 1;
	if (poll(&events, 1, 0) != 1 || !(events.revents & POLLIN) || events.revents & POLLERR)
		fail(h, "poll says %#x", events.revents);
	r->old += !!(events.revents & POLLPRI);
}

static void acquire(struct reader *r, struct held *h)
{
	struct tensormem_model_acquire item = { 0 };
	struct tensormem_model_info info = { 0 };
	struct stat status;

	if (ioctl(slot, TENSORMEM_IOC_MODEL_ACQUIRE, &item))
		fail(NULL, "acquire: %s", strerror(errno));
	h->fd = item.fd;
	h->number = item.generation;
	h->variant = common->variant[h->number % MAX_GENERATIONS] - 1;
	h->serial = common->serial[h->number % MAX_GENERATIONS];
	if (h->variant >= VARIANTS)
		fail(h, "was never committed");
	if (fstat(h->fd, &status) || (size_t)status.st_size != size)
		fail(h, "fstat: size %lld", (long long)status.st_size);
	if (ioctl(h->fd, TENSORMEM_IOC_MODEL_INFO, &info) || info.generation != h->number)
		fail(h, "info: %s", strerror(errno));
	h->map = mmap(NULL, size, PROT_READ, MAP_SHARED, h->fd, 0);
	if (h->map == MAP_FAILED)
		fail(h, "mmap: %s", strerror(errno));
	r->acquired++;
}

static void let_go(struct held *h)
{
	if (munmap((void *)h->map, size) || close(h->fd))
		fail(h, "letting go: %s", strerror(errno));
	h->map = NULL;
}

static void on_signal(int number)
{
	static const char text[] = "a reader got a signal\n";

	atomic_store(&common->failed, true);
	if (write(2, text, sizeof(text) - 1) < 0)
		_exit(128 + number);
	_exit(1);
}

static void read_on(struct reader *r, u64 dice)
{
	struct held held[HELD] = { 0 };

	signal(SIGBUS, on_signal);
	signal(SIGSEGV, on_signal);
	/* The writer has to get through, too. */
	if (nice(10) < 0)
		err(1, "nice");
	while (!atomic_load(&common->stop)) {
		/* The first changes all the time, the last hardly ever. */
		u32 which = roll(&dice) % HELD;
		struct held *h = &held[which];

		if (h->map && roll(&dice) % (1 + 2 * which * which) == 0)
			let_go(h);
		if (!h->map)
			acquire(r, h);
		look(r, h, &dice);
	}
	for (u32 i = 0; i < HELD; i++)
		if (held[i].map)
			let_go(&held[i]);
}

static int stage(int file, u32 variant, u32 serial, u64 *number)
{
	struct tensormem_model_stage item = { .file = file };
	struct label *label = malloc(page);

	fill_label(label, variant, serial);
	if (pwrite(file, label, page, (off_t)size - page) != (ssize_t)page)
		fail(NULL, "writing a label: %s", strerror(errno));
	free(label);
	if (ioctl(slot, TENSORMEM_IOC_MODEL_STAGE, &item))
		fail(NULL, "stage: %s", strerror(errno));
	if (item.generation >= MAX_GENERATIONS)
		fail(NULL, "more generations than there is room for");
	*number = item.generation;
	common->serial[*number] = serial;
	return item.fd;
}

static void wait_for(int fd)
{
	struct pollfd events = { .fd = fd, .events = POLLIN };

	if (poll(&events, 1, 120000) != 1 || !(events.revents & POLLIN) || events.revents & POLLERR)
		fail(NULL, "a load ends with %#x", events.revents);
}

static void swap(int file, u32 variant, u32 serial)
{
	struct tensormem_model_which which = { 0 };
	u64 number;
	int fd = stage(file, variant, serial, &number);

	wait_for(fd);
	common->variant[number] = variant + 1;
	which.generation = number;
	if (ioctl(slot, TENSORMEM_IOC_MODEL_COMMIT, &which))
		fail(NULL, "commit: %s", strerror(errno));
	close(fd);
	counts[SWAPS]++;
}

/* By a call, or by closing it; loaded or not. */
static void abandon(int file, u32 variant, u32 serial, u64 *dice)
{
	struct tensormem_model_which which = { 0 };
	u64 number;
	int fd = stage(file, variant, serial, &number);

	if (roll(dice) % 2)
		wait_for(fd);
	else
		usleep(roll(dice) % 3000);
	if (roll(dice) % 2) {
		which.generation = number;
		if (ioctl(slot, TENSORMEM_IOC_MODEL_ABORT, &which))
			fail(NULL, "abort: %s", strerror(errno));
		counts[ABORTS]++;
	} else {
		counts[CLOSED]++;
	}
	close(fd);
}

static void roll_back(void)
{
	struct tensormem_model_which which = { 0 };
	struct tensormem_model_slot before = { 0 }, after = { 0 };

	if (ioctl(slot, TENSORMEM_IOC_MODEL_SLOT, &before) ||
	    ioctl(slot, TENSORMEM_IOC_MODEL_ROLLBACK, &which) ||
	    ioctl(slot, TENSORMEM_IOC_MODEL_SLOT, &after))
		fail(NULL, "rollback: %s", strerror(errno));
	if (after.active != before.previous || after.previous != before.active ||
	    which.generation != after.active)
		fail(NULL, "rollback went to %llu", (unsigned long long)after.active);
	counts[ROLLBACKS]++;
}

static void write_on(const int *file, u64 deeds, u64 dice)
{
	u32 serial = 2;

	for (u64 i = 0; i < deeds && !atomic_load(&common->failed); i++) {
		u32 kind = roll(&dice) % 8, variant = roll(&dice) % VARIANTS;

		if (kind < 5)
			swap(file[variant], variant, serial++);
		else if (kind < 6)
			roll_back();
		else
			abandon(file[variant], variant, serial++, &dice);
	}
}

static void report(u32 readers)
{
	struct reader sum = { 0 };
	u64 least = ~0ull;

	for (u32 i = 0; i < readers; i++) {
		struct reader *r = &common->reader[i];

		sum.acquired += r->acquired;
		sum.checks += r->checks;
		sum.reads += r->reads;
		sum.old += r->old;
		if (r->checks < least)
			least = r->checks;
	}
	printf("{");
	for (u32 i = 0; i < COUNTS; i++)
		printf("\"%s\": %llu, ", count_names[i], (unsigned long long)counts[i]);
	printf("\"acquired\": %llu, \"checks\": %llu, \"least\": %llu, \"reads\": %llu, \"old\": %llu}\n",
	       (unsigned long long)sum.acquired, (unsigned long long)sum.checks,
	       (unsigned long long)least, (unsigned long long)sum.reads,
	       (unsigned long long)sum.old);
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
		{ "readers", required_argument, NULL, 'r' },
		{ "seed", required_argument, NULL, 's' },
		{ 0 },
	};
	struct tensormem_model_open open_it = {
		.name = "stress", .mode = 0600,
		.flags = TENSORMEM_MODEL_CREATE | TENSORMEM_MODEL_EXCL | TENSORMEM_MODEL_WRITE,
	};
	struct tensormem_model_remove remove_it = { 0 };
	struct tensormem_info info = { 0 };
	u64 deeds = 1000, readers = 8, seed = 1;
	int file[VARIANTS], client, status, c;
	bool good = true;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'd')
			deeds = number(optarg);
		else if (c == 'r')
			readers = number(optarg);
		else if (c == 's')
			seed = number(optarg);
		else
			return 2;
	}
	if (!readers || readers > MAX_READERS)
		errx(2, "1 to %u readers", MAX_READERS);
	client = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	if (client < 0 || ioctl(client, TENSORMEM_IOC_INFO, &info))
		err(1, "%s", TENSORMEM_DEVICE);
	if (ioctl(client, TENSORMEM_IOC_MODEL_OPEN, &open_it))
		err(1, "no slot");
	slot = open_it.fd;
	page = info.page_size;
	chunk = info.chunk_size;
	pages = chunk / page + TAIL_PAGES;
	size = (size_t)pages * page;
	common = mmap(NULL, sizeof(*common), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (common == MAP_FAILED)
		err(1, "no memory");
	for (u32 i = 0; i < VARIANTS; i++)
		file[i] = make(i);
	/* Two, so that there is always one to go back to. */
	swap(file[0], 0, 0);
	swap(file[3], 3, 1);

	for (u32 i = 0; i < readers; i++) {
		pid_t pid = fork();

		if (pid < 0)
			err(1, "fork");
		if (!pid) {
			/* Eight of them would leave the loads little of two CPUs. */
			if (nice(5) < 0)
				err(1, "nice");
			read_on(&common->reader[i], mix(seed * MAX_READERS + i));
			_exit(0);
		}
	}
	write_on(file, deeds, mix(~seed));
	atomic_store(&common->stop, true);
	while (wait(&status) > 0)
		good &= WIFEXITED(status) && !WEXITSTATUS(status);
	if (ioctl(slot, TENSORMEM_IOC_MODEL_REMOVE, &remove_it))
		err(1, "remove");
	if (good)
		report(readers);
	return !good || atomic_load(&common->failed);
}
