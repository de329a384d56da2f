/* The two products of T dense task vectors, [tasks, size], in one pass over them, in as many threads as there are parts.
   combine: out [size] = base [size] or 0, plus the sum over t of coef[t] * delta[t]; sums in fp32.
   inner: out [parts, tasks], zeros before, each part's share of delta [tasks, size] @ grad [size]; sums in fp32 within a
   block, in fp64 over the blocks. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 2048 /* elements of a row: the sums of a block stay in the first cache */

static inline float from_float32(float x) { return x; }

static inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#define PRODUCTS(NAME, TYPE)                                                                                           \
  static void combine_part_##NAME(float *out, const float *base, const float *coef, const TYPE *delta, size_t tasks,   \
                                  size_t size, size_t start, size_t stop) {                                            \
    float sum[BLOCK];                                                                                                  \
    for (size_t at = start; at < stop; at += BLOCK) {                                                                  \
      const size_t width = stop - at < BLOCK ? stop - at : BLOCK;                                                      \
      if (base)                                                                                                        \
        memcpy(sum, base + at, width * sizeof *sum);                                                                   \
      else                                                                                                             \
        memset(sum, 0, width * sizeof *sum);                                                                           \
      size_t t = 0;                                                                                                    \
      for (; t + 4 <= tasks; t += 4) {                                                                                 \
        const TYPE *a = delta + t * size + at, *b = a + size, *c = b + size, *d = c + size;                            \
        const float w = coef[t], x = coef[t + 1], y = coef[t + 2], z = coef[t + 3];                                    \
        for (size_t i = 0; i < width; i++)                                                                             \
          sum[i] += w * from_##NAME(a[i]) + x * from_##NAME(b[i]) + y * from_##NAME(c[i]) + z * from_##NAME(d[i]);     \
      }                                                                                                                \
      for (; t < tasks; t++) {                                                                                         \
        const TYPE *row = delta + t * size + at;                                                                       \
        const float factor = coef[t];                                                                                  \
        for (size_t i = 0; i < width; i++)                                                                             \
          sum[i] += factor * from_##NAME(row[i]);                                                                      \
      }                                                                                                                \
      memcpy(out + at, sum, width * sizeof *sum);                                                                      \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  static void inner_part_##NAME(double *out, const float *grad, const TYPE *delta, size_t tasks, size_t size,          \
                                size_t start, size_t stop) {                                                           \
    for (size_t at = start; at < stop; at += BLOCK) {                                                                  \
      const size_t width = stop - at < BLOCK ? stop - at : BLOCK;                                                      \
      size_t t = 0;                                                                                                    \
      for (; t + 4 <= tasks; t += 4) {                                                                                 \
        const TYPE *a = delta + t * size + at, *b = a + size, *c = b + size, *d = c + size;                            \
        float w = 0, x = 0, y = 0, z = 0;                                                                              \
        for (size_t i = 0; i < width; i++) {                                                                           \
          const float g = grad[at + i];                                                                                \
          w += g * from_##NAME(a[i]);                                                                                  \
          x += g * from_##NAME(b[i]);                                                                                  \
          y += g * from_##NAME(c[i]);                                                                                  \
          z += g * from_##NAME(d[i]);                                                                                  \
        }                                                                                                              \
        out[t] += w;                                                                                                   \
        out[t + 1] += x;                                                                                               \
        out[t + 2] += y;                                                                                               \
        out[t + 3] += z;                                                                                               \
      }                                                                                                                \
      for (; t < tasks; t++) {                                                                                         \
        const TYPE *row = delta + t * size + at;                                                                       \
        float sum = 0;                                                                                                 \
        for (size_t i = 0; i < width; i++)                                                                             \
          sum += grad[at + i] * from_##NAME(row[i]);                                                                   \
        out[t] += sum;                                                                                                 \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  void combine_##NAME(float *out, const float *base, const float *coef, const TYPE *delta, size_t tasks, size_t size,  \
                      size_t parts) {                                                                                  \
    _Pragma("omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)")                                  \
    for (size_t p = 0; p < parts; p++)                                                                                 \
      combine_part_##NAME(out, base, coef, delta, tasks, size, size * p / parts, size * (p + 1) / parts);              \
  }                                                                                                                    \
                                                                                                                       \
  void inner_##NAME(double *out, const float *grad, const TYPE *delta, size_t tasks, size_t size, size_t parts) {      \
    _Pragma("omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)")                                  \
    for (size_t p = 0; p < parts; p++)                                                                                 \
      inner_part_##NAME(out + p * tasks, grad, delta, tasks, size, size * p / parts, size * (p + 1) / parts);          \
  }

PRODUCTS(float32, float)
PRODUCTS(bfloat16, uint16_t)
