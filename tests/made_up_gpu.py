"""A GPU that has what WebGPU guarantees and no more."""

from mlcawq.engine.wgpu import Limits

GPU = Limits(
    name="Some GPU",
    driver="1.2",
    backend="vulkan",
    device_type="discrete",
    vendor_id=1,
    device_id=2,
    shader_f16=True,
    subgroups=False,
    max_storage_buffer_binding_size=2**27,
    max_buffer_size=2**28,
    max_compute_workgroup_storage_size=16384,
    max_compute_invocations_per_workgroup=256,
    max_compute_workgroup_size_x=256,
    max_compute_workgroup_size_y=256,
    max_compute_workgroup_size_z=64,
    max_compute_workgroups_per_dimension=65535,
    max_storage_buffers_per_shader_stage=8,
    min_storage_buffer_offset_alignment=256,
)
