// The CPU kernels, compiled once per instruction set; IABN_LEVEL names the table, and the compiler vectorises.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "iabn_cpu_places.h"
#include "iabn_cpu_runs.h"

namespace iabn {
namespace {

constexpr int64_t kSummed = 2048;  // values summed in float32 before their sums go to float64; rows likewise: kRows

// ---- formulas of one run -------------------------------------------------------------------------------------------
// Tensors are read and written in format F. `along`: the run goes along the channels; `joined`: there is a residual r.

template <bool along, bool joined, typename F, typename T, typename A>
void normalize_run(int64_t n, const Stored<F>* x, const Stored<F>* r, Stored<F>* y, const Channels<T>& c, A act) {
  map<F, T, along && !F::is_wide>(n, y, [=](auto at) {
    auto v = get<F>(x, at);
    if constexpr (F::is_wide) v -= lane<along>(c.mean, at);  // else `fold_mean` has put it into the shift
    auto z = v * lane<along>(c.scale, at) + lane<along>(c.shift, at);
    if constexpr (joined) z += get<F>(r, at);
    return act.forward(z);
  });
}

// dz, and z without the residual, which is what γ and β made of x̂; or, where y is x itself, its distance from the mean.
template <bool along, bool joined, typename F, typename At, typename T, typename A>
auto recover(At at, const Stored<F>* y, const Stored<F>* dy, const Stored<F>* r, const Channels<T>& c, A act) {
  auto kept = get<F>(y, at);
  if constexpr (A::from_input) {
    kept -= lane<along>(c.mean, at);
    auto z = kept * lane<along>(c.scale, at) + lane<along>(c.shift, at);
    return Two<decltype(z)>{act.gradient(z, get<F>(dy, at)), kept};
  } else {
    auto z = act.invert(kept);
    if constexpr (joined) z -= get<F>(r, at);
    return Two<decltype(z)>{act.gradient(kept, get<F>(dy, at)), z};
  }
}

template <bool along, bool joined, typename F, typename T, typename A>
auto dz_and_product(const Stored<F>* y, const Stored<F>* dy, const Stored<F>* r, const Channels<T>& c, A act) {
  return [=](auto at) {
    auto [dz, z] = recover<along, joined, F>(at, y, dy, r, c, act);
    auto xhat = recovered(z, lane<along>(c.inverse, at), lane<along>(c.offset, at));
    return Two<decltype(z)>{dz, dz * xhat};
  };
}

template <bool along, bool joined, typename F, typename T, typename A>
void gradient_run(int64_t n, const Stored<F>* y, const Stored<F>* dy, const Stored<F>* r, Stored<F>* dx,
                  Stored<F>* dz_out, const Channels<T>& c, A act) {
  constexpr bool in_pairs = along && !F::is_wide;
  auto dz_at = [=](auto at) {
    if constexpr (A::from_input) return recover<along, false, F>(at, y, dy, r, c, act).first;
    else return act.gradient(get<F>(y, at), get<F>(dy, at));
  };
  if (dx == nullptr) {  // dz alone
  } else if (c.slope != nullptr) {
    map<F, T, in_pairs>(n, dx, [=](auto at) {
      auto [dz, z] = recover<along, joined, F>(at, y, dy, r, c, act);
      return gradient_of_x(dz, z, lane<along>(c.scale, at), lane<along>(c.slope, at), lane<along>(c.intercept, at));
    });
  } else {  // eval mode
    map<F, T, in_pairs>(n, dx, [=](auto at) { return dz_at(at) * lane<along>(c.scale, at); });
  }
  if ((joined || A::from_input) && dz_out != nullptr) map<F, T, in_pairs>(n, dz_out, dz_at);
}

// The mean goes into the shift where x has few digits, which float32 does not lose in a sum.
template <typename T>
T fold_mean(T mean, T scale, T shift) {
  return T(double(shift) - double(mean) * double(scale));
}

// Distances of x from `shift`, and their squares.
template <bool along, typename F, typename T>
auto distances(const Stored<F>* x, const T* shift) {
  return [=](auto at) {
    auto d = get<F>(x, at) - lane<along>(shift, at);
    return Two<decltype(d)>{d, d * d};
  };
}

// ---- choices made at compile time ----------------------------------------------------------------------------------

template <bool value>
using Constant = std::integral_constant<bool, value>;

// Calls f(format) with the format that a kernel works in: bfloat16 if all operands are runs of it, else that of T.
template <typename T, int count, typename F>
void with_run_format(bool along, const Operand* const (&operands)[count], F&& f) {
#ifdef IABN_BF16
  if constexpr (sizeof(T) == sizeof(float)) {
    bool direct = std::all_of(operands, operands + count, [=](const Operand* o) {
      return !*o || (o->dtype == Dtype::bf16 && (along ? o->channel : o->inner) == 1);
    });
    if (direct) return f(BFloat16{});
  }
#endif
  f(Wide<T>{});
}

// Calls f(act, joined, format) for an activation of which z is known.
template <typename T, int count, typename F>
void with_known_input(const ActivationOptions& a, bool along, const Operand* const (&operands)[count], F&& f) {
  auto with = [&](auto act) {
    with_run_format<T>(along, operands, [&](auto format) { f(act, Constant<false>{}, format); });
  };
  switch (a.kind) {
    case Activation::identity:
      return with(FromInput<Activation::leaky_relu, T>{1});
    case Activation::leaky_relu:
      return with(FromInput<Activation::leaky_relu, T>{T(a.param)});
    case Activation::elu:
      return with(FromInput<Activation::elu, T>{T(a.param)});
    case Activation::silu:
      return with(FromInput<Activation::silu, T>{});
    case Activation::hardswish:
      return with(FromInput<Activation::hardswish, T>{});
    case Activation::relu6:
      return with(FromInput<Activation::relu6, T>{});
  }
}

// Calls f(act, joined, format). An identity is a leaky ReLU of slope 1. An ELU costs so much that it is compiled once,
// with a residual, which may be zero.
template <typename T, int count, typename F>
void with_options(const ActivationOptions& a, bool joined, bool along, const Operand* const (&operands)[count], F&& f) {
  if (a.from_input || a.kind > Activation::elu) return with_known_input<T>(a, along, operands, f);
  bool identity = a.kind == Activation::identity;
  T param = identity ? T(1) : T(a.param), inverse = identity ? T(1) : T(1 / a.param), lowest = T(a.lowest);
  if (a.kind == Activation::elu) {
    return f(Act<Activation::elu, T>{param, inverse, lowest}, Constant<true>{}, Wide<T>{});
  }
  with_run_format<T>(along, operands, [&](auto format) {
    Act<Activation::leaky_relu, T> act{param, inverse, lowest};
    if (joined) f(act, Constant<true>{}, format);
    else f(act, Constant<false>{}, format);
  });
}

template <typename F>
alignas(64) constexpr Stored<F> kNothing[kBlock] = {};

template <typename F>
const Stored<F>* load_residual(const Operand& r, int64_t offset, int64_t stride, int64_t n, Stored<F>* buffer) {
  return r ? load<F>(r, offset, stride, n, buffer) : kNothing<F>;
}

// ---- per-channel values ----------------------------------------------------------------------------------------------

template <typename T>
Channels<T> at_channel(Channels<T> c, int64_t i) {
  c.for_each([i](const T*& v) { v += i; });
  return c;
}

// All channels, in the order of pairs of format F, and with the mean folded for a narrow one if that is asked for.
template <typename F, typename T>
struct ChannelsInPairs {
  std::vector<T> memory;
  Channels<T> view;

