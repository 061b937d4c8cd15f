// The operators on CUDA: which layout, which kernels, and the memory they work in. Everything is queued on the current
// stream and nothing waits for it, so that a training step can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "iabn_cuda_work.h"

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

// ---- per-channel values ----------------------------------------------------------------------------------------------

void check_device(const Tensor& v, const Tensor& like) {
  STD_TORCH_CHECK(v.is_cuda() && v.get_device_index() == like.get_device_index(),
                  "iabn_hub: weight, bias and statistics must be on the device of the input");
}

Vector vector_of(const Optional& v, const Tensor& like) {
  if (!v) return {};
  check_device(*v, like);
  return {v->data_ptr(), dtype_of(*v), v->stride(0)};
}

Output output_of(const Optional& v, const Tensor& like) {
  if (!v) return {};
  check_device(*v, like);
  return {v->data_ptr(), dtype_of(*v), v->stride(0)};
}

Output output_of(const Tensor& v) { return {v.data_ptr(), dtype_of(v), 1}; }
Vector vector_of(const Output& v) { return {v.data, v.dtype, v.stride}; }

ScalarType accumulate_type(const Tensor& like) {
  return dtype_of(like) == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

Tensor per_channel(const Tensor& like) { return new_vector(like, like.size(1), accumulate_type(like)); }

// The gradient of `parameter`, or of a factor of 1.
Tensor gradient_for(const Optional& parameter, const Tensor& like) {
  return new_vector(like, like.size(1), parameter ? parameter->scalar_type() : accumulate_type(like));
}

Tensor zeros_like(const Tensor& v) { return torch::stable::new_zeros(v, {v.size(0)}); }

AffineVectors affine_of(const Tensor& like, const Optional& weight, const Optional& bias, double eps,
                        bool signed_scale) {
  return {vector_of(weight, like), vector_of(bias, like), eps, signed_scale};
}

const Tensor* pointer(const Optional& t) { return t ? &*t : nullptr; }

// ---- forward ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "iabn_hub: the input must be (N, C, *)");
  Tensor mean = per_channel(x), var = per_channel(x);
  if (x.numel() == 0) return {zeros_like(mean), zeros_like(var)};
  Work work({&x}, {});
  work.need_partial();
  StatisticsOutputs out;
  out.mean = output_of(mean), out.var = output_of(var);
  kernels_for(work.dtype).statistics(work.launch, work.operands[0], out);
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
                 affine_of(x, weight, bias, eps, signed_scale), {o[0], o[1], o[2]}, vector_of(Optional(mean), x),
                 vector_of(Optional(var), x));
  work.finish();
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                 const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  Tensor y = new_like(x);
  normalize_into(y, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
  return y;
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  normalize_into(x, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
}

// The running statistics of the channels of `mean` and `var`, and the number of batches, where there are any.
void update(const Tensor& like, Vector mean, Vector var, const StatisticsOutputs& out) {
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Launch launch{};
  launch.shape.channels = mean.data == nullptr ? 0 : like.size(0);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &launch.stream));
  kernels_for(dtype_of(like) == Dtype::f64 ? Dtype::f64 : Dtype::f32).update_statistics(launch, mean, var, out);
}

// What a training step overwrites beside its result.
struct Running {
  const Optional &mean, &var, &num_batches;
  double momentum;
};

