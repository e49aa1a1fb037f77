// Modules, kernels and launches.
#include <cstring>

#include "driver.h"

using namespace fake_cuda;

namespace {

// CUfunction_attribute
constexpr int kMaxThreadsPerBlock = 0;
constexpr int kStaticSharedBytes = 1;
constexpr int kNumRegisters = 4;
constexpr int kPtxVersion = 5;
constexpr int kBinaryVersion = 6;
constexpr int kMaxDynamicSharedBytes = 8;
constexpr int kSharedCarveout = 9;
constexpr int kLastAttribute = 9;

Result check_launch(Driver& driver, const KernelLaunch& launch) {
    const nvemu::KernelEntry& entry = *launch.function->entry;
    const std::string name = std::string("kernel ") + entry.name + ": ";
    if (launch.shared_bytes > static_cast<std::uint32_t>(launch.function->max_dynamic_bytes)) {
        return driver.fail(kInvalidValue, name + std::to_string(launch.shared_bytes) +
                                              " bytes of dynamic shared memory, it may have " +
                                              std::to_string(launch.function->max_dynamic_bytes) +
                                              " (see cuFuncSetAttribute)");
    }
    nvemu::LaunchRequest request{};
    request.module = launch.function->module->table();
    request.kernel = &entry;
    std::memcpy(request.grid, launch.grid, sizeof request.grid);
    std::memcpy(request.block, launch.block, sizeof request.block);
    request.dynamic_shared_bytes = launch.shared_bytes;
    nvemu::Failure failure{};
    if (nvemu_check_launch(&request, &failure) != 0) {
        return driver.fail(kInvalidValue, name + failure.message);
    }
    return kSuccess;
}

Result take_params(Driver& driver, KernelLaunch& launch, void** params, void** extra) {
    const nvemu::KernelEntry& entry = *launch.function->entry;
    if (extra != nullptr) {
        return driver.fail(kInvalidValue, "parameters in one buffer (extra) are not emulated");
    }
    if (entry.num_params != 0 && params == nullptr) {
        return driver.fail(kInvalidValue, std::string("kernel ") + entry.name + " was given no parameters");
    }
    for (std::uint32_t i = 0; i < entry.num_params; ++i) {
        const auto* bytes = static_cast<const std::byte*>(params[i]);
        launch.params.emplace_back(bytes, bytes + entry.param_bytes[i]);
    }
    return kSuccess;
}

struct LaunchAttribute {  // CUlaunchAttribute
    int id;
    int padding;
    std::uint64_t value[8];
};

constexpr int kProgrammaticStreamSerialization = 6;
constexpr int kEarlyInCapture = 12030;

// A launch that need not wait for what is in front of it is only for a kernel that does so itself. Here it
// waits all the same.
Result check_attributes(Driver& driver, const nvemu::KernelEntry& entry, const LaunchAttribute* attributes,
                        unsigned num_attributes, bool is_captured) {
    for (unsigned i = 0; i < num_attributes; ++i) {
        const bool is_early = attributes[i].id == kProgrammaticStreamSerialization &&
                              static_cast<int>(attributes[i].value[0]) != 0;
        if (is_early && driver.device.major < 9) {
            return driver.fail(kFeatureNotSupported, "programmatic launches need compute capability 9.0");
        }
        if (is_early && is_captured && driver.device.driver_version < kEarlyInCapture) {
            return driver.fail(kStreamCaptureUnsupported,
                               "programmatic launches are captured from CUDA 12.3 on");
        }
        if (is_early && entry.awaits_previous == 0) {
            return driver.fail(kInvalidValue, std::string("kernel ") + entry.name +
                                                  " would begin before what is in front of it has ended, and "
                                                  "has no griddepcontrol.wait");
        }
    }
    return kSuccess;
}

struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned num_attributes;
};

Result launch_kernel(void* handle, const LaunchConfig& config, void** params, void** extra) {
    return call(Needs::kContext, [&](Driver& driver) {
        KernelLaunch launch;
        launch.function = driver.functions.find(handle);
        const auto stream = driver.stream(config.stream);
        if (launch.function == nullptr || stream == nullptr) {
            return driver.fail(kInvalidHandle,
                               launch.function == nullptr ? "no such function" : "no such stream");
        }
        std::memcpy(launch.grid, config.grid, sizeof launch.grid);
        std::memcpy(launch.block, config.block, sizeof launch.block);
        launch.shared_bytes = config.shared_bytes;
        if (const Result bad = check_launch(driver, launch)) {
            return bad;
        }
        if (const Result bad = check_attributes(driver, *launch.function->entry, config.attributes,
                                                config.num_attributes, stream->capture != nullptr)) {
            return bad;
        }
        if (const Result bad = take_params(driver, launch, params, extra)) {
            return bad;
        }
        return driver.submit(stream, [&driver, launch]() mutable { driver.run(launch); });
    });
}

}  // namespace

