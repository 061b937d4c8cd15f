// What iabn_cuda_kernels.cu needs from CUDA; the tests have a header of the same names that runs it on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "iabn.h"

#define IABN_DEVICE __device__ __forceinline__

// `name` points to room for n items, shared by the threads of a block and not initialised.
#define IABN_SHARED(Item, name, n)                                         \
  __shared__ __align__(16) unsigned char name##_bytes[(n) * sizeof(Item)]; \
  Item* name = reinterpret_cast<Item*>(name##_bytes)

// `name` points to the shared memory whose size is given at launch.
#define IABN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// clang-format off: it takes the launch for comparisons
#define IABN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                             \
  (void((kernel)<<<grid, block, size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)),       \
   iabn::cuda::check(cudaGetLastError()))
// clang-format on

namespace iabn::cuda {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would report it again
  throw std::runtime_error(std::string("iabn_hub: CUDA: ") + cudaGetErrorString(error));
}

// What is asked of the driver once per kernel and device, since each question takes as long as a launch.
template <typename Kernel, typename Ask>
int64_t once(Kernel* kernel, int64_t device, Ask ask) {
  thread_local std::map<std::pair<const void*, int64_t>, int64_t> answers;
  std::pair<const void*, int64_t> key{reinterpret_cast<const void*>(kernel), device};
  auto found = answers.find(key);
  return found != answers.end() ? found->second : answers[key] = ask();
}

// A block may have more than 48 KiB of shared memory, its static part included, only if the kernel says so beforehand.
template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t device, int64_t bytes) {
  once(kernel, device, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    return bytes;
  });
}

// How many blocks of so many threads one multiprocessor runs at once.
template <typename Kernel>
int64_t blocks_per_processor(Kernel* kernel, int64_t device, int64_t threads) {
  return once(kernel, device, [&] {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(threads), 0));
    return int64_t(blocks);
  });
}

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
  using type = __nv_bfloat16;
  using wide = float;
};
template <>
struct Storage<Dtype::f16> {
  using type = __half;
  using wide = float;
};

IABN_DEVICE float widen(float v) { return v; }
IABN_DEVICE double widen(double v) { return v; }
IABN_DEVICE float widen(__half v) { return __half2float(v); }
IABN_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, typename A>
IABN_DEVICE T narrow(A v) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
  else return v;
}

// What a vector of so many bytes is loaded into and stored from: one access, which the compiler would not make of a struct
// of elements.
template <int bytes>
struct Register;
template <>
struct Register<16> {
  using type = uint4;
};
template <>
struct Register<8> {
  using type = uint2;
};
template <>
struct Register<4> {
  using type = unsigned;
};
template <>
struct Register<2> {
  using type = unsigned short;
};

template <typename R>
IABN_DEVICE R read_vector(const void* from) {
  return *static_cast<const R*>(from);
}

template <typename R>
IABN_DEVICE void write_vector(void* to, const R& raw) {
  __stcg(static_cast<R*>(to), raw);
}

// What another block has written: not from the L1 cache, which may hold what stood there before.
IABN_DEVICE float read_through(const float* from) { return __ldcg(from); }
IABN_DEVICE double read_through(const double* from) { return __ldcg(from); }

IABN_DEVICE void write_before_others() { __threadfence(); }

// Counts up to `last` and then starts again at 0; what it was before.
IABN_DEVICE unsigned count_up(unsigned* counter, unsigned last) { return atomicInc(counter, last); }

template <typename A>
IABN_DEVICE A shuffle_xor(A v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

}  // namespace iabn::cuda
