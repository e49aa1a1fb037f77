// Attention over the pool's pages for callers that bring their own model: one layer of one ragged batch, from
// plain block tables instead of page tables.
#pragma once

#include <cstdint>
#include <span>

#include "attention_work.h"
#include "kv_pool.h"
#include "thread_pool.h"

namespace nanoserve {

struct AttentionKernels {
    Kernel small = nullptr;
    AttentionTiling small_tiling{};
    Kernel large = nullptr;
    AttentionTiling large_tiling{};
    std::int64_t window = 0;  // that they have built in
};

// Queries and results are [num_tokens][num_heads][head_dim] without padding.
struct AttentionBatch {
    const float* q = nullptr;
    float* out = nullptr;
    std::int64_t num_tokens = 0;
    std::int64_t num_heads = 0;
    std::span<const std::int32_t>
        block_tables;  // [sequence][max_pages]; entries past a sequence's end are not read
    std::int64_t max_pages = 0;
    std::span<const std::int32_t> starts;
    std::span<const std::int32_t> counts;
};

// Checked when it is made, runs as often as wanted; the pool, the threads and q/out must outlive it.
class PagedAttention {
  public:
    PagedAttention(const KVCachePool& pool, std::int64_t layer, const AttentionBatch& batch,
                   const AttentionKernels& kernels, int num_threads);
    // An instance runs on as many threads as it was cut for, or fewer.
    void run(ThreadPool& threads);

  private:
    void add_sequences(const KVCachePool& pool, const AttentionBatch& batch);

    const std::byte* k_;
    const std::byte* v_;
    const float* q_;
    float* out_;
    AttentionKernels kernels_;
    std::vector<std::int32_t> table_;
    std::vector<SequenceSpan> sequences_;
    AttentionWork work_;
};

}  // namespace nanoserve
