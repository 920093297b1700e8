#include "guard.h"

namespace mlcawq {

#ifdef _WIN32

void InstallAbortHandler() {}

#else

thread_local sigjmp_buf* way_back_from_abort = nullptr;

namespace {

struct sigaction previous;

void OnAbort(int signal) {
  if (way_back_from_abort != nullptr) siglongjmp(*way_back_from_abort, 1);
  sigaction(signal, &previous, nullptr);
  raise(signal);
}

}  // namespace

void UnblockAbort() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGABRT);
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

void InstallAbortHandler() {
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_handler = OnAbort;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGABRT, &action, &previous) == 0;
  }();
  static_cast<void>(installed);
}

#endif

}  // namespace mlcawq
