// Runs csrc/iabn_cuda_kernels.cu on the host: what iabn_cuda_device.h is on a GPU, under the same names.
//
// Blocks run one after the other, in random order. The threads of a block are fibres, which take turns in random order
// between barriers, so that a missing barrier gives wrong results. Shared memory begins as NaN; threads that wait at
// different barriers, or leave while others wait, end the program with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <type_traits>
#include <vector>

#include "iabn.h"

#define __global__
#define __launch_bounds__(...)
#define IABN_DEVICE inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace on_host {

enum class State { ready, at_block_barrier, at_warp_barrier, finished };

struct Fibre {
  ucontext_t context;  // to begin on a stack of its own; from then on jumps, which need no system call
  jmp_buf here;
  bool begun;
  std::vector<char> stack;
  State state;
  dim3 thread;
  unsigned linear;
};

struct Block {
  dim3 grid, block, index;
  std::vector<Fibre> fibres;
  Fibre* running = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  std::map<const void*, std::vector<char>> shared;  // by variable
  std::vector<char> dynamic_shared;
  unsigned long long lanes[32][32];  // what each lane of a warp offers to a shuffle
};

inline Block* current;
inline std::map<const void*, size_t> allowed;  // dynamic shared memory, by kernel
inline std::mt19937 order{12345};
inline int64_t launches = 0, parts = 0;  // so far; of the last one

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

inline void wait(State state) {
  current->running->state = state;
  if (_setjmp(current->running->here) == 0) _longjmp(current->scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fibre& f) {
  current->running = &f;
  if (_setjmp(current->scheduler) != 0) return;
  if (f.begun) _longjmp(f.here, 1);
  f.begun = true;
  setcontext(&f.context);
}

inline void enter() {
  current->body();
  wait(State::finished);
}

inline void run_block(Block& b) {
  current = &b;
  b.shared.clear();
  std::memset(b.dynamic_shared.data(), 0xff, b.dynamic_shared.size());
  for (Fibre& f : b.fibres) {
    f.state = State::ready;
    f.begun = false;
    makecontext(&f.context, enter, 0);
  }
  std::vector<Fibre*> turns;
  for (Fibre& f : b.fibres) turns.push_back(&f);
  for (;;) {
    std::shuffle(turns.begin(), turns.end(), order);
    bool moved = false;
    for (Fibre* f : turns) {
      if (f->state != State::ready) continue;
      moved = true;
      resume(*f);
    }
    size_t finished = 0, waiting = 0;
    for (const Fibre& f : b.fibres)
      finished += f.state == State::finished, waiting += f.state == State::at_block_barrier;
    if (finished == b.fibres.size()) return;
    for (size_t begin = 0; begin < b.fibres.size(); begin += 32) {  // a warp goes on once all its lanes have arrived
      size_t end = std::min(begin + 32, b.fibres.size()), arrived = 0;
      for (size_t i = begin; i < end; ++i) arrived += b.fibres[i].state == State::at_warp_barrier;
      if (arrived == 0) continue;
      if (arrived == end - begin) {
        for (size_t i = begin; i < end; ++i) b.fibres[i].state = State::ready;
        moved = true;
      } else if (!moved) {
        die("the lanes of a warp part ways around a shuffle");
      }
    }
    if (waiting == b.fibres.size()) {
      for (Fibre& f : b.fibres) f.state = State::ready;
      moved = true;
    } else if (waiting > 0 && waiting + finished == b.fibres.size()) {
      die("some threads have left while others wait in __syncthreads");
    }
    if (!moved) die("threads wait at different barriers");
  }
}

template <typename F>
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, F body) {
  if (grid.y > 65535 || block.x * block.y * block.z > 1024) die("a grid or a block is too large");
  ++launches, parts = grid.y;
  Block b;
  b.grid = grid, b.block = block, b.body = body;
  b.dynamic_shared.resize(shared_bytes);
  b.fibres.resize(size_t(block.x) * block.y * block.z);
  for (unsigned i = 0; i < b.fibres.size(); ++i) {
    b.fibres[i].linear = i;
    b.fibres[i].thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    b.fibres[i].stack.resize(64 << 10);
    getcontext(&b.fibres[i].context);
    b.fibres[i].context.uc_stack.ss_sp = b.fibres[i].stack.data();
    b.fibres[i].context.uc_stack.ss_size = b.fibres[i].stack.size();
    b.fibres[i].context.uc_link = nullptr;
  }
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back(dim3(x, y));
  }
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (dim3 index : blocks) {
    b.index = index;
    run_block(b);
    size_t used = shared_bytes;
    for (const auto& [variable, room] : b.shared) used += room.size();
    if (used > 48 << 10 && allowed[kernel] < shared_bytes) die("more than 48 KiB of shared memory without leave");
  }
}

