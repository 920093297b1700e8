"""TVM's `webgpu` device over wgpu-native: Vulkan (Metal, DX12) for TVM builds that have none."""

from mlcawq.engine.wgpu.loader import Limits, adapters, limits, load, statistics

__all__ = ["Limits", "adapters", "limits", "load", "statistics"]
