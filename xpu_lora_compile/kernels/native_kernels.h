// Shrink and expand of batched LoRA on a CPU: rows grouped by slot, so that some rows share what is read of its weights,
// and one parallel region for all slices of a call. Nothing but the C++ standard library and OpenMP.
//
// Rank vectors and all sums are float32. A result depends on its own row alone: the order of additions is the same
// whatever else is in the batch, and what is left over by vectors is summed by fused operations as they do. A row whose
// index is no slot is in no group, and so no weight is read for it.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "native_tiles.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <typename T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
using Floats = VectorOf<float, LANES>::type;

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

float to_float(float value) { return value; }
float to_float(Bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
float to_float(Float16 value) {
    _Float16 half;
    std::memcpy(&half, &value, 2);
    return float(half);
}

void round_to(float value, float& result) { result = value; }
void round_to(float value, Bfloat16& result) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    // To nearest, ties to even; a NaN stays one.
    result.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
void round_to(float value, Float16& result) {
    _Float16 half = _Float16(value);
    std::memcpy(&result, &half, 2);
}

// sum + a * b, rounded once where the processor can: said outright, since a compiler that fuses as it likes does so in
// one of two loops that must agree to the bit (GCC 12, AVX2).
Floats multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}
float multiply_add(float a, float b, float sum) {
#if defined(__FMA__) || defined(__ARM_NEON)
    return __builtin_fmaf(a, b, sum);
#else
    return a * b + sum;
#endif
}

template <typename V>
V load_raw(const void* from) {
    V result;
    std::memcpy(&result, from, sizeof(V));
    return result;
}

// N neighbours in memory, as float32.
template <int N>
typename VectorOf<float, N>::type load(const float* from) {
    return load_raw<typename VectorOf<float, N>::type>(from);
}
template <int N>
typename VectorOf<float, N>::type load(const Bfloat16* from) {
    auto bits = load_raw<typename VectorOf<uint16_t, N>::type>(from);
    auto wide = __builtin_convertvector(bits, typename VectorOf<uint32_t, N>::type) << 16;
    return (typename VectorOf<float, N>::type)wide;
}
template <int N>
typename VectorOf<float, N>::type load(const Float16* from) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return _mm512_cvtph_ps(load_raw<__m256i>(from));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return _mm256_cvtph_ps(load_raw<__m128i>(from));
#endif
    auto halves = load_raw<typename VectorOf<_Float16, N>::type>(from);
    return __builtin_convertvector(halves, typename VectorOf<float, N>::type);
}

void store(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }
void store(Floats values, Bfloat16* to) {
#if defined(__AVX512BF16__)
    // The instruction makes zeros of subnormal numbers, of which there are hardly ever any.
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)values, 0x20) == 0, 1)) {
        __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
        std::memcpy(to, &rounded, sizeof rounded);
        return;
    }
#endif
    using Bits = VectorOf<uint32_t, LANES>::type;
    Bits bits = (Bits)values;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = values != values ? Bits{} + 0x7fc0 : bits;
    auto halves = __builtin_convertvector(bits, VectorOf<uint16_t, LANES>::type);
    std::memcpy(to, &halves, sizeof halves);
}
void store(Floats values, Float16* to) {
#if defined(__AVX512F__)
    if constexpr (LANES == 16) {
        __m256i rounded = _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
        std::memcpy(to, &rounded, sizeof rounded);
        return;
    }
#elif defined(__F16C__)
    if constexpr (LANES == 8) {
        __m128i rounded = _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
        std::memcpy(to, &rounded, sizeof rounded);
        return;
    }
#endif
    alignas(64) float lanes[LANES];
    std::memcpy(lanes, &values, sizeof values);
    for (int i = 0; i < LANES; i++) round_to(lanes[i], to[i]);
}

// Adds the upper half of each group of 2 * HALF lanes to its lower half, of two vectors at once.
template <int HALF, int... LANE>
Floats halved(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
    Floats lower = __builtin_shufflevector(a, b, (LANE / HALF * 2 * HALF + LANE % HALF)...);
    return lower + __builtin_shufflevector(a, b, (LANE / HALF * 2 * HALF + LANE % HALF + HALF)...);
}
template <int HALF, int COUNT>
Floats folded(Floats* vectors) {
    constexpr int LEFT = (COUNT + 1) / 2;
    for (int i = 0; i < LEFT; i++)
        vectors[i] = halved<HALF>(vectors[2 * i], vectors[2 * i + 1 < COUNT ? 2 * i + 1 : 2 * i],
                                  std::make_integer_sequence<int, LANES>());
    if constexpr (HALF > 1) return folded<HALF / 2, LEFT>(vectors);
    return vectors[0];
}

// to[i] = the sum of the lanes of vectors[i], halved until one is left: the same as if it were alone.
template <int COUNT>
void sum_lanes(Floats* vectors, float* to) {
    Floats sums = folded<LANES / 2, COUNT < LANES ? COUNT : LANES>(vectors);
    std::memcpy(to, &sums, sizeof(float) * (COUNT < LANES ? COUNT : LANES));
    if constexpr (COUNT > LANES) sum_lanes<COUNT - LANES>(vectors + LANES, to + LANES);
}

