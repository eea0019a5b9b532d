/* Whole epochs of stochastic gradient descent over the surviving weights of a multilayer
 * perceptron, and the evaluation of its loss.
 *
 * Examples are innermost: a unit's activations over a batch are one row of vectors, so that a
 * surviving weight is one number broadcast over a row. A batch is split evenly into panels of at
 * most MOST vectors, which stay in registers while the weights of one unit are visited. Weights are
 * stored by output (compressed rows); the gradient of the inputs visits them by input.
 *
 * Notation: x inputs, z = W x + b, a = f(z), dz and da the loss's gradients; o output, i input,
 * k position among a layer's surviving weights, v vector of a row. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lossprune.h"

#define MOST 8 /* vectors in a panel: with a broadcast weight they fit the registers */

/* GROUP, given by the build: examples, and pixels, that are transposed together; 16. */
typedef float wide __attribute__((vector_size(4 * GROUP), aligned(4)));
typedef uint8_t bytes __attribute__((vector_size(GROUP)));
typedef int16_t shorts __attribute__((vector_size(2 * GROUP)));
typedef int32_t integers __attribute__((vector_size(4 * GROUP)));

typedef struct {
    int32_t outputs, inputs, activation, unused;
    const int32_t *row_start, *column;           /* by output: (outputs + 1), (weights) */
    const int32_t *column_start, *row, *position; /* by input: (inputs + 1), (weights) twice */
    float *weight, *weight_velocity;             /* (weights), in order of outputs */
    float *bias, *bias_velocity;                 /* (outputs); NULL: the layer has none */
} layer;
MIRRORED(layer)

typedef struct {
    int32_t layers, blocks;     /* blocks of GROUP neighbouring pixels that are read */
    int64_t pixels;             /* of an image */
    const layer *layer;         /* the first one has blocks * GROUP inputs */
    const int32_t *block;       /* first pixel of each block */
    const float *factor, *offset; /* (pixels): an input is pixel * factor - offset */
    int64_t idle_count;         /* parameters that have no path to the output: */
    float *idle, *idle_velocity; /* their gradient is 0, but they decay */
} network;
MIRRORED(network)

typedef struct {
    float lr, momentum, decay;
} descent;
MIRRORED(descent)

typedef struct {
    void *memory;
    vec **activation; /* [0] inputs, [l + 1] outputs of layer l: rows of a panel */
    vec *dz, *da;     /* gradients of the widest layer */
    float **weight_gradient, **bias_gradient;
    int64_t lanes;    /* examples in a panel, a multiple of GROUP */
} workspace;

/* tanh(x) = numerator / denominator. Two at a time share one division. NaN stays NaN. */
INLINE void tanh_parts(vec x, vec *numerator, vec *denominator) {
    const vec limit = broadcast(TANH_LIMIT);
    x = choose(x > limit, limit, choose(x < -limit, -limit, x));
    vec y = x * x;
    vec p = y * TANH_P4 + TANH_P3;
    p = p * y + TANH_P2;
    p = p * y + TANH_P1;
    p = p * y + 1.0f;
    vec q = y * TANH_Q4 + TANH_Q3;
    q = q * y + TANH_Q2;
    q = q * y + TANH_Q1;
    q = q * y + 1.0f;
    *numerator = x * p;
    *denominator = q;
}

INLINE vec at_most_one(vec t) {
    const vec one = broadcast(1.0f);
    return choose(t > one, one, choose(t < -one, -one, t));
}

INLINE void tanh_(vec *x, const int count) {
    UNROLL for (int v = 0; v + 1 < count; v += 2) {
        vec n0, d0, n1, d1;
        tanh_parts(x[v], &n0, &d0);
        tanh_parts(x[v + 1], &n1, &d1);
        vec inverse = 1.0f / (d0 * d1);
        x[v] = at_most_one(n0 * (d1 * inverse));
        x[v + 1] = at_most_one(n1 * (d0 * inverse));
    }
    if (count % 2) {
        vec n, d;
        tanh_parts(x[count - 1], &n, &d);
        x[count - 1] = at_most_one(n / d);
    }
}

