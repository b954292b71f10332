// What a learner's layer does between its products, forward and backward. Compiled as agents/native.h says.
//
// For given threads, the same bits each time. Sums are float32.

#include "native.h"

#include <omp.h>

#define QUERIES 64  // at a time, a block
#define SPAN 32     // keys at a time
#define LEAST -1e30f
#define CACHE (1 << 19)  // numbers that stay near
#define ROOM __attribute__((aligned(64)))

// Of STEP rows of a product's second factor.
INLINE void interleave(real *to, const lanes *rows) {
#if BFLOAT16
    words pairs = rounded_bits(rows[0]) >> 16 | (rounded_bits(rows[1]) & 0xffff0000);
    memcpy(to, &pairs, sizeof pairs);
#else
    store(to, *rows);
#endif
}

INLINE void interleave_rows(int tokens, int t, const real *x, int stride, real *to) {
    lanes rows[STEP] = {0};
    for (int s = 0; s < STEP && t + s < tokens; s++)
        rows[s] = load(x + (size_t)(t + s) * stride);
    interleave(to, rows);
}

// The width over the length of x [WIDTH], as RMSNorm has it.
INLINE float scale_of(const float *x, float least) {
    lanes squares = {0};
    for (int i = 0; i < WIDTH; i += LANES)
        squares += load_floats(x + i) * load_floats(x + i);
    return 1 / sqrtf(total(squares) / WIDTH + least);
}

// y [n, WIDTH] = RMSNorm of x.
void norm(int threads, int n, float least, const float *x, const float *weight, real *y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int row = 0; row < n; row++) {
        const float *mine = x + (size_t)row * WIDTH, scale = scale_of(mine, least);
        for (int i = 0; i < WIDTH; i += LANES)
            store(y + (size_t)row * WIDTH + i, load_floats(mine + i) * scale * load_floats(weight + i));
    }
}

// out [n, WIDTH] = above + the gradient of x from that of y; the weight's is added to of_weight. sums [threads, WIDTH]
// is room to work in.
void norm_backward(int threads, int n, float least, const float *x, const float *weight, const real *gradient,
                   const float *above, float *sums, float *of_weight, float *out) {
#pragma omp parallel num_threads(threads)
    {
        float of_mine[WIDTH] = {0};
#pragma omp for schedule(static)
        for (int row = 0; row < n; row++) {
            const float *mine = x + (size_t)row * WIDTH, scale = scale_of(mine, least);
            const real *given = gradient + (size_t)row * WIDTH;
            lanes products = {0};
            for (int i = 0; i < WIDTH; i += LANES) {
                const lanes product = load(given + i) * load_floats(mine + i) * scale;
                store_floats(of_mine + i, load_floats(of_mine + i) + product);
                products += product * load_floats(weight + i);
            }
            const float along = total(products) / WIDTH * scale;
            for (int i = 0; i < WIDTH; i += LANES) {
                const lanes across = load(given + i) * load_floats(weight + i) - load_floats(mine + i) * along;
                const size_t at = (size_t)row * WIDTH + i;
                store_floats(out + at, load_floats(above + at) + across * scale);
            }
        }
        memcpy(sums + omp_get_thread_num() * WIDTH, of_mine, sizeof of_mine);
#pragma omp barrier
#pragma omp single
        for (int thread = 0; thread < omp_get_num_threads(); thread++)
            for (int i = 0; i < WIDTH; i++)
                of_weight[i] += sums[thread * WIDTH + i];
    }
}

// out [n, HIDDEN] = silu(gate) * up; inner [n, 2, HIDDEN] is of gates and ups.
void gate(int threads, int n, const real *inner, real *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int row = 0; row < n; row++)
        for (int i = 0; i < HIDDEN; i += LANES) {
            const real *gates = inner + (size_t)row * 2 * HIDDEN + i;
            const lanes opening = load(gates), open = rounded(opening / (1 + exponential(-opening)));
            store(out + (size_t)row * HIDDEN + i, open * load(gates + HIDDEN));
        }
}

// The same, and the gradient of inner from that of out.
void gate_backward(int threads, int n, const real *inner, const real *gradient, real *out, real *of_inner) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int row = 0; row < n; row++)
        for (int i = 0; i < HIDDEN; i += LANES) {
            const size_t at = (size_t)row * HIDDEN + i, place = (size_t)row * 2 * HIDDEN + i;
            const lanes opening = load(inner + place), up = load(inner + place + HIDDEN), given = load(gradient + at);
            const lanes share = 1 / (1 + exponential(-opening)), open = rounded(opening * share);
            store(out + at, open * up);
            store(of_inner + place, given * up * share * (1 + opening * (1 - share)));
            store(of_inner + place + HIDDEN, given * open);
        }
}

