"""Kernels of rows compiled for sm_90 for tables of a width: `python -m tests.kernels.gpu.compile_widths FIRST END`.

As far as PTX: the assembler is left out, so the compiler's cache must be a folder that nothing else uses.
"""

import sys
from unittest import mock

from triton.backends.nvidia.compiler import CUDABackend

from bench.triton_sm90 import call_all, calls, compiling
from recfx.kernels.op import gpu_function

SIZES = 512, 64, 16, 256, 1024
OF_ROWS = {
    "find_or_insert_", "pool", "add_row_grads_", "add_row_grads_atomic_", "clip_row_grads_", "adamw_rows_",
    "sum_adamw_rows_", "rowwise_adagrad_rows_",
}  # fmt: skip
# With a second table of width 1, and all operators: small widths, and those around powers of 2.
NEXT_TO_ONE = {*range(1, 34), *(2**k + d for k in range(5, 9) for d in (-1, 0, 1)), 100, 200} & {*range(257)}


def compile_rows(dims: tuple[int, ...]) -> None:
    for (_module, name), arguments in calls(dims, SIZES).items():
        if name in OF_ROWS:
            gpu_function(name)(*arguments)


def main(first: int, end: int) -> None:
    with mock.patch.object(CUDABackend, "make_cubin", return_value=b""), compiling() as compiled:
        for width in range(first, end):
            compile_rows((width,))
            if width in NEXT_TO_ONE:
                compile_rows((width, 1))
            if width in (1, 9, 27, 128, 256):
                call_all((width,), SIZES)
    print(f"{len(compiled)} kernels")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
