// The C interface that native/__init__.py calls. Sizes count elements: bytes of a mask, values, rows.
//
// Nothing is trusted: every buffer comes with its size, and is refused if rows and columns do not give the same.
// EFX_WITH_X86 says that avx512.cpp is part of the build.
#include "bits.hpp"

#define EFX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

bool is_product(int64_t size, int64_t rows, int64_t columns) {
    int64_t product;
    return !__builtin_mul_overflow(rows, columns, &product) && product == size;
}

bool is_mask(int64_t size, int64_t rows, int64_t columns) {
    // Written so that columns near the largest integer do not overflow.
    return rows >= 0 && columns >= 0 && is_product(size, rows, columns / 8 + (columns % 8 != 0));
}

const efx::Codec& codec() {
#ifdef EFX_WITH_X86
    static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512vbmi2");
    if (has_avx512) return efx::avx512;
#endif
    return efx::portable;
}

}  // namespace

// The instruction set in use.
EFX_EXPORT const char* efx_instruction_set() { return &codec() == &efx::portable ? "portable" : "avx512_vbmi2"; }

// Mask, bits per row and, unless `packed` is null, the values under the mask, row after row. Returns their number.
EFX_EXPORT int64_t efx_pack(int64_t width, const void* weight, int64_t weight_size, int64_t rows, int64_t columns,
                            uint32_t magnitude, int64_t fours, uint8_t* mask, int64_t mask_size, int64_t* counts,
                            int64_t counts_size, void* packed, int64_t packed_size) {
    if (!is_mask(mask_size, rows, columns) || !is_product(weight_size, rows, columns) || counts_size != rows ||
        (fours && columns % 4)) {
        return efx::kSizes;
    }
    return codec().pack({width, weight, rows, columns, magnitude, fours != 0, mask, counts, packed, packed_size});
}

// The mirror image. Returns the number of values, which are exactly as many as the mask has bits.
EFX_EXPORT int64_t efx_unpack(int64_t width, const void* packed, int64_t packed_size, const uint8_t* mask,
                              int64_t mask_size, int64_t rows, int64_t columns, void* weight, int64_t weight_size) {
    if (!is_mask(mask_size, rows, columns) || !is_product(weight_size, rows, columns)) return efx::kSizes;
    if (weight_size == 0) return packed_size ? efx::kUnused : int64_t{0};  // however many rows it claims
    return codec().unpack({width, packed, packed_size, mask, rows, columns, weight});
}

// Bits set in each row of a mask, those beyond the last column included. Returns the number of rows.
EFX_EXPORT int64_t efx_count(const uint8_t* mask, int64_t mask_size, int64_t rows, int64_t columns, int64_t* counts,
                             int64_t counts_size) {
    if (!is_mask(mask_size, rows, columns) || counts_size != rows) return efx::kSizes;
    codec().count({mask, rows, columns}, counts);
    return rows;
}

// 2 if every aligned four of a row has two bits set, 1 if none has more, else 0.
EFX_EXPORT int64_t efx_fours(const uint8_t* mask, int64_t mask_size, int64_t rows, int64_t columns) {
    if (!is_mask(mask_size, rows, columns) || columns % 4) return efx::kSizes;
    if (mask_size == 0) return 2;  // however many rows it claims
    return codec().fours({mask, rows, columns});
}
