/* Rows that know of each other: tokens of examples, and norms over a row's features.

   A block is whole examples, one after the other; its rows, ROWS of them, are a piece.  Each piece
   has all maps at the same places, ``room`` numbers apart, so that a linear layer's offsets are
   those of any piece.  An example may begin and end anywhere, and go on in the next piece. */

typedef struct {
    int64_t examples, tokens; /* of each */
    int64_t room;             /* of a piece */
} Block;

/* A tile of attention: several keys, or channels of the values, times vectors of queries. */
#define QUERIES (LANES == 16 ? 4 : 2)
#define KEYS 6
#define CHUNK (QUERIES * LANES)
#define LOWEST -3.4028234e38f
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))
#define PIECE(m, c) (((m)->offset + (c)) * ROWS)

/* 1 / sqrt(v) for normal v > 0: a guess from the bits of v, then Newton's steps. */
INLINE vec inverse_root(vec v) {
    vec y = (vec)(0x5f3759df - ((ivec)v >> 1));
    UNROLL for (int i = 0; i < 4; i++) y = y * (1.5f - 0.5f * v * y * y);
    return choose((ivec)(v > -LOWEST), (vec){0}, y);
}

/* ---- layer norm ----------------------------------------------------------------------------- */

/* The sums over channels of V vectors of numbers less a mean, and of their squares; in parts, so
   that small numbers are not lost in a long sum. */
INLINE void sums(int V, const float *from, int64_t step, int64_t n, const vec *mean, vec *total,
                 vec *squares) {
    UNROLL for (int v = 0; v < V; v++) total[v] = squares[v] = (vec){0};
    for (int64_t c = 0; c < n;) {
        int64_t end = n - c < 64 ? n : c + 64;
        vec part[QUERIES], square[QUERIES];
        UNROLL for (int v = 0; v < V; v++) part[v] = square[v] = (vec){0};
        for (; c < end; c++)
            UNROLL for (int v = 0; v < V; v++) {
                vec x = load(from + c * step + v * LANES) - mean[v];
                part[v] += x;
                square[v] += x * x;
            }
        UNROLL for (int v = 0; v < V; v++) total[v] += part[v], squares[v] += square[v];
    }
}

/* The mean is found twice: what rounding left of it the second sum tells. */
INLINE void norm_vectors(int V, const Operation *o, const float *from, int64_t step, float *to,
                         int64_t far) {
    int64_t n = o->source.channels;
    float share = 1.0f / (float)n, epsilon = (float)o->number;
    vec mean[QUERIES], rest[QUERIES], root[QUERIES], none[QUERIES];
    UNROLL for (int v = 0; v < V; v++) mean[v] = none[v] = (vec){0};
    if (o->kind == NORM) {
        sums(V, from, step, n, none, mean, root);
        UNROLL for (int v = 0; v < V; v++) mean[v] *= share;
    }
    sums(V, from, step, n, mean, rest, root);
    UNROLL for (int v = 0; v < V; v++) {
        rest[v] = o->kind == NORM ? rest[v] * share : none[v];
        root[v] = inverse_root(root[v] * share - rest[v] * rest[v] + epsilon);
    }
    for (int64_t c = 0; c < n; c++) {
        vec scale = broadcast(o->scale[c]), shift = broadcast(o->shift[c]);
        UNROLL for (int v = 0; v < V; v++) {
            vec x = (load(from + c * step + v * LANES) - mean[v] - rest[v]) * root[v];
            store(to + c * far + v * LANES, x * scale + shift);
        }
    }
}

/* Over elements of so many vectors, of ``width`` numbers. */
static void norm(const Operation *o, float *space, int64_t width, int64_t vectors, Team team) {
    const Map *s = &o->source, *t = &o->target;
    const float *from = space + (s->offset + s->origin) * width;
    float *to = space + (t->offset + t->origin) * width;
    int64_t step = s->plane * width, far = t->plane * width;
    int64_t v = vectors * team.rank / team.size, last = vectors * (team.rank + 1) / team.size;
    for (; v + QUERIES <= last; v += QUERIES)
        norm_vectors(QUERIES, o, from + v * LANES, step, to + v * LANES, far);
    for (; v < last; v++) norm_vectors(1, o, from + v * LANES, step, to + v * LANES, far);
}

