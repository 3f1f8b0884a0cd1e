// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the kernel's codecs make of data, and what it costs.
 *
 * /sys/kernel/debug/tm_bench_codec/data takes the data. Reading codecs beside it
 * compresses that in pieces of *segment* bytes, each by itself, decompresses and compares
 * them, and gives a line per codec:
 *
 *     NAME PACKED COMPRESS DECOMPRESS
 *
 * in bytes and in nanoseconds for all of it; a segment that does not get smaller counts
 * as it is, and a copy. Reading planes gives "planes SPLIT JOIN" in nanoseconds, for
 * the data as units of *unit* bytes with numbers of *element* bytes.
 *
 * zstd-1 is not to be had through the crypto API, which knows one level; it is here to
 * tell what that costs.
 */
#include <crypto/acompress.h>
#include <linux/crypto.h>
#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/scatterlist.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <linux/zstd.h>

/* The module does not export it: nobody but the KV cache needs it. */
#include "core/planes.c"

#define TM_CODEC_DATA		SZ_2M
#define TM_CODEC_SEGMENT	SZ_128K

struct tm_codec {
	u8 *data;
	size_t size;
	/* Codecs want addresses in the linear map. */
	u8 *plain;
	u8 *packed;
	u8 *back;
	struct crypto_acomp *acomp;
	struct acomp_req *request;
	zstd_parameters params;
	zstd_cctx *cctx;
	zstd_dctx *dctx;
	void *cwork;
	void *dwork;
};

static struct tm_codec tm_codec;
static struct dentry *tm_codec_dir;
static u32 tm_codec_segment = SZ_16K;
static u32 tm_codec_unit = SZ_16K;
static u32 tm_codec_element = 4;
static DEFINE_MUTEX(tm_codec_lock);

/* Return: bytes at @to, or a negative errno; too few for it is one of them. */
typedef int (*tm_codec_fn)(const u8 *from, u32 bytes, u8 *to, u32 room);

static int tm_codec_acomp(const u8 *from, u32 bytes, u8 *to, u32 room,
			  int (*act)(struct acomp_req *))
{
	struct scatterlist src, dst;
	DECLARE_CRYPTO_WAIT(wait);
	int err;

	sg_init_one(&src, from, bytes);
	sg_init_one(&dst, to, room);
	acomp_request_set_params(tm_codec.request, &src, &dst, bytes, room);
	acomp_request_set_callback(tm_codec.request, CRYPTO_TFM_REQ_MAY_SLEEP,
				   crypto_req_done, &wait);
	err = crypto_wait_req(act(tm_codec.request), &wait);
	return err ?: tm_codec.request->dlen;
}

static int tm_codec_compress(const u8 *from, u32 bytes, u8 *to, u32 room)
{
	return tm_codec_acomp(from, bytes, to, room, crypto_acomp_compress);
}

static int tm_codec_decompress(const u8 *from, u32 bytes, u8 *to, u32 room)
{
	return tm_codec_acomp(from, bytes, to, room, crypto_acomp_decompress);
}

static int tm_codec_zstd_compress(const u8 *from, u32 bytes, u8 *to, u32 room)
{
	size_t out = zstd_compress_cctx(tm_codec.cctx, to, room, from, bytes,
					&tm_codec.params);

	return zstd_is_error(out) ? -ENOSPC : out;
}

static int tm_codec_zstd_decompress(const u8 *from, u32 bytes, u8 *to, u32 room)
{
	size_t out = zstd_decompress_dctx(tm_codec.dctx, to, room, from, bytes);

	return zstd_is_error(out) ? -EINVAL : out;
}

static int tm_codec_run(struct seq_file *m, const char *name,
			tm_codec_fn compress, tm_codec_fn decompress)
{
	u64 packed = 0, there = 0, back = 0;

	for (size_t at = 0; at < tm_codec.size; at += tm_codec_segment) {
		u32 bytes = min_t(size_t, tm_codec_segment, tm_codec.size - at);
		u64 start, middle;
		int got;

		memcpy(tm_codec.plain, tm_codec.data + at, bytes);
		memset(tm_codec.back, 0, bytes);
		start = ktime_get_ns();
		got = compress(tm_codec.plain, bytes, tm_codec.packed, bytes);
		if (got < 0 || got >= bytes)
			memcpy(tm_codec.packed, tm_codec.plain, bytes);
		middle = ktime_get_ns();
		if (got < 0 || got >= bytes) {
			memcpy(tm_codec.back, tm_codec.packed, bytes);
			got = bytes;
		} else if (decompress(tm_codec.packed, got, tm_codec.back,
				      bytes) != bytes) {
			return -EIO;
		}
		back += ktime_get_ns() - middle;
		there += middle - start;
		packed += got;
		if (memcmp(tm_codec.plain, tm_codec.back, bytes))
			return -EIO;
	}
	seq_printf(m, "%s %llu %llu %llu\n", name, packed, there, back);
	return 0;
}

static int tm_codec_run_acomp(struct seq_file *m, const char *name,
			      const char *algorithm)
{
	int err = -ENOMEM;

	tm_codec.acomp = crypto_alloc_acomp(algorithm, 0, 0);
	if (IS_ERR(tm_codec.acomp))
		return PTR_ERR(tm_codec.acomp);
	tm_codec.request = acomp_request_alloc(tm_codec.acomp);
	if (tm_codec.request) {
		err = tm_codec_run(m, name, tm_codec_compress,
				   tm_codec_decompress);
		acomp_request_free(tm_codec.request);
	}
	crypto_free_acomp(tm_codec.acomp);
	return err;
}

