/* Whole epochs of stochastic gradient descent over the surviving weights of many multilayer
 * perceptrons, and the evaluation of their losses. A block of threads takes a network for a part of
 * the epoch, then whichever is next.
 *
 * All that a step touches lies in the block's shared memory: weights, their gradients, where they
 * are, and the activations of a panel of examples. Images are read as bytes, through the cache. An
 * activation is a row of examples, four to a lane, so that a surviving weight is one number times a
 * row. A warp takes a unit at a time (forward, and the gradient of its output), or eight weights
 * (their gradients), whose sums over the lanes are taken together.
 *
 * Sums are taken in an order that depends on the network and the batch alone: an epoch repeated is
 * the same to the bit, whichever networks train beside it and whichever block takes them.
 *
 * Compiled for LAYERS layers. CHANNELS is 1 where all pixels have one factor and offset. Where
 * IN_SHARED is 0 the activations, too many for shared memory, lie in `scratch`. Also given by the
 * build: EACH examples of a lane, the bytes of a word; PANEL = WARP EACH examples that are computed
 * together, at most; TOGETHER weights whose gradients a warp sums together, 8.
 *
 * Notation: z = W x + b, a = f(z), d the loss's gradient of z; o output, i input, k position among
 * a layer's surviving weights, e example. */
#include "lossprune.h"

#define WARP 32
#define AHEAD 4 /* words of pixels that are asked for before one is used */
#define ALL 0xffffffffu
#define DEVICE __device__ static inline
static_assert(PANEL == WARP * EACH, "a panel is a warp's");

/* What a network's integers begin with, for each layer. Positions are in the integers, in the
 * values, and in rows of activations. */
struct Layer {
    int outputs, inputs, weights, activation, has_bias;
    int row_start, column, row;               /* by output: (outputs + 1), (weights) twice, the */
                                              /* last repeated up to a multiple of TOGETHER */
    int column_start, by_input_row, by_input; /* by input: (inputs + 1), (weights) twice; not of */
    int weight, bias, unit;                   /* the first layer, whose inputs have no gradient */
};
MIRRORED(Layer)

/* Where a network's parts lie in the tensors of all. */
struct Place {
    long long integers, integer_count, values, value_count, idle, idle_count;
};
MIRRORED(Place)

/* Images and labels, put in panels' order by the caller. */
struct Data {
    const unsigned *images; /* (groups, parts, pixels, words): bytes of 4 examples a word */
    const int *labels;      /* (groups, parts, 4 words) */
    const float2 *affine;   /* (groups, pixels): factor and offset, x = byte factor - offset */
    int pixels, words, parts;
};
MIRRORED(Data)

struct Descent {
    const float *rates, *decays; /* (blocks) */
    float momentum;
};
MIRRORED(Descent)

/* A block at work on one panel. */
struct Panel {
    const int *integer;
    const float *value;
    float *gradient, *loss, *sum, *activation; /* sum: of each row of the first layer's d */
    const unsigned *image; /* of the lane: the word of pixel p is image[p * words] */
    const float2 *affine;
    int words, row;        /* of an image's row; numbers in a row of activations */
    int lane, column;      /* column: the lane's four examples; beyond the panel, those of another */
    int warp, warps;
    bool inside, add;      /* inside: not beyond it; add: gradients to those of panels before */
};

DEVICE const Layer &layer_of(const Panel &p, int l) { return ((const Layer *)p.integer)[l]; }

DEVICE float4 &row_of(const Panel &p, int unit) {
    return ((float4 *)(p.activation + unit * p.row))[p.column];
}

/* A byte of a word as a number: put behind the digits of 2^23, which are then taken away. */
DEVICE float byte_of(unsigned word, int which) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 | which)) - 8388608.0f;
}

DEVICE float4 bytes_of(unsigned word) {
    return make_float4(byte_of(word, 0), byte_of(word, 1), byte_of(word, 2), byte_of(word, 3));
}

