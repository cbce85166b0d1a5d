// What a kernel says to those before and behind it in a stream, with which it may overlap: see `cuda.Kernel.launch`.
// Nothing before Hopper.

// The kernel behind this one may start where there is room, once all thread blocks have said so or ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before this one has ended, and what it wrote can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