/* exp(x) for x <= 0: 2^n times a polynomial in the rest, |rest| <= ln(2) / 2; 0 below -87. */
INLINE vec exp_(vec x) {
    const vec magic = broadcast(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    const vec least = broadcast(-87.0f);
    ivec vanishing = x < least;
    x = choose(vanishing, least, x);
    vec shifted = x * 1.44269504f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec exponent = ((ivec)shifted - (ivec)magic + 127) << 23;
    vec result = p * (vec)exponent;
    return choose(vanishing, broadcast(0.0f), result);
}

INLINE vec even(vec a, vec b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

INLINE vec odd(vec a, vec b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

/* The sums of LANES vectors, as one vector: neighbours are added, again and again. */
INLINE vec sums(const vec *part) {
    vec p[LANES];
    UNROLL for (int i = 0; i < LANES; i++) p[i] = part[i];
    UNROLL for (int count = LANES; count > 1; count /= 2)
        UNROLL for (int i = 0; i < count / 2; i++)
            p[i] = even(p[2 * i], p[2 * i + 1]) + odd(p[2 * i], p[2 * i + 1]);
    return p[0];
}

INLINE float sum(vec a) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += a[i];
    return total;
}

/* ---- one layer on one panel of nv vectors a row ---- */

INLINE void forward(const layer *l, const vec *x, vec *a, const int nv) {
    for (int32_t o = 0; o < l->outputs; o++) {
        vec z[MOST];
        const float bias = l->bias ? l->bias[o] : 0.0f;
        UNROLL for (int v = 0; v < nv; v++) z[v] = broadcast(bias);
        for (int32_t k = l->row_start[o]; k < l->row_start[o + 1]; k++) {
            const vec *row = x + (ptrdiff_t)l->column[k] * nv;
            const vec w = broadcast(l->weight[k]);
            UNROLL for (int v = 0; v < nv; v++) z[v] += w * row[v];
        }
        if (l->activation == TANH) tanh_(z, nv);
        if (l->activation == RELU) /* NaN stays NaN */
            UNROLL for (int v = 0; v < nv; v++) z[v] = choose(z[v] < 0.0f, broadcast(0.0f), z[v]);
        UNROLL for (int v = 0; v < nv; v++) a[(ptrdiff_t)o * nv + v] = z[v];
    }
}

/* dz = da * f'(z), with f' told by a = f(z) */
INLINE vec through(vec da, vec a, const int32_t activation) {
    if (activation == TANH) return da * (1.0f - a * a);
    if (activation == RELU) return choose(a <= 0.0f, broadcast(0.0f), da);
    return da;
}

INLINE void inputs_gradient(
    const layer *l, const vec *dz, const vec *x, vec *dx, const int32_t activation, const int nv) {
    for (int32_t i = 0; i < l->inputs; i++) {
        vec d[MOST];
        UNROLL for (int v = 0; v < nv; v++) d[v] = broadcast(0.0f);
        for (int32_t k = l->column_start[i]; k < l->column_start[i + 1]; k++) {
            const vec *row = dz + (ptrdiff_t)l->row[k] * nv;
            const vec w = broadcast(l->weight[l->position[k]]);
            UNROLL for (int v = 0; v < nv; v++) d[v] += w * row[v];
        }
        UNROLL for (int v = 0; v < nv; v++) {
            ptrdiff_t at = (ptrdiff_t)i * nv + v;
            dx[at] = through(d[v], x[at], activation);
        }
    }
}

INLINE void weights_gradient(
    const layer *l, const vec *x, const vec *dz, float *gw, float *gb, const int nv) {
    vec part[LANES];
    int32_t k = 0;
    for (int32_t o = 0; o < l->outputs; o++) {
        vec d[MOST], total = broadcast(0.0f);
        UNROLL for (int v = 0; v < nv; v++) total += d[v] = dz[(ptrdiff_t)o * nv + v];
        if (gb) gb[o] += sum(total);
        for (; k < l->row_start[o + 1]; k++) {
            const vec *row = x + (ptrdiff_t)l->column[k] * nv;
            vec product = row[0] * d[0];
            UNROLL for (int v = 1; v < nv; v++) product += row[v] * d[v];
            part[k % LANES] = product;
            if (k % LANES == LANES - 1) *(vec *)(gw + k - (LANES - 1)) += sums(part);
        }
    }
    for (int32_t j = 0; j < k % LANES; j++) gw[k - k % LANES + j] += sum(part[j]);
}

/* The functions above for each width of a panel, chosen while running. */
#define WIDTHS(EACH) EACH(1) EACH(2) EACH(3) EACH(4) EACH(5) EACH(6) EACH(7) EACH(8)
#define DEFINE(NV)                                                                                 \
    static void forward_##NV(const layer *l, const vec *x, vec *a) { forward(l, x, a, NV); }       \
    static void inputs_##NV(                                                                       \
        const layer *l, const vec *dz, const vec *x, vec *dx, int32_t activation) {                \
        inputs_gradient(l, dz, x, dx, activation, NV);                                             \
    }                                                                                              \
    static void weights_##NV(const layer *l, const vec *x, const vec *dz, float *gw, float *gb) {  \
        weights_gradient(l, x, dz, gw, gb, NV);                                                    \
    }
