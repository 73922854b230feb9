#include "engines/packed.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace secateur {
namespace {

constexpr char kMagic[] = "SECATEUR";
constexpr int64_t kVersion = 1, kSpare = 16, kMostSize = 1 << 24, kAlignment = 64;
// Of layouts in 8 bits: bytes and places after the last one, which kernels load whole vectors of, and the most columns,
// because sums of products have 32 bits.
constexpr int64_t kByteSpare = 64, kMostByteColumns = 65536;
// Products below which one thread is faster than several.
constexpr int64_t kSmall = 32768;

// The first bytes of a block.
struct Header {
    char magic[8];
    int64_t version, layout, value_type, rows, columns, values, has_scale, sizes[4];
    int64_t reserved[4];
};
static_assert(sizeof(Header) == 2 * kAlignment);

[[noreturn]] void refuse(const std::string& reason) {
    throw std::invalid_argument("a packed weight is damaged: " + reason + ". Export the model again.");
}

void check(bool valid, const char* reason) {
    if (!valid) refuse(reason);
}

int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Takes arrays one after the other. Each starts at a multiple of 64 bytes.
struct Reader {
    const char* data;
    int64_t size, at;

    template <class T> const T* take(int64_t count) {
        at = parts(at, kAlignment) * kAlignment;
        check(count >= 0 && at <= size && count <= (size - at) / int64_t(sizeof(T)), "it ends too early");
        const T* found = reinterpret_cast<const T*>(data + at);
        at += count * int64_t(sizeof(T));
        return found;
    }
};

// Offsets that start at 0 and never fall. Returns the last one.
int64_t check_offsets(const int64_t* offsets, int64_t count) {
    check(offsets[0] == 0, "its offsets do not start at 0");
    for (int64_t i = 0; i < count; ++i) check(offsets[i] <= offsets[i + 1], "its offsets fall");
    return offsets[count];
}

// How many values the kernel reads. Each function below reads what its layout has besides the values, and checks it.
template <class Weight> int64_t read_bits(Reader& from, Weight& weight) {
    const int64_t words = parts(weight.columns, 64);
    weight.mask = from.take<uint64_t>(weight.rows * words);
    weight.offsets = from.take<int64_t>(weight.rows + 1);
    const int64_t last = check_offsets(weight.offsets, weight.rows);
    const int64_t over = words * 64 - weight.columns;
    for (int64_t row = 0; row < weight.rows; ++row) {
        int64_t count = 0;
        for (int64_t i = 0; i < words; ++i) count += __builtin_popcountll(weight.mask[row * words + i]);
        check(count == weight.offsets[row + 1] - weight.offsets[row], "a row has more or fewer values than bits");
        check(!over || !(weight.mask[row * words + words - 1] >> (64 - over)), "a bit is beyond the last column");
    }
    return last;
}

int64_t read(Reader& from, const Header&, Bitmask& weight) { return read_bits(from, weight); }

template <class Index> void check_panels(const Panels& weight, int64_t panels, int64_t sections) {
    const Index* index = static_cast<const Index*>(weight.index);
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t section = 0; section < sections; ++section) {
            const int64_t at = panel * sections + section, first = weight.offsets[at], last = weight.offsets[at + 1];
            const int64_t left = weight.columns - section * weight.width;
            const int64_t width = left < weight.width ? left : weight.width;
            int64_t count = 0;
            for (int64_t row = 0; row < weight.height; ++row) count += weight.counts[at * weight.height + row];
            check(count == last - first, "a section has more or fewer values than its rows");
            for (int64_t i = first; i < last; ++i) check(index[i] < width, "a column is outside of its section");
        }
}

int64_t read(Reader& from, const Header& header, Panels& weight) {
    weight.height = header.sizes[0], weight.width = header.sizes[1], weight.index_bytes = int(header.sizes[2]);
    check(weight.height >= 1 && weight.height <= kMostSize, "its height is out of range");
    check(weight.width >= 1 && weight.width <= 32768, "its width is out of range");
    check(weight.index_bytes == (weight.width <= 256 ? 1 : 2), "its index has the wrong size");
    const int64_t panels = parts(weight.rows, weight.height), sections = parts(weight.columns, weight.width);
    if (weight.index_bytes == 1) weight.index = from.take<uint8_t>(header.values);
    else weight.index = from.take<uint16_t>(header.values);
    weight.counts = from.take<uint16_t>(panels * sections * weight.height);
    weight.offsets = from.take<int64_t>(panels * sections + 1);
    const int64_t last = check_offsets(weight.offsets, panels * sections);
    check(last <= header.values - kSpare, "it has too few values");
    if (weight.index_bytes == 1) check_panels<uint8_t>(weight, panels, sections);
    else check_panels<uint16_t>(weight, panels, sections);
    return last;
}

