// The C interface, and the choice of an instruction set at run time.
//
// EFX_WITH_X86 says that the files for x86-64 are part of the build, EFX_WITH_ARM64 those for aarch64.
#include <omp.h>

#include <cstring>

#ifdef __linux__
#include <sys/auxv.h>
#include <sys/mman.h>
#endif

#include "entry.hpp"
#include "layout.hpp"

namespace {

struct Named {
    const char* name;
    const efx::Isa* isa;
    bool is_supported;
};

#ifdef EFX_WITH_ARM64
// Other systems than Linux are not asked.
bool has_neon_bf16() {
#ifdef __linux__
    constexpr unsigned long kDotProd = 1ul << 20, kBf16 = 1ul << 14;  // newer than some C libraries' headers
    return (getauxval(AT_HWCAP) & kDotProd) && (getauxval(AT_HWCAP2) & kBf16);
#else
    return false;
#endif
}
#endif

// From the best to the one that runs everywhere.
const Named* isas(int* count) {
#ifdef EFX_WITH_X86
    static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("bmi2");
    static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512vbmi") &&
                                 __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
                                 __builtin_cpu_supports("avx512bf16");
    static const Named all[] = {
        {"amx", &efx::amx, has_bf16 && efx::can_use_tiles()},
        {"avx512_bf16", &efx::avx512_bf16, has_bf16},
        {"avx512_vnni", &efx::avx512_vnni, has_avx512 && __builtin_cpu_supports("avx512vnni")},
        {"avx512", &efx::avx512, has_avx512},
        {"avx2", &efx::avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
        {"portable", &efx::portable, true},
    };
#elif defined(EFX_WITH_ARM64)
    static const Named all[] = {
        {"neon_bf16", &efx::neon_bf16, has_neon_bf16()},
        {"neon", &efx::neon, true},
        {"portable", &efx::portable, true},
    };
#else
    static const Named all[] = {{"portable", &efx::portable, true}};
#endif
    *count = sizeof all / sizeof *all;
    return all;
}

const efx::Isa* supported_isa(int64_t index) {
    int count;
    const Named* all = isas(&count);
    return index >= 0 && index < count && all[index].is_supported ? all[index].isa : nullptr;
}

int64_t align(int64_t bytes) { return (bytes + efx::kAlign - 1) / efx::kAlign * efx::kAlign; }

bool is_kind(int64_t kind) { return kind >= efx::kBf16 && kind <= efx::kInt4Dynamic; }

bool is_span(int64_t kind, int64_t columns, int64_t span) {
    if (!efx::is_int4(kind)) return span == 0;
    return span == columns || (span < columns && (span == 32 || span == 64 || span == 128));
}

bool is_scale_type(int64_t kind, int64_t type) {
    return type == efx::kScaleBf16 || (efx::is_int4(kind) && type == efx::kScaleFp16);
}

int64_t scale_bytes(const efx::Header& header) {
    if (efx::is_int8(header.kind)) return 4 * efx::kBlock * header.blocks;
    if (!efx::is_int4(header.kind)) return 0;
    return 2 * efx::kBlock * header.blocks * efx::count_spans(header);
}

// The whole layout follows from these numbers, which is how a buffer is checked.
efx::Header plan(int64_t kind, int64_t rows, int64_t columns, int64_t span, int64_t scale_type, int64_t values) {
    const int64_t per_group = efx::group_columns(kind), value_size = 4 / per_group;
    efx::Header header{};
    header.magic = efx::kMagic + kind + 8 * scale_type + 16 * span;
    header.kind = kind, header.rows = rows, header.columns = columns, header.values = values;
    header.span = span, header.scale_type = scale_type;
    header.blocks = (rows + efx::kBlock - 1) / efx::kBlock;
    header.groups = ((columns + per_group - 1) / per_group + efx::kGroupPad - 1) / efx::kGroupPad * efx::kGroupPad;
    header.scales_at = align(sizeof(efx::Header));
    header.sums_at = header.scales_at + align(scale_bytes(header));
    header.offsets_at = header.sums_at + (kind == efx::kInt8Dynamic ? align(4 * efx::kBlock * header.blocks) : 0);
    header.masks_at = header.offsets_at + align(8 * (header.blocks + 1));
    // 4 bits of mask per byte of weight in a group, 16 rows
    header.values_at = header.masks_at + align(2 * per_group * header.blocks * header.groups);
    header.size = header.values_at + align(values * value_size) + 64;
    return header;
}

bool is_size(int64_t rows, int64_t columns) {
    return rows > 0 && columns > 0 && rows < int64_t{1} << 31 && columns < int64_t{1} << 31 &&
           rows * columns < int64_t{1} << 40;
}

bool is_packed(const void* buffer, int64_t size) {
    efx::Header header;
    if (size < static_cast<int64_t>(sizeof header) || reinterpret_cast<uintptr_t>(buffer) % 8) return false;
    std::memcpy(&header, buffer, sizeof header);
    if (!is_kind(header.kind) || header.size != size || !is_size(header.rows, header.columns)) return false;
    if (!is_span(header.kind, header.columns, header.span)) return false;
    if (!is_scale_type(header.kind, header.scale_type)) return false;
    if (header.values < 0 || header.values > header.rows * header.columns) return false;
    const efx::Header expected =
        plan(header.kind, header.rows, header.columns, header.span, header.scale_type, header.values);
    return std::memcmp(&header, &expected, sizeof header) == 0;
}

// Scales [rows, spans] of 16 bits to [blocks][spans][16].
void pack_scales(const efx::Header& header, const uint16_t* scales, uint16_t* to) {
    const int64_t spans = efx::count_spans(header);
    for (int64_t row = 0; row < header.rows; row++) {
        uint16_t* lane = to + row / efx::kBlock * spans * efx::kBlock + row % efx::kBlock;
        for (int64_t span = 0; span < spans; span++) lane[span * efx::kBlock] = scales[row * spans + span];
    }
}

// Streaming through huge pages spares misses of the address cache.
void use_huge_pages(char* begin, int64_t size) {
#ifdef __linux__
    constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + size) / kHugePage * kHugePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

const char* efx_isa_name(int64_t index) {
    int count;
    const Named* all = isas(&count);
    return index >= 0 && index < count ? all[index].name : nullptr;
}

int64_t efx_isa_supported(int64_t index) { return supported_isa(index) != nullptr; }

int64_t efx_packed_size(int64_t isa_index, int64_t kind, const void* weight, int64_t rows, int64_t columns,
                        int64_t span, int64_t threads) {
    const efx::Isa* isa = supported_isa(isa_index);
    if (!isa) return efx::kUnsupported;
    if (!is_kind(kind)) return efx::kArguments;
    if (!is_size(rows, columns) || !is_span(kind, columns, span) || threads < 1) return efx::kSizes;
    const efx::Dense dense{weight, rows, columns};
    const int64_t blocks = (rows + efx::kBlock - 1) / efx::kBlock;
    int64_t values = 0;
#pragma omp parallel for schedule(static) reduction(+ : values) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) values += isa->count(dense, kind, block);
    return plan(kind, rows, columns, span, efx::kScaleBf16, values).size;
}

int64_t efx_pack(int64_t isa_index, int64_t kind, const void* weight, int64_t rows, int64_t columns,
                 int64_t span, int64_t scale_type, const void* scales, void* buffer, int64_t size, int64_t threads) {
    const efx::Isa* isa = supported_isa(isa_index);
    if (!isa) return efx::kUnsupported;
    if (!is_kind(kind) || (kind != efx::kBf16) != (scales != nullptr)) return efx::kArguments;
    if (!is_scale_type(kind, scale_type)) return efx::kArguments;
    if (!is_size(rows, columns) || !is_span(kind, columns, span) || threads < 1) return efx::kSizes;
    const efx::Dense dense{weight, rows, columns};
    const int64_t value_size = 4 / efx::group_columns(kind), mask_size = 2 * efx::group_columns(kind);
    efx::Header header = plan(kind, rows, columns, span, scale_type, 0);
    if (size < header.size || reinterpret_cast<uintptr_t>(buffer) % 8) return efx::kSizes;
    char* base = static_cast<char*>(buffer);
    use_huge_pages(base, size);
    std::memset(base, 0, header.masks_at);  // also what lies between the sections, and scales beyond the last row
    auto* offsets = reinterpret_cast<int64_t*>(base + header.offsets_at);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < header.blocks; block++) offsets[block + 1] = isa->count(dense, kind, block);
    for (int64_t block = 0; block < header.blocks; block++) offsets[block + 1] += offsets[block];
    header = plan(kind, rows, columns, span, scale_type, offsets[header.blocks]);
    if (header.size != size) return efx::kSizes;
    std::memcpy(base, &header, sizeof header);
    if (efx::is_int8(kind)) std::memcpy(base + header.scales_at, scales, 4 * rows);
    if (efx::is_int4(kind)) {
        pack_scales(header, static_cast<const uint16_t*>(scales),
                    reinterpret_cast<uint16_t*>(base + header.scales_at));
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < header.blocks; block++) {
        int32_t* sums = kind == efx::kInt8Dynamic ? reinterpret_cast<int32_t*>(base + header.sums_at) : nullptr;
        isa->pack(dense, header, block, base + header.masks_at + block * header.groups * mask_size,
                  base + header.values_at + offsets[block] * value_size, sums ? sums + block * efx::kBlock : nullptr);
    }
    const int64_t masks_end = header.masks_at + header.blocks * header.groups * mask_size;
    std::memset(base + masks_end, 0, header.values_at - masks_end);
    std::memset(base + header.values_at + header.values * value_size, 0,
                size - header.values_at - header.values * value_size);
    return efx::kOk;
}

int64_t efx_linear(int64_t isa_index, const void* buffer, int64_t size, const void* x, int64_t type,
                   int64_t m, int64_t columns, const void* bias, void* y, int64_t rows, int64_t threads) {
    const efx::Isa* isa = supported_isa(isa_index);
    if (!isa) return efx::kUnsupported;
    if (type != efx::kTypeBf16 && type != efx::kTypeFp32) return efx::kArguments;
    if (!is_packed(buffer, size) || m < 0 || threads < 1) return efx::kSizes;
    const efx::Weight weight{static_cast<const efx::Header*>(buffer), static_cast<const char*>(buffer)};
    if (weight.header->rows != rows || weight.header->columns != columns) return efx::kSizes;
    return isa->linear({weight, static_cast<efx::Type>(type), x, m, bias, y, static_cast<int>(threads)});
}
