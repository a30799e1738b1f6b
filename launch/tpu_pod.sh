#!/bin/bash
# A run on a slice of Cloud TPUs, one process per host, from a machine with gcloud:
#
#     REPOSITORY=https://host/you/tokenizers.git SHARE=10.0.0.2:/share TPU=run1 ZONE=us-east5-a \
#         launch/tpu_pod.sh --config=configs/vitok_image.py --workdir=/mnt/shared/runs/vitok --config.mesh.fsdp=16
#
# Makes the slice if there is none, sets up its hosts, trains, and does so again when the slice was taken away: the run
# goes on from its last checkpoint. Everything behind the file goes to train.py. In the environment:
#
#     TPU, ZONE         name and zone of the slice
#     TYPE, VERSION     v5litepod-64 and v2-alpha-tpuv5-lite, unless told
#     SPOT              --spot (the default, cheap and taken away at times), or empty
#     REPOSITORY        what the hosts clone, and BRANCH of it (main)
#     SHARE             a Filestore (NFS) share, mounted at /mnt/shared: --workdir, data and compiled programs
#     TRIES             how often to start, at most (100)
set -uo pipefail

: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${REPOSITORY:?what the hosts clone}" "${SHARE:?an NFS share}"
TYPE=${TYPE:-v5litepod-64}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT---spot}
BRANCH=${BRANCH:-main}
TRIES=${TRIES:-100}
if [ "$#" -eq 0 ]; then
    echo "usage: launch/tpu_pod.sh --config=<file> --workdir=/mnt/shared/<folder> [--config.<field>=<value> ...]" >&2
    exit 2
fi

vm() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet; }

on_all_hosts() { vm ssh "$TPU" --worker=all --command="$1"; }

setup="
set -e
sudo mkdir -p /mnt/shared
mountpoint -q /mnt/shared || sudo mount -t nfs -o nolock $(printf %q "$SHARE") /mnt/shared
test -d tokenizers || git clone --branch $(printf %q "$BRANCH") $(printf %q "$REPOSITORY") tokenizers
cd tokenizers
test -x .venv/bin/python || python3 -m venv .venv
.venv/bin/python -m pip install --quiet 'jax[tpu]' -r requirements.txt
"

# JAX asks the metadata server who the others are. The hosts come and go; their compiled programs lie on the share.
# `exec`: the signal that ends a host reaches train.py itself, which saves.
train="cd tokenizers && JAX_COMPILATION_CACHE_DIR=/mnt/shared/compiled \
exec .venv/bin/python train.py $(printf '%q ' "$@") --config.distributed.mode=auto --stopped_status=75"

for try in $(seq "$TRIES"); do
    state=$(vm describe "$TPU" --format="value(state)" 2>/dev/null || echo NONE)
    echo "start $try: $TPU is $state"
    if [ "$state" != READY ]; then
        [ "$state" = NONE ] || vm delete "$TPU"
        vm create "$TPU" --accelerator-type="$TYPE" --version="$VERSION" $SPOT || { sleep 60; continue; }
    fi
    if on_all_hosts "$setup" && on_all_hosts "$train"; then
        echo "finished; the slice is still there: gcloud compute tpus tpu-vm delete $TPU --zone=$ZONE"
        exit 0
    fi
    # Stopped (75), taken away, or an error; gcloud does not always say which.
    sleep 60
done
echo "not finished after $TRIES starts" >&2
exit 1
