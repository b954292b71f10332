// A pass of some tokens through a Llama-like model, all threads in one parallel region.
//
// Compiled for the sizes of one model: WIDTH, HIDDEN, HEADS, KV_HEADS and DIM, all but the heads multiples of 32;
// BFLOAT16 is 1 where weights, keys and values are of that type, 0 where they are float32; AMX 1 where the processor
// multiplies tiles of bfloat16. KEYS keys and values of a head lie together. Sums are float32, and rounded where those
// of LlamaForward are, but that attention's weights are rounded before they are divided by their sum. What a token gets
// does not depend on the other tokens of the pass, nor on the threads, as long as all is finite.

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

const int tile = TILE;

// Weights are laid out [outputs / TILE, inputs / STEP, TILE, STEP].
struct linear {
    const real *weight, *bias;
};

struct layer {
    const float *norm;
    struct linear qkv, out;
    const float *mlp_norm;
    struct linear gate_up, down;
};

INLINE lanes exponential(lanes x) {  // Cephes' expf: 2^n times a polynomial; 0 for -87 and less, of more than 88 that
    const words above = (words)(x > -87), below = (words)(x < 88);
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

// y [rows, TILE] = x [rows, inputs] by a tile of weights [inputs / STEP, TILE, STEP].
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
    FENCE;
    _tile_loadconfig(&shape);
}

static void product(int rows, int inputs, const real *x, int x_stride, const real *weights, float *y, int y_stride) {
    const int both = rows > 16;
    const int line = x_stride * sizeof *x, out = y_stride * sizeof *y, pairs = TILE * STEP * sizeof *weights;
    FENCE;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
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
static void configure(int rows) {}

INLINE void product_of(int rows, int inputs, const real *x, int x_stride, const real *weights, float *y, int y_stride) {
    lanes sums[ROWS][PARTS] = {0};
    for (int k = 0; k < inputs; k += STEP)
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < PARTS; part++)
                sums[row][part] =
                    multiply(sums[row][part], weights + k * TILE + part * STEP * LANES, x + row * x_stride + k);
    for (int row = 0; row < rows; row++)
        memcpy(y + row * y_stride, sums[row], sizeof sums[row]);
}

