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
 *   page-table entries and never data, and pages can be pinned (O_DIRECT), but
 *   POOL_DMA's.
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
 *              Free tensors, or have root raise chunk/capacity in sysfs. TENSORMEM_POOL_DMA: the
 *              region has no such gap (dma/free in sysfs). Free tensors of it, or have the device tree
 *              set aside more.
 *     ENODEV   TENSORMEM_POOL_DMA: the device tree sets no region aside, or its driver is unbound
 *              (dma/node in sysfs).
 *              Use TENSORMEM_POOL_CHUNK, or add the nodes that docs/dma.md shows.
 *     ENOBUFS  The window has no gap of this size left. Free tensors.
 *     EBUSY    A new quota is below what the client already holds.
 *     EPERM    Not allowed: PROT_EXEC, a quota above clients/default_quota or a
 *              budget above bandwidth/client_budget without CAP_SYS_RESOURCE,
 *              TENSORMEM_PINNED or an export beyond RLIMIT_MEMLOCK without CAP_IPC_LOCK, or RELIEVE
 *              without CAP_SYS_ADMIN.
 *     EINTR    A fatal signal ended the call.
 *     ENOTTY   Not a tensormem ioctl.
 *
 *   This comes from an export only, beside EMFILE and ENFILE as from open(2):
 *
 *     EOPNOTSUPP  The tensor shares its pages with others. Allocate it with TENSORMEM_POOL_BUDDY.
 *
 *   These come from KV caches only:
 *
 *     ERANGE   The sequence would have more tokens than tensormem_kv_create::max_tokens.
 *              Truncate it, or create a cache for longer ones.
 *     ENODATA  The KV asked for is not there, or not any more: no block is published
 *              under this hash, a window has moved past it, or a state has moved on.
 *              Compute it.
 *     EIO      A packed block does not match its checksum: memory has gone bad. Its
 *              tokens are lost; a touch of them raises SIGBUS.
 *     EOPNOTSUPP  The kernel has no codec to pack KV with. Load the module zstd or lz4.
 *
 *   and these from model slots only:
 *
 *     EACCES   The slot's mode does not let the caller, or the descriptor was not opened
 *              for it; or TENSORMEM_MODEL_CACHED and the file is another user's. As for files.
 *     EEXIST   A slot of this name exists, and TENSORMEM_MODEL_EXCL was given.
 *     EAGAIN   The generation is being loaded still. poll(2) says when it is not.
 *     ESTALE   The generation cannot be used: tensormem_model_info::error says why.
 *     EBADMSG  The file is not what was promised: it is shorter, or has another SHA-256.
 *              Get a whole copy of it.
 *     ETXTBSY  The file is open for writing, or was opened for it later, and a cached generation
 *              cannot have that. Close it there; replace models by rename(2).
 *     ECANCELED  The load was given up: the one who staged it closed its descriptor.
 *
 *   and EMFILE, ENFILE from KV_CREATE as from open(2); EDQUOT, ENOSPC (the cache is at
 *   its limit, too), ENOMEM as above; ENOENT for
 *   no such sequence, ENOBUFS for max_sequences open already, EBUSY for a reset
 *   while sequences hold blocks.
 *
 *   and this from the RT pool only:
 *
 *     ETIMEDOUT  No memory was to be had by the deadline. It counts as a miss. Reserve, or free some.
 *
 *   where ENOSPC is: no memory now and no deadline to wait for it, or the pool has no room for
 *   an arena or a reservation; ENOENT: no such block of this client's; ENFILE: more movable blocks
 *   than the arena was made for.
 *
 * A dma-buf
 *
 *   TENSORMEM_IOC_EXPORT returns a descriptor of a tensor's memory for devices and their drivers (GPU, NPU,
 *   camera, V4L2, RDMA), which take such descriptors. It is of the kernel's own kind: mmap(2) from offset 0, MAP_SHARED
 *   (EINVAL) and without PROT_EXEC (EPERM); lseek(2) to SEEK_END tells its size; DMA_BUF_IOCTL_SYNC before and
 *   after the CPU looks at what devices write, or writes what they read. It can be sent over a Unix socket.
 *
 *   The memory is the tensor's, not a copy: what is written through the window shows here and the other way
 *   round. It stays where it is, and counts as locked by who exports it (RLIMIT_MEMLOCK, once for each export,
 *   unless with CAP_IPC_LOCK), until the last descriptor, mapping and device that has it is gone.
 *   TENSORMEM_IOC_FREE, closing the client and the end of the process take it from none of them: until
 *   then it is set aside, and on the client's bill. A tensor that was ever exported is not kept for
 *   TENSORMEM_NOZERO reuse.
 *
 *   A whole chunk is one entry of 2 MiB for a device that takes as much (and one entry of its IOMMU), so weights
 *   and tensors of TENSORMEM_POOL_CHUNK cost fewest. The module cannot be unloaded while there is a dma-buf.
 *
 * A KV cache
 *
 *   TENSORMEM_IOC_KV_CREATE makes one for a model's geometry and returns a descriptor
 *   of its own, which can be mapped, polled, and sent over a Unix socket. It is on
 *   its client's bill and outlives the client's descriptor; closing the last
 *   descriptor and mapping of it frees everything.
 *
 *   Its window has a place for each sequence, of tensormem_kv_info::sequence_size bytes.
 *   In it each plane (K or V of a layer) is one array: number t of a
 *   sequence's tokens begins at
 *
 *     sequence offset + group offset + plane * group stride + t * token_bytes
 *
 *   so that attention code reads plain contiguous memory. Behind the addresses lie
 *   blocks of block_tokens tokens. A sequence shares blocks with those it was
 *   forked from and with every other that begins alike (TENSORMEM_IOC_KV_LOOKUP).
 *   Who writes to a block that somebody else can see gets a copy of it: nobody ever
 *   sees another sequence's writes.
 *
 *   mmap(2) of the descriptor takes the whole window, or a part of one open sequence's
 *   place (else EINVAL, or ENOENT for a sequence that is not open). A mapping of a place
 *   outlives the sequence and shows the next one there: to pass on one sequence is
 *   to pass on all that come after it. Touching what
 *   a sequence does not hold raises SIGBUS: tokens past its length (to the end of
 *   their block), those that have left the window of a group, all of a closed one.
 *   So does a touch that needs memory (a copy, or unpacking) when there is none: within
 *   the quota, the limit and after giving up cached blocks. Wrong data is never
 *   seen. These mappings cannot be pinned (O_DIRECT from or to them fails with EFAULT;
 *   read(2) and write(2) copy and work), because who may write to a page is known
 *   page by page.
 *
 * A model slot
 *
 *   A slot is a name for a model that programs use while it is replaced. It
 *   has generations, numbered from 1: at most one that is staged, one that is
 *   active, and the one that was active before it.
 *
 *   TENSORMEM_IOC_MODEL_OPEN opens a slot, or makes it, and returns a descriptor of
 *   it. A slot outlives who made it and goes by TENSORMEM_IOC_MODEL_REMOVE; until
 *   then the module cannot be unloaded. It has an owner, a group and a mode like a
 *   file; fstat(2), fchmod(2) and fchown(2) of the descriptor are how to see and change them. To
 *   acquire a generation takes permission to read, all else to write.
 *
 *   TENSORMEM_IOC_MODEL_STAGE loads a file as a new generation beside the active one;
 *   TENSORMEM_IOC_MODEL_COMMIT makes it active, in constant time; whoever acquires after that
 *   gets the new one. TENSORMEM_IOC_MODEL_ROLLBACK makes the previous one active again
 *   as long as it is kept: until another is committed, or until memory
 *   is short while one is being staged.
 *
 *   TENSORMEM_IOC_MODEL_ACQUIRE returns a descriptor of a generation: a read-only
 *   file of the model's bytes, for mmap(2), read(2), pread(2), lseek(2) and fstat(2), that can be
 *   sent over a Unix socket. What it shows never changes, whatever becomes of the slot;
 *   the memory is freed when the last descriptor and mapping are closed and the
 *   slot does not have it any more.
 *
 *   poll(2) of a generation: POLLIN when it is not being loaded any more, POLLERR when
 *   it cannot be used, POLLPRI when it is not (any more) the active one. Of a slot: POLLIN
 *   when another generation is active than the one this descriptor acquired or
 *   described last, POLLHUP when it was removed.
 *
 *   A resident generation is in chunks, on the bill of the client that staged it; chunks that are
 *   equal to the active generation's are shared with it. Whole chunks are mapped as
 *   blocks where the kernel can. A cached one (TENSORMEM_MODEL_CACHED) stays in its file and
 *   is mapped from the page cache, which the system may evict and read again: for
 *   boards where two copies do not fit. It is as good as its file: while it exists, who opens the file for writing
 *   or truncates it ends it first. Its mappings are emptied, touching them
 *   raises SIGBUS, read() gives ESTALE; changed contents are never seen. (Writes that bypass the
 *   file, to the disk below it or on another machine, cannot be noticed, nor writes to pages that
 *   a process pinned for that before it closed the file. Pages of a mapping that were pinned or
 *   spliced, by O_DIRECT or vmsplice(2), stay the file's.) A new time of modification ends it, too.
 *   Where the model ends within a page, a mapping shows what of the file follows in that page.
 *
 *   An evictable one (TENSORMEM_MODEL_EVICTABLE) is in chunks as a resident one is, but its chunks may go when memory is
 *   wanted, least recently used first, and are read from the file again when somebody touches or reads them.
 *   (Used is what was read or has faulted; what others hold besides, by O_DIRECT or vmsplice(2), stays.) They come back on the
 *   bill of the client that staged it and of that client's memory cgroup. A touch that finds no memory, after other
 *   evictable chunks and the slot's previous generation were given up and two seconds passed, raises SIGBUS, and the next may
 *   succeed; read(2) fails with ENOMEM, EDQUOT or ENOSPC. So it is with an error of the disk, where read(2) gives
 *   that. It shares no chunks with other generations: a chunk would have to come back for readers of one whose file is gone. The file is
 *   watched as that of a cached one, with the same demands on it. Who opens it for writing waits until all that
 *   is missing has come back (up to 20 seconds), and from then on it is like a resident one. If that cannot be done, or if bytes come
 *   back other than they were loaded (a checksum of each chunk is kept), the generation fails: mappings are emptied, touching
 *   them raises SIGBUS, read() gives ESTALE. Other bytes than those that were loaded are never shown.
 *
 *   mmap(2) of a generation fails with EACCES for PROT_WRITE, EPERM for PROT_EXEC, EINVAL for what
 *   lies behind the file's last page.
 *
 * The RT pool
 *
 *   Memory for what must not wait. It comes in arenas of whole chunks: zeroed, pinned, mapped with all of its pages when it
 *   is mmapped, and given to nobody else until the last descriptor and mapping are
 *   gone. All arenas together are bounded by rt/size in sysfs, which the board decides.
 *
 *   TENSORMEM_IOC_RT_OPEN makes an arena, or joins one, and returns a descriptor: an RT client. Clients of one arena
 *   see each other's memory, as threads do; who must not be seen has an arena of its own. What a
 *   client allocates is its own: only it can free it, and its last close does.
 *
 *   mmap(2) of the descriptor, MAP_SHARED, maps the arena or whole pages of it. Nothing in it faults afterwards
 *   (MADV_DONTNEED gives that up, and a touch brings it back; so does fork(2) for the child, which had better map it again). Blocks lie at offsets
 *   in it, aligned to tensormem_rt_info::granule, which no two CPUs' cache lines nor DMA buffers share. A block shows
 *   what the arena's clients left there.
 *
 *   TENSORMEM_IOC_RT_RESERVE promises blocks: @count of up to @size bytes. As long as the client has fewer
 *   than that, allocating one cannot fail, whatever anybody does; it takes a constant number of steps, and so does
 *   freeing it. All other blocks come from what is left of the arena, also in constant time, while there is any.
 *   When there is none, a deadline says what to do: blocks that may be moved are, one at a time, until there is a hole that fits;
 *   then the call waits for somebody to free something. Those who wait are served by priority, then
 *   in order. It returns by the deadline, plus a step: at most a copy of TENSORMEM_RT_STEP granules.
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
	TENSORMEM_POOL_DMA	= 4,	/* whole chunks side by side, out of the device tree's region */
};

