#include "fiber_stacks.h"

#include <sys/mman.h>

#include <new>

namespace nvemu {

namespace {
constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kLine = 64;
constexpr std::size_t kNumColours = 61;  // odd and prime: neighbours fall into different sets
}  // namespace

FiberStacks::FiberStacks() {
    void* mapped = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
        throw std::bad_alloc();
    }
    base_ = static_cast<std::byte*>(mapped);
    for (std::uint32_t thread = 0; thread < kMaxThreads; ++thread) {
        mprotect(base_ + thread * kStackBytes, kGuardBytes, PROT_NONE);
    }
}

FiberStacks::~FiberStacks() {
    munmap(base_, kStackBytes * kMaxThreads);
}

void* FiberStacks::top(std::uint32_t thread) const {
    return base_ + (thread + 1) * kStackBytes - (thread % kNumColours) * 5 * kLine;
}

bool FiberStacks::holds(std::uint32_t thread, std::uint64_t address, std::uint64_t num_bytes) const {
    const auto low = reinterpret_cast<std::uint64_t>(base_ + thread * kStackBytes + kGuardBytes);
    const auto high = reinterpret_cast<std::uint64_t>(base_ + (thread + 1) * kStackBytes);
    return address >= low && address < high && num_bytes <= high - address;
}

}  // namespace nvemu
