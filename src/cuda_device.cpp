#include "cuda_device.h"

#include <array>
#include <stdexcept>

#include "checked.h"

namespace nanoserve::cuda {

namespace {

// CUdevice_attribute.
constexpr int kMultiprocessors = 16, kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxSharedOptIn = 97;
constexpr int kEarlyStartsInGraphs = 12030;  // version of the driver that captures them

}  // namespace

int Device::count() {
    int count = 0;
    check(driver().device_count(&count), "cuDeviceGetCount");
    return count;
}

Device::Device(int ordinal) : ordinal_(ordinal) {
    const Driver& cuda = driver();
    const int devices = count();
    if (ordinal < 0 || ordinal >= devices) {
        throw std::out_of_range("device " + std::to_string(ordinal) + ": there are " +
                                std::to_string(devices) + " CUDA devices");
    }
    check(cuda.device_get(&device_, ordinal), "cuDeviceGet");
    std::array<char, 256> name{};
    check(cuda.device_name(name.data(), static_cast<int>(name.size()) - 1, device_), "cuDeviceGetName");
    name_ = name.data();
    capability_ = 10 * attribute(kCapabilityMajor) + attribute(kCapabilityMinor);
    num_multiprocessors_ = attribute(kMultiprocessors);
    max_shared_bytes_ = attribute(kMaxSharedOptIn);
    int version = 0;
    check(cuda.driver_version(&version), "cuDriverGetVersion");
    starts_early_ = capability_ >= 90 && cuda.launch_with != nullptr && version >= kEarlyStartsInGraphs;
    check(cuda.primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain on " + name_);
}

Device::~Device() {
    if (context_ != nullptr) {
        static_cast<void>(driver().primary_context_release(device_));
    }
}

int Device::attribute(int number) const {
    int value = 0;
    check(driver().device_attribute(&value, number, device_), "cuDeviceGetAttribute");
    return value;
}

void Device::use() const {
    check(driver().context_set_current(context_), "cuCtxSetCurrent");
}

// A context that an error has spoiled frees nothing any more; its memory goes with the process.
void Device::free_memory(DevicePtr data) const noexcept {
    if (data != 0 && driver().context_set_current(context_) == 0) {
        static_cast<void>(driver().memory_free(data));
    }
}

void Device::free_pinned(void* data) const noexcept {
    if (data != nullptr && driver().context_set_current(context_) == 0) {
        static_cast<void>(driver().host_free(data));
    }
}

MemoryInfo Device::memory() const {
    use();
    std::size_t free = 0;
    std::size_t total = 0;
    check(driver().memory_info(&free, &total), "cuMemGetInfo");
    return {static_cast<std::int64_t>(free), static_cast<std::int64_t>(total)};
}

DeviceBlock::DeviceBlock(std::shared_ptr<const Device> device, const char* what, std::int64_t num_bytes)
    : device_(std::move(device)), num_bytes_(num_bytes) {
    require_at_least(what, num_bytes, 1);
    const MemoryInfo info = device_->memory();
    check(driver().memory_alloc(&data_, static_cast<std::size_t>(num_bytes)),
          std::string(what) + ": " + std::to_string(num_bytes) + " bytes on " + device_->name() + ", " +
              std::to_string(info.free) + " of " + std::to_string(info.total) + " are free");
}

DeviceBlock::~DeviceBlock() {
    if (device_ != nullptr) {
        device_->free_memory(data_);
    }
}

PinnedBlock::PinnedBlock(std::shared_ptr<const Device> device, const char* what, std::int64_t num_bytes)
    : device_(std::move(device)), num_bytes_(num_bytes) {
    require_at_least(what, num_bytes, 1);
    device_->use();
    check(driver().host_alloc(&data_, static_cast<std::size_t>(num_bytes), 0),
          std::string(what) + ": " + std::to_string(num_bytes) + " bytes of pinned memory");
}

PinnedBlock::~PinnedBlock() {
    device_->free_pinned(data_);
}

}  // namespace nanoserve::cuda
