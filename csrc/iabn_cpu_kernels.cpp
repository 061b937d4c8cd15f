// The CPU kernels, compiled once per instruction set; IABN_LEVEL names the table, and the compiler vectorises.
//
// Everything happens in runs of at most kBlock values. A run that is not contiguous, or not of the accumulate type, is
// converted into a buffer in the L1 cache first, so that each formula is one plain loop over plain arrays.
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "iabn_cpu.h"

namespace iabn {
namespace {

// One vector register of the instruction set that this is compiled for.
#if defined(__AVX512F__)
constexpr int kVector = 64;
#elif defined(__AVX__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
constexpr int kAtOnce = 4;  // vectors summed independently, to cover the latency of an addition

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float type __attribute__((vector_size(kVector)));
};
template <>
struct LanesOf<double> {
  typedef double type __attribute__((vector_size(kVector)));
};
template <typename T>
constexpr int kLanes = kVector / sizeof(T);
template <typename T>
using Lanes = typename LanesOf<T>::type;

using u16 = uint16_t;
using u32 __attribute__((may_alias)) = uint32_t;

inline u32 bits_of(float f) {
  u32 u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float float_of(u32 u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

struct Float32 {
  using type = float;
  static constexpr Dtype dtype = Dtype::f32;
  static constexpr bool is_wide = true;  // it is also a type to accumulate in
  static float widen(float f) { return f; }
  static float narrow(float f) { return f; }
};

struct Float64 {
  using type = double;
  static constexpr Dtype dtype = Dtype::f64;
  static constexpr bool is_wide = true;  // it is also a type to accumulate in
  static double widen(double f) { return f; }
  static double narrow(double f) { return f; }
};

struct BFloat16 {
  using type = u16;
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr bool is_wide = false;  // it is also a type to accumulate in
  static float widen(u16 b) { return float_of(u32(b) << 16); }
  static u16 narrow(float f) {
    u32 u = bits_of(f);
    u32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    return u16((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

struct Float16 {
  using type = u16;
  static constexpr Dtype dtype = Dtype::f16;
  static constexpr bool is_wide = false;  // it is also a type to accumulate in
  static float widen(u16 h) {
    u32 u = u32(h & 0x7fff) << 13;
    // Scaling by 2^112 moves the exponent's bias, and normalises subnormal numbers on the way.
    float f = float_of(u) * float_of(0x77800000);
    u32 magnitude = (h & 0x7c00) == 0x7c00 ? u | 0x7f800000 : bits_of(f);
    return float_of(magnitude | u32(h & 0x8000) << 16);
  }
  static u16 narrow(float f) {
    u32 u = bits_of(f), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    u32 normal = (u + 0xc8000fff + ((u >> 13) & 1)) >> 13;
    u32 subnormal = bits_of(float_of(u) + 0.5f) - 0x3f000000;  // the addition rounds at 2^-24
    u32 magnitude = u < 0x38800000 ? subnormal : normal;
    if (u >= 0x47800000) magnitude = u > 0x7f800000 ? 0x7e00 : 0x7c00;
    return u16(magnitude | sign);
  }
};

// The format to accumulate in.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 8, Float64, Float32>;

template <typename F>
void with_format(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(Float32{});
    case Dtype::f64: return f(Float64{});
    case Dtype::bf16: return f(BFloat16{});
    case Dtype::f16: return f(Float16{});
  }
}

// Reading and writing runs that are not plain arrays of T: out of line, so that each formula is compiled once.
template <typename T>
__attribute__((noinline)) void read_run(const Operand& o, int64_t offset, int64_t stride, int64_t n, T* buffer) {
  with_format(o.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* p = static_cast<const typename Format::type*>(o.data) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = T(Format::widen(p[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = T(Format::widen(p[i * stride]));
    }
  });
}

template <typename T>
__attribute__((noinline)) void write_run(const Operand& o, int64_t offset, int64_t stride, int64_t n, const T* values) {
  with_format(o.dtype, [&](auto format) {
    using Format = decltype(format);
    auto* p = static_cast<typename Format::type*>(o.data) + offset;
    using Wide = decltype(Format::widen(*p));
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) p[i] = Format::narrow(Wide(values[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) p[i * stride] = Format::narrow(Wide(values[i]));
    }
  });
}

// A kernel works in a format F: the tensors' own if all of them have it and it is worth compiling, else that of T.
// n values of `o` from `offset` on, `stride` apart: where they lie if that will do, else converted into `buffer`.
template <typename F>
const typename F::type* load(const Operand& o, int64_t offset, int64_t stride, int64_t n, typename F::type* buffer) {
  using Type = typename F::type;
  if (o.dtype == F::dtype && (stride == 1 || n == 1)) return static_cast<const Type*>(o.data) + offset;
  if constexpr (F::is_wide) read_run(o, offset, stride, n, buffer);
  return buffer;
}

// Where to write n values of `o`: in place if that will do, else `buffer`, which `store` then writes out.
template <typename F>
typename F::type* place(const Operand& o, int64_t offset, int64_t stride, int64_t n, typename F::type* buffer) {
  return o.dtype == F::dtype && (stride == 1 || n == 1) ? static_cast<typename F::type*>(o.data) + offset : buffer;
}

template <typename F>
void store(const Operand& o, int64_t offset, int64_t stride, int64_t n, const typename F::type* values,
           const typename F::type* buffer) {
  if constexpr (F::is_wide) {
    if (values == buffer) write_run(o, offset, stride, n, values);
  }
}

// The residual of a layer that has none.
template <typename T>
alignas(64) constexpr T kNothing[kBlock] = {};

// ---- one run -------------------------------------------------------------------------------------------------------
// Tensors are read and written in their own format F, the residual in the accumulate type T. Each formula stands once,
// for a vector of elements or for a single one: `V` is either.

template <typename F>
using Stored = typename F::type;

typedef u16 NarrowLanes __attribute__((vector_size(kVector / 2)));
typedef uint32_t BitLanes __attribute__((vector_size(kVector)));

template <typename V, typename P>
V read(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// One element or one vector of a tensor, from p on.
template <typename V, typename F>
V get(const Stored<F>* p) {
  if constexpr (F::is_wide) {
    return read<V>(p);
  } else if constexpr (sizeof(V) == sizeof(float)) {
    return F::widen(*p);
  } else {
    static_assert(F::dtype == Dtype::bf16);
    BitLanes bits = __builtin_convertvector(read<NarrowLanes>(p), BitLanes) << 16;
    return read<V>(&bits);
  }
}

template <typename V, typename F>
void put(Stored<F>* p, V v) {
  if constexpr (F::is_wide) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (sizeof(V) == sizeof(float)) {
    *p = F::narrow(v);
  } else {
    BitLanes u = read<BitLanes>(&v);
    BitLanes rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // as BFloat16::narrow
    BitLanes out = (u & 0x7fffffff) > 0x7f800000 ? BitLanes{} + 0x7fc0 : rounded;
    NarrowLanes narrow = __builtin_convertvector(out, NarrowLanes);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
}

// The per-channel values of elements i on: their own when a run goes along the channels, else the only one.
template <typename V, bool along, typename T>
auto lane(const T* v, int64_t i) {
  if constexpr (along) return read<V>(v + i);
  else return v[0];
}

// Calls f(V{}, i) for whole vectors of n elements, then for the elements that are left over.
template <typename T, typename F>
void for_lanes(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(Lanes<T>{}, i);
  for (; i < n; ++i) f(T{}, i);
}

template <bool along, typename F, typename T, typename A>
void normalize_run(int64_t n, const Stored<F>* x, const T* r, Stored<F>* y, const Channels<T>& c, A act) {
  for_lanes<T>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    V centred = get<V, F>(x + i) - lane<V, along>(c.mean, i);
    V z = centred * lane<V, along>(c.scale, i) + lane<V, along>(c.bias, i) + read<V>(r + i);
    put<V, F>(y + i, act.forward(z));
  });
}

template <typename V>
struct Recovered {
  V dz, xhat;
};

template <typename V, bool along, typename F, typename T, typename A>
Recovered<V> recover(int64_t i, const Stored<F>* y, const Stored<F>* dy, const T* r, const Channels<T>& c, A act) {
  V out = get<V, F>(y + i);
  V dz = act.gradient(out, get<V, F>(dy + i));
  V xhat = (act.invert(out) - read<V>(r + i) - lane<V, along>(c.bias, i)) * lane<V, along>(c.inverse, i);
  return {dz, xhat};
}

// Adds dz and dz·x̂ of element i to sums[i] and products[i].
template <typename F, typename T, typename A>
void sum_row(int64_t n, const Stored<F>* y, const Stored<F>* dy, const T* r, const Channels<T>& c, A act, T* sums,
             T* products) {
  for_lanes<T>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    Recovered<V> v = recover<V, true, F>(i, y, dy, r, c, act);
    put<V, Wide<T>>(sums + i, read<V>(sums + i) + v.dz);
    put<V, Wide<T>>(products + i, read<V>(products + i) + v.dz * v.xhat);
  });
}

// Adds v − shift and (v − shift)² to element i of `sums` and `squares`.
template <typename F, typename T>
void add_row(int64_t n, const Stored<F>* x, const T* shift, T* sums, T* squares) {
  for_lanes<T>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    V d = get<V, F>(x + i) - read<V>(shift + i);
    put<V, Wide<T>>(sums + i, read<V>(sums + i) + d);
    put<V, Wide<T>>(squares + i, read<V>(squares + i) + d * d);
  });
}

// Σ of two quantities over a run, kAtOnce vectors at a time; `value` gives both for elements i on.
template <typename T, typename F>
void add_run(int64_t n, F&& value, double total[2]) {
  Lanes<T> first[kAtOnce] = {}, second[kAtOnce] = {};
  int64_t i = 0;
  for (; i + kAtOnce * kLanes<T> <= n; i += kAtOnce * kLanes<T>) {
    for (int k = 0; k < kAtOnce; ++k) {
      auto [a, b] = value(Lanes<T>{}, i + k * kLanes<T>);
      first[k] += a;
      second[k] += b;
    }
  }
  T rest[2] = {0, 0};
  for (; i < n; ++i) {
    auto [a, b] = value(T{}, i);
    rest[0] += a;
    rest[1] += b;
  }
  Lanes<T> one = (first[0] + first[1]) + (first[2] + first[3]);
  Lanes<T> two = (second[0] + second[1]) + (second[2] + second[3]);
  double sums[2] = {rest[0], rest[1]};
  for (int j = 0; j < kLanes<T>; ++j) sums[0] += one[j], sums[1] += two[j];
  total[0] += sums[0], total[1] += sums[1];
}

// Adds Σdz and Σdz·x̂ of a run of one channel to total[0] and total[1].
template <typename F, typename T, typename A>
void sum_run(int64_t n, const Stored<F>* y, const Stored<F>* dy, const T* r, const Channels<T>& c, A act,
             double total[2]) {
  add_run<T>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    Recovered<V> v = recover<V, false, F>(i, y, dy, r, c, act);
    return Recovered<V>{v.dz, v.dz * v.xhat};
  }, total);
}

// Σ(v − shift) and Σ(v − shift)² of n values.
template <typename F, typename T>
void shifted_sums(int64_t n, const Stored<F>* x, T shift, double out[2]) {
  out[0] = out[1] = 0;
  add_run<T>(n, [=](auto zero, int64_t i) {
    using V = decltype(zero);
    V d = get<V, F>(x + i) - shift;
    return Recovered<V>{d, d * d};
  }, out);
}

template <bool along, typename F, typename T, typename A>
void gradient_run(int64_t n, const Stored<F>* y, const Stored<F>* dy, const T* r, Stored<F>* dx, Stored<F>* dz_out,
                  const Channels<T>& c, A act) {
  if (c.mean_dz != nullptr) {
    for_lanes<T>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      Recovered<V> v = recover<V, along, F>(i, y, dy, r, c, act);
      V centre = lane<V, along>(c.mean_dz, i) + v.xhat * lane<V, along>(c.mean_dz_xhat, i);
      put<V, F>(dx + i, (v.dz - centre) * lane<V, along>(c.scale, i));
    });
  } else {  // eval mode
    for_lanes<T>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      V dz = act.gradient(get<V, F>(y + i), get<V, F>(dy + i));
      put<V, F>(dx + i, dz * lane<V, along>(c.scale, i));
    });
  }
  if (dz_out != nullptr) {
    for_lanes<T>(n, [=](auto zero, int64_t i) {
      using V = decltype(zero);
      put<V, F>(dz_out + i, act.gradient(get<V, F>(y + i), get<V, F>(dy + i)));
    });
  }
}

