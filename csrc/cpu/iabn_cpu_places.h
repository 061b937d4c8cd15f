// Where a kernel goes: blocks of one channel, or rows and tiles of all channels.
#pragma once

#include <algorithm>

#include "iabn_cpu.h"

namespace iabn {
namespace {

constexpr int64_t kRows = 128;  // positions of a tile

// A place among the outer dimensions, and its offset in each operand.
template <int count>
struct Place {
  const Shape& s;
  const Operand* const (&o)[count];
  int64_t index[kOuter], offsets[count] = {};

  Place(const Shape& s, const Operand* const (&o)[count], int64_t run) : s(s), o(o) {
    for (int d = kOuter - 1; d >= 0; --d) {
      index[d] = run == 0 ? 0 : run % s.outer[d];
      if (run > 0) run /= s.outer[d];  // divisions are dear
      for (int k = 0; k < count; ++k) offsets[k] += index[d] * o[k]->outer[d];
    }
  }
  void next() {
    for (int d = kOuter - 1; d >= 0; --d) {
      bool wraps = ++index[d] == s.outer[d];
      for (int k = 0; k < count; ++k) offsets[k] += wraps ? (1 - s.outer[d]) * o[k]->outer[d] : o[k]->outer[d];
      if (!wraps) return;
      index[d] = 0;
    }
  }
};

// Calls f(offsets, n) for blocks [first, last) of one channel: n ≤ kBlock values, and where they begin in each operand.
template <int count, typename F>
void for_blocks(const Shape& s, const Operand* const (&o)[count], int64_t channel, int64_t first, int64_t last, F&& f) {
  int64_t per_run = (s.inner + kBlock - 1) / kBlock, start = first % per_run * kBlock, offsets[count];
  Place<count> place(s, o, first / per_run);
  for (int64_t b = first; b < last; ++b) {
    for (int k = 0; k < count; ++k) offsets[k] = place.offsets[k] + channel * o[k]->channel + start * o[k]->inner;
    f(offsets, std::min(s.inner - start, kBlock));
    start += kBlock;
    if (start >= s.inner) start = 0, place.next();
  }
}

// Calls f(offsets) for positions [first, last): where channel c0 lies in each operand.
template <int count, typename F>
void for_rows(const Shape& s, const Operand* const (&o)[count], int64_t first, int64_t last, int64_t c0, F&& f) {
  int64_t inner = first % s.inner, offsets[count];
  Place<count> place(s, o, first / s.inner);
  while (first < last) {
    int64_t until = std::min(last, first + s.inner - inner);
    for (int k = 0; k < count; ++k) offsets[k] = place.offsets[k] + inner * o[k]->inner + c0 * o[k]->channel;
    for (; first < until; ++first) {
      f(offsets);
      for (int k = 0; k < count; ++k) offsets[k] += o[k]->inner;
    }
    inner = 0;
    place.next();
  }
}

// Calls f(c0, n, r0, r1) for tiles of at most kBlock channels and kRows positions. A pass that only reads goes backward:
// it begins with what its producer has written last, and ends with what the pass after it reads first.
template <typename F>
void for_tiles(const Shape& s, int64_t first, int64_t last, bool backward, F&& f) {
  int64_t tiles = (last - first + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t r0 = first + (backward ? tiles - 1 - t : t) * kRows;
    for (int64_t c0 = 0; c0 < s.channels; c0 += kBlock) {
      f(c0, std::min(s.channels - c0, kBlock), r0, std::min(r0 + kRows, last));
    }
  }
}

}  // namespace
}  // namespace iabn
