/* Sparse networks: a list of operations on maps of features, run by one call.

   A map is C planes.  A plane of H x W positions has a halo of h zeros on every side; rows share
   it: the halo on the right of one row is the halo on the left of the next, so that a row takes
   W + h elements and a tap of a convolution is one constant offset for every position.

   The same plan is run in three ways, which differ in what an element is:
     blocks     an element is LANES images, innermost in memory, so that each kept weight is
                broadcast once and multiplied with whole vectors;
     rows       where all layers are linear, an element is ROW_VECTORS vectors of rows, so that a
                kept weight and its offset are loaded once for all of them;
     positions  an element is one number of one image, and vectors lie along the positions.
   In all, a tile of accumulators stays in registers while the kept weights of one output channel
   go by; only then are bias, residual, activation and maximum applied and the tile written. */

#include <string.h>

#include "activations.h"
#include "lossprune.h"

MIRRORED(Threads)

#define MOST 16 /* accumulators of a tile */
#define ROWS (ROW_VECTORS * LANES) /* of an element; ROW_VECTORS is given by the build */

/* Offsets and strides are in elements. */
typedef struct {
    int64_t offset, plane, row, origin, height, width, halo, channels;
} Map;
MIRRORED(Map)

typedef struct {
    int64_t kind;                   /* CONVOLUTION, AFFINE, ...: numbered by the build */
    int64_t activation;
    float low, high; /* of the activation */
    int64_t pool;    /* 2 for a maximum over 2 x 2 after a convolution */
    Map source, target, other;      /* other: the second map; its plane is 0 without one */
    int64_t spread;                 /* whether that has one number a channel, for all positions */
    int64_t height, width;          /* of a convolution's output, before the maximum */
    int64_t stride_y, stride_x;     /* of a convolution; factors of a split */
    int64_t tile_y, tile_x, chunks; /* chunks: of the input channels */
    int64_t alike;                  /* output channels that read the same input channels */
    const int32_t *total;  /* (channels + 1): kept weights of the channels before */
    const int32_t *visit;  /* (chunks x channels): the channels of a chunk, the fullest first */
    const int32_t *begin;  /* (chunks x channels + 1): where the kept weights of a visit begin */
    const int32_t *offset; /* (kept): where in the source a weight's input lies, in numbers */
    const float *value;    /* (kept) */
    const float *scale, *shift; /* (channels); the shift is a convolution's bias */
    const int32_t *window; /* (rows + columns of the target, 3): where a window begins and ends in
                              the source, and what the sum is divided by */
    int64_t tensor;             /* index of the tensor that is read or written */
    Map third, bias; /* attention's values, and a number a key, whose plane is 0 without; its
                        queries are the source, keys the other */
    int64_t single;             /* of rows: 1 where there is one an example, 0 one a token */
    int64_t heads, key_heads, size, value_size; /* of attention; numbers of a query and a value */
    int64_t query, key, values, causal; /* their first channels; whether later keys are left out */
    int64_t place;              /* of the token that is taken */
    double number;              /* attention's scale, the epsilon of a norm */
} Operation;
MIRRORED(Operation)

typedef struct {
    const Operation *operations;
    int64_t count, images, tokens, together, vectors, scratch, room, pieces;
    float *const *tensors;
    float *workspace;
    const Threads *threads;
    int64_t next;
} Job;

typedef struct {
    int64_t rank, size;
} Team;

typedef struct {
    int64_t first, last; /* not this one */
} Span;

EXPORTED int64_t lanes(void) { return LANES; }

/* Keeps NaN. */
INLINE vec larger(vec a, vec b) { return choose((ivec)(a < b) | (ivec)(b != b), b, a); }

INLINE vec finished(vec v, const Operation *o) {
    return activate(v, o->activation, o->low, o->high);
}

/* sum[y][x] += sum over kept weights k of value[k] * in[offset[k] + y * row + x * SX * LANES].
   CHAINS: sums kept apart, so that a small tile need not wait for each addition. */
INLINE void gather(int TY, int TX, int SX, int CHAINS, const float *in, const int32_t *offset,
                   const float *value, int64_t n, int64_t row, vec *sum) {
    UNROLL for (int t = TY * TX; t < CHAINS * TY * TX; t++) sum[t] = (vec){0};
    int64_t k = 0;
    for (; k + CHAINS <= n; k += CHAINS) {
        UNROLL for (int c = 0; c < CHAINS; c++) {
            const float *at = in + offset[k + c];
            vec w = broadcast(value[k + c]);
            UNROLL for (int y = 0; y < TY; y++, at += row)
                UNROLL for (int x = 0; x < TX; x++)
                    sum[(c * TY + y) * TX + x] += w * load(at + x * SX * LANES);
        }
    }
    if (CHAINS > 1) {
        for (; k < n; k++) {
            const float *at = in + offset[k];
            vec w = broadcast(value[k]);
            UNROLL for (int y = 0; y < TY; y++, at += row)
                UNROLL for (int x = 0; x < TX; x++)
                    sum[y * TX + x] += w * load(at + x * SX * LANES);
        }
        UNROLL for (int c = 1; c < CHAINS; c++)
            UNROLL for (int t = 0; t < TY * TX; t++) sum[t] += sum[c * TY * TX + t];
    }
}

