// AVX-512 with VBMI, VBMI2, VNNI and BF16 (AMD from Zen 4, Intel from Sapphire Rapids): groups expand in one instruction into what
// the dot products of two bfloat16 or four int8 take.
#include <immintrin.h>

#include "linear.hpp"
#include "pack.hpp"
#include "transpose.hpp"
#include "vbmi2.hpp"

namespace {

// Packing works on 16 rows of 64 bytes, whose transpose has a group in each row.
struct Packer {
    template <class Value>
    static void load_groups(const Value* weight, int64_t stride, int64_t rows, int64_t columns, __m512i* groups) {
        for (int i = 0; i < 16; i++) {
            if (i >= rows) {
                groups[i] = _mm512_setzero_si512();
            } else if constexpr (sizeof(Value) == 2) {
                groups[i] = _mm512_maskz_loadu_epi16(columns < 32 ? (1u << columns) - 1 : ~0u, weight + i * stride);
            } else {
                groups[i] = _mm512_maskz_loadu_epi8(columns < 64 ? (uint64_t{1} << columns) - 1 : ~uint64_t{0},
                                                    weight + i * stride);
            }
        }
        transpose(groups);
    }

    static uint32_t compress(__m512i group, uint16_t* to) {
        const uint32_t mask = _mm512_test_epi16_mask(group, _mm512_set1_epi16(0x7FFF));
        const int n = __builtin_popcount(mask);
        _mm512_mask_storeu_epi16(to, n < 32 ? (1u << n) - 1 : ~0u, _mm512_maskz_compress_epi16(mask, group));
        return mask;
    }

    static uint64_t compress(__m512i group, int8_t* to) {
        const uint64_t mask = _mm512_test_epi8_mask(group, group);
        const int n = __builtin_popcountll(mask);
        _mm512_mask_storeu_epi8(to, n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0},
                                _mm512_maskz_compress_epi8(mask, group));
        return mask;
    }

    static __m512i add_sums(__m512i sums, __m512i group) {
        return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), group);
    }
};

// f(i, group) for each group i of a block.
template <class Value, class F>
void each_group(const efx::Dense& dense, const efx::Header& header, int64_t block, F&& f) {
    constexpr int64_t kStep = 64 / sizeof(Value);  // columns
    const int64_t first = block * kBlock;
    const int64_t rows = dense.rows - first < kBlock ? dense.rows - first : kBlock;
    const Value* weight = static_cast<const Value*>(dense.weight) + first * dense.columns;
    for (int64_t group = 0; group < header.groups; group += 16) {
        const int64_t column = group / 16 * kStep;
        const int64_t n = header.groups - group < 16 ? header.groups - group : 16;
        __m512i groups[16];
        Packer::load_groups(weight + column, dense.columns, rows, dense.columns - column, groups);
        for (int64_t i = 0; i < n; i++) f(group + i, groups[i]);
    }
}

template <class Value, class Mask>
void pack_vectors(const efx::Dense& dense, const efx::Header& header, int64_t block, Mask* masks, Value* values,
                  int32_t* sums) {
    __m512i total = _mm512_setzero_si512();
    each_group<Value>(dense, header, block, [&](int64_t i, __m512i group) {
        masks[i] = Packer::compress(group, values);
        values += __builtin_popcountll(masks[i]);
        if (sums) total = Packer::add_sums(total, group);
    });
    if (sums) _mm512_storeu_si512(sums, total);
}

void pack_vector_nibbles(const efx::Dense& dense, const efx::Header& header, int64_t block, uint64_t* masks,
                         uint8_t* values) {
    each_group<int8_t>(dense, header, block, [&](int64_t i, __m512i group) {
        int8_t bytes[64 + 1];
        masks[i] = Packer::compress(reorder(group), bytes);
        const int count = __builtin_popcountll(masks[i]);
        bytes[count] = 0;
        for (int k = 0; k < count; k += 2) *values++ = (bytes[k] & 15) | (bytes[k + 1] & 15) << 4;
    });
}

void pack_vector_block(const efx::Dense& dense, const efx::Header& header, int64_t block, void* masks, void* values,
                       int32_t* sums) {
    if (header.kind == efx::kBf16) {
        pack_vectors(dense, header, block, static_cast<uint32_t*>(masks), static_cast<uint16_t*>(values), sums);
    } else if (efx::is_int4(header.kind)) {
        pack_vector_nibbles(dense, header, block, static_cast<uint64_t*>(masks), static_cast<uint8_t*>(values));
    } else {
        pack_vectors(dense, header, block, static_cast<uint64_t*>(masks), static_cast<int8_t*>(values), sums);
    }
}

int64_t linear(const efx::Call& call) {
    const int64_t kind = call.weight.header->kind;
    if (kind == efx::kInt8Dynamic) return Linear<Int8Int8<Vbmi2>>::run(call);
    if (kind == efx::kInt4Dynamic) return Linear<Int4Int8<Vbmi2>>::run(call);
    if (call.type == efx::kTypeFp32) return efx::avx512.linear(call);  // nothing here helps with those
    if (kind == efx::kInt4) return Linear<Int4Bf16>::run(call);
    return kind == efx::kBf16 ? Linear<Bf16Bf16>::run(call) : Linear<Int8Bf16>::run(call);
}

}  // namespace

const efx::Isa efx::avx512_bf16{linear, count_block, pack_vector_block};
const efx::Isa efx::amx{linear_by_tiles, count_block, pack_vector_block};