// ---- positions -----------------------------------------------------------------------------------------------------

// The element offset of outer position `run` in an operand.
int64_t outer_offset(const Shape& s, const Operand& o, int64_t run) {
  int64_t offset = 0;
  for (int d = kOuter - 1; d >= 0 && run > 0; --d) {
    offset += run % s.outer[d] * o.outer[d];
    run /= s.outer[d];
  }
  return offset;
}

// Calls f(run, start, n) for blocks [first, last) of one channel: n ≤ kBlock values of the run, from `start` on.
template <typename F>
void for_blocks(const Shape& s, int64_t first, int64_t last, F&& f) {
  int64_t per_run = (s.inner + kBlock - 1) / kBlock;
  for (int64_t b = first; b < last; ++b) {
    int64_t run = b / per_run, start = b % per_run * kBlock;
    f(run, start, s.inner - start < kBlock ? s.inner - start : kBlock);
  }
}

// Calls f(offsets, c0, n) for positions [first, last): the offset of each operand, and channels c0 to c0 + n.
template <int operands, typename F>
void for_rows(const Shape& s, const Operand* const (&o)[operands], int64_t first, int64_t last, int64_t c0, int64_t n,
              F&& f) {
  int64_t offsets[operands];
  for (int64_t position = first; position < last;) {
    int64_t run = position / s.inner, inner = position % s.inner;
    int64_t until = position + s.inner - inner < last ? position + s.inner - inner : last;
    for (int k = 0; k < operands; ++k) {
      offsets[k] = *o[k] ? outer_offset(s, *o[k], run) + inner * o[k]->inner + c0 * o[k]->channel : 0;
    }
    for (; position < until; ++position) {
      f(offsets, n);
      for (int k = 0; k < operands; ++k) offsets[k] += o[k]->inner;
    }
  }
}

