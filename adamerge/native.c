/* The two products of T dense task vectors, in one pass over them. Rows are `stride` elements apart; each call does the
   elements from `start` to `stop` of every row. Sums of `combine` are fp32; of `inner`, fp32 within a block, fp64 over
   the blocks. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048 /* of one row: the sums of a block stay in the first cache */

static inline float from_float32(float x) { return x; }

static inline float from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#define PRODUCTS(NAME, TYPE)                                                                                           \
  void combine_##NAME(float *out, const float *base, const float *coef, const TYPE *delta, size_t tasks,               \
                      size_t stride, size_t start, size_t stop) {                                                      \
    float sum[BLOCK];                                                                                                  \
    for (size_t at = start; at < stop; at += BLOCK) {                                                                  \
      size_t size = stop - at < BLOCK ? stop - at : BLOCK;                                                             \
      if (base)                                                                                                        \
        memcpy(sum, base + at, size * sizeof *sum);                                                                    \
      else                                                                                                             \
        memset(sum, 0, size * sizeof *sum);                                                                            \
      size_t t = 0;                                                                                                    \
      for (; t + 4 <= tasks; t += 4) {                                                                                 \
        const TYPE *a = delta + t * stride + at, *b = a + stride, *c = b + stride, *d = c + stride;                    \
        const float w = coef[t], x = coef[t + 1], y = coef[t + 2], z = coef[t + 3];                                    \
        for (size_t i = 0; i < size; i++)                                                                              \
          sum[i] += w * from_##NAME(a[i]) + x * from_##NAME(b[i]) + y * from_##NAME(c[i]) + z * from_##NAME(d[i]);     \
      }                                                                                                                \
      for (; t < tasks; t++) {                                                                                         \
        const TYPE *row = delta + t * stride + at;                                                                     \
        const float factor = coef[t];                                                                                  \
        for (size_t i = 0; i < size; i++)                                                                              \
          sum[i] += factor * from_##NAME(row[i]);                                                                      \
      }                                                                                                                \
      memcpy(out + at, sum, size * sizeof *sum);                                                                       \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  void inner_##NAME(double *out, const float *grad, const TYPE *delta, size_t tasks, size_t stride, size_t start,      \
                    size_t stop) {                                                                                     \
    for (size_t t = 0; t < tasks; t++)                                                                                 \
      out[t] = 0;                                                                                                      \
    for (size_t at = start; at < stop; at += BLOCK) {                                                                  \
      size_t size = stop - at < BLOCK ? stop - at : BLOCK;                                                             \
      for (size_t t = 0; t < tasks; t++) {                                                                             \
        const TYPE *row = delta + t * stride + at;                                                                     \
        float sum = 0;                                                                                                 \
        for (size_t i = 0; i < size; i++)                                                                              \
          sum += grad[at + i] * from_##NAME(row[i]);                                                                   \
        out[t] += sum;                                                                                                 \
      }                                                                                                                \
    }                                                                                                                  \
  }

PRODUCTS(float32, float)
PRODUCTS(bfloat16, uint16_t)
