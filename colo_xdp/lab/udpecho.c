/* SPDX-License-Identifier: GPL-2.0-or-later */
/* UDP echo on port 7, IPv4 and IPv6, for the lab guest, whose busybox has none. */
#include <netinet/in.h>
#include <sys/socket.h>

int main(void)
{
	struct sockaddr_in6 me = { .sin6_family = AF_INET6, .sin6_port = htons(7) };
	struct sockaddr_storage from;
	static char buf[65536];
	int s = socket(AF_INET6, SOCK_DGRAM, 0);

	if (s < 0 || bind(s, (struct sockaddr *)&me, sizeof(me)))
		return 1;
	for (;;) {
		socklen_t n = sizeof(from);
		ssize_t r = recvfrom(s, buf, sizeof(buf), 0, (struct sockaddr *)&from, &n);

		if (r >= 0)
			sendto(s, buf, r, 0, (struct sockaddr *)&from, n);
	}
}
