#include "step_executor.h"

#include <chrono>
#include <stdexcept>

namespace nanoserve {

namespace {

std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

}  // namespace

StepExecutor::Share StepExecutor::share_of(std::int64_t num_units, int thread_id, int num_threads) {
    // As floor(units * id / threads), without the product: that could overflow for absurd unit counts.
    const std::int64_t each = num_units / num_threads;
    const std::int64_t rest = num_units % num_threads;
    const auto start = [&](std::int64_t id) { return each * id + rest * id / num_threads; };
    return {start(thread_id), start(thread_id + 1)};
}

StepExecutor::Step::Step(std::atomic<bool>& busy) : busy_(&busy) {
    if (busy.exchange(true, std::memory_order_acquire)) {
        throw std::runtime_error("this executor is running a step already: one step at a time");
    }
}

StepExecutor::Step::~Step() {
    if (busy_ != nullptr) {
        busy_->store(false, std::memory_order_release);
    }
}

StepExecutor::StepExecutor(std::shared_ptr<KVCachePool> pool, std::shared_ptr<ThreadPool> threads,
                           const StepLimits& limits)
    : pool_(std::move(pool)), threads_(std::move(threads)), limits_(limits), batch_(limits) {
    if (pool_ == nullptr || threads_ == nullptr) {
        throw std::invalid_argument("a step executor needs a pool and threads");
    }
}

void StepExecutor::size_operations() {
    for (PlannedOp& planned : ops_) {
        planned.next_item.store(0, std::memory_order_relaxed);
        if (planned.attention != nullptr) {
            planned.num_threads = planned.attention->work.num_threads();
        } else {
            planned.num_units = planned.op.num_units(batch_.num_rows(), batch_.num_samples());
            planned.num_threads =
                threads_for(planned.num_units, planned.op.cost_per_unit, threads_->num_threads());
        }
    }
}

int StepExecutor::threads_for(std::int64_t num_units, std::int64_t cost_per_unit, int max_threads) {
    std::int64_t threads = std::min<std::int64_t>(max_threads, num_units);
    std::int64_t cost = 0;
    if (cost_per_unit > 0 && !__builtin_mul_overflow(num_units, cost_per_unit, &cost)) {
        threads = std::min(threads, cost / kMinCostPerThread);
    }
    return static_cast<int>(std::max<std::int64_t>(1, threads));
}

std::vector<StepExecutor::Share> StepExecutor::shares(std::int64_t num_units, std::int64_t cost_per_unit,
                                                      int max_threads) {
    require_at_least("num_units", num_units, 0);
    require_at_least("cost_per_unit", cost_per_unit, 0);
    require_range("max_threads", max_threads, 1, ThreadPool::kMaxThreads);
    const int num_threads = threads_for(num_units, cost_per_unit, max_threads);
    std::vector<Share> out;
    for (int thread_id = 0; thread_id < num_threads; ++thread_id) {
        out.push_back(share_of(num_units, thread_id, num_threads));
    }
    return out;
}

StepExecutor::Step StepExecutor::prepare(const StepInputs& inputs) {
    Step step(busy_);
    batch_.prepare(*pool_, inputs);
    for (Work& shared : works_) {
        shared.work.build(batch_.sequences(), threads_->num_threads(), kMinCostPerThread);
        shared.items = shared.work.items().data();
        shared.parts = shared.work.parts();
    }
    values_ = {.ids = batch_.ids().data(),
               .positions = batch_.positions().data(),
               .slots = batch_.slots().data(),
               .table = batch_.table().data(),
               .sample_rows = batch_.sample_rows().data(),
               .logits = nullptr,
               .block_max = nullptr,
               .num_rows = batch_.num_rows(),
               .num_samples = batch_.num_samples()};
    size_operations();
    return step;
}

void StepExecutor::run(const Step&, float* logits, float* block_max) {
    if (batch_.num_samples() > 0 &&
        ((writes_logits_ && logits == nullptr) || (writes_block_max_ && block_max == nullptr))) {
        throw std::invalid_argument("a step of " + std::to_string(batch_.num_samples()) +
                                    " samples needs memory for what its plan writes");
    }
    values_.logits = logits;
    values_.block_max = block_max;
    int team = 1;
    for (const PlannedOp& planned : ops_) {
        team = std::max(team, planned.num_threads);
    }
    if (team == 1) {
        walk(0, nullptr);  // nobody to wait for, so nobody is woken
    } else {
        Barrier barrier(team, threads_->spin_us());
        threads_->run([&](int thread_id) {
            if (thread_id < team) {
                walk(thread_id, &barrier);
            }
        });
    }
}

void StepExecutor::walk(int thread_id, Barrier* barrier) {
    const bool timing = profiling_ && thread_id == 0;
    std::int64_t since = timing ? now_ns() : 0;
    for (std::size_t i = 0; i < ops_.size(); ++i) {
        PlannedOp& planned = ops_[i];
        do_share(planned, thread_id);
        const int next_threads = i + 1 < ops_.size() ? ops_[i + 1].num_threads : 1;
        if (std::max(planned.num_threads, next_threads) > 1) {
            barrier->arrive_and_wait();
        }
        if (timing) {
            const std::int64_t now = now_ns();
            planned.nanoseconds += now - std::exchange(since, now);
            ++planned.calls;
        }
    }
}

void StepExecutor::do_share(PlannedOp& planned, int thread_id) {
    if (thread_id >= planned.num_threads) {
        return;
    }
    if (planned.attention == nullptr) {
        const Share share = share_of(planned.num_units, thread_id, planned.num_threads);
        KernelCall call(planned.args);
        call(planned.op.kernel, share.begin, share.end);
    } else {
        planned.attention->work.drain(planned.op.kernel, planned.op.large_kernel, planned.args,
                                      planned.next_item);
    }
}

void StepExecutor::profile(bool enable) {
    require_idle();
    profiling_ = enable;
    if (enable) {
        for (PlannedOp& planned : ops_) {
            planned.nanoseconds = 0;
            planned.calls = 0;
        }
    }
}

std::vector<OpTiming> StepExecutor::timings() const {
    require_idle();
    std::vector<OpTiming> out;
    out.reserve(ops_.size());
    for (const PlannedOp& planned : ops_) {
        out.push_back({planned.op.name, planned.nanoseconds, planned.calls});
    }
    return out;
}

void StepExecutor::require_idle() const {
    if (busy_.load(std::memory_order_acquire)) {
        throw std::runtime_error("this executor is running a step: wait for it to finish");
    }
}

}  // namespace nanoserve
