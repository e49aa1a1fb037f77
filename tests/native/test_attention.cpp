#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "check.h"
#include "page_table.h"
#include "paged_attention.h"
#include "test_kernels.h"

using namespace nanoserve;

TEST(block_tables_are_padded_with_the_last_page) {
    std::vector<std::int32_t> table;
    const std::vector<std::int32_t> pages = {7, 3, 9, 4, 1};
    CHECK_EQ(append_block_table(table, pages, 33, 16), 0);  // 1 block and one ahead: 128 tokens
    CHECK_EQ(table, (std::vector<std::int32_t>{7, 3, 9, 9, 9, 9, 9, 9}));
    CHECK_EQ(append_block_table(table, pages, 65, 16), 8);  // 2 blocks: 192 tokens
    CHECK_EQ(std::ssize(table), 8 + 12);
    CHECK_EQ(table[12], 1);
    CHECK_EQ(table.back(), 1);
    table.clear();
    CHECK_EQ(append_block_table(table, pages, 100, 100), 0);  // pages larger than a block
    CHECK_EQ(table, (std::vector<std::int32_t>{7, 7}));
    table.clear();
    CHECK_EQ(append_block_table(table, pages, 5, 5), 0);  // pages that do not divide a block
    CHECK_EQ(std::ssize(table), 26);
    CHECK_THROWS(std::invalid_argument, "needs 6 pages of 16, it has 5",
                 append_block_table(table, pages, 81, 16));
    CHECK_EQ(std::ssize(table), 26);
}

TEST(items_cover_every_row_and_head_once) {
    std::mt19937 random(7);
    for (int round = 0; round < 200; ++round) {
        const AttentionShape shape{.group = 1 + static_cast<std::int64_t>(random() % 5),
                                   .kv_heads = 1 + static_cast<std::int64_t>(random() % 3),
                                   .head_dim = 8,
                                   .small_rows = 1 + static_cast<std::int64_t>(random() % 6),
                                   .large_rows = 1 + static_cast<std::int64_t>(random() % 14)};
        std::vector<SequenceSpan> sequences;
        std::int64_t rows = 0, offset = 0;
        for (int s = 0; s < 5; ++s) {
            const std::int64_t count = random() % 2 == 0 ? 1 : 1 + static_cast<std::int64_t>(random() % 40);
            sequences.push_back({rows, static_cast<std::int64_t>(random() % 100), count, offset});
            rows += count;
            offset += 8;
        }
        AttentionWork work(shape);
        work.build(sequences);
        std::map<std::tuple<std::int64_t, std::int64_t>, std::int64_t>
            seen;  // (batch row, query head) -> position
        std::int64_t wrong = 0;
        for (std::int64_t i = 0; i < std::ssize(work.items()); ++i) {
            const AttentionItem& item = work.items()[static_cast<std::size_t>(i)];
            wrong += item.num_rows <= (i < work.num_large() ? shape.large_rows : shape.small_rows) ? 0 : 1;
            wrong += i < work.num_large() && item.num_rows <= shape.small_rows ? 1 : 0;
            for (std::int64_t r = 0; r < item.num_rows; ++r) {
                const std::int64_t token = (item.r0 + r) / shape.group;
                const std::int64_t head = item.kv_head * shape.group + (item.r0 + r) % shape.group;
                wrong += seen.insert({{item.q0 + token, head}, item.pos0 + token}).second ? 0 : 1;
                const SequenceSpan& owner = sequences[static_cast<std::size_t>(item.table_off / 8)];
                wrong +=
                    item.q0 == owner.first_row && token < owner.count && item.pos0 == owner.start ? 0 : 1;
            }
        }
        CHECK_EQ(wrong, 0);
        CHECK_EQ(std::ssize(seen), rows * shape.kv_heads * shape.group);
    }
}

TEST(long_contexts_come_first) {
    AttentionWork work({.group = 1, .kv_heads = 1, .head_dim = 8, .small_rows = 1, .large_rows = 4});
    work.build(std::vector<SequenceSpan>{{0, 0, 1, 0}, {1, 0, 9, 8}, {10, 500, 1, 16}});
    CHECK_EQ(work.num_large(),
             2);  // of the chunk of 9: two tiles of 4, and a single row for the small kernel
    CHECK_EQ(std::ssize(work.items()), 5);
    CHECK_EQ(work.items()[0].r0, 4);
    CHECK_EQ(work.items()[1].r0, 0);
    CHECK_EQ(work.items()[2].q0, 10);
    CHECK_EQ(work.items()[3].r0, 8);
    CHECK_EQ(work.items()[4].q0, 0);
    CHECK(work.cost() > 500 * 8);
}

