#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Starts every service of a lab guest that the demo and the tests use: in the small guest from its
# initramfs, in the Debian guest as a unit of systemd.
echo 0 > /proc/sys/net/ipv6/conf/all/accept_dad
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad                # created before the default was set
ip link set lo up
ip link set eth0 up
ip addr add 10.9.0.2/24 dev eth0
ip addr add fd09::2/64 dev eth0
if [ -d /sys/class/net/eth1 ]; then                             # the second NIC, on another network
	echo 0 > /proc/sys/net/ipv6/conf/eth1/accept_dad
	ip link set eth1 up
	ip addr add 10.8.0.2/24 dev eth1
	ip addr add fd08::2/64 dev eth1
fi
httpd -p 8080 -h /www                                           # its answers contain the time
nc -ll -p 80 -e serve &                                         # no time: equal on both guests
nc -ll -p 7 -e cat &                                            # echo
nc -ll -p 9 -e md5sum &                                         # sink: returns the digest
nc -ll -p 19 -e cat /www/big &                                  # source
nc -ll -p 1234 -e sh -c 'i=0; while :; do i=$((i+1)); echo "line $i"; usleep 50000; done' &
udpecho &                                                       # UDP echo on 7
port=2000
for d in vda vdb; do                                            # durable records on 2001 and 2002
	port=$((port + 1))
	[ -b /dev/$d ] || continue
	# What the root is on is a directory of it there.
	grep -q "root=/dev/$d" /proc/cmdline || mount -t ext4 /dev/$d /mnt/$d || continue
	recordd /mnt/$d $port &
done
# The guest is ready when each service listens, not when it was started.
for p in 0007 0009 0013 0050 04D2 1F90; do
	until grep -q ":$p [0-9A-F:]* 0A " /proc/net/tcp /proc/net/tcp6; do usleep 10000; done
done
until grep -q ":0007 " /proc/net/udp6; do usleep 10000; done
port=2000
for d in vda vdb; do
	port=$((port + 1))
	[ -b /dev/$d ] || continue
	until grep -q ":$(printf %04X $port) [0-9A-F:]* 0A " /proc/net/tcp6; do usleep 10000; done
done
# The secrets behind sequence numbers and timestamps are generated at first use. Using them
# before the guest is copied gives both copies the same ones.
wget -q -O /dev/null http://10.9.0.2/index.html
wget -q -O /dev/null "http://[fd09::2]/index.html"
echo GUEST-READY
