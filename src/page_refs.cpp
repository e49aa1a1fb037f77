#include "page_refs.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>

#include "checked.h"
#include "errors.h"

namespace nanoserve {

namespace {
std::string page_name(std::int64_t page) {
    return "page " + std::to_string(page);
}
}  // namespace

PageRefs::PageRefs(std::int64_t num_pages)
    : counts_(at(num_pages), 0), free_(at(ceil_div(num_pages, 64)), 0), num_free_(num_pages) {
    for (std::size_t page = 0; page < counts_.size(); ++page) {
        set_free(page, true);
    }
}

void PageRefs::set_free(std::size_t page, bool free) {
    const std::uint64_t bit = std::uint64_t{1} << (page % 64);
    if (free) {
        free_[page / 64] |= bit;
        hint_ = std::min(hint_, page / 64);
    } else {
        free_[page / 64] &= ~bit;
    }
}

void PageRefs::check(std::int64_t page) const {
    if (page < 0 || page >= num_pages()) {
        throw std::out_of_range(page_name(page) + " is out of range: the pool has pages 0 to " +
                                std::to_string(num_pages() - 1));
    }
}

std::int32_t PageRefs::count(std::int64_t page) const {
    check(page);
    return counts_[at(page)];
}

std::int64_t PageRefs::num_shared() const {
    return std::count_if(counts_.begin(), counts_.end(), [](std::int32_t count) { return count > 1; });
}

std::vector<std::int32_t> PageRefs::allocate(std::int64_t num_pages) {
    require_at_least("num_pages", num_pages, 0);
    if (num_pages > num_free_) {
        throw PoolExhausted("KV pool exhausted: " + std::to_string(num_pages) + " pages wanted, " +
                            std::to_string(num_free_) + " of " + std::to_string(this->num_pages()) + " free");
    }
    std::vector<std::int32_t> pages;
    pages.reserve(at(num_pages));
    while (std::ssize(pages) < num_pages) {
        while (free_[hint_] == 0) {
            ++hint_;
        }
        const std::size_t page = hint_ * 64 + static_cast<std::size_t>(std::countr_zero(free_[hint_]));
        set_free(page, false);
        counts_[page] = 1;
        pages.push_back(static_cast<std::int32_t>(page));
    }
    num_free_ -= num_pages;
    return pages;
}

void PageRefs::ref(std::span<const std::int32_t> pages) {
    for (const std::int32_t page : pages) {
        if (count(page) == 0) {
            throw std::invalid_argument(page_name(page) + " is free: only a page in use can be shared");
        }
        // The whole list may be this one page, so leave room for every entry of it.
        if (counts_[at(page)] > std::numeric_limits<std::int32_t>::max() - std::ssize(pages)) {
            throw std::invalid_argument(page_name(page) + " has too many references");
        }
    }
    for (const std::int32_t page : pages) {
        ++counts_[at(page)];
    }
}

std::vector<std::int32_t> PageRefs::unref(std::span<const std::int32_t> pages) {
    std::vector<std::int32_t> freed;
    freed.reserve(pages.size());  // before the first change: nothing below allocates unless it throws
    for (std::size_t i = 0; i < pages.size(); ++i) {
        const std::int32_t page = pages[i];
        if (page >= 0 && page < num_pages() && counts_[at(page)] > 0) {
            --counts_[at(page)];
            continue;
        }
        // Take the decrements back, so that the caller's next audit sees the pool as it was.
        for (const std::int32_t done : pages.first(i)) {
            ++counts_[at(done)];
        }
        if (count(page) == 0) {
            throw std::invalid_argument(page_name(page) + " is free already");
        }
        throw std::invalid_argument(page_name(page) + " is listed " +
                                    std::to_string(std::count(pages.begin(), pages.end(), page)) +
                                    " times but has " + std::to_string(count(page)) + " references");
    }
    for (const std::int32_t page : pages) {
        if (counts_[at(page)] == 0 && !is_free(at(page))) {
            set_free(at(page), true);
            freed.push_back(page);
        }
    }
    num_free_ += std::ssize(freed);
    return freed;
}

std::vector<std::string> PageRefs::audit(std::span<const std::int64_t> expected) const {
    std::vector<std::string> problems;
    std::int64_t free_bits = 0;
    for (std::size_t page = 0; page < counts_.size(); ++page) {
        const std::string name = page_name(static_cast<std::int64_t>(page));
        if (counts_[page] != expected[page]) {
            problems.push_back(name + " has " + std::to_string(counts_[page]) + " references but " +
                               std::to_string(expected[page]) + " holders");
        }
        if (is_free(page) != (counts_[page] == 0)) {
            problems.push_back(name + (is_free(page) ? " is in the free set" : " is not in the free set") +
                               " with " + std::to_string(counts_[page]) + " references");
        }
        free_bits += is_free(page) ? 1 : 0;
    }
    if (free_bits != num_free_) {
        problems.push_back("num_free is " + std::to_string(num_free_) + " but the free set has " +
                           std::to_string(free_bits) + " pages");
    }
    return problems;
}

}  // namespace nanoserve
