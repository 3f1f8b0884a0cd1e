/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * tensormem: memory for tensors and LLM inference
 *
 * The whole user ABI. This header is also its manual: every struct, flag and
 * errno is described where it is declared. docs/ABI describes the sysfs files.
 *
 * A client
 *
 *   open("/dev/tensormem", O_RDWR) makes a client. It owns every tensor it
 *   allocates; when the last descriptor and the last mapping of it are gone,
 *   all of them are freed, however the process ended. Two opens are two
 *   clients: neither can name, map or see the memory of the other. A
 *   descriptor kept across fork() or sent over a Unix socket is the same client.
 *
 * A tensor and the window
 *
 *   A tensor is named by a handle (never 0) and lives at an offset in the
 *   client's window, a range of struct tensormem_info::window_size bytes that
 *   mmap(2) sees as the contents of the descriptor:
 *
 *   - mmap(NULL, window_size, prot, MAP_SHARED, fd, 0) maps the window once.
 *     Every tensor allocated later is then at window + offset, with no further
 *     system call.
 *   - mmap(NULL, length, prot, MAP_SHARED, fd, offset) maps one tensor or a
 *     page-aligned part of it.
 *
 *   Memory is zero when a tensor is first seen, unless TENSORMEM_NOZERO let it be
 *   the client's own old contents. Mappings behave like those of a
 *   shared file: they survive fork(), mprotect() works, MADV_DONTNEED drops
 *   page-table entries and never data, and pages can be pinned (O_DIRECT).
 *   Touching a part of the window that holds no tensor, or a tensor that was
 *   freed, raises SIGBUS until its offset is given to the client's next tensor
 *   (a tensor with TENSORMEM_NOZERO, or one in the slab, may stay readable to its own
 *   client instead).
 *   userfaultfd is not supported: a page it marked raises SIGBUS. mmap() fails with:
 *
 *     EINVAL   not MAP_SHARED; or the range is neither the whole window nor
 *              inside one tensor. Map what TENSORMEM_IOC_ALLOC returned.
 *     ENOENT   no tensor at this offset. Allocate it first.
 *     EPERM    PROT_EXEC: tensor memory is never executable.
 *
 *   How a tensor is mapped is up to its kind, or to the flags TENSORMEM_HUGE and
 *   TENSORMEM_PAGED; enum tensormem_mapping says what the ways are, and
 *   TENSORMEM_IOC_QUERY which one is in force.
 *
 *   mremap() may shrink a mapping and neither grow nor move one (EFAULT or
 *   EINVAL): map the tensor again instead.
 *
 * Extensible structs
 *
 *   Every ioctl carries the size of its struct in its number. A struct shorter
 *   than the kernel's is taken as if the missing tail were zero, and gets back
 *   only the part it has; a longer one is accepted when the tail the kernel
 *   does not know is zero. So old programs run on new modules and new programs
 *   on old modules as long as they ask for nothing the module lacks. The same
 *   holds for the items of a batch, by tensormem_batch::item_size.
 *
 * Errors
 *
 *   A call that fails changes nothing. Every errno means one thing:
 *
 *     EINVAL   The call is malformed: a size of 0 or above the window, an
 *              unknown kind, pool, flag, node or non-zero tail. Fix the caller.
 *     EFAULT   A struct or an array of items is not readable or not writable.
 *     ENOENT   No such tensor: never allocated, freed, or of another client.
 *     ENOMEM   The system has no memory, or the caller's memory cgroup is at its
 *              limit. Free some, or lower what else runs. Nothing is ever killed
 *              for memory of ours.
 *     EDQUOT   The client's quota is used up. Free tensors or raise the quota.
 *              What others still hold of freed ones counts until they let go.
 *     ENOSPC   The chunk pool is at its capacity, on every node the call allows.
 *              Free tensors, or have root raise chunk/capacity in sysfs.
 *     ENOBUFS  The window has no gap of this size left. Free tensors.
 *     EBUSY    A new quota is below what the client already holds.
 *     EPERM    Not allowed: PROT_EXEC, a quota above clients/default_quota
 *              without CAP_SYS_RESOURCE, or TENSORMEM_PINNED beyond
 *              RLIMIT_MEMLOCK without CAP_IPC_LOCK.
 *     EINTR    A fatal signal ended the call.
 *     ENOTTY   Not a tensormem ioctl.
 */
#ifndef _UAPI_LINUX_TENSORMEM_H
#define _UAPI_LINUX_TENSORMEM_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define TENSORMEM_DEVICE	"/dev/tensormem"
#define TENSORMEM_ABI_VERSION	1

/* What a tensor is for. It selects the pool unless the call names one. */
enum tensormem_kind {
	TENSORMEM_KIND_WEIGHTS		= 1,	/* large, read-mostly */
	TENSORMEM_KIND_KV		= 2,	/* keys and values of attention */
	TENSORMEM_KIND_ACTIVATIONS	= 3,	/* short-lived, reused often */
	TENSORMEM_KIND_PROTOCOL		= 4,	/* buffers of real-time I/O */
};

