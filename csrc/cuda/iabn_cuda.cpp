// The operators on CUDA: which layout, which kernels, and the memory they work in. Everything is queued on the current
// stream and nothing waits for it, so that a training step can be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "iabn_cuda.h"
#include "iabn_torch.h"

namespace {

using namespace iabn;
using namespace iabn::cuda;

const Launchers& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return k_f64;
    case Dtype::bf16:
      return k_bf16;
    case Dtype::f16:
      return k_f16;
    default:
      return k_f32;
  }
}

Device device_of(const Tensor& t) {
  int processors = 0, bytes = 0, index = t.get_device_index();
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  STD_TORCH_CHECK(error == cudaSuccess, "iabn_hub: CUDA: ", cudaGetErrorString(error));
  return {processors, bytes};
}

// ---- layouts ---------------------------------------------------------------------------------------------------------

// Merges dimensions [first, last) of a tensor without the channel into one: its stride, or −1 if there is none.
int64_t merged_stride(const Tensor& t, int64_t first) {
  int64_t stride = -1, expected = 0;
  for (int64_t d = t.dim() - 1; d >= first; --d) {
    if (d == 1 || t.size(d) == 1) continue;
    if (stride < 0) stride = t.stride(d);
    else if (t.stride(d) != expected) return -1;
    expected = t.stride(d) * t.size(d);
  }
  return stride < 0 ? 1 : stride;  // a single element has any stride
}

// The tensor as rows or planes, if it is so laid out.
std::optional<StridedTensor> as_layout(const Tensor& t, bool rows) {
  StridedTensor o{t.data_ptr(), 0, 0, 0};
  o.channel = t.size(1) == 1 ? 1 : t.stride(1);
  if (rows) {
    if (o.channel != 1) return std::nullopt;
    o.inner = merged_stride(t, 0);
    return o.inner > 0 ? std::optional(o) : std::nullopt;  // 0: rows that share memory, whose copy has another layout
  }
  o.inner = merged_stride(t, 2);
  o.outer = t.size(0) == 1 ? 0 : t.stride(0);
  return o.inner == 1 ? std::optional(o) : std::nullopt;
}

int64_t alignment_of(const StridedTensor& o, const Extent& s, int64_t bytes) {
  uint64_t all = 16 | reinterpret_cast<uintptr_t>(o.data);
  if (s.rows) all |= uint64_t(o.inner * bytes);
  else all |= uint64_t(o.outer * bytes) | (s.channels > 1 ? uint64_t(o.channel * bytes) : 0);
  return int64_t(all & -all);
}

// Several tensors of one shape, ready for a launch. The first decides the layout; one that is laid out otherwise is
// copied, and one that is written is copied back by `finish`.
struct Work {
  Launch launch{};
  Dtype dtype;
  std::vector<StridedTensor> operands;  // an undefined tensor gives an empty one
  torch::stable::accelerator::DeviceGuard guard;
  int64_t element_bytes;
  Device device;

  Work(const std::vector<const Tensor*>& reads, const std::vector<Tensor*>& writes)
      : dtype(dtype_of(*reads[0])),
        guard(reads[0]->get_device_index()),
        element_bytes(reads[0]->element_size()),
        device(device_of(*reads[0])) {
    const Tensor& first = *reads[0];
    Extent& s = launch.shape;
    s.channels = first.size(1);
    bool planes = as_layout(first, false).has_value();
    s.rows = as_layout(first, true).has_value() && (s.channels > 1 || !planes);
    Tensor like = s.rows || planes ? first : torch::stable::contiguous(first);
    s.outer = s.rows ? 1 : first.size(0);
    s.inner = first.numel() / s.channels / s.outer;
    add(&like, like, true);
    for (size_t k = 1; k < reads.size(); ++k) add(reads[k], like, true);
    for (Tensor* t : writes) {
      if (Tensor copy = add(t, like, false); copy.defined()) back.push_back({*t, copy});
    }
    int64_t alignment = 16;
    for (const StridedTensor& o : operands) {
      if (o.data != nullptr) alignment = std::min(alignment, alignment_of(o, s, element_bytes));
    }
    launch.plan = make_plan(s, element_bytes, alignment, device);
    STD_TORCH_CHECK(s.per_channel() / launch.plan.width <= std::numeric_limits<uint32_t>::max(),
                    "iabn_hub: more than 2^32 vectors of values per channel");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
    launch.stream = stream;
  }

