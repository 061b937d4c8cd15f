// The operators on the CPU: which memory to walk in which order, and which thread does which part.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "iabn_cpu.h"

namespace {

using namespace iabn;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kValuesPerThread = 16384;  // below, starting a thread costs more than it saves
constexpr int64_t kRowChannels = 16;         // shorter rows of channels are walked channel by channel instead
constexpr int64_t kJoined = 256;             // several rows of channels become one of up to so many

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "iabn_hub: the input must be of a floating dtype");
  }
}

double epsilon(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return std::numeric_limits<float>::epsilon();
    case Dtype::f64: return std::numeric_limits<double>::epsilon();
    case Dtype::bf16: return 0x1p-7;
    case Dtype::f16: return 0x1p-10;
  }
  return 0;
}

const Kernels& kernels_for(Dtype dtype) {
  if (dtype == Dtype::f64) return kFloat64;
#if defined(IABN_V4)
  static const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) return kV4;
#endif
#if defined(IABN_V3)
  static const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (v3) return kV3;
#endif
  return kBaseline;
}

// ---- memory order ----------------------------------------------------------------------------------------------------

// Several tensors of one shape (N, C, *) as operands of one walk; the first decides the order.
struct Walk {
  Shape shape;
  std::vector<Operand> operands;  // an undefined tensor gives an empty one
};

Walk plan(const std::vector<const Tensor*>& tensors) {
  const Tensor& first = *tensors[0];
  auto sizes = first.sizes();
  Walk walk;
  walk.shape.channels = sizes[1];
  struct Dimension {
    int64_t size;
    std::vector<int64_t> strides;
  };
  std::vector<Dimension> dimensions;  // all but the channel, outermost first
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (d == 1 || sizes[d] == 1) continue;
    Dimension each{sizes[d], {}};
    for (const Tensor* t : tensors) each.strides.push_back(t ? t->stride(d) : 0);
    dimensions.push_back(each);
  }
  std::stable_sort(dimensions.begin(), dimensions.end(),
                   [](const Dimension& a, const Dimension& b) { return a.strides[0] > b.strides[0]; });
  std::vector<Dimension> merged;
  for (Dimension& each : dimensions) {
    bool continues = !merged.empty();
    for (size_t k = 0; continues && k < tensors.size(); ++k) {
      continues = merged.back().strides[k] == each.size * each.strides[k];
    }
    if (continues) each.size *= merged.back().size, merged.back() = each;
    else merged.push_back(each);
  }
  if (merged.empty()) merged.push_back({1, std::vector<int64_t>(tensors.size(), 1)});
  STD_TORCH_CHECK(merged.size() <= kOuter + 1, "iabn_hub: too many dimensions that are not contiguous");

  Dimension inner = merged.back();
  merged.pop_back();
  walk.shape.inner = inner.size;
  for (size_t d = 0; d < merged.size(); ++d) walk.shape.outer[kOuter - merged.size() + d] = merged[d].size;
  walk.shape.rows = sizes[1] >= kRowChannels && first.stride(1) == 1 && !(inner.size > 1 && inner.strides[0] == 1);
  for (size_t k = 0; k < tensors.size(); ++k) {
    Operand operand;
    if (const Tensor* t = tensors[k]) {
      operand.data = t->data_ptr();
      operand.dtype = dtype_of(*t);
      operand.channel = t->stride(1);
      operand.inner = inner.strides[k];
      for (size_t d = 0; d < merged.size(); ++d) operand.outer[kOuter - merged.size() + d] = merged[d].strides[k];
    }
    walk.operands.push_back(operand);
  }
  return walk;
}

// Rows of few channels, joined so that one run covers several of them: `repeat` rows of `channels` become one row of
// repeat·channels lanes, with the per-channel values repeated as often. The rows left over follow one by one.
struct Rows {
  Shape joined;
  std::vector<Operand> operands;
  int64_t repeat, rest;  // rows in one, and where the rows that are left over begin
};

