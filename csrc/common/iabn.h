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
enum class Activation : int64_t { identity = 0, leaky_relu = 1, elu = 2 };  // as in layers/activations.py

struct ActivationOptions {
  Activation kind;
  double param;
  double lowest;  // the largest z whose ELU is stored as −alpha
};

// Three functions of one element, or of a vector of elements. `param` is the negative slope or alpha, `inverse` its
// reciprocal, and `lowest` the z that stands for a saturated ELU, whose stored value has no finite inverse.
template <Activation activation, typename T>
struct Act {
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
    if constexpr (activation == Activation::leaky_relu) return y < 0 ? dy * param : dy;
    if constexpr (activation == Activation::elu) {
      V slope = y + param;
      return y < 0 ? dy * (slope < 0 ? V{} : slope) : dy;
    }
    return dy;
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
