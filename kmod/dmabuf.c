// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tensors for devices: a dma-buf holds the pages of a tensor as anybody does who has
 * pinned them. So they stay where they are, and who frees the tensor or dies leaves them
 * in quarantine, on the client's bill, until the last descriptor, mapping and device is done.
 *
 * tm_dmabuf::lock is taken inside of the dma-buf's reservation lock; nothing is taken in it.
 */
#include <linux/atomic.h>
#include <linux/device.h>
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/err.h>
#include <linux/fcntl.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/iosys-map.h>
#include <linux/list.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/stddef.h>
#include <linux/sysfs.h>
#include <linux/vmalloc.h>
#include <uapi/linux/tensormem.h>

#include "args.h"
#include "client.h"
#include "compat.h"
#include "dma_pool.h"
#include "dmabuf.h"
#include "limits.h"
#include "memory.h"
#include "tensor.h"
#include "vm.h"

#define TM_MIN_EXPORT	offsetofend(struct tensormem_export, fd)

/**
 * struct tm_dmabuf - a tensor's memory, as a dma-buf
 * @region: the memory, which it holds, and its place in its own descriptor: from 0 on
 * @pinned_by: whose RLIMIT_MEMLOCK it counts against, or NULL
 * @lock: guards @mappings
 * @mappings: what devices have mapped of it
 */
struct tm_dmabuf {
	struct tm_region region;
	const struct cred *pinned_by;
	struct mutex lock;
	struct list_head mappings;
};

/**
 * struct tm_dmabuf_mapping - a dma-buf as one device sees it
 * @all: in tm_dmabuf::mappings
 * @device: which device
 * @direction: which way data may go
 * @table: the pages, and where they are for the device
 */
struct tm_dmabuf_mapping {
	struct list_head all;
	struct device *device;
	enum dma_data_direction direction;
	struct sg_table table;
};

static atomic64_t tm_nr_dmabufs = ATOMIC64_INIT(0);
static atomic64_t tm_nr_dmabuf_bytes = ATOMIC64_INIT(0);
static atomic64_t tm_nr_attachments = ATOMIC64_INIT(0);

/* Bytes of memory that @buf keeps from being given back. */
static u64 tm_dmabuf_held(const struct tm_dmabuf *buf)
{
	return (u64)buf->region.memory->nr_pages << PAGE_SHIFT;
}

static int tm_dmabuf_attach(struct dma_buf *dmabuf,
			    struct dma_buf_attachment *attachment)
{
	atomic64_inc(&tm_nr_attachments);
	return 0;
}

static void tm_dmabuf_detach(struct dma_buf *dmabuf,
			     struct dma_buf_attachment *attachment)
{
	atomic64_dec(&tm_nr_attachments);
}

/* Bytes that lie side by side from extent *@i on; that becomes the one behind them. */
static size_t tm_dmabuf_stretch(const struct tm_memory *memory, u32 *i)
{
	if (!tm_memory_is_dma(memory))
		return PAGE_SIZE << memory->extent[(*i)++].run.order;
	*i = memory->nr_extents;
	return (size_t)memory->nr_pages << PAGE_SHIFT;
}

/* Put @buf in pieces of up to @most bytes into @sg, unless that is NULL. Return: how many they are. */
static u32 tm_dmabuf_pieces(const struct tm_dmabuf *buf, size_t most,
			    struct scatterlist *sg)
{
	const struct tm_memory *memory = buf->region.memory;
	u64 left = buf->region.range.length << PAGE_SHIFT;
	u32 pieces = 0;

	for (u32 i = 0; i < memory->nr_extents;) {
		struct page *page = tm_pages_page(&memory->extent[i].run);
		size_t size = min_t(u64, left, tm_dmabuf_stretch(memory, &i));

		left -= size;
		for (size_t at = 0, part; at < size; at += part) {
			part = min(size - at, most);
			if (sg) {
				sg_set_page(sg, page + (at >> PAGE_SHIFT), part, 0);
				sg = sg_next(sg);
			}
			pieces++;
		}
	}
	return pieces;
}