Rows join_rows(const Walk& w) {
  const Shape& s = w.shape;
  int64_t positions = s.per_channel(), repeat = std::clamp<int64_t>(kJoined / s.channels, 1, positions);
  for (const Operand& o : w.operands) {
    if (o && (s.runs() != 1 || o.channel != 1 || o.inner != s.channels)) repeat = 1;
  }
  Rows rows{s, w.operands, repeat, positions / repeat * repeat};
  if (repeat > 1) {
    rows.joined.channels *= repeat;
    rows.joined.inner = positions / repeat;
    for (Operand& o : rows.operands) o.inner *= repeat;
  }
  return rows;
}

// ---- threads ---------------------------------------------------------------------------------------------------------

// How many equal parts to split a walk into: it depends on the sizes and the number of threads alone.
int64_t parts_of(const Shape& s) {
  int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(s.channels * s.per_channel() / kValuesPerThread, 1, threads);
}

// Calls f(part, begin, end) for `parts` equal shares of [0, count), each in a thread of its own.
template <typename F>
void in_parts(int64_t parts, int64_t count, const F& f) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(p, p * count / parts, (p + 1) * count / parts);
  });
}

// Calls f(channel, first block, last block) so that every block of every channel is covered. With fewer channels than
// parts a channel is split: `splits` says into how many, and f gets the number of the split as well.
template <typename F>
void over_blocks(const Shape& s, int64_t parts, int64_t splits, const F& f) {
  int64_t blocks = s.blocks();
  in_parts(std::min(parts, s.channels * splits), s.channels * splits, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      int64_t split = item % splits;
      f(item / splits, split, split * blocks / splits, (split + 1) * blocks / splits);
    }
  });
}

int64_t splits_of(const Shape& s, int64_t parts) {
  return s.channels >= parts ? 1 : std::min(s.blocks(), (parts + s.channels - 1) / s.channels);
}

// ---- per-channel values ----------------------------------------------------------------------------------------------

std::vector<double> to_doubles(const Optional& v, int64_t n, double otherwise) {
  std::vector<double> out(n, otherwise);
  if (!v) return out;
  Dtype dtype = dtype_of(*v);
  int64_t stride = v->stride(0);
  const void* p = v->data_ptr();
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == Dtype::f32) out[i] = static_cast<const float*>(p)[i * stride];
    else if (dtype == Dtype::f64) out[i] = static_cast<const double*>(p)[i * stride];
    else if (dtype == Dtype::bf16) out[i] = static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(p)[i * stride]);
    else out[i] = static_cast<float>(static_cast<const torch::headeronly::Half*>(p)[i * stride]);
  }
  return out;
}

Tensor per_channel(const Tensor& like, const std::vector<double>& values) {
  bool wide = dtype_of(like) == Dtype::f64;
  int64_t n = values.size();
  Tensor out = torch::stable::new_empty(like, {n}, wide ? ScalarType::Double : ScalarType::Float);
  void* p = out.data_ptr();
  for (int64_t i = 0; i < n; ++i) {
    if (wide) static_cast<double*>(p)[i] = values[i];
    else static_cast<float*>(p)[i] = float(values[i]);
  }
  return out;
}

struct Affine {
  double eps;
  bool signed_scale;
  std::vector<double> weight, bias;  // weight of 1 stands for γ = 1, which is what no weight means
  bool has_weight;

  Affine(const Optional& w, const Optional& b, double eps, bool signed_scale, int64_t n)
      : eps(eps), signed_scale(signed_scale), weight(to_doubles(w, n, 1)), bias(to_doubles(b, n, 0)), has_weight(bool(w)) {}

  double gamma(int64_t c) const {
    if (!has_weight) return 1;
    double scale = std::abs(weight[c]) + eps;
    return signed_scale && weight[c] < 0 ? -scale : scale;
  }
};

// The vectors of a `Channels`, in the type that the kernels accumulate in. Each term that is
// added is computed from the rounded factor that the kernels multiply with, so that no rounding counts twice.
template <typename T>
struct Vectors {
  std::vector<T> mean, scale, shift, inverse, offset, slope, intercept;

