// Warp collectives: instructions that 32 lanes execute together.
//
// Every lane of the mask arrives with its operands; the last one to arrive computes for all, and all go on. A
// GPU demands that the lanes named by the mask execute the same instruction. Lanes that meet in two different
// ones have diverged: on a GPU a hang or wrong values, here an error that names both.
#pragma once

#include <cstdint>

#include "block.h"

namespace nvemu {

inline constexpr std::uint32_t kFullMask = ~0u;

// The current lane's slot among its warp's collectives, made if it is the first to arrive.
Collective& arrive(const char* operation, std::uint32_t line, std::uint32_t mask, const void* in, void* out);

// combine(const Collective&) reads in[lane] and writes out[lane] for every lane in mask.
template <typename Combine>
void collect(const char* operation, std::uint32_t line, std::uint32_t mask, const void* in, void* out,
             const Combine& combine) {
    Block& block = *Block::running;
    Collective& collective = arrive(operation, line, mask, in, out);
    if (collective.arrived != collective.mask) {
        block.wait({operation, line, true});
        return;
    }
    combine(static_cast<const Collective&>(collective));
    const std::uint32_t lanes = collective.mask;
    collective.mask = 0;
    block.wake(block.current().warp(), lanes);
}

// For matrix instructions, which take whole warps only.
template <typename Combine>
void collect_warp(const char* operation, std::uint32_t line, const void* in, void* out,
                  const Combine& combine) {
    Block& block = *Block::running;
    if (block.warp().exists != kFullMask) {
        block.fail(FailureKind::kInvalidOperand, line, 0, "%s in a warp of fewer than 32 threads", operation);
    }
    collect(operation, line, kFullMask, in, out, combine);
}

}  // namespace nvemu
