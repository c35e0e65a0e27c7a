// The loops of the sparse product, written once and compiled for each instruction set.
//
// A `Dot` says how one kind of weight meets one kind of activation:
//   Mask, Value            of the packed weight; kColumns columns per group
//   Element                what activations are converted to; a group's kColumns of them lie together
//   kVectors               vectors that a group expands to
//   Vector, Accumulator    16 rows
//   expand(mask, values, vectors)            the group's vectors, from whole vectors of values
//   multiply(accumulator, vectors, elements) add the products with one row of activations
//   finish(accumulator, floats, sums)        16 floats
//   round(floats, bf16)                      and their roundings
//   kQuantized             whether elements are int8 with a scale per row of activations
//   kTile                  rows of activations whose sums fill the registers, beside the vectors of two groups
//   blocks(m)              blocks for which they do, of m <= kTile rows
//
// Up to kTile rows of activations the weight is expanded in registers, straight into the products: the speed is that
// of reading it. Beyond, some hundred columns of a block at a time are expanded into the first-level cache too, and
// serve all further tiles of activations: the speed is that of the products.
//
// Every element of the result is summed in the order of the columns into one accumulator, whichever way is taken: it
// depends neither on the other rows of the batch nor on the number of threads.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "layout.hpp"

#define EFX_INLINE __attribute__((always_inline))

namespace {

using efx::kBlock;

template <int I>
struct Index {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

template <class F, int... I>
EFX_INLINE inline void unroll(F&& f, std::integer_sequence<int, I...>) {
    (f(Index<I>{}), ...);
}

// Call f(Index<0>), f(Index<1>), ...: loops over registers must be gone before registers are assigned.
template <int N, class F>
EFX_INLINE inline void unroll(F&& f) {
    unroll(f, std::make_integer_sequence<int, N>{});
}

inline float to_float(uint16_t bf16) {
    const uint32_t bits = uint32_t{bf16} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float value) { return value; }

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const uint32_t quiet = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

// The nearest integer, ties to even, of a number between -2^22 and 2^22.
inline int32_t nearest(float value) {
    const float shifted = value + 0x1.8p23f;  // whose last bit counts ones
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    return bits - 0x4B400000;
}

// Memory that lives as long as the thread that calls, so that a call allocates only when it needs more than any before.
char* workspace(int64_t size) {
    struct Memory {
        char* begin = nullptr;
        int64_t size = 0;
        ~Memory() { std::free(begin); }
    };
    static thread_local Memory memory;
    if (size > memory.size) {
        std::free(memory.begin);
        size = (size + size / 4 + efx::kAlign - 1) / efx::kAlign * efx::kAlign;
        memory.begin = static_cast<char*>(std::aligned_alloc(efx::kAlign, size));
        memory.size = memory.begin ? size : 0;
    }
    return memory.begin;
}

// Where results go, and what happens to the 16 floats of a block on their way.
template <class Dot>
struct Result {
    const efx::Call& call;
    int64_t first_row;      // rows of activations are counted from it
    const float* x_scales;  // of each of them, or null

    void write(const float* sums, int64_t m, int64_t block) const {
        const int64_t first = block * kBlock;
        const float* scales = call.weight.scales();
        float y[kBlock];
        std::memcpy(y, sums, sizeof y);
        if (scales) {
            const float x_scale = x_scales ? x_scales[m] : 1.0f;
            for (int i = 0; i < kBlock; i++) y[i] *= scales[first + i] * x_scale;
        }
        if (call.type == efx::kTypeBf16) {
            add_bias_and_store<uint16_t>(y, m, first);
        } else {
            add_bias_and_store<float>(y, m, first);
        }
    }

