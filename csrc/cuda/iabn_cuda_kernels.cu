// The CUDA kernels for one dtype, IABN_DTYPE; the tests compile the same text for the host, with a header of their own
// in place of iabn_cuda_device.h.
//
// Passes over memory: statistics read x, normalize reads x [and r] and writes y; sums read y, dy [and r], the gradient
// reads them again and writes dx [and dz]. Passes that only read take their blocks in reverse order: so they begin with
// what was written last, and leave in the L2 cache what the next pass reads first. Where a channel fits into shared
// memory (`fused_*`) it is read once.
//
// Every reduction has a fixed order, given by the shape and the device: the same input gives the same bits.
#include <algorithm>

#include "iabn_cuda_parts.h"

namespace iabn::cuda {
namespace {

// The vectors of y, dy and the residual at one place.
template <int W>
struct Gradients {
  Pack<W> y, dy, r;

  // Calls f(i, dz, z): z without the residual, which is what γ and β made of x̂.
  template <typename F>
  IABN_DEVICE void each(const Activated& act, F f) const {
    Values<W> out = unpack(y), d = unpack(dy), residual = unpack(r);
    act.choose([&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < W; ++i) f(i, chosen.gradient(out.v[i], d.v[i]), chosen.invert(out.v[i]) - residual.v[i]);
    });
  }
};

template <int W>
struct Inputs {
  Pack<W> x, r;
};

template <int W>
IABN_DEVICE Gradients<W> load_gradients(const Slot& at, int64_t c, const StridedTensor& y, const StridedTensor& dy,
                                        const StridedTensor& r) {
  return {load<W>(y, at.in(y, c)), load<W>(dy, at.in(dy, c)), load_any<W>(r, at.in(r, c))};
}

// Writes dx, and dz where it is asked for, at these offsets; gradient(i) is that of element i.
template <int W, typename F>
IABN_DEVICE void store_gradients(const Activated& act, const Gradients<W>& g, F gradient, const StridedTensor& dx,
                                 int64_t dx_at, const StridedTensor& dz, int64_t dz_at) {
  Values<W> dx_values, dz_values;
  g.each(act, [&](int i, A dz_value, A z) {
    dz_values.v[i] = dz_value;
    dx_values.v[i] = gradient(i).of(dz_value, z);
  });
  store(dx, dx_at, dx_values);
  if (dz.data != nullptr) store(dz, dz_at, dz_values);
}

// ---- channels in planes --------------------------------------------------------------------------------------------

// Adds a vector to the distances of one channel.
template <int W>
IABN_DEVICE void add_vector(Distances& distances, const Pack<W>& pack) {
  Values<W> v = unpack(pack);
  distances.start(v.v[0]);
  distances.count += W;
#pragma unroll
  for (int i = 0; i < W; ++i) distances.add(v.v[i]);
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads) planes_moments(Extent s, StridedTensor x, Moments<A>* partial) {
  Share share = share_of_block(slots<W>(s), true);
  int64_t c = share.tile;
  Distances distances;
  auto load_x = [&](int64_t slot) { return load<W>(x, Slot::number<W>(s, slot).in(x, c)); };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_x,
            [&](int64_t, const Pack<W>& pack) { add_vector(distances, pack); });
  Moments<A> moments = merge_block(distances.finished(origin(x, c)));
  if (threadIdx.x == 0) partial[share.part * s.channels + c] = moments;
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_normalize(Extent s, Activated act, AffineVectors affine, StridedTensor x, StridedTensor r, StridedTensor y,
                     Vector mean, Vector var) {
  Share share = share_of_block(slots<W>(s), false);
  int64_t c = share.tile;
  A m = value(mean, c, 0), scale = scale_of(affine, c, value(var, c, 0)), bias = value(affine.bias, c, 0);
  auto load_inputs = [&](int64_t slot) {
    Slot at = Slot::number<W>(s, slot);
    return Inputs<W>{load<W>(x, at.in(x, c)), load_any<W>(r, at.in(r, c))};
  };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_inputs, [&](int64_t slot, const Inputs<W>& in) {
    Values<W> v = unpack(in.x), residual = unpack(in.r);
    act.choose([&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < W; ++i) v.v[i] = forward(chosen, v.v[i], m, scale, bias, residual.v[i]);
    });
    store(y, Slot::number<W>(s, slot).in(y, c), v);
  });
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_sums(Extent s, Activated act, AffineVectors affine, StridedTensor y, StridedTensor dy, StridedTensor r,
                Sums* partial) {
  Share share = share_of_block(slots<W>(s), true);
  int64_t c = share.tile;
  Recovery recovery(affine, c);
  Sums sums;
  auto load_slot = [&](int64_t slot) { return load_gradients<W>(Slot::number<W>(s, slot), c, y, dy, r); };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_slot, [&](int64_t, const Gradients<W>& g) {
    g.each(act, [&](int, A dz, A z) { sums.add(dz, recovered(z, recovery.inverse, recovery.offset)); });
  });
  sums = merge_block(sums);
  if (threadIdx.x == 0) partial[share.part * s.channels + c] = sums;
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_gradient(Extent s, Activated act, AffineVectors affine, StridedTensor y, StridedTensor dy, StridedTensor r,
                    StridedTensor dx, StridedTensor dz, Vector var, Vector mean_dz, Vector mean_dz_xhat, A mean_share) {
  Share share = share_of_block(slots<W>(s), false);
  int64_t c = share.tile;
  Gradient gradient(affine, c, value(var, c, 0), mean_dz.data != nullptr, value(mean_dz, c, 0) * mean_share,
                    value(mean_dz_xhat, c, 0) * mean_share);
  auto load_slot = [&](int64_t slot) { return load_gradients<W>(Slot::number<W>(s, slot), c, y, dy, r); };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_slot, [&](int64_t slot, const Gradients<W>& g) {
    Slot at = Slot::number<W>(s, slot);
    store_gradients(act, g, [&](int) { return gradient; }, dx, at.in(dx, c), dz, at.in(dz, c));
  });
}

