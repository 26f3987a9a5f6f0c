// One decode step of a Llama on a CPU: rows of one new token each, through all layers and the head in one call.
//
// Weights and cache are read where torch holds them; states and sums are float32 throughout, but that a processor with
// products of bfloat16 rounds many rows that meet such weights, and queries that meet such keys (tiles.h). Among few
// rows, and among many, a row's numbers do not depend on the others. generate/kernel.py says what the structures
// hold; they must stay alike.
//
// R rows, D model width, H query heads, K key/value heads, E head width, V vocabulary.

#include "tiles.h"

constexpr int FEW = 8;  // rows for which reading the weights is all that counts

struct Matrix { const void *data, *scales; int32_t kind, rows, columns, group; };  // kind 0 fp32, 1 bf16, 2 int8, 3 int4
struct Layer { const float *attention_norm, *ffn_norm; Matrix wq, wk, wv, wo, w1, w2, w3; };
struct Model { const Layer *layers; const float *norm; Matrix output; int32_t n_layers, heads, kv_heads, width; float eps; };
struct Cache {  // strides in numbers; a row's position s is at place s % page of the page table[row][s / page]
    void *const *keys, *const *values;  // a pointer a layer
    const int64_t *table;
    int64_t pages, page, page_stride, head_stride, place_stride;
    int32_t is_bf16;
};

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
static bool is_tiled(const Matrix &m) { return m.kind != 3 && (m.kind != 1 || m.columns % NUMBERS<Bf16> == 0); }
template <class Give>
static void multiply(const std::vector<float> &x, int rows, const Matrix &m, int begin, int end, const Give &give) {
    if (begin == end) return;
    auto scaled = [&](int r, int n, float dot) { give(r, n, dot * ((const float *)m.scales)[n]); };
    if (rows > FEW && is_tiled(m)) {
        if (m.kind == 0) tiles(x.data(), rows, (const float *)m.data, m.columns, begin, end, give);
        if (m.kind == 1) tiles(x.data(), rows, (const Bf16 *)m.data, m.columns, begin, end, give);
        if (m.kind == 2) tiles(x.data(), rows, (const int8_t *)m.data, m.columns, begin, end, scaled);
        return;
    }
    int r = 0;
    for (; r + 4 <= rows; r += 4) product<4>(&x[(int64_t)r * m.columns], m, r, begin, end, give);
    for (; r + 2 <= rows; r += 2) product<2>(&x[(int64_t)r * m.columns], m, r, begin, end, give);
    for (; r < rows; r++) product<1>(&x[(int64_t)r * m.columns], m, r, begin, end, give);
}

// f(row) for each of the rows, a few at a time.
template <class F> static void each_row(int rows, const F &f) {
    threads.pieces(rows, FEW, [&](int begin, int end) {
        for (int r = begin; r < end; r++) f(r);
    });
}

static void normalise(const std::vector<float> &x, const float *weight, int rows, int dim, float eps, std::vector<float> &out) {
    each_row(rows, [&](int r) {
        const float *from = &x[(int64_t)r * dim];
        Floats squares = all(0);
        int i = 0;
        for (; i + LANES <= dim; i += LANES) squares = multiply_add(load(from + i), load(from + i), squares);
        float rest = sum(squares);
        for (; i < dim; i++) rest += from[i] * from[i];
        const float scale = 1 / std::sqrt(rest / dim + eps);
        for (i = 0; i < dim; i++) out[(int64_t)r * dim + i] = from[i] * scale * weight[i];
    });
}

// gate (count,) becomes silu(gate) * up.
static void activate(float *gate, const float *up, int count) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats x = load(gate + i), e = exponential(x < all(0) ? x : -x);
        store(gate + i, x * load(up + i) * (x < all(0) ? e : all(1)) / (all(1) + e));
    }
    for (; i < count; i++) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
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
    static thread_local std::vector<uint32_t> units;  // of q
    weights.assign((last / LANES + 1) * LANES, -INFINITY);
    auto over_pages = [&](const void *base, auto f) {  // f(first position, how many, where)
        for (int64_t s = 0; s <= last; s += cache.page)
            f(s, std::min(cache.page, last + 1 - s),
              (const C *)base + pages[s / cache.page] * cache.page_stride + head * cache.head_stride);
    };
    for (const void *base : {cache.keys[layer], cache.values[layer]})
        over_pages(base, [&](int64_t, int64_t count, const C *held) {
            for (int64_t i = 0; i < count; i++)
                for (int e = 0; e < width; e += 64 / sizeof(C)) __builtin_prefetch(held + i * cache.place_stride + e);
        });
    const bool is_turned = LANES == 16 && width % NUMBERS<C> == 0;  // AVX2 is faster without
    const uint32_t *from = is_turned ? units_of<C>(q, width, units) : nullptr;
    over_pages(cache.keys[layer], [&](int64_t s, int64_t count, const C *keys) {
        if (is_turned) return dots_with(from, keys, cache.place_stride, count, width / NUMBERS<C>, &weights[s]);
        for (int64_t i = 0; i < count; i++) dots<1>(q, keys + i * cache.place_stride, width, &weights[s + i]);
    });
    const float scale = 1 / std::sqrt((float)width);
    float highest = -INFINITY;
    for (int64_t s = 0; s <= last; s++) highest = std::max(highest, weights[s] *= scale);
    Floats totals = all(0);
    for (size_t s = 0; s < weights.size(); s += LANES) {
        Floats weight = exponential(load(&weights[s]) - all(highest));
        store(&weights[s], weight), totals += weight;
    }
    const float total = sum(totals);
    int i = 0;
    auto part = [&](auto count) {  // the next numbers of the output, summed in so many registers
        Floats sums[count] = {};
        over_pages(cache.values[layer], [&](int64_t s, int64_t places, const C *value) {
            for (; places--; s++, value += cache.place_stride)
                for (int n = 0; n < count; n++) sums[n] = multiply_add(all(weights[s]), load(value + i + n * LANES), sums[n]);
        });
        for (int n = 0; n < count; n++, i += LANES) store(out + i, sums[n] / all(total));
    };
    while (i + 4 * LANES <= width) part(std::integral_constant<int, 4>());
    while (i + 2 * LANES <= width) part(std::integral_constant<int, 2>());
    while (i + LANES <= width) part(std::integral_constant<int, 1>());
    for (; i < width; i++) {
        float sum_of_one = 0;
        over_pages(cache.values[layer], [&](int64_t s, int64_t places, const C *value) {
            for (; places--; s++, value += cache.place_stride) sum_of_one += weights[s] * one(value[i]);
        });
        out[i] = sum_of_one / total;
    }
}

