/* SPDX-License-Identifier: MIT */
/*
 * What bcc's own headers ask of a kernel's, and no more. The tools read tracepoints, whose
 * layout tracefs tells, so they need neither the headers of the running kernel on the
 * board nor the seconds that a compiler takes to read them, and no new kernel breaks them.
 */
#define CONFIG_BPF_SYSCALL 1
