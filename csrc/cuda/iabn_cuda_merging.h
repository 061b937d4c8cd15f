// Sums over a channel: what a thread adds up, how threads and blocks merge it in a fixed order, and what is written of it.
#pragma once

#include "iabn_cuda_parts.h"

namespace iabn::cuda {
namespace {

// ---- sums that can be merged -----------------------------------------------------------------------------------------

// Σdz and Σdz·x̂
struct Sums {
  A dz = 0, product = 0;

  IABN_DEVICE void add(A d, A xhat) {
    dz += d;
    product += d * xhat;
  }
};

// Moments of the values that one thread sees, from distances to the first of them. Its own share of the variance bounds
// how far that one can lie from the mean, so that no more than log2(count) bits cancel.
struct Distances {
  A shift = 0, count = 0, sum = 0, squares = 0;

  IABN_DEVICE void start(A x) {
    if (count == 0) shift = x;
  }
  IABN_DEVICE void add(A x) {
    A d = x - shift;
    sum += d;
    squares += d * d;
  }
  // With a mean that counts from `origin`.
  IABN_DEVICE Moments<A> finished(A origin) const {
    if (count == 0) return {};
    A m2 = squares - sum * sum / count;
    return {count, (shift - origin) + sum / count, m2 < 0 ? A(0) : m2};
  }
};

// The first value of a channel. Means are merged as distances from it: were they merged as they are, a large one would
// have lost the digits that the variance needs.
IABN_DEVICE A origin(const StridedTensor& x, int64_t c) { return widen(static_cast<const T*>(x.data)[c * x.channel]); }

IABN_DEVICE void merge(Moments<A>& a, const Moments<A>& b) { a.merge(b.count, b.mean, b.m2); }
IABN_DEVICE void merge(Sums& a, const Sums& b) {
  a.dz += b.dz;
  a.product += b.product;
}

IABN_DEVICE Moments<A> from_lane(const Moments<A>& m, int mask) {
  return {shuffle_xor(m.count, mask), shuffle_xor(m.mean, mask), shuffle_xor(m.m2, mask)};
}
IABN_DEVICE Sums from_lane(const Sums& s, int mask) { return {shuffle_xor(s.dz, mask), shuffle_xor(s.product, mask)}; }

IABN_DEVICE Moments<A> of_other_block(const Moments<A>* m) {
  return {read_through(&m->count), read_through(&m->mean), read_through(&m->m2)};
}
IABN_DEVICE Sums of_other_block(const Sums* s) { return {read_through(&s->dz), read_through(&s->product)}; }

// The merged items of all threads of a block of whole warps, to thread 0.
template <typename Item>
IABN_DEVICE Item merge_block(Item item) {
  IABN_SHARED(Item, of_warp, 32);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int mask = 16; mask > 0; mask /= 2) merge(item, from_lane(item, mask));
  if (lane == 0) of_warp[warp] = item;
  __syncthreads();
  if (warp == 0) {
    item = lane < warps ? of_warp[lane] : Item{};
    for (int mask = 16; mask > 0; mask /= 2) merge(item, from_lane(item, mask));
  }
  return item;
}

// The merged items of all threads with the same threadIdx.x, to the one with threadIdx.y 0. blockDim.y is a power of two.
template <int W, typename Item>
IABN_DEVICE void merge_columns(Item (&items)[W]) {
  IABN_SHARED(Item, upper, kBlockThreads / 2 * W);
  int y = threadIdx.y;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    int at = y % half * blockDim.x + threadIdx.x;
    if (y >= half && y < 2 * half) {
      for (int i = 0; i < W; ++i) upper[i * (kBlockThreads / 2) + at] = items[i];
    }
    __syncthreads();
    if (y < half) {
      for (int i = 0; i < W; ++i) merge(items[i], upper[i * (kBlockThreads / 2) + at]);
    }
    __syncthreads();
  }
}

// Whether this block is the last of its tile to get here. Then it may read what all others have written before.
IABN_DEVICE bool is_last_of_tile(unsigned* arrived) {
  IABN_SHARED(unsigned, before, 1);
  write_before_others();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) *before = count_up(&arrived[blockIdx.x], gridDim.y - 1);
  __syncthreads();
  bool last = *before == gridDim.y - 1;
  if (last) write_before_others();
  return last;
}

// ---- what becomes of them --------------------------------------------------------------------------------------------

// The result of one channel of a launch.
struct FinishMoments {
  StatisticsOutputs out;
  StridedTensor x;

  IABN_DEVICE void operator()(int64_t c, const Moments<A>& moments) const {
    A mean = origin(x, c) + moments.mean, var = moments.m2 / moments.count;
    put(out.mean, c, mean);
    put(out.var, c, var);
    renew(out.running_mean, c, mean, out.momentum);
    renew(out.running_var, c, var * A(out.correction), out.momentum);
    if (out.num_batches != nullptr && c == 0) *out.num_batches += 1;
  }
};

struct FinishSums {
  SumsOutputs out;
  AffineVectors affine;

  IABN_DEVICE void operator()(int64_t c, const Sums& sums) const {
    put(out.sum_dz, c, sums.dz);
    put(out.sum_dz_xhat, c, sums.product);
    bool negative = !affine.signed_scale && value(affine.weight, c, 1) < 0;
    put(out.d_weight, c, negative ? -sums.product : sums.product);
    put(out.d_bias, c, sums.dz);
  }
};

// The items of a block for one channel, in its thread 0, become the result once those of all parts are there.
template <typename Item, typename Finish>
IABN_DEVICE void finish_channel(const Extent& s, int64_t c, int64_t part, Item item, Item* partial, unsigned* arrived,
                                const Finish& finish) {
  if (gridDim.y > 1) {
    if (threadIdx.x == 0) partial[part * s.channels + c] = item;
    if (!is_last_of_tile(arrived)) return;
    item = Item{};
    for (int64_t p = threadIdx.x; p < gridDim.y; p += blockDim.x)
      merge(item, of_other_block(&partial[p * s.channels + c]));
    item = merge_block(item);
  }
  if (threadIdx.x == 0) finish(c, item);
}

// The same for W adjacent channels from c on, of the threads with threadIdx.y 0.
template <int W, typename Item, typename Finish>
IABN_DEVICE void finish_columns(const Extent& s, int64_t c, int64_t part, Item (&items)[W], Item* partial,
                                unsigned* arrived, const Finish& finish) {
  bool inside = c < s.end;
  if (gridDim.y > 1) {
    if (threadIdx.y == 0 && inside) {
      for (int i = 0; i < W; ++i) partial[part * s.channels + c + i] = items[i];
    }
    if (!is_last_of_tile(arrived)) return;
    for (int i = 0; i < W; ++i) items[i] = Item{};
    for (int64_t p = threadIdx.y; p < gridDim.y && inside; p += blockDim.y) {
      for (int i = 0; i < W; ++i) merge(items[i], of_other_block(&partial[p * s.channels + c + i]));
    }
    merge_columns(items);
  }
  // One thread for each channel, since what is left to do is long.
  IABN_SHARED(Item, done, 32 * W);
  if (threadIdx.y == 0) {
    for (int i = 0; i < W; ++i) done[threadIdx.x * W + i] = items[i];
  }
  __syncthreads();
  for_channels<W>(s, c, [&](unsigned k, int64_t channel) { finish(channel, done[k]); });
}

}  // namespace
}  // namespace iabn::cuda
