// Single entries of an int32 array: array[index[i]] = value[i]. How a block table on the device follows its host mirror.
//
// Compile-time values: THREADS.

extern "C" __global__ void __launch_bounds__(THREADS) write_entries(int* array, const int* index, const int* value, int count) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) array[index[i]] = value[i];
}