   private:
    template <class T>
    void add_bias_and_store(float* y, int64_t m, int64_t first) const {
        const int64_t rows = call.weight.header->rows;
        const int64_t n = rows - first < kBlock ? rows - first : kBlock;
        if (call.bias) {
            const T* bias = static_cast<const T*>(call.bias) + first;
            for (int i = 0; i < n; i++) y[i] += to_float(bias[i]);
        }
        T rounded[kBlock];
        if constexpr (sizeof(T) == 2) {
            Dot::round(y, rounded);
        } else {
            std::memcpy(rounded, y, sizeof rounded);
        }
        T* to = static_cast<T*>(call.y) + (first_row + m) * rows + first;
        if (n == kBlock) {
            std::memcpy(to, rounded, sizeof rounded);
        } else {
            std::memcpy(to, rounded, n * sizeof(T));
        }
    }
};

template <class Dot>
struct Linear {
    using Mask = typename Dot::Mask;
    using Value = typename Dot::Value;
    using Element = typename Dot::Element;
    using Vector = typename Dot::Vector;
    using Accumulator = typename Dot::Accumulator;

    static constexpr int kColumns = Dot::kColumns;
    static constexpr int kVectors = Dot::kVectors;
    static constexpr int64_t kChunk = 256 / kVectors;  // groups expanded at a time
    static constexpr int64_t kRowsAtOnce = 512;        // of activations, which bounds the workspace
    static constexpr int64_t kAhead = 2048;            // bytes of values to prefetch ahead

    struct Stream {
        const Mask* masks;
        const Value* values;
    };

    static Stream stream(const efx::Weight& weight, int64_t block) {
        return {weight.masks<Mask>() + block * weight.header->groups,
                weight.values<Value>() + weight.offsets()[block]};
    }

    EFX_INLINE static inline void next_group(Stream& stream, int64_t group, Vector* vectors) {
        const Mask mask = stream.masks[group];
        Dot::expand(mask, stream.values, vectors);
        __builtin_prefetch(reinterpret_cast<const char*>(stream.values) + kAhead);
        stream.values += sizeof(Mask) == 4 ? __builtin_popcount(mask) : __builtin_popcountll(mask);
        if (group % 8 == 0) {
            __builtin_prefetch(reinterpret_cast<const char*>(stream.masks + group) + kAhead / 4);
        }
    }

