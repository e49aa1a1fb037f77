// The part of cuBLAS that a decoder's matrix products need, on the emulated device: to be loaded in the place
// of libcublas.so. Written down from the cuBLAS manual.
//
// Sums are float64, rounded once. It is stricter than the library where that depends on its version: during a
// capture, a handle without a workspace cannot multiply, and neither can one that has not yet multiplied such
// matrices, because kernels may be loaded then.
#include <bit>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>

#include "device_work.h"
#include "emulator/abi.h"

using namespace fake_cuda;

FAKE_CUDA_EXPORT Result cuCtxGetCurrent(void** context);
FAKE_CUDA_EXPORT Result cuStreamIsCapturing(void* stream, int* status);

namespace {

using Status = int;  // cublasStatus_t
constexpr Status kOk = 0, kNoHandle = 1, kAllocFailed = 3, kInvalid = 7, kExecutionFailed = 13,
                 kNotSupported = 15;
constexpr int kFloat32 = 0, kBfloat16 = 14;  // cudaDataType
constexpr int kTransposed = 1;               // cublasOperation_t; 0 is not
constexpr int kCompute32F = 68, kCompute32FPedantic = 69;
constexpr int kDefaultAlgorithm = -1;

struct Matrix {
    std::uint64_t data;
    int type;
    int stride;  // elements from column to column
    bool transposed;

    [[nodiscard]] std::uint64_t place(std::int64_t row, std::int64_t column) const {
        return static_cast<std::uint64_t>(transposed ? row * stride + column : column * stride + row);
    }
    [[nodiscard]] double load(std::int64_t row, std::int64_t column) const {
        const std::uint64_t at = place(row, column);
        if (type == kFloat32) {
            return reinterpret_cast<const float*>(data)[at];
        }
        const std::uint32_t bits = reinterpret_cast<const std::uint16_t*>(data)[at];
        return std::bit_cast<float>(bits << 16);
    }
    void store(std::int64_t row, std::int64_t column, double value) const {
        const std::uint64_t at = place(row, column);
        const auto rounded = static_cast<float>(value);
        if (type == kFloat32) {
            reinterpret_cast<float*>(data)[at] = rounded;
            return;
        }
        const auto bits = std::bit_cast<std::uint32_t>(rounded);
        const std::uint32_t even = bits + 0x7FFF + (bits >> 16 & 1);
        reinterpret_cast<std::uint16_t*>(data)[at] =
            static_cast<std::uint16_t>(std::isnan(rounded) ? 0x7FFF : even >> 16);
    }
    // Whether it lies in one allocation, rows x columns of it as they are multiplied.
    [[nodiscard]] bool is_allocated(int rows, int columns) const {
        const std::uint64_t size = type == kFloat32 ? sizeof(float) : sizeof(std::uint16_t);
        const std::uint64_t bytes = (place(rows - 1, columns - 1) + 1) * size;
        return data % size == 0 && nvemu_is_allocated(reinterpret_cast<const void*>(data), bytes) != 0;
    }
    [[nodiscard]] bool is_wide_enough(int rows, int columns) const {
        return stride >= (transposed ? columns : rows);
    }
};

struct Product {
    int m, n, k;
    float alpha, beta;
    Matrix a, b, c;

    [[nodiscard]] bool is_allocated() const {
        return a.is_allocated(m, k) && b.is_allocated(k, n) && c.is_allocated(m, n);
    }
    void run() const {
        for (int column = 0; column < n; ++column) {
            for (int row = 0; row < m; ++row) {
                double sum = 0;
                for (int i = 0; i < k; ++i) {
                    sum += a.load(row, i) * b.load(i, column);
                }
                sum *= alpha;
                // With a beta of zero, what is there is not read, and may be no number.
                c.store(row, column, beta == 0 ? sum : sum + beta * c.load(row, column));
            }
        }
    }
};

struct Context {
    void* stream = nullptr;
    bool has_workspace = false;
    std::set<std::tuple<int, int, int, int, int>> known;  // shapes and types that were multiplied
};

std::mutex lock;
std::map<void*, std::unique_ptr<Context>> contexts;

template <typename Body>
Status with(void* handle, const Body& body) {
    const std::lock_guard guard(lock);
    const auto found = contexts.find(handle);
    return found == contexts.end() ? kNoHandle : body(*found->second);
}

Status multiply(Context& context, const Product& product) {
    int capturing = 0;
    if (cuStreamIsCapturing(context.stream, &capturing) != kSuccess) {
        return kInvalid;
    }
    const auto shape = std::tuple(product.m, product.n, product.k, product.a.type, product.c.type);
    if (capturing == 0) {
        context.known.insert(shape);
    } else if (!context.has_workspace) {
        return kAllocFailed;
    } else if (!context.known.contains(shape)) {
        return kExecutionFailed;
    }
    const auto run = [](void* data) {
        const auto& job = *static_cast<const Product*>(data);
        if (!job.is_allocated()) {
            return kIllegalAddress;  // freed since
        }
        job.run();
        return kSuccess;
    };
    const auto release = [](void* data) { delete static_cast<Product*>(data); };
    return fake_cuda_enqueue(context.stream, run, new Product(product), release) == kSuccess
               ? kOk
               : kExecutionFailed;
}

}  // namespace

