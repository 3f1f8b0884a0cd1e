// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver for QEMU's edu device that takes dma-bufs: what proves that a device reads and
 * writes tensors. /dev/tm_edu is one importer for each open; what it imported it lets go of when it
 * is closed, as a driver does whose user was killed. Tests know the calls by number
 * (tests/guest/edu.py).
 */
#include <linux/delay.h>
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/iosys-map.h>
#include <linux/ktime.h>
#include <linux/minmax.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "compat.h"

#define TM_EDU_SRC	0x80
#define TM_EDU_DST	0x88
#define TM_EDU_COUNT	0x90
#define TM_EDU_COMMAND	0x98
#define TM_EDU_RUN	BIT(0)
#define TM_EDU_TO_RAM	BIT(1)

/* Its own memory; a transfer that ends exactly at its end ends QEMU. */
#define TM_EDU_MEMORY	0x40000
#define TM_EDU_SIZE	(4096 - 1)

/* Neighbours in a table of single pages are that many pages apart where they were together. */
#define TM_EDU_STRIDE	4099

struct tm_edu_map {
	__u32 direction;	/* in: enum dma_data_direction */
	__u32 entries;		/* out: of the table, as the CPU has it */
	__u32 segments;		/* out: as the device sees it */
	__u32 largest;		/* out: bytes of the largest entry */
};

struct tm_edu_copy {
	__u64 offset;		/* in: where in the dma-buf */
	__u32 size;		/* in: bytes, up to TM_EDU_SIZE */
	__u32 to_ram;		/* in: whether the device writes it */
};

struct tm_edu_cost {
	__u32 pages;		/* in: single pages to map; 0: the dma-buf */
	__u32 entries;		/* out */
	__u64 ns;		/* out: to map and unmap them once */
};

#define TM_EDU_ATTACH	_IO('e', 0)
#define TM_EDU_DETACH	_IO('e', 1)
#define TM_EDU_MAP	_IOWR('e', 2, struct tm_edu_map)
#define TM_EDU_UNMAP	_IO('e', 3)
#define TM_EDU_COPY	_IOW('e', 4, struct tm_edu_copy)
#define TM_EDU_COST	_IOWR('e', 5, struct tm_edu_cost)
#define TM_EDU_SUM	_IOR('e', 6, __u64)

/**
 * struct tm_edu_user - one importer
 * @lock: one call at a time
 * @dmabuf: what it imported, or NULL
 * @attachment: of that
 * @table: where it is for the device, or NULL
 * @direction: which it was mapped for
 */
struct tm_edu_user {
	struct mutex lock;
	struct dma_buf *dmabuf;
	struct dma_buf_attachment *attachment;
	struct sg_table *table;
	enum dma_data_direction direction;
};

static struct pci_dev *tm_edu_device;
static void __iomem *tm_edu_registers;
static DEFINE_MUTEX(tm_edu_transfer);

static int tm_edu_attach(struct tm_edu_user *user, int fd)
{
	struct dma_buf_attachment *attachment;
	struct dma_buf *dmabuf;

	if (user->dmabuf)
		return -EBUSY;
	dmabuf = dma_buf_get(fd);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	attachment = dma_buf_attach(dmabuf, &tm_edu_device->dev);
	if (IS_ERR(attachment)) {
		dma_buf_put(dmabuf);
		return PTR_ERR(attachment);
	}
	user->dmabuf = dmabuf;
	user->attachment = attachment;
	return 0;
}

static int tm_edu_unmap(struct tm_edu_user *user)
{
	if (!user->table)
		return -EINVAL;
	dma_buf_unmap_attachment_unlocked(user->attachment, user->table,
					  user->direction);
	user->table = NULL;
	return 0;
}

static int tm_edu_detach(struct tm_edu_user *user)
{
	if (!user->dmabuf)
		return -EINVAL;
	if (user->table)
		return -EBUSY;
	dma_buf_detach(user->dmabuf, user->attachment);
	dma_buf_put(user->dmabuf);
	user->dmabuf = NULL;
	return 0;
}

