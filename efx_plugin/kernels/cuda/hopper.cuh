// The instructions of the PTX ISA for compute capability 9.0 ("sm_90a") that wgmma.cu uses beside those of ptx.cuh.

// "mbarrier": a barrier in shared memory, 8 bytes. A phase of it ends when so many have arrived as `init` says, and all
// bytes that they expect; it has a parity, which begins with 0.
DEVICE void init_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes barriers known to copies; then the block is to be synchronized.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity, which may be over: before the first one, 1 is.
DEVICE void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{.reg .pred over;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;}" ::"r"(barrier), "r"(parity) : "memory");
}
// "cp.async.bulk": multiples of 16 bytes from global to shared memory, which the barrier expects.
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// "wgmma": products of a warpgroup. Registers of A and sums are handed over by `begin_products`, and are free when
// `wait_products` says that no more than so many groups are under way.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups> DEVICE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}
// After the last wait: sums are not to be read before it.
template <int count> DEVICE void settle(float (&sums)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// "Matrix descriptor" of B in shared memory: rows of 64 values, 128 bytes each, whose 16-byte units are swizzled by 8 rows
// ("128-Byte swizzling"). B begins at a multiple of 1024, and this is of 16 of its columns.
DEVICE u64 descriptor(u32 address) { return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }

// "setmaxnreg": registers that each thread of a warpgroup has from now on.
template <int count> DEVICE void lower_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> DEVICE void raise_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }

#define EFX_TEN(x, d) x(d##0), x(d##1), x(d##2), x(d##3), x(d##4), x(d##5), x(d##6), x(d##7), x(d##8), x(d##9)
#define EFX_SUM(i) "+f"(sums[i])
#define EFX_FROM_0(x) x(0), x(1), x(2), x(3), x(4), x(5), x(6), x(7), x(8), x(9)
#define EFX_NAMES(d) "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d "9, "
#define EFX_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#if EFX_FP16
#define EFX_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#else
#define EFX_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#endif

// sums += a B, of 64 rows of A and 32, 64 or 128 rows of B. Sum 4j + i of lane 4g + t of a warp is that of row g + 8 (i / 2) of
// the warp's 16 rows, and of row 8j + 2t + i % 2 of B; registers of A are those of `mma`.
DEVICE void multiply(float (&sums)[16], const u32 (&a)[4], u64 b) {
    asm volatile(EFX_WGMMA(32) "{" EFX_NAMES_0 "%10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
                 : EFX_FROM_0(EFX_SUM), EFX_SUM(10), EFX_SUM(11), EFX_SUM(12), EFX_SUM(13), EFX_SUM(14), EFX_SUM(15)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply(float (&sums)[32], const u32 (&a)[4], u64 b) {
    asm volatile(EFX_WGMMA(64) "{" EFX_NAMES_0 EFX_NAMES(1) EFX_NAMES(2) "%30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : EFX_FROM_0(EFX_SUM), EFX_TEN(EFX_SUM, 1), EFX_TEN(EFX_SUM, 2), EFX_SUM(30), EFX_SUM(31)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply(float (&sums)[64], const u32 (&a)[4], u64 b) {
    asm volatile(EFX_WGMMA(128) "{" EFX_NAMES_0 EFX_NAMES(1) EFX_NAMES(2) EFX_NAMES(3) EFX_NAMES(4) EFX_NAMES(5)
                     "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : EFX_FROM_0(EFX_SUM), EFX_TEN(EFX_SUM, 1), EFX_TEN(EFX_SUM, 2), EFX_TEN(EFX_SUM, 3),
                   EFX_TEN(EFX_SUM, 4), EFX_TEN(EFX_SUM, 5), EFX_SUM(60), EFX_SUM(61), EFX_SUM(62), EFX_SUM(63)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
