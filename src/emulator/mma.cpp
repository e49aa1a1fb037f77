// mma.sync: D = A * B + C by one warp, each lane holding a fragment of every matrix.
//
// A is m16 x k, B is k x n8, C and D are m16 x n8 in float. With g = lane / 4 and t = lane % 4, a register of
// two 16-bit elements holds: A registers (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); B
// registers (2t.., g), (2t + 8.., g); C and D (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). A tf32
// register holds one element: t and t + 4 in the place of 2t.. and 2t + 8...
//
// The order of summation is fixed: d = c, then k ascending, each product (exact: two 11-bit significands at
// most) added with one rounding to float. Tensor cores sum several products at once and round differently;
// what they promise, and what a test may rely on, is that a row's result depends on that row alone.
#include "collective.h"
#include "element.h"
#include "runtime.h"

namespace nvemu {

namespace {

constexpr std::uint32_t kM = 16;
constexpr std::uint32_t kN = 8;
constexpr std::uint32_t kMaxK = 16;

struct Operands {
    float a[kM][kMaxK];
    float b[kMaxK][kN];
    float d[kM][kN];
};

void multiply(Operands& x, std::uint32_t num_k) {
    for (std::uint32_t m = 0; m < kM; ++m) {
        for (std::uint32_t k = 0; k < num_k; ++k) {
            for (std::uint32_t n = 0; n < kN; ++n) {
                x.d[m][n] += x.a[m][k] * x.b[k][n];
            }
        }
    }
}

// Calls visit(register, half, m or n, k) for every element of A (rows: 2) or B (rows: 1) that a lane holds.
template <bool kPacked, std::uint32_t kRows, typename Visit>
void for_each_element(std::uint32_t lane, std::uint32_t num_registers, const Visit& visit) {
    const std::uint32_t g = lane / 4;
    const std::uint32_t t = lane % 4;
    for (std::uint32_t r = 0; r < num_registers; ++r) {
        const std::uint32_t outer = g + 8 * (r % kRows);
        if constexpr (kPacked) {
            visit(r, 0u, outer, 2 * t + 8 * (r / kRows));
            visit(r, 1u, outer, 2 * t + 1 + 8 * (r / kRows));
        } else {
            visit(r, 0u, outer, t + 4 * (r / kRows));
        }
    }
}

template <bool kPacked, typename Convert>
void run(const Collective& warp, std::uint32_t num_a, std::uint32_t num_b, const Convert& convert) {
    Operands x;
    for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
        const auto* in = static_cast<const std::uint32_t*>(warp.in[lane]);
        for_each_element<kPacked, 2>(lane, num_a, [&](auto r, auto half, auto m, auto k) {
            x.a[m][k] = convert(in[r] >> (16 * half));
        });
        for_each_element<kPacked, 1>(lane, num_b, [&](auto r, auto half, auto n, auto k) {
            x.b[k][n] = convert(in[num_a + r] >> (16 * half));
        });
        for (std::uint32_t r = 0; r < 4; ++r) {
            x.d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2] = std::bit_cast<float>(in[num_a + num_b + r]);
        }
    }
    multiply(x, (kPacked ? 8 : 4) * num_b);
    for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
        auto* out = static_cast<std::uint32_t*>(warp.out[lane]);
        for (std::uint32_t r = 0; r < 4; ++r) {
            out[r] = std::bit_cast<std::uint32_t>(x.d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2]);
        }
    }
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_mma(std::uint32_t line, std::uint32_t shape, const std::uint32_t* in,
                            std::uint32_t* out) {
    collect_warp("mma.sync", line, in, out, [shape](const Collective& warp) {
        const auto bf16 = [](std::uint32_t bits) { return from_bf16(static_cast<std::uint16_t>(bits)); };
        const auto f16 = [](std::uint32_t bits) { return from_f16(static_cast<std::uint16_t>(bits)); };
        switch (static_cast<MmaShape>(shape)) {
            case MmaShape::kBf16K16:
                return run<true>(warp, 4, 2, bf16);
            case MmaShape::kF16K16:
                return run<true>(warp, 4, 2, f16);
            case MmaShape::kTf32K8:
                return run<false>(warp, 4, 2, from_tf32);
            case MmaShape::kBf16K8:
                return run<true>(warp, 2, 1, bf16);
            case MmaShape::kF16K8:
                return run<true>(warp, 2, 1, f16);
            case MmaShape::kTf32K4:
                return run<false>(warp, 2, 1, from_tf32);
        }
    });
}
