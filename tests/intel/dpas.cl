// The matrix engine of Intel's GPUs and its 2-D block loads, emulated, for a sub-group of 16 threads.
//
// Row m of A is element m of all threads, column n of B lies in thread n. Products are exact, and are added in order of
// k, each sum rounded to float; in which order the engine adds, and with how many bits, is not published.
#pragma OPENCL EXTENSION cl_intel_subgroups : enable
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define UNROLLED __attribute__((opencl_unroll_hint))

float as_bf16(ushort bits) { return as_float((uint)bits << 16); }
float as_f16(ushort bits) { return convert_float(as_half(bits)); }
// The engine reads the upper 19 bits.
float as_tf32(float x) { return as_float(as_uint(x) & 0xFFFFE000u); }

// `total + A B`, A of M rows and 16 columns, B of 16 rows, two in each element, and 16 columns.
#define MATRIX_MAD(NAME, M, SHORTS, FLOATS, WIDEN)                                                     \
  __attribute__((overloadable, noinline)) FLOATS NAME(SHORTS a, int8 b, FLOATS total) {                \
    float column[16];                                                                                  \
    UNROLLED for (int k = 0; k < 16; ++k) column[k] = WIDEN((ushort)((uint)b[k / 2] >> (k % 2 * 16))); \
    UNROLLED for (int m = 0; m < M; ++m) UNROLLED for (int k = 0; k < 16; ++k) {                       \
      ushort left = intel_sub_group_shuffle(as_ushort(a[m]), (uint)k);                                 \
      total[m] = fma(WIDEN(left), column[k], total[m]);                                                \
    }                                                                                                  \
    return total;                                                                                      \
  }
MATRIX_MAD(intel_sub_group_bf16_bf16_matrix_mad_k16, 8, short8, float8, as_bf16)
MATRIX_MAD(intel_sub_group_f16_f16_matrix_mad_k16, 8, short8, float8, as_f16)

// A has 8 columns: element i of thread l is in row 2 i + l / 8 and column l % 8.
__attribute__((overloadable, noinline)) float8
intel_sub_group_tf32_tf32_matrix_mad_k8(float4 a, float8 b, float8 total) {
  UNROLLED for (int m = 0; m < 8; ++m) UNROLLED for (int k = 0; k < 8; ++k) {
    float left = intel_sub_group_shuffle(a[m / 2], (uint)(m % 2 * 8 + k));
    total[m] = fma(as_tf32(left), as_tf32(b[k]), total[m]);
  }
  return total;
}

// Of a matrix of `width` bytes and `height` rows, `pitch` bytes apart, zero where it has ended. It starts at a multiple of
// 64 bytes: the compiler has moved `x` by what its address has beyond one, which the hardware does not look at.
ushort element_at(__global void* matrix, int width, int height, int pitch, int x, int y) {
  __global char* start = (__global char*)((ulong)matrix & ~63ul);
  return x >= 0 && y >= 0 && 2 * x < width && y < height ? ((__global ushort*)(start + (long)y * pitch))[x] : (ushort)0;
}

// Blocks of 16 columns from column and row `at` on: thread l gets column l of each block, row by row. Transformed, two rows
// are one element, as the matrix engine wants B.
#define BLOCK_READ(ROWS, BLOCKS)                                                                               \
  __attribute__((overloadable, noinline)) void intel_sub_group_2d_block_read_16b_##ROWS##r16x##BLOCKS##c(     \
      __global void* matrix, int width, int height, int pitch, int2 at, private ushort* elements) {           \
    for (int block = 0; block < BLOCKS; ++block) for (int row = 0; row < ROWS; ++row) {                        \
      int x = at.x + block * 16 + (int)get_sub_group_local_id();                                               \
      elements[block * ROWS + row] = element_at(matrix, width, height, pitch, x, at.y + row);                  \
    }                                                                                                          \
  }                                                                                                            \
  __attribute__((overloadable, noinline)) void                                                                 \
  intel_sub_group_2d_block_read_transform_16b_##ROWS##r16x##BLOCKS##c(                                         \
      __global void* matrix, int width, int height, int pitch, int2 at, private uint* elements) {             \
    for (int block = 0; block < BLOCKS; ++block) for (int row = 0; row < ROWS; row += 2) {                     \
      int x = at.x + block * 16 + (int)get_sub_group_local_id();                                               \
      uint low = element_at(matrix, width, height, pitch, x, at.y + row);                                      \
      uint high = element_at(matrix, width, height, pitch, x, at.y + row + 1);                                 \
      elements[(block * ROWS + row) / 2] = low | high << 16;                                                   \
    }                                                                                                          \
  }
BLOCK_READ(8, 1)
BLOCK_READ(8, 2)
BLOCK_READ(16, 1)
BLOCK_READ(16, 2)
BLOCK_READ(32, 1)
BLOCK_READ(32, 2)

// A hint.
#define BLOCK_PREFETCH(ROWS, BLOCKS)                                                                             \
  __attribute__((overloadable, noinline)) void intel_sub_group_2d_block_prefetch_16b_##ROWS##r16x##BLOCKS##c(   \
      __global void* matrix, int width, int height, int pitch, int2 at) {}
BLOCK_PREFETCH(8, 1)
BLOCK_PREFETCH(8, 2)
BLOCK_PREFETCH(16, 1)
BLOCK_PREFETCH(16, 2)
BLOCK_PREFETCH(32, 1)
BLOCK_PREFETCH(32, 2)
