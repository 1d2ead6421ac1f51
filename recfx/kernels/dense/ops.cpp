// The operators of dense tensors as torch's dispatcher calls them: without a line of Python between graph and kernel.

#include "kernels/kernels.h"
#include "kernels/tensors.h"
#include "kernels/dense/matrices.h"

namespace {

void add_predictions_op(Tensor histogram, Tensor sums, const Tensor& logit, const Tensor& label, const Tensor& loss,
                        const Tensor& valid, double logit_range) {
  add_predictions(flat<int64_t>(histogram), flat<double>(sums), flat<float>(logit), flat<float>(label),
                  flat<float>(loss), flat<bool>(valid), logit.numel(), histogram.size(1), sums.numel(), logit_range);
}

Tensor all_finite_op(const Tensors& tensors, const Tensors& grads, const Tensors& counters) {
  Tensor result =
      torch::stable::new_empty(tensors.empty() ? grads[0] : tensors[0], {}, ScalarType::Bool);
  Matrices m;
  for (const Tensor& t : tensors) m.add(t);
  for (size_t i = 0; i < grads.size(); ++i)
    m.add(grads[i], flat<int64_t>(counters[i])[NUM_UNIQUE], grads[i].stride(0), grads[i].size(1));
  all_finite(m.first.data(), m.num.data(), m.stride.data(), m.width.data(), m.num.size(), flat<bool>(result));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recfx, CPU, library) {
  library.impl("add_predictions_", TORCH_BOX(&add_predictions_op));
  library.impl("all_finite", TORCH_BOX(&all_finite_op));
}
