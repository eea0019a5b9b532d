/* Convolutions over the kept weights alone: outputs, gradients of inputs, gradients of weights.

   A value is blocks of LANES images, with the images of a block innermost in memory and the rows of
   all channels together: (blocks, height, channels, width, LANES).  So what a tile needs lies near
   together, and not a power of two apart, where it would compete for the same places in a cache.

   What is computed is a pass: at output positions (origin + step i), i < count,

       out[o][i] = sum over entries k of o: value[k] * in[channel(k)][from + stride i + tap(k)],

   with 0 outside of the input.  A convolution is one pass; the gradient of its inputs is one for
   each remainder of the positions modulo the stride; on small maps there is a pass for each set of
   positions that the same taps reach, so that no zeros are multiplied.

   A tile is tile_y x tile_x positions of ``blocks`` blocks.  Chunk by chunk of the input channels,
   what the tile needs of them is copied to a patch, which fits into the first cache; then one
   output channel after the other is visited: the sums of the tile are held in registers while the
   chunk's entries of that channel go by.  The same order serves the gradient of the weights, where
   the tile of the outputs' gradient is held in registers.  The channels of a chunk are visited by
   their numbers of entries, so that the processor foresees where the loop over these ends.

   Threads share the tiles; where these are too few, and for the gradient of the weights, each takes
   a part of the output channels, with as many entries as any other. */

#include <stdlib.h>
#include <string.h>

#include "lossprune.h"

MIRRORED(Threads)

#define MOST 16     /* vectors of a tile */
#define LARGE 65536 /* vectors of an output that no cache of a core holds */

typedef struct {
    int64_t chunks, parts, outputs;
    int64_t tile_y, tile_x, blocks;
    int64_t origin_y, origin_x, count_y, count_x, step_y, step_x;
    int64_t from_y, from_x, stride_y, stride_x;
    int64_t patch_y, patch_x; /* input positions that a tile needs */
    int64_t room;             /* vectors of the largest patch */
    int64_t entry;            /* the first of this pass */
    const int32_t *first;     /* (chunks + 1): their first input channels */
    const int32_t *part;      /* (parts + 1): their first output channels */
    const int32_t *visit;     /* (chunks * parts + 1): where the visits of a chunk's part begin */
    const int32_t *output;    /* (visits): the channel */
    const int32_t *begin;     /* (visits + 1): where the entries of a visit begin */
    const int32_t *offset;    /* (entries): where in the patch an entry's input lies */
} Pass;
MIRRORED(Pass)

typedef struct {
    int64_t blocks, height, channels, width; /* of the input of the passes */
    int64_t out_height, outputs, out_width;
} Shape;
MIRRORED(Shape)

int64_t lanes(void) { return LANES; }

/* Write past the caches, where what is written is too large to be found there later. */
INLINE void stream(float *p, vec v) {
#ifdef __clang__
    __builtin_nontemporal_store(v, (vec *)p);
#elif defined(__AVX512F__)
    __builtin_ia32_movntps512(p, v);
#elif defined(__AVX__)
    __builtin_ia32_movntps256(p, v);
#else
    store(p, v);
#endif
}
INLINE void streamed(void) {
#if defined(__AVX__)
    __builtin_ia32_sfence();
#endif
}
/* 0 where the gate is not positive; what is no number stays none, as in torch. */
INLINE vec positive(vec gate, vec v) { return (vec)((ivec)v & ~(ivec)(gate <= 0.0f)); }

/* ---- one tile and one output channel after the other ------------------------------------------ */

/* What is visited, and the entries there; the tile of channel ``first`` is the first of them all. */
typedef struct {
    const int32_t *output, *begin;
    int64_t count, first;
    const int32_t *offset;
} Visits;

/* For each visit: sums[y][x] += sum over k of value[k] * in[offset[k] + y * row + x * LANES] */
INLINE void accumulate(int TY, int TX, const float *in, const Visits *visits, const float *value,
                       int64_t row, float *tiles) {
    for (int64_t v = 0; v < visits->count; v++) {
        float *sums = tiles + (visits->output[v] - visits->first) * (TY * TX * LANES);
        vec sum[MOST];
        UNROLL for (int t = 0; t < TY * TX; t++) sum[t] = load(sums + t * LANES);
        for (int64_t k = visits->begin[v], end = visits->begin[v + 1]; k < end; k++) {
            const float *at = in + visits->offset[k];
            vec w = broadcast(value[k]);
            UNROLL for (int y = 0; y < TY; y++, at += row)
                UNROLL for (int x = 0; x < TX; x++) sum[y * TX + x] += w * load(at + x * LANES);
        }
        UNROLL for (int t = 0; t < TY * TX; t++) store(sums + t * LANES, sum[t]);
    }
}

