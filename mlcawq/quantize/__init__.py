"""Calibration text, AWQ search, packing, journal and report, on PyTorch alone."""

import os

# MKL chooses threads and schedules work by what it meets at run time, and sums then differ in their
# last bits now and then, which can tip a search. Intel's conditions for equal results from run to
# run: fixed scheduling, and a number of threads that stays. MKL reads them at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ.setdefault("MKL_DYNAMIC", "FALSE")
