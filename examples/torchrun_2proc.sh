#!/usr/bin/env bash
# Two processes on this machine, each with half of every batch and negatives of both: replicas, then shards (FSDP), on
# generated clips. On GPUs, several machines or your data: torchrun's options, another --config, without --dry-run.
#
#   examples/torchrun_2proc.sh [configs/msrvtt_wti_cdcr.yaml] [more options of drl-fast train]
#
# torchrun_2proc.py shows the same in plain PyTorch, for a loop of your own.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
config=configs/folder_wti_cdcr.yaml
if [ $# -gt 0 ] && [[ $1 != -* ]]; then config=$1 && shift; fi
for parallel in ddp fsdp; do
  torchrun --standalone --nproc-per-node 2 -m drl_fast.cli train --config "$config" --dry-run \
    --set clip=drl-small --set parallel=$parallel "$@"
done
