// The operators of the captured step as torch's dispatcher calls them: without a line of Python between graph and kernel.
// Schemas, definitions and fakes are in the .py files; torch's stable C++ interface keeps the build at two seconds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "kernels/lists/lists.h"
#include "kernels/index/table.h"

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

extern "C" {
bool order_ids(const int64_t* const*, const int32_t* const*, const int64_t*, int64_t, int64_t, int64_t, int64_t*,
               int32_t*);
void find(const int64_t*, const int64_t*, const int64_t*, const int64_t*, const int32_t*, int64_t, const int32_t*,
          int64_t, int32_t*);
void find_or_insert(int64_t*, int64_t*, int32_t*, int64_t*, int32_t*, float*, const int32_t*, int32_t*, int64_t*,
                    int64_t, int64_t, int64_t, int64_t, const int64_t*, const int32_t*, int64_t, const int32_t*,
                    int64_t, const int64_t*, const float*, int64_t, const bool*, int32_t*, int32_t*);
void pool(const float*, int64_t, int64_t, const int32_t*, const int64_t*, const int32_t*, int64_t, const int32_t*,
          int64_t, int64_t, const int64_t*, const float*, int64_t, const int64_t*, const int64_t*, const float*,
          float* const*);
void add_row_grads(float*, int64_t, const int32_t*, const int32_t*, int64_t, int64_t, const int64_t*, const int64_t*,
                   const GradBlock*, const float*);
void add_predictions(int64_t*, double*, const float*, const float*, const float*, const bool*, int64_t, int64_t, int64_t,
                     double);
void adamw_rows(float*, float*, int64_t*, const int32_t*, int64_t, int64_t, int64_t, const double*, const bool*, bool*);
void order_lists(const int64_t* const*, const int32_t* const*, const float* const*, const int64_t*, int64_t, int64_t,
                 int64_t, int64_t*, int32_t*, float*);
void list_sums(const float*, const int32_t*, int64_t, float*);
void select_lists(const float* const*, const int32_t* const*, int64_t, int64_t, int64_t, const float*, float*);
void clip_row_grads(float*, const int64_t*, int64_t, const float*, const bool*, int64_t, const int64_t*, const double*);
void squared_norm(const float*, const int64_t*, int64_t, int64_t, double*);
void all_finite(const float* const*, const int64_t*, const int64_t*, const int64_t*, int64_t, bool*);
void untouch_rows(int64_t*, int64_t*, const int32_t*, const int32_t*, int64_t, const int64_t*, const bool*);
void sgd_rows(const StepRows*);
void adagrad_rows(const StepRows*);
void rowwise_adagrad_rows(const StepRows*);
void adamw_rows_by_column(const StepRows*);
void ftrl_rows(const StepRows*);
}

