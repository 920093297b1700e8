"""Kernels that CUDA and Vulkan share: thread blocks and shared memory, nothing of one vendor."""