static int tm_edu_map(struct tm_edu_user *user, struct tm_edu_map __user *arg)
{
	struct tm_edu_map map;
	struct scatterlist *sg;
	struct sg_table *table;
	unsigned int i;

	if (copy_from_user(&map, arg, sizeof(map)))
		return -EFAULT;
	if (!user->dmabuf || map.direction > DMA_FROM_DEVICE)
		return -EINVAL;
	if (user->table)
		return -EBUSY;
	table = dma_buf_map_attachment_unlocked(user->attachment, map.direction);
	if (IS_ERR(table))
		return PTR_ERR(table);
	map.entries = table->orig_nents;
	map.segments = table->nents;
	map.largest = 0;
	for_each_sgtable_sg(table, sg, i)
		map.largest = max(map.largest, sg->length);
	user->table = table;
	user->direction = map.direction;
	if (copy_to_user(arg, &map, sizeof(map))) {
		tm_edu_unmap(user);
		return -EFAULT;
	}
	return 0;
}

static int tm_edu_transfer_one(dma_addr_t address, u32 at, u32 size, bool to_ram)
{
	u64 own = TM_EDU_MEMORY + at;

	writeq(to_ram ? own : address, tm_edu_registers + TM_EDU_SRC);
	writeq(to_ram ? address : own, tm_edu_registers + TM_EDU_DST);
	writeq(size, tm_edu_registers + TM_EDU_COUNT);
	writeq(TM_EDU_RUN | (to_ram ? TM_EDU_TO_RAM : 0),
	       tm_edu_registers + TM_EDU_COMMAND);
	/* It begins a tenth of a second later; an emulated board's seconds may be long. */
	for (int tries = 0; tries < 1500; tries++) {
		if (!(readq(tm_edu_registers + TM_EDU_COMMAND) & TM_EDU_RUN))
			return 0;
		msleep(20);
	}
	return -ETIMEDOUT;
}

static int tm_edu_copy(struct tm_edu_user *user, const struct tm_edu_copy *copy)
{
	u64 begin = 0, end = copy->offset + copy->size;
	struct scatterlist *sg;
	unsigned int i;
	int err = 0;

	if (!user->table || copy->size > TM_EDU_SIZE || end < copy->offset ||
	    end > user->dmabuf->size)
		return -EINVAL;
	mutex_lock(&tm_edu_transfer);
	for_each_sgtable_dma_sg(user->table, sg, i) {
		u64 from = max(copy->offset, begin);
		u64 to = min(end, begin + sg_dma_len(sg));

		if (from < to && !err)
			err = tm_edu_transfer_one(sg_dma_address(sg) + (from - begin),
						  from - copy->offset, to - from,
						  copy->to_ram);
		begin += sg_dma_len(sg);
	}
	mutex_unlock(&tm_edu_transfer);
	return err;
}

/* Fill @table with single pages, no two of which lie side by side as they stand there. */
static int tm_edu_scatter(struct sg_table *table, struct page **pages, u32 count)
{
	struct scatterlist *sg;
	unsigned int i;
	int err;

	err = sg_alloc_table(table, count, GFP_KERNEL);
	if (err)
		return err;
	for_each_sgtable_sg(table, sg, i)
		sg_set_page(sg, pages[(u64)i * TM_EDU_STRIDE % count], PAGE_SIZE, 0);
	return 0;
}

