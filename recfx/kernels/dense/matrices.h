// Tensors of any strides as `all_finite` reads them.
#pragma once
#include "kernels/kernels.h"
#include "kernels/tensors.h"

namespace {  // of each file that includes this

// Tensors as matrices whose rows are contiguous.
struct Matrices {
  Tensors kept;  // the copies among them
  std::vector<const float*> first;
  Ints num, stride, width;

  void add(const Tensor& t, int64_t num_rows, int64_t row_stride, int64_t row_width) {
    if (t.scalar_type() != ScalarType::Float) fail("all_finite: got a tensor that is not f32.");
    first.push_back(strided<const float>(t));
    num.push_back(num_rows);
    stride.push_back(row_stride);
    width.push_back(row_width);
  }
  void add(const Tensor& t) {
    if (t.is_contiguous()) return add(t, 1, t.numel(), t.numel());
    for (int64_t inner = 0; t.dim() == 2 && inner < 2; ++inner)
      if (t.stride(inner) == 1) return add(t, t.size(1 - inner), t.stride(1 - inner), t.size(inner));
    kept.push_back(torch::stable::contiguous(t));
    add(kept.back(), 1, t.numel(), t.numel());
  }
};

}  // namespace