#if TILES
// out [outputs, inputs] += gradient.T @ x, x [tokens, inputs]; rows of gradient [tokens, outputs] are `stride` apart.
// across [outputs, padded] and pairs [inputs, padded] are room to work in; 32 divides outputs, inputs and padded, which
// is `tokens` or the next such number.
void learn(int threads, int tokens, int padded, int outputs, int inputs, const real *gradient, int stride,
           const real *x, real *across, real *pairs, float *out) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int start = 0; start < padded; start += 32)
            for (int first = 0; first < outputs; first += 16)
                for (int t = start; t < start + 32; t += 2) {
                    real pair[32], *to = across + (size_t)first * padded + start * 16 + t % 32;
                    interleave_rows(tokens, t, gradient + first, stride, pair);
                    for (int i = 0; i < 16; i++)
                        memcpy(to + i * 32, pair + i * 2, 4);
                }
#pragma omp for schedule(static)
        for (int start = 0; start < padded; start += 32)
            for (int i = 0; i < inputs; i += 16)
                for (int t = start; t < start + 32; t += 2)
                    interleave_rows(tokens, t, x + i, inputs, pairs + (size_t)i * padded + t * 16);
        configure(32);
        const int piece = (CACHE / inputs / 32 + 1) * 32;  // tokens, of which pairs fit the cache
        for (int start = 0; start < padded; start += piece) {
            const int end = start + piece < padded ? start + piece : padded;
#pragma omp for schedule(static) nowait
            for (int first = 0; first < outputs; first += 32)
                for (int i = 0; i < inputs; i += 32) {
                    const real *above = across + (size_t)first * padded, *below = above + 16 * padded;
                    const real *left = pairs + (size_t)i * padded, *right = left + 16 * padded;
                    float *to = out + (size_t)first * inputs + i, *lower = to + 16 * inputs;
                    const int line = inputs * sizeof *to;
                    FENCE;
                    _tile_loadd(0, to, line);
                    _tile_loadd(1, to + 16, line);
                    _tile_loadd(2, lower, line);
                    _tile_loadd(3, lower + 16, line);
                    for (int t = start * 16; t < end * 16; t += 512) {
                        _tile_loadd(4, above + t, 64);
                        _tile_loadd(5, below + t, 64);
                        _tile_loadd(6, left + t, 64);
                        _tile_loadd(7, right + t, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    _tile_stored(0, to, line);
                    _tile_stored(1, to + 16, line);
                    _tile_stored(2, lower, line);
                    _tile_stored(3, lower + 16, line);
                }
        }
    }
}
#endif

// Attention to packed trees, as in FlashAttention-2 (Dao 2023, section 3.1). Tokens lie depth first: those from t to
// until[t] - 1 see token t. Scores lie with a row for each key, so that all that is done for a query is done in a lane;
// weights, and the gradients of scores, are rounded before they are multiplied.

// y [rows, outputs] = x [rows, inputs] by weights [outputs / TILE, inputs / STEP, TILE, STEP], or that much more.
INLINE void multiply_all(int rows, int inputs, int outputs, const real *x, int x_stride, const real *weights, float *y,
                         int y_stride, int add) {
    for (int first = 0; first < outputs; first += TILE)
        for (int row = 0; row < rows; row += ROWS)
            product(rows - row < ROWS ? rows - row : ROWS, inputs, x + (size_t)row * x_stride, x_stride,
                    weights + first * inputs, y + (size_t)row * y_stride + first, y_stride, add);
}

// Rotary position embedding: a head's two halves are the parts of DIM / 2 complex numbers; turns [2, DIM / 2] are
// cosines and sines.
INLINE void turn(const real *x, const float *turns, real *y) {
    for (int i = 0; i < DIM / 2; i += LANES) {
        const lanes a = load(x + i), b = load(x + DIM / 2 + i);
        const lanes cosine = load_floats(turns + i), sine = load_floats(turns + DIM / 2 + i);
        store(y + i, a * cosine - b * sine);
        store(y + DIM / 2 + i, b * cosine + a * sine);
    }
}

INLINE void turn_back(const float *x, const float *turns, real *y) {
    for (int i = 0; i < DIM / 2; i += LANES) {
        const lanes a = load_floats(x + i), b = load_floats(x + DIM / 2 + i);
        const lanes cosine = load_floats(turns + i), sine = load_floats(turns + DIM / 2 + i);
        store(y + i, a * cosine + b * sine);
        store(y + DIM / 2 + i, b * cosine - a * sine);
    }
}

