// SPDX-License-Identifier: GPL-2.0-only
/*
 * Instructions of each call of the RT core on this machine, beside malloc() and free().
 *
 *   rt_core core|malloc
 *
 * Prints "NAME WORST MEDIAN COUNT" lines. The program under test is a child that is stepped an instruction at a
 * time from just before a call until just after it, so the numbers are exact, whatever else the machine does, and the
 * same in each run; arguments, call and return are in them. Random calls on an arena that is nine tenths
 * full; of those, some are counted, and all calls of the scenes that are made to be long: merges with both neighbours out of
 * the middle of their lists, sixteen classes, waiters in two rings.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/rt.h"

#define GRANULE		128
#define SIZE		16384		/* granules: 2 MiB */
#define LONGEST		64
#define STEPS		20000
#define COUNTED_ONE_IN	100
#define MOST		65536		/* counted calls */

enum what {
	ALLOC,
	ALLOC_RESERVED,
	FREE,
	FREE_RESERVED,
	PIN,
	UNPIN,
	RESERVE,
	UNRESERVE,
	JOIN,
	LEAVE,
	WAIT,
	CANCEL,
	SERVE,
	MOVE_BEGIN,
	MOVE_END,
	MALLOC_ALLOC,
	MALLOC_FREE,
	WHATS,
};

static const char *const names[WHATS] = {
	"alloc", "alloc-reserved", "free", "free-reserved", "pin", "unpin",
	"reserve", "unreserve", "join", "leave", "wait", "cancel", "serve",
	"move-begin", "move-end", "malloc", "free",
};

/* What the child says: which call comes, and whether it is in it. */
static volatile struct {
	u32 what;
	u32 on;
} *mark;

#define COUNTED(number, call)						\
	({								\
		mark->what = (number);					\
		raise(SIGTRAP);						\
		mark->on = 1;						\
		__auto_type result_ = (call);				\
		mark->on = 0;						\
		result_;						\
	})

#define SOMETIMES(number, call)						\
	(random_below(COUNTED_ONE_IN) ? (call) : COUNTED(number, call))

static u32 *count[WHATS];
static u32 nr_counts[WHATS];

static tm_raw_lock_t lock;
static struct tm_rt rt;
static struct tm_rt_client client[2];
static u32 handle[SIZE];
static u32 nr;

static u32 random_below(u32 n)
{
	static u64 state = 1;

	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (u32)(state >> 33) % n;
}

static void fail(const char *what)
{
	fprintf(stderr, "rt_core: %s\n", what);
	exit(1);
}

static void must(int err, const char *what)
{
	if (err)
		fail(what);
}

/* As many as are nine tenths of the arena; then each step frees one and allocates another. */
static void random_steps(void)
{
	struct tm_rt_block block;

	while (rt.heap.free > SIZE / 10) {
		if (tm_rt_alloc(&rt, &client[0], 1 + random_below(LONGEST), 0,
				&block))
			break;
		handle[nr++] = block.handle;
	}
	for (u32 i = 0; i < STEPS; i++) {
		u32 size = 1 + random_below(LONGEST);

		if (rt.heap.free > SIZE / 10 &&
		    !SOMETIMES(ALLOC, tm_rt_alloc(&rt, &client[0], size, 0,
						  &block))) {
			handle[nr++] = block.handle;
		} else {
			u32 victim = random_below(nr);

			must(SOMETIMES(FREE, tm_rt_free(&rt, &client[0],
							handle[victim])),
			     "free");
			handle[victim] = handle[--nr];
		}
	}
	while (nr)
		must(tm_rt_free(&rt, &client[0], handle[--nr]), "free");
}