  // Room for the parts of every channel.
  void need_partial() {
    ScalarType accumulate = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    partial = torch::stable::new_empty(kept.front(), {3 * launch.plan.parts * launch.shape.channels}, accumulate);
    launch.partial = partial.data_ptr();
  }
  bool fuse(int64_t tensors) {
    launch.fused_bytes = fused_bytes(launch.shape, element_bytes, tensors, device);
    return launch.fused_bytes > 0;
  }
  void finish() {
    for (auto& [to, from] : back) torch::stable::copy_(to, from);
  }

 private:
  std::vector<Tensor> kept;  // until the kernels are queued: the allocator gives memory back in the order of the stream
  std::vector<std::pair<Tensor, Tensor>> back;
  Tensor partial;

  // Adds an operand; returns the copy that stands for it, if it needs one.
  Tensor add(const Tensor* t, const Tensor& like, bool read) {
    if (t == nullptr || t->numel() == 0) {
      operands.push_back({});
      return Tensor();
    }
    STD_TORCH_CHECK(t->get_device_index() == like.get_device_index(), "iabn_hub: tensors are on different devices");
    std::optional<StridedTensor> o =
        t->scalar_type() == like.scalar_type() ? as_layout(*t, launch.shape.rows) : std::nullopt;
    Tensor copy;
    if (!o) {
      copy = torch::stable::empty_like(like);
      if (read) torch::stable::copy_(copy, *t);
      o = as_layout(copy, launch.shape.rows);
      STD_TORCH_CHECK(o.has_value(), "iabn_hub: this layout is not supported");
    }
    kept.push_back(copy.defined() ? copy : *t);
    operands.push_back(*o);
    return copy;
  }
};

// ---- per-channel values ----------------------------------------------------------------------------------------------

Vector vector_of(const Optional& v, const Tensor& like) {
  if (!v) return {};
  STD_TORCH_CHECK(v->is_cuda() && v->get_device_index() == like.get_device_index(),
                  "iabn_hub: weight, bias and statistics must be on the device of the input");
  return {v->data_ptr(), dtype_of(*v), v->stride(0)};
}

Tensor per_channel(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(1)},
                                  dtype_of(like) == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
}

Tensor zeros_per_channel(const Tensor& like) {
  return torch::stable::new_zeros(like, {like.size(1)},
                                  dtype_of(like) == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
}

AffineVectors affine_of(const Tensor& like, const Optional& weight, const Optional& bias, double eps,
                        bool signed_scale) {
  return {vector_of(weight, like), vector_of(bias, like), eps, signed_scale};
}

const Tensor* pointer(const Optional& t) { return t ? &*t : nullptr; }

// ---- forward ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "iabn_hub: the input must be (N, C, *)");
  if (x.numel() == 0) return {zeros_per_channel(x), zeros_per_channel(x)};
  Tensor mean = per_channel(x), var = per_channel(x);
  Work work({&x}, {});
  work.need_partial();
  kernels_for(work.dtype).statistics(work.launch, work.operands[0], mean.data_ptr(), var.data_ptr());
  return {mean, var};
}

