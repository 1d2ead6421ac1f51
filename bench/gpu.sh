#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: the tests marked gpu, then the benchmarks. From a checkout, with
# `python3` that has torch with CUDA, triton, numpy, pyarrow, safetensors, tqdm, xxhash and, for the tests, pytest,
# pytest-benchmark and hypothesis; JAX with CUDA if it is to be compared. Each benchmark writes
# bench/results/<theme>_<device>_<yyyymm>.md and .json as it goes, and the script parts_<device>_<yyyymm>, of how each
# part ended. Its exit code is 0 if all did well.
#
# Limits add up to 520 s. A part that ends early leaves its time to those after it; the order is that of what
# matters most.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=. CUBLAS_WORKSPACE_CONFIG=:4096:8 # repeatable matrix products
export PYTHONUNBUFFERED=1                           # a part that is cut off has said where it was
outcomes=$(mktemp) output=$(mktemp)
failed=0 due=0

part() { # part NAME SECONDS COMMAND...: one part, cut off when all the time so far is used, whatever became of others
    due=$((due + $2))
    local begun=$SECONDS limit=$((due - SECONDS)) code
    echo "== $1, at most $limit s"
    timeout --kill-after=2 "$limit" "${@:3}" 2>&1 | tee "$output"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || { echo "== $1: exit code $code"; failed=1; }
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$limit" $((SECONDS - begun)) "$code" "$(tail -n 1 "$output" | tr '\t' ' ')" >>"$outcomes"
}

end() { # also when the script is stopped
    timeout 15 python3 -m bench.gpu_timing "$outcomes"
    rm -f "$outcomes" "$output"
}

python3 -c 'import torch; from bench.gpu_timing import need_device; need_device("bench/gpu.sh"); print(torch.__version__,
    torch.cuda.get_device_name())' || exit 1
trap end EXIT
part kernels 150 python3 -m pytest -q -m gpu -p no:cacheprovider -W default tests/kernels/gpu
part races 50 python3 -m pytest -q -m gpu -p no:cacheprovider -W default tests/gpu/test_races.py
part captured 100 python3 -m pytest -q -m gpu -p no:cacheprovider -W default tests/gpu/test_captured.py
part table 45 python3 -m bench.gpu_table
part deepfm 90 python3 -m bench.gpu_deepfm
part sizes 50 python3 -m bench.gpu_sizes
part files 35 python3 -m bench.gpu_files
exit $failed
