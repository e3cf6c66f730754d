// Barriers in shared memory that count arrivals and bytes, and the barriers that groups of warps share. sm_90.
#pragma once

#include "common/types.cuh"

// A ring of COUNT buffers has two barriers for each: `full`, which the loads complete, and `empty`, which the readers
// do. Whoever walks the ring keeps its place here, in one register: which buffer, and the parity of the round.
template <int COUNT>
struct Place {
    int step = 0; // of two rounds
    __device__ __forceinline__ int stage() const { return step >= COUNT ? step - COUNT : step; }
    __device__ __forceinline__ u32 parity() const { return step >= COUNT; }
    __device__ __forceinline__ void advance() { step = step == 2 * COUNT - 1 ? 0 : step + 1; }
};

constexpr u32 BARRIER_BYTES = 8;

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and keeps the phase open until so many bytes have been copied.
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when this thread's asynchronous copies have: each of its threads is one of the arrivals that are counted.
__device__ __forceinline__ void arrive_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@complete bra.uni done;\n"
        "bra.uni again;\n"
        "done:\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// The sixteen barriers of a block, by number: `threads` in all, some of which wait and some of which only arrive.
__device__ __forceinline__ void sync_threads(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void signal_threads(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Orders ordinary accesses to shared memory before those of the copy engine and of wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How many registers a thread of this warpgroup has from here on.
template <int REGISTERS>
__device__ __forceinline__ void shrink_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void grow_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
