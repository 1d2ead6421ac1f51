// The operators of rows as torch's dispatcher calls them: without a line of Python between graph and kernel.

#include "kernels/kernels.h"
#include "kernels/tensors.h"
#include "kernels/dense/matrices.h"

namespace {

Tensors pool_op(const Tensor& rows, const Tensor& row_P, const Tensor& id_P, const Tensor& cell_P,
                const Tensor& vocabularies, int64_t batch_size, const Tensor& init_keys,
                std::optional<Tensor> unknown_params, const Ints& firsts, const Ints& dims,
                std::optional<Tensor> weight_P) {
  Tensors out;
  for (int64_t dim : dims) out.push_back(torch::stable::new_empty(rows, {batch_size, vocabularies.numel(), dim}));
  pool(strided<float>(rows), rows.stride(0), rows.size(2), flat<int32_t>(row_P), flat<int64_t>(id_P),
       flat<int32_t>(cell_P), cell_P.numel(), flat<int32_t>(vocabularies), vocabularies.numel(), batch_size,
       flat<int64_t>(init_keys), flat<float>(unknown_params), dims.size(), firsts.data(),
       dims.data(), flat<float>(weight_P), flat<float>(out).data());
  return out;
}

void add_row_grads_op(Tensor grads, const Tensor& inverse_P, const Tensor& cell_P, const Ints& firsts, const Ints& dims,
                      const Tensors& blocks, std::optional<Tensor> weight_P) {
  Tensors kept;  // until the kernel has run
  std::vector<GradBlock> sources;
  for (const Tensor& block : blocks) {
    const bool readable = block.size(2) == 1 || block.stride(2) == 1;
    kept.push_back(readable ? block : torch::stable::contiguous(block));
    const Tensor& t = kept.back();
    sources.push_back({strided<const float>(t), t.size(1), t.stride(0), t.stride(1)});
  }
  add_row_grads(strided<float>(grads), grads.stride(0), flat<int32_t>(inverse_P), flat<int32_t>(cell_P),
                cell_P.numel(), dims.size(), firsts.data(), dims.data(), sources.data(),
                flat<float>(weight_P));
}

void adamw_rows_op(Tensor rows, Tensor grads, Tensor counters, const Tensor& unique_rows, const Tensor& hyper,
                   const Tensor& due) {
  adamw_rows(strided<float>(rows), strided<float>(grads), flat<int64_t>(counters), flat<int32_t>(unique_rows),
             rows.stride(0), grads.stride(0), rows.size(2), flat<double>(hyper), flat<bool>(due), nullptr);
}

void count_rows_op(Tensor counts, const Tensor& counters, const Tensor& unique_rows, const Tensor& due) {
  count_rows(flat<int32_t>(counts), flat<int64_t>(counters), flat<int32_t>(unique_rows), flat<bool>(due));
}

// As two kernels: on a CPU the gradients of a step stay in the cache between them.
void sum_adamw_rows_op(Tensor rows, Tensor counters, const Tensor& unique_rows, const Tensor& hyper,
                       const Tensor& inverse_P, const Tensor& cell_P, const Ints& firsts, const Ints& dims,
                       const Tensors& blocks, std::optional<Tensor> weight_P) {
  const int64_t num = flat<int64_t>(counters)[NUM_UNIQUE], width = rows.size(2);
  Tensor grads = torch::stable::new_zeros(rows, {num, width});
  add_row_grads_op(grads, inverse_P, cell_P, firsts, dims, blocks, weight_P);
  const bool due = true;
  adamw_rows(strided<float>(rows), strided<float>(grads), flat<int64_t>(counters), flat<int32_t>(unique_rows),
             rows.stride(0), width, width, flat<double>(hyper), &due, nullptr);
}

void clip_row_grads_op(Tensor grads, const Tensor& counters, const Tensor& scale, const Tensor& due, const Ints& dims,
                       double limit, double max_norm) {
  const double limits[] = {limit, max_norm};
  clip_row_grads(strided<float>(grads), flat<int64_t>(counters), grads.stride(0), flat<float>(scale), flat<bool>(due),
                 dims.size(), dims.data(), limits);
}

void take_rows_op(Tensor message, int64_t first, const Tensor& rows, const Tensor& row_M, int64_t width) {
  STD_TORCH_CHECK(message.scalar_type() == ScalarType::Float && message.dim() == 2 &&
                      rows.scalar_type() == ScalarType::Float && rows.dim() == 3 &&
                      (rows.size(2) == 1 || rows.stride(2) == 1) && row_M.scalar_type() == ScalarType::Int,
                  "take_rows_: got other tensors than an f32 message [ranks, numbers], f32 rows [R, 1 + slots, W] and "
                  "i32 row numbers.");
  const int64_t num_ranks = message.size(0), num_rows = row_M.numel();
  if (num_ranks < 1) fail("message: got ", num_ranks, " ranks, expected at least 1.");
  if (width < 1 || width > rows.size(2))
    fail("width: got ", width, ", expected 1 to ", rows.size(2), ", the rows' width.");
  if (num_rows % num_ranks || first < 0 || first + num_rows / num_ranks * (width + 1) > message.size(1))
    fail("row_M: got ", num_rows, " rows of ", width, " weights, expected as many for each of ", num_ranks,
         " ranks, and room for them in a message of ", message.size(1), " numbers.");
  take_rows(flat<float>(message), message.size(1), first, num_ranks, strided<float>(rows), rows.stride(0),
            flat<int32_t>(row_M), num_rows, width);
}

Tensor squared_norm_op(const Tensor& grads, const Tensor& counters) {
  Tensor norm = torch::stable::new_empty(grads, {}, ScalarType::Double);
  squared_norm(strided<float>(grads), flat<int64_t>(counters), grads.stride(0), grads.size(1), flat<double>(norm));
  return norm;
}

Tensor adamw_rows_checked_op(Tensor rows, Tensor grads, Tensor counters, const Tensor& unique_rows,
                             const Tensor& hyper, const Tensor& due, const Tensors& others) {
  Tensor result = torch::stable::empty_like(due);
  Matrices m;
  for (const Tensor& t : others) m.add(t);
  all_finite(m.first.data(), m.num.data(), m.stride.data(), m.width.data(), m.num.size(), flat<bool>(result));
  adamw_rows(strided<float>(rows), strided<float>(grads), flat<int64_t>(counters), flat<int32_t>(unique_rows),
             rows.stride(0), grads.stride(0), rows.size(2), flat<double>(hyper), flat<bool>(due), flat<bool>(result));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recfx, CPU, library) {
  library.impl("adamw_rows_", TORCH_BOX(&adamw_rows_op));
  library.impl("adamw_rows_checked_", TORCH_BOX(&adamw_rows_checked_op));
  library.impl("add_row_grads_", TORCH_BOX(&add_row_grads_op));
  library.impl("clip_row_grads_", TORCH_BOX(&clip_row_grads_op));
  library.impl("count_rows_", TORCH_BOX(&count_rows_op));
  library.impl("pool", TORCH_BOX(&pool_op));
  library.impl("squared_norm", TORCH_BOX(&squared_norm_op));
  library.impl("take_rows_", TORCH_BOX(&take_rows_op));
  library.impl("sum_adamw_rows_", TORCH_BOX(&sum_adamw_rows_op));
}
