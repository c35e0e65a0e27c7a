// AVX-512 without VBMI2 or BF16 (Intel from Skylake-SP, and Ice Lake): words of 32 bits are expanded, bytes are shuffled,
// and nibbles move in general registers. int8 activations are multiplied in integers of 16 bits.
#include <immintrin.h>

#include "expand_sixteen.hpp"
#include "floats.hpp"

namespace {

struct Avx512 {
    using Floats = __m512;
    static constexpr int kTile = 24;
    static constexpr int blocks(int m) { return m <= 4 ? 4 : m <= 6 ? 3 : m <= 12 ? 2 : 1; }

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    EFX_INLINE static inline void store(float* to, Floats floats) { _mm512_storeu_ps(to, floats); }
    EFX_INLINE static inline Floats multiply_add(Floats sum, Floats floats, float x) {
        return _mm512_fmadd_ps(floats, _mm512_set1_ps(x), sum);
    }
    EFX_INLINE static inline Floats multiply_add(Floats sum, Floats floats, Floats x) {
        return _mm512_fmadd_ps(floats, x, sum);
    }
    EFX_INLINE static inline void expand_pairs(uint32_t mask, const uint16_t* values, Floats* vectors) {
        const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
        const __m512 upper_rows = expand(low, values);  // pairs of columns, rows 0 to 7
        const __m512 lower_rows = expand(high, values + __builtin_popcount(low));
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        vectors[0] = _mm512_permutex2var_ps(upper_rows, even, lower_rows);
        vectors[1] = _mm512_permutex2var_ps(upper_rows, odd, lower_rows);
    }
    EFX_INLINE static inline void expand_bytes(uint64_t mask, const int8_t* values, Floats* vectors) {
        const __m512i fours = expand_sixty_four(mask, values);
        unroll<4>([&](auto c) EFX_INLINE {
            const __m512i top = c == 3 ? fours : _mm512_slli_epi32(fours, 24 - 8 * c);
            vectors[c] = _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
        });
    }
    EFX_INLINE static inline void expand_nibbles(uint64_t mask, Nibbles values, Floats* vectors) {
        uint64_t rows[4];  // each four rows of four columns
        unroll<4>([&](auto i) EFX_INLINE {
            const uint64_t kept = mask >> 16 * i & 0xFFFF;
            rows[i] = _pdep_u64(values.sixteen(), 15 * _pdep_u64(kept, 0x1111'1111'1111'1111));
            values += __builtin_popcountll(kept);
        });
        const __m512i fours = _mm512_cvtepu16_epi32(_mm256_setr_epi64x(rows[0], rows[1], rows[2], rows[3]));
        unroll<4>([&](auto i) EFX_INLINE {  // a look-up takes the lowest four bits
            const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
            vectors[efx::kInt4Order[i]] = _mm512_permutexvar_ps(_mm512_srli_epi32(fours, 4 * i), values);
        });
    }

   private:
    EFX_INLINE static inline __m512 expand(__mmask16 mask, const uint16_t* values) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        const __m512i floats = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
        return _mm512_castsi512_ps(_mm512_maskz_expand_epi32(mask, floats));
    }
};

// int8 times int8. Words of two columns add to 32 bits, exactly, and take a third of the work of four columns of floats.
struct Int8Words : FloatDot<Avx512> {
    using Mask = uint64_t;
    using Value = int8_t;
    using Values = const Value*;
    using Element = int16_t;
    using Vector = __m512i;
    using Accumulator = __m512i;
    static constexpr int kColumns = 4, kVectors = 2;
    static constexpr int column(int i) { return efx::kInt4Order[i]; }

    static Accumulator zero() { return _mm512_setzero_si512(); }
    static Element quantize(float x) { return static_cast<Element>(nearest(x)); }
    EFX_INLINE static inline void expand(Mask mask, const Value* values, Vector* vectors) {
        const __m512i fours = expand_sixty_four(mask, values);
        vectors[0] = _mm512_srai_epi16(_mm512_slli_epi16(fours, 8), 8);  // columns 0 and 2
        vectors[1] = _mm512_srai_epi16(fours, 8);
    }
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, Vector vector, const Element* x) {
        int32_t two;
        std::memcpy(&two, x, 4);
        return _mm512_add_epi32(sum, _mm512_madd_epi16(vector, _mm512_set1_epi32(two)));
    }
    EFX_INLINE static inline void finish(Accumulator sum, float* floats, const int32_t*) {
        _mm512_store_ps(floats, _mm512_cvtepi32_ps(sum));
    }
};

int64_t linear(const efx::Call& call) {
    const bool is_int8 = call.weight.header->kind == efx::kInt8Dynamic;
    return is_int8 ? Linear<Int8Words>::run(call) : linear<Avx512>(call);
}

}  // namespace

const efx::Isa efx::avx512{linear, count_block, pack_block};
