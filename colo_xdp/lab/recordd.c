// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * recordd DIRECTORY PORT: for each line "N" that a client sends, write record N and a block that
 * depends on it, make both durable, then answer "ok N". What was answered must be on the disk that
 * survives. Record N is 16 bytes at 16 * N of DIRECTORY/log; the block is one of BLOCKS in
 * DIRECTORY/data, and each of its words depends on N (tests check them on the host's side).
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BLOCKS 512
#define RECORD 16

static uint32_t mix(uint32_t x)
{
	x ^= x >> 16;
	x *= 0x7feb352d;
	x ^= x >> 15;
	x *= 0x846ca68b;
	return x ^ x >> 16;
}

static int keep(int log, int data, uint32_t n)
{
	uint32_t block[1024];
	char record[RECORD + 1];

	for (uint32_t i = 0; i < 1024; i++)
		block[i] = i ? mix(n * 1024u + i) : n;
	snprintf(record, sizeof(record), "%015u\n", n);
	return pwrite(data, block, sizeof(block), (off_t)(mix(n) % BLOCKS) * 4096) == 4096 &&
	       fsync(data) == 0 && pwrite(log, record, RECORD, (off_t)n * RECORD) == RECORD &&
	       fsync(log) == 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 a = {.sin6_family = AF_INET6};
	int s, log, data, on = 1;

	if (argc != 3 || chdir(argv[1]))
		return 2;
	signal(SIGCHLD, SIG_IGN);
	log = open("log", O_RDWR | O_CREAT, 0644);
	data = open("data", O_RDWR | O_CREAT, 0644);
	s = socket(AF_INET6, SOCK_STREAM, 0);
	a.sin6_port = htons(atoi(argv[2]));
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (log < 0 || data < 0 || bind(s, (void *)&a, sizeof(a)) || listen(s, 8)) {
		perror("recordd");
		return 1;
	}
	for (;;) {
		int c = accept(s, NULL, NULL);

		if (c < 0)
			continue;
		if (fork() == 0) {
			FILE *f = fdopen(c, "r");
			char line[64], answer[64];

			setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
			while (fgets(line, sizeof(line), f)) {
				uint32_t n = strtoul(line, NULL, 10);
				int len = snprintf(answer, sizeof(answer), "%s %u\n",
						   keep(log, data, n) ? "ok" : "failed", n);

				if (write(c, answer, len) != len)
					break;
			}
			_exit(0);
		}
		close(c);
	}
}
