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

ActivationOptions activation_options(int64_t activation, double param, Dtype stored) {
  double epsilon = stored == Dtype::f64    ? 0x1p-52
                   : stored == Dtype::f32  ? 0x1p-23
                   : stored == Dtype::bf16 ? 0x1p-7
                                           : 0x1p-10;
  return {static_cast<Activation>(activation), param, std::log(epsilon / 4)};
}

}  // namespace
}  // namespace iabn
