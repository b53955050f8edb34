// The decoder step in Python. Objects hold addresses; runtime/decoder.py keeps what they point to.
#include "step/bindings.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "bound.h"
#include "step/decoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace subnibble {

namespace {

using Address = std::uintptr_t;
// (order, count, [(order of a factor, address of its matrix)]) of adjacent blocks.
using Runs = std::vector<std::tuple<std::int64_t, std::int64_t, std::vector<std::pair<std::int64_t, Address>>>>;

template <typename T>
const T* at(Address address) {
    return reinterpret_cast<const T*>(address);
}

std::vector<HadamardRun> hadamard_of(const Runs& runs) {
    std::vector<HadamardRun> out;
    for (const auto& [order, count, factors] : runs) {
        HadamardRun run{order, count, {}};
        for (const auto& [size, matrix] : factors) run.factors.push_back({size, at<float>(matrix)});
        out.push_back(std::move(run));
    }
    return out;
}

// A linear, term by term.
struct Terms {
    LinearTerms terms;

    explicit Terms(std::int64_t rows) { terms.rows = rows; }
    void main(const Weight& w, std::int64_t start) { terms.main.push_back({w.tiles(), start}); }
    void salient(const Weight& w, std::int64_t start) { terms.salient.push_back({w.tiles(), start}); }
    void down(const Weight& w, std::int64_t start) { terms.down.push_back({w.tiles(), start}); }
    void up(const Weight& w, std::int64_t start) { terms.up.push_back({w.tiles(), start}); }
    void inner(const Scheme& scheme) { terms.inner = scheme.scheme; }
    void bias(Address address) { terms.bias = at<float>(address); }
    void dense(Address address, int type) {
        terms.dense = at<void>(address);
        terms.dense_type = static_cast<Number>(type);
    }
};

struct SiteForm {
    SiteSteps steps;
    std::vector<LinearTerms> readers;

    SiteForm(std::int64_t width, Address column_scale, Address gather, const Runs& blocks, const Scheme& scheme,
             std::int64_t requantized) {
        steps.width = width;
        steps.column_scale = at<float>(column_scale);
        steps.gather = at<std::int64_t>(gather);
        steps.blocks = hadamard_of(blocks);
        steps.scheme = scheme.scheme;
        steps.requantized = requantized;
    }
    void reader(const Terms& terms) { readers.push_back(terms.terms); }
    std::unique_ptr<Site> make(const Kernel& kernel) const {
        return std::make_unique<Site>(kernel, step_functions(kernel.name), steps, readers);
    }
};

// (address of the gain or 0, address of the bias or 0, eps).
using Norm = std::tuple<Address, Address, float>;

NormTerms norm_of(const Norm& norm) {
    return {at<float>(std::get<0>(norm)), at<float>(std::get<1>(norm)), std::get<2>(norm)};
}

struct LayerForm {
    Norm attention_norm, mlp_norm, query_norm, key_norm;
    std::vector<SiteForm> attention_in, attention_out, mlp_in, mlp_hidden;
    // (site, reader) of query, key, value, gate, up.
    std::vector<std::pair<std::size_t, std::size_t>> places;
    std::int64_t window = 0;
    Address key_center = 0;

