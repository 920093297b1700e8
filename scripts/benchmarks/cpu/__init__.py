"""What scripts/bench_cpu.py is made of.

`worker`, and the modules that it loads, also run in other projects' environments: they import
nothing of mlcawq at their top.
"""
