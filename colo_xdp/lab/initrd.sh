#!/bin/busybox sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Init of the initramfs: loads the drivers, then hands over to the root file system that the kernel's
# command line names, or, without one, runs the services here.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net virtio_blk; do
	insmod /modules/$m.ko || echo "no module $m"
done
for word in $(cat /proc/cmdline); do
	case $word in root=*)
		mount -t ext4 "${word#root=}" /root
		for d in proc sys dev; do mount --move /$d /root/$d; done
		exec switch_root /root /sbin/init ;;
	esac
done
. /bin/services
exec sh < /dev/console > /dev/console 2>&1