  explicit Vectors(const Affine& affine) {
    for (std::vector<T>* v : {&mean, &scale, &shift, &inverse, &offset}) v->resize(affine.bias.size());
    for (size_t c = 0; c < scale.size(); ++c) {
      inverse[c] = usual(1 / affine.gamma(c));
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
    return {data(mean),   data(scale), data(shift),    data(inverse),
            data(offset), data(slope), data(intercept)};
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
  static T usual(double v) { return v == v ? T(v) : std::numeric_limits<T>::quiet_NaN(); }
  void centre() {
    slope.resize(scale.size());
    intercept.resize(scale.size());
  }
};

template <typename F>
auto with_accumulator(const Tensor& t, F&& f) {
  return dtype_of(t) == Dtype::f64 ? f(double{}) : f(float{});
}

// A large new tensor is touched for the first time by the kernel that fills it; with huge pages that costs a few
// page faults instead of one per 4 KiB.
Tensor new_like(const Tensor& t) {
  Tensor out = torch::stable::empty_like(t);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + t.numel() * t.element_size()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// ---- passes ----------------------------------------------------------------------------------------------------------

// Calls f(shape, operands, first, last, part) for the rows of a walk: joined rows in parts, then those left over.
template <typename F>
void over_rows(const Walk& w, const Rows& rows, int64_t parts, const F& f) {
  in_parts(parts, rows.joined.per_channel(), [&](int64_t p, int64_t begin, int64_t end) {
    f(rows.joined, rows.operands, begin, end, p);
  });
  if (rows.rest < w.shape.per_channel()) f(w.shape, w.operands, rows.rest, w.shape.per_channel(), parts);
}

void moments_by_rows(const Kernels& k, const Walk& w, int64_t parts, std::vector<Moments>& out) {
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
                       std::vector<Moments>& out) {
  std::vector<Moments> pieces(s.channels * splits);
  over_blocks(s, parts, splits, [&](int64_t c, int64_t split, int64_t first, int64_t last) {
    pieces[c * splits + split] = k.block_moments(s, x, c, first, last);
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t i = 0; i < splits; ++i) {
      const Moments& piece = pieces[c * splits + i];
      out[c].merge(piece.count, piece.mean, piece.m2);
    }
  }
}

std::tuple<Tensor, Tensor> to_tensors(const Tensor& like, const std::vector<Moments>& moments) {
  std::vector<double> mean, var;
  for (const Moments& m : moments) {
    mean.push_back(m.mean);
    var.push_back(m.count > 0 ? m.m2 / m.count : 0);
  }
  return {per_channel(like, mean), per_channel(like, var)};
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "iabn_hub: the input must be (N, C, *)");
  std::vector<Moments> moments(x.size(1));
  if (x.numel() > 0) {
    Walk w = plan({&x});
    const Kernels& k = kernels_for(dtype_of(x));
    int64_t parts = parts_of(w.shape);
    if (w.shape.rows) moments_by_rows(k, w, parts, moments);
    else moments_by_blocks(k, w.shape, w.operands[0], parts, splits_of(w.shape, parts), moments);
  }
  return to_tensors(x, moments);
}

ActivationOptions activation_options(int64_t activation, double param, Dtype stored) {
  return {static_cast<Activation>(activation), param, std::log(epsilon(stored) / 4)};
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
  Tensor y = new_like(x);
  normalize_into(y, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
  return y;
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight, const Optional& bias,
                const Optional& residual, double eps, int64_t activation, double param, bool signed_scale) {
  normalize_into(x, x, mean, var, weight, bias, residual, eps, activation, param, signed_scale);
}

// Statistics and normalisation of a training step: a channel is normalised while it is in the cache of the thread
// that has just read it.
std::tuple<Tensor, Tensor> batch_normalize_into(const Tensor& y, const Tensor& x, const Optional& weight,
                                                const Optional& bias, const Optional& residual, double eps,
                                                int64_t activation, double param, bool signed_scale) {
  std::vector<Moments> moments(x.size(1));
  if (x.numel() == 0) return to_tensors(x, moments);
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
  return to_tensors(x, moments);
}

std::tuple<Tensor, Tensor, Tensor> batch_normalize(const Tensor& x, const Optional& weight, const Optional& bias,
                                                   const Optional& residual, double eps, int64_t activation,
                                                   double param, bool signed_scale) {
  Tensor y = new_like(x);
  auto [mean, var] = batch_normalize_into(y, x, weight, bias, residual, eps, activation, param, signed_scale);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_normalize_(const Tensor& x, const Optional& weight, const Optional& bias,
                                            const Optional& residual, double eps, int64_t activation, double param,
                                            bool signed_scale) {
  return batch_normalize_into(x, x, weight, bias, residual, eps, activation, param, signed_scale);
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
    for (int64_t i = 0; i < filled; ++i) out.dz[i % n] += dz[p * lanes + i], out.dz_xhat[i % n] += dz_xhat[p * lanes + i];
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
    for (int64_t i = c * splits; i < (c + 1) * splits; ++i) out.dz[c] += pieces[2 * i], out.dz_xhat[c] += pieces[2 * i + 1];
  }
}

std::tuple<Tensor, Tensor> gradient_sums(const Tensor& y, const Tensor& dy, const Optional& weight, const Optional& bias,
                                         const Optional& residual, double eps, int64_t activation, double param,
                                         bool signed_scale) {
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
  Tensor dx = new_like(y);
  Tensor dz = want_dz ? new_like(y) : torch::stable::new_empty(y, {0});
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

// Both passes of a training step's backward: the second reads a channel while it is in the cache.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_gradient(const Tensor& y, const Tensor& dy, const Tensor& var,
                                                          bool want_dz, const Optional& weight, const Optional& bias,
                                                          const Optional& residual, double eps, int64_t activation,
                                                          double param, bool signed_scale) {
  Tensor dx = new_like(y);
  Tensor dz = want_dz ? new_like(y) : torch::stable::new_empty(y, {0});
  Sums sums(y.size(1));
  if (y.numel() > 0) {
    Walk w = plan({&y, &dy, residual ? &*residual : nullptr, &dx, want_dz ? &dz : nullptr});
    ActivationOptions a = activation_options(activation, param, dtype_of(y));
    int64_t n = w.shape.channels;
    Affine affine(weight, bias, eps, signed_scale, n);
    std::vector<double> vars = to_doubles(var, n, 0);
    const Kernels& k = kernels_for(dtype_of(y));
    double count = double(w.shape.per_channel());
    with_accumulator(y, [&](auto zero) {
      using T = decltype(zero);
      Vectors<T> v(affine);
      v.centre();
      for (int64_t c = 0; c < n; ++c) v.set_forward(affine, c, 0, vars[c]);
      auto ready = [&](int64_t c) { v.set_backward(affine, c, sums.dz[c] / count, sums.dz_xhat[c] / count); };
      int64_t parts = parts_of(w.shape), splits = splits_of(w.shape, parts);
      const auto& o = w.operands;
      Channels<T> channels = v.view();
      if (!w.shape.rows && splits == 1) {
        over_blocks(w.shape, parts, 1, [&](int64_t c, int64_t, int64_t first, int64_t last) {
          double pair[2];
          k.block_sums(w.shape, a, o[0], o[1], o[2], &channels, c, first, last, pair);
          sums.dz[c] = pair[0], sums.dz_xhat[c] = pair[1];
          ready(c);
          k.block_gradient(w.shape, a, o[0], o[1], o[2], o[3], o[4], &channels, c, first, last);
        });
        return;
      }
      if (w.shape.rows) sums_by_rows(k, a, w, v, parts, sums);
      else sums_by_blocks(k, a, w, v.view(), parts, splits, sums);
      for (int64_t c = 0; c < n; ++c) ready(c);
      gradient_pass(k, a, w, v, parts);
    });
  }
  return {dx, dz, per_channel(y, sums.dz), per_channel(y, sums.dz_xhat)};
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
}
