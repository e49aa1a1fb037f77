#include "tensor_map.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>

namespace nvemu {

namespace {

constexpr std::uint64_t kMagic = 0x50414D524F534E54;  // "TNSORMAP"
constexpr std::uint32_t kAlignment = 64;              // of a tensor map
constexpr std::uint32_t kLine = 16;                   // bytes that addresses and strides are multiples of
constexpr std::uint64_t kMaxDim = std::uint64_t{1} << 32, kMaxStride = std::uint64_t{1} << 40;
constexpr std::uint32_t kMaxBox = 256, kMaxElementStride = 8, kMaxPromotion = 3;
constexpr std::uint32_t kFirstFloat = 6;  // of the data types
constexpr std::array<std::uint8_t, 13> kElementBytes = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr std::array<std::uint32_t, 4> kSpans = {0, 32, 64, 128};  // bytes, by swizzle

std::string about(const char* what, std::uint64_t value, const char* rule) {
    return std::string(what) + " = " + std::to_string(value) + ": " + rule;
}

// What the manual of cuTensorMapEncodeTiled demands; empty when it is satisfied.
std::string refusal(const TensorMapRequest& r, const void* out) {
    if (reinterpret_cast<std::uintptr_t>(out) % kAlignment != 0) {
        return "the tensor map must be aligned to 64 bytes";
    }
    if (r.data_type >= kElementBytes.size()) {
        return about("tensorDataType", r.data_type, "no such type");
    }
    if (r.rank == 0 || r.rank > kMaxTensorRank) {
        return about("tensorRank", r.rank, "must be 1 to 5");
    }
    if (r.interleave != 0) {
        return about("interleave", r.interleave, "is not emulated");
    }
    if (r.swizzle >= kSpans.size()) {
        return about("swizzle", r.swizzle, "no such swizzle");
    }
    if (r.l2_promotion > kMaxPromotion) {
        return about("l2Promotion", r.l2_promotion, "no such promotion");
    }
    if (r.oob_fill > 1 || (r.oob_fill == 1 && r.data_type < kFirstFloat)) {
        return about("oobFill", r.oob_fill, "0, or 1 of floating-point numbers");
    }
    if (r.oob_fill == 1) {
        return "a fill of NaN is not emulated";
    }
    if (r.address == 0 || r.address % kLine != 0) {
        return about("globalAddress", r.address, "must be a multiple of 16");
    }
    for (std::uint32_t d = 0; d < r.rank; ++d) {
        if (r.dims[d] == 0 || r.dims[d] > kMaxDim) {
            return about("globalDim", r.dims[d], "must be 1 to 2^32");
        }
        if (r.box[d] == 0 || r.box[d] > kMaxBox) {
            return about("boxDim", r.box[d], "must be 1 to 256");
        }
        if (r.element_strides[d] == 0 || r.element_strides[d] > kMaxElementStride) {
            return about("elementStrides", r.element_strides[d], "must be 1 to 8");
        }
        if (r.element_strides[d] != 1) {
            return about("elementStrides", r.element_strides[d], "only 1 is emulated");
        }
        if (d > 0 && (r.strides[d - 1] % kLine != 0 || r.strides[d - 1] >= kMaxStride)) {
            return about("globalStrides", r.strides[d - 1], "must be a multiple of 16, less than 2^40");
        }
    }
    const std::uint64_t inner = std::uint64_t{r.box[0]} * kElementBytes[r.data_type];
    if (inner % kLine != 0) {
        return about("boxDim[0] in bytes", inner, "must be a multiple of 16");
    }
    if (kSpans[r.swizzle] != 0 && inner > kSpans[r.swizzle]) {
        return about("boxDim[0] in bytes", inner, "must not be more than the swizzle spans");
    }
    return {};
}

}  // namespace

std::uint32_t TensorMap::checksum(const Fields& fields) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&fields);
    std::uint32_t sum = 0x811C9DC5;  // FNV-1a
    for (std::size_t i = 0; i < offsetof(Fields, checksum); ++i) {
        sum = (sum ^ bytes[i]) * 0x01000193;
    }
    return sum;
}

bool TensorMap::encode(const TensorMapRequest& request, void* out, std::string& reason) {
    reason = refusal(request, out);
    if (!reason.empty()) {
        return false;
    }
    Fields fields;
    std::memset(&fields, 0, sizeof fields);  // the gaps as well: all of it is summed
    fields.magic = kMagic;
    fields.address = request.address;
    fields.rank = static_cast<std::uint8_t>(request.rank);
    fields.element_bytes = kElementBytes[request.data_type];
    fields.swizzle = static_cast<std::uint8_t>(request.swizzle);
    for (std::uint32_t d = 0; d < kMaxTensorRank; ++d) {
        const bool given = d < request.rank;
        fields.strides[d] = d == 0 ? fields.element_bytes : given ? request.strides[d - 1] : 0;
        fields.last[d] = given ? static_cast<std::uint32_t>(request.dims[d] - 1) : 0;
        fields.box[d] = given ? static_cast<std::uint16_t>(request.box[d]) : 1;
    }
    fields.checksum = checksum(fields);
    std::memset(out, 0, kTensorMapBytes);
    std::memcpy(out, &fields, sizeof fields);
    return true;
}

bool TensorMap::decode(const void* bytes) {
    std::memcpy(&fields_, bytes, sizeof fields_);
    return fields_.magic == kMagic && fields_.checksum == checksum(fields_);
}

std::uint32_t TensorMap::box_bytes() const {
    std::uint32_t bytes = element_bytes();
    for (const std::uint16_t extent : fields_.box) {
        bytes *= extent;
    }
    return bytes;
}

std::uint64_t TensorMap::row(const std::array<std::int64_t, kMaxTensorRank>& at) const {
    std::uint64_t address = fields_.address;
    for (std::uint32_t d = 1; d < kMaxTensorRank; ++d) {
        if (at[d] < 0 || at[d] > std::int64_t{fields_.last[d]}) {
            return 0;
        }
        address += static_cast<std::uint64_t>(at[d]) * fields_.strides[d];
    }
    return address;
}

TensorMap::Inside TensorMap::inside(std::int64_t first) const {
    const std::int64_t begin = std::max(first, std::int64_t{0});
    const std::int64_t end = std::min(first + std::int64_t{box(0)}, std::int64_t{fields_.last[0]} + 1);
    return {begin, std::max(begin, end)};
}

}  // namespace nvemu

NVEMU_EXPORT std::int32_t nvemu_encode_tensor_map(const nvemu::TensorMapRequest* request, void* out,
                                                  char* message, std::uint64_t size) {
    std::string reason;
    if (nvemu::TensorMap::encode(*request, out, reason)) {
        return 0;
    }
    std::snprintf(message, size, "%s", reason.c_str());
    return 1;
}
