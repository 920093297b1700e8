#include "vulkan_memory.h"

#ifdef _WIN32
namespace mlcawq {
DeviceMemory QueryVulkanMemory(uint32_t, uint32_t) { return {}; }
}  // namespace mlcawq
#else

#include <dlfcn.h>

#include <cstring>
#include <vector>

namespace mlcawq {
namespace {

// The little of Vulkan's interface that this takes, declared here because machines that only run
// models have no Vulkan headers. Names, numbers and layouts are those of the specification.
namespace vk {

constexpr uint32_t kVersion11 = (1u << 22) | (1u << 12);
constexpr int kApplicationInfo = 0;
constexpr int kInstanceCreateInfo = 1;
constexpr int kMemoryProperties2 = 1000059006;
constexpr int kMemoryBudget = 1000237000;
constexpr uint32_t kDeviceLocalHeap = 1;
constexpr uint32_t kMostHeaps = 16;

struct ApplicationInfo {
  int type;
  const void* next;
  const char* name;
  uint32_t version;
  const char* engine;
  uint32_t engine_version;
  uint32_t api_version;
};
struct InstanceCreateInfo {
  int type;
  const void* next;
  uint32_t flags;
  const ApplicationInfo* application;
  uint32_t layer_count;
  const char* const* layers;
  uint32_t extension_count;
  const char* const* extensions;
};
// VkPhysicalDeviceProperties begins with these; the rest only has to fit.
struct DeviceProperties {
  uint32_t api_version, driver_version, vendor_id, device_id;
  uint64_t rest[256];
};
struct ExtensionProperties {
  char name[256];
  uint32_t version;
};
struct Heap {
  uint64_t size;
  uint32_t flags;
};
struct MemoryProperties {
  uint32_t type_count;
  struct {
    uint32_t flags, heap;
  } types[32];
  uint32_t heap_count;
  Heap heaps[kMostHeaps];
};
struct MemoryBudget {
  int type;
  void* next;
  uint64_t budget[kMostHeaps];
  uint64_t usage[kMostHeaps];
};
struct MemoryProperties2 {
  int type;
  void* next;
  MemoryProperties properties;
};

using Instance = struct InstanceHandle*;
using PhysicalDevice = struct PhysicalDeviceHandle*;
using Function = void (*)();
using GetInstanceProcAddr = Function (*)(Instance, const char*);

}  // namespace vk

class Loader {
 public:
  Loader() {
    void* library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    get_ = reinterpret_cast<vk::GetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
    if (get_ == nullptr) return;
    vk::ApplicationInfo application = {};
    application.type = vk::kApplicationInfo;
    application.api_version = vk::kVersion11;
    vk::InstanceCreateInfo info = {};
    info.type = vk::kInstanceCreateInfo;
    info.application = &application;
    auto create = Get<int(const vk::InstanceCreateInfo*, const void*, vk::Instance*)>(
        "vkCreateInstance");
    if (create == nullptr || create(&info, nullptr, &instance_) != 0) instance_ = nullptr;
  }

  template <typename Signature>
  Signature* Get(const char* name) const {
    return reinterpret_cast<Signature*>(get_(instance_, name));
  }

  std::vector<vk::PhysicalDevice> Devices() const {
    std::vector<vk::PhysicalDevice> devices;
    if (instance_ == nullptr) return devices;
    auto enumerate = Get<int(vk::Instance, uint32_t*, vk::PhysicalDevice*)>(
        "vkEnumeratePhysicalDevices");
    uint32_t count = 0;
    if (enumerate == nullptr || enumerate(instance_, &count, nullptr) != 0) return devices;
    devices.resize(count);
    enumerate(instance_, &count, devices.data());
    devices.resize(count);
    return devices;
  }

  bool HasBudget(vk::PhysicalDevice device) const {
    auto enumerate =
        Get<int(vk::PhysicalDevice, const char*, uint32_t*, vk::ExtensionProperties*)>(
            "vkEnumerateDeviceExtensionProperties");
    uint32_t count = 0;
    if (enumerate == nullptr || enumerate(device, nullptr, &count, nullptr) != 0) return false;
    std::vector<vk::ExtensionProperties> extensions(count);
    enumerate(device, nullptr, &count, extensions.data());
    for (const vk::ExtensionProperties& extension : extensions) {
      if (std::strcmp(extension.name, "VK_EXT_memory_budget") == 0) return true;
    }
    return false;
  }

 private:
  vk::GetInstanceProcAddr get_ = nullptr;
  vk::Instance instance_ = nullptr;
};

}  // namespace

DeviceMemory QueryVulkanMemory(uint32_t vendor_id, uint32_t device_id) {
  // One instance for the process, never destroyed: drivers dislike both many and late endings.
  static const auto* loader = new Loader();
  for (vk::PhysicalDevice device : loader->Devices()) {
    vk::DeviceProperties properties = {};
    loader->Get<void(vk::PhysicalDevice, vk::DeviceProperties*)>("vkGetPhysicalDeviceProperties")(
        device, &properties);
    if (properties.vendor_id != vendor_id || properties.device_id != device_id) continue;
    auto query = loader->Get<void(vk::PhysicalDevice, vk::MemoryProperties2*)>(
        "vkGetPhysicalDeviceMemoryProperties2");
    if (query == nullptr || properties.api_version < vk::kVersion11) return {};
    vk::MemoryBudget budget = {};
    budget.type = vk::kMemoryBudget;
    vk::MemoryProperties2 memory = {};
    memory.type = vk::kMemoryProperties2;
    const bool has_budget = loader->HasBudget(device);
    if (has_budget) memory.next = &budget;
    query(device, &memory);
    DeviceMemory found;
    for (uint32_t i = 0; i < memory.properties.heap_count && i < vk::kMostHeaps; ++i) {
      const vk::Heap& heap = memory.properties.heaps[i];
      // The smaller heaps of a GPU are parts of the largest that the host can see, too.
      if (!(heap.flags & vk::kDeviceLocalHeap) || heap.size <= found.total) continue;
      found.total = heap.size;
      found.available = 0;
      if (has_budget && budget.budget[i] > budget.usage[i]) {
        found.available = budget.budget[i] - budget.usage[i];
      }
    }
    return found;
  }
  return {};
}

}  // namespace mlcawq

#endif  // _WIN32
