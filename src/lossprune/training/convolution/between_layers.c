/* What stands between convolutions: batch normalisation in training mode, and maxima over windows.

   Values are as in sparse_convolution.c: (blocks, height, channels, width, LANES).  The last block
   may have lanes without an image: they take no part in statistics, and have no gradient.  Threads
   share the channels, so that what comes out does not depend on how many they are. */

#include "lossprune.h"

MIRRORED(Threads)

typedef double wide __attribute__((vector_size(8 * LANES)));

typedef struct {
    int64_t blocks, height, channels, width, images;
} Maps;
MIRRORED(Maps)

typedef struct {
    int64_t size_y, size_x, stride_y, stride_x, padding_y, padding_x, height, width; /* of the output */
} Window;
MIRRORED(Window)

typedef struct {
    const Maps *maps;
    const Window *window;
    const float *in, *out_gradient, *out;
    float *mean, *variance;          /* (channels) */
    const float *scale, *shift;      /* (channels) */
    const float *weight;             /* (channels) or NULL */
    float epsilon;
    int64_t relu; /* the output is rectified; of maxima: the input was */
    float *to, *weight_gradient, *bias_gradient;
    const Threads *threads;
} Work;

/* 0 where the gate is not positive; what is no number stays none, as in torch. */
INLINE vec positive(vec gate, vec v) { return (vec)((ivec)v & ~(ivec)(gate <= 0.0f)); }

/* Of the lanes of a block those that have an image: all bits set. */
static ivec present(const Maps *m, int64_t block) {
    ivec found;
    for (int l = 0; l < LANES; l++) found[l] = block * LANES + l < m->images ? -1 : 0;
    return found;
}

INLINE int64_t row_of(const Maps *m, int64_t block, int64_t y, int64_t channel) {
    return ((block * m->height + y) * m->channels + channel) * m->width * LANES;
}

INLINE double total(wide v) {
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += v[l];
    return sum;
}

INLINE wide widened(vec v) { return __builtin_convertvector(v, wide); }

static void own_channels(const Work *w, int64_t *first, int64_t *last) {
    int64_t rank = w->threads ? w->threads->rank() : 0;
    int64_t size = w->threads ? w->threads->size() : 1;
    *first = w->maps->channels * rank / size;
    *last = w->maps->channels * (rank + 1) / size;
}

/* ---- batch normalisation ---------------------------------------------------------------------- */

/* mean[c] and variance[c], the biased one, over images and positions. */
static void moments_share(void *data) {
    const Work *w = data;
    const Maps *m = w->maps;
    double count = (double)(m->images * m->height * m->width);
    int64_t first, last;
    own_channels(w, &first, &last);
    for (int64_t c = first; c < last; c++) {
        for (int pass = 0; pass < 2; pass++) {
            float center = pass ? w->mean[c] : 0.0f;
            wide sum = {0};
            for (int64_t b = 0; b < m->blocks; b++) {
                ivec valid = present(m, b);
                for (int64_t y = 0; y < m->height; y++) {
                    const float *row = w->in + row_of(m, b, y, c);
                    vec part = {0};
                    for (int64_t x = 0; x < m->width; x++) {
                        vec v = load(row + x * LANES) - center;
                        part += pass ? v * v : v;
                    }
                    sum += widened((vec)((ivec)part & valid));
                }
            }
            if (pass) w->variance[c] = (float)(total(sum) / count);
            else w->mean[c] = (float)(total(sum) / count);
        }
    }
}

/* to = in * scale[c] + shift[c], rectified if asked for */
static void scale_share(void *data) {
    const Work *w = data;
    const Maps *m = w->maps;
    int64_t first, last;
    own_channels(w, &first, &last);
    for (int64_t b = 0; b < m->blocks; b++)
        for (int64_t y = 0; y < m->height; y++)
            for (int64_t c = first; c < last; c++) {
                int64_t row = row_of(m, b, y, c);
                float scale = w->scale[c], shift = w->shift[c];
                for (int64_t x = 0; x < m->width; x++) {
                    vec v = load(w->in + row + x * LANES) * scale + shift;
                    store(w->to + row + x * LANES, w->relu ? positive(v, v) : v);
                }
            }
}

