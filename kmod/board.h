/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_BOARD_H
#define TM_BOARD_H

#include <linux/types.h>

/**
 * struct tm_board - what this machine's memory is divided into unless told otherwise
 * @name: the row of the table that says so
 * @matched: whether this is such a board; else the row is the nearest in RAM
 * @ram: bytes that the row was scaled to
 * @model: bytes for models, their caches and what else is no protocol's
 * @protocol: bytes that the RT pool may have
 */
struct tm_board {
	const char *name;
	bool matched;
	u64 ram;
	u64 model;
	u64 protocol;
};

void tm_board_init(void);
const struct tm_board *tm_board(void);

#endif