namespace {

// The address of a tensor's first item; the kernel knows the strides of `rows` and `grads`, all others are contiguous.
template <class T>
T* strided(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* flat(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "recfx: got a strided tensor where the kernel reads a contiguous one.");
  return static_cast<T*>(t.data_ptr());
}

template <class T>
std::vector<T*> flat(const Tensors& tensors) {
  std::vector<T*> addresses;
  for (const Tensor& t : tensors) addresses.push_back(flat<T>(t));
  return addresses;
}

// Raises RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Raises what `recfx.kernels.lists.order_ids.check_offsets` raises of one lookup: its ids would be read outside their tensor.
void check_offsets(const int32_t* offsets, int64_t num_lists, int64_t num_values, int64_t lookup) {
  int32_t falls = offsets[0] < 0 || offsets[num_lists] > num_values;
  for (int64_t b = 0; b < num_lists; ++b) falls |= offsets[b + 1] < offsets[b];
  if (!falls) return;
  int64_t at = 0, least = 0;
  for (; offsets[at] >= least && offsets[at] <= num_values; ++at) least = offsets[at];
  fail("offsets of lookup ", lookup, ": got ", offsets[at], " at place ", at, ", expected ", least, " to ", num_values,
       ": offsets never fall and end within the values. Ids would be read outside their tensor. Make Ragged features ",
       "with recfx.types.pack, or correct these offsets.");
}

// The number of lists, which is the same for each lookup.
int64_t equal_lists(const Tensors& offsets) {
  const int64_t num_lists = offsets[0].numel() - 1;
  for (size_t l = 0; l < offsets.size(); ++l)
    if (offsets[l].numel() != num_lists + 1)
      fail("offsets of lookup ", l, ": got ", offsets[l].numel(), " numbers, expected ", num_lists + 1,
           ", as many as of lookup 0. Lookups are of the same samples.");
  return num_lists;
}

using Values = std::vector<const int64_t*>;
using Offsets = std::vector<const int32_t*>;

std::tuple<Tensor, Tensor> ordered(const Values& values, const Offsets& offsets, const Ints& capacities,
                                   int64_t num_lists, const Tensor& like_ids, const Tensor& like_cells) {
  const int64_t positions = std::accumulate(capacities.begin(), capacities.end(), int64_t{0});
  Tensor id_P = torch::stable::new_empty(like_ids, {positions}), cell_P = torch::stable::new_empty(like_cells, {positions});
  if (!order_ids(values.data(), offsets.data(), capacities.data(), values.size(), num_lists, positions,
                 flat<int64_t>(id_P), flat<int32_t>(cell_P)))
    for (size_t l = 0; l < values.size(); ++l) check_offsets(offsets[l], num_lists, capacities[l], l);
  return {id_P, cell_P};
}

std::tuple<Tensor, Tensor> order_ids_op(const Tensors& values, const Tensors& offsets) {
  const int64_t num_lists = equal_lists(offsets);
  Ints capacities;
  for (const Tensor& t : values) capacities.push_back(t.numel());
  return ordered(flat<const int64_t>(values), flat<const int32_t>(offsets), capacities, num_lists, values[0],
                 offsets[0]);
}

std::tuple<Tensor, Tensor> order_ids_at_op(const Tensors& values, const Tensors& offsets, const Ints& places,
                                           int64_t num_samples) {
  const std::vector<int64_t*> all_values = flat<int64_t>(values);
  const std::vector<int32_t*> all_offsets = flat<int32_t>(offsets);
  Values of_values;
  Offsets of_offsets;
  Ints capacities;
  for (size_t i = 0; i < places.size(); i += 5) {
    of_values.push_back(all_values[places[i]] + places[i + 1]);
    of_offsets.push_back(all_offsets[places[i + 3]] + places[i + 4]);
    capacities.push_back(places[i + 2]);
  }
  return ordered(of_values, of_offsets, capacities, num_samples, values[0], offsets[0]);
}

Tensor find_op(const Tensor& slots, const Tensor& ids, const Tensor& counters, const Tensor& id_P, const Tensor& cell_P,
               const Tensor& vocabularies) {
  Tensor row_P = torch::stable::empty_like(cell_P);
  find(flat<int64_t>(slots), flat<int64_t>(ids), flat<int64_t>(counters), flat<int64_t>(id_P), flat<int32_t>(cell_P),
       cell_P.numel(), flat<int32_t>(vocabularies), vocabularies.numel(), flat<int32_t>(row_P));
  return row_P;
}

std::tuple<Tensor, Tensor> find_or_insert_op(
    Tensor slots, Tensor ids, Tensor row_vocabularies, Tensor seen, Tensor born, Tensor rows,
    const Tensor& free_rows, Tensor unique_rows, Tensor counters, const Tensor& id_P, const Tensor& cell_P,
    const Tensor& vocabularies, const Tensor& init_keys, const Tensor& init_params, std::optional<Tensor> admit_P) {
  Tensor row_P = torch::stable::empty_like(cell_P), inverse_P = torch::stable::empty_like(cell_P);
  find_or_insert(flat<int64_t>(slots), flat<int64_t>(ids), flat<int32_t>(row_vocabularies), flat<int64_t>(seen),
                 flat<int32_t>(born), strided<float>(rows), flat<int32_t>(free_rows),
                 flat<int32_t>(unique_rows), flat<int64_t>(counters), ids.numel(), unique_rows.numel(), rows.stride(0), rows.size(1),
                 flat<int64_t>(id_P), flat<int32_t>(cell_P), cell_P.numel(), flat<int32_t>(vocabularies),
                 vocabularies.numel(), flat<int64_t>(init_keys), flat<float>(init_params), rows.size(2),
                 admit_P ? flat<bool>(*admit_P) : nullptr, flat<int32_t>(row_P), flat<int32_t>(inverse_P));
  return {row_P, inverse_P};
}

Tensors pool_op(const Tensor& rows, const Tensor& row_P, const Tensor& id_P, const Tensor& cell_P,
                const Tensor& vocabularies, int64_t batch_size, const Tensor& init_keys,
                std::optional<Tensor> unknown_params, const Ints& firsts, const Ints& dims,
                std::optional<Tensor> weight_P) {
  Tensors out;
  for (int64_t dim : dims) out.push_back(torch::stable::new_empty(rows, {batch_size, vocabularies.numel(), dim}));
  pool(strided<float>(rows), rows.stride(0), rows.size(2), flat<int32_t>(row_P), flat<int64_t>(id_P),
       flat<int32_t>(cell_P), cell_P.numel(), flat<int32_t>(vocabularies), vocabularies.numel(), batch_size,
       flat<int64_t>(init_keys), unknown_params ? flat<float>(*unknown_params) : nullptr, dims.size(), firsts.data(),
       dims.data(), weight_P ? flat<float>(*weight_P) : nullptr, flat<float>(out).data());
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
                weight_P ? flat<float>(*weight_P) : nullptr);
}

