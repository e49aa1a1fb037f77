#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "check.h"
#include "checked.h"
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

namespace {

std::vector<SequenceSpan> spans(const std::vector<std::pair<std::int64_t, std::int64_t>>& starts_and_counts) {
    std::vector<SequenceSpan> out;
    std::int64_t row = 0;
    for (const auto& [start, count] : starts_and_counts) {
        out.push_back({.first_row = row, .start = start, .count = count, .table_off = 8 * std::ssize(out)});
        row += count;
    }
    return out;
}

}  // namespace

// Every row, head and segment of it in exactly one item, for any number of threads; every cut walk in one
// merge, with a place for each segment that nothing else has.
TEST(items_cover_every_segment_once) {
    std::mt19937 random(7);
    const auto below = [&](std::uint32_t n) { return static_cast<std::int64_t>(random() % n); };
    for (int round = 0; round < 200; ++round) {
        const std::int64_t group = 1 + below(5);
        const AttentionShape shape{.group = group,
                                   .kv_heads = 1 + below(6),
                                   .head_dim = 8 + below(3),
                                   .small = {std::min<std::int64_t>(group, 4), 1 + below(4)},
                                   .large = {1 + below(8), 1 + below(4)},
                                   .window = below(3) == 0 ? 1 + below(700) : 0};
        std::vector<std::pair<std::int64_t, std::int64_t>> sizes;
        for (std::int64_t s = 1 + below(5); s > 0; --s) {
            sizes.emplace_back(below(2) == 0 ? below(100) : below(3000), below(2) == 0 ? 1 : 1 + below(40));
        }
        const std::vector<SequenceSpan> sequences = spans(sizes);
        AttentionWork work(shape);
        work.build(sequences, static_cast<int>(1 + below(64)));
        using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t>;  // batch row, query head, segment
        std::map<Key, std::int64_t> seen;                                  // -> position
        std::map<std::int64_t, std::int64_t>
            part_of;  // where a segment's results go -> the merge that reads it
        std::int64_t wrong = 0;
        const auto check = [&](bool holds) { wrong += holds ? 0 : 1; };
        for (std::int64_t i = 0; i < work.num_taken(); ++i) {
            const AttentionItem& item = work.items()[at(i)];
            const bool small = item.num_rows == group && group <= shape.small.rows;
            check(item.num_heads <= (small ? shape.small.tiles : 1));
            check(item.num_rows <= (small ? shape.small.rows : shape.large.rows * shape.large.tiles));
            const SequenceSpan& owner = sequences[at(item.table_off / 8)];
            check(item.q0 == owner.first_row && item.pos0 == owner.start);
            check(item.first_segment < item.end_segment && item.num_parts == 0);
            for (std::int64_t segment = item.first_segment; segment < item.end_segment; ++segment) {
                if (item.part >= 0) {
                    const std::int64_t part = item.part + (segment - item.first_segment) * item.part_stride;
                    check(part_of.insert({part, item.merge}).second);
                }
                for (std::int64_t r = 0; r < item.num_rows * item.num_heads; ++r) {
                    const std::int64_t flat = item.r0 + r % item.num_rows;
                    const std::int64_t head = (item.kv_head + r / item.num_rows) * group + flat % group;
                    const Key key{item.q0 + flat / group, head, segment};
                    check(seen.insert({key, item.pos0 + flat / group}).second);
                }
            }
        }
        std::int64_t merged = 0, last_end = 0;
        for (std::int64_t i = work.num_taken(); i < std::ssize(work.items()); ++i) {
            const AttentionItem& merge = work.items()[at(i)];
            check(merge.first_segment == merge.end_segment && merge.part >= last_end);
            check(merge.part_stride * 16 >=
                  2 * round_up(merge.num_rows, 16) + merge.num_rows * merge.num_heads * shape.head_dim);
            for (std::int64_t part = 0; part < merge.num_parts; ++part, ++merged) {
                const auto found = part_of.find(merge.part + part * merge.part_stride);
                check(found != part_of.end() && found->second == i);
            }
            last_end = merge.part + std::int64_t{merge.num_parts} * merge.part_stride;
        }
        check(merged == std::ssize(part_of));
        std::int64_t expected = 0;
        for (const SequenceSpan& sequence : sequences) {
            for (std::int64_t t = 0; t < sequence.count; ++t) {
                const std::int64_t position = sequence.start + t;
                const std::int64_t first =
                    shape.window > 0 ? std::max<std::int64_t>(0, position - shape.window + 1) : 0;
                for (std::int64_t h = 0; h < shape.kv_heads * group; ++h) {
                    for (std::int64_t s = first / kSegmentTokens; s <= position / kSegmentTokens; ++s) {
                        ++expected;
                        const auto found = seen.find({sequence.first_row + t, h, s});
                        check(found != seen.end() && found->second == position);
                    }
                }
            }
        }
        CHECK_EQ(wrong, 0);
        // An item walks what any of its rows sees: a few segments more than each row does by itself.
        CHECK(std::ssize(seen) >= expected);
    }
}

