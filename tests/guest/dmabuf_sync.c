// SPDX-License-Identifier: GPL-2.0-only
/*
 * A dma-buf as C programs use one: mmap() and DMA_BUF_IOCTL_SYNC, in two processes, past the end
 * of the tensor, its client and the process that exported it.
 *
 *	dmabuf_sync CHUNKS
 *
 * Prints how many bytes were compared, by whom.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/dma-buf.h>
#include <linux/tensormem.h>

static size_t size;

static int sync_buf(int fd, uint64_t flags)
{
	struct dma_buf_sync sync = { .flags = flags };

	while (ioctl(fd, DMA_BUF_IOCTL_SYNC, &sync))
		if (errno != EINTR && errno != EAGAIN)
			return errno;
	return 0;
}

static void begin(int fd, uint64_t access)
{
	if (sync_buf(fd, DMA_BUF_SYNC_START | access))
		err(1, "begin");
}

static void end(int fd, uint64_t access)
{
	if (sync_buf(fd, DMA_BUF_SYNC_END | access))
		err(1, "end");
}

static uint32_t *map(int fd, int prot)
{
	void *at = mmap(NULL, size, prot, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED)
		err(1, "mmap");
	return at;
}

static void fill(uint32_t *at, uint32_t seed)
{
	for (size_t i = 0; i < size / sizeof(*at); i++)
		at[i] = seed + i;
}

static void compare(const uint32_t *at, uint32_t seed, const char *who)
{
	for (size_t i = 0; i < size / sizeof(*at); i++)
		if (at[i] != seed + i)
			errx(1, "%s: word %zu is %x", who, i, at[i]);
	printf("%s %zu\n", who, size);
	fflush(stdout);
}

static void send_fd(int socket, int fd)
{
	char control[CMSG_SPACE(sizeof(fd))] = { 0 }, byte = 0;
	struct iovec data = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	if (sendmsg(socket, &message, 0) != 1)
		err(1, "sendmsg");
}

static int receive_fd(int socket)
{
	char control[CMSG_SPACE(sizeof(int))], byte;
	struct iovec data = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	int fd;

	if (recvmsg(socket, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
		err(1, "recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	return fd;
}

/* Exports, writes, sends, and ends without a word. */
static void exporter(int socket)
{
	struct tensormem_alloc alloc = {
		.size = size, .kind = TENSORMEM_KIND_WEIGHTS,
	};
	struct tensormem_export export = { 0 };
	int client = open(TENSORMEM_DEVICE, O_RDWR);
	uint32_t *window, *view;

	if (client < 0 || ioctl(client, TENSORMEM_IOC_ALLOC, &alloc))
		err(1, "alloc");
	export.handle = alloc.handle;
	if (ioctl(client, TENSORMEM_IOC_EXPORT, &export))
		err(1, "export");
	if (export.size != size)
		errx(1, "%zu bytes became %llu", size, export.size);
	view = map(export.fd, PROT_READ | PROT_WRITE);
	begin(export.fd, DMA_BUF_SYNC_WRITE);
	fill(view, 1);
	end(export.fd, DMA_BUF_SYNC_WRITE);
	window = mmap(NULL, size, PROT_READ, MAP_SHARED, client, alloc.offset);
	if (window == MAP_FAILED)
		err(1, "mmap of the window");
	compare(window, 1, "window");
	send_fd(socket, export.fd);
	abort();
}

int main(int argc, char **argv)
{
	int sockets[2], status, fd;
	uint32_t *view;

	if (argc != 2)
		errx(2, "usage: dmabuf_sync CHUNKS");
	size = strtoul(argv[1], NULL, 0) << 21;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets))
		err(1, "socketpair");
	if (!fork())
		exporter(sockets[0]);
	/* So that its end is one of what comes from it. */
	close(sockets[0]);
	fd = receive_fd(sockets[1]);
	if (wait(&status) < 0 || !WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
		errx(1, "the exporter ended with %x", status);

	view = map(fd, PROT_READ | PROT_WRITE);
	begin(fd, DMA_BUF_SYNC_READ);
	compare(view, 1, "importer");
	end(fd, DMA_BUF_SYNC_READ);
	begin(fd, DMA_BUF_SYNC_RW);
	fill(view, 7);
	end(fd, DMA_BUF_SYNC_RW);
	if (lseek(fd, 0, SEEK_END) != (off_t)size)
		err(1, "lseek");
	if (sync_buf(fd, 0) != EINVAL || sync_buf(fd, 8 | DMA_BUF_SYNC_RW) != EINVAL)
		errx(1, "unknown flags were taken");
	close(fd);
	if (sync_buf(fd, DMA_BUF_SYNC_RW) != EBADF)
		errx(1, "a closed descriptor was taken");
	compare(view, 7, "mapping");
	return 0;
}