DEVICE void add_product(float4 &sum, float w, const float4 x) {
    sum.x += w * x.x;
    sum.y += w * x.y;
    sum.z += w * x.z;
    sum.w += w * x.w;
}

DEVICE float dot(const float4 a, const float4 b) {
    return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
}

/* NaN stays NaN. */
DEVICE float tanh_(float x) {
    x = fabsf(x) > TANH_LIMIT ? copysignf(TANH_LIMIT, x) : x;
    const float y = x * x;
    float p = y * TANH_P4 + TANH_P3;
    p = p * y + TANH_P2;
    p = p * y + TANH_P1;
    p = p * y + 1.0f;
    float q = y * TANH_Q4 + TANH_Q3;
    q = q * y + TANH_Q2;
    q = q * y + TANH_Q1;
    q = q * y + 1.0f;
    const float t = __fdividef(x * p, q);
    return fabsf(t) > 1.0f ? copysignf(1.0f, t) : t;
}

DEVICE float activate(float z, int activation) {
    if (activation == TANH) return tanh_(z);
    if (activation == RELU) return z < 0.0f ? 0.0f : z; /* NaN stays NaN */
    return z;
}

/* The gradient before an activation, f' told by a = f(z). */
DEVICE float through(float d, float a, int activation) {
    if (activation == TANH) return d * (1.0f - a * a);
    if (activation == RELU) return a <= 0.0f ? 0.0f : d;
    return d;
}

DEVICE float sum_over_lanes(float part) {
    for (int apart = WARP / 2; apart; apart /= 2) part += __shfl_xor_sync(ALL, part, apart);
    return part;
}

/* The sums of eight numbers over the lanes, that of the j-th in lane 4 j. Of what a lane still has
 * it keeps one half and gives the other away. */
DEVICE float sums_over_lanes(float *part, int lane) {
#pragma unroll
    for (int round = 0; round < 3; round++) {
        const int half = TOGETHER / 2 >> round, apart = WARP / 2 >> round;
        const bool upper = lane & apart;
#pragma unroll
        for (int j = 0; j < half; j++) {
            const float keep = upper ? part[j + half] : part[j];
            const float give = upper ? part[j] : part[j + half];
            part[j] = keep + __shfl_xor_sync(ALL, give, apart);
        }
    }
    const float sum = part[0] + __shfl_xor_sync(ALL, part[0], 2);
    return sum + __shfl_xor_sync(ALL, sum, 1);
}

/* ---- forward ---- */

/* A unit's sum over surviving pixels: w (u f - g) = (w f) u - w g. Four words are asked for at a
 * time, the last one in the place of those that are not there. */
DEVICE float4 weighted_pixels(const Panel &p, const Layer &layer, int first, int end) {
    float4 z = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float shift = 0.0f;
    float2 affine = p.affine[0];
    for (int k = first; k < end; k += AHEAD) {
        unsigned word[AHEAD];
        int column[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            column[j] = p.integer[layer.column + min(k + j, end - 1)];
            word[j] = __ldg(p.image + column[j] * p.words);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const float w = k + j < end ? p.value[layer.weight + k + j] : 0.0f;
            if (CHANNELS > 1) affine = p.affine[column[j]];
            add_product(z, CHANNELS > 1 ? w * affine.x : w, bytes_of(word[j]));
            shift += CHANNELS > 1 ? w * affine.y : w;
        }
    }
    const float f = CHANNELS > 1 ? 1.0f : affine.x;
    if (CHANNELS == 1) shift *= affine.y;
    return make_float4(z.x * f - shift, z.y * f - shift, z.z * f - shift, z.w * f - shift);
}

DEVICE float4 weighted_units(const Panel &p, const Layer &layer, int below, int first, int end) {
    float4 z = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int k = first; k < end; k++)
        add_product(z, p.value[layer.weight + k], row_of(p, below + p.integer[layer.column + k]));
    return z;
}

