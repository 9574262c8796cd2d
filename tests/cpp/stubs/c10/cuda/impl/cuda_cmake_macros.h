// Generated in CUDA builds of torch, and missing from CPU builds.
#pragma once
#define C10_CUDA_BUILD_SHARED_LIBS