/* Rows of vectors along the positions, and their tiles over blocks of images: (rows, columns, stride
   of the columns, chains). */
#define LINES(DO)                                                                        \
    DO(1, 4) DO(2, 4) DO(3, 2) DO(4, 2) DO(5, 2) DO(6, 1) DO(7, 1) DO(8, 1) DO(9, 1)     \
    DO(10, 1) DO(11, 1) DO(12, 1) DO(13, 1) DO(14, 1) DO(15, 1) DO(16, 1)
#define TILES(DO)                                                                        \
    DO(1, 1, 1, 4) DO(1, 2, 1, 4) DO(1, 4, 1, 2) DO(1, 8, 1, 1) DO(2, 1, 1, 4)           \
    DO(2, 2, 1, 2) DO(2, 4, 1, 1) DO(2, 8, 1, 1) DO(4, 1, 1, 2) DO(4, 2, 1, 1)           \
    DO(4, 4, 1, 1) DO(1, 2, 2, 4) DO(1, 4, 2, 2) DO(1, 8, 2, 1) DO(2, 2, 2, 2)           \
    DO(2, 4, 2, 1) DO(2, 8, 2, 1) DO(4, 2, 2, 1) DO(4, 4, 2, 1)

/* The share of the channels that one of a team takes: equal numbers of kept weights. */
static int64_t first_channel(const Operation *o, int64_t channels, int64_t rank, int64_t size) {
    if (rank <= 0) return 0;
    if (rank >= size) return channels;
    if (!o->total) return channels * rank / size;
    int64_t own = 4, total = o->total[channels] + own * channels, low = 0, high = channels;
    while (low < high) { /* a channel costs something even without a weight */
        int64_t middle = (low + high) / 2;
        if ((o->total[middle] + own * middle) * size < total * rank) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Whether each of a team takes as many rows of a map, whole tiles of them; and which one does. */
static int shares_rows(int64_t height, int64_t tile, Team team, Span *rows) {
    int64_t share = height / team.size;
    if (team.size == 1 || !share || share * team.size != height || share % tile) return 0;
    *rows = (Span){share * team.rank, share * (team.rank + 1)};
    return 1;
}

static void clear_halo(float *plane, const Map *m, int64_t width) {
    if (!m->halo) return;
    int64_t end = m->height * m->row;
    memset(plane, 0, (size_t)(m->origin * width) * 4);
    float *beside = plane + (m->origin + m->width) * width;
    for (int64_t y = 0; y < m->height; y++, beside += m->row * width) {
        if (width > 1) for (int64_t k = 0; k < m->halo * width; k += LANES) store(beside + k, (vec){0});
        else if (m->halo == 1) *beside = 0.0f; /* a call takes longer than a few numbers */
        else if (m->halo == 2) beside[0] = beside[1] = 0.0f;
        else memset(beside, 0, (size_t)m->halo * 4);
    }
    memset(plane + (m->origin + end) * width, 0, (size_t)(m->halo * m->row * width) * 4);
}

/* ---- blocks of images ---------------------------------------------------------------------- */

/* A chunk of the input channels, and a tile of positions. */
typedef struct {
    const float *in; /* the tile's first position in the source, of channel 0 */
    float *sums;     /* (channels, rows, columns): what earlier chunks gave */
    float *target;   /* the tile's first position in channel 0, and in what is added */
    const float *other;
    int64_t chunk, first, last; /* output channels */
} Part;

/* Residual, maximum, activation. */
INLINE void finish(int TY, int TX, const Operation *o, vec *sum, float *target,
                   const float *other) {
    int64_t row = o->target.row * LANES;
    if (other)
        UNROLL for (int y = 0; y < TY; y++)
            UNROLL for (int x = 0; x < TX; x++)
                sum[y * TX + x] += load(other + (y * o->other.row + x) * LANES);
    int by = TY % 2 || TX % 2 || o->pool != 2 ? 1 : 2;
    if (by == 2)
        UNROLL for (int y = 0; y + 1 < TY; y += 2)
            UNROLL for (int x = 0; x + 1 < TX; x += 2)
                sum[y * TX + x] = larger(larger(sum[y * TX + x], sum[y * TX + x + 1]),
                                         larger(sum[(y + 1) * TX + x], sum[(y + 1) * TX + x + 1]));
    if (o->activation == RELU)
        UNROLL for (int t = 0; t < TY * TX; t++) sum[t] = activate(sum[t], RELU, 0.0f, 0.0f);
    if (by == 2) {
        UNROLL for (int y = 0; y + 1 < TY; y += 2)
            UNROLL for (int x = 0; x + 1 < TX; x += 2)
                store(target + y / 2 * row + x / 2 * LANES, sum[y * TX + x]);
    } else {
        UNROLL for (int y = 0; y < TY; y++)
            UNROLL for (int x = 0; x < TX; x++)
                store(target + y * row + x * LANES, sum[y * TX + x]);
    }
    if (o->activation == IDENTITY || o->activation == RELU) return;
    for (int y = 0; y < TY / by; y++)
        for (int x = 0; x < TX / by; x++) {
            float *at = target + y * row + x * LANES;
            store(at, finished(load(at), o));
        }
}

INLINE void visit_chunk(int TY, int TX, int SX, int CHAINS, const Operation *o, const Part *p) {
    int64_t channels = o->target.channels, row = o->stride_y * o->source.row * LANES;
    int64_t begin = p->chunk * channels, first = p->first, last = p->last;
    int ends = p->chunk == o->chunks - 1, whole = o->chunks > 1; /* one is as they are numbered */
    for (int64_t v = whole ? begin : first; v < (whole ? begin + channels : last); v++) {
        int64_t c = o->visit[v], k = o->begin[v], n = o->begin[v + 1] - k;
        if (c < first || c >= last) continue;
        if (!n && p->chunk && !ends) break; /* so have all that follow */
        float *own = p->sums + c * (TY * TX * LANES);
        vec sum[MOST];
        if (p->chunk) UNROLL for (int t = 0; t < TY * TX; t++) sum[t] = load(own + t * LANES);
        else UNROLL for (int t = 0; t < TY * TX; t++) sum[t] = broadcast(o->shift[c]);
        gather(TY, TX, SX, CHAINS, p->in, o->offset + k, o->value + k, n, row, sum);
        if (ends)
            finish(TY, TX, o, sum, p->target + c * o->target.plane * LANES,
                   p->other ? p->other + c * o->other.plane * LANES : NULL);
        else
            UNROLL for (int t = 0; t < TY * TX; t++) store(own + t * LANES, sum[t]);
    }
}

typedef void Tile(const Operation *, const Part *);

#define TILE(TY, TX, SX, CHAINS)                                                 \
    static void tile_##TY##_##TX##_##SX(const Operation *o, const Part *p) {     \
        visit_chunk(TY, TX, SX, CHAINS, o, p);                                   \
    }
TILES(TILE)

static Tile *find_tile(int64_t ty, int64_t tx, int64_t sx) {
    if (tx == 1) sx = 1; /* a tile of one column never steps along the row */
#define TILE_CASE(TY, TX, SX, CHAINS) \
    if (ty == TY && tx == TX && sx == SX) return tile_##TY##_##TX##_##SX;
    TILES(TILE_CASE)
    return NULL;
}

/* Sums of a tile are gathered chunk by chunk of the input channels, whose part of the map then
   stays in a near cache while the output channels go by.  Those with as many kept weights follow
   one another, so that the processor foresees where the loop over these ends. */
static void convolve_tiles(const Operation *o, float *space, float *sums, Span channels,
                           Span rows) {
    Tile *visit = find_tile(o->tile_y, o->tile_x, o->stride_x);
    const float *source = space + (o->source.offset + o->source.origin) * LANES;
    float *target = space + (o->target.offset + o->target.origin) * LANES;
    const float *other = space + (o->other.offset + o->other.origin) * LANES;
    /* The last tile of a row or column is moved back to end with the map. */
    for (int64_t y0 = rows.first; y0 < rows.last; y0 += o->tile_y) {
        int64_t y = y0 + o->tile_y > o->height ? o->height - o->tile_y : y0;
        for (int64_t x0 = 0; x0 < o->width; x0 += o->tile_x) {
            int64_t x = x0 + o->tile_x > o->width ? o->width - o->tile_x : x0;
            Part part = {
                source + (y * o->stride_y * o->source.row + x * o->stride_x) * LANES, sums,
                target + (y / o->pool * o->target.row + x / o->pool) * LANES,
                o->other.plane ? other + (y * o->other.row + x) * LANES : NULL, 0, channels.first,
                channels.last,
            };
            for (; part.chunk < o->chunks; part.chunk++) visit(o, &part);
        }
    }
}

/* Channels that read others than those before, as in a depthwise convolution, go over the whole map
   one after the other, and find what they read in a near cache.  Where they read the same, a team
   shares the rows, if these are enough: each then reads its part of the map alone. */
static void convolve_block(const Operation *o, float *space, float *sums, Team team) {
    Span own = {first_channel(o, o->target.channels, team.rank, team.size),
                first_channel(o, o->target.channels, team.rank + 1, team.size)};
    Span every = {0, o->target.channels}, rows = {0, o->height};
    int once = o->tile_y >= o->height && o->tile_x >= o->width;
    int64_t step = o->chunks > 1 || once ? o->target.channels : o->alike;
    if (step >= every.last && shares_rows(o->height, o->tile_y, team, &rows))
        convolve_tiles(o, space, sums, every, rows);
    else
        for (int64_t c = own.first; c < own.last; c += step)
            convolve_tiles(o, space, sums, (Span){c, c + step < own.last ? c + step : own.last},
                           rows);
    for (int64_t c = own.first; c < own.last; c++)
        clear_halo(space + (o->target.offset + c * o->target.plane) * LANES, &o->target, LANES);
}

/* ---- vectors along the positions ----------------------------------------------------------- */

/* ``more``: to what is there. */
typedef void Line(const float *, const int32_t *, const float *, int64_t, int64_t, float *);

#define LINE(N, CHAINS)                                                                   \
    static void line_##N(const float *in, const int32_t *offset, const float *value,      \
                         int64_t n, int64_t more, float *out) {                           \
        vec sum[MOST];                                                                    \
        if (more) UNROLL for (int t = 0; t < N; t++) sum[t] = load(out + t * LANES);      \
        else UNROLL for (int t = 0; t < N; t++) sum[t] = (vec){0};                        \
        gather(1, N, 1, CHAINS, in, offset, value, n, 0, sum);                            \
        UNROLL for (int t = 0; t < N; t++) store(out + t * LANES, sum[t]);                \
    }
