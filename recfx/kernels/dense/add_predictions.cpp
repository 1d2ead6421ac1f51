// Counts a batch's predictions by label and logit bin, and adds up clicks, losses, predicted clicks, how many are not
// finite and, where `sums` has a sixth number, how many labels are not in [0, 1].
#include <vector>

#include "kernels/kernels.h"

constexpr int64_t CHUNK = 512;  // samples summed before their sums are added: the same for any number of threads

struct Sums {
  double clicks = 0, loss = 0, predicted = 0;
  int32_t samples = 0, nonfinite = 0, bad_labels = 0;
};

EXPORT void add_predictions(int64_t* histogram, double* sums, const float* logit, const float* label, const float* loss,
                            const bool* valid, int64_t batch_size, int64_t num_bins, int64_t num_sums, double logit_range) {
  const int64_t num_chunks = (batch_size + CHUNK - 1) / CHUNK;
  const float range = logit_range, width = 2 * logit_range, last = num_bins - 1;
  std::vector<int64_t> place(batch_size);
  std::vector<Sums> chunk_sums(num_chunks);
#pragma omp parallel for schedule(static) if (num_chunks > 1)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    Sums s;
    for (int64_t b = chunk * CHUNK; b < std::min((chunk + 1) * CHUNK, batch_size); ++b) {
      const float bin = (logit[b] + range) / width * num_bins;
      place[b] = (label[b] > 0.5f) * num_bins + (bin >= 0.0f ? (int64_t)std::min(bin, last) : 0);  // NaN: the lowest
      if (!valid[b]) continue;
      s.samples += 1;
      s.clicks += label[b];
      s.loss += loss[b];
      s.predicted += 1.0f / (1.0f + std::exp(-logit[b]));
      s.nonfinite += !(std::isfinite(logit[b]) && std::isfinite(loss[b]));
    }
    for (int64_t b = chunk * CHUNK; b < std::min((chunk + 1) * CHUNK, batch_size); ++b)  // a loop of vectors
      s.bad_labels += valid[b] & !((label[b] >= 0.0f) & (label[b] <= 1.0f));              // NaN too
    chunk_sums[chunk] = s;
  }
  for (int64_t b = 0; b < batch_size; ++b) histogram[place[b]] += valid[b];
  for (const Sums& s : chunk_sums) {
    sums[0] += s.samples, sums[1] += s.clicks, sums[2] += s.loss, sums[3] += s.predicted, sums[4] += s.nonfinite;
    if (num_sums > 5) sums[5] += s.bad_labels;
  }
}
