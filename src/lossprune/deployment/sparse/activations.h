/* What numbers go through at the end of an operation, a vector of them at a time.

   Each is right to 2e-7 of its value for every float (without fused multiply-adds to 2.1e-7), but
   GELU, which is so to 1e-6, and near whose zeros that is no share of it. NaN stays NaN. */
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#include "lossprune.h"

/* erf(x) = x P(x^2) / Q(x^2) for |x| <= ERF_LIMIT, where it is 1 in float32; a minimax fit of the
   relative error, 2e-8. Coefficients from the highest power down; the last of Q is 1. */
#define ERF_LIMIT 3.95f
#define ERF_P5 2.02591332e-06f
#define ERF_P4 0.000284686248f
#define ERF_P3 0.00380810839f
#define ERF_P2 0.0528752804f
#define ERF_P1 0.191549107f
#define ERF_P0 1.12837911f
#define ERF_Q5 3.78317782e-05f
#define ERF_Q4 0.00117071241f
#define ERF_Q3 0.0150549822f
#define ERF_Q2 0.114559121f
#define ERF_Q1 0.503088653f

/* As above of tanh(x / 2) for |x| <= TANH_LIMIT: a minimax fit of what tanh(x) is then, to 8e-9. */
#define TANH_HALF_P2 0.000114176781f
#define TANH_HALF_P1 0.0297702867f
#define TANH_HALF_Q3 1.22734852e-06f
#define TANH_HALF_Q2 0.00120617949f
#define TANH_HALF_Q1 0.113103584f

INLINE vec with_sign(vec magnitude, vec x) {
    return (vec)((ivec)magnitude | ((ivec)x & (int32_t)0x80000000));
}
INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

/* 1 / d for 0 < d < 2^126, to 4e-6. Vectors of 16 numbers divide in the time of 32 multiply-adds; so
   it is guessed from d's bits to 13 %, then made better: u is how far from 1 its product with d
   is. */
INLINE vec inverse(vec d) {
#if LANES == 16 && defined(__AVX512F__)
    vec r = (vec)(0x7ef311c7 - (ivec)d);
    vec u = 1.0f - d * r;
    r += r * (u + u * u);
    return r + r * (1.0f - d * r);
#else
    return 1.0f / d;
#endif
}

/* n / d for such d and finite n. */
INLINE vec quotient(vec n, vec d) {
#if LANES == 16 && defined(__AVX512F__)
    vec r = inverse(d), q = n * r;
    return q + (n - q * d) * r;
#else
    return n / d;
#endif
}

/* exp(t) = 2^power * the number returned, for |t| <= 150: t = power ln 2 + r, |r| <= ln 2 / 2, and
   Taylor's series of exp(r) - 1, which is the number returned. */
INLINE vec exponential_minus_1(vec t, ivec *power) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec n = (t * 1.44269504088896341f + magic) - magic;
    vec r = t - n * 0.693359375f + n * 2.12194440054690583e-4f;
    vec p = r * 1.9841269841e-4f + 1.3888888889e-3f;
    p = p * r + 8.3333333333e-3f;
    p = p * r + 4.1666666667e-2f;
    p = p * r + 1.6666666667e-1f;
    p = p * r + 0.5f;
    *power = __builtin_convertvector(n, ivec);
    return r + r * r * p;
}

/* 2^n for -126 <= n <= 127. */
INLINE vec power_of_two(ivec n) { return (vec)((n + 127) << 23); }

/* tanh(x) = 2 t / (1 + t^2) with t = tanh(x / 2) = h / q, h = x P(x^2) / 2 and q = Q(x^2). Where it is
   near 1, errors of t hardly reach it. What rounding has left of y (q^2 + h^2) = 2 h q is brought
   in at the end. */
INLINE vec hyperbolic(vec x) {
    vec a = absolute(x);
    a = choose((ivec)(a > TANH_LIMIT), broadcast(TANH_LIMIT), a);
    vec z = a * a;
    vec p = z * TANH_HALF_P2 + TANH_HALF_P1;
    p = a * z * p + a;
    vec q = z * TANH_HALF_Q3 + TANH_HALF_Q2;
    q = q * z + TANH_HALF_Q1;
    q = q * z + 1.0f;
    vec h = 0.5f * p, r = inverse(q * q + h * h), y = p * q * r;
    return with_sign(y + (q * (p - y * q) - y * h * h) * r, x);
}

INLINE vec error_function(vec x) {
    vec z = x * x;
    vec p = z * ERF_P5 + ERF_P4;
    p = p * z + ERF_P3;
    p = p * z + ERF_P2;
    p = p * z + ERF_P1;
    p = p * z + ERF_P0;
    vec q = z * ERF_Q5 + ERF_Q4;
    q = q * z + ERF_Q3;
    q = q * z + ERF_Q2;
    q = q * z + ERF_Q1;
    q = q * z + 1.0f;
    vec beyond = choose((ivec)(x > 0.0f), broadcast(1.0f), broadcast(-1.0f));
    return choose((ivec)(z > ERF_LIMIT * ERF_LIMIT), beyond, quotient(x * p, q));
}

/* y / (1 + exp(-x)): for x < 0 that is y exp(x) / (1 + exp(x)), of which the powers of 2 are
   multiplied with in halves, so that numbers as small as there are come out right. */
INLINE vec logistic(vec y, vec x) {
    vec a = absolute(x);
    ivec power, negative = (ivec)(x < 0.0f), near = (ivec)(a < 120.0f);
    vec e = exponential_minus_1(-choose(near, a, broadcast(120.0f)), &power) + 1.0f;
    ivec half = power >> 1;
    vec first = e * power_of_two(half), second = power_of_two(power - half);
    vec n = choose(negative, y * first, y);
    vec q = quotient(n, 1.0f + first * second);
    q = choose(negative, q * second, q);
    q = choose(near, q, choose(negative, y * 0.0f, y));
    return choose((ivec)(x != x), x, q);
}

/* exp(x) - 1 for x <= 0. */
INLINE vec exponential_below(vec x) {
    ivec power;
    vec r = exponential_minus_1(choose((ivec)(x < -20.0f), broadcast(-20.0f), x), &power);
    vec scale = power_of_two(power);
    return scale * r + (scale - 1.0f);
}

INLINE vec clamped(vec v, float low, float high) {
    v = choose((ivec)(v < low), broadcast(low), v);
    return choose((ivec)(v > high), broadcast(high), v);
}

/* low, high: the bounds of a clamp; low: the slope of a leaky ReLU, the factor of an ELU. */
INLINE vec activate(vec v, int64_t kind, float low, float high) {
    switch (kind) {
    case RELU: return (vec)((ivec)v & ~(ivec)(v < 0.0f));
    case TANH: return hyperbolic(v);
    case GELU: return 0.5f * v * (1.0f + error_function(v * 0.70710678118654752f));
    case GELU_TANH: /* sqrt(2 / pi) */
        return 0.5f * v * (1.0f + hyperbolic(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case SIGMOID: return logistic(broadcast(1.0f), v);
    case SILU: return logistic(v, v);
    case HARDSIGMOID: return clamped(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    case HARDSWISH: return v * (clamped(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
    case CLAMP: return clamped(v, low, high);
    case LEAKY_RELU: return choose((ivec)(v < 0.0f), v * low, v);
    case ELU: return choose((ivec)(v < 0.0f), low * exponential_below(v), v);
    default: return v;
    }
}

#endif
