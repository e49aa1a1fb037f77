#include "cuda_blas.h"

#include <dlfcn.h>

#include <limits>

#include "checked.h"

namespace nanoserve::cuda {

namespace {

// cublasOperation_t, cudaDataType, cublasComputeType_t and cublasGemmAlgo_t.
constexpr int kAsIs = 0, kTransposed = 1;
constexpr int kFloat32 = 0, kBfloat16 = 14;
constexpr int kCompute32F = 68;  // of float32, IEEE float32: TF32 is a type of its own
constexpr int kDefaultAlgorithm = -1;
// What the manual recommends for Hopper; older chips need less.

int data_type(ElementType element) {
    return element == ElementType::f32 ? kFloat32 : kBfloat16;
}

void* open(const std::string& path) {
    // A wheel's library needs its other half, which lies beside it.
    constexpr std::string_view kName = "libcublas.so";
    if (const std::size_t name = path.rfind(kName); name != std::string::npos && name > 0) {
        std::string half = path;
        half.replace(name, kName.size(), "libcublasLt.so");
        static_cast<void>(::dlopen(half.c_str(), RTLD_NOW | RTLD_LOCAL));
    }
    return ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
}

}  // namespace

struct Blas::Library {
    // Throws BlasMissing when it lacks one of them.
    Library(void* library, const std::string& path);

    int (*create)(Handle*);
    int (*destroy)(Handle);
    int (*version)(Handle, int*);
    int (*set_stream)(Handle, Handle);
    int (*set_workspace)(Handle, void*, std::size_t);
    const char* (*status_name)(int);
    int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                const void*, void*, int, int, int, int);
};

Blas::Library::Library(void* library, const std::string& path) {
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
        if (function == nullptr) {
            throw BlasMissing("cuBLAS " + path + " has no " + name + ": it is too old");
        }
    };
    find(create, "cublasCreate_v2");
    find(destroy, "cublasDestroy_v2");
    find(version, "cublasGetVersion_v2");
    find(set_stream, "cublasSetStream_v2");
    find(set_workspace, "cublasSetWorkspace_v2");
    find(status_name, "cublasGetStatusName");
    find(gemm, "cublasGemmEx");
}

void validate(const std::string& name, const ProductShape& shape) {
    constexpr std::int64_t kMost = std::numeric_limits<int>::max();
    require_range("n", shape.n, 1, kMost);
    require_range("k", shape.k, 1, kMost);
    require_range("ldx", shape.ldx, shape.k, kMost);
    require_range("ldw", shape.ldw, shape.k, kMost);
    require_range("ldy", shape.ldy, shape.n, kMost);
    if (shape.element == ElementType::f32 && shape.y_element != ElementType::f32) {
        throw std::invalid_argument(name + ": cuBLAS gives float32 of float32");
    }
}

Blas::Blas(std::shared_ptr<Stream> stream, std::span<const std::string> paths)
    : stream_(std::move(stream)), workspace_(stream_->device(), "cuBLAS's workspace", kWorkspaceBytes) {
    std::string reasons;
    void* library = nullptr;  // never closed: it has threads and handlers of its own
    for (const std::string& path : paths) {
        library = open(path);
        if (library != nullptr) {
            path_ = path;
            break;
        }
        const char* const why = ::dlerror();
        reasons += "\n  " + (why != nullptr ? std::string(why) : path);
    }
    if (library == nullptr) {
        throw BlasMissing("no cuBLAS: it comes with PyTorch for CUDA, or NANOSERVE_CUBLAS names it; tried" +
                          (reasons.empty() ? " nothing" : reasons));
    }
    library_ = std::make_unique<const Library>(library, path_);
    stream_->device()->use();
    check(library_->create(&handle_), "cublasCreate of " + path_);
    try {
        check(library_->version(handle_, &version_), "cublasGetVersion");
        check(library_->set_stream(handle_, stream_->handle()), "cublasSetStream");
        // After the stream: setting that takes the workspace back.
        check(library_->set_workspace(handle_, reinterpret_cast<void*>(workspace_.data()),
                                      at(workspace_.num_bytes())),
              "cublasSetWorkspace of " + std::to_string(workspace_.num_bytes()) + " bytes");
    } catch (...) {
        static_cast<void>(library_->destroy(handle_));
        throw;
    }
}

Blas::~Blas() {
    try {
        stream_->device()->use();
        static_cast<void>(library_->destroy(handle_));
    } catch (const std::exception&) {  // the context is spoiled: there is nothing left to give back
    }
}

void Blas::check(int status, const std::string& what) const {
    if (status != 0) {
        const char* const name = library_->status_name(status);
        throw BlasError(what + ": " + (name != nullptr ? name : "an unknown status") + " (" +
                        std::to_string(status) + ")");
    }
}

void Blas::multiply(const std::string& name, const ProductShape& shape, DevicePtr x, DevicePtr w, DevicePtr y,
                    std::int64_t rows) {
    if (rows == 0) {
        return;
    }
    // To the library, whose matrices are columns, ours are transposed: y^T[n][rows] = w[n][k] x^T[k][rows].
    const float alpha = shape.scale;
    const float beta = shape.residual ? 1.0F : 0.0F;
    const int type = data_type(shape.element);
    const auto pointer = [](DevicePtr data) { return reinterpret_cast<void*>(data); };
    const int status = library_->gemm(
        handle_, kTransposed, kAsIs, narrow<int>(shape.n), narrow<int>(rows), narrow<int>(shape.k), &alpha,
        pointer(w), type, narrow<int>(shape.ldw), pointer(x), type, narrow<int>(shape.ldx), &beta, pointer(y),
        data_type(shape.y_element), narrow<int>(shape.ldy), kCompute32F, kDefaultAlgorithm);
    if (status != 0) {
        check(status, "cublasGemmEx of " + name + ", " + std::to_string(rows) +
                          " rows, n=" + std::to_string(shape.n) + ", k=" + std::to_string(shape.k));
    }
}

}  // namespace nanoserve::cuda