/*
 * A table of @buf with an entry for each chunk or run, or one for all of the DMA pool's, where
 * @device takes as much in one; where what it cannot reach is copied for it, that is less.
 */
static int tm_dmabuf_table(const struct tm_dmabuf *buf, struct device *device,
			   struct sg_table *table)
{
	size_t most = min_t(size_t, dma_get_max_seg_size(device),
			    dma_max_mapping_size(device));
	int err;

	most = max_t(size_t, PAGE_SIZE, round_down(most, PAGE_SIZE));
	err = sg_alloc_table(table, tm_dmabuf_pieces(buf, most, NULL), TM_GFP);
	if (!err)
		tm_dmabuf_pieces(buf, most, table->sgl);
	return err;
}

static struct sg_table *tm_dmabuf_map(struct dma_buf_attachment *attachment,
				      enum dma_data_direction direction)
{
	struct dma_buf *dmabuf = attachment->dmabuf;
	struct tm_dmabuf *buf = dmabuf->priv;
	struct tm_dmabuf_mapping *mapping;
	int err;

	/* Who was given a descriptor to read from is not to have a device write for him. */
	if (direction != DMA_TO_DEVICE && !(dmabuf->file->f_mode & FMODE_WRITE))
		return ERR_PTR(-EACCES);
	mapping = kmalloc(sizeof(*mapping), TM_GFP);
	if (!mapping)
		return ERR_PTR(-ENOMEM);
	mapping->device = attachment->dev;
	mapping->direction = direction;
	err = tm_dmabuf_table(buf, mapping->device, &mapping->table);
	if (err)
		goto err_free;
	err = dma_map_sgtable(mapping->device, &mapping->table, direction, 0);
	if (err)
		goto err_table;
	mutex_lock(&buf->lock);
	list_add(&mapping->all, &buf->mappings);
	mutex_unlock(&buf->lock);
	return &mapping->table;

err_table:
	sg_free_table(&mapping->table);
err_free:
	kfree(mapping);
	return ERR_PTR(err);
}

static void tm_dmabuf_unmap(struct dma_buf_attachment *attachment,
			    struct sg_table *table,
			    enum dma_data_direction direction)
{
	struct tm_dmabuf_mapping *mapping =
		container_of(table, struct tm_dmabuf_mapping, table);
	struct tm_dmabuf *buf = attachment->dmabuf->priv;

	mutex_lock(&buf->lock);
	list_del(&mapping->all);
	mutex_unlock(&buf->lock);
	dma_unmap_sgtable(mapping->device, table, mapping->direction, 0);
	sg_free_table(table);
	kfree(mapping);
}

/* What devices have written is for the CPU to see. */
static int tm_dmabuf_begin_cpu(struct dma_buf *dmabuf,
			       enum dma_data_direction direction)
{
	struct tm_dmabuf *buf = dmabuf->priv;
	struct tm_dmabuf_mapping *mapping;

	mutex_lock(&buf->lock);
	list_for_each_entry(mapping, &buf->mappings, all)
		dma_sync_sgtable_for_cpu(mapping->device, &mapping->table,
					 mapping->direction);
	mutex_unlock(&buf->lock);
	return 0;
}

/* What the CPU has written, if it did, is for devices to see. */
static int tm_dmabuf_end_cpu(struct dma_buf *dmabuf,
			     enum dma_data_direction direction)
{
	struct tm_dmabuf *buf = dmabuf->priv;
	struct tm_dmabuf_mapping *mapping;

	/* Where a device has a copy, what it wrote there since would be lost. */
	if (direction == DMA_FROM_DEVICE)
		return 0;
	mutex_lock(&buf->lock);
	list_for_each_entry(mapping, &buf->mappings, all)
		dma_sync_sgtable_for_device(mapping->device, &mapping->table,
					    mapping->direction);
	mutex_unlock(&buf->lock);
	return 0;
}

static vm_fault_t tm_dmabuf_fault(struct vm_fault *vmf)
{
	const struct tm_dmabuf *buf = vmf->vma->vm_private_data;
	u32 mapped;

	if (tm_vm_marked(vmf))
		return VM_FAULT_SIGBUS;
	if (vmf->vma->vm_flags & VM_WRITE)
		tm_vm_born_dirty(vmf->vma);
	return tm_vm_map(vmf, &buf->region, &mapped);
}