/* The rows of the units of all layers. */
DEVICE void forward(const Panel &p) {
    for (int l = 0; l < LAYERS; l++) {
        const Layer &layer = layer_of(p, l);
        for (int o = p.warp; o < layer.outputs; o += p.warps) {
            const int *start = p.integer + layer.row_start + o, first = start[0], end = start[1];
            const float4 z = l ? weighted_units(p, layer, layer_of(p, l - 1).unit, first, end)
                               : weighted_pixels(p, layer, first, end);
            const float bias = p.value[layer.bias + o];
            if (p.inside)
                row_of(p, layer.unit + o) = make_float4(
                    activate(z.x + bias, layer.activation), activate(z.y + bias, layer.activation),
                    activate(z.z + bias, layer.activation), activate(z.w + bias, layer.activation));
        }
        __syncthreads();
    }
}

/* ---- loss ---- */

/* -log softmax(z)[label] of example e of the panel, and whether another logit is the largest. Where
 * size is above 0 the gradient / size takes the place of the logits; it is 0 where there is no
 * example. */
DEVICE float cross_entropy(const Panel &p, int e, bool present, int label, float size, bool *wrong) {
    const Layer &top = layer_of(p, LAYERS - 1);
    float *z = p.activation + top.unit * p.row + e;
    float most = z[0];
    int best = 0;
    for (int c = 1; c < top.outputs; c++)
        if (z[c * p.row] > most) {
            most = z[c * p.row];
            best = c;
        }
    *wrong = present && best != label;
    const float own = z[label * p.row];
    float total = 0.0f;
    for (int c = 0; c < top.outputs; c++) {
        const float power = expf(z[c * p.row] - most);
        total += power;
        if (size > 0.0f) z[c * p.row] = power;
    }
    if (size > 0.0f)
        for (int c = 0; c < top.outputs; c++)
            z[c * p.row] =
                present ? (z[c * p.row] / total - (c == label ? 1.0f : 0.0f)) / size : 0.0f;
    return present ? logf(total) + most - own : 0.0f;
}

/* ---- backward: gradients d take the place of activations ---- */

/* Of eight weights from k0 on, the lane's part of the sums of d x over the examples; the last
 * weight stands in for those that are not there. All words are asked for before one is used, and a
 * row of d is read once for the weights that share it. */
DEVICE void pixel_products(const Panel &p, const Layer &layer, int k0, float *part) {
    unsigned word[TOGETHER];
#pragma unroll
    for (int j = 0; j < TOGETHER; j++)
        word[j] = __ldg(p.image + p.integer[layer.column + k0 + j] * p.words);
    int now = -1;
    float4 d = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
        const int o = p.integer[layer.row + k0 + j];
        if (o != now) d = row_of(p, layer.unit + o);
        now = o;
        part[j] = p.inside ? dot(d, bytes_of(word[j])) : 0.0f;
    }
}

DEVICE void unit_products(const Panel &p, const Layer &layer, int below, int k0, float *part) {
    int now = -1;
    float4 d = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
        const int k = k0 + j, o = p.integer[layer.row + k];
        if (o != now) d = row_of(p, layer.unit + o);
        now = o;
        part[j] = p.inside ? dot(d, row_of(p, below + p.integer[layer.column + k])) : 0.0f;
    }
}

DEVICE void weights_gradient(const Panel &p, int l) {
    const Layer &layer = layer_of(p, l);
    for (int k0 = p.warp * TOGETHER; k0 < layer.weights; k0 += p.warps * TOGETHER) {
        float part[TOGETHER];
        if (l)
            unit_products(p, layer, layer_of(p, l - 1).unit, k0, part);
        else
            pixel_products(p, layer, k0, part);
        float sum = sums_over_lanes(part, p.lane);
        const int k = k0 + p.lane / 4;
        if (p.lane % 4 || k >= layer.weights) continue;
        if (l == 0) { /* the sum of d (u f - g) */
            const float2 affine = p.affine[CHANNELS > 1 ? p.integer[layer.column + k] : 0];
            sum = sum * affine.x - affine.y * p.sum[p.integer[layer.row + k]];
        }
        float &to = p.gradient[layer.weight + k];
        to = p.add ? to + sum : sum;
    }
}

