// AMX's tiles of bfloat16 in plain C++, for tests on any processor: the same sizes, and zeros for subnormal numbers.
// What a processor would raise an error for ends the process.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct EmulatedTiles {
    bool set = false;
    int rows[8] = {}, bytes[8] = {};
    uint8_t data[8][16][64] = {};
};
thread_local EmulatedTiles tiles;

bool has_tiles() { return true; }

template <typename Sizes>
void set_tiles(const Sizes& sizes) {
    if (sizes.palette != 1) std::abort();
    tiles = {};
    tiles.set = true;
    for (int tile = 0; tile < 8; tile++) {
        tiles.rows[tile] = sizes.rows[tile];
        tiles.bytes[tile] = sizes.bytes[tile];
        if (tiles.rows[tile] > 16 || tiles.bytes[tile] > 64) std::abort();
    }
}
void release_tiles() { tiles = {}; }

void check_tile(int tile) {
    if (!tiles.set || !tiles.rows[tile] || !tiles.bytes[tile]) std::abort();
}
template <int TO>
void tile_zero() {
    check_tile(TO);
    std::memset(tiles.data[TO], 0, sizeof tiles.data[TO]);
}
template <int TO>
void tile_load(const void* from, int64_t stride) {
    tile_zero<TO>();
    for (int row = 0; row < tiles.rows[TO]; row++)
        std::memcpy(tiles.data[TO][row], static_cast<const char*>(from) + row * stride, tiles.bytes[TO]);
}
template <int FROM>
void tile_store(void* to, int64_t stride) {
    check_tile(FROM);
    for (int row = 0; row < tiles.rows[FROM]; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[FROM][row], tiles.bytes[FROM]);
}
float without_subnormal(float value) {
    return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value;
}
template <int SUMS, int A, int B>
void tile_multiply() {
    for (int tile : {SUMS, A, B}) check_tile(tile);
    if (tiles.rows[SUMS] != tiles.rows[A] || tiles.bytes[SUMS] != tiles.bytes[B] || tiles.bytes[A] != 4 * tiles.rows[B])
        std::abort();
    auto number = [](int tile, int row, int column) {
        uint16_t half;
        std::memcpy(&half, tiles.data[tile][row] + 2 * column, 2);
        uint32_t bits = uint32_t(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return without_subnormal(value);
    };
    for (int m = 0; m < tiles.rows[SUMS]; m++)
        for (int n = 0; n < tiles.bytes[SUMS] / 4; n++) {
            float sum;
            std::memcpy(&sum, tiles.data[SUMS][m] + 4 * n, 4);
            for (int k = 0; k < tiles.bytes[A] / 2; k++)
                sum = without_subnormal(std::fma(number(A, m, k), number(B, k / 2, 2 * n + k % 2), sum));
            std::memcpy(tiles.data[SUMS][m] + 4 * n, &sum, 4);
        }
}

}  // namespace
