"""Kernels for 4-bit weights on TVM: layouts, a numpy reference, one package for each target.

Imports TVM and numpy and nothing of mlcawq, so that other compilers can use them as a plug-in.
"""
