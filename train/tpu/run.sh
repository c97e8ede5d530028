#!/usr/bin/env bash
# Start or go on with a run on all workers and return at once:
#   train/tpu/run.sh PRESET [flags of train.images]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if (($# == 0)) || [[ $1 == -* ]]; then
  echo "usage: train/tpu/run.sh PRESET [flags of train.images]" >&2
  exit 2
fi

# Given flags come after --out and --data-dir and override them. %q quotes each argument
# for the shell of the workers.
arguments=$(printf ' %q' "$1" --out "$MOUNT/runs" --data-dir ../data "${@:2}" \
  --distributed --resume)

# Dollar signs with a backslash are for the workers. nohup and the redirections let the
# program live on after ssh has ended; the log is unbuffered, so that it can be followed.
workers "cd oialr_jax || exit 1
if kill -0 \"\$(cat ../run.pid 2>/dev/null)\" 2>/dev/null; then
  echo 'a run is on already: process' \"\$(cat ../run.pid)\" >&2
  exit 1
fi
PYTHONUNBUFFERED=1 nohup ../venv/bin/python -m train.images$arguments \\
  </dev/null >>../run.log 2>&1 &
echo \$! >../run.pid"
echo "started; each worker writes run.log in its home folder"
