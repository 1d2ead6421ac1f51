#!/usr/bin/env bash
# The seed's launch script for `recfx.examples.deepfm`; put ORC files in ./data/ or pass --data_paths. NPROC is the
# number of processes that train together, 1 by default: NPROC=2 ./run.sh --output_dir=./ckpt2
set -euo pipefail
NPROC="${NPROC:-1}"
ARG="--data_paths=./data/              \
    --batch_size=1000                  \
    --thread_num=1                     \
    --prefetch=1                       \
    --drop_remainder=true              \
    --gradient_accumulation_steps=4    \
    --output_dir=./ckpt                \
    --log_steps=10                     \
    --save_steps=2000"
PYTHON="${PYTHON:-python}"
if [ "$NPROC" = 1 ]; then
    exec "$PYTHON" -m recfx.examples.deepfm $ARG "$@"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" -m recfx.examples.deepfm $ARG "$@"
