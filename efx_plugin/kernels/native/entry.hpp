// The C interface. Functions that return int64_t return a Status where it is negative.
#pragma once

#include <cstdint>

#define EFX_EXPORT extern "C" __attribute__((visibility("default")))

// Names of the instruction sets of this build, best first, by index; null beyond the last.
EFX_EXPORT const char* efx_isa_name(int64_t index);

// 1 if this processor has the instruction set.
EFX_EXPORT int64_t efx_isa_supported(int64_t index);

// The size in bytes of the buffer for a weight [rows, columns], row-major; int4 comes as int8. `span` is the number of
// columns that share a scale of int4: 32, 64 or 128 and less than all, or all; for other kinds 0.
EFX_EXPORT int64_t efx_packed_size(int64_t isa_index, int64_t kind, const void* weight, int64_t rows, int64_t columns,
                                   int64_t span, int64_t threads);

// Pack into a buffer of that size. `scales` are float [rows] of int8, or 16 bits each [rows, spans] of int4, which
// `scale_type` tells apart; null for bfloat16.
EFX_EXPORT int64_t efx_pack(int64_t isa_index, int64_t kind, const void* weight, int64_t rows, int64_t columns,
                            int64_t span, int64_t scale_type, const void* scales, void* buffer, int64_t size,
                            int64_t threads);

// y [m, rows] = x [m, columns] times the packed weight, plus bias [rows] unless null; see layout.hpp.
EFX_EXPORT int64_t efx_linear(int64_t isa_index, const void* buffer, int64_t size, const void* x, int64_t type,
                              int64_t m, int64_t columns, const void* bias, void* y, int64_t rows, int64_t threads);
