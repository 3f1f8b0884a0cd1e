// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/tensormem: the way in. Checks and copies what user space hands over and
 * calls the object concerned. The semantics are in the UAPI header.
 */
#include <linux/cache.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/stddef.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "bandwidth.h"
#include "client.h"
#include "core/geometry.h"
#include "device.h"
#include "dmabuf.h"
#include "kv_file.h"
#include "model.h"
#include "model_file.h"
#include "model_sysfs.h"
#include "pages.h"
#include "pressure.h"
#include "rt_file.h"
#include "rt_sysfs.h"
#include "sysfs.h"
#include "tensor.h"
#include "trace.h"
#include "vm.h"

/* The parts every version of a struct has had. */
#define TM_MIN_ALLOC	offsetofend(struct tensormem_alloc, handle)
#define TM_MIN_FREE	offsetofend(struct tensormem_free, handle)
#define TM_MIN_QUERY	offsetofend(struct tensormem_query, handle)
#define TM_MIN_NUMA	offsetofend(struct tensormem_set_numa, numa)
#define TM_MIN_QUOTA	offsetofend(struct tensormem_quota, bytes)
#define TM_MIN_BUDGET	offsetofend(struct tensormem_budget, bytes)

static int tm_device_info(struct tm_client *client, void __user *arg,
			  size_t size)
{
	struct tm_client_usage usage;
	struct tensormem_info info;
	int err;

	err = tm_args_in(&info, sizeof(info), 0, arg, size);
	if (err)
		return err;
	tm_client_usage(client, &usage);
	info = (struct tensormem_info){
		.abi_version = TENSORMEM_ABI_VERSION,
		.page_size = PAGE_SIZE,
		.chunk_size = TM_CHUNK_SIZE,
		.window_size = tm_client_window_size(),
		.quota = usage.quota,
		.used = usage.used,
		.kept = usage.kept,
		.nr_tensors = usage.nr_tensors,
		.max_batch = TM_MAX_BATCH,
		.cache_line = cache_line_size(),
		.nodes = tm_pages_nodes(),
	};
	return tm_args_out(arg, size, &info, sizeof(info));
}

static int tm_device_set_quota(struct tm_client *client, void __user *arg,
			       size_t size)
{
	struct tensormem_quota quota;
	int err;

	err = tm_args_in(&quota, sizeof(quota), TM_MIN_QUOTA, arg, size);
	return err ?: tm_client_set_quota(client, quota.bytes);
}

static int tm_device_set_budget(struct tm_client *client, void __user *arg,
				size_t size)
{
	struct tensormem_budget budget;
	int err;

	err = tm_args_in(&budget, sizeof(budget), TM_MIN_BUDGET, arg, size);
	return err ?: tm_bandwidth_set_budget(client, budget.bytes);
}

static int tm_device_bandwidth(struct tm_client *client, void __user *arg,
			       size_t size)
{
	struct tensormem_bandwidth bandwidth;
	struct tm_meter meter;
	int err;

	err = tm_args_in(&bandwidth, sizeof(bandwidth), 0, arg, size);
	if (err)
		return err;
	tm_bandwidth_usage(client, &meter);
	bandwidth = (struct tensormem_bandwidth){
		.budget = meter.budget,
		.used = meter.used,
		.moved = meter.moved,
		.excess = meter.excess,
		.waits = meter.waits,
		.held_ns = meter.held_ns,
		.period_ns = tm_bandwidth_period_ns(),
		.client = client->id,
		.throttle = tm_bandwidth_throttles(),
	};
	return tm_args_out(arg, size, &bandwidth, sizeof(bandwidth));
}

static int tm_device_set_numa(struct tm_client *client, void __user *arg,
			      size_t size)
{
	struct tensormem_set_numa set;
	struct tm_numa numa;
	int err;

	err = tm_args_in(&set, sizeof(set), TM_MIN_NUMA, arg, size);
	if (err)
		return err;
	if (set.flags)
		return -EINVAL;
	if (set.numa == TENSORMEM_NUMA_DEFAULT)
		set.numa = TENSORMEM_NUMA_LOCAL;
	err = tm_numa_parse(set.numa, set.nodes, &numa);
	if (!err)
		tm_client_set_numa(client, &numa);
	return err;
}

