#include "token_choice.h"

#include <cmath>
#include <functional>
#include <numeric>

namespace nanoserve {

namespace {

constexpr std::size_t kRun = 16;            // logits looked at together
constexpr std::size_t kSortedAtOnce = 256;  // candidates of a nucleus that are sorted instead of halved

double weight_of(float logit, float largest, double temperature) {
    return std::exp((double{logit} - double{largest}) / temperature);
}

bool is_before(const WeightedToken& a, const WeightedToken& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Calls visit(id, logit) for every logit that is at least `bar`, in order of ids.
template <typename Visit>
void for_each_from(const LogitsRow& row, float bar, Visit&& visit) {
    for (std::size_t b = 0; b < row.block_max.size(); ++b) {
        if (!(row.block_max[b] >= bar)) {
            continue;
        }
        const std::span<const float> block = row.block(b);
        const auto first = static_cast<std::int64_t>(b) * kLogitsBlock;
        for (std::size_t at = 0; at < block.size(); at += kRun) {
            const std::span<const float> run = block.subspan(at, std::min(kRun, block.size() - at));
            int hits = 0;  // of all sixteen without a branch
            for (const float logit : run) {
                hits += logit >= bar ? 1 : 0;
            }
            for (std::size_t i = 0; hits > 0; ++i) {
                if (run[i] >= bar) {
                    visit(first + static_cast<std::int64_t>(at + i), run[i]);
                    --hits;
                }
            }
        }
    }
}

float kth_largest(std::vector<float>& values, std::int64_t k) {
    const auto kth = values.begin() + (k - 1);
    std::nth_element(values.begin(), kth, values.end(), std::greater<>());
    return *kth;
}

// A number that at least k logits reach, 1 <= k <= vocab: the k-th largest of the maxima of k or more groups.
float reached_by(const LogitsRow& row, std::int64_t k) {
    std::vector<float> maxima;
    if (k <= std::ssize(row.block_max)) {
        maxima.assign(row.block_max.begin(), row.block_max.end());
    } else if (k <= ceil_div(std::ssize(row.values), kRun)) {
        for (std::size_t at = 0; at < row.values.size(); at += kRun) {
            maxima.push_back(max_of(row.values.subspan(at, std::min(kRun, row.values.size() - at))));
        }
    } else {
        maxima.assign(row.values.begin(), row.values.end());
    }
    return kth_largest(maxima, k);
}

std::vector<WeightedToken> tokens_from(const LogitsRow& row, float bar) {
    std::vector<WeightedToken> tokens;
    for_each_from(row, bar, [&](std::int64_t id, float logit) { tokens.push_back({id, logit, 0.0}); });
    return tokens;
}

// At least as large as the k-th largest: more than k where that place is shared.
std::vector<WeightedToken> at_least_kth(const LogitsRow& row, std::int64_t k) {
    std::vector<WeightedToken> tokens = tokens_from(row, reached_by(row, k));
    if (std::ssize(tokens) > k) {
        std::vector<float> logits(tokens.size());
        std::ranges::transform(tokens, logits.begin(), &WeightedToken::logit);
        const float kth = kth_largest(logits, k);
        std::erase_if(tokens, [&](const WeightedToken& token) { return token.logit < kth; });
    }
    return tokens;
}

double weigh(std::vector<WeightedToken>& tokens, float largest, double temperature) {
    double total = 0.0;
    for (WeightedToken& token : tokens) {
        token.weight = weight_of(token.logit, largest, temperature);
        total += token.weight;
    }
    return total;
}

// Leaves the fewest tokens, in the order of is_before, whose weight reaches `target`.
void cut_to_nucleus(std::vector<WeightedToken>& tokens, double target) {
    std::vector<WeightedToken> ranked = tokens;
    auto begin = ranked.begin();
    auto end = ranked.end();
    double above = 0.0;  // the weight of all before `begin`, which are in
    while (end - begin > std::ptrdiff_t{kSortedAtOnce}) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, is_before);
        const double with_half = std::accumulate(
            begin, middle, above, [](double sum, const WeightedToken& token) { return sum + token.weight; });
        if (with_half >= target) {
            end = middle;
        } else {
            begin = middle;
            above = with_half;
        }
    }
    std::sort(begin, end, is_before);
    auto last = begin;
    for (; last + 1 < end && (above += last->weight) < target; ++last) {
    }
    if (last < ranked.end()) {
        const WeightedToken limit = *last;
        std::erase_if(tokens, [&](const WeightedToken& token) { return is_before(limit, token); });
    }
}

// The nucleus of a whole row. Only likely tokens need ranking: those above a bar, if together they are more
// than enough. Tokens below the last bar weigh less together than half of the tail that is cut.
std::vector<WeightedToken> nucleus(const LogitsRow& row, float largest, double temperature, double top_p,
                                   std::span<const double> sums) {
    const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
    const double target = top_p * total;
    const double last_bar = 0.5 * (1.0 - top_p) / static_cast<double>(row.values.size()) * total;
    std::vector<WeightedToken> tokens;
    for (const double bar : {0x1p-6, 0x1p-12, 0x1p-20, last_bar}) {
        if (bar < last_bar) {
            continue;
        }
        tokens = tokens_from(row, static_cast<float>(double{largest} + temperature * std::log(bar)));
        if (weigh(tokens, largest, temperature) > target * (1.0 + 1e-9)) {
            break;
        }
    }
    cut_to_nucleus(tokens, target);
    return tokens;
}

// Where a running sum of `weights` first exceeds `target`; the last one that weighs anything if rounding kept
// it below.
template <typename Range, typename Weight>
std::size_t first_beyond(const Range& range, double target, Weight weight) {
    double running = 0.0;
    std::size_t last = 0;
    for (std::size_t i = 0; i < range.size(); ++i) {
        const double more = weight(range[i]);
        running += more;
        if (running > target) {
            return i;
        }
        last = more > 0.0 ? i : last;
    }
    return last;
}

std::int64_t draw_from_all(const LogitsRow& row, float largest, double temperature,
                           std::span<const double> sums, double uniform) {
    const double target = uniform * std::accumulate(sums.begin(), sums.end(), 0.0);
    const std::size_t hit = first_beyond(sums, target, [](double sum) { return sum; });
    const double before = std::accumulate(sums.begin(), sums.begin() + static_cast<std::ptrdiff_t>(hit), 0.0);
    // The block's own weights, in double, stand for the sum that it has in float32: the same fraction of
    // both.
    std::vector<double> weights;
    weights.reserve(static_cast<std::size_t>(kLogitsBlock));
    for (const float logit : row.block(hit)) {
        weights.push_back(weight_of(logit, largest, temperature));
    }
    const double own = std::accumulate(weights.begin(), weights.end(), 0.0);
    const double inside = (target - before) / sums[hit] * own;
    return static_cast<std::int64_t>(hit) * kLogitsBlock +
           static_cast<std::int64_t>(first_beyond(weights, inside, [](double weight) { return weight; }));
}

}  // namespace

