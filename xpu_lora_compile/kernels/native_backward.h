// The gradients of batched LoRA on a CPU, of all slices of a call in one parallel region, with h = s A[i] x and
// g = s B[i]^T grad of each row:
//
//     dX[t] = A[i]^T g          dA[i] = sum over its rows of g x^T          dB[i] = sum over its rows of grad h^T
//
// All sums are float32. Those of a slot's weights are added up row by row, in the order of the batch, by one thread for
// each element: the same bits whatever else is in the batch, and however many threads there are. No row of another slot
// is read for it, and no memory of a slot that no row uses is touched.

#include "native_kernels.h"

namespace {

// Where the gradient of one slot's A or B^T goes, [ranks, columns]; nowhere if `data` is null.
struct Gradient {
    void* data = nullptr;
    int64_t dtype = 0, ranks = 0, rank_stride = 0, column_stride = 0;
};

// Registers of a tile of sums: N vectors of M rows.
constexpr int TILE_N = 2, TILE_M = LANES == 16 ? 12 : 6;
constexpr int64_t TILE_COLUMNS = TILE_N * LANES;
// Rows whose columns of one tile stay near while all ranks pass over them.
constexpr int64_t ROWS_AT_ONCE = 128;

// The `columns` first of a tile's columns, with zeros behind them.
template <typename X>
void load_columns(const X* from, int64_t columns, Floats* to) {
    if (columns == TILE_COLUMNS) {
        for (int n = 0; n < TILE_N; n++) to[n] = load<LANES>(from + n * LANES);
        return;
    }
    alignas(64) float padded[TILE_COLUMNS] = {};
    for (int64_t c = 0; c < columns; c++) padded[c] = to_float(from[c]);
    std::memcpy(to, padded, sizeof padded);
}

template <typename Out>
void store_columns(const Floats* values, int64_t columns, Out* to) {
    if (columns == TILE_COLUMNS) {
        for (int n = 0; n < TILE_N; n++) store(values[n], to + n * LANES);
        return;
    }
    alignas(64) float padded[TILE_COLUMNS];
    std::memcpy(padded, values, sizeof padded);
    for (int64_t c = 0; c < columns; c++) round_to(padded[c], to[c]);
}

// sums[m] += sum over rows of left[row][m] rows[row], of M ranks and the columns of one tile; sums [M, a tile].
template <int M, bool WHOLE, typename X>
void add_outer_products(const float* left, int64_t left_stride, const X* const* rows, int64_t count, int64_t offset,
                        int64_t columns, float* to) {
    // Each by itself: an array that is copied as a whole stays in memory (GCC 12).
    Floats sums[M][TILE_N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < TILE_N; n++) sums[m][n] = load<LANES>(to + m * TILE_COLUMNS + n * LANES);
    for (int64_t row = 0; row < count; row++) {
        const X* here = rows[row] + offset;
        Floats right[TILE_N];
        if constexpr (WHOLE)
            for (int n = 0; n < TILE_N; n++) right[n] = load<LANES>(here + n * LANES);
        else
            load_columns(here, columns, right);
        const float* from = left + row * left_stride;
        for (int m = 0; m < M; m++)
            for (int n = 0; n < TILE_N; n++) sums[m][n] = multiply_add(from[m] - Floats{}, right[n], sums[m][n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < TILE_N; n++) store(sums[m][n], to + m * TILE_COLUMNS + n * LANES);
}

// The same of all ranks, as many at once as there are registers for.
template <typename X>
void add_outer_products_of(const float* left, int64_t left_stride, int64_t ranks, const X* const* rows, int64_t count,
                           int64_t offset, int64_t columns, float* sums) {
    int64_t pieces = (ranks + TILE_M - 1) / TILE_M;
    for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
        int64_t taken = smaller(ROWS_AT_ONCE, count - first);
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t r = piece * ranks / pieces;
            with_count<TILE_M>((piece + 1) * ranks / pieces - r, [&](auto rank_count) {
                constexpr int M = decltype(rank_count)::value;
                auto* add = columns == TILE_COLUMNS ? add_outer_products<M, true, X> : add_outer_products<M, false, X>;
                add(left + first * left_stride + r, left_stride, rows + first, taken, offset, columns,
                    sums + r * TILE_COLUMNS);
            });
        }
    }
}

// output[m] = sum over r of left[m][r] weights[r], of M rows and the columns of one tile; weights [ranks, a tile].
template <int M, typename Out>
void multiply_by_tile(const float* left, int64_t ranks, const float* weights, Out* const* outputs, int64_t offset,
                      int64_t columns) {
    Floats sums[M][TILE_N] = {};
    for (int64_t r = 0; r < ranks; r++) {
        Floats right[TILE_N];
        for (int n = 0; n < TILE_N; n++) right[n] = load<LANES>(weights + r * TILE_COLUMNS + n * LANES);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < TILE_N; n++)
                sums[m][n] = multiply_add(left[m * ranks + r] - Floats{}, right[n], sums[m][n]);
    }
    for (int m = 0; m < M; m++) {
        Out* to = outputs[m] + offset;
        if (columns == TILE_COLUMNS)
            for (int n = 0; n < TILE_N; n++) store(sums[m][n], to + n * LANES);
        else
            store_columns(sums[m], columns, to);
    }
}

