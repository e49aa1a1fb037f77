#include "cuda_step.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "attention_work.h"
#include "checked.h"

namespace nanoserve::cuda {

namespace {

using Name = std::pair<std::string_view, Source>;
constexpr std::array kSources = {
    Name{"buffer", Source::buffer},
    Name{"weight", Source::weight},
    Name{"k", Source::k},
    Name{"v", Source::v},
    Name{"ids", Source::ids},
    Name{"positions", Source::positions},
    Name{"slots", Source::slots},
    Name{"table", Source::table},
    Name{"decodes", Source::decodes},
    Name{"chunks", Source::chunks},
    Name{"sample_rows", Source::sample_rows},
    Name{"logits", Source::logits},
    Name{"block_max", Source::block_max},
    Name{"num_rows", Source::num_rows},
    Name{"num_samples", Source::num_samples},
    Name{"num_decodes", Source::num_decodes},
    Name{"num_chunks", Source::num_chunks},
    Name{"num_segments", Source::num_segments},
    Name{"number", Source::number},
};

constexpr std::int64_t kAlignment = 256;  // of every array in the block of inputs
constexpr std::size_t kMaxArgs = 32;

bool is_scalar(Source source) {
    return source >= Source::num_rows;
}

template <typename T>
std::int64_t bytes_of(std::int64_t count) {
    return round_up(checked_product("a step's inputs", {{"count", count}, {"bytes", sizeof(T)}}), kAlignment);
}

DevicePages& device_pages(KVCachePool& pool) {
    auto* const pages = dynamic_cast<DevicePages*>(&pool.memory());
    if (pages == nullptr) {
        throw std::invalid_argument("this step needs a pool whose pages are on a device");
    }
    return *pages;
}

Limits checked(const Limits& limits) {
    require_at_least("max_sequences", limits.max_sequences, 1);
    require_at_least("max_tokens", limits.max_tokens, limits.max_sequences);
    require_at_least("chunk_rows", limits.chunk_rows, 1);
    require_at_least("segment", limits.segment, 1);
    require_at_least("vocab", limits.vocab, 1);
    require_at_least("logits_stride", limits.logits_stride, limits.vocab);
    require_at_least("num_blocks", limits.num_blocks, 1);
    return limits;
}

std::int64_t row_bytes(const Limits& limits, std::int64_t floats) {
    return checked_product(
        "the logits in bytes",
        {{"max_sequences", limits.max_sequences}, {"floats", floats}, {"bytes", sizeof(float)}});
}

}  // namespace

Source source_from_name(std::string_view name) {
    for (const auto& [known, source] : kSources) {
        if (known == name) {
            return source;
        }
    }
    throw std::invalid_argument("unknown argument source '" + std::string(name) + "'");
}

// The arrays lie one behind the other, the table last, because it alone has a length worth not copying.
struct CudaStep::Inputs {
    Inputs(const std::shared_ptr<const Device>& device, const Limits& limits, std::int64_t page_size)
        : positions(bytes_of<std::int32_t>(limits.max_tokens)),
          slots(positions + bytes_of<std::int32_t>(limits.max_tokens)),
          sample_rows(slots + bytes_of<std::int32_t>(limits.max_tokens)),
          decodes(sample_rows + bytes_of<std::int32_t>(limits.max_sequences)),
          chunks(decodes + bytes_of<AttentionSpan>(limits.max_sequences)),
          max_chunks(limits.max_tokens / limits.chunk_rows + limits.max_sequences),
          table(chunks + bytes_of<AttentionSpan>(max_chunks)),
          // As append_block_table pads it.
          max_table(checked_product(
              "the block table",
              {{"max_sequences", limits.max_sequences},
               {"pages",
                ceil_div((ceil_div(limits.max_positions, kBlockTokens) + 1) * kBlockTokens, page_size) +
                    1}})),
          host(device, "a step's inputs", table + bytes_of<std::int32_t>(max_table)),
          block(device, "a step's inputs", host.num_bytes()) {}

    template <typename T>
    [[nodiscard]] std::span<T> at_offset(std::int64_t offset, std::size_t count) const {
        return {reinterpret_cast<T*>(host.data() + offset), count};
    }