/*
 * How a tensor's pages are mapped. All can be pinned (O_DIRECT, io_uring), but
 * POOL_DMA's: what would pin these is refused (EEXIST, EFAULT). A block
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
 * (POOL_SLAB: not PINNED, and only for NUMA_DEFAULT), whole chunks side by side (POOL_DMA: only for
 * NUMA_DEFAULT; mapped page by page, not to be pinned, not kept for reuse, on no cgroup's bill), or what the dispatch table in sysfs says for POOL_AUTO; a tensor
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

/*
 * Flags of an export. READ_ONLY: the descriptor can be mapped for reading only, and no
 * device writes through it: an importer that asks for that is refused (EACCES), and so is
 * one whose driver works on it with the CPU (vmap; EINVAL), because it could write.
 */
#define TENSORMEM_EXPORT_READ_ONLY	(1u << 0)

/**
 * struct tensormem_export - share one tensor as a dma-buf
 * @handle: in: the tensor
 * @flags: in: TENSORMEM_EXPORT_READ_ONLY
 * @size: out: bytes of the dma-buf: the tensor's, in whole pages
 * @fd: out: the dma-buf's descriptor, close-on-exec
 * @pad: in: must be 0
 *
 * See "A dma-buf" above. EOPNOTSUPP: the tensor is one of the slab, whose pages have others in them.
 * EPERM: beyond RLIMIT_MEMLOCK.
 */
