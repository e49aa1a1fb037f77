// Paged attention for a ragged batch, as data: a flat block table, and a list of items that threads take one
// by one.
//
// The queries of a sequence that share a KV head are flattened to rows r = token * group + g, so that one
// item (a few rows of one KV head of one sequence) uses each key and value it loads for all of them. Decode
// rows and prefill chunks differ only in how many rows they have. A row's result depends on nothing but its
// own sequence.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "kernel_call.h"

namespace nanoserve {

// What kernels read; eight int32. Row r of the item is flattened row r0 + r = token * group + g of its
// sequence: batch row q0 + token, position pos0 + token, query head kv_head * group + g.
struct AttentionItem {
    std::int32_t table_off;  // where the sequence's pages start in the flat table
    std::int32_t kv_head;
    std::int32_t q0;
    std::int32_t r0;
    std::int32_t num_rows;
    std::int32_t pos0;
    std::int32_t unused[2];
};
static_assert(sizeof(AttentionItem) == 8 * sizeof(std::int32_t));

// Kernels walk keys in blocks of this many tokens and look one block ahead.
inline constexpr std::int64_t kBlockTokens = 64;

// One sequence of the batch: its rows are [first_row, first_row + count), its positions [start, start +
// count).
struct SequenceSpan {
    std::int64_t first_row;
    std::int64_t start;
    std::int64_t count;
    std::int64_t table_off;
};

struct AttentionShape {
    std::int64_t group;  // query heads per KV head
    std::int64_t kv_heads;
    std::int64_t head_dim;
    std::int64_t small_rows;  // the most rows the small kernel takes
    std::int64_t large_rows;
    std::int64_t window = 0;  // keys a row sees, its own included; 0 for all of them

    // max_tokens: the most rows of one batch; flattened rows must fit in the items' int32.
    void validate(std::int64_t max_tokens) const;
    bool operator==(const AttentionShape&) const = default;
};

// Appends the sequence's pages, padded with the page of its last token to (num_blocks + 1) * kBlockTokens
// tokens so that reading ahead stays inside the table and the pool. Returns where they start.
[[nodiscard]] std::int64_t append_block_table(std::vector<std::int32_t>& table,
                                              std::span<const std::int32_t> pages, std::int64_t num_tokens,
                                              std::int64_t page_size);

class AttentionWork {
  public:
    explicit AttentionWork(const AttentionShape& shape) : shape_(shape) {}

    // Items for the large kernel first, longest contexts first: the last items to finish are then the short
    // ones.
    void build(std::span<const SequenceSpan> sequences);

    [[nodiscard]] const AttentionShape& shape() const { return shape_; }
    [[nodiscard]] std::span<const AttentionItem> items() const { return items_; }
    [[nodiscard]] std::int64_t num_large() const { return num_large_; }
    [[nodiscard]] std::int64_t cost() const { return cost_; }  // multiply-adds, estimated

    // One thread's part: takes items from `next` (zero when the first thread starts) until none are left.
    void drain(Kernel small, Kernel large, std::span<void* const> args,
               std::atomic<std::int64_t>& next) const;
    // The whole list on the calling thread.
    void run_alone(Kernel small, Kernel large, std::span<void* const> args) const;

  private:
    void add_sequence(const SequenceSpan& sequence);

    AttentionShape shape_;
    std::vector<AttentionItem> items_;
    std::vector<AttentionItem> small_items_;  // kept between steps for its memory
    std::vector<SequenceSpan> order_;
    std::int64_t num_large_ = 0;
    std::int64_t cost_ = 0;
};

}  // namespace nanoserve
