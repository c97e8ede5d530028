#!/usr/bin/env bash
# Put the committed source on all workers and install it:
#   train/tpu/install.sh [datasets to prepare, such as fashion_mnist]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
if [[ -n $(git -C "$root" status --porcelain) ]]; then
  echo "note: what is not committed does not go along" >&2
fi
echo "source: commit $(git -C "$root" rev-parse HEAD)"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git -C "$root" archive --format=tar.gz --output="$folder/source.tar.gz" HEAD
tpu scp "$folder/source.tar.gz" "$NAME:" --worker=all

# The old folder goes first: tar would leave files that the new commit does not have.
# Dollar signs with a backslash are for the workers.
workers "set -e
if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then
  echo 'a run is on; stop it first, see train/tpu/README.md' >&2
  exit 1
fi
rm -rf oialr_jax
mkdir oialr_jax
tar -xzf source.tar.gz -C oialr_jax
oialr_jax/train/tpu/worker.sh$(printf ' %q' "$BUCKET" "$MOUNT" "$@")"

# Each worker must print the same number of processes and of devices in all.
check='import jax; jax.distributed.initialize(); print(
    f"process {jax.process_index()} of {jax.process_count()}:",
    f"{jax.local_device_count()} of {jax.device_count()} devices")'
workers "$(printf '%q ' venv/bin/python -c "$check")"