WIDTHS(DEFINE)

typedef void (*forward_function)(const layer *, const vec *, vec *);
typedef void (*inputs_function)(const layer *, const vec *, const vec *, vec *, int32_t);
typedef void (*weights_function)(const layer *, const vec *, const vec *, float *, float *);
#define FORWARD(NV) forward_##NV,
#define INPUTS(NV) inputs_##NV,
#define WEIGHTS(NV) weights_##NV,
static const forward_function forward_of[] = {NULL, WIDTHS(FORWARD)};
static const inputs_function inputs_of[] = {NULL, WIDTHS(INPUTS)};
static const weights_function weights_of[] = {NULL, WIDTHS(WEIGHTS)};

/* ---- images to rows of inputs ---- */

/* Transpose 16 x 16 bytes: four rounds that interleave the first half with the second. */
INLINE void transpose(bytes *a) {
    UNROLL for (int round = 0; round < 4; round++) {
        bytes b[GROUP];
        UNROLL for (int i = 0; i < GROUP / 2; i++) {
            b[2 * i] = __builtin_shufflevector(
                a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = __builtin_shufflevector(
                a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        UNROLL for (int i = 0; i < GROUP; i++) a[i] = b[i];
    }
}

/* Product and difference round apart, as in torch: the compiler must not fuse them. */
INLINE wide affine(wide pixel, float factor, float offset) {
    wide scaled = pixel * factor;
#if defined(__x86_64__) && LANES == 16
    __asm__("" : "+v"(scaled));
#else
    float *values = (float *)&scaled;
    __asm__("" : : "r"(values) : "memory");
#endif
    return scaled - offset;
}

/* Rows of the panel from example first on; lanes beyond count repeat an example. */
static void gather(
    const network *net, const uint8_t *images, const int64_t *order, int64_t first, int64_t count,
    int64_t lanes, float *rows) {
    for (int64_t g = 0; g < lanes; g += GROUP) {
        const uint8_t *image[GROUP];
        for (int64_t e = 0; e < GROUP; e++) {
            int64_t at = first + (g + e < count ? g + e : count - 1);
            image[e] = images + (order ? order[at] : at) * net->pixels;
        }
        for (int32_t b = 0; b < net->blocks; b++) {
            const int32_t pixel = net->block[b];
            bytes a[GROUP];
            if (net->pixels >= GROUP)
                for (int e = 0; e < GROUP; e++) memcpy(&a[e], image[e] + pixel, GROUP);
            else
                for (int e = 0; e < GROUP; e++) {
                    a[e] = (bytes){0};
                    memcpy(&a[e], image[e], (size_t)net->pixels);
                }
            transpose(a);
            for (int p = 0; p < GROUP && pixel + p < net->pixels; p++) {
                /* In three steps, each of which is one instruction. */
                shorts two = __builtin_convertvector(a[p], shorts);
                wide value =
                    __builtin_convertvector(__builtin_convertvector(two, integers), wide);
                *(wide *)(rows + ((int64_t)b * GROUP + p) * lanes + g) =
                    affine(value, net->factor[pixel + p], net->offset[pixel + p]);
            }
        }
    }
}

/* ---- loss ---- */

/* Sum over count examples of -log softmax(z)[label]; with dz, its gradient divided by divisor;
 * with wrong, how many have another largest logit than their label. */
static double cross_entropy(
    const vec *z, int32_t classes, const int64_t *labels, const int64_t *order, int64_t first,
    int64_t count, int nv, vec *dz, float divisor, int64_t *wrong) {
    float largest[MOST * LANES], total[MOST * LANES];
    int32_t chosen[MOST * LANES];
    for (int v = 0; v < nv; v++) {
        vec most = z[v], all = broadcast(0.0f);
        ivec best = {0};
        for (int32_t c = 1; c < classes; c++) {
            vec value = z[(ptrdiff_t)c * nv + v];
            ivec larger = value > most;
            most = choose(larger, value, most);
            best = (best & ~larger) | (c & larger);
        }
        for (int32_t c = 0; c < classes; c++) {
            vec e = exp_(z[(ptrdiff_t)c * nv + v] - most);
            all += e;
            if (dz) dz[(ptrdiff_t)c * nv + v] = e;
        }
        memcpy(largest + v * LANES, &most, sizeof most);
        memcpy(total + v * LANES, &all, sizeof all);
        memcpy(chosen + v * LANES, &best, sizeof best);
        if (dz) {
            vec share = 1.0f / (all * divisor);
            ivec absent = {0};
            for (int j = 0; j < LANES; j++) absent[j] = v * LANES + j < count ? 0 : -1;
            for (int32_t c = 0; c < classes; c++) {
                vec *d = dz + (ptrdiff_t)c * nv + v;
                *d = choose(absent, broadcast(0.0f), *d * share);
            }
        }
    }
    double loss = 0;
    const float *logits = (const float *)z;
    for (int64_t e = 0; e < count; e++) {
        int64_t label = labels[order ? order[first + e] : first + e];
        loss += logf(total[e]) + largest[e] - logits[label * nv * LANES + e];
        if (dz) ((float *)dz)[label * nv * LANES + e] -= 1.0f / divisor;
        if (wrong) *wrong += chosen[e] != label;
    }
    return loss;
}

/* ---- workspace ---- */

static int64_t panel_lanes(int64_t batch) {
    int64_t panels = (batch + MOST * LANES - 1) / (MOST * LANES);
    int64_t examples = (batch + panels - 1) / panels;
    return (examples + GROUP - 1) / GROUP * GROUP;
}

static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static workspace *reserve(const network *net, int64_t lanes) {
    const int32_t layers = net->layers;
    int64_t widest = 0, size = rounded((3 * layers + 1) * (int64_t)sizeof(void *));
    const int64_t pointers = size, row = lanes * 4;
    size += (int64_t)net->blocks * GROUP * row;
    for (int32_t l = 0; l < layers; l++) {
        const layer *own = net->layer + l;
        size += own->outputs * row;
        size += rounded(own->row_start[own->outputs] * 4) + rounded(own->outputs * 4);
        widest = own->outputs > widest ? own->outputs : widest;
    }
    size += 2 * widest * row;
    workspace *w = malloc(sizeof *w);
    char *memory = w ? aligned_alloc(64, (size_t)size) : NULL;
    if (!memory) return free(w), NULL;
    memset(memory, 0, (size_t)size);
    *w = (workspace){.memory = memory, .lanes = lanes, .activation = (vec **)memory};
    w->weight_gradient = (float **)(w->activation + layers + 1);
    w->bias_gradient = w->weight_gradient + layers;
    memory += pointers;
    w->activation[0] = (vec *)memory;
    memory += (int64_t)net->blocks * GROUP * row;
    for (int32_t l = 0; l < layers; l++) {
        const layer *own = net->layer + l;
        w->activation[l + 1] = (vec *)memory;
        memory += own->outputs * row;
        w->weight_gradient[l] = (float *)memory;
        memory += rounded(own->row_start[own->outputs] * 4);
        w->bias_gradient[l] = (float *)memory;
        memory += rounded(own->outputs * 4);
    }
    w->dz = (vec *)memory;
    w->da = (vec *)(memory + widest * row);
    return w;
}

static void release(workspace *w) {
    free(w->memory);
    free(w);
}

/* ---- one step ---- */

static void logits_(const network *net, workspace *w) {
    const int nv = (int)(w->lanes / LANES);
    for (int32_t l = 0; l < net->layers; l++)
        forward_of[nv](net->layer + l, w->activation[l], w->activation[l + 1]);
}

static void gradients_(const network *net, workspace *w) {
    const int nv = (int)(w->lanes / LANES);
    const int32_t last = net->layers - 1;
    const layer *top = net->layer + last;
    if (top->activation != IDENTITY)
        for (int64_t at = 0; at < (int64_t)top->outputs * nv; at++)
            w->dz[at] = through(w->dz[at], w->activation[last + 1][at], top->activation);
    for (int32_t l = last; l >= 0; l--) {
        const layer *own = net->layer + l;
        weights_of[nv](
            own, w->activation[l], w->dz, w->weight_gradient[l],
            own->bias ? w->bias_gradient[l] : NULL);
        if (l == 0) break;
        inputs_of[nv](own, w->dz, w->activation[l], w->da, net->layer[l - 1].activation);
        vec *swap = w->dz;
        w->dz = w->da;
        w->da = swap;
    }
}

/* u = momentum u + g + decay w, w = w - lr u; the gradient begins the next step at 0. */
static void descend(float *weight, float *velocity, float *gradient, int64_t count, descent by) {
    for (int64_t k = 0; k < count; k++) {
        float d = gradient[k] + by.decay * weight[k];
        velocity[k] = by.momentum * velocity[k] + d;
        weight[k] -= by.lr * velocity[k];
        gradient[k] = 0;
    }
}

static void decay_idle(const network *net, descent by) {
    for (int64_t k = 0; k < net->idle_count; k++) {
        net->idle_velocity[k] = by.momentum * net->idle_velocity[k] + by.decay * net->idle[k];
        net->idle[k] -= by.lr * net->idle_velocity[k];
    }
}

/* ---- entry points ---- */

/* Train for one epoch, batch examples a step, in this order. *mean gets the mean loss on the way.
 * Returns 0, or the step at which the loss was found not to be finite (looked at every check
 * steps, and at the end), or -1 where there is no memory. */
int64_t lossprune_sparse_epoch(
    const network *net, const uint8_t *images, const int64_t *labels, const int64_t *order,
    int64_t examples, int64_t batch, int64_t check, descent by, double *mean) {
    if (batch > examples) batch = examples;
    workspace *w = reserve(net, panel_lanes(batch));
    if (!w) return -1;
    float total = 0; /* in single precision, to overflow where the dense loop does */
    int64_t step = 0, bad = 0;
    for (int64_t start = 0; start < examples && !bad; start += batch) {
        const int64_t size = examples - start < batch ? examples - start : batch;
        double loss = 0;
        for (int64_t first = start; first < start + size; first += w->lanes) {
            int64_t count = start + size - first < w->lanes ? start + size - first : w->lanes;
            gather(net, images, order, first, count, w->lanes, (float *)w->activation[0]);
            logits_(net, w);
            loss += cross_entropy(
                w->activation[net->layers], net->layer[net->layers - 1].outputs, labels, order,
                first, count, (int)(w->lanes / LANES), w->dz, (float)size, NULL);
            gradients_(net, w);
        }
        for (int32_t l = 0; l < net->layers; l++) {
            const layer *own = net->layer + l;
            descend(
                own->weight, own->weight_velocity, w->weight_gradient[l],
                own->row_start[own->outputs], by);
            if (own->bias)
                descend(own->bias, own->bias_velocity, w->bias_gradient[l], own->outputs, by);
        }
        decay_idle(net, by);
        total += (float)(loss / (double)size) * (float)size;
        step++;
        if (step % check == 0 && !isfinite(total)) bad = step;
    }
    if (!bad && !isfinite(total)) bad = step;
    *mean = (double)total / (double)examples;
    release(w);
    return bad;
}

/* Sum of the losses, and number of wrong answers, of the examples from first on. Returns 0, or -1
 * where there is no memory. */
int64_t lossprune_sparse_evaluate(
    const network *net, const uint8_t *images, const int64_t *labels, int64_t first, int64_t count,
    double *loss, int64_t *wrong) {
    workspace *w = reserve(net, panel_lanes(MOST * LANES));
    if (!w) return -1;
    *loss = 0;
    *wrong = 0;
    for (int64_t at = first; at < first + count; at += w->lanes) {
        int64_t some = first + count - at < w->lanes ? first + count - at : w->lanes;
        gather(net, images, NULL, at, some, w->lanes, (float *)w->activation[0]);
        logits_(net, w);
        *loss += cross_entropy(
            w->activation[net->layers], net->layer[net->layers - 1].outputs, labels, NULL, at, some,
            (int)(w->lanes / LANES), NULL, 1.0f, wrong);
    }
    release(w);
    return 0;
}
