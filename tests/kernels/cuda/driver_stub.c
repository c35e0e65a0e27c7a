// A CUDA driver without a GPU: it prints the calls that it gets. test_driver.py puts it in the place of libcuda.so.1.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static int answer(void) {
    fflush(stdout);
    const char *status = getenv("STUB_STATUS");
    return status ? atoi(status) : 0;
}

int cuModuleLoadData(void **module, const void *image) {
    printf("load %.4s\n", (const char *)image);
    *module = (void *)0x11;
    return answer();
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("function %p %s\n", module, name);
    *function = (void *)0x22;
    return answer();
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("set %p %d %d\n", function, attribute, value);
    return answer();
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    printf("get %p %d\n", function, attribute);
    *value = 32;
    return answer();
}

// The function launched is (pointer, pointer, int, int).
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    printf("launch %p %u,%u,%u %u,%u,%u %u %p %p %p %d %d %p\n", function, gx, gy, gz, bx, by, bz, shared, stream,
           *(void **)parameters[0], *(void **)parameters[1], *(int *)parameters[2], *(int *)parameters[3], (void *)extra);
    return answer();
}

int cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    Dl_info here;
    dladdr((void *)cuModuleLoadData, &here);
    *address = dlsym(dlopen(here.dli_fname, RTLD_NOLOAD | RTLD_NOW), symbol);
    if (status) *status = *address ? 0 : 1;
    return *address ? 0 : 500;
}
