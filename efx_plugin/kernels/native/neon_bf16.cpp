// NEON with the dot products of two bfloat16 and of four int8 (all of ARMv8.6; Neoverse V1 before it): a group expands into
// what they take.
#include "neon.hpp"
#include "pack.hpp"

namespace {

struct Registers {  // what the dots here have in common
    using Floats = ::Floats;
    using Vector = Group;
    static constexpr int kTile = 4;
    static constexpr bool kSpans = false;
    static constexpr int kShift = 0;
    static constexpr int column(int i) { return i; }
    static constexpr int blocks(int m) { return m == 1 ? 2 : 1; }

    // The elements of a group's columns, four bytes, for all rows.
    EFX_INLINE static inline uint32x2_t broadcast(const void* four_bytes) {
        uint32_t bits;
        std::memcpy(&bits, four_bytes, 4);
        return vdup_n_u32(bits);
    }
    EFX_INLINE static inline void store(float* to, const Floats& floats) { ::store(to, floats); }
    EFX_INLINE static inline void round(const float* floats, uint16_t* bf16) {
        unroll<4>([&](auto i) EFX_INLINE {
            vst1_u16(bf16 + 4 * i, vreinterpret_u16_bf16(vcvt_bf16_f32(vld1q_f32(floats + 4 * i))));
        });
    }
};

// The dot product of two bfloat16 rounds both of its sums to odd, which may err twice as much as to nearest, and takes and
// gives zeros for denormals.
struct FloatSums : Registers {
    using Accumulator = Floats;
    using Element = uint16_t;

    static Accumulator zero() { return {}; }
    EFX_INLINE static inline void finish(const Accumulator& sum, float* floats, const int32_t*) { store(floats, sum); }
    // Two columns of each row.
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, const Group& pairs, const Element* x) {
        const bfloat16x4_t two = vreinterpret_bf16_u32(broadcast(x));
        unroll<4>([&](auto i) EFX_INLINE {
            sum.fours[i] = vbfdotq_lane_f32(sum.fours[i], vreinterpretq_bf16_u8(pairs.fours[i]), two, 0);
        });
        return sum;
    }
};

// Four columns of int8, in integers.
struct IntSums : Registers {
    struct Accumulator {
        int32x4_t fours[4];
    };
    using Element = int8_t;
    static constexpr int kColumns = 4, kVectors = 1;

    static Accumulator zero() { return {}; }
    static Element quantize(float x) { return static_cast<Element>(nearest(x)); }
    EFX_INLINE static inline Accumulator multiply(Accumulator sum, const Group& group, const Element* x) {
        const int8x8_t four = vreinterpret_s8_u32(broadcast(x));
        unroll<4>([&](auto i) EFX_INLINE {
            sum.fours[i] = vdotq_lane_s32(sum.fours[i], vreinterpretq_s8_u8(group.fours[i]), four, 0);
        });
        return sum;
    }

   protected:
    EFX_INLINE static inline Floats to_floats(const Accumulator& sum) {
        Floats floats;
        unroll<4>([&](auto i) EFX_INLINE { floats.fours[i] = vcvtq_f32_s32(sum.fours[i]); });
        return floats;
    }
};

struct Int8Weight {
    using Mask = uint64_t;
    using Value = int8_t;
    using Values = const Value*;
};

struct Int4Weight {
    using Mask = uint64_t;
    using Value = uint8_t;
    using Values = Nibbles;
    static constexpr bool kSpans = true;

    EFX_INLINE static inline Floats load_scales(const uint16_t* scales, bool is_fp16) {
        Floats floats;
        unroll<4>([&](auto i) EFX_INLINE {
            const uint16x4_t four = vld1_u16(scales + 4 * i);
            floats.fours[i] = is_fp16 ? vcvt_f32_f16(vreinterpret_f16_u16(four))
                                      : vreinterpretq_f32_u32(vshll_n_u16(four, 16));
        });
        return floats;
    }
    EFX_INLINE static inline Floats add_scaled(Floats total, const Floats& sum, const Floats& scales, int32_t) {
        unroll<4>([&](auto i) EFX_INLINE {
            total.fours[i] = vfmaq_f32(total.fours[i], sum.fours[i], scales.fours[i]);
        });
        return total;
    }
};

// bfloat16 times bfloat16.
struct Bf16Bf16 : FloatSums {
    using Mask = uint32_t;
    using Value = uint16_t;
    using Values = const Value*;
    static constexpr int kColumns = 2, kVectors = 1;

