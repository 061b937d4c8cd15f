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
  int64_t activation, signed_scale;
  double param, lowest, eps, share;
  int64_t alignment, processors, shared_bytes;
  void *out[2], *partial;
  Plan plan;  // what came of it
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
  Device device{call->processors, call->shared_bytes};
  Launch l{call->shape, make_plan(call->shape, call->element_bytes, call->alignment, device), call->partial, 0,
           nullptr};
  call->plan = l.plan;
  ActivationOptions act{Activation(call->activation), call->param, call->lowest};
  AffineVectors affine{call->weight, call->bias, call->eps, call->signed_scale != 0};
  StridedTensor* o = call->operands;
  switch (call->operation) {
    case 0:
      k.statistics(l, o[0], call->out[0], call->out[1]);
      break;
    case 1:
      k.normalize(l, act, affine, o[0], o[1], o[2], call->mean, call->var);
      break;
    case 2:
      l.fused_bytes = fused_bytes(l.shape, call->element_bytes, 1, device);
      if (l.fused_bytes == 0) return 1;
      k.fused_forward(l, act, affine, o[0], o[1], o[2], call->out[0], call->out[1]);
      break;
    case 3:
      k.gradient_sums(l, act, affine, o[0], o[1], o[2], call->out[0], call->out[1]);
      break;
    case 4:
      k.input_gradient(l, act, affine, o[0], o[1], o[2], o[3], o[4], call->var, call->mean_dz, call->mean_dz_xhat,
                       call->share);
      break;
    case 5:
      l.fused_bytes = fused_bytes(l.shape, call->element_bytes, 2, device);
      if (l.fused_bytes == 0) return 1;
      k.fused_backward(l, act, affine, o[0], o[1], o[2], o[3], o[4], call->var, call->out[0], call->out[1]);
      break;
  }
  return 0;
}
