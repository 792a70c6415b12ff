// The native kernel by itself: without PyTorch, whose headers take longer to compile than the kernel on most processors.

#include "native_kernels.h"

// Numbers side by side in a vector: it tells which code a compiler's flags have chosen.
extern "C" int lanes() { return LANES; }

// output[t] += B[i] @ (A[i] @ inputs[t]) where all is of one dtype; but for B, columns and then rows are side by side.
extern "C" void add_lora(int64_t rows, int64_t features, int64_t slots, int64_t rank, int64_t width, int64_t dtype,
                         const void* inputs, const void* a, const void* b, int64_t b_row_stride,
                         int64_t b_column_stride, const int64_t* indices, void* output) {
    Batch batch{rows, features, slots, 1, 2, true, indices, sizeof *indices, inputs, dtype, features, 1.0};
    Weights a_weights{a, dtype, rank * features, features, 1};
    Weights b_weights{b, dtype, rank * width, b_row_stride, b_column_stride};
    Slice slice{a_weights, b_weights, rank, width, output, dtype, width};
    add_slices(batch, &slice);
}

// How many threads a call gets that should take `expected` nanoseconds, and then takes `took`.
extern "C" int threads(int64_t most, int64_t expected, int64_t took) {
    static Threads chosen;
    int count = chosen.choose(most, expected);
    if (count > 1) chosen.took(took);
    return count;
}

// Whether it multiplies bfloat16 by tiles.
extern "C" bool tiles() { return has_tiles(); }
