"""Read by Python before a program that finds this folder on PYTHONPATH: bench's GPU programs get the stand-in."""

import sys

if any(word.startswith("bench.gpu_") for word in sys.orig_argv):
    import cuda_stand_in

    cuda_stand_in.install()
