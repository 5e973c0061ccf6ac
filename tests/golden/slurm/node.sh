#!/bin/bash
# What each node of a job does; started by `srun` from job.sbatch, whose environment it has.
#   node.sh look NONCE   say what this node has
#   node.sh keep         copy what Ray's processes said into the run's folder
#   node.sh token        keep the token of the job's Ray, which is read from stdin
#   node.sh ray          be a node of the job's Ray until the job ends
set -uo pipefail
cd "$LF_RUN" || { echo "$SLURMD_NODENAME does not see $LF_RUN: runs_dir must be a folder that all nodes share" >&2; exit 70; }
address() {
    if [ -n "$LF_INTERFACE" ]; then
        ip -4 -o addr show dev "$LF_INTERFACE" | awk '{split($4, part, "/"); print part[1]; exit}'
    else
        { getent ahostsv4 "$SLURMD_NODENAME" | awk '{print $1}'; hostname -I | tr ' ' '\n'; } |
            awk '/^[0-9.]+$/ && !/^127\./ {print; exit}'
    fi
}
LF_HERE=$LF_HERE-$SLURM_NODEID # its own name on each node: some clusters share /tmp
# Compiled kernels and the staged model lie on this node's own disk; where the site names one, for the next job too.
caches() { # FOLDER of this job alone
    local cache=$1/cache
    if [ -n "$LF_KEEP" ]; then
        mkdir -m 700 "$LF_KEEP" 2>/dev/null
        if [ -O "$LF_KEEP" ] && [ ! -L "$LF_KEEP" ]; then cache=$LF_KEEP; fi
    fi
    export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
    [ -z "$LF_STAGE" ] || export LORAFLEET_STAGE=$cache/models
}
safe=${LF_HERE%-*}-token-$SLURMD_NODENAME
[ "$1" != ray ] || trap 'rm -rf "$safe"' EXIT # the job may end before its token was taken
if [ "$1" = token ]; then
    umask 077
    mkdir -m 700 "$safe" && IFS= read -r token && [ -n "$token" ] && printf '%s' "$token" >"$safe/token"
    exit
fi
if [ "$1" = keep ]; then
    mkdir -p "slurm/ray-$SLURMD_NODENAME-$LF_ATTEMPT" &&
        find "$LF_HERE"/r/session_2*/logs -type f -size -5M -exec cp {} "slurm/ray-$SLURMD_NODENAME-$LF_ATTEMPT" \;
    exit
fi
me=$(address)
if [ "$1" = look ]; then
    exec lorafleet node look "$LF_RUN" --nonce "slurm/nonce-$LF_ATTEMPT" --address "$me" \
        --node "$SLURMD_NODENAME" --number "$SLURM_NODEID" --scratch "${LF_HERE%/*}" --interface "$LF_INTERFACE"
fi

number=$SLURM_NODEID name=$SLURMD_NODENAME gpus=${SLURM_GPUS_ON_NODE:-0} all_cpus=${SLURM_CPUS_ON_NODE:-$LF_CPUS}
stopping=''
ended() { # CODE SENTENCE
    [ -z "$stopping" ] || exit 0
    [ "$number" != 0 ] || : >"$LF_PRIVATE/head-ended"
    printf '%s: %s\n' "$name" "$2" >>"slurm/lost-$LF_ATTEMPT"
    exit "$1"
}
mask=$(umask)
umask 077
mkdir -m 700 "$LF_HERE" || ended 1 "$LF_HERE could not be made"
ray=''
# Ray's processes are one session: what of them outlives `ray start` (modules of the dashboard that still import) ends too.
trap '[ -z "$ray" ] || pkill -KILL -s "$ray"; rm -rf "$LF_HERE" "$safe"' EXIT
printf '{"machine": ["%s", "%s"], "pid": %d, "started": %s}\n' "$(uname -n)" "$(readlink /proc/self/ns/pid)" \
    "$$" "$(awk '{print $22}' "/proc/$$/stat")" >"$LF_HERE/owner.json"
mv "$safe/token" "$LF_HERE/token" && rmdir "$safe"
umask "$mask"
[ "$number" != 0 ] || printf '%s\n' "$SLURM_STEP_ID" >"$LF_PRIVATE/step"
[ "$(stat -c '%a %s' "$LF_HERE/token")" = '600 64' ] || ended 1 "the token of Ray did not come, or others could read it"

caches "$LF_HERE"
[ "$number" != 0 ] || [ "$LF_HEAD_WORKS" = 1 ] || LF_STAGE='' # a head of its own loads no model
[ -z "$LF_STAGE" ] || lorafleet node stage "$LF_RUN" || ended 1 "the model could not be brought to this node's disk"

# Ray's processes are no tasks of Slurm: libraries that find its variables would join ranks that are not there.
for variable in "${!SLURM_@}" "${!PMI_@}" "${!PMIX_@}"; do unset "$variable"; done
unset RAY_ADDRESS ROCR_VISIBLE_DEVICES
export TMPDIR=$LF_HERE RAY_TMPDIR=$LF_HERE RAY_AUTH_TOKEN_PATH=$LF_HERE/token
ulimit -n "$(ulimit -Hn)" 2>/dev/null
cpus=$LF_CPUS
[ -z "${LF_WHOLE_NODES:-}" ] || cpus=$all_cpus
[ "$number" != 0 ] || LF_OBJECTS=$LF_HEAD_OBJECTS
[ "$number" != 0 ] || [ "$LF_HEAD_WORKS" = 1 ] || cpus=0
common=(
    --temp-dir="$LF_HERE/r" --node-ip-address="$me" --num-cpus="$cpus" --num-gpus="$gpus"
    --memory="$LF_MEMORY" --object-store-memory="$LF_OBJECTS" --disable-usage-stats
    --node-manager-port=$((LF_PORT + 1)) --object-manager-port=$((LF_PORT + 2))
    --runtime-env-agent-port=$((LF_PORT + 3)) --dashboard-agent-grpc-port=$((LF_PORT + 4))
    --dashboard-agent-listen-port=$((LF_PORT + 5)) --metrics-export-port=$((LF_PORT + 6))
    --min-worker-port=$((LF_PORT + 20)) --max-worker-port="$LF_LAST" --block
)
if [ "$number" = 0 ]; then
    # The dashboard is on since Ray Train asks its state API for the placement groups of stopped trials.
    setsid ray start --head --port="$LF_PORT" --include-dashboard=true --dashboard-host="$me" \
        --dashboard-port=$((LF_PORT + 7)) "${common[@]}" &
else
    for _ in $(seq 1800); do (exec 3<>"/dev/tcp/$LF_ADDRESS/$LF_PORT") 2>/dev/null && break; sleep 0.5; done
    setsid ray start --address="$LF_ADDRESS:$LF_PORT" "${common[@]}" &
fi
ray=$!
trap 'stopping=1; kill -TERM "$ray" 2>/dev/null' TERM
while kill -0 "$ray" 2>/dev/null; do sleep 0.5; done
wait "$ray"
code=$?
ended "$code" "Ray ended with code $code (slurm/ray-$name-$LF_ATTEMPT.log)"
