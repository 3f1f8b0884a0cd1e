/* SPDX-License-Identifier: MIT */
/* As the running kernel has it: the tools tell it. */
#define PAGE_SIZE TM_PAGE_SIZE
