// One decode step of a Llama on a CPU: rows of one new token each, through all layers and the head in one call.
//
// Weights and cache are read where torch holds them; states and sums are float32 throughout, but that a processor with
// products of bfloat16 rounds many rows that meet such weights, and what meets such keys and values (tiles.h). Among few
// rows, and among many, a row's numbers do not depend on the others. generate/kernel.py says what the structures
// hold; they must stay alike.
//
// R rows, D model width, H query heads, K key/value heads, E head width, V vocabulary.

#include "tiles.h"

constexpr int FEW = 8;     // rows for which reading the weights is all that counts
constexpr int ALIKE = 16;  // rows at most that a thread takes at once because they begin with the same pages

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
    constexpr int SUMS = 4, AHEAD = 4096;
    Floats sums[R][SUMS] = {};
    int i = 0;
    auto add = [&](int part) {
        Floats weights = load(w + i + part * LANES);
        for (int r = 0; r < R; r++)
            sums[r][part] = multiply_add(weights, load(x + (int64_t)r * count + i + part * LANES), sums[r][part]);
    };
    for (; i + SUMS * LANES <= count; i += SUMS * LANES) {
        for (int j = 0; j < SUMS * LANES; j += LINE / sizeof(W)) __builtin_prefetch((const char *)(w + i + j) + AHEAD);
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

// Calls give(row of x, row of w, dots, how many with rows of w from there on) for rows begin..end of the matrix, R rows of
// x from `first` on.
template <int R, class W, class Give>
static void few_plain(const float *x, const Matrix &m, int first, int begin, int end, const Give &give) {
    float out[R];
    for (int n = begin; n < end; n++) {
        dots<R>(x, (const W *)m.data + (int64_t)n * m.columns, m.columns, out);
        for (int r = 0; r < R; r++) {
            if (m.scales) out[r] *= ((const float *)m.scales)[n];
            give(first + r, n, &out[r], 1);
        }
    }
}
template <int R, class Give>
static void few_int4(const float *x, const Matrix &m, int first, int begin, int end, const Give &give) {
    float out[R * BLOCK];
    for (; begin < end; begin += BLOCK) {
        block<R>(x, m, begin, out);
        for (int r = 0; r < R; r++) give(first + r, begin, out + r * BLOCK, BLOCK);
    }
}
template <int R, class Give>
static void few(const float *x, const Matrix &m, int first, int begin, int end, const Give &give) {
    if (m.kind == 0) few_plain<R, float>(x, m, first, begin, end, give);
    else if (m.kind == 1) few_plain<R, Bf16>(x, m, first, begin, end, give);
    else if (m.kind == 2) few_plain<R, int8_t>(x, m, first, begin, end, give);
    else few_int4<R>(x, m, first, begin, end, give);
}

// Rows of numbers; where they are many, also as pairs of bfloat16, and with matrix tiles these as columns.
struct Rows { const float *x; int count; const uint32_t *pairs; Right columns; };

static bool takes_many(const Matrix &m) { return m.kind != 3 && (m.kind != 1 || m.columns % NUMBERS<Bf16> == 0); }
static bool takes_pairs(const Matrix &m) { return m.kind == 1 && NUMBERS<Bf16> == 2 && takes_many(m); }

// As these matrices take them; x is what is multiplied next.
static Rows rows_of(const Room<float> &x, int rows, std::initializer_list<Matrix> readers) {
    static Room<uint32_t> pairs, columns;
    const int wide = x.size() / rows, units = wide / NUMBERS<Bf16>, block = padded(units, LANES) * WIDE;
    if (rows <= FEW || std::none_of(readers.begin(), readers.end(), takes_pairs)) return {x.data(), rows};
    pairs.resize((int64_t)rows * units);
    if (is_tiled<Bf16>()) columns.resize((int64_t)padded(rows, WIDE) / WIDE * block);
    threads.pieces(rows, LANES, [&](int begin, int end) {
        uint32_t *to = &pairs[(int64_t)begin * units];
        along((end - begin) * wide, [&](int i, auto part) { part.set((Bf16 *)to + i, part.get(&x[(int64_t)begin * wide + i])); });
        if (is_tiled<Bf16>()) lay_out((float *)to, units, end - begin, units, &columns[(int64_t)begin / WIDE * block + begin % WIDE]);
    });
    return {x.data(), rows, pairs.data(), {columns.data(), block, WIDE}};
}

// As `few` for many rows of x and a matrix whose columns fill whole units. A block of its rows is laid out at a time, and
// the one that this thread will likely take next is asked for meanwhile: behind its chunk come the other threads'. (A
// guess: another matrix may come first.) Matrix tiles read a block where it lies, and give its columns.
template <class W, class Give>
static void many(const Rows &x, const Matrix &m, int begin, int end, const Give &give) {
    static thread_local Room<uint32_t> room;
    static thread_local Room<float> held_sums, held_columns;
    const int units = m.columns / NUMBERS<W>, others = (end - begin) * (threads.at_work() - 1), high = padded(x.count, LANES);
    const uint32_t *from = NUMBERS<W> == 2 ? x.pairs : (const uint32_t *)x.x;
    held_sums.resize((int64_t)high * WIDE);
    is_tiled<W>() ? held_columns.resize((int64_t)high * WIDE) : room.resize(PANEL * WIDE);
    uint32_t *laid = room.data();
    float *sums = held_sums.data(), *columns = held_columns.data();
    auto row = [&](int n) { return (const W *)m.data + (int64_t)n * m.columns; };
    for (; begin < end; begin += WIDE) {
        const int wide = std::min(WIDE, end - begin), next = begin + wide + (begin + WIDE < end ? 0 : others);
        const char *ahead = (const char *)row(next), *last = (const char *)row(std::min(next + WIDE, m.rows));
        for (int u = 0; u < units; u += PANEL) {
            const int n = std::min(PANEL, units - u);
            auto part = [&](int u) { return next < m.rows ? ahead + (last - ahead) * u / units : nullptr; };
            auto left = [&](const void *at) { return Left{(const uint32_t *)at + u, units, part(u), part(u + n)}; };
            if (is_tiled<W>()) {
                product<W>(left(row(begin)), {x.columns.at + u * WIDE, x.columns.block, WIDE}, n, columns, high, wide, high, u > 0);
            } else {
                lay_out(row(begin) + u * NUMBERS<W>, m.columns, wide, n, laid);
                product<W>(left(from), {laid, 0, WIDE}, n, sums, WIDE, x.count, padded(wide, LANES), u > 0);
            }
        }
        if (is_tiled<W>()) lay_out(columns, high, wide, x.count, (uint32_t *)sums);
        for (int r = 0; r < x.count; r++) {
            float *dots = sums + r * WIDE;
            for (int n = 0; m.scales && n < wide; n++) dots[n] *= ((const float *)m.scales)[begin + n];
            give(r, begin, dots, wide);
        }
    }
}

template <class Give> static void multiply(const Rows &x, const Matrix &m, int begin, int end, const Give &give) {
    if (begin == end) return;
    if (x.count > FEW && takes_many(m)) {
        if (m.kind == 0) many<float>(x, m, begin, end, give);
        if (m.kind == 1) many<Bf16>(x, m, begin, end, give);
        if (m.kind == 2) many<int8_t>(x, m, begin, end, give);
        return;
    }
    int r = 0;
    for (; r + 4 <= x.count; r += 4) few<4>(x.x + (int64_t)r * m.columns, m, r, begin, end, give);
    for (; r + 2 <= x.count; r += 2) few<2>(x.x + (int64_t)r * m.columns, m, r, begin, end, give);
    for (; r < x.count; r++) few<1>(x.x + (int64_t)r * m.columns, m, r, begin, end, give);
}

// f(row) for each of the rows, a few at a time.
template <class F> static void each_row(int rows, const F &f) {
    threads.pieces(rows, FEW, [&](int begin, int end) {
        for (int r = begin; r < end; r++) f(r);
    });
}

static void normalise(const Room<float> &x, const float *weight, int rows, int dim, float eps, Room<float> &out) {
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

// Neighbouring rows that begin with the same pages, so many of them, which each sees whole.
struct Group { int first, rows; int64_t pages; };

static std::vector<Group> groups_of(const Cache &cache, int rows, const int64_t *positions, int most) {
    auto alike = [&](int a, int b) {
        const int64_t *pages = cache.table + a * cache.pages;
        const int64_t whole = std::min(positions[a], positions[b]) / cache.page;
        return std::mismatch(pages, pages + whole, cache.table + b * cache.pages).first - pages;
    };
    std::vector<Group> groups;
    for (int first = 0, next; first < rows; first = next) {
        next = first + 1;
        int64_t pages = next < rows ? alike(first, next) : 0;
        if (next + 1 < rows && alike(next, next + 1) > pages) pages = 0;  // the next one has more in common with others
        while (pages && next < rows && next < first + most && alike(first, next) >= pages) next++;
        groups.push_back({first, next - first, pages});
    }
    return groups;
}

// Attention of neighbouring heads that read one key head, for the rows of a group. q and out point at the first of these
// heads in (R, H, E), whose rows are so many numbers apart. What several queries read is laid out once for all of them.
template <class C>
static void attend(const float *q, const Cache &cache, int layer, int key_head, const Group &group, const int64_t *positions,
                   int sharing, int apart, int width, float *out) {
    struct Piece { int query, count, places; int64_t begin, offset; };  // that `count` queries see from position `begin` on
    static thread_local std::vector<Piece> pieces;
    static thread_local Room<float> queries, scores, sums;
    static thread_local Room<uint32_t> room;
    const int count = group.rows * sharing, wide_out = padded(width, LANES);
    const int64_t *last = positions + group.first;
    const int64_t wide = padded(*std::max_element(last, last + group.rows) + 1, LANES) + LANES;
    auto place = [&](int query) { return (int64_t)(group.first + query / sharing) * apart + query % sharing * width; };
    auto add = [&](int query, int readers, int64_t i) {
        const int64_t page = cache.table[(group.first + query / sharing) * cache.pages + i], begin = i * cache.page;
        const int places = std::min(cache.page, last[query / sharing] + 1 - begin);
        pieces.push_back({query, readers, places, begin, page * cache.page_stride + key_head * cache.head_stride});
    };
    pieces.clear();
    for (int64_t i = 0; i < group.pages; i++) add(0, count, i);
    for (int r = 0; r < group.rows; r++)
        for (int64_t i = group.pages; i * cache.page <= last[r]; i++) add(r * sharing, sharing, i);
    const C *keys = (const C *)cache.keys[layer], *values = (const C *)cache.values[layer];
    auto over_pieces = [&](const C *base, const C *then, auto f) {  // f(piece, tokens, bytes to those that are read next)
        for (size_t i = 0; i < pieces.size(); i++) {
            const C *at = base + pieces[i].offset, *next = i + 1 < pieces.size() ? base + pieces[i + 1].offset : then;
            f(pieces[i], Head<C>{at, cache.place_stride, pieces[i].places, width}, (next - at) * sizeof(C));
        }
    };
    queries.resize(count * wide_out), scores.resize(count * wide), sums.assign((int64_t)count * wide_out, 0);
    for (int i = 0; i < count; i++) std::copy_n(q + place(i), width, &queries[i * wide_out]);
    const Left from = left_of<C>(queries.data(), count, wide_out);
    over_pieces(keys, values + pieces[0].offset, [&](const Piece &p, const Head<C> &held, int64_t next) {
        product<C>({from.at + p.query * from.row, from.row}, held.turned(room, next), width / NUMBERS<C>,
                   &scores[p.query * wide + p.begin], wide, p.count, padded(p.places, LANES));
    });
    float totals[count];
    for (int i = 0; i < count; i++) {
        const int seen = last[i / sharing] + 1;
        totals[i] = weigh(&scores[i * wide], padded(seen, LANES), seen, nullptr, 1 / std::sqrt((float)width)).second;
    }
    const Left weights = left_of<C>(scores.data(), count, wide);
    over_pieces(values, values + pieces.back().offset, [&](const Piece &p, const Head<C> &held, int64_t next) {
        product<C>({weights.at + p.query * weights.row + p.begin / NUMBERS<C>, weights.row}, held.paired(room, next),
                   in_units<C>(p.places), &sums[p.query * wide_out], wide_out, p.count, wide_out, true);
    });
    for (int i = 0; i < count; i++)
        along(width, [&](int e, auto part) { part.set(out + place(i) + e, load(&sums[i * wide_out + e]) / all(totals[i])); });
}

static auto into(float *x, const Matrix &m) {
    return [=, wide = m.rows](int r, int n, const float *dots, int count) { std::copy_n(dots, count, x + (int64_t)r * wide + n); };
}

template <class C>
static void step(const Model &model, const Cache &cache, int rows, const int64_t *positions, const float *rotary,
                 float *states, float *logits) {
    const int dim = model.output.columns, width = model.width, heads = model.heads, kv = model.kv_heads;
    const int hidden = model.layers->w1.rows, wide = heads * width, narrow = kv * width;
    const int enough = threads.at_work();
    const int most = std::clamp(rows * kv / (2 * enough), 1, ALIKE);  // two groups a thread: one alone would be waited for
    const std::vector<Group> groups = groups_of(cache, rows, positions, most);
    int sharing = heads / kv;  // heads of a key head that a thread takes at once
    while (sharing > 1 && (heads / kv % sharing || (int)groups.size() * heads / sharing < enough)) sharing--;
    const int parts = heads / sharing;
    auto divide = [&](int count, int columns, const auto &f) {
        rows > FEW ? threads.parts(count, f) : threads.rows(count, columns, f);
    };
    static Room<float> x, h, q, out, k, v, gate, up;  // kept from step to step, of which one runs at a time
    x.assign(states, states + (int64_t)rows * dim);
    h.resize(x.size());
    for (auto part : {&q, &out}) part->resize((int64_t)rows * wide);
    for (auto part : {&k, &v}) part->resize((int64_t)rows * narrow);
    for (auto part : {&gate, &up}) part->resize((int64_t)rows * hidden);
    for (int l = 0; l < model.n_layers; l++) {
        const Layer &layer = model.layers[l];
        auto add = [states = x.data(), dim](int r, int n, const float *dots, int count) {
            for (float *to = states + (int64_t)r * dim + n, *end = to + count; to < end;) *to++ += *dots++;
        };
        normalise(x, layer.attention_norm, rows, dim, model.eps, h);
        const Rows read = rows_of(h, rows, {layer.wq, layer.wk, layer.wv});
        divide(wide + 2 * narrow, dim, [&](int begin, int end) {
            int first = 0;
            for (auto [m, to] : {std::pair{&layer.wq, &q}, {&layer.wk, &k}, {&layer.wv, &v}}) {
                multiply(read, *m, std::clamp(begin - first, 0, m->rows), std::clamp(end - first, 0, m->rows), into(to->data(), *m));
                first += m->rows;
            }
        });
        each_row(rows, [&](int r) {
            rotate(&q[r * wide], rotary + r * width, heads, width);
            rotate(&k[r * narrow], rotary + r * width, kv, width);
            int64_t page = cache.table[r * cache.pages + positions[r] / cache.page];
            int64_t place = page * cache.page_stride + positions[r] % cache.page * cache.place_stride;
            for (int i = 0; i < narrow; i += width, place += cache.head_stride)
                along(width, [&](int e, auto part) {
                    part.set((C *)cache.keys[l] + place + e, part.get(&k[r * narrow + i + e]));
                    part.set((C *)cache.values[l] + place + e, part.get(&v[r * narrow + i + e]));
                });
        });
        threads.run(groups.size() * parts, [&](int i) {
            const int head = i % parts * sharing;
            const Group &group = groups[i / parts];
            attend<C>(&q[head * width], cache, l, head * kv / heads, group, positions, sharing, wide, width, &out[head * width]);
        });
        const Rows attended = rows_of(out, rows, {layer.wo});
        divide(dim, wide, [&](int begin, int end) { multiply(attended, layer.wo, begin, end, add); });
        normalise(x, layer.ffn_norm, rows, dim, model.eps, h);
        const Rows normed = rows_of(h, rows, {layer.w1, layer.w3});
        divide(hidden, 2 * dim, [&](int begin, int end) {
            for (auto [m, to] : {std::pair{&layer.w1, &gate}, {&layer.w3, &up}})
                multiply(normed, *m, begin, end, into(to->data(), *m));
            for (int r = 0; r < rows; r++)
                activate(&gate[(int64_t)r * hidden + begin], &up[(int64_t)r * hidden + begin], end - begin);
        });
        const Rows activated = rows_of(gate, rows, {layer.w2});
        divide(dim, hidden, [&](int begin, int end) { multiply(activated, layer.w2, begin, end, add); });
    }
    normalise(x, model.norm, rows, dim, model.eps, h);
    memcpy(states, h.data(), h.size() * sizeof(float));
    if (!logits) return;
    const Rows last = rows_of(h, rows, {model.output});
    divide(model.output.rows, dim, [&](int begin, int end) { multiply(last, model.output, begin, end, into(logits, model.output)); });
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
