// Tokens from rows of logits, against loops over the whole row; with threads, so that the sanitizers see
// them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "check.h"
#include "logits_reader.h"

using namespace nanoserve;

namespace {

struct Rows {
    std::int64_t count, vocab;
    std::vector<float> values, block_max;
    LogitsReader reader;

    Rows(std::int64_t num_rows, std::int64_t num_logits, int num_threads)
        : count(num_rows),
          vocab(num_logits),
          values(at(num_rows * num_logits)),
          block_max(at(num_rows * num_logits_blocks(num_logits))),
          reader(num_threads > 1 ? std::make_shared<ThreadPool>(num_threads) : nullptr, {}) {
        std::mt19937 bits(7);
        std::normal_distribution<float> normal(0.0F, 3.0F);
        std::ranges::generate(values, [&] { return std::round(normal(bits) * 8.0F) / 8.0F; });  // with ties
        reader.block_max(view(), false, block_max.data());
    }

    [[nodiscard]] LogitsView view() const {
        return {.values = values.data(),
                .block_max = block_max.data(),
                .num_rows = count,
                .vocab = vocab,
                .row_stride = vocab};
    }
    [[nodiscard]] std::span<const float> row(std::int64_t index) const { return view().row(index).values; }
};

// Token ids by (logit descending, id ascending).
std::vector<std::int64_t> ranking(std::span<const float> row) {
    std::vector<std::int64_t> ids(row.size());
    std::iota(ids.begin(), ids.end(), std::int64_t{0});
    std::ranges::stable_sort(ids, [&](std::int64_t a, std::int64_t b) { return row[at(a)] > row[at(b)]; });
    return ids;
}

}  // namespace

TEST(greedy_scores_and_ranks_are_those_of_a_sort) {
    for (const int threads : {1, 3}) {
        for (const std::int64_t vocab : {1, 255, 256, 257, 40'000}) {
            const Rows rows(5, vocab, threads);
            std::vector<Choice> greedy;
            std::vector<Scored> wanted;
            for (std::int64_t i = 0; i < rows.count; ++i) {
                greedy.push_back({.row = i, .filters = {.temperature = 0.0}});
                wanted.push_back({i, vocab * i / 5, 7});
            }
            const std::vector<std::int64_t> tokens = rows.reader.sample(rows.view(), greedy);
            const std::vector<Score> scores = rows.reader.score(rows.view(), wanted);
            for (std::size_t i = 0; i < wanted.size(); ++i) {
                const std::span<const float> row = rows.row(static_cast<std::int64_t>(i));
                const std::vector<std::int64_t> ids = ranking(row);
                CHECK_EQ(tokens[i], ids[0]);
                CHECK_EQ(scores[i].rank, std::ranges::find(ids, wanted[i].token) - ids.begin() + 1);
                CHECK_EQ(std::ssize(scores[i].top), std::min<std::int64_t>(7, vocab));
                double total = 0.0;
                for (const float logit : row) {
                    total += std::exp(double{logit});
                }
                for (std::size_t place = 0; place < scores[i].top.size(); ++place) {
                    const auto& [id, logprob] = scores[i].top[place];
                    CHECK_EQ(id, ids[place]);
                    CHECK(std::abs(logprob - (double{row[at(id)]} - std::log(total))) < 1e-9);
                }
            }
        }
    }
}

TEST(a_draw_depends_on_its_own_row_and_number) {
    const Rows alone(6, 9'000, 1);
    const Rows shared(6, 9'000, 4);
    std::vector<Choice> choices;
    for (std::int64_t i = 0; i < 48; ++i) {
        choices.push_back({.row = i % 6,
                           .filters = {.temperature = i % 5 == 0 ? 0.0 : 0.3 + 0.1 * static_cast<double>(i),
                                       .top_k = i % 3 == 0 ? 40 : 0,
                                       .top_p = i % 4 == 0 ? 0.9 : 1.0,
                                       .min_p = i % 7 == 0 ? 0.05 : 0.0},
                           .uniform = static_cast<double>(i) / 48.0});
    }
    const std::vector<std::int64_t> together = shared.reader.sample(shared.view(), choices);
    for (std::size_t i = 0; i < choices.size(); ++i) {
        CHECK_EQ(alone.reader.sample(alone.view(), {&choices[i], 1}), std::vector<std::int64_t>{together[i]});
    }
}

TEST(forbidden_tokens_are_minus_infinity_in_rows_and_maxima) {
    for (const int threads : {1, 3}) {
        for (const std::int64_t vocab : {1, 31, 33, 256, 257, 70'000}) {
            const Rows before(4, vocab, threads);
            Rows rows(4, vocab, threads);
            const std::vector<std::int64_t> masked = {2, 0};
            const std::int64_t words = ceil_div(vocab, 32);
            std::vector<std::uint32_t> masks(at(2 * words));
            std::mt19937 bits(3);
            for (std::size_t w = 0; w < masks.size(); ++w) {  // stretches of none, of all, and mixed
                masks[w] = w / 20 % 3 == 0 ? 0U : w / 20 % 3 == 1 ? ~0U : static_cast<std::uint32_t>(bits());
            }
            rows.reader.forbid(rows.view(), rows.values.data(), rows.block_max.data(), masked, masks);
            for (std::int64_t row = 0; row < 4; ++row) {
                for (std::int64_t token = 0; token < vocab; ++token) {
                    const std::int64_t entry = row == masked[0] ? 0 : row == masked[1] ? 1 : -1;
                    const bool allowed =
                        entry < 0 || (masks[at(entry * words + token / 32)] >> (token % 32) & 1U) != 0;
                    const float own = before.row(row)[at(token)];
                    CHECK_EQ(rows.row(row)[at(token)],
                             allowed ? own : -std::numeric_limits<float>::infinity());
                }
            }
            std::vector<float> maxima(rows.block_max.size());
            rows.reader.block_max(rows.view(), true, maxima.data());
            CHECK(maxima == rows.block_max);
        }
    }
}

TEST(a_row_that_is_not_finite_gives_some_token_and_no_score) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
        Rows rows(2, 600, 2);
        rows.values[300] = bad;
        rows.reader.block_max(rows.view(), false, rows.block_max.data());
        CHECK(std::isnan(rows.block_max[1]));
        CHECK(std::isfinite(rows.block_max[0]));
        for (const Filters& filters : {Filters{.temperature = 0.0}, Filters{}, Filters{.top_k = 3},
                                       Filters{.top_p = 0.5}, Filters{.min_p = 0.1}}) {
            const Choice choice{.row = 0, .filters = filters, .uniform = 0.5};
            const std::int64_t token = rows.reader.sample(rows.view(), {&choice, 1})[0];
            CHECK(0 <= token && token < 600);
        }
        const Scored wanted{.row = 0, .token = 3, .num_top = 2};
        CHECK(rows.reader.score(rows.view(), {&wanted, 1})[0].top.empty());
    }
}
