// "Kernels" in plain C++ with the calling convention of the compiled ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "attention_work.h"

namespace test {

template <typename T>
T arg(void** args, int index) {
    return *static_cast<T*>(args[index]);
}

// What a compiled kernel has built in.
struct AttentionSizes {
    int group, heads, dim, page_size, q_stride, out_stride, max_heads, max_rows;
};

// Causal attention of one item after the other, in double precision. An item with more heads or rows than
// kSizes says came to the wrong kernel: NaN. Parts hold [row][dim + 1] numbers, fewer than the real ones.
template <AttentionSizes kSizes>
void attention(void** args) {
    constexpr int kDim = kSizes.dim, kPage = kSizes.page_size;
    const auto* q = arg<const float*>(args, 0);
    const auto* k = arg<const float*>(args, 1);
    const auto* v = arg<const float*>(args, 2);
    const auto* table = arg<const std::int32_t*>(args, 3);
    const auto* items = arg<const nanoserve::AttentionItem*>(args, 4);
    auto* parts = arg<float*>(args, 5);
    auto* out = arg<float*>(args, 6);
    for (std::int64_t i = arg<std::int64_t>(args, 7); i < arg<std::int64_t>(args, 8); ++i) {
        const nanoserve::AttentionItem& item = items[i];
        const bool is_wrong = item.num_heads > kSizes.max_heads || item.num_rows > kSizes.max_rows;
        for (int row = 0; row < item.num_heads * item.num_rows; ++row) {
            const int kv_head = item.kv_head + row / item.num_rows;
            const int r = item.r0 + row % item.num_rows;
            const int head = kv_head * kSizes.group + r % kSizes.group;
            const int position = item.pos0 + r / kSizes.group;
            const int batch_row = item.q0 + r / kSizes.group;
            const float* query = q + batch_row * kSizes.q_stride + head * kDim;
            const auto part_of = [&](int segment) {
                return parts + (item.part + std::int64_t{segment} * item.part_stride) * 16 + row * (kDim + 1);
            };
            std::vector<double> sum(kDim + 1, 0.0), total(kDim + 1, 0.0);  // the last is that of the weights
            const auto merge = [&](const float* segment) {
                std::transform(total.begin(), total.end(), segment, total.begin(), std::plus<>());
            };
            for (int segment = item.first_segment; segment < item.end_segment; ++segment) {
                const int begin = segment * static_cast<int>(nanoserve::kSegmentTokens);
                const int end = std::min(position + 1, begin + static_cast<int>(nanoserve::kSegmentTokens));
                for (int p = begin; p < end; ++p) {
                    const int page = table[item.table_off + p / kPage];
                    const std::int64_t block =
                        (std::int64_t{page} * kSizes.heads + kv_head) * 2 * kDim * kPage;
                    double score = 0.0;
                    for (int d = 0; d < kDim; ++d) {
                        score += double{query[d]} * double{k[block + d * kPage + p % kPage]};
                    }
                    const double weight = std::exp(score);
                    for (int d = 0; d < kDim; ++d) {
                        sum[static_cast<std::size_t>(d)] += weight * double{v[block + p % kPage * kDim + d]};
                    }
                    sum[kDim] += weight;
                }
                const std::vector<float> rounded(sum.begin(), sum.end());
                std::fill(sum.begin(), sum.end(), 0.0);
                if (item.part >= 0) {
                    std::copy(rounded.begin(), rounded.end(), part_of(segment - item.first_segment));
                } else {
                    merge(rounded.data());
                }
            }
            for (int part = 0; part < item.num_parts; ++part) {
                merge(part_of(part));
            }
            float* result = out + batch_row * kSizes.out_stride + head * kDim;
            for (int d = 0; d < kDim && (item.part < 0 || item.num_parts > 0); ++d) {
                // += so that a row computed twice is as wrong as one left out.
                const double value = total[static_cast<std::size_t>(d)] / total[kDim];
                result[d] += is_wrong ? std::nanf("") : static_cast<float>(value);
            }
        }
    }
}

}  // namespace test
