#include "arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "checked.h"
#include "errors.h"

namespace nanoserve {

Arena::Arena(const char* what, std::int64_t num_bytes) : num_bytes_(num_bytes) {
    require_at_least(what, num_bytes, 1);
    void* memory = ::mmap(nullptr, at(num_bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw OutOfMemory(std::string(what) + ": the system refused " + std::to_string(num_bytes) +
                          " bytes (" + std::strerror(errno) + ")");
    }
    data_ = static_cast<std::byte*>(memory);
#ifdef MADV_HUGEPAGE
    // Advice only: attention reads scattered pages, and large TLB entries are worth about a tenth of its
    // time.
    static_cast<void>(::madvise(memory, at(num_bytes), MADV_HUGEPAGE));
#endif
}

Arena::~Arena() {
    if (data_ != nullptr) {
        static_cast<void>(::munmap(data_, at(num_bytes_)));
    }
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

}  // namespace nanoserve
