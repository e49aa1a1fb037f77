// A launch: the grid's blocks one after the other, in an order that depends on the thread order.
//
// Nothing says in which order a GPU runs blocks, so kernels must not care; here 0 is ascending, 1 descending
// and any other order a shuffle. Blocks do not overlap: a kernel whose blocks wait for each other does not
// end.
#include <algorithm>
#include <array>
#include <cstdio>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "block.h"
#include "device_memory.h"
#include "fault_guard.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

constexpr std::uint64_t kMaxGrid[3] = {0x7FFF'FFFF, 65535, 65535};

template <typename... Arguments>
void refuse(Failure& failure, const char* format, Arguments... arguments) {
    failure.kind = FailureKind::kInvalidLaunch;
    std::snprintf(failure.message, sizeof failure.message, format, arguments...);
}

// What the driver refuses, with the same limits as sm_90.
bool is_valid(const LaunchRequest& request, Failure& failure) {
    const KernelEntry& kernel = *request.kernel;
    if (request.module->abi_version != kAbiVersion) {
        refuse(failure, "the module was built for another emulator: version %u, this is %u",
               request.module->abi_version, kAbiVersion);
        return false;
    }
    std::uint64_t threads = 1;
    for (int dim = 0; dim < 3; ++dim) {
        if (request.grid[dim] == 0 || request.grid[dim] > kMaxGrid[dim] || request.block[dim] == 0 ||
            request.block[dim] > FiberStacks::kMaxThreads) {
            refuse(failure, "grid (%u, %u, %u) of blocks (%u, %u, %u): no dimension may be 0 or too large",
                   request.grid[0], request.grid[1], request.grid[2], request.block[0], request.block[1],
                   request.block[2]);
            return false;
        }
        threads *= request.block[dim];
    }
    const std::uint64_t max_threads = kernel.max_threads != 0 ? kernel.max_threads : FiberStacks::kMaxThreads;
    if (threads > max_threads || (kernel.required_threads != 0 && threads != kernel.required_threads)) {
        refuse(failure, "a block of %llu threads: the kernel takes %s %llu",
               static_cast<unsigned long long>(threads), kernel.required_threads != 0 ? "exactly" : "at most",
               static_cast<unsigned long long>(kernel.required_threads != 0 ? kernel.required_threads
                                                                            : max_threads));
        return false;
    }
    const std::uint64_t shared = std::uint64_t{kernel.static_shared_bytes} + request.dynamic_shared_bytes;
    if (shared > SharedMemory::kMaxBytes ||
        request.module->dynamic_offset + request.dynamic_shared_bytes > kSharedBytes) {
        refuse(failure, "%llu bytes of shared memory: at most %llu a block",
               static_cast<unsigned long long>(shared),
               static_cast<unsigned long long>(SharedMemory::kMaxBytes));
        return false;
    }
    return true;
}

std::vector<std::uint32_t> block_order(std::uint64_t num_blocks, std::uint32_t order) {
    std::vector<std::uint32_t> sequence(num_blocks);
    std::iota(sequence.begin(), sequence.end(), 0u);
    if (order == 1) {
        std::reverse(sequence.begin(), sequence.end());
    } else if (order >= 2) {
        std::uint64_t state = order;
        for (std::size_t i = num_blocks; i > 1; --i) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(sequence[i - 1], sequence[(state >> 33) % i]);
        }
    }
    return sequence;
}

void run_grid(const LaunchRequest& request, SharedMemory& shared, Failure& failure) {
    const std::uint64_t num_blocks = std::uint64_t{request.grid[0]} * request.grid[1] * request.grid[2];
    if (num_blocks > 0xFFFF'FFFF) {
        return refuse(failure, "%llu blocks are more than anybody would emulate",
                      static_cast<unsigned long long>(num_blocks));
    }
    Block block(request, &failure);
    const FaultGuard guard;
    shared.open(*request.module, request.dynamic_shared_bytes);
    for (const std::uint32_t b : block_order(num_blocks, request.order)) {
        shared.reset();
        const std::array<std::uint32_t, 3> index{b % request.grid[0], b / request.grid[0] % request.grid[1],
                                                 b / request.grid[0] / request.grid[1]};
        if (!block.run(index)) {
            break;
        }
    }
    shared.close();
    if (failure.kind == FailureKind::kNone) {
        const std::string overrun = DeviceMemory::instance().overrun();
        if (!overrun.empty()) {
            failure.kind = FailureKind::kIllegalAddress;
            std::snprintf(failure.message, sizeof failure.message, "%s", overrun.c_str());
        }
    }
}

}  // namespace

}  // namespace nvemu

NVEMU_EXPORT std::int32_t nvemu_check_launch(const nvemu::LaunchRequest* request, nvemu::Failure* failure) {
    *failure = {};
    nvemu::is_valid(*request, *failure);
    return static_cast<std::int32_t>(failure->kind);
}

NVEMU_EXPORT std::int32_t nvemu_launch(const nvemu::LaunchRequest* request, nvemu::Failure* failure) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    *failure = {};
    nvemu::SharedMemory* shared = nvemu::SharedMemory::instance();
    if (shared == nullptr) {
        nvemu::refuse(*failure, "address %#llx, where shared memory must lie, is taken in this process",
                      static_cast<unsigned long long>(nvemu::kSharedBase));
    } else if (nvemu::is_valid(*request, *failure)) {
        try {
            nvemu::run_grid(*request, *shared, *failure);
        } catch (const std::bad_alloc&) {
            nvemu::refuse(*failure, "no memory for the threads of a block");
        }
    }
    return static_cast<std::int32_t>(failure->kind);
}
