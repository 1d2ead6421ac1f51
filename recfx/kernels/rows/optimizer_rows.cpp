// Optimisers on the rows of one step. Afterwards the step's gradients and its number of unique rows are zero, and the
// table has taken one step more. A formula defines what happens to one row; the walk over the rows is the same for all.
#include <vector>

#include "kernels/index/table.h"
#include "kernels/tensors.h"

// The formulas below; operator NAME_ of each: recfx/kernels/op.py reads the names from this list, too.
#define ROW_OPTIMIZERS(FORMULA) \
  FORMULA(sgd_rows)             \
  FORMULA(adagrad_rows)         \
  FORMULA(rowwise_adagrad_rows) \
  FORMULA(adamw_rows_by_column) \
  FORMULA(ftrl_rows)

// Calls formula(w, g, decay, rate, dim) per row: its first weight, its scaled gradients, decay and rate per weight.
template <class Formula>
static void update_rows(const StepRows& s, Formula formula) {
  if (!*s.due) return;
  const int64_t num = s.counters[NUM_UNIQUE], ahead = rows_ahead();
  const float scale = s.hyper[2];
  std::vector<float> same(2 * s.width, (float)s.hyper[0]);
  std::fill(same.begin() + s.width, same.end(), (float)s.hyper[1]);
  with_dim(s.width, [&](auto dim) {
#pragma omp parallel for schedule(static, OWNED)
    for (int64_t u = 0; u < num; ++u) {
      if (u + ahead < num)
        for (int64_t c = 0; c < s.row_stride; c += 16)
          __builtin_prefetch(s.rows + s.unique_rows[u + ahead] * s.row_stride + c, 1);
      const int64_t row = s.unique_rows[u];
      const float* __restrict decay = s.rates ? s.rates + s.vocabularies[row] * 2 * dim : same.data();
      float* __restrict g = s.grads_UW + u * s.grad_stride;
      for (int64_t c = 0; c < dim; ++c) g[c] *= scale;
      formula(s.rows + row * s.row_stride, g, decay, decay + dim, dim);
      for (int64_t c = 0; c < dim; ++c) g[c] = 0.0f;
    }
  });
  s.counters[NUM_UNIQUE] = 0;
  ++s.counters[STEP];
}

static void sgd_rows(const StepRows* s) {
  update_rows(*s, [](float* __restrict w, const float* g, const float* decay, const float* rate, auto dim) {
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) w[c] = decay[c] * w[c] - rate[c] * g[c];
  });
}

static void adagrad_rows(const StepRows* s) {
  const float initial = s->hyper[3], eps = s->hyper[4];
  update_rows(*s, [=](float* __restrict w, const float* g, const float* decay, const float* rate, auto dim) {
    float* __restrict sum = w + dim;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      const float gc = g[c] + decay[c] * w[c];
      sum[c] += gc * gc;
      w[c] -= rate[c] * gc / (std::sqrt(initial + sum[c]) + eps);
    }
  });
}

static void rowwise_adagrad_rows(const StepRows* s) {
  const float initial = s->hyper[3], eps = s->hyper[4];
  update_rows(*s, [=](float* w, float* g, const float* decay, const float* rate, auto width) {
    float* sum = w + width;
    for (int64_t t = 0; t < s->num_tables; ++t)
      with_dim(s->dims[t], [&](auto dim) {
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < dim; ++c) {
          g[c] += decay[c] * w[c];
          squares += g[c] * g[c];
        }
        sum[t] += squares / dim;
        const float step = 1.0f / (std::sqrt(initial + sum[t]) + eps);
#pragma omp simd
        for (int64_t c = 0; c < dim; ++c) w[c] -= rate[c] * step * g[c];
        w += dim, g += dim, decay += dim, rate += dim;
      });
  });
}

static void adamw_rows_by_column(const StepRows* s) {
  const float b1 = s->hyper[3], c1 = s->hyper[4], b2 = s->hyper[5], c2 = s->hyper[6], eps = s->hyper[7];
  update_rows(*s, [=](float* __restrict w, const float* g, const float* decay, const float* rate, auto dim) {
    float* __restrict m = w + dim;
    float* __restrict v = m + dim;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      m[c] = b1 * m[c] + c1 * g[c];
      v[c] = b2 * v[c] + c2 * g[c] * g[c];
      w[c] = decay[c] * w[c] - rate[c] * m[c] / (std::sqrt(v[c]) + eps);
    }
  });
}

static void ftrl_rows(const StepRows* s) {
  const float beta = s->hyper[3], l1 = s->hyper[4];
  update_rows(*s, [=](float* __restrict w, const float* g, const float* decay, const float* rate, auto dim) {
    float* __restrict z = w + dim;
    float* __restrict n = z + dim;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      const float before = z[c] == 0.0f && n[c] == 0.0f ? 0.0f : beta + std::sqrt(n[c]);
      const float sum = n[c] + g[c] * g[c], now = beta + std::sqrt(sum);
      const float moved = z[c] + rate[c] * g[c] - (now - before) * w[c];
      const float beyond = std::max(std::fabs(moved) - rate[c] * l1, 0.0f);
      const bool learns = rate[c] > 0.0f && now > 0.0f;
      w[c] = learns ? -std::copysign(beyond, moved) / (now + rate[c] * decay[c]) : w[c];
      z[c] = moved;
      n[c] = sum;
    }
  });
}

template <void (*update)(const StepRows*)>
static void optimizer_rows_op(Tensor rows, Tensor grads, Tensor counters, const Tensor& unique_rows,
                              const Tensor& row_vocabularies, const Tensor& hyper, const Tensor& due, const Ints& dims,
                              std::optional<Tensor> rates) {
  const StepRows step{strided<float>(rows), strided<float>(grads), flat<int64_t>(counters), flat<int32_t>(unique_rows),
                      flat<int32_t>(row_vocabularies), rows.stride(0), grads.stride(0), grads.size(1),
                      flat<double>(hyper), flat<float>(rates), flat<bool>(due),
                      (int64_t)dims.size(), dims.data()};
  update(&step);
}

#define NAME(formula) #formula,
extern const char* const ROW_OPTIMIZER_NAMES[];  // for define.cpp
const char* const ROW_OPTIMIZER_NAMES[] = {ROW_OPTIMIZERS(NAME) nullptr};

STABLE_TORCH_LIBRARY_IMPL(recfx, CPU, library) {
#define REGISTER(formula) library.impl(#formula "_", TORCH_BOX(&optimizer_rows_op<formula>));
  ROW_OPTIMIZERS(REGISTER)
}
