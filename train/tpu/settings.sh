#!/usr/bin/env bash
# Settings and helpers of the scripts here, which source it; it does nothing by itself.
set -euo pipefail

: "${PROJECT:?set PROJECT to the Google Cloud project that pays}"
: "${ZONE:?set ZONE to the zone of the TPU, such as europe-west4-b}"
: "${NAME:?set NAME to the name of the TPU, such as oialr}"
: "${ACCELERATOR:?set ACCELERATOR to the kind of TPU, such as v5litepod-16}"
: "${RUNTIME:?set RUNTIME to its software version, such as v2-alpha-tpuv5-lite}"
: "${BUCKET:?set BUCKET to the bucket of the runs, without gs://}"
: "${MOUNT:=/mnt/bucket}" # where the workers have the bucket

tpu() { # tpu VERB ARGUMENTS...
  gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"
}

queue() { # queue VERB ARGUMENTS...
  gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

workers() { # workers COMMAND: on all workers at the same time, in their home folder
  tpu ssh "$NAME" --worker=all --command="$1"
}
