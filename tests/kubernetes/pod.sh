#!/bin/bash
# One pod of the stand-in: process 1 of its own network, process table, host name, /dev/shm and mounts.
#   pod.sh FOLDER NAME ADDRESS GATEWAY      FOLDER has hosts, mounts (SOURCE TARGET lines), environment and command
set -e
folder=$1 name=$2 address=$3 gateway=$4
hostname "$name"
mount --make-rprivate /
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o mode=1777,size=1g tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs -o mode=1777,size=2g tmpfs /tmp/ray # /tmp itself is shared: the tests' folders may be in it
while read -r source target; do mount --bind "$source" "$target"; done <"$folder/mounts"
ip link set lo up
for _ in $(seq 200); do ip link show eth0 >/dev/null 2>&1 && break; sleep .05; done
ip link set eth0 up
ip addr add "$address/24" dev eth0
ip route add default via "$gateway"
mapfile -d '' variables <"$folder/environment"
code=0
env -i "${variables[@]}" bash -c "$(<"$folder/command")" </dev/null >>"$folder/log" 2>&1 &
trap 'kill -TERM $! 2>/dev/null' TERM
wait $! || code=$?
while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done # a signal ends the wait, not the command
echo $code >"$folder/exit"