/* fold_W(a, b): of every 2 W lanes of a and then b, the first W and the last W, added. */
#if LANES == 16
#define EACH(at) at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), \
                 at(11), at(12), at(13), at(14), at(15)
#elif LANES == 8
#define EACH(at) at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)
#else
#define EACH(at) at(0), at(1), at(2), at(3)
#endif
#ifdef __clang__
#define PICKED(a, b, at) __builtin_shufflevector(a, b, EACH(at))
#else
#define PICKED(a, b, at) __builtin_shuffle(a, b, (ivec){EACH(at)})
#endif
#define FIRST(W, i) ((i) / (W) * 2 * (W) + (i) % (W))
#define FOLD(W)                                                                                   \
    INLINE vec fold_##W(vec a, vec b) {                                                           \
        return PICKED(a, b, FIRST_##W) + PICKED(a, b, LAST_##W);                                  \
    }
#define FIRST_1(i) FIRST(1, i)
#define LAST_1(i) FIRST(1, i) + 1
#define FIRST_2(i) FIRST(2, i)
#define LAST_2(i) FIRST(2, i) + 2
FOLD(1)
FOLD(2)
#if LANES > 4
#define FIRST_4(i) FIRST(4, i)
#define LAST_4(i) FIRST(4, i) + 4
FOLD(4)
#endif
#if LANES > 8
#define FIRST_8(i) FIRST(8, i)
#define LAST_8(i) FIRST(8, i) + 8
FOLD(8)
#endif

/* to[j] += the sum of the lanes of sum[j], j < N, a power of 2. */
INLINE void add_totals(int N, vec *sum, float *to) {
    int left = N;
#define STEP(W)                                                                                   \
    UNROLL for (int j = 0; j < 4; j++)                                                            \
        if (j < (left + 1) / 2) sum[j] = fold_##W(sum[2 * j % left], sum[(2 * j + 1) % left]);    \
    left = (left + 1) / 2;
#if LANES > 8
    STEP(8)
#endif
#if LANES > 4
    STEP(4)
#endif
    STEP(2)
    STEP(1)
    UNROLL for (int j = 0; j < N; j++) to[j] += sum[j / LANES][j % LANES];
}

/* gradient[k] += sum over the tile of out[y][x] * in[offset[k] + y * row + x * LANES], for N entries
   at a time: their N sums hide each other's latency. */
INLINE void correlate(int TY, int TX, int N, const float *in, const int32_t *offset, int64_t row,
                      const vec *out, float *gradient) {
    vec sum[8];
    const float *at[8];
    UNROLL for (int j = 0; j < N; j++) {
        sum[j] = (vec){0};
        at[j] = in + offset[j];
    }
    UNROLL for (int y = 0; y < TY; y++) {
        UNROLL for (int x = 0; x < TX; x++)
            UNROLL for (int j = 0; j < N; j++) sum[j] += out[y * TX + x] * load(at[j] + x * LANES);
        UNROLL for (int j = 0; j < N; j++) at[j] += row;
    }
    add_totals(N, sum, gradient);
}

INLINE void correlate_all(int TY, int TX, const float *in, const Visits *visits, int64_t row,
                          const float *tiles, float *gradient) {
    for (int64_t v = 0; v < visits->count; v++) {
        const float *tile = tiles + (visits->output[v] - visits->first) * (TY * TX * LANES);
        const int32_t *offset = visits->offset;
        vec out[MOST];
        UNROLL for (int t = 0; t < TY * TX; t++) out[t] = load(tile + t * LANES);
        int64_t k = visits->begin[v], end = visits->begin[v + 1];
        for (; k + 8 <= end; k += 8) correlate(TY, TX, 8, in, offset + k, row, out, gradient + k);
        if (k + 4 <= end) correlate(TY, TX, 4, in, offset + k, row, out, gradient + k), k += 4;
        if (k + 2 <= end) correlate(TY, TX, 2, in, offset + k, row, out, gradient + k), k += 2;
        if (k < end) correlate(TY, TX, 1, in, offset + k, row, out, gradient + k);
    }
}