void adamw_rows_op(Tensor rows, Tensor grads, Tensor counters, const Tensor& unique_rows, const Tensor& hyper,
                   const Tensor& due) {
  adamw_rows(strided<float>(rows), strided<float>(grads), flat<int64_t>(counters), flat<int32_t>(unique_rows),
             rows.stride(0), grads.stride(0), rows.size(2), flat<double>(hyper), flat<bool>(due), nullptr);
}

void add_predictions_op(Tensor histogram, Tensor sums, const Tensor& logit, const Tensor& label, const Tensor& loss,
                        const Tensor& valid, double logit_range) {
  add_predictions(flat<int64_t>(histogram), flat<double>(sums), flat<float>(logit), flat<float>(label),
                  flat<float>(loss), flat<bool>(valid), logit.numel(), histogram.size(1), sums.numel(), logit_range);
}

std::tuple<Tensor, Tensor, Tensor> order_lists_op(const Tensors& values, const Tensors& offsets,
                                                  const std::vector<std::optional<Tensor>>& weights,
                                                  const Ints& lengths) {
  const int64_t num_lists = equal_lists(offsets);
  int64_t positions = 0;
  std::vector<const float*> of_weights;
  for (size_t l = 0; l < values.size(); ++l) {
    check_offsets(flat<const int32_t>(offsets[l]), num_lists, values[l].numel(), l);
    positions += values[l].numel();
    of_weights.push_back(weights[l] ? flat<const float>(*weights[l]) : nullptr);
    if (weights[l] && weights[l]->numel() != values[l].numel())
      fail("weights of lookup ", l, ": got ", weights[l]->numel(), ", expected ", values[l].numel(),
           ", one for each id.");
  }
  Tensor id_P = torch::stable::new_empty(values[0], {positions}), cell_P = torch::stable::new_empty(offsets[0], {positions});
  Tensor weight_P = torch::stable::new_empty(values[0], {positions}, torch::headeronly::ScalarType::Float);
  order_lists(flat<const int64_t>(values).data(), flat<const int32_t>(offsets).data(), of_weights.data(), lengths.data(),
              values.size(), num_lists, positions, flat<int64_t>(id_P), flat<int32_t>(cell_P), flat<float>(weight_P));
  return {id_P, cell_P, weight_P};
}

// The offsets i32 of `num_lists` lists of values, whatever made them: no list leaves the values.
const int32_t* offsets_of(const Tensor& offsets, int64_t num_lists, const Tensor& values) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && values.scalar_type() == ScalarType::Float,
                  "recfx: got lists of other dtypes than the kernel reads, expected f32 values and i32 offsets.");
  const int32_t* at = flat<const int32_t>(offsets);
  STD_TORCH_CHECK(offsets.numel() == num_lists + 1 && lists_fit(at, num_lists, values.numel()),
                  "recfx: got offsets that do not begin with 0, fall, leave their ", values.numel(),
                  " values or are not ", num_lists + 1, ", expected the ends of as many lists one after another. The kernel would "
                  "read outside the column. recfx.types.pack names it.");
  return at;
}

Tensor list_sums_op(const Tensor& values, const Tensor& offsets) {
  Tensor sums = torch::stable::new_empty(values, {offsets.numel() - 1});
  list_sums(flat<float>(values), offsets_of(offsets, sums.numel(), values), sums.numel(), flat<float>(sums));
  return sums;
}

Tensor select_lists_op(const Tensors& values, const Tensors& offsets, int64_t dim, double fill) {
  const int64_t num_lists = offsets[0].numel() - 1, num_columns = values.size();
  const float number = fill;
  std::vector<const int32_t*> of_offsets;
  for (int64_t c = 0; c < num_columns; ++c) of_offsets.push_back(offsets_of(offsets[c], num_lists, values[c]));
  Tensor out = torch::stable::new_empty(values[0], {num_lists, num_columns * dim});
  select_lists(flat<const float>(values).data(), of_offsets.data(), num_columns, num_lists, dim,
               &number, flat<float>(out));
  return out;
}

void clip_row_grads_op(Tensor grads, const Tensor& counters, const Tensor& scale, const Tensor& due, const Ints& dims,
                       double limit, double max_norm) {
  const double limits[] = {limit, max_norm};
  clip_row_grads(strided<float>(grads), flat<int64_t>(counters), grads.stride(0), flat<float>(scale), flat<bool>(due),
                 dims.size(), dims.data(), limits);
}

