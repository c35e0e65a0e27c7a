// NEON, which every processor of aarch64 has.
#include "floats.hpp"
#include "neon.hpp"

namespace {

struct Neon {
    using Floats = ::Floats;
    static constexpr int kTile = 4;
    static constexpr int blocks(int m) { return m == 1 ? 2 : 1; }

    static Floats zero() { return {}; }
    static Floats load(const float* from) {
        return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
    }
    EFX_INLINE static inline void store(float* to, const Floats& floats) { ::store(to, floats); }
    EFX_INLINE static inline Floats multiply_add(Floats sum, const Floats& floats, float x) {
        unroll<4>([&](auto i) EFX_INLINE { sum.fours[i] = vfmaq_n_f32(sum.fours[i], floats.fours[i], x); });
        return sum;
    }
    EFX_INLINE static inline Floats multiply_add(Floats sum, const Floats& floats, const Floats& x) {
        unroll<4>([&](auto i) EFX_INLINE { sum.fours[i] = vfmaq_f32(sum.fours[i], floats.fours[i], x.fours[i]); });
        return sum;
    }
    EFX_INLINE static inline void expand_pairs(uint32_t mask, const uint16_t* values, Floats* vectors) {
        const Group group = ::expand_pairs(mask, values);
        unroll<4>([&](auto i) EFX_INLINE {
            const uint32x4_t pairs = vreinterpretq_u32_u8(group.fours[i]);
            vectors[0].fours[i] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
            vectors[1].fours[i] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)));
        });
    }
    EFX_INLINE static inline void expand_bytes(uint64_t mask, const int8_t* values, Floats* vectors) {
        const Group group = ::expand_bytes(mask, values);
        unroll<4>([&](auto c) EFX_INLINE { vectors[c] = column<c>(group); });
    }
    EFX_INLINE static inline void expand_nibbles(uint64_t mask, const Nibbles& values, Floats* vectors) {
        const Group group = expand_signed_nibbles(mask, values);
        unroll<4>([&](auto c) EFX_INLINE { vectors[efx::kInt4Order[c]] = column<c>(group); });
    }

   private:
    template <int c>
    EFX_INLINE static inline Floats column(const Group& group) {
        Floats floats;
        unroll<4>([&](auto i) EFX_INLINE { floats.fours[i] = column_of<c>(group.fours[i]); });
        return floats;
    }
};

}  // namespace

const efx::Isa efx::neon = kFloatIsa<Neon>;
