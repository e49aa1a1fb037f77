// The part of the driver API's vocabulary that is implemented, written down from the CUDA Driver API manual:
// no header of the toolkit is needed to build this.
#pragma once

#include <cstddef>
#include <cstdint>

#define FAKE_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake_cuda {

using Result = int;  // CUresult

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNotInitialized = 3;
inline constexpr Result kInvalidDevice = 101;
inline constexpr Result kInvalidImage = 200;
inline constexpr Result kInvalidContext = 201;
inline constexpr Result kInvalidHandle = 400;
inline constexpr Result kNotFound = 500;
inline constexpr Result kNotReady = 600;
inline constexpr Result kIllegalAddress = 700;
inline constexpr Result kLaunchOutOfResources = 701;
inline constexpr Result kLaunchTimeout = 702;
inline constexpr Result kHostMemoryAlreadyRegistered = 712;
inline constexpr Result kHostMemoryNotRegistered = 713;
inline constexpr Result kIllegalInstruction = 715;
inline constexpr Result kMisalignedAddress = 716;
inline constexpr Result kLaunchFailed = 719;
inline constexpr Result kFeatureNotSupported = 801;
inline constexpr Result kStreamCaptureUnsupported = 900;
inline constexpr Result kStreamCaptureInvalidated = 901;
inline constexpr Result kStreamCaptureUnmatched = 903;
inline constexpr Result kStreamCaptureUnjoined = 904;
inline constexpr Result kStreamCaptureImplicit = 906;
inline constexpr Result kStreamCaptureWrongThread = 908;

inline constexpr std::uintptr_t kLegacyStream = 1;  // as is a null handle
inline constexpr std::uintptr_t kPerThreadStream = 2;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;

inline constexpr int kDeviceMemory = 2;               // CU_MEMORYTYPE_DEVICE
inline constexpr std::size_t kMaxPitch = 2147483647;  // CU_DEVICE_ATTRIBUTE_MAX_PITCH

struct Memcpy3D {  // CUDA_MEMCPY3D
    struct Side {
        std::size_t x_bytes, y, z, lod;
        int memory_type;
        const void* host;
        std::uint64_t device;
        void* array;
        void* reserved;
        std::size_t pitch, height;
    };
    Side source, destination;
    std::size_t width_bytes, height, depth;
};

enum class CaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };

}  // namespace fake_cuda
