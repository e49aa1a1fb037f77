// How a compiled kernel is called: void f(void** args), where args[i] points at the i-th argument (a pointer
// or an int64) and the last two are `begin, end`, the range of work units of this call.
//
// The values the arguments point at are shared by all threads and do not change during a step; only begin and
// end are a thread's own. Kernels must not throw (they are compiled code) and must give the same bits for any
// split.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace nanoserve {

using Kernel = void (*)(void**);

class KernelCall {
  public:
    static constexpr std::size_t kMaxArgs = 30;

    explicit KernelCall(std::span<void* const> args) {
        if (args.size() > kMaxArgs) {
            throw std::invalid_argument("a kernel has too many arguments");
        }
        std::copy(args.begin(), args.end(), argv_.begin());
        argv_[args.size()] = &begin_;
        argv_[args.size() + 1] = &end_;
    }
    KernelCall(const KernelCall&) = delete;  // argv_ points into this object
    KernelCall& operator=(const KernelCall&) = delete;

    void operator()(Kernel kernel, std::int64_t begin, std::int64_t end) {
        if (begin < end) {
            begin_ = begin;
            end_ = end;
            kernel(argv_.data());
        }
    }

  private:
    std::int64_t begin_ = 0;
    std::int64_t end_ = 0;
    std::array<void*, kMaxArgs + 2> argv_;
};

}  // namespace nanoserve