/* Full of blocks of @n; every second one is freed, movable ones compacted, then the others freed. */
static void holes(u32 n, u32 flags, bool compact)
{
	struct tm_rt_block block;
	struct tm_rt_move move;

	for (nr = 0; nr < 64; nr++) {
		must(COUNTED(ALLOC, tm_rt_alloc(&rt, &client[nr % 2], n, flags,
						&block)), "alloc");
		handle[nr] = block.handle;
	}
	/* What is left, so that it is no neighbour. */
	must(tm_rt_alloc(&rt, &client[0], rt.heap.free, 0, &block), "alloc");
	for (u32 i = 0; flags && i < nr; i++) {
		must(COUNTED(UNPIN, tm_rt_unpin(&rt, &client[i % 2],
						handle[i])), "unpin");
		must(COUNTED(PIN, tm_rt_pin(&rt, &client[i % 2], handle[i],
					    &block)), "pin");
		must(tm_rt_unpin(&rt, &client[i % 2], handle[i]), "unpin");
	}
	for (u32 i = 0; i < nr; i += 2)
		must(COUNTED(FREE, tm_rt_free(&rt, &client[0], handle[i])),
		     "free");
	for (u32 rounds = 0; compact && rounds < 2;) {
		enum tm_rt_step step = COUNTED(MOVE_BEGIN,
					       tm_rt_move_begin(&rt, &move));

		if (step == TM_RT_STEP_MOVE)
			COUNTED(MOVE_END, (tm_rt_move_end(&rt, &move), 0));
		rounds += step == TM_RT_STEP_ROUND;
	}
	/* Allocations that split and that find nothing short. */
	for (u32 i = 0; i < 4; i++)
		if (!COUNTED(ALLOC, tm_rt_alloc(&rt, &client[0], 2,
						i % 2 ? TM_RT_ALLOC_MOVABLE : 0,
						&block)))
			must(tm_rt_free(&rt, &client[0], block.handle), "free");
	for (u32 i = 1; i < nr; i += 4)
		must(COUNTED(FREE, tm_rt_free(&rt, &client[1], handle[i])),
		     "free");
	for (u32 c = 0; c < 2; c++) {
		while (COUNTED(LEAVE, tm_rt_leave(&rt, &client[c])))
			;
		must(COUNTED(JOIN, tm_rt_join(&rt, &client[c], c)), "join");
	}
}

static void reservations(void)
{
	struct tm_rt_block block[8], other;
	struct tm_rt_waiter w[3];

	for (u32 i = 0; i < TM_RT_CLASSES; i++)
		must(COUNTED(RESERVE, tm_rt_reserve(&rt, &client[0], 16 - i, 8)),
		     "reserve");
	if (COUNTED(RESERVE, tm_rt_reserve(&rt, &client[0], 99, 1)) != -ENOSPC)
		fail("17 classes");
	for (u32 round = 0; round < 2; round++) {
		for (u32 i = 0; i < 8; i++)
			must(COUNTED(ALLOC_RESERVED,
				     tm_rt_alloc(&rt, &client[0], 1, 0,
						 &block[i])), "alloc");
		/* None is left: from the heap. */
		must(COUNTED(ALLOC, tm_rt_alloc(&rt, &client[0], 1, 0, &other)),
		     "alloc");
		must(COUNTED(FREE, tm_rt_free(&rt, &client[0], other.handle)),
		     "free");
		for (u32 i = 0; i < 3; i++) {
			w[i] = (struct tm_rt_waiter){
				.client = &client[0],
				.size = 1,
			};
			COUNTED(WAIT, (tm_rt_wait(&rt, &w[i]), 0));
		}
		(void)COUNTED(CANCEL, tm_rt_cancel(&rt, &w[1]));
		for (u32 i = 0; i < 8; i++) {
			must(COUNTED(FREE_RESERVED,
				     tm_rt_free(&rt, &client[0],
						block[i].handle)), "free");
			COUNTED(SERVE, tm_rt_serve(&rt));
		}
		for (u32 i = 0; i < 3; i += 2)
			must(COUNTED(FREE_RESERVED,
				     tm_rt_free(&rt, &client[0],
						w[i].block.handle)), "free");
	}
	for (u32 i = 0; i < TM_RT_CLASSES; i++)
		must(COUNTED(UNRESERVE,
			     tm_rt_unreserve(&rt, &client[0], 16 - i)),
		     "unreserve");
}

