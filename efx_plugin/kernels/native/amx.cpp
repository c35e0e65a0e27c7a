// AMX (Intel from Sapphire Rapids on): what groups expand to are tiles, which are multiplied.
#include <cpuid.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tiles.hpp"
#include "vbmi2.hpp"

// Products of a few tokens with scales for groups of inputs are faster in vectors; those of int8 are the same bits.
int64_t efx::linear_by_tiles(const efx::Call& call) {
    constexpr int64_t kFew = 5;  // tokens
    const int64_t kind = call.weight.header->kind;
    if (kind == efx::kInt8Dynamic) return Tiled<Int8Int8<Vbmi2>>::run(call);
    if (kind == efx::kInt4Dynamic && call.m > kFew) return Tiled<Int4Int8<Vbmi2>>::run(call);
    if (kind == efx::kInt4Dynamic || call.type == efx::kTypeFp32) return efx::avx512_bf16.linear(call);
    if (kind == efx::kInt4) return Tiled<Int4Bf16>::run(call);
    return kind == efx::kBf16 ? Tiled<Bf16Bf16>::run(call) : Tiled<Int8Bf16>::run(call);
}

bool efx::can_use_tiles() {
#ifdef EFX_EMULATE_TILES
    return true;
#elif defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
