/* SPDX-License-Identifier: MIT */
/* The sizes that the tools give are powers of two. */
#define roundup_pow_of_two(n) (n)
