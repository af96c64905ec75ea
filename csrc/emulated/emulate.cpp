#include "cuda/emulate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace htf::emulate {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr int kLanes = 32;

#ifdef __x86_64__

// Saves what a function call leaves to the callee, and goes on where the other stack left off.
extern "C" void htf_switch_stack(void** from, void* to);
asm(R"(
  .text
  .type htf_switch_stack, @function
htf_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size htf_switch_stack, . - htf_switch_stack
)");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + kStack) & ~std::uintptr_t{15};
    // As after a call: the return address lies 8 bytes off a boundary of 16.
    void** at = reinterpret_cast<void**>(top) - 2;
    *at = reinterpret_cast<void*>(entry);
    at -= 6;
    std::fill_n(at, 6, nullptr);
    stack_pointer = at;
  }
  static void go(Context& from, Context& to) {
    htf_switch_stack(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

enum class State { ready, at_block, at_warp, done };

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  bool valid;
  void now() const {
    if (valid) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
};

struct Fiber {
  Context context;
  State state;
  Place place;
  int predicate;
  unsigned exchanges;
  std::vector<Copy> copies;               // of the open group
  std::vector<std::vector<Copy>> groups;  // closed, oldest first
};

struct Machine {
  Order order = Order::forward;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber> fibers;
  std::vector<Registers> slots;  // [warp][2][lane]
  Context scheduler;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  void* shared = nullptr;
  int any = 0;
};

Machine& machine() {
  static thread_local Machine m;
  return m;
}

void entry() {
  Machine& m = machine();
  (*m.kernel)();
  m.running->state = State::done;
  Context::go(m.running->context, m.scheduler);
  std::abort();  // nobody goes on with a fiber that is done
}

void wait(State state) {
  Machine& m = machine();
  Fiber& self = *m.running;
  self.state = state;
  Context::go(self.context, m.scheduler);
}

// Runs a warp until all its lanes wait for the block or are done.
void run_warp(Machine& m, int warp) {
  for (;;) {
    int ready = 0, at_warp = 0;
    for (int i = 0; i < kLanes; ++i) {
      const int lane = m.order == Order::forward ? i : kLanes - 1 - i;
      Fiber& f = m.fibers[warp * kLanes + lane];
      if (f.state == State::ready) {
        m.running = &f;
        Context::go(m.scheduler, f.context);
        ++ready;
      }
    }
    for (int i = 0; i < kLanes; ++i) at_warp += m.fibers[warp * kLanes + i].state == State::at_warp;
    if (at_warp == kLanes) {
      for (int i = 0; i < kLanes; ++i) m.fibers[warp * kLanes + i].state = State::ready;
    } else if (at_warp > 0) {
      throw std::runtime_error(
          "emulated kernel: a warp waits for lanes that have ended or wait for the block");
    } else if (ready == 0) {
      return;
    }
  }
}

void run_block(Machine& m, dim3 grid, dim3 block, dim3 at) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    const unsigned u = static_cast<unsigned>(i);
    f.state = State::ready;
    f.place = {dim3(u % block.x, u / block.x % block.y, u / (block.x * block.y)), at, block, grid};
    f.exchanges = 0;
    f.copies.clear();
    f.groups.clear();
#ifdef __SANITIZE_ADDRESS__
    // A fiber leaves its functions' marks behind: it never returns from the first, and after an
    // error from none.
    __asan_unpoison_memory_region(m.stacks[i].get(), kStack);
#endif
    f.context.prepare(m.stacks[i].get(), entry);
  }
  const int warps = threads / kLanes;
  for (;;) {
    int waiting = 0, any = 0;
    for (int w = 0; w < warps; ++w) run_warp(m, m.order == Order::forward ? w : warps - 1 - w);
    for (int i = 0; i < threads; ++i)
      if (m.fibers[i].state == State::at_block) {
        ++waiting;
        any |= m.fibers[i].predicate;
        m.fibers[i].state = State::ready;
      }
    if (waiting == 0) return;
    m.any = any;
  }
}

}  // namespace

