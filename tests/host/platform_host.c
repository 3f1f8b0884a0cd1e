// SPDX-License-Identifier: GPL-2.0-only
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "platform_host.h"

static unsigned int expected_warnings;
static unsigned int fail_table;
static unsigned int tables;

#ifndef NDEBUG
u64 tm_host_steps;
#endif

void tm_host_die(const char *file, int line, const char *fmt, ...)
{
	va_list args;

	fprintf(stderr, "%s:%d: ", file, line);
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
	abort();
}

void tm_host_warned(const char *text, const char *file, int line)
{
	if (!expected_warnings)
		tm_host_die(file, line, "warning: %s", text);
	expected_warnings--;
}

void tm_host_expect_warnings(unsigned int n)
{
	expected_warnings = n;
}

unsigned int tm_host_missing_warnings(void)
{
	unsigned int n = expected_warnings;

	expected_warnings = 0;
	return n;
}

void *tm_table_alloc(size_t n, size_t size)
{
	void *table;

	if (fail_table && !--fail_table)
		return NULL;
	table = calloc(n, size);
	tables += table != NULL;
	return table;
}

void tm_table_free(void *table)
{
	tables -= table != NULL;
	free(table);
}

void tm_host_fail_table(unsigned int nth)
{
	fail_table = nth;
}

unsigned int tm_host_tables(void)
{
	return tables;
}
