// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/kernel/debug/tensormem: what the memory looks like, for `tensormem map` and
 * `tensormem walk`. The files are described in docs/ABI/debugfs-tensormem.
 *
 * Nothing else depends on them: where debugfs is missing, the module works as well.
 */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "debugfs.h"
#include "pages.h"
#include "walk.h"

static struct dentry *tm_debugfs;

static const char *const tm_purposes[TM_PURPOSES] = {
	[TM_FOR_MODULE] = "module",
	[TM_FOR_WEIGHTS] = "weights",
	[TM_FOR_KV] = "kv",
	[TM_FOR_ACTIVATIONS] = "activations",
	[TM_FOR_PROTOCOL] = "protocol",
	[TM_FOR_CACHE] = "cache",
	[TM_FOR_MODEL] = "model",
	[TM_FOR_RT] = "rt",
};

/* Two words: what the chunk is, and who has it if that is anybody. */
static const char *tm_chunks_use(const struct tm_chunk_view *view)
{
	static const char *const states[TM_CHUNK_STATES] = {
		[TM_CHUNK_FREE_ZEROED] = "zeroed -",
		[TM_CHUNK_FREE_DIRTY] = "dirty -",
		[TM_CHUNK_FREE_SPLIT] = "split -",
		[TM_CHUNK_ZEROING] = "zeroing -",
	};

	if (view->chunk.state != TM_CHUNK_OWNED)
		return states[view->chunk.state];
	return view->chunk.owner == TM_OWNER_BUDDY ? "buddy -" : "chunk";
}

static void tm_chunks_runs(struct seq_file *m, const u8 *run)
{
	u32 pages = tm_chunk_pages(tm_pages_geometry());

	for (u32 i = 0; i < pages; ) {
		u8 order = run[i] & TM_BUDDY_RUN_ORDER;

		if (!order) {
			i++;
			continue;
		}
		seq_printf(m, " %u+%u%s%s", i, 1u << (order - 1),
			   run[i] & TM_BUDDY_RUN_UNMOVABLE ? "u" : "",
			   run[i] & TM_BUDDY_RUN_ARRIVING ? "a" : "");
		i += 1u << (order - 1);
	}
}

static void *tm_chunks_start(struct seq_file *m, loff_t *pos)
{
	return *pos < tm_pages_slots() ? m->private : NULL;
}

static void *tm_chunks_next(struct seq_file *m, void *v, loff_t *pos)
{
	++*pos;
	return tm_chunks_start(m, pos);
}

static void tm_chunks_stop(struct seq_file *m, void *v)
{
}

/* One chunk at a time: a busy pool is not held up by who looks at it. */
static int tm_chunks_show(struct seq_file *m, void *v)
{
	struct tm_chunk_view *view = v;
	const struct tm_chunk *chunk = &view->chunk;
	bool owned;

	if (!tm_pages_view(m->index, view))
		return SEQ_SKIP;
	owned = chunk->state == TM_CHUNK_OWNED;
	seq_printf(m, "%u %u %lx %s", view->node, view->id, view->frame,
		   tm_chunks_use(view));
	if (owned && chunk->owner == TM_OWNER_TENSOR)
		seq_printf(m, " %s", tm_purposes[view->purpose]);
	seq_printf(m, " %u", owned && chunk->form.charged);
	if (owned && chunk->owner == TM_OWNER_BUDDY)
		tm_chunks_runs(m, view->run);
	seq_putc(m, '\n');
	return 0;
}

static const struct seq_operations tm_chunks_ops = {
	.start = tm_chunks_start,
	.next = tm_chunks_next,
	.stop = tm_chunks_stop,
	.show = tm_chunks_show,
};

static int tm_chunks_open(struct inode *inode, struct file *file)
{
	return __seq_open_private(file, &tm_chunks_ops,
				  sizeof(struct tm_chunk_view)) ? 0 : -ENOMEM;
}

static const struct file_operations tm_chunks_fops = {
	.owner = THIS_MODULE,
	.open = tm_chunks_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = seq_release_private,
};

void __init tm_debugfs_init(void)
{
	tm_debugfs = debugfs_create_dir("tensormem", NULL);
	debugfs_create_file("chunks", 0400, tm_debugfs, NULL, &tm_chunks_fops);
	debugfs_create_file("walk", 0600, tm_debugfs, NULL, &tm_walk_fops);
}

void tm_debugfs_exit(void)
{
	debugfs_remove(tm_debugfs);
}