static const struct vm_operations_struct tm_dmabuf_vm_ops = {
	.fault = tm_dmabuf_fault,
	.mremap = tm_vm_mremap,
};

/* Importers come here too, with areas of their own descriptors: what ours may do is not checked by then. */
static int tm_dmabuf_mmap(struct dma_buf *dmabuf, struct vm_area_struct *vma)
{
	bool writable = dmabuf->file->f_mode & FMODE_WRITE;

	/* Not VM_SHARED, which a read-only descriptor never gets. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (vma->vm_flags & VM_WRITE && !writable)
		return -EACCES;
	vm_flags_mod(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYEXEC | (writable ? 0 : VM_MAYWRITE));
	vma->vm_private_data = dmabuf->priv;
	vma->vm_ops = &tm_dmabuf_vm_ops;
	return 0;
}

/* The pages of @buf side by side for the kernel, where they are not so anyway. */
static void *tm_dmabuf_join(const struct tm_dmabuf *buf)
{
	const struct tm_memory *memory = buf->region.memory;
	u32 count = buf->region.range.length, done = 0;
	struct page **pages;
	void *address;

	if (memory->nr_extents == 1)
		return page_address(tm_pages_page(&memory->extent[0].run));
	pages = kvmalloc_array(count, sizeof(*pages), TM_GFP);
	if (!pages)
		return NULL;
	for (u32 i = 0; i < memory->nr_extents; i++) {
		const struct tm_run *run = &memory->extent[i].run;

		for (u32 p = 0; p < 1u << run->order && done < count; p++)
			pages[done++] = tm_pages_page(run) + p;
	}
	address = vmap(pages, count, VM_MAP, PAGE_KERNEL);
	kvfree(pages);
	return address;
}

static int tm_dmabuf_vmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	void *address = tm_dmabuf_join(dmabuf->priv);

	if (!address)
		return -ENOMEM;
	iosys_map_set_vaddr(map, address);
	return 0;
}

static void tm_dmabuf_vunmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	if (is_vmalloc_addr(map->vaddr))
		vunmap(map->vaddr);
}

static void tm_dmabuf_destroy(struct tm_dmabuf *buf)
{
	tm_limits_unpin(buf->region.memory->nr_pages, buf->pinned_by);
	tm_memory_let_go(buf->region.memory);
	mutex_destroy(&buf->lock);
	kfree(buf);
}

static void tm_dmabuf_release(struct dma_buf *dmabuf)
{
	struct tm_dmabuf *buf = dmabuf->priv;

	atomic64_sub(tm_dmabuf_held(buf), &tm_nr_dmabuf_bytes);
	atomic64_dec(&tm_nr_dmabufs);
	tm_dmabuf_destroy(buf);
}

static const struct dma_buf_ops tm_dmabuf_ops = {
	.attach = tm_dmabuf_attach,
	.detach = tm_dmabuf_detach,
	.map_dma_buf = tm_dmabuf_map,
	.unmap_dma_buf = tm_dmabuf_unmap,
	.begin_cpu_access = tm_dmabuf_begin_cpu,
	.end_cpu_access = tm_dmabuf_end_cpu,
	.mmap = tm_dmabuf_mmap,
	.vmap = tm_dmabuf_vmap,
	.vunmap = tm_dmabuf_vunmap,
	.release = tm_dmabuf_release,
};

/* For readers: what a driver has by vmap() it may write, and cannot be told not to. */
static const struct dma_buf_ops tm_dmabuf_read_only_ops = {
	.attach = tm_dmabuf_attach,
	.detach = tm_dmabuf_detach,
	.map_dma_buf = tm_dmabuf_map,
	.unmap_dma_buf = tm_dmabuf_unmap,
	.begin_cpu_access = tm_dmabuf_begin_cpu,
	.end_cpu_access = tm_dmabuf_end_cpu,
	.mmap = tm_dmabuf_mmap,
	.release = tm_dmabuf_release,
};

