// Vectors of float32, numbers as they lie in memory, and products of tiles, by what the processor has.
//
// Compiled for the sizes of one model: WIDTH, HIDDEN, HEADS, KV_HEADS and DIM, all but the heads multiples of 32;
// BFLOAT16 is 1 where weights, keys and values are of that type, 0 where they are float32; AMX 1 where the processor
// multiplies tiles of bfloat16.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the first of a pair of bfloat16 is taken to be the lower half of a word"
#endif

#define GROUP (HEADS / KV_HEADS)  // query heads that share keys
#define QKV ((HEADS + 2 * KV_HEADS) * DIM)

// What a vector holds, and how many outputs (or keys) of how many tokens are computed at a time: in registers.
#ifdef __AVX512F__
#define LANES 16
#define TILE 32
#if BFLOAT16 && AMX && defined __AMX_BF16__
#define TILES 1
#define ROWS 32
#else
#define ROWS 8
#endif
#elif defined __AVX2__
#define LANES 8
#define TILE 16
#define ROWS 6
#else
#define LANES 4
#define TILE 16
#define ROWS 3
#endif
#define PARTS (TILE / LANES)
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#if BFLOAT16
typedef uint16_t real;
#define STEP 2  // inputs that lie side by side for each output

INLINE float wide(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

INLINE real narrow(float x) {  // to the nearest, of two to the even one
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE lanes load(const real *x) {
    halves narrowed;
    memcpy(&narrowed, x, sizeof narrowed);
    return (lanes)(__builtin_convertvector(narrowed, words) << 16);
}

INLINE words rounded_bits(lanes x) { return (words)x + 0x7fff + ((words)x >> 16 & 1); }
INLINE lanes rounded(lanes x) { return (lanes)(rounded_bits(x) & 0xffff0000); }

INLINE void store(real *y, lanes x) {
    halves narrowed = __builtin_convertvector(rounded_bits(x) >> 16, halves);
    memcpy(y, &narrowed, sizeof narrowed);
}

INLINE lanes multiply(lanes sum, const real *weights, const real *x) {
    words pairs;
    memcpy(&pairs, weights, sizeof pairs);
#ifdef __AVX512BF16__
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(pair));
#else
    sum += (lanes)(pairs << 16) * wide(x[0]);
    return sum + (lanes)(pairs & 0xffff0000) * wide(x[1]);
#endif
}
#else
typedef float real;
#define STEP 1

INLINE float wide(real x) { return x; }
INLINE real narrow(float x) { return x; }

INLINE lanes load(const real *x) {
    lanes y;
    memcpy(&y, x, sizeof y);
    return y;
}

INLINE lanes rounded(lanes x) { return x; }
INLINE void store(real *y, lanes x) { memcpy(y, &x, sizeof x); }

INLINE lanes multiply(lanes sum, const real *weights, const real *x) { return sum + load(weights) * *x; }
#endif

// Cephes' expf: 2^n times a polynomial. 0 for -87 and less, of more than 88 that, of no number none.
INLINE lanes exponential(lanes x) {
    const words above = ~(words)(x <= -87), below = ~(words)(x >= 88);
    x = (lanes)(((words)x & below) | ((words)((lanes){0} + 88) & ~below));
    lanes n = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: such a sum has no bits for fractions
    const words power = (words)n << 23;
    n -= 12582912.f;
    lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    lanes y = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
               1.6666665459e-1f) * r + 5.0000001201e-1f;
    return (lanes)(((words)(y * r * r + r + 1) + power) & above);
}

INLINE lanes load_floats(const float *x) {
    lanes y;
    memcpy(&y, x, sizeof y);
    return y;
}

INLINE void store_floats(float *y, lanes x) { memcpy(y, &x, sizeof x); }

INLINE float total(lanes x) {
    float parts[LANES];
    store_floats(parts, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            parts[i] += parts[i + n];
    return *parts;
}

// y [rows, TILE] = x [rows, inputs] by a tile of weights [inputs / STEP, TILE, STEP], or that much more.
#if TILES
#define FENCE __asm__ volatile("" ::: "memory")  // gcc does not know what tiles are loaded from: it is stored by now

static void configure(int rows) {
    int above = rows < 16 ? rows : 16, below = rows > 16 ? rows - 16 : 1;  // 0 is not a shape
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1,
               .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
               .rows = {above, above, below, below, above, below, 16, 16}};
    __asm__ volatile("" ::"r"(&shape) : "memory");  // all of it is stored by now
    _tile_loadconfig(&shape);
}

static void product(int rows, int inputs, const real *x, int x_stride, const real *weights, float *y, int y_stride,
                    int add) {
    const int both = rows > 16;
    const int line = x_stride * sizeof *x, out = y_stride * sizeof *y, pairs = TILE * STEP * sizeof *weights;
    FENCE;
    if (add) {
        _tile_loadd(0, y, out);
        _tile_loadd(1, y + 16, out);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (both && add) {
        _tile_loadd(2, y + 16 * y_stride, out);
        _tile_loadd(3, y + 16 * y_stride + 16, out);
    } else if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < inputs; k += 32) {
        _tile_loadd(6, weights + k * TILE, pairs);
        _tile_loadd(7, weights + k * TILE + TILE, pairs);
        _tile_loadd(4, x + k, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + 16 * x_stride + k, line);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, out);
    _tile_stored(1, y + 16, out);
    if (both) {
        _tile_stored(2, y + 16 * y_stride, out);
        _tile_stored(3, y + 16 * y_stride + 16, out);
    }
}
#else
static void configure(int rows) { (void)rows; }

INLINE void product_of(int rows, int inputs, const real *x, int x_stride, const real *weights, float *y, int y_stride,
                       int add) {
    lanes sums[ROWS][PARTS] = {0};
    for (int row = 0; add && row < rows; row++)
        memcpy(sums[row], y + row * y_stride, sizeof sums[row]);
    for (int k = 0; k < inputs; k += STEP)
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < PARTS; part++)
                sums[row][part] =
                    multiply(sums[row][part], weights + k * TILE + part * STEP * LANES, x + row * x_stride + k);
    for (int row = 0; row < rows; row++)
        memcpy(y + row * y_stride, sums[row], sizeof sums[row]);
}

static void product(int rows, int inputs, const real *x, int x_stride, const real *weights, float *y, int y_stride,
                    int add) {
#define OF(n) case n: return product_of(n, inputs, x, x_stride, weights, y, y_stride, add);
    switch (rows) {  // each has a loop of its own
        OF(1) OF(2) OF(3)
#if ROWS > 3
        OF(4) OF(5) OF(6)
#endif
#if ROWS > 6
        OF(7) OF(8)
#endif
    }
}
#endif
