// What the CUDA kernels are made of: activations, per-channel values, vectors of elements, and walks over memory.
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

// ---- vectors in any dtype --------------------------------------------------------------------------------------------

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

IABN_DEVICE void put(const Output& v, int64_t c, A value) {
  if (v.data == nullptr) return;
  switch (v.dtype) {
    case Dtype::f32:
      static_cast<float*>(v.data)[c * v.stride] = float(value);
      break;
    case Dtype::f64:
      static_cast<double*>(v.data)[c * v.stride] = double(value);
      break;
    case Dtype::bf16:
      static_cast<Storage<Dtype::bf16>::type*>(v.data)[c * v.stride] = narrow<Storage<Dtype::bf16>::type>(float(value));
      break;
    case Dtype::f16:
      static_cast<Storage<Dtype::f16>::type*>(v.data)[c * v.stride] = narrow<Storage<Dtype::f16>::type>(float(value));
      break;
  }
}

// running += momentum·(batch − running)
IABN_DEVICE void renew(const Output& running, int64_t c, A batch, double momentum) {
  if (running.data == nullptr) return;
  A before = value({running.data, running.dtype, running.stride}, c, 0);
  put(running, c, before * A(1 - momentum) + batch * A(momentum));
}

// ---- activations -----------------------------------------------------------------------------------------------------

// What dz and z are found from in a backward pass. The kernels for the output of leaky ReLU without a residual have no
// code for anything else, and so need fewer registers.
enum class From { leaky_output, output, input };

// The activation as chosen when a kernel is launched: the branch is the same for all threads, and made once per vector.
struct Activated {
  Activation kind;
  A param, lowest;

  explicit Activated(const ActivationOptions& options)
      : kind(options.kind),
        param(options.kind == Activation::identity ? A(1) : A(options.param)),
        lowest(A(options.lowest)) {}

  bool is_leaky() const { return kind == Activation::leaky_relu || kind == Activation::identity; }

  template <Activation activation>
  IABN_DEVICE Act<activation, A> invertible() const {
    return {param, 1 / param, lowest};
  }
  // Calls f with the activation if it has no inverse; else returns false.
  template <typename F>
  IABN_DEVICE bool without_inverse(F f) const {
    switch (kind) {
      case Activation::silu:
        return f(FromInput<Activation::silu, A>{param}), true;
      case Activation::hardswish:
        return f(FromInput<Activation::hardswish, A>{param}), true;
      case Activation::relu6:
        return f(FromInput<Activation::relu6, A>{param}), true;
      default:
        return false;
    }
  }
  // Calls f with something that has forward(z).
  template <bool any, typename F>
  IABN_DEVICE void forward(F f) const {
    if constexpr (any) {
      if (without_inverse(f)) return;
      if (kind == Activation::elu) return f(invertible<Activation::elu>());
    }
    f(invertible<Activation::leaky_relu>());
  }
  // Calls f with something that has gradient(y, dy) and invert(y), or with From::input gradient(z, dy).
  template <From from, typename F>
  IABN_DEVICE void backward(F f) const {
    if constexpr (from == From::input) {
      if (without_inverse(f)) return;
      if (kind == Activation::elu) return f(FromInput<Activation::elu, A>{param});
      f(FromInput<Activation::leaky_relu, A>{param});
    } else {
      if constexpr (from == From::output) {
        if (kind == Activation::elu) return f(invertible<Activation::elu>());
      }
      f(invertible<Activation::leaky_relu>());
    }
  }
};

// ---- per-channel values ----------------------------------------------------------------------------------------------

// What a pass multiplies with and adds. Normalisation and From::input: z = (x − mean)·scale + shift. With t = act⁻¹(y) −
// residual, or From::input t = x − mean:
//   sums      x̂ = t·factor + term
//   gradient  dx = dz·scale + (t·factor + term)
struct Channel {
  A mean = 0, scale = 0, shift = 0, factor = 0, term = 0;
};

IABN_DEVICE A gamma_of(const AffineVectors& affine, int64_t c) {
  if (affine.weight.data == nullptr) return 1;
  return effective_scale(value(affine.weight, c, 1), A(affine.eps), affine.signed_scale);
}

IABN_DEVICE Channel forward_of(const AffineVectors& affine, int64_t c, A mean, A var) {
  return {mean, gamma_of(affine, c) / std::sqrt(var + A(affine.eps)), value(affine.bias, c, 0), 0, 0};
}

template <From from>
IABN_DEVICE Channel sums_of(const AffineVectors& affine, int64_t c, A mean, A var) {
  if constexpr (from == From::input) {
    Channel channel = forward_of(affine, c, mean, var);
    channel.factor = 1 / std::sqrt(var + A(affine.eps));
    return channel;
  } else {
    A inverse = inverse_scale(gamma_of(affine, c));
    return {0, 0, 0, inverse, -value(affine.bias, c, 0) * inverse};
  }
}

