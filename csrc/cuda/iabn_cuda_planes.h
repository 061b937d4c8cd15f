// The kernels for channels in planes, as in NCHW: a channel is a few contiguous runs, and a block works on one channel.
#pragma once

#include "iabn_cuda_merging.h"

namespace iabn::cuda {
namespace {

template <int W>
IABN_DEVICE int64_t slots(const Extent& s) {
  return s.per_channel() / W;
}

// Where vector number `slot` of a channel lies in an operand.
template <int W>
struct Slot {
  int64_t run, position, channel;

  IABN_DEVICE Slot(const Extent& s, int64_t slot, int64_t c)
      : run(s.by_run.divide(uint32_t(slot))), position((slot - run * s.run) * W), channel(c) {}
  IABN_DEVICE int64_t operator()(const StridedTensor& o) const {
    return run * o.outer + channel * o.channel + position;
  }
};

// Adds a vector to the distances of one channel.
template <int W>
IABN_DEVICE void add_vector(Distances& distances, const Pack<W>& pack) {
  Values<W> v = unpack(pack);
  distances.start(v.v[0]);
  distances.count += W;
#pragma unroll
  for (int i = 0; i < W; ++i) distances.add(v.v[i]);
}

template <int W>
__global__ void __launch_bounds__(kBlockThreads)
    planes_moments(Extent s, Moments<A>* partial, unsigned* arrived, FinishMoments finish) {
  Share share = share_of_block(slots<W>(s), true);
  int64_t c = s.begin + share.tile;
  Distances distances;
  auto load_x = [&](int64_t slot) { return load<W>(finish.x, Slot<W>(s, slot, c)(finish.x)); };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_x,
            [&](int64_t, const Pack<W>& pack) { add_vector(distances, pack); });
  Moments<A> moments = merge_block(distances.finished(origin(finish.x, c)));
  finish_channel(s, c, share.part, moments, partial, arrived, finish);
}

template <int W, bool any>
__global__ void __launch_bounds__(kBlockThreads)
    planes_normalize(Extent s, Activated act, AffineVectors affine, ForwardOperands o, Vector mean, Vector var) {
  Share share = share_of_block(slots<W>(s), false);
  int64_t c = s.begin + share.tile;
  Channel channel = forward_of(affine, c, value(mean, c, 0), value(var, c, 0));
  auto load_inputs = [&](int64_t slot) {
    Slot<W> at(s, slot, c);
    Inputs<W> in{load<W>(o.x, at(o.x)), {}};
    if constexpr (any) in.residual = load_any<W>(o.residual, at(o.residual));
    return in;
  };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_inputs, [&](int64_t slot, const Inputs<W>& in) {
    store(o.y, Slot<W>(s, slot, c)(o.y), activated<any>(act, in, A(0), [&](int) -> const Channel& { return channel; }));
  });
}

template <int W, From from>
__global__ void __launch_bounds__(kBlockThreads)
    planes_sums(Extent s, Activated act, BackwardOperands o, Vector mean, Vector var, Sums* partial, unsigned* arrived,
                FinishSums finish) {
  Share share = share_of_block(slots<W>(s), true);
  int64_t c = s.begin + share.tile;
  Channel channel = sums_of<from>(finish.affine, c, value(mean, c, 0), value(var, c, 0));
  Sums sums;
  auto load_slot = [&](int64_t slot) { return load_gradients<from, W>(o, Slot<W>(s, slot, c)); };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_slot, [&](int64_t, const Gradients<from, W>& g) {
    g.each(
        act, [&](int) -> const Channel& { return channel; },
        [&](int, A dz, A t) { sums.add(dz, recovered(t, channel.factor, channel.term)); });
  });
  finish_channel(s, c, share.part, merge_block(sums), partial, arrived, finish);
}

template <int W, From from>
__global__ void __launch_bounds__(kBlockThreads)
    planes_gradient(Extent s, Activated act, AffineVectors affine, BackwardOperands o, Vector mean, Vector var,
                    Vector mean_dz, Vector mean_dz_xhat, A mean_share) {
  Share share = share_of_block(slots<W>(s), false);
  int64_t c = s.begin + share.tile;
  bool centred = mean_dz.data != nullptr;
  Channel channel = gradient_of<from>(affine, c, value(mean, c, 0), value(var, c, 0), value(mean_dz, c, 0) * mean_share,
                                      value(mean_dz_xhat, c, 0) * mean_share);
  auto load_slot = [&](int64_t slot) { return load_gradients<from, W>(o, Slot<W>(s, slot, c)); };
  pipelined(share.begin + threadIdx.x, share.end, blockDim.x, load_slot,
            [&](int64_t slot, const Gradients<from, W>& g) {
              store_gradients(act, g, [&](int) -> const Channel& { return channel; }, centred, o, Slot<W>(s, slot, c));
            });
}

