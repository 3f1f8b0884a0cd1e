// SPDX-License-Identifier: GPL-2.0-only
/*
 * Cannot be unloaded, having no exit: what proves that the guest notices.
 */
#include <linux/module.h>

static int __init tm_stay_init(void)
{
	return 0;
}

module_init(tm_stay_init);

MODULE_DESCRIPTION("A module that stays, for testing the test gate");
MODULE_LICENSE("GPL");