Tensor squared_norm_op(const Tensor& grads, const Tensor& counters) {
  Tensor norm = torch::stable::new_empty(grads, {}, torch::headeronly::ScalarType::Double);
  squared_norm(strided<float>(grads), flat<int64_t>(counters), grads.stride(0), grads.size(1), flat<double>(norm));
  return norm;
}

// Tensors as matrices whose rows are contiguous.
struct Matrices {
  Tensors kept;  // the copies among them
  std::vector<const float*> first;
  Ints num, stride, width;

  void add(const Tensor& t, int64_t num_rows, int64_t row_stride, int64_t row_width) {
    if (t.scalar_type() != torch::headeronly::ScalarType::Float) fail("all_finite: got a tensor that is not f32.");
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

Tensor all_finite_op(const Tensors& tensors, const Tensors& grads, const Tensors& counters) {
  Tensor result =
      torch::stable::new_empty(tensors.empty() ? grads[0] : tensors[0], {}, torch::headeronly::ScalarType::Bool);
  Matrices m;
  for (const Tensor& t : tensors) m.add(t);
  for (size_t i = 0; i < grads.size(); ++i)
    m.add(grads[i], flat<int64_t>(counters[i])[NUM_UNIQUE], grads[i].stride(0), grads[i].size(1));
  all_finite(m.first.data(), m.num.data(), m.stride.data(), m.width.data(), m.num.size(), flat<bool>(result));
  return result;
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

void untouch_rows_op(Tensor seen, Tensor counters, const Tensor& row_P, const Tensor& inverse_P,
                     const Tensor& num_before, const Tensor& counts) {
  untouch_rows(flat<int64_t>(seen), flat<int64_t>(counters), flat<int32_t>(row_P), flat<int32_t>(inverse_P),
               row_P.numel(), flat<int64_t>(num_before), flat<bool>(counts));
}

template <void (*update)(const StepRows*)>
void optimizer_rows_op(Tensor rows, Tensor grads, Tensor counters, const Tensor& unique_rows,
                       const Tensor& row_vocabularies, const Tensor& hyper, const Tensor& due, const Ints& dims,
                       std::optional<Tensor> rates) {
  const StepRows step{strided<float>(rows), strided<float>(grads), flat<int64_t>(counters), flat<int32_t>(unique_rows),
                      flat<int32_t>(row_vocabularies), rows.stride(0), grads.stride(0), grads.size(1),
                      flat<double>(hyper), rates ? flat<float>(*rates) : nullptr, flat<bool>(due),
                      (int64_t)dims.size(), dims.data()};
  update(&step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recfx, CPU, library) {
  library.impl("order_ids", TORCH_BOX(&order_ids_op));
  library.impl("order_ids_at", TORCH_BOX(&order_ids_at_op));
  library.impl("find", TORCH_BOX(&find_op));
  library.impl("find_or_insert_", TORCH_BOX(&find_or_insert_op));
  library.impl("pool", TORCH_BOX(&pool_op));
  library.impl("add_row_grads_", TORCH_BOX(&add_row_grads_op));
  library.impl("adamw_rows_", TORCH_BOX(&adamw_rows_op));
  library.impl("adamw_rows_checked_", TORCH_BOX(&adamw_rows_checked_op));
  library.impl("add_predictions_", TORCH_BOX(&add_predictions_op));
  library.impl("order_lists", TORCH_BOX(&order_lists_op));
  library.impl("list_sums", TORCH_BOX(&list_sums_op));
  library.impl("select_lists", TORCH_BOX(&select_lists_op));
  library.impl("clip_row_grads_", TORCH_BOX(&clip_row_grads_op));
  library.impl("squared_norm", TORCH_BOX(&squared_norm_op));
  library.impl("all_finite", TORCH_BOX(&all_finite_op));
  library.impl("untouch_rows_", TORCH_BOX(&untouch_rows_op));
  library.impl("sgd_rows_", TORCH_BOX(&optimizer_rows_op<sgd_rows>));
  library.impl("adagrad_rows_", TORCH_BOX(&optimizer_rows_op<adagrad_rows>));
  library.impl("rowwise_adagrad_rows_", TORCH_BOX(&optimizer_rows_op<rowwise_adagrad_rows>));
  library.impl("adamw_rows_by_column_", TORCH_BOX(&optimizer_rows_op<adamw_rows_by_column>));
  library.impl("ftrl_rows_", TORCH_BOX(&optimizer_rows_op<ftrl_rows>));
}
