// SPDX-License-Identifier: GPL-2.0-only
/*
 * monitor_rate ROUNDS - allocate a page and free it, so many times, and print the
 * nanoseconds of all of that: four events a round (alloc, free and the two calls).
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

static unsigned long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void once(int fd, long page)
{
	struct tensormem_alloc a = {
		.size = page,
		.kind = TENSORMEM_KIND_ACTIVATIONS,
	};
	struct tensormem_free f = { 0 };

	if (ioctl(fd, TENSORMEM_IOC_ALLOC, &a))
		err(1, "alloc");
	f.handle = a.handle;
	if (ioctl(fd, TENSORMEM_IOC_FREE, &f))
		err(1, "free");
}

int main(int argc, char **argv)
{
	long rounds = argc > 1 ? atol(argv[1]) : 0;
	long page = sysconf(_SC_PAGESIZE);
	int fd = open("/dev/tensormem", O_RDWR);
	unsigned long long begin;

	if (rounds < 1)
		errx(2, "usage: monitor_rate ROUNDS");
	if (fd < 0)
		err(1, "/dev/tensormem");
	for (int i = 0; i < 100; i++)
		once(fd, page);
	begin = now();
	for (long i = 0; i < rounds; i++)
		once(fd, page);
	printf("%llu\n", now() - begin);
	return 0;
}
