/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Play a prepared schedule of frames into two stream sockets and count the frames that a third one
 * returns. It is fast enough to keep QEMU's colo-compare or filter chain busy all the time. A thread
 * of its own reads the output at once, because QEMU drops what it cannot write.
 *
 * feed FILE PVM SVM OUT LIMIT VNET   (descriptors of connected sockets; VNET: 1 or 0)
 *
 * FILE: records of one byte (0: to PVM, 1: to SVM), the length of what follows (32 bits, network
 * order), and bytes that are written unchanged (QEMU's own framing included). At most LIMIT frames
 * of the PVM are in flight at a time; VNET: QEMU's framing has a second length. Prints the number of
 * frames that came out and went in, and the seconds from the first byte in to the last frame out.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_S 3.0
#define BUFFER	   (4 << 20)

static int out_fd, framing;
static atomic_long came;
static double last;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *reader(void *unused)
{
	uint8_t *buf = malloc(BUFFER);
	size_t have = 0;
	ssize_t n;

	(void)unused;
	while (buf && (n = read(out_fd, buf + have, BUFFER - have)) > 0) {
		size_t at = 0;
		long frames = 0;

		have += n;
		while (have - at >= 4) {
			uint32_t len;

			memcpy(&len, buf + at, 4);
			len = ntohl(len) + framing;
			if (have - at < len)
				break;
			at += len;
			frames++;
		}
		memmove(buf, buf + at, have - at);
		have -= at;
		if (frames) {
			last = now();
			came += frames;
		}
	}
	return 0;
}

/* Wait until fewer than `limit` of `sent` frames are in flight; 0: nothing came out for long. */
static int wait_for(long sent, long limit)
{
	double end = now() + PATIENCE_S;
	long seen = came;

	while (sent - came >= limit) {
		if (came != seen) {
			seen = came;
			end = now() + PATIENCE_S;
		} else if (now() > end) {
			return 0;
		}
		usleep(20);
	}
	return 1;
}

int main(int argc, char **argv)
{
	int fds[2], file;
	struct stat st;
	pthread_t t;
	uint8_t *d;
	long sent = 0, limit;
	double began;

	if (argc != 7)
		return 2;
	file = open(argv[1], O_RDONLY);
	if (file < 0 || fstat(file, &st))
		fail(argv[1]);
	d = mmap(0, st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
	if (d == MAP_FAILED)
		fail("mmap");
	fds[0] = atoi(argv[2]);
	fds[1] = atoi(argv[3]);
	out_fd = atoi(argv[4]);
	limit = atol(argv[5]);
	framing = atoi(argv[6]) ? 8 : 4;
	if (pthread_create(&t, 0, reader, 0))
		fail("thread");
	began = last = now();
	for (off_t at = 0; at < st.st_size;) {
		int side = d[at];
		uint32_t len;

		memcpy(&len, d + at + 1, 4);
		len = ntohl(len);
		at += 5;
		for (uint32_t done = 0; done < len;) {
			ssize_t n = write(fds[side], d + at + done, len - done);

			if (n < 0 && errno != EINTR)
				fail("write");
			if (n > 0)
				done += n;
		}
		at += len;
		if (side == 0 && !wait_for(++sent, limit))
			break;
	}
	wait_for(sent, 1);
	printf("%ld %ld %.6f\n", (long)came, sent, last - began);
	return 0;
}
