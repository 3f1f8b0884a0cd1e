// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the RT pool promises, from user space, while the board drowns: one process computes, one takes and touches memory, and one
 * keeps the arena full and in pieces and has it compacted all the time. Prints
 *
 *   reserved-misses OURS PEER   of 100,000 allocations with a deadline of ten times the median: refused, or back
 *                               later than that. Peer: the same without a reservation, times ten
 *   late-returns OURS PEER      of requests for more than there is: back later than the deadline and a step. Peer:
 *                               who tries, sleeps for 100 us and tries again
 *
 * and, with a # in front, how the times were found. The clock is the guest's. A step is what may lie between a deadline and the
 * return: a copy of TENSORMEM_RT_STEP granules, a wake-up, and a call that is refused, each measured here at its longest.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define ARENA		(8ul << 20)
#define RESERVED_BYTES	1024
#define RESERVED_COUNT	64
#define ALLOCATIONS	100000
#define BURST		10		/* then the hogs run */
#define PEER_ONE_IN	10
#define PERIOD_NS	300000ull
#define REQUESTS	2000
#define RETRY_NS	100000ull
#define SAMPLES		1000
#define HOG_BYTES	(8ul << 20)
#define HOLES		2048		/* movable blocks of the third process */

typedef unsigned long long u64;

static u64 now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void sleep_until(u64 at)
{
	struct timespec t = { at / 1000000000, at % 1000000000 };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL))
		;
}

static unsigned int random_below(unsigned int n)
{
	static u64 state = 1;

	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (unsigned int)(state >> 33) % n;
}

static int open_rt(int dev, int arena, unsigned int priority)
{
	struct tensormem_rt_open rt = {
		.size = arena < 0 ? ARENA : 0,
		.arena = arena,
		.priority = priority,
		.movable = arena < 0 ? 8192 : 0,
	};

	if (ioctl(dev, TENSORMEM_IOC_RT_OPEN, &rt))
		err(1, "RT_OPEN");
	return rt.fd;
}

/* Return: 0 or an errno. */
static int take(int fd, u64 size, u64 deadline, unsigned int flags,
		unsigned int *handle)
{
	struct tensormem_rt_alloc a = {
		.size = size,
		.deadline_ns = deadline,
		.flags = flags,
	};

	int error = ioctl(fd, TENSORMEM_IOC_RT_ALLOC, &a) ? errno : 0;

	*handle = a.handle;
	return error;
}

static void give(int fd, unsigned int handle)
{
	struct tensormem_rt_block b = { .handle = handle };

	if (ioctl(fd, TENSORMEM_IOC_RT_FREE, &b))
		err(1, "RT_FREE");
}

static void unpin(int fd, unsigned int handle)
{
	struct tensormem_rt_block b = { .handle = handle };

	if (ioctl(fd, TENSORMEM_IOC_RT_UNPIN, &b))
		err(1, "RT_UNPIN");
}

static void compute(int fd)
{
	volatile unsigned int x = 0;

	(void)fd;
	for (;;)
		x = x * 3 + 1;
}

static void take_memory(int fd)
{
	(void)fd;
	for (;;) {
		char *p = malloc(HOG_BYTES);

		if (!p)
			err(1, "malloc");
		for (unsigned long i = 0; i < HOG_BYTES; i += 4096)
			p[i] = 1;
		free(p);
	}
}

/* Fill it with blocks that move, free some, and ask for one that is longer than any hole. */
static void fragment(int fd)
{
	static unsigned int handle[HOLES];
	unsigned int nr = 0, big;

	for (;;) {
		while (nr < HOLES &&
		       !take(fd, 128 * (2 + random_below(100)), 0,
			     TENSORMEM_RT_MOVABLE, &handle[nr]))
			unpin(fd, handle[nr++]);
		for (unsigned int i = 0; i < 64 && nr; i++) {
			unsigned int victim = random_below(nr);

			give(fd, handle[victim]);
			handle[victim] = handle[--nr];
		}
		if (!take(fd, 256 << 10, 1000000, 0, &big))
			give(fd, big);
	}
}

static pid_t hog(void (*what)(int), int fd)
{
	pid_t pid = fork();

	if (pid < 0)
		err(1, "fork");
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	what(fd);
	exit(1);
}

static int less(const void *a, const void *b)
{
	u64 x = *(const u64 *)a, y = *(const u64 *)b;

	return (x > y) - (x < y);
}

/* The median of an allocation inside the reservation. */
static u64 median(int fd)
{
	static u64 took[SAMPLES];
	unsigned int handle;

	for (unsigned int i = 0; i < SAMPLES; i++) {
		u64 start = now();

		if (take(fd, RESERVED_BYTES, 1000000000, 0, &handle))
			err(1, "a reserved block");
		took[i] = now() - start;
		give(fd, handle);
	}
	qsort(took, SAMPLES, sizeof(*took), less);
	return took[SAMPLES / 2];
}

/* Whether an allocation was refused or came late. */
static bool missed(int fd, u64 within, u64 *worst)
{
	unsigned int handle;
	u64 start = now();
	int error = take(fd, RESERVED_BYTES, within, 0, &handle);
	u64 took = now() - start;

	if (!error)
		give(fd, handle);
	if (took > *worst)
		*worst = took;
	return error || took > within;
}

