// SPDX-License-Identifier: GPL-2.0-only
/*
 * One megabyte from user space: allocate, touch every page, free; through the
 * device and through mmap. Prints "user-1m-churn OURS PEER" in nanoseconds a time,
 * and "user-1m-reuse OURS PEER" for memory that comes back to who freed it.
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define SIZE	(1ul << 20)
#define ROUNDS	200

static unsigned long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void touch(volatile char *p, long page)
{
	for (unsigned long at = 0; at < SIZE; at += page)
		p[at] = 1;
}

static void ours(int fd, char *window, long page, unsigned int flags)
{
	struct tensormem_alloc a = {
		.size = SIZE,
		.kind = TENSORMEM_KIND_ACTIVATIONS,
		.flags = flags,
	};
	struct tensormem_free f = { 0 };

	if (ioctl(fd, TENSORMEM_IOC_ALLOC, &a))
		err(1, "alloc");
	touch(window + a.offset, page);
	f.handle = a.handle;
	if (ioctl(fd, TENSORMEM_IOC_FREE, &f))
		err(1, "free");
}

static void peer(long page)
{
	char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	touch(p, page);
	munmap(p, SIZE);
}

static void row(const char *name, int fd, char *window, long page,
		unsigned int flags)
{
	unsigned long long mine = 0, theirs = 0;

	/* Round 0 warms both up. */
	for (int i = 0; i <= ROUNDS; i++) {
		unsigned long long start = now(), middle;

		ours(fd, window, page, flags);
		middle = now();
		peer(page);
		if (i) {
			mine += middle - start;
			theirs += now() - middle;
		}
	}
	printf("%s %llu %llu\n", name, mine / ROUNDS, theirs / ROUNDS);
}

int main(void)
{
	long page = sysconf(_SC_PAGESIZE);
	struct tensormem_info info;
	char *window;
	int fd;

	fd = open(TENSORMEM_DEVICE, O_RDWR);
	if (fd < 0)
		err(1, "%s", TENSORMEM_DEVICE);
	if (ioctl(fd, TENSORMEM_IOC_INFO, &info))
		err(1, "info");
	window = mmap(NULL, info.window_size, PROT_READ | PROT_WRITE,
		      MAP_SHARED, fd, 0);
	if (window == MAP_FAILED)
		err(1, "mmap of the window");
	row("user-1m-churn", fd, window, page, 0);
	row("user-1m-reuse", fd, window, page, TENSORMEM_NOZERO);
	return 0;
}