// The dtypes by number, as native.cpp counts them.
template <typename Work>
void with_dtype(int64_t dtype, Work work) {
    if (dtype == 0) work(float{});
    if (dtype == 1) work(Bfloat16{});
    if (dtype == 2) work(Float16{});
}

int64_t bytes_of(int64_t dtype) { return dtype == 0 ? 4 : 2; }

// A number from 1 to MOST as one that is known while compiling.
template <int MOST, typename Work>
void with_count(int64_t count, Work work) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_count<MOST - 1>(count, work);
    work(std::integral_constant<int, MOST>{});
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A stack of weights [slots, rows, columns]; strides, here and below, are in elements.
struct Weights {
    const void* data;
    int64_t dtype, slot_stride, row_stride, column_stride;
};

// One slice: A [K, rank, D], B [K, width, rank], and the columns of the output it is added to.
struct Slice {
    Weights a, b;
    int64_t rank, width;
    void* output;
    int64_t output_dtype, output_stride;
};

// What every slice shares. The columns of inputs and outputs lie side by side.
struct Batch {
    int64_t rows, features, slots, slices, most_threads;
    bool add;
    const void* indices;
    int64_t index_bytes;
    const void* inputs;
    int64_t inputs_dtype, inputs_stride;
    double scaling;
    // Factors of the slots, besides; nothing where all are 1.
    const float* scalings = nullptr;
    // Where rows have several adapters: how many, and the factor of each. Indices and factors are [rows, per_row].
    int64_t per_row = 1;
    const float* factors = nullptr;

    // The same call as the rows of one slot see it.
    Batch of_slot(int64_t slot) const {
        Batch mine = *this;
        if (scalings) mine.scaling *= scalings[slot];
        return mine;
    }
};

// Columns of the output that one task works on at most, and rows of a slot that it takes through A together.
constexpr int64_t WIDTH = 512;
#if defined(XPU_LORA_TILES)
constexpr int64_t ROWS = 2 * TILE;
#else
constexpr int64_t ROWS = 24;
#endif
// Rows that share what is read of A or B: as many as there are registers for.
constexpr int64_t SHARING = LANES == 16 ? 6 : 3;

struct Rows {
    int64_t slot, first, last;
};

// The rows of the batch in the order of their slots, a row once for each of its adapters. Rows without an adapter are in
// no group.
struct Groups {
    std::vector<int64_t> order;
    std::vector<Rows> whole, parts;
    int64_t most_rows = 0;
    // Where rows have several adapters: the factor at each place of `order`, and the rows that are in it.
    std::vector<float> factors;
    std::vector<int64_t> rows;

    explicit Groups(const Batch& batch) {
        auto slot_of = [&](int64_t place) -> int64_t {
            return batch.index_bytes == 8 ? static_cast<const int64_t*>(batch.indices)[place] : static_cast<const int32_t*>(batch.indices)[place];
        };
        // Of many slots, as pages of experts are, most have no rows: to sort the rows takes less than to look at all.
        if (!batch.factors && batch.slots > 16 * batch.rows) {
            std::vector<std::pair<int64_t, int64_t>> rows;
            rows.reserve(batch.rows);
            for (int64_t t = 0; t < batch.rows; t++) {
                int64_t slot = slot_of(t);
                if (slot >= 0 && slot < batch.slots) rows.emplace_back(slot, t);
            }
            std::sort(rows.begin(), rows.end());
            order.reserve(rows.size());
            for (const auto& [slot, row] : rows) order.push_back(row);
            for (int64_t first = 0, last = 0; first < int64_t(rows.size()); first = last) {
                while (last < int64_t(rows.size()) && rows[last].first == rows[first].first) last++;
                add(rows[first].first, first, last);
            }
            return;
        }
        std::vector<int64_t> next(batch.slots + 1, 0);
        for (int64_t place = 0; place < batch.rows * batch.per_row; place++) {
            int64_t slot = slot_of(place);
            if (slot >= 0 && slot < batch.slots) next[slot + 1]++;
        }
        for (int64_t k = 0; k < batch.slots; k++) {
            int64_t first = next[k], last = first + next[k + 1];
            next[k + 1] = last;
            if (first < last) add(k, first, last);
        }
        order.resize(next[batch.slots]);
        if (batch.factors) {
            order_several(batch, slot_of, next);
            return;
        }
        for (int64_t t = 0; t < batch.rows; t++) {
            int64_t slot = slot_of(t);
            if (slot >= 0 && slot < batch.slots) order[next[slot]++] = t;
        }
    }

   private:
    void add(int64_t slot, int64_t first, int64_t last) {
        whole.push_back({slot, first, last});
        most_rows = larger(most_rows, last - first);
        for (int64_t row = first; row < last; row += ROWS) parts.push_back({slot, row, smaller(row + ROWS, last)});
    }