LINES(LINE)

static Line *find_line(int64_t n) {
#define LINE_CASE(N, CHAINS) \
    if (n == N) return line_##N;
    LINES(LINE_CASE)
    return NULL;
}

static float dot(const float *in, const int32_t *offset, const float *value, int64_t n) {
    vec sum = {0};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        vec x;
        UNROLL for (int l = 0; l < LANES; l++) x[l] = in[offset[k + l]];
        sum += x * load(value + k);
    }
    float total = 0;
    for (; k < n; k++) total += in[offset[k]] * value[k];
    for (int l = 0; l < LANES; l++) total += sum[l];
    return total;
}

static void activate_line(float *line, int64_t n, const Operation *o) {
    if (o->activation == IDENTITY) return;
    for (int64_t k = 0; k < n; k += LANES) {
        if (k + LANES <= n) {
            store(line + k, finished(load(line + k), o));
        } else {
            vec v = {0};
            memcpy(&v, line + k, (size_t)(n - k) * 4);
            v = finished(v, o);
            memcpy(line + k, &v, (size_t)(n - k) * 4);
        }
    }
}

static void pool_line(const Operation *o, const float *line, float *target, float shift) {
    int64_t row = o->source.row;
    for (int64_t y = 0; y < o->target.height; y++) {
        const float *a = line + 2 * y * row, *b = a + row;
        float *to = target + y * o->target.row;
        for (int64_t x = 0; x < o->target.width; x++) {
            float p = a[2 * x], q = a[2 * x + 1], r = b[2 * x], s = b[2 * x + 1];
            p = p < q || q != q ? q : p;
            r = r < s || s != s ? s : r;
            to[x] = (p < r || r != r ? r : p) + shift;
        }
        activate_line(to, o->target.width, o);
    }
}