/* Hand out what was published; undo all of it when the caller can't be told. */
static int tm_device_alloc_results(struct tm_client *client,
				   const struct tm_items *items,
				   const struct tensormem_alloc *results,
				   u32 *failed)
{
	int err = 0;
	u32 i, ignored;

	for (i = 0; i < items->count && !err; i++) {
		*failed = i;
		err = tm_args_out(tm_item(items, i), items->size, &results[i],
				  sizeof(results[i]));
	}
	if (!err)
		return 0;
	/* Another thread may have guessed a handle and freed it: fine as well. */
	for (i = 0; i < items->count; i++)
		if (tm_tensor_free(client, &results[i].handle, 1, &ignored))
			continue;
	return err;
}

static int tm_device_alloc(void *object, const struct tm_items *items,
			   u32 *failed)
{
	struct tm_client *client = object;
	struct tensormem_alloc *requests;
	struct tm_tensor **tensors;
	u32 made = 0;
	int err;

	*failed = 0;
	err = tm_bandwidth_wait(client);
	if (err)
		return err;
	err = -ENOMEM;
	requests = kvmalloc_array(items->count, sizeof(*requests), TM_GFP);
	tensors = kvmalloc_array(items->count, sizeof(*tensors), TM_GFP);
	if (!requests || !tensors)
		goto out;

	for (; made < items->count; made++) {
		*failed = made;
		err = tm_args_in(&requests[made], sizeof(*requests),
				 TM_MIN_ALLOC, tm_item(items, made),
				 items->size);
		if (err)
			goto out;
		tensors[made] = tm_tensor_create(client, &requests[made]);
		if (IS_ERR(tensors[made])) {
			err = PTR_ERR(tensors[made]);
			goto out;
		}
	}
	err = tm_tensor_publish(client, tensors, made, requests, failed);
	if (!err) {
		made = 0;
		err = tm_device_alloc_results(client, items, requests, failed);
	}
out:
	while (made--)
		tm_tensor_discard(client, tensors[made]);
	kvfree(tensors);
	kvfree(requests);
	return err;
}

static int tm_device_free(void *object, const struct tm_items *items,
			  u32 *failed)
{
	struct tm_client *client = object;
	struct tensormem_free request;
	u32 *handles;
	int err = 0;

	*failed = 0;
	handles = kvmalloc_array(items->count, sizeof(*handles), TM_GFP);
	if (!handles)
		return -ENOMEM;
	for (u32 i = 0; i < items->count; i++) {
		*failed = i;
		err = tm_args_in(&request, sizeof(request), TM_MIN_FREE,
				 tm_item(items, i), items->size);
		if (!err && request.flags)
			err = -EINVAL;
		if (err)
			goto out;
		handles[i] = request.handle;
	}
	err = tm_tensor_free(client, handles, items->count, failed);
out:
	kvfree(handles);
	return err;
}

static int tm_device_query(void *object, const struct tm_items *items,
			   u32 *failed)
{
	struct tm_client *client = object;
	struct tensormem_query query;
	int err = 0;

	for (u32 i = 0; i < items->count && !err; i++) {
		*failed = i;
		err = tm_args_in(&query, sizeof(query), TM_MIN_QUERY,
				 tm_item(items, i), items->size);
		if (!err)
			err = tm_tensor_query(client, &query);
		if (!err)
			err = tm_args_out(tm_item(items, i), items->size,
					  &query, sizeof(query));
		if (!err && fatal_signal_pending(current))
			err = -EINTR;
	}
	return err;
}

static struct miscdevice tm_device;

