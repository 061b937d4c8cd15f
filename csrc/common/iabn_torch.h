// What the drivers of every device need of torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>

#include "iabn.h"

namespace iabn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "iabn_hub: the input must be of a floating dtype");
  }
}

void check_counts(const Tensor& num_batches) {
  STD_TORCH_CHECK(num_batches.scalar_type() == ScalarType::Long, "iabn_hub: the number of batches must be int64");
}

// A new tensor on the device of `like`. torch::stable::new_empty and empty_like take twice as long: they go through the
// dispatcher.
Tensor new_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device = 0, number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, number, device, like.get_device_index(), &made));
  return Tensor(made);
}

Tensor new_vector(const Tensor& like, int64_t n, ScalarType dtype) {
  int64_t stride = 1;
  return new_strided(like, 1, &n, &stride, dtype);
}

// Whether the elements are in memory one behind the other, in the order of the dimensions or with the channels last.
bool is_dense(const Tensor& t) {
  auto sizes = t.sizes(), strides = t.strides();
  int64_t dims = t.dim();
  for (bool channels_last : {false, true}) {
    int64_t expected = 1;
    bool dense = true;
    auto follows = [&](int64_t d) {
      dense = dense && (sizes[d] == 1 || strides[d] == expected);
      expected *= sizes[d];
    };
    if (channels_last) follows(1);
    for (int64_t d = dims - 1; d >= 0; --d) {
      if (!channels_last || d != 1) follows(d);
    }
    if (dense) return true;
  }
  return false;
}

// A new tensor with the dtype, the sizes and the order of the dimensions of `like`.
Tensor new_like(const Tensor& like) {
  if (!is_dense(like)) return torch::stable::empty_like(like);
  return new_strided(like, like.dim(), like.sizes().data(), like.strides().data(), like.scalar_type());
}

ActivationOptions activation_options(int64_t activation, double param, Dtype stored) {
  double epsilon = stored == Dtype::f64    ? 0x1p-52
                   : stored == Dtype::f32  ? 0x1p-23
                   : stored == Dtype::bf16 ? 0x1p-7
                                           : 0x1p-10;
  return {static_cast<Activation>(activation), param, std::log(epsilon / 4)};
}

}  // namespace
}  // namespace iabn
