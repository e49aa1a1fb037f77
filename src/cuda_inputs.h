// What differs from step to step, in one block of device memory that is filled in one copy: token ids,
// positions, slots, page tables, and the work of attention. Its addresses never change, so a graph can read
// it.
#pragma once

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

struct Limits {
    std::int64_t max_tokens;     // rows of a step
    std::int64_t max_positions;  // rows of the model's position tables
    std::int64_t max_sequences;  // of a step
    std::int64_t max_samples;    // rows whose logits are wanted
    std::int64_t chunk_rows;     // most rows of an AttentionSpan
    std::int64_t segment;        // tokens of a sequence that one program reads
    std::int64_t vocab;
    std::int64_t logits_stride, num_blocks;  // floats per sample
};

// The numbers of a step that grids and kernels depend on.
struct Sizes {
    std::int64_t rows, samples, decodes, chunks, segments;
};

// Where the arrays lie in the block, one behind the other, the table last: it alone has a length worth not
// copying.
class InputLayout {
  public:
    InputLayout(const Limits& limits, std::int64_t page_size);
    [[nodiscard]] std::int64_t num_bytes() const { return num_bytes_; }

  protected:
    const std::int64_t positions_, slots_, sample_rows_, decodes_, chunks_, max_chunks_, table_, max_table_,
        num_bytes_;
};

class Inputs : private InputLayout {
  public:
    // buckets: rows of the graphs, ascending.
    Inputs(const std::shared_ptr<const Device>& device, const Limits& limits, std::int64_t page_size,
           std::vector<std::int64_t> buckets);

    // Everything of a step into the block, padded to its bucket if it has one: padding writes no keys, and
    // its logits are nobody's.
    void stage(const StepBatch& batch);
    void copy(Stream& stream) const;

    [[nodiscard]] const Sizes& sizes() const { return sizes_; }
    // Of the graph that this step can be run by; 0: none.
    [[nodiscard]] std::int64_t bucket() const { return bucket_; }
    // Where an array lies on the device.
    [[nodiscard]] DevicePtr address(Source array) const;

  private:
    [[nodiscard]] std::int64_t bucket_of(const Sizes& sizes) const;
    void put(std::int64_t offset, std::span<const std::int32_t> values, std::int64_t count,
             std::int32_t padding);

    template <typename T>
    [[nodiscard]] std::span<T> at_offset(std::int64_t offset, std::size_t count) const {
        return {reinterpret_cast<T*>(host_.data() + offset), count};
    }

    const Limits limits_;
    const std::vector<std::int64_t> buckets_;
    const PinnedBlock host_;
    const DeviceBlock block_;
    Sizes sizes_{};
    std::int64_t bucket_ = 0;
    std::int64_t used_ = 0;  // bytes of this step
};

}  // namespace nanoserve::cuda
