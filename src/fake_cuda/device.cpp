#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <limits>

#include "cuda_types.h"

namespace fake_cuda {

namespace {

std::uint64_t number(const char* name, std::uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 0);
}

}  // namespace

Device Device::from_environment() {
    Device device;
    if (const char* capability = std::getenv("NANOSERVE_FAKE_CUDA_CAPABILITY")) {
        std::sscanf(capability, "%d.%d", &device.major, &device.minor);
    }
    device.driver_version = static_cast<int>(number("NANOSERVE_FAKE_CUDA_VERSION", 12080));
    device.num_sms = static_cast<int>(number("NANOSERVE_FAKE_CUDA_SMS", 132));
    device.memory_bytes = number("NANOSERVE_FAKE_CUDA_MEMORY", device.memory_bytes);
    device.order = static_cast<std::uint32_t>(number("NANOSERVE_FAKE_CUDA_ORDER", 0));
    return device;
}

// CUDA C Programming Guide, "Compute Capabilities": KiB per multiprocessor, of which 1 KiB per block is
// reserved.
int Device::shared_bytes_per_block() const {
    const int kib = major >= 9 ? 228 : major == 8 && (minor == 0 || minor == 7) ? 164 : major == 8 ? 100 : 64;
    return kib * 1024 - (major >= 8 ? kReservedSharedBytes : 0);
}

std::optional<int> Device::attribute(int number) const {
    switch (number) {
        case 1:  // MAX_THREADS_PER_BLOCK
        case 2:  // MAX_BLOCK_DIM_X
        case 3:  // MAX_BLOCK_DIM_Y
            return 1024;
        case 4:  // MAX_BLOCK_DIM_Z
            return 64;
        case 5:  // MAX_GRID_DIM_X
            return std::numeric_limits<int>::max();
        case 6:  // MAX_GRID_DIM_Y
        case 7:  // MAX_GRID_DIM_Z
            return 65535;
        case 8:  // MAX_SHARED_MEMORY_PER_BLOCK
            return kDefaultSharedBytes;
        case 9:  // TOTAL_CONSTANT_MEMORY
            return 65536;
        case 10:  // WARP_SIZE
            return 32;
        case 11:  // MAX_PITCH
            return static_cast<int>(kMaxPitch);
        case 12:  // MAX_REGISTERS_PER_BLOCK
        case 82:  // MAX_REGISTERS_PER_MULTIPROCESSOR
            return 65536;
        case 13:  // CLOCK_RATE, kHz
            return 1'700'000;
        case 16:  // MULTIPROCESSOR_COUNT
            return num_sms;
        case 31:  // CONCURRENT_KERNELS
        case 41:  // UNIFIED_ADDRESSING
        case 78:  // STREAM_PRIORITIES_SUPPORTED
            return 1;
        case 36:  // MEMORY_CLOCK_RATE, kHz
            return 2'600'000;
        case 37:  // GLOBAL_MEMORY_BUS_WIDTH, bits
            return 5120;
        case 38:  // L2_CACHE_SIZE
            return 50 * 1024 * 1024;
        case 39:  // MAX_THREADS_PER_MULTIPROCESSOR
            return 2048;
        case 40:  // ASYNC_ENGINE_COUNT
            return 3;
        case 75:  // COMPUTE_CAPABILITY_MAJOR
            return major;
        case 76:  // COMPUTE_CAPABILITY_MINOR
            return minor;
        case 81:  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
            return shared_bytes_per_block() + (major >= 8 ? kReservedSharedBytes : 0);
        case 97:  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            return shared_bytes_per_block();
        case 106:  // MAX_BLOCKS_PER_MULTIPROCESSOR
            return 32;
        case 111:  // RESERVED_SHARED_MEMORY_PER_BLOCK
            return major >= 8 ? kReservedSharedBytes : 0;
        case 15:  // GPU_OVERLAP is deprecated, 17 KERNEL_EXEC_TIMEOUT, 18 INTEGRATED, 20 COMPUTE_MODE
                  // (default)
        case 17:
        case 18:
        case 20:
        case 83:   // MANAGED_MEMORY
        case 89:   // CONCURRENT_MANAGED_ACCESS
        case 95:   // COOPERATIVE_LAUNCH
        case 115:  // MEMORY_POOLS_SUPPORTED
            return 0;
        default:
            return std::nullopt;
    }
}

}  // namespace fake_cuda
