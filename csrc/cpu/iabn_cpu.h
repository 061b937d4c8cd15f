// Between iabn_cpu.cpp, which knows torch, and iabn_cpu_kernels.cpp, which is compiled once per instruction set and
// knows numbers only.
#pragma once

#include <initializer_list>

#include "iabn.h"

namespace iabn {

constexpr int kOuter = 4;         // dimensions that may remain beside the channel and the innermost one
constexpr int64_t kBlock = 1024;  // values of one run: 4 KiB in float32, so that five of them fit into the L1 cache

// One tensor as (outer…, channel, inner); strides in elements.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t channel = 0, inner = 0;
  int64_t outer[kOuter] = {};

  explicit operator bool() const { return data != nullptr; }
};

// The sizes that all operands share. With `rows` the channel is innermost in memory, and runs go along it.
struct Shape {
  int64_t channels = 0, inner = 1;
  int64_t outer[kOuter] = {1, 1, 1, 1};
  bool rows = false;

  int64_t runs() const { return outer[0] * outer[1] * outer[2] * outer[3]; }
  int64_t per_channel() const { return runs() * inner; }
  int64_t blocks() const { return runs() * ((inner + kBlock - 1) / kBlock); }  // of one channel, without `rows`
};

// Per-channel values in the accumulate type T; the vectors have `channels` elements, and no NaN but the usual one.
template <typename T>
struct Channels {
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;  // forward: z = (x − mean)·scale + shift
  const T *inverse = nullptr, *offset = nullptr;                // recovery: x̂ = z·inverse + offset
  const T *slope = nullptr, *intercept = nullptr;  // backward: dx = dz·scale + z·slope + intercept; none in eval mode

  template <typename F>
  void for_each(F&& f) {
    for (const T** v : {&mean, &scale, &shift, &inverse, &offset, &slope, &intercept}) {
      if (*v != nullptr) f(*v);
    }
  }
};

// Work on channels [begin, end) without `rows`, or on positions [begin, end) of all channels with it.
struct Kernels {
  // Statistics of blocks [first, last) of one channel.
  Moments<double> (*block_moments)(const Shape&, const Operand& x, int64_t channel, int64_t first, int64_t last);
  // Σdz and Σdz·x̂ of blocks [first, last) of one channel.
  void (*block_sums)(const Shape&, const ActivationOptions&, const Operand& y, const Operand& dy, const Operand& r,
                     const void* channels, int64_t channel, int64_t first, int64_t last, double sums[2]);
  void (*block_normalize)(const Shape&, const ActivationOptions&, const Operand& x, const Operand& r, const Operand& y,
                          const void* channels, int64_t channel, int64_t first, int64_t last);
  // dx and dz, each unless its operand is empty.
  void (*block_gradient)(const Shape&, const ActivationOptions&, const Operand& y, const Operand& dy, const Operand& r,
                         const Operand& dx, const Operand& dz, const void* channels, int64_t channel, int64_t first,
                         int64_t last);
  // The same for positions [first, last) of all channels; mean and m2, or the two sums, are (channels,) and set anew.
  void (*row_moments)(const Shape&, const Operand& x, int64_t first, int64_t last, double* mean, double* m2);
  void (*row_sums)(const Shape&, const ActivationOptions&, const Operand& y, const Operand& dy, const Operand& r,
                   const void* channels, int64_t first, int64_t last, double* sum_dz, double* sum_dz_xhat);
  void (*row_normalize)(const Shape&, const ActivationOptions&, const Operand& x, const Operand& r, const Operand& y,
                        const void* channels, int64_t first, int64_t last);
  void (*row_gradient)(const Shape&, const ActivationOptions&, const Operand& y, const Operand& dy, const Operand& r,
                       const Operand& dx, const Operand& dz, const void* channels, int64_t first, int64_t last);
};

// Accumulating in float32, one table per instruction set that was compiled (IABN_V3, IABN_V4); and in float64, which is
// for checks, for any machine.
extern const Kernels kBaseline, kFloat64;
extern const Kernels kV3, kV4;  // AVX2 with FMA; AVX-512

}  // namespace iabn