/* A vector may reach past its row: into what is written next, or cleared. */
static void finish_line(const Operation *o, const float *line, float *target, const float *other,
                        float shift) {
    if (o->pool == 2) {
        pool_line(o, line, target, shift);
        return;
    }
    for (int64_t y = 0; y < o->height; y++)
        for (int64_t x = 0; x < o->width; x += LANES) {
            vec v = load(line + y * o->source.row + x) + shift;
            if (o->other.plane) v += load(other + y * o->other.row + x);
            store(target + y * o->target.row + x, finished(v, o));
        }
}

static void convolve_positions(const Operation *o, float *space, float *sums, Team team) {
    int64_t first = first_channel(o, o->target.channels, team.rank, team.size);
    int64_t last = first_channel(o, o->target.channels, team.rank + 1, team.size);
    const float *source = space + o->source.offset + o->source.origin;
    float *target = space + o->target.offset + o->target.origin;
    const float *other = space + o->other.offset + o->other.origin;
    if (o->height == 1 && o->width == 1 && o->target.plane == 1) {
        for (int64_t c = first; c < last; c++) {
            int64_t k = o->begin[c];
            target[c] = dot(source, o->offset + k, o->value + k, o->begin[c + 1] - k) + o->shift[c];
            if (o->other.plane) target[c] += other[c * o->other.plane];
        }
        activate_line(target + first, last - first, o);
        return;
    }
    int64_t length = (o->height - 1) * o->source.row + o->width, channels = o->target.channels;
    int64_t step = o->tile_x * LANES;
    int64_t whole = (length + step - 1) / step * step;
    Line *add = find_line(o->tile_x);
    if (o->chunks > 1) /* as over blocks */
        for (int64_t p = 0; p < length; p += step)
            for (int64_t v = 0; v < o->chunks * channels; v++) {
                int64_t c = o->visit[v], k = o->begin[v], n = o->begin[v + 1] - k;
                if (c >= first && c < last && (n || v < channels))
                    add(source + p, o->offset + k, o->value + k, n, v >= channels,
                        sums + c * whole + p);
            }
    for (int64_t c = first; c < last; c++) {
        float *line = sums + (o->chunks > 1 ? c * whole : 0);
        if (o->chunks == 1)
            for (int64_t p = 0; p < length; p += step)
                add(source + p, o->offset + o->begin[c], o->value + o->begin[c],
                    o->begin[c + 1] - o->begin[c], 0, line + p);
        finish_line(o, line, target + c * o->target.plane, other + c * o->other.plane, o->shift[c]);
        clear_halo(space + o->target.offset + c * o->target.plane, &o->target, 1);
    }
}

