// Work for the emulated device that is none of the driver's own: what a library such as cuBLAS would launch.
#pragma once

#include "cuda_types.h"

// Puts run(data) into a stream, or into the graph that it captures. What it returns, if not success, breaks
// the context. It may not call the driver; release(data) follows when nothing can run it any more.
FAKE_CUDA_EXPORT fake_cuda::Result fake_cuda_enqueue(void* stream, fake_cuda::Result (*run)(void*),
                                                     void* data, void (*release)(void*));
