// CUDA graphs as Relax's virtual machine uses them: a function's launches are recorded once, with
// the values their arguments have then, and replayed from then on without running the function.
#pragma once

#include <functional>

namespace emulator {

// Between begin and end of a capture nothing runs on the device.
bool is_capturing();
void record(std::function<void()> operation);
// For what the CUDA runtime refuses during a capture: throws RuntimeError.
void refuse_during_capture(const char* what);

}  // namespace emulator
