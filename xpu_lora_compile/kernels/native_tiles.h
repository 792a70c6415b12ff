// Products of bfloat16 by the tiles of Intel's AMX, for native_kernels.h.
//
// An element of a product depends on its own row and column alone, to the bit: a tile may hold one row or sixteen. So
// where there are tiles, one row takes them, too.

#if defined(XPU_LORA_EMULATED_TILES)
#include "emulated_tiles.h"
#define XPU_LORA_TILES
#elif defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define XPU_LORA_TILES
#endif

namespace {

// As many rows, and as many bytes in each of them, as a tile has at most.
constexpr int64_t TILE = 16, TILE_BYTES = 64;

struct alignas(64) TileSizes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t its_rows, int64_t its_bytes) {
        rows[tile] = uint8_t(its_rows);
        bytes[tile] = uint16_t(its_bytes);
    }
};

#if !defined(XPU_LORA_TILES)
constexpr bool has_tiles() { return false; }
#elif !defined(XPU_LORA_EMULATED_TILES)
// The kernel of the operating system gives each process leave, or does not.
bool has_tiles() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}
void set_tiles(const TileSizes& sizes) { asm volatile("ldtilecfg %0" : : "m"(sizes)); }
void release_tiles() { asm volatile("tilerelease"); }
template <int TO>
void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TO));
}
template <int TO>
void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TO) : "memory");
}
template <int FROM>
void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(FROM) : "memory");
}
// sums[m][n] += sum over k of a[m][k] b[k / 2][2 n + k % 2]
template <int SUMS, int A, int B>
void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}
#endif

}  // namespace
