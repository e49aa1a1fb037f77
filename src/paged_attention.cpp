#include "paged_attention.h"

#include <array>
#include <stdexcept>
#include <string>

#include "checked.h"

namespace nanoserve {

namespace {

AttentionShape shape_of(const KVCachePool& pool, const AttentionBatch& batch,
                        const AttentionKernels& kernels) {
    const PoolShape& s = pool.shape();
    if (batch.num_heads < 1 || batch.num_heads % s.num_heads != 0) {
        throw std::invalid_argument(std::to_string(batch.num_heads) +
                                    " query heads cannot share the pool's " + std::to_string(s.num_heads) +
                                    " KV heads evenly");
    }
    const AttentionShape shape{.group = batch.num_heads / s.num_heads,
                               .kv_heads = s.num_heads,
                               .head_dim = s.head_dim,
                               .small = kernels.small_tiling,
                               .large = kernels.large_tiling,
                               .window = kernels.window};
    shape.validate(batch.num_tokens);
    return shape;
}

}  // namespace

PagedAttention::PagedAttention(const KVCachePool& pool, std::int64_t layer, const AttentionBatch& batch,
                               const AttentionKernels& kernels, int num_threads)
    : k_(pool.k_layer(layer)),
      v_(pool.v_layer(layer)),
      q_(batch.q),
      out_(batch.out),
      kernels_(kernels),
      work_(shape_of(pool, batch, kernels)) {
    if (kernels.small == nullptr || kernels.large == nullptr) {
        throw std::invalid_argument("paged attention has no kernel: the address is 0");
    }
    add_sequences(pool, batch);
    work_.build(sequences_, num_threads);
}

void PagedAttention::add_sequences(const KVCachePool& pool, const AttentionBatch& batch) {
    const std::size_t num_sequences = batch.starts.size();
    require_at_least("max_pages", batch.max_pages, 0);
    if (batch.counts.size() != num_sequences ||
        std::ssize(batch.block_tables) !=
            checked_product("block_tables",
                            {{"sequences", std::ssize(batch.starts)}, {"max_pages", batch.max_pages}})) {
        throw std::invalid_argument("block_tables, starts and counts must have one row for each sequence");
    }
    std::int64_t row = 0;
    for (std::size_t i = 0; i < num_sequences; ++i) {
        const std::int64_t start = batch.starts[i];
        const std::int64_t count = batch.counts[i];
        require_at_least("every start", start, 0);
        require_at_least("every count", count, 1);
        const auto pages = batch.block_tables.subspan(i * at(batch.max_pages), at(batch.max_pages));
        const std::int64_t needed = ceil_div(start + count, pool.shape().page_size);
        if (needed > batch.max_pages) {
            throw std::invalid_argument("sequence " + std::to_string(i) + " reaches " +
                                        std::to_string(start + count) + " tokens, which needs " +
                                        std::to_string(needed) + " pages: block_tables has " +
                                        std::to_string(batch.max_pages));
        }
        for (const std::int32_t page : pages.first(at(needed))) {
            require_range(("a page of sequence " + std::to_string(i)).c_str(), page, 0,
                          pool.shape().num_pages - 1);
        }
        sequences_.push_back(
            {.first_row = row,
             .start = start,
             .count = count,
             .table_off = append_block_table(table_, pages, start + count, pool.shape().page_size)});
        row += count;
    }
    if (row != batch.num_tokens) {
        throw std::invalid_argument("the counts add up to " + std::to_string(row) + " tokens, q has " +
                                    std::to_string(batch.num_tokens));
    }
}

void PagedAttention::run(ThreadPool& threads) {
    const std::int32_t* table = table_.data();
    const AttentionItem* items = work_.items().data();
    float* parts = work_.parts();
    const std::array<void*, 7> args = {&q_, &k_, &v_, &table, &items, &parts, &out_};
    std::atomic<std::int64_t> next{0};
    threads.run([&](int) { work_.drain(kernels_.small, kernels_.large, args, next); });
}

}  // namespace nanoserve
