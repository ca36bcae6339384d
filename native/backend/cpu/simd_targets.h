// The instruction sets that hand-vectorised code is compiled for; include before any Highway header. One binary
// carries them all and picks at run time: SSE4, AVX2 and AVX-512 on x86-64, NEON on AArch64.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
// x86-64-v2 does not promise AES or CLMUL and nothing here uses them; with this, SSE4 is the baseline.
#define HWY_DISABLE_PCLMUL_AES
#define HWY_DISABLED_TARGETS (HWY_SCALAR | HWY_SSSE3 | HWY_AVX3_DL)
#elif defined(__aarch64__)
#define HWY_DISABLED_TARGETS (HWY_SCALAR | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif
