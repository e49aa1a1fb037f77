// Tensor maps: what the driver checks, and an encoding that the emulator reads.
#include "driver.h"
#include "emulator/tensor_map.h"

using namespace fake_cuda;

namespace {

constexpr int kFirstCapability = 9;  // major

}  // namespace

FAKE_CUDA_EXPORT Result cuTensorMapEncodeTiled(void* tensor_map, std::uint32_t data_type, std::uint32_t rank,
                                               void* address, const std::uint64_t* dims,
                                               const std::uint64_t* strides, const std::uint32_t* box,
                                               const std::uint32_t* element_strides, std::uint32_t interleave,
                                               std::uint32_t swizzle, std::uint32_t l2_promotion,
                                               std::uint32_t oob_fill) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (driver.device.major < kFirstCapability) {
            return driver.fail(kFeatureNotSupported, "tensor maps are for compute capability 9.0 and higher");
        }
        const nvemu::TensorMapRequest request{.data_type = data_type,
                                              .rank = rank,
                                              .address = reinterpret_cast<std::uint64_t>(address),
                                              .dims = dims,
                                              .strides = strides,
                                              .box = box,
                                              .element_strides = element_strides,
                                              .interleave = interleave,
                                              .swizzle = swizzle,
                                              .l2_promotion = l2_promotion,
                                              .oob_fill = oob_fill};
        char reason[512];
        if (nvemu_encode_tensor_map(&request, tensor_map, reason, sizeof reason) != 0) {
            return driver.fail(kInvalidValue, reason);
        }
        return kSuccess;
    });
}
