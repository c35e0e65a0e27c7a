// AVX-512 with VBMI, VBMI2, VNNI and BF16 (AMD from Zen 4, Intel from Sapphire Rapids): groups expand in one instruction into what
// the dot products of two bfloat16 or four int8 take.
#include <immintrin.h>

#include "expand_rows.hpp"
#include "linear.hpp"
#include "pack.hpp"
#include "transpose.hpp"
#include "vnni.hpp"

namespace {

struct Bytes {
    uint8_t bytes[64];
};

template <class F>
constexpr Bytes make_bytes(F&& byte) {
    Bytes made{};
    for (int i = 0; i < 64; i++) made.bytes[i] = static_cast<uint8_t>(byte(i));
    return made;
}

// Groups expand in one instruction.
struct Vbmi2 : Registers {
    EFX_INLINE static inline void round(const float* floats, uint16_t* bf16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(floats)));
    }
    EFX_INLINE static inline __m512i expand_bytes(uint64_t mask, const int8_t* values) {
        return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
    }
    EFX_INLINE static inline __m512i expand_nibbles(uint64_t mask, const Nibbles& values) {
        // Eight nibbles come from eight bytes, for the last of them may lie in the fifth.
        alignas(64) static constexpr Bytes kFrom = make_bytes([](int i) { return i / 8 * 4 + i % 8; });
        alignas(64) static constexpr Bytes kShifts[2] = {make_bytes([](int i) { return i % 8 * 4; }),
                                                         make_bytes([](int i) { return i % 8 * 4 + 4; })};
        const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(&kFrom), _mm512_loadu_si512(values.at()));
        const __m512i shifts = _mm512_load_si512(&kShifts[values.next % 2]);
        return _mm512_maskz_expand_epi8(mask, _mm512_multishift_epi64_epi8(shifts, bytes));
    }
};

struct FloatSums : Vbmi2 {
    using Vector = __m512i;
    using Accumulator = __m512;
    using Element = uint16_t;
    static Accumulator zero() { return _mm512_setzero_ps(); }
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, Vector vector, const Element* x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)vector, (__m512bh)broadcast(x));
    }
    EFX_INLINE static inline void finish(Accumulator sum, float* floats, const int32_t*) {
        _mm512_store_ps(floats, sum);
    }
};

// bfloat16 times bfloat16.
struct Bf16Bf16 : FloatSums {
    using Mask = uint32_t;
    using Value = uint16_t;
    using Values = const Value*;
    static constexpr int kColumns = 2, kVectors = 1;

    EFX_INLINE static inline void expand(Mask mask, const Value* values, Vector* vectors) {
        vectors[0] = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    }
};

// int8 times bfloat16: every int8 is a bfloat16.
struct Int8Bf16 : FloatSums, Int8Weight {
    static constexpr int kVectors = 2;
    static constexpr int blocks(int m) { return m <= 4 ? 3 : m <= 8 ? 2 : 1; }

    EFX_INLINE static inline void expand(Mask mask, const Value* values, Vector* vectors) {
        const __m512i fours = expand_bytes(mask, values);
        vectors[0] = pair(floats_of<0>(fours), floats_of<1>(fours));
        vectors[1] = pair(floats_of<2>(fours), floats_of<3>(fours));
    }

   private:
    // Column c of the 16 rows.
    template <int c>
    EFX_INLINE static inline __m512 floats_of(__m512i fours) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(c == 3 ? fours : _mm512_slli_epi32(fours, 24 - 8 * c), 24));
    }
    // The upper halves of both, which are all of a small integer.
    EFX_INLINE static inline __m512i pair(__m512 even, __m512 odd) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
        return _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(odd));
    }
};

// int4 times bfloat16.
struct Int4Bf16 : FloatSums, Int4Weight {
    using Int4Weight::kSpans, Int4Weight::kTile;
    static constexpr int kVectors = 2;
    static constexpr int blocks(int m) { return m <= 1 ? 4 : m <= 4 ? 3 : m <= 8 ? 2 : 1; }

    EFX_INLINE static inline void expand(Mask mask, const Nibbles& values, Vector* vectors) {
        // A look-up takes the lowest five bits of a word.
        alignas(64) static constexpr uint16_t kBf16[32] = {
            0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0,
            0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
            0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};
        const __m512i table = _mm512_load_si512(kBf16), nibbles = expand_nibbles(mask, values);
        vectors[0] = _mm512_permutexvar_epi16(nibbles, table);
        vectors[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 8), table);
    }
    EFX_INLINE static inline __m512 add_scaled(__m512 total, Accumulator sum, __m512 scales, int32_t) {
        return _mm512_fmadd_ps(sum, scales, total);
    }
};

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
    int8_t bytes[1 + 64];  // a group's, behind one that may be left of those before
    int64_t count = 0;
    each_group<int8_t>(dense, header, block, [&](int64_t i, __m512i group) {
        masks[i] = Packer::compress(reorder(group), bytes + count);
        count += __builtin_popcountll(masks[i]);
        for (int64_t k = 0; k + 1 < count; k += 2) *values++ = (bytes[k] & 15) | (bytes[k + 1] & 15) << 4;
        if (count % 2) bytes[0] = bytes[count - 1];
        count %= 2;
    });
    if (count) *values = bytes[0] & 15;
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

const efx::Isa efx::avx512_bf16{linear, count_block, pack_vector_block, expand_block<Vbmi2>};
