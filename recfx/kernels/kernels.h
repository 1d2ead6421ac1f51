// Every kernel as its operator calls it. A kernel's source includes this too, so that a signature which differs does not
// compile. Parameters are explained where the kernel is.
#pragma once
#include "kernels/index/table.h"

extern "C" {
// index
void count_candidates(int64_t* candidate_slots, int64_t* candidate_ids, int32_t* candidate_vocabularies,
                      int32_t* candidate_counts, int64_t max_candidates, const int64_t* slots, const int64_t* ids,
                      int64_t* counters, const int64_t* id_P, const int32_t* cell_P, int64_t num_positions,
                      const int32_t* vocabularies, int64_t num_lookups, int32_t* count_P);
void deal_ids(int64_t* message, int64_t stride, int64_t first, int64_t num_ranks, const int64_t* id_P,
              const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
              const bool* trains, int64_t num_trains, int64_t capacity, bool distinct, int32_t* place_P,
              int64_t* counts);
void find(const int64_t* slots, const int64_t* ids, const int64_t* counters, const int64_t* id_P, const int32_t* cell_P,
          int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups, int32_t* row_P);
void find_or_insert(int64_t* slots, int64_t* ids, int32_t* row_vocabularies, int64_t* seen, int32_t* born, float* rows,
                    const int32_t* free_rows, int32_t* unique_rows, int64_t* counters, int64_t max_rows,
                    int64_t max_unique, int64_t row_stride, int64_t row_blocks, const int64_t* id_P,
                    const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                    const int64_t* init_keys, const float* init_params, int64_t width, const bool* admit_P,
                    int32_t* row_P, int32_t* inverse_P);
void keep_trained(int64_t* seen, int32_t* unique_rows, int64_t* counters, int64_t num_before, const int32_t* inverse_P,
                  const int32_t* cell_P, int64_t num_positions, const bool* trains, int64_t num_cells, int32_t* out_P);
void owner(const int64_t* ids, const int32_t* vocabularies, int64_t num, int64_t world_size, int64_t* ranks);
void rehash(int64_t* slots, int64_t* num_crowded, const int64_t* ids, const int32_t* row_vocabularies, int64_t num_rows,
            int64_t num_slots, int64_t salt);
void untouch_rows(int64_t* seen, int64_t* counters, const int32_t* row_P, const int32_t* inverse_P,
                  int64_t num_positions, const int64_t* num_before, const bool* counts);
// lists
void cross_lists(const int64_t* x, const int32_t* x_offsets, const float* x_weights, const int64_t* y,
                 const int32_t* y_offsets, const float* y_weights, int64_t num_lists, int64_t capacity,
                 int32_t* x_first, int32_t* y_first, int32_t* counts, int64_t* out, float* out_weights,
                 int32_t* offsets, int64_t* overflow, int64_t num_x, int64_t num_y, int64_t* bad);
bool order_ids(const int64_t* const* values, const int32_t* const* offsets, const int64_t* capacities,
               int64_t num_lookups, int64_t batch_size, int64_t num_positions, int64_t* id_P, int32_t* cell_P);
void order_lists(const int64_t* const* values, const int32_t* const* offsets, const float* const* weights,
                 const int64_t* lengths, int64_t num_lookups, int64_t batch_size, int64_t num_positions, int64_t* id_P,
                 int32_t* cell_P, float* weight_P);
void list_sums(const float* values, const int32_t* offsets, int64_t num_lists, float* out);
void select_lists(const float* const* values, const int32_t* const* offsets, int64_t num_columns, int64_t num_lists,
                  int64_t dim, const float* fill, float* out);
void farm_hashes(const uint8_t* const* values, const int64_t* num_bytes, const int32_t* const* offsets,
                 const int64_t* num_strings, int64_t num_columns, int64_t* const* out, int64_t* bad);
void murmur_hashes(const uint8_t* const* values, const int64_t* num_bytes, const int32_t* const* offsets,
                   const int64_t* num_strings, int64_t num_columns, int64_t* const* out, int64_t* bad);
void take_lists(const void* const* values, const int32_t* const* first, const int32_t* const* length,
                const int64_t* num_values, const int64_t* item_bytes, const int64_t* num_lists, const int64_t* capacity,
                void* const* out, int32_t* const* offsets, int64_t num_columns, int64_t* bad);
// rows
void adamw_rows(float* rows, float* grads_UW, int64_t* counters, const int32_t* unique_rows, int64_t row_stride,
                int64_t grad_stride, int64_t width, const double* hyper, const bool* due, bool* is_finite);
void add_row_grads(float* grads_UW, int64_t stride, const int32_t* inverse_P, const int32_t* cell_P,
                   int64_t num_positions, int64_t num_slices, const int64_t* firsts, const int64_t* dims,
                   const GradBlock* blocks, const float* weight_P);
void clip_row_grads(float* grads_UW, const int64_t* counters, int64_t stride, const float* scale, const bool* due,
                    int64_t num_tables, const int64_t* dims, const double* limits);
void squared_norm(const float* grads_UW, const int64_t* counters, int64_t stride, int64_t width, double* out);
void count_rows(int32_t* counts, const int64_t* counters, const int32_t* unique_rows, const bool* due);
void pool(const float* rows, int64_t stride, int64_t width, const int32_t* row_P, const int64_t* id_P,
          const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
          int64_t batch_size, const int64_t* init_keys, const float* unknown_params, int64_t num_slices,
          const int64_t* firsts, const int64_t* dims, const float* weight_P, float* const* out);
void take_rows(float* message, int64_t stride, int64_t first, int64_t num_ranks, const float* rows, int64_t row_stride,
               const int32_t* row_M, int64_t num_rows, int64_t width);
// dense
void add_predictions(int64_t* histogram, double* sums, const float* logit, const float* label, const float* loss,
                     const bool* valid, int64_t batch_size, int64_t num_bins, int64_t num_sums, double logit_range);
void all_finite(const float* const* first, const int64_t* num, const int64_t* stride, const int64_t* width,
                int64_t num_matrices, bool* out);
}
