// SPDX-License-Identifier: GPL-2.0-only
#include <net/genetlink.h>

void probe(struct genl_family *family, int (*bind)(int), void (*unbind)(int));

void probe(struct genl_family *family, int (*bind)(int), void (*unbind)(int))
{
	family->bind = bind;
	family->unbind = unbind;
}
