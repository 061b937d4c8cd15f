// The CUDA kernels for one dtype, IABN_DTYPE, and how they are launched; the tests compile the same text for the host,
// with a header of their own in place of iabn_cuda_device.h.
//
// Passes over memory: statistics read x, normalize reads x [and r] and writes y; sums read y, dy [and r], the gradient
// reads them again and writes dx [and dz]. Passes that only read take their blocks in reverse order: so they begin with
// what was written last, and leave in the L2 cache what the next pass reads first. Where a channel fits into shared
// memory (`fused_*`) it is read once.
//
// Every reduction has a fixed order, given by the shape and the device: the same input gives the same bits.
#include <algorithm>

#include "iabn_cuda_planes.h"
#include "iabn_cuda_rows.h"

namespace iabn::cuda {
namespace {

__global__ void update_running(int64_t channels, Vector mean, Vector var, StatisticsOutputs out) {
  int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c == 0 && out.num_batches != nullptr) *out.num_batches += 1;
  if (c >= channels) return;
  renew(out.running_mean, c, value(mean, c, 0), out.momentum);
  renew(out.running_var, c, value(var, c, 0) * A(out.correction), out.momentum);
}

// ---- launchers -------------------------------------------------------------------------------------------------------

template <int W>
using Width = std::integral_constant<int, W>;
template <bool any>
using Any = std::integral_constant<bool, any>;
template <From from>
using Source = std::integral_constant<From, from>;

// Calls f(width) with the plan's width as a compile-time value.
template <typename F>
void with_width(const Launch& l, F f) {
  constexpr int most = 16 / sizeof(T);
  if constexpr (most == 8) {
    if (l.plan.width == 4) return f(Width<4>{});
  }
  if (l.plan.width == most) f(Width<most>{});
  else f(Width<1>{});
}

// Calls f(width, any): whether more than leaky ReLU without a residual may be wanted. float64, which is for checks, has
// the kernels for everything alone.
template <typename F>
void with_forward(const Launch& l, const Activated& act, const StridedTensor& residual, F f) {
  with_width(l, [&](auto width) {
    if constexpr (sizeof(T) < 8) {
      if (act.is_leaky() && residual.data == nullptr) return f(width, Any<false>{});
    }
    f(width, Any<true>{});
  });
}

// Calls f(width, source).
template <typename F>
void with_backward(const Launch& l, const Activated& act, bool from_input, const BackwardOperands& o, F f) {
  with_width(l, [&](auto width) {
    if (from_input) return f(width, Source<From::input>{});
    if constexpr (sizeof(T) < 8) {
      bool needs_more = o.residual.data != nullptr || o.dz.data != nullptr;
      if (act.is_leaky() && !needs_more) return f(width, Source<From::leaky_output>{});
    }
    f(width, Source<From::output>{});
  });
}

dim3 block(const Launch& l) { return dim3(unsigned(l.plan.x), unsigned(l.plan.y)); }

// As many parts as the device runs at once, and not one block more: those would run alone after all others.
template <typename Kernel>
dim3 grid(Kernel* kernel, const Launch& l) {
  int64_t room = blocks_per_processor(kernel, l.device.index, l.plan.x * l.plan.y) * l.device.processors;
  int64_t parts = std::clamp<int64_t>(room / l.plan.tiles, 1, l.plan.most_parts);
  return dim3(unsigned(l.plan.tiles), unsigned(parts));
}

// A thread of a fused kernel has about eight vectors, so that a small channel does not keep threads without work.
dim3 fused_block(const Launch& l) {
  int64_t vectors = l.shape.per_channel() / l.plan.width;
  return dim3(unsigned(std::clamp<int64_t>((vectors / 8 + 31) / 32 * 32, 64, kBlockThreads)));
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, const Launch& l, const Arguments&... arguments) {
  IABN_LAUNCH(kernel, grid(kernel, l), block(l), 0, l.stream, l.shape, arguments...);
}

template <typename Kernel, typename... Arguments>
void launch_fused(Kernel* kernel, const Launch& l, const Arguments&... arguments) {
  allow_shared(kernel, l.device.index, l.device.shared_bytes - kStaticShared);
  IABN_LAUNCH(kernel, dim3(unsigned(l.shape.channels)), fused_block(l), l.fused_bytes, l.stream, l.shape, arguments...);
}

void statistics(const Launch& l, StridedTensor x, const StatisticsOutputs& out) {
  auto* partial = static_cast<Moments<A>*>(l.partial);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    launch(l.shape.rows ? rows_moments<W> : planes_moments<W>, l, partial, l.arrived, FinishMoments{out, x});
  });
}

