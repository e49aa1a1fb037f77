// The KV cache: one arena of pages, and who holds which page.
//
// Layout in the machine's memory, chosen so that attention streams it without gathers (on a device:
// cuda_pages.h):
//   [layer][page][head]  K [dim][slot]   transposed inside a page: a run of tokens is one vector of scores
//                        V [slot][dim]   right behind it, so that a page is one run of memory
// bfloat16 lies in pairs that kernels multiply and add as one: K [dim / 2][slot][2], V [slot / 2][dim][2].
// Invariant: every page is free, or held by exactly ref_count(page) holders (page tables, prefix cache); a
// page with more than one holder is never written. The arena starts as zeros and callers scrub what went
// non-finite. A slot is page_id * page_size + offset. Not thread-safe: Python's lock (or one thread) guards
// all of it. It does not know requests, tokens or eviction: those decisions are Python's.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "page_memory.h"
#include "page_refs.h"

namespace nanoserve {

class PageTable;

enum class ElementType : std::uint8_t { f32, bf16 };
[[nodiscard]] ElementType element_from_name(std::string_view name);
[[nodiscard]] const char* element_name(ElementType type);
[[nodiscard]] std::int64_t element_bytes(ElementType type);

struct PoolShape {
    std::int64_t num_pages = 1;
    std::int64_t page_size = 16;
    std::int64_t num_layers = 1;
    std::int64_t num_heads = 1;  // KV heads
    std::int64_t head_dim = 16;
    ElementType element = ElementType::f32;
};

struct PoolStats {
    std::int64_t num_pages, free, used, shared;
    std::int64_t bytes_total, bytes_used;
    std::int64_t tokens_held;           // over all live tables: the tokens each was grown to
    std::int64_t tokens_capacity_used;  // over all live tables: the tokens their pages could hold
    double internal_fragmentation;      // the share of that capacity nothing is held in
};

class KVCachePool {
  public:
    explicit KVCachePool(const PoolShape& shape);
    // With pages that lie elsewhere, of that shape.
    KVCachePool(const PoolShape& shape, std::unique_ptr<PageMemory> memory);
    ~KVCachePool() = default;
    KVCachePool(const KVCachePool&) = delete;
    KVCachePool& operator=(const KVCachePool&) = delete;

    [[nodiscard]] const PoolShape& shape() const { return shape_; }
    [[nodiscard]] std::int64_t num_slots() const { return shape_.num_pages * shape_.page_size; }
    [[nodiscard]] std::int64_t num_free_pages() const { return refs_.num_free(); }
    [[nodiscard]] std::int64_t num_used_pages() const { return shape_.num_pages - refs_.num_free(); }
    [[nodiscard]] std::int64_t bytes_total() const { return memory_->num_bytes(); }
    [[nodiscard]] PageMemory& memory() const { return *memory_; }
    [[nodiscard]] std::int64_t page_bytes() const;  // K and V over all layers
    [[nodiscard]] std::int64_t pages_needed(std::int64_t num_tokens) const;
    [[nodiscard]] bool can_allocate(std::int64_t num_tokens) const;

    [[nodiscard]] std::vector<std::int32_t> allocate(std::int64_t num_tokens);
    [[nodiscard]] std::vector<std::int32_t> allocate_pages(std::int64_t num_pages);
    void ref(std::span<const std::int32_t> pages) { refs_.ref(pages); }
    std::vector<std::int32_t> unref(std::span<const std::int32_t> pages) { return refs_.unref(pages); }
    [[nodiscard]] std::int32_t ref_count(std::int64_t page) const { return refs_.count(page); }
    void check_page(std::int64_t page) const { refs_.check(page); }

    // Writes rows [n][head][dim] of keys and values, rounded to the pool's element type, into slots, which
    // must lie in pages with one holder.
    void store_kv(std::span<const float> k, std::span<const float> v, std::span<const std::int64_t> slots,
                  std::int64_t layer);
    // A new page with the same keys and values in every layer.
    [[nodiscard]] std::int32_t copy_page(std::int64_t page);
    // All of its memory now, not page by page as it is used; false where the system cannot.
    bool populate() const { return memory_->populate(); }
    void scrub(std::span<const std::int32_t> pages);

    // The first key, and the first value, of page 0. Throws where the pages are on a device.
    [[nodiscard]] std::byte* k_layer(std::int64_t layer) const;
    [[nodiscard]] std::byte* v_layer(std::int64_t layer) const { return k_layer(layer) + head_bytes(); }
    [[nodiscard]] std::int64_t head_bytes() const;        // of the keys, or values, of one head of a page
    [[nodiscard]] std::int64_t layer_page_bytes() const;  // of a page in one layer

    [[nodiscard]] PoolStats stats() const;
    // `holders`: the page lists held by anything that is not a PageTable (the prefix cache, a plain request).
    [[nodiscard]] std::vector<std::string> audit(std::span<const std::vector<std::int32_t>> holders) const;

  private:
    friend class PageTable;  // registers itself in tables_

    [[nodiscard]] std::byte* page_start(std::int64_t layer, std::int64_t page) const;

    PoolShape shape_;
    std::unique_ptr<PageMemory> memory_;
    PageRefs refs_;
    std::vector<const PageTable*> tables_;  // every live table of this pool
};

}  // namespace nanoserve
