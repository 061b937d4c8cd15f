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

// n / d by a multiplication: a division by a number that the compiler does not know takes 20 instructions. n < 2^31.
struct Divisor {
  uint32_t multiplier = 1u << 31 | 1, shift = 31;

  Divisor() = default;
  explicit Divisor(uint32_t d) {
    uint32_t log = 0;
    while ((uint64_t(1) << log) < d) ++log;
    shift = 31 + log;
    multiplier = uint32_t((uint64_t(1) << shift) / d + 1);
  }
  IABN_HOST_DEVICE uint32_t divide(uint32_t n) const { return uint32_t((uint64_t(n) * multiplier) >> shift); }
};

// The sizes that all operands share. With `rows` the channel is contiguous and outer is 1: `inner` rows of channels, as
// in channels_last. Without it the inner dimension is contiguous, and each channel has `outer` runs of it, as in NCHW.
struct Extent {
  int64_t outer = 1, channels = 0, inner = 1;
  bool rows = false;
  int64_t begin = 0, end = 0;  // the channels that a launch works on
  int64_t run = 1;             // vectors of a run of planes
  Divisor by_run;

  IABN_HOST_DEVICE int64_t per_channel() const { return outer * inner; }
  void set_width(int64_t width) {
    run = rows ? 1 : inner / width;
    by_run = Divisor(uint32_t(run));
  }
};

// Per-channel values in any dtype, or none.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride = 1;
};

// The same, to be written.
struct Output {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride = 1;
};

struct AffineVectors {
  Vector weight, bias;
  double eps;
  bool signed_scale;
};

// What the statistics of a batch become: running += momentum·(batch − running), with var·correction.
struct StatisticsOutputs {
  Output mean, var, running_mean, running_var;
  int64_t* num_batches = nullptr;
  double momentum = 0, correction = 1;
};

// What the sums of a backward pass become. dγ/dweight is the sign of the weight unless the scale is signed.
struct SumsOutputs {
  Output sum_dz, sum_dz_xhat;  // of the accumulate type
  Output d_weight, d_bias;
};

struct ForwardOperands {
  StridedTensor x, residual, y;
};

// `kept` is y, or with from_input x; there is no residual then.
struct BackwardOperands {
  StridedTensor kept, dy, residual, dx, dz;
};

struct Device {
  int64_t index, processors;  // processors: multiprocessors
  int64_t shared_bytes;       // of shared memory that one block can have
  int64_t cache_bytes;        // of the L2 cache
};

// How a tensor is split. A block has x·y threads and works on one tile and one part:
//   planes  tile = one channel;                 part = a share of its vectors of `width` elements
//   rows    tile = x·width adjacent channels;   part = a share of the rows, of which a block reads y at once
// A kernel takes as many parts, up to `most_parts`, as fit on the device at once.
struct Plan {
  int64_t width = 1, x = 1, y = 1, tiles = 1, most_parts = 1;
};

constexpr int64_t kBlockThreads = 256;      // at most; more would leave a thread too few registers
constexpr int64_t kBlocksPerProcessor = 8;  // of so many threads, at most
#ifndef IABN_READS_PER_THREAD
#define IABN_READS_PER_THREAD 4
#endif
#ifndef IABN_CACHE_PERCENT
#define IABN_CACHE_PERCENT 0
#endif
constexpr int64_t kStaticShared = 2048;  // bytes that a fused block has beside its channel, the device's own included
// At least, before a channel is split: the partial results cost memory too.
constexpr int64_t kReadsPerThread = IABN_READS_PER_THREAD;
// Of the L2 cache, for a group of channels whose second pass follows its first, so that it finds it there; 0: no groups.
constexpr int64_t kCachePercent = IABN_CACHE_PERCENT;