    template <typename SlotOf>
    void order_several(const Batch& batch, SlotOf slot_of, std::vector<int64_t>& next) {
        factors.resize(order.size());
        for (int64_t t = 0; t < batch.rows; t++) {
            bool has_adapter = false;
            for (int64_t place = t * batch.per_row; place < (t + 1) * batch.per_row; place++) {
                int64_t slot = slot_of(place);
                if (slot < 0 || slot >= batch.slots) continue;
                factors[next[slot]] = batch.factors[place];
                order[next[slot]++] = t;
                has_adapter = true;
            }
            if (has_adapter) rows.push_back(t);
        }
    }
};

// Sums of products, as many as a vector has lanes: added up in the order of the columns, the same for every row.
template <typename X, typename A>
struct Products {
    static constexpr int COLUMNS = LANES;
    using Inputs = Floats;
    using Weights = Floats;
    static Inputs inputs(const X* from) { return load<LANES>(from); }
    static Weights weights(const A* from) { return load<LANES>(from); }
    static void add(Floats& sums, Inputs x, Weights a) { sums = multiply_add(x, a, sums); }
};
#if defined(__AVX512BF16__)
// Two products of bfloat16 a lane, exact, and summed as float32 (with subnormal inputs as zero).
template <>
struct Products<Bfloat16, Bfloat16> {
    static constexpr int COLUMNS = 32;
    using Inputs = __m512bh;
    using Weights = __m512bh;
    static Inputs inputs(const Bfloat16* from) { return load_raw<__m512bh>(from); }
    static Weights weights(const Bfloat16* from) { return load_raw<__m512bh>(from); }
    static void add(Floats& sums, Inputs x, Weights a) { sums = (Floats)_mm512_dpbf16_ps((__m512)sums, x, a); }
};
#else
// Twice as many bfloat16 fill two vectors, one of those at even places and one of those at odd: half the instructions.
template <>
struct Products<Bfloat16, Bfloat16> {
    static constexpr int COLUMNS = 2 * LANES;
    struct Pair {
        Floats even, odd;
    };
    using Inputs = Pair;
    using Weights = Pair;
    static Pair inputs(const Bfloat16* from) {
        auto bits = load_raw<VectorOf<uint32_t, LANES>::type>(from);
        return {(Floats)(bits << 16), (Floats)(bits & 0xffff0000)};
    }
    static Pair weights(const Bfloat16* from) { return inputs(from); }
    static void add(Floats& sums, const Pair& x, const Pair& a) {
        sums = multiply_add(x.even, a.even, sums);
        sums = multiply_add(x.odd, a.odd, sums);
    }
};
#endif

// hidden[m][n] = scaling * sum over d of a[n][d] * x[m][d]
template <int M, int N, typename X, typename A>
void dots(const X* const* x, const A* a, int64_t a_stride, int64_t features, float scaling, float* const* hidden) {
    using P = Products<X, A>;
    Floats sums[M][N] = {};
    int64_t d = 0;
    for (; d + P::COLUMNS <= features; d += P::COLUMNS) {
        typename P::Inputs inputs[M];
        for (int m = 0; m < M; m++) inputs[m] = P::inputs(x[m] + d);
        for (int n = 0; n < N; n++) {
            typename P::Weights weights = P::weights(a + n * a_stride + d);
            for (int m = 0; m < M; m++) P::add(sums[m][n], inputs[m], weights);
        }
    }
    float totals[M][N];
    sum_lanes<M * N>(sums[0], totals[0]);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum = totals[m][n];
            for (int64_t rest = d; rest < features; rest++)
                sum = multiply_add(to_float(x[m][rest]), to_float(a[n * a_stride + rest]), sum);
            hidden[m][n] = scaling * sum;
        }
}

template <int N, typename X, typename A>
void shrink_rows(const Batch& batch, const int64_t* order, int64_t rows, const A* a, int64_t a_stride, int64_t rank,
                 float* hidden) {
    for (int64_t done = 0; done < rows;) {
        const X* x[SHARING];
        float* results[SHARING];
        int64_t taken = smaller(rows - done, SHARING);
        for (int64_t m = 0; m < taken; m++) {
            x[m] = static_cast<const X*>(batch.inputs) + order[done + m] * batch.inputs_stride;
            results[m] = hidden + (done + m) * rank;
        }
        float scaling = float(batch.scaling);
        with_count<SHARING>(taken, [&](auto count) {
            dots<decltype(count)::value, N>(x, a, a_stride, batch.features, scaling, results);
        });
        done += taken;
    }
}

// Of eight ranks together, or four, or one.
template <typename X, typename A>
void shrink_ranks(int64_t ranks, const Batch& batch, const int64_t* order, int64_t rows, const A* a, int64_t a_stride,
                  int64_t rank, float* hidden) {
    if (ranks == 8) shrink_rows<8, X>(batch, order, rows, a, a_stride, rank, hidden);
    if (ranks == 4) shrink_rows<4, X>(batch, order, rows, a, a_stride, rank, hidden);
    if (ranks == 1) shrink_rows<1, X>(batch, order, rows, a, a_stride, rank, hidden);
}

#if defined(XPU_LORA_TILES)
using Words = VectorOf<uint32_t, 16>::type;