struct tensormem_export {
	__u32 handle;
	__u32 flags;
	__u64 size;
	__s32 fd;
	__u32 pad;
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
 * struct tensormem_budget - bound what the module moves for the client in a period
 * @bytes: in: the new budget, from 1 (else EINVAL); all bits set: none
 *
 * What counts is told at struct tensormem_bandwidth. Any client may lower its budget, and raise
 * it up to bandwidth/client_budget in sysfs, which is what it begins with. Going above
 * that takes CAP_SYS_RESOURCE (else EPERM). The period is root's to set: bandwidth/period_us.
 */
struct tensormem_budget {
	__u64 bytes;
};

/**
 * struct tensormem_bandwidth - what the module has moved for the client
 * @budget: out: bytes that it may in a period; all bits set: any
 * @used: out: bytes in this period, and what earlier ones had above the budget; 0
 *        without a budget
 * @moved: out: bytes since the client was made
 * @excess: out: periods in which it moved and was above the budget
 * @waits: out: calls, and steps of loading a model, that had to wait for it
 * @held_ns: out: how long they waited
 * @period_ns: out: how long a period is
 * @client: out: what names the client in traces and events
 * @throttle: out: 1: above the budget it has to wait; 0: it is only told (bandwidth/throttle)
 *
 * A byte counts when it is zeroed, copied, read from a file, compared, packed or unpacked for the client:
 * allocating a tensor counts as much as tensormem_query::held says it holds (a small one: its
 * length, and its slab when that is new), also where the memory was zeroed beforehand; one that NOZERO
 * reuses counts nothing. What compaction moves, and all that RT clients do, is on nobody's bill.
 *
 * Who has to wait does at the beginning of TENSORMEM_IOC_ALLOC, _KV_EXTEND, _KV_FORK, _KV_LOOKUP,
 * _KV_ADOPT, _KV_PACK and their batches, until earlier excess is made up for, a
 * period for each budget; only a fatal signal ends it (EINTR). Models load the slower. Faults count and never wait.
 */
struct tensormem_bandwidth {
	__u64 budget;
	__u64 used;
	__u64 moved;
	__u64 excess;
	__u64 waits;
	__u64 held_ns;
	__u64 period_ns;
	__u32 client;
	__u32 throttle;
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

/* Which tokens a group of layers keeps. */
enum tensormem_kv_rule {
	TENSORMEM_KV_FULL	= 1,	/* all */
	TENSORMEM_KV_WINDOW	= 2,	/* at least the last @window */
	TENSORMEM_KV_STATE	= 3,	/* none: a state of fixed size */
};

/**
 * struct tensormem_kv_group - layers that share one KV shape and one rule
 * @rule: in: enum tensormem_kv_rule
 * @planes: in: arrays: K and V of each layer, so usually twice the layers
 * @token_bytes: in: bytes of a token in one plane; for KV_STATE bytes of a state's plane
 * @window: in: tokens, for KV_WINDOW; else 0
 * @element: in: bytes of one number (1, 2, 4 or 8), for packing; 0 is 1
 * @pad: in: must be 0
 * @offset: out (KV_INFO): where its first plane lies in a sequence's place
 * @stride: out (KV_INFO): bytes from one plane to the next
 */
struct tensormem_kv_group {
	__u32 rule;
	__u32 planes;
	__u32 token_bytes;
	__u32 window;
	__u32 element;
	__u32 pad;
	__u64 offset;
	__u64 stride;
};

/* Most groups of a cache. */
#define TENSORMEM_KV_MAX_GROUPS	16

/* tensormem_kv_create::flags: keep events for read(2). */
#define TENSORMEM_KV_EVENTS	(1u << 0)

/**
 * struct tensormem_kv_create - make a KV cache
 * @groups: in: address of the first struct tensormem_kv_group
 * @nr_groups: in: 1 to TENSORMEM_KV_MAX_GROUPS
 * @group_size: in: bytes from one group to the next
 * @max_tokens: in: of one sequence, at least 1
 * @max_sequences: in: open at a time, 1 to 65535
 * @block_tokens: in: tokens of a block, or 0 for the fewest (8 or more) that waste
 *                little; block_tokens * token_bytes has to be whole pages in every
 *                group but those of KV_STATE
 * @flags: in: TENSORMEM_KV_EVENTS
 * @limit: in: bytes of memory it may hold, rounded up to chunks; 0 for what
 *         max_sequences of max_tokens take. It is taken as it is needed, on the
 *         client's quota; the cache's own tables count in its memory cgroup only
 * @fd: out: the descriptor, close-on-exec
 * @pad: in: must be 0
 *
 * EINVAL also for a geometry that overflows, or a limit below one block of each group.
 */
struct tensormem_kv_create {
	__u64 groups;
	__u32 nr_groups;
	__u32 group_size;
	__u32 max_tokens;
	__u32 max_sequences;
	__u32 block_tokens;
	__u32 flags;
	__u64 limit;
	__s32 fd;
	__u32 pad;
};

/**
 * struct tensormem_kv_info - layout and counters of a KV cache
 * @groups: in: address for @nr_groups struct tensormem_kv_group, or 0
 * @nr_groups: in: room at @groups; out: groups of the cache
 * @group_size: in: bytes from one group to the next
 * @max_tokens: as created
 * @max_sequences: as created
 * @block_tokens: tokens of a block
 * @sequences: open now
 * @window_size: bytes of the window
 * @sequence_size: bytes of a sequence's place in it
 * @limit: most bytes it may hold
 * @held: bytes it holds, in whole chunks
 * @used: bytes in blocks: of sequences and cached
 * @cached: bytes in blocks that no sequence holds, kept for their hash
 * @packed: bytes that packed blocks take; they are in @used
 * @unpacked: bytes they take unpacked
 * @lookups: blocks asked for by hash
 * @hits: those found
 * @copies: blocks copied: at a fork, before a write, of a partial match
 * @evictions: cached blocks given up
 * @packs: @unpacks: blocks packed and unpacked
 * @events_lost: events that nobody read in time
 * @moved: pages moved so that chunks fell empty
 */
struct tensormem_kv_info {
	__u64 groups;
	__u32 nr_groups;
	__u32 group_size;
	__u32 max_tokens;
	__u32 max_sequences;
	__u32 block_tokens;
	__u32 sequences;
	__u64 window_size;
	__u64 sequence_size;
	__u64 limit;
	__u64 held;
	__u64 used;
	__u64 cached;
	__u64 packed;
	__u64 unpacked;
	__u64 lookups;
	__u64 hits;
	__u64 copies;
	__u64 evictions;
	__u64 packs;
	__u64 unpacks;
	__u64 events_lost;
	__u64 moved;
};

/**
 * struct tensormem_kv_open - begin a sequence
 * @sequence: out: its name, never 0
 * @flags: in: must be 0
 * @tenant: in: whose it is: blocks published by one tenant are found by no other.
 *          A number that others cannot guess, where tenants must not probe
 *          each other's cache
 * @offset: out: its place in the window
 */
struct tensormem_kv_open {
	__u32 sequence;
	__u32 flags;
	__u64 tenant;
	__u64 offset;
};

/**
 * struct tensormem_kv_close - end a sequence
 * @sequence: in: which
 * @flags: in: must be 0
 *
 * Published blocks stay cached until their memory is needed.
 */
struct tensormem_kv_close {
	__u32 sequence;
	__u32 flags;
};

/**
 * struct tensormem_kv_extend - make room for more tokens at the end of a sequence
 * @sequence: in: which
 * @tokens: in: how many, at least 1
 * @flags: in: must be 0
 * @length: out: tokens it has now
 *
 * New blocks are zero, and mapped at once where the caller has mapped the window.
 * A window group gives back the blocks that the new length has moved past. Blocks that
 * were full before the call count as written: they are mapped read-only from
 * time to time, which a later write notices only by a fault.
 *
 * ENOSPC at the cache's limit with nothing left to evict.
 */
struct tensormem_kv_extend {
	__u32 sequence;
	__u32 tokens;
	__u32 flags;
	__u32 length;
};

/**
 * struct tensormem_kv_truncate - drop tokens from the end of a sequence
 * @sequence: in: which
 * @length: in: tokens to keep; EINVAL for more than it has
 * @flags: in: must be 0
 * @pad: in: must be 0
 *
 * ENODATA when a window group no longer has what @length needs, or there is a state
 * and @length is neither 0 nor the present length.
 */
struct tensormem_kv_truncate {
	__u32 sequence;
	__u32 length;
	__u32 flags;
	__u32 pad;
};

/**
 * struct tensormem_kv_fork - begin a sequence with the tokens of another
 * @sequence: in: which
 * @at: in: how many of its tokens; EINVAL for more than it has
 * @flags: in: must be 0
 * @child: out: the new sequence, of the same tenant
 * @offset: out: its place in the window
 *
 * Full blocks are shared, the rest is copied. ENODATA as for truncate. What a thread
 * writes meanwhile, to the tokens that are not in full blocks, may be in the child
 * or not.
 */
struct tensormem_kv_fork {
	__u32 sequence;
	__u32 at;
	__u32 flags;
	__u32 child;
	__u64 offset;
};

/* The name of a block's contents and of all before it: chain it over the tokens. */
struct tensormem_kv_hash {
	__u8 bytes[16];
};

/* tensormem_kv_hashes::flags of KV_LOOKUP: say what matches and change nothing. */
#define TENSORMEM_KV_PEEK	(1u << 0)

/**
 * struct tensormem_kv_hashes - name a sequence's blocks, or begin it with those named
 * @sequence: in: which
 * @first: in: KV_PUBLISH: the first block, counted from the start; KV_LOOKUP: 0
 * @count: in: hashes, 1 to tensormem_info::max_batch
 * @flags: in: KV_LOOKUP: TENSORMEM_KV_PEEK; KV_PUBLISH: 0
 * @hashes: in: address of the first struct tensormem_kv_hash
 * @matched: out: KV_LOOKUP: blocks that the sequence begins with now
 * @pad: in: must be 0
 *
 * KV_PUBLISH: others of the same tenant may find the blocks from now on. They have to
 * be full (EINVAL) and written. A block has one hash: to publish it under another
 * is EINVAL, under the same again is nothing. A state is published where the
 * sequence ends with the last of the blocks, as a copy.
 *
 * KV_LOOKUP: the sequence must be empty (EINVAL). It gets the longest prefix of
 * @hashes that every group has: all blocks in a full group, those of its window in a
 * window group, the state at that very place in a state group. No match is no
 * error: @matched is 0.
 */
struct tensormem_kv_hashes {
	__u32 sequence;
	__u32 first;
	__u32 count;
	__u32 flags;
	__u64 hashes;
	__u32 matched;
	__u32 pad;
};

/**
 * struct tensormem_kv_adopt - put a published block into a sequence
 * @sequence: in: which
 * @block: in: where: a full block it has, which is replaced, or the one after its last
 *         full block when it ends there
 * @tokens: in: how many of the block's tokens, counted from its start; fewer than
 *          block_tokens are copied and only at the end; 0 means all
 * @flags: in: must be 0
 * @hash: in: the block's
 * @length: out: tokens of the sequence now
 * @pad: in: must be 0
 *
 * ENODATA when a group does not have the block.
 */
struct tensormem_kv_adopt {
	__u32 sequence;
	__u32 block;
	__u32 tokens;
	__u32 flags;
	struct tensormem_kv_hash hash;
	__u32 length;
	__u32 pad;
};

/**
 * struct tensormem_kv_query - describe a sequence
 * @sequence: in: which
 * @flags: in: must be 0
 * @length: out: tokens
 * @pad: in: must be 0
 * @offset: out: its place in the window
 * @held: out: bytes in its blocks, shared ones too
 * @shared: out: bytes of @held that another sequence holds as well
 * @packed: out: bytes that its packed blocks take; they are in @held
 * @unpacked: out: bytes they take unpacked
 */
struct tensormem_kv_query {
	__u32 sequence;
	__u32 flags;
	__u32 length;
	__u32 pad;
	__u64 offset;
	__u64 held;
	__u64 shared;
	__u64 packed;
	__u64 unpacked;
};

/* tensormem_kv_pack::flags: bring everything back instead, or fail with an errno. */
#define TENSORMEM_KV_UNPACK	(1u << 0)

/**
 * struct tensormem_kv_pack - compress the blocks that only this sequence holds
 * @sequence: in: which
 * @flags: in: TENSORMEM_KV_UNPACK
 * @blocks: out: blocks packed, or unpacked
 * @pad: in: must be 0
 * @before: out: bytes they took
 * @after: out: bytes they take now
 *
 * Lossless, and undone by a touch. The cache does so by itself with sequences that
 * are idle, when it is nearly full. Blocks that would not get smaller, or are larger
 * than a chunk, stay as they are. A call that fails half-way leaves what it has packed
 * or unpacked so.
 */
struct tensormem_kv_pack {
	__u32 sequence;
	__u32 flags;
	__u32 blocks;
	__u32 pad;
	__u64 before;
	__u64 after;
};

/**
 * struct tensormem_kv_reset - forget all published blocks
 * @flags: in: must be 0
 * @pad: in: must be 0
 *
 * EBUSY while any sequence holds a block.
 */
struct tensormem_kv_reset {
	__u32 flags;
	__u32 pad;
};

enum tensormem_kv_event_type {
	TENSORMEM_KV_STORED	= 1,	/* a block was published */
	TENSORMEM_KV_REMOVED	= 2,	/* it is not to be found any more */
	TENSORMEM_KV_CLEARED	= 3,	/* nothing is: a reset */
};

/**
 * struct tensormem_kv_event - what read(2) of a cache's descriptor returns, whole ones
 * @type: enum tensormem_kv_event_type
 * @block: KV_STORED: which block of its sequence, counted from the start
 * @group: which group's block; each group has its own
 * @pad: 0
 * @tenant: whose it is
 * @hash: its name
 * @parent: KV_STORED: the name of the block before it in its sequence; 0 for none
 *
 * read() gives EAGAIN when there is none and the descriptor does not block, EINVAL
 * for a buffer too small for one or a cache created without TENSORMEM_KV_EVENTS.
 * poll(2) says when there are some. The oldest are dropped when nobody reads, and
 * counted in tensormem_kv_info::events_lost.
 */
struct tensormem_kv_event {
	__u32 type;
	__u32 block;
	__u32 group;
	__u32 pad;
	__u64 tenant;
	struct tensormem_kv_hash hash;
	struct tensormem_kv_hash parent;
};

/*
 * Bytes for a slot's name with its final 0. Letters, digits, '.', '_', '-'; no '.' first. Not
 * "slots", "generations", "held", "evictable", "evicted", "reloads" or "reload_failed", which are files beside
 * the slots' folders in sysfs.
 */
#define TENSORMEM_MODEL_NAME	64

/* Bytes of a SHA-256. */
#define TENSORMEM_SHA256	32

/*
 * Flags of MODEL_OPEN.
 *
 * CREATE: make the slot unless it exists. EXCL: fail if it does. WRITE: the descriptor
 * is for staging, committing and so on, not for acquiring only; CREATE needs it.
 */
#define TENSORMEM_MODEL_CREATE	(1u << 0)
#define TENSORMEM_MODEL_EXCL	(1u << 1)
#define TENSORMEM_MODEL_WRITE	(1u << 2)

/**
 * struct tensormem_model_open - open a model slot
 * @name: in: its name, ended and filled up with zeros
 * @flags: in: TENSORMEM_MODEL_CREATE and the others
 * @mode: in: with CREATE its permissions, as for open(2), less the umask: 0666 at most
 * @fd: out: the descriptor, close-on-exec
 * @pad: in: must be 0
 *
 * ENOENT for no such slot, ENOSPC for more than 4096 of them. What the descriptor stages is on the client's bill.
 */
struct tensormem_model_open {
	__u8 name[TENSORMEM_MODEL_NAME];
	__u32 flags;
	__u32 mode;
	__s32 fd;
	__u32 pad;
};

/**
 * struct tensormem_model_slot - what a slot has
 * @active: out: number of the active generation, or 0
 * @previous: out: of the one that a rollback would make active, or 0
 * @staged: out: of the one that is being loaded or waits for a commit, or 0
 * @last: out: the number that was given out last
 * @generations: out: in the slot or still held by a reader
 * @pad: 0
 */
struct tensormem_model_slot {
	__u64 active;
	__u64 previous;
	__u64 staged;
	__u64 last;
	__u32 generations;
	__u32 pad;
};

/*
 * Flags of MODEL_STAGE.
 *
 * CACHED: leave the model in its file, see "A model slot". VERIFY: @sha256 says what the
 * file's is. KEEP: closing the descriptor does not abort what is loaded and not committed: the
 * slot keeps it for somebody else to commit or abort. EVICTABLE: chunks of it may go and come
 * back from the file, see "A model slot"; not with CACHED.
 */
#define TENSORMEM_MODEL_CACHED	(1u << 0)
#define TENSORMEM_MODEL_VERIFY	(1u << 1)
#define TENSORMEM_MODEL_KEEP	(1u << 2)
#define TENSORMEM_MODEL_EVICTABLE	(1u << 3)

/**
 * struct tensormem_model_stage - load a file as a new generation
 * @file: in: a descriptor of it, open for reading: a regular file or a block device.
 *        It may be closed at once
 * @flags: in: TENSORMEM_MODEL_CACHED and the others
 * @offset: in: where the model begins in the file; a multiple of page_size with CACHED
 * @size: in: its bytes; 0: all that follows. EINVAL when there is nothing
 * @sha256: in: with VERIFY; else zeros
 * @generation: out: its number
 * @fd: out: a descriptor of it, close-on-exec
 * @pad: in: must be 0
 *
 * Returns at once; a thread of the kernel loads. It reads ahead, takes memory a
 * chunk at a time, and stops when the last such descriptor is closed: that aborts. The
 * descriptor is that of a reader besides: until all is loaded read(2) gives EAGAIN and a touch
 * SIGBUS. A load that fails shows in
 * tensormem_model_info::error and harms nothing else.
 *
 * EBUSY while another generation is staged: commit or abort it. EBADF for a bad @file,
 * EACCES when it is not open for reading, EINVAL when it is neither a regular file nor a
 * block device, cannot be read by the kernel (files of /proc), or was opened with O_DIRECT.
 * ENOSPC when the chunk pool could not hold it even if it were empty. With CACHED or EVICTABLE also ETXTBSY, and EOPNOTSUPP for a file system that cannot
 * say when a file changes (neither one on a disk of this machine nor tmpfs; memfds; DAX), or a
 * block device: load it whole instead.
 */
struct tensormem_model_stage {
	__s32 file;
	__u32 flags;
	__u64 offset;
	__u64 size;
	__u8 sha256[TENSORMEM_SHA256];
	__u64 generation;
	__s32 fd;
	__u32 pad;
};

/**
 * struct tensormem_model_which - a generation of a slot
 * @generation: in: its number. MODEL_ROLLBACK: that of the previous one, or 0 for whichever
 *              it is; out: the one that is active now
 * @flags: in: must be 0
 * @pad: in: must be 0
 *
 * MODEL_COMMIT: of the staged one. The one that was active is kept as the previous one, and what
 * was that is let go. MODEL_ABORT: of the staged one; whoever loads it is told to stop.
 * MODEL_ROLLBACK: the active and the previous one change places.
 *
 * ENOENT when the slot does not have it so: it was committed, aborted or let go.
 * MODEL_COMMIT: EAGAIN while it is being loaded, ESTALE when that failed; abort it.
 */
struct tensormem_model_which {
	__u64 generation;
	__u32 flags;
	__u32 pad;
};

/**
 * struct tensormem_model_acquire - become a reader of a generation
 * @generation: in: its number: active, previous or staged (EACCES without WRITE); or 0
 *              for whichever is active; out: which it is
 * @flags: in: must be 0
 * @fd: out: a descriptor of it, close-on-exec
 *
 * ENOENT when the slot does not have it, or has nothing active yet.
 */
struct tensormem_model_acquire {
	__u64 generation;
	__u32 flags;
	__s32 fd;
};

enum tensormem_model_state {
	TENSORMEM_MODEL_LOADING	 = 1,
	TENSORMEM_MODEL_STAGED	 = 2,	/* loaded, to be committed or aborted */
	TENSORMEM_MODEL_ACTIVE	 = 3,
	TENSORMEM_MODEL_PREVIOUS = 4,	/* a rollback makes it active again */
	TENSORMEM_MODEL_RETIRED	 = 5,	/* not in the slot any more; its readers have it */
	TENSORMEM_MODEL_FAILED	 = 6,	/* see @error */
};

/**
 * struct tensormem_model_info - describe a generation
 * @generation: out: its number
 * @state: out: enum tensormem_model_state
 * @flags: out: those it was staged with
 * @size: out: bytes of the model
 * @loaded: out: bytes of it that are loaded; with VERIFY and CACHED, verified
 * @private_bytes: out: memory that only this generation holds
 * @shared_bytes: out: memory that it shares with others of the slot
 * @readers: out: descriptors of it, this one too
 * @error: out: in MODEL_FAILED why: an errno as above or of the file system; else 0
 * @mapping: out: enum tensormem_mapping of its whole chunks
 * @pad: 0
 * @evicted_bytes: out: those of an evictable one that are in its file only
 * @reloads: out: chunks of it that have come back
 */
struct tensormem_model_info {
	__u64 generation;
	__u32 state;
	__u32 flags;
	__u64 size;
	__u64 loaded;
	__u64 private_bytes;
	__u64 shared_bytes;
	__u32 readers;
	__u32 error;
	__u32 mapping;
	__u32 pad;
	__u64 evicted_bytes;
	__u64 reloads;
};

/**
 * struct tensormem_model_evict - make room now: chunks of an evictable generation go
 * @generation: in: its number, or 0 for whichever is active; out: which it is
 * @bytes: in: how many at least, least recently used first; 0: all that can; out: given back,
 *         which is less when there is no more, or when others hold it
 * @flags: in: must be 0
 * @pad: in: must be 0
 *
 * They come back when they are touched or read. ENOENT when the slot does not have it, EINVAL when it is not evictable.
 */
struct tensormem_model_evict {
	__u64 generation;
	__u64 bytes;
	__u32 flags;
	__u32 pad;
};

/**
 * struct tensormem_model_remove - take a slot away
 * @flags: in: must be 0
 * @pad: in: must be 0
 *
 * Its name is free at once. Readers keep what they have; a staged generation is aborted.
 * Calls on other descriptors of the slot fail with ENOENT.
 */
struct tensormem_model_remove {
	__u32 flags;
	__u32 pad;
};

/* Most granules of a movable block. */
#define TENSORMEM_RT_STEP	128

/* Most items of a batch of an RT client. */
#define TENSORMEM_RT_MAX_BATCH	64

/* Most sizes that a client may reserve. */
#define TENSORMEM_RT_MAX_CLASSES	16

/* Highest priority of a client. */
#define TENSORMEM_RT_MAX_PRIORITY	99

/**
 * struct tensormem_rt_open - make an arena of the RT pool, or join one
 * @size: in: bytes, rounded up to chunks; 0 to join
 * @arena: in: to join: a descriptor of one of its clients; else -1
 * @priority: in: who is served first when several wait, up to TENSORMEM_RT_MAX_PRIORITY;
 *            above 0 it takes CAP_SYS_NICE
 * @movable: in: movable blocks that may exist at a time, up to 65536; 0 to join
 * @flags: in: must be 0
 * @fd: out: the descriptor, close-on-exec
 * @pad: in: must be 0
 *
 * An arena is on the quota of the client that makes it, and counts as locked: RLIMIT_MEMLOCK, or
 * CAP_IPC_LOCK. Its memory belongs to the machine and not to a memory cgroup.
 *
 * ENOSPC when the pool has less than @size left (rt/size - rt/used in sysfs), or the arena has 255 clients; EINVAL also
 * for an @arena that is no RT descriptor; EBADF when it is no descriptor.
 */
struct tensormem_rt_open {
	__u64 size;
	__s32 arena;
	__u32 priority;
	__u32 movable;
	__u32 flags;
	__s32 fd;
	__u32 pad;
};

/**
 * struct tensormem_rt_info - an arena and this client of it
 * @size: out: bytes of the arena, and of the mapping
 * @granule: out: bytes; all offsets are multiples of it
 * @clients: out: of the arena
 * @free: out: bytes of the arena that are neither reserved nor allocated
 * @largest: out: bytes of a block that could be had now outside of reservations
 * @reserved: out: bytes laid aside for this client
 * @used: out: bytes that this client has allocated, also of what is reserved for it
 * @blocks: out: blocks it has
 * @priority: out: its priority
 * @waiting: out: calls of it that wait now
 * @pad: 0
 * @allocs: out: blocks that it ever got
 * @refused: out: ENOSPC and ENFILE
 * @misses: out: ETIMEDOUT
 * @waits: out: requests that had to wait
 * @moves: out: blocks of the arena that were moved
 */
struct tensormem_rt_info {
	__u64 size;
	__u32 granule;
	__u32 clients;
	__u64 free;
	__u64 largest;
	__u64 reserved;
	__u64 used;
	__u32 blocks;
	__u32 priority;
	__u32 waiting;
	__u32 pad;
	__u64 allocs;
	__u64 refused;
	__u64 misses;
	__u64 waits;
	__u64 moves;
};

/**
 * struct tensormem_rt_reserve - lay blocks aside for this client, or give them up
 * @size: in: bytes of each, up to the arena's; rounded up to granules
 * @count: in: how many; 0 gives up those of this size
 * @flags: in: must be 0
 *
 * A request is inside the reservation when a class of at least its size exists and the one with the
 * smallest blocks has one left.
 *
 * EPERM without CAP_SYS_NICE. ENOSPC when the arena has no room for it in one piece: reserve before anything is allocated.
 * EEXIST when this size is reserved already. EBUSY to give up what is in use, ENOENT what is not reserved.
 */
struct tensormem_rt_reserve {
	__u64 size;
	__u32 count;
	__u32 flags;
};

/*
 * Flags of RT_ALLOC.
 *
 * ABSOLUTE: @deadline_ns is a time of CLOCK_MONOTONIC (the machine's, also in a time namespace) and not from now on. RESERVED: inside the reservation or
 * ENOSPC at once. MOVABLE: the block, up to TENSORMEM_RT_STEP granules, may be moved while it is not
 * pinned; it never comes from a reservation, and is pinned at first.
 */
#define TENSORMEM_RT_ABSOLUTE	(1u << 0)
#define TENSORMEM_RT_RESERVED	(1u << 1)
#define TENSORMEM_RT_MOVABLE	(1u << 2)

/**
 * struct tensormem_rt_alloc - allocate a block
 * @size: in: bytes, from 1 to the arena's
 * @deadline_ns: in: nanoseconds until it has to be there; 0: at once or ENOSPC. Up to 2^63 - 1
 * @flags: in: TENSORMEM_RT_ABSOLUTE and the others
 * @handle: out: its name, never 0; ignored on input
 * @offset: out: where it lies in the arena; ignored on input
 *
 * A deadline that has passed (ABSOLUTE) is ETIMEDOUT unless the block can be had at once. EINTR when a signal comes
 * while it waits; nothing was allocated.
 */
struct tensormem_rt_alloc {
	__u64 size;
	__u64 deadline_ns;
	__u32 flags;
	__u32 handle;
	__u64 offset;
};

/**
 * struct tensormem_rt_block - free, pin or unpin a block
 * @handle: in: which
 * @flags: in: must be 0
 * @offset: out: RT_PIN: where it lies until it is unpinned as often as it was pinned
 *
 * RT_UNPIN: EINVAL for one that is not pinned; ENOENT for one that is not movable. RT_PIN of one that is not movable says where it is.
 */
struct tensormem_rt_block {
	__u32 handle;
	__u32 flags;
	__u64 offset;
};

/**
 * struct tensormem_rt_priority - change the priority of this client
 * @priority: in: for requests that begin to wait from now on; raising it takes CAP_SYS_NICE
 * @flags: in: must be 0
 */
struct tensormem_rt_priority {
	__u32 priority;
	__u32 flags;
};

/* What a relief does, in this order, until enough has been given to the system. */
enum tensormem_relief {
	TENSORMEM_RELIEF_CHUNKS		= 0,	/* free chunks, the reserve, what is kept for reuse */
	TENSORMEM_RELIEF_PREFIXES	= 1,	/* KV: what is free, then cached blocks, the oldest first */
	TENSORMEM_RELIEF_IDLE		= 2,	/* KV: sequences not used for a second are packed */
	TENSORMEM_RELIEF_WEIGHTS	= 3,	/* evictable weights, least recently used first */
};

#define TENSORMEM_RELIEF_STEPS	4

/**
 * struct tensormem_relieve - give memory back to the system
 * @bytes: in: how much, at least 1; whole chunks are given
 * @steps: in: which steps, a bit for each of enum tensormem_relief; 0: all
 * @flags: in: must be 0
 * @given: out: bytes that the system got from this call, not from others meanwhile
 * @step: out: of these, by enum tensormem_relief
 *
 * Less may be given than asked for: that is no error. Nothing is lost but what can be had
 * again: cached prefixes have to be computed, packed sequences and weights come back by a touch. The
 * RT pool gives nothing. Takes CAP_SYS_ADMIN. One relief at a time: others wait.
 */
struct tensormem_relieve {
	__u64 bytes;
	__u32 steps;
	__u32 flags;
	__u64 given;
	__u64 step[TENSORMEM_RELIEF_STEPS];
};

/*
 * How short of memory the system is: pressure/level in sysfs. LOW: below pressure/low, and then until
 * pressure/high. CRITICAL: below half of pressure/low, and then until that.
 */
enum tensormem_pressure_level {
	TENSORMEM_PRESSURE_NONE		= 0,
	TENSORMEM_PRESSURE_LOW		= 1,
	TENSORMEM_PRESSURE_CRITICAL	= 2,
};

/*
 * Events, by generic netlink: family TENSORMEM_NL_FAMILY, in the initial network namespace, because slots and clients are
 * the machine's. docs/netlink/tensormem.yaml describes it for programs.
 *
 * A group is joined by its name (NETLINK_ADD_MEMBERSHIP). "pressure" and "bandwidth" say who is to take less and are open to
 * everybody; "slots", "rt" and "kv" tell what others do, so joining them takes CAP_NET_ADMIN (EPERM).
 *
 * Each group numbers its events from 1 without a gap (SEQ), so what did not arrive can be told exactly: because the reader's socket was
 * full (ENOBUFS from recv(2)), or because more events came at once than the module keeps. These have numbers, too, and are
 * told: in MISSED of the group's next event, or by EVENT_MISSED, whose SEQ is that of the last of them.
 * CMD_GET says which number was given last: whatever has it or a lower one has arrived by then, or never will.
 *
 * What happens while nobody has joined a group has no number. Whoever joined is heard at once when setsockopt(2) returns; should that call
 * be held up for ten seconds within the kernel, then from the next CMD_GET on.
 */
#define TENSORMEM_NL_FAMILY	"tensormem"
#define TENSORMEM_NL_VERSION	1

/* In the order of the names of the multicast groups: slots, rt, kv, pressure, bandwidth. */
enum tensormem_nl_group {
	TENSORMEM_NL_GROUP_SLOTS	= 0,
	TENSORMEM_NL_GROUP_RT		= 1,
	TENSORMEM_NL_GROUP_KV		= 2,
	TENSORMEM_NL_GROUP_PRESSURE	= 3,
	TENSORMEM_NL_GROUP_BANDWIDTH	= 4,
};

/*
 * CMD_GET: with GROUP, the state of that group; as a dump, without, that of all. The answer has GROUP, SEQ, MISSED (ever, by
 * the module) and, of "pressure", LEVEL. ERANGE for no such group, EINVAL for any other attribute.
 *
 * Events have SEQ, TIME and, when some were lost before it, MISSED; and what stands here.
 */
enum tensormem_nl_command {
	TENSORMEM_NL_CMD_GET			= 1,

