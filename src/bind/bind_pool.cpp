#include "bind/bind.h"
#include "kv_pool.h"

namespace nanoserve::bind {

namespace {

using PageList = std::vector<std::int64_t>;

// K and V of one layer over the pool's own memory; the pool lives for as long as any view does. The strides
// undo the layout: [num_pages, page_size, num_heads, head_dim] float32. bfloat16's pairs are axes of their
// own, K [num_pages, page_size, num_heads, head_dim / 2, 2] and V [num_pages, page_size / 2, 2, num_heads,
// head_dim], uint16.
py::tuple layer_views(const py::object& self, std::int64_t layer) {
    using Sizes = std::vector<py::ssize_t>;
    const auto& pool = self.cast<const KVCachePool&>();
    const PoolShape& s = pool.shape();
    const py::ssize_t item = element_bytes(s.element);
    const py::ssize_t head = 2 * pool.head_bytes();
    const py::ssize_t page = pool.layer_page_bytes();
    std::byte* const k = pool.k_layer(layer);
    std::byte* const v = pool.v_layer(layer);
    if (s.element == ElementType::f32) {
        const Sizes shape = {s.num_pages, s.page_size, s.num_heads, s.head_dim};
        return py::make_tuple(
            py::array(py::dtype::of<float>(), shape, Sizes{page, item, head, s.page_size * item}, k, self),
            py::array(py::dtype::of<float>(), shape, Sizes{page, s.head_dim * item, head, item}, v, self));
    }
    const py::ssize_t pair = 2 * item;
    return py::make_tuple(py::array(py::dtype::of<std::uint16_t>(),
                                    Sizes{s.num_pages, s.page_size, s.num_heads, s.head_dim / 2, 2},
                                    Sizes{page, pair, head, s.page_size * pair, item}, k, self),
                          py::array(py::dtype::of<std::uint16_t>(),
                                    Sizes{s.num_pages, s.page_size / 2, 2, s.num_heads, s.head_dim},
                                    Sizes{page, s.head_dim * pair, item, head, pair}, v, self));
}

void store_kv(KVCachePool& pool, const py::object& k, const py::object& v, const py::object& slots,
              std::int64_t layer) {
    const FloatArray k_rows = float_array("k", k, 3);
    const FloatArray v_rows = float_array("v", v, 3);
    const std::vector<std::int64_t> slot_ids = int_vector("slots", slots);
    const PoolShape& s = pool.shape();
    for (const auto& [name, rows] : {std::pair{"k", &k_rows}, std::pair{"v", &v_rows}}) {
        if (rows->shape(0) != std::ssize(slot_ids) || rows->shape(1) != s.num_heads ||
            rows->shape(2) != s.head_dim) {
            throw std::invalid_argument(std::string(name) + " has shape " + shape_text(*rows) +
                                        ", must be [" + std::to_string(slot_ids.size()) + ", " +
                                        std::to_string(s.num_heads) + ", " + std::to_string(s.head_dim) +
                                        "] (slots, num_heads, head_dim)");
        }
    }
    pool.store_kv({k_rows.data(), static_cast<std::size_t>(k_rows.size())},
                  {v_rows.data(), static_cast<std::size_t>(v_rows.size())}, slot_ids, layer);
}

py::dict stats_dict(const KVCachePool& pool) {
    const PoolStats stats = pool.stats();
    py::dict out;
    out["num_pages"] = stats.num_pages;
    out["free"] = stats.free;
    out["used"] = stats.used;
    out["shared"] = stats.shared;
    out["bytes_total"] = stats.bytes_total;
    out["bytes_used"] = stats.bytes_used;
    out["tokens_held"] = stats.tokens_held;
    out["tokens_capacity_used"] = stats.tokens_capacity_used;
    out["internal_fragmentation"] = stats.internal_fragmentation;
    return out;
}

std::vector<std::string> audit(const KVCachePool& pool, const std::vector<PageList>& holders) {
    std::vector<std::vector<std::int32_t>> narrowed;
    narrowed.reserve(holders.size());
    for (const PageList& holder : holders) {
        narrowed.push_back(page_ids(holder));
    }
    return pool.audit(narrowed);
}

}  // namespace

void populate_pool(py::module_& m) {
    py::class_<KVCachePool, std::shared_ptr<KVCachePool>>(m, "KVCachePool",
                                                          "Pages of keys and values, and who holds which.")
        .def(py::init([](std::int64_t num_pages, std::int64_t page_size, std::int64_t num_layers,
                         std::int64_t num_heads, std::int64_t head_dim, const std::string& element) {
                 return std::make_shared<KVCachePool>(PoolShape{.num_pages = num_pages,
                                                                .page_size = page_size,
                                                                .num_layers = num_layers,
                                                                .num_heads = num_heads,
                                                                .head_dim = head_dim,
                                                                .element = element_from_name(element)});
             }),
             py::arg("num_pages"), py::arg("page_size") = 16, py::arg("num_layers") = 1,
             py::arg("num_heads") = 1, py::arg("head_dim") = 16, py::arg("element") = "f32",
             "element: what keys and values are kept as, f32 or bf16.")
        .def_property_readonly("element",
                               [](const KVCachePool& p) { return element_name(p.shape().element); })
        .def_property_readonly("num_pages", [](const KVCachePool& p) { return p.shape().num_pages; })
        .def_property_readonly("page_size", [](const KVCachePool& p) { return p.shape().page_size; })
        .def_property_readonly("num_layers", [](const KVCachePool& p) { return p.shape().num_layers; })
        .def_property_readonly("num_heads", [](const KVCachePool& p) { return p.shape().num_heads; })
        .def_property_readonly("head_dim", [](const KVCachePool& p) { return p.shape().head_dim; })
        .def_property_readonly("num_free_pages", &KVCachePool::num_free_pages)
        .def_property_readonly("num_used_pages", &KVCachePool::num_used_pages)
        .def_property_readonly("bytes_total", &KVCachePool::bytes_total)
        .def_property_readonly("page_bytes", &KVCachePool::page_bytes)
        .def("allocate", &KVCachePool::allocate, py::arg("num_tokens"),
             "The lowest free pages that hold num_tokens; PoolExhausted when there are too few.")
        .def("allocate_pages", &KVCachePool::allocate_pages, py::arg("num_pages"))
        .def(
            "ref", [](KVCachePool& p, const PageList& pages) { p.ref(page_ids(pages)); }, py::arg("pages"),
            "Takes one more reference on each page; every page must be in use.")
        .def(
            "unref", [](KVCachePool& p, const PageList& pages) { return p.unref(page_ids(pages)); },
            py::arg("pages"), "Drops one reference on each page; returns the pages that became free.")
        .def(
            "free", [](KVCachePool& p, const PageList& pages) { return p.unref(page_ids(pages)); },
            py::arg("pages"), "The same as unref. On an error nothing has changed.")
        .def("ref_count", &KVCachePool::ref_count, py::arg("page"))
        .def("pages_needed", &KVCachePool::pages_needed, py::arg("num_tokens"))
        .def("can_allocate", &KVCachePool::can_allocate, py::arg("num_tokens"))
        .def("store_kv", &store_kv, py::arg("k"), py::arg("v"), py::arg("slots"), py::arg("layer"),
             "Writes k and v [n, num_heads, head_dim] into slots (page_id * page_size + offset).")
        .def("get_layer_cache", &layer_views, py::arg("layer"),
             "(k, v), both [num_pages, page_size, num_heads, head_dim]: writable views, no copy. Of bf16, "
             "uint16: "
             "k [num_pages, page_size, num_heads, head_dim / 2, 2], v [num_pages, page_size / 2, 2, "
             "num_heads, "
             "head_dim].")
        .def("copy_page", &KVCachePool::copy_page, py::arg("page"),
             "A new page with the same content in all layers.")
        .def("populate", &KVCachePool::populate, py::call_guard<py::gil_scoped_release>(),
             "Takes all of the pool's memory from the system now instead of page by page; False where it "
             "cannot.")
        .def(
            "scrub", [](KVCachePool& p, const PageList& pages) { p.scrub(page_ids(pages)); },
            py::arg("pages"),
            "Zeroes the pages in all layers, so that no non-finite value outlives its request.")
        .def("stats", &stats_dict)
        .def("audit", &audit, py::arg("holders") = std::vector<PageList>{},
             "Problems found, one line each: every page must be free, or have as many references as holders.")
        .def("__repr__", [](const KVCachePool& p) {
            return "KVCachePool(num_pages=" + std::to_string(p.shape().num_pages) +
                   ", page_size=" + std::to_string(p.shape().page_size) +
                   ", free=" + std::to_string(p.num_free_pages()) + ")";
        });
}

}  // namespace nanoserve::bind
