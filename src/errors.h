// The errors that callers tell apart by type. Everything else is a standard exception: invalid_argument
// becomes ValueError in Python, out_of_range IndexError, runtime_error RuntimeError.
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace nanoserve {

// Not enough free pages. Nothing was taken: free or preempt something and try again.
class PoolExhausted : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The operating system refused memory; a bad_alloc that says how much was asked for. MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
  public:
    explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
    [[nodiscard]] const char* what() const noexcept override { return message_.c_str(); }

  private:
    std::string message_;
};

}  // namespace nanoserve
