#include "page_table.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "checked.h"

namespace nanoserve {

PageTable::PageTable(std::shared_ptr<KVCachePool> pool) : pool_(std::move(pool)) {
    if (pool_ == nullptr) {
        throw std::invalid_argument("a page table needs a pool");
    }
    pool_->tables_.push_back(this);
}

PageTable::~PageTable() {
    // No exception can leave here: these pages hold at least the table's own reference, unless somebody freed
    // what was not theirs. In that case the pages are left alone and the next audit of the pool says so.
    try {
        release();
    } catch (const std::exception&) {
        pages_.clear();
    }
    std::erase(pool_->tables_, this);
}

std::int32_t PageTable::page(std::int64_t index) const {
    if (index < 0 || index >= size()) {
        throw std::out_of_range("index " + std::to_string(index) + " is out of range: the table has " +
                                std::to_string(size()) + " pages");
    }
    return pages_[at(index)];
}

std::vector<std::int32_t> PageTable::grow_to(std::int64_t num_tokens) {
    const std::int64_t missing = std::max<std::int64_t>(0, pool_->pages_needed(num_tokens) - size());
    if (missing <= pool_->num_free_pages()) {
        pages_.reserve(at(size() + missing));  // before the pages are taken, so that nothing can fail after
    }
    std::vector<std::int32_t> added = pool_->allocate_pages(missing);
    pages_.insert(pages_.end(), added.begin(), added.end());
    num_tokens_ = std::max(num_tokens_, num_tokens);
    return added;
}

void PageTable::adopt(std::span<const std::int32_t> shared) {
    pages_.reserve(pages_.size() + shared.size());
    pool_->ref(shared);
    pages_.insert(pages_.end(), shared.begin(), shared.end());
    num_tokens_ = capacity();
}

bool PageTable::make_writable(std::int64_t index) {
    const std::int32_t old = page(index);
    if (pool_->ref_count(old) <= 1) {
        return false;
    }
    pages_[at(index)] = pool_->copy_page(old);
    pool_->unref({&old, 1});
    return true;
}

void PageTable::release() {
    pool_->unref(pages_);
    pages_.clear();
    num_tokens_ = 0;
}

void PageTable::slots(std::int64_t start, std::span<std::int32_t> out) const {
    const std::int64_t page_size = pool_->shape().page_size;
    require_at_least("start", start, 0);
    if (start > capacity() - std::ssize(out)) {
        throw std::out_of_range(std::to_string(out.size()) + " positions from " + std::to_string(start) +
                                " do not fit: the table has room for " + std::to_string(capacity()) +
                                " tokens");
    }
    std::int64_t written = 0;
    while (written < std::ssize(out)) {  // page by page: one division per page, not per token
        const std::int64_t index = (start + written) / page_size;
        const std::int64_t offset = (start + written) % page_size;
        const std::int64_t run = std::min(page_size - offset, std::ssize(out) - written);
        const std::int64_t first = pages_[at(index)] * page_size + offset;
        for (std::int64_t i = 0; i < run; ++i) {
            out[at(written + i)] = static_cast<std::int32_t>(first + i);
        }
        written += run;
    }
}

}  // namespace nanoserve