static struct tm_dmabuf *tm_dmabuf_create(struct tm_client *client, u32 handle)
{
	struct tm_dmabuf *buf = kzalloc(sizeof(*buf), TM_GFP);
	int err;

	if (!buf)
		return ERR_PTR(-ENOMEM);
	err = tm_tensor_hold(client, handle, &buf->region);
	if (err)
		goto err_free;
	err = tm_limits_pin(buf->region.memory->nr_pages, &buf->pinned_by);
	if (err)
		goto err_hold;
	mutex_init(&buf->lock);
	INIT_LIST_HEAD(&buf->mappings);
	return buf;

err_hold:
	tm_memory_let_go(buf->region.memory);
err_free:
	kfree(buf);
	return ERR_PTR(err);
}

/* Return: the dma-buf, which has @buf from now on, or an ERR_PTR. */
static struct dma_buf *tm_dmabuf_publish(struct tm_dmabuf *buf, u32 flags)
{
	bool read_only = flags & TENSORMEM_EXPORT_READ_ONLY;
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct dma_buf *dmabuf;

	info.ops = read_only ? &tm_dmabuf_read_only_ops : &tm_dmabuf_ops;
	info.size = buf->region.range.length << PAGE_SHIFT;
	info.flags = read_only ? O_RDONLY : O_RDWR;
	info.priv = buf;
	dmabuf = dma_buf_export(&info);
	if (IS_ERR(dmabuf))
		return dmabuf;
	atomic64_inc(&tm_nr_dmabufs);
	atomic64_add(tm_dmabuf_held(buf), &tm_nr_dmabuf_bytes);
	return dmabuf;
}

/**
 * tm_dmabuf_file_export - TENSORMEM_IOC_EXPORT
 * @client: whose tensor
 * @arg: struct tensormem_export of the caller's
 * @size: of that
 *
 * Context: may sleep; takes the client's invalidate_lock.
 * Return: 0 or an errno as in the UAPI header.
 */
int tm_dmabuf_file_export(struct tm_client *client, void __user *arg,
			  size_t size)
{
	struct tensormem_export export;
	struct dma_buf *dmabuf;
	struct tm_dmabuf *buf;
	int err, fd;

	err = tm_args_in(&export, sizeof(export), TM_MIN_EXPORT, arg, size);
	if (err)
		return err;
	if (export.flags & ~TENSORMEM_EXPORT_READ_ONLY || export.pad)
		return -EINVAL;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	buf = tm_dmabuf_create(client, export.handle);
	if (IS_ERR(buf)) {
		err = PTR_ERR(buf);
		goto err_fd;
	}
	dmabuf = tm_dmabuf_publish(buf, export.flags);
	if (IS_ERR(dmabuf)) {
		err = PTR_ERR(dmabuf);
		tm_dmabuf_destroy(buf);
		goto err_fd;
	}
	export.size = dmabuf->size;
	export.fd = fd;
	err = tm_args_out(arg, size, &export, sizeof(export));
	if (err)
		goto err_put;
	fd_install(fd, dmabuf->file);
	return 0;

err_put:
	dma_buf_put(dmabuf);
err_fd:
	put_unused_fd(fd);
	return err;
}

#define TM_DMA_RO(file, count)						\
static ssize_t file##_show(struct device *dev,				\
			   struct device_attribute *attr, char *buf)	\
{									\
	return sysfs_emit(buf, "%lld\n", atomic64_read(&(count)));	\
}									\
static DEVICE_ATTR_RO(file)

TM_DMA_RO(buffers, tm_nr_dmabufs);
TM_DMA_RO(bytes, tm_nr_dmabuf_bytes);
TM_DMA_RO(attachments, tm_nr_attachments);

static struct attribute *tm_dma_attrs[] = {
	&dev_attr_buffers.attr,
	&dev_attr_bytes.attr,
	&dev_attr_attachments.attr,
	&tm_dma_pool_total.attr,
	&tm_dma_pool_used.attr,
	&tm_dma_pool_free.attr,
	&tm_dma_pool_node.attr,
	NULL
};

const struct attribute_group tm_dma_group = {
	.name = "dma",
	.attrs = tm_dma_attrs,
};

TM_IMPORT_NS_DMA_BUF;
