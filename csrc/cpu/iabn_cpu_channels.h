// The per-channel values of iabn_cpu.cpp: from tensors of any dtype to what the kernels multiply with and add.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "iabn_cpu_walk.h"

namespace iabn {
namespace {

std::vector<double> to_doubles(const Optional& v, int64_t n, double otherwise) {
  std::vector<double> out(n, otherwise);
  if (!v) return out;
  Dtype dtype = dtype_of(*v);
  int64_t stride = v->stride(0);
  const void* p = v->data_ptr();
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == Dtype::f32) out[i] = static_cast<const float*>(p)[i * stride];
    else if (dtype == Dtype::f64) out[i] = static_cast<const double*>(p)[i * stride];
    else if (dtype == Dtype::bf16)
      out[i] = static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(p)[i * stride]);
    else out[i] = static_cast<float>(static_cast<const torch::headeronly::Half*>(p)[i * stride]);
  }
  return out;
}

void from_doubles(const Tensor& v, const std::vector<double>& values) {
  Dtype dtype = dtype_of(v);
  int64_t stride = v.stride(0), n = values.size();
  void* p = v.data_ptr();
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == Dtype::f32) static_cast<float*>(p)[i * stride] = float(values[i]);
    else if (dtype == Dtype::f64) static_cast<double*>(p)[i * stride] = values[i];
    else if (dtype == Dtype::bf16)
      static_cast<torch::headeronly::BFloat16*>(p)[i * stride] = torch::headeronly::BFloat16(float(values[i]));
    else static_cast<torch::headeronly::Half*>(p)[i * stride] = torch::headeronly::Half(float(values[i]));
  }
}

// A new vector in the dtype that is accumulated in for `like`, or in that of `like` itself.
Tensor per_channel(const Tensor& like, const std::vector<double>& values, bool same_dtype = false) {
  ScalarType dtype = same_dtype                     ? like.scalar_type()
                     : dtype_of(like) == Dtype::f64 ? ScalarType::Double
                                                    : ScalarType::Float;
  Tensor out = new_vector(like, values.size(), dtype);
  from_doubles(out, values);
  return out;
}

struct Affine {
  double eps;
  bool signed_scale;
  std::vector<double> weight, bias;  // weight of 1 stands for γ = 1, which is what no weight means
  bool has_weight;

  Affine(const Optional& w, const Optional& b, double eps, bool signed_scale, int64_t n)
      : eps(eps),
        signed_scale(signed_scale),
        weight(to_doubles(w, n, 1)),
        bias(to_doubles(b, n, 0)),
        has_weight(bool(w)) {}

  double gamma(int64_t c) const { return has_weight ? effective_scale(weight[c], eps, signed_scale) : 1; }
};

// The vectors of a `Channels`, in the type that the kernels accumulate in. Each term that is
// added is computed from the rounded factor that the kernels multiply with, so that no rounding counts twice.
template <typename T>
struct Vectors {
  std::vector<T> mean, scale, shift, inverse, offset, slope, intercept;

  explicit Vectors(const Affine& affine) {
    for (std::vector<T>* v : {&mean, &scale, &shift, &inverse, &offset}) v->resize(affine.bias.size());
    for (size_t c = 0; c < scale.size(); ++c) {
      inverse[c] = usual(inverse_scale(affine.gamma(c)));
      offset[c] = usual(-affine.bias[c] * inverse[c]);
    }
  }
  Vectors(const Vectors& other, int64_t repeat) {
    auto repeated = [repeat](std::vector<T>& to, const std::vector<T>& from) {
      to.reserve(from.size() * repeat);
      for (int64_t i = 0; i < repeat; ++i) to.insert(to.end(), from.begin(), from.end());
    };
    repeated(mean, other.mean), repeated(scale, other.scale), repeated(shift, other.shift);
    repeated(inverse, other.inverse), repeated(offset, other.offset);
    repeated(slope, other.slope), repeated(intercept, other.intercept);
  }

  Channels<T> view() const {
    auto data = [](const std::vector<T>& v) { return v.empty() ? nullptr : v.data(); };
    return {data(mean), data(scale), data(shift), data(inverse), data(offset), data(slope), data(intercept)};
  }
  void set_forward(const Affine& affine, int64_t c, double exact_mean, double var) {
    scale[c] = usual(affine.gamma(c) / std::sqrt(var + affine.eps));
    mean[c] = usual(exact_mean);
    shift[c] = usual(affine.bias[c] + (mean[c] - exact_mean) * scale[c]);
  }
  // dx = scale·(dz − mean_dz − x̂·mean_dz_xhat), with x̂ = (z − bias)/γ
  void set_backward(const Affine& affine, int64_t c, double mean_dz, double mean_dz_xhat) {
    slope[c] = usual(-mean_dz_xhat * scale[c] * inverse[c]);
    intercept[c] = usual(-mean_dz * scale[c] - affine.bias[c] * slope[c]);
  }
  // For what is computed from x: distances from the mean take the place of z.
  void set_from_input(const Affine& affine, int64_t c, double exact_mean, double var) {
    set_forward(affine, c, exact_mean, var);
    inverse[c] = usual(1 / std::sqrt(var + affine.eps));
    offset[c] = usual((mean[c] - exact_mean) * inverse[c]);
  }
  void set_backward_from_input(int64_t c, double mean_dz, double mean_dz_xhat) {
    slope[c] = usual(-mean_dz_xhat * scale[c] * inverse[c]);
    intercept[c] = usual(-mean_dz * scale[c] - mean_dz_xhat * scale[c] * offset[c]);
  }
  static T usual(double v) { return v == v ? T(v) : std::numeric_limits<T>::quiet_NaN(); }
  void centre() {
    slope.resize(scale.size());
    intercept.resize(scale.size());
  }
};

}  // namespace
}  // namespace iabn
