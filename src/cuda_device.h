// A GPU, what can be asked of it, and the blocks of memory it gives.
//
// The context is the device's primary one, which other users of CUDA in this process (PyTorch) share, so that
// pointers mean the same to all. Contexts are per thread: whoever calls the driver calls `use` first.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "cuda_driver.h"

namespace nanoserve::cuda {

struct MemoryInfo {
    std::int64_t free, total;
};

class Device {
  public:
    // Throws DriverMissing, or out_of_range when there is no such device.
    explicit Device(int ordinal);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    [[nodiscard]] static int count();

    void use() const;  // makes the context current in this thread
    void free_memory(DevicePtr data) const noexcept;
    void free_pinned(void* data) const noexcept;

    [[nodiscard]] int ordinal() const { return ordinal_; }
    [[nodiscard]] const std::string& name() const { return name_; }
    // 90 for compute capability 9.0.
    [[nodiscard]] int capability() const { return capability_; }
    [[nodiscard]] int num_multiprocessors() const { return num_multiprocessors_; }
    // Dynamic shared memory a block may ask for.
    [[nodiscard]] int max_shared_bytes() const { return max_shared_bytes_; }
    // Whether a kernel can be launched before the one in front of it has ended, also into a graph: compute
    // capability 9.0, and a driver of CUDA 12.3.
    [[nodiscard]] bool starts_early() const { return starts_early_; }
    [[nodiscard]] MemoryInfo memory() const;

  private:
    [[nodiscard]] int attribute(int number) const;

    const int ordinal_;
    int device_ = 0;
    Handle context_ = nullptr;
    std::string name_;
    int capability_ = 0, num_multiprocessors_ = 0, max_shared_bytes_ = 0;
    bool starts_early_ = false;
};

// A block of device memory, uninitialised; freed with this object.
class DeviceBlock {
  public:
    // `what` names it in the error when there is not enough.
    DeviceBlock(std::shared_ptr<const Device> device, const char* what, std::int64_t num_bytes);
    ~DeviceBlock();
    DeviceBlock(DeviceBlock&& other) noexcept
        : device_(std::move(other.device_)),
          data_(std::exchange(other.data_, 0)),
          num_bytes_(std::exchange(other.num_bytes_, 0)) {}
    DeviceBlock& operator=(DeviceBlock&&) = delete;
    DeviceBlock(const DeviceBlock&) = delete;
    DeviceBlock& operator=(const DeviceBlock&) = delete;

    [[nodiscard]] DevicePtr data() const { return data_; }
    [[nodiscard]] std::int64_t num_bytes() const { return num_bytes_; }

  private:
    std::shared_ptr<const Device> device_;
    DevicePtr data_ = 0;
    std::int64_t num_bytes_;
};

// Host memory that the device copies from and to by itself.
class PinnedBlock {
  public:
    PinnedBlock(std::shared_ptr<const Device> device, const char* what, std::int64_t num_bytes);
    ~PinnedBlock();
    PinnedBlock(const PinnedBlock&) = delete;
    PinnedBlock& operator=(const PinnedBlock&) = delete;

    [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(data_); }
    [[nodiscard]] std::int64_t num_bytes() const { return num_bytes_; }

  private:
    std::shared_ptr<const Device> device_;
    void* data_ = nullptr;
    std::int64_t num_bytes_;
};

}  // namespace nanoserve::cuda
