#include "arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "checked.h"
#include "errors.h"

namespace nanoserve {

namespace {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20;  // of the CPUs in use; elsewhere just an alignment

}  // namespace

Arena::Arena(const char* what, std::int64_t num_bytes) : num_bytes_(num_bytes) {
    require_at_least(what, num_bytes, 1);
    // Address space for a start on a huge page; what is in front of it is never touched.
    const std::int64_t slack = num_bytes < kHugePage ? 0 : kHugePage;
    if (__builtin_add_overflow(num_bytes, slack, &mapped_bytes_)) {
        mapped_bytes_ = num_bytes;
    }
    void* memory =
        ::mmap(nullptr, at(mapped_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw OutOfMemory(std::string(what) + ": the system refused " + std::to_string(num_bytes) +
                          " bytes (" + std::strerror(errno) + ")");
    }
    mapped_ = static_cast<std::byte*>(memory);
    const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory) % kHugePage);
    data_ = mapped_ + (slack == 0 || past == 0 ? 0 : kHugePage - past);
#ifdef MADV_HUGEPAGE
    // Advice only: attention reads scattered pages and weights are streamed, and large TLB entries are worth
    // about a tenth of the time of both.
    static_cast<void>(::madvise(data_, at(num_bytes), MADV_HUGEPAGE));
#endif
}

bool Arena::populate() const {
#ifdef MADV_POPULATE_WRITE
    return ::madvise(data_, at(num_bytes_), MADV_POPULATE_WRITE) == 0;
#else
    return false;
#endif
}

Arena::~Arena() {
    if (mapped_ != nullptr) {
        static_cast<void>(::munmap(mapped_, at(mapped_bytes_)));
    }
}

Arena::Arena(Arena&& other) noexcept
    : mapped_(std::exchange(other.mapped_, nullptr)),
      mapped_bytes_(std::exchange(other.mapped_bytes_, 0)),
      data_(std::exchange(other.data_, nullptr)),
      num_bytes_(std::exchange(other.num_bytes_, 0)) {}

}  // namespace nanoserve
