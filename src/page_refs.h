// Who holds which page: a reference count per page and the set of free ones.
//
// Invariant: a page is free exactly when its count is 0, and num_free is the size of that set.
// Guarantee: every call either does all it was asked or throws and changes nothing.
// Lowest id first, so that a lightly used pool touches (and so commits) only the start of its arena, and so
// that a run of the scheduler gives the same page ids every time.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace nanoserve {

class PageRefs {
  public:
    explicit PageRefs(std::int64_t num_pages);

    [[nodiscard]] std::int64_t num_pages() const { return static_cast<std::int64_t>(counts_.size()); }
    [[nodiscard]] std::int64_t num_free() const { return num_free_; }
    [[nodiscard]] std::int64_t num_shared() const;
    [[nodiscard]] std::int32_t count(std::int64_t page) const;

    // Throws out_of_range with the limit when there is no such page.
    void check(std::int64_t page) const;

    // The lowest free pages, one reference each; PoolExhausted when there are not enough.
    [[nodiscard]] std::vector<std::int32_t> allocate(std::int64_t num_pages);
    void ref(std::span<const std::int32_t> pages);
    // Returns the pages that became free.
    std::vector<std::int32_t> unref(std::span<const std::int32_t> pages);

    // Compares every count with `expected` and the free set with the counts; one line per disagreement.
    [[nodiscard]] std::vector<std::string> audit(std::span<const std::int64_t> expected) const;

  private:
    [[nodiscard]] bool is_free(std::size_t page) const { return (free_[page / 64] >> (page % 64) & 1U) != 0; }
    void set_free(std::size_t page, bool free);

    std::vector<std::int32_t> counts_;
    std::vector<std::uint64_t> free_;  // one bit per page
    std::size_t hint_ = 0;             // no word before this one has a free page
    std::int64_t num_free_ = 0;
};

}  // namespace nanoserve