bool Filters::needs_sums(std::int64_t vocab) const {
    const bool few = (top_k > 0 && top_k < vocab) || (min_p > 0.0 && top_p >= 1.0);
    return temperature > 0.0 && !few;
}

void sum_blocks(const LogitsRow& row, float largest, double temperature, std::span<double> sums) {
    for (std::size_t b = 0; b < sums.size(); ++b) {
        sums[b] = 0.0;
        for (const float logit : row.block(b)) {
            sums[b] += weight_of(logit, largest, temperature);
        }
    }
}

std::int64_t argmax(const LogitsRow& row, float largest) {
    const auto block = std::ranges::find(row.block_max, largest) - row.block_max.begin();
    const std::span<const float> values = row.block(static_cast<std::size_t>(block));
    return block * kLogitsBlock + (std::ranges::find(values, largest) - values.begin());
}

std::vector<WeightedToken> kept_tokens(const LogitsRow& row, float largest, const Filters& filters,
                                       std::span<const double> sums) {
    const std::int64_t vocab = std::ssize(row.values);
    const double temperature = filters.temperature;
    std::vector<WeightedToken> tokens;
    if (filters.top_k > 0 && filters.top_k < vocab) {
        tokens = at_least_kth(row, filters.top_k);
        const double total = weigh(tokens, largest, temperature);
        if (filters.top_p < 1.0) {
            cut_to_nucleus(tokens, filters.top_p * total);
        }
    } else if (filters.top_p < 1.0) {
        tokens = nucleus(row, largest, temperature, filters.top_p, sums);
    } else {
        // Most tokens are far below min_p, told without computing their weights. The margin covers what is
        // rounded.
        const double lowest = double{largest} + temperature * std::log(filters.min_p);
        const double margin = 1e-5 * (1.0 + std::abs(double{largest}) + std::abs(lowest));
        tokens = tokens_from(row, filters.min_p > 0.0 ? static_cast<float>(lowest - margin)
                                                      : -std::numeric_limits<float>::infinity());
        weigh(tokens, largest, temperature);
    }
    if (filters.min_p > 0.0) {
        std::erase_if(tokens, [&](const WeightedToken& token) { return token.weight < filters.min_p; });
    }
    return tokens;
}