// A channel in shared memory, one block per channel; each thread comes back to the vectors that it has put there itself.
template <int W>
__global__ void __launch_bounds__(kBlockThreads, 2)
    planes_fused_forward(Extent s, Activated act, AffineVectors affine, StridedTensor x, StridedTensor r,
                         StridedTensor y, A* mean, A* var) {
  IABN_DYNAMIC_SHARED(kept);
  Pack<W>* packs = reinterpret_cast<Pack<W>*>(kept);
  IABN_SHARED(Moments<A>, all, 1);
  int64_t c = blockIdx.x;
  A first = origin(x, c);
  Distances distances;
  auto load_x = [&](int64_t slot) { return load<W>(x, Slot::number<W>(s, slot).in(x, c)); };
  pipelined(threadIdx.x, slots<W>(s), blockDim.x, load_x, [&](int64_t slot, const Pack<W>& pack) {
    packs[slot] = pack;
    add_vector(distances, pack);
  });
  Moments<A> moments = merge_block(distances.finished(first));
  if (threadIdx.x == 0) {
    *all = moments;
    mean[c] = first + moments.mean;
    var[c] = moments.m2 / moments.count;
  }
  __syncthreads();
  // The mean stays a distance from the first value: x − first is exact where the mean is large.
  A m = all->mean, scale = scale_of(affine, c, all->m2 / all->count), bias = value(affine.bias, c, 0);
  auto load_inputs = [&](int64_t slot) {
    return Inputs<W>{packs[slot], load_any<W>(r, Slot::number<W>(s, slot).in(r, c))};
  };
  pipelined<1>(threadIdx.x, slots<W>(s), blockDim.x, load_inputs, [&](int64_t slot, const Inputs<W>& in) {
    Values<W> v = unpack(in.x), residual = unpack(in.r);
    act.choose([&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < W; ++i) v.v[i] = forward(chosen, v.v[i] - first, m, scale, bias, residual.v[i]);
    });
    store(y, Slot::number<W>(s, slot).in(y, c), v);
  });
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads, 2)
    planes_fused_backward(Extent s, Activated act, AffineVectors affine, StridedTensor y, StridedTensor dy,
                          StridedTensor r, StridedTensor dx, StridedTensor dz, Vector var, A* sum_dz, A* sum_dz_xhat) {
  IABN_DYNAMIC_SHARED(kept);
  Pack<W>*ys = reinterpret_cast<Pack<W>*>(kept), *dys = ys + slots<W>(s);
  IABN_SHARED(Sums, all, 1);
  int64_t c = blockIdx.x;
  Recovery recovery(affine, c);
  Sums sums;
  auto load_slot = [&](int64_t slot) { return load_gradients<W>(Slot::number<W>(s, slot), c, y, dy, r); };
  pipelined(threadIdx.x, slots<W>(s), blockDim.x, load_slot, [&](int64_t slot, const Gradients<W>& g) {
    ys[slot] = g.y;
    dys[slot] = g.dy;
    g.each(act, [&](int, A dz_value, A z) { sums.add(dz_value, recovered(z, recovery.inverse, recovery.offset)); });
  });
  sums = merge_block(sums);
  if (threadIdx.x == 0) {
    *all = sums;
    sum_dz[c] = sums.dz;
    sum_dz_xhat[c] = sums.product;
  }
  __syncthreads();
  A count = A(s.per_channel());
  Gradient gradient(affine, c, value(var, c, 0), true, all->dz / count, all->product / count);
  auto load_kept = [&](int64_t slot) {
    return Gradients<W>{ys[slot], dys[slot], load_any<W>(r, Slot::number<W>(s, slot).in(r, c))};
  };
  pipelined<1>(threadIdx.x, slots<W>(s), blockDim.x, load_kept, [&](int64_t slot, const Gradients<W>& g) {
    Slot at = Slot::number<W>(s, slot);
    store_gradients(act, g, [&](int) { return gradient; }, dx, at.in(dx, c), dz, at.in(dz, c));
  });
}

