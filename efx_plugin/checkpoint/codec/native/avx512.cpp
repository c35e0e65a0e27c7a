// AVX512-VBMI2: one instruction compresses or expands a vector under a mask.
//
// The forms of these instructions that access memory are microcoded on some processors, so vectors are compressed and
// expanded in registers. A whole vector is then stored or loaded where the buffer has room for it, else under a mask,
// which accesses nothing that it masks out.
#include <immintrin.h>

#include "rows.hpp"

namespace {

template <class T>
struct Vector;

template <>
struct Vector<uint8_t> {
    using Lanes = __mmask64;
    static __m512i load(Lanes k, const void* from) { return _mm512_maskz_loadu_epi8(k, from); }
    static void store(void* to, Lanes k, __m512i v) { _mm512_mask_storeu_epi8(to, k, v); }
    static Lanes nonzero(__m512i v, uint8_t bits) { return _mm512_test_epi8_mask(v, _mm512_set1_epi8(bits)); }
    static __m512i compress(Lanes k, __m512i v) { return _mm512_maskz_compress_epi8(k, v); }
    static __m512i expand(Lanes k, __m512i v) { return _mm512_maskz_expand_epi8(k, v); }
};

template <>
struct Vector<uint16_t> {
    using Lanes = __mmask32;
    static __m512i load(Lanes k, const void* from) { return _mm512_maskz_loadu_epi16(k, from); }
    static void store(void* to, Lanes k, __m512i v) { _mm512_mask_storeu_epi16(to, k, v); }
    static Lanes nonzero(__m512i v, uint16_t bits) { return _mm512_test_epi16_mask(v, _mm512_set1_epi16(bits)); }
    static __m512i compress(Lanes k, __m512i v) { return _mm512_maskz_compress_epi16(k, v); }
    static __m512i expand(Lanes k, __m512i v) { return _mm512_maskz_expand_epi16(k, v); }
};

template <>
struct Vector<uint32_t> {
    using Lanes = __mmask16;
    static __m512i load(Lanes k, const void* from) { return _mm512_maskz_loadu_epi32(k, from); }
    static void store(void* to, Lanes k, __m512i v) { _mm512_mask_storeu_epi32(to, k, v); }
    static Lanes nonzero(__m512i v, uint32_t bits) { return _mm512_test_epi32_mask(v, _mm512_set1_epi32(bits)); }
    static __m512i compress(Lanes k, __m512i v) { return _mm512_maskz_compress_epi32(k, v); }
    static __m512i expand(Lanes k, __m512i v) { return _mm512_maskz_expand_epi32(k, v); }
};

struct Avx512 {
    template <class T>
    static constexpr int64_t kLanes = 64 / sizeof(T);

    template <class T>
    static uint64_t nonzeros(const T* weights, int64_t n, T magnitude) {
        uint64_t bits = 0;
        for (int64_t i = 0; i < kWord; i += kLanes<T>) {
            const auto k = static_cast<typename Vector<T>::Lanes>(first_lanes(n) >> i);
            const __m512i v = n == kWord ? _mm512_loadu_si512(weights + i) : Vector<T>::load(k, weights + i);
            bits |= static_cast<uint64_t>(Vector<T>::nonzero(v, magnitude)) << i;
        }
        return bits;
    }

    template <class T>
    static void compress(const T* weights, uint64_t nonzeros, uint64_t kept, T* to, int64_t room) {
        using Lanes = typename Vector<T>::Lanes;
        for (int64_t i = 0; i < kWord; i += kLanes<T>) {
            const Lanes k = static_cast<Lanes>(kept >> i);
            const int64_t count = __builtin_popcountll(k);
            const __m512i v = Vector<T>::compress(k, Vector<T>::load(static_cast<Lanes>(nonzeros >> i), weights + i));
            if (room >= kLanes<T>) {
                _mm512_storeu_si512(to, v);
            } else {
                Vector<T>::store(to, static_cast<Lanes>(first_lanes(count)), v);
            }
            to += count;
            room -= count;
        }
    }

    template <class T>
    static void expand(const T* from, int64_t left, uint64_t mask, T* weights, int64_t n) {
        using Lanes = typename Vector<T>::Lanes;
        for (int64_t i = 0; i < kWord; i += kLanes<T>) {
            const Lanes k = static_cast<Lanes>(mask >> i);
            const int64_t count = __builtin_popcountll(k);
            const __m512i v = left >= kLanes<T> ? _mm512_loadu_si512(from)
                                                : Vector<T>::load(static_cast<Lanes>(first_lanes(count)), from);
            const __m512i w = Vector<T>::expand(k, v);
            if (n == kWord) {
                _mm512_storeu_si512(weights + i, w);
            } else {
                Vector<T>::store(weights + i, static_cast<Lanes>(first_lanes(n) >> i), w);
            }
            from += count;
            left -= count;
        }
    }
};

}  // namespace

const efx::Codec efx::avx512 = CodecOf<Avx512>::table;