  ChannelsInPairs(const void* channels, int64_t n, bool fold) : view(*static_cast<const Channels<T>*>(channels)) {
    if constexpr (!F::is_wide) {
      memory.resize(7 * n);
      T* to = memory.data();
      view.for_each([&](const T*& v) {
        to_pairs<F, T>(n, v, to);
        v = to;
        to += n;
      });
      T* shift = &memory[view.shift - memory.data()];
      for (int64_t i = 0; fold && i < n; ++i) shift[i] = fold_mean(view.mean[i], view.scale[i], shift[i]);
    }
  }
};

// ---- channels whose values lie in runs -----------------------------------------------------------------------------

template <typename T>
Moments<double> block_moments(const Shape& s, const Operand& x, int64_t channel, int64_t first, int64_t last) {
  Moments<double> moments;
  const Operand* operands[] = {&x};
  with_run_format<T>(false, operands, [&](auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> buffer[kBlock];
    Totals<T> totals;
    T shift = 0;
    int64_t summed = 0;
    auto merge = [&] {
      auto [sum, squares] = totals.take();
      double n = double(summed);
      if (summed > 0) moments.merge(n, double(shift) + sum / n, squares - sum * sum / n);
      shift = T(moments.mean);
      summed = 0;
    };
    for_blocks(s, operands, channel, first, last, [&](const int64_t* offsets, int64_t n) {
      const auto* v = load<F>(x, offsets[0], x.inner, n, buffer);
      if (moments.count == 0 && summed == 0) {  // nothing is known of the mean: one more pass over the first block
        T one = T(F::widen(v[0]));
        add<F>(n, totals, distances<false, F>(v, &one));
        shift = T(double(one) + totals.take().first / double(n));
      }
      add<F>(n, totals, distances<false, F>(v, &shift));  // from about the mean: no cancellation, however large it is
      summed += n;
      if (summed >= kSummed) merge();
    });
    merge();
  });
  if (moments.m2 < 0) moments.m2 = 0;
  return moments;
}

template <typename T>
void block_sums(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
                const void* channels, int64_t channel, int64_t first, int64_t last, double sums[2]) {
  Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), channel);
  const Operand* operands[] = {&y, &dy, &r};
  sums[0] = sums[1] = 0;
  with_options<T>(a, bool(r), false, operands, [&](auto act, auto joined, auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> yb[kBlock], db[kBlock], rb[kBlock];
    Totals<T> totals;
    int64_t summed = 0;
    auto take = [&] {
      auto [dz, product] = totals.take();
      sums[0] += dz, sums[1] += product;
      summed = 0;
    };
    for_blocks(s, operands, channel, first, last, [&](const int64_t* at, int64_t n) {
      const auto *yp = load<F>(y, at[0], y.inner, n, yb), *dp = load<F>(dy, at[1], dy.inner, n, db);
      const auto* rp = load_residual<F>(r, at[2], r.inner, n, rb);
      add<F>(n, totals, dz_and_product<false, joined.value, F>(yp, dp, rp, c, act));
      summed += n;
      if (summed >= kSummed) take();
    });
    take();
  });
}