/* Of one row, whose numbers lie ``plane`` apart. */
static void norm_line(const Operation *o, float *space, Team team) {
    const Map *s = &o->source, *t = &o->target;
    if (team.rank) return;
    const float *from = space + s->offset + s->origin;
    float *to = space + t->offset + t->origin;
    int64_t n = s->channels;
    float mean = 0, rest = 0, square = 0;
    for (int64_t c = 0; c < n && o->kind == NORM; c++) mean += from[c * s->plane] / (float)n;
    for (int64_t c = 0; c < n; c++) {
        float x = from[c * s->plane] - mean;
        rest += x / (float)n;
        square += x * x / (float)n;
    }
    if (o->kind == ROOT_NORM) rest = 0;
    float root = inverse_root(broadcast(square - rest * rest + (float)o->number))[0];
    for (int64_t c = 0; c < n; c++)
        to[c * t->plane] = (from[c * s->plane] - mean - rest) * root * o->scale[c] + o->shift[c];
}

/* At each position of a map. A vector may reach past its row, into what one thread writes next. */
static void norm_map(const Operation *o, float *space, int64_t width, Team team) {
    const Map *s = &o->source, *t = &o->target;
    if (width == 1 && t->height == 1 && t->width == 1) {
        norm_line(o, space, team);
        return;
    }
    int64_t n = t->width * width, size = width == 1 ? 1 : team.size;
    int64_t y = t->height * team.rank / size, last = t->height * (team.rank + 1) / size;
    if (team.rank >= size) return;
    for (; y < last; y++) {
        const float *from = space + (s->offset + s->origin + y * s->row) * width;
        float *to = space + (t->offset + t->origin + y * t->row) * width;
        int64_t step = s->plane * width, far = t->plane * width, x = 0;
        for (; x + QUERIES * LANES <= n; x += QUERIES * LANES)
            norm_vectors(QUERIES, o, from + x, step, to + x, far);
        for (; x < n; x += LANES) norm_vectors(1, o, from + x, step, to + x, far);
    }
    for (int64_t c = t->channels * team.rank / size; c < t->channels * (team.rank + 1) / size; c++)
        clear_halo(space + (t->offset + c * t->plane) * width, t, width);
}

/* ---- tokens of examples --------------------------------------------------------------------- */

/* So many rows of a channel from ``row`` on, which may cross pieces, as numbers in a line; these
   end with a whole vector. */
INLINE void take(float *line, const float *channel, int64_t room, int64_t row, int64_t n) {
    while (n > 0) {
        const float *at = channel + row / ROWS * room + row % ROWS;
        int64_t part = ROWS - row % ROWS;
        if (part > n) part = n;
        for (int64_t k = 0; k < part; k += LANES) store(line + k, load(at + k));
        line += part, row += part, n -= part;
    }
}

/* The other way: no other row is written, as another thread may do that. */
INLINE void put(const float *line, float *channel, int64_t room, int64_t row, int64_t n) {
    while (n > 0) {
        float *at = channel + row / ROWS * room + row % ROWS;
        int64_t part = ROWS - row % ROWS, k = 0;
        if (part > n) part = n;
        for (; k + LANES <= part; k += LANES) store(at + k, load(line + k));
        for (; k < part; k++) at[k] = line[k];
        line += part, row += part, n -= part;
    }
}

/* Lines of ``size`` numbers of so many channels.  What lies beyond n of them is never used. */
static void fetch(float *lines, int64_t size, const Map *m, int64_t channel, int64_t channels,
                  const float *space, const Block *b, int64_t row, int64_t n) {
    for (int64_t c = 0; c < channels; c++)
        take(lines + c * size, space + PIECE(m, channel + c), b->room, row, n);
}

/* out[r][queries] = sum over i < n of left[r * down + i * along] * right[i][queries], for KEYS rows
   r and V vectors of queries. */
INLINE void multiply(int V, const float *left, int64_t down, int64_t along, const float *right,
                     int64_t n, float *out) {
    vec sum[KEYS * QUERIES];
    UNROLL for (int t = 0; t < KEYS * V; t++) sum[t] = (vec){0};
    for (int64_t i = 0; i < n; i++) {
        vec x[QUERIES];
        UNROLL for (int v = 0; v < V; v++) x[v] = load(right + i * CHUNK + v * LANES);
        UNROLL for (int r = 0; r < KEYS; r++) {
            vec w = broadcast(left[r * down + i * along]);
            UNROLL for (int v = 0; v < V; v++) sum[r * V + v] += w * x[v];
        }
    }
    UNROLL for (int r = 0; r < KEYS; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * CHUNK + v * LANES, sum[r * V + v]);
}

