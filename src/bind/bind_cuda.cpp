#include "bind/bind.h"
#include "cuda_step.h"

namespace nanoserve::bind {

namespace {

using cuda::Arg;
using cuda::CudaStep;
using cuda::Device;
using cuda::DevicePages;
using cuda::Extent;
using cuda::Kernel;
using cuda::Limits;
using cuda::Stream;
using cuda::TensorForm;

// ("buffer", 3), ("ids",) ...
Arg arg_of(const py::tuple& value) {
    if (value.empty() || value.size() > 2) {
        throw std::invalid_argument("an argument is (source,) or (source, index)");
    }
    return {.source = cuda::source_from_name(value[0].cast<std::string>()),
            .index = value.size() == 2 ? value[1].cast<std::int64_t>() : 0};
}

// (scalar argument, per, times)
Extent extent_of(const py::tuple& value) {
    if (value.size() != 3) {
        throw std::invalid_argument("an extent of a grid is (argument, per, times)");
    }
    return {.scalar = arg_of(value[0].cast<py::tuple>()),
            .per = value[1].cast<std::int64_t>(),
            .times = value[2].cast<std::int64_t>()};
}

std::array<Extent, 3> grid_of(const std::vector<py::tuple>& extents) {
    std::array<Extent, 3> grid;
    if (extents.size() > grid.size()) {
        throw std::invalid_argument("a grid has at most 3 dimensions");
    }
    for (std::size_t axis = 0; axis < extents.size(); ++axis) {
        grid[axis] = extent_of(extents[axis]);
    }
    return grid;
}

// (argument, element, dims, strides, box, swizzle)
using TensorTuple = std::tuple<std::int64_t, std::string, std::vector<std::int64_t>,
                               std::vector<std::int64_t>, std::vector<std::int64_t>, std::int64_t>;

std::vector<TensorForm> tensors_of(const std::vector<TensorTuple>& tuples) {
    std::vector<TensorForm> forms;
    for (const auto& [argument, element, dims, strides, box, swizzle] : tuples) {
        require_range("argument of a tensor map", argument, 0, std::int64_t{cuda::kMaxArgs} - 1);
        forms.push_back({.argument = static_cast<std::size_t>(argument),
                         .element = element_from_name(element),
                         .dims = dims,
                         .strides = strides,
                         .box = box,
                         .swizzle = swizzle});
    }
    return forms;
}

using VariantTuple = std::tuple<std::int64_t, std::shared_ptr<Kernel>, std::vector<py::tuple>>;

void add_op(CudaStep& step, const std::string& name, const std::vector<VariantTuple>& variants,
            const std::vector<py::tuple>& args, const py::tuple& over) {
    cuda::Op op{.name = name, .variants = {}, .over = arg_of(over), .args = {}};
    for (const auto& [most, kernel, grid] : variants) {
        op.variants.push_back({.most = most, .kernel = kernel, .grid = grid_of(grid)});
    }
    for (const py::tuple& arg : args) {
        op.args.push_back(arg_of(arg));
    }
    step.op(std::move(op));
}

void add_product(CudaStep& step, const std::string& name, const py::tuple& x, const py::tuple& weight,
                 const py::tuple& y, const py::tuple& rows, std::int64_t n, std::int64_t k, std::int64_t ldx,
                 std::int64_t ldw, std::int64_t ldy, const std::string& element, const std::string& y_element,
                 float scale, bool residual) {
    step.product({.name = name,
                  .shape = {.n = n,
                            .k = k,
                            .ldx = ldx,
                            .ldw = ldw,
                            .ldy = ldy,
                            .element = element_from_name(element),
                            .y_element = element_from_name(y_element),
                            .scale = scale,
                            .residual = residual},
                  .x = arg_of(x),
                  .w = arg_of(weight),
                  .y = arg_of(y),
                  .rows = arg_of(rows)});
}

py::tuple load_blas(CudaStep& step, const std::vector<std::string>& paths) {
    const cuda::Blas& blas = step.load_blas(paths);
    return py::make_tuple(blas.path(), blas.version());
}

std::span<const std::byte> bytes_of(const py::array& array) {
    if ((array.flags() & py::array::c_style) == 0 || array.size() == 0) {
        throw std::invalid_argument("a weight of shape " + shape_text(array) +
                                    " must be C-contiguous, and not empty");
    }
    return {static_cast<const std::byte*>(array.data()), static_cast<std::size_t>(array.nbytes())};
}

std::int64_t start(CudaStep& step, const py::object& input_ids, const py::sequence& tables,
                   const py::object& starts, const py::object& counts, const py::object& sample_rows,
                   std::int64_t vocab, const std::optional<py::object>& position_offsets,
                   const std::optional<FloatArray>& draws, const std::optional<Int32Array>& draw_ints,
                   const std::optional<py::object>& sources) {
    std::vector<const PageTable*> table_list;
    table_list.reserve(tables.size());
    for (const py::handle table : tables) {
        table_list.push_back(table.cast<const PageTable*>());
    }
    const auto optional_vector = [](const char* name, const std::optional<py::object>& values) {
        return values ? int32_vector(name, *values) : std::vector<std::int32_t>{};
    };
    const std::vector<std::int32_t> ids = int32_vector("input_ids", input_ids);
    const std::vector<std::int32_t> start_list = int32_vector("starts", starts);
    const std::vector<std::int32_t> count_list = int32_vector("counts", counts);
    const std::vector<std::int32_t> sample_list = int32_vector("sample_rows", sample_rows);
    const std::vector<std::int32_t> offset_list = optional_vector("position_offsets", position_offsets);
    const std::vector<std::int32_t> source_list = optional_vector("sources", sources);
    require_range("vocab", vocab, step.limits().vocab, step.limits().vocab);
    const auto elements = [](const auto& array) {
        using Element = typename std::decay_t<decltype(*array)>::value_type;
        return array ? std::span<const Element>(array->data(), static_cast<std::size_t>(array->size()))
                     : std::span<const Element>{};
    };
    step.prepare({.input_ids = ids,
                  .tables = table_list,
                  .starts = start_list,
                  .counts = count_list,
                  .sample_rows = sample_list,
                  .vocab = vocab,
                  .position_offsets = offset_list},
                 {.draws = elements(draws), .draw_ints = elements(draw_ints), .sources = source_list});
    const py::gil_scoped_release unlocked;
    return step.start();
}

py::array_t<std::int32_t> finish(CudaStep& step, std::int64_t number) {
    std::span<const std::int32_t> tokens;
    {
        const py::gil_scoped_release unlocked;
        tokens = step.finish(number);
    }
    return py::array_t<std::int32_t>(std::ssize(tokens), tokens.data());
}

py::tuple read_logits(CudaStep& step, std::int64_t number, const py::object& samples) {
    const std::vector<std::int32_t> chosen = int32_vector("samples", samples);
    const auto rows = std::ssize(chosen);
    py::array_t<float> logits(std::vector<py::ssize_t>{rows, step.limits().logits_stride});
    py::array_t<float> block_max(std::vector<py::ssize_t>{rows, step.limits().num_blocks});
    float* const data = logits.mutable_data();
    float* const block_data = block_max.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        step.read_logits(number, chosen, data, block_data);
    }
    return py::make_tuple(std::move(logits), std::move(block_max));
}

std::shared_ptr<KVCachePool> make_pool(std::shared_ptr<Stream> stream, std::int64_t num_pages,
                                       std::int64_t page_size, std::int64_t num_layers,
                                       std::int64_t num_heads, std::int64_t head_dim,
                                       const std::string& element) {
    const PoolShape shape{.num_pages = num_pages,
                          .page_size = page_size,
                          .num_layers = num_layers,
                          .num_heads = num_heads,
                          .head_dim = head_dim,
                          .element = element_from_name(element)};
    return std::make_shared<KVCachePool>(shape, std::make_unique<DevicePages>(std::move(stream), shape));
}

// Keys or values of a layer, as they lie: [num_pages, num_heads, page_size, head_dim], bfloat16 as uint16.
py::array read_layer(const KVCachePool& pool, std::int64_t layer, bool values) {
    const auto* const pages = dynamic_cast<const DevicePages*>(&pool.memory());
    if (pages == nullptr) {
        throw std::invalid_argument("the pages of this pool are not on a device");
    }
    const PoolShape& s = pool.shape();
    const py::dtype dtype =
        s.element == ElementType::f32 ? py::dtype::of<float>() : py::dtype::of<std::uint16_t>();
    py::array out(dtype, std::vector<py::ssize_t>{s.num_pages, s.num_heads, s.page_size, s.head_dim});
    pages->read(values ? pages->values(layer) : pages->keys(layer),
                {static_cast<std::byte*>(out.mutable_data()), static_cast<std::size_t>(out.nbytes())});
    return out;
}

py::dict counts_dict(const CudaStep& step) {
    py::dict out;
    const CudaStep::Counts& counts = step.counts();
    out["steps"] = counts.steps;
    out["graph_launches"] = counts.graph_launches;
    out["kernel_launches"] = counts.kernel_launches;
    out["early_launches"] = counts.early_launches;
    out["products"] = counts.products;
    out["graphs"] = counts.graphs;
    return out;
}

}  // namespace

