#include "step/site.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace subnibble {

void multiply_hadamard(const StepFunctions& functions, const std::vector<HadamardRun>& runs, const float* x, float* y,
                       float* work) {
    for (const HadamardRun& run : runs) {
        const std::int64_t numbers = run.order * run.count;
        const float* from = x;
        std::int64_t inner = 1;
        for (std::size_t i = 0; i < run.factors.size(); ++i) {
            const HadamardRun::Factor& factor = run.factors[i];
            const bool last = i + 1 == run.factors.size();
            // The last factor writes to y; the others take turns.
            float* to = (run.factors.size() - 1 - i) % 2 == 0 ? y : work;
            const float scale = last ? 1.0f / std::sqrt(static_cast<float>(run.order)) : 1.0f;
            functions.factor(from, factor.matrix, factor.order, inner, numbers / (factor.order * inner), scale, to);
            from = to;
            inner *= factor.order;
        }
        if (run.factors.empty()) std::copy(x, x + numbers, y);
        x += numbers, y += numbers, work += numbers;
    }
}

Site::Site(const Kernel& kernel, const StepFunctions& functions, SiteSteps steps, std::vector<LinearTerms> readers)
    : kernel_(kernel), functions_(functions), steps_(std::move(steps)), readers_(std::move(readers)) {
    for (const LinearTerms& reader : readers_) {
        if (reader.dense != nullptr)
            has_dense_ = true;
        else
            has_packed_ = true;
        has_low_rank_ = has_low_rank_ || !reader.down.empty();
    }
}

const Operand& Site::Entered::of(const TiledRange& range) const {
    for (const auto& operand : operands)
        if (operand->start() == range.start && operand->suits(range.tiles)) return *operand;
    throw std::logic_error("an input was not prepared for a weight");
}

void Site::Entered::prepare(const std::vector<TiledRange>& ranges) {
    for (const TiledRange& range : ranges) {
        const bool known = std::any_of(operands.begin(), operands.end(), [&](const auto& operand) {
            return operand->start() == range.start && operand->suits(range.tiles);
        });
        if (!known)
            operands.push_back(
                std::make_unique<Operand>(*input, range.start, range.tiles.columns, range.tiles.group));
    }
}

void Site::Entered::begin(std::int64_t tokens) {
    input->resize(tokens);
    for (const auto& operand : operands) operand->attach(*input);
}

void Site::Entered::read(const Kernel& kernel, std::int64_t t) {
    for (const auto& operand : operands) operand->read(kernel, *input, t);
}

void Site::reserve(std::int64_t tokens, float* results, const Site* before) {
    y_.assign(readers_.size(), nullptr);
    for (std::size_t i = 0; i < readers_.size() && results != nullptr; ++i) {
        y_[i] = results;
        results += tokens * readers_[i].rows;
    }
    room_ = before != nullptr && needs_room_of(*before) ? before->room_ : new_room(tokens);
}

std::int64_t Site::result_numbers() const {
    std::int64_t numbers = 0;
    for (const LinearTerms& reader : readers_) numbers += reader.rows;
    return numbers;
}

std::unique_ptr<Site::Room> Site::new_room(std::int64_t tokens) const {
    auto room = std::make_unique<Room>();
    if (has_dense_) room->plain = aligned<float>(tokens * steps_.width);
    if (!has_packed_) return room;
    room->x.input = std::make_unique<Input>(steps_.scheme, tokens, steps_.width);
    if (steps_.requantized > 0) room->rest.input = std::make_unique<Input>(steps_.scheme, tokens, steps_.requantized);
    for (const LinearTerms& reader : readers_) {
        room->x.prepare(reader.main);
        room->x.prepare(reader.salient);
        room->x.prepare(reader.down);
        if (steps_.requantized > 0) room->rest.prepare(reader.salient);
        LowRank& branch = room->low_rank.emplace_back();
        if (reader.down.empty()) continue;
        const std::int64_t rank = reader.down.front().tiles.rows;
        branch.inner = aligned<float>(tokens * rank);
        branch.entered.input = std::make_unique<Input>(reader.inner, tokens, rank);
        branch.entered.prepare(reader.up);
    }
    return room;
}

bool Site::needs_room_of(const Site& other) const {
    const auto same_scheme = [](const InputScheme& a, const InputScheme& b) {
        return a.rounding.kind == b.rounding.kind && a.rounding.last == b.rounding.last &&
               a.rounding.clip == b.rounding.clip && a.group == b.group && a.outliers == b.outliers &&
               a.planes == b.planes;
    };
    // Of the low-rank terms, the inner tokens have a column for each row of `down`.
    const auto same_ranges = [](const std::vector<TiledRange>& a, const std::vector<TiledRange>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const TiledRange& x, const TiledRange& y) {
            return x.start == y.start && x.tiles.columns == y.tiles.columns && x.tiles.group == y.tiles.group &&
                   x.tiles.rows == y.tiles.rows;
        });
    };
    return steps_.width == other.steps_.width && steps_.requantized == other.steps_.requantized &&
           same_scheme(steps_.scheme, other.steps_.scheme) && has_dense_ == other.has_dense_ &&
           std::equal(readers_.begin(), readers_.end(), other.readers_.begin(), other.readers_.end(),
                      [&](const LinearTerms& a, const LinearTerms& b) {
                          return same_ranges(a.main, b.main) && same_ranges(a.salient, b.salient) &&
                                 same_ranges(a.down, b.down) && same_ranges(a.up, b.up) &&
                                 (a.down.empty() || same_scheme(a.inner, b.inner));
                      });
}

