// The CUDA driver API, found at run time: nothing is linked against it, and no header of CUDA's is needed to
// build. A machine without a GPU builds, imports and tests all of this.
//
// What is declared here is the driver's binary interface (CUDA Driver API reference manual): functions by the
// names they have in libcuda.so.1, opaque handles as pointers, CUdeviceptr as an integer, CUresult as int.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace nanoserve::cuda {

using Handle = void*;  // CUcontext, CUmodule, CUfunction, CUstream, CUevent, CUgraph, CUgraphExec
using DevicePtr = std::uint64_t;

// There is no driver, or none that can be used: says what was looked for.
class DriverMissing : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A call of the driver failed: says which, and CUDA's name for it.
class CudaError : public std::runtime_error {
  public:
    CudaError(int code, const std::string& message) : std::runtime_error(message), code_(code) {}
    [[nodiscard]] int code() const { return code_; }

  private:
    int code_;
};

// After this one nothing can be done with the device any more: it says so to every call.
class DeviceLost : public CudaError {
  public:
    using CudaError::CudaError;
};

// CUDA_MEMCPY3D: a box of rows. A row begins at device + (z * height + y) * pitch + x.
struct BoxSide {
    std::size_t x, y, z, level;
    int memory_type;  // CU_MEMORYTYPE_DEVICE
    const void* host;
    DevicePtr device;
    Handle array;
    void* reserved;
    std::size_t pitch, height;  // bytes from row to row, rows from slice to slice
};
struct BoxCopy {
    BoxSide from, to;
    std::size_t width, height, depth;  // bytes, rows, slices
};
static_assert(sizeof(BoxCopy) == 200, "CUDA_MEMCPY3D of a 64-bit machine");

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
    int id;
    int padding;
    union {
        int number;
        std::uint64_t words[8];
    } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute of a 64-bit machine");
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    const LaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig of a 64-bit machine");

// (name here, symbol, arguments)
#define NANOSERVE_CUDA_FUNCTIONS(X)                                                                  \
    X(init, "cuInit", (unsigned))                                                                    \
    X(driver_version, "cuDriverGetVersion", (int*))                                                  \
    X(error_name, "cuGetErrorName", (int, const char**))                                             \
    X(error_string, "cuGetErrorString", (int, const char**))                                         \
    X(device_count, "cuDeviceGetCount", (int*))                                                      \
    X(device_get, "cuDeviceGet", (int*, int))                                                        \
    X(device_name, "cuDeviceGetName", (char*, int, int))                                             \
    X(device_attribute, "cuDeviceGetAttribute", (int*, int, int))                                    \
    X(device_total_memory, "cuDeviceTotalMem_v2", (std::size_t*, int))                               \
    X(primary_context_retain, "cuDevicePrimaryCtxRetain", (Handle*, int))                            \
    X(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (int))                                \
    X(context_set_current, "cuCtxSetCurrent", (Handle))                                              \
    X(memory_info, "cuMemGetInfo_v2", (std::size_t*, std::size_t*))                                  \
    X(memory_alloc, "cuMemAlloc_v2", (DevicePtr*, std::size_t))                                      \
    X(memory_free, "cuMemFree_v2", (DevicePtr))                                                      \
    X(host_alloc, "cuMemHostAlloc", (void**, std::size_t, unsigned))                                 \
    X(host_free, "cuMemFreeHost", (void*))                                                           \
    X(copy_to_device, "cuMemcpyHtoDAsync_v2", (DevicePtr, const void*, std::size_t, Handle))         \
    X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void*, DevicePtr, std::size_t, Handle))                 \
    X(copy_on_device, "cuMemcpyDtoDAsync_v2", (DevicePtr, DevicePtr, std::size_t, Handle))           \
    X(copy_box, "cuMemcpy3DAsync_v2", (const BoxCopy*, Handle))                                      \
    X(fill, "cuMemsetD8Async", (DevicePtr, unsigned char, std::size_t, Handle))                      \
    X(stream_create, "cuStreamCreate", (Handle*, unsigned))                                          \
    X(stream_destroy, "cuStreamDestroy_v2", (Handle))                                                \
    X(stream_synchronize, "cuStreamSynchronize", (Handle))                                           \
    X(event_create, "cuEventCreate", (Handle*, unsigned))                                            \
    X(event_destroy, "cuEventDestroy_v2", (Handle))                                                  \
    X(event_record, "cuEventRecord", (Handle, Handle))                                               \
    X(event_synchronize, "cuEventSynchronize", (Handle))                                             \
    X(event_elapsed, "cuEventElapsedTime", (float*, Handle, Handle))                                 \
    X(module_load, "cuModuleLoadData", (Handle*, const void*))                                       \
    X(module_unload, "cuModuleUnload", (Handle))                                                     \
    X(module_function, "cuModuleGetFunction", (Handle*, Handle, const char*))                        \
    X(function_attribute, "cuFuncGetAttribute", (int*, int, Handle))                                 \
    X(function_set_attribute, "cuFuncSetAttribute", (Handle, int, int))                              \
    X(launch, "cuLaunchKernel",                                                                      \
      (Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, \
       void**))                                                                                      \
    X(capture_begin, "cuStreamBeginCapture_v2", (Handle, int))                                       \
    X(capture_end, "cuStreamEndCapture", (Handle, Handle*))                                          \
    X(graph_instantiate, "cuGraphInstantiateWithFlags", (Handle*, Handle, unsigned long long))       \
    X(graph_launch, "cuGraphLaunch", (Handle, Handle))                                               \
    X(graph_exec_destroy, "cuGraphExecDestroy", (Handle))                                            \
    X(graph_destroy, "cuGraphDestroy", (Handle))

// The same that older drivers do not have: null there.
#define NANOSERVE_NEWER_CUDA_FUNCTIONS(X)                                                \
    X(launch_with, "cuLaunchKernelEx", (const LaunchConfig*, Handle, void**, void**))    \
    X(tensor_map_tiled, "cuTensorMapEncodeTiled",                                        \
      (void*, int, std::uint32_t, DevicePtr, const std::uint64_t*, const std::uint64_t*, \
       const std::uint32_t*, const std::uint32_t*, int, int, int, int))

struct Driver {
#define NANOSERVE_DECLARE(name, symbol, arguments) int(*name) arguments = nullptr;
    NANOSERVE_CUDA_FUNCTIONS(NANOSERVE_DECLARE)
    NANOSERVE_NEWER_CUDA_FUNCTIONS(NANOSERVE_DECLARE)
#undef NANOSERVE_DECLARE
};

// The driver of this process: libcuda.so.1, or the library that NANOSERVE_CUDA_DRIVER names. Loaded and
// initialised by the first call.
const Driver& driver();

// Throws unless a call succeeded; `what` names it, as in "cuMemAlloc of 4096 bytes".
void check(int result, const std::string& what);
[[nodiscard]] std::string error_text(int result);

}  // namespace nanoserve::cuda
