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

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // else the next launch would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "iabn_hub: CUDA: ", cudaGetErrorString(error));
}

// Asked of the driver once per device.
const Device& device_of(const Tensor& t) {
  thread_local std::map<int64_t, Device> known;
  int index = t.get_device_index();
  auto found = known.find(index);
  if (found != known.end()) return found->second;
  auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index));
    return int64_t(value);
  };
  Device device = {index, attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                   attribute(cudaDevAttrL2CacheSize)};
  return known.emplace(index, device).first->second;
}

// A zero for each tile, which the kernels leave as they found it. Those of a stream serve all launches on it, one after
// the other. In a graph they are new, since it may be replayed on another stream, beside this one.
unsigned* zeros(int64_t tiles, const Tensor& like, void* stream, std::vector<Tensor>& kept) {
  constexpr int64_t kMost = 1 << 16;
  auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(cuda_stream, &status));
  if (status != cudaStreamCaptureStatusNone || tiles > kMost) {
    kept.push_back(torch::stable::new_zeros(like, {tiles}, ScalarType::Int));
    return static_cast<unsigned*>(kept.back().data_ptr());
  }
  // By the number of a stream, since a new one may have the handle of one that is gone. Not from torch's allocator, which
  // may be handing out memory of a pool that is given back. Never freed: at the end of the process there may be no device.
  static auto& of_streams = *new std::map<std::pair<int64_t, unsigned long long>, unsigned*>();
  static auto& access = *new std::mutex();
  std::lock_guard guard(access);
  unsigned long long number = 0;
  check_cuda(cudaStreamGetId(cuda_stream, &number));
  unsigned*& found = of_streams[{like.get_device_index(), number}];
  if (found == nullptr) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another thread may be capturing
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode));
    unsigned* made = nullptr;
    cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&made), kMost * sizeof(unsigned));
    if (error == cudaSuccess) error = cudaMemsetAsync(made, 0, kMost * sizeof(unsigned), cuda_stream);
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode));
    check_cuda(error);
    found = made;
  }
  return found;
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

  // Room for the parts of every channel, if there may be several.
  void need_partial() {
    int64_t parts = launch.plan.most_parts;
    if (parts == 1) return;
    if (parts > room) {
      ScalarType accumulate = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
      kept.push_back(new_vector(kept.front(), 3 * parts * launch.shape.channels, accumulate));
      launch.partial = kept.back().data_ptr();
      room = parts;
    }
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
  int64_t alignment, room = 0;  // room: parts for which there is memory

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