std::int64_t Site::panel_bytes() const {
    // As many tokens as need panels at all.
    constexpr std::int64_t kMany = 1 << 20;
    std::int64_t most = 0;
    for (const LinearTerms& reader : readers_)
        for (const auto* ranges : {&reader.main, &reader.salient, &reader.down, &reader.up})
            for (const TiledRange& range : *ranges) most = std::max(most, scratch_bytes(range.tiles, kMany));
    return most;
}

void Site::begin(std::int64_t tokens) {
    tokens_ = tokens;
    if (!has_packed_) return;
    room_->x.begin(tokens);
    if (steps_.requantized > 0) room_->rest.begin(tokens);
    for (LowRank& branch : room_->low_rank)
        if (branch.entered.input != nullptr) branch.entered.begin(tokens);
}

void Site::enter(std::int64_t t, const float* x, float* room) {
    const std::int64_t width = steps_.width;
    if (steps_.column_scale != nullptr) {
        for (std::int64_t i = 0; i < width; ++i) room[i] = x[i] * steps_.column_scale[i];
        x = room;
    }
    if (steps_.gather != nullptr) {
        float* to = x == room ? room + width : room;
        for (std::int64_t i = 0; i < width; ++i) to[i] = x[steps_.gather[i]];
        x = to;
    }
    if (!steps_.blocks.empty()) {
        float* to = x == room ? room + width : room;
        multiply_hadamard(functions_, steps_.blocks, x, to, room + 2 * width);
        x = to;
    }
    if (has_dense_) std::memcpy(room_->plain.get() + t * width, x, static_cast<std::size_t>(width) * 4);
    if (!has_packed_) return;
    room_->x.input->round(kernel_, t, x);
    room_->x.read(kernel_, t);
    if (steps_.requantized > 0) {
        room_->rest.input->round_rest(kernel_, *room_->x.input, t, x, room + 2 * width);
        room_->rest.read(kernel_, t);
    }
}

std::pair<std::int64_t, std::int64_t> Site::part_of(const Team& team, std::size_t reader) const {
    const std::int64_t rows = readers_[reader].rows;
    return team.share(rows, 2 * kTileRows);
}

void Site::multiply_ranges(const Entered& x, const std::vector<TiledRange>& ranges, float* y, std::int64_t y_stride,
                           std::int64_t first, std::int64_t last, bool add, Scratch& scratch) const {
    const std::int64_t from = first / kTileRows, to = (last + kTileRows - 1) / kTileRows;
    for (const TiledRange& range : ranges) {
        multiply_tiles(kernel_, range.tiles, x.of(range), y, y_stride, add, from, to, scratch.panels.get());
        add = true;
    }
}

void Site::multiply_part(std::size_t reader, std::int64_t first, std::int64_t last, Scratch& scratch) {
    const LinearTerms& terms = readers_[reader];
    float* y = y_[reader];
    if (terms.dense != nullptr) {
        functions_.dense(terms.dense, terms.dense_type, steps_.width, room_->plain.get(), steps_.width, tokens_, first,
                         last, y, terms.rows);
    } else {
        multiply_ranges(room_->x, terms.main, y, terms.rows, first, last, false, scratch);
        multiply_ranges(room_->x, terms.salient, y, terms.rows, first, last, true, scratch);
        if (steps_.requantized > 0)
            multiply_ranges(room_->rest, terms.salient, y, terms.rows, first, last, true, scratch);
        multiply_ranges(room_->low_rank[reader].entered, terms.up, y, terms.rows, first, last, true, scratch);
    }
    if (terms.bias == nullptr) return;
    for (std::int64_t t = 0; t < tokens_; ++t)
        functions_.add(y + t * terms.rows + first, terms.bias + first, last - first);
}

void Site::multiply_low_rank(const Team& team, Scratch& scratch) {
    if (!has_low_rank_) return;
    for (std::size_t i = 0; i < readers_.size(); ++i) {
        if (readers_[i].down.empty()) continue;
        const std::int64_t rank = readers_[i].down.front().tiles.rows;
        const auto [first, last] = team.share(rank, 2 * kTileRows);
        if (first < last)
            multiply_ranges(room_->x, readers_[i].down, room_->low_rank[i].inner.get(), rank, first, last, false,
                            scratch);
    }
    team.meet();
    const auto [first, last] = team.share(tokens_);
    for (std::size_t i = 0; i < readers_.size(); ++i) {
        if (readers_[i].down.empty()) continue;
        const std::int64_t rank = readers_[i].down.front().tiles.rows;
        for (std::int64_t t = first; t < last; ++t) {
            room_->low_rank[i].entered.input->round(kernel_, t, room_->low_rank[i].inner.get() + t * rank);
            room_->low_rank[i].entered.read(kernel_, t);
        }
    }
    team.meet();
}

}  // namespace subnibble
