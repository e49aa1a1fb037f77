#include "cuda_driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "errors.h"

namespace nanoserve::cuda {

namespace {

constexpr int kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY

Driver load() {
    const char* const override_path = std::getenv("NANOSERVE_CUDA_DRIVER");
    const std::string path =
        override_path != nullptr && *override_path != '\0' ? override_path : "libcuda.so.1";
    // Never closed: handles of the driver outlive whoever made them, up to the end of the process.
    void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* const why = ::dlerror();
        throw DriverMissing("no CUDA driver: " + std::string(why != nullptr ? why : path) +
                            "; it comes with NVIDIA's kernel driver, or NANOSERVE_CUDA_DRIVER names it");
    }
    Driver found;
    const auto symbol = [&](const char* name) {
        void* const address = ::dlsym(library, name);
        if (address == nullptr) {
            throw DriverMissing("the CUDA driver " + path + " has no " + name + ": it is too old");
        }
        return address;
    };
#define NANOSERVE_FIND(name, text, arguments) \
    found.name = reinterpret_cast<decltype(found.name)>(symbol(text));
    NANOSERVE_CUDA_FUNCTIONS(NANOSERVE_FIND)
#undef NANOSERVE_FIND
#define NANOSERVE_FIND(name, text, arguments) \
    found.name = reinterpret_cast<decltype(found.name)>(::dlsym(library, text));
    NANOSERVE_NEWER_CUDA_FUNCTIONS(NANOSERVE_FIND)
#undef NANOSERVE_FIND
    if (const int result = found.init(0); result != 0) {
        const char* name = nullptr;
        static_cast<void>(found.error_name(result, &name));
        throw DriverMissing("the CUDA driver " + path + " cannot be used: " +
                            (name != nullptr ? name : "error " + std::to_string(result)));
    }
    return found;
}

// Errors of which the manual says that the process must end to use the device again: an uncorrectable error
// of the memory, and whatever a kernel did wrong.
bool is_final(int result) {
    constexpr std::array kFinal = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721};
    return std::ranges::find(kFinal, result) != kFinal.end();
}

}  // namespace

const Driver& driver() {
    // A failure is not remembered: the next call tries again.
    static const Driver loaded = load();
    return loaded;
}

std::string error_text(int result) {
    const char* name = nullptr;
    const char* text = nullptr;
    static_cast<void>(driver().error_name(result, &name));
    static_cast<void>(driver().error_string(result, &text));
    return std::string(name != nullptr ? name : "an unknown error") + " (" + std::to_string(result) +
           (text != nullptr ? std::string(", ") + text : "") + ")";
}

void check(int result, const std::string& what) {
    if (result == 0) {
        return;
    }
    const std::string message = what + ": " + error_text(result);
    if (result == kOutOfMemory) {
        throw OutOfMemory(message);
    }
    if (is_final(result)) {
        throw DeviceLost(result, message);
    }
    throw CudaError(result, message);
}

}  // namespace nanoserve::cuda