/* ---- what is done element by element, in either layout -------------------------------------- */

INLINE vec combined(const Operation *o, int64_t c, vec one, vec two) {
    switch (o->kind) {
    case AFFINE: return one * o->scale[c] + o->shift[c];
    case ADDITION: return one + two;
    case DIFFERENCE: return one - two;
    default: return one * two; /* PRODUCT */
    }
}

/* target = activation(scale * source + shift), or that of source and other, number by number. */
static void combine(const Operation *o, float *space, int64_t width, Team team) {
    const Map *s = &o->source, *t = &o->target, *r = &o->other;
    int64_t first = first_channel(o, t->channels, team.rank, team.size);
    int64_t last = first_channel(o, t->channels, team.rank + 1, team.size);
    Span channels = {first, last}, rows = {0, t->height};
    if (width > 1 && shares_rows(t->height, 1, team, &rows)) channels = (Span){0, t->channels};
    int single = width == 1 && t->plane == 1, two = r->plane != 0;
    int64_t across = o->spread && t->width > 1 ? 0 : 1, down = o->spread ? 0 : r->row;
    for (int64_t c = channels.first; c < channels.last; c++) {
        const float *from = space + (s->offset + c * s->plane + s->origin) * width;
        const float *with = space + (r->offset + c * r->plane + r->origin) * width;
        float *to = space + (t->offset + c * t->plane + t->origin) * width;
        if (single) {
            *to = combined(o, c, broadcast(*from), broadcast(two ? *with : 0.0f))[0];
            continue;
        }
        for (int64_t y = rows.first; y < rows.last; y++)
            for (int64_t x = 0; x < t->width * width; x += LANES) {
                vec v = load(from + y * s->row * width + x), other = v;
                if (two && o->spread && width == 1) other = broadcast(*with);
                else if (two) other = load(with + y * down * width + x * across);
                store(to + y * t->row * width + x, finished(combined(o, c, v, other), o));
            }
        if (c >= first && c < last)
            clear_halo(space + (t->offset + c * t->plane) * width, t, width);
    }
    if (single) activate_line(space + t->offset + t->origin + first, last - first, o);
}

INLINE vec gathered(const Operation *o, vec one, vec two) {
    return o->kind == MEAN ? one + two : larger(one, two);
}

/* The maximum or mean over windows, of columns within what the window's rows make. */
static void pool(const Operation *o, float *space, float *line, int64_t width, Team team) {
    int64_t first = first_channel(o, o->target.channels, team.rank, team.size);
    int64_t last = first_channel(o, o->target.channels, team.rank + 1, team.size);
    const Map *s = &o->source, *t = &o->target;
    const int32_t *rows = o->window, *columns = rows + 3 * t->height;
    for (int64_t c = first; c < last; c++) {
        const float *from = space + (s->offset + c * s->plane + s->origin) * width;
        float *to = space + (t->offset + c * t->plane + t->origin) * width;
        for (int64_t y = 0; y < t->height; y++) {
            for (int64_t x = 0; x < s->width * width; x += LANES) {
                vec v = load(from + rows[3 * y] * s->row * width + x);
                for (int64_t i = rows[3 * y] + 1; i < rows[3 * y + 1]; i++)
                    v = gathered(o, v, load(from + i * s->row * width + x));
                store(line + x, v);
            }
            for (int64_t x = 0; x < t->width; x++) {
                const int32_t *window = columns + 3 * x;
                float by = (float)rows[3 * y + 2] * (float)window[2];
                float *out = to + (y * t->row + x) * width;
                if (width == 1) {
                    float best = line[window[0]];
                    for (int64_t i = window[0] + 1; i < window[1]; i++) {
                        float v = line[i];
                        if (o->kind == MEAN) best += v;
                        else best = best < v || v != v ? v : best;
                    }
                    *out = o->kind == MEAN ? best / by : best;
                    continue;
                }
                for (int64_t l = 0; l < width; l += LANES) {
                    vec v = load(line + window[0] * width + l);
                    for (int64_t i = window[0] + 1; i < window[1]; i++)
                        v = gathered(o, v, load(line + i * width + l));
                    store(out + l, o->kind == MEAN ? v / by : v);
                }
            }
        }
        clear_halo(space + (t->offset + c * t->plane) * width, t, width);
    }
}