template <typename T>
Channels<T> at_channel(const Channels<T>& c, int64_t i) {
  auto shift = [i](const T* v) { return v == nullptr ? v : v + i; };
  return {shift(c.mean), shift(c.scale), shift(c.bias), shift(c.inverse), shift(c.mean_dz), shift(c.mean_dz_xhat)};
}

// Calls f(act, format) with the activation, and the format that runs of all `operands` are read and written in, as
// compile-time values. `along`: runs go along the channels.
template <typename T, typename Operands, typename F>
void with_options(const ActivationOptions& a, bool along, const Operands& operands, F&& f) {
#ifdef IABN_BF16
  bool direct = sizeof(T) == 4;
  for (const Operand* o : operands) {
    direct = direct && (!*o || (o->dtype == Dtype::bf16 && (along ? o->channel : o->inner) == 1));
  }
#else
  (void)along, (void)operands;
#endif
  auto with_activation = [&](auto act) {
#ifdef IABN_BF16
    if constexpr (sizeof(T) == 4) {
      if (direct) return f(act, BFloat16{});
    }
#endif
    f(act, Wide<T>{});
  };
  T param = T(a.param), inverse = T(1 / a.param), lowest = T(a.lowest);
  switch (a.kind) {
    case Activation::identity: return with_activation(Act<Activation::identity, T>{param, inverse, lowest});
    case Activation::leaky_relu: return with_activation(Act<Activation::leaky_relu, T>{param, inverse, lowest});
    case Activation::elu: return with_activation(Act<Activation::elu, T>{param, inverse, lowest});
  }
}

