// A way back from wgpu-native's panics.
//
// wgpu-native reports errors to the device's callback, except in the calls that submit, wait and
// map: what fails there, above all a device that was lost, is a panic, which may not leave a C
// function and so ends the process by abort(). A program that serves other things as well has to
// outlive its GPU. So these few calls are made under a handler of SIGABRT that jumps back here.
// Whatever wgpu-native held at that moment stays locked: the device must not be used again.
#ifndef MLCAWQ_WGPU_GUARD_H_
#define MLCAWQ_WGPU_GUARD_H_

#include <csetjmp>
#include <csignal>

namespace mlcawq {

// Puts the handler in place. Aborts of other origin go to the handler that was there before.
void InstallAbortHandler();

#ifdef _WIN32

template <typename Call>
bool Survives(Call call) {
  call();
  return true;
}

#else

extern thread_local sigjmp_buf* way_back_from_abort;
// After the jump: the handler's signal is blocked still.
void UnblockAbort();

// Makes `call`, which must be one call of wgpu-native and own nothing. False when it panicked.
template <typename Call>
bool Survives(Call call) {
  sigjmp_buf here;
  if (sigsetjmp(here, /*savemask=*/0) != 0) {
    way_back_from_abort = nullptr;
    UnblockAbort();
    return false;
  }
  way_back_from_abort = &here;
  call();
  way_back_from_abort = nullptr;
  return true;
}

#endif

}  // namespace mlcawq

#endif  // MLCAWQ_WGPU_GUARD_H_