// Four pairs of neighbours of each of four rows.
Words four_pairs(const Bfloat16* a, const Bfloat16* b, const Bfloat16* c, const Bfloat16* d) {
#if defined(__AVX512F__)
    __m512i first = _mm512_inserti32x4(_mm512_castsi128_si512(load_raw<__m128i>(a)), load_raw<__m128i>(b), 1);
    return (Words)_mm512_inserti32x4(_mm512_inserti32x4(first, load_raw<__m128i>(c), 2), load_raw<__m128i>(d), 3);
#else
    const Bfloat16* rows[] = {a, b, c, d};
    Words result;
    for (int i = 0; i < 4; i++) std::memcpy(reinterpret_cast<char*>(&result) + 16 * i, rows[i], 16);
    return result;
#endif
}

// to[k][n] = rows[n][k], where each element is a pair of neighbours, for sixteen pairs of N rows.
template <int N>
void interleave(const Bfloat16* const* rows, int64_t d, Words* to) {
    for (int k = 0; k < 16; k += 4) {
        auto pairs = [&](int i) { return rows[i] + d + 2 * k; };
        if constexpr (N == 4) {
            Words four = four_pairs(pairs(0), pairs(1), pairs(2), pairs(3));
            to[k / 4] = __builtin_shufflevector(four, four, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        } else {
            Words v[4], u[4];
            for (int i = 0; i < 4; i++) v[i] = four_pairs(pairs(i), pairs(4 + i), pairs(8 + i), pairs(12 + i));
            for (int i = 0; i < 4; i++) {
                Words a = v[i / 2 * 2], b = v[i / 2 * 2 + 1];
                u[i] = i % 2 ? __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
                             : __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
            }
            for (int i = 0; i < 4; i++) {
                Words a = u[i / 2], b = u[i / 2 + 2];
                to[k + i] =
                    i % 2 ? __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
                          : __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            }
        }
    }
}

// sums[n][m] = sum over d of a[n][d] * x[m][d], for N rows: a tile of sums, 0, one of A, 1, and one of rows, 2.
template <int N>
void dots_by_tiles(const Bfloat16* const* rows, const Bfloat16* a, int64_t a_stride, int64_t features, int64_t ranks,
                   float* sums) {
    TileSizes sizes;
    sizes.set(0, ranks, 4 * N);
    sizes.set(1, ranks, TILE_BYTES);
    sizes.set(2, TILE, 4 * N);
    set_tiles(sizes);
    const Bfloat16* x[N];
    std::memcpy(x, rows, sizeof x);
    // By turns, so that nothing waits for a tile to be read.
    Words pairs[4][N];
    auto add = [&](const Bfloat16* weights, int64_t stride, int64_t d) {
        Words* mine = pairs[d / 32 % 4];
        interleave<N>(x, d, mine);
        tile_load<1>(weights, 2 * stride);
        tile_load<2>(mine, 4 * N);
        tile_multiply<0, 1, 2>();
    };
    tile_zero<0>();
    int64_t d = 0;
    for (; d + 32 <= features; d += 32) add(a + d, a_stride, d);
    if (d < features) {
        // What is left over, with zeros behind it.
        Bfloat16 rest[N + TILE][32] = {};
        for (int m = 0; m < N; m++) {
            std::memcpy(rest[m], x[m] + d, 2 * (features - d));
            x[m] = rest[m] - d;
        }
        for (int64_t n = 0; n < ranks; n++) std::memcpy(rest[N + n], a + n * a_stride + d, 2 * (features - d));
        add(rest[N], 32, d);
    }
    tile_store<0>(sums, 4 * N);
    release_tiles();
}

// As `shrink_part`, where inputs and A are bfloat16 and A's columns lie side by side.
void shrink_by_tiles(const Batch& batch, const int64_t* order, int64_t rows, const Bfloat16* a, int64_t a_stride,
                     int64_t from, int64_t to, int64_t rank, float* hidden) {
    float scaling = float(batch.scaling);
    for (int64_t r = from; r < to; r += TILE)
        for (int64_t row = 0; row < rows; row += TILE) {
            int64_t ranks = smaller(TILE, to - r), taken = smaller(TILE, rows - row), columns = taken > 4 ? TILE : 4;
            const Bfloat16* x[TILE];
            // The last row fills up what is left of the tile.
            for (int64_t m = 0; m < columns; m++)
                x[m] = static_cast<const Bfloat16*>(batch.inputs) +
                       order[row + smaller(m, taken - 1)] * batch.inputs_stride;
            alignas(64) float sums[TILE * TILE];
            auto* dots = columns == 4 ? dots_by_tiles<4> : dots_by_tiles<TILE>;
            dots(x, a + r * a_stride, a_stride, batch.features, ranks, sums);
            for (int64_t m = 0; m < taken; m++)
                for (int64_t n = 0; n < ranks; n++) hidden[(row + m) * rank + r + n] = scaling * sums[n * columns + m];
        }
}
#endif

// The rank vectors of some rows of one slot, of ranks `from` to `to`.
void shrink_part(const Batch& all, const Slice& slice, const Groups& groups, const Rows& rows, int64_t from, int64_t to,
                 float* hidden, float* scratch) {
    Batch batch = all.of_slot(rows.slot);
    const Weights& a = slice.a;
    const int64_t* order = groups.order.data() + rows.first;
    int64_t count = rows.last - rows.first;
    with_dtype(batch.inputs_dtype, [&](auto x) {
        with_dtype(a.dtype, [&](auto weight) {
            using X = decltype(x);
            using A = decltype(weight);
            const A* first = static_cast<const A*>(a.data) + rows.slot * a.slot_stride;
            float* results = hidden + rows.first * slice.rank;
#if defined(XPU_LORA_TILES)
            if constexpr (std::is_same_v<X, Bfloat16> && std::is_same_v<A, Bfloat16>)
                if (a.column_stride == 1 && has_tiles()) {
                    shrink_by_tiles(batch, order, count, first, a.row_stride, from, to, slice.rank, results);
                    return;
                }
#endif
            for (int64_t r = from; r < to;) {
                int64_t ranks = to - r >= 8 && count == 1 ? 8 : to - r >= 4 ? 4 : 1;
                const A* here = first + r * a.row_stride;
                if (a.column_stride != 1) {
                    for (int64_t n = 0; n < ranks; n++)
                        for (int64_t d = 0; d < batch.features; d++)
                            scratch[n * batch.features + d] = to_float(here[n * a.row_stride + d * a.column_stride]);
                    shrink_ranks<X>(ranks, batch, order, count, scratch, batch.features, slice.rank, results + r);
                } else {
                    shrink_ranks<X>(ranks, batch, order, count, here, a.row_stride, slice.rank, results + r);
                }
                r += ranks;
            }
        });
    });
    if (batch.factors)
        for (int64_t row = rows.first; row < rows.last; row++)
            for (int64_t r = from; r < to; r++) hidden[row * slice.rank + r] *= groups.factors[row];
}

// B is read in short pieces, one of each rank, which the hardware does not see coming: asked for so many bytes ahead.
constexpr int64_t AHEAD = 512;

// output[m][w] (+)= sum over r of hidden[m][r] * b[r][w], for M rows and N vectors of columns
template <int M, int N, typename B, typename Out>
void outer(const float* const* hidden, const B* b, int64_t b_stride, int64_t rank, Out* const* output, bool add) {
    // The rows of the output, too, lie apart.
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N * LANES * int(sizeof(Out)); n += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(output[m]) + n);
    Floats sums[M][N] = {};
    for (int64_t r = 0; r < rank; r++) {
        const B* from = b + r * b_stride;
        for (int n = 0; n < N * LANES * int(sizeof(B)); n += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD + n);
        Floats weights[N];
        for (int n = 0; n < N; n++) weights[n] = load<LANES>(from + n * LANES);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) sums[m][n] = multiply_add(hidden[m][r] - Floats{}, weights[n], sums[m][n]);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            Out* to = output[m] + n * LANES;
            store(add ? load<LANES>(to) + sums[m][n] : sums[m][n], to);
        }
}

