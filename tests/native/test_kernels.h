// "Kernels" in plain C++ with the calling convention of the compiled ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "attention_work.h"

namespace test {

template <typename T>
T arg(void** args, int index) {
    return *static_cast<T*>(args[index]);
}

// Causal attention of one item after the other, in double precision. The sizes a compiled kernel has built in
// are template parameters here. An item with fewer than kMinRows or more than kMaxRows rows came to the wrong
// kernel: NaN.
template <int kGroup, int kHeads, int kDim, int kPageSize, int kQStride, int kOutStride, int kMinRows,
          int kMaxRows>
void attention(void** args) {
    const auto* q = arg<const float*>(args, 0);
    const auto* k = arg<const float*>(args, 1);
    const auto* v = arg<const float*>(args, 2);
    const auto* table = arg<const std::int32_t*>(args, 3);
    const auto* items = arg<const nanoserve::AttentionItem*>(args, 4);
    auto* out = arg<float*>(args, 5);
    for (std::int64_t i = arg<std::int64_t>(args, 6); i < arg<std::int64_t>(args, 7); ++i) {
        const nanoserve::AttentionItem& item = items[i];
        for (int r = 0; r < item.num_rows; ++r) {
            const int token = (item.r0 + r) / kGroup;
            const int head = item.kv_head * kGroup + (item.r0 + r) % kGroup;
            const int position = item.pos0 + token;
            const float* query = q + (item.q0 + token) * kQStride + head * kDim;
            float* result = out + (item.q0 + token) * kOutStride + head * kDim;
            std::vector<double> sum(kDim, 0.0);
            double total = item.num_rows < kMinRows || item.num_rows > kMaxRows ? std::nan("") : 0.0;
            for (int p = 0; p <= position; ++p) {
                const int page = table[item.table_off + p / kPageSize];
                const std::int64_t block = (std::int64_t{page} * kHeads + item.kv_head) * kDim * kPageSize;
                const int offset = p % kPageSize;
                double score = 0.0;
                for (int d = 0; d < kDim; ++d) {
                    score += double{query[d]} * double{k[block + d * kPageSize + offset]};
                }
                const double weight = std::exp(score);
                total += weight;
                for (int d = 0; d < kDim; ++d) {
                    sum[static_cast<std::size_t>(d)] += weight * double{v[block + offset * kDim + d]};
                }
            }
            for (int d = 0; d < kDim; ++d) {
                // += so that a row computed twice is as wrong as one left out.
                result[d] += static_cast<float>(sum[static_cast<std::size_t>(d)] / total);
            }
        }
    }
}

}  // namespace test