    Layer make(const Kernel& kernel) const {
        Layer layer;
        layer.attention_norm = norm_of(attention_norm), layer.mlp_norm = norm_of(mlp_norm);
        layer.query_norm = norm_of(query_norm), layer.key_norm = norm_of(key_norm);
        const auto fill = [&](Tensor& tensor, const std::vector<SiteForm>& sites) {
            for (const SiteForm& site : sites) tensor.sites.push_back(site.make(kernel));
        };
        fill(layer.attention_in, attention_in), fill(layer.attention_out, attention_out);
        fill(layer.mlp_in, mlp_in), fill(layer.mlp_hidden, mlp_hidden);
        if (places.size() != 5) throw std::invalid_argument("a layer has five readers of two tensors");
        Place* const to[] = {&layer.query, &layer.key, &layer.value, &layer.gate, &layer.up};
        for (std::size_t i = 0; i < 5; ++i) *to[i] = {places[i].first, places[i].second};
        layer.attention.window = window;
        layer.attention.key_center = at<float>(key_center);
        return layer;
    }
};

struct BoundCache : CacheRules {
    BoundCache(std::int64_t heads_, std::int64_t width_, int bits_, std::int64_t group_, bool by_channel,
               std::int64_t window_, float clip_, bool before_rope_)
        : CacheRules{heads_, width_, bits_, group_, by_channel ? Axis::channel : Axis::token, window_, clip_,
                     before_rope_} {}
};

struct BoundTable : Table {
    BoundTable(std::int64_t rows_, std::int64_t width_) {
        rows = rows_;
        width = width_;
    }
    void packed(const Form& form, Address codes, Address scales, Address zeros) {
        ranges.push_back(form.at(codes, scales, zeros));
    }
    void set_dense(Address address, int type) {
        dense = at<void>(address);
        dense_type = static_cast<Number>(type);
    }
};

class BoundDecoder {
   public:
    BoundDecoder(const std::string& isa, std::int64_t width, std::int64_t query_heads, std::int64_t angles,
                 float scaling, int gate, const BoundCache& cache, const Runs& head_rotation,
                 std::int64_t prefix_tokens, const BoundTable& table, const std::vector<LayerForm>& layers,
                 const Norm& final_norm, const SiteForm& head) {
        const Kernel& kernel = kernel_of(isa);
        const DecoderForm form{width, query_heads, angles, scaling, static_cast<Gate>(gate), cache,
                               hadamard_of(head_rotation), prefix_tokens};
        std::vector<Layer> made;
        for (const LayerForm& layer : layers) made.push_back(layer.make(kernel));
        decoder_ = std::make_unique<Decoder>(kernel, form, table, std::move(made), norm_of(final_norm),
                                             head.make(kernel));
    }
    void set_head_input(Address matrix, std::vector<std::int64_t> widths) {
        decoder_->set_head_input(at<float>(matrix), std::move(widths));
    }
    void set_angles(Address cos, Address sin, std::int64_t positions) {
        decoder_->set_angles(at<float>(cos), at<float>(sin), positions);
    }
    void set_prefix(std::int64_t layer, Address keys, Address values) {
        decoder_->set_prefix(layer, at<float>(keys), at<float>(values));
    }
    std::int64_t nbytes() { return decoder_->store().nbytes(); }
    std::unique_ptr<Sequence> open() { return std::make_unique<Sequence>(decoder_->store(), decoder_->layers()); }

    void forward(const std::vector<std::tuple<Sequence*, std::vector<std::int64_t>, bool>>& appends,
                 std::int64_t threads, Address logits) {
        std::vector<Append> all;
        for (const auto& [sequence, ids, all_logits] : appends) all.push_back({sequence, ids, all_logits});
        bool finished = false;
        {
            nb::gil_scoped_release released;
            finished = decoder_->forward(all, threads, reinterpret_cast<float*>(logits), [] {
                nb::gil_scoped_acquire acquired;
                return PyErr_CheckSignals() != 0;
            });
        }
        if (!finished) throw nb::python_error();
    }

   private:
    std::unique_ptr<Decoder> decoder_;
};

// Attention of one layer alone, as tests compare it with runtime/attention.py.
class BoundAttention {
   public:
    BoundAttention(const std::string& isa, const BoundCache& cache, std::int64_t query_heads, std::int64_t angles,
                   std::int64_t window)
        : functions_(step_functions(kernel_of(isa).name)), store_(cache), angles_(angles),
          attention_(functions_, store_, query_heads / cache.heads, angles, 0) {
        layer_.window = window;
        scratch_.numbers = aligned<float>(attention_.scratch_numbers());
    }
    std::unique_ptr<Sequence> open() { return std::make_unique<Sequence>(store_, 1); }

    // Append tokens: keys and values (tokens, heads, width), queries (tokens, query heads, width), scaled; cosines and
    // sines (tokens, angles) or 0. Writes out, (tokens, query heads, width).
    void append(Sequence& sequence, std::int64_t tokens, Address q, Address k, Address v, Address cos, Address sin,
                Address center, Address out) {
        const CacheRules& rules = store_.rules();
        layer_.key_center = at<float>(center);
        sequence.reserve(tokens);
        if (cos != 0) sequence.place_angles(at<float>(cos), at<float>(sin), tokens, angles_);
        attention_.begin({{&sequence, 0, tokens, sequence.length()}});
        for (std::int64_t head = 0; head < rules.heads; ++head) {
            const float* of_head = center == 0 ? nullptr : at<float>(center) + head * rules.width;
            for (std::int64_t t = 0; t < tokens; ++t) {
                const std::int64_t from = (t * rules.heads + head) * rules.width, token = sequence.length() + t;
                store_.write_key(sequence.layer(0), head, token, at<float>(k) + from, of_head);
                store_.write_value(sequence.layer(0), head, token, at<float>(v) + from);
            }
            store_.code_keys(sequence.layer(0), head, sequence.length() + tokens, of_head);
            store_.code_values(sequence.layer(0), head, sequence.length() + tokens);
        }
        attention_.run(Team{1, 0}, layer_, 0, at<float>(q), reinterpret_cast<float*>(out), scratch_);
        sequence.advance(tokens);
    }

   private:
    const StepFunctions& functions_;
    KvStore store_;
    std::int64_t angles_;
    AttentionLayer layer_{};
    Attention attention_;
    Scratch scratch_;
};

}  // namespace

