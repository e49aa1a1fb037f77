// Tensor maps: memory as a tensor that a kernel's copies take boxes of (TMA, from compute capability 9.0 on).
//
// A kernel says of such an argument what it depends on, its form; the driver makes 128 opaque bytes of that
// and of where the memory is and how much of it there is. The bytes are a parameter of the launch, so that a
// graph keeps them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "kv_pool.h"

namespace nanoserve::cuda {

// As compiler/gpu/spec.py's TensorForm: dimensions from the innermost, the outermost without an end of its
// own.
struct TensorForm {
    std::size_t argument;  // of the kernel
    ElementType element;
    std::vector<std::int64_t> dims;     // elements, of all dimensions but the outermost
    std::vector<std::int64_t> strides;  // elements, of all dimensions but the innermost
    std::vector<std::int64_t> box;
    std::int64_t swizzle;  // bytes: 0, 32, 64, 128
};

// Throws invalid_argument unless its parts fit together; what the driver demands beside is for it to say.
void validate(const TensorForm& form);

class TensorMap {
  public:
    // Of so many bytes from `data` on. Throws CudaError when the driver refuses, DriverMissing when it has no
    // tensor maps, invalid_argument for less memory than the inner dimensions are; `what` names the argument.
    TensorMap(const TensorForm& form, DevicePtr data, std::int64_t num_bytes, const std::string& what);

    // The value of a launch's argument, which the driver only reads and yet takes as a void*.
    [[nodiscard]] void* value() const { return const_cast<std::byte*>(bytes_.data()); }

  private:
    alignas(64) std::array<std::byte, 128> bytes_{};  // CUtensorMap
};

}  // namespace nanoserve::cuda
