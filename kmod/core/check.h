/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Structural checkers: everything that must be true of a core object between two
 * operations. Linear or worse; for tests and for the debug build, never for a
 * hot path.
 *
 * Return: NULL when all holds, else a sentence that says what does not.
 */
#ifndef TM_CORE_CHECK_H
#define TM_CORE_CHECK_H

#include "core/buddy.h"
#include "core/chunk.h"

const char *tm_chunk_check(const struct tm_chunk_pool *pool);
const char *tm_buddy_check(const struct tm_buddy *buddy);

#endif