// `alignment`: the largest power of two, up to 16, that divides every address a vector could start at, in bytes.
inline Plan make_plan(const Extent& s, int64_t element_bytes, int64_t alignment, const Device& device) {
  Plan plan;
  int64_t most = 16 / element_bytes, along = s.rows ? s.channels : s.inner;
  // The widths that are compiled: 16 bytes, one element, and 8 bytes of halves, since runs are often 14·14 long.
  for (int64_t width : {most, int64_t(element_bytes == 2 ? 4 : 1), int64_t(1)}) {
    plan.width = width;
    if (width * element_bytes <= alignment && along % width == 0) break;
  }
  int64_t reads;
  if (s.rows) {
    int64_t vectors = (s.end - s.begin) / plan.width;
    while (plan.x < 32 && plan.x < vectors) plan.x *= 2;
    plan.y = kBlockThreads / plan.x;
    plan.tiles = (vectors + plan.x - 1) / plan.x;
    reads = (s.inner + plan.y - 1) / plan.y;
  } else {
    plan.x = kBlockThreads;
    plan.tiles = s.end - s.begin;
    reads = (s.per_channel() / plan.width + plan.x - 1) / plan.x;
  }
  int64_t room = std::min<int64_t>(kBlocksPerProcessor * device.processors / std::max<int64_t>(plan.tiles, 1), 1024);
  plan.most_parts = std::clamp<int64_t>((reads + kReadsPerThread - 1) / kReadsPerThread, 1, std::max<int64_t>(room, 1));
  return plan;
}

// Bytes of shared memory for `tensors` copies of a channel, or 0 if a kernel per pass is better: a multiprocessor should
// have room for two blocks, one to read while the other writes, and there should be a block for most of them.
inline int64_t fused_bytes(const Extent& s, int64_t element_bytes, int64_t tensors, const Device& device) {
  int64_t bytes = s.per_channel() * element_bytes * tensors;
  bool fits = !s.rows && 2 * (bytes + kStaticShared) <= device.shared_bytes && 2 * s.channels >= device.processors;
  return fits ? bytes : 0;
}

// The channels of a group whose `tensors` operands fit into the chosen part of the L2 cache; all of them without groups.
inline int64_t channels_of_group(const Extent& s, int64_t element_bytes, int64_t tensors, const Device& device) {
  int64_t bytes = s.per_channel() * element_bytes * tensors;  // of a channel
  int64_t fit = device.cache_bytes * kCachePercent / 100 / std::max<int64_t>(bytes, 1);
  // In rows a group must be wide enough for whole lines of the cache.
  if (s.rows) fit = fit / 64 * 64;
  return kCachePercent == 0 || fit == 0 || fit > s.channels ? s.channels : fit;
}

// What a launch works with. `partial` holds 3·most_parts·channels values of the accumulate type, and `arrived` a zero for
// each tile, which is zero again afterwards; both null with `fused_bytes`.
struct Launch {
  Extent shape;
  Plan plan;
  Device device;
  void* stream;
  void* partial;
  unsigned* arrived;
  int64_t fused_bytes;  // of shared memory in which a block keeps its channel, or 0 for a kernel per pass
};

// The launchers for one dtype. Nothing waits for the device.
struct Launchers {
  void (*statistics)(const Launch&, StridedTensor x, const StatisticsOutputs&);
  void (*normalize)(const Launch&, const ActivationOptions&, const AffineVectors&, const ForwardOperands&, Vector mean,
                    Vector var);
  // Statistics and normalisation in one, a channel kept in shared memory; needs fused_bytes.
  void (*fused_forward)(const Launch&, const ActivationOptions&, const AffineVectors&, const ForwardOperands&,
                        const StatisticsOutputs&);
  // mean and var with from_input only.
  void (*gradient_sums)(const Launch&, const ActivationOptions&, const AffineVectors&, const BackwardOperands&,
                        Vector mean, Vector var, const SumsOutputs&);
  // mean_dz and mean_dz_xhat without data in eval mode; they are multiplied with `share`. mean with from_input only.
  void (*input_gradient)(const Launch&, const ActivationOptions&, const AffineVectors&, const BackwardOperands&,
                         Vector mean, Vector var, Vector mean_dz, Vector mean_dz_xhat, double share);
  void (*fused_backward)(const Launch&, const ActivationOptions&, const AffineVectors&, const BackwardOperands&,
                         Vector mean, Vector var, const SumsOutputs&);
  // running += momentum·(batch − running) for both; `channels` values.
  void (*update_statistics)(const Launch&, Vector mean, Vector var, const StatisticsOutputs&);
};

extern const Launchers k_f32, k_f64, k_bf16, k_f16;

}  // namespace iabn::cuda
