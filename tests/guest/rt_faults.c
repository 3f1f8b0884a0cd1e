// SPDX-License-Identifier: GPL-2.0-only
/*
 * What touching an arena of the RT pool costs in page faults.
 *
 *	rt_faults CHUNKS
 *
 * Counts the faults of this very process (getrusage) while it touches each page of a mapping, in
 * all the ways there are to come by one, and prints them by name. Python would count its own, too.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define BOTH	(PROT_READ | PROT_WRITE)

static size_t page, size;
static int arena;
static const char *separator = "{";

static void say(const char *name, long value)
{
	printf("%s\"%s\": %ld", separator, name, value);
	separator = ", ";
	fflush(stdout);
}

static long faults(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_SELF, &usage))
		err(1, "getrusage");
	return usage.ru_minflt + usage.ru_majflt;
}

static long reading(const volatile char *at, size_t length)
{
	long before = faults();

	for (size_t i = 0; i < length; i += page)
		at[i];
	return faults() - before;
}

static long writing(volatile char *at, size_t length)
{
	long before = faults();

	for (size_t i = 0; i < length; i += page)
		at[i] = 1;
	return faults() - before;
}

static char *map(int prot, size_t length, size_t offset)
{
	char *at = mmap(NULL, length, prot, MAP_SHARED, arena, offset);

	if (at == MAP_FAILED)
		err(1, "mmap");
	return at;
}

static void unmap(char *at, size_t length)
{
	if (munmap(at, length))
		err(1, "munmap");
}

static long missing(char *at, size_t length)
{
	unsigned char *there = calloc(1, length / page);
	long count = 0;

	if (!there || mincore(at, length, there))
		err(1, "mincore");
	for (size_t i = 0; i < length / page; i++)
		count += !(there[i] & 1);
	free(there);
	return count;
}

/* What this program itself has not touched yet must not be counted. */
static void warm_up(void)
{
	char *at = mmap(NULL, size, BOTH, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (at == MAP_FAILED)
		err(1, "mmap");
	reading(at, size);
	writing(at, size);
	missing(at, size);
	unmap(at, size);
}

static void mappings(void)
{
	char *at = map(BOTH, size, 0);

	say("missing", missing(at, size));
	say("written first", writing(at, size));
	say("read then", reading(at, size));
	unmap(at, size);
	at = map(BOTH, size, 0);
	say("read first", reading(at, size));
	say("written then", writing(at, size));
	unmap(at, size);
	at = map(PROT_READ, size, 0);
	say("missing, read-only", missing(at, size));
	say("read-only", reading(at, size));
	unmap(at, size);
	at = map(BOTH, 3 * page, size - 3 * page);
	say("missing of a part", missing(at, 3 * page));
	say("a part", writing(at, 3 * page));
	unmap(at, 3 * page);
}

static void by_another_client(int device)
{
	struct tensormem_rt_open join = { .arena = arena };
	int first = arena;
	char *at;

	if (ioctl(device, TENSORMEM_IOC_RT_OPEN, &join))
		err(1, "joining");
	arena = join.fd;
	at = map(BOTH, size, 0);
	say("joined", writing(at, size));
	unmap(at, size);
	close(arena);
	arena = first;
}

static void given_up(void)
{
	char *at = map(BOTH, size, 0);

	if (madvise(at, size, MADV_DONTNEED))
		err(1, "madvise");
	say("missing when given up", missing(at, size));
	say("brought back", writing(at, size));
	say("and again", writing(at, size) + reading(at, size));
	unmap(at, size);
}

static void child(char *at)
{
	/* Its own pages are shared with the parent: this is what writes to them. */
	warm_up();
	faults();
	say("missing in a child", missing(at, size));
	say("inherited", reading(at, size) + writing(at, size));
	say("inherited, again", reading(at, size) + writing(at, size));
	unmap(at, size);
	at = map(BOTH, size, 0);
	say("mapped in a child", writing(at, size) + reading(at, size));
	fflush(stdout);
	_exit(0);
}

static void across_fork(void)
{
	char *at = map(BOTH, size, 0);
	int status;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid)
		child(at);
	if (waitpid(pid, &status, 0) != pid || status)
		errx(1, "the child ended with %#x", status);
	warm_up();
	say("parent after fork", writing(at, size) + reading(at, size));
	unmap(at, size);
}

int main(int argc, char **argv)
{
	int device = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC);
	struct tensormem_rt_open open_it = { .arena = -1 };
	struct tensormem_info info = { 0 };

	if (argc != 2)
		return 2;
	if (device < 0 || ioctl(device, TENSORMEM_IOC_INFO, &info))
		err(1, "%s", TENSORMEM_DEVICE);
	page = info.page_size;
	open_it.size = strtoul(argv[1], NULL, 0) * info.chunk_size;
	if (ioctl(device, TENSORMEM_IOC_RT_OPEN, &open_it))
		err(1, "no arena");
	arena = open_it.fd;
	size = open_it.size;
	say("pages", size / page);
	warm_up();
	mappings();
	by_another_client(device);
	given_up();
	across_fork();
	printf("}\n");
	return 0;
}
