// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which board this is, and what its RAM is to be used for: so that a first run needs
 * no configuration. Everything that follows from it can be set otherwise.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/log2.h>
#include <linux/math64.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/of.h>
#include <linux/sizes.h>
#include <linux/string.h>

#include "board.h"

/* In MiB. */
struct tm_board_row {
	const char *name;
	const char *module;	/* the same as a compute module */
	u32 ram;
	u32 model;
	u32 protocol;
};

static const struct tm_board_row tm_board_rows[] = {
	{ "Raspberry Pi Zero 2", NULL, 512, 350, 64 },
	{ "Raspberry Pi 3", "Raspberry Pi Compute Module 3", 1024, 600, 128 },
	{ "Raspberry Pi 4", "Raspberry Pi Compute Module 4", 4096, 2560, 256 },
	{ "Raspberry Pi 5", "Raspberry Pi Compute Module 5", 8192, 6144, 512 },
};

static struct tm_board tm_this_board __ro_after_init;

const struct tm_board *tm_board(void)
{
	return &tm_this_board;
}

static bool tm_board_is(const struct tm_board_row *row, const char *model)
{
	return strstarts(model, row->name) ||
	       (row->module && strstarts(model, row->module));
}

/* By the name that the device tree gives the board, or NULL. */
static const struct tm_board_row *__init tm_board_by_name(void)
{
	struct device_node *root = of_find_node_by_path("/");
	const struct tm_board_row *found = NULL;
	const char *model;

	if (root && !of_property_read_string(root, "model", &model))
		for (u32 i = 0; i < ARRAY_SIZE(tm_board_rows) && !found; i++)
			if (tm_board_is(&tm_board_rows[i], model))
				found = &tm_board_rows[i];
	of_node_put(root);
	return found;
}

static const struct tm_board_row *__init tm_board_by_ram(u64 ram)
{
	const struct tm_board_row *best = NULL;
	u64 least = U64_MAX;

	for (u32 i = 0; i < ARRAY_SIZE(tm_board_rows); i++) {
		u64 rows = (u64)tm_board_rows[i].ram * SZ_1M;
		u64 off = max(rows, ram) - min(rows, ram);

		if (off < least) {
			least = off;
			best = &tm_board_rows[i];
		}
	}
	return best;
}

/*
 * What a board is sold with. Firmware and kernel keep up to a quarter of that for themselves, which is
 * no reason to divide the rest in another way; a limit on the command line (mem=) is.
 */
static u64 __init tm_board_nominal(u64 ram)
{
	u64 nominal = roundup_pow_of_two(ram);

	return ram >= nominal / 4 * 3 ? nominal : ram;
}

void __init tm_board_init(void)
{
	u64 ram = (u64)totalram_pages() << PAGE_SHIFT;
	const struct tm_board_row *row = tm_board_by_name();

	tm_this_board.matched = row;
	if (row)
		ram = tm_board_nominal(ram);
	else
		row = tm_board_by_ram(ram);
	tm_this_board.name = row->name;
	tm_this_board.ram = ram;
	/* Of MiB, which keeps it in 64 bits. */
	tm_this_board.model = div_u64(ram * row->model, row->ram);
	tm_this_board.protocol = div_u64(ram * row->protocol, row->ram);
}
