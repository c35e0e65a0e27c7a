// Packing a dense weight block by block, in plain C++.
#pragma once

#include "layout.hpp"

namespace {

// What is clear in a zero: all but the sign of a bfloat16.
inline bool is_nonzero(uint16_t value) { return (value & 0x7FFF) != 0; }
inline bool is_nonzero(int8_t value) { return value != 0; }

template <class Value>
int64_t count_nonzeros(const efx::Dense& dense, int64_t block) {
    const int64_t first = block * efx::kBlock;
    const int64_t rows = dense.rows - first < efx::kBlock ? dense.rows - first : efx::kBlock;
    const Value* weight = static_cast<const Value*>(dense.weight) + first * dense.columns;
    int64_t count = 0;
    for (int64_t begin = 0; begin < rows * dense.columns; begin += 4096) {
        const int64_t end = begin + 4096 < rows * dense.columns ? begin + 4096 : rows * dense.columns;
        uint16_t some = 0;
        for (int64_t i = begin; i < end; i++) some += is_nonzero(weight[i]);
        count += some;
    }
    return count;
}

// The bytes of a block of int4, whose groups are whole bytes.
inline int64_t count_pairs(const efx::Dense& dense, int64_t block) {
    constexpr int64_t kAtOnce = 256;  // groups
    const int64_t first = block * efx::kBlock;
    const int64_t rows = dense.rows - first < efx::kBlock ? dense.rows - first : efx::kBlock;
    int64_t bytes = 0;
    for (int64_t begin = 0; begin < dense.columns; begin += 4 * kAtOnce) {
        const int64_t columns = dense.columns - begin < 4 * kAtOnce ? dense.columns - begin : 4 * kAtOnce;
        uint8_t counts[kAtOnce] = {};
        for (int64_t row = 0; row < rows; row++) {
            const int8_t* weight = static_cast<const int8_t*>(dense.weight) + (first + row) * dense.columns + begin;
            for (int64_t column = 0; column < columns; column++) counts[column / 4] += is_nonzero(weight[column]);
        }
        for (const uint8_t count : counts) bytes += (count + 1) / 2;
    }
    return bytes;
}

int64_t count_block(const efx::Dense& dense, int64_t kind, int64_t block) {
    if (kind == efx::kBf16) return count_nonzeros<uint16_t>(dense, block);
    return efx::is_int4(kind) ? count_pairs(dense, block) : count_nonzeros<int8_t>(dense, block);
}

template <class Value, class Mask>
void pack_values(const efx::Dense& dense, const efx::Header& header, int64_t block, Mask* masks, Value* values,
                 int32_t* sums) {
    constexpr int64_t kColumns = 4 / sizeof(Value);
    const int64_t first = block * efx::kBlock;
    const Value* weight = static_cast<const Value*>(dense.weight) + first * dense.columns;
    const int64_t rows = dense.rows - first < efx::kBlock ? dense.rows - first : efx::kBlock;
    for (int64_t row = 0; sums && row < efx::kBlock; row++) sums[row] = 0;
    for (int64_t group = 0; group < header.groups; group++) {
        const int64_t begin = group * kColumns;
        const int64_t end = begin + kColumns < dense.columns ? begin + kColumns : dense.columns;
        Mask mask = 0;
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t column = begin; column < end; column++) {
                const Value value = weight[row * dense.columns + column];
                if (!is_nonzero(value)) continue;
                mask |= Mask{1} << (row * kColumns + column - begin);
                *values++ = value;
                if (sums) sums[row] += static_cast<int8_t>(value);
            }
        }
        masks[group] = mask;
    }
}

void pack_nibbles(const efx::Dense& dense, const efx::Header& header, int64_t block, uint64_t* masks, uint8_t* values) {
    const int64_t first = block * efx::kBlock;
    const int8_t* weight = static_cast<const int8_t*>(dense.weight) + first * dense.columns;
    const int64_t rows = dense.rows - first < efx::kBlock ? dense.rows - first : efx::kBlock;
    for (int64_t group = 0; group < header.groups; group++) {
        uint64_t mask = 0;
        int64_t count = 0;
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t place = 0; place < 4; place++) {
                const int64_t column = 4 * group + efx::kInt4Order[place];
                const int8_t value = column < dense.columns ? weight[row * dense.columns + column] : 0;
                if (!is_nonzero(value)) continue;
                mask |= uint64_t{1} << (4 * row + place);
                const uint8_t others = count % 2 ? values[count / 2] : 0;
                values[count / 2] = static_cast<uint8_t>(others | (value & 15) << (count % 2 * 4));
                count++;
            }
        }
        masks[group] = mask;
        values += (count + 1) / 2;
    }
}

inline void pack_block(const efx::Dense& dense, const efx::Header& header, int64_t block, void* masks, void* values,
                       int32_t* sums) {
    if (header.kind == efx::kBf16) {
        pack_values(dense, header, block, static_cast<uint32_t*>(masks), static_cast<uint16_t*>(values), sums);
    } else if (efx::is_int4(header.kind)) {
        pack_nibbles(dense, header, block, static_cast<uint64_t*>(masks), static_cast<uint8_t*>(values));
    } else {
        pack_values(dense, header, block, static_cast<uint64_t*>(masks), static_cast<int8_t*>(values), sums);
    }
}

}  // namespace
