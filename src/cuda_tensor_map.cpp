#include "cuda_tensor_map.h"

#include <stdexcept>

#include "checked.h"

namespace nanoserve::cuda {

namespace {

constexpr int kFloat32 = 7, kBfloat16 = 9;  // CUtensorMapDataType
constexpr int kNoInterleave = 0, kZeros = 0;
constexpr int kLines128 = 2;  // CU_TENSOR_MAP_L2_PROMOTION_L2_128B: the row of a swizzled box
constexpr std::size_t kMaxRank = 5;

// CUtensorMapSwizzle, and the bytes it spans.
int swizzle_of(std::int64_t bytes) {
    switch (bytes) {
        case 0:
            return 0;
        case 32:
            return 1;
        case 64:
            return 2;
        case 128:
            return 3;
        default:
            throw std::invalid_argument("a tensor map's swizzle spans 0, 32, 64 or 128 bytes, not " +
                                        std::to_string(bytes));
    }
}

}  // namespace

void validate(const TensorForm& form) {
    const std::size_t rank = form.box.size();
    if (rank < 2 || rank > kMaxRank || form.dims.size() != rank - 1 || form.strides.size() != rank - 1) {
        throw std::invalid_argument(
            "a tensor map has a box of 2 to 5 dimensions, an extent for each but the outermost, and a stride "
            "for each but the innermost");
    }
    for (const auto* numbers : {&form.dims, &form.strides, &form.box}) {
        for (const std::int64_t number : *numbers) {
            require_range("a number of a tensor map", number, 1, std::int64_t{1} << 40);
        }
    }
    static_cast<void>(swizzle_of(form.swizzle));
}

TensorMap::TensorMap(const TensorForm& form, DevicePtr data, std::int64_t num_bytes,
                     const std::string& what) {
    validate(form);
    if (driver().tensor_map_tiled == nullptr) {
        throw DriverMissing(what +
                            ": the CUDA driver has no cuTensorMapEncodeTiled, it is older than CUDA 12.0");
    }
    const std::size_t rank = form.box.size();
    std::array<std::uint64_t, kMaxRank> dims{}, strides{};
    std::array<std::uint32_t, kMaxRank> box{}, steps{};
    for (std::size_t d = 0; d < rank; ++d) {
        box[d] = narrow<std::uint32_t>(form.box[d]);
        steps[d] = 1;
        if (d + 1 < rank) {
            dims[d] = static_cast<std::uint64_t>(form.dims[d]);
            strides[d] = static_cast<std::uint64_t>(form.strides[d] * element_bytes(form.element));
        }
    }
    dims[rank - 1] = static_cast<std::uint64_t>(num_bytes) / strides[rank - 2];
    if (dims[rank - 1] == 0) {
        throw std::invalid_argument(what + ": " + std::to_string(num_bytes) +
                                    " bytes are less than one of its tensor map's outermost parts, " +
                                    std::to_string(strides[rank - 2]));
    }
    check(driver().tensor_map_tiled(bytes_.data(), form.element == ElementType::bf16 ? kBfloat16 : kFloat32,
                                    static_cast<std::uint32_t>(rank), data, dims.data(), strides.data(),
                                    box.data(), steps.data(), kNoInterleave, swizzle_of(form.swizzle),
                                    kLines128, kZeros),
          what + ": cuTensorMapEncodeTiled");
}

}  // namespace nanoserve::cuda