FAKE_CUDA_EXPORT Result cuModuleLoadData(void** module, const void* image) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result refused = driver.refuse_in_capture()) {
            return refused;
        }
        char reason[512];
        nvemu::Image* loaded = nvemu_load_image(image, reason, sizeof reason);
        if (loaded == nullptr) {
            return driver.fail(kInvalidImage, reason);
        }
        *module = driver.modules.add(std::make_shared<Module>(loaded));
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

FAKE_CUDA_EXPORT Result cuModuleUnload(void* handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto module = driver.modules.find(handle);
        if (module == nullptr) {
            return driver.fail(kInvalidHandle, "no such module");
        }
        if (const Result refused = driver.refuse_in_capture()) {
            return refused;
        }
        driver.synchronize();
        module->is_unloaded = true;
        std::vector<const void*> gone;
        for (const auto& [function_handle, function] : driver.functions.all()) {
            if (function->module == module) {
                gone.push_back(function_handle);
            }
        }
        for (const void* function_handle : gone) {
            driver.functions.remove(function_handle);
        }
        driver.modules.remove(handle);
        return driver.sticky;
    });
}

FAKE_CUDA_EXPORT Result cuModuleGetFunction(void** function, void* handle, const char* name) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto module = driver.modules.find(handle);
        if (module == nullptr) {
            return driver.fail(kInvalidHandle, "no such module");
        }
        const nvemu::ModuleTable& table = *module->table();
        for (std::uint32_t i = 0; i < table.num_kernels; ++i) {
            if (std::strcmp(table.kernels[i].name, name) == 0) {
                // The same handle every time, for attributes that are set stay set.
                for (const auto& [known_handle, known] : driver.functions.all()) {
                    if (known->entry == &table.kernels[i]) {
                        *function = known.get();
                        return kSuccess;
                    }
                }
                const auto made = std::make_shared<Function>();
                made->module = module;
                made->entry = &table.kernels[i];
                made->max_dynamic_bytes =
                    kDefaultSharedBytes - static_cast<int>(made->entry->static_shared_bytes);
                *function = driver.functions.add(made);
                return kSuccess;
            }
        }
        return driver.fail(kNotFound, std::string("the module has no kernel ") + name);
    });
}

FAKE_CUDA_EXPORT Result cuFuncGetAttribute(int* value, int attribute, void* handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto function = driver.functions.find(handle);
        if (function == nullptr) {
            return driver.fail(kInvalidHandle, "no such function");
        }
        if (attribute < 0 || attribute > kLastAttribute) {
            return driver.fail(kInvalidValue,
                               "function attribute " + std::to_string(attribute) + " is not emulated");
        }
        const nvemu::KernelEntry& entry = *function->entry;
        const int capability = 10 * driver.device.major + driver.device.minor;
        switch (attribute) {
            case kMaxThreadsPerBlock:
                *value = entry.max_threads != 0        ? static_cast<int>(entry.max_threads)
                         : entry.required_threads != 0 ? static_cast<int>(entry.required_threads)
                                                       : 1024;
                break;
            case kStaticSharedBytes:
                *value = static_cast<int>(entry.static_shared_bytes);
                break;
            case kNumRegisters:
                *value = 32;  // nobody allocated any
                break;
            case kPtxVersion:
            case kBinaryVersion:
                *value = capability;
                break;
            case kMaxDynamicSharedBytes:
                *value = function->max_dynamic_bytes;
                break;
            default:
                *value = 0;
        }
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuFuncSetAttribute(void* handle, int attribute, int value) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto function = driver.functions.find(handle);
        if (function == nullptr) {
            return driver.fail(kInvalidHandle, "no such function");
        }
        if (attribute == kSharedCarveout) {
            return kSuccess;
        }
        const int most =
            driver.device.shared_bytes_per_block() - static_cast<int>(function->entry->static_shared_bytes);
        if (attribute != kMaxDynamicSharedBytes || value < 0 || value > most) {
            return driver.fail(kInvalidValue, "function attribute " + std::to_string(attribute) + " = " +
                                                  std::to_string(value) +
                                                  ": only the dynamic shared memory (8) can be "
                                                  "set, up to " +
                                                  std::to_string(most) + " bytes here");
        }
        function->max_dynamic_bytes = value;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                       unsigned block_x, unsigned block_y, unsigned block_z,
                                       unsigned shared_bytes, void* stream, void** params, void** extra) {
    const LaunchConfig config{
        {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, nullptr, 0};
    return launch_kernel(function, config, params, extra);
}

FAKE_CUDA_EXPORT Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** params,
                                         void** extra) {
    return launch_kernel(function, *config, params, extra);
}
