// Loaded modules and their kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "emulator/image.h"

namespace fake_cuda {

class Module {
  public:
    // `image` is one that nvemu_load_image gave.
    explicit Module(nvemu::Image* image) : image_(image), table_(nvemu_module_table(image)) {}
    ~Module() { nvemu_unload_image(image_); }
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    [[nodiscard]] const nvemu::ModuleTable* table() const { return table_; }

    bool is_unloaded = false;  // by the program; graphs may still hold on to it

  private:
    nvemu::Image* image_;
    const nvemu::ModuleTable* table_;
};

struct Function {
    std::shared_ptr<Module> module;
    const nvemu::KernelEntry* entry = nullptr;
    int max_dynamic_bytes = 0;  // what launches may ask for
};

// A launch with its parameters as they were when it was asked for.
struct KernelLaunch {
    std::shared_ptr<Function> function;
    std::uint32_t grid[3] = {};
    std::uint32_t block[3] = {};
    std::uint32_t shared_bytes = 0;
    std::vector<std::vector<std::byte>> params;

    [[nodiscard]] std::vector<void*> pointers() {
        std::vector<void*> all;
        for (std::vector<std::byte>& param : params) {
            all.push_back(param.data());
        }
        return all;
    }
};

}  // namespace fake_cuda
