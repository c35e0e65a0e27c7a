// Packing a weight under the mask of its non-zeros, and back.
//
// A weight is rows x columns unsigned integers of 1, 2 or 4 bytes. Its mask holds one bit per weight, lowest bit first,
// each row beginning a byte: ceil(columns / 8) bytes a row. The loops over rows and words of 64 bits are in rows.hpp;
// portable.cpp and avx512.cpp compile them for one instruction set each; entry.cpp checks sizes and picks one of them.
#pragma once

#include <cstdint>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are read as words of 64 bits, lowest byte first");

namespace efx {

// What goes wrong, as the functions of entry.cpp return it; see native/__init__.py.
enum Status : int64_t {
    kSizes = -1,    // the buffers are not as large as rows and columns ask
    kWidth = -2,    // no integers of that many bytes
    kRoom = -3,     // more bits in the mask than packed values (or than room for them)
    kUnused = -4,   // more packed values than bits in the mask
    kPadding = -5,  // a bit set beyond the last column
    kNot24 = -6,    // more than two non-zeros in an aligned four of a row
};

struct Pack {
    int64_t width;
    const void* weight;
    int64_t rows, columns;
    uint32_t magnitude;  // the bits that are clear in a zero
    bool fours;          // 2:4: keep exactly two of every four, zeros where a four has fewer non-zeros
    uint8_t* mask;
    int64_t* counts;  // bits set per row
    void* packed;     // null: only the mask
    int64_t packed_size;
};

struct Unpack {
    int64_t width;
    const void* packed;
    int64_t packed_size;
    const uint8_t* mask;
    int64_t rows, columns;
    void* weight;
};

struct Mask {
    const uint8_t* bytes;
    int64_t rows, columns;
};

// One instruction set. All sizes have been checked but for those that only the bits of the mask tell.
struct Codec {
    int64_t (*pack)(const Pack&);      // the number of values kept, or a Status
    int64_t (*unpack)(const Unpack&);  // the number of values, or a Status
    void (*count)(const Mask&, int64_t* counts);
    int64_t (*fours)(const Mask&);  // 2: two bits in every aligned four of a row; 1: at most two; 0: more somewhere
};

extern const Codec portable;
extern const Codec avx512;  // in builds for x86-64; needs AVX512F, AVX512BW and AVX512-VBMI2

}  // namespace efx