/* The channels of source, then those of other; what lies in the target already stays there. */
static void join(const Operation *o, float *space, int64_t width, Team team) {
    const Map *t = &o->target, *parts[] = {&o->source, &o->other};
    int64_t before = 0;
    for (int p = 0; p < 2; before += parts[p++]->channels) {
        const Map *s = parts[p];
        int64_t place = t->offset + before * t->plane;
        if (s->offset == place) continue;
        int64_t first = s->channels * team.rank / team.size;
        int64_t last = s->channels * (team.rank + 1) / team.size;
        for (int64_t c = first; c < last; c++) {
            const float *from = space + (s->offset + c * s->plane + s->origin) * width;
            float *plane = space + (place + c * t->plane) * width, *to = plane + t->origin * width;
            for (int64_t y = 0; y < t->height; y++)
                memcpy(to + y * t->row * width, from + y * s->row * width,
                       (size_t)(t->width * width) * 4);
            clear_halo(plane, t, width);
        }
    }
}

/* Channel c's positions (y, x) with y = i, x = j modulo the stride become channel (c, i, j). */
static void split(const Operation *o, float *space, Team team) {
    const Map *s = &o->source, *t = &o->target;
    int64_t first = s->channels * team.rank / team.size;
    int64_t last = s->channels * (team.rank + 1) / team.size;
    int64_t sy = o->stride_y, sx = o->stride_x;
    for (int64_t c = first; c < last; c++)
        for (int64_t i = 0; i < sy; i++)
            for (int64_t j = 0; j < sx; j++) {
                const float *from = space + s->offset + c * s->plane + s->origin;
                float *to = space + t->offset + ((c * sy + i) * sx + j) * t->plane + t->origin;
                int64_t width = (s->width - j + sx - 1) / sx, height = (s->height - i + sy - 1) / sy;
                for (int64_t y = 0; y < t->height; y++) {
                    const float *row = from + (y * sy + i) * s->row + j;
                    float *out = to + y * t->row;
                    int64_t inside = y < height ? width : 0;
                    if (sx == 2) for (int64_t x = 0; x < inside; x++) out[x] = row[2 * x];
                    else for (int64_t x = 0; x < inside; x++) out[x] = row[x * sx];
                    for (int64_t x = inside; x < t->width; x++) out[x] = 0.0f;
                }
                clear_halo(to - t->origin, t, 1);
            }
}

/* ---- between tensors (n, channels, height, width) and maps ---------------------------------- */

static void read_tensor(const Operation *o, const float *tensor, float *space, int64_t images,
                        int64_t width, Team team) {
    const Map *t = &o->target;
    int64_t one = t->channels * t->height * t->width;
    int64_t first = t->channels * team.rank / team.size;
    int64_t last = t->channels * (team.rank + 1) / team.size;
    if (width == 1 && t->plane == 1) {
        memcpy(space + t->offset + first, tensor + first, (size_t)(last - first) * 4);
        return;
    }
    for (int64_t c = first; c < last; c++) {
        for (int64_t y = 0; y < t->height; y++) {
            const float *from = tensor + (c * t->height + y) * t->width;
            float *to = space + (t->offset + c * t->plane + t->origin + y * t->row) * width;
            if (width == 1) {
                memcpy(to, from, (size_t)t->width * 4);
            } else if (images == LANES) {
                for (int64_t x = 0; x < t->width; x++)
                    for (int64_t l = 0; l < LANES; l++) to[x * LANES + l] = from[l * one + x];
            } else {
                for (int64_t x = 0; x < t->width; x++)
                    for (int64_t l = 0; l < LANES; l++)
                        to[x * LANES + l] = l < images ? from[l * one + x] : 0.0f;
            }
        }
        clear_halo(space + (t->offset + c * t->plane) * width, t, width);
    }
}

static void write_tensor(const Operation *o, float *tensor, const float *space, int64_t images,
                         int64_t width, Team team) {
    const Map *s = &o->source;
    int64_t one = s->channels * s->height * s->width;
    int64_t first = s->channels * team.rank / team.size;
    int64_t last = s->channels * (team.rank + 1) / team.size;
    for (int64_t c = first; c < last; c++)
        for (int64_t y = 0; y < s->height; y++) {
            float *to = tensor + (c * s->height + y) * s->width;
            const float *from = space + (s->offset + c * s->plane + s->origin + y * s->row) * width;
            for (int64_t l = 0; l < images; l++)
                for (int64_t x = 0; x < s->width; x++) to[l * one + x] = from[x * width + l];
        }
}

/* ---- rows of features ----------------------------------------------------------------------- */

