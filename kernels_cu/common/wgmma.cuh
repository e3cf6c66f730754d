// Matrix products of a warpgroup (four warps, 128 threads), asynchronous, with float32 accumulators. sm_90a.
//
// c (64 x N) += a (64 x 16) * b (16 x N). b lies in shared memory in the tiles of common/tma.cuh, a there or in registers.
// Warp w holds rows 16 w to 16 w + 15; its lane l rows l / 4 and l / 4 + 8, and of every 8 columns 2 (l % 4) and the next:
// c[4 n] and c[4 n + 1] are those of columns 8 n and on in the first row, c[4 n + 2] and c[4 n + 3] in the second.
#pragma once

#include "common/types.cuh"
#include "common/tma.cuh"

typedef unsigned long long u64;

// From here on registers of accumulators and operands belong to the products that follow.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING of the latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Keeps the compiler from moving uses of these registers over the fences and waits around.
template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void pin(u32 (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Where an operand lies, for wgmma: its address, two strides, and that it is swizzled by 128 bytes.
__device__ __forceinline__ u64 describe(u32 address, u32 leading_bytes, u32 stride_bytes) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 | static_cast<u64>(stride_bytes >> 4) << 32 | 1ull << 62;
}
// Rows of 16-bit elements along the summed dimension, 8 rows in SWIZZLE_BYTES. A step of 16 elements is 32 bytes.
__device__ __forceinline__ u64 describe_rows(u32 address) { return describe(address, 16, SWIZZLE_BYTES); }
// Rows across the summed dimension: blocks of 64 columns are `block_bytes` apart. A step of 16 rows is 2048 bytes.
__device__ __forceinline__ u64 describe_columns(u32 address, u32 block_bytes) { return describe(address, block_bytes, SWIZZLE_BYTES); }
__device__ __forceinline__ u64 step_bytes(u64 description, u32 bytes) { return description + (bytes >> 4); }

template <int N> struct Wgmma;

#if DTYPE == DTYPE_BFLOAT16
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif

// The text of operands is what it takes to write an instruction with up to 128 registers once for all widths.
#define REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define REGISTERS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define REGISTERS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define REGISTERS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define REGISTERS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define REGISTERS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define REGISTERS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define REGISTERS_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define LIST_1 REGISTERS_0
#define LIST_2 LIST_1 ", " REGISTERS_1
#define LIST_3 LIST_2 ", " REGISTERS_2
#define LIST_4 LIST_3 ", " REGISTERS_3
#define LIST_5 LIST_4 ", " REGISTERS_4
#define LIST_6 LIST_5 ", " REGISTERS_5
#define LIST_7 LIST_6 ", " REGISTERS_6
#define LIST_8 LIST_7 ", " REGISTERS_7
#define LIST_9 LIST_8 ", " REGISTERS_8
#define LIST_10 LIST_9 ", " REGISTERS_9
#define LIST_11 LIST_10 ", " REGISTERS_10
#define LIST_12 LIST_11 ", " REGISTERS_11
#define LIST_13 LIST_12 ", " REGISTERS_12
#define LIST_14 LIST_13 ", " REGISTERS_13
#define LIST_15 LIST_14 ", " REGISTERS_14
#define LIST_16 LIST_15 ", " REGISTERS_15
#define EIGHT(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define OUTPUTS_1 EIGHT(0)
#define OUTPUTS_2 OUTPUTS_1, EIGHT(8)
#define OUTPUTS_3 OUTPUTS_2, EIGHT(16)
#define OUTPUTS_4 OUTPUTS_3, EIGHT(24)
#define OUTPUTS_5 OUTPUTS_4, EIGHT(32)
#define OUTPUTS_6 OUTPUTS_5, EIGHT(40)
#define OUTPUTS_7 OUTPUTS_6, EIGHT(48)
#define OUTPUTS_8 OUTPUTS_7, EIGHT(56)
#define OUTPUTS_9 OUTPUTS_8, EIGHT(64)
#define OUTPUTS_10 OUTPUTS_9, EIGHT(72)
#define OUTPUTS_11 OUTPUTS_10, EIGHT(80)
#define OUTPUTS_12 OUTPUTS_11, EIGHT(88)
#define OUTPUTS_13 OUTPUTS_12, EIGHT(96)
#define OUTPUTS_14 OUTPUTS_13, EIGHT(104)
#define OUTPUTS_15 OUTPUTS_14, EIGHT(112)
#define OUTPUTS_16 OUTPUTS_15, EIGHT(120)

// N; N / 16; the numbers of the five operands behind the accumulators.
#define WGMMA(N, SIXTEENS, A, B, C, D, E, F)                                                                                  \
    template <> struct Wgmma<N> {                                                                                              \
        /* a in shared memory; c = a b unless `add`. Both have their rows along the summed dimension. */                       \
        static __device__ __forceinline__ void multiply(float (&c)[N / 2], u64 a, u64 b, int add) {                            \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #C ", 0;\n"                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16" WGMMA_TYPES "{" LIST_##SIXTEENS "}, %" #A ", %" #B        \
                         ", add, 1, 1, 0, 0;\n}" : OUTPUTS_##SIXTEENS : "l"(a), "l"(b), "r"(add) : "memory");                  \
        }                                                                                                                      \
        /* a in registers, b with its rows across the summed dimension. */                                                     \
        static __device__ __forceinline__ void multiply(float (&c)[N / 2], const u32* a, u64 b, int add) {                     \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #F ", 0;\n"                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16" WGMMA_TYPES "{" LIST_##SIXTEENS "}, {%" #A ", %" #B       \
                         ", %" #C ", %" #D "}, %" #E ", add, 1, 1, 1;\n}" : OUTPUTS_##SIXTEENS                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add) : "memory");                           \
        }                                                                                                                      \
    };
WGMMA(16, 1, 8, 9, 10, 11, 12, 13)
WGMMA(32, 2, 16, 17, 18, 19, 20, 21)
WGMMA(48, 3, 24, 25, 26, 27, 28, 29)
WGMMA(64, 4, 32, 33, 34, 35, 36, 37)
WGMMA(80, 5, 40, 41, 42, 43, 44, 45)
WGMMA(96, 6, 48, 49, 50, 51, 52, 53)
WGMMA(112, 7, 56, 57, 58, 59, 60, 61)
WGMMA(128, 8, 64, 65, 66, 67, 68, 69)
WGMMA(144, 9, 72, 73, 74, 75, 76, 77)
WGMMA(160, 10, 80, 81, 82, 83, 84, 85)
WGMMA(176, 11, 88, 89, 90, 91, 92, 93)
WGMMA(192, 12, 96, 97, 98, 99, 100, 101)
WGMMA(208, 13, 104, 105, 106, 107, 108, 109)
WGMMA(224, 14, 112, 113, 114, 115, 116, 117)
WGMMA(240, 15, 120, 121, 122, 123, 124, 125)
WGMMA(256, 16, 128, 129, 130, 131, 132, 133)
