// A CUDA driver without a GPU: it prints the calls that it gets. test_driver.py puts it in the place of libcuda.so.1.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

static void *current; // context

// Success, unless STUB_REFUSES names the function.
static int answer(const char *function) {
    fflush(stdout);
    const char *refused = getenv("STUB_REFUSES");
    return refused && !strcmp(refused, function) ? OUT_OF_MEMORY : 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return answer("cuDeviceGet");
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    printf("retain %d\n", device);
    *context = (void *)0xC0;
    return answer("cuDevicePrimaryCtxRetain");
}

int cuCtxPushCurrent(void *context) {
    current = context;
    return answer("cuCtxPushCurrent");
}

int cuCtxPopCurrent(void **context) {
    *context = current;
    current = NULL;
    return answer("cuCtxPopCurrent");
}

int cuCtxSetCurrent(void *context) {
    printf("current %p\n", context);
    current = context;
    return answer("cuCtxSetCurrent");
}

int cuModuleLoadData(void **module, const void *image) {
    printf("load %.4s in %p\n", (const char *)image, current);
    *module = (void *)0x11;
    return answer("cuModuleLoadData");
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("function %p %s\n", module, name);
    *function = (void *)0x22;
    return answer("cuModuleGetFunction");
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("set %p %d %d\n", function, attribute, value);
    return answer("cuFuncSetAttribute");
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    printf("get %p %d\n", function, attribute);
    *value = 32;
    return answer("cuFuncGetAttribute");
}

// The function launched is (pointer, pointer, int, int).
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    if (!current) return INVALID_CONTEXT;
    printf("launch %p %u,%u,%u %u,%u,%u %u %p %p %p %d %d %p\n", function, gx, gy, gz, bx, by, bz, shared, stream,
           *(void **)parameters[0], *(void **)parameters[1], *(int *)parameters[2], *(int *)parameters[3], (void *)extra);
    return answer("cuLaunchKernel");
}

int cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    Dl_info here;
    dladdr((void *)cuModuleLoadData, &here);
    *address = dlsym(dlopen(here.dli_fname, RTLD_NOLOAD | RTLD_NOW), symbol);
    if (status) *status = *address ? 0 : 1;
    return *address ? 0 : NOT_FOUND;
}