static void reserve(int fd)
{
	struct tensormem_rt_reserve r = {
		.size = RESERVED_BYTES,
		.count = RESERVED_COUNT,
	};

	if (ioctl(fd, TENSORMEM_IOC_RT_RESERVE, &r))
		err(1, "RT_RESERVE");
}

static void reserved(int fd, int other)
{
	u64 within, next = now(), worst = 0, peer_worst = 0;
	unsigned int misses = 0, peer = 0, held[RESERVED_COUNT - 1];

	/* All but one are taken. */
	for (unsigned int i = 0; i < RESERVED_COUNT - 1; i++)
		if (take(fd, RESERVED_BYTES, 0, TENSORMEM_RT_RESERVED, &held[i]))
			err(1, "a reserved block");
	within = 10 * median(fd);
	for (unsigned int i = 0; i < ALLOCATIONS; i++) {
		misses += missed(fd, within, &worst);
		if (i % PEER_ONE_IN == 0)
			peer += missed(other, within, &peer_worst);
		if (i % BURST == BURST - 1) {
			next = now() + PERIOD_NS;
			sleep_until(next);
		}
	}
	for (unsigned int i = 0; i < RESERVED_COUNT - 1; i++)
		give(fd, held[i]);
	printf("# reserved: deadline %llu ns, worst %llu ns; without a reservation %llu ns\n",
	       within, worst, peer_worst);
	printf("reserved-misses %u %u\n", misses, peer * PEER_ONE_IN);
	fflush(stdout);
}

/* The longest of each of what may lie between a deadline and the return. */
static u64 step_of(int fd)
{
	static char from[TENSORMEM_RT_STEP * 128], to[sizeof(from)];
	u64 copy = 0, wake = 0, call = 0;
	unsigned int handle;

	for (unsigned int i = 0; i < SAMPLES; i++) {
		u64 at = now(), took;

		memcpy(to, from, sizeof(to));
		__asm__ volatile("" : : "r"(to) : "memory");
		took = now() - at;
		copy = took > copy ? took : copy;
		at = now();
		if (take(fd, ARENA, 0, 0, &handle) != ENOSPC)
			errx(1, "all of the arena");
		took = now() - at;
		call = took > call ? took : call;
		at = now() + PERIOD_NS + random_below(PERIOD_NS);
		sleep_until(at);
		took = now() - at;
		wake = took > wake ? took : wake;
	}
	printf("# step: copy %llu ns, wake-up %llu ns, call %llu ns\n", copy,
	       wake, call);
	return copy + wake + call;
}

/* What cannot be had until somebody frees: by the deadline, or as the peer does it. */
static bool late(int fd, bool retry, u64 step, u64 *worst, unsigned int *got)
{
	u64 size = 4096 + 4096 * random_below(64);
	u64 deadline = now() + 50000 + random_below(1000000), end;
	unsigned int handle;
	int error;

	if (!retry) {
		error = take(fd, size, deadline, TENSORMEM_RT_ABSOLUTE, &handle);
		if (error && error != ETIMEDOUT)
			err(1, "RT_ALLOC");
	} else {
		do
			error = take(fd, size, 0, 0, &handle);
		while (error && now() < deadline &&
		       (sleep_until(now() + RETRY_NS), true));
	}
	end = now();
	if (end > deadline && end - deadline > *worst)
		*worst = end - deadline;
	if (!error) {
		give(fd, handle);
		++*got;
	}
	return end > deadline + step;
}

static void returns(int fd)
{
	u64 step = step_of(fd), worst[2] = { 0 };
	unsigned int nr[2] = { 0 }, got[2] = { 0 };

	for (unsigned int i = 0; i < REQUESTS; i++)
		for (unsigned int peer = 0; peer < 2; peer++) {
			nr[peer] += late(fd, peer, step, &worst[peer],
					 &got[peer]);
			sleep_until(now() + PERIOD_NS);
		}
	printf("# late: %d requests, %u served, worst %llu ns after the deadline; retried: %u served, worst %llu ns\n",
	       REQUESTS, got[0], worst[0], got[1], worst[1]);
	printf("late-returns %u %u\n", nr[0], nr[1]);
}

int main(void)
{
	struct sched_param param = { .sched_priority = 80 };
	int dev = open(TENSORMEM_DEVICE, O_RDWR | O_CLOEXEC), rt, other;
	pid_t pid[3];

	if (dev < 0)
		err(1, TENSORMEM_DEVICE);
	rt = open_rt(dev, -1, 50);
	other = open_rt(dev, rt, 0);
	reserve(rt);
	pid[0] = hog(compute, -1);
	pid[1] = hog(take_memory, -1);
	pid[2] = hog(fragment, other);
	if (mlockall(MCL_CURRENT | MCL_FUTURE) ||
	    sched_setscheduler(0, SCHED_FIFO, &param))
		err(1, "SCHED_FIFO");
	reserved(rt, other);
	/* The arena is full by now. */
	returns(rt);
	for (int i = 0; i < 3; i++) {
		int status;

		kill(pid[i], SIGKILL);
		if (waitpid(pid[i], &status, 0) != pid[i] ||
		    !WIFSIGNALED(status))
			errx(1, "hog %d had ended", i);
	}
	return 0;
}
