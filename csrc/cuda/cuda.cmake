# The CUDA kernels, included where TDPO_CUDA is on. nvcc compiles only the .cu files: without torch's headers they take
# seconds.
enable_language(CUDA)
set(default_archs 80 90)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND default_archs 100)
endif()
set(TDPO_CUDA_ARCHS "${default_archs}" CACHE STRING "CUDA architectures")
set(CMAKE_CUDA_ARCHITECTURES ${TDPO_CUDA_ARCHS})
add_library(cuda_kernels OBJECT csrc/cuda/launch.cu)
set_target_properties(cuda_kernels PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_compile_options(cuda_kernels PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--extended-lambda --expt-relaxed-constexpr>)