// ---- rows of channels ----------------------------------------------------------------------------------------------

// The first of this thread's W channels.
template <int W>
IABN_DEVICE int64_t first_channel(int64_t tile) {
  return (tile * blockDim.x + threadIdx.x) * W;
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads) rows_moments(Extent s, StridedTensor x, Moments<A>* partial) {
  Share share = share_of_block(s.inner, true);
  int64_t c = first_channel<W>(share.tile);
  Moments<A> moments[W];
  if (c < s.channels) {
    Distances distances[W];
    auto load_x = [&](int64_t row) { return load<W>(x, in_row(x, row, c)); };
    pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_x, [&](int64_t, const Pack<W>& pack) {
      Values<W> v = unpack(pack);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        distances[i].start(v.v[i]);
        distances[i].count += 1;
        distances[i].add(v.v[i]);
      }
    });
    for (int i = 0; i < W; ++i) moments[i] = distances[i].finished(origin(x, c + i));
  }
  merge_columns<kBlockThreads>(moments);
  if (threadIdx.y == 0 && c < s.channels) {
    for (int i = 0; i < W; ++i) partial[share.part * s.channels + c + i] = moments[i];
  }
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_normalize(Extent s, Activated act, AffineVectors affine, StridedTensor x, StridedTensor r, StridedTensor y,
                   Vector mean, Vector var) {
  Share share = share_of_block(s.inner, false);
  int64_t c = first_channel<W>(share.tile);
  if (c >= s.channels) return;
  A m[W], scale[W], bias[W];
  for (int i = 0; i < W; ++i) {
    m[i] = value(mean, c + i, 0);
    scale[i] = scale_of(affine, c + i, value(var, c + i, 0));
    bias[i] = value(affine.bias, c + i, 0);
  }
  auto load_inputs = [&](int64_t row) {
    return Inputs<W>{load<W>(x, in_row(x, row, c)), load_any<W>(r, in_row(r, row, c))};
  };
  pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_inputs, [&](int64_t row, const Inputs<W>& in) {
    Values<W> v = unpack(in.x), residual = unpack(in.r);
    act.choose([&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < W; ++i) v.v[i] = forward(chosen, v.v[i], m[i], scale[i], bias[i], residual.v[i]);
    });
    store(y, in_row(y, row, c), v);
  });
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_sums(Extent s, Activated act, AffineVectors affine, StridedTensor y, StridedTensor dy, StridedTensor r,
              Sums* partial) {
  Share share = share_of_block(s.inner, true);
  int64_t c = first_channel<W>(share.tile);
  Sums sums[W];
  if (c < s.channels) {
    A inverse[W], offset[W];
    for (int i = 0; i < W; ++i) {
      Recovery recovery(affine, c + i);
      inverse[i] = recovery.inverse, offset[i] = recovery.offset;
    }
    auto load_row = [&](int64_t row) {
      return Gradients<W>{load<W>(y, in_row(y, row, c)), load<W>(dy, in_row(dy, row, c)),
                          load_any<W>(r, in_row(r, row, c))};
    };
    pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_row, [&](int64_t, const Gradients<W>& g) {
      g.each(act, [&](int i, A dz, A z) { sums[i].add(dz, recovered(z, inverse[i], offset[i])); });
    });
  }
  merge_columns<kBlockThreads>(sums);
  if (threadIdx.y == 0 && c < s.channels) {
    for (int i = 0; i < W; ++i) partial[share.part * s.channels + c + i] = sums[i];
  }
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_gradient(Extent s, Activated act, AffineVectors affine, StridedTensor y, StridedTensor dy, StridedTensor r,
                  StridedTensor dx, StridedTensor dz, Vector var, Vector mean_dz, Vector mean_dz_xhat, A mean_share) {
  Share share = share_of_block(s.inner, false);
  int64_t c = first_channel<W>(share.tile);
  if (c >= s.channels) return;
  bool centred = mean_dz.data != nullptr;
  Gradient gradient[W];
  for (int i = 0; i < W; ++i) {
    gradient[i] = Gradient(affine, c + i, value(var, c + i, 0), centred, value(mean_dz, c + i, 0) * mean_share,
                           value(mean_dz_xhat, c + i, 0) * mean_share);
  }
  auto load_row = [&](int64_t row) {
    return Gradients<W>{load<W>(y, in_row(y, row, c)), load<W>(dy, in_row(dy, row, c)),
                        load_any<W>(r, in_row(r, row, c))};
  };
  pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_row, [&](int64_t row, const Gradients<W>& g) {
    store_gradients(act, g, [&](int i) { return gradient[i]; }, dx, in_row(dx, row, c), dz, in_row(dz, row, c));
  });
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
    finish_moments(int64_t channels, int64_t parts, const Moments<A>* partial, StridedTensor x, A* mean, A* var) {
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
// A thread of a fused kernel has about eight vectors, so that a small channel does not keep threads without work.
dim3 fused_block(const Launch& l) {
  int64_t vectors = l.shape.per_channel() / l.plan.width;
  return dim3(unsigned(std::clamp<int64_t>((vectors / 8 + 31) / 32 * 32, 64, kBlockThreads)));
}
dim3 finish_grid(const Launch& l) { return dim3(unsigned((l.shape.channels + kFinishChannels - 1) / kFinishChannels)); }

void statistics(const Launch& l, StridedTensor x, void* mean, void* var) {
  auto* partial = static_cast<Moments<A>*>(l.partial);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (l.shape.rows) IABN_LAUNCH((rows_moments<W>), grid(l), block(l), 0, l.stream, l.shape, x, partial);
    else IABN_LAUNCH((planes_moments<W>), grid(l), block(l), 0, l.stream, l.shape, x, partial);
  });
  IABN_LAUNCH(finish_moments, finish_grid(l), dim3(kFinishChannels, kFinishParts), 0, l.stream, l.shape.channels,
              l.plan.parts, partial, x, static_cast<A*>(mean), static_cast<A*>(var));
}

