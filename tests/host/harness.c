// SPDX-License-Identifier: GPL-2.0-only
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"

#define OPS_KEPT	12
#define OP_LENGTH	112

/* Shared with the test's process: what it was doing when it died. */
struct context {
	u64 steps;
	u64 seed;
	u32 round_steps;
	u32 step;
	bool random;
	char op[OPS_KEPT][OP_LENGTH];
};

static struct context *context;
static struct tm_test *first;
static struct tm_test **last = &first;

/* The environment's, if @has_. */
static bool has_seed, has_steps;
static u64 env_seed, env_steps;

void tm_test_register(struct tm_test *test)
{
	*last = test;
	last = &test->next;
}

u64 tm_rand(struct tm_rng *rng)
{
	u64 z = rng->state += 0x9e3779b97f4a7c15;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

u32 tm_rand_below(struct tm_rng *rng, u32 n)
{
	return (u32)(tm_rand(rng) % n);
}

bool tm_rand_one_in(struct tm_rng *rng, u32 n)
{
	return !tm_rand_below(rng, n);
}

u32 tm_rand_weighted(struct tm_rng *rng, const u32 *weights, u32 n)
{
	u32 sum = 0, pick;

	for (u32 i = 0; i < n; i++)
		sum += weights[i];
	pick = tm_rand_below(rng, sum);
	for (u32 i = 0; i < n; i++) {
		if (pick < weights[i])
			return i;
		pick -= weights[i];
	}
	return n - 1;
}

bool tm_round_next(struct tm_round *round, u32 rounds, u32 steps)
{
	u64 seed = has_seed ? env_seed : round->nr + 1;

	if (round->nr == (has_seed ? 1 : rounds)) {
		context->random = false;
		return false;
	}
	round->nr++;
	round->steps = has_steps ? (u32)env_steps : steps;
	round->rng.state = seed;
	context->random = true;
	context->seed = seed;
	context->round_steps = round->steps;
	context->step = 0;
	return true;
}

void tm_op(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vsnprintf(context->op[context->step % OPS_KEPT], OP_LENGTH, fmt, args);
	va_end(args);
	context->step++;
	context->steps++;
}

void tm_test_fail(const char *file, int line, const char *fmt, ...)
{
	va_list args;

	fprintf(stderr, "%s:%d: ", file, line);
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
	/* Not exit(): the leaks of a test cut short are no news. */
	_exit(1);
}

void tm_check_aborts(const char *what, void (*fn)(void *), void *arg)
{
	int status = 0;
	pid_t pid = fork();

	if (!pid) {
		int null = open("/dev/null", O_WRONLY);

		dup2(null, STDERR_FILENO);
		fn(arg);
		_exit(0);
	}
	CHECK(pid > 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
		tm_test_fail(__FILE__, __LINE__, "%s did not abort", what);
}

static void full_name(char *name, size_t size, const struct tm_test *test)
{
	if (test->variant)
		snprintf(name, size, "%s[%s]", test->name, test->variant);
	else
		snprintf(name, size, "%s", test->name);
}

static bool selected(const char *name, char **patterns, int n)
{
	for (int i = 0; i < n; i++)
		if (strstr(name, patterns[i]))
			return true;
	return !n;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void explain(const char *name, int status)
{
	u32 kept = context->step < OPS_KEPT ? context->step : OPS_KEPT;

	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU)
		fprintf(stderr, "  took longer than TIMEOUT\n");
	else if (WIFSIGNALED(status))
		fprintf(stderr, "  ended by signal %d\n", WTERMSIG(status));
	if (context->random)
		fprintf(stderr,
			"  replay: SEED=%llu STEPS=%u core_test '%s'\n",
			context->seed, context->round_steps, name);
	for (u32 i = context->step - kept; i < context->step; i++)
		fprintf(stderr, "  step %u: %s\n", i,
			context->op[i % OPS_KEPT]);
}

static bool run(const struct tm_test *test, const char *name,
		u64 timeout)
{
	double start = now();
	int status = 0;
	pid_t pid;

	memset(context, 0, sizeof(*context));
	fflush(NULL);
	pid = fork();
	if (!pid) {
		setrlimit(RLIMIT_CPU, &(struct rlimit){ timeout, timeout + 1 });
		test->fn(test->arg);
		if (tm_host_missing_warnings())
			tm_test_fail(test->name, 0, "a warning did not come");
		if (tm_host_tables())
			tm_test_fail(test->name, 0, "%u tables leaked",
				     tm_host_tables());
		/* Runs the leak sanitizer. */
		exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid) {
		perror(name);
		exit(2);
	}
	printf("%s %s", status ? "FAIL" : "ok  ", name);
	if (context->steps)
		printf(" (%llu steps, %.1f s)", context->steps, now() - start);
	putchar('\n');
	fflush(stdout);
	if (status)
		explain(name, status);
	return !status;
}

/* A number from the environment; ends the program when it is none. */
static bool env_number(const char *name, u64 *number)
{
	const char *text = getenv(name);
	char *end;

	if (!text)
		return false;
	errno = 0;
	*number = strtoull(text, &end, 0);
	if (end == text || *end || errno) {
		fprintf(stderr, "%s=%s is not a number\n", name, text);
		exit(2);
	}
	return true;
}

static int usage(const char *argv0)
{
	fprintf(stderr,
		"usage: %s [-l] [-x] [part of a test's name]...\n"
		"  -l  list the tests\n"
		"  -x  stop at the first failure\n", argv0);
	return 2;
}

int main(int argc, char **argv)
{
	u64 timeout = 120;
	unsigned int passed = 0, failed = 0;
	bool list = false, stop = false;
	double start = now();
	u64 steps = 0;
	int opt;

	while ((opt = getopt(argc, argv, "lx")) != -1) {
		if (opt == 'l')
			list = true;
		else if (opt == 'x')
			stop = true;
		else
			return usage(argv[0]);
	}
	has_seed = env_number("SEED", &env_seed);
	has_steps = env_number("STEPS", &env_steps);
	env_number("TIMEOUT", &timeout);
	context = mmap(NULL, sizeof(*context), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (context == MAP_FAILED) {
		perror("mmap");
		return 2;
	}
	for (struct tm_test *test = first; test; test = test->next) {
		char name[128];

		full_name(name, sizeof(name), test);
		if (!selected(name, argv + optind, argc - optind))
			continue;
		if (list) {
			puts(name);
			continue;
		}
		if (run(test, name, timeout))
			passed++;
		else
			failed++;
		steps += context->steps;
		if (failed && stop)
			break;
	}
	if (list)
		return 0;
	printf("%llu steps in %.1f s\n", steps, now() - start);
	printf("%u passed, %u failed\n", passed, failed);
	/* Nothing run is no success: a misspelt name must not pass. */
	return failed || !passed;
}