void bind_step(nb::module_& module) {
    nb::class_<Terms>(module, "Terms")
        .def(nb::init<std::int64_t>(), "rows"_a)
        .def("main", &Terms::main)
        .def("salient", &Terms::salient)
        .def("down", &Terms::down)
        .def("up", &Terms::up)
        .def("inner", &Terms::inner)
        .def("bias", &Terms::bias)
        .def("dense", &Terms::dense);
    nb::class_<SiteForm>(module, "Site")
        .def(nb::init<std::int64_t, Address, Address, const Runs&, const Scheme&, std::int64_t>(), "width"_a,
             "column_scale"_a, "gather"_a, "blocks"_a, "scheme"_a, "requantized"_a)
        .def("reader", &SiteForm::reader);
    nb::class_<LayerForm>(module, "Layer")
        .def(nb::init<>())
        .def_rw("attention_norm", &LayerForm::attention_norm)
        .def_rw("mlp_norm", &LayerForm::mlp_norm)
        .def_rw("query_norm", &LayerForm::query_norm)
        .def_rw("key_norm", &LayerForm::key_norm)
        .def_rw("attention_in", &LayerForm::attention_in)
        .def_rw("attention_out", &LayerForm::attention_out)
        .def_rw("mlp_in", &LayerForm::mlp_in)
        .def_rw("mlp_hidden", &LayerForm::mlp_hidden)
        .def_rw("places", &LayerForm::places)
        .def_rw("window", &LayerForm::window)
        .def_rw("key_center", &LayerForm::key_center);
    nb::class_<BoundCache>(module, "Cache")
        .def(nb::init<std::int64_t, std::int64_t, int, std::int64_t, bool, std::int64_t, float, bool>(), "heads"_a,
             "width"_a, "bits"_a, "group"_a, "by_channel"_a, "window"_a, "clip"_a, "before_rope"_a);
    nb::class_<BoundTable>(module, "Table")
        .def(nb::init<std::int64_t, std::int64_t>(), "rows"_a, "width"_a)
        .def("packed", &BoundTable::packed)
        .def("dense", &BoundTable::set_dense);
    nb::class_<Sequence>(module, "Sequence")
        .def_prop_ro("length", &Sequence::length)
        .def("crop", &Sequence::crop)
        .def("reserve", &Sequence::reserve)
        .def("advance", &Sequence::advance)
        .def("place_angles",
             [](Sequence& sequence, Address cos, Address sin, std::int64_t tokens, std::int64_t count) {
                 sequence.place_angles(at<float>(cos), at<float>(sin), tokens, count);
             })
        .def("read",
             [](const Sequence& sequence, std::int64_t layer, bool of_keys, Address codes, Address scales, Address lows,
                Address exact) {
                 sequence.read(layer, of_keys, reinterpret_cast<std::uint8_t*>(codes),
                               reinterpret_cast<std::uint16_t*>(scales), reinterpret_cast<std::uint16_t*>(lows),
                               reinterpret_cast<std::uint16_t*>(exact));
             })
        .def("write", [](Sequence& sequence, std::int64_t layer, bool of_keys, Address codes, Address scales,
                         Address lows, Address exact) {
            sequence.write(layer, of_keys, at<std::uint8_t>(codes), at<std::uint16_t>(scales), at<std::uint16_t>(lows),
                           at<std::uint16_t>(exact));
        });
    nb::class_<BoundAttention>(module, "Attention")
        .def(nb::init<const std::string&, const BoundCache&, std::int64_t, std::int64_t, std::int64_t>(), "isa"_a,
             "cache"_a, "query_heads"_a, "angles"_a, "window"_a)
        .def("open", &BoundAttention::open, nb::keep_alive<0, 1>())
        .def("append", &BoundAttention::append);
    nb::class_<BoundDecoder>(module, "Decoder")
        .def(nb::init<const std::string&, std::int64_t, std::int64_t, std::int64_t, float, int, const BoundCache&,
                      const Runs&, std::int64_t, const BoundTable&, const std::vector<LayerForm>&, const Norm&,
                      const SiteForm&>(),
             "isa"_a, "width"_a, "query_heads"_a, "angles"_a, "scaling"_a, "gate"_a, "cache"_a, "head_rotation"_a,
             "prefix_tokens"_a, "table"_a, "layers"_a, "final_norm"_a, "head"_a)
        .def("set_head_input", &BoundDecoder::set_head_input)
        .def("set_angles", &BoundDecoder::set_angles)
        .def("set_prefix", &BoundDecoder::set_prefix)
        .def_prop_ro("nbytes", &BoundDecoder::nbytes)
        .def("open", &BoundDecoder::open, nb::keep_alive<0, 1>())
        .def("forward", &BoundDecoder::forward);
}

}  // namespace subnibble
