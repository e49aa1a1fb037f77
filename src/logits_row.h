// One row of logits and the largest of each block of it: what tokens are chosen from.
//
// A row is 150,000 numbers of which a token needs a few. The step leaves each block's maximum behind, and
// whoever looks for the large ones reads the blocks that can have them and no others.
#pragma once

#include <algorithm>
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

// The largest of `values`, NaN if one of them is NaN. In sixteen lanes so that it vectorises; a maximum has
// no rounding, so the order does not matter.
[[nodiscard]] inline float max_of(std::span<const float> values) {
    constexpr std::size_t lanes = 16;
    float best[lanes];
    float nan[lanes] = {};
    std::fill_n(best, lanes, -std::numeric_limits<float>::infinity());
    const auto take = [&](std::size_t lane, float value) {
        best[lane] = value > best[lane] ? value : best[lane];
        nan[lane] = value == value ? nan[lane] : value;
    };
    std::size_t i = 0;
    for (; i + lanes <= values.size(); i += lanes) {
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            take(lane, values[i + lane]);
        }
    }
    for (std::size_t lane = 0; i < values.size(); ++i, ++lane) {
        take(lane, values[i]);
    }
    float result = best[0];
    for (std::size_t lane = 0; lane < lanes; ++lane) {
        if (nan[lane] != nan[lane]) {
            return nan[lane];
        }
        result = std::max(result, best[lane]);
    }
    return result;
}

}  // namespace nanoserve
