// The definitions of interrupt.h and what only they and the code that starts threads need. Included
// by one source of each module.
//
// Python runs the handler of a signal between two of its own instructions, and a call into C++ is
// one instruction. So the thread that made the call lets Python run handlers every tenth of a
// second. Where one of them raises an exception, all threads of the call stop where they next say
// what they have worked, and the caller gets the exception, the same object.
#pragma once

#include <Python.h>
#include <pybind11/detail/common.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <exception>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include "interrupt.h"

namespace htf {

constinit thread_local Worker worker;

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  const PyGILState_STATE state_;
};

// A Python exception on its way through C++. The bindings of PyTorch are pybind11's, as ours are:
// where they hand over to Python, they call set_error. Anybody else takes it for a runtime_error.
class Raised : public pybind11::builtin_exception {
 public:
  // Takes the exception that is set. The caller has the GIL.
  Raised() : builtin_exception("htfkernels: ended by an exception of Python") {
    PyObject *type, *value, *traceback;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // their successors are not in 3.10
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
#pragma GCC diagnostic pop
    if (traceback != nullptr) PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    value_ = std::shared_ptr<PyObject>(value, [](PyObject* last) {
      const Gil gil;
      Py_XDECREF(last);
    });
  }
  void set_error() const override {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value_.get())), value_.get());
  }

 private:
  std::shared_ptr<PyObject> value_;
};

// Threads that share out the work of a call. The first exception of any of them ends the others.
class Crew {
 public:
  // Runs f in this thread; caller: whether it is the one that made the call.
  template <class F>
  void run(bool caller, const F& f) {
    const Worker before = worker;
    worker.crew = this;
    worker.asks_python = caller && before.asks_python;
    try {
      f();
    } catch (const Stopped&) {
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (failure_ == nullptr) failure_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
    worker = before;
  }
  // Throws what ended a thread: when all of them are done.
  void finish() const {
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  friend void look_up();
  struct Stopped {};  // thrown where another thread has failed

  std::mutex mutex_;
  std::exception_ptr failure_;
  std::atomic<bool> failed_{false};
};

// Milliseconds since some start. A coarse clock costs a fifth of a fine one.
inline int64_t clock_in_milliseconds() {
#if defined(CLOCK_MONOTONIC_COARSE)
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1000000;
#else
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
#endif
}

// Whether this is the process's first thread: Python runs handlers in no other. The one thread of a
// process that was forked is its first.
inline bool is_first_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
  return pthread_main_np() != 0;
#else
  return true;
#endif
}

void look_up() {
  constexpr int64_t kBetweenLooks = 1 << 20;  // multiply-adds: tens of microseconds
  constexpr int64_t kBetweenQuestions = 100;  // milliseconds: whoever asks waits for the GIL
  thread_local int64_t next_question = 0;
  worker.left = kBetweenLooks;
  if (worker.crew != nullptr && worker.crew->failed_.load(std::memory_order_relaxed))
    throw Crew::Stopped();
  if (!worker.asks_python) return;
  const int64_t now = clock_in_milliseconds();
  if (now < next_question) return;
  next_question = now + kBetweenQuestions;
  if (!is_first_thread()) return;
  const Gil gil;
  // A handler may call operators itself, which have crews of their own.
  Crew* const crew = std::exchange(worker.crew, nullptr);
  const bool raised = PyErr_CheckSignals() != 0;
  worker.crew = crew;
  if (raised) throw Raised();
}

}  // namespace htf