template <int M, typename B, typename Out>
void expand_rows(const float* const* hidden, const B* b, int64_t b_stride, int64_t rank, Out* const* output,
                 int64_t width, bool add) {
    constexpr int N = M == 1 || LANES == 16 ? 4 : 2;
    Out* here[M];
    auto step_to = [&](int64_t w) {
        for (int m = 0; m < M; m++) here[m] = output[m] + w;
    };
    int64_t w = 0;
    for (; w + N * LANES <= width; w += N * LANES) {
        step_to(w);
        outer<M, N>(hidden, b + w, b_stride, rank, here, add);
    }
    for (; w + LANES <= width; w += LANES) {
        step_to(w);
        outer<M, 1>(hidden, b + w, b_stride, rank, here, add);
    }
    for (; w < width; w++)
        for (int m = 0; m < M; m++) {
            float sum = 0;
            for (int64_t r = 0; r < rank; r++) sum = multiply_add(hidden[m][r], to_float(b[r * b_stride + w]), sum);
            round_to(add ? to_float(output[m][w]) + sum : sum, output[m][w]);
        }
}

using Eight = VectorOf<float, 8>::type;

// to[r][w] = from[w][r] for eight rows of eight neighbours
template <typename B>
void transpose_eight(const B* from, int64_t from_stride, float* to, int64_t to_stride) {
    Eight v[8], u[8];
    for (int i = 0; i < 8; i++) v[i] = load<8>(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        u[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        u[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; j++) {
            v[j] = __builtin_shufflevector(u[j], u[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            v[j + 2] = __builtin_shufflevector(u[j], u[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        u[j] = __builtin_shufflevector(v[j], v[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        u[j + 4] = __builtin_shufflevector(v[j], v[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int j = 0; j < 8; j++) std::memcpy(to + j * to_stride, &u[j], sizeof u[j]);
}

// A block of B as float32, [rank, WIDTH]: its columns side by side.
template <typename B>
void pack(const B* from, const Weights& b, int64_t width, int64_t rank, float* to) {
    int64_t r = 0;
    if (b.row_stride == 1) {
        for (; r < rank; r++) {
            const B* row = from + r * b.column_stride;
            int64_t w = 0;
            for (; w + LANES <= width; w += LANES) store(load<LANES>(row + w), to + r * WIDTH + w);
            for (; w < width; w++) to[r * WIDTH + w] = to_float(row[w]);
        }
        return;
    }
    if (b.column_stride == 1)
        for (; r + 8 <= rank; r += 8) {
            int64_t w = 0;
            for (; w + 8 <= width; w += 8)
                transpose_eight(from + w * b.row_stride + r, b.row_stride, to + r * WIDTH + w, WIDTH);
            for (; w < width; w++)
                for (int64_t i = r; i < r + 8; i++) to[i * WIDTH + w] = to_float(from[w * b.row_stride + i]);
        }
    for (; r < rank; r++)
        for (int64_t w = 0; w < width; w++)
            to[r * WIDTH + w] = to_float(from[w * b.row_stride + r * b.column_stride]);
}

// Many rows are better served by weights that were converted once, where vectors are short, and where there are tiles:
// the nearest cache of those processors holds them.
bool converts(const Weights& b, int64_t rows) {
    return b.dtype != 0 && (LANES < 16 ? rows > 8 : has_tiles() && rows > 24);
}

// All rows of one slot into columns `from` to `to` of a slice's output.
void expand_part(const Batch& batch, const Slice& slice, const Groups& groups, const Rows& rows, int64_t from, int64_t to,
                 const float* hidden, float* scratch) {
    const Weights& b = slice.b;
    with_dtype(b.dtype, [&](auto weight) {
        with_dtype(slice.output_dtype, [&](auto out) {
            using B = decltype(weight);
            using Out = decltype(out);
            const B* first = static_cast<const B*>(b.data) + rows.slot * b.slot_stride + from * b.row_stride;
            auto run = [&](auto weights, int64_t stride) {
                for (int64_t row = rows.first; row < rows.last;) {
                    const float* h[SHARING];
                    Out* outputs[SHARING];
                    int64_t taken = smaller(rows.last - row, SHARING);
                    for (int64_t m = 0; m < taken; m++) {
                        h[m] = hidden + (row + m) * slice.rank;
                        outputs[m] = static_cast<Out*>(slice.output) +
                                     groups.order[row + m] * slice.output_stride + from;
                    }
                    with_count<SHARING>(taken, [&](auto count) {
                        constexpr int M = decltype(count)::value;
                        expand_rows<M>(h, weights, stride, slice.rank, outputs, to - from, batch.add);
                    });
                    row += taken;
                }
            };
            if (b.row_stride == 1 && !converts(b, rows.last - rows.first)) {
                run(first, b.column_stride);
            } else {
                pack(first, b, to - from, slice.rank, scratch);
                run(static_cast<const float*>(scratch), WIDTH);
            }
        });
    });
}

// output[t] += sums[t], for columns of some rows of the batch; of sums the rows and columns lie together.
void add_sums(const Slice& slice, const std::vector<int64_t>& rows, int64_t from, int64_t to, const float* sums) {
    with_dtype(slice.output_dtype, [&](auto out) {
        using Out = decltype(out);
        for (int64_t t : rows) {
            Out* output = static_cast<Out*>(slice.output) + t * slice.output_stride + from;
            const float* added = sums + t * (to - from);
            int64_t w = 0;
            for (; w + LANES <= to - from; w += LANES)
                store(load<LANES>(output + w) + load<LANES>(added + w), output + w);
            for (; w < to - from; w++) round_to(to_float(output[w]) + added[w], output[w]);
        }
    });
}

// How many threads a call gets: all or one. With some of them OpenMP would end the others, and start them again for the
// next product.
//
// A region waits for all of its threads. Where another process keeps one of them from running, that takes milliseconds.
// After a short call that did so, one thread does the next ones alone.
class Threads {
   public:
    // Of a call that should take so many nanoseconds on one thread.
    int choose(int64_t most, int64_t expected) {
        is_short_ = expected < 200'000;
        // Each is to get twice what it takes to wake it and wait for it.
        if (most < 2 || expected < 6000 * most) return 1;
        if (!is_short_ || alone_ == 0) return int(most);
        alone_--;
        return 1;
    }
    void took(int64_t nanoseconds) {
        if (is_short_ && nanoseconds > 1'000'000) alone_ = 250;
    }

   private:
    bool is_short_ = false;
    int alone_ = 0;
};

struct Work {
    const Batch& batch;
    const Slice* slices;
    Groups groups;
    // Rank vectors of all slices, [rows with an adapter, rank] each, and memory for one task of each thread that needs
    // weights in another order; not cleared, since that would take longer than many a call.
    std::unique_ptr<float[]> hidden, scratch;
    // Where rows have several adapters: for a task of each thread what is added to its columns of all rows, if that is
    // to be rounded once.
    std::unique_ptr<float[]> sums;
    std::vector<int64_t> hidden_at;
    int64_t scratch_size = 0;
    // Whether the rows and columns of some B change places before it is multiplied.
    bool transposes = false;
    int threads;
    // How many tasks of each kind have been taken.
    std::unique_ptr<std::atomic<int64_t>[]> taken;

    Work(const Batch& batch, const Slice* slices)
        : batch(batch), slices(slices), groups(batch), taken(new std::atomic<int64_t>[2 * batch.slices]()) {
        int64_t size = 0;
        for (int64_t s = 0; s < batch.slices; s++) {
            hidden_at.push_back(size);
            size += int64_t(groups.order.size()) * slices[s].rank;
            const Weights &a = slices[s].a, &b = slices[s].b;
            if (b.data && (b.row_stride != 1 || converts(b, groups.most_rows)))
                scratch_size = larger(scratch_size, slices[s].rank * WIDTH);
            transposes |= b.data && b.row_stride != 1;
            if (a.data && a.column_stride != 1) scratch_size = larger(scratch_size, 8 * batch.features);
        }
        hidden.reset(new float[size]);
        threads = chosen().choose(batch.most_threads, expected());
        scratch.reset(new float[scratch_size * threads]);
        if (batch.factors && rounds(batch, slices)) sums.reset(new float[batch.rows * WIDTH * threads]);
    }

    // Whether some output holds fewer bits than sums have.
    static bool rounds(const Batch& batch, const Slice* slices) {
        return std::any_of(slices, slices + batch.slices, [](const Slice& slice) { return slice.output_dtype != 0; });
    }

    // Nanoseconds of one thread: 40 multiplications and 20 bytes of weights in each (a core of an EPYC with AVX-512).
    int64_t expected() const {
        int64_t multiplied = 0, read = 0;
        for (int64_t s = 0; s < batch.slices; s++) {
            const Slice& slice = slices[s];
            int64_t in_a = slice.a.data ? slice.rank * batch.features : 0;
            int64_t in_b = slice.b.data ? slice.rank * slice.width : 0;
            multiplied += in_a + in_b;
            read += in_a * (slice.a.dtype ? 2 : 4) + in_b * (slice.b.dtype ? 2 : 4);
        }
        return int64_t(groups.order.size()) * multiplied / 40 + int64_t(groups.whole.size()) * read / 20;
    }

    // Has all threads of the call run the same.
    template <typename Region>
    void on_threads(Region region) {
        auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads) if (threads > 1)
        region();
        if (threads > 1) chosen().took((std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1));
    }

    // Those of the calls of one thread.
    static Threads& chosen() {
        static thread_local Threads threads;
        return threads;
    }

    // Runs tasks 0 to count - 1, shared with the other threads of the region, which call this in the same order.
    template <typename Task>
    void share(int64_t which, int64_t count, Task task) {
        for (int64_t next; (next = taken[which].fetch_add(1, std::memory_order_relaxed)) < count;) task(next);
    }

    // Whether shrink and expand of each part of each slice are one thread's: it waits for no other's rank vectors.
    bool is_in_parts() const {
        int64_t parts = groups.parts.size();
        // That is to be done once for all rows of a slot.
        return parts * batch.slices >= 2 * threads && (!transposes || groups.parts.size() == groups.whole.size());
    }

    // To be called by all threads of a parallel region, as are the next two.
    void add_parts() {
        share(0, int64_t(groups.parts.size()) * batch.slices, [&](int64_t task) {
            int64_t s = task % batch.slices;
            const Rows& rows = groups.parts[task / batch.slices];
            shrink_part(batch, slices[s], groups, rows, 0, slices[s].rank, hidden.get() + hidden_at[s], my_scratch());
            int64_t step = columns_at_once(slices[s]);
            for (int64_t from = 0; from < slices[s].width; from += step)
                expand_part(batch, slices[s], groups, rows, from, smaller(from + step, slices[s].width),
                            hidden.get() + hidden_at[s], my_scratch());
        });
    }

    void shrink() {
        int64_t parts = groups.parts.size();
        // Where there are fewer parts than could keep all threads busy, the ranks are divided, too.
        int64_t ranks = parts * batch.slices >= 4 * threads ? 1 << 30 : 8;
        for (int64_t s = 0; s < batch.slices; s++) {
            int64_t step = larger(1, smaller(ranks, slices[s].rank)), steps = (slices[s].rank + step - 1) / step;
            share(s, parts * steps, [&](int64_t task) {
                int64_t from = task % steps * step;
                shrink_part(batch, slices[s], groups, groups.parts[task / steps], from,
                            smaller(from + step, slices[s].rank), hidden.get() + hidden_at[s], my_scratch());
            });
        }
    }

    void expand() {
        int64_t slots = groups.whole.size();
        for (int64_t s = 0; s < batch.slices; s++) {
            int64_t width = slices[s].width;
            // Where there are few slots, narrower blocks, so that all threads get some: of whole lines of memory.
            int64_t least = slots ? (4 * threads + slots - 1) / slots : 1;
            int64_t step = (width / larger(least, 1 + width / WIDTH) + 63) / 64 * 64;
            step = larger(64, smaller(step, columns_at_once(slices[s])));
            int64_t blocks = (width + step - 1) / step;
            share(batch.slices + s, slots * blocks, [&](int64_t task) {
                int64_t from = task % blocks * step;
                expand_part(batch, slices[s], groups, groups.whole[task / blocks], from,
                            smaller(from + step, width), hidden.get() + hidden_at[s], my_scratch());
            });
        }
    }

    // Where rows have several adapters: a block of columns is one task for all slots, so that no two threads write to one
    // row, and it is rounded once, after all slots in their order.
    void expand_several() {
        for (int64_t s = 0; s < batch.slices; s++) {
            int64_t width = slices[s].width;
            int64_t step = (width / larger(2 * threads, 1 + width / WIDTH) + 63) / 64 * 64;
            step = larger(64, smaller(step, columns_at_once(slices[s])));
            share(batch.slices + s, (width + step - 1) / step, [&](int64_t task) {
                int64_t from = task * step, to = smaller(from + step, width);
                if (slices[s].output_dtype == 0) {
                    for (const Rows& rows : groups.whole)
                        expand_part(batch, slices[s], groups, rows, from, to, hidden.get() + hidden_at[s], my_scratch());
                    return;
                }
                float* mine = sums.get() + omp_get_thread_num() * batch.rows * WIDTH;
                for (int64_t t : groups.rows) std::memset(mine + t * (to - from), 0, sizeof(float) * (to - from));
                Slice into = slices[s];
                // As if the columns before these were there, too.
                into.output = mine - from;
                into.output_dtype = 0;
                into.output_stride = to - from;
                for (const Rows& rows : groups.whole)
                    expand_part(batch, into, groups, rows, from, to, hidden.get() + hidden_at[s], my_scratch());
                add_sums(slices[s], groups.rows, from, to, mine);
            });
        }
    }

    // What is read of 16 bits a number is to stay in the nearest cache until its neighbours are read, too; but not where
    // each rank is in a page of memory of its own, and every block has to find them all again.
    static int64_t columns_at_once(const Slice& slice) {
        bool in_few_pages = slice.b.column_stride < 2048 && slice.b.row_stride == 1;
        if (slice.b.dtype == 0 || !in_few_pages) return WIDTH;
        return smaller(WIDTH, larger(64, 8192 / larger(1, slice.rank) / 64 * 64));
    }

    float* my_scratch() { return scratch.get() + omp_get_thread_num() * scratch_size; }
};

// Every slice's shrink and expand: output[t] += B (scaling A inputs[t]).
void add_slices(const Batch& batch, const Slice* slices) {
    Work work(batch, slices);
    bool in_parts = work.is_in_parts();
    work.on_threads([&] {
        if (in_parts) return work.add_parts();
        work.shrink();
#pragma omp barrier
        work.expand();
    });
}

// The same for rows with several adapters each: output[t] += the sum of factor B (scaling A inputs[t]).
void add_several(const Batch& batch, const Slice* slices) {
    // So many rows at a time, so that a task's sums stay in the cache of its core.
    int64_t most = Work::rounds(batch, slices) ? 128 : batch.rows;
    std::vector<Slice> moved(slices, slices + batch.slices);
    for (int64_t first = 0; first < batch.rows; first += most) {
        Batch part = batch;
        part.rows = smaller(most, batch.rows - first);
        part.inputs = static_cast<const char*>(batch.inputs) + first * batch.inputs_stride * bytes_of(batch.inputs_dtype);
        part.indices = static_cast<const char*>(batch.indices) + first * batch.per_row * batch.index_bytes;
        part.factors = batch.factors + first * batch.per_row;
        for (int64_t s = 0; s < batch.slices; s++)
            moved[s].output = static_cast<char*>(slices[s].output) +
                              first * slices[s].output_stride * bytes_of(slices[s].output_dtype);
        Work work(part, moved.data());
        if (work.groups.order.empty()) continue;
        work.on_threads([&] {
            work.shrink();
#pragma omp barrier
            work.expand_several();
        });
    }
}

// output[t, :R] = scaling A inputs[t], and 0 for rows without an adapter.
void shrink_slice(const Batch& batch, const Slice* slice) {
    Work work(batch, slice);
    work.on_threads([&] { work.shrink(); });
    with_dtype(slice->output_dtype, [&](auto out) {
        using Out = decltype(out);
        Out* output = static_cast<Out*>(slice->output);
        for (int64_t t = 0; t < batch.rows; t++)
            for (int64_t r = 0; r < slice->rank; r++) round_to(0, output[t * slice->output_stride + r]);
        for (size_t row = 0; row < work.groups.order.size(); row++)
            for (int64_t r = 0; r < slice->rank; r++)
                round_to(work.hidden[row * slice->rank + r],
                         output[work.groups.order[row] * slice->output_stride + r]);
    });
}

// output[t] (+)= B inputs[t], where the inputs are rank vectors; rows without an adapter keep their value.
void expand_slice(const Batch& batch, const Slice* slice) {
    Work work(batch, slice);
    with_dtype(batch.inputs_dtype, [&](auto x) {
        using X = decltype(x);
        for (size_t row = 0; row < work.groups.order.size(); row++) {
            const X* from = static_cast<const X*>(batch.inputs) + work.groups.order[row] * batch.inputs_stride;
            for (int64_t r = 0; r < slice->rank; r++) work.hidden[row * slice->rank + r] = to_float(from[r]);
        }
    });
    work.on_threads([&] { work.expand(); });
}

}  // namespace
