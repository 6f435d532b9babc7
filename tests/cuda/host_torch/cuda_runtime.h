// What csrc/cuda's operators name of the CUDA runtime, on the host.
#pragma once

using cudaStream_t = void*;
