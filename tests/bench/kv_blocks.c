// SPDX-License-Identifier: GPL-2.0-only
/*
 * A sequence of TinyLlama's KV that grows and forks: through the device, and as a
 * program would do it without one.
 *
 * The program has its blocks in a memfd, allocated before, and a list of free ones;
 * its page table is made of mappings, 44 for each block, because each plane has to
 * be one array. What it does not do: zero a block, keep sequences from writing to what
 * they share (it write-protects, and a write would have to be caught by a SIGSEGV
 * handler), or give blocks back. Its variants are measured and the one that is fastest in
 * total is the peer, for each row by itself.
 *
 * The device is to have as many zeroed chunks ready as a sequence takes, and to zero no
 * more meanwhile, just as the program has its blocks.
 *
 * Prints "NAME OURS PEER" in nanoseconds, which count instructions under icount, and
 * lines that start with # for the reader.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/tensormem.h>

#define LAYERS		22
#define PLANES		(2 * LAYERS)
#define TOKEN_BYTES	512ul	/* 4 heads of 64 numbers of 2 bytes */
#define TOKENS		4096ul
#define PLANE_BYTES	(TOKENS * TOKEN_BYTES)
#define ALL_BYTES	(PLANES * PLANE_BYTES)

static unsigned long page;
static unsigned long block_tokens;
static unsigned long blocks;

static unsigned long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Numbers that tell one page from every other. */
static void fill(char *at, unsigned long plane, unsigned long block)
{
	*(uint64_t *)at = plane << 32 | block | 1ull << 63;
}

static void check(const char *at, unsigned long plane, unsigned long block)
{
	if (*(uint64_t *)at != (plane << 32 | block | 1ull << 63))
		errx(1, "plane %lu, block %lu: not what was written", plane, block);
}

/* What a pass of attention touches: every page of every plane. */
static unsigned long long read_all(const char *base, unsigned long stride)
{
	unsigned long long start = now();

	for (unsigned long plane = 0; plane < PLANES; plane++)
		for (unsigned long b = 0; b < blocks; b++)
			check(base + plane * stride + b * page, plane, b);
	return now() - start;
}

/*
 * --- without the device
 */

/* Where a block's pages lie in the memfd, and who makes their entries. */
struct variant {
	const char *name;
	bool by_plane;	/* a plane's pages side by side, else a block's */
	bool populate;	/* the mapping call does, else the first touch */
	bool reserved;	/* addresses are, else nobody else takes them by luck */
};

static const struct variant variants[] = {
	{ "block by block, populated, reserved", false, true, true },
	{ "block by block, touched, reserved", false, false, true },
	{ "block by block, populated", false, true, false },
	{ "block by block, touched", false, false, false },
	{ "plane by plane, populated, reserved", true, true, true },
	{ "plane by plane, touched, reserved", true, false, true },
	{ "plane by plane, populated", true, true, false },
	{ "plane by plane, touched", true, false, false },
};

#define VARIANTS	(sizeof(variants) / sizeof(*variants))

struct peer {
	const struct variant *variant;
	int fd;
	unsigned long *free_blocks;
	unsigned long nr_free;
	unsigned long *table;	/* of the sequence: its blocks in order */
	char *base;
	char *child;
};

static off_t peer_offset(const struct peer *p, unsigned long plane,
			 unsigned long block)
{
	return page * (p->variant->by_plane ? plane * blocks + block :
					      block * PLANES + plane);
}

