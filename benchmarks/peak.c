/* The most multiply-adds that one core makes: chains in registers that no memory slows, and the loop
   of a sparse layer whose inputs are in the first-level cache. */
#include <stdint.h>
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float V __attribute__((vector_size(LANES * 4)));

/* Make 12 * rounds vector multiply-adds; return the floating-point operations they hold. */
int64_t multiply_add(int64_t rounds, float *out) {
    V w = (V){0} + out[0], x = (V){0} + out[1], s[12];
    _Pragma("GCC unroll 12") for (int k = 0; k < 12; k++) s[k] = (V){0} + (float)k;
    for (int64_t r = 0; r < rounds; r++) {
        _Pragma("GCC unroll 12") for (int k = 0; k < 12; k++) s[k] = s[k] * w + x;
    }
    _Pragma("GCC unroll 12") for (int k = 0; k < 12; k++) *out += s[k][0];
    return rounds * 12 * LANES * 2;
}

#define TILE 16 /* vectors */

/* The loop of a sparse layer with nothing around it: go through n weights, each a multiply-add for
   a tile of vectors that begins at its offset into near; return the operations they hold. */
int64_t gather(const float *near, const int32_t *offset, const float *value, int64_t n, float *out) {
    V sum[TILE];
    _Pragma("GCC unroll 16") for (int t = 0; t < TILE; t++) sum[t] = (V){0};
    for (int64_t k = 0; k < n; k++) {
        const V *at = (const V *)(near + offset[k]);
        V w = value[k] - (V){0};
        _Pragma("GCC unroll 16") for (int t = 0; t < TILE; t++) sum[t] += w * at[t];
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < TILE; t++) *out += sum[t][0];
    return n * TILE * LANES * 2;
}
