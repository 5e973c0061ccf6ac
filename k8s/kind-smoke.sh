#!/usr/bin/env bash
# A sweep on a real KubeRay, and with --kueue through a real Kueue, in a kind cluster of this machine.
# Needs docker, kind, kubectl, helm and lorafleet on the path, and about 20 GB of disk. It has never been run.
#   k8s/kind-smoke.sh [--kueue] [--keep]
set -euo pipefail
cd "$(dirname "$0")/.."
KUBERAY=1.7.0 KUEUE=0.19.2 CLUSTER=lorafleet-smoke REGISTRY=lorafleet-registry PORT=5001
kueue=no keep=no
for option in "$@"; do
    case $option in
    --kueue) kueue=yes ;;
    --keep) keep=yes ;;
    *) echo "usage: k8s/kind-smoke.sh [--kueue] [--keep]" >&2; exit 2 ;;
    esac
done
for program in docker kind kubectl helm lorafleet; do
    command -v "$program" >/dev/null || { echo "there is no $program here" >&2; exit 2; }
done
scratch=$(mktemp -d)
export KUBECONFIG=$scratch/kubeconfig XDG_STATE_HOME=$scratch/state
clean_up() {
    code=$?
    [ $keep = yes ] && { echo "kept: KUBECONFIG=$KUBECONFIG, files in $scratch"; exit $code; }
    kind delete cluster --name $CLUSTER || true
    docker rm --force $REGISTRY >/dev/null || true
    rm -rf "$scratch"
    exit $code
}
trap clean_up EXIT

echo "== an image, by digest, in a registry that the cluster sees"
cat >"$scratch/Dockerfile" <<'DOCKERFILE'
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY . /opt/lorafleet
RUN pip install --no-cache-dir "/opt/lorafleet[train]" && useradd --uid 1000 --gid 100 --create-home ray
USER 1000:100
WORKDIR /home/ray
DOCKERFILE
docker run --detach --restart=always --publish "127.0.0.1:$PORT:5000" --name $REGISTRY registry:2
version=$(lorafleet --version)
image=localhost:$PORT/lorafleet:$version
git archive HEAD | tar -x -C "$(mkdir -p "$scratch/source" && echo "$scratch/source")"
docker build --file "$scratch/Dockerfile" --tag "$image" "$scratch/source"
docker push "$image"
digest=$(docker inspect --format '{{index .RepoDigests 0}}' "$image")
pinned=localhost:$PORT/lorafleet:$version@${digest#*@}

echo "== a cluster with KubeRay $KUBERAY"
kind create cluster --name $CLUSTER --config - <<KIND
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
containerdConfigPatches:
  - |-
    [plugins."io.containerd.grpc.v1.cri".registry]
      config_path = "/etc/containerd/certs.d"
KIND
node=$CLUSTER-control-plane
docker exec $node mkdir -p /etc/containerd/certs.d/localhost:$PORT
echo "[host.\"http://$REGISTRY:5000\"]" | docker exec -i $node cp /dev/stdin /etc/containerd/certs.d/localhost:$PORT/hosts.toml
docker network connect kind $REGISTRY
helm repo add kuberay https://ray-project.github.io/kuberay-helm/
helm install kuberay-operator kuberay/kuberay-operator --version $KUBERAY --wait
kubectl create namespace smoke
kubectl label namespace smoke pod-security.kubernetes.io/enforce=restricted
kubectl apply --namespace smoke -f k8s/role.yaml
kubectl apply --namespace smoke -f - <<'CLAIM'
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: lorafleet}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 5Gi}}}
CLAIM
scheduler="{kind: none}"
if [ $kueue = yes ]; then
    echo "== Kueue $KUEUE"
    kubectl apply --server-side -f https://github.com/kubernetes-sigs/kueue/releases/download/v$KUEUE/manifests.yaml
    kubectl --namespace kueue-system wait --for=condition=available deployment/kueue-controller-manager --timeout=5m
    kubectl apply -f - <<'QUEUES'
apiVersion: kueue.x-k8s.io/v1beta1
kind: ResourceFlavor
metadata: {name: any}
---
apiVersion: kueue.x-k8s.io/v1beta1
kind: ClusterQueue
metadata: {name: smoke}
spec:
  namespaceSelector: {}
  resourceGroups:
    - coveredResources: [cpu, memory, ephemeral-storage]
      flavors:
        - name: any
          resources:
            - {name: cpu, nominalQuota: 8}
            - {name: memory, nominalQuota: 16Gi}
            - {name: ephemeral-storage, nominalQuota: 50Gi}
---
apiVersion: kueue.x-k8s.io/v1beta1
kind: LocalQueue
metadata: {name: smoke, namespace: smoke}
spec: {clusterQueue: smoke}
QUEUES
    scheduler="{kind: kueue, queue: smoke}"
fi

echo "== lorafleet"
cat >"$scratch/smoke.yaml" <<SITE
kind: kubernetes
context: kind-$CLUSTER
namespace: smoke
image: $pinned
storage: {claim: lorafleet, read_write_many: false}
nodes: 1
max_nodes: 1
cpus_per_node: 2
memory_gb_per_node: 4
ephemeral_gb_per_node: 5
head: {cpus: 1, memory_gb: 4, ephemeral_gb: 5}
scheduler: $scheduler
SITE
cd "$scratch"
lorafleet fetch --examples
lorafleet doctor --on smoke.yaml
lorafleet validate examples/quickstart.yaml --on smoke.yaml
lorafleet fetch examples/quickstart.yaml --on smoke.yaml
run=$(lorafleet sweep examples/quickstart.yaml --on smoke.yaml --detach)
for _ in $(seq 90); do
    said=$(lorafleet status "$run" | tee /dev/stderr)
    grep -q "^running" <<<"$said" && break
    grep -q "^failed" <<<"$said" && exit 1
    sleep 10
done
sleep 60
lorafleet stop "$run"
timeout 300 bash -c 'while kubectl --namespace smoke get pods --no-headers 2>/dev/null | grep -q .; do sleep 5; done'
lorafleet resume "$run" --wait
lorafleet pull "$run"
lorafleet report "$run"
echo "== done"