// As the second factor of products over DIM: to [QUERIES / TILE, DIM / STEP, TILE, STEP].
INLINE void lay_across(const real *rows, real *to) {
    for (int row = 0; row < QUERIES; row++)
        for (int i = 0; i < DIM; i += STEP)
            memcpy(to + row / TILE * TILE * DIM + i * TILE + row % TILE * STEP, rows + row * DIM + i, 4);
}

// And of products over queries: to [DIM / TILE, QUERIES / STEP, TILE, STEP].
INLINE void lay_down(const real *rows, real *to) {
    for (int row = 0; row < QUERIES; row += STEP)
        for (int i = 0; i < DIM; i += LANES) {
            const lanes pair[] = {load(rows + row * DIM + i), load(rows + (row + STEP - 1) * DIM + i)};
            interleave(to + i / TILE * TILE * QUERIES + row * TILE + i % TILE * STEP, pair);
        }
}

// Whether none, some or all of the queries from `block` see all of the keys from `first`.
INLINE int sight(const int32_t *until, int first, int block) {
    int nearest = INT32_MAX, farthest = 0;
    for (int k = first; k < first + SPAN; k++) {
        nearest = until[k] < nearest ? until[k] : nearest;
        farthest = until[k] > farthest ? until[k] : farthest;
    }
    if (first >= block + QUERIES || farthest <= block)
        return 0;
    return first + SPAN - 1 <= block && nearest >= block + QUERIES ? 2 : 1;
}

INLINE void hide(float *scores, const int32_t *until, int first, int block) {
    for (int k = 0; k < SPAN; k++)
        for (int q = 0; q < QUERIES; q++) {
            const int token = block + q;
            float *score = scores + k * QUERIES + q;
            *score = (token >= first + k) & (token < until[first + k]) ? *score : LEAST;
        }
}

// The tokens of a pass, their places, and their queries, keys and values [tokens, QKV], not yet turned.
struct pass {
    int tokens, padded;    // the next number that SPAN divides
    const int32_t *until;  // [padded], 0 from `tokens` on
    const float *turns;    // [tokens, 2, DIM / 2]
    const real *joint;
};

// Keys, turned, and values, each [KV_HEADS, padded, DIM] or, across, [KV_HEADS, DIM, padded]; NULL where not wanted.
INLINE void lay(const struct pass *p, real *keys, real *values, real *keys_across, real *values_across) {
#pragma omp for collapse(2) schedule(static)
    for (int h = 0; h < KV_HEADS; h++)
        for (int t = 0; t < p->padded; t++) {
            const size_t place = ((size_t)h * p->padded + t) * DIM, column = (size_t)h * DIM * p->padded + t;
            real key[DIM] = {0}, value[DIM] = {0};
            if (t < p->tokens) {
                const real *heads = p->joint + (size_t)t * QKV + (HEADS + h) * DIM;
                turn(heads, p->turns + (size_t)t * DIM, key);
                memcpy(value, heads + KV_HEADS * DIM, sizeof value);
            }
            memcpy(keys + place, key, sizeof key);
            if (values)
                memcpy(values + place, value, sizeof value);
            for (int i = 0; i < DIM && keys_across; i++)
                keys_across[column + (size_t)i * p->padded] = key[i];
            for (int i = 0; i < DIM && values_across; i++)
                values_across[column + (size_t)i * p->padded] = value[i];
        }
}

// A head's queries of a block, turned; zeros after the last token.
INLINE void queries_of(const struct pass *p, int block, int head, real *rows) {
    memset(rows, 0, QUERIES * DIM * sizeof *rows);
    for (int q = 0; q < QUERIES && block + q < p->tokens; q++) {
        const size_t token = block + q;
        turn(p->joint + token * QKV + head * DIM, p->turns + token * DIM, rows + q * DIM);
    }
}

// Where a number of query q and key k lies in the second factor of a product over keys.
INLINE int down(int k, int q) { return q / TILE * TILE * SPAN + k * TILE + q % TILE * STEP; }

