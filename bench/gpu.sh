#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: the tests marked gpu, then the benchmarks. From a checkout, with
# `python` that has torch with CUDA, triton, numpy, pyarrow, safetensors, tqdm, xxhash and, for the tests, pytest and
# hypothesis. Writes bench/results/gpu_<device>_<yyyymm>.md and .json. Its exit code is 0 if every part ended well.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=. CUBLAS_WORKSPACE_CONFIG=:4096:8 # repeatable matrix products
records=$(mktemp)
failed=0

part() { # part NAME SECONDS COMMAND...: one part, cut off after so long, whatever became of those before
    echo "== $1"
    timeout --kill-after=5 "$2" "${@:3}" || { echo "== $1: exit code $?"; failed=1; }
}

python -c 'import torch; from bench.gpu_timing import need_device; need_device("bench/gpu.sh"); print(torch.__version__,
    torch.cuda.get_device_name())' || exit 1
part kernels 100 python -m pytest -q -m gpu -p no:cacheprovider -W default tests/kernels/gpu
part races 60 python -m pytest -q -m gpu -p no:cacheprovider -W default tests/gpu/test_races.py
part captured 150 python -m pytest -q -m gpu -p no:cacheprovider -W default tests/gpu/test_captured.py
part table 80 python -m bench.gpu_table "$records"
part deepfm 120 python -m bench.gpu_deepfm "$records"
part page 20 python -m bench.gpu_timing "$records"
rm -f "$records"
exit $failed