static auto into(std::vector<float> &x, const Matrix &m) {
    return [to = x.data(), wide = m.rows](int r, int n, float dot) { to[(int64_t)r * wide + n] = dot; };
}

template <class C>
static void step(const Model &model, const Cache &cache, int rows, const int64_t *positions, const float *rotary,
                 float *states, float *logits) {
    const int dim = model.output.columns, width = model.width, heads = model.heads, kv = model.kv_heads;
    const int hidden = model.layers->w1.rows, wide = heads * width, narrow = kv * width;
    const int each = rows > FEW ? heads / kv : 1;  // heads that a thread takes at once
    auto share = [&](int count, int columns, const auto &f) { rows > FEW ? threads.parts(count, f) : threads.rows(count, columns, f); };
    static std::vector<float> x, h, q, out, k, v, gate, up;  // kept from step to step, of which one runs at a time
    x.assign(states, states + (int64_t)rows * dim);
    h.resize(x.size());
    for (auto part : {&q, &out}) part->resize((int64_t)rows * wide);
    for (auto part : {&k, &v}) part->resize((int64_t)rows * narrow);
    for (auto part : {&gate, &up}) part->resize((int64_t)rows * hidden);
    for (int l = 0; l < model.n_layers; l++) {
        const Layer &layer = model.layers[l];
        auto add = [to = x.data(), dim](int r, int n, float dot) { to[(int64_t)r * dim + n] += dot; };
        normalise(x, layer.attention_norm, rows, dim, model.eps, h);
        share(wide + 2 * narrow, dim, [&](int begin, int end) {
            int first = 0;
            for (auto [m, to] : {std::pair{&layer.wq, &q}, {&layer.wk, &k}, {&layer.wv, &v}}) {
                multiply(h, rows, *m, std::clamp(begin - first, 0, m->rows), std::clamp(end - first, 0, m->rows), into(*to, *m));
                first += m->rows;
            }
        });
        each_row(rows, [&](int r) {
            rotate(&q[r * wide], rotary + r * width, heads, width);
            rotate(&k[r * narrow], rotary + r * width, kv, width);
            int64_t page = cache.table[r * cache.pages + positions[r] / cache.page];
            int64_t place = page * cache.page_stride + positions[r] % cache.page * cache.place_stride;
            for (int i = 0; i < narrow; i++) {
                int64_t to = place + i / width * cache.head_stride + i % width;
                put((C *)cache.keys[l] + to, k[r * narrow + i]);
                put((C *)cache.values[l] + to, v[r * narrow + i]);
            }
        });
        threads.pieces(rows * heads, each, [&](int begin, int end) {
            for (int i = begin; i < end; i++) {
                const int r = i / heads, head = i % heads / (heads / kv);
                attend<C>(&q[i * width], cache, l, head, cache.table + r * cache.pages, positions[r], width, &out[i * width]);
            }
        });
        share(dim, wide, [&](int begin, int end) { multiply(out, rows, layer.wo, begin, end, add); });
        normalise(x, layer.ffn_norm, rows, dim, model.eps, h);
        share(hidden, 2 * dim, [&](int begin, int end) {
            for (auto [m, to] : {std::pair{&layer.w1, &gate}, {&layer.w3, &up}})
                multiply(h, rows, *m, begin, end, into(*to, *m));
            for (int r = 0; r < rows; r++)
                activate(&gate[(int64_t)r * hidden + begin], &up[(int64_t)r * hidden + begin], end - begin);
        });
        share(dim, hidden, [&](int begin, int end) { multiply(gate, rows, layer.w2, begin, end, add); });
    }
    normalise(x, model.norm, rows, dim, model.eps, h);
    memcpy(states, h.data(), h.size() * sizeof(float));
    if (logits)
        share(model.output.rows, dim, [&](int begin, int end) {
            multiply(h, rows, model.output, begin, end,
                     [=, wide = model.output.rows](int r, int n, float dot) { logits[(int64_t)r * wide + n] = dot; });
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
