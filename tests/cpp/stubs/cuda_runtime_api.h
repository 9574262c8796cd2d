// What csrc/cuda/operators.cpp uses of the CUDA runtime: enough to check the operators' source where there is no CUDA
// toolkit. Nothing here can be linked.
#pragma once

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