void set_order(Order order) { machine().order = order; }
Order order() { return machine().order; }

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kLanes != 0)
    throw std::runtime_error(
        "emulated kernel: a block must have whole warps and at most 1024 "
        "threads, got " +
        std::to_string(threads));
  if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu || block.z > 64)
    throw std::runtime_error("emulated kernel: a grid is larger than a GPU takes");
  while (m.stacks.size() < threads) m.stacks.emplace_back(new char[kStack]);
  if (m.fibers.size() < threads) m.fibers.resize(threads);
  m.slots.resize(threads * 2);
  m.kernel = &kernel;
  const std::int64_t blocks = std::int64_t{grid.x} * grid.y * grid.z;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t b = m.order == Order::forward ? i : blocks - 1 - i;
    void* shared = nullptr;
    if (shared_bytes > 0 && posix_memalign(&shared, 128, shared_bytes) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> given_back(shared, std::free);
    if (shared != nullptr) std::memset(shared, 0xff, shared_bytes);
    m.shared = shared;
    const auto x = static_cast<unsigned>(b % grid.x),
               y = static_cast<unsigned>(b / grid.x % grid.y),
               z = static_cast<unsigned>(b / (std::int64_t{grid.x} * grid.y));
    run_block(m, grid, block, dim3(x, y, z));
  }
}

const Place& here() { return machine().running->place; }
void* shared() { return machine().shared; }

int lane() { return static_cast<int>(machine().running - machine().fibers.data()) % kLanes; }

void block_barrier() {
  machine().running->predicate = 0;
  wait(State::at_block);
}

int block_or(int predicate) {
  machine().running->predicate = predicate != 0;
  wait(State::at_block);
  return machine().any;
}

void warp_barrier() { wait(State::at_warp); }

const Registers* exchange(const Registers& mine) {
  Machine& m = machine();
  const auto self = static_cast<std::size_t>(m.running - m.fibers.data());
  const std::size_t half = m.running->exchanges++ % 2;
  Registers* slots = m.slots.data() + self / kLanes * 2 * kLanes + half * kLanes;
  slots[self % kLanes] = mine;
  wait(State::at_warp);
  return slots;
}

void copy_async(void* to, const void* from, std::size_t bytes, bool valid) {
  const auto aligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
  };
  if (!aligned(to) || (valid && !aligned(from))) {
    std::fputs("emulated kernel: an asynchronous copy is not aligned to its size\n", stderr);
    std::abort();
  }
  const Copy copy{to, from, bytes, valid};
  if (machine().order == Order::backward) {
    copy.now();
  } else {
    machine().running->copies.push_back(copy);
  }
}

void copy_commit() {
  Fiber& self = *machine().running;
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void copy_wait(int pending) {
  std::vector<std::vector<Copy>>& groups = machine().running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) copy.now();
    groups.erase(groups.begin());
  }
}

}  // namespace htf::emulate

namespace htf::gpu {
namespace {

struct Operands {
  uint32_t a[4], b[2];
};

const emulate::Registers* operands(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  return emulate::exchange(emulate::packed(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}));
}

float tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }
float bf16(uint32_t pair, int half) {
  return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000u);
}

// Tensor cores add a few products (an A100: four in TF32, eight in bfloat16) to the sum at once and
// cut off what is beyond a float, where the CPU would round.
float cut_off(double exact) {
  const float near = static_cast<float>(exact);
  return std::isfinite(near) && std::abs(near) > std::abs(exact) ? std::nextafter(near, 0.0f)
                                                                 : near;
}

}  // namespace

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulate::Registers* all = operands(a, b);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 8; k += 4) {
      double sum = d[i];
      for (int e = 0; e < 4; ++e) {
        const uint32_t x = all[row % 8 * 4 + e].r[row / 8 + k / 4 * 2];
        const uint32_t y = all[col * 4 + e].r[4 + k / 4];
        sum += static_cast<double>(tf32(x)) * tf32(y);
      }
      d[i] = cut_off(sum);
    }
  }
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulate::Registers* all = operands(a, b);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 16; k += 8) {
      double sum = d[i];
      for (int e = 0; e < 8; ++e) {
        const uint32_t x = all[row % 8 * 4 + e / 2].r[row / 8 + k / 8 * 2];
        const uint32_t y = all[col * 4 + e / 2].r[4 + k / 8];
        sum += static_cast<double>(bf16(x, e % 2)) * bf16(y, e % 2);
      }
      d[i] = cut_off(sum);
    }
  }
}

void mma_f64(double (&d)[2], double a, double b) {
  struct Pair {
    double a, b;
  };
  const emulate::Registers* all = emulate::exchange(emulate::packed(Pair{a, b}));
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 4; ++k)
      d[i] += emulate::unpacked<Pair>(all[g * 4 + k]).a *
              emulate::unpacked<Pair>(all[(2 * t + i) * 4 + k]).b;
}

}  // namespace htf::gpu
