// What the CUDA kernels are made of: per-channel values, vectors of elements, sums that threads merge, and walks.
//
// For iabn_cuda_kernels.cu, which is compiled once per dtype.
#pragma once

#ifndef IABN_ON_HOST
#include "iabn_cuda_device.h"
#endif

#include "iabn_cuda.h"

namespace iabn::cuda {
namespace {

using T = Storage<Dtype::IABN_DTYPE>::type;  // what tensors hold
using A = Storage<Dtype::IABN_DTYPE>::wide;  // what is computed with

// ---- per-channel values --------------------------------------------------------------------------------------------

IABN_DEVICE A value(const Vector& v, int64_t c, A otherwise) {
  if (v.data == nullptr) return otherwise;
  switch (v.dtype) {
    case Dtype::f32:
      return A(static_cast<const float*>(v.data)[c * v.stride]);
    case Dtype::f64:
      return A(static_cast<const double*>(v.data)[c * v.stride]);
    case Dtype::bf16:
      return A(widen(static_cast<const Storage<Dtype::bf16>::type*>(v.data)[c * v.stride]));
    case Dtype::f16:
      return A(widen(static_cast<const Storage<Dtype::f16>::type*>(v.data)[c * v.stride]));
  }
  return otherwise;
}

IABN_DEVICE A gamma_of(const AffineVectors& affine, int64_t c) {
  if (affine.weight.data == nullptr) return 1;
  return effective_scale(value(affine.weight, c, 1), A(affine.eps), affine.signed_scale);
}

IABN_DEVICE A scale_of(const AffineVectors& affine, int64_t c, A var) {
  return gamma_of(affine, c) / sqrt(var + A(affine.eps));
}

// x̂ of a channel from z
struct Recovery {
  A inverse, offset;

  IABN_DEVICE Recovery(const AffineVectors& affine, int64_t c)
      : inverse(inverse_scale(gamma_of(affine, c))), offset(-value(affine.bias, c, 0) * inverse) {}
};

// dx of a channel from dz and z
struct Gradient {
  A scale, slope, intercept;
  bool centred;  // else in eval mode, where z may be infinite

  Gradient() = default;
  IABN_DEVICE Gradient(const AffineVectors& affine, int64_t c, A var, bool centred, A mean_dz, A mean_dz_xhat)
      : scale(scale_of(affine, c, var)), slope(0), intercept(0), centred(centred) {
    if (!centred) return;
    slope = -scale * mean_dz_xhat * inverse_scale(gamma_of(affine, c));
    intercept = -scale * mean_dz - value(affine.bias, c, 0) * slope;
  }
  IABN_DEVICE A of(A dz, A z) const { return centred ? gradient_of_x(dz, z, scale, slope, intercept) : dz * scale; }
};

// The activation as chosen when a kernel is launched: the branch is the same for all threads.
struct Activated {
  Act<Activation::leaky_relu, A> leaky;  // of slope 1 for the identity
  Act<Activation::elu, A> elu;
  bool is_elu;

  explicit Activated(const ActivationOptions& options) : is_elu(options.kind == Activation::elu) {
    A param = options.kind == Activation::identity ? A(1) : A(options.param);
    leaky = {param, 1 / param, A(options.lowest)};
    elu = {param, 1 / param, A(options.lowest)};
  }
  // Calls f with the activation itself: one branch for all elements of a vector.
  template <typename F>
  IABN_DEVICE void choose(F f) const {
    if (is_elu) f(elu);
    else f(leaky);
  }
};

// ---- vectors of W elements -----------------------------------------------------------------------------------------

// As it is in memory. The words stay as they are until a value is used: were they taken apart when they are loaded, the
// compiler would wait for one vector before it asks for the next.
template <int W>
struct Pack {
  typename Register<sizeof(T) * W>::type raw;
};

template <int W>
struct Values {
  A v[W] = {};
};

template <int W>
IABN_DEVICE Values<W> unpack(const Pack<W>& pack) {
  T v[W];
  memcpy(v, &pack.raw, sizeof(v));
  Values<W> out;
#pragma unroll
  for (int i = 0; i < W; ++i) out.v[i] = widen(v[i]);
  return out;
}

template <int W>
IABN_DEVICE Pack<W> load(const StridedTensor& o, int64_t offset) {
  return {read_vector<decltype(Pack<W>::raw)>(static_cast<const T*>(o.data) + offset)};
}

// Zeros where there is no operand, such as no residual.
template <int W>
IABN_DEVICE Pack<W> load_any(const StridedTensor& o, int64_t offset) {
  return o.data == nullptr ? Pack<W>{} : load<W>(o, offset);
}

template <int W>
IABN_DEVICE void store(const StridedTensor& o, int64_t offset, const Values<W>& values) {
  T v[W];
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = narrow<T>(values.v[i]);
  Pack<W> pack;
  memcpy(&pack.raw, v, sizeof(v));
  write_vector(static_cast<T*>(o.data) + offset, pack.raw);
}

// ---- sums that can be merged ---------------------------------------------------------------------------------------

// Σdz and Σdz·x̂
struct Sums {
  A dz = 0, product = 0;

  IABN_DEVICE void add(A d, A xhat) {
    dz += d;
    product += d * xhat;
  }
};

// Moments of the values that one thread sees, from distances to the first of them. Its own share of the variance bounds
// how far that one can lie from the mean, so that no more than log2(count) bits cancel.
struct Distances {
  A shift = 0, count = 0, sum = 0, squares = 0;

