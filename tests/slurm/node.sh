#!/bin/bash
# One node of the rig: process 1 of its own network, process table, host name, /dev/shm and mounts.
#   node.sh NAME RIG_FOLDER ADDRESS GATEWAY
set -e
name=$1 rig=$2 address=$3 gateway=$4
hostname "$name"
mount --make-rprivate /
mount --bind "$rig/hosts" /etc/hosts
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
for own in /tmp/ray /tmp/disk; do # a node's own disk: /tmp itself is shared, since the tests' folders are in it
    mkdir -p "$own"
    mount -t tmpfs -o mode=1777,size=2g tmpfs "$own"
done
ip link set lo up
for _ in $(seq 200); do ip link show eth0 >/dev/null 2>&1 && break; sleep .05; done
ip link set eth0 up
ip addr add "$address/24" dev eth0
ip route add default via "$gateway"
export SLURM_CONF=$rig/slurm.conf
slurmd -D -f "$rig/slurm.conf" -N "$name" </dev/null >"$rig/log/slurmd.$name.out" 2>&1 &
wait $! # bash stays process 1 and reaps orphans, as an init does
