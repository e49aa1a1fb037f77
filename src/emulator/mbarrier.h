// mbarriers: barriers in shared memory that count arrivals, and bytes of asynchronous copies.
//
// A phase of one ends when as many threads have arrived as it was made for and as many bytes have come as
// they said to expect; the next phase begins at once. A thread waits for the phase of a parity, 0 or 1, to be
// over. What the hardware keeps in the eight bytes is not told, so here they are closed to ordinary accesses
// and the counts stand beside them.
//
// What nothing on a GPU reports is an error: one arrival too many, more bytes than were expected, a barrier
// that nobody has made, or has made and not fenced before a copy uses it. try_wait may return before the
// phase is over, so the first time it does: who does not ask again goes on too early.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "fiber_stacks.h"

namespace nvemu {

class Block;

struct MBarrier {
    std::uint32_t expected = 0;  // arrivals of a phase
    std::uint32_t pending = 0;   // of them, still to come
    std::int64_t bytes = 0;      // expected and not there yet; less than 0: there and not expected yet
    std::uint64_t phase = 0;
    std::uint32_t maker = 0;                                             // thread
    bool is_fenced = false;                                              // visible to the copy engine
    std::array<std::uint32_t, FiberStacks::kMaxThreads / 32> waiting{};  // lanes of each warp
};

class MBarriers {
  public:
    explicit MBarriers(Block& block) : block_(block) {}

    void clear() { barriers_.clear(); }
    void init(std::uint32_t line, std::uint64_t address, std::uint32_t count);
    // What this thread has made is visible to the copy engine.
    void fence();
    // An arrival, which first says that so many bytes more will come.
    void arrive(std::uint32_t line, std::uint64_t address, std::uint32_t expected_bytes);
    // Whether the phase of this parity is over.
    [[nodiscard]] bool try_wait(std::uint32_t line, std::uint64_t address, std::uint32_t parity);
    // Fails unless a copy may complete on it.
    void check_for_copy(std::uint32_t line, std::uint64_t address);
    void complete(std::uint32_t line, std::uint64_t address, std::uint32_t num_bytes);

    [[nodiscard]] bool touches(std::uint64_t address, std::uint64_t num_bytes) const;
    // What is missing to the end of its phase, in words.
    [[nodiscard]] std::string missing(std::uint64_t address) const;

  private:
    MBarrier& at(const char* operation, std::uint32_t line, std::uint64_t address);
    void end_phase_if_complete(std::uint32_t line, std::uint64_t address, MBarrier& barrier);

    Block& block_;
    std::map<std::uint64_t, MBarrier> barriers_;  // by address
};

}  // namespace nvemu