static void product(int rows, int inputs, const real *x, int x_stride, const real *weights, float *y, int y_stride) {
#define OF(n) case n: return product_of(n, inputs, x, x_stride, weights, y, y_stride);
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

enum then { STORE, ADD, GATE };

// x [n, inputs] @ weight.T + bias -> y [n, outputs], or added to sum. A gated layer has twice the outputs: it gives
// silu(first half) * second half.
INLINE void apply(struct linear by, int n, int inputs, int outputs, const real *x, enum then then, real *y,
                  float *sum) {
#pragma omp for schedule(static)
    for (int first = 0; first < outputs; first += TILE) {
        const real *weight = by.weight + (size_t)first * inputs;
        for (int row = 0; row < n; row += ROWS) {
            const int rows = n - row < ROWS ? n - row : ROWS;
            const real *from = x + (size_t)row * inputs;
            lanes products[ROWS][PARTS], ups[ROWS][PARTS];
            if (row == 0 || rows < ROWS)
                configure(rows);
            product(rows, inputs, from, inputs, weight, (float *)products, TILE);
            if (then == GATE)
                product(rows, inputs, from, inputs, weight + (size_t)outputs * inputs, (float *)ups, TILE);
            for (int i = 0; i < PARTS * rows; i++) {
                const int output = first + i % PARTS * LANES;
                const size_t to = (size_t)(row + i / PARTS) * outputs + output;
                lanes out = products[i / PARTS][i % PARTS];
                if (by.bias)
                    out += load(by.bias + output);
                if (then == STORE) {
                    store(y + to, out);
                } else if (then == ADD) {
                    store_floats(sum + to, load_floats(sum + to) + rounded(out));
                } else {
                    lanes up = ups[i / PARTS][i % PARTS];
                    if (by.bias)
                        up += load(by.bias + outputs + output);
                    out = rounded(out);
                    store(y + to, rounded(out / (1 + exponential(-out))) * rounded(up));
                }
            }
        }
    }
}

// y [n, WIDTH] = x over its root mean square, scaled; scale has the root of WIDTH in it.
INLINE void normalise(int n, const float *x, const float *scale, float least, real *y) {
#pragma omp for schedule(static)
    for (int row = 0; row < n; row++) {
        const float *mine = x + (size_t)row * WIDTH;
        lanes squares = {0};
        for (int i = 0; i < WIDTH; i += LANES)
            squares += load_floats(mine + i) * load_floats(mine + i);
        const float length = sqrtf(total(squares) + least * least);
        for (int i = 0; i < WIDTH; i += LANES)
            store(y + (size_t)row * WIDTH + i, load_floats(mine + i) / length * load_floats(scale + i));
    }
}

// Rotary position embedding: pairs [DIM / 2, 2] times as many complex numbers.
INLINE void turn(real *pairs, const float *turns) {
    for (int i = 0; i < DIM; i += 2) {
        float x = wide(pairs[i]), y = wide(pairs[i + 1]);
        pairs[i] = narrow(x * turns[i] - y * turns[i + 1]);
        pairs[i + 1] = narrow(x * turns[i + 1] + y * turns[i]);
    }
}

// A head's keys and values: KEYS tokens of them in one piece, of keys [KEYS / TILE, DIM / STEP, TILE, STEP] and of
// values [DIM / TILE, KEYS / STEP, TILE, STEP]. A token's are put there, or taken from there.
INLINE void move(real *keys, real *values, int64_t position, real *key, real *value, int store) {
    keys += position / TILE * TILE * DIM + position % TILE * STEP;
    values += position / KEYS * KEYS * DIM + position % KEYS / STEP * TILE * STEP + position % STEP;
    for (int i = 0; i < DIM; i++) {
        real *in = keys + i / STEP * TILE * STEP + i % STEP, *of = values + i / TILE * KEYS * TILE + i % TILE * STEP;
        if (store)
            *in = key[i], *of = value[i];
        else
            key[i] = *in, value[i] = *of;
    }
}

// Attention of some heads that share keys and values, and of some tokens in a row, the first at `position`; at most
// ROWS queries. A token's lie side by side, QKV after those of the token before, and in `out` HEADS * DIM after.
static void attend(int tokens, int heads, int64_t position, const real *queries, const real *keys, const real *values,
                   real *out) {
    const float scale = 1 / sqrtf(DIM);
    const int rows = tokens * heads;
    real asked[ROWS][DIM];
    float most[ROWS], sums[ROWS] = {0};
    lanes seen[ROWS][DIM / LANES] = {0};
    for (int row = 0; row < rows; row++) {
        memcpy(asked[row], queries + row / heads * QKV + row % heads * DIM, sizeof *asked);
        most[row] = -INFINITY;
    }
    configure(rows);
    for (int64_t from = 0; from < position + tokens; from += KEYS) {
        const int64_t left = position + tokens - from;
        const int n = left < KEYS ? (left + TILE - 1) / TILE * TILE : KEYS;
        float scores[ROWS][KEYS];
        real weights[ROWS][KEYS];
        for (int t = 0; t < n; t += TILE)
            product(rows, DIM, *asked, DIM, keys + (from + t) * DIM, *scores + t, KEYS);
        for (int row = 0; row < rows; row++) {
            const int64_t sees = position + row / heads + 1 - from;
            float *mine = scores[row], high = most[row];
            for (int t = sees < 0 ? 0 : sees; t < n; t++)
                mine[t] = -INFINITY;
#pragma omp simd reduction(max : high)
            for (int t = 0; t < n; t++)
                high = mine[t] > high ? mine[t] : high;
            lanes sum = {0};
            for (int t = 0; t < n; t += LANES) {
                const lanes weight = exponential((load_floats(mine + t) - high) * scale);
                sum += weight;
                store(weights[row] + t, weight);
            }
            const float kept = exponential((lanes){0} + (most[row] - high) * scale)[0];
            sums[row] = sums[row] * kept + total(sum);
            most[row] = high;
            for (int i = 0; i < DIM / LANES; i++)
                seen[row][i] *= kept;
        }
        for (int i = 0; i < DIM; i += TILE) {
            lanes part[ROWS][PARTS];
            product(rows, n, *weights, KEYS, values + from * DIM + i * KEYS, (float *)part, TILE);
            for (int row = 0; row < rows; row++)
                for (int j = 0; j < PARTS; j++)
                    seen[row][i / LANES + j] += part[row][j];
        }
    }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < DIM / LANES; i++)
            store(out + (row / heads * HEADS + row % heads) * DIM + i * LANES, seen[row][i] / sums[row]);
}

