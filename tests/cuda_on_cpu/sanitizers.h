// Tells AddressSanitizer and ThreadSanitizer of fibers. Without them all of this does nothing.
//
// To ThreadSanitizer a fiber is a thread, although only one runs at a time: two accesses to the same memory, one of
// them a write, are a race unless __syncthreads or __syncwarp puts them in order. A shuffle orders no memory.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_write_range(void* data, size_t bytes);
}
#endif

namespace cuda_on_cpu {

struct SanitizedFiber {
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer, while the fiber does not run
  void* thread = nullptr;      // of ThreadSanitizer

  // Before its first run on this stack, and again if it was left in the middle of a run.
  void start() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(stack, stack_bytes);
    fake_stack = nullptr;
#endif
#ifdef __SANITIZE_THREAD__
    if (thread != nullptr) __tsan_destroy_fiber(thread);
    thread = __tsan_create_fiber(0);
#endif
  }

  // The fiber is the thread that calls.
  void adopt() {
#ifdef __SANITIZE_THREAD__
    thread = __tsan_get_current_fiber();
#endif
  }

  void leave_for(const SanitizedFiber& next) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack, next.stack, next.stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(next.thread, __tsan_switch_to_fiber_no_sync);
#endif
  }

  void arrive_from(SanitizedFiber& left) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &left.stack, &left.stack_bytes);
#endif
  }
};

// While one of these lives, reads and writes of the fiber belong to the scheduler and are no race.
struct Scheduling {
  Scheduling() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Scheduling() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
};

// A place where fibers meet again and again. All that fibers do before arrive() comes before all they do after leave().
// Meetings take two addresses in turn, because one fiber may arrive at the next before another has left this one.
class Meeting {
 public:
  void arrive(unsigned turn) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(&turns_[turn % 2]);
#endif
  }
  void leave(unsigned turn) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(&turns_[turn % 2]);
#endif
  }

 private:
  char turns_[2];
};

}  // namespace cuda_on_cpu
