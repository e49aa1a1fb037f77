#include "attention_work.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "checked.h"
#include "thread_pool.h"

namespace nanoserve {

namespace {

// Keys of few rows are as expensive as those of this many: what a core reads from memory in the meantime.
constexpr std::int64_t kMemoryRows = 16;
constexpr double kEven = 1.08;          // the largest share over the mean that is not worth cutting for
constexpr int kMostPieces = 16;         // of a thread's share; more would cost more than they even out
constexpr std::int64_t kPartUnit = 16;  // floats that items count parts in

}  // namespace

void AttentionShape::validate(std::int64_t max_tokens) const {
    require_at_least("group", group, 1);
    require_at_least("kv_heads", kv_heads, 1);
    require_at_least("head_dim", head_dim, 1);
    require_at_least("small rows", small.rows, 1);
    require_at_least("small tiles", small.tiles, 1);
    require_at_least("large rows", large.rows, 1);
    require_at_least("large tiles", large.tiles, 1);
    require_range("window", window, 0, std::numeric_limits<std::int32_t>::max());
    require_range("max_tokens * group",
                  checked_product("attention rows", {{"tokens", max_tokens}, {"group", group}}), 0,
                  std::numeric_limits<std::int32_t>::max());
}

std::int64_t append_block_table(std::vector<std::int32_t>& table, std::span<const std::int32_t> pages,
                                std::int64_t num_tokens, std::int64_t page_size) {
    const std::int64_t needed = ceil_div(num_tokens, page_size);
    if (needed < 1 || needed > std::ssize(pages)) {
        throw std::invalid_argument("a sequence of " + std::to_string(num_tokens) + " tokens needs " +
                                    std::to_string(needed) + " pages of " + std::to_string(page_size) +
                                    ", it has " + std::to_string(pages.size()));
    }
    const std::int64_t padded = ceil_div((ceil_div(num_tokens, kBlockTokens) + 1) * kBlockTokens, page_size);
    const std::int64_t offset = std::ssize(table);
    if (offset + padded > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("the flat block table of this batch does not fit in 32 bits");
    }
    table.insert(table.end(), pages.begin(), pages.begin() + needed);
    table.insert(table.end(), at(padded - needed), pages[at(needed - 1)]);
    return offset;
}

void AttentionWork::build(std::span<const SequenceSpan> sequences, int max_threads,
                          std::int64_t min_thread_cost) {
    whole_.clear();
    order_.assign(sequences.begin(), sequences.end());
    std::stable_sort(order_.begin(), order_.end(), [](const SequenceSpan& a, const SequenceSpan& b) {
        return a.start + a.count > b.start + b.count;
    });
    for (const SequenceSpan& sequence : order_) {
        add_sequence(sequence);
    }
    cost_ = 0;
    for (const Walk& walk : whole_) {
        cost_ += walk.cost;
    }
    const std::int64_t most_threads =
        min_thread_cost > 0 ? std::clamp<std::int64_t>(cost_ / min_thread_cost, 1, max_threads) : max_threads;
    num_threads_ = static_cast<int>(most_threads);
    // Whole walks if they come out even; else pieces of at most a share, a half of one, ...
    arrange(std::numeric_limits<std::int64_t>::max());
    for (int pieces = 1; pieces <= kMostPieces && imbalance(num_threads_) > kEven; pieces *= 2) {
        arrange(std::max<std::int64_t>(1, cost_ / (std::int64_t{num_threads_} * pieces)));
    }
    num_threads_ = static_cast<int>(std::min<std::int64_t>(num_threads_, num_taken()));
}

std::int64_t AttentionWork::most_part_floats(const AttentionShape& shape, std::int64_t max_tokens,
                                             std::int64_t max_context, int max_threads) {
    require_at_least("max_tokens", max_tokens, 1);
    require_at_least("max_context", max_context, 1);
    require_range("max_threads", max_threads, 1, ThreadPool::kMaxThreads);
    shape.validate(max_tokens);
    if (max_threads == 1) {
        return 0;  // one share is always even
    }
    const auto area = [](const AttentionTiling& tiling) {
        return checked_product("an item", {{"rows", tiling.rows}, {"tiles", tiling.tiles}});
    };
    // A walk that is cut costs more than one in kMostPieces * max_threads of all, so there are fewer of them.
    const std::int64_t all_rows = checked_product(
        "attention rows", {{"tokens", max_tokens}, {"group", shape.group}, {"kv_heads", shape.kv_heads}});
    const std::int64_t walks = std::min<std::int64_t>(std::int64_t{kMostPieces} * max_threads - 1, all_rows);
    // Rows of its own for each, of all of its heads.
    const std::int64_t most_rows = std::max(area(shape.small), area(shape.large));
    const std::int64_t rows =
        std::min(checked_product("rows", {{"walks", walks}, {"rows", most_rows}}), all_rows);
    std::int64_t segments = ceil_div(max_context, kSegmentTokens);
    if (shape.window > 0) {  // what the first of its rows sees, and the tokens to the last; begun anywhere
        const std::int64_t seen = shape.window + ceil_div(area(shape.large), shape.group);
        segments = std::min(segments, ceil_div(seen, kSegmentTokens) + 1);
    }
    // Beside the values: maxima and sums for a whole item, once per share of its heads, and what is rounded
    // up.
    const auto beside = [&](const AttentionTiling& tiling) {
        return 2 * ceil_div(area(tiling), kPartUnit) + 1;
    };
    const std::int64_t most_beside =
        std::max(checked_product("parts", {{"tiles", shape.small.tiles}, {"units", beside(shape.small)}}),
                 beside(shape.large));
    const std::int64_t values =
        ceil_div(checked_product("parts", {{"rows", rows}, {"head_dim", shape.head_dim}}), kPartUnit);
    const std::int64_t units = checked_product("parts", {{"walks", walks}, {"units", most_beside}}) + values;
    return checked_product("parts", {{"segments", segments}, {"units", units}, {"floats", kPartUnit}});
}

bool AttentionWork::is_small(const AttentionItem& item) const {
    return item.num_rows <= shape_.small.rows && item.num_rows == shape_.group;
}

std::int64_t AttentionWork::cost_of(const AttentionItem& item) const {
    const std::int64_t last = item.pos0 + (item.r0 + item.num_rows - 1) / shape_.group;
    const std::int64_t end = std::min<std::int64_t>(last + 1, item.end_segment * kSegmentTokens);
    std::int64_t begin = item.first_segment * kSegmentTokens;
    if (shape_.window > 0) {
        const std::int64_t seen = item.pos0 + item.r0 / shape_.group - shape_.window + 1;
        begin = std::max(begin, std::max<std::int64_t>(seen, 0) / kBlockTokens * kBlockTokens);
    }
    const std::int64_t tile = is_small(item) ? shape_.small.rows : shape_.large.rows;
    const std::int64_t rows = std::max(kMemoryRows, round_up(item.num_rows, tile));
    return std::max<std::int64_t>(end - begin, 1) * item.num_heads * rows * shape_.head_dim * 2;
}

void AttentionWork::add_sequence(const SequenceSpan& sequence) {
    const std::int64_t num_rows = sequence.count * shape_.group;
    const bool small = sequence.count == 1 && num_rows <= shape_.small.rows;
    const std::int64_t most_rows = small ? num_rows : shape_.large.rows * shape_.large.tiles;
    const std::int64_t most_heads = small ? shape_.small.tiles : 1;
    for (std::int64_t kv_head = 0; kv_head < shape_.kv_heads; kv_head += most_heads) {
        for (std::int64_t t = ceil_div(num_rows, most_rows) - 1; t >= 0; --t) {  // causal: the last has most
            const std::int64_t r0 = t * most_rows;
            const std::int64_t rows = std::min(most_rows, num_rows - r0);
            const std::int64_t end = sequence.start + (r0 + rows - 1) / shape_.group + 1;
            const std::int64_t seen = sequence.start + r0 / shape_.group - shape_.window + 1;
            const std::int64_t begin = shape_.window > 0 ? std::max<std::int64_t>(seen, 0) : 0;
            const AttentionItem item{
                .table_off = narrow<std::int32_t>(sequence.table_off),
                .kv_head = narrow<std::int32_t>(kv_head),
                .num_heads = narrow<std::int32_t>(std::min(most_heads, shape_.kv_heads - kv_head)),
                .q0 = narrow<std::int32_t>(sequence.first_row),
                .r0 = narrow<std::int32_t>(r0),
                .num_rows = narrow<std::int32_t>(rows),
                .pos0 = narrow<std::int32_t>(sequence.start),
                .first_segment = narrow<std::int32_t>(begin / kSegmentTokens),
                .end_segment = narrow<std::int32_t>(ceil_div(end, kSegmentTokens)),
                .part = -1,
                .part_stride = 0,
                .num_parts = 0,
                .merge = -1,
                .unused = {0, 0, 0}};
            whole_.push_back({item, cost_of(item)});
        }
    }
}

// Walks that cost more than most_cost in pieces, all in the order they are taken in.
void AttentionWork::arrange(std::int64_t most_cost) {
    walks_.clear();
    merges_.clear();
    num_pieces_.clear();
    part_blocks_ = 0;
    for (const Walk& walk : whole_) {
        cut(walk, most_cost);
    }
    // Large ones first, so that small ones fill the end. Among walks of one magnitude the order stays:
    // neighbours then read the same keys while these are in the cache.
    std::stable_sort(walks_.begin(), walks_.end(), [](const Walk& a, const Walk& b) {
        return std::bit_width(static_cast<std::uint64_t>(a.cost)) >
               std::bit_width(static_cast<std::uint64_t>(b.cost));
    });
    items_.clear();
    costs_.clear();
    for (const Walk& walk : walks_) {
        items_.push_back(walk.item);
        costs_.push_back(walk.cost);
    }
    for (AttentionItem& item : items_) {
        item.merge += item.merge < 0 ? 0 : static_cast<std::int32_t>(walks_.size());
    }
    items_.insert(items_.end(), merges_.begin(), merges_.end());
    if (part_blocks_ * kPartUnit > std::ssize(parts_)) {
        parts_ = std::vector<float>();  // nothing to keep: no copy, and no more than is needed
        parts_.resize(at(part_blocks_ * kPartUnit));
    }
    if (remaining_.size() < merges_.size()) {
        remaining_ = std::vector<std::atomic<int>>(merges_.size());
    }
    for (std::size_t i = 0; i < merges_.size(); ++i) {
        remaining_[i].store(num_pieces_[i], std::memory_order_relaxed);
    }
}

void AttentionWork::cut(const Walk& walk, std::int64_t most_cost) {
    const std::int64_t wanted = walk.cost <= most_cost ? 1 : ceil_div(walk.cost, most_cost);
    const std::int64_t num_segments = walk.item.end_segment - walk.item.first_segment;
    const std::int64_t pieces = std::min(wanted, num_segments);
    // Segments first: the heads of a page lie side by side.
    const std::int64_t shares = std::min<std::int64_t>(ceil_div(wanted, pieces), walk.item.num_heads);
    for (std::int64_t i = 0; i < shares; ++i) {
        AttentionItem item = walk.item;
        const std::int64_t begin = walk.item.num_heads * i / shares;
        item.kv_head += static_cast<std::int32_t>(begin);
        item.num_heads = static_cast<std::int32_t>(walk.item.num_heads * (i + 1) / shares - begin);
        cut_segments(item, pieces);
    }
}

void AttentionWork::cut_segments(AttentionItem item, std::int64_t num_pieces) {
    if (num_pieces == 1) {
        walks_.push_back({item, cost_of(item)});
        return;
    }
    const AttentionTiling& tiling = is_small(item) ? shape_.small : shape_.large;
    const std::int64_t rows = std::int64_t{item.num_rows} * item.num_heads;
    const std::int64_t stride =
        2 * ceil_div(tiling.rows * tiling.tiles, kPartUnit) + ceil_div(rows * shape_.head_dim, kPartUnit);
    const std::int64_t first = item.first_segment;
    const std::int64_t num_segments = item.end_segment - first;
    item.part = narrow<std::int32_t>(part_blocks_);
    item.part_stride = narrow<std::int32_t>(stride);
    part_blocks_ += num_segments * stride;
    AttentionItem merge = item;
    merge.end_segment = merge.first_segment;
    merge.num_parts = narrow<std::int32_t>(num_segments);
    item.merge = narrow<std::int32_t>(std::ssize(merges_));
    merges_.push_back(merge);
    num_pieces_.push_back(static_cast<int>(num_pieces));
    for (std::int64_t i = 0; i < num_pieces; ++i) {
        AttentionItem piece = item;
        const std::int64_t begin = num_segments * i / num_pieces;
        piece.first_segment = narrow<std::int32_t>(first + begin);
        piece.end_segment = narrow<std::int32_t>(first + num_segments * (i + 1) / num_pieces);
        piece.part = narrow<std::int32_t>(item.part + begin * stride);
        walks_.push_back({piece, cost_of(piece)});
    }
}

double AttentionWork::imbalance(int num_threads) const {
    const double mean = static_cast<double>(cost_) / num_threads;
    std::vector<std::int64_t> busy(at(num_threads), 0);  // a heap, the first to be free on top
    for (const std::int64_t cost : costs_) {
        std::pop_heap(busy.begin(), busy.end(), std::greater<>());
        busy.back() += cost;
        std::push_heap(busy.begin(), busy.end(), std::greater<>());
    }
    return static_cast<double>(*std::max_element(busy.begin(), busy.end())) / mean;
}

void AttentionWork::drain(Kernel small, Kernel large, std::span<void* const> args,
                          std::atomic<std::int64_t>& next) {
    KernelCall call(args);
    // Relaxed: the counter only hands out numbers; the items were published by the barrier before.
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < num_taken();
         i = next.fetch_add(1, std::memory_order_relaxed)) {
        const AttentionItem& item = items_[at(i)];
        const Kernel kernel = is_small(item) ? small : large;
        call(kernel, i, i + 1);
        if (item.merge < 0) {
            continue;
        }
        const std::size_t merge = at(item.merge - num_taken());
        // Release what this piece left in parts, acquire what the others did.
        if (remaining_[merge].fetch_sub(1, std::memory_order_acq_rel) == 1) {
            remaining_[merge].store(num_pieces_[merge], std::memory_order_relaxed);  // for the next layer
            call(kernel, item.merge, item.merge + 1);
        }
    }
}

}  // namespace nanoserve