// x [n, WIDTH], the embeddings, becomes what the last block gives. Token i is at positions[i] of rows[i] of the slab
// [layers, slab_rows, 2, KV_HEADS, capacity, DIM], which its keys and values are written to; turns [n, DIM / 2, 2] turn
// it. one [n, max(WIDTH, HEADS * DIM)] and two [n, max(QKV, HIDDEN)] are room to work in.
void blocks(int threads, int layers, const struct layer *model, float least, int n, float *x, const int64_t *rows,
            const int64_t *positions, const float *turns, real *one, real *two, real *slab, int64_t slab_rows,
            int64_t capacity) {
    int starts[n + 1], spans = 0;  // of tokens that lie in a row and attend together
    for (int i = 0; i < n; i++)
        if (!i || rows[i] != rows[i - 1] || i - starts[spans - 1] >= ROWS / GROUP)
            starts[spans++] = i;
    starts[spans] = n;
#pragma omp parallel num_threads(threads)
    for (int l = 0; l < layers; l++) {
        const struct layer *layer = model + l;
        const size_t head = (size_t)capacity * DIM, row = 2 * KV_HEADS * head;
        real *cached = slab + l * slab_rows * row;
        normalise(n, x, layer->norm, least, one);
        apply(layer->qkv, n, WIDTH, QKV, one, STORE, two, 0);
#pragma omp for schedule(static)
        for (int i = 0; i < n; i++) {
            real *heads = two + (size_t)i * QKV, *key = heads + HEADS * DIM, *keys = cached + rows[i] * row;
            for (int h = 0; h < HEADS + KV_HEADS; h++)
                turn(heads + h * DIM, turns + (size_t)i * DIM);
            for (int h = 0; h < KV_HEADS; h++, keys += head, key += DIM)
                move(keys, keys + KV_HEADS * head, positions[i], key, key + KV_HEADS * DIM, 1);
        }
#pragma omp for schedule(dynamic)
        for (int i = 0; i < spans * KV_HEADS; i++) {
            const int first = starts[i / KV_HEADS], tokens = starts[i / KV_HEADS + 1] - first, h = i % KV_HEADS;
            const real *keys = cached + rows[first] * row + h * head;
            for (int g = h * GROUP; g < (h + 1) * GROUP; g += ROWS) {
                const int heads = (h + 1) * GROUP - g < ROWS ? (h + 1) * GROUP - g : ROWS;
                attend(tokens, heads, positions[first], two + (size_t)first * QKV + g * DIM, keys,
                       keys + KV_HEADS * head, one + ((size_t)first * HEADS + g) * DIM);
            }
        }
        apply(layer->out, n, HEADS * DIM, WIDTH, one, ADD, 0, x);
        normalise(n, x, layer->mlp_norm, least, one);
        apply(layer->gate_up, n, WIDTH, HIDDEN, one, GATE, two, 0);
        apply(layer->down, n, HIDDEN, WIDTH, two, ADD, 0, x);
    }
}

// The logits [n, outputs] of x [n, WIDTH]; one [n, WIDTH] is room to work in.
void logits(int threads, const float *norm, float least, const struct linear *head, int outputs, int n, const float *x,
            real *one, real *out) {
#pragma omp parallel num_threads(threads)
    {
        normalise(n, x, norm, least, one);
        apply(*head, n, WIDTH, outputs, one, STORE, out, 0);
    }
}

// The keys and values of n tokens of a slab row, from `start` on, are put there or taken from there: span
// [layers, 2, KV_HEADS, n, DIM].
void move_span(int threads, int layers, real *slab, int64_t slab_rows, int64_t capacity, int64_t row, int64_t start,
               int64_t n, real *span, int store) {
    const size_t head = (size_t)capacity * DIM, part = (size_t)n * DIM;
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < layers * KV_HEADS; i++) {
        int l = i / KV_HEADS, h = i % KV_HEADS;
        real *keys = slab + ((l * slab_rows + row) * 2 * KV_HEADS + h) * head;
        real *key = span + (l * 2 * KV_HEADS + h) * part;
        for (int64_t t = 0; t < n; t++, key += DIM)
            move(keys, keys + KV_HEADS * head, start + t, key, key + KV_HEADS * part, store);
    }
}
