// Blocks of a packed weight made dense again, row by row, for a product by another library.
#pragma once

#include "linear.hpp"
#include "transpose.hpp"
#include "vnni.hpp"

namespace {

// f(row, column, values) for each row and each 64 bytes of it that hold columns from `column` on. A row's columns are in
// the order of the packed weight. `expand(mask, values)` is a group.
template <class Mask, class Values, class Expand, class F>
EFX_INLINE inline void each_row(const efx::Weight& weight, int64_t block, int64_t rows, Values values, Expand&& expand,
                                F&& f) {
    constexpr int64_t kAhead = 2048;  // bytes of values to prefetch ahead
    const efx::Header& header = *weight.header;
    const Mask* masks = weight.masks<Mask>() + block * header.groups;
    for (int64_t group = 0; group < header.groups; group += 16) {
        const int64_t n = header.groups - group < 16 ? header.groups - group : 16;
        __m512i v[16];
        for (int64_t i = 0; i < 16; i++) {
            const Mask mask = i < n ? masks[group + i] : 0;
            v[i] = expand(mask, values);
            __builtin_prefetch(address(values) + kAhead);
            values += sizeof(Mask) == 4 ? __builtin_popcount(mask) : __builtin_popcountll(mask);
        }
        transpose(v);
        for (int64_t row = 0; row < rows; row++) f(row, group * efx::group_columns(header.kind), v[row]);
    }
}

// The first n of 32 bfloat16, if so many.
EFX_INLINE inline void store_bf16(uint16_t* to, __m512i values, int64_t n) {
    _mm512_mask_storeu_epi16(to, n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0u, values);
}

// 64 int8 times a scale for either half of them, each product rounded once.
EFX_INLINE inline void store_scaled(uint16_t* to, __m512i values, float first, float second, int64_t n) {
    alignas(64) int8_t bytes[64];
    _mm512_store_si512(bytes, values);
    unroll<2>([&](auto half) EFX_INLINE {
        const __m512 scale = _mm512_set1_ps(half ? second : first);
        const auto sixteen = [&](int from) EFX_INLINE {
            const __m128i loaded = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes + 32 * half + from));
            return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(loaded)), scale);
        };
        store_bf16(to + 32 * half, (__m512i)_mm512_cvtne2ps_pbh(sixteen(16), sixteen(0)), n - 32 * half);
    });
}

// The scales of 16 rows of int4 in the columns from `column` on, and in those 32 further.
EFX_INLINE inline void load_scales(const efx::Weight& weight, int64_t block, int64_t column, float (*scales)[kBlock]) {
    const efx::Header& header = *weight.header;
    for (int half = 0; half < 2; half++) {
        const int64_t here = column + 32 * half < header.columns ? column + 32 * half : header.columns - 1;
        const uint16_t* from = weight.span_scales(block) + here / header.span * kBlock;
        Int4Weight::store(scales[half], Int4Weight::load_scales(from, header.scale_type == efx::kScaleFp16));
    }
}

// `rows` of a block's rows to `dense` [rows, columns] of bfloat16; weights of 8 and of 4 bits times their scales. `Simd`
// is as in vnni.hpp.
template <class Simd>
void expand_block(const efx::Weight& weight, int64_t block, int64_t rows, uint16_t* dense) {
    const efx::Header& header = *weight.header;
    const int64_t columns = header.columns, offset = weight.offsets()[block];
    if (header.kind == efx::kBf16) {
        const auto expand = [](uint32_t mask, const uint16_t* values) EFX_INLINE {
            return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
        };
        each_row<uint32_t>(weight, block, rows, weight.values<uint16_t>() + offset, expand,
                           [&](int64_t row, int64_t column, __m512i values) EFX_INLINE {
                               store_bf16(dense + row * columns + column, values, columns - column);
                           });
    } else if (efx::is_int8(header.kind)) {
        const float* scales = weight.scales() + block * kBlock;
        each_row<uint64_t>(weight, block, rows, weight.values<int8_t>() + offset, Simd::expand_bytes,
                           [&](int64_t row, int64_t column, __m512i values) EFX_INLINE {
                               store_scaled(dense + row * columns + column, values, scales[row], scales[row],
                                            columns - column);
                           });
    } else {
        alignas(64) float scales[2][kBlock];
        const __m512i eight = _mm512_set1_epi8(8);
        each_row<uint64_t>(weight, block, rows, Nibbles{weight.values<uint8_t>() + offset}, Simd::expand_nibbles,
                           [&](int64_t row, int64_t column, __m512i values) EFX_INLINE {
                               if (row == 0) load_scales(weight, block, column, scales);
                               const __m512i nibbles = _mm512_and_si512(values, _mm512_set1_epi8(15));
                               const __m512i bytes = _mm512_sub_epi8(_mm512_xor_si512(nibbles, eight), eight);
                               store_scaled(dense + row * columns + column, reorder(bytes), scales[0][row],
                                            scales[1][row], columns - column);
                           });
    }
}

}  // namespace
