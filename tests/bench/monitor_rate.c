// SPDX-License-Identifier: GPL-2.0-only
/*
 * monitor_rate ROUNDS - allocate a block of the RT pool and free it, so many times, and print the nanoseconds of all of
 * that: four events a round (rt_alloc, rt_free and the two calls). Nothing comes faster than these, and each round takes
 * the same steps; a tensor's free leaves work to RCU, which takes now more and now less.
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define ARENA	(2ul << 20)
#define BLOCK	1024

static unsigned long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void once(int fd)
{
	struct tensormem_rt_alloc a = { .size = BLOCK };
	struct tensormem_rt_block b = { 0 };

	if (ioctl(fd, TENSORMEM_IOC_RT_ALLOC, &a))
		err(1, "RT_ALLOC");
	b.handle = a.handle;
	if (ioctl(fd, TENSORMEM_IOC_RT_FREE, &b))
		err(1, "RT_FREE");
}

int main(int argc, char **argv)
{
	long rounds = argc > 1 ? atol(argv[1]) : 0;
	int device = open("/dev/tensormem", O_RDWR);
	struct tensormem_rt_open rt = { .size = ARENA, .arena = -1 };
	unsigned long long begin;

	if (rounds < 1)
		errx(2, "usage: monitor_rate ROUNDS");
	if (device < 0)
		err(1, "/dev/tensormem");
	if (ioctl(device, TENSORMEM_IOC_RT_OPEN, &rt))
		err(1, "RT_OPEN");
	for (int i = 0; i < 100; i++)
		once(rt.fd);
	begin = now();
	for (long i = 0; i < rounds; i++)
		once(rt.fd);
	printf("%llu\n", now() - begin);
	return 0;
}