FAKE_CUDA_EXPORT Status cublasCreate_v2(void** handle) {
    void* current = nullptr;
    if (cuCtxGetCurrent(&current) != kSuccess || current == nullptr) {
        return kNoHandle;
    }
    const std::lock_guard guard(lock);
    auto made = std::make_unique<Context>();
    *handle = made.get();
    contexts[*handle] = std::move(made);
    return kOk;
}

FAKE_CUDA_EXPORT Status cublasDestroy_v2(void* handle) {
    const std::lock_guard guard(lock);
    return contexts.erase(handle) != 0 ? kOk : kNoHandle;
}

FAKE_CUDA_EXPORT Status cublasGetVersion_v2(void* handle, int* version) {
    return with(handle, [&](Context&) {
        *version = 130000;
        return kOk;
    });
}

FAKE_CUDA_EXPORT Status cublasSetStream_v2(void* handle, void* stream) {
    return with(handle, [&](Context& context) {
        context.stream = stream;
        context.has_workspace = false;
        return kOk;
    });
}

FAKE_CUDA_EXPORT Status cublasSetWorkspace_v2(void* handle, void* workspace, std::size_t num_bytes) {
    return with(handle, [&](Context& context) {
        const bool aligned = reinterpret_cast<std::uintptr_t>(workspace) % 256 == 0;
        if (!aligned || nvemu_is_allocated(workspace, num_bytes) == 0) {
            return kInvalid;
        }
        context.has_workspace = true;
        return kOk;
    });
}

FAKE_CUDA_EXPORT const char* cublasGetStatusName(Status status) {
    switch (status) {
        case kOk:
            return "CUBLAS_STATUS_SUCCESS";
        case kNoHandle:
            return "CUBLAS_STATUS_NOT_INITIALIZED";
        case kAllocFailed:
            return "CUBLAS_STATUS_ALLOC_FAILED";
        case kInvalid:
            return "CUBLAS_STATUS_INVALID_VALUE";
        case kExecutionFailed:
            return "CUBLAS_STATUS_EXECUTION_FAILED";
        case kNotSupported:
            return "CUBLAS_STATUS_NOT_SUPPORTED";
        default:
            return "cublas unknown status";
    }
}

FAKE_CUDA_EXPORT Status cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                     const void* alpha, const void* a, int a_type, int lda, const void* b,
                                     int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                                     int compute_type, int algorithm) {
    return with(handle, [&](Context& context) {
        const auto matrix = [](const void* data, int type, int stride, int operation) {
            return Matrix{reinterpret_cast<std::uint64_t>(data), type, stride, operation == kTransposed};
        };
        if (transpose_a < 0 || transpose_a > 1 || transpose_b < 0 || transpose_b > 1 || m < 0 || n < 0 ||
            k < 0) {
            return kInvalid;
        }
        const bool narrow = a_type == kBfloat16 && (c_type == kBfloat16 || c_type == kFloat32);
        const bool wide = a_type == kFloat32 && c_type == kFloat32;
        if (a_type != b_type || !(narrow || wide) ||
            (compute_type != kCompute32F && compute_type != kCompute32FPedantic) ||
            algorithm != kDefaultAlgorithm) {
            return kNotSupported;
        }
        if (m == 0 || n == 0) {
            return kOk;
        }
        const Product product{m,
                              n,
                              k,
                              *static_cast<const float*>(alpha),
                              *static_cast<const float*>(beta),
                              matrix(a, a_type, lda, transpose_a),
                              matrix(b, b_type, ldb, transpose_b),
                              matrix(c, c_type, ldc, 0)};
        if (k == 0 || !product.a.is_wide_enough(m, k) || !product.b.is_wide_enough(k, n) ||
            !product.c.is_wide_enough(m, n)) {
            return kInvalid;
        }
        // A GPU would say so later, and break the context; here nothing is done.
        return product.is_allocated() ? multiply(context, product) : kExecutionFailed;
    });
}
