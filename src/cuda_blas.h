// cuBLAS, found at run time as the driver is: matrix products by the library instead of a kernel of ours.
//
// Work goes into one stream, and scratch memory is given once, so a product allocates nothing and can be
// captured in a graph. The library chooses among its algorithms by the number of rows: a row's bits may
// depend on how many others there are.
//
// What is declared here is its binary interface (cuBLAS manual, "Using the cuBLAS API").
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "cuda_stream.h"
#include "kv_pool.h"

namespace nanoserve::cuda {

// No library was found that has what is needed: says what was looked for.
class BlasMissing : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A call of the library failed: says which, and cuBLAS's name for it.
class BlasError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// y[rows][n] = scale * x[rows][k] w[n][k]^T (+ y). Strides are elements from row to row.
struct ProductShape {
    std::int64_t n, k;
    std::int64_t ldx, ldw, ldy;
    ElementType element;    // of x and w; float32 is multiplied as such, not as TF32
    ElementType y_element;  // bfloat16 only of a bfloat16 x
    float scale;
    bool residual;
};

// Throws invalid_argument unless every size fits the library.
void validate(const std::string& name, const ProductShape& shape);

class Blas {
  public:
    // The first of `paths` that can be loaded: files, or names for the loader to find.
    Blas(std::shared_ptr<Stream> stream, std::span<const std::string> paths);
    ~Blas();
    Blas(const Blas&) = delete;
    Blas& operator=(const Blas&) = delete;

    // Into the stream; no rows are nothing to do. The device's context must be current.
    void multiply(const std::string& name, const ProductShape& shape, DevicePtr x, DevicePtr w, DevicePtr y,
                  std::int64_t rows);

    // Device memory of its own: the size NVIDIA recommends for Hopper.
    static constexpr std::int64_t kWorkspaceBytes = std::int64_t{32} << 20;

    [[nodiscard]] const std::string& path() const { return path_; }
    // 130100 for 13.1.0.
    [[nodiscard]] int version() const { return version_; }

  private:
    struct Library;

    void check(int status, const std::string& what) const;

    std::shared_ptr<Stream> stream_;
    std::string path_;
    std::unique_ptr<const Library> library_;
    DeviceBlock workspace_;
    Handle handle_ = nullptr;
    int version_ = 0;
};

}  // namespace nanoserve::cuda