/* With the standardised input z, its scale s = weight / sqrt(variance + epsilon), N values and the
   outputs' gradient d:  to = s (d - mean of d - z * mean of d z). */
static void normalise_gradient_share(void *data) {
    const Work *w = data;
    const Maps *m = w->maps;
    double count = (double)(m->images * m->height * m->width);
    int64_t first, last;
    own_channels(w, &first, &last);
    for (int64_t c = first; c < last; c++) {
        float mean = w->mean[c], inverse = 1.0f / __builtin_sqrtf(w->variance[c] + w->epsilon);
        wide sum = {0}, product = {0};
        for (int64_t b = 0; b < m->blocks; b++)
            for (int64_t y = 0; y < m->height; y++) {
                int64_t row = row_of(m, b, y, c);
                vec part = {0}, with = {0};
                for (int64_t x = 0; x < m->width; x++) {
                    vec d = load(w->out_gradient + row + x * LANES);
                    if (w->out) d = positive(load(w->out + row + x * LANES), d);
                    part += d;
                    with += d * ((load(w->in + row + x * LANES) - mean) * inverse);
                }
                sum += widened(part);
                product += widened(with);
            }
        double d_sum = total(sum), dz_sum = total(product);
        if (w->bias_gradient) w->bias_gradient[c] = (float)d_sum;
        if (w->weight_gradient) w->weight_gradient[c] = (float)dz_sum;
        if (!w->to) continue;
        float scale = inverse * (w->weight ? w->weight[c] : 1.0f);
        float d_mean = (float)(d_sum / count), dz_mean = (float)(dz_sum / count);
        for (int64_t b = 0; b < m->blocks; b++) {
            ivec valid = present(m, b);
            for (int64_t y = 0; y < m->height; y++) {
                int64_t row = row_of(m, b, y, c);
                for (int64_t x = 0; x < m->width; x++) {
                    vec d = load(w->out_gradient + row + x * LANES);
                    if (w->out) d = positive(load(w->out + row + x * LANES), d);
                    vec z = (load(w->in + row + x * LANES) - mean) * inverse;
                    vec v = (d - d_mean - z * dz_mean) * scale;
                    store(w->to + row + x * LANES, (vec)((ivec)v & valid));
                }
            }
        }
    }
}

/* ---- maxima ----------------------------------------------------------------------------------- */

typedef struct {
    int64_t from_y, to_y, from_x, to_x; /* positions of the input */
} Reach;

INLINE Reach reach_of(const Maps *m, const Window *o, int64_t y, int64_t x) {
    int64_t from_y = y * o->stride_y - o->padding_y, from_x = x * o->stride_x - o->padding_x;
    int64_t to_y = from_y + o->size_y, to_x = from_x + o->size_x;
    return (Reach){from_y < 0 ? 0 : from_y, to_y > m->height ? m->height : to_y,
                   from_x < 0 ? 0 : from_x, to_x > m->width ? m->width : to_x};
}

/* The maximum, NaN if one is, and with ``in`` rows apart by ``step``. */
INLINE vec maximum(const float *in, int64_t step, Reach r) {
    vec most = load(in + r.from_y * step + r.from_x * LANES);
    for (int64_t y = r.from_y; y < r.to_y; y++)
        for (int64_t x = r.from_x; x < r.to_x; x++) {
            vec v = load(in + y * step + x * LANES);
            most = choose((ivec)(v > most) | (ivec)(v != v), v, most);
        }
    return most;
}

static void maximum_share(void *data) {
    const Work *w = data;
    const Maps *m = w->maps;
    const Window *o = w->window;
    int64_t first, last, step = m->channels * m->width * LANES;
    own_channels(w, &first, &last);
    for (int64_t b = 0; b < m->blocks; b++)
        for (int64_t y = 0; y < o->height; y++)
            for (int64_t c = first; c < last; c++) {
                const float *in = w->in + row_of(m, b, 0, c);
                float *to = w->to + ((b * o->height + y) * m->channels + c) * o->width * LANES;
                for (int64_t x = 0; x < o->width; x++)
                    store(to + x * LANES, maximum(in, step, reach_of(m, o, y, x)));
            }
}

/* The gradient goes to the first of those that are the maximum.  ``apart``: the windows fill the map
   without overlap, so that each number is written once. */
