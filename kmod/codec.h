/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_CODEC_H
#define TM_CODEC_H

#include <linux/types.h>

struct acomp_req;

/* Most bytes at a time: half of what the crypto API's codecs take (6.12). */
#define TM_CODEC_MAX	(64u << 10)

/* What one user at a time compresses or decompresses with. */
struct tm_codec_stream {
	struct acomp_req *request;
};

int __must_check tm_codec_init(void);
void tm_codec_exit(void);
const char *tm_codec_name(void);

int __must_check tm_codec_open(struct tm_codec_stream *stream);
void tm_codec_close(struct tm_codec_stream *stream);
int __must_check tm_codec_compress(struct tm_codec_stream *stream, void *from,
				   u32 bytes, void *to, u32 room);
int __must_check tm_codec_decompress(struct tm_codec_stream *stream,
				     void *from, u32 bytes, void *to,
				     u32 want);

#endif
