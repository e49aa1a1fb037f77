// cp.async.bulk.tensor: TMA copies a box of a tensor to shared memory, and an mbarrier counts its bytes.
//
// As with cp.async (async_copy.cpp), a copy lands as late as the program allows: when no thread can go on
// without it. The destination holds NaN and is closed until then. Which of several lands first is up to the
// thread order: the oldest, the youngest, or any; in the random orders one may also land earlier.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tensor_map.h"

namespace nvemu {

class Block;

class TensorCopies {
  public:
    explicit TensorCopies(Block& block) : block_(block) {}

    struct Operands {
        std::uint64_t destination, mbarrier;
        const void* map;
        const std::int32_t* at;  // the first element's coordinates, the innermost first
        std::uint32_t rank;
        bool to_others;  // blocks of a cluster
    };
    void issue(std::uint32_t line, const Operands& operands);
    // One of those under way, as `chosen` says.
    void land(std::size_t chosen);
    [[nodiscard]] std::size_t num_pending() const { return pending_.size(); }
    // Where the oldest of them goes.
    [[nodiscard]] std::uint64_t destination() const { return pending_.front().destination; }
    void clear() { pending_.clear(); }

  private:
    struct Copy {
        TensorMap map;
        std::array<std::int64_t, kMaxTensorRank> at;
        std::uint64_t destination, mbarrier;
        std::uint32_t line;
    };
    // visit(source or 0, offset in the destination) for every row of the box, in its order.
    template <typename Visit>
    static void for_each_row(const Copy& copy, const Visit& visit);
    void check(const Copy& copy) const;

    Block& block_;
    std::vector<Copy> pending_;
};

}  // namespace nvemu
