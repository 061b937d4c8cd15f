// What a launch of iabn_cuda.cpp needs of its tensors: their layout, the device, and the memory that the kernels work in.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "iabn_cuda.h"
#include "iabn_torch.h"

namespace iabn::cuda {
namespace {

// ---- the device ------------------------------------------------------------------------------------------------------

// Asked of the driver once per device.
const Device& device_of(const Tensor& t) {
  thread_local std::map<int64_t, Device> known;
  int index = t.get_device_index();
  auto [found, is_new] = known.try_emplace(index);
  if (is_new) {
    auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
      STD_TORCH_CHECK(error == cudaSuccess, "iabn_hub: CUDA: ", cudaGetErrorString(error));
      return int64_t(value);
    };
    found->second = {index, attribute(cudaDevAttrMultiProcessorCount),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrL2CacheSize)};
  }
  return found->second;
}

// A zero for each tile, which the kernels leave as they found it. Those of a stream serve all launches on it, one after
// the other. In a graph they are new, since it may be replayed on another stream, beside this one.
unsigned* zeros(int64_t tiles, const Tensor& like, void* stream, std::vector<Tensor>& kept) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  STD_TORCH_CHECK(error == cudaSuccess, "iabn_hub: CUDA: ", cudaGetErrorString(error));
  if (status != cudaStreamCaptureStatusNone) {
    kept.push_back(torch::stable::new_zeros(like, {tiles}, ScalarType::Int));
    return static_cast<unsigned*>(kept.back().data_ptr());
  }
  // Never freed: at the end of the process there may be no device left to free them on.
  static auto& of_streams = *new std::map<std::pair<int64_t, void*>, Tensor>();
  static auto& access = *new std::mutex();
  std::lock_guard guard(access);
  auto [found, is_new] = of_streams.try_emplace({like.get_device_index(), stream});
  if (is_new || found->second.numel() < tiles) {
    found->second = torch::stable::new_zeros(like, {std::max<int64_t>(tiles, 4096)}, ScalarType::Int);
  }
  return static_cast<unsigned*>(found->second.data_ptr());
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

// Several tensors of one shape, ready for launches. The first decides the layout; one that is laid out otherwise is
// copied, and one that is written is copied back by `finish`.
struct Work {
  Launch launch{};
  Dtype dtype;
  std::vector<StridedTensor> operands;  // an undefined tensor gives an empty one
  torch::stable::accelerator::DeviceGuard guard;
  int64_t element_bytes;

  Work(const std::vector<const Tensor*>& reads, const std::vector<Tensor*>& writes)
      : dtype(dtype_of(*reads[0])), guard(reads[0]->get_device_index()), element_bytes(reads[0]->element_size()) {
    const Tensor& first = *reads[0];
    launch.device = device_of(first);
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
    alignment = 16;
    for (const StridedTensor& o : operands) {
      if (o.data != nullptr) alignment = std::min(alignment, alignment_of(o, s, element_bytes));
    }
    set_channels(0, s.channels);
    s.set_width(launch.plan.width);
    STD_TORCH_CHECK(s.per_channel() / launch.plan.width <= std::numeric_limits<int32_t>::max(),
                    "iabn_hub: more than 2^31 vectors of values per channel");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &launch.stream));
  }

  // Room for the parts of every channel.
  void need_partial() {
    ScalarType accumulate = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    kept.push_back(new_vector(kept.front(), 3 * launch.plan.most_parts * launch.shape.channels, accumulate));
    launch.partial = kept.back().data_ptr();
    launch.arrived = zeros(launch.plan.tiles, kept.front(), launch.stream, kept);
  }
  bool fuse(int64_t tensors) {
    launch.fused_bytes = fused_bytes(launch.shape, element_bytes, tensors, launch.device);
    return launch.fused_bytes > 0;
  }
  // Calls f for the channels, a group at a time whose `tensors` operands stay in the L2 cache.
  template <typename F>
  void by_groups(int64_t tensors, F f) {
    int64_t channels = launch.shape.channels;
    int64_t step = channels_of_group(launch.shape, element_bytes, tensors, launch.device);
    for (int64_t begin = 0; begin < channels; begin += step) {
      set_channels(begin, std::min(begin + step, channels));
      need_partial();
      f();
    }
  }
  void finish() {
    for (auto& [to, from] : back) torch::stable::copy_(to, from);
  }

 private:
  std::vector<Tensor> kept;  // until the kernels are queued: the allocator gives memory back in the order of the stream
  std::vector<std::pair<Tensor, Tensor>> back;
  int64_t alignment;

  void set_channels(int64_t begin, int64_t end) {
    launch.shape.begin = begin, launch.shape.end = end;
    launch.plan = make_plan(launch.shape, element_bytes, alignment, launch.device);
  }

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

}  // namespace
}  // namespace iabn::cuda
