#include "bind/bind.h"
#include "paged_attention.h"

namespace nanoserve::bind {

namespace {

void paged_attention(const KVCachePool& pool, std::int64_t layer, const py::array& q, const py::array& out,
                     const py::array& block_tables, const py::object& starts, const py::object& counts,
                     std::uintptr_t small_address, const Tiling& small_tiling, std::uintptr_t large_address,
                     const Tiling& large_tiling, ThreadPool& threads, std::int64_t window) {
    const std::int64_t dim = pool.shape().head_dim;
    for (const auto& [name, array] : {std::pair{"q", &q}, std::pair{"out", &out}}) {
        if (!py::isinstance<FloatArray>(*array)) {
            throw py::type_error(std::string(name) + " must be a C-contiguous float32 array");
        }
        if (array->ndim() != 3 || array->shape(2) != dim) {
            throw std::invalid_argument(std::string(name) + " has shape " + shape_text(*array) +
                                        ", must be [tokens, heads, " + std::to_string(dim) + "]");
        }
    }
    if (q.shape(0) != out.shape(0) || q.shape(1) != out.shape(1)) {
        throw std::invalid_argument("q has shape " + shape_text(q) + " but out has " + shape_text(out));
    }
    if (!py::isinstance<Int32Array>(block_tables) || block_tables.ndim() != 2) {
        throw py::type_error("block_tables must be a C-contiguous int32 array [sequences, max_pages]");
    }
    const std::vector<std::int32_t> start_list = int32_vector("starts", starts);
    const std::vector<std::int32_t> count_list = int32_vector("counts", counts);
    if (block_tables.shape(0) != std::ssize(start_list)) {
        throw std::invalid_argument("block_tables has shape " + shape_text(block_tables) + " but there are " +
                                    std::to_string(start_list.size()) + " starts");
    }
    py::array out_array = out;
    PagedAttention attention(
        pool, layer,
        {.q = static_cast<const float*>(q.data()),
         .out = static_cast<float*>(out_array.mutable_data()),  // throws when out is read-only
         .num_tokens = q.shape(0),
         .num_heads = q.shape(1),
         .block_tables = {static_cast<const std::int32_t*>(block_tables.data()), at(block_tables.size())},
         .max_pages = block_tables.shape(1),
         .starts = start_list,
         .counts = count_list},
        {.small = reinterpret_cast<Kernel>(small_address),
         .small_tiling = tiling_of(small_tiling),
         .large = reinterpret_cast<Kernel>(large_address),
         .large_tiling = tiling_of(large_tiling),
         .window = window},
        threads.num_threads());
    const py::gil_scoped_release unlocked;
    attention.run(threads);
}

}  // namespace

void populate_attention(py::module_& m) {
    m.def(
        "paged_attention", &paged_attention, py::arg("pool"), py::arg("layer"), py::arg("q"), py::arg("out"),
        py::arg("block_tables"), py::arg("starts"), py::arg("counts"), py::arg("small_address"),
        py::arg("small_tiling"), py::arg("large_address"), py::arg("large_tiling"), py::arg("threads"),
        py::arg("window") = 0,
        "Causal attention of q [tokens, heads, head_dim] over the pool's pages, written to out. Runs without "
        "Python's lock.");
}

}  // namespace nanoserve::bind
