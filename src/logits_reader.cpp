#include "logits_reader.h"

#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

namespace nanoserve {

namespace {

// In multiply-adds, as kMinCostPerThread.
constexpr std::int64_t kCostPerWeight = 16;   // of a kernel
constexpr std::int64_t kCostPerRow = 20'000;  // of reading some blocks
constexpr std::int64_t kCostPerMax = 2;

float largest_of(const LogitsRow& row) {
    return max_of(row.block_max);
}

// Where a kernel finds a value; it takes every pointer as mutable.
template <typename T>
void* pointer_to(const T& variable) {
    return const_cast<void*>(static_cast<const void*>(&variable));
}

}  // namespace

LogitsRow LogitsView::row(std::int64_t index) const {
    const std::int64_t blocks = num_logits_blocks(vocab);
    return {.values = {values + index * row_stride, at(vocab)},
            .block_max = {block_max + index * blocks, at(blocks)}};
}

// The rows whose blocks are summed, in the arrays that the kernel reads.
struct LogitsReader::Sums {
    std::vector<std::int32_t> rows;
    std::vector<float> largest;
    std::vector<double> temperatures;
    std::vector<float> inverses;  // of the temperatures
    std::unique_ptr<double[]> values;
    std::int64_t num_blocks = 0;

    std::int64_t add(std::int64_t row, float row_largest, double temperature) {
        rows.push_back(narrow<std::int32_t>(row));
        largest.push_back(row_largest);
        temperatures.push_back(temperature);
        // Never infinite: 0, of the largest token, times infinity would be NaN.
        const double limit = std::numeric_limits<float>::max();
        inverses.push_back(static_cast<float>(std::min(1.0 / temperature, limit)));
        return std::ssize(rows) - 1;
    }

    void allocate(std::int64_t blocks) {
        num_blocks = blocks;
        values = std::make_unique_for_overwrite<double[]>(at(std::ssize(rows) * blocks));
    }

    [[nodiscard]] std::span<double> of(std::int64_t entry) const {
        return entry < 0 ? std::span<double>{}
                         : std::span<double>{values.get() + entry * num_blocks, at(num_blocks)};
    }
};

LogitsReader::LogitsReader(std::shared_ptr<ThreadPool> threads, const LogitsKernels& kernels)
    : threads_(std::move(threads)), kernels_(kernels) {
    if ((kernels.block_sums == nullptr) != (kernels.block_max == nullptr)) {
        throw std::invalid_argument("a reader of logits needs both kernels or none");
    }
    if (kernels.block_sums != nullptr) {
        require_at_least("vocab", kernels.vocab, 1);
        require_at_least("row_stride", kernels.row_stride, kernels.vocab);
        require_at_least("blocks_per_unit", kernels.blocks_per_unit, 1);
    }
}

void LogitsReader::check(const LogitsView& rows) const {
    require_at_least("vocab", rows.vocab, 1);
    if (kernels_.block_sums != nullptr && rows.num_rows > 0 &&
        (rows.vocab != kernels_.vocab || rows.row_stride != kernels_.row_stride)) {
        throw std::invalid_argument("rows of " + std::to_string(rows.vocab) + " logits, " +
                                    std::to_string(rows.row_stride) + " apart: the kernel is for " +
                                    std::to_string(kernels_.vocab) + ", " +
                                    std::to_string(kernels_.row_stride) + " apart");
    }
}

int LogitsReader::team_for(std::int64_t cost) const {
    const std::int64_t most = threads_ == nullptr ? 1 : threads_->num_threads();
    return static_cast<int>(std::clamp<std::int64_t>(cost / kMinCostPerThread, 1, most));
}

template <typename Finish>
void LogitsReader::run(const LogitsView& rows, Sums& sums, std::int64_t count, std::int64_t cost,
                       Finish&& finish) const {
    const std::int64_t num_sums = std::ssize(sums.rows);
    sums.allocate(num_logits_blocks(rows.vocab));
    const bool compiled = kernels_.block_sums != nullptr;
    const std::int64_t units =
        compiled ? num_sums * ceil_div(sums.num_blocks, kernels_.blocks_per_unit) : num_sums;
    const int team = team_for(cost + num_sums * rows.vocab * kCostPerWeight);
    Barrier barrier(team, threads_ == nullptr ? 0 : threads_->spin_us());
    std::atomic<std::int64_t> next{0};

    const float* const values = rows.values;
    const float* const block_max = rows.block_max;
    const std::int32_t* const row_list = sums.rows.data();
    const float* const largest = sums.largest.data();
    const float* const inverses = sums.inverses.data();
    const double* const out = sums.values.get();
    const std::array<void*, 6> args = {pointer_to(values),  pointer_to(block_max), pointer_to(row_list),
                                       pointer_to(largest), pointer_to(inverses),  pointer_to(out)};

    const auto work = [&](int thread_id) {
        if (thread_id >= team) {
            return;
        }
        const std::int64_t begin = units * thread_id / team;
        const std::int64_t end = units * (thread_id + 1) / team;
        if (compiled) {
            KernelCall call(args);
            call(kernels_.block_sums, begin, end);
        } else {
            for (std::int64_t i = begin; i < end; ++i) {
                sum_blocks(rows.row(sums.rows[at(i)]), sums.largest[at(i)], sums.temperatures[at(i)],
                           sums.of(i));
            }
        }
        if (team > 1 && units > 0) {
            barrier.arrive_and_wait();
        }
        for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
            finish(i);
        }
    };
    if (team == 1) {
        work(0);
    } else {
        threads_->run(work);
    }
}

