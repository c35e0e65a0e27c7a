// The instructions of AMX. A tile has up to 16 rows of up to 64 bytes; tiles are numbers from 0 to 7.
//
// EFX_EMULATE_TILES names a file that does the same in loops, for tests.
#pragma once

#include <cstdint>
#include <type_traits>

namespace {

// What `tile_configure` takes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

}  // namespace

#ifdef EFX_EMULATE_TILES
#include EFX_EMULATE_TILES
#else

namespace {

inline void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void tile_release() { asm volatile("tilerelease"); }

template <int t>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
}

// Rows that lie `stride` bytes apart.
template <int t>
inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
}

template <int t>
inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
}

// Add activations times weights to sums. Activations are bfloat16 (uint16_t), unsigned bytes with signed weights, or
// signed bytes with unsigned weights.
template <int sums, int x, int weight, class Element>
inline void tile_multiply() {
    if constexpr (sizeof(Element) == 2) {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(weight));
    } else if constexpr (std::is_unsigned_v<Element>) {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(weight));
    } else {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(x), "i"(weight));
    }
}

}  // namespace

#endif
