#include "cuda_graph.h"

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <map>
#include <utility>
#include <vector>

namespace emulator {

namespace ffi = tvm::ffi;

namespace {

using Operations = std::vector<std::function<void()>>;

Operations* capture;  // null outside of captures

struct Graph {
  ffi::ObjectRef function;  // held, so that its address stays its own
  ffi::Any result;
  Operations operations;
};

// A captured function belongs to one virtual machine; one graph for each value of its shapes.
using GraphKey = std::pair<const ffi::Object*, std::vector<int64_t>>;
// Never destroyed: at the process's end TVM is gone before they would be.
auto& graphs = *new std::map<GraphKey, Graph>;

struct Allocation {
  ffi::ObjectRef function;
  ffi::Any result;
};
auto& allocations = *new std::map<const ffi::Object*, Allocation>;

ffi::Any invoke(ffi::AnyView machine, ffi::AnyView closure, const ffi::Array<ffi::Any>& arguments) {
  static ffi::Function invoke_closure =
      ffi::Function::GetGlobalRequired("vm.builtin.invoke_closure");
  std::vector<ffi::AnyView> views{machine, closure};
  for (const ffi::Any& argument : arguments) views.push_back(argument);
  ffi::Any result;
  invoke_closure.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  return result;
}

// (machine, function, its arguments, index[, shape])
void run_or_capture(ffi::PackedArgs arguments, ffi::Any* result) {
  auto function = arguments[1].cast<ffi::ObjectRef>();
  GraphKey key{function.get(), {}};
  if (arguments.size() == 5) {
    for (int64_t value : arguments[4].cast<ffi::Shape>()) key.second.push_back(value);
  }
  auto found = graphs.find(key);
  if (found == graphs.end()) {
    auto values = arguments[2].cast<ffi::Array<ffi::Any>>();
    // First without a capture, so that what is allocated or loaded once is there.
    *result = invoke(arguments[0], arguments[1], values);
    Graph graph{function, {}, {}};
    struct Capture {
      explicit Capture(Operations* operations) { capture = operations; }
      ~Capture() { capture = nullptr; }
    };
    {
      Capture scope(&graph.operations);
      graph.result = invoke(arguments[0], arguments[1], values);
    }
    *result = graph.result;
    graphs.emplace(std::move(key), std::move(graph));
    return;
  }
  for (const auto& operation : found->second.operations) operation();
  *result = found->second.result;
}

// (machine, function, index)
void get_cached_alloc(ffi::PackedArgs arguments, ffi::Any* result) {
  auto function = arguments[1].cast<ffi::ObjectRef>();
  auto found = allocations.find(function.get());
  if (found == allocations.end()) {
    Allocation made{function, invoke(arguments[0], arguments[1], {})};
    found = allocations.emplace(function.get(), std::move(made)).first;
  }
  *result = found->second.result;
}

}  // namespace

bool is_capturing() { return capture != nullptr; }

void record(std::function<void()> operation) { capture->push_back(std::move(operation)); }

void refuse_during_capture(const char* what) {
  if (capture) TVM_FFI_THROW(RuntimeError) << what << " while a CUDA graph is captured";
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("cuda_emulator.vm.builtin.cuda_graph.run_or_capture", run_or_capture)
      .def_packed("cuda_emulator.vm.builtin.cuda_graph.get_cached_alloc", get_cached_alloc)
      .def("cuda_emulator.forget_graphs", [] {
        graphs.clear();
        allocations.clear();
      });
}

}  // namespace emulator