std::tuple<Tensor, Tensor> batch_normalize_into(Tensor y, const Tensor& x, const Optional& weight, const Optional& bias,
                                                const Optional& residual, double eps, int64_t activation, double param,
                                                bool signed_scale, const Running& running) {
  Tensor mean = per_channel(x), var = per_channel(x);
  StatisticsOutputs out;
  out.mean = output_of(mean), out.var = output_of(var);
  if (running.num_batches) {
    check_device(*running.num_batches, x);
    check_counts(*running.num_batches);
    out.num_batches = static_cast<int64_t*>(running.num_batches->data_ptr());
  }
  if (x.numel() == 0) {  // the batch counts, but says nothing
    update(x, {}, {}, out);
    return {zeros_like(mean), zeros_like(var)};
  }
  if (running.mean && running.var) {
    out.running_mean = output_of(running.mean, x), out.running_var = output_of(running.var, x);
    out.momentum = running.momentum;
    double count = double(x.numel() / x.size(1));
    out.correction = count / std::max(1.0, count - 1);
  }
  Work work({&x, pointer(residual)}, {&y});
  const Launchers& k = kernels_for(work.dtype);
  ForwardOperands o{work.operands[0], work.operands[1], work.operands[2]};
  ActivationOptions options = activation_options(activation, param, work.dtype);
  AffineVectors affine = affine_of(x, weight, bias, eps, signed_scale);
  if (work.fuse(1)) {
    k.fused_forward(work.launch, options, affine, o, out);
  } else {
    work.by_groups(1, [&] {
      k.statistics(work.launch, o.x, out);
      k.normalize(work.launch, options, affine, o, vector_of(out.mean), vector_of(out.var));
    });
  }
  work.finish();
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_normalize(const Tensor& x, const Optional& weight, const Optional& bias,
                                                   const Optional& residual, double eps, int64_t activation,
                                                   double param, bool signed_scale, const Optional& running_mean,
                                                   const Optional& running_var, const Optional& num_batches,
                                                   double momentum) {
  Tensor y = new_like(x);
  auto [mean, var] = batch_normalize_into(y, x, weight, bias, residual, eps, activation, param, signed_scale,
                                          {running_mean, running_var, num_batches, momentum});
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_normalize_(const Tensor& x, const Optional& weight, const Optional& bias,
                                            const Optional& residual, double eps, int64_t activation, double param,
                                            bool signed_scale, const Optional& running_mean,
                                            const Optional& running_var, const Optional& num_batches, double momentum) {
  return batch_normalize_into(x, x, weight, bias, residual, eps, activation, param, signed_scale,
                              {running_mean, running_var, num_batches, momentum});
}

void update_statistics_(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                        double momentum, double correction) {
  StatisticsOutputs out;
  out.running_mean = output_of(Optional(running_mean), mean), out.running_var = output_of(Optional(running_var), mean);
  out.momentum = momentum, out.correction = correction;
  update(mean, vector_of(Optional(mean), mean), vector_of(Optional(var), mean), out);
}

// ---- backward --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> gradient_sums(const Tensor& y, const Tensor& dy, const Optional& weight,
                                         const Optional& bias, const Optional& residual, double eps, int64_t activation,
                                         double param, bool signed_scale) {
  Tensor sum_dz = per_channel(y), sum_dz_xhat = per_channel(y);
  if (y.numel() == 0) return {zeros_like(sum_dz), zeros_like(sum_dz_xhat)};
  Work work({&y, &dy, pointer(residual)}, {});
  work.need_partial();
  const auto& o = work.operands;
  SumsOutputs out;
  out.sum_dz = output_of(sum_dz), out.sum_dz_xhat = output_of(sum_dz_xhat);
  kernels_for(work.dtype)
      .gradient_sums(work.launch, activation_options(activation, param, work.dtype),
                     affine_of(y, weight, bias, eps, signed_scale), {o[0], o[1], o[2], {}, {}}, {}, {}, out);
  return {sum_dz, sum_dz_xhat};
}

std::tuple<Tensor, Tensor> input_gradient(const Tensor& y, const Tensor& dy, const Tensor& var, const Optional& mean_dz,
                                          const Optional& mean_dz_xhat, bool want_dz, const Optional& weight,
                                          const Optional& bias, const Optional& residual, double eps,
                                          int64_t activation, double param, bool signed_scale) {
  Tensor dx = new_like(y);
  Tensor dz = want_dz ? new_like(y) : new_vector(y, 0, y.scalar_type());
  if (y.numel() == 0) return {dx, dz};
  Work work({&y, &dy, mean_dz ? pointer(residual) : nullptr}, {&dx, &dz});  // x̂ matters in training only
  const auto& o = work.operands;
  kernels_for(work.dtype)
      .input_gradient(work.launch, activation_options(activation, param, work.dtype),
                      affine_of(y, weight, bias, eps, signed_scale), {o[0], o[1], o[2], o[3], o[4]}, {},
                      vector_of(Optional(var), y), vector_of(mean_dz, y), vector_of(mean_dz_xhat, y), 1);
  work.finish();
  return {dx, dz};
}

// Both passes. `out` has all but sum_dz and sum_dz_xhat, or these too.
void gradient_into(Work& work, const ActivationOptions& options, const AffineVectors& affine, Vector mean, Vector var,
                   bool centred, SumsOutputs out, const Tensor& like) {
  const Launchers& k = kernels_for(work.dtype);
  const auto& given = work.operands;
  BackwardOperands o{given[0], given[1], given[2], given[3], given[4]};
  if (centred && work.fuse(2)) {
    k.fused_backward(work.launch, options, affine, o, mean, var, out);
    work.finish();
    return;
  }
  Tensor sums;  // until the kernels are queued
  if (centred && out.sum_dz.data == nullptr) {
    sums = new_vector(like, 2 * like.size(1), accumulate_type(like));
    out.sum_dz = out.sum_dz_xhat = output_of(sums);
    out.sum_dz_xhat.data = static_cast<char*>(sums.data_ptr()) + like.size(1) * sums.element_size();
  }
  double share = 1 / double(work.launch.shape.per_channel());
  work.by_groups(2, [&] {
    k.gradient_sums(work.launch, options, affine, o, mean, var, out);
    k.input_gradient(work.launch, options, affine, o, mean, var, centred ? vector_of(out.sum_dz) : Vector{},
                     centred ? vector_of(out.sum_dz_xhat) : Vector{}, share);
  });
  work.finish();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_gradient(const Tensor& y, const Tensor& dy, const Tensor& var,
                                                          bool want_dz, const Optional& weight, const Optional& bias,
                                                          const Optional& residual, double eps, int64_t activation,
                                                          double param, bool signed_scale) {
  Tensor dx = new_like(y);
  Tensor dz = want_dz ? new_like(y) : new_vector(y, 0, y.scalar_type());
  Tensor d_weight = gradient_for(weight, y), d_bias = gradient_for(bias, y);
  if (y.numel() == 0) return {dx, dz, zeros_like(d_weight), zeros_like(d_bias)};
  Work work({&y, &dy, pointer(residual)}, {&dx, &dz});
  SumsOutputs out;
  out.d_weight = output_of(d_weight), out.d_bias = output_of(d_bias);
  gradient_into(work, activation_options(activation, param, work.dtype), affine_of(y, weight, bias, eps, signed_scale),
                {}, vector_of(Optional(var), y), true, out, y);
  return {dx, dz, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> gradient_from_input(const Tensor& x, const Tensor& dy, const Tensor& mean,
                                                       const Tensor& var, const Optional& weight, const Optional& bias,
                                                       double eps, int64_t activation, double param, bool centred) {
  Tensor dx = new_like(x);
  Tensor sum_dz = per_channel(x), sum_dz_xhat = per_channel(x);
  if (x.numel() == 0) return {dx, zeros_like(sum_dz), zeros_like(sum_dz_xhat)};
  Work work({&x, &dy, nullptr}, {&dx, nullptr});
  SumsOutputs out;
  out.sum_dz = output_of(sum_dz), out.sum_dz_xhat = output_of(sum_dz_xhat);
  ActivationOptions options = activation_options(activation, param, work.dtype);
  options.from_input = true;
  gradient_into(work, options, affine_of(x, weight, bias, eps, true), vector_of(Optional(mean), x),
                vector_of(Optional(var), x), centred, out, x);
  return {dx, sum_dz, sum_dz_xhat};
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
  m.impl("update_statistics_", TORCH_BOX(&update_statistics_));
  m.impl("gradient_from_input", TORCH_BOX(&gradient_from_input));
}