/* Take the sum of a unit's row of d: its bias's gradient, and what its weights' need. */
DEVICE void sum_row(const Panel &p, int l, int o, const float4 d) {
    const float sum = sum_over_lanes(p.inside ? (d.x + d.y) + (d.z + d.w) : 0.0f);
    if (p.lane) return;
    float &to = p.gradient[layer_of(p, l).bias + o];
    to = p.add ? to + sum : sum;
    if (l == 0) p.sum[o] = sum;
}

/* From d of layer l to d of the one below. */
DEVICE void inputs_gradient(const Panel &p, int l) {
    const Layer &layer = layer_of(p, l), &below = layer_of(p, l - 1);
    for (int i = p.warp; i < layer.inputs; i += p.warps) {
        float4 d = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const int end = p.integer[layer.column_start + i + 1];
#pragma unroll 4
        for (int q = p.integer[layer.column_start + i]; q < end; q++)
            add_product(
                d, p.value[layer.weight + p.integer[layer.by_input + q]],
                row_of(p, layer.unit + p.integer[layer.by_input_row + q]));
        const float4 a = row_of(p, below.unit + i);
        d.x = through(d.x, a.x, below.activation);
        d.y = through(d.y, a.y, below.activation);
        d.z = through(d.z, a.z, below.activation);
        d.w = through(d.w, a.w, below.activation);
        __syncwarp(); /* lanes beyond the panel have read another's row */
        if (p.inside) row_of(p, below.unit + i) = d;
        sum_row(p, l - 1, i, d);
    }
}

DEVICE void backward(const Panel &p) {
    const Layer &top = layer_of(p, LAYERS - 1);
    for (int o = p.warp; o < top.outputs; o += p.warps)
        sum_row(p, LAYERS - 1, o, row_of(p, top.unit + o));
    if (LAYERS == 1) __syncthreads();
    for (int l = LAYERS - 1; l >= 0; l--) {
        weights_gradient(p, l);
        __syncthreads();
        if (l == 0) break;
        inputs_gradient(p, l);
        __syncthreads();
    }
}

/* ---- the step ---- */

struct Rates {
    float lr, momentum, decay;
};

DEVICE void descend(float &weight, float &velocity, float gradient, const Rates by) {
    velocity = by.momentum * velocity + (gradient + by.decay * weight);
    weight -= by.lr * velocity;
}

/* ---- a block's memory ---- */

/* What it begins with: the number of the block's task. */
DEVICE int &task_of_block() {
    extern __shared__ float4 memory[];
    return *(int *)memory;
}

/* Copy a network into shared memory, and lay out behind it: gradients (of training), losses, sums,
 * activations. Values may just have been written by another block: the first cache does not know. */
DEVICE Panel enter(
    const Place &place, const int *integers, const float *values, float *scratch, long long room,
    const Data &data, bool training) {
    extern __shared__ float4 memory[];
    int *integer = (int *)(memory + 1);
    float *value = (float *)(integer + place.integer_count);
    for (int n = threadIdx.x; n < place.integer_count; n += blockDim.x)
        integer[n] = integers[place.integers + n];
    for (int n = threadIdx.x; n < place.value_count; n += blockDim.x)
        value[n] = __ldcg(values + place.values + n);
    __syncthreads();
    Panel p;
    p.integer = integer;
    p.value = value;
    p.gradient = value + place.value_count;
    p.loss = p.gradient + (training ? place.value_count : 0);
    p.sum = p.loss + PANEL;
    const long long used = p.sum + layer_of(p, 0).outputs - (float *)memory;
    const long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    p.activation = IN_SHARED ? (float *)memory + (used + 3) / 4 * 4 : scratch + block * room;
    p.words = data.words;
    p.row = EACH * min(data.words, WARP);
    p.lane = threadIdx.x % WARP;
    p.warp = threadIdx.x / WARP;
    p.warps = blockDim.x / WARP;
    return p;
}

