#!/usr/bin/env bash
# Copy records, results and logs here; checkpoints stay in the bucket:
#   train/tpu/collect.sh [FOLDER, by default runs]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# By way of the bucket, because it outlives the workers.
if ! workers "cp run.log $(printf %q "$MOUNT")/runs/logs/\"\$(hostname)\".log"; then
  echo "note: no log from some workers; what earlier calls collected is in the bucket" >&2
fi
mkdir -p "${1:-runs}"
gcloud storage rsync "gs://$BUCKET/runs" "${1:-runs}" --project="$PROJECT" \
  --recursive --exclude='.*checkpoints/.*'
