// "Global" memory of the emulated device: what a kernel may read and write by pointer.
//
// Each allocation is full of NaN (a kernel that reads what nobody wrote computes nonsense that shows) and
// ends, up to 15 bytes, at a page that faults; so does the page before it. Addresses are used once: what was
// freed faults for good. The bytes between the end and the page hold a pattern that is checked after every
// launch and when the allocation is freed.
//
// An address is a multiple of 16, and of 256 (which cuMemAlloc promises) where the size is a multiple of 256:
// between a larger alignment and a closer guard page, the guard page finds more bugs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace nvemu {

class DeviceMemory {
  public:
    static DeviceMemory& instance();

    // Null when the system refuses or every address was used.
    void* allocate(std::uint64_t num_bytes);

    enum class Freed { kYes, kNoSuchAllocation, kWrittenPastItsEnd };
    Freed free(void* address);

    // Whether [address, address + num_bytes) lies in one live allocation.
    bool is_allocated(const void* address, std::uint64_t num_bytes);

    // An allocation whose end was written past since the last call, in words; empty when there is none.
    std::string overrun();

  private:
    struct Allocation {
        std::uint64_t num_bytes;
        std::uint64_t pages_begin;
        std::uint64_t pages_end;
    };

    DeviceMemory();
    static bool intact(std::uint64_t address, const Allocation& allocation);

    std::mutex mutex_;
    std::map<std::uint64_t, Allocation> live_;
    std::uint64_t next_ = 0;  // 0 when the range could not be reserved
};

}  // namespace nvemu
