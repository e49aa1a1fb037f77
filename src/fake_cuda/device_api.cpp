// Initialisation, devices, and the primary context.
#include <cstring>

#include "driver.h"

using namespace fake_cuda;

namespace {
constexpr char kName[] = "nanoserve emulated GPU";
}  // namespace

FAKE_CUDA_EXPORT Result cuInit(unsigned flags) {
    return call(Needs::kNothing, [&](Driver& driver) {
        if (flags != 0) {
            return driver.fail(kInvalidValue, "cuInit: flags must be 0");
        }
        if (driver.num_retained == 0) {
            driver.device = Device::from_environment();
            driver.is_initialized = true;
        }
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDriverGetVersion(int* version) {
    return call(Needs::kNothing, [&](Driver& driver) {
        *version = driver.device.driver_version;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDeviceGetCount(int* count) {
    return call(Needs::kInit, [&](Driver&) {
        *count = 1;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDeviceGet(int* device, int ordinal) {
    return call(Needs::kInit, [&](Driver& driver) {
        if (ordinal != 0) {
            return driver.fail(kInvalidDevice, "there is device 0 only");
        }
        *device = 0;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDeviceGetName(char* name, int size, int) {
    return call(Needs::kInit, [&](Driver&) {
        if (size > 0) {
            std::strncpy(name, kName, static_cast<std::size_t>(size) - 1);
            name[size - 1] = '\0';
        }
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDeviceTotalMem_v2(std::size_t* bytes, int) {
    return call(Needs::kInit, [&](Driver& driver) {
        *bytes = driver.device.memory_bytes;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int) {
    return call(Needs::kInit, [&](Driver& driver) {
        const auto found = driver.device.attribute(attribute);
        if (!found) {
            return driver.fail(kInvalidValue,
                               "device attribute " + std::to_string(attribute) + " is not emulated");
        }
        *value = *found;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDevicePrimaryCtxRetain(void** context, int device) {
    return call(Needs::kInit, [&](Driver& driver) {
        if (device != 0) {
            return driver.fail(kInvalidDevice, "there is device 0 only");
        }
        ++driver.num_retained;
        *context = Driver::context_handle();
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDevicePrimaryCtxRelease_v2(int) {
    return call(Needs::kInit, [&](Driver& driver) {
        if (driver.num_retained == 0) {
            return driver.fail(kInvalidContext, "the primary context was not retained");
        }
        if (--driver.num_retained == 0) {
            driver.synchronize();
            driver.reset_context();
        }
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuDevicePrimaryCtxReset_v2(int) {
    return call(Needs::kInit, [&](Driver& driver) {
        driver.reset_context();
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuCtxSetCurrent(void* context) {
    return call(Needs::kInit, [&](Driver& driver) {
        if (context != nullptr && (context != Driver::context_handle() || driver.num_retained == 0)) {
            return driver.fail(kInvalidContext, "not a context, or one that was released");
        }
        context_is_current() = context != nullptr;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuCtxGetCurrent(void** context) {
    return call(Needs::kInit, [&](Driver&) {
        *context = context_is_current() ? Driver::context_handle() : nullptr;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuCtxPushCurrent_v2(void* context) {
    return cuCtxSetCurrent(context);  // with one context, a stack of it is the context
}

FAKE_CUDA_EXPORT Result cuCtxPopCurrent_v2(void** context) {
    const Result result = cuCtxGetCurrent(context);
    return result == kSuccess ? cuCtxSetCurrent(nullptr) : result;
}

FAKE_CUDA_EXPORT Result cuCtxGetDevice(int* device) {
    return call(Needs::kContext, [&](Driver&) {
        *device = 0;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuCtxSynchronize() {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result refused = driver.refuse_in_capture()) {
            return refused;
        }
        driver.synchronize();
        return driver.sticky;
    });
}