// Without means (eval mode) dx = dz·scale.
template <From from>
IABN_DEVICE Channel gradient_of(const AffineVectors& affine, int64_t c, A mean, A var, A mean_dz, A mean_dz_xhat) {
  Channel channel = forward_of(affine, c, mean, var);
  A slope = -channel.scale * mean_dz_xhat, intercept = -channel.scale * mean_dz;
  if constexpr (from == From::input) {
    channel.factor = slope / std::sqrt(var + A(affine.eps));
    channel.term = intercept;
  } else {
    channel.factor = slope * inverse_scale(gamma_of(affine, c));
    channel.term = intercept - channel.shift * channel.factor;
  }
  return channel;
}

// ---- vectors of W elements -------------------------------------------------------------------------------------------

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

// ---- formulas of one vector ------------------------------------------------------------------------------------------

template <int W>
struct Inputs {
  Pack<W> x, residual;
};

// act((x − origin − mean)·scale + shift [+ residual]); channel(i) is that of element i.
template <bool any, int W, typename ChannelOf>
IABN_DEVICE Values<W> activated(const Activated& act, const Inputs<W>& in, A origin, ChannelOf channel) {
  Values<W> v = unpack(in.x), residual;
  if constexpr (any) residual = unpack(in.residual);
  act.forward<any>([&](const auto& chosen) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Channel& c = channel(i);
      v.v[i] = chosen.forward(normalized(v.v[i] - origin, c.mean, c.scale, c.shift) + residual.v[i]);
    }
  });
  return v;
}

// The vectors at one place of what is kept, of dy, and of the residual, which is there with From::output alone.
template <From from, int W>
struct Gradients {
  Pack<W> kept, dy, residual;

  // Calls f(i, dz, t), with t as described at `Channel`.
  template <typename ChannelOf, typename F>
  IABN_DEVICE void each(const Activated& act, ChannelOf channel, F f) const {
    Values<W> v = unpack(kept), d = unpack(dy), r;
    if constexpr (from == From::output) r = unpack(residual);
    act.backward<from>([&](const auto& chosen) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if constexpr (from == From::input) {
          const Channel& c = channel(i);
          A t = v.v[i] - c.mean;
          f(i, chosen.gradient(A(t * c.scale + c.shift), d.v[i]), t);
        } else {
          f(i, chosen.gradient(v.v[i], d.v[i]), A(chosen.invert(v.v[i]) - r.v[i]));
        }
      }
    });
  }
};

template <From from, int W, typename Offset>
IABN_DEVICE Gradients<from, W> load_gradients(const BackwardOperands& o, Offset at) {
  Gradients<from, W> g;
  g.kept = load<W>(o.kept, at(o.kept));
  g.dy = load<W>(o.dy, at(o.dy));
  if constexpr (from == From::output) g.residual = load_any<W>(o.residual, at(o.residual));
  return g;
}

// Writes dx, and dz where it is asked for. Not `centred` is eval mode, where z may be infinite.
template <From from, int W, typename ChannelOf, typename Offset>
IABN_DEVICE void store_gradients(const Activated& act, const Gradients<from, W>& g, ChannelOf channel, bool centred,
                                 const BackwardOperands& o, Offset at) {
  Values<W> dx, dz;
  g.each(act, channel, [&](int i, A dz_value, A t) {
    const Channel& c = channel(i);
    dz.v[i] = dz_value;
    dx.v[i] = centred ? gradient_of_x(dz_value, t, c.scale, c.factor, c.term) : dz_value * c.scale;
  });
  store(o.dx, at(o.dx), dx);
  if constexpr (from == From::output) {
    if (o.dz.data != nullptr) store(o.dz, at(o.dz), dz);
  }
}

// ---- walks -----------------------------------------------------------------------------------------------------------

#ifndef IABN_UNDER_WAY
#define IABN_UNDER_WAY 2
#endif
// Vectors of each operand that a thread has asked for before it uses the first.
constexpr int kUnderWay = IABN_UNDER_WAY;

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

struct Share {
  int64_t tile, begin, end, part;
};

// The tile of this block, and its share of `count` slots or rows; `backward`: the other way round.
IABN_DEVICE Share share_of_block(int64_t count, bool backward) {
  int64_t tile = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  if (backward) tile = gridDim.x - 1 - tile, part = parts - 1 - part;
  return {tile, part * count / parts, (part + 1) * count / parts, part};
}

// Calls f(k, c + k) for the blockDim.x·W channels of a block of rows, each in one thread; c is the first of this thread.
template <int W, typename F>
IABN_DEVICE void for_channels(const Extent& s, int64_t c, F f) {
  int64_t first = c - int64_t(threadIdx.x) * W;
  for (unsigned k = threadIdx.y * blockDim.x + threadIdx.x; k < blockDim.x * W; k += blockDim.x * blockDim.y) {
    if (first + k < s.end) f(k, first + k);
  }
}

}  // namespace
}  // namespace iabn::cuda
