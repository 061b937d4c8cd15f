// How iabn_cpu.cpp goes over memory: which order suits several tensors at once, and which thread does which part.
#pragma once

#include <algorithm>
#include <vector>

#include "iabn_cpu.h"
#include "iabn_torch.h"

namespace iabn {
namespace {

constexpr int64_t kValuesPerThread = 16384;  // below, starting a thread costs more than it saves
constexpr int64_t kRowChannels = 16;         // shorter rows of channels are walked channel by channel instead
constexpr int64_t kJoined = 256;             // several rows of channels become one of up to so many

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

// Calls f(shape, operands, first, last, part) for the rows of a walk: joined rows in parts, then those left over.
template <typename F>
void over_rows(const Walk& w, const Rows& rows, int64_t parts, const F& f) {
  in_parts(parts, rows.joined.per_channel(),
           [&](int64_t p, int64_t begin, int64_t end) { f(rows.joined, rows.operands, begin, end, p); });
  if (rows.rest < w.shape.per_channel()) f(w.shape, w.operands, rows.rest, w.shape.per_channel(), parts);
}

}  // namespace
}  // namespace iabn
