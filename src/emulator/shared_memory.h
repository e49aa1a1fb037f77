// A block's shared memory, and what is known about every four bytes of it.
//
// Shared memory lies at one fixed 32-bit address and is full of NaN when a block starts: on a GPU it holds
// what the last block left there, which in a test is too often the right answer. Beside it lies a shadow, one
// byte for every four:
//
//     bit 0       not to be read: outside every variable, an mbarrier, or an asynchronous copy is on its way
//     there bit 1       written by ordinary stores and not fenced for the async proxy (wgmma) yet bits 2..7
//     how many asynchronous reads (wgmma) may still be going on: not to be written
//
// Compiled code tests the shadow with one load per access and calls check_access only when something is
// wrong. Between variables lie gaps, so an index that runs over its end meets bit 0.
#pragma once

#include <cstdint>

#include "abi.h"

namespace nvemu {

class SharedMemory {
  public:
    static constexpr std::uint64_t kGranule = 4;
    static constexpr std::uint8_t kClosed = 0x01;
    static constexpr std::uint8_t kUnfenced = 0x02;
    static constexpr std::uint8_t kReader = 0x04;
    static constexpr std::uint8_t kNoWrite = 0xFD;      // a store looks at everything but bit 1
    static constexpr std::uint64_t kMaxBytes = 232448;  // per block, static and dynamic: what sm_90 has

    // Null when the addresses are taken by something else in this process.
    static SharedMemory* instance();

    // The module's variables and the dynamic part for the next blocks.
    void open(const ModuleTable& module, std::uint32_t dynamic_bytes);
    void close();
    // NaN everywhere, nothing under way.
    void reset();

    [[nodiscard]] static bool contains(std::uint64_t address, std::uint64_t num_bytes) {
        return address - kSharedBase < kSharedBytes && num_bytes <= kSharedBytes - (address - kSharedBase);
    }
    [[nodiscard]] static bool readable(std::uint64_t address, std::uint64_t num_bytes) {
        return !any(address, num_bytes, kClosed);
    }
    [[nodiscard]] static bool writable(std::uint64_t address, std::uint64_t num_bytes) {
        return !any(address, num_bytes, kNoWrite);
    }
    [[nodiscard]] static bool any(std::uint64_t address, std::uint64_t num_bytes, std::uint8_t bits);
    static void set(std::uint64_t address, std::uint64_t num_bytes, std::uint8_t bits);
    static void clear(std::uint64_t address, std::uint64_t num_bytes, std::uint8_t bits);
    // One asynchronous read more or less. False when there are too many to count.
    static bool add_reader(std::uint64_t address, std::uint64_t num_bytes);
    static void remove_reader(std::uint64_t address, std::uint64_t num_bytes);

    // In words, why an access to [address, address + num_bytes) is refused.
    [[nodiscard]] const char* reason(std::uint64_t address, std::uint64_t num_bytes, bool is_write) const;

  private:
    SharedMemory() = default;
    static std::uint8_t* shadow(std::uint64_t address) {
        return reinterpret_cast<std::uint8_t*>(kShadowBase + (address - kSharedBase) / kGranule);
    }
    // Granules that [address, address + num_bytes) touches.
    static std::uint64_t granules(std::uint64_t address, std::uint64_t num_bytes) {
        return num_bytes == 0 ? 0 : (address + num_bytes - 1) / kGranule - address / kGranule + 1;
    }
    [[nodiscard]] bool in_variable(std::uint64_t address, std::uint64_t num_bytes) const;

    const ModuleTable* module_ = nullptr;
    std::uint32_t dynamic_bytes_ = 0;
    std::uint64_t used_bytes_ = 0;
};

}  // namespace nvemu
