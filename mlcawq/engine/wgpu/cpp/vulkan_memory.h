// How much memory a Vulkan device has, which WebGPU does not tell.
#ifndef MLCAWQ_WGPU_VULKAN_MEMORY_H_
#define MLCAWQ_WGPU_VULKAN_MEMORY_H_

#include <cstdint>

namespace mlcawq {

struct DeviceMemory {
  uint64_t total = 0;      // bytes of the device's largest heap of its own
  uint64_t available = 0;  // of them, what the driver lets this process have now
};

// Zeros when it cannot be found out. Asks the driver each time: what is available changes.
DeviceMemory QueryVulkanMemory(uint32_t vendor_id, uint32_t device_id);

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_VULKAN_MEMORY_H_
