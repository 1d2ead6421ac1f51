// The operators of the index as torch's dispatcher calls them: without a line of Python between graph and kernel.
#include <algorithm>

#include "kernels/kernels.h"
#include "kernels/tensors.h"

namespace {

Tensor count_candidates_op(Tensor candidate_slots, Tensor candidate_ids, Tensor candidate_vocabularies,
                           Tensor candidate_counts, const Tensor& slots, const Tensor& ids, Tensor counters,
                           const Tensor& id_P, const Tensor& cell_P, const Tensor& vocabularies) {
  Tensor count_P = torch::stable::empty_like(cell_P);
  count_candidates(flat<int64_t>(candidate_slots), flat<int64_t>(candidate_ids), flat<int32_t>(candidate_vocabularies),
                   flat<int32_t>(candidate_counts), candidate_ids.numel(), flat<int64_t>(slots), flat<int64_t>(ids),
                   flat<int64_t>(counters), flat<int64_t>(id_P), flat<int32_t>(cell_P), cell_P.numel(),
                   flat<int32_t>(vocabularies), vocabularies.numel(), flat<int32_t>(count_P));
  return count_P;
}

std::tuple<Tensor, Tensor> deal_ids_op(Tensor message, int64_t first, const Tensor& id_P, const Tensor& cell_P,
                                       const Tensor& vocabularies, std::optional<Tensor> trains, int64_t capacity,
                                       bool distinct) {
  STD_TORCH_CHECK(message.scalar_type() == ScalarType::Long && message.dim() == 2 &&
                      id_P.scalar_type() == ScalarType::Long && cell_P.scalar_type() == ScalarType::Int &&
                      id_P.numel() == cell_P.numel() && vocabularies.scalar_type() == ScalarType::Int,
                  "deal_ids_: got other tensors than an i64 message [ranks, words], i64 ids, as many i32 cells, and "
                  "i32 vocabularies.");
  const int64_t num_ranks = message.size(0), room = message.size(1) - first, num_lookups = vocabularies.numel();
  if (num_ranks < 1) fail("message: got ", num_ranks, " ranks, expected at least 1.");
  if (num_lookups < 1 && cell_P.numel()) fail("vocabularies: got none, expected one for each lookup.");
  if (trains && (trains->scalar_type() != ScalarType::Bool || trains->numel() != num_lookups))
    fail("trains: got ", trains->numel(), " items, expected ", num_lookups, " booleans, one for each lookup.");
  if (capacity < 0 || capacity % 2 || first < 0 || capacity + capacity / 2 > room)
    fail("capacity: got ", capacity, ", expected an even number, and 1.5 of it at most ", room, ", the message's room.");
  Tensor place_P = torch::stable::empty_like(cell_P);
  Tensor counts = torch::stable::new_empty(message, {num_ranks, 2});
  deal_ids(flat<int64_t>(message), message.size(1), first, num_ranks, flat<int64_t>(id_P), flat<int32_t>(cell_P),
           cell_P.numel(), flat<int32_t>(vocabularies), num_lookups, flat<bool>(trains),
           trains ? trains->numel() : 0, capacity, distinct, flat<int32_t>(place_P), flat<int64_t>(counts));
  return {place_P, counts};
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
                 flat<bool>(admit_P), flat<int32_t>(row_P), flat<int32_t>(inverse_P));
  return {row_P, inverse_P};
}

Tensor keep_trained_op(Tensor seen, Tensor unique_rows, Tensor counters, const Tensor& num_before, const Tensor& inverse_P,
                       const Tensor& cell_P, const Tensor& trains) {
  Tensor out_P = torch::stable::empty_like(inverse_P);
  const int64_t before = num_before.scalar_type() == ScalarType::Int ? *flat<int32_t>(num_before) : *flat<int64_t>(num_before);
  keep_trained(flat<int64_t>(seen), flat<int32_t>(unique_rows), flat<int64_t>(counters), before,
               flat<int32_t>(inverse_P), flat<int32_t>(cell_P), inverse_P.numel(), flat<bool>(trains), trains.numel(),
               flat<int32_t>(out_P));
  return out_P;
}

Tensor owner_op(const Tensor& ids, const Tensor& vocabularies, int64_t world_size) {
  if (world_size < 1) fail("world_size: got ", world_size, ", expected at least 1 rank.");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && vocabularies.scalar_type() == ScalarType::Int &&
                      ids.numel() == vocabularies.numel(),
                  "owner: got other tensors than i64 ids and as many i32 vocabularies.");
  Tensor ranks = torch::stable::empty_like(ids);
  owner(flat<int64_t>(ids), flat<int32_t>(vocabularies), ids.numel(), world_size, flat<int64_t>(ranks));
  return ranks;
}

void rehash_op(Tensor slots, Tensor num_crowded, const Tensor& ids, const Tensor& row_vocabularies, int64_t num_rows,
               int64_t num_slots, int64_t salt) {
  rehash(flat<int64_t>(slots), flat<int64_t>(num_crowded), flat<int64_t>(ids), flat<int32_t>(row_vocabularies),
         num_rows, num_slots, salt);
}

void untouch_rows_op(Tensor seen, Tensor counters, const Tensor& row_P, const Tensor& inverse_P,
                     const Tensor& num_before, const Tensor& counts) {
  untouch_rows(flat<int64_t>(seen), flat<int64_t>(counters), flat<int32_t>(row_P), flat<int32_t>(inverse_P),
               row_P.numel(), flat<int64_t>(num_before), flat<bool>(counts));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recfx, CPU, library) {
  library.impl("count_candidates_", TORCH_BOX(&count_candidates_op));
  library.impl("deal_ids_", TORCH_BOX(&deal_ids_op));
  library.impl("find", TORCH_BOX(&find_op));
  library.impl("find_or_insert_", TORCH_BOX(&find_or_insert_op));
  library.impl("keep_trained_", TORCH_BOX(&keep_trained_op));
  library.impl("owner", TORCH_BOX(&owner_op));
  library.impl("rehash_", TORCH_BOX(&rehash_op));
  library.impl("untouch_rows_", TORCH_BOX(&untouch_rows_op));
}