/* Three wait for a full heap, of which the first is served from a list of many. */
static void waiting(void)
{
	struct tm_rt_waiter w[3];
	struct tm_rt_block block;

	for (nr = 0; !tm_rt_alloc(&rt, &client[1], 4, 0, &block); nr++)
		handle[nr] = block.handle;
	for (u32 i = 0; i < 3; i++) {
		w[i] = (struct tm_rt_waiter){
			.client = &client[0],
			.size = 2,
			.flags = i ? TM_RT_ALLOC_MOVABLE : 0,
		};
		COUNTED(WAIT, (tm_rt_wait(&rt, &w[i]), 0));
		COUNTED(SERVE, tm_rt_serve(&rt));
	}
	for (u32 i = 0; i < nr; i += 3)
		must(COUNTED(FREE, tm_rt_free(&rt, &client[1], handle[i])),
		     "free");
	for (u32 i = 0; i < 4; i++)
		COUNTED(SERVE, tm_rt_serve(&rt));
}

static void run_core(void)
{
	must(tm_rt_init(&rt, &lock, SIZE, 4096), "init");
	for (u32 c = 0; c < 2; c++)
		must(tm_rt_join(&rt, &client[c], c), "join");
	random_steps();
	for (u32 n = 2; n < 70; n = n * 2 + 1)
		for (u32 how = 0; how < 3; how++)
			holes(n, how ? TM_RT_ALLOC_MOVABLE : 0, how == 2);
	reservations();
	waiting();
}

static void run_malloc(void)
{
	static void *block[SIZE];
	static u32 length[SIZE];
	u32 used = 0;

	for (u32 i = 0; i < STEPS + SIZE; i++) {
		u32 size = 1 + random_below(LONGEST);
		bool warm = i < SIZE;

		if (used + size <= SIZE / 10 * 9) {
			size_t bytes = (size_t)size * GRANULE;

			block[nr] = warm ? malloc(bytes) :
					   SOMETIMES(MALLOC_ALLOC, malloc(bytes));
			length[nr++] = size;
			used += size;
		} else {
			u32 victim = random_below(nr);
			void *p = block[victim];

			if (warm)
				free(p);
			else
				SOMETIMES(MALLOC_FREE, (free(p), 0));
			used -= length[victim];
			block[victim] = block[--nr];
			length[victim] = length[nr];
		}
	}
}

/* One instruction of the child. */
static void step(pid_t child)
{
	int status;

	if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) ||
	    waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
		fail("the child cannot be stepped");
}

static void count_call(pid_t child)
{
	u32 what = mark->what, n = 0;

	while (!mark->on)
		step(child);
	for (; mark->on; n++)
		step(child);
	if (nr_counts[what] == MOST)
		fail("too many calls");
	count[what][nr_counts[what]++] = n;
}

static int less(const void *a, const void *b)
{
	u32 x = *(const u32 *)a, y = *(const u32 *)b;

	return (x > y) - (x < y);
}

static void report(void)
{
	for (u32 i = 0; i < WHATS; i++) {
		u32 n = nr_counts[i];

		if (!n)
			continue;
		qsort(count[i], n, sizeof(u32), less);
		printf("%s %u %u %u\n", names[i], count[i][n - 1],
		       count[i][n / 2], n);
	}
}

int main(int argc, char **argv)
{
	bool core = argc == 2 && !strcmp(argv[1], "core");
	int status;
	pid_t child;

	if (argc != 2 || (!core && strcmp(argv[1], "malloc")))
		fail("usage: rt_core core|malloc");
	mark = mmap(NULL, sizeof(*mark), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (mark == MAP_FAILED)
		fail("no memory");
	for (u32 i = 0; i < WHATS; i++) {
		count[i] = calloc(MOST, sizeof(u32));
		if (!count[i])
			fail("no memory");
	}
	child = fork();
	if (!child) {
		must(ptrace(PTRACE_TRACEME, 0, NULL, NULL) ? 1 : 0,
		     "ptrace is not allowed");
		if (core)
			run_core();
		else
			run_malloc();
		_exit(0);
	}
	while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
		if (WSTOPSIG(status) != SIGTRAP)
			fail("the child crashed");
		count_call(child);
		if (ptrace(PTRACE_CONT, child, NULL, NULL))
			fail("the child is gone");
	}
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		fail("the child failed");
	report();
	return 0;
}