/* Go to the panel that begins at a word of a part's rows. */
DEVICE void go_to(Panel &p, const Data &data, long long group, long long part, int word) {
    const int words = min(data.words - word, WARP);
    p.inside = p.lane < words;
    p.column = p.inside ? p.lane : words - 1;
    p.image = data.images + (group * data.parts + part) * data.pixels * data.words + word + p.column;
    p.affine = data.affine + group * data.pixels;
    p.add = word > 0;
}

DEVICE const int *labels_of(const Data &data, long long group, long long part, int word) {
    return data.labels + ((group * data.parts + part) * data.words + word) * EACH;
}

/* ---- entry points ---- */

/* Tasks are numbered part by part of the epoch, and within a part network by network. A block takes
 * the next one, and waits until the network has come so far: whoever has the part before it is at
 * work already. Returns -1 where nothing is left.
 *
 * progress: the number of the next task, then for each network the parts that are done. */
DEVICE int take_task(int *progress, int count, int parts) {
    __syncthreads(); /* nobody needs the last one's number any more */
    if (threadIdx.x == 0) {
        const int task = atomicAdd(progress, 1);
        task_of_block() = task < count * parts ? task : -1;
        if (task < count * parts)
            while (atomicAdd(progress + 1 + task % count, 0) < task / count) continue;
        __threadfence();
    }
    __syncthreads();
    return task_of_block();
}

DEVICE void end_task(int *progress, int count, int task) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(progress + 1 + task % count, task / count + 1);
}

/* Take a step on `size` examples. Returns, in the first warp, the sum of their losses. */
DEVICE float step_(
    Panel &p, const Data &data, long long group, int step, int size, float *velocity, const Rates by) {
    float total = 0.0f, *value = (float *)p.value;
    for (int word = 0; word < data.words; word += WARP) {
        go_to(p, data, group, step, word);
        forward(p);
        const int e = threadIdx.x, at = word * EACH + e;
        if (e < p.row && at < data.words * EACH) {
            bool wrong;
            const int label = labels_of(data, group, step, word)[e];
            p.loss[e] = cross_entropy(p, e, at < size, label, (float)size, &wrong);
        } else if (e < PANEL) {
            p.loss[e] = 0.0f;
        }
        __syncthreads();
        if (p.warp == 0) {
            float part = 0.0f;
            for (int j = 0; j < EACH; j++) part += p.loss[p.lane + j * WARP];
            total += sum_over_lanes(part);
        }
        backward(p);
    }
    for (int l = 0; l < LAYERS; l++) {
        const Layer &layer = layer_of(p, l);
        const int count = layer.weights + (layer.has_bias ? layer.outputs : 0);
        for (int k = threadIdx.x; k < count; k += blockDim.x) {
            const int n = k < layer.weights ? layer.weight + k : layer.bias + k - layer.weights;
            float v = __ldcg(velocity + n);
            descend(value[n], v, p.gradient[n], by);
            velocity[n] = v;
        }
    }
    __syncthreads();
    return total;
}

/* An epoch of `count` networks: `data.parts` steps of `batch` examples, the last one with what is
 * left, in `parts` parts of the epoch. totals, which begins at 0, gets the sum of the losses of all
 * examples on the way; bad, likewise, the step at which it was found not to be finite (looked at
 * every `check` steps, and at the end). */
