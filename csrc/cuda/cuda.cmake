# The CUDA half of the extension, included where TDPO_CUDA_ARCHS is set. Only the .cu files meet nvcc: they are free of
# torch and compile in seconds.
set(CMAKE_CUDA_ARCHITECTURES ${TDPO_CUDA_ARCHS})
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
add_library(cuda_kernels OBJECT csrc/cuda/token_divergence.cu)
set_target_properties(cuda_kernels PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_compile_options(cuda_kernels PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--extended-lambda --expt-relaxed-constexpr>)
if(TARGET _C)
  target_sources(_C PRIVATE csrc/cuda/operators.cpp $<TARGET_OBJECTS:cuda_kernels>)
  target_include_directories(_C SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  # The runtime is linked statically into the kernels' own objects; torch brings its streams and its allocator.
  target_link_libraries(_C PRIVATE c10_cuda torch_cuda CUDA::cudart)
endif()
