// SPDX-License-Identifier: GPL-2.0-only
/*
 * First touch of 64 MiB of weights, and of as much ordinary memory in pages of
 * 4 KiB. Prints "map-64m-faults OURS PEER" in page faults.
 */
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define SIZE	(64ul << 20)

static long touch(volatile char *p, long page)
{
	struct rusage before, after;

	getrusage(RUSAGE_SELF, &before);
	for (unsigned long at = 0; at < SIZE; at += page)
		p[at] = 1;
	getrusage(RUSAGE_SELF, &after);
	return after.ru_minflt - before.ru_minflt;
}

int main(void)
{
	struct tensormem_alloc a = {
		.size = SIZE,
		.kind = TENSORMEM_KIND_WEIGHTS,
	};
	int fd = open(TENSORMEM_DEVICE, O_RDWR);
	long page = sysconf(_SC_PAGESIZE);
	char *ours, *peer;
	long faults;

	if (fd < 0)
		err(1, "%s", TENSORMEM_DEVICE);
	if (ioctl(fd, TENSORMEM_IOC_ALLOC, &a))
		err(1, "alloc");
	ours = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		    a.offset);
	peer = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ours == MAP_FAILED || peer == MAP_FAILED)
		err(1, "mmap");
	if (madvise(peer, SIZE, MADV_NOHUGEPAGE))
		err(1, "madvise");
	faults = touch(ours, page);
	printf("map-64m-faults %ld %ld\n", faults, touch(peer, page));
	return 0;
}