/* The sums of channels over V vectors of rows, chunk by chunk of the inputs. CHAINS: as of a tile. */
INLINE void linear(int V, int CHAINS, const Operation *o, float *space, int64_t first,
                   int64_t last) {
    const float *source = space + o->source.offset * ROWS;
    float *target = space + o->target.offset * ROWS;
    const float *other = o->other.plane ? space + o->other.offset * ROWS : NULL;
    int64_t channels = o->target.channels, ending = (o->chunks - 1) * channels;
    for (int64_t i = 0; i < ending + channels; i++) {
        int64_t c = o->visit[i], k = o->begin[i], n = o->begin[i + 1] - k;
        if (c < first || c >= last || (!n && i >= channels && i < ending)) continue;
        float *to = target + c * ROWS;
        vec sum[MOST];
        if (i >= channels) UNROLL for (int v = 0; v < V; v++) sum[v] = load(to + v * LANES);
        else UNROLL for (int v = 0; v < V; v++) sum[v] = broadcast(o->shift[c]);
        gather(1, V, 1, CHAINS, source, o->offset + k, o->value + k, n, 0, sum);
        if (i >= ending && other)
            UNROLL for (int v = 0; v < V; v++) sum[v] += load(other + c * ROWS + v * LANES);
        if (i >= ending && o->activation == RELU)
            UNROLL for (int v = 0; v < V; v++) sum[v] = activate(sum[v], RELU, 0.0f, 0.0f);
        UNROLL for (int v = 0; v < V; v++) store(to + v * LANES, sum[v]);
        if (i < ending || o->activation == IDENTITY || o->activation == RELU) continue;
        for (int v = 0; v < V; v++) store(to + v * LANES, finished(load(to + v * LANES), o));
    }
}

static void multiply_rows(const Operation *o, float *space, int64_t rows, Team team) {
    int64_t first = first_channel(o, o->target.channels, team.rank, team.size);
    int64_t last = first_channel(o, o->target.channels, team.rank + 1, team.size);
    switch ((rows + LANES - 1) / LANES) {
    case 1: linear(1, 4, o, space, first, last); break;
    case 2: linear(2, 4, o, space, first, last); break;
    case 3: linear(3, 2, o, space, first, last); break;
    case 4: linear(4, 2, o, space, first, last); break;
    case 5: linear(5, 1, o, space, first, last); break;
    case 6: linear(6, 1, o, space, first, last); break;
    case 7: linear(7, 1, o, space, first, last); break;
    default: linear(ROW_VECTORS, 1, o, space, first, last);
    }
}

