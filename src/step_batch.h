// One step's batch, checked and flattened into the arrays kernels read.
//
// Everything is copied out of the caller's arrays and page tables here, under Python's lock: while the step
// runs without that lock, nobody can change what was checked. Invariant after prepare(): every id is in the
// vocabulary, every position has a page, and every page that is about to be written has exactly one holder.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "attention_work.h"
#include "page_table.h"

namespace nanoserve {

struct StepInputs {
    std::span<const std::int32_t> input_ids;    // all sequences' tokens, one after the other
    std::span<const PageTable* const> tables;   // one per sequence
    std::span<const std::int32_t> starts;       // the position of its first token
    std::span<const std::int32_t> counts;       // how many tokens
    std::span<const std::int32_t> sample_rows;  // the rows whose logits are wanted
    std::int64_t vocab = 0;
    // Per sequence, what is added to the positions kernels look up in the model's tables (a model may keep
    // several, one after the other); empty for none. Pages, slots and attention know nothing of it.
    std::span<const std::int32_t> position_offsets = {};
};

struct StepLimits {
    std::int64_t max_tokens;
    std::int64_t max_positions;  // rows of the model's position tables
};

class StepBatch {
  public:
    explicit StepBatch(const StepLimits& limits);

    // Throws before it changes anything that a kernel could see half done.
    void prepare(const KVCachePool& pool, const StepInputs& inputs);

    [[nodiscard]] std::int64_t num_rows() const { return std::ssize(ids_); }
    [[nodiscard]] std::int64_t num_samples() const { return std::ssize(sample_rows_); }
    [[nodiscard]] std::span<const SequenceSpan> sequences() const { return sequences_; }
    [[nodiscard]] std::span<const std::int32_t> ids() const { return ids_; }
    [[nodiscard]] std::span<const std::int32_t> positions() const { return positions_; }
    [[nodiscard]] std::span<const std::int32_t> slots() const { return slots_; }
    [[nodiscard]] std::span<const std::int32_t> table() const { return table_; }
    [[nodiscard]] std::span<const std::int32_t> sample_rows() const { return sample_rows_; }

  private:
    void check_shapes(const StepInputs& inputs) const;
    void check_ids(const StepInputs& inputs) const;
    static void check_tables(const KVCachePool& pool, const StepInputs& inputs);
    void check_sequence(const KVCachePool& pool, const StepInputs& inputs, std::size_t sequence) const;

    StepLimits limits_;
    std::vector<SequenceSpan> sequences_;
    std::vector<std::int32_t> ids_, positions_, slots_, table_, sample_rows_;
};

}  // namespace nanoserve
