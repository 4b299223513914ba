#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
#
# /init of initrd.img: loads the drivers, reports to the boot timer, and goes on from the root
# disk that root= names (rw unless ro is given, init=/sbin/init unless told otherwise). Without
# root=, or if the disk does not come, a shell on the console.
#
# shellcheck shell=dash

/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

while read -r module; do
    insmod "/modules/$module" || echo "hostel: cannot load $module"
done < /modules/order

boot-timer

root='' mode=rw init=/sbin/init
read -r cmdline < /proc/cmdline
for word in $cmdline; do
    case $word in
    root=*) root=${word#root=} ;;
    init=*) init=${word#init=} ;;
    ro) mode=ro ;;
    esac
done

console() {
    echo "hostel: $1"
    exec cttyhack sh
}
[ -n "$root" ] || console 'no root= given, a shell in the initramfs'

# Ten seconds: a disk is probed by the time that its driver is loaded, unless the host is slow.
tries=0
until [ -b "$root" ]; do
    [ "$tries" -lt 500 ] || console "no $root after 10 s, a shell in the initramfs"
    tries=$((tries + 1))
    sleep 0.02
done
mount -t ext4 -o "$mode" "$root" /root || console "cannot mount $root, a shell in the initramfs"
for dir in proc sys dev; do mount --move "/$dir" "/root/$dir"; done
exec switch_root /root "$init"
