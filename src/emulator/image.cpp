#include "image.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace nvemu {

namespace {

constexpr char kMagic[8] = {'N', 'V', 'E', 'M', 'U', 'I', 'M', 'G'};
constexpr std::uint64_t kMaxBytes = 256 * 1024 * 1024;

bool write_all(int fd, const char* data, std::uint64_t num_bytes) {
    while (num_bytes > 0) {
        const ssize_t written = write(fd, data, num_bytes);
        if (written <= 0) {
            return false;
        }
        data += written;
        num_bytes -= static_cast<std::uint64_t>(written);
    }
    return true;
}

}  // namespace

Image load_image(const void* bytes, std::string& reason) {
    const auto* data = static_cast<const char*>(bytes);
    if (std::memcmp(data, kMagic, sizeof kMagic) != 0) {
        reason = "not an image for the emulator (a cubin, or PTX?)";
        return {};
    }
    std::uint64_t num_bytes = 0;
    std::memcpy(&num_bytes, data + sizeof kMagic, sizeof num_bytes);
    if (num_bytes > kMaxBytes) {
        reason = "the image says that it has " + std::to_string(num_bytes) + " bytes: damaged";
        return {};
    }
    Image image;
    // The file stays open: another image at the same path would be taken for this one.
    image.fd = memfd_create("nvemu-image", MFD_CLOEXEC);
    if (image.fd < 0 || !write_all(image.fd, data + sizeof kMagic + sizeof num_bytes, num_bytes)) {
        reason = "no memory for an image";
    } else {
        const std::string path = "/proc/self/fd/" + std::to_string(image.fd);
        image.library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (image.library == nullptr) {
            const char* error = dlerror();
            reason =
                std::string("the image cannot be loaded: ") + (error != nullptr ? error : "no reason given");
        } else {
            image.table = static_cast<const ModuleTable*>(dlsym(image.library, "nvemu_module"));
        }
    }
    if (image.library != nullptr && (image.table == nullptr || image.table->abi_version != kAbiVersion)) {
        reason = "the image was made for another version of the emulator";
        image.table = nullptr;
    }
    if (image.table == nullptr) {
        unload_image(image);
        return {};
    }
    return image;
}

void unload_image(const Image& image) {
    if (image.library != nullptr) {
        dlclose(image.library);
    }
    if (image.fd >= 0) {
        close(image.fd);
    }
}

}  // namespace nvemu

NVEMU_EXPORT nvemu::Image* nvemu_load_image(const void* bytes, char* message, std::uint64_t size) {
    std::string reason;
    const nvemu::Image image = nvemu::load_image(bytes, reason);
    if (image.table == nullptr) {
        std::snprintf(message, size, "%s", reason.c_str());
        return nullptr;
    }
    return new nvemu::Image(image);
}

NVEMU_EXPORT void nvemu_unload_image(nvemu::Image* image) {
    nvemu::unload_image(*image);
    delete image;
}

NVEMU_EXPORT const nvemu::ModuleTable* nvemu_module_table(const nvemu::Image* image) {
    return image->table;
}