void normalize_into(Tensor y, const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight,
                    const Optional& bias, const Optional& residual, double eps, int64_t activation, double param,
                    bool signed_scale) {
  if (x.numel() == 0) return;
  Work work({&x, pointer(residual)}, {&y});
  const auto& o = work.operands;
  kernels_for(work.dtype)
      .normalize(work.launch, activation_options(activation, param, work.dtype),
                 affine_of(x, weight, bias, eps, signed_scale), o[0], o[1], o[2], vector_of(mean, x),
                 vector_of(var, x));
  work.finish();
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                 const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  Tensor y = torch::stable::empty_like(x);
  normalize_into(y, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
  return y;
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  normalize_into(x, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
}

std::tuple<Tensor, Tensor> batch_normalize_into(Tensor y, const Tensor& x, const Optional& weight, const Optional& bias,
                                                const Optional& residual, double eps, int64_t activation, double param,
                                                bool signed_scale) {
  if (x.numel() == 0) return {zeros_per_channel(x), zeros_per_channel(x)};
  Tensor mean = per_channel(x), var = per_channel(x);
  Work work({&x, pointer(residual)}, {&y});
  const Launchers& k = kernels_for(work.dtype);
  const auto& o = work.operands;
  ActivationOptions options = activation_options(activation, param, work.dtype);
  AffineVectors affine = affine_of(x, weight, bias, eps, signed_scale);
  if (work.fuse(1)) {
    k.fused_forward(work.launch, options, affine, o[0], o[1], o[2], mean.data_ptr(), var.data_ptr());
  } else {
    work.need_partial();
    k.statistics(work.launch, o[0], mean.data_ptr(), var.data_ptr());
    k.normalize(work.launch, options, affine, o[0], o[1], o[2], vector_of(mean, x), vector_of(var, x));
  }
  work.finish();
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_normalize(const Tensor& x, const Optional& weight, const Optional& bias,
                                                   const Optional& residual, double eps, int64_t activation,
                                                   double param, bool signed_scale) {
  Tensor y = torch::stable::empty_like(x);
  auto [mean, var] = batch_normalize_into(y, x, weight, bias, residual, eps, activation, param, signed_scale);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_normalize_(const Tensor& x, const Optional& weight, const Optional& bias,
                                            const Optional& residual, double eps, int64_t activation, double param,
                                            bool signed_scale) {
  return batch_normalize_into(x, x, weight, bias, residual, eps, activation, param, signed_scale);
}

// ---- backward --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> gradient_sums(const Tensor& y, const Tensor& dy, const Optional& weight,
                                         const Optional& bias, const Optional& residual, double eps, int64_t activation,
                                         double param, bool signed_scale) {
  if (y.numel() == 0) return {zeros_per_channel(y), zeros_per_channel(y)};
  Tensor sum_dz = per_channel(y), sum_dz_xhat = per_channel(y);
  Work work({&y, &dy, pointer(residual)}, {});
  work.need_partial();
  const auto& o = work.operands;
  kernels_for(work.dtype)
      .gradient_sums(work.launch, activation_options(activation, param, work.dtype),
                     affine_of(y, weight, bias, eps, signed_scale), o[0], o[1], o[2], sum_dz.data_ptr(),
                     sum_dz_xhat.data_ptr());
  return {sum_dz, sum_dz_xhat};
}

std::tuple<Tensor, Tensor> input_gradient(const Tensor& y, const Tensor& dy, const Tensor& var, const Optional& mean_dz,
                                          const Optional& mean_dz_xhat, bool want_dz, const Optional& weight,
                                          const Optional& bias, const Optional& residual, double eps,
                                          int64_t activation, double param, bool signed_scale) {
  Tensor dx = torch::stable::empty_like(y);
  Tensor dz = want_dz ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {dx, dz};
  Work work({&y, &dy, mean_dz ? pointer(residual) : nullptr}, {&dx, &dz});  // x̂ matters in training only
  const auto& o = work.operands;
  kernels_for(work.dtype)
      .input_gradient(work.launch, activation_options(activation, param, work.dtype),
                      affine_of(y, weight, bias, eps, signed_scale), o[0], o[1], o[2], o[3], o[4], vector_of(var, y),
                      vector_of(mean_dz, y), vector_of(mean_dz_xhat, y), 1);
  work.finish();
  return {dx, dz};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_gradient(const Tensor& y, const Tensor& dy, const Tensor& var,
                                                          bool want_dz, const Optional& weight, const Optional& bias,
                                                          const Optional& residual, double eps, int64_t activation,
                                                          double param, bool signed_scale) {
  Tensor dx = torch::stable::empty_like(y);
  Tensor dz = want_dz ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {dx, dz, zeros_per_channel(y), zeros_per_channel(y)};
  Tensor sum_dz = per_channel(y), sum_dz_xhat = per_channel(y);
  Work work({&y, &dy, pointer(residual)}, {&dx, &dz});
  const Launchers& k = kernels_for(work.dtype);
  const auto& o = work.operands;
  ActivationOptions options = activation_options(activation, param, work.dtype);
  AffineVectors affine = affine_of(y, weight, bias, eps, signed_scale);
  if (work.fuse(2)) {
    k.fused_backward(work.launch, options, affine, o[0], o[1], o[2], o[3], o[4], vector_of(var, y), sum_dz.data_ptr(),
                     sum_dz_xhat.data_ptr());
  } else {
    work.need_partial();
    k.gradient_sums(work.launch, options, affine, o[0], o[1], o[2], sum_dz.data_ptr(), sum_dz_xhat.data_ptr());
    k.input_gradient(work.launch, options, affine, o[0], o[1], o[2], o[3], o[4], vector_of(var, y),
                     vector_of(sum_dz, y), vector_of(sum_dz_xhat, y), 1 / double(work.launch.shape.per_channel()));
  }
  work.finish();
  return {dx, dz, sum_dz, sum_dz_xhat};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iabn_hub, CUDA, m) {
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_", TORCH_BOX(&normalize_));
  m.impl("batch_normalize", TORCH_BOX(&batch_normalize));
  m.impl("batch_normalize_", TORCH_BOX(&batch_normalize_));
  m.impl("gradient_sums", TORCH_BOX(&gradient_sums));
  m.impl("input_gradient", TORCH_BOX(&input_gradient));
  m.impl("batch_gradient", TORCH_BOX(&batch_gradient));
}
