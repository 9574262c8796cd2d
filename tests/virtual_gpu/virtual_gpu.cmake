# The CUDA kernels under the emulator of tests/cpp, included instead of csrc/cuda/cuda.cmake where TDPO_VIRTUAL_GPU is on.
# They are in a library of their own, whose thread-local memory is their shared memory. nvcc is not needed, nor a CUDA
# library: the stand-in runtime of the environment is found when the extension is loaded.
set(TDPO_CUDA_ARCHS emulated)
add_library(cuda_kernels SHARED csrc/cuda/launch.cu tests/virtual_gpu/emulated_kernels.cpp)
set_source_files_properties(csrc/cuda/launch.cu PROPERTIES LANGUAGE CXX)
target_compile_definitions(cuda_kernels PRIVATE TDPO_EMULATOR)
target_include_directories(cuda_kernels PRIVATE tests/cpp)
set_target_properties(cuda_kernels PROPERTIES CXX_VISIBILITY_PRESET default)
target_compile_options(cuda_kernels PRIVATE -x c++ -O2 -fno-strict-aliasing -Wno-unknown-pragmas -Wno-dangling-pointer)
install(TARGETS cuda_kernels DESTINATION .)
