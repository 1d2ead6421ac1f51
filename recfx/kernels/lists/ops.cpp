// The operators of lists as torch's dispatcher calls them: without a line of Python between graph and kernel.
#include <cstring>
#include <numeric>

#include "kernels/kernels.h"
#include "kernels/tensors.h"
#include "kernels/lists/lists.h"

namespace {

// Raises RuntimeError where the offsets of a column, one of several, do not fit; -1: all do.
void check_unfit(int64_t column, const Tensors& values, const Tensors& offsets) {
  if (column < 0) return;
  const int32_t* const at = flat<const int32_t>(offsets[column]);
  const int64_t num = offsets[column].numel(), num_values = values[column].numel();
  std::ostringstream of_column;
  of_column << "column " << column << " of " << values.size() << ": got offsets ";
  const std::string fault = of_column.str();
  if (num == 0) fail(fault, "without a number, expected one more than there are lists.");
  if (at[0] != 0) fail(fault, at[0], " at place 0, expected 0. List l goes from offsets[l] to offsets[l + 1].");
  for (int64_t p = 1; p < num; ++p) {
    if (at[p] < at[p - 1])
      fail(fault, "falling from ", at[p - 1], " to ", at[p], " at place ", p,
           ", expected rising ones. They are the ends of lists.");
    if (at[p] > num_values)
      fail(fault, at[p], " at place ", p, ", expected at most ", num_values, ", the number of values.");
  }
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

Tensor join_op(const Tensors& parts) {
  Ints sizes = sizes_of(parts);
  Tensor out = torch::stable::new_empty(parts[0], {std::accumulate(sizes.begin(), sizes.end(), int64_t{0})});
  char* to = static_cast<char*>(out.data_ptr());
  for (const Tensor& part : parts) {
    if (part.scalar_type() != parts[0].scalar_type()) fail("join: got parts of several dtypes, expected one.");
    const Tensor t = torch::stable::contiguous(part);
    const size_t num_bytes = t.numel() * t.element_size();
    std::memcpy(to, t.data_ptr(), num_bytes);
    to += num_bytes;
  }
  return out;
}

Tensors take_lists_op(const Tensors& values, const Tensors& first, const Tensors& length, const Ints& capacity) {
  Tensors out, offsets, pairs;
  Ints item_bytes;
  for (size_t c = 0; c < values.size(); ++c) {
    out.push_back(torch::stable::new_empty(values[c], {capacity[c]}));
    offsets.push_back(torch::stable::new_empty(first[c], {first[c].numel() + 1}));
    item_bytes.push_back(values[c].element_size());
    pairs.push_back(out[c]);
    pairs.push_back(offsets[c]);
  }
  int64_t bad = -1;
  take_lists(flat<const void>(values).data(), flat<const int32_t>(first).data(), flat<const int32_t>(length).data(),
             sizes_of(values).data(), item_bytes.data(), sizes_of(first).data(), capacity.data(),
             flat<void>(out).data(), flat<int32_t>(offsets).data(), values.size(), &bad);
  if (bad >= 0) {
    const auto first_eight = [](const Tensor& t) {
      std::ostringstream text;
      for (int64_t i = 0; i < t.numel() && i < 8; ++i) text << (i ? ", " : "[") << flat<int32_t>(t)[i];
      return text.str() + "]";
    };
    fail("column ", bad, " of ", values.size(), ": got lists from ", first_eight(first[bad]), " of ",
         first_eight(length[bad]), " values, expected them within ", values[bad].numel(),
         ". The first eight are shown.");
  }
  return pairs;
}

template <void (*hash)(const uint8_t* const*, const int64_t*, const int32_t* const*, const int64_t*, int64_t,
                       int64_t* const*, int64_t*)>
Tensors hashes_op(const Tensors& values, const Tensors& offsets) {
  Tensors out;
  for (const Tensor& t : offsets) out.push_back(torch::stable::new_empty(t, {t.numel() - 1}, ScalarType::Long));
  int64_t bad = -1;
  hash(flat<const uint8_t>(values).data(), sizes_of(values).data(), flat<const int32_t>(offsets).data(),
       sizes_of(out).data(), out.size(), flat<int64_t>(out).data(), &bad);
  check_unfit(bad, values, offsets);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_lists_op(const Tensor& x, const Tensor& x_offsets,
                                                          std::optional<Tensor> x_weights, const Tensor& y,
                                                          const Tensor& y_offsets, std::optional<Tensor> y_weights,
                                                          int64_t capacity) {
  const int64_t num_lists = x_offsets.numel() - 1;
  Tensor out = torch::stable::new_empty(x, {capacity}), offsets = torch::stable::empty_like(x_offsets);
  Tensor weights = torch::stable::new_empty(x, {capacity}, ScalarType::Float);
  Tensor overflow = torch::stable::new_empty(x, {});
  std::vector<int32_t> x_first(x.numel()), y_first(y.numel()), counts(2 * x_offsets.numel());
  int64_t bad = -1;
  cross_lists(flat<int64_t>(x), flat<int32_t>(x_offsets), flat<float>(x_weights), flat<int64_t>(y),
              flat<int32_t>(y_offsets), flat<float>(y_weights), num_lists, capacity, x_first.data(), y_first.data(),
              counts.data(), flat<int64_t>(out), flat<float>(weights), flat<int32_t>(offsets),
              flat<int64_t>(overflow), x.numel(), y.numel(), &bad);
  check_unfit(bad, {x, y}, {x_offsets, y_offsets});
  return {out, weights, offsets, overflow};
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
  Tensor weight_P = torch::stable::new_empty(values[0], {positions}, ScalarType::Float);
  order_lists(flat<const int64_t>(values).data(), flat<const int32_t>(offsets).data(), of_weights.data(), lengths.data(),
              values.size(), num_lists, positions, flat<int64_t>(id_P), flat<int32_t>(cell_P), flat<float>(weight_P));
  return {id_P, cell_P, weight_P};
}

// The offsets i32 of `num_lists` lists of values, whatever made them: no list leaves the values.
const int32_t* offsets_of(const Tensor& offsets, int64_t num_lists, const Tensor& values) {
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recfx, CPU, library) {
  library.impl("cross_lists", TORCH_BOX(&cross_lists_op));
  library.impl("farm_hashes", TORCH_BOX(&hashes_op<farm_hashes>));
  library.impl("join", TORCH_BOX(&join_op));
  library.impl("list_sums", TORCH_BOX(&list_sums_op));
  library.impl("murmur_hashes", TORCH_BOX(&hashes_op<murmur_hashes>));
  library.impl("order_ids", TORCH_BOX(&order_ids_op));
  library.impl("order_ids_at", TORCH_BOX(&order_ids_at_op));
  library.impl("order_lists", TORCH_BOX(&order_lists_op));
  library.impl("select_lists", TORCH_BOX(&select_lists_op));
  library.impl("take_lists", TORCH_BOX(&take_lists_op));
}