template <typename T>
const T* load_residual(const Operand& r, int64_t offset, int64_t stride, int64_t n, T* buffer) {
  return r ? load<Wide<T>>(r, offset, stride, n, buffer) : kNothing<T>;
}

// ---- channels whose values lie in runs -----------------------------------------------------------------------------

template <typename T>
Moments block_moments(const Shape& s, const Operand& x, int64_t channel, int64_t first, int64_t last) {
  Moments moments;
  with_options<T>({}, false, std::initializer_list<const Operand*>{&x}, [&](auto, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type buffer[kBlock];
    for_blocks(s, first, last, [&](int64_t run, int64_t start, int64_t n) {
      const auto* v = load<F>(x, outer_offset(s, x, run) + channel * x.channel + start * x.inner, x.inner, n, buffer);
      double sums[2];
      double shift = moments.mean;
      if (moments.count == 0) {  // nothing is known of the mean yet: one more pass over a block in the L1 cache
        shifted_sums<F>(n, v, T(F::widen(v[0])), sums);
        shift = double(F::widen(v[0])) + sums[0] / double(n);
      }
      // Distances from the mean so far: no cancellation, however large the mean.
      T centre = T(shift);
      shifted_sums<F>(n, v, centre, sums);
      moments.merge(double(n), double(centre) + sums[0] / double(n), sums[1] - sums[0] * sums[0] / double(n));
    });
  });
  if (moments.m2 < 0) moments.m2 = 0;
  return moments;
}

