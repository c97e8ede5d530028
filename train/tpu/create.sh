#!/usr/bin/env bash
# Create the TPU: train/tpu/create.sh [--queued] [flags of gcloud, such as --spot]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

# The workers write to the bucket; the default scopes may only let them read.
scopes=--scopes=https://www.googleapis.com/auth/cloud-platform

if [[ ${1-} != --queued ]]; then # fails at once where there is no capacity
  tpu create "$NAME" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" "$scopes" "$@"
  exit
fi
shift

# The request and the TPU have the same name, so that delete.sh finds both.
queue create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
  --runtime-version="$RUNTIME" "$scopes" "$@"
while state=$(queue describe "$NAME" --format='value(state.state)'); do
  echo "$(date +%T) $state"
  case $state in
    ACTIVE) exit ;;
    FAILED | SUSPEND*)
      echo "the request came to nothing; train/tpu/delete.sh removes it" >&2
      exit 1
      ;;
  esac
  sleep 30
done
echo "cannot see the request any more; it may still be in the queue" >&2
exit 1