INLINE void maximum_gradient_row(const Work *w, int apart, int64_t b, int64_t y, int64_t c) {
    const Maps *m = w->maps;
    const Window *o = w->window;
    int64_t step = m->channels * m->width * LANES;
    const float *in = w->in + row_of(m, b, 0, c);
    float *to = w->to + row_of(m, b, 0, c);
    int64_t at = ((b * o->height + y) * m->channels + c) * o->width * LANES;
    for (int64_t x = 0; x < o->width; x++) {
        Reach r = reach_of(m, o, y, x);
        vec most = maximum(in, step, r), d = load(w->out_gradient + at + x * LANES);
        if (w->relu) d = positive(most, d);
        ivec open = (ivec){0} - 1;
        for (int64_t i = r.from_y; i < r.to_y; i++)
            for (int64_t j = r.from_x; j < r.to_x; j++) {
                vec v = load(in + i * step + j * LANES);
                ivec here = open & ((ivec)(v == most) | ((ivec)(v != v) & (ivec)(most != most)));
                float *place = to + i * step + j * LANES;
                vec own = (vec)((ivec)d & here);
                store(place, apart ? own : load(place) + own);
                open &= ~here;
            }
    }
}

static void maximum_gradient_share(void *data) {
    const Work *w = data;
    const Maps *m = w->maps;
    const Window *o = w->window;
    int apart = o->size_y == o->stride_y && o->size_x == o->stride_x && !o->padding_y &&
                !o->padding_x && o->size_y * o->height == m->height &&
                o->size_x * o->width == m->width;
    int64_t first, last;
    own_channels(w, &first, &last);
    for (int64_t b = 0; b < m->blocks; b++) {
        for (int64_t y = 0; y < m->height && !apart; y++)
            for (int64_t c = first; c < last; c++)
                for (int64_t x = 0; x < m->width; x++)
                    store(w->to + row_of(m, b, y, c) + x * LANES, (vec){0});
        for (int64_t y = 0; y < o->height; y++)
            for (int64_t c = first; c < last; c++)
                if (apart) maximum_gradient_row(w, 1, b, y, c);
                else maximum_gradient_row(w, 0, b, y, c);
    }
}

/* ---- calls ------------------------------------------------------------------------------------ */

static void run(void (*share)(void *), Work *work, int64_t threads, const Threads *by) {
    if (threads > 1) {
        work->threads = by;
        by->parallel(share, work, (unsigned)threads, 0);
    } else {
        share(work);
    }
}

void moments(const Maps *maps, const float *in, float *mean, float *variance, int64_t threads,
             const Threads *by) {
    Work work = {.maps = maps, .in = in, .mean = mean, .variance = variance};
    run(moments_share, &work, threads, by);
}

void scaled(const Maps *maps, const float *in, const float *scale, const float *shift, int64_t relu,
            float *to, int64_t threads, const Threads *by) {
    Work work = {.maps = maps, .in = in, .scale = scale, .shift = shift, .relu = relu, .to = to};
    run(scale_share, &work, threads, by);
}

void normalise_gradient(const Maps *maps, const float *in, const float *out_gradient,
                        const float *out, float *mean, float *variance, const float *weight,
                        float epsilon, float *to, float *weight_gradient, float *bias_gradient,
                        int64_t threads, const Threads *by) {
    Work work = {.maps = maps, .in = in, .out_gradient = out_gradient, .out = out, .mean = mean,
                 .variance = variance, .weight = weight, .epsilon = epsilon, .to = to,
                 .weight_gradient = weight_gradient, .bias_gradient = bias_gradient};
    run(normalise_gradient_share, &work, threads, by);
}

void maxima(const Maps *maps, const Window *window, const float *in, float *to, int64_t threads,
            const Threads *by) {
    Work work = {.maps = maps, .window = window, .in = in, .to = to};
    run(maximum_share, &work, threads, by);
}

void maxima_gradient(const Maps *maps, const Window *window, const float *in,
                     const float *out_gradient, int64_t relu, float *to, int64_t threads,
                     const Threads *by) {
    Work work = {.maps = maps, .window = window, .in = in, .out_gradient = out_gradient,
                 .relu = relu, .to = to};
    run(maximum_gradient_share, &work, threads, by);
}
