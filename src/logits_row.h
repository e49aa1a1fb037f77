// One row of logits and the largest of each block of it: what tokens are chosen from.
//
// A row is 150,000 numbers of which a token needs a few. The step leaves each block's maximum behind, and
// whoever looks for the large ones reads the blocks that can have them and no others.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "checked.h"

namespace nanoserve {

constexpr std::int64_t kLogitsBlock = 256;

[[nodiscard]] constexpr std::int64_t num_logits_blocks(std::int64_t vocab) {
    return ceil_div(vocab, kLogitsBlock);
}

struct LogitsRow {
    std::span<const float> values;
    std::span<const float> block_max;  // NaN where a block holds a number that is no logit

    [[nodiscard]] std::span<const float> block(std::size_t index) const {
        constexpr auto width = static_cast<std::size_t>(kLogitsBlock);
        const std::size_t first = index * width;
        return values.subspan(first, std::min(width, values.size() - first));
    }
};

// The largest of `values`; NaN if one is NaN or, unless infinities may stand for something, infinite. In
// sixteen lanes so that it vectorises; a maximum has no rounding, so the order does not matter.
[[nodiscard]] inline float max_of(std::span<const float> values, bool may_be_infinite = true) {
    constexpr std::size_t lanes = 16;
    constexpr std::int32_t infinity = 0x7f80'0000;
    const std::int32_t limit = may_be_infinite ? infinity : infinity - 1;  // the largest good magnitude
    float best[lanes];
    std::int32_t most[lanes] = {};  // the magnitudes' bits, which are ordered as the magnitudes are, NaN last
    std::fill_n(best, lanes, -std::numeric_limits<float>::infinity());
    const auto take = [&](std::size_t lane, float value) {
        const std::int32_t magnitude = std::bit_cast<std::int32_t>(value) & 0x7fff'ffff;
        best[lane] = value > best[lane] ? value : best[lane];
        most[lane] = magnitude > most[lane] ? magnitude : most[lane];
    };
    std::size_t i = 0;
    for (; i + lanes <= values.size(); i += lanes) {
        const float* const next = values.data() + i;
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            take(lane, next[lane]);
        }
    }
    for (std::size_t lane = 0; i < values.size(); ++i, ++lane) {
        take(lane, values[i]);
    }
    for (std::size_t half = lanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) {
            best[lane] = best[lane + half] > best[lane] ? best[lane + half] : best[lane];
            most[lane] = most[lane + half] > most[lane] ? most[lane + half] : most[lane];
        }
    }
    return most[0] > limit ? std::numeric_limits<float>::quiet_NaN() : best[0];
}

// Leaves the tokens whose bit is set (bit i % 32 of word i / 32 for token i) and makes the others' logits
// -inf, in `values` and in the maxima of their blocks. A block that keeps all of its tokens is neither read
// nor written.
inline void forbid_outside(std::span<float> values, std::span<float> block_max,
                           std::span<const std::uint32_t> mask) {
    constexpr float forbidden = -std::numeric_limits<float>::infinity();
    constexpr std::size_t bits = 32;
    constexpr auto width = static_cast<std::size_t>(kLogitsBlock);
    for (std::size_t b = 0; b < block_max.size(); ++b) {
        const std::size_t first = b * width;
        const std::span<float> block = values.subspan(first, std::min(width, values.size() - first));
        const std::span<const std::uint32_t> words =
            mask.subspan(first / bits, (block.size() + bits - 1) / bits);
        std::uint32_t all = ~std::uint32_t{0}, any = 0;
        for (const std::uint32_t word : words) {
            all &= word;
            any |= word;
        }
        if (all == ~std::uint32_t{0}) {
            continue;
        }
        if (any == 0) {
            std::ranges::fill(block, forbidden);
            block_max[b] = forbidden;
            continue;
        }
        for (std::size_t w = 0; w < words.size(); ++w) {
            const std::span<float> run = block.subspan(w * bits, std::min(bits, block.size() - w * bits));
            for (std::size_t i = 0; i < run.size(); ++i) {
                run[i] = (words[w] >> i & 1U) != 0 ? run[i] : forbidden;
            }
        }
        block_max[b] = max_of(block);
    }
}

}  // namespace nanoserve