void LogitsReader::block_max(const LogitsView& rows, bool may_forbid, float* out) const {
    const std::int64_t blocks = num_logits_blocks(rows.vocab);
    const bool compiled = kernels_.block_max != nullptr && may_forbid;
    if (compiled) {
        check(rows);
    }
    const float* const values = rows.values;
    const std::array<void*, 3> args = {pointer_to(values), pointer_to(out), pointer_to(rows.num_rows)};
    // Of a row each time, in the order of rows or, compiled, in that of the kernel's units.
    const std::int64_t ranges = compiled ? ceil_div(blocks, kernels_.blocks_per_unit) : 1;
    Sums none;
    run(rows, none, rows.num_rows, rows.num_rows * rows.vocab * kCostPerMax, [&](std::int64_t index) {
        if (compiled) {
            KernelCall call(args);
            call(kernels_.block_max, index * ranges, (index + 1) * ranges);
            return;
        }
        const LogitsRow row = {.values = {values + index * rows.row_stride, at(rows.vocab)}, .block_max = {}};
        for (std::int64_t b = 0; b < blocks; ++b) {
            out[index * blocks + b] = max_of(row.block(at(b)), may_forbid);
        }
    });
}

void LogitsReader::forbid(const LogitsView& view, float* values, float* block_max,
                          std::span<const std::int64_t> rows, std::span<const std::uint32_t> masks) const {
    const std::int64_t blocks = num_logits_blocks(view.vocab);
    const std::int64_t words = ceil_div(view.vocab, 32);
    Sums none;
    run(view, none, std::ssize(rows), std::ssize(rows) * view.vocab * kCostPerMax, [&](std::int64_t index) {
        const std::int64_t row = rows[at(index)];
        forbid_outside({values + row * view.row_stride, at(view.vocab)},
                       {block_max + row * blocks, at(blocks)}, masks.subspan(at(index * words), at(words)));
    });
}

std::vector<std::int64_t> LogitsReader::sample(const LogitsView& rows,
                                               std::span<const Choice> choices) const {
    check(rows);
    Sums sums;
    std::vector<float> largest(choices.size());
    std::vector<std::int64_t> entries(choices.size(), -1);  // of the sums
    for (std::size_t i = 0; i < choices.size(); ++i) {
        const Choice& choice = choices[i];
        largest[i] = largest_of(rows.row(choice.row));
        if (std::isfinite(largest[i]) && choice.filters.needs_sums(rows.vocab)) {
            entries[i] = sums.add(choice.row, largest[i], choice.filters.temperature);
        }
    }
    std::vector<std::int64_t> tokens(choices.size(), 0);
    std::int64_t cost = 0;
    for (const Choice& choice : choices) {
        cost += choice.filters.temperature > 0.0 ? kCostPerRow : 0;
    }
    run(rows, sums, std::ssize(choices), cost, [&](std::int64_t index) {
        const std::size_t i = at(index);
        const Choice& choice = choices[i];
        if (std::isfinite(largest[i])) {
            const LogitsRow row = rows.row(choice.row);
            tokens[i] = choice.filters.temperature > 0.0
                            ? draw(row, largest[i], choice.filters, sums.of(entries[i]), choice.uniform)
                            : argmax(row, largest[i]);
        }
    });
    return tokens;
}

std::vector<Score> LogitsReader::score(const LogitsView& rows, std::span<const Scored> wanted) const {
    check(rows);
    Sums sums;
    std::vector<std::int64_t> entries(wanted.size(), -1);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        const float largest = largest_of(rows.row(wanted[i].row));
        if (std::isfinite(largest)) {
            entries[i] = sums.add(wanted[i].row, largest, 1.0);
        }
    }
    std::vector<Score> scores(wanted.size());
    run(rows, sums, std::ssize(wanted), std::ssize(wanted) * kCostPerRow, [&](std::int64_t index) {
        const std::size_t i = at(index);
        if (entries[i] < 0) {
            return;
        }
        const Scored& one = wanted[i];
        const LogitsRow row = rows.row(one.row);
        const float largest = sums.largest[at(entries[i])];
        const double log_sum = log_total(row, largest, sums.of(entries[i]));
        const auto logprob = [&](float logit) { return double{logit} - double{largest} - log_sum; };
        scores[i].logprob = logprob(row.values[at(one.token)]);
        scores[i].rank = rank_of(row, one.token);
        for (const WeightedToken& token : likeliest(row, largest, one.num_top)) {
            scores[i].top.emplace_back(token.id, logprob(token.logit));
        }
    });
    return scores;
}

std::vector<WeightedToken> LogitsReader::kept(const LogitsView& rows, const Choice& choice) const {
    check(rows);
    Sums sums;
    const LogitsRow row = rows.row(choice.row);
    const float largest = largest_of(row);
    std::vector<WeightedToken> tokens;
    if (std::isfinite(largest)) {
        const bool summed = choice.filters.needs_sums(rows.vocab);
        const std::int64_t entry = summed ? sums.add(choice.row, largest, choice.filters.temperature) : -1;
        run(rows, sums, 1, 0,
            [&](std::int64_t) { tokens = kept_tokens(row, largest, choice.filters, sums.of(entry)); });
    }
    return tokens;
}

}  // namespace nanoserve