/* Which pool serves a tensor. */
enum tensormem_pool {
	TENSORMEM_POOL_AUTO	= 0,	/* by kind and size */
	TENSORMEM_POOL_CHUNK	= 1,	/* whole chunks; the last may be part used */
	TENSORMEM_POOL_BUDDY	= 2,	/* runs of pages, up to half a chunk each */
	TENSORMEM_POOL_SLAB	= 3,	/* objects below a page, in pages of this client */
};

/*
 * How a tensor's pages are mapped. All can be pinned (O_DIRECT, io_uring). A block
 * costs one TLB entry and one fault for 2 MiB, but does not count as RSS on every
 * kernel, and where only part of a chunk is mapped it is mapped by pages.
 */
enum tensormem_mapping {
	TENSORMEM_MAPPING_PAGES	= 1,	/* page by page, a page table's worth a fault */
	TENSORMEM_MAPPING_CONT	= 2,	/* the same; the CPU folds contiguous ones */
	TENSORMEM_MAPPING_BLOCK	= 3,	/* whole chunks as one entry each */
};

/* Which memory node serves a tensor, where there is more than one. */
enum tensormem_numa {
	TENSORMEM_NUMA_DEFAULT	  = 0,	/* what TENSORMEM_IOC_SET_NUMA says */
	TENSORMEM_NUMA_LOCAL	  = 1,	/* the caller's, else the nearest to it */
	TENSORMEM_NUMA_BIND	  = 2,	/* those of a mask and no other */
	TENSORMEM_NUMA_INTERLEAVE = 3,	/* those of a mask in turn */
};

/*
 * Flags of an allocation.
 *
 * NOZERO: the tensor may have the contents of an earlier NOZERO tensor of the same
 * client, kind and size in place of zeros. Its memory and its mappings are kept for
 * the next one when it is freed, which makes reuse cheap: nothing is zeroed,
 * unmapped or faulted in again. What is kept counts as used, and is given up when
 * the quota, the capacity or the system is short of memory.
 *
 * HUGE, PAGED: map whole chunks as blocks, or page by page, whatever the kind.
 *
 * PINNED: the pages stay where they are: compaction never moves them. They count
 * against the caller's RLIMIT_MEMLOCK unless it has CAP_IPC_LOCK.
 */
#define TENSORMEM_NOZERO	(1u << 0)
#define TENSORMEM_HUGE		(1u << 1)
#define TENSORMEM_PAGED		(1u << 2)
#define TENSORMEM_PINNED	(1u << 3)

/**
 * struct tensormem_info - what this module and this client offer
 * @abi_version: TENSORMEM_ABI_VERSION the module was built with
 * @page_size: bytes in a page; offsets and mappings are multiples of it
 * @chunk_size: bytes in a chunk, the unit that moves between pools
 * @window_size: bytes in the client's window
 * @quota: bytes the client may hold; see TENSORMEM_IOC_SET_QUOTA
 * @used: bytes the client holds, in whole pages or chunks
 * @nr_tensors: tensors the client holds
 * @max_batch: most items in one batch call
 * @cache_line: bytes of alignment that keep two CPUs from sharing a line
 * @pad: zero
 * @kept: bytes of @used that no tensor has: kept for NOZERO reuse, or freed and
 *        still held by somebody else
 * @nodes: memory nodes with a pool, a bit each
 */
struct tensormem_info {
	__u32 abi_version;
	__u32 page_size;
	__u64 chunk_size;
	__u64 window_size;
	__u64 quota;
	__u64 used;
	__u32 nr_tensors;
	__u32 max_batch;
	__u32 cache_line;
	__u32 pad;
	__u64 kept;
	__u64 nodes;
};

/**
 * struct tensormem_alloc - allocate one tensor
 * @size: in: bytes, from 1 to window_size
 * @kind: in: enum tensormem_kind
 * @pool: in: enum tensormem_pool
 * @flags: in: TENSORMEM_NOZERO, _HUGE or _PAGED, _PINNED
 * @handle: out: the tensor's name; ignored on input
 * @offset: out: where it lies in the window; ignored on input
 * @numa: in: enum tensormem_numa
 * @pad: in: must be 0
 * @nodes: in: for NUMA_BIND and NUMA_INTERLEAVE the nodes allowed, a bit each, out of
 *         tensormem_info::nodes; 0 means all of them for INTERLEAVE; else 0
 *
 * Takes whole pages (POOL_BUDDY), whole chunks (POOL_CHUNK), part of a page
 * (POOL_SLAB: not PINNED, and only for NUMA_DEFAULT), or what the dispatch table in sysfs says for POOL_AUTO; a tensor
 * of a chunk or more then takes whole chunks and the rest as whole pages. The tensor
 * is physically allocated when the call returns. A tensor of a chunk or more starts
 * at a multiple of chunk_size in the window, one of a page or more at a multiple of
 * page_size, any other at a multiple of its size rounded up to a power of two or
 * of cache_line, whichever is less.
 */