// The weights of a span of keys, as the second factor of a product over them, from scores. `most` is the highest score
// so far of each query and `sums` that of its weights; they, and what was seen so far, follow the highest.
INLINE void soften(float scores[SPAN][QUERIES], float scale, lanes *most, lanes *sums, float seen[DIM][QUERIES],
                   real *weights) {
    for (int c = 0; c < QUERIES / LANES; c++) {
        const int q = c * LANES;
        lanes high = most[c];
        for (int k = 0; k < SPAN; k++) {
            const lanes score = load_floats(scores[k] + q);
            const words larger = (words)(score > high);
            high = (lanes)(((words)score & larger) | ((words)high & ~larger));
        }
        if (memcmp(&high, &most[c], sizeof high)) {
            const lanes kept = exponential((most[c] - high) * scale);
            sums[c] *= kept;
            for (int i = 0; i < DIM; i++)
                store_floats(seen[i] + q, load_floats(seen[i] + q) * kept);
            most[c] = high;
        }
        for (int k = 0; k < SPAN; k += STEP) {
            lanes pair[STEP];
            for (int s = 0; s < STEP; s++) {
                pair[s] = exponential((load_floats(scores[k + s] + q) - high) * scale);
                sums[c] += pair[s];
            }
            interleave(weights + down(k, q), pair);
        }
    }
}

static void see(const struct pass *p, int block, int head, const real *keys, const real *values_across, real *seen,
                float *lengths) {
    const float scale = 1 / sqrtf(DIM);
    real rows[QUERIES * DIM] ROOM, asked[QUERIES * DIM] ROOM, weights[SPAN * QUERIES] ROOM;
    float scores[SPAN][QUERIES] ROOM, out[DIM][QUERIES] ROOM = {0};
    lanes most[QUERIES / LANES], sums[QUERIES / LANES] = {0};
    for (int c = 0; c < QUERIES / LANES; c++)
        most[c] = (lanes){0} + LEAST;
    queries_of(p, block, head, rows);
    lay_across(rows, asked);
    for (int first = 0; first < p->padded && first < block + QUERIES; first += SPAN) {
        const int seeing = sight(p->until, first, block);
        if (!seeing)
            continue;
        multiply_all(SPAN, DIM, QUERIES, keys + (size_t)first * DIM, DIM, asked, *scores, QUERIES, 0);
        if (seeing == 1)
            hide(*scores, p->until, first, block);
        soften(scores, scale, most, sums, out, weights);
        multiply_all(DIM, SPAN, QUERIES, values_across + first, p->padded, weights, *out, QUERIES, 1);
    }
    float divisors[QUERIES], highest[QUERIES];
    memcpy(divisors, sums, sizeof divisors);
    memcpy(highest, most, sizeof highest);
    for (int q = 0; q < QUERIES && block + q < p->tokens; q++) {
        float row[DIM];
        for (int i = 0; i < DIM; i++)
            row[i] = out[i][q] / divisors[q];
        for (int i = 0; i < DIM; i += LANES)
            store(seen + ((size_t)(block + q) * HEADS + head) * DIM + i, load_floats(row + i));
        lengths[(size_t)head * p->tokens + block + q] = highest[q] * scale + logf(divisors[q]);
    }
}

// joint [tokens, QKV] -> seen [tokens, HEADS * DIM], and lengths [HEADS, tokens], the logarithm of what a query's
// weights are divided by. keys and values, each as many as `lay` gives, are room to work in.
void attend(int threads, int tokens, int padded, const int32_t *until, const float *turns, const real *joint,
            real *keys, real *values, real *seen, float *lengths) {
    const struct pass pass = {tokens, padded, until, turns, joint};
    const size_t head_size = (size_t)padded * DIM;
#pragma omp parallel num_threads(threads)
    {
        configure(ROWS);
        lay(&pass, keys, NULL, NULL, values);
#pragma omp for collapse(2) schedule(dynamic)
        for (int b = (tokens - 1) / QUERIES; b >= 0; b--)
            for (int head = 0; head < HEADS; head++)
                see(&pass, b * QUERIES, head, keys + head / GROUP * head_size, values + head / GROUP * head_size, seen,
                    lengths);
    }
}

