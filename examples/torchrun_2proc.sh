#!/usr/bin/env bash
# Two processes on this machine, each with half of every batch and negatives of both: replicas, then shards (FSDP), on
# generated clips. For GPUs, several machines or your data: add torchrun's options and drop --dry-run.
#
#   examples/torchrun_2proc.sh [ROW DATASET] [more options of drl-fast train]
#
# torchrun_2proc.py shows the same in plain PyTorch, for your own training loop.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
row=wti_cdcr dataset=folder
if [ $# -gt 1 ] && [[ $1 != -* ]]; then row=$1 dataset=$2 && shift 2; fi
for parallel in ddp fsdp; do
  torchrun --standalone --nproc-per-node 2 -m drl_fast.cli train --config "$row" --dataset "$dataset" --dry-run \
    --set clip=drl-small --set parallel=$parallel "$@"
done
