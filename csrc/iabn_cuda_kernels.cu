// The CUDA kernels for one dtype, IABN_DTYPE; the tests compile the same text for the host, with a header of their own
// in place of iabn_cuda_device.h.
//
// Passes over memory: statistics read x, normalize reads x [and r] and writes y; sums read y, dy [and r], the gradient
// reads them again and writes dx [and dz]. Passes that only read take their blocks in reverse order: so they begin with
// what was written last, and leave in the L2 cache what the next pass reads first. Where a channel fits into shared
// memory (`fused_*`) it is read once.
//
// Every reduction has a fixed order, given by the shape and the device: the same input gives the same bits.
#include "iabn_cuda_parts.h"

namespace iabn::cuda {
namespace {

// ---- channels in planes --------------------------------------------------------------------------------------------

template <int W>
__global__ void __launch_bounds__(kBlockThreads) planes_moments(Shape s, Operand x, Moments<A>* partial) {
  Share share = share_of_block(slots<W>(s), true);
  Distances distances;
  for_slots<W>(s, share.begin, share.end, [&](int64_t run, int64_t position, int64_t) {
    Values<W> v = load<W>(x, in_plane(x, share.tile, run, position));
    distances.start(v.v[0]);
    distances.count += W;
#pragma unroll
    for (int i = 0; i < W; ++i) distances.add(v.v[i]);
  });
  Moments<A> moments = merge_block(distances.finished(origin(x, share.tile)));
  if (threadIdx.x == 0) partial[share.part * s.channels + share.tile] = moments;
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_normalize(Shape s, Activated act, Affine affine, Operand x, Operand r, Operand y, Vector mean, Vector var) {
  Share share = share_of_block(slots<W>(s), false);
  int64_t c = share.tile;
  A m = value(mean, c, 0), scale = scale_of(affine, c, value(var, c, 0)), bias = value(affine.bias, c, 0);
  for_slots<W>(s, share.begin, share.end, [&](int64_t run, int64_t position, int64_t) {
    Values<W> v = load<W>(x, in_plane(x, c, run, position));
    Values<W> residual = residual_or_zero<W>(r, in_plane(r, c, run, position));
#pragma unroll
    for (int i = 0; i < W; ++i) v.v[i] = forward(act, v.v[i], m, scale, bias, residual.v[i]);
    store<W>(y, in_plane(y, c, run, position), v);
  });
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_sums(Shape s, Activated act, Affine affine, Operand y, Operand dy, Operand r, Sums* partial) {
  Share share = share_of_block(slots<W>(s), true);
  int64_t c = share.tile;
  Recovery recovery(affine, c);
  Sums sums;
  for_slots<W>(s, share.begin, share.end, [&](int64_t run, int64_t position, int64_t) {
    Values<W> out = load<W>(y, in_plane(y, c, run, position)), d = load<W>(dy, in_plane(dy, c, run, position));
    Values<W> residual = residual_or_zero<W>(r, in_plane(r, c, run, position));
#pragma unroll
    for (int i = 0; i < W; ++i) {
      A z = act.invert(out.v[i]) - residual.v[i];
      sums.add(act.gradient(out.v[i], d.v[i]), recovered(z, recovery.inverse, recovery.offset));
    }
  });
  sums = merge_block(sums);
  if (threadIdx.x == 0) partial[share.part * s.channels + c] = sums;
}

// dx, and dz where it is asked for, of one vector whose operands begin at these offsets.
template <int W>
IABN_DEVICE void write_gradient(const Activated& act, bool centred, const Values<W>& out, const Values<W>& d,
                                const Values<W>& residual, const A* scale, const A* slope, const A* intercept,
                                int each, const Operand& dx, int64_t dx_at, const Operand& dz, int64_t dz_at) {
  Values<W> gradient, dz_values;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    int k = each * i;
    A dz_value = act.gradient(out.v[i], d.v[i]);
    dz_values.v[i] = dz_value;
    gradient.v[i] = dz_value * scale[k];
    if (centred) {
      A z = act.invert(out.v[i]) - residual.v[i];
      gradient.v[i] = gradient_of_x(dz_value, z, scale[k], slope[k], intercept[k]);
    }
  }
  store<W>(dx, dx_at, gradient);
  if (dz.data != nullptr) store<W>(dz, dz_at, dz_values);
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_gradient(Shape s, Activated act, Affine affine, Operand y, Operand dy, Operand r, Operand dx, Operand dz,
                    Vector var, Vector mean_dz, Vector mean_dz_xhat, A mean_share) {
  Share share = share_of_block(slots<W>(s), false);
  int64_t c = share.tile;
  bool centred = mean_dz.data != nullptr;
  Gradient g(affine, c, value(var, c, 0), centred, value(mean_dz, c, 0) * mean_share,
             value(mean_dz_xhat, c, 0) * mean_share);
  for_slots<W>(s, share.begin, share.end, [&](int64_t run, int64_t position, int64_t) {
    Values<W> out = load<W>(y, in_plane(y, c, run, position)), d = load<W>(dy, in_plane(dy, c, run, position));
    Values<W> residual = residual_or_zero<W>(r, in_plane(r, c, run, position));
    write_gradient<W>(act, centred, out, d, residual, &g.scale, &g.slope, &g.intercept, 0, dx,
                      in_plane(dx, c, run, position), dz, in_plane(dz, c, run, position));
  });
}

// A channel in shared memory, one block per channel.
template <int W>
__global__ void __launch_bounds__(kFusedThreads)
    planes_fused_forward(Shape s, Activated act, Affine affine, Operand x, Operand r, Operand y, A* mean, A* var) {
  IABN_DYNAMIC_SHARED(kept);
  Pack<W>* packs = reinterpret_cast<Pack<W>*>(kept);
  IABN_SHARED(Moments<A>, all, 1);
  int64_t c = blockIdx.x;
  A first = origin(x, c);
  Distances distances;
  for_slots<W>(s, 0, slots<W>(s), [&](int64_t run, int64_t position, int64_t slot) {
    Pack<W> pack = *reinterpret_cast<const Pack<W>*>(static_cast<const T*>(x.data) + in_plane(x, c, run, position));
    packs[slot] = pack;
    Values<W> v = unpack<W>(pack);
    distances.start(v.v[0]);
    distances.count += W;
#pragma unroll
    for (int i = 0; i < W; ++i) distances.add(v.v[i]);
  });
  Moments<A> moments = merge_block(distances.finished(first));
  if (threadIdx.x == 0) {
    moments.mean += first;
    *all = moments;
    mean[c] = moments.mean;
    var[c] = moments.m2 / moments.count;
  }
  __syncthreads();
  A m = all->mean, scale = scale_of(affine, c, all->m2 / all->count), bias = value(affine.bias, c, 0);
  for_slots<W>(s, 0, slots<W>(s), [&](int64_t run, int64_t position, int64_t slot) {  // its own vectors again
    Values<W> v = unpack<W>(packs[slot]), residual = residual_or_zero<W>(r, in_plane(r, c, run, position));
#pragma unroll
    for (int i = 0; i < W; ++i) v.v[i] = forward(act, v.v[i], m, scale, bias, residual.v[i]);
    store<W>(y, in_plane(y, c, run, position), v);
  });
}

template <int W>
__global__ void __launch_bounds__(kFusedThreads)
    planes_fused_backward(Shape s, Activated act, Affine affine, Operand y, Operand dy, Operand r, Operand dx,
                          Operand dz, Vector var, A* sum_dz, A* sum_dz_xhat) {
  IABN_DYNAMIC_SHARED(kept);
  Pack<W>*outs = reinterpret_cast<Pack<W>*>(kept), *ds = outs + slots<W>(s);
  IABN_SHARED(Sums, all, 1);
  int64_t c = blockIdx.x;
  Recovery recovery(affine, c);
  Sums sums;
  for_slots<W>(s, 0, slots<W>(s), [&](int64_t run, int64_t position, int64_t slot) {
    outs[slot] = *reinterpret_cast<const Pack<W>*>(static_cast<const T*>(y.data) + in_plane(y, c, run, position));
    ds[slot] = *reinterpret_cast<const Pack<W>*>(static_cast<const T*>(dy.data) + in_plane(dy, c, run, position));
    Values<W> out = unpack<W>(outs[slot]), d = unpack<W>(ds[slot]);
    Values<W> residual = residual_or_zero<W>(r, in_plane(r, c, run, position));
#pragma unroll
    for (int i = 0; i < W; ++i) {
      A z = act.invert(out.v[i]) - residual.v[i];
      sums.add(act.gradient(out.v[i], d.v[i]), recovered(z, recovery.inverse, recovery.offset));
    }
  });
  sums = merge_block(sums);
  if (threadIdx.x == 0) {
    *all = sums;
    sum_dz[c] = sums.dz;
    sum_dz_xhat[c] = sums.product;
  }
  __syncthreads();
  A count = A(s.per_channel());
  Gradient g(affine, c, value(var, c, 0), true, all->dz / count, all->product / count);
  for_slots<W>(s, 0, slots<W>(s), [&](int64_t run, int64_t position, int64_t slot) {
    Values<W> residual = residual_or_zero<W>(r, in_plane(r, c, run, position));
    write_gradient<W>(act, true, unpack<W>(outs[slot]), unpack<W>(ds[slot]), residual, &g.scale, &g.slope,
                      &g.intercept, 0, dx, in_plane(dx, c, run, position), dz, in_plane(dz, c, run, position));
  });
}

// ---- rows of channels ----------------------------------------------------------------------------------------------

// The first of this thread's W channels.
template <int W>
IABN_DEVICE int64_t first_channel(int64_t tile) {
  return (tile * blockDim.x + threadIdx.x) * W;
}

IABN_DEVICE int64_t in_row(const Operand& o, int64_t row, int64_t c) { return row * o.inner + c; }

template <int W>
__global__ void __launch_bounds__(kBlockThreads) rows_moments(Shape s, Operand x, Moments<A>* partial) {
  Share share = share_of_block(s.inner, true);
  int64_t c = first_channel<W>(share.tile);
  Distances distances[W];
  if (c < s.channels) {
    for (int64_t row = share.begin + threadIdx.y; row < share.end; row += blockDim.y) {
      Values<W> v = load<W>(x, in_row(x, row, c));
#pragma unroll
      for (int i = 0; i < W; ++i) {
        distances[i].start(v.v[i]);
        distances[i].count += 1;
        distances[i].add(v.v[i]);
      }
    }
  }
  Moments<A> moments[W];
  for (int i = 0; i < W && c < s.channels; ++i) moments[i] = distances[i].finished(origin(x, c + i));
  merge_columns<kBlockThreads>(moments);
  if (threadIdx.y == 0 && c < s.channels) {
    for (int i = 0; i < W; ++i) partial[share.part * s.channels + c + i] = moments[i];
  }
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_normalize(Shape s, Activated act, Affine affine, Operand x, Operand r, Operand y, Vector mean, Vector var) {
  Share share = share_of_block(s.inner, false);
  int64_t c = first_channel<W>(share.tile);
  if (c >= s.channels) return;
  A m[W], scale[W], bias[W];
  for (int i = 0; i < W; ++i) {
    m[i] = value(mean, c + i, 0);
    scale[i] = scale_of(affine, c + i, value(var, c + i, 0));
    bias[i] = value(affine.bias, c + i, 0);
  }
  for (int64_t row = share.begin + threadIdx.y; row < share.end; row += blockDim.y) {
    Values<W> v = load<W>(x, in_row(x, row, c)), residual = residual_or_zero<W>(r, in_row(r, row, c));
#pragma unroll
    for (int i = 0; i < W; ++i) v.v[i] = forward(act, v.v[i], m[i], scale[i], bias[i], residual.v[i]);
    store<W>(y, in_row(y, row, c), v);
  }
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_sums(Shape s, Activated act, Affine affine, Operand y, Operand dy, Operand r, Sums* partial) {
  Share share = share_of_block(s.inner, true);
  int64_t c = first_channel<W>(share.tile);
  Sums sums[W];
  if (c < s.channels) {
    A inverse[W], offset[W];
    for (int i = 0; i < W; ++i) {
      Recovery recovery(affine, c + i);
      inverse[i] = recovery.inverse, offset[i] = recovery.offset;
    }
    for (int64_t row = share.begin + threadIdx.y; row < share.end; row += blockDim.y) {
      Values<W> out = load<W>(y, in_row(y, row, c)), d = load<W>(dy, in_row(dy, row, c));
      Values<W> residual = residual_or_zero<W>(r, in_row(r, row, c));
#pragma unroll
      for (int i = 0; i < W; ++i) {
        A z = act.invert(out.v[i]) - residual.v[i];
        sums[i].add(act.gradient(out.v[i], d.v[i]), recovered(z, inverse[i], offset[i]));
      }
    }
  }
  merge_columns<kBlockThreads>(sums);
  if (threadIdx.y == 0 && c < s.channels) {
    for (int i = 0; i < W; ++i) partial[share.part * s.channels + c + i] = sums[i];
  }
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_gradient(Shape s, Activated act, Affine affine, Operand y, Operand dy, Operand r, Operand dx, Operand dz,
                  Vector var, Vector mean_dz, Vector mean_dz_xhat, A mean_share) {
  Share share = share_of_block(s.inner, false);
  int64_t c = first_channel<W>(share.tile);
  if (c >= s.channels) return;
  bool centred = mean_dz.data != nullptr;
  A scale[W], slope[W], intercept[W];
  for (int i = 0; i < W; ++i) {
    Gradient g(affine, c + i, value(var, c + i, 0), centred, value(mean_dz, c + i, 0) * mean_share,
               value(mean_dz_xhat, c + i, 0) * mean_share);
    scale[i] = g.scale, slope[i] = g.slope, intercept[i] = g.intercept;
  }
  for (int64_t row = share.begin + threadIdx.y; row < share.end; row += blockDim.y) {
    Values<W> out = load<W>(y, in_row(y, row, c)), d = load<W>(dy, in_row(dy, row, c));
    Values<W> residual = residual_or_zero<W>(r, in_row(r, row, c));
    write_gradient<W>(act, centred, out, d, residual, scale, slope, intercept, 1, dx, in_row(dx, row, c), dz,
                      in_row(dz, row, c));
  }
}

// ---- partial results -----------------------------------------------------------------------------------------------

constexpr int kFinishChannels = 32, kFinishParts = 32;  // of a block

// The merged parts of a channel, to the threads with threadIdx.y 0.
template <typename Item>
IABN_DEVICE Item merge_parts(int64_t channels, int64_t parts, const Item* partial, int64_t c) {
  Item items[1] = {};
  for (int64_t p = threadIdx.y; p < parts && c < channels; p += blockDim.y) merge(items[0], partial[p * channels + c]);
  merge_columns<kFinishChannels * kFinishParts>(items);
  return items[0];
}

__global__ void __launch_bounds__(kFinishChannels* kFinishParts)
    finish_moments(int64_t channels, int64_t parts, const Moments<A>* partial, Operand x, A* mean, A* var) {
  int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  Moments<A> moments = merge_parts(channels, parts, partial, c);
  if (threadIdx.y != 0 || c >= channels) return;
  mean[c] = origin(x, c) + moments.mean;
  var[c] = moments.m2 / moments.count;
}

__global__ void __launch_bounds__(kFinishChannels* kFinishParts)
    finish_sums(int64_t channels, int64_t parts, const Sums* partial, A* sum_dz, A* sum_dz_xhat) {
  int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  Sums sums = merge_parts(channels, parts, partial, c);
  if (threadIdx.y != 0 || c >= channels) return;
  sum_dz[c] = sums.dz;
  sum_dz_xhat[c] = sums.product;
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Calls f(width) with the plan's width as a compile-time value.
template <int W>
using Width = std::integral_constant<int, W>;

template <typename F>
void with_width(const Launch& l, F f) {
  constexpr int most = 16 / sizeof(T);
  if constexpr (most == 8) {
    if (l.plan.width == 4) return f(Width<4>{});
  }
  if (l.plan.width == most) f(Width<most>{});
  else f(Width<1>{});
}

dim3 grid(const Launch& l) { return dim3(unsigned(l.plan.tiles), unsigned(l.plan.parts)); }
dim3 block(const Launch& l) { return dim3(unsigned(l.plan.x), unsigned(l.plan.y)); }
dim3 finish_grid(const Launch& l) { return dim3(unsigned((l.shape.channels + kFinishChannels - 1) / kFinishChannels)); }

void statistics(const Launch& l, Operand x, void* mean, void* var) {
  auto* partial = static_cast<Moments<A>*>(l.partial);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (l.shape.rows) IABN_LAUNCH((rows_moments<W>), grid(l), block(l), 0, l.stream, l.shape, x, partial);
    else IABN_LAUNCH((planes_moments<W>), grid(l), block(l), 0, l.stream, l.shape, x, partial);
  });
  IABN_LAUNCH(finish_moments, finish_grid(l), dim3(kFinishChannels, kFinishParts), 0, l.stream, l.shape.channels,
              l.plan.parts, partial, x, static_cast<A*>(mean), static_cast<A*>(var));
}

void normalize(const Launch& l, const ActivationOptions& options, const Affine& affine, Operand x, Operand r,
               Operand y, Vector mean, Vector var) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (l.shape.rows)
      IABN_LAUNCH((rows_normalize<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, x, r, y, mean, var);
    else IABN_LAUNCH((planes_normalize<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, x, r, y, mean, var);
  });
}

void fused_forward(const Launch& l, const ActivationOptions& options, const Affine& affine, Operand x, Operand r,
                   Operand y, void* mean, void* var) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    allow_shared(planes_fused_forward<W>, l.fused_bytes);
    IABN_LAUNCH((planes_fused_forward<W>), dim3(unsigned(l.shape.channels)), dim3(kFusedThreads), l.fused_bytes,
                l.stream, l.shape, act, affine, x, r, y, static_cast<A*>(mean), static_cast<A*>(var));
  });
}

void gradient_sums(const Launch& l, const ActivationOptions& options, const Affine& affine, Operand y, Operand dy,
                   Operand r, void* sum_dz, void* sum_dz_xhat) {
  Activated act(options);
  auto* partial = static_cast<Sums*>(l.partial);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (l.shape.rows)
      IABN_LAUNCH((rows_sums<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, y, dy, r, partial);
    else IABN_LAUNCH((planes_sums<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, y, dy, r, partial);
  });
  IABN_LAUNCH(finish_sums, finish_grid(l), dim3(kFinishChannels, kFinishParts), 0, l.stream, l.shape.channels,
              l.plan.parts, partial, static_cast<A*>(sum_dz), static_cast<A*>(sum_dz_xhat));
}

void input_gradient(const Launch& l, const ActivationOptions& options, const Affine& affine, Operand y, Operand dy,
                    Operand r, Operand dx, Operand dz, Vector var, Vector mean_dz, Vector mean_dz_xhat, double share) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (l.shape.rows)
      IABN_LAUNCH((rows_gradient<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, y, dy, r, dx, dz, var,
                  mean_dz, mean_dz_xhat, A(share));
    else
      IABN_LAUNCH((planes_gradient<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, y, dy, r, dx, dz, var,
                  mean_dz, mean_dz_xhat, A(share));
  });
}

void fused_backward(const Launch& l, const ActivationOptions& options, const Affine& affine, Operand y, Operand dy,
                    Operand r, Operand dx, Operand dz, Vector var, void* sum_dz, void* sum_dz_xhat) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    allow_shared(planes_fused_backward<W>, l.fused_bytes);
    IABN_LAUNCH((planes_fused_backward<W>), dim3(unsigned(l.shape.channels)), dim3(kFusedThreads), l.fused_bytes,
                l.stream, l.shape, act, affine, y, dy, r, dx, dz, var, static_cast<A*>(sum_dz),
                static_cast<A*>(sum_dz_xhat));
  });
}

}  // namespace

#define IABN_JOIN_(a, b) a##b
#define IABN_JOIN(a, b) IABN_JOIN_(a, b)
const Kernels IABN_JOIN(k_, IABN_DTYPE) = {statistics,    normalize,      fused_forward,
                                           gradient_sums, input_gradient, fused_backward};

}  // namespace iabn::cuda
