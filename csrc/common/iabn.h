// What the kernels of every device share: the activations, their inverses, and the formulas of one element.
//
//   z = γ·x̂ + β [+ r],   y = act(z)                                   forward
//   x̂ = (act⁻¹(y) − r − β)/γ,   dz = dy·act'(z)                       recovered from the output
//   dx = γ/σ·(dz − mean(dz) − x̂·mean(dz·x̂))                          backward
//
// The contracts of the operators stand in iabn_hub/layers/ops.py.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define IABN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IABN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace iabn {

enum class Dtype { f32, f64, bf16, f16 };
enum class Activation : int64_t {  // as in layers/activations.py; the last three have no inverse
  identity = 0,
  leaky_relu = 1,
  elu = 2,
  silu = 3,
  hardswish = 4,
  relu6 = 5
};

struct ActivationOptions {
  Activation kind;
  double param;
  double lowest;            // the largest z whose ELU is stored as −alpha
  bool from_input = false;  // what is kept is x, not y
};

// exp(v) of an element, or of a vector of elements of type T.
template <typename T, typename V>
IABN_HOST_DEVICE V exponential(V v) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return std::exp(v);
  } else if constexpr (sizeof(T) == 8) {
    for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) v[i] = std::exp(v[i]);
    return v;
  } else {
    // 2^k·e^r with |r| ≤ ln 2 / 2, in which the series to r^7 is exact to half an ulp. Adding 1.5·2^23 rounds to an
    // integer, which then stands in the low bits.
    using Bits = decltype(v < v);
    constexpr float kRound = 12582912.0f;
    v = v < -87.0f ? V{} - 87.0f : v > 88.0f ? V{} + 88.0f : v;
    V shifted = v * 1.44269504f + kRound, k = shifted - kRound;
    V r = (v - k * 0.693145752f) - k * 1.42860677e-6f;
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (V)(((Bits)shifted + (127 - 0x4b400000)) << 23);
  }
}

// Three functions of one element, or of a vector of elements. `param` is the negative slope or alpha, `inverse` its
// reciprocal, and `lowest` the z that stands for a saturated ELU, whose stored value has no finite inverse.
template <Activation activation, typename T>
struct Act {
  static constexpr bool from_input = false;
  T param, inverse, lowest;

  template <typename V>
  IABN_HOST_DEVICE V forward(V z) const {
    if constexpr (activation == Activation::leaky_relu) return z < 0 ? z * param : z;
    if constexpr (activation == Activation::elu) {
      if constexpr (sizeof(V) == sizeof(T)) return z < T(0) ? T(param * std::expm1(z)) : z;
      else
        for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) z[i] = forward(T(z[i]));
    }
    return z;
  }
  template <typename V>
  IABN_HOST_DEVICE V invert(V y) const {
    if constexpr (activation == Activation::leaky_relu) return y < 0 ? y * inverse : y;
    if constexpr (activation == Activation::elu) {
      if constexpr (sizeof(V) == sizeof(T)) {
        T ratio = y * inverse;  // below −1 where alpha was rounded up when it was stored
        T z = y < T(0) ? T(std::log1p(ratio < T(-1) ? T(-1) : ratio)) : y;
        return z < lowest ? lowest : z;
      } else {
        for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) y[i] = invert(T(y[i]));
      }
    }
    return y;
  }
  template <typename V>
  IABN_HOST_DEVICE V gradient(V y, V dy) const {
    if constexpr (activation == Activation::leaky_relu) return y > 0 ? dy : dy * param;
    if constexpr (activation == Activation::elu) {
      V slope = y + param;
      return y > 0 ? dy : dy * (slope < 0 ? V{} : slope);
    }
    return dy;
  }
};

// An activation whose input z is known in the backward pass as well, because x is kept: it needs no inverse.
template <Activation activation, typename T>
struct FromInput {
  static constexpr bool from_input = true;
  T param;

  template <typename V>
  IABN_HOST_DEVICE V forward(V z) const {
    if constexpr (activation == Activation::leaky_relu) return z < 0 ? z * param : z;
    if constexpr (activation == Activation::elu) return z < 0 ? (exponential<T>(z) - 1) * param : z;
    if constexpr (activation == Activation::silu) return z / (1 + exponential<T>(-z));
    if constexpr (activation == Activation::hardswish) return z * gate(z);
    if constexpr (activation == Activation::relu6) return z < 0 ? V{} : z > 6 ? V{} + 6 : z;
    return z;
  }
  // dy·act'(z)
  template <typename V>
  IABN_HOST_DEVICE V gradient(V z, V dy) const {
    if constexpr (activation == Activation::leaky_relu) return z > 0 ? dy : dy * param;
    if constexpr (activation == Activation::elu) return z > 0 ? dy : dy * exponential<T>(z) * param;
    if constexpr (activation == Activation::silu) {
      V s = 1 / (1 + exponential<T>(-z));
      return dy * (s * (1 + z * (1 - s)));
    }
    if constexpr (activation == Activation::hardswish) {
      return z <= T(-3) ? V{} : z >= T(3) ? dy : dy * (z * T(1.0 / 3) + T(0.5));
    }
    if constexpr (activation == Activation::relu6) return z > 0 ? (z < 6 ? dy : V{}) : V{};
    return dy;
  }

 private:
  template <typename V>
  IABN_HOST_DEVICE V gate(V z) const {
    V t = z + 3;
    return (t < 0 ? V{} : t > 6 ? V{} + 6 : t) * T(1.0 / 6);
  }
};

// ---- formulas of one element or vector; the factors and terms are those of its channel ----------------------------------

// γ of a weight: |w| + eps, or with signed_scale w itself
template <typename T>
IABN_HOST_DEVICE T effective_scale(T weight, T eps, bool signed_scale) {
  if (signed_scale) return weight;
  return (weight < 0 ? -weight : weight) + eps;
}

// 1/γ for the recovery of x̂, which is bounded: nothing of x̂ is left where γ is smaller.
template <typename T>
IABN_HOST_DEVICE T inverse_scale(T gamma) {
  constexpr T smallest = T(1e-5);
  if (gamma < 0) return 1 / (gamma > -smallest ? -smallest : gamma);
  return 1 / (gamma < smallest ? smallest : gamma);
}

// z without a residual, with scale = γ/σ and shift = β
template <typename V, typename S>
IABN_HOST_DEVICE V normalized(V x, S mean, S scale, S shift) {
  return (x - mean) * scale + shift;
}

// x̂ from z without a residual, with inverse = 1/γ and offset = −β/γ
template <typename V, typename S>
IABN_HOST_DEVICE V recovered(V z, S inverse, S offset) {
  return z * inverse + offset;
}

// dx = scale·(dz − mean(dz) − x̂·mean(dz·x̂)), with slope = −scale·mean(dz·x̂)/γ, intercept = −scale·mean(dz) − β·slope
template <typename V, typename S>
IABN_HOST_DEVICE V gradient_of_x(V dz, V z, S scale, S slope, S intercept) {
  return dz * scale + (z * slope + intercept);
}

// Count, mean and sum of squared distances of a set of values; merging two sets is Chan, Golub and LeVeque (1979).
template <typename T>
struct Moments {
  T count = 0, mean = 0, m2 = 0;

  IABN_HOST_DEVICE void merge(T n, T other_mean, T other_m2) {
    if (n == 0) return;
    T total = count + n, delta = other_mean - mean, share = n / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
};

}  // namespace iabn
