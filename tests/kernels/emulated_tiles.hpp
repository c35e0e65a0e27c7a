// The instructions of tile_instructions.hpp as loops, which sanitizers can watch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

struct Tiles {
    TileShapes shapes;
    uint8_t bytes[8][16][64];
    bool are_configured = false;
};

inline Tiles& tiles() {
    static thread_local Tiles all;
    return all;
}

inline void tile_configure(const TileShapes& shapes) {
    for (int t = 0; t < 8; t++) {
        if (shapes.rows[t] < 1 || shapes.rows[t] > 16 || shapes.row_bytes[t] < 4 || shapes.row_bytes[t] > 64) std::abort();
    }
    tiles().shapes = shapes;
    std::memset(tiles().bytes, 0, sizeof tiles().bytes);
    tiles().are_configured = true;
}

inline void tile_release() { tiles().are_configured = false; }

inline void need(bool condition) {
    if (!condition || !tiles().are_configured) std::abort();
}

template <int t>
inline void tile_zero() {
    need(true);
    std::memset(tiles().bytes[t], 0, sizeof tiles().bytes[t]);
}

template <int t>
inline void tile_load(const void* from, int64_t stride) {
    need(stride >= tiles().shapes.row_bytes[t]);
    tile_zero<t>();
    for (int i = 0; i < tiles().shapes.rows[t]; i++) {
        std::memcpy(tiles().bytes[t][i], static_cast<const char*>(from) + i * stride, tiles().shapes.row_bytes[t]);
    }
}

template <int t>
inline void tile_store(void* to, int64_t stride) {
    need(stride >= tiles().shapes.row_bytes[t]);
    for (int i = 0; i < tiles().shapes.rows[t]; i++) {
        std::memcpy(static_cast<char*>(to) + i * stride, tiles().bytes[t][i], tiles().shapes.row_bytes[t]);
    }
}

template <class T>
inline T tile_element(int tile, int row, int i) {
    T value;
    std::memcpy(&value, &tiles().bytes[tile][row][i * sizeof(T)], sizeof(T));
    return value;
}

inline float tile_bf16(int tile, int row, int i) {
    const uint32_t bits = uint32_t{tile_element<uint16_t>(tile, row, i)} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <int sums, int x, int weight, class Element>
inline void tile_multiply() {
    const TileShapes& shapes = tiles().shapes;
    need(shapes.rows[sums] == shapes.rows[x] && shapes.row_bytes[x] == 4 * shapes.rows[weight] &&
         shapes.row_bytes[sums] == shapes.row_bytes[weight]);
    for (int row = 0; row < shapes.rows[sums]; row++) {
        for (int column = 0; column < shapes.row_bytes[sums] / 4; column++) {
            uint8_t* place = &tiles().bytes[sums][row][4 * column];
            if constexpr (sizeof(Element) == 2) {
                float sum = tile_element<float>(sums, row, column);
                for (int k = 0; k < shapes.row_bytes[x] / 2; k++) {
                    sum += tile_bf16(x, row, k) * tile_bf16(weight, k / 2, 2 * column + k % 2);
                }
                std::memcpy(place, &sum, 4);
            } else {
                using Weight = std::conditional_t<std::is_unsigned_v<Element>, int8_t, uint8_t>;
                int32_t sum = tile_element<int32_t>(sums, row, column);
                for (int k = 0; k < shapes.row_bytes[x]; k++) {
                    sum += tile_element<Element>(x, row, k) * tile_element<Weight>(weight, k / 4, 4 * column + k % 4);
                }
                std::memcpy(place, &sum, 4);
            }
        }
    }
}

}  // namespace
