#!/usr/bin/env bash
# The seed's launch script for `recfx.examples.deepfm`, one process; put ORC files in ./data/ or pass --data_paths.
set -euo pipefail
ARG="--data_paths=./data/              \
    --batch_size=1000                  \
    --thread_num=1                     \
    --prefetch=1                       \
    --drop_remainder=true              \
    --gradient_accumulation_steps=4    \
    --output_dir=./ckpt                \
    --log_steps=10                     \
    --save_steps=2000"
exec "${PYTHON:-python}" -m recfx.examples.deepfm $ARG "$@"