void normalize(const Launch& l, const ActivationOptions& options, const AffineVectors& affine, const ForwardOperands& o,
               Vector mean, Vector var) {
  Activated act(options);
  with_forward(l, act, o.residual, [&](auto width, auto any) {
    constexpr int W = decltype(width)::value;
    constexpr bool kAny = decltype(any)::value;
    launch(l.shape.rows ? rows_normalize<W, kAny> : planes_normalize<W, kAny>, l, act, affine, o, mean, var);
  });
}

void fused_forward(const Launch& l, const ActivationOptions& options, const AffineVectors& affine,
                   const ForwardOperands& o, const StatisticsOutputs& out) {
  Activated act(options);
  with_forward(l, act, o.residual, [&](auto width, auto any) {
    launch_fused(planes_fused_forward<decltype(width)::value, decltype(any)::value>, l, act, affine, o,
                 FinishMoments{out, o.x});
  });
}

void gradient_sums(const Launch& l, const ActivationOptions& options, const AffineVectors& affine,
                   const BackwardOperands& o, Vector mean, Vector var, const SumsOutputs& out) {
  Activated act(options);
  auto* partial = static_cast<Sums*>(l.partial);
  with_backward(l, act, options.from_input, o, [&](auto width, auto source) {
    constexpr int W = decltype(width)::value;
    constexpr From from = decltype(source)::value;
    launch(l.shape.rows ? rows_sums<W, from> : planes_sums<W, from>, l, act, o, mean, var, partial, l.arrived,
           FinishSums{out, affine});
  });
}

void input_gradient(const Launch& l, const ActivationOptions& options, const AffineVectors& affine,
                    const BackwardOperands& o, Vector mean, Vector var, Vector mean_dz, Vector mean_dz_xhat,
                    double share) {
  Activated act(options);
  with_backward(l, act, options.from_input, o, [&](auto width, auto source) {
    constexpr int W = decltype(width)::value;
    constexpr From from = decltype(source)::value;
    launch(l.shape.rows ? rows_gradient<W, from> : planes_gradient<W, from>, l, act, affine, o, mean, var, mean_dz,
           mean_dz_xhat, A(share));
  });
}

void fused_backward(const Launch& l, const ActivationOptions& options, const AffineVectors& affine,
                    const BackwardOperands& o, Vector mean, Vector var, const SumsOutputs& out) {
  Activated act(options);
  with_backward(l, act, options.from_input, o, [&](auto width, auto source) {
    launch_fused(planes_fused_backward<decltype(width)::value, decltype(source)::value>, l, act, o, mean, var,
                 FinishSums{out, affine});
  });
}

void update_statistics(const Launch& l, Vector mean, Vector var, const StatisticsOutputs& out) {
  unsigned blocks = unsigned(l.shape.channels / kBlockThreads + 1);
  IABN_LAUNCH(update_running, dim3(blocks), dim3(unsigned(kBlockThreads)), 0, l.stream, l.shape.channels, mean, var,
              out);
}

}  // namespace

#define IABN_JOIN_(a, b) a##b
#define IABN_JOIN(a, b) IABN_JOIN_(a, b)
const Launchers IABN_JOIN(k_, IABN_DTYPE) = {statistics,     normalize,      fused_forward,    gradient_sums,
                                             input_gradient, fused_backward, update_statistics};

}  // namespace iabn::cuda
