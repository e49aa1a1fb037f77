// The pages of one sequence, in order: token position p lives in page t[p / page_size] at offset p %
// page_size.
//
// Invariant: the table owns one reference on each of its pages, for as long as they are listed in it, and
// gives them back on release() or destruction. The pool outlives its tables. Every call is all or nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv_pool.h"

namespace nanoserve {

class PageTable {
  public:
    explicit PageTable(std::shared_ptr<KVCachePool> pool);
    ~PageTable();
    PageTable(const PageTable&) = delete;
    PageTable& operator=(const PageTable&) = delete;

    [[nodiscard]] const std::shared_ptr<KVCachePool>& pool() const { return pool_; }
    [[nodiscard]] std::span<const std::int32_t> pages() const { return pages_; }
    [[nodiscard]] std::int64_t size() const { return std::ssize(pages_); }
    [[nodiscard]] std::int32_t page(std::int64_t index) const;
    [[nodiscard]] std::int64_t capacity() const { return size() * pool_->shape().page_size; }
    [[nodiscard]] std::int64_t num_tokens() const {
        return num_tokens_;
    }  // for statistics: what it was grown to

    // Adds pages until num_tokens fit; returns the pages added.
    std::vector<std::int32_t> grow_to(std::int64_t num_tokens);
    // Appends pages that are in use elsewhere (a cached prefix), taking one reference on each.
    void adopt(std::span<const std::int32_t> shared);
    // Copies the page first if anyone else holds it; true when it did.
    bool make_writable(std::int64_t index);
    void release();

    // The slots of positions [start, start + out.size()).
    void slots(std::int64_t start, std::span<std::int32_t> out) const;

  private:
    std::shared_ptr<KVCachePool> pool_;
    std::vector<std::int32_t> pages_;
    std::int64_t num_tokens_ = 0;
};

}  // namespace nanoserve
