"""TVM's `webgpu` device over wgpu-native: Vulkan (Metal, DX12) for TVM builds that have none."""

from mlcawq.engine.wgpu.loader import (
    WINDOW_BIT,
    Limits,
    adapters,
    limits,
    load,
    statistics,
    window,
)

__all__ = ["WINDOW_BIT", "Limits", "adapters", "limits", "load", "statistics", "window"]
