// What the binding files share: one populate function per concept, and the conversions from Python's
// integers.
//
// Rule of this folder: everything from Python is checked here (type, shape, range), and again by the class
// that uses it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_work.h"
#include "checked.h"

namespace nanoserve::bind {

namespace py = pybind11;

void populate_pool(py::module_& m);
void populate_table(py::module_& m);
void populate_threads(py::module_& m);
void populate_executor(py::module_& m);
void populate_attention(py::module_& m);
void populate_weights(py::module_& m);
void populate_logits(py::module_& m);
void populate_cuda(py::module_& m);
void populate_cuda_tools(py::module_& m);

using FloatArray = py::array_t<float, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

// Page ids. What does not fit in 32 bits cannot be a page either, so it is the same IndexError.
[[nodiscard]] std::vector<std::int32_t> page_ids(const std::vector<std::int64_t>& values);

// A one-dimensional integer array or sequence as int64; floats and booleans are refused, not truncated.
[[nodiscard]] std::vector<std::int64_t> int_vector(const char* name, const py::handle& values);
// The same, narrowed to int32 with a range check.
[[nodiscard]] std::vector<std::int32_t> int32_vector(const char* name, const py::handle& values);

// A float32 array with this many dimensions; made contiguous if it is not. Other dtypes are refused by name.
[[nodiscard]] FloatArray float_array(const char* name, const py::handle& value, int ndim);

using Tiling = std::pair<std::int64_t, std::int64_t>;  // rows, tiles
[[nodiscard]] inline AttentionTiling tiling_of(const Tiling& tiling) {
    return {.rows = tiling.first, .tiles = tiling.second};
}

[[nodiscard]] std::string shape_text(const py::array& array);

}  // namespace nanoserve::bind