std::int64_t draw(const LogitsRow& row, float largest, const Filters& filters, std::span<const double> sums,
                  double uniform) {
    const bool cuts = !filters.needs_sums(std::ssize(row.values)) || filters.top_p < 1.0;
    if (!cuts) {
        return draw_from_all(row, largest, filters.temperature, sums, uniform);
    }
    const std::vector<WeightedToken> tokens = kept_tokens(row, largest, filters, sums);
    const auto weight = [](const WeightedToken& token) { return token.weight; };
    double total = 0.0;
    for (const WeightedToken& token : tokens) {
        total += token.weight;
    }
    return tokens[first_beyond(tokens, uniform * total, weight)].id;
}

std::vector<WeightedToken> likeliest(const LogitsRow& row, float largest, std::int64_t count) {
    if (count == 0) {
        return {};
    }
    const std::int64_t wanted = std::min(count, std::ssize(row.values));
    std::vector<WeightedToken> tokens = at_least_kth(row, wanted);
    weigh(tokens, largest, 1.0);
    std::ranges::sort(tokens, is_before);
    tokens.resize(static_cast<std::size_t>(wanted));
    return tokens;
}

std::int64_t rank_of(const LogitsRow& row, std::int64_t token) {
    const float own = row.values[at(token)];
    const std::size_t own_block = at(token / kLogitsBlock);
    std::int64_t before = 0;
    for (std::size_t b = 0; b < row.block_max.size(); ++b) {
        if (!(row.block_max[b] >= own)) {
            continue;
        }
        const std::span<const float> block = row.block(b);
        const std::size_t equal_count =  // of the block, those whose equals come first
            b < own_block    ? block.size()
            : b == own_block ? at(token % kLogitsBlock)
                             : 0;
        before += std::ranges::count_if(block.first(equal_count), [&](float logit) { return logit >= own; });
        before += std::ranges::count_if(block.subspan(equal_count), [&](float logit) { return logit > own; });
    }
    return before + 1;
}

double log_total(const LogitsRow& row, float largest, std::span<const double> sums) {
    const std::int64_t best = argmax(row, largest);
    const std::size_t best_block = at(best / kLogitsBlock);
    double rest = 0.0;
    for (std::size_t b = 0; b < sums.size(); ++b) {
        rest += b == best_block ? 0.0 : sums[b];
    }
    const std::span<const float> block = row.block(best_block);
    for (std::size_t i = 0; i < block.size(); ++i) {
        rest += i == at(best % kLogitsBlock) ? 0.0 : weight_of(block[i], largest, 1.0);
    }
    return std::log1p(rest);
}

}  // namespace nanoserve