int64_t read(Reader& from, const Header& header, Groups& weight) {
    const int64_t n = header.sizes[0], m = header.sizes[1];
    check(m >= 2 && m <= 16 && n >= 1 && n <= m && weight.columns % m == 0, "its groups have a wrong size");
    weight.n = int(n), weight.m = int(m);
    // Any place in a word is one of a vector that the kernel loads at a group, and the inputs are padded for that.
    const int64_t panels = parts(weight.rows, 16), groups = weight.columns / m, slots = m <= 4 ? 16 : 8;
    const int64_t words = n > slots ? groups * parts(n, slots) : parts(groups, slots / n);
    weight.words = from.take<uint32_t>(panels * words * 16);
    return panels * groups * n * 16;
}

int64_t read(Reader& from, const Header& header, Tiles& weight) {
    weight.height = header.sizes[0], weight.width = header.sizes[1];
    check(weight.height >= 1 && weight.width >= 1, "its tiles have no size");
    check(weight.rows % weight.height == 0 && weight.columns % weight.width == 0, "its tiles do not divide it");
    const int64_t down = weight.rows / weight.height, across = weight.columns / weight.width;
    weight.first_tiles = from.take<int64_t>(down + 1);
    const int64_t tiles = check_offsets(weight.first_tiles, down);
    check(tiles <= down * across, "it has too many tiles");
    weight.tile_columns = from.take<int32_t>(tiles);
    for (int64_t i = 0; i < tiles; ++i)
        check(weight.tile_columns[i] >= 0 && weight.tile_columns[i] < across, "a tile is outside of the weight");
    return tiles * weight.height * weight.width;
}

// Layouts in 8 bits. Takes the sums of the rows, which are compared when the places of the bytes are known.
template <class Weight> void read_sums(Reader& from, Weight& weight) {
    check(weight.value_type == 2 && weight.scale, "its values are no bytes with scales");
    check(weight.columns <= kMostByteColumns, "its columns are out of range");
    for (int64_t row = 0; row < weight.rows; ++row)
        check(std::isfinite(weight.scale[row]) && weight.scale[row] >= 0, "a scale is no size");
    weight.sums = from.take<int32_t>(weight.rows);
}

template <class Weight> const int8_t* codes_of(const Weight& weight, const Header& header, int64_t stored) {
    check(stored <= header.values, "it has too few values");
    const int8_t* codes = static_cast<const int8_t*>(weight.values);
    for (int64_t i = 0; i < stored; ++i) check(codes[i] != -128, "a value is out of range");
    return codes;
}

template <class Weight> void check_sums(const Weight& weight, const std::vector<int64_t>& sums) {
    for (int64_t row = 0; row < weight.rows; ++row)
        check(sums[row] == weight.sums[row], "the sum of a row is not that of its values");
}

int64_t read(Reader& from, const Header& header, Int8Panels& weight) {
    read_sums(from, weight);
    const int64_t panels = parts(weight.rows, 16), each = parts(weight.columns, 4) * 64, stored = panels * each;
    const int8_t* codes = codes_of(weight, header, stored);
    std::vector<int64_t> sums(panels * 16);
    for (int64_t i = 0; i < stored; ++i) sums[i / each * 16 + i / 4 % 16] += codes[i];
    check_sums(weight, sums);
    return stored;
}

int64_t read(Reader& from, const Header& header, Int8Tiles& weight) {
    read_sums(from, weight);
    weight.height = header.sizes[0], weight.width = header.sizes[1];
    weight.sections = header.sizes[2], weight.panel = header.sizes[3];
    const int64_t height = weight.height, width = weight.width;
    check((height == 1 && width == 4) || (height == 4 && (width == 4 || width == 1)), "its tiles have a wrong size");
    check(weight.panel == 16 || weight.panel == 64, "its panels have a wrong size");
    check(weight.sections >= 1 && weight.sections <= weight.columns, "its sections are out of range");
    const int64_t panels = parts(weight.rows, weight.panel), each = weight.panel / height;
    const int64_t count = panels * weight.sections * each;
    weight.first_tiles = from.take<int64_t>(count + 1);
    const int64_t tiles = check_offsets(weight.first_tiles, count);
    check(tiles <= header.values / (height * 4), "it has too few values");
    const int64_t stored = tiles * height * 4;
    check(stored <= header.values - kByteSpare, "it has too few values");
    // A kernel follows the places of a whole vector of tiles, so that those after the last tile count as well.
    const int64_t places = tiles * (width == 1 ? 4 : 1) + kByteSpare;
    const int64_t across = width == 1 ? weight.columns : parts(weight.columns, 4);
    weight.places = from.take<uint16_t>(places);
    for (int64_t i = 0; i < places; ++i) check(weight.places[i] < across, "a tile is outside of the weight");
    const int8_t* codes = codes_of(weight, header, stored);
    std::vector<int64_t> sums(panels * weight.panel);
    for (int64_t part = 0; part < count; ++part) {
        const int64_t row = (part / (each * weight.sections) * each + part % each) * height;
        for (int64_t i = weight.first_tiles[part] * height * 4; i < weight.first_tiles[part + 1] * height * 4; ++i)
            sums[row + i / 4 % height] += codes[i];
    }
    check_sums(weight, sums);
    return stored;
}

