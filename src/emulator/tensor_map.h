// A tensor map: what TMA, the copy engine of sm_90, knows of a tensor in global memory.
//
// On a GPU its 128 bytes are opaque: cuTensorMapEncodeTiled makes them, a kernel hands them to the
// instruction. So here, in an encoding of our own; whoever reads one demands that it was made by encode() and
// nothing has changed it since.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "abi.h"

namespace nvemu {

inline constexpr std::uint32_t kTensorMapBytes = 128;
inline constexpr std::uint32_t kMaxTensorRank = 5;

// As cuTensorMapEncodeTiled takes them; dimension 0 is the innermost, whose stride is an element.
struct TensorMapRequest {
    std::uint32_t data_type;  // CUtensorMapDataType
    std::uint32_t rank;
    std::uint64_t address;
    const std::uint64_t* dims;     // elements
    const std::uint64_t* strides;  // bytes, of dimensions 1 to rank - 1
    const std::uint32_t* box;
    const std::uint32_t* element_strides;
    std::uint32_t interleave;
    std::uint32_t swizzle;
    std::uint32_t l2_promotion;
    std::uint32_t oob_fill;
};

class TensorMap {
  public:
    enum Swizzle : std::uint8_t { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };

    // Into 128 bytes. What the driver refuses is refused: false, and why in `reason`.
    static bool encode(const TensorMapRequest& request, void* out, std::string& reason);
    // False when these bytes are no tensor map.
    bool decode(const void* bytes);

    [[nodiscard]] std::uint32_t rank() const { return fields_.rank; }
    [[nodiscard]] std::uint32_t element_bytes() const { return fields_.element_bytes; }
    [[nodiscard]] std::uint8_t swizzle() const { return fields_.swizzle; }
    [[nodiscard]] std::uint32_t box(std::uint32_t d) const { return fields_.box[d]; }
    [[nodiscard]] std::uint32_t box_bytes() const;
    // Bytes of a row of the box, which are neighbours in both memories.
    [[nodiscard]] std::uint32_t row_bytes() const { return box(0) * element_bytes(); }
    // Where the row that begins at these coordinates lies; 0 when it is outside the tensor.
    [[nodiscard]] std::uint64_t row(const std::array<std::int64_t, kMaxTensorRank>& at) const;
    // The part of [first, first + box(0)) that is inside, in elements: [begin, end).
    struct Inside {
        std::int64_t begin, end;
    };
    [[nodiscard]] Inside inside(std::int64_t first) const;

  private:
    struct Fields {
        std::uint64_t magic;
        std::uint64_t address;
        std::uint64_t strides[kMaxTensorRank];  // bytes; of dimension 0: an element
        std::uint32_t last[kMaxTensorRank];     // index: a dimension may have 2^32 elements
        std::uint16_t box[kMaxTensorRank];
        std::uint8_t rank, element_bytes, swizzle, unused;
        std::uint32_t checksum;  // of all before
    };
    static_assert(sizeof(Fields) <= kTensorMapBytes);
    static std::uint32_t checksum(const Fields& fields);

    Fields fields_{};
};

}  // namespace nvemu

// For other languages: 0, or 1 with the reason in message[0 .. size).
NVEMU_EXPORT std::int32_t nvemu_encode_tensor_map(const nvemu::TensorMapRequest* request, void* out,
                                                  char* message, std::uint64_t size);
