// What the compiled layer wants of a C library, so that it runs in an emulator without one.
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *to, const void *from, size_t size) {
    for (size_t i = 0; i < size; i++) {
        ((char *)to)[i] = ((const char *)from)[i];
        __asm__ volatile("" ::: "memory");  // no call of memcpy in its place
    }
    return to;
}

void *memset(void *to, int value, size_t size) {
    for (size_t i = 0; i < size; i++) {
        ((char *)to)[i] = (char)value;
        __asm__ volatile("" ::: "memory");
    }
    return to;
}

float nearbyintf(float value) { return __builtin_roundevenf(value); }

// One allocation in each run, at an address that the emulator has mapped.
int posix_memalign(void **memory, size_t alignment, size_t size) {
    (void)alignment, (void)size;
    *memory = (void *)(uintptr_t)0x40000000;
    return 0;
}

void free(void *memory) { (void)memory; }

unsigned long getauxval(unsigned long type) { return type == 16 ? 1ul << 20 : 0; }  // AT_HWCAP: dot products