static long tm_device_command(struct file *file, unsigned int cmd,
			      unsigned long arg)
{
	struct tm_client *client = file->private_data;
	void __user *user = (void __user *)arg;
	size_t size = _IOC_SIZE(cmd);

	if (_IOC_TYPE(cmd) != TENSORMEM_IOC_MAGIC ||
	    _IOC_DIR(cmd) != (_IOC_READ | _IOC_WRITE))
		return -ENOTTY;

	/* By number: the size in a command is the caller's idea of the struct. */
	switch (_IOC_NR(cmd)) {
	case _IOC_NR(TENSORMEM_IOC_INFO):
		return tm_device_info(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_SET_QUOTA):
		return tm_device_set_quota(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_SET_NUMA):
		return tm_device_set_numa(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_RELIEVE):
		return tm_pressure_file_relieve(user, size);
	case _IOC_NR(TENSORMEM_IOC_SET_BUDGET):
		return tm_device_set_budget(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_BANDWIDTH):
		return tm_device_bandwidth(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_ALLOC):
		return tm_args_single(client, user, size, tm_device_alloc);
	case _IOC_NR(TENSORMEM_IOC_FREE):
		return tm_args_single(client, user, size, tm_device_free);
	case _IOC_NR(TENSORMEM_IOC_QUERY):
		return tm_args_single(client, user, size, tm_device_query);
	case _IOC_NR(TENSORMEM_IOC_EXPORT):
		return tm_dmabuf_file_export(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_ALLOC_BATCH):
		return tm_args_batch(client, user, size, tm_device_alloc);
	case _IOC_NR(TENSORMEM_IOC_FREE_BATCH):
		return tm_args_batch(client, user, size, tm_device_free);
	case _IOC_NR(TENSORMEM_IOC_QUERY_BATCH):
		return tm_args_batch(client, user, size, tm_device_query);
	case _IOC_NR(TENSORMEM_IOC_KV_CREATE):
		return tm_kv_file_create(client, user, size);
	case _IOC_NR(TENSORMEM_IOC_MODEL_OPEN):
		return tm_model_file_open(client, &tm_device.this_device->kobj,
					  user, size);
	case _IOC_NR(TENSORMEM_IOC_RT_OPEN):
		return tm_rt_file_open(client, user, size);
	default:
		return -ENOTTY;
	}
}

static long tm_device_ioctl(struct file *file, unsigned int cmd,
			    unsigned long arg)
{
	u64 start = trace_tensormem_ioctl_enabled() ? ktime_get_ns() : 0;
	const struct tm_client *client = file->private_data;
	long ret = tm_device_command(file, cmd, arg);

	if (start)
		trace_tensormem_ioctl(client->id, _IOC_NR(cmd),
				      ret, ktime_get_ns() - start);
	return ret;
}

static int tm_device_open(struct inode *inode, struct file *file)
{
	struct tm_client *client = tm_client_create();

	if (IS_ERR(client))
		return PTR_ERR(client);
	file->private_data = client;
	/* Each client's mappings hang on its own inode: a window of its own. */
	file->f_mapping = client->inode->i_mapping;
	return 0;
}

static int tm_device_release(struct inode *inode, struct file *file)
{
	tm_client_destroy(file->private_data);
	return 0;
}

static void tm_device_fdinfo(struct seq_file *out, struct file *file)
{
	struct tm_client *client = file->private_data;
	struct tm_meter meter;

	tm_bandwidth_usage(client, &meter);
	seq_printf(out, "tensormem-client:\t%u\n", client->id);
#define TM_DEVICE_LINE(field)						\
	seq_printf(out, #field ":\t%llu\n", meter.field)
	TM_DEVICE_LINE(moved);
	TM_DEVICE_LINE(budget);
	TM_DEVICE_LINE(used);
	TM_DEVICE_LINE(excess);
	TM_DEVICE_LINE(waits);
	TM_DEVICE_LINE(held_ns);
#undef TM_DEVICE_LINE
}

static const struct file_operations tm_device_fops = {
	.owner = THIS_MODULE,
	.open = tm_device_open,
	.release = tm_device_release,
	.unlocked_ioctl = tm_device_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = tm_vm_mmap,
	.show_fdinfo = tm_device_fdinfo,
	.get_unmapped_area = tm_vm_unmapped_area,
};

static struct miscdevice tm_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "tensormem",
	.fops = &tm_device_fops,
	.mode = 0660,
};

int __init tm_device_init(void)
{
	int err;

	tm_device.groups = tm_sysfs_groups();
	if (!tm_device.groups)
		return -ENOMEM;
	err = misc_register(&tm_device);
	if (err) {
		tm_sysfs_exit();
		return err;
	}
	tm_models_start(&tm_device.this_device->kobj);
	tm_rt_sysfs_start(&tm_device.this_device->kobj);
	tm_pressure_start(&tm_device.this_device->kobj);
	return 0;
}

void tm_device_exit(void)
{
	tm_pressure_stop();
	tm_rt_sysfs_exit();
	tm_model_sysfs_exit();
	misc_deregister(&tm_device);
	tm_sysfs_exit();
}