typedef void Accumulate(const float *, const Visits *, const float *, int64_t, float *);
typedef void Correlate(const float *, const Visits *, int64_t, const float *, float *);
typedef struct {
    int64_t tile_y, vectors;
    Accumulate *accumulate;
    Correlate *correlate;
} Kernel;

#define KERNEL(TY, TX)                                                                            \
    static void accumulate_##TY##_##TX(const float *in, const Visits *visits, const float *value, \
                                       int64_t row, float *tiles) {                               \
        accumulate(TY, TX, in, visits, value, row, tiles);                                        \
    }                                                                                             \
    static void correlate_##TY##_##TX(const float *in, const Visits *visits, int64_t row,         \
                                      const float *tiles, float *gradient) {                      \
        correlate_all(TY, TX, in, visits, row, tiles, gradient);                                  \
    }
#define KERNELS(DO)                                                                               \
    DO(1, 1) DO(1, 2) DO(1, 4) DO(1, 7) DO(1, 8) DO(1, 14) DO(1, 16) DO(2, 2) DO(2, 4) DO(2, 7)    \
    DO(2, 8) DO(4, 2) DO(4, 4)
KERNELS(KERNEL)

static const Kernel *find_kernel(int64_t tile_y, int64_t vectors) {
#define ENTRY(TY, TX) {TY, TX, accumulate_##TY##_##TX, correlate_##TY##_##TX},
    static const Kernel kernels[] = {KERNELS(ENTRY){0, 0, NULL, NULL}};
    for (const Kernel *k = kernels; k->tile_y; k++)
        if (k->tile_y == tile_y && k->vectors == vectors) return k;
    return NULL;
}

/* ---- patches and tiles ------------------------------------------------------------------------ */

/* Where a tile lies: its first block and its first position, counted in the pass's positions. */
typedef struct {
    int64_t block, y, x;
} Place;

/* Copy what the tile needs of some channels; with a gate, only where that is positive. */
static void copy_patch(const Pass *p, const Shape *s, const float *in, const float *gate,
                       Place at, int64_t first, int64_t last, float *patch) {
    int64_t across = (p->patch_x + p->stride_x - 1) / p->stride_x; /* columns of each remainder */
    int64_t row = across * p->stride_x * p->blocks;
    int64_t y0 = p->from_y + at.y * p->stride_y, x0 = p->from_x + at.x * p->stride_x;
    for (int64_t py = 0; py < p->patch_y; py++) {
        int64_t y = y0 + py;
        for (int64_t c = first; c < last; c++) {
            float *to = patch + ((c - first) * p->patch_y + py) * row * LANES;
            if (y < 0 || y >= s->height) {
                memset(to, 0, (size_t)(row * LANES) * 4);
                continue;
            }
            for (int64_t b = 0; b < p->blocks; b++) {
                int64_t block = at.block + b;
                int64_t from = (((block * s->height + y) * s->channels + c) * s->width + x0) * LANES;
                int64_t low = x0 < 0 ? -x0 : 0, high = s->width - x0;
                if (block >= s->blocks) high = 0;
                if (high > p->patch_x) high = p->patch_x;
                for (int64_t r = 0; r < p->stride_x; r++) {
                    float *column = to + (r * across * p->blocks + b) * LANES;
                    for (int64_t px = r; px < p->patch_x; px += p->stride_x) {
                        vec v = {0};
                        if (px >= low && px < high) {
                            v = load(in + from + px * LANES);
                            if (gate) v = positive(load(gate + from + px * LANES), v);
                        }
                        store(column, v);
                        column += p->blocks * LANES;
                    }
                }
            }
        }
    }
}

/* Where a row of a tile lies in an output channel, in numbers, and how many positions it has. */
typedef struct {
    int64_t at, count;
} Line;

INLINE Line line_of(const Pass *p, const Shape *s, Place at, int64_t channel, int64_t y, int64_t b) {
    if (at.block + b >= s->blocks || at.y + y >= p->count_y) return (Line){0, 0};
    int64_t row = ((at.block + b) * s->out_height + p->origin_y + (at.y + y) * p->step_y);
    int64_t left = p->count_x - at.x;
    return (Line){((row * s->outputs + channel) * s->out_width + p->origin_x + at.x * p->step_x) * LANES,
                  left < p->tile_x ? left : p->tile_x};
}

