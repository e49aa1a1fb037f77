// Paged attention for a ragged batch, as data: a flat block table, and a list of items that threads take one
// by one.
//
// The queries of a sequence that share a KV head are flattened to rows r = token * group + g, so that one
// item uses each key and value it loads for all of its rows. A decode row's item spans several KV heads, a
// prompt chunk's a few dozen rows of one. A row's result depends on nothing but its own sequence: kernels
// merge the results of fixed segments of keys in ascending order, so a long walk may also be cut at their
// borders and shared, whoever finishes last merging.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "kernel_call.h"

namespace nanoserve {

// What kernels read; sixteen int32. Row r of a head is flattened row r0 + r = token * group + g of its
// sequence: batch row q0 + token, position pos0 + token, query head kv_head * group + g.
struct AttentionItem {
    std::int32_t table_off;  // where the sequence's pages start in the flat table
    std::int32_t kv_head;
    std::int32_t num_heads;  // KV heads from kv_head on
    std::int32_t q0;
    std::int32_t r0;
    std::int32_t num_rows;  // of each head
    std::int32_t pos0;
    std::int32_t first_segment;
    std::int32_t end_segment;
    std::int32_t part;         // where its segments' results go, or a merge finds them; -1: it is alone
    std::int32_t part_stride;  // from a segment's results to the next one's; both in 16 floats
    std::int32_t num_parts;    // segments to merge
    std::int32_t merge;        // the item to run when all that share its rows are done; -1 for none
    std::int32_t unused[3];
};
static_assert(sizeof(AttentionItem) == 16 * sizeof(std::int32_t));

// Kernels walk keys in blocks of this many tokens and look one block ahead.
inline constexpr std::int64_t kBlockTokens = 64;
// Tokens whose results are merged as one: kernels/attention.py says why so many.
inline constexpr std::int64_t kSegmentTokens = 256;

// One sequence of the batch: its rows are [first_row, first_row + count), its positions [start, start +
// count).
struct SequenceSpan {
    std::int64_t first_row;
    std::int64_t start;
    std::int64_t count;
    std::int64_t table_off;
};

// A kernel's item: register tiles of `rows`. The small kernel's tiles are KV heads with one token's rows, the
// large one's are rows of one head.
struct AttentionTiling {
    std::int64_t rows;
    std::int64_t tiles;
    bool operator==(const AttentionTiling&) const = default;
};

struct AttentionShape {
    std::int64_t group;  // query heads per KV head
    std::int64_t kv_heads;
    std::int64_t head_dim;
    AttentionTiling small;
    AttentionTiling large;
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

    // Items of about equal cost for at most max_threads, and no more of them than have min_thread_cost each
    // to do. Rows of large cost come first; longer walks than the threads can share evenly are cut.
    void build(std::span<const SequenceSpan> sequences, int max_threads, std::int64_t min_thread_cost = 0);

    [[nodiscard]] const AttentionShape& shape() const { return shape_; }
    // What threads take, and behind these the merges.
    [[nodiscard]] std::span<const AttentionItem> items() const { return items_; }
    [[nodiscard]] std::int64_t num_taken() const { return std::ssize(costs_); }
    [[nodiscard]] float* parts() { return parts_.data(); }
    [[nodiscard]] std::int64_t num_part_floats() const { return std::ssize(parts_); }
    // What parts() never exceeds, whatever is built of at most max_tokens rows, in sequences of at most
    // max_context tokens, for at most max_threads.
    [[nodiscard]] static std::int64_t most_part_floats(const AttentionShape& shape, std::int64_t max_tokens,
                                                       std::int64_t max_context, int max_threads);
    [[nodiscard]] int num_threads() const { return num_threads_; }
    [[nodiscard]] std::int64_t cost() const { return cost_; }  // in multiply-adds, estimated
    // The largest share of the cost over the mean when threads take the items in their order.
    [[nodiscard]] double imbalance(int num_threads) const;

    // One thread's part: takes items from `next` (zero when the first thread starts) until none are left.
    void drain(Kernel small, Kernel large, std::span<void* const> args, std::atomic<std::int64_t>& next);

  private:
    struct Walk {  // an item and what it costs
        AttentionItem item;
        std::int64_t cost;
    };

    void add_sequence(const SequenceSpan& sequence);
    [[nodiscard]] bool is_small(const AttentionItem& item) const;
    [[nodiscard]] std::int64_t cost_of(const AttentionItem& item) const;
    void arrange(std::int64_t most_cost);
    void cut(const Walk& walk, std::int64_t most_cost);
    void cut_segments(AttentionItem item, std::int64_t num_pieces);

    AttentionShape shape_;
    std::vector<SequenceSpan> order_;
    std::vector<Walk> whole_;  // every row's walk in one piece
    std::vector<Walk> walks_;  // the same, some of them cut
    std::vector<AttentionItem> items_, merges_;
    std::vector<std::int64_t> costs_;  // of the items that threads take
    std::vector<int> num_pieces_;      // of each merge
    std::vector<std::atomic<int>> remaining_;
    std::vector<float> parts_;
    std::int64_t part_blocks_ = 0;  // of 16 floats in use
    std::int64_t cost_ = 0;
    int num_threads_ = 1;
};

}  // namespace nanoserve
