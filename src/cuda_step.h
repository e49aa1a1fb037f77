// Runs a plan on a device: the whole forward pass as launches on one stream, or as one graph.
//
// A plan is a list of kernels, where their arguments come from, and how their grids follow from the step's
// sizes; it names no batch. What differs from step to step is written to one block of device memory in one
// copy: token ids, positions, slots, page tables, and the work of attention. So a step of nothing but
// decoding rows is captured once per bucket of rows (and of their segments) and then launched whole;
// rows up to the bucket are padding that writes no keys, and whose logits nobody reads.
//
// A step may be started while the one before it runs: rows whose ids the host does not know yet take them
// from the tokens that step chooses, on the device. Everything is in one stream, so a step sees the pages as
// all steps before it have left them, and pages that were given back in the meantime are written by the old
// step before any new one.
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

#include "checked.h"
#include "cuda_inputs.h"
#include "cuda_pages.h"

namespace nanoserve::cuda {

class CudaStep {
  public:
    // The pool's pages must be DevicePages. buckets: rows of the graphs, ascending; none: launches only.
    // start_early: kernels that can are launched before those in front of them have ended, where the device
    // can do that.
    CudaStep(std::shared_ptr<KVCachePool> pool, const Limits& limits, std::vector<std::int64_t> buckets,
             bool start_early = true);
    ~CudaStep();
    CudaStep(const CudaStep&) = delete;
    CudaStep& operator=(const CudaStep&) = delete;

    // The plan. Both return ids.
    std::int64_t buffer(std::int64_t num_bytes);           // activations, zeroed
    std::int64_t weight(std::span<const std::byte> data);  // copied to the device
    std::int64_t reserve_weight(std::int64_t num_bytes);   // to be filled piece by piece
    void fill_weight(std::int64_t id, std::int64_t offset, std::span<const std::byte> data);
    void op(Op op);
    // Products need cuBLAS: the first of `paths` that can be loaded.
    const Blas& load_blas(std::span<const std::string> paths);
    void product(Product product);

    // One step: prepare under Python's lock, start without it; another one in between is refused, and so is
    // one more than kMaxInFlight that are not finished. Steps end in order.
    void prepare(const StepInputs& inputs, const Choices& choices = {});
    std::int64_t start();  // its number
    // Waits for the oldest step in flight. tokens: one per sample, -1 where a logit is not finite.
    [[nodiscard]] std::span<const std::int32_t> finish(std::int64_t number);
    // Samples' rows of logits, logits_stride apart, and of block maxima, num_blocks each: of the step that
    // was started last.
    void read_logits(std::int64_t number, std::span<const std::int32_t> samples, float* logits,
                     float* block_max);
    [[nodiscard]] std::int64_t num_samples(std::int64_t number) const;

    [[nodiscard]] const Limits& limits() const { return limits_; }
    [[nodiscard]] const std::shared_ptr<const Device>& device() const { return stream_->device(); }
    // What a step takes of a device beside its plan's buffers and weights: its inputs and logits.
    [[nodiscard]] static std::int64_t own_bytes(const Limits& limits, std::int64_t page_size);
    [[nodiscard]] std::int64_t weight_bytes() const;
    struct Counts {
        std::int64_t steps, graph_launches, kernel_launches, early_launches, products, graphs;
    };
    [[nodiscard]] const Counts& counts() const { return counts_; }

  private:
    using GraphKey = std::pair<std::int64_t, std::int64_t>;  // rows, pieces

    // A step that was started.
    struct Flight {
        explicit Flight(const std::shared_ptr<const Device>& device, std::int64_t num_bytes)
            : tokens(device, "a step's tokens", num_bytes), done(device) {}
        PinnedBlock tokens;
        Event done;
        Staged staged{};
    };

    [[nodiscard]] static std::size_t turn_of(std::int64_t number) { return at(number) % kMaxInFlight; }
    [[nodiscard]] std::int64_t value_of(const Arg& arg, const Sizes& sizes) const;
    [[nodiscard]] const DeviceBlock& block_of(const Arg& arg) const;
    void make_maps(Op& op) const;
    void check_args(std::span<const Arg> args) const;
    void append(Work work);
    void run(const Op& op, const Sizes& sizes);
    void run(const Product& product, const Sizes& sizes);
    void warm_products(const Sizes& sizes);
    void launch_all(const Sizes& sizes);
    void launch_graph(const GraphKey& key);

    const std::shared_ptr<KVCachePool> pool_;
    DevicePages& pages_;
    const std::shared_ptr<Stream> stream_;
    const Limits limits_;
    const bool start_early_;
    bool behind_kernel_ = false;  // what was launched last is a kernel of this step
    std::atomic<bool> busy_{false};

    std::vector<DeviceBlock> buffers_, weights_;
    std::vector<Work> plan_;
    std::unique_ptr<Blas> blas_;  // if products need it
    Inputs inputs_;
    DeviceBlock logits_, block_max_, tokens_;
    std::array<Flight, kMaxInFlight> flights_;  // step n is at n % kMaxInFlight
    std::int64_t started_ = 0, finished_ = 0;   // steps
    std::map<GraphKey, Graph> graphs_;

    StepBatch batch_;
    Counts counts_{};
};

}  // namespace nanoserve::cuda