static char *peer_addresses(const struct variant *variant, unsigned long bytes)
{
	char *at = mmap(NULL, bytes, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		err(1, "address space");
	if (!variant->reserved)
		munmap(at, bytes);
	return at;
}

static void peer_begin(struct peer *p, const struct variant *variant, int fd)
{
	*p = (struct peer){ .variant = variant, .fd = fd };
	p->free_blocks = calloc(blocks, sizeof(*p->free_blocks));
	p->table = calloc(blocks, sizeof(*p->table));
	if (!p->free_blocks || !p->table)
		err(1, "tables");
	/* In the order that suits it best: neighbours in turn. */
	while (p->nr_free < blocks) {
		p->free_blocks[p->nr_free] = blocks - 1 - p->nr_free;
		p->nr_free++;
	}
	p->base = peer_addresses(variant, 2 * ALL_BYTES);
	p->child = p->base + ALL_BYTES;
}

static void peer_end(struct peer *p)
{
	munmap(p->base, 2 * ALL_BYTES);
	free(p->free_blocks);
	free(p->table);
}

static void peer_map(const struct peer *p, char *base, unsigned long plane,
		     unsigned long index, unsigned long nr, int prot, int flags)
{
	char *at = base + plane * PLANE_BYTES + index * page;

	if (mmap(at, nr * page, prot, MAP_SHARED | MAP_FIXED | flags, p->fd,
		 peer_offset(p, plane, p->table[index])) != at)
		err(1, "mapping a block");
}

static void peer_extend(struct peer *p, unsigned long index)
{
	p->table[index] = p->free_blocks[--p->nr_free];
	for (unsigned long plane = 0; plane < PLANES; plane++)
		peer_map(p, p->base, plane, index, 1, PROT_READ | PROT_WRITE,
			 p->variant->populate ? MAP_POPULATE : 0);
}

/*
 * All of the sequence again, in as few calls as the memfd's order allows; then no
 * write goes to either any more.
 */
static void peer_fork(struct peer *p)
{
	unsigned long run;

	for (unsigned long plane = 0; plane < PLANES; plane++)
		for (unsigned long i = 0; i < blocks; i += run) {
			off_t next = peer_offset(p, plane, p->table[i]) + page;

			for (run = 1; i + run < blocks; run++, next += page)
				if (peer_offset(p, plane, p->table[i + run]) !=
				    next)
					break;
			peer_map(p, p->child, plane, i, run, PROT_READ, 0);
		}
	if (mprotect(p->base, ALL_BYTES, PROT_READ))
		err(1, "write protection");
}

static void write_block(char *base, unsigned long stride, unsigned long index)
{
	for (unsigned long plane = 0; plane < PLANES; plane++)
		fill(base + plane * stride + index * page, plane, index);
}

struct times {
	unsigned long long extend;	/* one block, mapped */
	unsigned long long write;	/* and its first write */
	unsigned long long fork;
	unsigned long long again;	/* a second one: nothing is left to seal */
	unsigned long long read;	/* the child, for the first time */
};

static void peer_run(const struct variant *variant, int fd, struct times *times)
{
	struct peer p;

	*times = (struct times){ 0 };
	peer_begin(&p, variant, fd);
	for (unsigned long i = 0; i < blocks; i++) {
		unsigned long long start = now(), middle;

		peer_extend(&p, i);
		middle = now();
		write_block(p.base, PLANE_BYTES, i);
		times->write += now() - middle;
		times->extend += middle - start;
	}
	times->extend /= blocks;
	times->write /= blocks;
	times->fork = now();
	peer_fork(&p);
	times->fork = now() - times->fork;
	times->read = read_all(p.child, PLANE_BYTES);
	peer_end(&p);
}

/* Fresh memory for a child, and everything in it: the fastest of some ways. */
static unsigned long long copy_run(const char *from, unsigned long stride)
{
	static const struct {
		const char *name;
		int flags;
		int advice;
	} ways[] = {
		{ "touched", 0, MADV_NORMAL },
		{ "populated", MAP_POPULATE, MADV_NORMAL },
		{ "huge pages", 0, MADV_HUGEPAGE },
	};
	unsigned long long best = ~0ull;

	for (unsigned long i = 0; i < sizeof(ways) / sizeof(*ways); i++) {
		unsigned long long start = now();
		char *to = mmap(NULL, ALL_BYTES, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | ways[i].flags,
				-1, 0);

		if (to == MAP_FAILED)
			err(1, "memory for a copy");
		/* A kernel without huge pages has none to give. */
		if (ways[i].advice != MADV_NORMAL)
			madvise(to, ALL_BYTES, ways[i].advice);
		for (unsigned long plane = 0; plane < PLANES; plane++)
			memcpy(to + plane * PLANE_BYTES, from + plane * stride,
			       PLANE_BYTES);
		start = now() - start;
		printf("# copy, %s: %llu\n", ways[i].name, start);
		if (start < best)
			best = start;
		munmap(to, ALL_BYTES);
	}
	return best;
}

/* The best of all variants, field by field; extend with the write that completes it. */
static void peer_best(struct times *best)
{
	int fd = memfd_create("blocks", MFD_CLOEXEC);
	struct times t;

	if (fd < 0 || ftruncate(fd, ALL_BYTES) ||
	    posix_fallocate(fd, 0, ALL_BYTES))
		err(1, "memfd");
	for (unsigned long i = 0; i < VARIANTS; i++) {
		peer_run(&variants[i], fd, &t);
		printf("# peer, %s: extend %llu, first write %llu, fork %llu, first read of the child %llu\n",
		       variants[i].name, t.extend, t.write, t.fork, t.read);
		if (!i || t.extend + t.write < best->extend + best->write) {
			best->extend = t.extend;
			best->write = t.write;
		}
		if (!i || t.fork < best->fork)
			best->fork = t.fork;
		if (!i || t.read < best->read)
			best->read = t.read;
	}
	close(fd);
}

/*
 * --- with the device
 */

static int cache(void)
{
	struct tensormem_kv_group group = {
		.rule = TENSORMEM_KV_FULL,
		.planes = PLANES,
		.token_bytes = TOKEN_BYTES,
		.element = 2,
	};
	struct tensormem_kv_create create = {
		.groups = (uintptr_t)&group,
		.nr_groups = 1,
		.group_size = sizeof(group),
		.max_tokens = TOKENS,
		.max_sequences = 4,
		.block_tokens = block_tokens,
	};
	int fd = open(TENSORMEM_DEVICE, O_RDWR);

	if (fd < 0)
		err(1, "%s", TENSORMEM_DEVICE);
	if (ioctl(fd, TENSORMEM_IOC_KV_CREATE, &create))
		err(1, "a KV cache");
	close(fd);
	return create.fd;
}

static void ours_run(int fd, struct times *times, unsigned long long *copy)
{
	struct tensormem_kv_group group = { 0 };
	struct tensormem_kv_info info = {
		.groups = (uintptr_t)&group,
		.nr_groups = 1,
		.group_size = sizeof(group),
	};
	struct tensormem_kv_open open = { 0 };
	struct tensormem_kv_fork fork = { 0 };
	char *window, *base;

	if (ioctl(fd, TENSORMEM_IOC_KV_INFO, &info))
		err(1, "info");
	window = mmap(NULL, info.window_size, PROT_READ | PROT_WRITE,
		      MAP_SHARED, fd, 0);
	if (window == MAP_FAILED)
		err(1, "mmap of the window");
	if (ioctl(fd, TENSORMEM_IOC_KV_OPEN, &open))
		err(1, "a sequence");
	base = window + open.offset + group.offset;
	*times = (struct times){ 0 };
	for (unsigned long i = 0; i < blocks; i++) {
		struct tensormem_kv_extend extend = {
			.sequence = open.sequence,
			.tokens = block_tokens,
		};
		unsigned long long start = now(), middle;

		if (ioctl(fd, TENSORMEM_IOC_KV_EXTEND, &extend))
			err(1, "extend");
		middle = now();
		write_block(base, group.stride, i);
		times->write += now() - middle;
		times->extend += middle - start;
	}
	times->extend /= blocks;
	times->write /= blocks;
	fork.sequence = open.sequence;
	fork.at = TOKENS;
	times->fork = now();
	if (ioctl(fd, TENSORMEM_IOC_KV_FORK, &fork))
		err(1, "fork");
	times->fork = now() - times->fork;
	times->read = read_all(window + fork.offset + group.offset,
			       group.stride);
	times->again = now();
	if (ioctl(fd, TENSORMEM_IOC_KV_FORK, &fork))
		err(1, "another fork");
	times->again = now() - times->again;
	*copy = copy_run(base, group.stride);
	munmap(window, info.window_size);
	close(fd);
}

int main(void)
{
	struct times ours, peer;
	unsigned long long copy;

	page = sysconf(_SC_PAGESIZE);
	block_tokens = page / TOKEN_BYTES;
	blocks = TOKENS / block_tokens;
	setvbuf(stdout, NULL, _IOLBF, 0);
	peer_best(&peer);
	ours_run(cache(), &ours, &copy);
	printf("# ours: extend %llu, first write %llu, fork %llu, another %llu, first read of the child %llu\n",
	       ours.extend, ours.write, ours.fork, ours.again, ours.read);
	printf("extend %llu %llu\n", ours.extend + ours.write,
	       peer.extend + peer.write);
	printf("fork-remap %llu %llu\n", ours.fork, peer.fork);
	printf("fork-copy %llu %llu\n", ours.fork, copy);
	printf("# fork and first read of the child: ours %llu, peer %llu\n",
	       ours.fork + ours.read, peer.fork + peer.read);
	return 0;
}