  IABN_DEVICE void start(A x) {
    if (count == 0) shift = x;
  }
  IABN_DEVICE void add(A x) {
    A d = x - shift;
    sum += d;
    squares += d * d;
  }
  // With a mean that counts from `origin`.
  IABN_DEVICE Moments<A> finished(A origin) const {
    if (count == 0) return {};
    A m2 = squares - sum * sum / count;
    return {count, (shift - origin) + sum / count, m2 < 0 ? A(0) : m2};
  }
};

// The first value of a channel. Means are merged as distances from it: were they merged as they are, a large one would
// have lost the digits that the variance needs.
IABN_DEVICE A origin(const StridedTensor& x, int64_t c) { return widen(static_cast<const T*>(x.data)[c * x.channel]); }

IABN_DEVICE void merge(Moments<A>& a, const Moments<A>& b) { a.merge(b.count, b.mean, b.m2); }
IABN_DEVICE void merge(Sums& a, const Sums& b) {
  a.dz += b.dz;
  a.product += b.product;
}

IABN_DEVICE Moments<A> from_lane(const Moments<A>& m, int mask) {
  return {shuffle_xor(m.count, mask), shuffle_xor(m.mean, mask), shuffle_xor(m.m2, mask)};
}
IABN_DEVICE Sums from_lane(const Sums& s, int mask) { return {shuffle_xor(s.dz, mask), shuffle_xor(s.product, mask)}; }

// The merged items of all threads of a block of whole warps, to thread 0.
template <typename Item>
IABN_DEVICE Item merge_block(Item item) {
  IABN_SHARED(Item, of_warp, 32);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int mask = 16; mask > 0; mask /= 2) merge(item, from_lane(item, mask));
  if (lane == 0) of_warp[warp] = item;
  __syncthreads();
  if (warp == 0) {
    item = lane < warps ? of_warp[lane] : Item{};
    for (int mask = 16; mask > 0; mask /= 2) merge(item, from_lane(item, mask));
  }
  return item;
}

// The merged items of all threads with the same threadIdx.x, to the one with threadIdx.y 0. blockDim.y is a power of two.
template <int threads, int W, typename Item>
IABN_DEVICE void merge_columns(Item (&items)[W]) {
  IABN_SHARED(Item, upper, threads / 2 * W);
  int y = threadIdx.y;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    int at = y % half * blockDim.x + threadIdx.x;
    if (y >= half && y < 2 * half) {
      for (int i = 0; i < W; ++i) upper[i * (threads / 2) + at] = items[i];
    }
    __syncthreads();
    if (y < half) {
      for (int i = 0; i < W; ++i) merge(items[i], upper[i * (threads / 2) + at]);
    }
    __syncthreads();
  }
}

// ---- walks ---------------------------------------------------------------------------------------------------------

#ifndef IABN_UNDER_WAY
#define IABN_UNDER_WAY 2
#endif
constexpr int kUnderWay =
    IABN_UNDER_WAY;  // vectors of each operand that a thread has asked for before it uses the first

// Calls use(i, load(i)) for i from `begin` in steps to `end`, with several loads under way.
template <int under_way = kUnderWay, typename Load, typename Use>
IABN_DEVICE void pipelined(int64_t begin, int64_t end, int64_t step, Load load, Use use) {
  for (int64_t first = begin; first < end; first += under_way * step) {
    decltype(load(begin)) loaded[under_way];
#pragma unroll
    for (int u = 0; u < under_way; ++u) {
      if (first + u * step < end) loaded[u] = load(first + u * step);
    }
#pragma unroll
    for (int u = 0; u < under_way; ++u) {
      if (first + u * step < end) use(first + u * step, loaded[u]);
    }
  }
}

// A vector of one channel: number `slot` of all its runs.
struct Slot {
  int64_t run, position;

  template <int W>
  IABN_DEVICE static Slot number(const Extent& s, int64_t slot) {
    uint32_t per_run = uint32_t(s.inner / W), run = uint32_t(slot) / per_run;
    return {int64_t(run), int64_t(uint32_t(slot) - run * per_run) * W};
  }
  // Where it lies in an operand.
  IABN_DEVICE int64_t in(const StridedTensor& o, int64_t c) const { return run * o.outer + c * o.channel + position; }
};

template <int W>
IABN_DEVICE int64_t slots(const Extent& s) {
  return s.per_channel() / W;
}

IABN_DEVICE int64_t in_row(const StridedTensor& o, int64_t row, int64_t c) { return row * o.inner + c; }

struct Share {
  int64_t tile, begin, end, part;
};

// The tile of this block, and its share of `count` slots or rows; `backward`: the other way round.
IABN_DEVICE Share share_of_block(int64_t count, bool backward) {
  int64_t tile = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  if (backward) tile = gridDim.x - 1 - tile, part = parts - 1 - part;
  return {tile, part * count / parts, (part + 1) * count / parts, part};
}

// ---- formulas of one vector ----------------------------------------------------------------------------------------

// act((x − mean)·scale + β [+ r])
template <typename Activation>
IABN_DEVICE A forward(const Activation& act, A x, A mean, A scale, A bias, A r) {
  return act.forward(normalized(x, mean, scale, bias) + r);
}

}  // namespace
}  // namespace iabn::cuda
