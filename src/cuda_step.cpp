#include "cuda_step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "checked.h"

namespace nanoserve::cuda {

namespace {

DevicePages& device_pages(KVCachePool& pool) {
    auto* const pages = dynamic_cast<DevicePages*>(&pool.memory());
    if (pages == nullptr) {
        throw std::invalid_argument("this step needs a pool whose pages are on a device");
    }
    return *pages;
}

std::int64_t row_bytes(const Limits& limits, std::int64_t floats) {
    return checked_product(
        "the logits in bytes",
        {{"max_samples", limits.max_samples}, {"floats", floats}, {"bytes", sizeof(float)}});
}

}  // namespace

CudaStep::CudaStep(std::shared_ptr<KVCachePool> pool, const Limits& limits, std::vector<std::int64_t> buckets)
    : pool_(std::move(pool)),
      pages_(device_pages(*pool_)),
      stream_(pages_.stream()),
      limits_(limits),
      inputs_(device(), limits, pool_->shape().page_size, std::move(buckets)),
      logits_(device(), "the logits", row_bytes(limits_, limits_.logits_stride)),
      block_max_(device(), "the logits' maxima", row_bytes(limits_, limits_.num_blocks)),
      logits_out_(device(), "the logits", logits_.num_bytes()),
      block_max_out_(device(), "the logits' maxima", block_max_.num_bytes()),
      batch_({.max_tokens = limits.max_tokens, .max_positions = limits.max_positions}) {}

CudaStep::~CudaStep() {
    // Nothing that the device may still read or write goes before it is done.
    try {
        device()->use();
        stream_->synchronize();
    } catch (const std::exception&) {  // the context is spoiled: nothing runs any more
    }
}

std::int64_t CudaStep::buffer(std::int64_t num_bytes) {
    device()->use();
    const DeviceBlock& made = buffers_.emplace_back(device(), "activations", num_bytes);
    stream_->zero(made.data(), num_bytes);
    return std::ssize(buffers_) - 1;
}

std::int64_t CudaStep::reserve_weight(std::int64_t num_bytes) {
    weights_.emplace_back(device(), "a weight", num_bytes);
    return std::ssize(weights_) - 1;
}

void CudaStep::fill_weight(std::int64_t id, std::int64_t offset, std::span<const std::byte> data) {
    require_range("weight", id, 0, std::ssize(weights_) - 1);
    const DeviceBlock& weight = weights_[at(id)];
    require_range("offset", offset, 0, weight.num_bytes() - std::ssize(data));
    device()->use();
    stream_->copy_in(weight.data() + static_cast<DevicePtr>(offset), data.data(), std::ssize(data));
    stream_->synchronize();  // the caller's memory may go
}

std::int64_t CudaStep::weight(std::span<const std::byte> data) {
    const std::int64_t id = reserve_weight(std::ssize(data));
    fill_weight(id, 0, data);
    return id;
}

std::int64_t CudaStep::own_bytes(const Limits& limits, std::int64_t page_size) {
    return InputLayout(limits, page_size).num_bytes() + row_bytes(limits, limits.logits_stride) +
           row_bytes(limits, limits.num_blocks);
}

std::int64_t CudaStep::weight_bytes() const {
    std::int64_t total = 0;
    for (const DeviceBlock& weight : weights_) {
        total += weight.num_bytes();
    }
    return total;
}

void CudaStep::op(Op op) {
    validate(op);
    constexpr Sizes kOne{.rows = 1, .samples = 1, .decodes = 1, .chunks = 1, .segments = 1};
    for (const Arg& arg : op.args) {
        static_cast<void>(value_of(arg, kOne));
    }
    graphs_.clear();  // of the plan before
    ops_.push_back(std::move(op));
}

std::int64_t CudaStep::value_of(const Arg& arg, const Sizes& sizes) const {
    const auto block = [&](const char* what, const std::vector<DeviceBlock>& blocks) {
        require_range(what, arg.index, 0, std::ssize(blocks) - 1);
        return static_cast<std::int64_t>(blocks[at(arg.index)].data());
    };
    switch (arg.source) {
        case Source::buffer:
            return block("buffer", buffers_);
        case Source::weight:
            return block("weight", weights_);
        case Source::k:
            return static_cast<std::int64_t>(pages_.keys(arg.index));
        case Source::v:
            return static_cast<std::int64_t>(pages_.values(arg.index));
        case Source::ids:
        case Source::positions:
        case Source::slots:
        case Source::table:
        case Source::decodes:
        case Source::chunks:
        case Source::sample_rows:
            return static_cast<std::int64_t>(inputs_.address(arg.source));
        case Source::logits:
            return static_cast<std::int64_t>(logits_.data());
        case Source::block_max:
            return static_cast<std::int64_t>(block_max_.data());
        case Source::num_rows:
            return sizes.rows;
        case Source::num_samples:
            return sizes.samples;
        case Source::num_decodes:
            return sizes.decodes;
        case Source::num_chunks:
            return sizes.chunks;
        case Source::num_segments:
            return sizes.segments;
        case Source::number:
            return arg.index;
    }
    throw std::invalid_argument("unknown argument source");
}

void CudaStep::prepare(const StepInputs& inputs) {
    if (busy_.exchange(true)) {
        throw std::runtime_error("this executor is running a step: wait for it to finish");
    }
    try {
        require_range("sequences of a step", std::ssize(inputs.tables), 0, limits_.max_sequences);
        require_range("samples of a step", std::ssize(inputs.sample_rows), 0, limits_.max_samples);
        batch_.prepare(*pool_, inputs);
        inputs_.stage(batch_);
    } catch (...) {
        busy_.store(false);
        throw;
    }
}

void CudaStep::launch_all(const Sizes& sizes) {
    std::array<std::int64_t, kMaxArgs> values;
    std::array<void*, kMaxArgs> args;
    for (const Op& op : ops_) {
        const std::int64_t over = value_of(op.over, sizes);
        const Variant& variant = *std::find_if(op.variants.begin(), op.variants.end() - 1,
                                               [&](const Variant& each) { return over <= each.most; });
        std::array<unsigned, 3> grid{};
        for (std::size_t axis = 0; axis < 3; ++axis) {
            const Extent& extent = variant.grid[axis];
            grid[axis] =
                narrow<unsigned>(extent.times * ceil_div(value_of(extent.scalar, sizes), extent.per));
        }
        for (std::size_t i = 0; i < op.args.size(); ++i) {
            values[i] = value_of(op.args[i], sizes);
            args[i] = &values[i];
        }
        stream_->launch(variant.kernel->function(), op.name.c_str(), variant.kernel->shape(grid),
                        std::span<void* const>(args.data(), op.args.size()));
        ++counts_.kernel_launches;
    }
}

void CudaStep::launch_graph(const GraphKey& key) {
    auto found = graphs_.find(key);
    if (found == graphs_.end()) {
        stream_->begin_capture();
        try {
            const auto [rows, segments] = key;
            launch_all({.rows = rows, .samples = rows, .decodes = rows, .chunks = 0, .segments = segments});
        } catch (...) {
            stream_->abandon_capture();
            throw;
        }
        found = graphs_.emplace(key, stream_->end_capture()).first;
        ++counts_.graphs;
    }
    stream_->launch(found->second);
    ++counts_.graph_launches;
}

void CudaStep::run(float* logits, float* block_max) {
    struct Done {
        std::atomic<bool>& busy;
        ~Done() { busy.store(false); }
    } const done{busy_};
    device()->use();
    inputs_.copy(*stream_);
    const Sizes& sizes = inputs_.sizes();
    if (inputs_.bucket() > 0) {
        launch_graph({inputs_.bucket(), sizes.segments});
    } else {
        launch_all(sizes);
    }
    ++counts_.steps;
    const auto floats = [](std::int64_t count) { return count * static_cast<std::int64_t>(sizeof(float)); };
    const std::int64_t samples = sizes.samples;
    stream_->copy_out(logits_out_.data(), logits_.data(), floats(samples * limits_.logits_stride));
    stream_->copy_out(block_max_out_.data(), block_max_.data(), floats(samples * limits_.num_blocks));
    stream_->synchronize();
    std::memcpy(logits, logits_out_.data(), at(floats(samples * limits_.logits_stride)));
    std::memcpy(block_max, block_max_out_.data(), at(floats(samples * limits_.num_blocks)));
}

}  // namespace nanoserve::cuda