template <typename T>
void block_normalize(const Shape& s, const ActivationOptions& a, const Operand& x, const Operand& r, const Operand& y,
                     const void* channels, int64_t channel, int64_t first, int64_t last) {
  Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), channel);
  const Operand* operands[] = {&x, &r, &y};
  with_options<T>(a, bool(r), false, operands, [&](auto act, auto joined, auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> xb[kBlock], rb[kBlock], yb[kBlock];
    T folded = fold_mean(*c.mean, *c.scale, *c.shift);
    if constexpr (!F::is_wide) c.shift = &folded;
    for_blocks(s, operands, channel, first, last, [&](const int64_t* at, int64_t n) {
      const auto *xp = load<F>(x, at[0], x.inner, n, xb), *rp = load_residual<F>(r, at[1], r.inner, n, rb);
      auto* yp = place<F>(y, at[2], y.inner, n, yb);
      normalize_run<false, joined.value, F>(n, xp, rp, yp, c, act);
      store<F>(y, at[2], y.inner, n, yp, yb);
    });
  });
}

template <typename T>
void block_gradient(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
                    const Operand& dx, const Operand& dz, const void* channels, int64_t channel, int64_t first,
                    int64_t last) {
  Channels<T> c = at_channel(*static_cast<const Channels<T>*>(channels), channel);
  const Operand* operands[] = {&y, &dy, &r, &dx, &dz};
  with_options<T>(a, r || dz, false, operands, [&](auto act, auto joined, auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> yb[kBlock], db[kBlock], rb[kBlock], xb[kBlock], zb[kBlock];
    for_blocks(s, operands, channel, first, last, [&](const int64_t* at, int64_t n) {
      const auto *yp = load<F>(y, at[0], y.inner, n, yb), *dp = load<F>(dy, at[1], dy.inner, n, db);
      const auto* rp = load_residual<F>(r, at[2], r.inner, n, rb);
      auto* xp = dx ? place<F>(dx, at[3], dx.inner, n, xb) : nullptr;
      auto* zp = dz ? place<F>(dz, at[4], dz.inner, n, zb) : nullptr;
      gradient_run<false, joined.value, F>(n, yp, dp, rp, xp, zp, c, act);
      if (dx) store<F>(dx, at[3], dx.inner, n, xp, xb);
      if (dz) store<F>(dz, at[4], dz.inner, n, zp, zb);
    });
  });
}

