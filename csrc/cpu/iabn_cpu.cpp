// The operators on the CPU, in passes over memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "iabn_cpu_channels.h"
#include "iabn_cpu_walk.h"

namespace {

using namespace iabn;

// IABN_HUB_CPU_CAPABILITY ("default", "avx2" or "avx512") caps the level: 0, 1 or 2. Python checks its spelling.
int highest_level() {
  const char* wanted = std::getenv("IABN_HUB_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return 2;
  return std::strcmp(wanted, "avx512") == 0 ? 2 : std::strcmp(wanted, "avx2") == 0 ? 1 : 0;
}

const Kernels& kernels_for(Dtype dtype) {
  if (dtype == Dtype::f64) return kFloat64;
  [[maybe_unused]] static const int highest = highest_level();
#if defined(IABN_V4)
  static const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && highest >= 2) return kV4;
#endif
#if defined(IABN_V3)
  static const bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (v3 && highest >= 1) return kV3;
#endif
  return kBaseline;
}

template <typename F>
auto with_accumulator(const Tensor& t, F&& f) {
  return dtype_of(t) == Dtype::f64 ? f(double{}) : f(float{});
}

// A large new tensor is touched for the first time by the kernel that fills it; with huge pages that costs a few
// page faults instead of one per 4 KiB.
Tensor new_output(const Tensor& t) {
  Tensor out = new_like(t);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + t.numel() * t.element_size()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// ---- passes ----------------------------------------------------------------------------------------------------------

void moments_by_rows(const Kernels& k, const Walk& w, int64_t parts, std::vector<Moments<double>>& out) {
  Rows rows = join_rows(w);
  int64_t n = w.shape.channels, lanes = rows.joined.channels;
  std::vector<double> means((parts + 1) * lanes), m2s((parts + 1) * lanes), counts(parts + 1);
  over_rows(w, rows, parts, [&](const Shape& s, const std::vector<Operand>& o, int64_t begin, int64_t end, int64_t p) {
    k.row_moments(s, o[0], begin, end, &means[p * lanes], &m2s[p * lanes]);
    counts[p] = double(end - begin);
  });
  for (int64_t p = 0; p <= parts; ++p) {
    int64_t filled = p < parts ? lanes : n;  // the rows left over were not joined
    for (int64_t i = 0; i < filled; ++i) out[i % n].merge(counts[p], means[p * lanes + i], m2s[p * lanes + i]);
  }
}

void moments_by_blocks(const Kernels& k, const Shape& s, const Operand& x, int64_t parts, int64_t splits,
                       std::vector<Moments<double>>& out) {
  std::vector<Moments<double>> pieces(s.channels * splits);
  over_blocks(s, parts, splits, [&](int64_t c, int64_t split, int64_t first, int64_t last) {
    pieces[c * splits + split] = k.block_moments(s, x, c, first, last);
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t i = 0; i < splits; ++i) {
      const Moments<double>& piece = pieces[c * splits + i];
      out[c].merge(piece.count, piece.mean, piece.m2);
    }
  }
}

std::tuple<Tensor, Tensor> to_tensors(const Tensor& like, const std::vector<Moments<double>>& moments) {
  std::vector<double> mean, var;
  for (const Moments<double>& m : moments) {
    mean.push_back(m.mean);
    var.push_back(m.count > 0 ? m.m2 / m.count : 0);
  }
  return {per_channel(like, mean), per_channel(like, var)};
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "iabn_hub: the input must be (N, C, *)");
  std::vector<Moments<double>> moments(x.size(1));
  if (x.numel() > 0) {
    Walk w = plan({&x});
    const Kernels& k = kernels_for(dtype_of(x));
    int64_t parts = parts_of(w.shape);
    if (w.shape.rows) moments_by_rows(k, w, parts, moments);
    else moments_by_blocks(k, w.shape, w.operands[0], parts, splits_of(w.shape, parts), moments);
  }
  return to_tensors(x, moments);
}

template <typename T>
void normalize_rows(const Kernels& k, const ActivationOptions& a, const Walk& w, const Vectors<T>& v, int64_t parts) {
  Rows rows = join_rows(w);
  Vectors<T> repeated(v, rows.repeat);
  Channels<T> channels = repeated.view();
  over_rows(w, rows, parts, [&](const Shape& s, const std::vector<Operand>& o, int64_t begin, int64_t end, int64_t) {
    k.row_normalize(s, a, o[0], o[1], o[2], &channels, begin, end);
  });
}

void normalize_into(const Tensor& y, const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight,
                    const Optional& bias, const Optional& residual, double eps, int64_t activation, double param,
                    bool signed_scale) {
  if (x.numel() == 0) return;
  Walk w = plan({&x, residual ? &*residual : nullptr, &y});
  const Shape& s = w.shape;
  const Kernels& k = kernels_for(dtype_of(x));
  ActivationOptions a = activation_options(activation, param, dtype_of(x));
  Affine affine(weight, bias, eps, signed_scale, s.channels);
  std::vector<double> means = to_doubles(mean, s.channels, 0), vars = to_doubles(var, s.channels, 0);
  with_accumulator(x, [&](auto zero) {
    using T = decltype(zero);
    Vectors<T> v(affine);
    for (int64_t c = 0; c < s.channels; ++c) {
      v.set_forward(affine, c, means[c], vars[c]);
    }
    int64_t parts = parts_of(s);
    if (s.rows) {
      normalize_rows(k, a, w, v, parts);
    } else {
      Channels<T> channels = v.view();
      over_blocks(s, parts, splits_of(s, parts), [&](int64_t c, int64_t, int64_t first, int64_t last) {
        k.block_normalize(s, a, w.operands[0], w.operands[1], w.operands[2], &channels, c, first, last);
      });
    }
  });
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                 const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  Tensor y = new_output(x);
  normalize_into(y, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
  return y;
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  normalize_into(x, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
}

// running += momentum·(batch − running)
void update(const Tensor& running, const std::vector<double>& batch, double momentum) {
  std::vector<double> values = to_doubles(running, batch.size(), 0);
  for (size_t c = 0; c < batch.size(); ++c) values[c] = values[c] * (1 - momentum) + batch[c] * momentum;
  from_doubles(running, values);
}

void update_statistics_(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                        double momentum, double correction) {
  int64_t n = mean.size(0);
  std::vector<double> unbiased = to_doubles(var, n, 0);
  for (double& v : unbiased) v *= correction;
  update(running_mean, to_doubles(mean, n, 0), momentum);
  update(running_var, unbiased, momentum);
}

// What a training step overwrites beside its result.
struct Running {
  const Optional &mean, &var, &num_batches;
  double momentum;

  void track(const std::vector<Moments<double>>& moments) const {
    if (num_batches) {
      check_counts(*num_batches);
      *static_cast<int64_t*>(num_batches->data_ptr()) += 1;
    }
    if (!mean || !var || moments.empty() || moments[0].count == 0) return;
    std::vector<double> means, unbiased;
    for (const Moments<double>& m : moments) {
      means.push_back(m.mean);
      unbiased.push_back(m.m2 / std::max(1.0, m.count - 1));
    }
    update(*mean, means, momentum);
    update(*var, unbiased, momentum);
  }
};

// Statistics and normalisation of a training step: a channel is normalised while it is in the cache of the thread
// that has just read it.
std::tuple<Tensor, Tensor> batch_normalize_into(const Tensor& y, const Tensor& x, const Optional& weight,
                                                const Optional& bias, const Optional& residual, double eps,
                                                int64_t activation, double param, bool signed_scale,
                                                const Running& running) {
  std::vector<Moments<double>> moments(x.size(1));
  if (x.numel() == 0) {
    running.track(moments);
    return to_tensors(x, moments);
  }
  Walk w = plan({&x, residual ? &*residual : nullptr, &y});
  const Shape& s = w.shape;
  const Kernels& k = kernels_for(dtype_of(x));
  ActivationOptions a = activation_options(activation, param, dtype_of(x));
  Affine affine(weight, bias, eps, signed_scale, s.channels);
  with_accumulator(x, [&](auto zero) {
    using T = decltype(zero);
    Vectors<T> v(affine);
    auto ready = [&](int64_t c) { v.set_forward(affine, c, moments[c].mean, moments[c].m2 / moments[c].count); };
    int64_t parts = parts_of(s), splits = splits_of(s, parts);
    Channels<T> channels = v.view();
    if (s.rows) {
      moments_by_rows(k, w, parts, moments);
      for (int64_t c = 0; c < s.channels; ++c) ready(c);
      normalize_rows(k, a, w, v, parts);
    } else if (splits == 1) {
      over_blocks(s, parts, 1, [&](int64_t c, int64_t, int64_t first, int64_t last) {
        moments[c] = k.block_moments(s, w.operands[0], c, first, last);
        ready(c);
        k.block_normalize(s, a, w.operands[0], w.operands[1], w.operands[2], &channels, c, first, last);
      });
    } else {
      moments_by_blocks(k, s, w.operands[0], parts, splits, moments);
      for (int64_t c = 0; c < s.channels; ++c) ready(c);
      over_blocks(s, parts, splits, [&](int64_t c, int64_t, int64_t first, int64_t last) {
        k.block_normalize(s, a, w.operands[0], w.operands[1], w.operands[2], &channels, c, first, last);
      });
    }
  });
  running.track(moments);
  return to_tensors(x, moments);
}

std::tuple<Tensor, Tensor, Tensor> batch_normalize(const Tensor& x, const Optional& weight, const Optional& bias,
                                                   const Optional& residual, double eps, int64_t activation,
                                                   double param, bool signed_scale, const Optional& running_mean,
                                                   const Optional& running_var, const Optional& num_batches,
                                                   double momentum) {
  Tensor y = new_output(x);
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

// ---- backward --------------------------------------------------------------------------------------------------------

struct Sums {
  std::vector<double> dz, dz_xhat;
  explicit Sums(int64_t n) : dz(n), dz_xhat(n) {}
};

template <typename T>
void sums_by_rows(const Kernels& k, const ActivationOptions& a, const Walk& w, const Vectors<T>& v, int64_t parts,
                  Sums& out) {
  Rows rows = join_rows(w);
  Vectors<T> repeated(v, rows.repeat);
  Channels<T> channels = repeated.view();
  int64_t n = w.shape.channels, lanes = rows.joined.channels;
  std::vector<double> dz((parts + 1) * lanes), dz_xhat((parts + 1) * lanes);
  over_rows(w, rows, parts, [&](const Shape& s, const std::vector<Operand>& o, int64_t begin, int64_t end, int64_t p) {
    k.row_sums(s, a, o[0], o[1], o[2], &channels, begin, end, &dz[p * lanes], &dz_xhat[p * lanes]);
  });
  for (int64_t p = 0; p <= parts; ++p) {
    int64_t filled = p < parts ? lanes : n;
    for (int64_t i = 0; i < filled; ++i)
      out.dz[i % n] += dz[p * lanes + i], out.dz_xhat[i % n] += dz_xhat[p * lanes + i];
  }
}

template <typename T>
void sums_by_blocks(const Kernels& k, const ActivationOptions& a, const Walk& w, const Channels<T>& v, int64_t parts,
                    int64_t splits, Sums& out) {
  std::vector<double> pieces(2 * w.shape.channels * splits);
  over_blocks(w.shape, parts, splits, [&](int64_t c, int64_t split, int64_t first, int64_t last) {
    k.block_sums(w.shape, a, w.operands[0], w.operands[1], w.operands[2], &v, c, first, last,
                 &pieces[2 * (c * splits + split)]);
  });
  for (int64_t c = 0; c < w.shape.channels; ++c) {
    for (int64_t i = c * splits; i < (c + 1) * splits; ++i)
      out.dz[c] += pieces[2 * i], out.dz_xhat[c] += pieces[2 * i + 1];
  }
}

std::tuple<Tensor, Tensor> gradient_sums(const Tensor& y, const Tensor& dy, const Optional& weight,
                                         const Optional& bias, const Optional& residual, double eps, int64_t activation,
                                         double param, bool signed_scale) {
  Sums sums(y.size(1));
  if (y.numel() > 0) {
    Walk w = plan({&y, &dy, residual ? &*residual : nullptr});
    ActivationOptions a = activation_options(activation, param, dtype_of(y));
    Affine affine(weight, bias, eps, signed_scale, w.shape.channels);
    int64_t parts = parts_of(w.shape);
    with_accumulator(y, [&](auto zero) {
      using T = decltype(zero);
      Vectors<T> v(affine);
      const Kernels& k = kernels_for(dtype_of(y));
      if (w.shape.rows) sums_by_rows(k, a, w, v, parts, sums);
      else sums_by_blocks(k, a, w, v.view(), parts, splits_of(w.shape, parts), sums);
    });
  }
  return {per_channel(y, sums.dz), per_channel(y, sums.dz_xhat)};
}

template <typename T>
void gradient_pass(const Kernels& k, const ActivationOptions& a, const Walk& w, const Vectors<T>& v, int64_t parts) {
  if (w.shape.rows) {
    Rows rows = join_rows(w);
    Vectors<T> repeated(v, rows.repeat);
    Channels<T> channels = repeated.view();
    over_rows(w, rows, parts, [&](const Shape& s, const std::vector<Operand>& o, int64_t begin, int64_t end, int64_t) {
      k.row_gradient(s, a, o[0], o[1], o[2], o[3], o[4], &channels, begin, end);
    });
  } else {
    const auto& o = w.operands;
    Channels<T> channels = v.view();
    over_blocks(w.shape, parts, splits_of(w.shape, parts), [&](int64_t c, int64_t, int64_t first, int64_t last) {
      k.block_gradient(w.shape, a, o[0], o[1], o[2], o[3], o[4], &channels, c, first, last);
    });
  }
}

std::tuple<Tensor, Tensor> input_gradient(const Tensor& y, const Tensor& dy, const Tensor& var, const Optional& mean_dz,
                                          const Optional& mean_dz_xhat, bool want_dz, const Optional& weight,
                                          const Optional& bias, const Optional& residual, double eps,
                                          int64_t activation, double param, bool signed_scale) {
  Tensor dx = new_output(y);
  Tensor dz = want_dz ? new_output(y) : new_vector(y, 0, y.scalar_type());
  if (y.numel() == 0) return {dx, dz};
  Walk w = plan({&y, &dy, residual ? &*residual : nullptr, &dx, want_dz ? &dz : nullptr});
  ActivationOptions a = activation_options(activation, param, dtype_of(y));
  int64_t n = w.shape.channels;
  Affine affine(weight, bias, eps, signed_scale, n);
  std::vector<double> vars = to_doubles(var, n, 0), m1 = to_doubles(mean_dz, n, 0), m2 = to_doubles(mean_dz_xhat, n, 0);
  with_accumulator(y, [&](auto zero) {
    using T = decltype(zero);
    Vectors<T> v(affine);
    if (mean_dz) v.centre();
    for (int64_t c = 0; c < n; ++c) {
      v.set_forward(affine, c, 0, vars[c]);
      if (mean_dz) v.set_backward(affine, c, m1[c], m2[c]);
    }
    gradient_pass(kernels_for(dtype_of(y)), a, w, v, parts_of(w.shape));
  });
  return {dx, dz};
}

// Both passes of a training step's backward: the second reads a channel while it is in the cache. Calls centre(c) when
// the sums of channel c are known. With `dz_first`, dz is computed once, into the memory of dx, and read from there.
template <typename T, typename Centre>
void sums_and_gradient(const Kernels& k, ActivationOptions a, Walk w, Vectors<T>& v, Sums& sums, Centre centre,
                       bool dz_first = false) {
  int64_t parts = parts_of(w.shape), splits = splits_of(w.shape, parts);
  Channels<T> channels = v.view();
  Walk whole = w;  // from which dz is computed
  whole.operands[4] = whole.operands[3], whole.operands[3] = Operand();
  const ActivationOptions given = a;
  if (dz_first) w.operands[1] = w.operands[3], a.kind = Activation::identity;
  const auto &o = w.operands, &f = whole.operands;
  if (!w.shape.rows && splits == 1) {
    over_blocks(w.shape, parts, 1, [&](int64_t c, int64_t, int64_t first, int64_t last) {
      if (dz_first) k.block_gradient(w.shape, given, f[0], f[1], f[2], f[3], f[4], &channels, c, first, last);
      double pair[2];
      k.block_sums(w.shape, a, o[0], o[1], o[2], &channels, c, first, last, pair);
      sums.dz[c] = pair[0], sums.dz_xhat[c] = pair[1];
      centre(c);
      k.block_gradient(w.shape, a, o[0], o[1], o[2], o[3], o[4], &channels, c, first, last);
    });
    return;
  }
  if (dz_first) gradient_pass(k, given, whole, v, parts);
  if (w.shape.rows) sums_by_rows(k, a, w, v, parts, sums);
  else sums_by_blocks(k, a, w, v.view(), parts, splits, sums);
  for (int64_t c = 0; c < w.shape.channels; ++c) centre(c);
  gradient_pass(k, a, w, v, parts);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_gradient(const Tensor& y, const Tensor& dy, const Tensor& var,
                                                          bool want_dz, const Optional& weight, const Optional& bias,
                                                          const Optional& residual, double eps, int64_t activation,
                                                          double param, bool signed_scale) {
  Tensor dx = new_output(y);
  Tensor dz = want_dz ? new_output(y) : new_vector(y, 0, y.scalar_type());
  Sums sums(y.size(1));
  if (y.numel() > 0) {
    Walk w = plan({&y, &dy, residual ? &*residual : nullptr, &dx, want_dz ? &dz : nullptr});
    int64_t n = w.shape.channels;
    Affine affine(weight, bias, eps, signed_scale, n);
    std::vector<double> vars = to_doubles(var, n, 0);
    double count = double(w.shape.per_channel());
    with_accumulator(y, [&](auto zero) {
      Vectors<decltype(zero)> v(affine);
      v.centre();
      for (int64_t c = 0; c < n; ++c) v.set_forward(affine, c, 0, vars[c]);
      sums_and_gradient(kernels_for(dtype_of(y)), activation_options(activation, param, dtype_of(y)), w, v, sums,
                        [&](int64_t c) { v.set_backward(affine, c, sums.dz[c] / count, sums.dz_xhat[c] / count); });
    });
  }
  if (!signed_scale) {
    std::vector<double> weights = to_doubles(weight, y.size(1), 0);
    for (size_t c = 0; c < weights.size(); ++c) {
      if (weights[c] < 0) sums.dz_xhat[c] = -sums.dz_xhat[c];
    }
  }
  return {dx, dz, per_channel(weight ? *weight : y, sums.dz_xhat, bool(weight)),
          per_channel(bias ? *bias : y, sums.dz, bool(bias))};
}

std::tuple<Tensor, Tensor, Tensor> gradient_from_input(const Tensor& x, const Tensor& dy, const Tensor& mean,
                                                       const Tensor& var, const Optional& weight, const Optional& bias,
                                                       double eps, int64_t activation, double param, bool centred) {
  Tensor dx = new_output(x);
  Sums sums(x.size(1));
  if (x.numel() > 0) {
    Walk w = plan({&x, &dy, nullptr, &dx, nullptr});
    int64_t n = w.shape.channels;
    Affine affine(weight, bias, eps, true, n);
    std::vector<double> means = to_doubles(mean, n, 0), vars = to_doubles(var, n, 0);
    ActivationOptions a = activation_options(activation, param, dtype_of(x));
    a.from_input = true;
    double count = double(w.shape.per_channel());
    // An exponential costs more than another pass over the cache, but a stored dz must not be rounded.
    bool exponential = a.kind == Activation::silu || a.kind == Activation::elu;
    bool exact = dtype_of(x) == Dtype::f32 || dtype_of(x) == Dtype::f64;
    with_accumulator(x, [&](auto zero) {
      Vectors<decltype(zero)> v(affine);
      if (centred) v.centre();
      for (int64_t c = 0; c < n; ++c) v.set_from_input(affine, c, means[c], vars[c]);
      sums_and_gradient(
          kernels_for(dtype_of(x)), a, w, v, sums,
          [&](int64_t c) {
            if (centred) v.set_backward_from_input(c, sums.dz[c] / count, sums.dz_xhat[c] / count);
          },
          exponential && exact);
    });
  }
  return {dx, per_channel(x, sums.dz), per_channel(x, sums.dz_xhat)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iabn_hub, CPU, m) {
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
