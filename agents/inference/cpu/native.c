// A pass of some tokens through a Llama-like model, all threads in one parallel region.
//
// Compiled as native.h says. KEYS keys and values of a head lie together. Sums are float32, and rounded where those
// of LlamaForward are, but that attention's weights are rounded before they are divided by their sum. What a token gets
// does not depend on the other tokens of the pass, nor on the threads, as long as all is finite.

#include "native.h"

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
            product(rows, inputs, from, inputs, weight, (float *)products, TILE, 0);
            if (then == GATE)
                product(rows, inputs, from, inputs, weight + (size_t)outputs * inputs, (float *)ups, TILE, 0);
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
            product(rows, DIM, *asked, DIM, keys + (from + t) * DIM, *scores + t, KEYS, 0);
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
            product(rows, n, *weights, KEYS, values + from * DIM + i * KEYS, (float *)part, TILE, 0);
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