struct Backward {
    // Inputs and scalings; the output of each slice is its gradient.
    const Batch& batch;
    const Slice* slices;
    // Of each slot's A and B^T of each slice, [slices, slots], or null.
    const Gradient *of_a, *of_b;
    // dX, [rows, features], or null.
    void* of_inputs;
    int64_t of_inputs_dtype, of_inputs_stride;

    Groups groups;
    std::vector<int64_t> rank_at, without;
    int64_t ranks = 0;
    bool needs_weights;
    // How many tasks of each kind have been taken.
    std::unique_ptr<std::atomic<int64_t>[]> taken;
    std::unique_ptr<float[]> hidden, of_hidden, scratch;
    int64_t scratch_size = 0;
    int threads;

    Backward(const Batch& batch, const Slice* slices, const Gradient* of_a, const Gradient* of_b, void* of_inputs,
             int64_t of_inputs_dtype, int64_t of_inputs_stride)
        : batch(batch), slices(slices), of_a(of_a), of_b(of_b), of_inputs(of_inputs), of_inputs_dtype(of_inputs_dtype),
          of_inputs_stride(of_inputs_stride), groups(batch), needs_weights(of_a != nullptr),
          taken(new std::atomic<int64_t>[3 * batch.slices + 2]()) {
        int64_t widest = batch.features, products = 0;
        for (int64_t s = 0; s < batch.slices; s++) {
            rank_at.push_back(ranks);
            ranks += slices[s].rank;
            widest = larger(widest, slices[s].width);
            products += slices[s].rank * (batch.features * (needs_weights ? 3 : 1) + slices[s].width * 2);
        }
        // Eight ranks of weights whose columns lie apart; or columns of all ranks.
        scratch_size = larger(8 * widest, ranks * inputs_columns());
        int64_t rows = groups.order.size();
        of_hidden.reset(new float[rows * ranks]);
        if (needs_weights) hidden.reset(new float[rows * ranks]);
        threads = Work::chosen().choose(batch.most_threads, rows * products / 20);
        scratch.reset(new float[scratch_size * threads]);
        if (of_inputs && rows < batch.rows) {
            std::vector<bool> has(batch.rows);
            for (int64_t row : groups.order) has[row] = true;
            for (int64_t t = 0; t < batch.rows; t++)
                if (!has[t]) without.push_back(t);
        }
    }

    float* my_scratch() { return scratch.get() + omp_get_thread_num() * scratch_size; }

    // As `Work::share`.
    template <typename Task>
    void share(int64_t which, int64_t count, Task task) {
        for (int64_t next; (next = taken[which].fetch_add(1, std::memory_order_relaxed)) < count;) task(next);
    }

