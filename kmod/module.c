// SPDX-License-Identifier: GPL-2.0-only
#include <linux/init.h>
#include <linux/module.h>

#include "bandwidth_core.h"
#include "board.h"
#include "client.h"
#include "debugfs.h"
#include "device.h"
#include "dma_pool.h"
#include "event.h"
#include "model.h"
#include "packer.h"
#include "pages.h"
#include "park.h"
#include "pressure.h"
#include "quarantine.h"
#include "rt.h"
#include "rt_pool.h"
#include "runcache.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static int __init tm_init(void)
{
	int err;

	tm_board_init();
	err = tm_events_init();
	if (err)
		return err;
	err = tm_pages_init();
	if (err)
		goto err_events;
	err = tm_dma_pool_init();
	if (err)
		goto err_pages;
	err = tm_runcache_init();
	if (err)
		goto err_dma_pool;
	err = tm_clients_init();
	if (err)
		goto err_runcache;
	err = tm_park_init();
	if (err)
		goto err_clients;
	err = tm_models_init();
	if (err)
		goto err_park;
	tm_arenas_init();
	tm_rt_pool_init();
	err = tm_pressure_init();
	if (err)
		goto err_rt;
	err = tm_cores_init();
	if (err)
		goto err_pressure;
	err = tm_device_init();
	if (err)
		goto err_cores;
	tm_debugfs_init();
	return 0;

err_cores:
	tm_cores_exit();
err_pressure:
	tm_pressure_exit();
err_rt:
	tm_rt_pool_exit();
	tm_models_exit();
err_park:
	tm_park_exit();
err_clients:
	tm_clients_exit();
err_runcache:
	tm_runcache_exit();
err_dma_pool:
	tm_dma_pool_exit();
err_pages:
	tm_pages_exit();
err_events:
	tm_events_exit();
	return err;
}

static void __exit tm_exit(void)
{
	tm_debugfs_exit();
	tm_device_exit();
	tm_cores_exit();
	tm_pressure_exit();
	tm_rt_pool_exit();
	tm_models_exit();
	tm_packer_exit();
	tm_park_exit();
	/*
	 * No client is open, but somebody may still read the pages of a dead one:
	 * with no reserve to fill, nothing of theirs is zeroed before they are done.
	 */
	WARN_ON(tm_pages_set_reserve(0));
	tm_quarantine_exit();
	tm_clients_exit();
	tm_runcache_exit();
	tm_dma_pool_exit();
	tm_pages_exit();
	tm_events_exit();
}

module_init(tm_init);
module_exit(tm_exit);

MODULE_DESCRIPTION("Memory for tensors and LLM inference");
MODULE_AUTHOR("The tensormem authors");
MODULE_LICENSE("GPL");
