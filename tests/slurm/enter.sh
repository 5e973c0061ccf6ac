#!/bin/bash
# Run a program of another Debian, whose root folder is named, with this machine's folders of work in it.
#   enter.sh ROOT RIG_FOLDER PROGRAM ARGUMENTS...
# Everything is mounted in a namespace of its own, which ends with the program.
set -e
if [ -z "${LF_RIG_ENTERED:-}" ]; then
    LF_RIG_ENTERED=1 exec unshare --mount --propagation private "$0" "$@"
fi
unset LF_RIG_ENTERED
root=$1 rig=$2
shift 2
while IFS= read -r folder; do
    mkdir -p "$root$folder"
    mount --rbind "$folder" "$root$folder"
done <"$rig/binds"
touch "$root/etc/hosts"
mount --bind "$rig/hosts" "$root/etc/hosts"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec chroot "$root" "$@"
