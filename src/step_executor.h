// Runs a plan over a batch: the whole forward pass in one region of the thread pool.
//
// Every thread walks the same list of operations, does its contiguous share of each, and meets the others at
// a barrier before the next. An operation too small to be worth sharing runs on fewer threads, and where two
// neighbours both run on thread 0 alone there is no barrier between them. None of this changes a bit of the
// result: kernels give the same bits for any split of their range. It allocates nothing per step beyond what
// its vectors keep, and it decides nothing: which sequences run, and which pages they have, is Python's
// business.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "arena.h"
#include "attention_work.h"
#include "checked.h"
#include "step_batch.h"
#include "step_plan.h"
#include "thread_pool.h"

namespace nanoserve {

struct OpTiming {
    std::string name;
    std::int64_t nanoseconds;
    std::int64_t calls;
};

class StepExecutor {
  public:
    // Proof that one step is in flight; a second one is refused while it lives.
    class Step {
      public:
        explicit Step(std::atomic<bool>& busy);
        ~Step();
        Step(Step&& other) noexcept : busy_(std::exchange(other.busy_, nullptr)) {}
        Step& operator=(Step&&) = delete;
        Step(const Step&) = delete;
        Step& operator=(const Step&) = delete;

      private:
        std::atomic<bool>* busy_;
    };

    StepExecutor(std::shared_ptr<KVCachePool> pool, std::shared_ptr<ThreadPool> threads,
                 const StepLimits& limits);
    StepExecutor(const StepExecutor&) = delete;
    StepExecutor& operator=(const StepExecutor&) = delete;

    // The row stride of a buffer, in items: whole panels fit, rows begin on cache lines and are never a
    // multiple of 4 KiB apart. item_bytes: 4 (float32), 2 (bfloat16) or 1 (8-bit integers).
    [[nodiscard]] static std::int64_t stride(std::int64_t cols, std::int64_t item_bytes = sizeof(float));
    [[nodiscard]] static std::int64_t logits_stride(std::int64_t vocab);

    struct Share {
        std::int64_t begin, end;
    };
    // What threads take of an operation's units, by thread; there are fewer than max_threads where the work
    // is not worth more. Attention has a rule of its own.
    [[nodiscard]] static std::vector<Share> shares(std::int64_t num_units, std::int64_t cost_per_unit,
                                                   int max_threads);

    // The plan. buffer and weight return ids; a weight's memory must outlive the executor.
    std::int64_t buffer(std::int64_t cols, std::int64_t item_bytes = sizeof(float));
    std::int64_t row_scales();  // a buffer of one float per row, without a gap: the scales of quantised rows
    std::int64_t weight(const void* data);
    void op(Op op);
    void attention(Op op, std::int64_t group, std::int64_t kv_heads, const AttentionTiling& small,
                   const AttentionTiling& large, std::int64_t window = 0);

    // One step: prepare under Python's lock, run without it.
    [[nodiscard]] Step prepare(const StepInputs& inputs);
    // logits: num_samples rows of logits_stride(vocab); block_max: as many of num_logits_blocks(vocab).
    // Either may be null where the plan does not write it or nothing is sampled.
    void run(const Step& step, float* logits, float* block_max);

    void profile(bool enable);  // counts from zero when enabled
    [[nodiscard]] std::vector<OpTiming> timings() const;

    [[nodiscard]] const std::shared_ptr<KVCachePool>& pool() const { return pool_; }
    [[nodiscard]] std::int64_t max_tokens() const { return limits_.max_tokens; }
    [[nodiscard]] bool writes_logits() const { return writes_logits_; }
    [[nodiscard]] bool writes_block_max() const { return writes_block_max_; }
    struct BufferView {
        std::byte* data;
        std::int64_t row_stride, item_bytes;
    };
    [[nodiscard]] BufferView buffer_view(std::int64_t id) const;
    [[nodiscard]] std::int64_t parts_bytes() const;  // of all attention operations, so far

  private:
    struct Buffer {
        Arena memory;
        std::int64_t row_stride;  // in items
        std::int64_t item_bytes;
    };
    struct Work {  // shared by all attention operations of one shape
        AttentionWork work;
        const AttentionItem* items = nullptr;
        float* parts = nullptr;
    };
    struct PlannedOp {
        Op op;
        std::vector<void*> args;  // where the kernel finds each argument's value
        Work* attention = nullptr;
        std::int64_t num_units = 0;
        int num_threads = 1;
        std::int64_t nanoseconds = 0;
        std::int64_t calls = 0;
        alignas(64) std::atomic<std::int64_t> next_item{0};
    };
    struct Values {  // what the sources of a plan point at
        const std::int32_t *ids, *positions, *slots, *table, *sample_rows;
        float *logits, *block_max;
        std::int64_t num_rows, num_samples;
    };

    void require_idle() const;
    std::int64_t add_buffer(std::int64_t row_stride, std::int64_t item_bytes);
    void add(Op op, Work* work);
    [[nodiscard]] void* address_of(const Arg& arg, Work* work);
    [[nodiscard]] void* constant(const void* value);
    [[nodiscard]] const Buffer& buffer_at(std::int64_t id) const;
    [[nodiscard]] static int threads_for(std::int64_t num_units, std::int64_t cost_per_unit, int max_threads);
    [[nodiscard]] static Share share_of(std::int64_t num_units, int thread_id, int num_threads);
    void size_operations();
    void walk(int thread_id, Barrier* barrier);
    static void do_share(PlannedOp& planned, int thread_id);

    const std::shared_ptr<KVCachePool> pool_;
    const std::shared_ptr<ThreadPool> threads_;
    const StepLimits limits_;
    std::atomic<bool> busy_{false};
    bool profiling_ = false;
    bool writes_logits_ = false;
    bool writes_block_max_ = false;

    // The plan. Deques: addresses in args point into them.
    std::vector<Buffer> buffers_;
    std::vector<const void*> weights_;
    std::deque<void*> constants_;
    std::deque<Work> works_;
    std::deque<PlannedOp> ops_;

    // The step.
    StepBatch batch_;
    Values values_{};
};

}  // namespace nanoserve
