// Runs a plan on a device: the whole forward pass as launches on one stream, or as one graph.
//
// A plan is a list of kernels, where their arguments come from, and how their grids follow from the step's
// sizes; it names no batch. What differs from step to step is written to one block of device memory in one
// copy: token ids, positions, slots, page tables, and the work of attention. So a step of nothing but
// decoding rows is captured once per bucket of rows (and of their longest context) and then launched whole;
// rows up to the bucket are padding that writes no keys, and whose logits nobody reads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cuda_kernel.h"
#include "cuda_pages.h"
#include "step_batch.h"

namespace nanoserve::cuda {

enum class Source : std::uint8_t {
    // Pointers.
    buffer,       // activations, by id
    weight,       // by id
    k,            // one layer of the pool's keys, as cuda_pages.h lays them out
    v,            // and values
    ids,          // int32 per row
    positions,    // int32 per row
    slots,        // int32 per row: where its keys and values go, -1 for padding
    table,        // int32, the flat block table
    decodes,      // AttentionSpan per sequence of one row
    chunks,       // AttentionSpan per tile of rows of a longer one
    sample_rows,  // int32 per sample: its row
    logits,       // float32 [samples][stride]
    block_max,    // float32 [samples][blocks]
    // int64.
    num_rows,
    num_samples,
    num_decodes,
    num_chunks,
    num_segments,  // of the longest sequence among the decodes, rounded up to a power of two
    number,        // the index itself
};

[[nodiscard]] Source source_from_name(std::string_view name);

// Rows that attend together: consecutive positions of one sequence. Kernels read it as four int32.
struct AttentionSpan {
    std::int32_t first_row;  // of the step
    std::int32_t count;      // rows; 0 is padding
    std::int32_t start;      // position of the first
    std::int32_t table_off;  // where the sequence's pages begin in the flat table
};

struct Arg {
    Source source;
    std::int64_t index = 0;  // of a buffer or weight, the layer of k and v, or the number
};

// Blocks along one dimension of a grid: times * ceil(scalar / per).
struct Extent {
    Arg scalar{.source = Source::number, .index = 1};
    std::int64_t per = 1;
    std::int64_t times = 1;
};

// A kernel for up to `most` of something; all of an operation give the same bits.
struct Variant {
    std::int64_t most;  // the last one's is not looked at
    std::shared_ptr<const Kernel> kernel;
    std::array<Extent, 3> grid;
};

struct Op {
    std::string name;
    std::vector<Variant> variants;       // by `most`, ascending
    Arg over{.source = Source::number};  // the number that chooses among them
    std::vector<Arg> args;
};

struct Limits {
    std::int64_t max_tokens;     // rows of a step
    std::int64_t max_positions;  // rows of the model's position tables
    std::int64_t max_sequences;  // and samples, of a step
    std::int64_t chunk_rows;     // most rows of an AttentionSpan
    std::int64_t segment;        // tokens of a sequence that one program reads
    std::int64_t vocab;
    std::int64_t logits_stride, num_blocks;  // floats per sample
};

class CudaStep {
  public:
    // The pool's pages must be DevicePages. buckets: rows of the graphs, ascending; none: launches only.
    CudaStep(std::shared_ptr<KVCachePool> pool, const Limits& limits, std::vector<std::int64_t> buckets);
    ~CudaStep();
    CudaStep(const CudaStep&) = delete;
    CudaStep& operator=(const CudaStep&) = delete;

    // The plan. Both return ids.
    std::int64_t buffer(std::int64_t num_bytes);           // activations, zeroed
    std::int64_t weight(std::span<const std::byte> data);  // copied to the device
    std::int64_t reserve_weight(std::int64_t num_bytes);   // to be filled piece by piece
    void fill_weight(std::int64_t id, std::int64_t offset, std::span<const std::byte> data);
    void op(Op op);

    // One step: prepare under Python's lock, run without it. A second one in between is refused.
    void prepare(const StepInputs& inputs);
    // logits: num_samples rows of `vocab` floats, logits_stride apart; block_max: as many of num_blocks.
    void run(float* logits, float* block_max);
    void cancel() { busy_.store(false); }

    [[nodiscard]] const Limits& limits() const { return limits_; }
    [[nodiscard]] const std::shared_ptr<const Device>& device() const { return stream_->device(); }
    [[nodiscard]] std::int64_t num_samples() const { return batch_.num_samples(); }
    [[nodiscard]] std::int64_t weight_bytes() const;
    struct Counts {
        std::int64_t steps, graph_launches, kernel_launches, graphs;
    };
    [[nodiscard]] const Counts& counts() const { return counts_; }
    // For tests and debugging: a copy of a buffer's bytes.
    void read_buffer(std::int64_t id, std::span<std::byte> to) const;

  private:
    struct Inputs;  // where the arrays of a step lie in the block that is copied
    struct Sizes {
        std::int64_t rows, samples, decodes, chunks, segments;
    };
    using GraphKey = std::pair<std::int64_t, std::int64_t>;  // rows, segments

    [[nodiscard]] std::int64_t value_of(const Arg& arg, const Sizes& sizes) const;
    [[nodiscard]] std::int64_t bucket_of(const Sizes& sizes) const;  // 0: none
    void stage();
    void launch_all(const Sizes& sizes);
    void launch_graph(const GraphKey& key);

    const std::shared_ptr<KVCachePool> pool_;
    DevicePages& pages_;
    const std::shared_ptr<Stream> stream_;
    const Limits limits_;
    const std::vector<std::int64_t> buckets_;
    std::atomic<bool> busy_{false};

    std::vector<DeviceBlock> buffers_, weights_;
    std::vector<Op> ops_;
    std::unique_ptr<Inputs> inputs_;
    DeviceBlock logits_, block_max_;
    PinnedBlock logits_out_, block_max_out_;
    std::map<GraphKey, Graph> graphs_;

    StepBatch batch_;
    Sizes sizes_{};
    Counts counts_{};
};

}  // namespace nanoserve::cuda
