// A kernel on a device: loaded from a cubin (or PTX, which the driver then compiles), and how it is launched.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cuda_stream.h"
#include "cuda_tensor_map.h"

namespace nanoserve::cuda {

class Kernel {
  public:
    // tensors: which of its arguments it takes as tensor maps. starts_early: it waits by itself for the
    // kernels in front of it.
    // Throws CudaError when the image is not for this device, or has no such entry; invalid_argument for more
    // shared memory than the device gives.
    Kernel(std::shared_ptr<const Device> device, std::string_view image, std::string entry, int block,
           int shared_bytes, std::vector<TensorForm> tensors, bool starts_early = false);
    ~Kernel();
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    [[nodiscard]] Handle function() const { return function_; }
    [[nodiscard]] const std::string& entry() const { return entry_; }
    [[nodiscard]] unsigned block() const { return block_; }
    [[nodiscard]] unsigned shared_bytes() const { return shared_bytes_; }
    [[nodiscard]] const std::vector<TensorForm>& tensors() const { return tensors_; }
    // early: what is in front is a kernel, and this one may begin before it has ended, if it can.
    [[nodiscard]] LaunchShape shape(const std::array<unsigned, 3>& grid, bool early) const {
        return {.grid = grid,
                .block = block_,
                .shared_bytes = shared_bytes_,
                .early = early && starts_early_ && device_->starts_early()};
    }
    // As the driver has it: registers per thread, and bytes of them that a thread keeps in memory.
    [[nodiscard]] int num_registers() const;
    [[nodiscard]] int local_bytes() const;

  private:
    [[nodiscard]] int attribute(int number) const;

    std::shared_ptr<const Device> device_;
    std::string entry_;
    unsigned block_, shared_bytes_;
    std::vector<TensorForm> tensors_;
    bool starts_early_;
    Handle module_ = nullptr;
    Handle function_ = nullptr;
};

}  // namespace nanoserve::cuda