/* The first, or second, halves of two vectors, their numbers in turn. */
#if LANES == 16
#define FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST 0, 4, 1, 5
#define SECOND 2, 6, 3, 7
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICKED(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Each round moves the first bit of a number's place (vector, lane) to its end. */
INLINE void transpose(vec *a) {
    for (int size = LANES; size > 1; size /= 2) {
        vec b[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = PICKED(a[i], a[i + LANES / 2], FIRST);
            b[2 * i + 1] = PICKED(a[i], a[i + LANES / 2], SECOND);
        }
        UNROLL for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
}

/* Between a matrix (rows, channels) and a map. Blocks of LANES channels; the last one is moved back
   to end with them. Rows beyond the last are 0 in the map. */
static void move_rows(int reads, const Map *m, float *matrix, float *space, int64_t rows,
                      Team team) {
    int64_t channels = m->channels, first = channels * team.rank / team.size;
    int64_t last = channels * (team.rank + 1) / team.size;
    for (int64_t row = 0; row < rows; row += LANES) {
        int64_t n = rows - row < LANES ? rows - row : LANES;
        for (int64_t c0 = first; c0 < last; c0 += LANES) {
            int64_t c = c0 + LANES <= last || last - first < LANES ? c0 : last - LANES;
            float *outside = matrix + row * channels + c;
            float *inside = space + (m->offset + c) * ROWS + row;
            vec a[LANES];
            if (last - c < LANES) {
                for (int64_t j = 0; j < last - c; j++)
                    for (int64_t l = 0; l < LANES; l++) {
                        if (reads) inside[j * ROWS + l] = l < n ? outside[l * channels + j] : 0.0f;
                        else if (l < n) outside[l * channels + j] = inside[j * ROWS + l];
                    }
            } else if (reads) {
                UNROLL for (int l = 0; l < LANES; l++)
                    a[l] = l < n ? load(outside + l * channels) : (vec){0};
                transpose(a);
                UNROLL for (int l = 0; l < LANES; l++) store(inside + l * ROWS, a[l]);
            } else {
                UNROLL for (int l = 0; l < LANES; l++) a[l] = load(inside + l * ROWS);
                transpose(a);
                UNROLL for (int l = 0; l < LANES; l++)
                    if (l < n) store(outside + l * channels, a[l]);
            }
        }
    }
}

#include "token_kernels.h"

/* ---- the whole plan ------------------------------------------------------------------------- */

/* An operation on a block of rows, piece by piece where it may be. */
static void run_rows(const Job *job, const Operation *o, const Block *b, int64_t image,
                     float *space, float *scratch, Team team) {
    int64_t each = o->single ? 1 : b->tokens, rows = b->examples * each;
    if (o->kind == ATTENTION) attend(o, b, space, scratch, team);
    if (o->kind == TOKEN || o->kind == TOKEN_MEAN) reduce_tokens(o, b, space, scratch, team);
    for (int64_t row = 0; row < rows; row += ROWS, space += job->room) {
        int64_t n = rows - row < ROWS ? rows - row : ROWS;
        switch (o->kind) {
        case CONVOLUTION: multiply_rows(o, space, n, team); break;
        case AFFINE:
        case ADDITION:
        case DIFFERENCE:
        case PRODUCT: combine(o, space, ROWS, team); break;
        case JOIN: join(o, space, ROWS, team); break;
        case NORM:
        case ROOT_NORM: norm(o, space, ROWS, (n + LANES - 1) / LANES, team); break;
        case TOKEN_SHIFT: shift_tokens(o, b, space, row, n, team); break;
        case PATCHES: {
            int64_t one = o->source.channels / (o->stride_y * o->stride_x) * o->height * o->width;
            read_patches(o, b, job->tensors[o->tensor] + image * one, space, row, n, team);
            break;
        }
        case READ:
        case WRITE: {
            float *matrix = job->tensors[o->tensor] + (image * each + row) * o->source.channels;
            move_rows(o->kind == READ, &o->source, matrix, space, n, team);
            break;
        }
        }
    }
}

static void run_block(const Job *job, int64_t block, float *space, float *scratch, Team team) {
    int64_t width = job->vectors ? job->vectors * LANES : 1, image = block * job->together;
    int64_t images = job->images - image < job->together ? job->images - image : job->together;
    Block rows = {images, job->tokens, job->room};
    for (int64_t k = 0; k < job->count; k++) {
        const Operation *o = &job->operations[k];
        if (job->vectors > 1) {
            run_rows(job, o, &rows, image, space, scratch, team);
            if (team.size > 1) job->threads->barrier();
            continue;
        }
        switch (o->kind) {
        case CONVOLUTION:
            if (job->vectors) convolve_block(o, space, scratch, team);
            else convolve_positions(o, space, scratch, team);
            break;
        case AFFINE:
        case ADDITION:
        case DIFFERENCE:
        case PRODUCT: combine(o, space, width, team); break;
        case MAXIMUM:
        case MEAN: pool(o, space, scratch, width, team); break;
        case JOIN: join(o, space, width, team); break;
        case SPLIT: split(o, space, team); break;
        case NORM:
        case ROOT_NORM: norm_map(o, space, width, team); break;
        case READ:
        case WRITE: {
            float *tensor = job->tensors[o->tensor] + image * o->source.channels *
                                                          o->source.height * o->source.width;
            if (o->kind == READ) read_tensor(o, tensor, space, images, width, team);
            else write_tensor(o, tensor, space, images, width, team);
            break;
        }
        }
        if (team.size > 1) job->threads->barrier();
    }
}

/* Threads take whole blocks as long as there is one for each; the rest they share. */
static void work(void *data) {
    Job *job = data;
    int64_t rank = job->threads ? job->threads->rank() : 0;
    int64_t size = job->threads ? job->threads->size() : 1;
    int64_t blocks = (job->images + job->together - 1) / job->together;
    int64_t alone = blocks / size * size, maps = job->pieces * job->room;
    float *own = job->workspace + rank * (maps + job->scratch);
    for (;;) {
        int64_t block = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (block >= alone) break;
        run_block(job, block, own, own + maps, (Team){0, 1});
    }
    if (alone == blocks) return;
    job->threads->barrier(); /* size is over 1 here: one thread leaves no rest */
    for (int64_t block = alone; block < blocks; block++)
        run_block(job, block, job->workspace, own + maps, (Team){rank, size});
}

/* Run the operations on ``images`` images, ``together`` to a block, of which rows have so many
   tokens each.  The workspace has pieces * room + scratch numbers a thread. */
EXPORTED void run(const Operation *operations, int64_t count, float *const *tensors, int64_t images,
                  int64_t tokens, int64_t together, int64_t vectors, float *workspace, int64_t room,
                  int64_t scratch, int64_t size, const Threads *threads) {
    Job job = {.operations = operations, .count = count, .images = images, .tokens = tokens,
               .together = together, .vectors = vectors, .scratch = scratch, .room = room,
               .tensors = tensors, .workspace = workspace, .pieces = 1};
    if (vectors > 1) job.pieces = (together * tokens + ROWS - 1) / ROWS;
    if (size > 1 && threads) {
        job.threads = threads;
        threads->parallel(work, &job, (unsigned)size, 0);
    } else {
        work(&job);
    }
}
