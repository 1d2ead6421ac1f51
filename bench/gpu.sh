#!/usr/bin/env bash
# What needs a GPU, made for the first ten minutes on one: what is installed, what the device does at most, the tests
# marked gpu, then the benchmarks. From a checkout, with `python3` that has torch with CUDA, triton, numpy, pyarrow,
# safetensors, tqdm, xxhash, pytest, pytest-benchmark and hypothesis, a C++ compiler; pytest-xdist is used if there, and
# so is JAX with CUDA.
#
#     bash bench/gpu.sh [--small] [--results FOLDER] [PART...]
#
# Without parts: all, in this order. --small: sizes for a first look, kept only with --results. Each part writes
# <theme>_<device>_<yyyymm>.md and .json into bench/results, or FOLDER, as it goes, and the script parts_... of how each
# part ended. Its exit code is 0 if all did well. In the environment: WORKERS, processes for tests, 8 if unset; PATIENCE,
# by which limits are multiplied where nothing cuts the script off.
#
# Limits add up to 560 s, so that all of it ends in under 590 s. A part that ends early leaves its time to those after
# it; the order is that of what matters most. Plan for the minutes after: bench/results/gpu_notes.md.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG=:4096:8 # repeatable matrix products
export PYTHONUNBUFFERED=1                                                       # a part that is cut off has said where
options=() chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        --small) options+=("$1") ;;
        --results) options+=("$1" "${2:?bench/gpu.sh: --results: got nothing, expected a folder}") && shift ;;
        --*) echo "bench/gpu.sh: got $1, expected --small, --results FOLDER or parts" >&2 && exit 2 ;;
        *) chosen+=("$1") ;;
    esac
    shift
done
python3 -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "triton", "numpy"))))' || {
    echo "bench/gpu.sh: needs torch, triton and numpy in $(command -v python3), one is missing. Nothing was measured." >&2
    exit 1
}
python3 -m bench.gpu_timing || exit 1
outcomes=$(mktemp) output=$(mktemp)
failed=0 due=0 names=" "

part() { # part NAME SECONDS MODULE ARGUMENTS...: cut off when all the time so far is used, whatever became of others
    names="$names$1 "
    [[ ${#chosen[@]} = 0 || " ${chosen[*]} " = *" $1 "* ]] || return 0
    due=$((due + $2 * ${PATIENCE:-1}))
    local begun=$SECONDS limit=$((due - SECONDS)) code
    limit=$((limit < 1 ? 1 : limit))
    echo "== $1, at most $limit s"
    timeout --signal=INT --kill-after=6 "$limit" python3 -m "${@:3}" "${options[@]}" 2>&1 | tee "$output"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || { echo "== $1: exit code $code" && failed=1; }
    printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$limit" $((SECONDS - begun)) "$code" "$(tail -n 1 "$output" | tr '\t' ' ')" >>"$outcomes"
}

end() { # also when the script is stopped
    timeout 15 python3 -m bench.gpu_timing --outcomes "$outcomes" "${options[@]}"
    rm -f "$outcomes" "$output"
}

trap end EXIT
part toolchain 45 bench.gpu_toolchain
part ceilings 25 bench.gpu_ceilings
part kernels 90 bench.gpu_tests tests/kernels/gpu
part races 40 bench.gpu_tests tests/gpu/test_races.py
part profile 65 bench.gpu_profile
part dynamicemb 40 bench.gpu_dynamicemb
part captured 75 bench.gpu_tests tests/gpu/test_captured.py
part deepfm 80 bench.gpu_deepfm
part table 20 bench.gpu_table
part sizes 50 bench.gpu_sizes
part files 30 bench.gpu_files
for name in "${chosen[@]}"; do
    [[ $names = *" $name "* ]] || { echo "bench/gpu.sh: got part $name, expected one of:$names" >&2 && failed=2; }
done
exit $failed
