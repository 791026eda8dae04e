#!/usr/bin/env bash
# Try drl-fast train on two processes of this machine, first with DDP, then with FSDP, on generated clips. Each process
# has half of every batch and the negatives of both. For several machines or your own data add torchrun's and drl-fast
# train's options and remove --dry-run.
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
