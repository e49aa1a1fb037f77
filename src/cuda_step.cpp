#include "cuda_step.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

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

std::int64_t token_bytes(const Limits& limits) {
    return limits.max_samples * std::int64_t{sizeof(std::int32_t)};
}

}  // namespace

CudaStep::CudaStep(std::shared_ptr<KVCachePool> pool, const Limits& limits, std::vector<std::int64_t> buckets,
                   bool start_early)
    : pool_(std::move(pool)),
      pages_(device_pages(*pool_)),
      stream_(pages_.stream()),
      limits_(limits),
      start_early_(start_early),
      inputs_(device(), limits, pool_->shape().page_size, std::move(buckets)),
      logits_(device(), "the logits", row_bytes(limits_, limits_.logits_stride)),
      block_max_(device(), "the logits' maxima", row_bytes(limits_, limits_.num_blocks)),
      tokens_(device(), "a step's tokens", token_bytes(limits_)),
      flights_{Flight(device(), token_bytes(limits_)), Flight(device(), token_bytes(limits_))},
      batch_({.max_tokens = limits.max_tokens, .max_positions = limits.max_positions}) {
    stream_->zero(tokens_.data(), tokens_.num_bytes());
}

CudaStep::~CudaStep() {
    // Nothing that the device may still read or write goes before it is done.
    try {
        device()->use();
        stream_->synchronize();
    } catch (const std::exception&) {  // the context is spoiled: nothing runs any more
    }
}

std::int64_t CudaStep::own_bytes(const Limits& limits, std::int64_t page_size) {
    return InputLayout(limits, page_size).num_bytes() + row_bytes(limits, limits.logits_stride) +
           row_bytes(limits, limits.num_blocks) + token_bytes(limits);
}

std::int64_t CudaStep::value_of(const Arg& arg, const Sizes& sizes) const {
    switch (arg.source) {
        case Source::buffer:
        case Source::weight:
            return static_cast<std::int64_t>(block_of(arg).data());
        case Source::k:
            return static_cast<std::int64_t>(pages_.keys(arg.index));
        case Source::v:
            return static_cast<std::int64_t>(pages_.values(arg.index));
        case Source::ids:
        case Source::positions:
        case Source::slots:
        case Source::table:
        case Source::decodes:
        case Source::pieces:
        case Source::chunks:
        case Source::sources:
        case Source::sample_rows:
        case Source::draws:
        case Source::draw_ints:
            return static_cast<std::int64_t>(inputs_.address(arg.source));
        case Source::logits:
            return static_cast<std::int64_t>(logits_.data());
        case Source::block_max:
            return static_cast<std::int64_t>(block_max_.data());
        case Source::tokens:
            return static_cast<std::int64_t>(tokens_.data());
        case Source::num_rows:
            return sizes.rows;
        case Source::num_samples:
            return sizes.samples;
        case Source::num_decodes:
            return sizes.decodes;
        case Source::num_chunks:
            return sizes.chunks;
        case Source::num_pieces:
            return sizes.pieces;
        case Source::number:
            return arg.index;
    }
    throw std::invalid_argument("unknown argument source");
}

void CudaStep::prepare(const StepInputs& inputs, const Choices& choices) {
    if (busy_.exchange(true)) {
        throw std::runtime_error("this executor is starting a step: wait for it");
    }
    try {
        if (started_ - finished_ == std::int64_t{kMaxInFlight}) {
            throw std::runtime_error(std::to_string(kMaxInFlight) + " steps are in flight: finish one");
        }
        require_range("sequences of a step", std::ssize(inputs.tables), 0, limits_.max_sequences);
        require_range("samples of a step", std::ssize(inputs.sample_rows), 0, limits_.max_samples);
        const auto per_sample = [&](const char* what, std::int64_t count) {
            if (count != 0 && count != kDrawFields * std::ssize(inputs.sample_rows)) {
                throw std::invalid_argument(std::string(what) + ": " + std::to_string(count) + " given, " +
                                            std::to_string(kDrawFields) + " per sample are needed");
            }
        };
        per_sample("draws", std::ssize(choices.draws));
        per_sample("draw_ints", std::ssize(choices.draw_ints));
        if (!choices.sources.empty() && choices.sources.size() != inputs.input_ids.size()) {
            throw std::invalid_argument("sources: " + std::to_string(choices.sources.size()) +
                                        " given, one per row is needed");
        }
        const std::int64_t samples_before = started_ == 0 ? 0 : num_samples(started_ - 1);
        for (const std::int32_t source : choices.sources) {
            require_range("source", source, -1, samples_before - 1);
        }
        batch_.prepare(*pool_, inputs);
        flights_[turn_of(started_)].staged = inputs_.stage(batch_, choices, turn_of(started_));
    } catch (...) {
        busy_.store(false);
        throw;
    }
}