typedef struct {
    const Pass *passes;
    int64_t count;
    const Shape *shape;
    const float *in, *gate, *value, *bias; /* value: of all passes' entries */
    const float *out_gate;                 /* the output is 0 where this is not positive */
    int64_t relu, large; /* large: the output is, so that it passes the caches by */
    float *out;
    const float *out_gradient;
    float *gradient, *bias_gradient;
    float *workspace;
    int64_t own; /* numbers of it a thread has */
    const Threads *threads;
} Job;

static int64_t tiles_of(const Pass *p, const Shape *s) {
    int64_t groups = (s->blocks + p->blocks - 1) / p->blocks;
    int64_t rows = (p->count_y + p->tile_y - 1) / p->tile_y;
    return groups * rows * ((p->count_x + p->tile_x - 1) / p->tile_x);
}

static Place place_of(const Pass *p, int64_t tile) {
    int64_t columns = (p->count_x + p->tile_x - 1) / p->tile_x;
    int64_t rows = (p->count_y + p->tile_y - 1) / p->tile_y;
    return (Place){tile / (rows * columns) * p->blocks, tile / columns % rows * p->tile_y,
                   tile % columns * p->tile_x};
}

/* The visits of a chunk to the channels of a part, and what holds for all of a pass. */
static Visits visits_of(const Pass *p, int64_t chunk, int64_t part, int64_t first) {
    int64_t at = p->visit[chunk * p->parts + part];
    int64_t end = p->visit[chunk * p->parts + part + 1];
    return (Visits){p->output + at, p->begin + at, end - at, first, p->offset};
}

INLINE int64_t row_of_patch(const Pass *p) {
    int64_t across = (p->patch_x + p->stride_x - 1) / p->stride_x;
    return across * p->stride_x * p->blocks * p->stride_y * LANES;
}

/* ---- outputs, or the gradient of inputs ------------------------------------------------------- */

/* Of the channels of the parts from one to another. */
static void convolve_tile(const Job *job, const Pass *p, Place at, int64_t from_part,
                          int64_t to_part, float *space) {
    const Shape *s = job->shape;
    int64_t vectors = p->tile_y * p->tile_x * p->blocks, row = row_of_patch(p);
    int64_t first = p->part[from_part], last = p->part[to_part];
    const Kernel *kernel = find_kernel(p->tile_y, p->tile_x * p->blocks);
    float *patch = space, *sums = space + p->room * LANES;
    for (int64_t o = first; o < last; o++) {
        vec start = broadcast(job->bias ? job->bias[o] : 0.0f);
        for (int64_t t = 0; t < vectors; t++) store(sums + ((o - first) * vectors + t) * LANES, start);
    }
    for (int64_t q = 0; q < p->chunks; q++) {
        const int32_t *visit = p->visit + q * p->parts;
        if (visit[from_part] == visit[to_part]) continue;
        copy_patch(p, s, job->in, job->gate, at, p->first[q], p->first[q + 1], patch);
        for (int64_t part = from_part; part < to_part; part++) {
            Visits visits = visits_of(p, q, part, first);
            kernel->accumulate(patch, &visits, job->value + p->entry, row, sums);
        }
    }
    for (int64_t y = 0; y < p->tile_y; y++)
        for (int64_t o = first; o < last; o++)
            for (int64_t b = 0; b < p->blocks; b++) {
                Line line = line_of(p, s, at, o, y, b);
                const float *from =
                    sums + (((o - first) * p->tile_y + y) * p->tile_x * p->blocks + b) * LANES;
                for (int64_t x = 0; x < line.count; x++) {
                    vec v = load(from + x * p->blocks * LANES);
                    if (job->relu) v = positive(v, v);
                    int64_t place = line.at + x * p->step_x * LANES;
                    if (job->out_gate) v = positive(load(job->out_gate + place), v);
                    float *to = job->out + place;
                    if (job->large) stream(to, v);
                    else store(to, v);
                }
            }
}

static void convolve_share(void *data) {
    const Job *job = data;
    int64_t rank = job->threads ? job->threads->rank() : 0;
    int64_t size = job->threads ? job->threads->size() : 1;
    float *space = job->workspace + rank * job->own;
    for (int64_t i = 0; i < job->count; i++) {
        const Pass *p = &job->passes[i];
        int64_t tiles = tiles_of(p, job->shape);
        int64_t whole = tiles / size * size; /* each takes as many; the rest they share */
        for (int64_t t = whole * rank / size; t < whole * (rank + 1) / size; t++)
            convolve_tile(job, p, place_of(p, t), 0, p->parts, space);
        for (int64_t t = whole; t < tiles; t++)
            for (int64_t part = rank; part < p->parts; part += size)
                convolve_tile(job, p, place_of(p, t), part, part + 1, space);
    }
    streamed();
}

