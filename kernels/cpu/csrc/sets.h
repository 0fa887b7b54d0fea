// What is compiled for several instruction sets, and which there are.
#pragma once

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)

// What stands between these is compiled for the instructions named.
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define BEGIN(target_) PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#define END() PRAGMA(clang attribute pop)
#else
#define BEGIN(target_) PRAGMA(GCC push_options) PRAGMA(GCC target(target_))
#define END() PRAGMA(GCC pop_options)
#endif

// Compilers that know all of them.
#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define X86
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#define ARM
#include <arm_neon.h>
#endif

// 0 is none of them. The numbers are known to native.py.
enum { NONE, AVX2, AVXVNNI, AVX512VNNI, AMX, DOTPROD, KINDS };
