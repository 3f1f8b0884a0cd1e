// SPDX-License-Identifier: GPL-2.0-only
#include <linux/shrinker.h>
void probe(void);
void probe(void)
{
	shrinker_register(shrinker_alloc(0, "%s", "probe"));
}
