// SPDX-License-Identifier: GPL-2.0-only
/*
 * Loses memory when unloaded: what proves that the guest's leak gate is not asleep.
 */
#include <linux/module.h>
#include <linux/slab.h>

#define TM_LEAK_OBJECTS	16

static void *tm_leak[TM_LEAK_OBJECTS];

static int __init tm_leak_init(void)
{
	for (int i = 0; i < TM_LEAK_OBJECTS; i++) {
		tm_leak[i] = kmalloc(96, GFP_KERNEL);
		if (!tm_leak[i])
			goto err;
	}
	return 0;

err:
	for (int i = 0; i < TM_LEAK_OBJECTS; i++)
		kfree(tm_leak[i]);
	return -ENOMEM;
}

/* The only pointers to the objects go away with the module. */
static void __exit tm_leak_exit(void)
{
}

module_init(tm_leak_init);
module_exit(tm_leak_exit);

MODULE_DESCRIPTION("A deliberate leak, for testing the test gate");
MODULE_LICENSE("GPL");
