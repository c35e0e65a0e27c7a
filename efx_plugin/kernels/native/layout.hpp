// A packed sparse weight: one buffer that every instruction set reads.
//
// The weight W [rows, columns] is cut into blocks of 16 rows, and a block into groups of adjacent columns: 2 for values of
// 16 bits, 4 for values of 8, so that a group of one row fills 32 bits and a group of 16 rows one vector of 512 bits. A
// group has one bit per weight, in the order row by row, and its non-zeros follow those of the group before. Expanded
// under its mask, a group is what the dot-product instructions take: a product with one activation per column, the same
// for all lanes, adds to 16 rows at once.
//
// Values of 4 bits are in groups like those of 8 bits, except that the columns of a row come in the order 0, 2, 1, 3: the
// even bytes of an expanded group are then pairs of adjacent columns, and the odd bytes too. Two values are in a byte, the
// first in its lower half, and a group begins with a byte of its own: a hundredth more bytes at half density, for a fifth
// less work. Their scales change along the columns: 32, 64 or 128 adjacent columns, in the last place maybe fewer, or
// all, are a span, which has one scale per row.
//
//   Header
//   scales   float [16 * blocks]         of int8 rows, 0 beyond the last row (only for int8)
//            uint16 [blocks][spans][16]  bfloat16 or float16 of int4 (only for int4)
//   sums     int32 [16 * blocks]         of the values of each row (only for int8 with quantized activations)
//   offsets  int64 [blocks + 1]          where each block's values begin, in values, or in bytes for int4
//   masks    uint32 or uint64 [blocks * groups]
//   values   uint16, int8, or two int4 to a byte, and 64 bytes of slack, for vectors are loaded whole
//
// All sections begin at multiples of 64 bytes. Nothing in the buffer is an address, so it may be copied.
#pragma once

#include <cstdint>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "groups are read as integers, lowest row first");

namespace efx {

constexpr int64_t kBlock = 16;      // rows
constexpr int64_t kGroupPad = 4;    // groups per block are a multiple of it; the added ones are empty
constexpr int64_t kAlign = 64;      // bytes
constexpr int64_t kMagic = 0x3230'5053'5846'45;  // "EFXSP02"

enum Kind : int64_t {
    kBf16 = 0,
    kInt8 = 1,         // activations stay as they are
    kInt8Dynamic = 2,  // activations are quantized per row: x = scale * int8 with scale = max |x| / 127
    kInt4 = 3,
    kInt4Dynamic = 4,
};

enum Type : int64_t { kTypeBf16 = 0, kTypeFp32 = 1 };  // of activations, bias and result

enum ScaleType : int64_t { kScaleBf16 = 0, kScaleFp16 = 1 };  // of the scales of int4; of other kinds the first

// What goes wrong, as the functions of entry.cpp return it; see native/__init__.py.
enum Status : int64_t {
    kOk = 0,
    kSizes = -1,        // the sizes disagree with each other or with the buffer
    kArguments = -2,    // an unknown kind or type
    kUnsupported = -3,  // this processor, or this build, lacks the instructions
    kMemory = -4,
};

// Kind, scale type and span are in the magic number too: they may differ where all sections are in the same places.
// `span` counts columns, and is 0 but for int4; `values` counts what offsets count.
struct Header {
    int64_t magic, kind, rows, columns, span, scale_type, blocks, groups, values;
    int64_t scales_at, sums_at, offsets_at, masks_at, values_at, size;  // bytes from the start of the buffer
};

inline int64_t group_columns(int64_t kind) { return kind == kBf16 ? 2 : 4; }
inline bool is_int8(int64_t kind) { return kind == kInt8 || kind == kInt8Dynamic; }
inline bool is_int4(int64_t kind) { return kind == kInt4 || kind == kInt4Dynamic; }
inline bool is_dynamic(int64_t kind) { return kind == kInt8Dynamic || kind == kInt4Dynamic; }

// Of int4.
inline int64_t count_spans(const Header& header) { return (header.columns + header.span - 1) / header.span; }

// The column, of four, in each place of a row of int4; also the place of each column.
constexpr int kInt4Order[4] = {0, 2, 1, 3};

// The weight of a buffer: its header, and where its sections are.
struct Weight {
    const Header* header;
    const char* base;

    const float* scales() const { return is_int8(header->kind) ? at<float>(header->scales_at) : nullptr; }
    // Of a block of int4.
    const uint16_t* span_scales(int64_t block) const {
        return at<uint16_t>(header->scales_at) + block * count_spans(*header) * kBlock;
    }
    const int32_t* sums() const { return at<int32_t>(header->sums_at); }
    const int64_t* offsets() const { return at<int64_t>(header->offsets_at); }
    template <class Mask>
    const Mask* masks() const {
        return at<Mask>(header->masks_at);
    }
    template <class Value>
    const Value* values() const {
        return at<Value>(header->values_at);
    }

   private:
    template <class T>
    const T* at(int64_t offset) const {
        return reinterpret_cast<const T*>(base + offset);
    }
};

// y [m, rows] = x [m, columns] times the weight, plus bias [rows] if there is one; all row-major, of one type.
struct Call {
    Weight weight;
    Type type;
    const void* x;
    int64_t m;
    const void* bias;  // or null
    void* y;
    int threads;
};

// A dense weight to pack: bfloat16 or int8, row-major, in this thread's share of blocks.
struct Dense {
    const void* weight;
    int64_t rows, columns;
};

// One instruction set.
struct Isa {
    int64_t (*linear)(const Call&);
    // How many values a block has, as offsets count them.
    int64_t (*count)(const Dense&, int64_t kind, int64_t block);
    // A block's masks, values, and sums unless null, to their places.
    void (*pack)(const Dense&, const Header&, int64_t block, void* masks, void* values, int32_t* sums);
};

extern const Isa portable;
extern const Isa avx2;         // AVX2, FMA
extern const Isa avx512;       // AVX512F, BW, DQ, VL, BMI2
extern const Isa avx512_vnni;  // and VNNI
extern const Isa avx512_bf16;  // and VBMI, VBMI2, BF16
extern const Isa amx;          // and AMX for bfloat16 and int8
extern const Isa neon;         // aarch64
extern const Isa neon_bf16;    // DotProd, BF16

// Whether the processor multiplies tiles of bfloat16 and int8 (AMX), and the system lets this process do so, which has to
// ask for it.
bool can_use_tiles();
int64_t linear_by_tiles(const Call& call);  // for processors that can

}  // namespace efx