	TENSORMEM_NL_EVENT_MISSED		= 2,	/* GROUP; has no number of its own */

	TENSORMEM_NL_EVENT_SLOT_STAGED		= 3,	/* SLOT, GENERATION, SIZE */
	TENSORMEM_NL_EVENT_SLOT_READY		= 4,	/* SLOT, GENERATION, SIZE */
	TENSORMEM_NL_EVENT_SLOT_FAILED		= 5,	/* SLOT, GENERATION, SIZE, ERROR */
	TENSORMEM_NL_EVENT_SLOT_COMMITTED	= 6,	/* SLOT, GENERATION */
	TENSORMEM_NL_EVENT_SLOT_ROLLED_BACK	= 7,	/* SLOT, GENERATION: the active one now */
	TENSORMEM_NL_EVENT_SLOT_ABORTED		= 8,	/* SLOT, GENERATION */
	TENSORMEM_NL_EVENT_SLOT_RETIRED		= 9,	/* SLOT, GENERATION: its memory has been freed */
	TENSORMEM_NL_EVENT_SLOT_REMOVED		= 10,	/* SLOT */

	TENSORMEM_NL_EVENT_RT_MISS		= 11,	/* CLIENT (as in sysfs), PID, SIZE, HAD */

	TENSORMEM_NL_EVENT_KV_EVICTED		= 12,	/* CLIENT, CACHE, BLOCKS: cached ones, by one call */
	TENSORMEM_NL_EVENT_KV_PACKED		= 13,	/* CLIENT, CACHE, SEQUENCE, BLOCKS, BEFORE, AFTER */
	TENSORMEM_NL_EVENT_KV_UNPACKED		= 14,	/* likewise; not what single touches unpack */
	TENSORMEM_NL_EVENT_KV_FULL		= 15,	/* CLIENT, CACHE, ERROR: a call had no memory */