struct tensormem_alloc {
	__u64 size;
	__u32 kind;
	__u32 pool;
	__u32 flags;
	__u32 handle;
	__u64 offset;
	__u32 numa;
	__u32 pad;
	__u64 nodes;
};

/**
 * struct tensormem_free - free one tensor
 * @handle: in: the tensor
 * @flags: in: must be 0
 *
 * Mappings of the tensor are emptied first: a later touch raises SIGBUS. Pages
 * that somebody else still holds (O_DIRECT in flight) are set aside until let
 * go, and never given to anyone before.
 */
struct tensormem_free {
	__u32 handle;
	__u32 flags;
};

/**
 * struct tensormem_query - describe one tensor
 * @handle: in: the tensor
 * @flags: in: must be 0
 * @kind: out: enum tensormem_kind
 * @pool: out: the pool that serves it, never TENSORMEM_POOL_AUTO
 * @size: out: bytes asked for
 * @length: out: bytes it takes in the window; at least @size, in pages or a slab's
 *          objects
 * @offset: out: where it lies in the window
 * @held: out: bytes of memory it holds; a slab is charged as a whole, not by object
 * @nr_chunks: out: whole chunks it is made of
 * @nr_runs: out: runs of pages it is made of, beside the chunks; 0 for a slab object
 * @mapping: out: enum tensormem_mapping of its chunks; runs are mapped as PAGES
 * @alloc_flags: out: the flags it was allocated with
 */
struct tensormem_query {
	__u32 handle;
	__u32 flags;
	__u32 kind;
	__u32 pool;
	__u64 size;
	__u64 length;
	__u64 offset;
	__u64 held;
	__u32 nr_chunks;
	__u32 nr_runs;
	__u32 mapping;
	__u32 alloc_flags;
};

/**
 * struct tensormem_batch - the same call for an array of items
 * @items: in: address of the first item
 * @count: in: items, from 1 to tensormem_info::max_batch
 * @item_size: in: bytes from one item to the next
 * @flags: in: must be 0
 * @failed: out: on failure the index of the item that failed, else @count
 *
 * All items or none: where one fails, those before it are undone (a query has
 * nothing to undo: they are filled in) and the call returns the errno of the one
 * that failed. A handle named twice in one
 * TENSORMEM_IOC_FREE_BATCH fails at its second place with ENOENT.
 */
struct tensormem_batch {
	__u64 items;
	__u32 count;
	__u32 item_size;
	__u32 flags;
	__u32 failed;
};

/**
 * struct tensormem_quota - bound what the client may hold
 * @bytes: in: the new quota
 *
 * Any client may lower its quota down to what it holds, and raise it up to
 * clients/default_quota in sysfs. Going above that takes CAP_SYS_RESOURCE. A quota
 * bounds one client, not all clients of a user: that is what memory cgroups are for.
 */
struct tensormem_quota {
	__u64 bytes;
};

/**
 * struct tensormem_set_numa - choose the nodes for a client's later allocations
 * @numa: in: enum tensormem_numa; DEFAULT means LOCAL, which every client starts with
 * @flags: in: must be 0
 * @nodes: in: as in struct tensormem_alloc
 */
struct tensormem_set_numa {
	__u32 numa;
	__u32 flags;
	__u64 nodes;
};

#define TENSORMEM_IOC_MAGIC		0xB7

#define TENSORMEM_IOC_INFO		_IOWR(TENSORMEM_IOC_MAGIC, 0x00, struct tensormem_info)
#define TENSORMEM_IOC_SET_QUOTA		_IOWR(TENSORMEM_IOC_MAGIC, 0x01, struct tensormem_quota)
#define TENSORMEM_IOC_SET_NUMA		_IOWR(TENSORMEM_IOC_MAGIC, 0x02, struct tensormem_set_numa)
#define TENSORMEM_IOC_ALLOC		_IOWR(TENSORMEM_IOC_MAGIC, 0x10, struct tensormem_alloc)
#define TENSORMEM_IOC_FREE		_IOWR(TENSORMEM_IOC_MAGIC, 0x11, struct tensormem_free)
#define TENSORMEM_IOC_QUERY		_IOWR(TENSORMEM_IOC_MAGIC, 0x12, struct tensormem_query)
/* Each takes a struct tensormem_batch over items of the single call's struct. */
#define TENSORMEM_IOC_ALLOC_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x20, struct tensormem_batch)
#define TENSORMEM_IOC_FREE_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x21, struct tensormem_batch)
#define TENSORMEM_IOC_QUERY_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x22, struct tensormem_batch)

#endif /* _UAPI_LINUX_TENSORMEM_H */
