#!/usr/bin/env bash
# Train one row of the MSR-VTT ablation, keep the best model by R@1, and evaluate it on the 1k-A test part.
#
#   VIDEOS=/data/msrvtt/videos ANNOTATIONS=/data/msrvtt ROW=wti_cdcr GPUS=8 examples/train_msrvtt.sh
#
# ROW is dp, dp_seqtransf, hi, mlp, xti, xti_seqtransf, ti, wti, dp_cdcr, ti_cdcr, wti_cdcr or video_colbert; GPUS is the
# number of processes (default 1). After an interruption run it again: it resumes. Further arguments go to drl-fast
# train, such as --set batch=256 or --dry-run.
set -euo pipefail
cd "$(dirname "$0")/.."
ROW=${ROW:-wti_cdcr} GPUS=${GPUS:-1} OUT=${OUT:-runs/msrvtt_$ROW}
PATH="$PWD/.venv/bin:$PATH"
if [ "$GPUS" -gt 1 ]; then
  start=(torchrun --standalone --nproc-per-node "$GPUS" -m drl_fast.cli)
else
  start=(python -m drl_fast.cli)
fi
"${start[@]}" train --config "$ROW" --dataset msrvtt --out "$OUT" --resume \
  --videos "${VIDEOS:?the folder of MSR-VTT\'s videos}" \
  --annotations "${ANNOTATIONS:?the folder of MSRVTT_data.json and the two CSV files}" "$@"
if [[ " $* " != *" --dry-run "* ]]; then
  "${start[@]}" eval --checkpoint "$OUT" --split test --out "$OUT/test.json" \
    --videos "$VIDEOS" --annotations "$ANNOTATIONS"
fi
