/* What the compiled files share.
 *
 * Numbers that Python knows too are macros, given by the build (see interface.py): here IDENTITY,
 * RELU, TANH and others of activations; a file's own likewise. */
#ifndef LOSSPRUNE_H
#define LOSSPRUNE_H

/* tanh(x) = x P(x^2) / Q(x^2) for |x| <= TANH_LIMIT, where it is 1 in float32; a minimax fit of the
 * relative error. Coefficients from the highest power down; the constant ones are 1. */
#define TANH_LIMIT 9.02f
#define TANH_P4 1.3319076508366834e-08f
#define TANH_P3 2.0583485820679925e-05f
#define TANH_P2 0.0034940349869430065f
#define TANH_P1 0.13379718363285065f
#define TANH_Q4 7.762021709822875e-07f
#define TANH_Q3 0.0003283093392383307f
#define TANH_Q2 0.025871073827147484f
#define TANH_Q1 0.4671303331851959f

/* MIRRORED(type): a structure that Python lays out as well. The build says how: its size, and in C
 * where each field begins. What differs is refused. */
#define REFUSAL(type) #type " disagrees with its mirror in Python"

#ifdef __cplusplus

#define MIRRORED(type) static_assert(sizeof(type) == SIZE_OF_##type, REFUSAL(type));

#else

#include <stddef.h>
#include <stdint.h>

#ifdef LOSSPRUNE_ALONE /* part of another C file, without Python */
#define MIRRORED(type)
#define EXPORTED static __attribute__((unused))
#else
#define EXPORTED
#define MIRRORED(type)                                                                             \
    _Static_assert(sizeof(type) == SIZE_OF_##type, REFUSAL(type));                                 \
    FIELDS_OF_##type
#endif
#define FIELD(type, name, at) _Static_assert(offsetof(type, name) == at, REFUSAL(type));

/* ---- vectors: as wide as the machine's ---- */

#if defined(LANES)
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec broadcast(float value) { return value - (vec){0}; }
INLINE vec load(const float *p) { return *(const unaligned *)p; }
INLINE void store(float *p, vec v) { *(unaligned *)p = v; }
INLINE vec choose(ivec where, vec yes, vec no) {
    return (vec)(((ivec)yes & where) | ((ivec)no & ~where));
}

/* A pool of threads (see threads.py): parallel(f, data, size, 0) runs f on each of so many. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    void (*barrier)(void);
    int (*rank)(void);
    int (*size)(void);
} Threads;

#endif

#endif
