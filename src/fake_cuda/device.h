// The device that the driver claims to have: an H100-like GPU unless the environment says otherwise.
//
//     NANOSERVE_FAKE_CUDA_CAPABILITY   compute capability, "9.0"
//     NANOSERVE_FAKE_CUDA_MEMORY       bytes of device memory, 1 GiB
//     NANOSERVE_FAKE_CUDA_VERSION      of the driver, 12080 for CUDA 12.8
//     NANOSERVE_FAKE_CUDA_SMS          multiprocessors, 132
//     NANOSERVE_FAKE_CUDA_ORDER        order of threads in kernels (see the emulator), 0; from 2 on, each
//     launch of
//                                      the process has a seed of its own, derived from it
//
// They are read by cuInit, again whenever no context is retained.
#pragma once

#include <cstdint>
#include <optional>

namespace fake_cuda {

struct Device {
    int major = 9;
    int minor = 0;
    int driver_version = 12080;
    int num_sms = 132;
    std::uint64_t memory_bytes = std::uint64_t{1} << 30;
    std::uint32_t order = 0;

    static Device from_environment();

    // Of CUdevice_attribute; nothing for a number that is not known here.
    [[nodiscard]] std::optional<int> attribute(int number) const;
    // Shared memory that one block can have at most, after asking for it.
    [[nodiscard]] int shared_bytes_per_block() const;
};

inline constexpr int kDefaultSharedBytes = 48 * 1024;  // what a block gets without asking
inline constexpr int kReservedSharedBytes = 1024;      // per block, by the system

}  // namespace fake_cuda