static int tm_codec_run_zstd(struct seq_file *m, const char *name, int level)
{
	size_t room;
	int err = -ENOMEM;

	tm_codec.params = zstd_get_params(level, 0);
	room = zstd_cctx_workspace_bound(&tm_codec.params.cParams);
	tm_codec.cwork = vzalloc(room);
	tm_codec.cctx = zstd_init_cctx(tm_codec.cwork, room);
	room = zstd_dctx_workspace_bound();
	tm_codec.dwork = vzalloc(room);
	tm_codec.dctx = zstd_init_dctx(tm_codec.dwork, room);
	if (tm_codec.cwork && tm_codec.dwork && tm_codec.cctx && tm_codec.dctx)
		err = tm_codec_run(m, name, tm_codec_zstd_compress,
				   tm_codec_zstd_decompress);
	vfree(tm_codec.cwork);
	vfree(tm_codec.dwork);
	return err;
}

static int tm_codec_codecs_show(struct seq_file *m, void *unused)
{
	int err;

	if (!tm_codec_segment || tm_codec_segment > TM_CODEC_SEGMENT)
		return -EINVAL;
	mutex_lock(&tm_codec_lock);
	err = tm_codec_run_acomp(m, "lz4", "lz4");
	err = err ?: tm_codec_run_zstd(m, "zstd-1", 1);
	err = err ?: tm_codec_run_acomp(m, "zstd-3", "zstd");
	mutex_unlock(&tm_codec_lock);
	return err;
}

static int tm_codec_planes_show(struct seq_file *m, void *unused)
{
	struct tm_planes_shape shape = {
		.rows = 1,
		.row_bytes = tm_codec_unit,
		.element = tm_codec_element,
	};
	u64 there = 0, back = 0;
	int err = 0;

	if (!tm_codec_unit || tm_codec_unit > TM_CODEC_SEGMENT ||
	    !is_power_of_2(tm_codec_element) || tm_codec_element > sizeof(u64))
		return -EINVAL;
	mutex_lock(&tm_codec_lock);
	for (size_t at = 0; at + tm_codec_unit <= tm_codec.size && !err;
	     at += tm_codec_unit) {
		u64 start = ktime_get_ns(), middle;

		tm_planes_split(&shape, tm_codec.data + at, tm_codec.plain);
		middle = ktime_get_ns();
		tm_planes_join(&shape, tm_codec.plain, tm_codec.back);
		back += ktime_get_ns() - middle;
		there += middle - start;
		if (memcmp(tm_codec.data + at, tm_codec.back, tm_codec_unit))
			err = -EIO;
	}
	seq_printf(m, "planes %llu %llu\n", there, back);
	mutex_unlock(&tm_codec_lock);
	return err;
}
DEFINE_SHOW_ATTRIBUTE(tm_codec_codecs);
DEFINE_SHOW_ATTRIBUTE(tm_codec_planes);

static ssize_t tm_codec_data_write(struct file *file, const char __user *from,
				   size_t count, loff_t *at)
{
	ssize_t n;

	mutex_lock(&tm_codec_lock);
	n = simple_write_to_buffer(tm_codec.data, TM_CODEC_DATA, at, from,
				   count);
	if (n > 0)
		tm_codec.size = *at;
	mutex_unlock(&tm_codec_lock);
	return n;
}

static const struct file_operations tm_codec_data_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = tm_codec_data_write,
	.llseek = default_llseek,
};

static void tm_codec_free(void)
{
	vfree(tm_codec.data);
	kfree(tm_codec.plain);
	kfree(tm_codec.packed);
	kfree(tm_codec.back);
}

static int __init tm_codec_init(void)
{
	tm_codec.data = vmalloc(TM_CODEC_DATA);
	tm_codec.plain = kmalloc(TM_CODEC_SEGMENT, GFP_KERNEL);
	tm_codec.packed = kmalloc(TM_CODEC_SEGMENT, GFP_KERNEL);
	tm_codec.back = kmalloc(TM_CODEC_SEGMENT, GFP_KERNEL);
	if (!tm_codec.data || !tm_codec.plain || !tm_codec.packed ||
	    !tm_codec.back) {
		tm_codec_free();
		return -ENOMEM;
	}
	tm_codec_dir = debugfs_create_dir("tm_bench_codec", NULL);
	debugfs_create_u32("segment", 0600, tm_codec_dir, &tm_codec_segment);
	debugfs_create_u32("unit", 0600, tm_codec_dir, &tm_codec_unit);
	debugfs_create_u32("element", 0600, tm_codec_dir, &tm_codec_element);
	debugfs_create_file("data", 0200, tm_codec_dir, NULL,
			    &tm_codec_data_fops);
	debugfs_create_file("codecs", 0400, tm_codec_dir, NULL,
			    &tm_codec_codecs_fops);
	debugfs_create_file("planes", 0400, tm_codec_dir, NULL,
			    &tm_codec_planes_fops);
	return 0;
}

static void __exit tm_codec_exit(void)
{
	debugfs_remove_recursive(tm_codec_dir);
	tm_codec_free();
}

module_init(tm_codec_init);
module_exit(tm_codec_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Benchmark of the kernel's codecs on KV");
