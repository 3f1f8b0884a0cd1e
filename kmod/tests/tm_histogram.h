/* SPDX-License-Identifier: GPL-2.0-only */
/* How long single operations take: median and worst of very many. */
#ifndef TM_HISTOGRAM_H
#define TM_HISTOGRAM_H

#include <linux/ktime.h>
#include <linux/minmax.h>
#include <linux/string.h>

#define TM_HISTOGRAM_NS		8192	/* more is one bucket */

struct tm_histogram {
	u64 clock;	/* what reading the clock takes */
	u64 worst;
	u64 count;
	u32 bucket[TM_HISTOGRAM_NS + 1];
};

static inline void tm_histogram_init(struct tm_histogram *h)
{
	memset(h, 0, sizeof(*h));
	h->clock = U64_MAX;
	for (int i = 0; i < 16; i++) {
		u64 start = ktime_get_ns();

		h->clock = min(h->clock, ktime_get_ns() - start);
	}
}

/* Count an operation that took @ns with reading the clock. */
static inline void tm_histogram_count(struct tm_histogram *h, u64 ns)
{
	ns -= min(h->clock, ns);
	h->worst = max(h->worst, ns);
	h->bucket[min_t(u64, ns, TM_HISTOGRAM_NS)]++;
	h->count++;
}

/* Count an operation that began at @start and ends now. */
static inline void tm_histogram_add(struct tm_histogram *h, u64 start)
{
	tm_histogram_count(h, ktime_get_ns() - start);
}

static inline u32 tm_histogram_median(const struct tm_histogram *h)
{
	u64 seen = 0;
	u32 ns = 0;

	while (seen + h->bucket[ns] <= h->count / 2)
		seen += h->bucket[ns++];
	return ns;
}

#endif
