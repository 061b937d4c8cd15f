// One C function for Python: calls a launcher of the kernels that were compiled for the host.
#include <type_traits>

#include "cuda_on_host.h"
#include "iabn_cuda.h"

using namespace iabn;
using namespace iabn::cuda;

struct Call {
  int64_t operation, dtype, element_bytes;
  Extent shape;
  StridedTensor operands[5];
  Vector weight, bias, mean, var, mean_dz, mean_dz_xhat;
  int64_t activation, signed_scale, from_input;
  double param, lowest, eps, share;
  int64_t alignment, processors, shared_bytes;
  Output out[4];  // of the statistics: mean, var, running mean and variance; of the sums: theirs, of weight and bias
  int64_t* num_batches;
  double momentum, correction;
  void* partial;
  unsigned* arrived;
  Plan plan;  // what came of it
  int64_t parts, launches;
};

extern "C" int64_t iabn_run(Call* call) {
  const Launchers* all[] = {
#ifdef IABN_WITHOUT_f64  // only float32 is compiled
      &k_f32
#else
      &k_f32, &k_f64, &k_bf16, &k_f16
#endif
  };
  const Launchers& k = *all[call->dtype];
  Launch l{};
  l.device = {0, call->processors, call->shared_bytes, 0};
  l.shape = call->shape;
  l.plan = call->plan = make_plan(call->shape, call->element_bytes, call->alignment, l.device);
  l.shape.set_width(l.plan.width);
  l.partial = call->partial, l.arrived = call->arrived;
  ActivationOptions act{Activation(call->activation), call->param, call->lowest, call->from_input != 0};
  AffineVectors affine{call->weight, call->bias, call->eps, call->signed_scale != 0};
  StatisticsOutputs moments{call->out[0],      call->out[1],   call->out[2],    call->out[3],
                            call->num_batches, call->momentum, call->correction};
  SumsOutputs sums{call->out[0], call->out[1], call->out[2], call->out[3]};
  StridedTensor* o = call->operands;
  ForwardOperands forward{o[0], o[1], o[2]};
  BackwardOperands backward{o[0], o[1], o[2], o[3], o[4]};
  int64_t before = on_host::launches;
  switch (call->operation) {
    case 0:
      k.statistics(l, o[0], moments);
      break;
    case 1:
      k.normalize(l, act, affine, forward, call->mean, call->var);
      break;
    case 2:
      l.fused_bytes = fused_bytes(l.shape, call->element_bytes, 1, l.device);
      if (l.fused_bytes == 0) return 1;
      k.fused_forward(l, act, affine, forward, moments);
      break;
    case 3:
      k.gradient_sums(l, act, affine, backward, call->mean, call->var, sums);
      break;
    case 4:
      k.input_gradient(l, act, affine, backward, call->mean, call->var, call->mean_dz, call->mean_dz_xhat, call->share);
      break;
    case 5:
      l.fused_bytes = fused_bytes(l.shape, call->element_bytes, 2, l.device);
      if (l.fused_bytes == 0) return 1;
      k.fused_backward(l, act, affine, backward, call->mean, call->var, sums);
      break;
    case 6:
      k.update_statistics(l, call->mean, call->var, moments);
      break;
  }
  call->launches = on_host::launches - before;
  call->parts = on_host::parts;
  return 0;
}

extern "C" uint32_t iabn_divide(uint32_t n, uint32_t d) { return Divisor(d).divide(n); }
