// Between iabn_cuda.cpp, which knows torch, and iabn_cuda_kernels.cu, which is compiled once per dtype and knows memory
// and streams only.
#pragma once

#include <algorithm>

#include "iabn.h"

namespace iabn::cuda {

// One tensor as (outer, channel, inner); strides in elements.
struct StridedTensor {
  void* data = nullptr;
  int64_t outer = 0, channel = 0, inner = 0;
};

// The sizes that all operands share. With `rows` the channel is contiguous and outer is 1: `inner` rows of channels, as
// in channels_last. Without it the inner dimension is contiguous, and each channel has `outer` runs of it, as in NCHW.
struct Extent {
  int64_t outer = 1, channels = 0, inner = 1;
  bool rows = false;

  IABN_HOST_DEVICE int64_t per_channel() const { return outer * inner; }
};

// Per-channel values in any dtype.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride = 1;
};

struct AffineVectors {
  Vector weight, bias;
  double eps;
  bool signed_scale;
};

struct Device {
  int64_t processors;    // multiprocessors
  int64_t shared_bytes;  // of shared memory that one block can have
};

// How a tensor is split. A block has x·y threads and works on one tile and one part:
//   planes  tile = one channel;                 part = a share of its vectors of `width` elements
//   rows    tile = x·width adjacent channels;   part = a share of the rows, of which a block reads y at once
struct Plan {
  int64_t width = 1, x = 1, y = 1, tiles = 1, parts = 1;
};

constexpr int64_t kBlockThreads = 256;  // at most; more would leave a thread too few registers
#ifndef IABN_BLOCKS_PER_PROCESSOR
#define IABN_BLOCKS_PER_PROCESSOR 4
#endif
#ifndef IABN_READS_PER_THREAD
#define IABN_READS_PER_THREAD 4
#endif
constexpr int64_t kBlocksPerProcessor = IABN_BLOCKS_PER_PROCESSOR;  // as many as registers allow the kernels for rows
constexpr int64_t kStaticShared = 2048;  // bytes that a fused block has beside its channel, the device's own included
// At least, before a channel is split: the partial results cost memory too.
constexpr int64_t kReadsPerThread = IABN_READS_PER_THREAD;

// `alignment`: the largest power of two, up to 16, that divides every address a vector could start at, in bytes.
inline Plan make_plan(const Extent& s, int64_t element_bytes, int64_t alignment, const Device& device) {
  Plan plan;
  int64_t most = 16 / element_bytes, along = s.rows ? s.channels : s.inner;
  // The widths that are compiled: 16 bytes, one element, and 8 bytes of halves, since runs are often 14·14 long.
  for (int64_t width : {most, int64_t(element_bytes == 2 ? 4 : 1), int64_t(1)}) {
    plan.width = width;
    if (width * element_bytes <= alignment && along % width == 0) break;
  }
  auto split = [&](int64_t reads, int64_t threads) {
    int64_t wanted = (kBlocksPerProcessor * device.processors + plan.tiles - 1) / plan.tiles;
    int64_t most_parts = (reads + threads * kReadsPerThread - 1) / (threads * kReadsPerThread);
    return std::clamp<int64_t>(std::min(wanted, most_parts), 1, 1024);
  };
  if (s.rows) {
    int64_t vectors = s.channels / plan.width;
    while (plan.x < 32 && plan.x < vectors) plan.x *= 2;
    plan.y = kBlockThreads / plan.x;
    plan.tiles = (vectors + plan.x - 1) / plan.x;
    plan.parts = split(s.inner, plan.y);
  } else {
    plan.x = kBlockThreads;
    plan.tiles = s.channels;
    plan.parts = split(s.per_channel() / plan.width, plan.x);
  }
  return plan;
}

// Bytes of shared memory for `tensors` copies of a channel, or 0 if a kernel per pass is better: a multiprocessor should
// have room for two blocks, one to read while the other writes, and there should be a block for most of them.
inline int64_t fused_bytes(const Extent& s, int64_t element_bytes, int64_t tensors, const Device& device) {
  int64_t bytes = s.per_channel() * element_bytes * tensors;
  bool fits = !s.rows && 2 * (bytes + kStaticShared) <= device.shared_bytes && 2 * s.channels >= device.processors;
  return fits ? bytes : 0;
}

// What a launch works with. `partial` holds 3·parts·channels values of the accumulate type; null with `fused_bytes`.
struct Launch {
  Extent shape;
  Plan plan;
  void* partial;
  int64_t fused_bytes;  // of shared memory in which a block keeps its channel, or 0 for a kernel per pass
  void* stream;
};

// The launchers for one dtype. Means, variances and sums are contiguous vectors of the accumulate type. What a launcher
// writes: y, mean and var; dx, dz (unless it has no data), sum_dz and sum_dz_xhat. Nothing waits for the device.
struct Launchers {
  void (*statistics)(const Launch&, StridedTensor x, void* mean, void* var);
  void (*normalize)(const Launch&, const ActivationOptions&, const AffineVectors&, StridedTensor x,
                    StridedTensor residual, StridedTensor y, Vector mean, Vector var);
  // Statistics and normalisation in one, a channel kept in shared memory; needs fused_bytes.
  void (*fused_forward)(const Launch&, const ActivationOptions&, const AffineVectors&, StridedTensor x,
                        StridedTensor residual, StridedTensor y, void* mean, void* var);
  void (*gradient_sums)(const Launch&, const ActivationOptions&, const AffineVectors&, StridedTensor y,
                        StridedTensor dy, StridedTensor residual, void* sum_dz, void* sum_dz_xhat);
  // mean_dz and mean_dz_xhat without data in eval mode; they are multiplied with `share`.
  void (*input_gradient)(const Launch&, const ActivationOptions&, const AffineVectors&, StridedTensor y,
                         StridedTensor dy, StridedTensor residual, StridedTensor dx, StridedTensor dz, Vector var,
                         Vector mean_dz, Vector mean_dz_xhat, double share);
  void (*fused_backward)(const Launch&, const ActivationOptions&, const AffineVectors&, StridedTensor y,
                         StridedTensor dy, StridedTensor residual, StridedTensor dx, StridedTensor dz, Vector var,
                         void* sum_dz, void* sum_dz_xhat);
};

extern const Launchers k_f32, k_f64, k_bf16, k_f16;

}  // namespace iabn::cuda
