// Reads rows of logits on a team of threads: tokens and log-probabilities of all rows of a step in one call.
//
// First the sums over blocks that some rows need, by a compiled kernel whose units (row, range of blocks) the
// threads share; then, after a barrier, row by row what token_choice.h does. A row's result does not depend
// on the others, on the number of threads, or on who computed it. Without a kernel the sums are computed in
// double, one row after the other: for models that bring logits from elsewhere.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernel_call.h"
#include "logits_row.h"
#include "thread_pool.h"
#include "token_choice.h"

namespace nanoserve {

// The kernels of kernels/logits.py, and the rows they were compiled for; both or none.
struct LogitsKernels {
    Kernel block_sums = nullptr;
    Kernel block_max = nullptr;  // where -inf is how a token is forbidden
    std::int64_t vocab = 0;
    std::int64_t row_stride = 0;
    std::int64_t blocks_per_unit = 0;
};

struct LogitsView {
    const float* values = nullptr;
    const float* block_max = nullptr;  // [num_rows][num_logits_blocks(vocab)]
    std::int64_t num_rows = 0;
    std::int64_t vocab = 0;
    std::int64_t row_stride = 0;  // in floats

    [[nodiscard]] LogitsRow row(std::int64_t index) const;
};

struct Choice {
    std::int64_t row;
    Filters filters;
    double uniform = 0.0;
};

struct Scored {
    std::int64_t row, token, num_top;
};

struct Score {
    double logprob = 0.0;
    std::int64_t rank = 0;
    std::vector<std::pair<std::int64_t, double>> top;  // (token, logprob), likeliest first
};

class LogitsReader {
  public:
    // threads: may be null for the caller alone.
    LogitsReader(std::shared_ptr<ThreadPool> threads, const LogitsKernels& kernels);

    // out: num_rows * num_logits_blocks(vocab). NaN for a block with a number that is not finite; where
    // tokens may be forbidden, which is -inf, it is not NaN for those.
    void block_max(const LogitsView& rows, bool may_forbid, float* out) const;
    // Of the rows with a mask, masks[i] for rows[i]: forbid_outside. values and block_max are those of
    // `view`; a row is named once.
    void forbid(const LogitsView& view, float* values, float* block_max, std::span<const std::int64_t> rows,
                std::span<const std::uint32_t> masks) const;
    // A token each; some token, which means nothing, for a row that is not finite.
    [[nodiscard]] std::vector<std::int64_t> sample(const LogitsView& rows,
                                                   std::span<const Choice> choices) const;
    // Zeros for a row that is not finite.
    [[nodiscard]] std::vector<Score> score(const LogitsView& rows, std::span<const Scored> wanted) const;
    // What sample would draw from, of one row.
    [[nodiscard]] std::vector<WeightedToken> kept(const LogitsView& rows, const Choice& choice) const;

  private:
    struct Sums;

    void check(const LogitsView& rows) const;
    [[nodiscard]] int team_for(std::int64_t cost) const;
    // finish(i) for every i < count, on all threads of the team, after the sums are there.
    template <typename Finish>
    void run(const LogitsView& rows, Sums& sums, std::int64_t count, std::int64_t cost,
             Finish&& finish) const;

    const std::shared_ptr<ThreadPool> threads_;
    const LogitsKernels kernels_;
};

}  // namespace nanoserve
