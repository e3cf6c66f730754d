// Blocks of a cluster: their rank, their barrier, and each other's shared memory. With CLUSTER = 1 all of it is nothing.
//
// Compile-time values: CLUSTER blocks, more than one from sm_90 on only.
#pragma once

#include "common/types.cuh"

__device__ __forceinline__ int cluster_rank() {
    int rank = 0;
#if CLUSTER > 1
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// All threads of all blocks, in two halves: what was written before arriving is seen after waiting.
__device__ __forceinline__ void cluster_arrive() {
#if CLUSTER > 1
    __syncwarp(); // what is aligned wants whole warps
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address, in the cluster's shared memory, of what lies at `local` in the block of this rank.
__device__ __forceinline__ u32 cluster_address(u32 local, int rank) {
    u32 remote = local;
#if CLUSTER > 1
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
#endif
    return remote;
}

__device__ __forceinline__ void store_cluster_quad(u32 address, float4 value) {
#if CLUSTER > 1
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#endif
}

__device__ __forceinline__ void store_cluster_pair(u32 address, float2 value) {
#if CLUSTER > 1
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y) : "memory");
#endif
}
