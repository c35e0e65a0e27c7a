// Dots for instruction sets that multiply floats: weights and activations are widened to 32 bits.
//
// A `Simd` has `Floats`, 16 of them, with zero(), load(from), store(to, floats), multiply_add(sum, floats, x) for floats
// or one x, and
//   expand_pairs(mask, values, floats)     bfloat16 groups to floats[2], one column of 16 rows each
//   expand_bytes(mask, values, floats)     int8 groups to floats[4]
//   expand_nibbles(mask, nibbles, floats)  int4 groups to floats[4]
// and kTile, blocks(m) as in linear.hpp, for the number of its registers.
#pragma once

#include "linear.hpp"
#include "pack.hpp"

namespace {

template <class Simd>
struct FloatDot : Simd {
    using Vector = typename Simd::Floats;
    using Accumulator = typename Simd::Floats;
    using Element = float;
    static constexpr bool kSpans = false;
    static constexpr int kShift = 0;
    static constexpr int column(int i) { return i; }

    EFX_INLINE static inline Accumulator multiply(const Accumulator& sum, const Vector& vector, const Element* x) {
        return Simd::multiply_add(sum, vector, *x);
    }
    // Quantized activations are integers in floats.
    static float quantize(float x) { return static_cast<float>(nearest(x)); }
    EFX_INLINE static inline void finish(const Accumulator& sum, float* floats, const int32_t*) {
        Simd::store(floats, sum);
    }
    EFX_INLINE static inline void round(const float* floats, uint16_t* bf16) {
        for (int i = 0; i < kBlock; i++) bf16[i] = to_bf16(floats[i]);
    }
};

template <class Simd>
struct Bf16Float : FloatDot<Simd> {
    using Mask = uint32_t;
    using Value = uint16_t;
    using Values = const Value*;
    static constexpr int kColumns = 2, kVectors = 2;

    EFX_INLINE static inline void expand(Mask mask, const Value* values, typename Simd::Floats* vectors) {
        Simd::expand_pairs(mask, values, vectors);
    }
};

// Weights of 8 and of 4 bits.
template <class Simd>
struct FourColumns : FloatDot<Simd> {
    using Mask = uint64_t;
    static constexpr int kColumns = 4, kVectors = 4;
};

template <class Simd>
struct Int8Float : FourColumns<Simd> {
    using Value = int8_t;
    using Values = const Value*;

    EFX_INLINE static inline void expand(uint64_t mask, const Value* values, typename Simd::Floats* vectors) {
        Simd::expand_bytes(mask, values, vectors);
    }
};

// Of a float16.
inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = uint32_t{half} << 13 & 0x0FFFE000;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;  // from one bias of the exponent to the other, denormals too
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= (half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;  // infinities and NaNs
    bits |= uint32_t{half} << 16 & 0x80000000;
    std::memcpy(&value, &bits, 4);
    return value;
}

// A block at a time: its four vectors, and those of the next group, take many registers.
template <class Simd>
struct Int4Float : FourColumns<Simd> {
    using Value = uint8_t;
    using Values = Nibbles;
    using Floats = typename Simd::Floats;
    static constexpr bool kSpans = true;
    static constexpr int kTile = Simd::kTile < 16 ? Simd::kTile : 16;
    static constexpr int blocks(int) { return 1; }

    EFX_INLINE static inline void expand(uint64_t mask, const Nibbles& values, Floats* vectors) {
        Simd::expand_nibbles(mask, values, vectors);
    }
    static Floats load_scales(const uint16_t* scales, bool is_fp16) {
        alignas(64) float floats[kBlock];
        for (int i = 0; i < kBlock; i++) floats[i] = is_fp16 ? half_to_float(scales[i]) : to_float(scales[i]);
        return Simd::load(floats);
    }
    EFX_INLINE static inline Floats add_scaled(const Floats& total, const Floats& sum, const Floats& scales, int32_t) {
        return Simd::multiply_add(total, sum, scales);
    }
};

template <class Simd>
int64_t linear(const efx::Call& call) {
    switch (call.weight.header->kind) {
        case efx::kBf16:
            return Linear<Bf16Float<Simd>>::run(call);
        case efx::kInt8:
        case efx::kInt8Dynamic:
            return Linear<Int8Float<Simd>>::run(call);
        default:
            return Linear<Int4Float<Simd>>::run(call);
    }
}

template <class Simd>
constexpr efx::Isa kFloatIsa{linear<Simd>, count_block, pack_block};

}  // namespace