template <typename T>
T* shared(const void* variable, size_t bytes) {
  std::vector<char>& room = current->shared[variable];
  if (room.empty()) room.assign(bytes, char(0xff));
  return reinterpret_cast<T*>(room.data());
}

}  // namespace on_host

#define threadIdx (on_host::current->running->thread)
#define blockIdx (on_host::current->index)
#define blockDim (on_host::current->block)
#define gridDim (on_host::current->grid)

inline void __syncthreads() { on_host::wait(on_host::State::at_block_barrier); }

#define IABN_SHARED(Item, name, n)       \
  static const char name##_variable = 0; \
  Item* name = on_host::shared<Item>(&name##_variable, (n) * sizeof(Item))
#define IABN_DYNAMIC_SHARED(name) char* name = on_host::current->dynamic_shared.data()
#define IABN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                         \
  on_host::launch(reinterpret_cast<const void*>(kernel), grid, block, size_t(shared_bytes), \
                  [&] { (kernel)(__VA_ARGS__); })

namespace iabn::cuda {

// As on a device: beyond 48 KiB only after this.
template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t, int64_t bytes) {
  on_host::allowed[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
}

template <typename Kernel>
int64_t blocks_per_processor(Kernel*, int64_t, int64_t) {
  return 3;
}

inline float read_through(const float* from) { return *from; }
inline double read_through(const double* from) { return *from; }
inline void write_before_others() {}
inline unsigned count_up(unsigned* counter, unsigned last) {
  unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

struct BFloat16 {
  uint16_t bits;
};

template <Dtype dtype>
struct Storage;
template <>
struct Storage<Dtype::f32> {
  using type = float;
  using wide = float;
};
template <>
struct Storage<Dtype::f64> {
  using type = double;
  using wide = double;
};
template <>
struct Storage<Dtype::bf16> {
  using type = BFloat16;
  using wide = float;
};
template <>
struct Storage<Dtype::f16> {
  using type = _Float16;
  using wide = float;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(_Float16 v) { return float(v); }
inline float widen(BFloat16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <typename T, typename A>
T narrow(A v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return {v != v ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return T(v);
  }
}

template <int bytes>
struct Register {
  struct alignas(bytes) type {
    unsigned char bytes_of[bytes];
  };
};

template <typename Pack>
Pack read_vector(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack))
    on_host::die("a vector is read from an address that does not suit it");
  return *static_cast<const Pack*>(from);
}

template <typename Pack>
void write_vector(void* to, const Pack& pack) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Pack))
    on_host::die("a vector is written to an address that does not suit it");
  *static_cast<Pack*>(to) = pack;
}

template <typename A>
A shuffle_xor(A v, int mask) {
  static_assert(sizeof(A) <= sizeof(on_host::current->lanes[0][0]));
  unsigned warp = on_host::current->running->linear / 32, lane = on_host::current->running->linear % 32;
  std::memcpy(&on_host::current->lanes[warp][lane], &v, sizeof(A));
  on_host::wait(on_host::State::at_warp_barrier);
  std::memcpy(&v, &on_host::current->lanes[warp][lane ^ unsigned(mask)], sizeof(A));
  on_host::wait(on_host::State::at_warp_barrier);
  return v;
}

}  // namespace iabn::cuda
