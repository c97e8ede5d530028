#!/usr/bin/env bash
# Runs on each worker, started by install.sh: worker.sh BUCKET MOUNT [datasets to prepare]
set -euo pipefail

bucket=$1
mount=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# From v5e on the TPU runtime starts and stops much faster with huge pages.
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A fresh VM is often busy with its own updates: wait for the lock.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse </dev/null
fi
if ! mountpoint -q "$mount"; then
  sudo mkdir -p "$mount"
  sudo chown "$USER" "$mount"
  # No cached metadata: all workers must see at once what one of them wrote.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "$mount"
fi
mkdir -p "$mount/runs/logs" # fails here, not after an hour, if writing is not allowed

# Ubuntu 22.04 has Python 3.10; uv brings its own 3.12. The environment is outside the
# source folder, which each installation replaces.
if [[ ! -x $HOME/.local/bin/uv ]]; then
  curl -LsSf https://astral.sh/uv/install.sh | sh
fi
if [[ ! -d $HOME/venv ]]; then
  "$HOME/.local/bin/uv" venv --python 3.12 "$HOME/venv"
fi
"$HOME/.local/bin/uv" pip install --python "$HOME/venv/bin/python" -e ".[train,tpu]"

# On the local disk: each worker reads all of a dataset, and these are small.
for dataset in "$@"; do
  "$HOME/venv/bin/python" -m train.data.prepare "$dataset" --data-dir "$HOME/data"
done
