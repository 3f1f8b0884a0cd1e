// SPDX-License-Identifier: GPL-2.0-only
/* The in-kernel API: include/linux/tensormem.h describes it. */
#include <linux/export.h>
#include <linux/tensormem.h>

#include "pages.h"

int tensormem_alloc_run(struct tensormem_run *run, unsigned int order,
			unsigned int flags)
{
	struct tm_geometry g = tm_pages_geometry();
	struct tm_chunk_id chunk;
	struct tm_page_id page;
	bool zeroed = false;
	int err;

	if (order > g.chunk_order || flags & ~TENSORMEM_ZEROED)
		return -EINVAL;
	if (order == g.chunk_order) {
		err = tm_pages_take_chunk(flags & TENSORMEM_ZEROED, &chunk,
					  &zeroed);
		if (!err)
			page = tm_page_id(g, chunk, 0);
	} else {
		err = tm_pages_alloc_run(order, true, &page);
	}
	if (err)
		return err;
	if (flags & TENSORMEM_ZEROED && !zeroed)
		tm_pages_zero(page, order);
	run->page = tm_pages_page(page);
	run->id = page.v;
	run->order = order;
	return 0;
}
EXPORT_SYMBOL_GPL(tensormem_alloc_run);

void tensormem_free_run(const struct tensormem_run *run)
{
	struct tm_geometry g = tm_pages_geometry();
	struct tm_page_id page = { run->id };

	if (run->order == g.chunk_order)
		tm_pages_put_chunk(tm_page_chunk(g, page), false);
	else
		tm_pages_free_run(page, run->order);
}
EXPORT_SYMBOL_GPL(tensormem_free_run);