// ---- a channel in shared memory --------------------------------------------------------------------------------------

// One block per channel; each thread comes back to the vectors that it has put there itself.
template <int W, bool any>
__global__ void __launch_bounds__(kBlockThreads, 2)
    planes_fused_forward(Extent s, Activated act, AffineVectors affine, ForwardOperands o, FinishMoments finish) {
  IABN_DYNAMIC_SHARED(kept);
  Pack<W>* packs = reinterpret_cast<Pack<W>*>(kept);
  IABN_SHARED(Moments<A>, all, 1);
  int64_t c = blockIdx.x;
  A first = origin(o.x, c);
  Distances distances;
  auto load_x = [&](int64_t slot) { return load<W>(o.x, Slot<W>(s, slot, c)(o.x)); };
  pipelined(threadIdx.x, slots<W>(s), blockDim.x, load_x, [&](int64_t slot, const Pack<W>& pack) {
    packs[slot] = pack;
    add_vector(distances, pack);
  });
  Moments<A> moments = merge_block(distances.finished(first));
  if (threadIdx.x == 0) *all = moments;
  __syncthreads();
  // The mean stays a distance from the first value: x − first is exact where the mean is large.
  Channel channel = forward_of(affine, c, all->mean, all->m2 / all->count);
  auto load_inputs = [&](int64_t slot) {
    Inputs<W> in{packs[slot], {}};
    if constexpr (any) in.residual = load_any<W>(o.residual, Slot<W>(s, slot, c)(o.residual));
    return in;
  };
  if (threadIdx.x == 0) finish(c, moments);  // which reads the first value, that this thread may overwrite below
  pipelined<1>(threadIdx.x, slots<W>(s), blockDim.x, load_inputs, [&](int64_t slot, const Inputs<W>& in) {
    store(o.y, Slot<W>(s, slot, c)(o.y),
          activated<any>(act, in, first, [&](int) -> const Channel& { return channel; }));
  });
}

template <int W, From from>
__global__ void __launch_bounds__(kBlockThreads, 2)
    planes_fused_backward(Extent s, Activated act, BackwardOperands o, Vector mean, Vector var, FinishSums finish) {
  IABN_DYNAMIC_SHARED(kept);
  Pack<W>*values = reinterpret_cast<Pack<W>*>(kept), *dys = values + slots<W>(s);
  IABN_SHARED(Sums, all, 1);
  int64_t c = blockIdx.x;
  A m = value(mean, c, 0), v = value(var, c, 0);
  Channel channel = sums_of<from>(finish.affine, c, m, v);
  Sums sums;
  auto load_slot = [&](int64_t slot) { return load_gradients<from, W>(o, Slot<W>(s, slot, c)); };
  pipelined(threadIdx.x, slots<W>(s), blockDim.x, load_slot, [&](int64_t slot, const Gradients<from, W>& g) {
    values[slot] = g.kept;
    dys[slot] = g.dy;
    g.each(
        act, [&](int) -> const Channel& { return channel; },
        [&](int, A dz, A t) { sums.add(dz, recovered(t, channel.factor, channel.term)); });
  });
  sums = merge_block(sums);
  if (threadIdx.x == 0) {
    *all = sums;
    finish(c, sums);
  }
  __syncthreads();
  A count = A(s.per_channel());
  channel = gradient_of<from>(finish.affine, c, m, v, all->dz / count, all->product / count);
  auto load_kept = [&](int64_t slot) {
    Gradients<from, W> g{values[slot], dys[slot], {}};
    if constexpr (from == From::output) g.residual = load_any<W>(o.residual, Slot<W>(s, slot, c)(o.residual));
    return g;
  };
  pipelined<1>(threadIdx.x, slots<W>(s), blockDim.x, load_kept, [&](int64_t slot, const Gradients<from, W>& g) {
    store_gradients(act, g, [&](int) -> const Channel& { return channel; }, true, o, Slot<W>(s, slot, c));
  });
}

}  // namespace
}  // namespace iabn::cuda