// ---- rows of channels ----------------------------------------------------------------------------------------------

template <typename T>
void row_moments(const Shape& s, const Operand& x, int64_t first, int64_t last, double* mean, double* m2) {
  const Operand* operands[] = {&x};
  with_run_format<T>(true, operands, [&](auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> buffer[kBlock];
    alignas(64) T shift[kBlock], sums[kBlock], squares[kBlock];
    std::vector<double> means(s.channels), m2s(s.channels);  // in the order of pairs, as the three above
    int64_t before = 0;
    for_tiles(s, first, last, true, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      auto pass = [&] {
        for (int64_t i = 0; i < n; ++i) sums[i] = squares[i] = 0;
        // Four rows at once, so that the sums are read and written once for all of them.
        const Stored<F>* rows[4];
        int waiting = 0;
        auto distances_of = [&](int row) { return distances<true, F>(rows[row], shift); };
        for_rows(s, operands, r0, r1, c0, [&](const int64_t* at) {
          rows[waiting++] = load<F>(x, at[0], x.channel, n, buffer);
          if (waiting == 4) {
            add_along(n, sums, squares, distances_of(0), distances_of(1), distances_of(2), distances_of(3));
            waiting = 0;
          } else if (rows[0] == buffer) {  // which the next row needs
            add_along(n, sums, squares, distances_of(0));
            waiting = 0;
          }
        });
        for (int row = 0; row < waiting; ++row) add_along(n, sums, squares, distances_of(row));
      };
      // Distances from the mean so far; before anything is known of it, from that of the first tile.
      for (int64_t i = 0; i < n; ++i) shift[i] = T(means[c0 + i]);
      if (before == 0) {
        for_rows(s, operands, r0, r0 + 1, c0, [&](const int64_t* at) {
          const auto* v = load<F>(x, at[0], x.channel, n, buffer);
          map<Wide<T>, T, true>(n, shift, [=](auto at) { return get<F>(v, at); });
        });
        pass();
        for (int64_t i = 0; i < n; ++i) shift[i] += sums[i] / T(r1 - r0);
      }
      pass();
      double here = double(r1 - r0), share = here / (double(before) + here);
      for (int64_t i = 0; i < n; ++i) {  // Moments::merge, with one count for all channels
        double sum = sums[i], delta = double(shift[i]) + sum / here - means[c0 + i];
        double tile = double(squares[i]) - sum * sum / here;
        means[c0 + i] += delta * share;
        m2s[c0 + i] += (tile > 0 ? tile : tile == tile ? 0 : tile) + delta * delta * double(before) * share;
      }
      if (c0 + n == s.channels) before += r1 - r0;
    });
    from_pairs<F, T>(s.channels, means.data(), mean);
    from_pairs<F, T>(s.channels, m2s.data(), m2);
  });
}

