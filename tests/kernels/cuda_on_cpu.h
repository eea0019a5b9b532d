/* Enough of CUDA to run a kernel on the CPU, for tests where there is no GPU: the threads of a block
 * are coroutines of one thread, which take turns wherever a barrier or a shuffle makes them wait.
 * A block that waits for a thread that has ended, or for lanes that never come, aborts. */
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>
using std::isfinite;
using std::min;

#define __global__
#define __device__
#define __launch_bounds__(n)
#define __shared__

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

float4 memory[1 << 14]; /* what a kernel declares as its dynamic shared memory */

namespace emulation {
struct Index { int x, y; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    Index index;
    bool ended;
    int barriers, shuffles; /* passed so far */
    double given[2];        /* to the lanes of the warp, in turn: one is read while one is written */
};
static std::vector<Thread> threads;
static Thread *now;
static ucontext_t scheduler;
static Index block, blocks, size;
static int at_barrier, at_shuffle[32]; /* times that a thread of the block, of a warp, has come */
static std::function<void()> body;

static void enter() {
    body();
    now->ended = true;
    swapcontext(&now->context, &scheduler);
}

/* Until so many have come in all. */
static void wait(const int &came, int all) {
    for (int turns = 0; came < all; turns++) {
        if (turns > 1000000) fprintf(stderr, "a thread waits for ever\n"), abort();
        swapcontext(&now->context, &scheduler);
    }
}

static void barrier() {
    at_barrier++;
    wait(at_barrier, ++now->barriers * size.x);
}

static double shuffle(double value, int lane) {
    Thread *self = now, *warp = threads.data() + self->index.x / 32 * 32;
    self->given[self->shuffles % 2] = value;
    int &came = at_shuffle[self->index.x / 32];
    came++;
    wait(came, ++self->shuffles * 32);
    return warp[lane].given[(self->shuffles - 1) % 2];
}

static void launch(int gx, int gy, int count, const std::function<void()> &kernel) {
    body = kernel;
    blocks = {gx, gy};
    size = {count, 1};
    for (block.y = 0; block.y < gy; block.y++)
        for (block.x = 0; block.x < gx; block.x++) {
            memset(memory, 0xff, sizeof memory); /* not-a-numbers, for whoever reads too early */
            threads = std::vector<Thread>(count);
            at_barrier = 0;
            memset(at_shuffle, 0, sizeof at_shuffle);
            for (int i = 0; i < count; i++) {
                Thread &thread = threads[i];
                thread.stack.resize(1 << 16);
                thread.index = {i, 0};
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.data();
                thread.context.uc_stack.ss_size = thread.stack.size();
                makecontext(&thread.context, enter, 0);
            }
            for (bool going = true; going;) {
                going = false;
                for (auto &thread : threads)
                    if (!thread.ended) {
                        going = true;
                        now = &thread;
                        swapcontext(&scheduler, &thread.context);
                    }
            }
        }
}
} // namespace emulation

#define threadIdx (emulation::now->index)
#define blockIdx emulation::block
#define gridDim emulation::blocks
#define blockDim emulation::size
static inline void __syncthreads() { emulation::barrier(); }
static inline void __syncwarp() { emulation::shuffle(0, threadIdx.x % 32); }
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int apart) {
    return (T)emulation::shuffle(value, (threadIdx.x % 32) ^ apart);
}
template <class T> static inline T __ldg(const T *at) { return *at; }
template <class T> static inline T __ldcg(const T *at) { return *at; }
static inline int atomicAdd(int *at, int more) { return (*at += more) - more; }
static inline int atomicExch(int *at, int value) { return std::exchange(*at, value); }
static inline void __threadfence() {}
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