    void run() {
        auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            shrink();
#pragma omp barrier
            multiply();
        }
        if (threads > 1) Work::chosen().took((std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1));
    }

    // The rank vectors of rows, and their gradients.
    void shrink() {
        int64_t parts = groups.parts.size(), kinds = needs_weights ? 2 : 1;
        int64_t most = parts * batch.slices * kinds >= 4 * threads ? 1 << 30 : 8;
        for (int64_t s = 0; s < batch.slices; s++) {
            const Slice& slice = slices[s];
            int64_t step = larger(1, smaller(most, slice.rank)), steps = (slice.rank + step - 1) / step;
            // All rank vectors of a row lie side by side.
            Slice forward = slice, backward = slice;
            forward.rank = backward.rank = ranks;
            backward.a = {slice.b.data, slice.b.dtype, slice.b.slot_stride, slice.b.column_stride, slice.b.row_stride};
            Batch grads = batch;
            grads.features = slice.width;
            grads.inputs = slice.output;
            grads.inputs_dtype = slice.output_dtype;
            grads.inputs_stride = slice.output_stride;
            share(s, parts * steps * kinds, [&](int64_t task) {
                int64_t from = task / kinds % steps * step, to = smaller(from + step, slice.rank);
                const Rows& rows = groups.parts[task / kinds / steps];
                if (task % kinds)
                    shrink_part(batch, forward, groups, rows, from, to, hidden.get() + rank_at[s], my_scratch());
                else
                    shrink_part(grads, backward, groups, rows, from, to, of_hidden.get() + rank_at[s], my_scratch());
            });
        }
    }

    // The gradients of inputs and weights.
    void multiply() {
        int64_t slots = groups.whole.size();
        if (of_inputs) {
            int64_t step = columns_for(batch.features, slots), blocks = (batch.features + step - 1) / step;
            share(batch.slices, slots * blocks, [&](int64_t task) {
                int64_t from = task % blocks * step;
                inputs_part(groups.whole[task / blocks], from, smaller(from + step, batch.features));
            });
            if (!without.empty()) share(batch.slices + 1, 1, [&](int64_t) { clear_rows(); });
        }
        if (!needs_weights) return;
        for (int64_t s = 0; s < batch.slices; s++)
            for (bool is_b : {false, true}) {
                int64_t columns = is_b ? slices[s].width : batch.features;
                int64_t step = columns_for(columns, slots), blocks = (columns + step - 1) / step;
                share(batch.slices + 2 + 2 * s + is_b, slots * blocks, [&](int64_t task) {
                    int64_t from = task % blocks * step;
                    weights_part(s, is_b, groups.whole[task / blocks], from, smaller(from + step, columns));
                });
            }
    }

    // So many columns that all threads get some: whole lines of memory.
    int64_t columns_for(int64_t columns, int64_t slots) const {
        int64_t least = slots ? (4 * threads + slots - 1) / slots : 1;
        return larger(1, (columns / larger(1, least) + 63) / 64) * 64;
    }

    // Columns of dX whose weights, of all ranks, stay in the nearest cache while rows pass over them.
    int64_t inputs_columns() const {
        return larger(1, smaller(256, 4096 / larger(1, ranks)) / TILE_COLUMNS) * TILE_COLUMNS;
    }

    void clear_rows() {
        with_dtype(of_inputs_dtype, [&](auto out) {
            using Out = decltype(out);
            for (int64_t row : without)
                std::memset(static_cast<Out*>(of_inputs) + row * of_inputs_stride, 0, sizeof(Out) * batch.features);
        });
    }

    void inputs_part(const Rows& rows, int64_t from, int64_t to) {
        float* weights = my_scratch();
        with_dtype(of_inputs_dtype, [&](auto out) {
            using Out = decltype(out);
            int64_t step = inputs_columns();
            for (int64_t start = from; start < to; start += step) {
                int64_t end = smaller(start + step, to);
                for (int64_t column = start; column < end; column += TILE_COLUMNS)
                    for (int64_t s = 0; s < batch.slices; s++)
                        pack_a(s, rows.slot, column, smaller(TILE_COLUMNS, end - column),
                               weights + (column - start) * ranks);
                for (int64_t row = rows.first; row < rows.last; row += TILE_M) {
                    int64_t taken = smaller(rows.last - row, TILE_M);
                    Out* outputs[TILE_M];
                    for (int64_t m = 0; m < taken; m++)
                        outputs[m] = static_cast<Out*>(of_inputs) + groups.order[row + m] * of_inputs_stride;
                    with_count<TILE_M>(taken, [&](auto count) {
                        for (int64_t column = start; column < end; column += TILE_COLUMNS)
                            multiply_by_tile<decltype(count)::value>(of_hidden.get() + row * ranks, ranks,
                                                                     weights + (column - start) * ranks, outputs,
                                                                     column, smaller(TILE_COLUMNS, end - column));
                    });
                }
            }
        });
    }

    // Columns of A as float32, [ranks, a tile].
    void pack_a(int64_t s, int64_t slot, int64_t column, int64_t columns, float* tile) {
        const Weights& a = slices[s].a;
        with_dtype(a.dtype, [&](auto weight) {
            using A = decltype(weight);
            const A* first = static_cast<const A*>(a.data) + slot * a.slot_stride + column * a.column_stride;
            for (int64_t r = 0; r < slices[s].rank; r++) {
                float* to = tile + (rank_at[s] + r) * TILE_COLUMNS;
                const A* row = first + r * a.row_stride;
                if (a.column_stride == 1 && columns == TILE_COLUMNS) {
                    for (int n = 0; n < TILE_N; n++) store(load<LANES>(row + n * LANES), to + n * LANES);
                } else {
                    for (int64_t c = 0; c < columns; c++) to[c] = to_float(row[c * a.column_stride]);
                    for (int64_t c = columns; c < TILE_COLUMNS; c++) to[c] = 0;
                }
            }
        });
    }

    // The columns of a slot's A, or of its B^T, that one thread adds up.
    void weights_part(int64_t s, bool is_b, const Rows& rows, int64_t from, int64_t to) {
        const Gradient& target = (is_b ? of_b : of_a)[s * batch.slots + rows.slot];
        if (!target.data) return;
        const float* left = (is_b ? hidden : of_hidden).get() + rows.first * ranks + rank_at[s];
        const void* right = is_b ? slices[s].output : batch.inputs;
        int64_t stride = is_b ? slices[s].output_stride : batch.inputs_stride;
        float* sums = my_scratch();
        with_dtype(is_b ? slices[s].output_dtype : batch.inputs_dtype, [&](auto x) {
            using X = decltype(x);
            std::vector<const X*> pointers;
            for (int64_t row = rows.first; row < rows.last; row++)
                pointers.push_back(static_cast<const X*>(right) + groups.order[row] * stride);
            for (int64_t column = from; column < to; column += TILE_COLUMNS) {
                int64_t columns = smaller(TILE_COLUMNS, to - column);
                std::memset(sums, 0, sizeof(float) * target.ranks * TILE_COLUMNS);
                add_outer_products_of(left, ranks, target.ranks, pointers.data(), rows.last - rows.first, column,
                                      columns, sums);
                write(target, sums, column, columns);
            }
        });
    }

    static void write(const Gradient& target, const float* sums, int64_t column, int64_t columns) {
        with_dtype(target.dtype, [&](auto out) {
            using Out = decltype(out);
            Out* to = static_cast<Out*>(target.data) + column * target.column_stride;
            for (int64_t r = 0; r < target.ranks; r++)
                if (target.column_stride == 1) {
                    Floats values[TILE_N];
                    std::memcpy(values, sums + r * TILE_COLUMNS, sizeof values);
                    store_columns(values, columns, to + r * target.rank_stride);
                } else {
                    for (int64_t c = 0; c < columns; c++)
                        round_to(sums[r * TILE_COLUMNS + c], to[r * target.rank_stride + c * target.column_stride]);
                }
        });
    }
};

}  // namespace