	TENSORMEM_NL_EVENT_PRESSURE		= 16,	/* LEVEL, AVAILABLE, GIVEN */

	TENSORMEM_NL_EVENT_BANDWIDTH		= 17,	/* CLIENT or CPU, USED, BUDGET, THROTTLED */
};

enum tensormem_nl_attribute {
	TENSORMEM_NL_A_GROUP		= 1,	/* u32: enum tensormem_nl_group */
	TENSORMEM_NL_A_PAD		= 2,
	TENSORMEM_NL_A_SEQ		= 3,	/* u64 */
	TENSORMEM_NL_A_MISSED		= 4,	/* u64 */
	TENSORMEM_NL_A_TIME		= 5,	/* u64: ns of CLOCK_MONOTONIC */
	TENSORMEM_NL_A_SLOT		= 6,	/* string */
	TENSORMEM_NL_A_GENERATION	= 7,	/* u64 */
	TENSORMEM_NL_A_SIZE		= 8,	/* u64: bytes */
	TENSORMEM_NL_A_ERROR		= 9,	/* u32: an errno as above */
	TENSORMEM_NL_A_CLIENT		= 10,	/* u32: its number; of a bandwidth event, 0 for a core's */
	TENSORMEM_NL_A_PID		= 11,	/* u32: the task that waited */
	TENSORMEM_NL_A_HAD		= 12,	/* u64: ns that it had */
	TENSORMEM_NL_A_CACHE		= 13,	/* u32: number of the KV cache */
	TENSORMEM_NL_A_SEQUENCE		= 14,	/* u32: as in TENSORMEM_IOC_KV_OPEN */
	TENSORMEM_NL_A_BLOCKS		= 15,	/* u64 */
	TENSORMEM_NL_A_BEFORE		= 16,	/* u64: bytes */
	TENSORMEM_NL_A_AFTER		= 17,	/* u64: bytes */
	TENSORMEM_NL_A_LEVEL		= 18,	/* u32: enum tensormem_pressure_level */
	TENSORMEM_NL_A_AVAILABLE	= 19,	/* u64: bytes that the system has left */
	TENSORMEM_NL_A_GIVEN		= 20,	/* u64: bytes that the module gave back for it */
	TENSORMEM_NL_A_CPU		= 21,	/* s32: whose traffic; -1 for a client's */
	TENSORMEM_NL_A_USED		= 22,	/* u64: bytes */
	TENSORMEM_NL_A_BUDGET		= 23,	/* u64: bytes */
	TENSORMEM_NL_A_THROTTLED	= 24,	/* u32: 1 when it is made to wait */
};

#define TENSORMEM_IOC_MAGIC		0xB7

#define TENSORMEM_IOC_INFO		_IOWR(TENSORMEM_IOC_MAGIC, 0x00, struct tensormem_info)
#define TENSORMEM_IOC_SET_QUOTA		_IOWR(TENSORMEM_IOC_MAGIC, 0x01, struct tensormem_quota)
#define TENSORMEM_IOC_SET_NUMA		_IOWR(TENSORMEM_IOC_MAGIC, 0x02, struct tensormem_set_numa)
#define TENSORMEM_IOC_RELIEVE		_IOWR(TENSORMEM_IOC_MAGIC, 0x03, struct tensormem_relieve)
#define TENSORMEM_IOC_SET_BUDGET	_IOWR(TENSORMEM_IOC_MAGIC, 0x04, struct tensormem_budget)
#define TENSORMEM_IOC_BANDWIDTH		_IOWR(TENSORMEM_IOC_MAGIC, 0x05, struct tensormem_bandwidth)
#define TENSORMEM_IOC_ALLOC		_IOWR(TENSORMEM_IOC_MAGIC, 0x10, struct tensormem_alloc)
#define TENSORMEM_IOC_FREE		_IOWR(TENSORMEM_IOC_MAGIC, 0x11, struct tensormem_free)
#define TENSORMEM_IOC_QUERY		_IOWR(TENSORMEM_IOC_MAGIC, 0x12, struct tensormem_query)
#define TENSORMEM_IOC_EXPORT		_IOWR(TENSORMEM_IOC_MAGIC, 0x13, struct tensormem_export)
/* Each takes a struct tensormem_batch over items of the single call's struct. */
#define TENSORMEM_IOC_ALLOC_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x20, struct tensormem_batch)
#define TENSORMEM_IOC_FREE_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x21, struct tensormem_batch)
#define TENSORMEM_IOC_QUERY_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x22, struct tensormem_batch)
#define TENSORMEM_IOC_KV_CREATE		_IOWR(TENSORMEM_IOC_MAGIC, 0x30, struct tensormem_kv_create)
#define TENSORMEM_IOC_MODEL_OPEN	_IOWR(TENSORMEM_IOC_MAGIC, 0x31, struct tensormem_model_open)
#define TENSORMEM_IOC_RT_OPEN		_IOWR(TENSORMEM_IOC_MAGIC, 0x32, struct tensormem_rt_open)

/* Of a KV cache's descriptor. */
#define TENSORMEM_IOC_KV_INFO		_IOWR(TENSORMEM_IOC_MAGIC, 0x40, struct tensormem_kv_info)
#define TENSORMEM_IOC_KV_OPEN		_IOWR(TENSORMEM_IOC_MAGIC, 0x41, struct tensormem_kv_open)
#define TENSORMEM_IOC_KV_CLOSE		_IOWR(TENSORMEM_IOC_MAGIC, 0x42, struct tensormem_kv_close)
#define TENSORMEM_IOC_KV_EXTEND		_IOWR(TENSORMEM_IOC_MAGIC, 0x43, struct tensormem_kv_extend)
/* A struct tensormem_batch of struct tensormem_kv_extend, each of another sequence. */
#define TENSORMEM_IOC_KV_EXTEND_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x44, struct tensormem_batch)
#define TENSORMEM_IOC_KV_TRUNCATE	_IOWR(TENSORMEM_IOC_MAGIC, 0x45, struct tensormem_kv_truncate)
#define TENSORMEM_IOC_KV_FORK		_IOWR(TENSORMEM_IOC_MAGIC, 0x46, struct tensormem_kv_fork)
#define TENSORMEM_IOC_KV_PUBLISH	_IOWR(TENSORMEM_IOC_MAGIC, 0x47, struct tensormem_kv_hashes)
#define TENSORMEM_IOC_KV_LOOKUP		_IOWR(TENSORMEM_IOC_MAGIC, 0x48, struct tensormem_kv_hashes)
#define TENSORMEM_IOC_KV_ADOPT		_IOWR(TENSORMEM_IOC_MAGIC, 0x49, struct tensormem_kv_adopt)
#define TENSORMEM_IOC_KV_QUERY		_IOWR(TENSORMEM_IOC_MAGIC, 0x4a, struct tensormem_kv_query)
#define TENSORMEM_IOC_KV_PACK		_IOWR(TENSORMEM_IOC_MAGIC, 0x4b, struct tensormem_kv_pack)
#define TENSORMEM_IOC_KV_RESET		_IOWR(TENSORMEM_IOC_MAGIC, 0x4c, struct tensormem_kv_reset)

/* Of a slot's descriptor. */
#define TENSORMEM_IOC_MODEL_SLOT	_IOWR(TENSORMEM_IOC_MAGIC, 0x50, struct tensormem_model_slot)
#define TENSORMEM_IOC_MODEL_STAGE	_IOWR(TENSORMEM_IOC_MAGIC, 0x51, struct tensormem_model_stage)
#define TENSORMEM_IOC_MODEL_COMMIT	_IOWR(TENSORMEM_IOC_MAGIC, 0x52, struct tensormem_model_which)
#define TENSORMEM_IOC_MODEL_ABORT	_IOWR(TENSORMEM_IOC_MAGIC, 0x53, struct tensormem_model_which)
#define TENSORMEM_IOC_MODEL_ROLLBACK	_IOWR(TENSORMEM_IOC_MAGIC, 0x54, struct tensormem_model_which)
#define TENSORMEM_IOC_MODEL_ACQUIRE	_IOWR(TENSORMEM_IOC_MAGIC, 0x55, struct tensormem_model_acquire)
#define TENSORMEM_IOC_MODEL_REMOVE	_IOWR(TENSORMEM_IOC_MAGIC, 0x56, struct tensormem_model_remove)
#define TENSORMEM_IOC_MODEL_EVICT	_IOWR(TENSORMEM_IOC_MAGIC, 0x57, struct tensormem_model_evict)

/* Of a generation's descriptor. */
#define TENSORMEM_IOC_MODEL_INFO	_IOWR(TENSORMEM_IOC_MAGIC, 0x60, struct tensormem_model_info)

/* Of an RT client's descriptor. */
#define TENSORMEM_IOC_RT_INFO		_IOWR(TENSORMEM_IOC_MAGIC, 0x70, struct tensormem_rt_info)
#define TENSORMEM_IOC_RT_RESERVE	_IOWR(TENSORMEM_IOC_MAGIC, 0x71, struct tensormem_rt_reserve)
#define TENSORMEM_IOC_RT_ALLOC		_IOWR(TENSORMEM_IOC_MAGIC, 0x72, struct tensormem_rt_alloc)
#define TENSORMEM_IOC_RT_FREE		_IOWR(TENSORMEM_IOC_MAGIC, 0x73, struct tensormem_rt_block)
#define TENSORMEM_IOC_RT_PIN		_IOWR(TENSORMEM_IOC_MAGIC, 0x74, struct tensormem_rt_block)
#define TENSORMEM_IOC_RT_UNPIN		_IOWR(TENSORMEM_IOC_MAGIC, 0x75, struct tensormem_rt_block)
#define TENSORMEM_IOC_RT_PRIORITY	_IOWR(TENSORMEM_IOC_MAGIC, 0x76, struct tensormem_rt_priority)
/* Each takes a struct tensormem_batch of up to TENSORMEM_RT_MAX_BATCH items of the single call's struct. */
#define TENSORMEM_IOC_RT_ALLOC_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x77, struct tensormem_batch)
#define TENSORMEM_IOC_RT_FREE_BATCH	_IOWR(TENSORMEM_IOC_MAGIC, 0x78, struct tensormem_batch)

#endif /* _UAPI_LINUX_TENSORMEM_H */