void normalize(const Launch& l, const ActivationOptions& options, const AffineVectors& affine, StridedTensor x,
               StridedTensor r, StridedTensor y, Vector mean, Vector var) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (l.shape.rows)
      IABN_LAUNCH((rows_normalize<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, x, r, y, mean, var);
    else IABN_LAUNCH((planes_normalize<W>), grid(l), block(l), 0, l.stream, l.shape, act, affine, x, r, y, mean, var);
  });
}

void fused_forward(const Launch& l, const ActivationOptions& options, const AffineVectors& affine, StridedTensor x,
                   StridedTensor r, StridedTensor y, void* mean, void* var) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    allow_shared(planes_fused_forward<W>, l.fused_bytes);
    IABN_LAUNCH((planes_fused_forward<W>), dim3(unsigned(l.shape.channels)), fused_block(l), l.fused_bytes, l.stream,
                l.shape, act, affine, x, r, y, static_cast<A*>(mean), static_cast<A*>(var));
  });
}

void gradient_sums(const Launch& l, const ActivationOptions& options, const AffineVectors& affine, StridedTensor y,
                   StridedTensor dy, StridedTensor r, void* sum_dz, void* sum_dz_xhat) {
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

void input_gradient(const Launch& l, const ActivationOptions& options, const AffineVectors& affine, StridedTensor y,
                    StridedTensor dy, StridedTensor r, StridedTensor dx, StridedTensor dz, Vector var, Vector mean_dz,
                    Vector mean_dz_xhat, double share) {
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

void fused_backward(const Launch& l, const ActivationOptions& options, const AffineVectors& affine, StridedTensor y,
                    StridedTensor dy, StridedTensor r, StridedTensor dx, StridedTensor dz, Vector var, void* sum_dz,
                    void* sum_dz_xhat) {
  Activated act(options);
  with_width(l, [&](auto width) {
    constexpr int W = decltype(width)::value;
    allow_shared(planes_fused_backward<W>, l.fused_bytes);
    IABN_LAUNCH((planes_fused_backward<W>), dim3(unsigned(l.shape.channels)), fused_block(l), l.fused_bytes, l.stream,
                l.shape, act, affine, y, dy, r, dx, dz, var, static_cast<A*>(sum_dz), static_cast<A*>(sum_dz_xhat));
  });
}

}  // namespace

#define IABN_JOIN_(a, b) a##b
#define IABN_JOIN(a, b) IABN_JOIN_(a, b)
const Launchers IABN_JOIN(k_, IABN_DTYPE) = {statistics,    normalize,      fused_forward,
                                             gradient_sums, input_gradient, fused_backward};

}  // namespace iabn::cuda
