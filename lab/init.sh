#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
#
# /init of the lab's initramfs: builds a writable view of the machine that runs the lab, then
# makes it the root and goes on with main.sh. A real root rather than a chroot, because the
# kernel creates no user namespace for a process in a chroot, and jails need them.
#
# shellcheck shell=dash

/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /ro /rw /lab /images /host
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec < /dev/null > /dev/console 2>&1

fail() {
    echo "lab: failed: $1"
    poweroff -f
}

while read -r module; do
    insmod "/modules/$module" || fail "cannot load $module"
done < /modules/order

p9() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$1" "$2" "$3" || fail "no 9p share $2"; }
p9 ro,cache=loose lab /lab
p9 ro,cache=loose root /ro
mount -t tmpfs -o size=75% tmpfs /rw

# overlay NAME LOWER TARGET: a view of LOWER at TARGET whose changes go to memory
overlay() {
    mkdir -p "/rw/$1/upper" "/rw/$1/work" "$3"
    mount -t overlay -o "lowerdir=$2,upperdir=/rw/$1/upper,workdir=/rw/$1/work" "$1" "$3" ||
        fail "cannot mount $1 on $3"
}
overlay root /ro /host

# Each line of `mounts` is: image NAME TARGET | bind - TARGET (the 9p view, under an image)
disk_of() {
    for block in /sys/block/vd*; do
        [ "$(cat "$block/serial")" != "$1" ] || echo "/dev/${block##*/}"
    done
}
while read -r kind name target; do
    case $kind in
    image)
        mkdir -p "/images/$name"
        mount -t squashfs -o ro "$(disk_of "$name")" "/images/$name" || fail "no image $name"
        overlay "$name" "/images/$name" "/host$target"
        ;;
    bind)
        [ ! -e "/ro$target" ] || { mkdir -p "/host$target" && mount --bind "/ro$target" "/host$target"; }
        ;;
    esac
done < /lab/mounts

for dir in proc sys dev run tmp out; do mkdir -p "/host/$dir"; done
mount -t tmpfs -o mode=755 tmpfs /host/run
mkdir -p /host/run/lab
cp /bin/busybox /lab/main.sh /lab/agent.py /lab/config.json /host/run/lab/
p9 cache=none out /host/out
for dir in proc sys dev; do mount --move "/$dir" "/host/$dir"; done
umount /lab
exec switch_root /host /run/lab/busybox sh /run/lab/main.sh
