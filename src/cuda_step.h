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

#include "cuda_inputs.h"
#include "cuda_pages.h"

namespace nanoserve::cuda {

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

    [[nodiscard]] const Limits& limits() const { return limits_; }
    [[nodiscard]] const std::shared_ptr<const Device>& device() const { return stream_->device(); }
    // What a step takes of a device beside its plan's buffers and weights: its inputs and logits.
    [[nodiscard]] static std::int64_t own_bytes(const Limits& limits, std::int64_t page_size);
    [[nodiscard]] std::int64_t weight_bytes() const;
    struct Counts {
        std::int64_t steps, graph_launches, kernel_launches, graphs;
    };
    [[nodiscard]] const Counts& counts() const { return counts_; }

  private:
    using GraphKey = std::pair<std::int64_t, std::int64_t>;  // rows, segments

    [[nodiscard]] std::int64_t value_of(const Arg& arg, const Sizes& sizes) const;
    void launch_all(const Sizes& sizes);
    void launch_graph(const GraphKey& key);

    const std::shared_ptr<KVCachePool> pool_;
    DevicePages& pages_;
    const std::shared_ptr<Stream> stream_;
    const Limits limits_;
    std::atomic<bool> busy_{false};

    std::vector<DeviceBlock> buffers_, weights_;
    std::vector<Op> ops_;
    Inputs inputs_;
    DeviceBlock logits_, block_max_;
    PinnedBlock logits_out_, block_max_out_;
    std::map<GraphKey, Graph> graphs_;

    StepBatch batch_;
    Counts counts_{};
};

}  // namespace nanoserve::cuda
