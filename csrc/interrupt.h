// How a long call ends early: by Control-C, another signal whose handler raises an exception, or an
// error in one of its threads. Free of PyTorch and Python; interrupt.inl has the definitions.
#pragma once

#include <cstdint>
#include <utility>

namespace htf {

class Crew;  // threads that share out work

// What a thread knows of the call that it works for.
struct Worker {
  int64_t left = 0;         // work until it looks up again
  Crew* crew = nullptr;     // null where it works alone
  bool asks_python = true;  // whether a signal has arrived
};
extern constinit thread_local Worker worker
#if defined(__ELF__)
    __attribute__((tls_model("initial-exec")))
#endif
    ;

// Throws where the call is to end.
void look_up();

// Says that work of about so many multiply-adds is done, and throws where the call is to end: what
// outlives the call must be whole then. A few instructions, and a look at the clock for every so
// many microseconds of work.
inline void worked(int64_t multiply_adds) {
  worker.left -= multiply_adds;
  if (worker.left <= 0) look_up();
}

// While it lives, signals wait: for work on what outlives the call.
class Undisturbed {
 public:
  Undisturbed() : before_(std::exchange(worker.asks_python, false)) {}
  ~Undisturbed() { worker.asks_python = before_; }
  Undisturbed(const Undisturbed&) = delete;
  Undisturbed& operator=(const Undisturbed&) = delete;

 private:
  const bool before_;
};

}  // namespace htf
