#include "attention_work.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "checked.h"

namespace nanoserve {

void AttentionShape::validate(std::int64_t max_tokens) const {
    require_at_least("group", group, 1);
    require_at_least("kv_heads", kv_heads, 1);
    require_at_least("head_dim", head_dim, 1);
    require_at_least("small_rows", small_rows, 1);
    require_at_least("large_rows", large_rows, 1);
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

void AttentionWork::build(std::span<const SequenceSpan> sequences) {
    items_.clear();
    small_items_.clear();
    cost_ = 0;
    order_.assign(sequences.begin(), sequences.end());
    std::stable_sort(order_.begin(), order_.end(), [](const SequenceSpan& a, const SequenceSpan& b) {
        return a.start + a.count > b.start + b.count;
    });
    for (const SequenceSpan& sequence : order_) {
        add_sequence(sequence);
    }
    num_large_ = std::ssize(items_);
    items_.insert(items_.end(), small_items_.begin(), small_items_.end());
}

void AttentionWork::add_sequence(const SequenceSpan& sequence) {
    const std::int64_t num_rows = sequence.count * shape_.group;
    const std::int64_t tile = num_rows <= shape_.small_rows ? shape_.small_rows : shape_.large_rows;
    const std::int64_t num_tiles = ceil_div(num_rows, tile);
    for (std::int64_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
        for (std::int64_t t = num_tiles - 1; t >= 0; --t) {  // causal: the last tile sees the most keys
            const std::int64_t r0 = t * tile;
            const std::int64_t rows = std::min(tile, num_rows - r0);
            const AttentionItem item{.table_off = narrow<std::int32_t>(sequence.table_off),
                                     .kv_head = narrow<std::int32_t>(kv_head),
                                     .q0 = narrow<std::int32_t>(sequence.first_row),
                                     .r0 = narrow<std::int32_t>(r0),
                                     .num_rows = narrow<std::int32_t>(rows),
                                     .pos0 = narrow<std::int32_t>(sequence.start),
                                     .unused = {0, 0}};
            (rows <= shape_.small_rows ? small_items_ : items_).push_back(item);
            const std::int64_t context = sequence.start + (r0 + rows - 1) / shape_.group + 1;
            const std::int64_t num_keys =
                shape_.window > 0 ? std::min(context, shape_.window + rows) : context;
            cost_ += rows * num_keys * shape_.head_dim * 2;
        }
    }
}

void AttentionWork::drain(Kernel small, Kernel large, std::span<void* const> args,
                          std::atomic<std::int64_t>& next) const {
    KernelCall call(args);
    const std::int64_t num_items = std::ssize(items_);
    // Relaxed: the counter only hands out numbers; the items were published by the barrier before.
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < num_items;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
        call(i < num_large_ ? large : small, i, i + 1);
    }
}

void AttentionWork::run_alone(Kernel small, Kernel large, std::span<void* const> args) const {
    KernelCall call(args);
    call(large, 0, num_large_);
    call(small, num_large_, std::ssize(items_));
}

}  // namespace nanoserve
