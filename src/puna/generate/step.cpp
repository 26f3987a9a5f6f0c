// One decode step of a Llama on a CPU: a few rows, one new token each, through all layers and the head in one call.
//
// Weights and cache are read where torch holds them; states and sums are float32 throughout. A row's numbers do not
// depend on the other rows. kernel.py compiles this file and says what the structures hold; they must stay alike.
//
// R rows, D model width, H query heads, K key/value heads, E head width, V vocabulary.

#include "shared.h"

struct Matrix { const void *data, *scales; int32_t kind, rows, columns, group; };  // kind 0 fp32, 1 bf16, 2 int8, 3 int4
struct Layer { const float *attention_norm, *ffn_norm; Matrix wq, wk, wv, wo, w1, w2, w3; };
struct Model { const Layer *layers; const float *norm; Matrix output; int32_t n_layers, heads, kv_heads, width; float eps; };
struct Cache {  // strides in numbers; a row's position s is at place s % page of the page table[row][s / page]
    void *const *keys, *const *values;  // a pointer a layer
    const int64_t *table;
    int64_t pages, page, page_stride, head_stride, place_stride;
    int32_t is_bf16;
};

static void put(float *p, float x) { *p = x; }
static void put(Bf16 *p, float x) {  // to the nearest, ties to even, as torch rounds
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Dots of R rows of x (R, count) with w; the order of a sum is the same for any R. One stream of weights with the next
// ones asked for reads memory twice as fast as four rows side by side.
template <int R, class W> static void dots(const float *x, const W *w, int count, float *out) {
    constexpr int SUMS = 4, AHEAD = 4096, LINE = 64 / sizeof(W);
    Floats sums[R][SUMS] = {};
    int i = 0;
    auto add = [&](int part) {
        Floats weights = load(w + i + part * LANES);
        for (int r = 0; r < R; r++)
            sums[r][part] = multiply_add(weights, load(x + (int64_t)r * count + i + part * LANES), sums[r][part]);
    };
    for (; i + SUMS * LANES <= count; i += SUMS * LANES) {
        for (int j = 0; j < SUMS * LANES; j += LINE) __builtin_prefetch((const char *)(w + i + j) + AHEAD);
        for (int part = 0; part < SUMS; part++) add(part);
    }
    for (; i + LANES <= count; i += LANES) add(0);
    for (int r = 0; r < R; r++) {
        float rest = 0;
        for (int j = i; j < count; j++) rest += one(w[j]) * x[(int64_t)r * count + j];
        for (int part = 1; part < SUMS; part++) sums[r][0] += sums[r][part];
        out[r] = sum(sums[r][0]) + rest;
    }
}

// As `dots`, with BLOCK rows of int4, out[r * BLOCK + n]. For each column lie 2 LANES bytes: low halves are the first
// rows, high halves the others. A scale and a zero of a row stand side by side for every group of columns.
template <int R> static void block(const float *x, const Matrix &m, int first, float *out) {
    const uint8_t *w = (const uint8_t *)m.data + (int64_t)first * m.columns / 2;
    Floats totals[R][4] = {};
    for (int begin = 0; begin < m.columns; begin += m.group) {
        Floats sums[R][4] = {}, ones[R] = {};
        for (int i = begin; i < begin + m.group; i++, w += 2 * LANES) {
            Floats held[4];
            for (int part = 0; part < 4; part++) held[part] = nibbles(w + part % 2 * LANES, part / 2 * 4);
            for (int r = 0; r < R; r++) {
                Floats number = all(x[(int64_t)r * m.columns + i]);
                ones[r] += number;
                for (int part = 0; part < 4; part++) sums[r][part] = multiply_add(held[part], number, sums[r][part]);
            }
        }
        const Bf16 *scales = (const Bf16 *)m.scales + 2 * ((int64_t)begin / m.group * m.rows + first);
        for (int part = 0; part < 4; part++)
            for (int r = 0; r < R; r++) {
                Floats &total = totals[r][part];
                total = multiply_add(bf16_of_pairs(scales + 2 * part * LANES, false), sums[r][part], total);
                total = multiply_add(bf16_of_pairs(scales + 2 * part * LANES, true), ones[r], total);
            }
    }
    memcpy(out, totals, sizeof totals);
}

// Calls give(row of x, row of w, dot) for rows begin..end of the matrix.
template <int R, class W, class Give>
static void product(const float *x, const Matrix &m, int first, int begin, int end, const Give &give) {
    float out[R];
    for (int n = begin; n < end; n++) {
        dots<R>(x, (const W *)m.data + (int64_t)n * m.columns, m.columns, out);
        for (int r = 0; r < R; r++) give(first + r, n, m.scales ? out[r] * ((const float *)m.scales)[n] : out[r]);
    }
}
template <int R, class Give>
static void product_int4(const float *x, const Matrix &m, int first, int begin, int end, const Give &give) {
    float out[R * BLOCK];
    for (; begin < end; begin += BLOCK) {
        block<R>(x, m, begin, out);
        for (int r = 0; r < R; r++)
            for (int n = 0; n < BLOCK; n++) give(first + r, begin + n, out[r * BLOCK + n]);
    }
}
template <int R, class Give>
static void product(const float *x, const Matrix &m, int first, int begin, int end, const Give &give) {
    if (m.kind == 0) product<R, float>(x, m, first, begin, end, give);
    else if (m.kind == 1) product<R, Bf16>(x, m, first, begin, end, give);
    else if (m.kind == 2) product<R, int8_t>(x, m, first, begin, end, give);
    else product_int4<R>(x, m, first, begin, end, give);
}
template <class Give>
static void multiply(const std::vector<float> &x, int rows, const Matrix &m, int begin, int end, const Give &give) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) product<4>(&x[(int64_t)r * m.columns], m, r, begin, end, give);
    for (; r + 2 <= rows; r += 2) product<2>(&x[(int64_t)r * m.columns], m, r, begin, end, give);
    for (; r < rows; r++) product<1>(&x[(int64_t)r * m.columns], m, r, begin, end, give);
}

