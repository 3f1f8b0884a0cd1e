/* SPDX-License-Identifier: MIT */
/* The oldest kernel that the module is for; bcc asks for much older ones. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
