#!/usr/bin/env bash
# A row of the MSR-VTT ablation: train, keep the best model by R@1, score it on the 1k-A test part.
#
#   VIDEOS=/data/msrvtt/videos ANNOTATIONS=/data/msrvtt ROW=wti_cdcr GPUS=8 examples/train_msrvtt.sh
#
# ROW is a file of configs/ without msrvtt_ and .yaml; GPUS the processes (1 where not given). Run it again after
# whatever ended it: it goes on. What follows the script's name goes to drl-fast train: --set batch=256, --dry-run.
set -euo pipefail
cd "$(dirname "$0")/.."
ROW=${ROW:-wti_cdcr} GPUS=${GPUS:-1} OUT=${OUT:-runs/msrvtt_$ROW}
PATH="$PWD/.venv/bin:$PATH"
if [ "$GPUS" -gt 1 ]; then
  start=(torchrun --standalone --nproc-per-node "$GPUS" -m drl_fast.cli)
else
  start=(python -m drl_fast.cli)
fi
"${start[@]}" train --config "configs/msrvtt_$ROW.yaml" --out "$OUT" --resume \
  --videos "${VIDEOS:?the folder of MSR-VTT\'s videos}" \
  --annotations "${ANNOTATIONS:?the folder of MSRVTT_data.json and the two CSV files}" "$@"
if [[ " $* " != *" --dry-run "* ]]; then
  "${start[@]}" eval --checkpoint "$OUT" --split test --out "$OUT/test.json" \
    --videos "$VIDEOS" --annotations "$ANNOTATIONS"
fi