    // M rows of activations x [groups][M][kColumns] times kBlocks blocks, `stride` blocks apart: far-apart streams of
    // memory are read faster than one.
    template <int M, int kBlocks>
    __attribute__((noinline)) static void direct(const efx::Weight& weight, const Element* x, int64_t block,
                                                 int64_t stride, const Result<Dot>& result) {
        Accumulator sums[kBlocks][M];
        Stream streams[kBlocks];
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            streams[b] = stream(weight, block + b * stride);
            unroll<M>([&](auto m) EFX_INLINE { sums[b][m] = Dot::zero(); });
        });
        expand_and_multiply<M, kBlocks, false>(streams, 0, weight.header->groups, x, nullptr, sums);
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            unroll<M>([&](auto m) EFX_INLINE { finish(sums[b][m], block + b * stride, result, m); });
        });
    }

    EFX_INLINE static inline void finish(const Accumulator& sum, int64_t block, const Result<Dot>& result, int64_t m) {
        alignas(64) float floats[kBlock];
        const efx::Weight& weight = result.call.weight;
        Dot::finish(sum, floats, Dot::kQuantized ? weight.sums() + block * kBlock : nullptr);
        result.write(floats, m, block);
    }

    template <int M>
    static void direct_share(const efx::Weight& weight, const Element* x, int64_t begin, int64_t end,
                             const Result<Dot>& result) {
        constexpr int kBlocks = Dot::blocks(M);
        const int64_t stride = (end - begin) / kBlocks;
        for (int64_t i = 0; i < stride; i++) direct<M, kBlocks>(weight, x, begin + i, stride, result);
        for (int64_t block = begin + stride * kBlocks; block < end; block++) {
            direct<M, 1>(weight, x, block, 0, result);
        }
    }

    // Expand n groups to panel [n][kVectors], and multiply them with M rows of activations x [n][M][kColumns] meanwhile:
    // the expansion costs less among products than by itself.
    template <int M>
    __attribute__((noinline)) static void expand_tile(Stream* stream, int64_t begin, int64_t n, const Element* x,
                                                      Vector* panel, Accumulator* partial) {
        Accumulator sums[1][M];
        load_sums<M>(sums[0], partial, begin == 0);
        Stream local[1] = {*stream};
        expand_and_multiply<M, 1, true>(local, begin, n, x, panel, sums);
        *stream = local[0];
        store_sums<M>(sums[0], partial);
    }

    // The same with groups that have been expanded.
    template <int M>
    __attribute__((noinline)) static void tile(const Vector* panel, int64_t n, const Element* x, Accumulator* partial,
                                               bool is_first) {
        Accumulator sums[1][M];
        load_sums<M>(sums[0], partial, is_first);
        for (int64_t group = 0; group < n; group++) {
            multiply<M, 1>(sums, panel + group * kVectors, x + group * M * kColumns);
        }
        store_sums<M>(sums[0], partial);
    }

    template <int M, int kBlocks>
    EFX_INLINE static inline void multiply(Accumulator (&sums)[kBlocks][M], const Vector* vectors, const Element* x) {
        unroll<M>([&](auto m) EFX_INLINE { multiply_row<M, kBlocks, m>(sums, vectors, x); });
    }

    template <int M, int kBlocks, int m>
    EFX_INLINE static inline void multiply_row(Accumulator (&sums)[kBlocks][M], const Vector* vectors,
                                               const Element* x) {
        unroll<kBlocks>([&](auto b) EFX_INLINE {
            sums[b][m] = Dot::multiply(sums[b][m], vectors + b * kVectors, x + m * kColumns);
        });
    }

    // Products of n groups, each expanded among the products of the one before, and stored to `panel` if kStore.
    template <int M, int kBlocks, bool kStore>
    EFX_INLINE static inline void expand_and_multiply(Stream* streams, int64_t begin, int64_t n, const Element* x,
                                                      Vector* panel, Accumulator (&sums)[kBlocks][M]) {
        Vector vectors[kBlocks * kVectors], next[kBlocks * kVectors];
        const auto expand = [&](auto b, int64_t group, Vector* to) EFX_INLINE {
            next_group(streams[b], begin + group, to + b * kVectors);
            if (!kStore) return;
            unroll<kVectors>([&](auto v) EFX_INLINE {
                panel[(group * kBlocks + b) * kVectors + v] = to[b * kVectors + v];
            });
        };
        unroll<kBlocks>([&](auto b) EFX_INLINE { expand(b, 0, vectors); });
        for (int64_t group = 1; group < n; group++, x += M * kColumns) {
            unroll<M>([&](auto m) EFX_INLINE {
                multiply_row<M, kBlocks, m>(sums, vectors, x);
                unroll<kBlocks>([&](auto b) EFX_INLINE {
                    if constexpr (b * M / kBlocks == m) expand(b, group, next);
                });
            });
            unroll<kBlocks * kVectors>([&](auto i) EFX_INLINE { vectors[i] = next[i]; });
        }
        multiply<M, kBlocks>(sums, vectors, x);
    }

    // Sums are kept in `partial` [M] between the chunks of a row.
    template <int M>
    EFX_INLINE static inline void load_sums(Accumulator (&sums)[M], const Accumulator* partial, bool is_first) {
        unroll<M>([&](auto m) EFX_INLINE { sums[m] = is_first ? Dot::zero() : partial[m]; });
    }

    template <int M>
    EFX_INLINE static inline void store_sums(const Accumulator (&sums)[M], Accumulator* partial) {
        unroll<M>([&](auto m) EFX_INLINE { partial[m] = sums[m]; });
    }

    // Rows of activations cut into as few tiles as there may be, of nearly equal size: at least half of kTile if there
    // is more than one.
    struct Tiles {
        int64_t m, count = (m + Dot::kTile - 1) / Dot::kTile;
        int64_t first(int64_t i) const { return m * i / count; }
        // Of two tiles, only the second reads what the first has expanded, which the second-level cache can give.
        int64_t chunk() const { return count <= 2 ? 4 * kChunk : kChunk; }
    };

    // All rows of activations, in chunks of tiles [groups of the chunk][rows of the tile][kColumns], times a block.
    static void panel_product(const efx::Weight& weight, const Element* x, const Tiles& tiles, int64_t block,
                              Vector* panel, Accumulator* partials, const Result<Dot>& result) {
        const int64_t groups = weight.header->groups, chunk = tiles.chunk();
        Stream values = stream(weight, block);
        for (int64_t begin = 0; begin < groups; begin += chunk) {
            const int64_t n = groups - begin < chunk ? groups - begin : chunk;
            for (int64_t i = 0; i < tiles.count; i++) {
                const int64_t row = tiles.first(i), rows = tiles.first(i + 1) - row;
                const Element* elements = x + (begin * tiles.m + row * n) * kColumns;
                with_rows<(Dot::kTile + 1) / 2, Dot::kTile>(rows, [&](auto rows_of_tile) EFX_INLINE {
                    if (i == 0) {
                        expand_tile<rows_of_tile>(&values, begin, n, elements, panel, partials);
                    } else {
                        tile<rows_of_tile>(panel, n, elements, partials + row, begin == 0);
                    }
                });
            }
        }
        for (int64_t row = 0; row < tiles.m; row++) finish(partials[row], block, result, row);
    }

    // f(Index<rows>), for kLeast <= rows <= kMost.
    template <int kLeast, int kMost, class F>
    static void with_rows(int64_t rows, F&& f) {
        unroll<kMost - kLeast + 1>([&](auto i) EFX_INLINE {
            if (rows == kLeast + i) f(Index<kLeast + i>{});
        });
    }

    static float element_scale(const efx::Call& call, int64_t row) {
        const int64_t columns = call.weight.header->columns;
        const int64_t from = row * columns;
        const float most =
            call.type == efx::kTypeBf16
                ? most_magnitude<uint16_t>(static_cast<const uint16_t*>(call.x) + from, columns)
                : most_magnitude<uint32_t>(static_cast<const float*>(call.x) + from, columns);
        return most / 127;
    }

    // Without their signs, floats are in the order of their bits; a NaN is above all.
    template <class Bits, class T>
    static float most_magnitude(const T* x, int64_t n) {
        Bits most = 0;
        for (int64_t i = 0; i < n; i++) {
            Bits bits;
            std::memcpy(&bits, x + i, sizeof bits);
            bits &= static_cast<Bits>(~Bits{0}) >> 1;
            most = bits > most ? bits : most;
        }
        T value;
        std::memcpy(&value, &most, sizeof value);
        return to_float(value);
    }

    // 0 also for a scale so small that its inverse is no number.
    static float inverse(float scale) {
        const float inverse = 1 / scale;
        return inverse <= 0x1p127f ? inverse : 0;
    }

    // Activations of rows [row, row + m), groups [begin, begin + n), to [n][m][kColumns].
    static void pack_x(const Result<Dot>& result, int64_t row, int64_t m, int64_t begin, int64_t n, Element* to) {
        const int64_t columns = result.call.weight.header->columns;
        const auto pack = [&](const auto* x, auto as_float) EFX_INLINE {
            using From = std::remove_cv_t<std::remove_reference_t<decltype(*x)>>;
            for (int64_t i = 0; i < m; i++) {
                const float scale = Dot::kQuantized ? inverse(result.x_scales[row + i]) : 1;
                const auto convert = [&](From value) EFX_INLINE -> Element {
                    if constexpr (Dot::kQuantized) {
                        return Dot::quantize(as_float(value) * scale);
                    } else if constexpr (sizeof(Element) == 2) {
                        return value;  // bfloat16 both
                    } else {
                        return as_float(value);
                    }
                };
                const From* from = x + (result.first_row + row + i) * columns + begin * kColumns;
                const int64_t here = columns - begin * kColumns < n * kColumns ? columns - begin * kColumns : n * kColumns;
                int64_t column = 0;
                for (; column + kColumns <= here; column += kColumns) {
                    for (int c = 0; c < kColumns; c++) to[column * m + i * kColumns + c] = convert(from[column + c]);
                }
                for (; column < n * kColumns; column += kColumns) {
                    for (int c = 0; c < kColumns; c++) {
                        to[column * m + i * kColumns + c] = convert(column + c < here ? from[column + c] : From{});
                    }
                }
            }
        };
        if (result.call.type == efx::kTypeBf16) {
            pack(static_cast<const uint16_t*>(result.call.x), [](uint16_t value) EFX_INLINE { return to_float(value); });
        } else if constexpr (sizeof(Element) != 2) {
            pack(static_cast<const float*>(result.call.x), [](float value) EFX_INLINE { return value; });
        }
    }

    static int64_t run(const efx::Call& call) {
        for (int64_t row = 0; row < call.m; row += kRowsAtOnce) {
            const int64_t m = call.m - row < kRowsAtOnce ? call.m - row : kRowsAtOnce;
            if (const int64_t status = run_rows(call, row, m)) return status;
        }
        return efx::kOk;
    }

    static int64_t run_rows(const efx::Call& call, int64_t first_row, int64_t m) {
        const efx::Header& header = *call.weight.header;
        const int64_t groups = header.groups, blocks = header.blocks;
        const Tiles tiles{m};
        const bool is_direct = tiles.count == 1;
        // One row of bfloat16 that needs no padding is read where it is.
        const bool in_place = m == 1 && sizeof(Element) == 2 && header.columns == groups * kColumns;
        const int64_t x_bytes = in_place ? 0 : align(m * groups * kColumns * sizeof(Element));
        const int64_t scale_bytes = Dot::kQuantized ? align(m * sizeof(float)) : 0;
        const int64_t panel_bytes = is_direct ? 0 : tiles.chunk() * kVectors * sizeof(Vector);
        const int64_t partial_bytes = is_direct ? 0 : m * sizeof(Accumulator);
        const int64_t thread_bytes = align(panel_bytes + partial_bytes);
        const int64_t bytes = x_bytes + scale_bytes + thread_bytes * call.threads;
        char* memory = bytes ? workspace(bytes) : nullptr;
        if (bytes && !memory) return efx::kMemory;
        auto* packed_x = reinterpret_cast<Element*>(memory);
        auto* x_scales = reinterpret_cast<float*>(memory + x_bytes);
        const Result<Dot> result{call, first_row, Dot::kQuantized ? x_scales : nullptr};

#pragma omp parallel num_threads(call.threads)
        {
            const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
            if (Dot::kQuantized) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < m; i++) x_scales[i] = element_scale(call, first_row + i);
            }
            if (!in_place) {
                const int64_t step = is_direct ? kChunk : tiles.chunk();
#pragma omp for schedule(static) collapse(2)
                for (int64_t group = 0; group < groups; group += step) {
                    for (int64_t i = 0; i < tiles.count; i++) {
                        const int64_t n = groups - group < step ? groups - group : step;
                        const int64_t row = tiles.first(i), rows = tiles.first(i + 1) - row;
                        pack_x(result, row, rows, group, n, packed_x + (group * m + row * n) * kColumns);
                    }
                }
            }
            const Element* x = in_place ? static_cast<const Element*>(call.x) + first_row * header.columns : packed_x;
            const int64_t begin = blocks * thread / threads, end = blocks * (thread + 1) / threads;
            if (is_direct) {
                with_rows<1, Dot::kTile>(m, [&](auto rows) EFX_INLINE {
                    direct_share<rows>(call.weight, x, begin, end, result);
                });
            } else {
                auto* panel = reinterpret_cast<Vector*>(memory + x_bytes + scale_bytes + thread * thread_bytes);
                auto* partials = reinterpret_cast<Accumulator*>(reinterpret_cast<char*>(panel) + panel_bytes);
                for (int64_t block = begin; block < end; block++) {
                    panel_product(call.weight, x, tiles, block, panel, partials, result);
                }
            }
        }
        return efx::kOk;
    }

    static int64_t align(int64_t bytes) { return (bytes + efx::kAlign - 1) / efx::kAlign * efx::kAlign; }
};

}  // namespace