int64_t read(Reader& from, const Header& header, Int8Bitmask& weight) {
    read_sums(from, weight);
    const int64_t stored = read_bits(from, weight);
    check(stored <= header.values - kByteSpare, "it has too few values");
    const int8_t* codes = codes_of(weight, header, stored);
    std::vector<int64_t> sums(weight.rows);
    for (int64_t row = 0; row < weight.rows; ++row)
        for (int64_t i = weight.offsets[row]; i < weight.offsets[row + 1]; ++i) sums[row] += codes[i];
    check_sums(weight, sums);
    return stored;
}

const Table& widest() {
    if (const char* name = std::getenv("SECATEUR_ISA"); name && *name) {
        if (const InstructionSet* isa = find_instruction_set(name)) return isa->table;
        throw std::invalid_argument("SECATEUR_ISA is '" + std::string(name) +
                                    "', which this machine cannot run. Unset it.");
    }
    const InstructionSet* isa = instruction_sets;
    while (!isa->supported) ++isa;
    return isa->table;
}

void run(const Table& table, const Bitmask& weight) { table.bitmask(weight); }
void run(const Table& table, const Panels& weight) { table.panels(weight); }
void run(const Table& table, const Groups& weight) { table.groups(weight); }
void run(const Table& table, const Tiles& weight) { table.tiles(weight); }
void run(const Table& table, const Int8Panels& weight) { table.int8_panels(weight); }
void run(const Table& table, const Int8Tiles& weight) { table.int8_tiles(weight); }
void run(const Table& table, const Int8Bitmask& weight) { table.int8_bitmask(weight); }

}  // namespace

PackedWeight::PackedWeight(const void* data, size_t size) : table_(&widest()) {
    check(reinterpret_cast<uintptr_t>(data) % alignof(int64_t) == 0, "it does not start at a multiple of 8 bytes");
    Reader from = {static_cast<const char*>(data), int64_t(size), 0};
    const Header& header = *from.take<Header>(1);
    check(!std::memcmp(header.magic, kMagic, sizeof(header.magic)), "it does not start with SECATEUR");
    if (header.version != kVersion)
        throw std::invalid_argument("a packed weight has version " + std::to_string(header.version) +
                                    "; this library reads version " + std::to_string(kVersion) +
                                    ". Install the version of secateur that exported the model.");
    check(header.value_type >= 0 && header.value_type <= 3, "its values have an unknown type");
    check(header.rows >= 1 && header.rows <= kMostSize, "its rows are out of range");
    check(header.columns >= 1 && header.columns <= kMostSize, "its columns are out of range");
    check(header.has_scale == 0 || header.has_scale == 1, "its header is wrong");
    switch (header.layout) {
        case 0: weight_ = Bitmask{}; break;
        case 1: weight_ = Panels{}; break;
        case 2: weight_ = Groups{}; break;
        case 3: weight_ = Tiles{}; break;
        case 4: weight_ = Int8Panels{}; break;
        case 5: weight_ = Int8Tiles{}; break;
        case 6: weight_ = Int8Bitmask{}; break;
        default: refuse("its layout is unknown");
    }
    std::visit([&](auto& weight) {
        weight.rows = header.rows, weight.columns = header.columns, weight.value_type = int(header.value_type);
        switch (header.value_type) {
            case 0: weight.values = from.take<float>(header.values); break;
            case 2: weight.values = from.take<int8_t>(header.values); break;
            default: weight.values = from.take<uint16_t>(header.values);
        }
        if (header.has_scale) weight.scale = from.take<float>(header.rows);
        stored_ = read(from, header, weight);
        // Panels of bytes are whole, and the other layouts in 8 bits have compared their own spare bytes.
        if (header.layout < 4) check(stored_ <= header.values - kSpare, "it has too few values");
    }, weight_);
}

const Linear& PackedWeight::linear() const {
    return std::visit([](const auto& weight) -> const Linear& { return weight; }, weight_);
}

void PackedWeight::run(const float* x, float* y, const float* bias, int64_t batch, int threads) const {
    if (batch < 1) return;
    std::visit([&](const auto& weight) {
        auto call = weight;  // a copy, because threads may share the weight
        call.x = x, call.y = y, call.bias = bias, call.batch = batch;
        call.threads = stored_ * batch > kSmall ? threads : 1;
        secateur::run(*table_, call);
    }, weight_);
}

}  // namespace secateur