/* Scores of keys (rows) and queries become exp(score - their maximum), for scores times ``scale``
   and plus a number a key, where there is a ``bias``; ``inverse`` is 1 over the sums of these.
   Where causal, a query ``first`` + i has no key beyond its own.  What has no key at all is 0. */
INLINE void weigh(int V, float *scores, int64_t keys, float scale, const float *bias,
                  int64_t causal, int64_t first, float *inverse) {
    vec most[QUERIES], total[QUERIES];
    ivec place;
    for (int l = 0; l < LANES; l++) place[l] = l;
    UNROLL for (int v = 0; v < V; v++) {
        most[v] = broadcast(LOWEST);
        total[v] = (vec){0};
    }
    for (int64_t j = 0; j < keys; j++)
        UNROLL for (int v = 0; v < V; v++) {
            float *at = scores + j * CHUNK + v * LANES;
            vec s = load(at);
            if (bias) s = s * scale + bias[j];
            if (causal && j > first)
                s = choose(place + (int32_t)(first + v * LANES - j) >= 0, s, broadcast(-3e38f));
            if (bias || (causal && j > first)) store(at, s);
            most[v] = larger(most[v], s);
        }
    if (bias) scale = 1.0f;
    for (int64_t j = 0; j < keys; j++)
        UNROLL for (int v = 0; v < V; v++) {
            float *at = scores + j * CHUNK + v * LANES;
            vec x = (load(at) - most[v]) * scale;
            ivec power;
            vec w = exponential_minus_1(x, &power) + 1.0f;
            w = choose((ivec)(x < -87.0f), (vec){0}, w * power_of_two(power));
            total[v] += w;
            store(at, w);
        }
    UNROLL for (int v = 0; v < V; v++)
        store(inverse + v * LANES, choose((ivec)(total[v] == 0.0f), total[v], 1.0f / total[v]));
}

typedef struct {
    float *keys, *values, *bias, *queries, *scores, *mixed, *inverse;
} Lines;

/* A chunk of the queries of one head, in V vectors: what is mixed for them, in ``lines.mixed``. */
INLINE void attend_chunk(int V, const Operation *o, Lines lines, int64_t tokens, int64_t first) {
    int64_t size = UP(tokens, KEYS), seen = tokens;
    if (o->causal && first + CHUNK < tokens) seen = first + CHUNK;
    for (int64_t j = 0; j < seen; j += KEYS)
        multiply(V, lines.keys + j, 1, size, lines.queries, o->size, lines.scores + j * CHUNK);
    weigh(V, lines.scores, seen, (float)o->number, o->bias.plane ? lines.bias : NULL, o->causal,
          first, lines.inverse);
    for (int64_t c = 0; c < o->value_size; c += KEYS) {
        float *out = lines.mixed + c * CHUNK;
        multiply(V, lines.values + c * size, size, 1, lines.scores, seen, out);
        UNROLL for (int r = 0; r < KEYS; r++)
            UNROLL for (int v = 0; v < V; v++) {
                float *at = out + r * CHUNK + v * LANES;
                store(at, load(at) * load(lines.inverse + v * LANES));
            }
    }
}