void CudaStep::run(const Op& op, const Sizes& sizes) {
    std::array<std::int64_t, kMaxArgs> values;
    std::array<void*, kMaxArgs> args;
    const std::int64_t over = value_of(op.over, sizes);
    const Variant& variant = *std::find_if(op.variants.begin(), op.variants.end() - 1,
                                           [&](const Variant& each) { return over <= each.most; });
    std::array<unsigned, 3> grid{};
    for (std::size_t axis = 0; axis < 3; ++axis) {
        const Extent& extent = variant.grid[axis];
        grid[axis] = narrow<unsigned>(extent.times * ceil_div(value_of(extent.scalar, sizes), extent.per));
    }
    for (std::size_t i = 0; i < op.args.size(); ++i) {
        values[i] = value_of(op.args[i], sizes);
        args[i] = &values[i];
    }
    for (std::size_t i = 0; i < variant.maps.size(); ++i) {
        args[variant.kernel->tensors()[i].argument] = variant.maps[i].value();
    }
    const LaunchShape shape = variant.kernel->shape(grid, start_early_ && behind_kernel_);
    if (!stream_->launch(variant.kernel->function(), op.name.c_str(), shape,
                         std::span<void* const>(args.data(), op.args.size()))) {
        return;
    }
    behind_kernel_ = true;
    ++counts_.kernel_launches;
    counts_.early_launches += shape.early ? 1 : 0;
}

void CudaStep::run(const Product& product, const Sizes& sizes) {
    const auto pointer = [&](const Arg& arg) { return static_cast<DevicePtr>(value_of(arg, sizes)); };
    blas_->multiply(product.name, product.shape, pointer(product.x), pointer(product.w), pointer(product.y),
                    value_of(product.rows, sizes));
    behind_kernel_ = false;  // of what a library launches, nothing is known
    ++counts_.products;
}

void CudaStep::launch_all(const Sizes& sizes) {
    behind_kernel_ = false;
    for (const Work& work : plan_) {
        std::visit([&](const auto& each) { run(each, sizes); }, work);
    }
}

// cuBLAS may load a kernel when it first needs it, which is not for a capture to do. What products alone
// write is activations, and the step writes them anew.
void CudaStep::warm_products(const Sizes& sizes) {
    for (const Work& work : plan_) {
        if (const auto* const product = std::get_if<Product>(&work)) {
            run(*product, sizes);
        }
    }
}

void CudaStep::launch_graph(const GraphKey& key) {
    auto found = graphs_.find(key);
    if (found == graphs_.end()) {
        const auto [rows, pieces] = key;
        const Sizes sizes{.rows = rows, .samples = rows, .decodes = rows, .chunks = 0, .pieces = pieces};
        warm_products(sizes);
        stream_->begin_capture();
        try {
            launch_all(sizes);
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

std::int64_t CudaStep::start() {
    struct Done {
        std::atomic<bool>& busy;
        ~Done() { busy.store(false); }
    } const done{busy_};
    device()->use();
    const std::size_t turn = turn_of(started_);
    Flight& flight = flights_[turn];
    const Staged& staged = flight.staged;
    inputs_.copy(*stream_, staged, turn);
    if (staged.bucket > 0) {
        launch_graph({staged.bucket, staged.sizes.pieces});
    } else {
        launch_all(staged.sizes);
    }
    stream_->copy_out(flight.tokens.data(), tokens_.data(),
                      staged.sizes.samples * std::int64_t{sizeof(std::int32_t)});
    stream_->record(flight.done);
    ++counts_.steps;
    return started_++;
}

std::int64_t CudaStep::num_samples(std::int64_t number) const {
    require_range("step", number, std::max(std::int64_t{0}, started_ - std::int64_t{kMaxInFlight}),
                  started_ - 1);
    return flights_[turn_of(number)].staged.sizes.samples;
}

std::span<const std::int32_t> CudaStep::finish(std::int64_t number) {
    if (number != finished_ || number >= started_) {
        throw std::invalid_argument("step " + std::to_string(number) + " is not the oldest in flight");
    }
    const Flight& flight = flights_[turn_of(number)];
    ++finished_;  // even if waiting fails: nothing more will come of it
    flight.done.wait();
    return {reinterpret_cast<const std::int32_t*>(flight.tokens.data()), at(num_samples(number))};
}

void CudaStep::read_logits(std::int64_t number, std::span<const std::int32_t> samples, float* logits,
                           float* block_max) {
    if (number != started_ - 1) {
        throw std::invalid_argument("the logits of step " + std::to_string(number) +
                                    " are gone: another one was started");
    }
    device()->use();
    const std::int64_t count = num_samples(number);
    for (std::size_t begin = 0; begin < samples.size();) {
        // As many as lie one behind the other are one copy.
        const std::int64_t first = samples[begin];
        std::int64_t run = 0;
        while (begin + at(run) < samples.size() && samples[begin + at(run)] == first + run) {
            require_range("sample", first + run, 0, count - 1);
            ++run;
        }
        const auto copy = [&](float* to, const DeviceBlock& from, std::int64_t floats) {
            const std::int64_t row_bytes = floats * std::int64_t{sizeof(float)};
            stream_->copy_out(to + at(floats) * begin,
                              from.data() + static_cast<DevicePtr>(first * row_bytes), run * row_bytes);
        };
        copy(logits, logits_, limits_.logits_stride);
        copy(block_max, block_max_, limits_.num_blocks);
        begin += at(run);
    }
    stream_->synchronize();
}

}  // namespace nanoserve::cuda