static void normalise(const std::vector<float> &x, const float *weight, int rows, int dim, float eps, std::vector<float> &out) {
    for (int r = 0; r < rows; r++) {
        const float *from = &x[(int64_t)r * dim];
        double squares = 0;
        for (int i = 0; i < dim; i++) squares += from[i] * from[i];
        float scale = 1 / std::sqrt((float)(squares / dim) + eps);
        for (int i = 0; i < dim; i++) out[(int64_t)r * dim + i] = from[i] * scale * weight[i];
    }
}

// Turns each neighbouring pair of every head by its angle; table (E / 2, 2) holds cos and sin.
static void rotate(float *x, const float *table, int heads, int width) {
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < width; i += 2, x += 2) {
            float a = x[0], b = x[1];
            x[0] = a * table[i] - b * table[i + 1];
            x[1] = a * table[i + 1] + b * table[i];
        }
}

// Attention of one head's query q (E,) over positions 0..last of a row, whose keys and values lie in these pages.
template <class C>
static void attend(const float *q, const Cache &cache, int layer, int head, const int64_t *pages, int64_t last, int width,
                   float *out) {
    static thread_local std::vector<float> weights;
    weights.assign((last / LANES + 1) * LANES, -INFINITY);
    auto over_places = [&](const void *base, auto f) {
        for (int64_t s = 0; s <= last;) {
            const C *at = (const C *)base + pages[s / cache.page] * cache.page_stride + head * cache.head_stride;
            for (int64_t end = std::min(last + 1, s + cache.page); s < end; s++, at += cache.place_stride) f(s, at);
        }
    };
    const float scale = 1 / std::sqrt((float)width);
    float highest = -INFINITY;
    over_places(cache.keys[layer], [&](int64_t s, const C *key) {
        dots<1>(q, key, width, &weights[s]);
        highest = std::max(highest, weights[s] *= scale);
    });
    Floats totals = all(0);
    for (size_t s = 0; s < weights.size(); s += LANES) {
        Floats weight = exponential(load(&weights[s]) - all(highest));
        store(&weights[s], weight), totals += weight;
    }
    const float total = sum(totals);
    int i = 0;
    auto part = [&](auto count) {  // the next numbers of the output, summed in so many registers
        Floats sums[count] = {};
        over_places(cache.values[layer], [&](int64_t s, const C *value) {
            for (int n = 0; n < count; n++) sums[n] = multiply_add(all(weights[s]), load(value + i + n * LANES), sums[n]);
        });
        for (int n = 0; n < count; n++, i += LANES) store(out + i, sums[n] / all(total));
    };
    while (i + 4 * LANES <= width) part(std::integral_constant<int, 4>());
    while (i + LANES <= width) part(std::integral_constant<int, 1>());
    for (; i < width; i++) {
        float sum_of_one = 0;
        over_places(cache.values[layer], [&](int64_t s, const C *value) { sum_of_one += weights[s] * one(value[i]); });
        out[i] = sum_of_one / total;
    }
}