template <typename T>
void block_sums(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
                const void* channels, int64_t channel, int64_t first, int64_t last, double sums[2]) {
  Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), channel);
  double total[2] = {0, 0};
  with_options<T>(a, false, std::initializer_list<const Operand*>{&y, &dy}, [&](auto act, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type yb[kBlock], db[kBlock];
    alignas(64) T rb[kBlock];
    for_blocks(s, first, last, [&](int64_t run, int64_t start, int64_t n) {
      auto at = [&](const Operand& o) { return outer_offset(s, o, run) + channel * o.channel + start * o.inner; };
      sum_run<F>(n, load<F>(y, at(y), y.inner, n, yb), load<F>(dy, at(dy), dy.inner, n, db),
                 load_residual(r, at(r), r.inner, n, rb), c, act, total);
    });
  });
  sums[0] = total[0], sums[1] = total[1];
}

template <typename T>
void block_normalize(const Shape& s, const ActivationOptions& a, const Operand& x, const Operand& r, const Operand& y,
                     const void* channels, int64_t channel, int64_t first, int64_t last) {
  Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), channel);
  with_options<T>(a, false, std::initializer_list<const Operand*>{&x, &y}, [&](auto act, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type xb[kBlock], yb[kBlock];
    alignas(64) T rb[kBlock];
    for_blocks(s, first, last, [&](int64_t run, int64_t start, int64_t n) {
      auto at = [&](const Operand& o) { return outer_offset(s, o, run) + channel * o.channel + start * o.inner; };
      auto* yp = place<F>(y, at(y), y.inner, n, yb);
      normalize_run<false, F>(n, load<F>(x, at(x), x.inner, n, xb), load_residual(r, at(r), r.inner, n, rb), yp, c, act);
      store<F>(y, at(y), y.inner, n, yp, yb);
    });
  });
}