template <typename T>
void row_sums(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
              const void* channels, int64_t first, int64_t last, double* sum_dz, double* sum_dz_xhat) {
  const Operand* operands[] = {&y, &dy, &r};
  with_options<T>(a, bool(r), true, operands, [&](auto act, auto joined, auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> yb[kBlock], db[kBlock], rb[kBlock];
    alignas(64) T dz[kBlock], products[kBlock];
    ChannelsInPairs<F, T> all(channels, s.channels, false);
    std::vector<double> total_dz(s.channels), total_products(s.channels);
    for_tiles(s, first, last, true, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      Channels<T> c = at_channel(all.view, c0);
      for (int64_t i = 0; i < n; ++i) dz[i] = products[i] = 0;
      for_rows(s, operands, r0, r1, c0, [&](const int64_t* at) {
        const auto *yp = load<F>(y, at[0], y.channel, n, yb), *dp = load<F>(dy, at[1], dy.channel, n, db);
        const auto* rp = load_residual<F>(r, at[2], r.channel, n, rb);
        add_along(n, dz, products, dz_and_product<true, joined.value, F>(yp, dp, rp, c, act));
      });
      for (int64_t i = 0; i < n; ++i) total_dz[c0 + i] += dz[i], total_products[c0 + i] += products[i];
    });
    from_pairs<F, T>(s.channels, total_dz.data(), sum_dz);
    from_pairs<F, T>(s.channels, total_products.data(), sum_dz_xhat);
  });
}

template <typename T>
void row_normalize(const Shape& s, const ActivationOptions& a, const Operand& x, const Operand& r, const Operand& y,
                   const void* channels, int64_t first, int64_t last) {
  const Operand* operands[] = {&x, &r, &y};
  with_options<T>(a, bool(r), true, operands, [&](auto act, auto joined, auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> xb[kBlock], rb[kBlock], yb[kBlock];
    ChannelsInPairs<F, T> all(channels, s.channels, true);
    for_tiles(s, first, last, false, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      Channels<T> c = at_channel(all.view, c0);
      for_rows(s, operands, r0, r1, c0, [&](const int64_t* at) {
        const auto *xp = load<F>(x, at[0], x.channel, n, xb), *rp = load_residual<F>(r, at[1], r.channel, n, rb);
        auto* yp = place<F>(y, at[2], y.channel, n, yb);
        normalize_run<true, joined.value, F>(n, xp, rp, yp, c, act);
        store<F>(y, at[2], y.channel, n, yp, yb);
      });
    });
  });
}

template <typename T>
void row_gradient(const Shape& s, const ActivationOptions& a, const Operand& y, const Operand& dy, const Operand& r,
                  const Operand& dx, const Operand& dz, const void* channels, int64_t first, int64_t last) {
  const Operand* operands[] = {&y, &dy, &r, &dx, &dz};
  with_options<T>(a, r || dz, true, operands, [&](auto act, auto joined, auto format) {
    using F = decltype(format);
    alignas(64) Stored<F> yb[kBlock], db[kBlock], rb[kBlock], xb[kBlock], zb[kBlock];
    ChannelsInPairs<F, T> all(channels, s.channels, false);
    for_tiles(s, first, last, false, [&](int64_t c0, int64_t n, int64_t r0, int64_t r1) {
      Channels<T> c = at_channel(all.view, c0);
      for_rows(s, operands, r0, r1, c0, [&](const int64_t* at) {
        const auto *yp = load<F>(y, at[0], y.channel, n, yb), *dp = load<F>(dy, at[1], dy.channel, n, db);
        const auto* rp = load_residual<F>(r, at[2], r.channel, n, rb);
        auto* xp = dx ? place<F>(dx, at[3], dx.channel, n, xb) : nullptr;
        auto* zp = dz ? place<F>(dz, at[4], dz.channel, n, zb) : nullptr;
        gradient_run<true, joined.value, F>(n, yp, dp, rp, xp, zp, c, act);
        if (dx) store<F>(dx, at[3], dx.channel, n, xp, xb);
        if (dz) store<F>(dz, at[4], dz.channel, n, zp, zb);
      });
    });
  });
}

template <typename T>
constexpr Kernels kernels() {
  return {block_moments<T>, block_sums<T>, block_normalize<T>, block_gradient<T>,
          row_moments<T>,   row_sums<T>,   row_normalize<T>,   row_gradient<T>};
}

}  // namespace

const Kernels IABN_LEVEL = kernels<float>();
#ifdef IABN_FLOAT64
const Kernels kFloat64 = kernels<double>();
#endif

}  // namespace iabn
