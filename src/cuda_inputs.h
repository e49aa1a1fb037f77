// What differs from step to step, in one block of device memory that is filled in one copy: token ids,
// positions, slots, page tables, the work of attention, and how tokens are chosen. Its addresses never
// change, so a graph can read it. On the host it is written into one of two blocks by turns: a step may be
// staged while the one before it has not been copied yet.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cuda_plan.h"
#include "step_batch.h"

namespace nanoserve::cuda {

// Rows that attend together: consecutive positions of one sequence. Kernels read it as four int32.
struct AttentionSpan {
    std::int32_t first_row;  // of the step
    std::int32_t count;      // rows; 0 is padding
    std::int32_t start;      // position of the first
    std::int32_t table_off;  // where the sequence's pages begin in the flat table
};

// One segment of the keys that a sequence's only row attends to. Four int32.
struct Piece {
    std::int32_t row = 0;        // of the step
    std::int32_t segment = -1;   // -1 is padding
    std::int32_t position = 0;   // of the row
    std::int32_t table_off = 0;  // as AttentionSpan's
};

// That row, whose pieces lie one behind the other. Three int32.
struct Decode {
    std::int32_t row = 0;
    std::int32_t keys = 0;  // it attends to; 0 is padding
    std::int32_t first_piece = 0;
};

struct Limits {
    std::int64_t max_tokens;     // rows of a step
    std::int64_t max_positions;  // rows of the model's position tables
    std::int64_t max_sequences;  // of a step
    std::int64_t max_pieces;   // of all sequences of one row; the shortest, for whom none are left, are spans
    std::int64_t max_samples;  // rows whose logits are wanted
    std::int64_t chunk_rows;   // most rows of an AttentionSpan
    std::int64_t segment;      // tokens of a sequence that one program reads
    std::int64_t vocab;
    std::int64_t logits_stride, num_blocks;  // floats per sample
};

// The numbers of a step that grids and kernels depend on.
struct Sizes {
    std::int64_t rows, samples, decodes, chunks, pieces;
};

// How the samples' tokens are chosen, and which rows wait for the tokens of the step before.
struct Choices {
    std::span<const float> draws = {};             // kDrawFields per sample; empty: the largest logit
    std::span<const std::int32_t> draw_ints = {};  // as many
    std::span<const std::int32_t> sources = {};    // per row; empty: every row has its id
};
inline constexpr std::int64_t kDrawFields = 4;
inline constexpr std::size_t kMaxInFlight = 2;

// A step that is written down on the host.
struct Staged {
    Sizes sizes;
    std::int64_t bucket;  // rows of the graph it can be run by; 0: none
    std::int64_t used;    // bytes
};

// Where the arrays lie in the block, one behind the other, the table last: it can have megabytes, which are
// not copied for nothing; the others' some hundred KiB are.
class InputLayout {
  public:
    InputLayout(const Limits& limits, std::int64_t page_size);
    [[nodiscard]] std::int64_t num_bytes() const { return num_bytes_; }

  protected:
    const std::int64_t positions_, slots_, sources_, sample_rows_, draws_, draw_ints_, decodes_, pieces_,
        chunks_, max_chunks_, table_, max_table_, num_bytes_;
};

class Inputs : private InputLayout {
  public:
    // buckets: rows of the graphs, ascending.
    Inputs(const std::shared_ptr<const Device>& device, const Limits& limits, std::int64_t page_size,
           std::vector<std::int64_t> buckets);

    // Everything of a step into host block `turn`, padded to its bucket if it has one: padding writes no
    // keys, and its logits are nobody's. What was staged there before must have been copied.
    [[nodiscard]] Staged stage(const StepBatch& batch, const Choices& choices, std::size_t turn);
    void copy(Stream& stream, const Staged& staged, std::size_t turn) const;

    // Where an array lies on the device.
    [[nodiscard]] DevicePtr address(Source array) const;

  private:
    [[nodiscard]] std::int64_t segments_of(const SequenceSpan& sequence) const;
    // Of each sequence, whether it is of one row and has room among the pieces.
    [[nodiscard]] std::vector<bool> choose_pieces(const StepBatch& batch) const;
    // Writes down what attends, and counts it in `sizes`.
    void stage_attention(const StepBatch& batch, Sizes& sizes);
    // Rows of the graph for a step of those sizes, 0 if there is none; fills what attends up to it.
    [[nodiscard]] std::int64_t pad_attention(Sizes& sizes);

    // Arrays of the host block that is being staged.
    template <typename T>
    void put(std::int64_t offset, std::span<const T> values, std::int64_t count, T padding) {
        const std::size_t size = std::max(static_cast<std::size_t>(count), values.size());
        const auto to = at_offset<T>(offset, size);
        std::fill(std::copy(values.begin(), values.end(), to.begin()), to.end(), padding);
    }
    template <typename T>
    [[nodiscard]] std::span<T> at_offset(std::int64_t offset, std::size_t count) const {
        return {reinterpret_cast<T*>(hosts_[turn_].data() + offset), count};
    }

    const Limits limits_;
    const std::vector<std::int64_t> buckets_;
    const std::array<PinnedBlock, kMaxInFlight> hosts_;
    const DeviceBlock block_;
    std::size_t turn_ = 0;
};

}  // namespace nanoserve::cuda
