/* The most multiply-adds that one core makes: chains in registers that no memory slows. */
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
