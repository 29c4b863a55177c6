// The numbers of PTX in C. Registers hold bits; a floating-point operation takes bits and returns bits.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8, b8, pred;
typedef uint16_t u16, b16;
typedef uint32_t u32, b32;
typedef uint64_t u64, b64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

// How far approximate instructions are off: 1 for as much as the manual allows, 0 for not at all.
static double off = 1;

static inline float from_f32(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline double from_f64(u64 x) { double y; memcpy(&y, &x, 8); return y; }
static inline float from_bf16(u16 x) { return from_f32((u32)x << 16); }
static inline u32 to_f32(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline u64 to_f64(double x) { u64 y; memcpy(&y, &x, 8); return y; }

// Rounds bits off, ties to even.
static inline u64 rounded(u64 x, int bits) { return (x + ((1ull << (bits - 1)) - 1) + (x >> bits & 1)) >> bits; }

static inline u16 to_bf16(float x) { return x != x ? 0x7fff : rounded(to_f32(x), 16); }

static inline float from_f16(u16 x) {
  u32 sign = (u32)(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 31) return from_f32(sign | 0x7f800000 | fraction << 13);
  float size = exponent ? ldexpf(1024 + fraction, (int)exponent - 25) : ldexpf(fraction, -24);
  return sign ? -size : size;
}

static inline u16 to_f16(float x) {
  u32 bits = to_f32(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return sign | 0x7c00;                        // rounds to infinity
  if (size < 0x38800000) return sign | (u16)rintf(fabsf(x) * 0x1p24f);  // subnormal
  return sign | (u16)(rounded(size, 13) - (112 << 10));
}

// Flushes subnormal numbers to zero, as instructions with .ftz do with what they take and return.
static inline float ftz(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

#define EXTREME(name, type, before) \
  static inline type name(type x, type y) { \
    if (x != x) return y; \
    if (y != y) return x; \
    return before ? x : y; \
  }
EXTREME(max_f32, float, x > y || (x == y && !signbit(x)))
EXTREME(min_f32, float, x < y || (x == y && signbit(x)))
EXTREME(max_f64, double, x > y || (x == y && !signbit(x)))
EXTREME(min_f64, double, x < y || (x == y && signbit(x)))
static inline float max_nan_f32(float x, float y) { return x != x || y != y ? NAN : max_f32(x, y); }
static inline float min_nan_f32(float x, float y) { return x != x || y != y ? NAN : min_f32(x, y); }

// 1 or -1, by the bits of x: the same operands always have the same error.
static inline double side(u64 x) { return (x * 0x9e3779b97f4a7c15ull ^ x >> 7) >> 63 ? off : -off; }

// Largest errors of approximate instructions, from the sections of the PTX ISA 9.1 that are named beside them; relative
// errors less half a unit for the rounding of their results. Powers of two are taken to be exact, as exponents of ex2
// are: units for special functions have tables of fractions.
static inline int is_power(float x) { return !(to_f32(x) << 9); }
#define RELATIVE(x, bits, bound) ((x) * (1 + side(bits) * ((bound) - 0x1p-24)))

// Two units in the last place off, up or down by what the operands are.
static inline float two_units_off(float z, u64 operands) {
  double to = side(operands) * INFINITY;
  return !isfinite(z) || z == 0 || off == 0 ? z : nextafterf(nextafterf(z, to), to);
}

// 9.7.3.21: 2 units from the correctly rounded result.
static inline float ex2_approx(float x) {
  return x == floorf(x) ? exp2(x) : two_units_off(exp2(x), to_f32(x));  // exact for whole numbers
}
// 9.7.3.20: absolute 2^-22 inside of (0.5, 2), relative 2^-22 elsewhere.
static inline float lg2_approx(float x) {
  double y = log2(x);
  return x > 0.5f && x < 2 ? (x == 1 ? 0 : y + side(to_f32(x)) * 0x1p-22) : RELATIVE(y, to_f32(x), 0x1p-22);
}
// 9.7.3.13: 1 unit.
static inline float rcp_approx(float x) { return is_power(x) ? 1 / x : RELATIVE(1.0 / x, to_f32(x), 0x1p-23); }
// 9.7.3.15: relative 2^-23.
static inline float sqrt_approx(float x) { return RELATIVE(sqrt(x), to_f32(x), 0x1p-23); }
// 9.7.3.16: relative 2^-22.9.
static inline float rsqrt_approx(float x) { return RELATIVE(1 / sqrt(x), to_f32(x), 0x1.12p-23); }
// 9.7.3.22: relative 2^-11.
static inline float tanh_approx(float x) { return RELATIVE(tanh(x), to_f32(x), 0x1p-11); }
// 9.7.3.8: 2 units.
static inline float div_full(float x, float y) {
  return is_power(y) ? x / y : two_units_off(x / y, (u64)to_f32(x) << 32 | to_f32(y));
}
// Also 9.7.3.8: 2 units, but 0 for divisors from 2^126.
static inline float div_approx(float x, float y) {
  return fabsf(y) > 0x1p126f && fabsf(y) < INFINITY ? (isinf(x) ? NAN : copysignf(0, x) * copysignf(1, y)) : div_full(x, y);
}
// 9.7.3.14: of 20 bits of the operand, to 20 bits; no bound is given.
static inline double rcp_approx_f64(double x) {
  u64 high = 0xffffffff00000000ull;
  return from_f64(to_f64(1 / from_f64(to_f64(x) & high) * (1 + side(to_f64(x)) * 0x1p-21)) & high);
}

// Integers from floating-point numbers saturate; NaN is 0.
#define TO_INTEGER(name, type, low, high) \
  static inline type to_##name(double x) { \
    return x != x ? 0 : x <= (double)(low) ? (low) : x >= (double)(high) ? (high) : (type)x; \
  }
TO_INTEGER(s8, s8, INT8_MIN, INT8_MAX)
TO_INTEGER(u8, u8, 0, UINT8_MAX)
TO_INTEGER(s16, s16, INT16_MIN, INT16_MAX)
TO_INTEGER(u16, u16, 0, UINT16_MAX)
TO_INTEGER(s32, s32, INT32_MIN, INT32_MAX)
TO_INTEGER(u32, u32, 0, UINT32_MAX)
TO_INTEGER(s64, s64, INT64_MIN, INT64_MAX)
TO_INTEGER(u64, u64, 0, UINT64_MAX)

// Division by zero gives all ones on a GPU.
#define DIVISION(type, unsigned_type, is_signed) \
  static inline type div_##type(type x, type y) { \
    return y == 0 ? (type)-1 : is_signed && y == (type)-1 ? (type)-(unsigned_type)x : x / y; \
  } \
  static inline type rem_##type(type x, type y) { \
    return y == 0 ? x : is_signed && y == (type)-1 ? 0 : x % y; \
  }
DIVISION(s16, u16, 1)
DIVISION(u16, u16, 0)
DIVISION(s32, u32, 1)
DIVISION(u32, u32, 0)
DIVISION(s64, u64, 1)
DIVISION(u64, u64, 0)

// Shifts by more than the width shift everything out.
#define SHIFTS(bits) \
  static inline u##bits shl_b##bits(u##bits x, u32 by) { return by < bits ? (u##bits)(x << by) : 0; } \
  static inline u##bits shr_u##bits(u##bits x, u32 by) { return by < bits ? x >> by : 0; } \
  static inline s##bits shr_s##bits(s##bits x, u32 by) { return x >> (by < bits ? by : bits - 1); }
SHIFTS(16)
SHIFTS(32)
SHIFTS(64)

static inline u32 bfe_u32(u32 x, u32 from, u32 length) {
  from &= 255, length &= 255;
  return length >= 32 ? shr_u32(x, from) : shr_u32(x, from) & ((1u << length) - 1);
}

// With the sign of its highest bit, which is that of the word where the field reaches beyond it.
static inline u32 bfe_s32(u32 x, u32 from, u32 length) {
  from &= 255, length &= 255;
  if (length == 0) return 0;
  u32 last = from + length - 1 < 31 ? from + length - 1 : 31;
  u32 sign = x >> last & 1 ? ~0u : 0;
  u32 field = from < 32 ? x >> from : sign;
  u32 kept = from <= last ? last - from + 1 : 0;
  return kept >= 32 ? field : (field & ((1u << kept) - 1)) | (sign << kept);
}

static inline u32 bfi_b32(u32 x, u32 into, u32 from, u32 length) {
  from &= 255, length &= 255;
  u32 mask = shl_b32(length >= 32 ? ~0u : (1u << length) - 1, from);
  return (into & ~mask) | (shl_b32(x, from) & mask);
}

static inline u32 prmt_b32(u32 x, u32 y, u32 selectors) {
  u64 bytes = (u64)y << 32 | x;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> 4 * i & 15;
    u8 byte = bytes >> 8 * (selector & 7);
    result |= (u32)(selector & 8 ? (byte >> 7 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}

static inline u32 lop3_b32(u32 x, u32 y, u32 z, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
  return result;
}