template <typename T>
void block_gradient(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
                    const Operand& dx, const Operand& dz, const void* channels, int64_t channel, int64_t first,
                    int64_t last) {
  Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), channel);
  with_options<T>(a, false, std::initializer_list<const Operand*>{&y, &dy, &dx, &dz}, [&](auto act, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type yb[kBlock], db[kBlock], xb[kBlock], zb[kBlock];
    alignas(64) T rb[kBlock];
    for_blocks(s, first, last, [&](int64_t run, int64_t start, int64_t n) {
      auto at = [&](const Operand& o) { return outer_offset(s, o, run) + channel * o.channel + start * o.inner; };
      auto* xp = place<F>(dx, at(dx), dx.inner, n, xb);
      auto* zp = dz ? place<F>(dz, at(dz), dz.inner, n, zb) : nullptr;
      gradient_run<false, F>(n, load<F>(y, at(y), y.inner, n, yb), load<F>(dy, at(dy), dy.inner, n, db),
                             load_residual(r, at(r), r.inner, n, rb), xp, zp, c, act);
      store<F>(dx, at(dx), dx.inner, n, xp, xb);
      if (dz) store<F>(dz, at(dz), dz.inner, n, zp, zb);
    });
  });
}

// ---- rows of channels ----------------------------------------------------------------------------------------------

// Calls f(c0, n, r0, r1) for tiles of at most kBlock channels and kRows positions.
template <typename F>
void for_tiles(const Shape& s, int64_t first, int64_t last, F&& f) {
  for (int64_t r0 = first; r0 < last; r0 += kRows) {
    int64_t r1 = r0 + kRows < last ? r0 + kRows : last;
    for (int64_t c0 = 0; c0 < s.channels; c0 += kBlock) {
      f(c0, s.channels - c0 < kBlock ? s.channels - c0 : kBlock, r0, r1);
    }
  }
}

template <typename T>
void row_moments(const Shape& s, const Operand& x, int64_t first, int64_t last, double* mean, double* m2) {
  for (int64_t c = 0; c < s.channels; ++c) mean[c] = m2[c] = 0;
  const Operand* operands[] = {&x};
  with_options<T>({}, true, operands, [&](auto, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type buffer[kBlock];
    alignas(64) T shift[kBlock], sums[kBlock], squares[kBlock];
    for_tiles(s, first, last, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      auto pass = [&](int64_t until) {
        for (int64_t i = 0; i < n; ++i) sums[i] = squares[i] = 0;
        for_rows(s, operands, r0, until, c0, n, [&](const int64_t* offsets, int64_t n) {
          add_row<F>(n, load<F>(x, offsets[0], x.channel, n, buffer), shift, sums, squares);
        });
      };
      // Distances from the mean so far; before anything is known of it, from that of the first tile.
      for (int64_t i = 0; i < n; ++i) shift[i] = T(mean[c0 + i]);
      if (r0 == first) {
        for_rows(s, operands, r0, r0 + 1, c0, n, [&](const int64_t* offsets, int64_t n) {
          const auto* v = load<F>(x, offsets[0], x.channel, n, buffer);
          for (int64_t i = 0; i < n; ++i) shift[i] = F::widen(v[i]);
        });
        pass(r1);
        for (int64_t i = 0; i < n; ++i) shift[i] += sums[i] / T(r1 - r0);
      }
      pass(r1);
      double before = double(r0 - first), here = double(r1 - r0), share = here / (before + here);
      for (int64_t i = 0; i < n; ++i) {  // Moments::merge, with one count for all channels
        double sum = sums[i], delta = double(shift[i]) + sum / here - mean[c0 + i];
        double tile = double(squares[i]) - sum * sum / here;
        mean[c0 + i] += delta * share;
        m2[c0 + i] += (tile > 0 ? tile : tile == tile ? 0 : tile) + delta * delta * before * share;
      }
    });
  });
}

