#!/usr/bin/env bash
# Delete the TPU, and with it the disks of its workers; the bucket stays.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if queue describe "$NAME" >/dev/null 2>&1; then
  queue delete "$NAME" --force --quiet # --force: with its TPU
else
  tpu delete "$NAME" --quiet
fi

echo "left in $ZONE:"
tpu list
queue list