// Threads that take items in order end at about the same time, unless there is less to share than one segment
// of one head for each.
TEST(shares_are_even_for_any_number_of_threads) {
    const std::vector<std::pair<const char*, std::vector<std::pair<std::int64_t, std::int64_t>>>> batches = {
        {"one long decode", {{8191, 1}}},
        {"one decode", {{2047, 1}}},
        {"three decodes", {{5000, 1}, {4100, 1}, {300, 1}}},
        {"many decodes", std::vector<std::pair<std::int64_t, std::int64_t>>(32, {1000, 1})},
        {"a prompt", {{0, 512}}},
        {"a chunk of a long prompt", {{6000, 256}}},
        {"a few rows of a long prompt", {{9000, 5}}},
        {"decodes and a chunk", {{2047, 1}, {900, 1}, {3333, 1}, {70, 1}, {512, 256}}},
        {"one long among short", {{30'000, 1}, {100, 1}, {200, 1}, {150, 1}}},
    };
    for (const AttentionShape& shape :
         {AttentionShape{.group = 2, .kv_heads = 8, .head_dim = 128, .small = {2, 4}, .large = {8, 4}},
          AttentionShape{.group = 1, .kv_heads = 12, .head_dim = 64, .small = {1, 12}, .large = {8, 4}},
          AttentionShape{.group = 8, .kv_heads = 1, .head_dim = 256, .small = {8, 1}, .large = {8, 2}}}) {
        for (const auto& [name, sizes] : batches) {
            for (int threads = 1; threads <= 64; ++threads) {
                AttentionWork work(shape);
                work.build(spans(sizes), threads);
                const double mean = static_cast<double>(work.cost()) / threads;
                const double segment = static_cast<double>(kSegmentTokens * 2 * shape.head_dim) *
                                       static_cast<double>(shape.large.rows * shape.large.tiles);
                const double most = std::max(1.15, 1.0 + segment / mean);
                const bool even = work.imbalance(threads) <= most;
                CHECK(even);
                if (!even) {
                    std::cerr << name << " on " << threads << " threads: " << work.imbalance(threads)
                              << " of the mean, at most " << most << "\n";
                }
            }
        }
    }
}

TEST(what_comes_out_even_is_not_cut) {
    AttentionWork work({.group = 2, .kv_heads = 8, .head_dim = 128, .small = {2, 4}, .large = {8, 4}});
    work.build(spans({{2047, 1}}), 2);
    CHECK_EQ(std::ssize(work.items()), 2);
    work.build(spans({{2047, 1}}), 1);
    CHECK_EQ(std::ssize(work.items()), 2);
    work.build(spans({{2047, 1}}), 4);
    CHECK_EQ(work.num_taken(), 4);
    CHECK_EQ(std::ssize(work.items()), 6);  // two walks of 8 segments in two pieces each, and their merges
    work.build(spans({{2047, 1}}), 64, work.cost() / 2);
    CHECK_EQ(work.num_threads(), 2);
}

TEST(parts_never_exceed_their_bound) {
    std::mt19937 random(11);
    const auto below = [&](std::uint32_t n) { return static_cast<std::int64_t>(random() % n); };
    for (int round = 0; round < 600; ++round) {
        const std::int64_t group = 1 + below(9);
        const AttentionShape shape{.group = group,
                                   .kv_heads = 1 + below(8),
                                   .head_dim = 8 + below(121),
                                   .small = {std::min<std::int64_t>(group, 8), 1 + below(8)},
                                   .large = {1 + below(8), 1 + below(4)},
                                   .window = below(3) == 0 ? 1 + below(3000) : 0};
        std::vector<std::pair<std::int64_t, std::int64_t>> sizes;
        for (std::int64_t s = 1 + below(12); s > 0; --s) {
            sizes.emplace_back(below(2) == 0 ? below(100) : below(30'000),
                               below(2) == 0 ? 1 : 1 + below(300));
        }
        std::int64_t tokens = 0, context = 0;
        for (const auto& [start, count] : sizes) {
            tokens += count;
            context = std::max(context, start + count);
        }
        AttentionWork work(shape);
        for (const int threads : {1, 2, 3, 8, 17, 64}) {
            work.build(spans(sizes), threads);  // one after another: what it keeps is the largest of them
            CHECK(work.num_part_floats() <= AttentionWork::most_part_floats(shape, tokens, context, threads));
            CHECK(threads > 1 || work.num_part_floats() == 0);
        }
    }
}

// A bound that no step comes near would cost memory that others could use.
TEST(parts_come_near_their_bound) {
    const AttentionShape shape{.group = 2, .kv_heads = 8, .head_dim = 128, .small = {2, 8}, .large = {8, 4}};
    AttentionWork chunk(shape), decode(shape);
    chunk.build(spans({{38'000, 912}}), 64);  // 57 tiles of 8 heads: 7.1 walks for each thread
    CHECK(chunk.num_part_floats() * 4 > AttentionWork::most_part_floats(shape, 912, 38'912, 64) * 3);
    decode.build(spans(std::vector<std::pair<std::int64_t, std::int64_t>>(51, {8000, 1})), 8);
    CHECK(decode.num_part_floats() * 2 > AttentionWork::most_part_floats(shape, 51, 8001, 8));
    AttentionWork two({.group = 1, .kv_heads = 1, .head_dim = 8, .small = {1, 1}, .large = {1, 1}});
    two.build(spans({{256, 1}}), 2);  // one walk, of two segments
    CHECK_EQ(two.num_part_floats(), 2 * (2 + 1) * 16);
    CHECK(AttentionWork::most_part_floats(two.shape(), 1, 256, 2) < 2 * (2 + 1) * 16);
    CHECK(AttentionWork::most_part_floats(two.shape(), 1, 257, 2) >= 2 * (2 + 1) * 16);
    CHECK_EQ(AttentionWork::most_part_floats(shape, 912, 38'912, 1), 0);
    CHECK_THROWS(std::invalid_argument, "max_threads is 0, must be in [1, 1024]",
                 AttentionWork::most_part_floats(shape, 1, 1, 0));
    CHECK_THROWS(std::invalid_argument, "max_context is 0, must be at least 1",
                 AttentionWork::most_part_floats(shape, 1, 0, 2));
}

TEST(costly_walks_come_first) {
    AttentionWork work({.group = 1, .kv_heads = 1, .head_dim = 8, .small = {1, 1}, .large = {4, 1}});
    work.build(spans({{0, 1}, {0, 9}, {500, 1}}), 1);
    CHECK_EQ(std::ssize(work.items()), 5);  // of the chunk of 9: two tiles of 4, and a single row
    CHECK_EQ(work.items()[0].q0, 10);
    CHECK_EQ(work.items()[4].q0, 0);
    CHECK(work.cost() > 500 * 8);
}

// What decides how many threads share the work: a window of keys costs the window, not the context.
TEST(a_window_bounds_the_cost) {
    const auto cost = [](std::int64_t window, std::int64_t start, std::int64_t count) {
        AttentionWork work(
            {.group = 2, .kv_heads = 3, .head_dim = 8, .small = {2, 1}, .large = {8, 4}, .window = window});
        work.build(spans({{start, count}}), 1);
        return work.cost();
    };
    CHECK_EQ(cost(0, 999, 1), 3 * 16 * 1000 * 8 * 2);                    // 3 KV heads, few rows, 1000 keys
    CHECK_EQ(cost(100, 999, 1), 3 * 16 * (1000 - 896) * 8 * 2);          // from the window's first block on
    CHECK_EQ(cost(100, 64'999, 1), 3 * 16 * (65'000 - 64'896) * 8 * 2);  // whatever came before
    CHECK_EQ(cost(5000, 999, 1), cost(0, 999, 1));                       // never more than there is
    CHECK_EQ(cost(0, 999, 16), 3 * 32 * 1015 * 8 * 2);                   // 32 rows
    CHECK_EQ(cost(2'147'483'647, 99, 1), cost(0, 99, 1));
}

TEST(attention_shapes_are_checked) {
    const auto shape = [](std::int64_t group, std::int64_t small, std::int64_t large) {
        return AttentionShape{
            .group = group, .kv_heads = 1, .head_dim = 8, .small = {small, 1}, .large = {large, 1}};
    };
    shape(4, 4, 8).validate(1024);
    CHECK_THROWS(std::invalid_argument, "group is 0", shape(0, 4, 8).validate(1024));
    CHECK_THROWS(std::invalid_argument, "small rows is 0", shape(4, 0, 8).validate(1024));
    CHECK_THROWS(std::invalid_argument, "large rows is -1", shape(4, 4, -1).validate(1024));
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
constexpr Kernel kSmall = test::attention<{kGroup, kHeads, kDim, kPage, kRow, kRow, 2, 2}>;
constexpr Kernel kLarge = test::attention<{kGroup, kHeads, kDim, kPage, kRow, kRow, 1, 10}>;

struct Layer {  // random keys and values in scattered pages, and the same without pages
    std::shared_ptr<KVCachePool> pool = std::make_shared<KVCachePool>(PoolShape{
        .num_pages = 512, .page_size = kPage, .num_layers = 2, .num_heads = kHeads, .head_dim = kDim});
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
    const std::vector<std::int32_t> starts = {0, 1200, 3}, counts = {7, 1, 15};
    constexpr std::int64_t kMaxPages = 241;
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
        PagedAttention attention(
            *layer.pool, 1,
            {.q = q.data(),
             .out = out.data(),
             .num_tokens = 23,
             .num_heads = kGroup * kHeads,
             .block_tables = block_tables,
             .max_pages = kMaxPages,
             .starts = starts,
             .counts = counts},
            {.small = kSmall, .small_tiling = {2, 2}, .large = kLarge, .large_tiling = {5, 2}}, threads);
        for (int repeat = 0; repeat < 2; ++repeat) {  // what counts the pieces of a walk starts anew
            std::fill(out.begin(), out.end(), 0.0F);
            attention.run(pool);
        }
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
    const AttentionKernels kernels{
        .small = kSmall, .small_tiling = {2, 2}, .large = kLarge, .large_tiling = {4, 1}};
    const auto make = [&](const AttentionBatch& b, std::int64_t layer_id = 0) {
        PagedAttention attention(*layer.pool, layer_id, b, kernels, 2);
    };
    make(batch);
    CHECK_THROWS(std::out_of_range, "layer 2", make(batch, 2));
    for (const auto& [sequence, page] : {std::pair{1, -1}, std::pair{1, 512}}) {
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
                 PagedAttention(*layer.pool, 0, batch,
                                {.small = kSmall, .small_tiling = {1, 1}, .large_tiling = {1, 1}}, 2));
}
