// SPDX-License-Identifier: GPL-2.0-only
#include <linux/init.h>
#include <linux/module.h>

#include "client.h"
#include "device.h"
#include "memory.h"
#include "pages.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static int __init tm_init(void)
{
	int err;

	err = tm_pages_init();
	if (err)
		return err;
	err = tm_clients_init();
	if (err)
		goto err_pages;
	err = tm_device_init();
	if (err)
		goto err_clients;
	return 0;

err_clients:
	tm_clients_exit();
err_pages:
	tm_pages_exit();
	return err;
}

static void __exit tm_exit(void)
{
	tm_device_exit();
	tm_clients_exit();
	/* No client is left, but pages of a dead one may still be held. */
	tm_memory_exit();
	tm_pages_exit();
}

module_init(tm_init);
module_exit(tm_exit);

MODULE_DESCRIPTION("Memory for tensors and LLM inference");
MODULE_AUTHOR("The tensormem authors");
MODULE_LICENSE("GPL");
