#!/run/lab/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
#
# Process 1 of the lab once its root is in place: prepares the host that Hostel expects, starts
# the agent that runs commands, and powers off when the agent ends.
#
# shellcheck shell=dash

b=/run/lab/busybox
$b chmod 1777 /tmp
$b ln -sf /proc/self/fd /dev/fd
$b ln -sf /proc/self/fd/0 /dev/stdin
$b ln -sf /proc/self/fd/1 /dev/stdout
$b ln -sf /proc/self/fd/2 /dev/stderr
$b mkdir -p /dev/pts /dev/shm /dev/mqueue /dev/hugepages
$b mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
$b mount -t tmpfs -o mode=1777 tmpfs /dev/shm
$b mount -t mqueue mqueue /dev/mqueue
$b mount -t hugetlbfs hugetlbfs /dev/hugepages
$b mount -t debugfs debugfs /sys/kernel/debug
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in cpuset cpu io memory pids hugetlb; do
    echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control
done
$b hostname lab
$b ip link set lo up

prepare() {
    # Their device nodes exist only once they are loaded; all else the kernel loads on demand.
    /sbin/modprobe -a kvm-amd tun vhost_net vhost_vsock vsock_loopback loop ext4
    for block in /sys/block/vd*; do
        if [ "$($b cat "$block/serial")" = scratch ]; then
            $b mkdir -p /scratch
            $b mount -t ext4 -o discard "/dev/${block##*/}" /scratch
            $b chmod 1777 /scratch
        fi
    done
    : > /run/lab/prepared
}
# Meanwhile the agent starts, which takes about as long.
prepare &

python=$($b sed -n 's/^ *"interpreter": "\([^"]*\)",*$/\1/p' /run/lab/config.json)
"$python" -I -S /run/lab/agent.py
echo "lab: the agent ended with status $?"
$b sync
$b umount /out
$b poweroff -f
