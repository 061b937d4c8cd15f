// Runs of values in the CPU's memory: their formats, and loops over them, in vectors.
//
// For iabn_cpu_kernels.cpp, which is compiled once per instruction set. A run is at most kBlock values long. One that is
// not contiguous, or not in the format that a kernel works in, is converted into a buffer in the L1 cache first.
#pragma once

#include <cstring>
#include <type_traits>

#include "iabn_cpu.h"

namespace iabn {
namespace {

// ---- formats -------------------------------------------------------------------------------------------------------

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
  static constexpr bool is_wide = true;  // its values are accumulated in the type that stores them
  static float widen(float f) { return f; }
  static float narrow(float f) { return f; }
};

struct Float64 {
  using type = double;
  static constexpr Dtype dtype = Dtype::f64;
  static constexpr bool is_wide = true;  // its values are accumulated in the type that stores them
  static double widen(double f) { return f; }
  static double narrow(double f) { return f; }
};

struct BFloat16 {
  using type = u16;
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr bool is_wide = false;  // stored in 16 bits, accumulated in float
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
  static constexpr bool is_wide = false;  // stored in 16 bits, accumulated in float
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
using Stored = typename F::type;

template <typename F>
void with_format(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(Float32{});
    case Dtype::f64:
      return f(Float64{});
    case Dtype::bf16:
      return f(BFloat16{});
    case Dtype::f16:
      return f(Float16{});
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
__attribute__((noinline)) void write_run(const Operand& o, int64_t offset, int64_t stride, int64_t n, T* values) {
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
const Stored<F>* load(const Operand& o, int64_t offset, int64_t stride, int64_t n, Stored<F>* buffer) {
  if (o.dtype == F::dtype && (stride == 1 || n == 1)) return static_cast<const Stored<F>*>(o.data) + offset;
  if constexpr (F::is_wide) read_run(o, offset, stride, n, buffer);
  return buffer;
}

// Where to write n values of `o`: in place if that will do, else `buffer`, which `store` then writes out.
template <typename F>
Stored<F>* place(const Operand& o, int64_t offset, int64_t stride, int64_t n, Stored<F>* buffer) {
  return o.dtype == F::dtype && (stride == 1 || n == 1) ? static_cast<Stored<F>*>(o.data) + offset : buffer;
}

template <typename F>
void store(const Operand& o, int64_t offset, int64_t stride, int64_t n, Stored<F>* values, Stored<F>* buffer) {
  if constexpr (F::is_wide) {
    if (values == buffer) write_run(o, offset, stride, n, values);
  }
}

// ---- vectors -------------------------------------------------------------------------------------------------------
// Loops go over pairs of vectors. In bfloat16 a pair is one register of values: those in even places become the first
// vector, those in odd places the second, which takes no more than a shift and a mask. So the elements of a pair are in
// another order than in memory, and so are values that are added to them element by element: see `to_pairs`.

#if defined(__AVX512F__)
constexpr int kVector = 64;  // bytes of one register
#elif defined(__AVX__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif

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
using Lanes = typename LanesOf<T>::type;
template <typename T>
constexpr int kLanes = kVector / sizeof(T);
template <typename T>
constexpr int kPair = 2 * kLanes<T>;

typedef uint32_t BitLanes __attribute__((vector_size(kVector)));

// Where a formula is evaluated: for the element at i, or for one half of the pair that starts at i.
template <typename T>
struct One {
  using Value = T;
  int64_t i;
  int64_t position() const { return i; }
};
template <typename T, int half>
struct Half {
  using Value = Lanes<T>;
  int64_t i;
  int64_t position() const { return i + half * kLanes<T>; }
};

template <typename V, typename P>
V read(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V, typename P>
void write(P* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// The values of a run there.
template <typename F, typename T>
T get(const Stored<F>* run, One<T> at) {
  return T(F::widen(run[at.i]));
}
template <typename F, typename T, int half>
Lanes<T> get(const Stored<F>* run, Half<T, half> at) {
  if constexpr (F::is_wide) {
    return read<Lanes<T>>(run + at.position());
  } else {
    static_assert(F::dtype == Dtype::bf16);
    BitLanes bits = read<BitLanes>(run + at.i);
    if constexpr (half == 0) bits <<= 16;
    else bits &= 0xffff0000;
    return read<Lanes<T>>(&bits);
  }
}

// The per-channel values there: as many if a run goes along the channels, else the only one.
template <bool along, typename At, typename T>
auto lane(const T* v, At at) {
  if constexpr (along) return read<typename At::Value>(v + at.position());
  else return v[0];
}

// As BFloat16::narrow, in the upper halves. No NaN becomes a number: those of bfloat16 tensors and of `Channels` have
// nothing but zeros in their lower halves.
inline BitLanes rounded(Lanes<float> v) {
  BitLanes u = read<BitLanes>(&v);
  return u + 0x7fff + ((u >> 16) & 1);
}

template <typename F, typename V>
void put_pair(Stored<F>* p, V first, V second) {
  if constexpr (F::is_wide) {
    write(p, first);
    write(p + sizeof(V) / sizeof(*p), second);
  } else {
    write(p, BitLanes((rounded(first) >> 16) | (rounded(second) & 0xffff0000)));
  }
}

// out[i] = value(i) for a run of n elements. What does not fill a pair is left to a pair that ends with the run, and is
// evaluated first, since `out` may be what `value` reads. Not in the order of pairs, where a place decides what is meant.
template <typename F, typename T, bool in_pairs, typename Formula>
void map(int64_t n, Stored<F>* out, Formula value) {
  constexpr int64_t step = kPair<T>;
  int64_t i = 0;
  if (in_pairs || n < step) {
    for (; i + step <= n; i += step) put_pair<F>(out + i, value(Half<T, 0>{i}), value(Half<T, 1>{i}));
    for (; i < n; ++i) out[i] = F::narrow(value(One<T>{i}));
    return;
  }
  Lanes<T> first = value(Half<T, 0>{n - step}), second = value(Half<T, 1>{n - step});
  for (; i + step < n; i += step) put_pair<F>(out + i, value(Half<T, 0>{i}), value(Half<T, 1>{i}));
  put_pair<F>(out + n - step, first, second);
}

// Two quantities of one element or vector.
template <typename V>
struct Two {
  V first, second;
};

// Sums of two quantities: in vectors over a few runs, then `take` adds those up.
template <typename T>
struct Totals {
  Lanes<T> first[4] = {}, second[4] = {};  // four, to cover the latency of an addition
  T rest[2] = {0, 0};

  Two<double> take() {
    Lanes<T> one = (first[0] + first[1]) + (first[2] + first[3]);
    Lanes<T> two = (second[0] + second[1]) + (second[2] + second[3]);
    double even[2] = {rest[0], rest[1]}, odd[2] = {};
    for (int j = 0; j < kLanes<T>; j += 2) {
      even[0] += one[j], even[1] += two[j];
      odd[0] += one[j + 1], odd[1] += two[j + 1];
    }
    *this = {};
    return {even[0] + odd[0], even[1] + odd[1]};
  }
};

// The elements of half a pair that are at `skip` or later in memory, and zeros.
template <typename F, typename T, int half>
Lanes<T> from_element(int64_t skip, Lanes<T> v) {
  Lanes<T> element;
  for (int j = 0; j < kLanes<T>; ++j) element[j] = T(F::is_wide ? j + half * kLanes<T> : 2 * j + half);
  return element < T(skip) ? Lanes<T>{} : v;
}

// Adds value(i) for a run of n elements in format F.
template <typename F, typename T, typename Formula>
void add(int64_t n, Totals<T>& totals, Formula value) {
  constexpr int64_t step = kPair<T>;
  Totals<T> t = totals;
  auto add_pair = [&](int k, int64_t i) {
    auto [a, b] = value(Half<T, 0>{i});
    auto [c, d] = value(Half<T, 1>{i});
    t.first[k] += a, t.second[k] += b;
    t.first[k + 1] += c, t.second[k + 1] += d;
  };
  int64_t i = 0;
  for (; i + 2 * step <= n; i += 2 * step) add_pair(0, i), add_pair(2, i + step);
  if (i + step <= n) add_pair(0, i), i += step;
  if (i < n && n >= step) {  // a last pair, of which only what is left counts
    int64_t skip = i - (n - step);
    auto [a, b] = value(Half<T, 0>{n - step});
    auto [c, d] = value(Half<T, 1>{n - step});
    t.first[0] += from_element<F, T, 0>(skip, a), t.second[0] += from_element<F, T, 0>(skip, b);
    t.first[1] += from_element<F, T, 1>(skip, c), t.second[1] += from_element<F, T, 1>(skip, d);
    i = n;
  }
  for (; i < n; ++i) {
    auto [a, b] = value(One<T>{i});
    t.rest[0] += a, t.rest[1] += b;
  }
  totals = t;
}

// Adds each formula's value(i) to first[i] and second[i], which have the order of pairs.
template <typename T, typename... Formulas>
IABN_HOST_DEVICE void add_along(int64_t n, T* first, T* second, Formulas... values) {
  auto add_there = [=](auto at) {
    auto one = lane<true>(first, at), two = lane<true>(second, at);
    auto add = [&](auto pair) { one += pair.first, two += pair.second; };
    (add(values(at)), ...);
    write(first + at.position(), one);
    write(second + at.position(), two);
  };
  int64_t i = 0;
  for (; i + kPair<T> <= n; i += kPair<T>) add_there(Half<T, 0>{i}), add_there(Half<T, 1>{i});
  for (; i < n; ++i) add_there(One<T>{i});
}

// n values from the order of memory to that of pairs of format F, or back.
template <typename F, typename T, typename P>
void to_pairs(int64_t n, const P* from, P* to) {
  constexpr bool apart = !F::is_wide;
  int64_t i = 0;
  for (; apart && i + kPair<T> <= n; i += kPair<T>) {
    for (int j = 0; j < kLanes<T>; ++j) to[i + j] = from[i + 2 * j], to[i + kLanes<T> + j] = from[i + 2 * j + 1];
  }
  for (; i < n; ++i) to[i] = from[i];
}
template <typename F, typename T, typename P>
void from_pairs(int64_t n, const P* from, P* to) {
  constexpr bool apart = !F::is_wide;
  int64_t i = 0;
  for (; apart && i + kPair<T> <= n; i += kPair<T>) {
    for (int j = 0; j < kLanes<T>; ++j) to[i + 2 * j] = from[i + j], to[i + 2 * j + 1] = from[i + kLanes<T> + j];
  }
  for (; i < n; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace iabn