// What decides how many threads share the work: a window of keys costs the window, not the context.
TEST(a_window_bounds_the_cost) {
    const auto cost = [](std::int64_t window, std::int64_t start, std::int64_t count) {
        AttentionWork work(
            {.group = 2, .kv_heads = 3, .head_dim = 8, .small_rows = 2, .large_rows = 8, .window = window});
        work.build(std::vector<SequenceSpan>{{0, start, count, 0}});
        return work.cost();
    };
    CHECK_EQ(cost(0, 999, 1), 3 * 2 * 1000 * 8 * 2);          // 3 KV heads, 2 rows, 1000 keys
    CHECK_EQ(cost(100, 999, 1), 3 * 2 * (100 + 2) * 8 * 2);   // the window, and what its rows add
    CHECK_EQ(cost(100, 99'999, 1), cost(100, 999, 1));        // whatever came before
    CHECK_EQ(cost(5000, 999, 1), cost(0, 999, 1));            // never more than there is
    CHECK_EQ(cost(100, 1000, 4), 3 * 8 * (100 + 8) * 8 * 2);  // one tile of 8 rows
    CHECK_EQ(cost(2'147'483'647, 99, 1), cost(0, 99, 1));
}

TEST(attention_shapes_are_checked) {
    const auto shape = [](std::int64_t group, std::int64_t small, std::int64_t large) {
        return AttentionShape{
            .group = group, .kv_heads = 1, .head_dim = 8, .small_rows = small, .large_rows = large};
    };
    shape(4, 4, 8).validate(1024);
    CHECK_THROWS(std::invalid_argument, "group is 0", shape(0, 4, 8).validate(1024));
    CHECK_THROWS(std::invalid_argument, "small_rows is 0", shape(4, 0, 8).validate(1024));
    CHECK_THROWS(std::invalid_argument, "large_rows is -1", shape(4, 4, -1).validate(1024));
    CHECK_THROWS(std::invalid_argument, "max_tokens * group", shape(1 << 20, 4, 8).validate(1 << 20));
    for (const std::int64_t window : {std::int64_t{-1}, std::int64_t{1} << 31}) {
        AttentionShape wrong = shape(4, 4, 8);
        wrong.window = window;
        CHECK_THROWS(std::invalid_argument, "window is " + std::to_string(window), wrong.validate(1024));
    }
}

namespace {

constexpr int kGroup = 2, kHeads = 2, kDim = 4, kPage = 5;
constexpr int kRow = kGroup * kHeads * kDim;
constexpr Kernel kSmall = test::attention<kGroup, kHeads, kDim, kPage, kRow, kRow, 1, 2>;
constexpr Kernel kLarge = test::attention<kGroup, kHeads, kDim, kPage, kRow, kRow, 3, 5>;

struct Layer {  // random keys and values in scattered pages, and the same without pages
    std::shared_ptr<KVCachePool> pool = std::make_shared<KVCachePool>(PoolShape{
        .num_pages = 64, .page_size = kPage, .num_layers = 2, .num_heads = kHeads, .head_dim = kDim});
    std::mt19937 random{3};

    float next() { return std::uniform_real_distribution<float>(-1.0F, 1.0F)(random); }
    std::vector<float> numbers(std::int64_t count) {
        std::vector<float> out(static_cast<std::size_t>(count));
        for (float& x : out) {
            x = next();
        }
        return out;
    }
};

// What one query row must give, from keys and values [token][head][dim].
std::vector<double> expected_row(const float* q, const std::vector<float>& k, const std::vector<float>& v,
                                 int position) {
    std::vector<double> out(kRow, 0.0);
    for (int head = 0; head < kGroup * kHeads; ++head) {
        const int kv = head / kGroup;
        double total = 0.0;
        std::vector<double> weights;
        for (int p = 0; p <= position; ++p) {
            double score = 0.0;
            for (int d = 0; d < kDim; ++d) {
                score += double{q[head * kDim + d]} *
                         double{k[static_cast<std::size_t>((p * kHeads + kv) * kDim + d)]};
            }
            weights.push_back(std::exp(score));
            total += weights.back();
        }
        for (int p = 0; p <= position; ++p) {
            for (int d = 0; d < kDim; ++d) {
                out[static_cast<std::size_t>(head * kDim + d)] +=
                    weights[static_cast<std::size_t>(p)] / total *
                    double{v[static_cast<std::size_t>((p * kHeads + kv) * kDim + d)]};
            }
        }
    }
    return out;
}

}  // namespace

TEST(paged_attention_matches_the_definition) {
    Layer layer;
    const std::vector<std::int32_t> starts = {0, 12, 3}, counts = {7, 1, 15};
    constexpr std::int64_t kMaxPages = 6;
    std::vector<std::int32_t> block_tables(3 * kMaxPages,
                                           -1);  // what is past a sequence's end is not looked at
    std::vector<std::vector<float>> keys, values;
    PageTable hole(layer.pool);
    for (std::size_t s = 0; s < 3; ++s) {
        const std::int64_t length = starts[s] + counts[s];
        const std::vector<std::int32_t> pages = layer.pool->allocate(length);
        static_cast<void>(hole.grow_to(hole.capacity() + 1));  // ids of a sequence are not a run
        std::copy(pages.rbegin(), pages.rend(),
                  block_tables.begin() + static_cast<std::ptrdiff_t>(s) * kMaxPages);
        std::vector<std::int64_t> slots;
        for (std::int64_t p = 0; p < length; ++p) {
            slots.push_back(block_tables[s * kMaxPages + static_cast<std::size_t>(p / kPage)] * kPage +
                            p % kPage);
        }
        keys.push_back(layer.numbers(length * kHeads * kDim));
        values.push_back(layer.numbers(length * kHeads * kDim));
        layer.pool->store_kv(keys.back(), values.back(), slots, 1);
    }
    const std::vector<float> q = layer.numbers(23 * kRow);
    for (const int threads : {1, 2, 5}) {
        std::vector<float> out(23 * kRow, 0.0F);
        ThreadPool pool(threads);
        PagedAttention attention(*layer.pool, 1,
                                 {.q = q.data(),
                                  .out = out.data(),
                                  .num_tokens = 23,
                                  .num_heads = kGroup * kHeads,
                                  .block_tables = block_tables,
                                  .max_pages = kMaxPages,
                                  .starts = starts,
                                  .counts = counts},
                                 {.small = kSmall, .small_rows = 2, .large = kLarge, .large_rows = 5});
        attention.run(pool);
        double worst = 0.0;
        std::size_t row = 0;
        for (std::size_t s = 0; s < 3; ++s) {
            for (int token = 0; token < counts[s]; ++token, ++row) {
                const auto want = expected_row(q.data() + row * kRow, keys[s], values[s], starts[s] + token);
                for (std::size_t i = 0; i < kRow; ++i) {
                    worst = std::max(worst, std::abs(want[i] - double{out[row * kRow + i]}));
                }
            }
        }
        CHECK(worst < 1e-6);
    }
}

TEST(paged_attention_checks_its_input) {
    Layer layer;
    std::vector<float> q(3 * kRow), out(3 * kRow);
    std::vector<std::int32_t> tables = {0, 1, 2, -1}, starts = {3, 0}, counts = {2, 1};
    AttentionBatch batch{.q = q.data(),
                         .out = out.data(),
                         .num_tokens = 3,
                         .num_heads = kGroup * kHeads,
                         .block_tables = tables,
                         .max_pages = 2,
                         .starts = starts,
                         .counts = counts};
    const AttentionKernels kernels{.small = kSmall, .small_rows = 2, .large = kLarge, .large_rows = 4};
    const auto make = [&](const AttentionBatch& b, std::int64_t layer_id = 0) {
        PagedAttention attention(*layer.pool, layer_id, b, kernels);
    };
    make(batch);
    CHECK_THROWS(std::out_of_range, "layer 2", make(batch, 2));
    for (const auto& [sequence, page] : {std::pair{1, -1}, std::pair{1, 64}}) {
        const std::int32_t kept = std::exchange(tables[static_cast<std::size_t>(sequence * 2)], page);
        CHECK_THROWS(std::invalid_argument, "a page of sequence 1 is " + std::to_string(page), make(batch));
        tables[static_cast<std::size_t>(sequence * 2)] = kept;
    }
    starts[0] = 9;
    CHECK_THROWS(std::invalid_argument, "sequence 0 reaches 11 tokens, which needs 3 pages", make(batch));
    starts[0] = -1;
    CHECK_THROWS(std::invalid_argument, "every start is -1", make(batch));
    starts[0] = 2'147'483'647;
    CHECK_THROWS(std::invalid_argument, "reaches 2147483649 tokens", make(batch));
    starts[0] = 3;
    counts[1] = 0;
    CHECK_THROWS(std::invalid_argument, "every count is 0", make(batch));
    counts[1] = 2;
    CHECK_THROWS(std::invalid_argument, "add up to 4 tokens, q has 3", make(batch));
    counts[1] = 1;
    batch.num_heads = 3;
    CHECK_THROWS(std::invalid_argument, "3 query heads", make(batch));
    batch.num_heads = 4;
    batch.max_pages = 1;
    CHECK_THROWS(std::invalid_argument, "one row for each sequence", make(batch));
    batch.max_pages = 2;
    CHECK_THROWS(std::invalid_argument, "address is 0",
                 PagedAttention(*layer.pool, 0, batch, {.small = kSmall, .small_rows = 1, .large_rows = 1}));
}
