// The kernels for rows of channels, as in channels_last: a thread works on W adjacent channels, a block on blockDim.x of
// such groups and on blockDim.y rows at once.
#pragma once

#include "iabn_cuda_merging.h"

namespace iabn::cuda {
namespace {

// The first of this thread's W channels.
template <int W>
IABN_DEVICE int64_t first_channel(const Extent& s, int64_t tile) {
  return s.begin + (tile * blockDim.x + threadIdx.x) * W;
}

struct Row {
  int64_t row, channel;

  IABN_DEVICE int64_t operator()(const StridedTensor& o) const { return row * o.inner + channel; }
};

// The values of this thread's channels, from c on. Each thread of the block computes those of one channel.
template <int W, typename ValuesOf>
IABN_DEVICE void share_channels(const Extent& s, int64_t c, Channel (&mine)[W], ValuesOf values_of) {
  IABN_SHARED(Channel, all, 32 * W);
  for_channels<W>(s, c, [&](unsigned k, int64_t channel) { all[k] = values_of(channel); });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < W; ++i) mine[i] = all[threadIdx.x * W + i];
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    rows_moments(Extent s, Moments<A>* partial, unsigned* arrived, FinishMoments finish) {
  Share share = share_of_block(s.inner, true);
  int64_t c = first_channel<W>(s, share.tile);
  Moments<A> moments[W];
  if (c < s.end) {
    Distances distances[W];
    auto load_x = [&](int64_t row) { return load<W>(finish.x, Row{row, c}(finish.x)); };
    pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_x, [&](int64_t, const Pack<W>& pack) {
      Values<W> v = unpack(pack);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        distances[i].start(v.v[i]);
        distances[i].count += 1;
        distances[i].add(v.v[i]);
      }
    });
    for (int i = 0; i < W; ++i) moments[i] = distances[i].finished(origin(finish.x, c + i));
  }
  merge_columns(moments);
  finish_columns(s, c, share.part, moments, partial, arrived, finish);
}

template <int W, bool any>
__global__ void __launch_bounds__(kBlockThreads)
    rows_normalize(Extent s, Activated act, AffineVectors affine, ForwardOperands o, Vector mean, Vector var) {
  Share share = share_of_block(s.inner, false);
  int64_t c = first_channel<W>(s, share.tile);
  Channel channels[W];
  share_channels(s, c, channels, [&](int64_t k) { return forward_of(affine, k, value(mean, k, 0), value(var, k, 0)); });
  if (c >= s.end) return;
  auto load_inputs = [&](int64_t row) {
    Row at{row, c};
    Inputs<W> in{load<W>(o.x, at(o.x)), {}};
    if constexpr (any) in.residual = load_any<W>(o.residual, at(o.residual));
    return in;
  };
  pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_inputs, [&](int64_t row, const Inputs<W>& in) {
    store(o.y, Row{row, c}(o.y), activated<any>(act, in, A(0), [&](int i) -> const Channel& { return channels[i]; }));
  });
}

template <int W, From from>
__global__ void __launch_bounds__(kBlockThreads)
    rows_sums(Extent s, Activated act, BackwardOperands o, Vector mean, Vector var, Sums* partial, unsigned* arrived,
              FinishSums finish) {
  Share share = share_of_block(s.inner, true);
  int64_t c = first_channel<W>(s, share.tile);
  Channel channels[W];
  share_channels(s, c, channels,
                 [&](int64_t k) { return sums_of<from>(finish.affine, k, value(mean, k, 0), value(var, k, 0)); });
  Sums sums[W];
  if (c < s.end) {
    auto load_row = [&](int64_t row) { return load_gradients<from, W>(o, Row{row, c}); };
    pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_row, [&](int64_t, const Gradients<from, W>& g) {
      g.each(
          act, [&](int i) -> const Channel& { return channels[i]; },
          [&](int i, A dz, A t) { sums[i].add(dz, recovered(t, channels[i].factor, channels[i].term)); });
    });
  }
  merge_columns(sums);
  finish_columns(s, c, share.part, sums, partial, arrived, finish);
}

template <int W, From from>
__global__ void __launch_bounds__(kBlockThreads)
    rows_gradient(Extent s, Activated act, AffineVectors affine, BackwardOperands o, Vector mean, Vector var,
                  Vector mean_dz, Vector mean_dz_xhat, A mean_share) {
  Share share = share_of_block(s.inner, false);
  int64_t c = first_channel<W>(s, share.tile);
  bool centred = mean_dz.data != nullptr;
  Channel channels[W];
  share_channels(s, c, channels, [&](int64_t k) {
    return gradient_of<from>(affine, k, value(mean, k, 0), value(var, k, 0), value(mean_dz, k, 0) * mean_share,
                             value(mean_dz_xhat, k, 0) * mean_share);
  });
  if (c >= s.end) return;
  auto load_row = [&](int64_t row) { return load_gradients<from, W>(o, Row{row, c}); };
  pipelined(share.begin + threadIdx.y, share.end, blockDim.y, load_row, [&](int64_t row, const Gradients<from, W>& g) {
    store_gradients(act, g, [&](int i) -> const Channel& { return channels[i]; }, centred, o, Row{row, c});
  });
}

}  // namespace
}  // namespace iabn::cuda