    static constexpr std::int64_t ids = 0;
    const std::int64_t positions, slots, sample_rows, decodes, chunks, max_chunks, table, max_table;
    const PinnedBlock host;
    const DeviceBlock block;
    std::int64_t used = 0;  // bytes of this step
};

CudaStep::CudaStep(std::shared_ptr<KVCachePool> pool, const Limits& limits, std::vector<std::int64_t> buckets)
    : pool_(std::move(pool)),
      pages_(device_pages(*pool_)),
      stream_(pages_.stream()),
      limits_(checked(limits)),
      buckets_(std::move(buckets)),
      inputs_(std::make_unique<Inputs>(device(), limits_, pool_->shape().page_size)),
      logits_(device(), "the logits", row_bytes(limits_, limits_.logits_stride)),
      block_max_(device(), "the logits' maxima", row_bytes(limits_, limits_.num_blocks)),
      logits_out_(device(), "the logits", logits_.num_bytes()),
      block_max_out_(device(), "the logits' maxima", block_max_.num_bytes()),
      batch_({.max_tokens = limits.max_tokens, .max_positions = limits.max_positions}) {
    if (!std::is_sorted(buckets_.begin(), buckets_.end()) ||
        (!buckets_.empty() && (buckets_.front() < 1 || buckets_.back() > limits_.max_sequences))) {
        throw std::invalid_argument("buckets must ascend from 1 to at most max_sequences=" +
                                    std::to_string(limits_.max_sequences));
    }
}

CudaStep::~CudaStep() {
    // Nothing that the device may still read or write goes before it is done.
    if (driver().stream_synchronize != nullptr) {
        try {
            device()->use();
            stream_->synchronize();
        } catch (const std::exception&) {  // the context is spoiled: nothing runs any more
        }
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

std::int64_t CudaStep::weight_bytes() const {
    std::int64_t total = 0;
    for (const DeviceBlock& weight : weights_) {
        total += weight.num_bytes();
    }
    return total;
}

void CudaStep::op(Op op) {
    if (op.variants.empty() || op.args.size() > kMaxArgs) {
        throw std::invalid_argument(op.name + ": needs a kernel, and at most " + std::to_string(kMaxArgs) +
                                    " arguments");
    }
    constexpr Sizes kOne{.rows = 1, .samples = 1, .decodes = 1, .chunks = 1, .segments = 1};
    for (const Arg& arg : op.args) {
        static_cast<void>(value_of(arg, kOne));
    }
    std::int64_t before = -1;
    for (const Variant& variant : op.variants) {
        if (variant.kernel == nullptr || (&variant != &op.variants.back() && variant.most <= before)) {
            throw std::invalid_argument(op.name + ": variants need a kernel each, and must ascend");
        }
        before = variant.most;
        for (const Extent& extent : variant.grid) {
            if (!is_scalar(extent.scalar.source) || extent.per < 1 || extent.times < 1) {
                throw std::invalid_argument(op.name +
                                            ": a grid follows from numbers, per and times at least 1");
            }
        }
    }
    if (!is_scalar(op.over.source)) {
        throw std::invalid_argument(op.name + ": a number chooses among variants");
    }
    graphs_.clear();  // of the plan before
    ops_.push_back(std::move(op));
}

void CudaStep::read_buffer(std::int64_t id, std::span<std::byte> to) const {
    require_range("buffer", id, 0, std::ssize(buffers_) - 1);
    require_range("bytes", std::ssize(to), 0, buffers_[at(id)].num_bytes());
    pages_.read(buffers_[at(id)].data(), to);
}

std::int64_t CudaStep::value_of(const Arg& arg, const Sizes& sizes) const {
    const auto input = [&](std::int64_t offset) {
        return static_cast<std::int64_t>(inputs_->block.data()) + offset;
    };
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
            return input(Inputs::ids);
        case Source::positions:
            return input(inputs_->positions);
        case Source::slots:
            return input(inputs_->slots);
        case Source::table:
            return input(inputs_->table);
        case Source::decodes:
            return input(inputs_->decodes);
        case Source::chunks:
            return input(inputs_->chunks);
        case Source::sample_rows:
            return input(inputs_->sample_rows);
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

std::int64_t CudaStep::bucket_of(const Sizes& sizes) const {
    if (sizes.chunks != 0 || sizes.samples != sizes.rows) {
        return 0;  // prompts, or decoding rows that nobody samples
    }
    const auto found = std::lower_bound(buckets_.begin(), buckets_.end(), sizes.rows);
    return found == buckets_.end() ? 0 : *found;
}

void CudaStep::prepare(const StepInputs& inputs) {
    if (busy_.exchange(true)) {
        throw std::runtime_error("this executor is running a step: wait for it to finish");
    }
    try {
        require_range("sequences of a step", std::ssize(inputs.tables), 0, limits_.max_sequences);
        require_range("samples of a step", std::ssize(inputs.sample_rows), 0, limits_.max_sequences);
        batch_.prepare(*pool_, inputs);
        stage();
    } catch (...) {
        busy_.store(false);
        throw;
    }
}

// Everything of the step into the block that is copied, padded to the bucket if there is one.
void CudaStep::stage() {
    const Inputs& in = *inputs_;
    sizes_ = {
        .rows = batch_.num_rows(), .samples = batch_.num_samples(), .decodes = 0, .chunks = 0, .segments = 0};
    std::int64_t longest = 0;
    const auto decodes = in.at_offset<AttentionSpan>(in.decodes, at(limits_.max_sequences));
    const auto chunks = in.at_offset<AttentionSpan>(in.chunks, at(in.max_chunks));
    for (const SequenceSpan& sequence : batch_.sequences()) {
        for (std::int64_t done = 0; done < sequence.count; done += limits_.chunk_rows) {
            const AttentionSpan span{
                .first_row = static_cast<std::int32_t>(sequence.first_row + done),
                .count = static_cast<std::int32_t>(std::min(limits_.chunk_rows, sequence.count - done)),
                .start = static_cast<std::int32_t>(sequence.start + done),
                .table_off = static_cast<std::int32_t>(sequence.table_off)};
            if (sequence.count == 1) {
                decodes[at(sizes_.decodes++)] = span;
                longest = std::max(longest, sequence.start + 1);
            } else {
                chunks[at(sizes_.chunks++)] = span;
            }
        }
    }
    sizes_.segments = static_cast<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(ceil_div(longest, limits_.segment))));
    if (std::ssize(batch_.table()) > in.max_table) {
        throw std::invalid_argument("the block table of this step has " +
                                    std::to_string(batch_.table().size()) + " entries, at most " +
                                    std::to_string(in.max_table) + " fit");
    }
    const std::int64_t bucket = bucket_of(sizes_);
    const std::int64_t rows = std::max(sizes_.rows, bucket);
    const auto put = [&](std::int64_t offset, std::span<const std::int32_t> values, std::int64_t count,
                         std::int32_t padding) {
        const std::size_t size = std::max(at(count), values.size());
        const auto to = in.at_offset<std::int32_t>(offset, size);
        std::fill(std::copy(values.begin(), values.end(), to.begin()), to.end(), padding);
    };
    put(Inputs::ids, batch_.ids(), rows, 0);
    put(in.positions, batch_.positions(), rows, 0);
    put(in.slots, batch_.slots(), rows, -1);
    put(in.sample_rows, batch_.sample_rows(), bucket, 0);
    put(in.table, batch_.table(), 0, 0);
    for (std::int64_t padded = sizes_.decodes; padded < bucket; ++padded) {
        decodes[at(padded)] = {
            .first_row = static_cast<std::int32_t>(padded), .count = 0, .start = 0, .table_off = 0};
    }
    inputs_->used = in.table + static_cast<std::int64_t>(batch_.table().size_bytes());
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
    stream_->copy_in(inputs_->block.data(), inputs_->host.data(), inputs_->used);
    if (const std::int64_t bucket = bucket_of(sizes_); bucket > 0) {
        launch_graph({bucket, sizes_.segments});
    } else {
        launch_all(sizes_);
    }
    ++counts_.steps;
    const auto floats = [](std::int64_t count) { return count * static_cast<std::int64_t>(sizeof(float)); };
    const std::int64_t samples = sizes_.samples;
    stream_->copy_out(logits_out_.data(), logits_.data(), floats(samples * limits_.logits_stride));
    stream_->copy_out(block_max_out_.data(), block_max_.data(), floats(samples * limits_.num_blocks));
    stream_->synchronize();
    std::memcpy(logits, logits_out_.data(), at(floats(samples * limits_.logits_stride)));
    std::memcpy(block_max, block_max_out_.data(), at(floats(samples * limits_.num_blocks)));
}

}  // namespace nanoserve::cuda
