// SPDX-License-Identifier: GPL-2.0-only
/*
 * The kernel's own compression, by way of the crypto API: it loads the codec's module
 * when it is wanted, and a kernel without one still loads ours.
 */
#include <crypto/acompress.h>
#include <linux/crypto.h>
#include <linux/err.h>
#include <linux/kconfig.h>
#include <linux/mutex.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>

#include "codec.h"

/* The first of them that the kernel has; docs/kv.md has what led to this order. */
static const char * const tm_codec_names[] = { "zstd", "lz4" };

/* Finding one may wait for modprobe: nobody but those who want the same waits too. */
static DEFINE_MUTEX(tm_codec_mutex);
static struct crypto_acomp *tm_codec;

static int tm_codec_find(void)
{
	struct crypto_acomp *codec = ERR_PTR(-ENOENT);

	/* The next one only where there is none: not where memory is short just now. */
	for (u32 i = 0; codec == ERR_PTR(-ENOENT) &&
			i < ARRAY_SIZE(tm_codec_names); i++)
		codec = crypto_alloc_acomp(tm_codec_names[i], 0, 0);
	if (codec == ERR_PTR(-ENOENT))
		return -EOPNOTSUPP;
	if (IS_ERR(codec))
		return fatal_signal_pending(current) ? -EINTR : -ENOMEM;
	WRITE_ONCE(tm_codec, codec);
	return 0;
}

/**
 * tm_codec_init - find a codec, once
 *
 * Context: may sleep. Return: 0, -EOPNOTSUPP, -ENOMEM, -EINTR.
 */
int tm_codec_init(void)
{
	int err = 0;

	if (!IS_REACHABLE(CONFIG_CRYPTO_ACOMP2))
		return -EOPNOTSUPP;
	mutex_lock(&tm_codec_mutex);
	if (!tm_codec)
		err = tm_codec_find();
	mutex_unlock(&tm_codec_mutex);
	return err;
}

/* Every stream is closed. */
void tm_codec_exit(void)
{
	if (IS_REACHABLE(CONFIG_CRYPTO_ACOMP2) && tm_codec)
		crypto_free_acomp(tm_codec);
}

/* What it is called, or NULL while there is none. Context: any. */
const char *tm_codec_name(void)
{
	struct crypto_acomp *codec = READ_ONCE(tm_codec);

	if (!IS_REACHABLE(CONFIG_CRYPTO_ACOMP2) || !codec)
		return NULL;
	return crypto_tfm_alg_name(crypto_acomp_tfm(codec));
}

/**
 * tm_codec_open - make a stream
 * @stream: the stream; an open one stays as it is
 *
 * Context: may sleep; tm_codec_init() has succeeded. Return: 0, -ENOMEM.
 */
int tm_codec_open(struct tm_codec_stream *stream)
{
	if (!IS_REACHABLE(CONFIG_CRYPTO_ACOMP2))
		return -ENOMEM;
	if (!stream->request)
		stream->request = acomp_request_alloc(tm_codec);
	return stream->request ? 0 : -ENOMEM;
}

/* Also one that was never opened. */
void tm_codec_close(struct tm_codec_stream *stream)
{
	if (IS_REACHABLE(CONFIG_CRYPTO_ACOMP2) && stream->request)
		acomp_request_free(stream->request);
}

/* Return: bytes written to @to, or an errno. */
static int tm_codec_run(struct acomp_req *request,
			int (*run)(struct acomp_req *req), void *from,
			u32 bytes, void *to, u32 room)
{
	struct scatterlist in, out;
	DECLARE_CRYPTO_WAIT(wait);
	int err;

	sg_init_one(&in, from, bytes);
	sg_init_one(&out, to, room);
	acomp_request_set_params(request, &in, &out, bytes, room);
	acomp_request_set_callback(request, CRYPTO_TFM_REQ_MAY_BACKLOG,
				   crypto_req_done, &wait);
	err = crypto_wait_req(run(request), &wait);
	return err ?: request->dlen;
}

/**
 * tm_codec_compress - make bytes fewer
 * @stream: open, and nobody else's
 * @from: the bytes, from kmalloc()
 * @bytes: how many; at most TM_CODEC_MAX
 * @to: where to, from kmalloc()
 * @room: bytes there
 *
 * Context: may sleep. Return: bytes at @to, or an errno when they do not fit.
 */
int tm_codec_compress(struct tm_codec_stream *stream, void *from, u32 bytes,
		      void *to, u32 room)
{
	if (!IS_REACHABLE(CONFIG_CRYPTO_ACOMP2))
		return -EOPNOTSUPP;
	return tm_codec_run(stream->request, crypto_acomp_compress, from, bytes,
			    to, room);
}

/**
 * tm_codec_decompress - the inverse
 * @stream: open, and nobody else's
 * @from: what it has made, from kmalloc()
 * @bytes: how many
 * @to: where to, from kmalloc()
 * @want: bytes there
 *
 * Context: may sleep. Return: 0, or -EIO for anything but @want bytes.
 */
int tm_codec_decompress(struct tm_codec_stream *stream, void *from, u32 bytes,
			void *to, u32 want)
{
	int got;

	if (!IS_REACHABLE(CONFIG_CRYPTO_ACOMP2))
		return -EIO;
	got = tm_codec_run(stream->request, crypto_acomp_decompress, from,
			   bytes, to, want);
	return got == want ? 0 : -EIO;
}
