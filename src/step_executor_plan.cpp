// The half of StepExecutor that builds a plan: buffers, weights, operations, and where each argument's value
// lives.
#include <stdexcept>

#include "step_executor.h"

namespace nanoserve {

namespace {

constexpr std::int64_t kColumnPadding = 64;
constexpr std::int64_t kSkewBytes = 64;
constexpr std::int64_t kMaxColumns = std::int64_t{1} << 32;

[[noreturn]] void throw_no_such(const char* what, std::int64_t id, std::size_t count) {
    throw std::out_of_range(std::string(what) + " " + std::to_string(id) + " is out of range: there are " +
                            std::to_string(count));
}

}  // namespace

std::int64_t StepExecutor::stride(std::int64_t cols, std::int64_t item_bytes) {
    require_range("cols", cols, 1, kMaxColumns);
    if (item_bytes != 1 && item_bytes != 2 && item_bytes != 4) {
        throw std::invalid_argument("item_bytes is " + std::to_string(item_bytes) + ", must be 1, 2 or 4");
    }
    return round_up(cols, kColumnPadding) + kSkewBytes / item_bytes;
}

std::int64_t StepExecutor::logits_stride(std::int64_t vocab) {
    require_range("vocab", vocab, 1, kMaxColumns);
    return round_up(vocab, kColumnPadding);
}

std::int64_t StepExecutor::buffer(std::int64_t cols, std::int64_t item_bytes) {
    return add_buffer(stride(cols, item_bytes), item_bytes);
}

std::int64_t StepExecutor::row_scales() {
    return add_buffer(1, sizeof(float));
}

std::int64_t StepExecutor::add_buffer(std::int64_t row_stride, std::int64_t item_bytes) {
    require_idle();
    const std::int64_t bytes = checked_product(
        "an activation buffer in bytes",
        {{"max_tokens", limits_.max_tokens}, {"stride", row_stride}, {"item_bytes", item_bytes}});
    buffers_.push_back({Arena("an activation buffer", bytes), row_stride, item_bytes});
    return std::ssize(buffers_) - 1;
}

const StepExecutor::Buffer& StepExecutor::buffer_at(std::int64_t id) const {
    if (id < 0 || id >= std::ssize(buffers_)) {
        throw_no_such("buffer", id, buffers_.size());
    }
    return buffers_[at(id)];
}

StepExecutor::BufferView StepExecutor::buffer_view(std::int64_t id) const {
    const Buffer& found = buffer_at(id);
    return {found.memory.data(), found.row_stride, found.item_bytes};
}

std::int64_t StepExecutor::parts_bytes() const {
    std::int64_t floats = 0;
    for (const Work& work : works_) {
        floats += work.work.num_part_floats();
    }
    return floats * static_cast<std::int64_t>(sizeof(float));
}

std::int64_t StepExecutor::weight(const void* data) {
    require_idle();
    if (data == nullptr) {
        throw std::invalid_argument("a weight needs memory");
    }
    weights_.push_back(data);
    return std::ssize(weights_) - 1;
}

void StepExecutor::op(Op op) {
    if (op.domain == Domain::attention) {
        throw std::invalid_argument("operation '" + op.name + "': attention is added by attention()");
    }
    add(std::move(op), nullptr);
}

void StepExecutor::attention(Op op, std::int64_t group, std::int64_t kv_heads, const AttentionTiling& small,
                             const AttentionTiling& large, std::int64_t window) {
    op.domain = Domain::attention;
    if (kv_heads != pool_->shape().num_heads) {
        throw std::invalid_argument("operation '" + op.name + "' has " + std::to_string(kv_heads) +
                                    " KV heads, the pool has " + std::to_string(pool_->shape().num_heads));
    }
    const AttentionShape shape{.group = group,
                               .kv_heads = kv_heads,
                               .head_dim = pool_->shape().head_dim,
                               .small = small,
                               .large = large,
                               .window = window};
    shape.validate(limits_.max_tokens);
    op.validate();
    require_idle();
    for (Work& work : works_) {
        if (work.work.shape() == shape) {
            add(std::move(op), &work);
            return;
        }
    }
    add(std::move(op), &works_.emplace_back(Work{.work = AttentionWork(shape)}));
}

void StepExecutor::add(Op op, Work* work) {
    require_idle();
    op.validate();
    std::vector<void*> args;
    args.reserve(op.args.size());
    for (const Arg& arg : op.args) {
        args.push_back(address_of(arg, work));
    }
    for (const Arg& arg : op.args) {
        writes_logits_ = writes_logits_ || arg.source == Source::logits;
        writes_block_max_ = writes_block_max_ || arg.source == Source::block_max;
    }
    PlannedOp& planned = ops_.emplace_back();
    planned.op = std::move(op);
    planned.args = std::move(args);
    planned.attention = work;
}

void* StepExecutor::constant(const void* value) {
    // Kernels take every pointer as mutable; which ones they write is part of their contract.
    constants_.push_back(const_cast<void*>(value));
    return &constants_.back();
}

void* StepExecutor::address_of(const Arg& arg, Work* work) {
    switch (arg.source) {
        case Source::buffer:
            return constant(buffer_at(arg.index).memory.data());
        case Source::weight:
            if (arg.index < 0 || arg.index >= std::ssize(weights_)) {
                throw_no_such("weight", arg.index, weights_.size());
            }
            return constant(weights_[at(arg.index)]);
        case Source::k:
            return constant(pool_->k_layer(arg.index));
        case Source::v:
            return constant(pool_->v_layer(arg.index));
        case Source::ids:
            return &values_.ids;
        case Source::positions:
            return &values_.positions;
        case Source::slots:
            return &values_.slots;
        case Source::table:
            return &values_.table;
        case Source::items:
            return &work->items;
        case Source::parts:
            return &work->parts;
        case Source::sample_rows:
            return &values_.sample_rows;
        case Source::logits:
            return &values_.logits;
        case Source::block_max:
            return &values_.block_max;
        case Source::num_rows:
            return &values_.num_rows;
        case Source::num_samples:
            return &values_.num_samples;
    }
    throw std::logic_error("unknown argument source");
}

}  // namespace nanoserve
