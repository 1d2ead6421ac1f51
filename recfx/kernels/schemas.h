// The operators of recfx: what they are called, take and return.
//
// The one definition: `define_op` in recfx/kernels/op.py reads the schemas from this file, and C++ alone calls
// `recfx_define_operators`.
#pragma once

constexpr const char* SCHEMAS[] = {
    // index
    "count_candidates_(Tensor(a!) candidate_slots, Tensor(b!) candidate_ids, Tensor(c!) candidate_vocabularies, "
    "Tensor(d!) candidate_counts, Tensor slots, Tensor ids, Tensor(e!) counters, Tensor id_P, Tensor cell_P, Tensor "
    "vocabularies) -> Tensor",
    "deal_ids_(Tensor(a!) message, int first, Tensor id_P, Tensor cell_P, Tensor vocabularies, Tensor? trains, int "
    "capacity, bool distinct) -> (Tensor, Tensor)",
    "find(Tensor slots, Tensor ids, Tensor counters, Tensor id_P, Tensor cell_P, Tensor vocabularies) -> Tensor",
    "find_or_insert_(Tensor(a!) slots, Tensor(b!) ids, Tensor(c!) row_vocabularies, Tensor(d!) seen, Tensor(e!) "
    "born, Tensor(f!) rows, Tensor free_rows, Tensor(g!) unique_rows, Tensor(h!) counters, Tensor id_P, Tensor "
    "cell_P, Tensor vocabularies, Tensor init_keys, Tensor init_params, Tensor? admit_P) -> (Tensor, Tensor)",
    "keep_trained_(Tensor(a!) seen, Tensor(b!) unique_rows, Tensor(c!) counters, Tensor num_before, Tensor "
    "inverse_P, Tensor cell_P, Tensor trains) -> Tensor",
    "owner(Tensor ids, Tensor vocabularies, int world_size) -> Tensor",
    "rehash_(Tensor(a!) slots, Tensor(b!) num_crowded, Tensor ids, Tensor row_vocabularies, int num_rows, int "
    "num_slots, int salt) -> ()",
    "untouch_rows_(Tensor(a!) seen, Tensor(b!) counters, Tensor row_P, Tensor inverse_P, Tensor num_before, Tensor "
    "counts) -> ()",
    // lists
    "cross_lists(Tensor x, Tensor x_offsets, Tensor? x_weights, Tensor y, Tensor y_offsets, Tensor? y_weights, int "
    "capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    "join(Tensor[] parts) -> Tensor",
    "order_ids(Tensor[] values, Tensor[] offsets) -> (Tensor, Tensor)",
    "order_ids_ends(Tensor[] values, Tensor[] offsets) -> (Tensor, Tensor, Tensor)",
    "order_ids_at(Tensor[] values, Tensor[] offsets, int[] places, int num_samples) -> (Tensor, Tensor)",
    "order_lists(Tensor[] values, Tensor[] offsets, Tensor?[] weights, int[] lengths) -> (Tensor, Tensor, Tensor)",
    "list_sums(Tensor values, Tensor offsets) -> Tensor",
    "select_lists(Tensor[] values, Tensor[] offsets, int dim, float fill) -> Tensor",
    "farm_hashes(Tensor[] values, Tensor[] offsets) -> Tensor[]",
    "murmur_hashes(Tensor[] values, Tensor[] offsets) -> Tensor[]",
    "take_lists(Tensor[] values, Tensor[] first, Tensor[] length, int[] capacity) -> Tensor[]",
    // rows
    "adamw_rows_(Tensor(a!) rows, Tensor(b!) grads, Tensor(c!) counters, Tensor unique_rows, Tensor hyper, Tensor "
    "due) -> ()",
    "adamw_rows_checked_(Tensor(a!) rows, Tensor(b!) grads, Tensor(c!) counters, Tensor unique_rows, Tensor hyper, "
    "Tensor due, Tensor[] others) -> Tensor",
    "add_row_grads_(Tensor(a!) grads, Tensor inverse_P, Tensor cell_P, int[] firsts, int[] dims, Tensor[] blocks, "
    "Tensor? weight_P=None) -> ()",
    "add_row_grads_atomic_(Tensor(a!) grads, Tensor inverse_P, Tensor cell_P, int[] firsts, int[] dims, Tensor[] "
    "blocks, Tensor? weight_P=None) -> ()",
    "clip_row_grads_(Tensor(a!) grads, Tensor counters, Tensor scale, Tensor due, int[] dims, float limit, float "
    "max_norm) -> ()",
    "squared_norm(Tensor grads, Tensor counters) -> Tensor",
    "count_rows_(Tensor(a!) counts, Tensor counters, Tensor unique_rows, Tensor due) -> ()",
    "pool(Tensor rows, Tensor row_P, Tensor id_P, Tensor cell_P, Tensor vocabularies, int batch_size, Tensor "
    "init_keys, Tensor? unknown_params, int[] firsts, int[] dims, Tensor? weight_P=None) -> Tensor[]",
    "pool_lists(Tensor rows, Tensor row_P, Tensor id_P, Tensor cell_P, Tensor ends, Tensor vocabularies, int "
    "batch_size, Tensor init_keys, Tensor? unknown_params, int[] firsts, int[] dims) -> Tensor[]",
    "take_rows_(Tensor(a!) message, int first, Tensor rows, Tensor row_M, int width) -> ()",
    "sum_adamw_rows_(Tensor(a!) rows, Tensor(b!) counters, Tensor unique_rows, Tensor hyper, Tensor inverse_P, "
    "Tensor cell_P, int[] firsts, int[] dims, Tensor[] blocks, Tensor? weight_P=None) -> ()",
    // dense
    "add_predictions_(Tensor(a!) histogram, Tensor(b!) sums, Tensor logit, Tensor label, Tensor loss, Tensor valid, "
    "float logit_range) -> ()",
    "all_finite(Tensor[] tensors, Tensor[] grads, Tensor[] counters) -> Tensor",
    "finite_parts(Tensor[] grads) -> Tensor",
};

// What each of the ROW_OPTIMIZERS in rows/optimizer_rows.cpp takes.
constexpr const char* ROW_OPTIMIZER =
    "(Tensor(a!) rows, Tensor(b!) grads, Tensor(c!) counters, Tensor unique_rows, Tensor row_vocabularies, Tensor "
    "hyper, Tensor due, int[] dims, Tensor? rates=None) -> ()";
