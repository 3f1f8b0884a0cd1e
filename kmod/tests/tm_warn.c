// SPDX-License-Identifier: GPL-2.0-only
/*
 * Warns when loaded: what proves that the guest's splat gate is not asleep.
 */
#include <linux/bug.h>
#include <linux/module.h>

static int __init tm_warn_init(void)
{
	WARN(1, "tensormem: a deliberate warning\n");
	return 0;
}

static void __exit tm_warn_exit(void)
{
}

module_init(tm_warn_init);
module_exit(tm_warn_exit);

MODULE_DESCRIPTION("A deliberate warning, for testing the test gate");
MODULE_LICENSE("GPL");