extern "C" __global__ void __launch_bounds__(1024) lossprune_stack_epoch(
    const Place *places, const int *members, const int *groups, const int *integers, float *values,
    float *velocities, float *idle, float *idle_velocities, Data data, Descent descent,
    long long examples, int batch, int check, int count, int parts, int *progress, float *scratch,
    long long room, double *totals, int *bad) {
    const int steps = (data.parts + parts - 1) / parts;
    for (int task; (task = take_task(progress, count, parts)) >= 0; end_task(progress, count, task)) {
        const int which = task % count, first = task / count * steps;
        const int end = min(first + steps, data.parts);
        const Place place = places[members[which]];
        const Rates by = {descent.rates[which], descent.momentum, descent.decays[which]};
        Panel p = enter(place, integers, values, scratch, room, data, true);
        double total = __ldcg(totals + which);
        int failed = __ldcg(bad + which);
        for (int step = first; step < end; step++) {
            const long long left = examples - (long long)step * batch;
            const int size = (int)(left < batch ? left : batch);
            total += step_(p, data, groups[which], step, size, velocities + place.values, by);
            const bool look = (step + 1) % check == 0 || step + 1 == data.parts;
            if (look && !failed && !isfinite(total)) failed = step + 1;
        }
        for (int n = threadIdx.x; n < place.value_count; n += blockDim.x)
            values[place.values + n] = p.value[n];
        /* What has no path to an output has no gradient, but it decays. */
        const bool last = first < data.parts && end == data.parts;
        for (int n = threadIdx.x; n < place.idle_count && last; n += blockDim.x) {
            float w = idle[place.idle + n], v = idle_velocities[place.idle + n];
            for (int step = 0; step < data.parts; step++) descend(w, v, 0.0f, by);
            idle[place.idle + n] = w;
            idle_velocities[place.idle + n] = v;
        }
        if (threadIdx.x == 0) {
            totals[which] = total;
            bad[which] = failed;
        }
    }
}

/* The sum of the losses, and the number of wrong answers, of `chunk` parts from blockIdx.x * chunk
 * on, with the network of blockIdx.y: into losses and wrongs (networks, chunks). */
extern "C" __global__ void __launch_bounds__(1024) lossprune_stack_evaluate(
    const Place *places, const int *members, const int *groups, const int *integers,
    const float *values, Data data, long long examples, int chunk, float *scratch, long long room,
    double *losses, int *wrongs) {
    const long long group = groups[blockIdx.y];
    Panel p = enter(places[members[blockIdx.y]], integers, values, scratch, room, data, false);
    const int end = min((int)(blockIdx.x + 1) * chunk, data.parts), e = threadIdx.x;
    double loss = 0.0;
    int count = 0;
    for (int part = blockIdx.x * chunk; part < end; part++) {
        go_to(p, data, group, part, 0);
        forward(p);
        if (e < p.row) {
            bool wrong;
            const bool present = (long long)part * p.row + e < examples;
            loss += cross_entropy(p, e, present, labels_of(data, group, part, 0)[e], 0.0f, &wrong);
            count += wrong;
        }
        __syncthreads();
    }
    for (int apart = WARP / 2; apart; apart /= 2) {
        loss += __shfl_xor_sync(ALL, loss, apart);
        count += __shfl_xor_sync(ALL, count, apart);
    }
    /* Of at most four warps that have examples. */
    double *part = (double *)(((unsigned long long)p.loss + 7) / 8 * 8);
    int *wrong = (int *)(part + EACH);
    if (p.lane == 0 && p.warp < EACH) {
        part[p.warp] = loss;
        wrong[p.warp] = count;
    }
    __syncthreads();
    if (e == 0) {
        const int warps = min(p.warps, EACH);
        for (int w = 1; w < warps; w++) {
            loss += part[w];
            count += wrong[w];
        }
        losses[blockIdx.y * gridDim.x + blockIdx.x] = loss;
        wrongs[blockIdx.y * gridDim.x + blockIdx.x] = count;
    }
}