template <typename T>
void row_sums(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
              const void* channels, int64_t first, int64_t last, double* sum_dz, double* sum_dz_xhat) {
  for (int64_t c = 0; c < s.channels; ++c) sum_dz[c] = sum_dz_xhat[c] = 0;
  const Operand* operands[] = {&y, &dy, &r};
  with_options<T>(a, true, std::initializer_list<const Operand*>{&y, &dy}, [&](auto act, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type yb[kBlock], db[kBlock];
    alignas(64) T rb[kBlock], sums[kBlock], products[kBlock];
    for_tiles(s, first, last, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), c0);
      for (int64_t i = 0; i < n; ++i) sums[i] = products[i] = 0;
      for_rows(s, operands, r0, r1, c0, n, [&](const int64_t* offsets, int64_t n) {
        sum_row<F>(n, load<F>(y, offsets[0], y.channel, n, yb), load<F>(dy, offsets[1], dy.channel, n, db),
                         load_residual(r, offsets[2], r.channel, n, rb), c, act, sums, products);
      });
      for (int64_t i = 0; i < n; ++i) sum_dz[c0 + i] += sums[i], sum_dz_xhat[c0 + i] += products[i];
    });
  });
}

template <typename T>
void row_normalize(const Shape& s, const ActivationOptions& a, const Operand& x, const Operand& r, const Operand& y,
                   const void* channels, int64_t first, int64_t last) {
  const Operand* operands[] = {&x, &r, &y};
  with_options<T>(a, true, std::initializer_list<const Operand*>{&x, &y}, [&](auto act, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type xb[kBlock], yb[kBlock];
    alignas(64) T rb[kBlock];
    for_tiles(s, first, last, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), c0);
      for_rows(s, operands, r0, r1, c0, n, [&](const int64_t* offsets, int64_t n) {
        auto* yp = place<F>(y, offsets[2], y.channel, n, yb);
        normalize_run<true, F>(n, load<F>(x, offsets[0], x.channel, n, xb),
                               load_residual(r, offsets[1], r.channel, n, rb), yp, c, act);
        store<F>(y, offsets[2], y.channel, n, yp, yb);
      });
    });
  });
}

template <typename T>
void row_gradient(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
                  const Operand& dx, const Operand& dz, const void* channels, int64_t first, int64_t last) {
  const Operand* operands[] = {&y, &dy, &r, &dx, &dz};
  with_options<T>(a, true, std::initializer_list<const Operand*>{&y, &dy, &dx, &dz}, [&](auto act, auto format) {
    using F = decltype(format);
    alignas(64) typename F::type yb[kBlock], db[kBlock], xb[kBlock], zb[kBlock];
    alignas(64) T rb[kBlock];
    for_tiles(s, first, last, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), c0);
      for_rows(s, operands, r0, r1, c0, n, [&](const int64_t* offsets, int64_t n) {
        auto* xp = place<F>(dx, offsets[3], dx.channel, n, xb);
        auto* zp = dz ? place<F>(dz, offsets[4], dz.channel, n, zb) : nullptr;
        gradient_run<true, F>(n, load<F>(y, offsets[0], y.channel, n, yb), load<F>(dy, offsets[1], dy.channel, n, db),
                              load_residual(r, offsets[2], r.channel, n, rb), xp, zp, c, act);
        store<F>(dx, offsets[3], dx.channel, n, xp, xb);
        if (dz) store<F>(dz, offsets[4], dz.channel, n, zp, zb);
      });
    });
  });
}

template <typename T>
constexpr Kernels kernels() {
  return {block_moments<T>, block_sums<T>, block_normalize<T>, block_gradient<T>,
          row_moments<T>,   row_sums<T>,   row_normalize<T>,   row_gradient<T>};
}

}  // namespace

const Kernels IABN_LEVEL = kernels<float>();
#ifdef IABN_FLOAT64
const Kernels kFloat64 = kernels<double>();
#endif

}  // namespace iabn
