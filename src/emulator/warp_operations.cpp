// Shuffles, votes and reductions: how the lanes of a warp see each other's registers without memory.
#include <algorithm>
#include <bit>

#include "collective.h"
#include "runtime.h"

namespace nvemu {

namespace {

// What a lane reads from one that takes no part: undefined on a GPU, a NaN here.
constexpr std::uint32_t kUndefined = 0x7FC0'DEAD;

struct ShuffleOperands {
    std::uint32_t value;
    std::uint32_t b;  // how far, or which lane
    std::uint32_t c;  // bits 0..4 the clamp, bits 8..12 the segment mask
};

// As the PTX manual defines it: the lane to read from, and whether it is in range of the segment.
struct ShuffleSource {
    std::uint32_t lane;
    bool in_range;
};

ShuffleSource shuffle_source(ShuffleMode mode, std::uint32_t lane, const ShuffleOperands& operands) {
    const std::uint32_t b = operands.b & 31;
    const std::uint32_t clamp = operands.c & 31;
    const std::uint32_t segment = operands.c >> 8 & 31;
    const std::uint32_t low = lane & segment;
    const std::uint32_t bound = low | (clamp & ~segment);  // the highest lane to read, for "up" the lowest
    switch (mode) {
        case ShuffleMode::kUp: {
            const bool in_range = lane >= b + bound;
            return {in_range ? lane - b : lane, in_range};
        }
        case ShuffleMode::kDown:
            return {lane + b <= bound ? lane + b : lane, lane + b <= bound};
        case ShuffleMode::kButterfly:
            return {(lane ^ b) <= bound ? lane ^ b : lane, (lane ^ b) <= bound};
        case ShuffleMode::kIndex:
            break;
    }
    const std::uint32_t source = low | (b & ~segment);
    return {source <= bound ? source : lane, source <= bound};
}

template <typename Visit>
void for_each_lane(std::uint32_t mask, const Visit& visit) {
    for (; mask != 0; mask &= mask - 1) {
        visit(static_cast<std::uint32_t>(std::countr_zero(mask)));
    }
}

std::uint32_t in_word(const Collective& collective, std::uint32_t lane) {
    return *static_cast<const std::uint32_t*>(collective.in[lane]);
}

void set_all(const Collective& collective, std::uint32_t value) {
    for_each_lane(collective.mask,
                  [&](std::uint32_t lane) { *static_cast<std::uint32_t*>(collective.out[lane]) = value; });
}

std::uint32_t reduce(ReduceOp op, std::uint32_t a, std::uint32_t b) {
    const auto as_signed = [](std::uint32_t word) { return static_cast<std::int32_t>(word); };
    switch (op) {
        case ReduceOp::kAdd:
            return a + b;
        case ReduceOp::kMin:
            return as_signed(a) < as_signed(b) ? a : b;
        case ReduceOp::kMax:
            return as_signed(a) > as_signed(b) ? a : b;
        case ReduceOp::kUMin:
            return std::min(a, b);
        case ReduceOp::kUMax:
            return std::max(a, b);
        case ReduceOp::kAnd:
            return a & b;
        case ReduceOp::kOr:
            return a | b;
        case ReduceOp::kXor:
            break;
    }
    return a ^ b;
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_warp_sync(std::uint32_t line, std::uint32_t mask) {
    collect("bar.warp.sync", line, mask, nullptr, nullptr, [](const Collective&) {});
}

NVEMU_EXPORT void nvemu_shuffle(std::uint32_t line, std::uint32_t mode, std::uint32_t mask,
                                std::uint32_t value, std::uint32_t b, std::uint32_t c, std::uint32_t* out) {
    const ShuffleOperands in{value, b, c};
    collect("shfl.sync", line, mask, &in, out, [mode](const Collective& warp) {
        for_each_lane(warp.mask, [&](std::uint32_t lane) {
            const auto operands_of = [&](std::uint32_t l) {
                return static_cast<const ShuffleOperands*>(warp.in[l]);
            };
            const ShuffleSource source =
                shuffle_source(static_cast<ShuffleMode>(mode), lane, *operands_of(lane));
            auto* result = static_cast<std::uint32_t*>(warp.out[lane]);
            result[0] = (warp.mask >> source.lane & 1) != 0 ? operands_of(source.lane)->value : kUndefined;
            result[1] = source.in_range ? 1 : 0;
        });
    });
}

NVEMU_EXPORT std::uint32_t nvemu_vote(std::uint32_t line, std::uint32_t mode, std::uint32_t mask,
                                      std::uint32_t predicate) {
    std::uint32_t out = 0;
    collect("vote.sync", line, mask, &predicate, &out, [mode](const Collective& warp) {
        std::uint32_t ballot = 0;
        for_each_lane(warp.mask, [&](std::uint32_t lane) { ballot |= (in_word(warp, lane) & 1) << lane; });
        switch (static_cast<VoteMode>(mode)) {
            case VoteMode::kAll:
                return set_all(warp, ballot == warp.mask ? 1 : 0);
            case VoteMode::kAny:
                return set_all(warp, ballot != 0 ? 1 : 0);
            case VoteMode::kUniform:
                return set_all(warp, ballot == warp.mask || ballot == 0 ? 1 : 0);
            case VoteMode::kBallot:
                return set_all(warp, ballot);
        }
    });
    return out;
}

NVEMU_EXPORT std::uint32_t nvemu_match_any(std::uint32_t line, std::uint32_t mask, std::uint64_t value) {
    std::uint32_t out = 0;
    collect("match.any.sync", line, mask, &value, &out, [](const Collective& warp) {
        const auto value_of = [&](std::uint32_t lane) {
            return *static_cast<const std::uint64_t*>(warp.in[lane]);
        };
        for_each_lane(warp.mask, [&](std::uint32_t lane) {
            std::uint32_t same = 0;
            for_each_lane(warp.mask, [&](std::uint32_t other) {
                same |= value_of(other) == value_of(lane) ? 1u << other : 0;
            });
            *static_cast<std::uint32_t*>(warp.out[lane]) = same;
        });
    });
    return out;
}

NVEMU_EXPORT std::uint32_t nvemu_warp_reduce(std::uint32_t line, std::uint32_t op, std::uint32_t mask,
                                             std::uint32_t value) {
    std::uint32_t out = 0;
    collect("redux.sync", line, mask, &value, &out, [op](const Collective& warp) {
        const auto first = static_cast<std::uint32_t>(std::countr_zero(warp.mask));
        std::uint32_t total = in_word(warp, first);
        for_each_lane(warp.mask & ~(1u << first), [&](std::uint32_t lane) {
            total = reduce(static_cast<ReduceOp>(op), total, in_word(warp, lane));
        });
        set_all(warp, total);
    });
    return out;
}

NVEMU_EXPORT void nvemu_elect(std::uint32_t line, std::uint32_t mask, std::uint32_t* out) {
    collect("elect.sync", line, mask, nullptr, out, [](const Collective& warp) {
        const auto leader = static_cast<std::uint32_t>(std::countr_zero(warp.mask));
        for_each_lane(warp.mask, [&](std::uint32_t lane) {
            auto* result = static_cast<std::uint32_t*>(warp.out[lane]);
            result[0] = leader;
            result[1] = lane == leader ? 1 : 0;
        });
    });
}

// prmt.b32: each nibble of the selector picks one of the eight bytes of {b, a}; its top bit spreads the sign.
NVEMU_EXPORT std::uint32_t nvemu_permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
    std::uint32_t result = 0;
    for (std::uint32_t i = 0; i < 4; ++i) {
        const std::uint32_t nibble = selector >> (4 * i) & 0xF;
        auto byte = static_cast<std::uint8_t>(bytes >> (8 * (nibble & 7)));
        if ((nibble & 8) != 0) {
            byte = (byte & 0x80) != 0 ? 0xFF : 0;
        }
        result |= std::uint32_t{byte} << (8 * i);
    }
    return result;
}
