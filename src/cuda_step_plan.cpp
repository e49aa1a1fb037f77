// The half of CudaStep that is called before the first step: memory of the plan's own, and the plan itself.
#include <stdexcept>
#include <utility>

#include "cuda_step.h"

namespace nanoserve::cuda {

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

std::int64_t CudaStep::weight_bytes() const {
    std::int64_t total = 0;
    for (const DeviceBlock& weight : weights_) {
        total += weight.num_bytes();
    }
    return total;
}

void CudaStep::check_args(std::span<const Arg> args) const {
    constexpr Sizes kOne{.rows = 1, .samples = 1, .decodes = 1, .chunks = 1, .pieces = 1};
    for (const Arg& arg : args) {
        static_cast<void>(value_of(arg, kOne));
    }
}

void CudaStep::append(Work work) {
    graphs_.clear();  // of the plan before
    plan_.push_back(std::move(work));
}

void CudaStep::op(Op op) {
    validate(op);
    check_args(op.args);
    make_maps(op);
    append(std::move(op));
}

const Blas& CudaStep::load_blas(std::span<const std::string> paths) {
    if (blas_ == nullptr) {
        blas_ = std::make_unique<Blas>(stream_, paths);
    }
    return *blas_;
}

void CudaStep::product(Product product) {
    validate(product);
    if (blas_ == nullptr) {
        throw std::invalid_argument(product.name + ": cuBLAS is not loaded");
    }
    check_args(std::array{product.x, product.w, product.y, product.rows});
    append(std::move(product));
}

const DeviceBlock& CudaStep::block_of(const Arg& arg) const {
    if (arg.source != Source::buffer && arg.source != Source::weight) {
        throw std::invalid_argument("memory of the plan's own, a buffer or a weight, is needed");
    }
    const bool is_buffer = arg.source == Source::buffer;
    const std::vector<DeviceBlock>& blocks = is_buffer ? buffers_ : weights_;
    require_range(is_buffer ? "buffer" : "weight", arg.index, 0, std::ssize(blocks) - 1);
    return blocks[at(arg.index)];
}

// Where buffers and weights are, and how large, does not change from here on. A step may have fewer rows than
// a buffer: a kernel computes with what lies behind them, and stores nothing of that.
void CudaStep::make_maps(Op& op) const {
    for (Variant& variant : op.variants) {
        for (const TensorForm& form : variant.kernel->tensors()) {
            const DeviceBlock& block = block_of(op.args[form.argument]);
            variant.maps.emplace_back(form, block.data(), block.num_bytes(), op.name);
        }
    }
}

}  // namespace nanoserve::cuda