    EFX_INLINE static inline void expand(Mask mask, const Value* values, Group* groups) {
        groups[0] = expand_pairs(mask, values);
    }
};

// Four columns of small integers, each a bfloat16, in two pairs.
struct FourBf16 : FloatSums {
    static constexpr int kColumns = 4, kVectors = 2;
};

// int8 times bfloat16.
struct Int8Bf16 : FourBf16, Int8Weight {
    EFX_INLINE static inline void expand(Mask mask, const Value* values, Group* groups) {
        const Group bytes = expand_bytes(mask, values);
        unroll<4>([&](auto i) EFX_INLINE {
            const uint8x16_t rows = bytes.fours[i];
            groups[0].fours[i] = pair(column_of<0>(rows), column_of<1>(rows));
            groups[1].fours[i] = pair(column_of<2>(rows), column_of<3>(rows));
        });
    }

   private:
    // The upper halves of both, which are all of a small integer.
    EFX_INLINE static inline uint8x16_t pair(float32x4_t even, float32x4_t odd) {
        return vreinterpretq_u8_u16(vtrn2q_u16(vreinterpretq_u16_f32(even), vreinterpretq_u16_f32(odd)));
    }
};

// int8 times int8.
struct Int8Int8 : IntSums, Int8Weight {
    EFX_INLINE static inline void expand(Mask mask, const Value* values, Group* groups) {
        groups[0] = expand_bytes(mask, values);
    }
    EFX_INLINE static inline void finish(const Accumulator& sum, float* floats, const int32_t*) {
        store(floats, to_floats(sum));
    }
};

// int4 times bfloat16.
struct Int4Bf16 : FourBf16, Int4Weight {
    using Int4Weight::kSpans;

    EFX_INLINE static inline void expand(Mask mask, const Nibbles& values, Group* groups) {
        // The halves of a bfloat16, by nibble.
        static constexpr uint8_t kLow[16] = {0x00, 0x80, 0x00, 0x40, 0x80, 0xA0, 0xC0, 0xE0,
                                             0x00, 0xE0, 0xC0, 0xA0, 0x80, 0x40, 0x00, 0x80};
        static constexpr uint8_t kHigh[16] = {0x00, 0x3F, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40,
                                              0xC1, 0xC0, 0xC0, 0xC0, 0xC0, 0xC0, 0xC0, 0xBF};
        const uint8x16_t low_table = vld1q_u8(kLow), high_table = vld1q_u8(kHigh);
        const Group nibbles = expand_nibbles(mask, values);
        unroll<4>([&](auto i) EFX_INLINE {
            const uint8x16_t low = vqtbl1q_u8(low_table, nibbles.fours[i]);
            const uint8x16_t high = vqtbl1q_u8(high_table, nibbles.fours[i]);
            groups[0].fours[i] = vtrn1q_u8(low, high);  // of the even places, which are columns 0 and 1
            groups[1].fours[i] = vtrn2q_u8(low, high);
        });
    }
};

// int4 times int8.
struct Int4Int8 : IntSums, Int4Weight {
    using Int4Weight::kSpans;
    static constexpr int column(int i) { return efx::kInt4Order[i]; }

    EFX_INLINE static inline void expand(Mask mask, const Nibbles& values, Group* groups) {
        groups[0] = expand_signed_nibbles(mask, values);
    }
    EFX_INLINE static inline Floats add_scaled(const Floats& total, const Accumulator& sum, const Floats& scales,
                                               int32_t) {
        return Int4Weight::add_scaled(total, to_floats(sum), scales, 0);
    }
};

int64_t linear(const efx::Call& call) {
    const int64_t kind = call.weight.header->kind;
    if (kind == efx::kInt8Dynamic) return Linear<Int8Int8>::run(call);
    if (kind == efx::kInt4Dynamic) return Linear<Int4Int8>::run(call);
    if (call.type == efx::kTypeFp32) return efx::neon.linear(call);  // nothing here helps with those
    if (kind == efx::kInt4) return Linear<Int4Bf16>::run(call);
    return kind == efx::kBf16 ? Linear<Bf16Bf16>::run(call) : Linear<Int8Bf16>::run(call);
}

}  // namespace

const efx::Isa efx::neon_bf16{linear, count_block, pack_block};
