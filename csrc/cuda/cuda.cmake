# The CUDA kernels, included where TDPO_CUDA is on. nvcc compiles only the .cu files: without torch's headers they take
# seconds.
set(TDPO_CUDA_ARCHS "80;90;100" CACHE STRING "CUDA architectures")
set(CMAKE_CUDA_ARCHITECTURES ${TDPO_CUDA_ARCHS})
enable_language(CUDA)
add_library(cuda_kernels OBJECT csrc/cuda/launch.cu)
set_target_properties(cuda_kernels PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_compile_options(cuda_kernels PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--extended-lambda --expt-relaxed-constexpr>)
