/* sparse_stack.cu on the CPU, called as the driver would call it: an address for each argument. */
#include "cuda_on_cpu.h"
#include "sparse_stack.cu"

template <class T> static T take(void **&arguments) { return *(T *)*arguments++; }

template <class... T>
static void run(void (*kernel)(T...), int gx, int gy, int threads, void **arguments) {
    std::tuple<T...> given{take<T>(arguments)...}; /* braces: from the first to the last */
    emulation::launch(gx, gy, threads, [&] { std::apply(kernel, given); });
}

extern "C" void run_lossprune_stack_epoch(int gx, int gy, int threads, void **arguments) {
    run(lossprune_stack_epoch, gx, gy, threads, arguments);
}

extern "C" void run_lossprune_stack_evaluate(int gx, int gy, int threads, void **arguments) {
    run(lossprune_stack_evaluate, gx, gy, threads, arguments);
}