static int tm_edu_cost_pages(struct tm_edu_cost *cost)
{
	struct sg_table table;
	struct page **pages;
	u32 made = 0;
	int err = -ENOMEM;
	u64 start;

	pages = kvcalloc(cost->pages, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return -ENOMEM;
	for (; made < cost->pages; made++) {
		pages[made] = alloc_page(GFP_KERNEL);
		if (!pages[made])
			goto out;
	}
	err = tm_edu_scatter(&table, pages, made);
	if (err)
		goto out;
	start = ktime_get_ns();
	err = dma_map_sgtable(&tm_edu_device->dev, &table, DMA_BIDIRECTIONAL, 0);
	if (!err)
		dma_unmap_sgtable(&tm_edu_device->dev, &table,
				  DMA_BIDIRECTIONAL, 0);
	cost->ns = ktime_get_ns() - start;
	cost->entries = table.orig_nents;
	sg_free_table(&table);
out:
	while (made--)
		__free_page(pages[made]);
	kvfree(pages);
	return err;
}

static int tm_edu_cost_dmabuf(struct tm_edu_user *user, struct tm_edu_cost *cost)
{
	struct sg_table *table;
	u64 start;

	if (!user->dmabuf || user->table)
		return -EINVAL;
	start = ktime_get_ns();
	table = dma_buf_map_attachment_unlocked(user->attachment,
						DMA_BIDIRECTIONAL);
	if (IS_ERR(table))
		return PTR_ERR(table);
	cost->entries = table->orig_nents;
	dma_buf_unmap_attachment_unlocked(user->attachment, table,
					  DMA_BIDIRECTIONAL);
	cost->ns = ktime_get_ns() - start;
	return 0;
}

/* The sum of its bytes, as the kernel sees them side by side. */
static int tm_edu_sum(struct tm_edu_user *user, u64 *sum)
{
	struct iosys_map map;
	int err;

	if (!user->dmabuf)
		return -EINVAL;
	err = tm_dma_buf_vmap(user->dmabuf, &map);
	if (err)
		return err;
	*sum = 0;
	for (size_t at = 0; at < user->dmabuf->size; at++)
		*sum += ((const u8 *)map.vaddr)[at];
	tm_dma_buf_vunmap(user->dmabuf, &map);
	return 0;
}

static int tm_edu_cost(struct tm_edu_user *user, void __user *arg)
{
	struct tm_edu_cost cost;
	int err;

	if (copy_from_user(&cost, arg, sizeof(cost)))
		return -EFAULT;
	err = cost.pages ? tm_edu_cost_pages(&cost) :
			   tm_edu_cost_dmabuf(user, &cost);
	if (err)
		return err;
	return copy_to_user(arg, &cost, sizeof(cost)) ? -EFAULT : 0;
}

static int tm_edu_command(struct tm_edu_user *user, unsigned int cmd,
			  unsigned long arg)
{
	void __user *address = (void __user *)arg;
	struct tm_edu_copy copy;
	u64 sum;
	int err;

	switch (cmd) {
	case TM_EDU_ATTACH:
		return tm_edu_attach(user, arg);
	case TM_EDU_DETACH:
		return tm_edu_detach(user);
	case TM_EDU_MAP:
		return tm_edu_map(user, address);
	case TM_EDU_UNMAP:
		return tm_edu_unmap(user);
	case TM_EDU_COPY:
		if (copy_from_user(&copy, address, sizeof(copy)))
			return -EFAULT;
		return tm_edu_copy(user, &copy);
	case TM_EDU_COST:
		return tm_edu_cost(user, address);
	case TM_EDU_SUM:
		err = tm_edu_sum(user, &sum);
		return err ?: put_user(sum, (u64 __user *)address);
	default:
		return -ENOTTY;
	}
}

static long tm_edu_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct tm_edu_user *user = file->private_data;
	int err;

	mutex_lock(&user->lock);
	err = tm_edu_command(user, cmd, arg);
	mutex_unlock(&user->lock);
	return err;
}

static int tm_edu_open(struct inode *inode, struct file *file)
{
	struct tm_edu_user *user = kzalloc(sizeof(*user), GFP_KERNEL);

	if (!user)
		return -ENOMEM;
	mutex_init(&user->lock);
	file->private_data = user;
	return 0;
}

static int tm_edu_release(struct inode *inode, struct file *file)
{
	struct tm_edu_user *user = file->private_data;

	tm_edu_unmap(user);
	tm_edu_detach(user);
	kfree(user);
	return 0;
}

static const struct file_operations tm_edu_fops = {
	.owner = THIS_MODULE,
	.open = tm_edu_open,
	.release = tm_edu_release,
	.unlocked_ioctl = tm_edu_ioctl,
};

static struct miscdevice tm_edu_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "tm_edu",
	.fops = &tm_edu_fops,
	.mode = 0600,
};

static int tm_edu_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	int err;

	err = pcim_enable_device(device);
	if (err)
		return err;
	err = dma_set_mask_and_coherent(&device->dev, DMA_BIT_MASK(32));
	if (err)
		return err;
	dma_set_max_seg_size(&device->dev, UINT_MAX);
	tm_edu_registers = pcim_iomap(device, 0, 0);
	if (!tm_edu_registers)
		return -ENOMEM;
	pci_set_master(device);
	tm_edu_device = device;
	return misc_register(&tm_edu_misc);
}

static void tm_edu_remove(struct pci_dev *device)
{
	misc_deregister(&tm_edu_misc);
}

static const struct pci_device_id tm_edu_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};

static struct pci_driver tm_edu_driver = {
	.name = "tm_edu",
	.id_table = tm_edu_ids,
	.probe = tm_edu_probe,
	.remove = tm_edu_remove,
	/* There is one device, and who has it open counts on it. */
	.driver.suppress_bind_attrs = true,
};

module_pci_driver(tm_edu_driver);

MODULE_DESCRIPTION("QEMU's edu device as an importer of dma-bufs, for tests");
MODULE_LICENSE("GPL");
TM_IMPORT_NS_DMA_BUF;