void populate_cuda(py::module_& m) {
    py::register_exception<cuda::DriverMissing>(m, "CudaDriverMissing", PyExc_RuntimeError);
    const auto& error = py::register_exception<cuda::CudaError>(m, "CudaError", PyExc_RuntimeError);
    py::register_exception<cuda::DeviceLost>(m, "CudaDeviceLost", error);
    py::register_exception<cuda::BlasMissing>(m, "CublasMissing", PyExc_RuntimeError);
    py::register_exception<cuda::BlasError>(m, "CublasError", PyExc_RuntimeError);

    py::class_<Device, std::shared_ptr<Device>>(m, "CudaDevice", "A GPU: what it is, and its memory.")
        .def(py::init<int>(), py::arg("ordinal") = 0)
        .def_static("count", &Device::count, "How many there are; CudaDriverMissing without a driver.")
        .def_property_readonly("ordinal", &Device::ordinal)
        .def_property_readonly("name", &Device::name)
        .def_property_readonly("capability", &Device::capability, "90 for compute capability 9.0.")
        .def_property_readonly("num_multiprocessors", &Device::num_multiprocessors)
        .def_property_readonly("max_shared_bytes", &Device::max_shared_bytes)
        .def_property_readonly("starts_early", &Device::starts_early,
                               "Whether kernels can be launched before those in front of them have ended.")
        .def_property_readonly("free_bytes", [](const Device& d) { return d.memory().free; })
        .def_property_readonly("total_bytes", [](const Device& d) { return d.memory().total; });

    py::class_<Stream, std::shared_ptr<Stream>>(m, "CudaStream", "Work on a device, in order.")
        .def(py::init(
                 [](std::shared_ptr<Device> device) { return std::make_shared<Stream>(std::move(device)); }),
             py::arg("device").none(false))
        .def("synchronize", &Stream::synchronize, py::call_guard<py::gil_scoped_release>());

    py::class_<Kernel, std::shared_ptr<Kernel>>(m, "CudaKernel", "A kernel on a device.")
        .def(py::init([](std::shared_ptr<Device> device, const py::bytes& image, const std::string& entry,
                         int block, int shared_bytes, const std::vector<TensorTuple>& tensors,
                         bool starts_early) {
                 return std::make_shared<Kernel>(std::move(device), std::string_view(image), entry, block,
                                                 shared_bytes, tensors_of(tensors), starts_early);
             }),
             py::arg("device").none(false), py::arg("image"), py::arg("entry"), py::arg("block"),
             py::arg("shared_bytes") = 0, py::arg("tensors") = std::vector<TensorTuple>{},
             py::arg("starts_early") = false,
             "tensors: (argument, element, dims, strides, box, swizzle) of those that it takes by a tensor "
             "map. starts_early: it waits by itself for the kernels in front of it.")
        .def_property_readonly("entry", &Kernel::entry)
        .def_property_readonly("num_registers", &Kernel::num_registers)
        .def_property_readonly("local_bytes", &Kernel::local_bytes);

    m.def("cuda_pool", &make_pool, py::arg("stream").none(false), py::arg("num_pages"),
          py::arg("page_size") = 16, py::arg("num_layers") = 1, py::arg("num_heads") = 1,
          py::arg("head_dim") = 16, py::arg("element") = "f32", "A KVCachePool whose pages are on a device.");
    m.def("cuda_layer_cache", &read_layer, py::arg("pool").none(false), py::arg("layer"), py::arg("values"),
          "A copy of a layer's keys, or values: [num_pages, num_heads, page_size, head_dim].");

    py::class_<Limits>(m, "CudaLimits", "The most there can be of everything in a step.")
        .def(py::init([](std::int64_t max_tokens, std::int64_t max_positions, std::int64_t max_sequences,
                         std::int64_t max_pieces, std::int64_t max_samples, std::int64_t chunk_rows,
                         std::int64_t segment, std::int64_t vocab, std::int64_t logits_stride,
                         std::int64_t num_blocks) {
                 return Limits{.max_tokens = max_tokens,
                               .max_positions = max_positions,
                               .max_sequences = max_sequences,
                               .max_pieces = max_pieces,
                               .max_samples = max_samples,
                               .chunk_rows = chunk_rows,
                               .segment = segment,
                               .vocab = vocab,
                               .logits_stride = logits_stride,
                               .num_blocks = num_blocks};
             }),
             py::kw_only(), py::arg("max_tokens"), py::arg("max_positions"), py::arg("max_sequences"),
             py::arg("max_pieces"), py::arg("max_samples"), py::arg("chunk_rows"), py::arg("segment"),
             py::arg("vocab"), py::arg("logits_stride"), py::arg("num_blocks"));

    py::class_<CudaStep>(m, "CudaStep", "Runs a plan of kernels over a ragged batch, on a device.")
        .def_property_readonly_static("blas_workspace_bytes",
                                      [](const py::object&) { return cuda::Blas::kWorkspaceBytes; })
        .def_static("own_bytes", &CudaStep::own_bytes, py::arg("limits"), py::arg("page_size"),
                    "Bytes of a device that a step takes beside buffers and weights; needs no device.")
        .def(py::init<std::shared_ptr<KVCachePool>, const Limits&, std::vector<std::int64_t>, bool>(),
             py::arg("pool").none(false), py::arg("limits"), py::arg("buckets") = std::vector<std::int64_t>{},
             py::arg("start_early") = true)
        .def("buffer", &CudaStep::buffer, py::arg("num_bytes"), "Activations, zeroed; returns the id.")
        .def(
            "weight", [](CudaStep& step, const py::array& array) { return step.weight(bytes_of(array)); },
            py::arg("array"), "Copies an array to the device; returns the id.")
        .def("reserve_weight", &CudaStep::reserve_weight, py::arg("num_bytes"))
        .def(
            "fill_weight",
            [](CudaStep& step, std::int64_t id, std::int64_t offset, const py::array& array) {
                step.fill_weight(id, offset, bytes_of(array));
            },
            py::arg("id"), py::arg("offset"), py::arg("array"))
        .def("op", &add_op, py::arg("name"), py::arg("variants"), py::arg("args"),
             py::arg("over") = py::make_tuple("number"),
             "Appends a launch. variants: (most, kernel, grid), ascending; `over` chooses the first that is "
             "not too small, "
             "else the last. args: (source,) or (source, index), in the kernel's order. grid: per dimension "
             "(argument, per, "
             "times): times * ceil(argument / per) blocks.")
        .def("load_blas", &load_blas, py::arg("paths"),
             "Loads cuBLAS, the first of the files or names that can be: (its path, its version).")
        .def("product", &add_product, py::arg("name"), py::arg("x"), py::arg("weight"), py::arg("y"),
             py::arg("rows"), py::arg("n"), py::arg("k"), py::arg("ldx"), py::arg("ldw"), py::arg("ldy"),
             py::arg("element"), py::arg("y_element"), py::arg("scale") = 1.0F, py::arg("residual") = false,
             "Appends y = scale * x weight^T (+ y) by cuBLAS. x, weight, y and rows are arguments as op's.")
        .def(
            "start", &start, py::arg("input_ids"), py::arg("tables"), py::arg("starts"), py::arg("counts"),
            py::arg("sample_rows"), py::arg("vocab"), py::arg("position_offsets") = py::none(),
            py::arg("draws") = py::none(), py::arg("draw_ints") = py::none(), py::arg("sources") = py::none(),
            "Launches a step; returns its number. Arrays as StepExecutor.forward's, and per sample 4 draws "
            "and "
            "4 draw_ints "
            "(kernels/cuda/choose.py); sources: per row the sample of the step before whose token is its id, "
            "-1: its own.")
        .def("finish", &finish, py::arg("number"),
             "Waits for the oldest step in flight: int32 [samples], -1 where a logit is not finite.")
        .def("read_logits", &read_logits, py::arg("number"), py::arg("samples"),
             "Of the step started last: (logits [samples, logits_stride], block_max [samples, num_blocks]).")
        .def_property_readonly("weight_bytes", &CudaStep::weight_bytes)
        .def_property_readonly(
            "counts", &counts_dict,
            "Steps, launches of graphs and of kernels, products of cuBLAS's, graphs made.");
}

}  // namespace nanoserve::bind
