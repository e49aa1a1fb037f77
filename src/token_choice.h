// Which token a row of logits gives, and how likely each was: everything that reads a few of its blocks.
//
// A token weighs exp((logit - largest) / temperature), computed in double here. What needs the weight of all
// tokens (a draw without top_k, top_p) gets it as sums over blocks, which a compiled kernel computes in
// float32 with a relative error around 1e-7. Kept tokens stand in vocabulary order, sums run in that order,
// and nothing depends on another row.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "logits_row.h"

namespace nanoserve {

// What a request cuts off before it draws: in this order, each of what the one before it left.
struct Filters {
    double temperature = 1.0;  // 0 takes the largest logit and nothing else counts
    std::int64_t top_k = 0;    // 0 keeps all
    double top_p = 1.0;
    double min_p = 0.0;

    // Whether the sums over the blocks of a row of `vocab` logits are needed.
    [[nodiscard]] bool needs_sums(std::int64_t vocab) const;
};

struct WeightedToken {
    std::int64_t id;
    float logit;
    double weight;
};

// Sums over blocks of exp((logit - largest) / temperature) the slow way: what a kernel computes, in double.
void sum_blocks(const LogitsRow& row, float largest, double temperature, std::span<double> sums);

// The lowest id among the largest logits.
[[nodiscard]] std::int64_t argmax(const LogitsRow& row, float largest);

// The tokens that pass, in vocabulary order. Empty sums are for filters that need none.
[[nodiscard]] std::vector<WeightedToken> kept_tokens(const LogitsRow& row, float largest,
                                                     const Filters& filters, std::span<const double> sums);

// The token that `uniform`, in [0, 1), falls on.
[[nodiscard]] std::int64_t draw(const LogitsRow& row, float largest, const Filters& filters,
                                std::span<const double> sums, double uniform);

// Tokens ranked by (logit descending, id ascending): the first `count`, and the place of one, from 1.
[[nodiscard]] std::vector<WeightedToken> likeliest(const LogitsRow& row, float largest, std::int64_t count);
[[nodiscard]] std::int64_t rank_of(const LogitsRow& row, std::int64_t token);

// The logarithm of the sum of exp(logit - largest). `sums` are those of temperature 1; the largest token's
// own block is summed again in double, so that where it is nearly certain, what is left keeps its digits.
[[nodiscard]] double log_total(const LogitsRow& row, float largest, std::span<const double> sums);

}  // namespace nanoserve