/* ---- the gradient of the kept weights --------------------------------------------------------- */

/* Read the gradient of a tile of the outputs, and add it to that of the biases. */
static void read_tile(const Job *job, const Pass *p, Place at, int64_t first, int64_t last,
                      float *tiles) {
    for (int64_t y = 0; y < p->tile_y; y++)
        for (int64_t o = first; o < last; o++)
            for (int64_t b = 0; b < p->blocks; b++) {
                Line line = line_of(p, job->shape, at, o, y, b);
                float *to =
                    tiles + (((o - first) * p->tile_y + y) * p->tile_x * p->blocks + b) * LANES;
                vec total = {0};
                for (int64_t x = 0; x < p->tile_x; x++) {
                    vec v = {0};
                    if (x < line.count) {
                        int64_t from = line.at + x * p->step_x * LANES;
                        v = load(job->out_gradient + from);
                        if (job->gate) v = positive(load(job->gate + from), v);
                    }
                    total += v;
                    store(to + x * p->blocks * LANES, v);
                }
                if (job->bias_gradient) add_totals(1, &total, job->bias_gradient + o);
            }
}

static void correlate_part(const Job *job, const Pass *p, int64_t part, float *space) {
    const Kernel *kernel = find_kernel(p->tile_y, p->tile_x * p->blocks);
    int64_t first = p->part[part], row = row_of_patch(p);
    float *patch = space, *tiles = space + p->room * LANES;
    for (int64_t t = 0; t < tiles_of(p, job->shape); t++) {
        Place at = place_of(p, t);
        read_tile(job, p, at, first, p->part[part + 1], tiles);
        for (int64_t q = 0; q < p->chunks; q++) {
            Visits visits = visits_of(p, q, part, first);
            if (!visits.count) continue;
            copy_patch(p, job->shape, job->in, NULL, at, p->first[q], p->first[q + 1], patch);
            kernel->correlate(patch, &visits, row, tiles, job->gradient + p->entry);
        }
    }
}

static void correlate_share(void *data) {
    const Job *job = data;
    int64_t rank = job->threads ? job->threads->rank() : 0;
    int64_t size = job->threads ? job->threads->size() : 1;
    float *space = job->workspace + rank * job->own;
    for (int64_t i = 0; i < job->count; i++)
        for (int64_t part = rank; part < job->passes[i].parts; part += size)
            correlate_part(job, &job->passes[i], part, space);
}

/* ---- calls ------------------------------------------------------------------------------------ */

static int64_t run(void (*share)(void *), Job *job, int64_t threads, const Threads *by) {
    int64_t own = 0;
    for (int64_t i = 0; i < job->count; i++) {
        const Pass *p = &job->passes[i];
        int64_t vectors = p->room + p->outputs * p->tile_y * p->tile_x * p->blocks;
        own = vectors > own ? vectors : own;
        if (!find_kernel(p->tile_y, p->tile_x * p->blocks)) return -1;
    }
    job->own = own * LANES;
    job->workspace = aligned_alloc(64, (size_t)(job->own * threads) * 4 + 64 & ~(size_t)63);
    if (!job->workspace) return -2;
    if (threads > 1) {
        job->threads = by;
        by->parallel(share, job, (unsigned)threads, 0);
    } else {
        share(job);
    }
    free(job->workspace);
    return 0;
}

int64_t convolve(const Pass *passes, int64_t count, const Shape *shape, const float *in,
                 const float *gate, const float *value, const float *bias, int64_t relu,
                 const float *out_gate, float *out, int64_t threads, const Threads *by) {
    Job job = {.passes = passes, .count = count, .shape = shape, .in = in, .gate = gate,
               .value = value, .bias = bias, .relu = relu, .out_gate = out_gate, .out = out};
    job.large = shape->blocks * shape->out_height * shape->outputs * shape->out_width > LARGE;
    return run(convolve_share, &job, threads, by);
}

int64_t correlate_weights(const Pass *passes, int64_t count, const Shape *shape, const float *in,
                          const float *gate, const float *out_gradient, float *gradient,
                          float *bias_gradient, int64_t threads, const Threads *by) {
    Job job = {.passes = passes, .count = count, .shape = shape, .in = in, .gate = gate,
               .out_gradient = out_gradient, .gradient = gradient, .bias_gradient = bias_gradient};
    return run(correlate_share, &job, threads, by);
}
