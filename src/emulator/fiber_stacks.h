// The stacks of a block's threads, kept from one launch to the next.
//
// Each ends in a page that faults, so a kernel with too much local memory is an error and not corruption. The
// tops are staggered: stacks at equal distances would put the hot lines of all threads into the same few sets
// of the caches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nvemu {

class FiberStacks {
  public:
    static constexpr std::size_t kStackBytes = 256 * 1024;
    static constexpr std::uint32_t kMaxThreads = 1024;

    FiberStacks();
    ~FiberStacks();
    FiberStacks(const FiberStacks&) = delete;
    FiberStacks& operator=(const FiberStacks&) = delete;

    [[nodiscard]] void* top(std::uint32_t thread) const;
    // Whether [address, address + num_bytes) lies in the thread's stack.
    [[nodiscard]] bool holds(std::uint32_t thread, std::uint64_t address, std::uint64_t num_bytes) const;

  private:
    std::byte* base_ = nullptr;
};

}  // namespace nvemu
