// A module image: what cuModuleLoadData gets here in the place of a cubin.
//
//     bytes 0..7    "NVEMUIMG"
//     bytes 8..15   length of what follows, little endian
//     bytes 16..    a shared object that exports nvemu_module and imports the functions of runtime.h
//
// Loading maps the shared object from memory; the code runs as it is, nothing is compiled here.
#pragma once

#include <cstdint>
#include <string>

#include "abi.h"

namespace nvemu {

struct Image {
    const ModuleTable* table = nullptr;
    void* library = nullptr;
    int fd = -1;
};

// A table of null, and why in `reason`, when these bytes are no image for this emulator.
Image load_image(const void* bytes, std::string& reason);
void unload_image(const Image& image);

}  // namespace nvemu

// For callers in other languages: an opaque handle, or null with the reason in message[0 .. size).
NVEMU_EXPORT nvemu::Image* nvemu_load_image(const void* bytes, char* message, std::uint64_t size);
NVEMU_EXPORT void nvemu_unload_image(nvemu::Image* image);
NVEMU_EXPORT const nvemu::ModuleTable* nvemu_module_table(const nvemu::Image* image);