// The gradient of a block's queries goes to `within`; those of keys and values, of which of_both [padded, 2, DIM] are
// the sums, grow.
static void see_backward(const struct pass *p, int block, int head, const real *keys, const real *values,
                         const real *keys_across, const real *seen, const float *lengths, const real *gradient,
                         float *of_both, real *within) {
    const float scale = 1 / sqrtf(DIM);
    real rows[QUERIES * DIM] ROOM, asked[QUERIES * DIM] ROOM, asked_down[QUERIES * DIM] ROOM;
    real given[QUERIES * DIM] ROOM, given_down[QUERIES * DIM] ROOM;
    real weights[SPAN * QUERIES] ROOM, slopes[SPAN * QUERIES] ROOM, slopes_down[SPAN * QUERIES] ROOM;
    float scores[SPAN][QUERIES] ROOM, of_weights[SPAN][QUERIES] ROOM, out[DIM][QUERIES] ROOM = {0};
    float length[QUERIES] = {0}, along[QUERIES] = {0};
    queries_of(p, block, head, rows);
    lay_across(rows, asked);
    lay_down(rows, asked_down);
    memset(rows, 0, sizeof rows);
    for (int q = 0; q < QUERIES && block + q < p->tokens; q++) {
        const size_t place = ((size_t)(block + q) * HEADS + head) * DIM;
        lanes products = {0};
        for (int i = 0; i < DIM; i += LANES)
            products += load(gradient + place + i) * load(seen + place + i);
        along[q] = total(products);
        length[q] = lengths[(size_t)head * p->tokens + block + q];
        memcpy(rows + q * DIM, gradient + place, DIM * sizeof *rows);
    }
    lay_across(rows, given);
    lay_down(rows, given_down);
    for (int first = 0; first < p->padded && first < block + QUERIES; first += SPAN) {
        const int seeing = sight(p->until, first, block);
        if (!seeing)
            continue;
        const size_t from = (size_t)first * DIM;
        float *of_keys = of_both + 2 * from, *of_values = of_keys + DIM;
        multiply_all(SPAN, DIM, QUERIES, keys + from, DIM, asked, *scores, QUERIES, 0);
        multiply_all(SPAN, DIM, QUERIES, values + from, DIM, given, *of_weights, QUERIES, 0);
        if (seeing == 1)
            hide(*scores, p->until, first, block);
        for (int k = 0; k < SPAN; k += STEP)
            for (int q = 0; q < QUERIES; q += LANES) {
                lanes pair[STEP];
                for (int s = 0; s < STEP; s++) {
                    const lanes score = load_floats(scores[k + s] + q);
                    const lanes weight = exponential(score * scale - load_floats(length + q));
                    pair[s] = weight * (load_floats(of_weights[k + s] + q) - load_floats(along + q));
                    store(weights + (k + s) * QUERIES + q, weight);
                    store(slopes + (k + s) * QUERIES + q, pair[s]);
                }
                interleave(slopes_down + down(k, q), pair);
            }
        multiply_all(SPAN, QUERIES, DIM, weights, QUERIES, given_down, of_values, 2 * DIM, 1);
        multiply_all(SPAN, QUERIES, DIM, slopes, QUERIES, asked_down, of_keys, 2 * DIM, 1);
        multiply_all(DIM, SPAN, QUERIES, keys_across + first, p->padded, slopes_down, *out, QUERIES, 1);
    }
    for (int q = 0; q < QUERIES && block + q < p->tokens; q++) {
        const size_t token = block + q;
        float row[DIM];
        for (int i = 0; i < DIM; i++)
            row[i] = out[i][q] * scale;
        turn_back(row, p->turns + token * DIM, within + token * QKV + head * DIM);
    }
}

// The gradient within [tokens, QKV] of joint, from that of seen. keys, values and across, each as many as `lay` gives,
// and sums [threads, padded, 2, DIM] are room to work in.
void attend_backward(int threads, int tokens, int padded, const int32_t *until, const float *turns, const real *joint,
                     const real *seen, const float *lengths, const real *gradient, real *keys, real *values,
                     real *across, float *sums, real *within) {
    const struct pass pass = {tokens, padded, until, turns, joint};
    const size_t head_size = (size_t)padded * DIM;
#pragma omp parallel num_threads(threads)
    {
        float *mine = sums + omp_get_thread_num() * 2 * head_size;
        configure(ROWS);
        lay(&pass, keys, values, across, NULL);
        for (int h = 0; h < KV_HEADS; h++) {
            memset(mine, 0, 2 * head_size * sizeof *mine);
#pragma omp for collapse(2) schedule(static, 1)
            for (int block = 0; block < tokens; block += QUERIES)
                for (int head = h * GROUP; head < (h + 1) * GROUP; head++)
                    see_backward(&pass, block, head, keys + h * head_size, values + h * head_size,
                                 across + h * head_size, seen, lengths, gradient, mine, within);
#pragma omp for schedule(static)
            for (int t = 0; t < tokens; t++) {
                real *to = within + (size_t)t * QKV + (HEADS + h) * DIM;
                float row[2 * DIM] = {0};
                for (int thread = 0; thread < omp_get_num_threads(); thread++)
                    for (int i = 0; i < 2 * DIM; i++)
                        row[i] += sums[2 * (thread * head_size + (size_t)t * DIM) + i];
                for (int i = 0; i < DIM; i++)
                    row[i] /= sqrtf(DIM);
                turn_back(row, turns + (size_t)t * DIM, to);
                for (int i = 0; i < DIM; i += LANES)
                    store(to + KV_HEADS * DIM + i, load_floats(row + DIM + i));
            }
        }
    }
}