template <class C>
static void step(const Model &model, const Cache &cache, int rows, const int64_t *positions, const float *rotary,
                 float *states, float *logits) {
    const int dim = model.output.columns, width = model.width, heads = model.heads, kv = model.kv_heads;
    const int hidden = model.layers->w1.rows, wide = heads * width, narrow = kv * width;
    std::vector<float> x(states, states + (int64_t)rows * dim), h(x.size()), q(rows * wide), out(q.size());
    std::vector<float> k(rows * narrow), v(k.size()), gate((int64_t)rows * hidden);
    for (int l = 0; l < model.n_layers; l++) {
        const Layer &layer = model.layers[l];
        auto add = [&](int r, int n, float dot) { x[(int64_t)r * dim + n] += dot; };
        normalise(x, layer.attention_norm, rows, dim, model.eps, h);
        threads.rows(wide + 2 * narrow, dim, [&](int begin, int end) {
            int first = 0;
            for (auto [m, to] : {std::pair{&layer.wq, &q}, {&layer.wk, &k}, {&layer.wv, &v}}) {
                multiply(h, rows, *m, std::clamp(begin - first, 0, m->rows), std::clamp(end - first, 0, m->rows),
                         [&](int r, int n, float dot) { (*to)[r * m->rows + n] = dot; });
                first += m->rows;
            }
        });
        for (int r = 0; r < rows; r++) {
            rotate(&q[r * wide], rotary + r * width, heads, width);
            rotate(&k[r * narrow], rotary + r * width, kv, width);
            int64_t page = cache.table[r * cache.pages + positions[r] / cache.page];
            int64_t place = page * cache.page_stride + positions[r] % cache.page * cache.place_stride;
            for (int i = 0; i < narrow; i++) {
                int64_t to = place + i / width * cache.head_stride + i % width;
                put((C *)cache.keys[l] + to, k[r * narrow + i]);
                put((C *)cache.values[l] + to, v[r * narrow + i]);
            }
        }
        threads.run(rows * heads, [&](int chunk) {
            int r = chunk / heads, head = chunk % heads / (heads / kv);
            attend<C>(&q[chunk * width], cache, l, head, cache.table + r * cache.pages, positions[r], width, &out[chunk * width]);
        });
        threads.rows(dim, wide, [&](int begin, int end) { multiply(out, rows, layer.wo, begin, end, add); });
        normalise(x, layer.ffn_norm, rows, dim, model.eps, h);
        threads.rows(hidden, 2 * dim, [&](int begin, int end) {
            multiply(h, rows, layer.w1, begin, end, [&](int r, int n, float dot) { gate[(int64_t)r * hidden + n] = dot; });
            multiply(h, rows, layer.w3, begin, end, [&](int r, int n, float dot) {
                float &g = gate[(int64_t)r * hidden + n];
                g *= dot / (1 + std::exp(-g));
            });
        });
        threads.rows(dim, hidden, [&](int begin, int end) { multiply(gate, rows, layer.w2, begin, end, add); });
    }
    normalise(x, model.norm, rows, dim, model.eps, h);
    memcpy(states, h.data(), h.size() * sizeof(float));
    if (logits)
        threads.rows(model.output.rows, dim, [&](int begin, int end) {
            multiply(h, rows, model.output, begin, end,
                     [&](int r, int n, float dot) { logits[(int64_t)r * model.output.rows + n] = dot; });
        });
}

extern "C" int puna_block() { return BLOCK; }

// states (R, D): embeddings in, normalised last states out; rotary (R, E / 2, 2); logits (R, V), or null for none.
extern "C" void puna_step(const Model *model, const Cache *cache, int rows, const int64_t *positions,
                          const float *rotary, float *states, float *logits, int count) {
    std::lock_guard<std::mutex> alone(threads.mutex);
    threads.begin(count, count);
    (cache->is_bf16 ? step<Bf16> : step<float>)(*model, *cache, rows, positions, rotary, states, logits);
    threads.end();
}
