// Names of errors, and of functions.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <string>

#include "driver.h"

using namespace fake_cuda;

namespace {

struct ErrorText {
    Result result;
    const char* name;
    const char* text;
};

constexpr std::array kErrors{
    ErrorText{kSuccess, "CUDA_SUCCESS", "no error"},
    ErrorText{kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    ErrorText{kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    ErrorText{kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    ErrorText{kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    ErrorText{kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    ErrorText{kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    ErrorText{kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    ErrorText{kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    ErrorText{kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    ErrorText{kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    ErrorText{kLaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
              "too many resources requested for launch"},
    ErrorText{kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    ErrorText{kHostMemoryAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
              "part or all of the requested memory range is already mapped"},
    ErrorText{kHostMemoryNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
              "pointer does not correspond to a registered memory region"},
    ErrorText{kIllegalInstruction, "CUDA_ERROR_ILLEGAL_INSTRUCTION",
              "an illegal instruction was encountered"},
    ErrorText{kMisalignedAddress, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    ErrorText{kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    ErrorText{kFeatureNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    ErrorText{kStreamCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
              "operation not permitted when stream is capturing"},
    ErrorText{kStreamCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
              "operation failed due to a previous error during capture"},
    ErrorText{kStreamCaptureUnmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
              "capture was not ended in the same stream as it began"},
    ErrorText{kStreamCaptureUnjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
              "capturing stream has unjoined work"},
    ErrorText{kStreamCaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
              "operation would make the legacy stream depend on a capturing blocking stream"},
    ErrorText{kStreamCaptureWrongThread, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
              "attempt to terminate a thread-local capture sequence from another thread"},
};

const ErrorText* find_error(Result result) {
    const auto* found = std::find_if(kErrors.begin(), kErrors.end(),
                                     [&](const ErrorText& error) { return error.result == result; });
    return found == kErrors.end() ? nullptr : found;
}

}  // namespace

FAKE_CUDA_EXPORT Result cuGetErrorName(Result result, const char** name) {
    const ErrorText* error = find_error(result);
    *name = error != nullptr ? error->name : nullptr;
    return error != nullptr ? kSuccess : kInvalidValue;
}

FAKE_CUDA_EXPORT Result cuGetErrorString(Result result, const char** text) {
    const ErrorText* error = find_error(result);
    *text = error != nullptr ? error->text : nullptr;
    return error != nullptr ? kSuccess : kInvalidValue;
}

// The newest version of a function, by its name without one.
FAKE_CUDA_EXPORT Result cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t,
                                            int* status) {
    Dl_info self{};
    dladdr(reinterpret_cast<void*>(&cuGetErrorName), &self);
    void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    for (const char* version : {"_v2", ""}) {
        if (library != nullptr && *function == nullptr) {
            *function = dlsym(library, (std::string(name) + version).c_str());
        }
    }
    if (library != nullptr) {
        dlclose(library);
    }
    if (status != nullptr) {
        *status = *function != nullptr ? 0 : 1;  // found, or no such symbol
    }
    return *function != nullptr ? kSuccess : kNotFound;
}

FAKE_CUDA_EXPORT Result cuGetProcAddress(const char* name, void** function, int version,
                                         std::uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
