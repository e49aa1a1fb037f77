#include "cuda_kernel.h"

#include "checked.h"

namespace nanoserve::cuda {

namespace {

// CUfunction_attribute.
constexpr int kLocalBytes = 3, kNumRegisters = 4, kMaxDynamicShared = 8, kSharedCarveout = 9;
constexpr int kMostShared = 100;  // percent
constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr int kMaxBlock = 1024;

}  // namespace

Kernel::Kernel(std::shared_ptr<const Device> device, std::string_view image, std::string entry, int block,
               int shared_bytes, std::vector<TensorForm> tensors, bool starts_early)
    : device_(std::move(device)),
      entry_(std::move(entry)),
      block_(static_cast<unsigned>(block)),
      shared_bytes_(static_cast<unsigned>(shared_bytes)),
      tensors_(std::move(tensors)),
      starts_early_(starts_early) {
    require_range("block", block, 1, kMaxBlock);
    for (const TensorForm& form : tensors_) {
        validate(form);
    }
    if (shared_bytes < 0 || shared_bytes > device_->max_shared_bytes()) {
        throw std::invalid_argument(entry_ + ": " + std::to_string(shared_bytes) +
                                    " bytes of shared memory, a block of " + device_->name() + " can have " +
                                    std::to_string(device_->max_shared_bytes()));
    }
    device_->use();
    const std::string terminated(image);  // PTX is text that ends with a zero
    check(driver().module_load(&module_, terminated.c_str()),
          "loading " + entry_ + " on " + device_->name() + " (compute capability " +
              std::to_string(device_->capability() / 10) + "." + std::to_string(device_->capability() % 10) +
              ")");
    try {
        check(driver().module_function(&function_, module_, entry_.c_str()),
              "finding " + entry_ + " in its image");
        if (starts_early_) {
            // One division of a multiprocessor's memory for all: it is not changed while a block is there, so
            // that a kernel which wants another one could not begin early.
            check(driver().function_set_attribute(function_, kSharedCarveout, kMostShared),
                  entry_ + ": asking for the most shared memory");
        }
        if (shared_bytes > kSharedWithoutAsking) {
            check(driver().function_set_attribute(function_, kMaxDynamicShared, shared_bytes),
                  entry_ + ": asking for " + std::to_string(shared_bytes) + " bytes of shared memory");
        }
    } catch (...) {
        static_cast<void>(driver().module_unload(module_));
        throw;
    }
}

Kernel::~Kernel() {
    static_cast<void>(driver().module_unload(module_));
}

int Kernel::attribute(int number) const {
    int value = 0;
    check(driver().function_attribute(&value, number, function_), "cuFuncGetAttribute of " + entry_);
    return value;
}

int Kernel::num_registers() const {
    return attribute(kNumRegisters);
}

int Kernel::local_bytes() const {
    return attribute(kLocalBytes);
}

}  // namespace nanoserve::cuda