/* softmax(scale * q k^T + bias) v for each head of each example.  A team shares chunks of queries. */
static void attend(const Operation *o, const Block *b, float *space, float *scratch, Team team) {
    int64_t t = b->tokens, size = UP(t, KEYS), chunks = (t + CHUNK - 1) / CHUNK;
    int64_t units = b->examples * o->heads * chunks, last = -1;
    Lines lines = {.keys = scratch};
    lines.values = lines.keys + o->size * size;
    lines.bias = lines.values + UP(o->value_size, KEYS) * size;
    lines.queries = lines.bias + size;
    lines.scores = lines.queries + o->size * CHUNK;
    lines.mixed = lines.scores + size * CHUNK;
    lines.inverse = lines.mixed + UP(o->value_size, KEYS) * CHUNK;
    for (int64_t u = units * team.rank / team.size; u < units * (team.rank + 1) / team.size; u++) {
        int64_t example = u / chunks / o->heads, head = u / chunks % o->heads;
        int64_t own = head * o->key_heads / o->heads, row = example * t;
        int64_t first = u % chunks * CHUNK, n = t - first < CHUNK ? t - first : CHUNK;
        if (u / chunks != last) {
            fetch(lines.keys, size, &o->other, o->key + own * o->size, o->size, space, b, row,
                  t);
            fetch(lines.values, size, &o->third, o->values + own * o->value_size, o->value_size, space, b,
                  row, t);
            if (o->bias.plane) fetch(lines.bias, size, &o->bias, 0, 1, space, b, row, t);
            last = u / chunks;
        }
        fetch(lines.queries, CHUNK, &o->source, o->query + head * o->size, o->size, space, b,
              row + first, n);
        switch ((n + LANES - 1) / LANES) {
        case 1: attend_chunk(1, o, lines, t, first); break;
#if LANES == 16
        case 2: attend_chunk(2, o, lines, t, first); break;
        case 3: attend_chunk(3, o, lines, t, first); break;
#endif
        default: attend_chunk(QUERIES, o, lines, t, first);
        }
        for (int64_t c = 0; c < o->value_size; c++)
            put(lines.mixed + c * CHUNK, space + PIECE(&o->target, head * o->value_size + c),
                b->room, row + first, n);
    }
}

/* One row an example: the mean over its tokens, or the token at a place, counted from the end where
   that is below 0. */
static void reduce_tokens(const Operation *o, const Block *b, float *space, float *line,
                          Team team) {
    int64_t first = first_channel(o, o->target.channels, team.rank, team.size);
    int64_t last = first_channel(o, o->target.channels, team.rank + 1, team.size);
    int64_t t = b->tokens, place = o->place < 0 ? o->place + t : o->place;
    for (int64_t c = first; c < last; c++) {
        const float *from = space + PIECE(&o->source, c);
        float *to = space + PIECE(&o->target, c);
        for (int64_t e = 0; e < b->examples; e++) {
            if (o->kind == TOKEN) {
                to[e] = from[(e * t + place) / ROWS * b->room + (e * t + place) % ROWS];
                continue;
            }
            take(line, from, b->room, e * t, t);
            memset(line + t, 0, (size_t)(UP(t, LANES) - t) * 4);
            vec sum = {0};
            for (int64_t k = 0; k < t; k += LANES) sum += load(line + k);
            float total = 0;
            for (int l = 0; l < LANES; l++) total += sum[l];
            to[e] = total / (float)t;
        }
    }
}

/* Adds a number of each channel and token, which all examples share. */
static void shift_tokens(const Operation *o, const Block *b, float *piece, int64_t begin, int64_t n,
                         Team team) {
    int64_t first = first_channel(o, o->target.channels, team.rank, team.size);
    int64_t last = first_channel(o, o->target.channels, team.rank + 1, team.size);
    for (int64_t c = first; c < last; c++) {
        const float *from = piece + PIECE(&o->source, c), *shift = o->shift + c * b->tokens;
        float *to = piece + PIECE(&o->target, c);
        for (int64_t k = 0; k < n;) {
            int64_t token = (begin + k) % b->tokens, part = b->tokens - token;
            if (part > n - k) part = n - k;
            for (int64_t i = 0; i < part; i++) to[k + i] = from[k + i] + shift[token + i];
            k += part;
        }
    }
}

/* The numbers of patches of images, channel by channel; those of the first tokens are 0. */
static void read_patches(const Operation *o, const Block *b, const float *images, float *piece,
                         int64_t begin, int64_t n, Team team) {
    int64_t height = o->stride_y, width = o->stride_x, across = o->width / width;
    int64_t channels = o->target.channels / (height * width), area = o->height * o->width;
    for (int64_t k = n * team.rank / team.size; k < n * (team.rank + 1) / team.size; k++) {
        int64_t example = (begin + k) / b->tokens, token = (begin + k) % b->tokens - o->place;
        int64_t place = token / across * height * o->width + token % across * width;
        const float *image = images + example * channels * area + (token < 0 ? 0 : place);
        float *to = piece + PIECE(&o->target, 0) + k;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t y = 0; y < height; y++)
                for (int64_t x = 0; x < width; x++, to += ROWS)
                    *to = token < 0 ? 0.0f : image[c * area + y * o->width + x];
    }
}
