#include "engines/packed.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace secateur {
namespace {

constexpr char kMagic[] = "SECATEUR";
constexpr int64_t kVersion = 1, kMostSize = 1 << 24, kAlignment = 64;
// A kernel reads whole vectors: so many values stand after the last one, so that they can be read.
constexpr int64_t kSpare = 16, kSpareBytes = 64;
// With more columns, the sum of products of bytes would not fit 32 bits.
constexpr int64_t kMostBytes = 65536;
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
template <class Bits> int64_t read_bits(Reader& from, Bits& weight) {
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

int64_t read(Reader& from, const Header& header, Bitmask& weight) {
    (void)header;
    return read_bits(from, weight) + kSpare;
}

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
    return last + kSpare;
}

int64_t read(Reader& from, const Header& header, Groups& weight) {
    const int64_t n = header.sizes[0], m = header.sizes[1];
    check(m >= 2 && m <= 16 && n >= 1 && n <= m && weight.columns % m == 0, "its groups have a wrong size");
    weight.n = int(n), weight.m = int(m);
    // Any place in a word is one of a vector that the kernel loads at a group, and the inputs are padded for that.
    const int64_t panels = parts(weight.rows, 16), groups = weight.columns / m, slots = m <= 4 ? 16 : 8;
    const int64_t words = n > slots ? groups * parts(n, slots) : parts(groups, slots / n);
    weight.words = from.take<uint32_t>(panels * words * 16);
    return panels * groups * n * 16 + kSpare;
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
    return tiles * weight.height * weight.width + kSpare;
}

// What weights of eight bits share.
template <class Bytes> void read_bytes(Reader& from, const Header& header, Bytes& weight) {
    check(header.value_type == 2 && header.has_scale, "its values are no bytes with scales");
    check(weight.columns <= kMostBytes, "it has too many columns for sums of 32 bits");
    weight.sums = from.take<int32_t>(weight.rows);
}

int64_t read(Reader& from, const Header& header, Int8Panels& weight) {
    read_bytes(from, header, weight);
    return parts(weight.rows, 16) * 16 * parts(weight.columns, 4) * 4;
}

int64_t read(Reader& from, const Header& header, Int8Tiles& weight) {
    read_bytes(from, header, weight);
    weight.height = header.sizes[0], weight.width = header.sizes[1];
    weight.sections = header.sizes[2], weight.panel = header.sizes[3];
    const bool words = weight.width == 4 && (weight.height == 1 || weight.height == 4);
    check(words || (weight.width == 1 && weight.height == 4), "its tiles have a wrong size");
    check(weight.panel == 16 || weight.panel == 64, "its panels have a wrong size");
    check(weight.sections >= 1 && weight.sections <= weight.columns, "its sections are out of range");
    const int64_t rows = parts(weight.rows, weight.panel) * weight.panel / weight.height * weight.sections;
    weight.first_tiles = from.take<int64_t>(rows + 1);
    const int64_t tiles = check_offsets(weight.first_tiles, rows), places = words ? tiles : tiles * 4;
    check(tiles <= header.values / (4 * weight.height), "it has too few values");
    weight.places = from.take<uint16_t>(places + kSpareBytes);
    const int64_t across = words ? parts(weight.columns, 4) : weight.columns;
    for (int64_t i = 0; i < places; ++i) check(weight.places[i] < across, "a tile is outside of the weight");
    return tiles * 4 * weight.height + kSpareBytes;
}

int64_t read(Reader& from, const Header& header, Int8Bitmask& weight) {
    read_bytes(from, header, weight);
    return read_bits(from, weight) + kSpareBytes;
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
        check(stored_ <= header.values, "it has too few values");
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
