// Attention and its gradient, a key's head of a row at a time: its scores never leave a core's cache.
//
// Products are of units (tiles.h), a float32 or, where the processor multiplies them, a pair of bfloat16, summed in
// float32. The weights and their gradient are rounded to the numbers' type before they are multiplied. No sum depends on
// how many threads there are, or on other rows.
//
// T queries, S keys, E head width; G query heads share a key's. model/fused.py says what is computed.

#include <cfloat>

#include "passes.h"
#include "tiles.h"

constexpr int QUERIES = 32;  // of a head that are taken at once; an even number

struct Shape { int rows, heads, kv_heads, queries, keys, width; int64_t of_mask; };  // numbers between rows' masks

struct Left { const uint32_t *at; int64_t row, unit; };               // units between neighbours
struct Right { const uint32_t *at; int64_t block; int stride; };      // WIDE columns a block, units between neighbours

// Units of two bfloat16 each.
static Floats pairs(Floats low, Floats high) {
#ifdef __AVX512BF16__
    auto wide = [](Floats x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
    return (Floats)_mm512_or_si512(wide(low), _mm512_slli_epi32(wide(high), 16));
#else
    return low;  // no product here is of pairs
#endif
}

static int padded(int count, int to) { return (count + to - 1) / to * to; }
template <class T> static int in_units(int count) { return (count + NUMBERS<T> - 1) / NUMBERS<T>; }

// out (R, N LANES) = x (R, units) w (units, N LANES), or more of it.
template <class T, int R, int N>
static void corner(const Left &x, const uint32_t *w, int stride, int units, float *out, int wide, bool adds) {
    Floats sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = adds ? load(out + r * wide + n * LANES) : all(0);
    for (int u = 0; u < units; u++, w += stride)
        for (int r = 0; r < R; r++) {
            const Ints unit = every(x.at[r * x.row + u * x.unit]);
            for (int n = 0; n < N; n++) sums[r][n] = add_products<T>(sums[r][n], unit, (Ints)load((const float *)w + n * LANES));
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(out + r * wide + n * LANES, sums[r][n]);
}

// out (rows, columns), whose rows stand `wide` numbers apart; columns are whole LANES.
template <class T>
static void product(const Left &x, const Right &w, int units, float *out, int wide, int rows, int columns, bool adds = false) {
    auto block = [&](int column, auto n) {
        int r = 0;
        auto some = [&](auto count) {
            for (; r + count <= rows; r += count)
                corner<T, count, n>({x.at + r * x.row, x.row, x.unit}, w.at + column / WIDE * w.block + column % WIDE, w.stride,
                                    units, out + (int64_t)r * wide + column, wide, adds);
        };
        some(std::integral_constant<int, 6>()), some(std::integral_constant<int, 2>()), some(std::integral_constant<int, 1>());
    };
    int column = 0;
    for (; column + WIDE <= columns; column += WIDE) block(column, std::integral_constant<int, VECTORS>());
    const int left = (columns - column) / LANES;
    if (left == 3) block(column, std::integral_constant<int, 3>());
    if (left == 2) block(column, std::integral_constant<int, 2>());
    if (left == 1) block(column, std::integral_constant<int, 1>());
}

// The tokens of one head, and what products need of them.
template <class T> struct Head {
    const T *at;
    int64_t stride;
    int rows, width;

    Left left() const { return {(const uint32_t *)at, stride / NUMBERS<T>, 1}; }
    Head part(int begin, int count) const { return {at + begin * stride, stride, count, width}; }

    // The rows as columns: to multiply with other rows.
    Right turned(std::vector<uint32_t> &room) const {
        const int units = width / NUMBERS<T>, block = padded(units, LANES) * WIDE;
        room.resize(padded(rows, WIDE) / WIDE * block);
        for (int r = 0; r < rows; r += WIDE)
            lay_out(at + r * stride, stride, std::min(WIDE, rows - r), units, room.data() + r / WIDE * block);
        return {room.data(), block, WIDE};
    }
    // The rows as they are, to be summed: neighbours in one unit.
    Right paired(std::vector<uint32_t> &room) const {
        const int wide = padded(width, LANES);
        room.resize((rows + 1) * wide);
        for (int r = 0; r < rows; r += NUMBERS<T>)
            along(width, [&](int i, auto part) {
                Floats units = part.get(at + r * stride + i);
                if (NUMBERS<T> == 2) units = pairs(units, r + 1 < rows ? part.get(at + (r + 1) * stride + i) : all(0));
                store((float *)room.data() + r / NUMBERS<T> * wide + i, units);
            });
        return {room.data(), WIDE, wide};
    }
};

// The units of rows (count, wide) that stand below each other, to multiply what they weigh: (count / 2, wide) or as it is.
template <class T> static Left turned_left(const float *rows, int count, int wide, std::vector<uint32_t> &room) {
    if constexpr (NUMBERS<T> == 1) return {(const uint32_t *)rows, 1, wide};
    room.resize((count + 1) / 2 * wide);
    for (int r = 0; r < count; r += 2)
        for (int i = 0; i < wide; i += LANES) {
            const Floats high = r + 1 < count ? load(rows + (r + 1) * wide + i) : all(0);
            store((float *)room.data() + r / 2 * wide + i, pairs(load(rows + r * wide + i), high));
        }
    return {room.data(), 1, wide};
}

// Rows (count, wide) in place as numbers of type T.
template <class T> static Left left_of(float *rows, int count, int wide) {
    if constexpr (NUMBERS<T> == 2)
        for (int r = 0; r < count; r++)
            for (int i = 0; i < wide; i += LANES) store((Bf16 *)(rows + r * wide) + i, load(rows + r * wide + i));
    return {(const uint32_t *)rows, wide, 1};
}

// f(i, scores) along the keys that a query sees of its row of scores; `wide` is whole LANES, and -inf what it does not see.
template <class F> static void seen_scores(const float *row, int wide, int seen, const int8_t *marks, float scale, const F &f) {
    for (int i = 0; i < wide; i += LANES) {
        Floats score = load(row + i) * all(scale);
        if (i + LANES > seen) score = Part{std::max(0, seen - i)}.or_lowest(score);
        if (marks && i < seen) {
            const Floats marked = i + LANES > seen ? Part{seen - i}.get(marks + i) : load(marks + i);
            score = marked != all(0) ? score : all(-INFINITY);
        }
        f(i, score);
    }
}

template <class T> static Head<T> head_of(const T *x, const Layout &layout, int row, int head, int count, int width) {
    return {x + row * layout.row + head * layout.head, layout.token, count, width};
}

// Rows of sums (count, wide) as the tokens of a head from `begin` on.
template <class T>
static void give(const std::vector<float> &sums, int wide, T *x, const Layout &layout, int row, int head, int begin, int count,
                 int width) {
    for (int i = 0; i < count; i++) {
        T *to = x + row * layout.row + head * layout.head + (begin + i) * layout.token;
        along(width, [&](int e, auto part) { part.set(to + e, part.get(&sums[i * wide + e])); });
    }
}

// Queries of one head, and the keys that they see: up to their own, or those that are marked.
struct Block {
    int head, begin, count, keys;
    const int8_t *marks;

    int sees(int i) const { return marks ? keys : std::min(keys, begin + i + 1); }
    int seen() const { return sees(count - 1); }
    const int8_t *marks_of(int i) const { return marks ? marks + (int64_t)(begin + i) * keys : nullptr; }
};
// f(Block) for all queries of a key's head.
template <class F> static void blocks(const Shape &s, int row, int key_head, const int8_t *mask, const F &f) {
    const int sharing = s.heads / s.kv_heads;
    for (int head = key_head * sharing; head < (key_head + 1) * sharing; head++)
        for (int begin = 0; begin < s.queries; begin += QUERIES) {
            const int8_t *marks = mask ? mask + row * s.of_mask : nullptr;
            f(Block{head, begin, std::min(QUERIES, s.queries - begin), s.keys, marks});
        }
}

// logs (rows, heads, queries): the logarithm of the sum that a query's weights were divided by.
template <class T>
static void attend(const T *q, const T *k, const T *v, const int8_t *mask, T *out, float *logs, const Layout *layouts,
                   const Shape &s, int threads) {
    const float scale = 1 / std::sqrt((float)s.width);
    over(threads, s.rows * s.kv_heads, 1, [=](int64_t task, int64_t) {
        static thread_local std::vector<uint32_t> key_room, value_room;
        static thread_local std::vector<float> scores, sums;
        const int row = task / s.kv_heads, key_head = task % s.kv_heads, wide_out = padded(s.width, LANES);
        const Right keys = head_of(k, layouts[1], row, key_head, s.keys, s.width).turned(key_room);
        const Right values = head_of(v, layouts[2], row, key_head, s.keys, s.width).paired(value_room);
        blocks(s, row, key_head, mask, [&](const Block &b) {
            const int seen = b.seen(), wide = padded(seen, LANES);
            scores.resize(b.count * wide), sums.resize(b.count * wide_out);
            const Head<T> queries = head_of(q, layouts[0], row, b.head, s.queries, s.width).part(b.begin, b.count);
            product<T>(queries.left(), keys, in_units<T>(s.width), scores.data(), wide, b.count, wide);
            for (int i = 0; i < b.count; i++) {
                float *held = &scores[i * wide];
                Floats most = all(-INFINITY);
                seen_scores(held, wide, b.sees(i), b.marks_of(i), scale, [&](int j, Floats score) {
                    store(held + j, score), most = score > most ? score : most;
                });
                const float at_most = std::max(highest(most), -FLT_MAX), total = exponentials(held, wide, at_most);
                const Floats share_of = all(total == 0 ? 0 : 1 / total);  // a query may see nothing
                for (int j = 0; j < wide; j += LANES) store(held + j, load(held + j) * share_of);
                const float log = total == 0 ? INFINITY : at_most + std::log(total);
                logs[((int64_t)row * s.heads + b.head) * s.queries + b.begin + i] = log;
            }
            const Left weights = left_of<T>(scores.data(), b.count, wide);
            product<T>(weights, values, in_units<T>(seen), sums.data(), wide_out, b.count, wide_out);
            give(sums, wide_out, out, layouts[3], row, b.head, b.begin, b.count, s.width);
        });
    });
}

template <class T>
static void attend_back(const T *slopes, const T *q, const T *k, const T *v, const T *out, const int8_t *mask, const float *logs,
                        T *of_q, T *of_k, T *of_v, const Layout *layouts, const Shape &s, int threads) {
    const float scale = 1 / std::sqrt((float)s.width);
    over(threads, s.rows * s.kv_heads, 1, [=](int64_t task, int64_t) {
        static thread_local std::vector<uint32_t> rooms[7];
        static thread_local std::vector<float> weights, of_scores, sums, key_sums, value_sums;
        const int row = task / s.kv_heads, key_head = task % s.kv_heads, wide_out = padded(s.width, LANES);
        const int units = in_units<T>(s.width);
        const Head<T> keys = head_of(k, layouts[2], row, key_head, s.keys, s.width);
        const Right by_key = keys.turned(rooms[0]), key_rows = keys.paired(rooms[1]);
        const Right by_value = head_of(v, layouts[3], row, key_head, s.keys, s.width).turned(rooms[2]);
        for (auto part : {&key_sums, &value_sums}) part->assign(s.keys * wide_out, 0);
        blocks(s, row, key_head, mask, [&](const Block &b) {
            const int seen = b.seen(), wide = padded(seen, LANES);
            for (auto part : {&weights, &of_scores}) part->resize(b.count * wide);
            sums.resize(b.count * wide_out);
            const Head<T> queries = head_of(q, layouts[1], row, b.head, s.queries, s.width).part(b.begin, b.count);
            const Head<T> slope = head_of(slopes, layouts[0], row, b.head, s.queries, s.width).part(b.begin, b.count);
            const Head<T> outs = head_of(out, layouts[4], row, b.head, s.queries, s.width).part(b.begin, b.count);
            product<T>(queries.left(), by_key, units, weights.data(), wide, b.count, wide);
            product<T>(slope.left(), by_value, units, of_scores.data(), wide, b.count, wide);
            for (int i = 0; i < b.count; i++) {
                float *weight = &weights[i * wide], *of_score = &of_scores[i * wide];
                Floats dots = all(0);
                along(s.width, [&](int e, auto part) {
                    dots = multiply_add(part.get(slope.at + i * slope.stride + e), part.get(outs.at + i * outs.stride + e), dots);
                });
                const Floats mean = all(sum(dots)), log = all(logs[((int64_t)row * s.heads + b.head) * s.queries + b.begin + i]);
                seen_scores(weight, wide, b.sees(i), b.marks_of(i), scale, [&](int j, Floats score) {
                    const Floats w = exponential(score - log);
                    store(weight + j, w), store(of_score + j, w * (load(of_score + j) - mean) * all(scale));
                });
            }
            const Left by_weight = turned_left<T>(weights.data(), b.count, wide, rooms[3]);
            product<T>(by_weight, slope.paired(rooms[4]), in_units<T>(b.count), value_sums.data(), wide_out, seen, wide_out, true);
            const Left by_slope = turned_left<T>(of_scores.data(), b.count, wide, rooms[5]);
            product<T>(by_slope, queries.paired(rooms[6]), in_units<T>(b.count), key_sums.data(), wide_out, seen, wide_out, true);
            const Left of_weights = left_of<T>(of_scores.data(), b.count, wide);
            product<T>(of_weights, key_rows, in_units<T>(seen), sums.data(), wide_out, b.count, wide_out);
            give(sums, wide_out, of_q, layouts[5], row, b.head, b.begin, b.count, s.width);
        });
        give(key_sums, wide_out, of_k, layouts[6], row, key_head, 0, s.keys, s.width);
        give(value_sums, wide_out, of_v, layouts[7], row, key_head, 0, s.keys, s.width);
    });
}

extern "C" {
// Whether a product of bfloat16 is of pairs here; without, there is no attention of them.
int puna_multiplies_bf16() { return NUMBERS<Bf16> == 2; }

void puna_attend(const void *q, const void *k, const void *v, const int8_t *mask, void *out, float *logs, bool is_bf16,
                 const Layout *layouts, const Shape *shape, int threads) {
    of_type(is_bf16, [&](auto number) {
        using T = decltype(number);
        attend((const T *)q, (const T *)k, (const T *)v, mask, (T *)out, logs, layouts, *shape, threads);
    });
}

void puna_attend_back(const void *slopes, const void *q, const void *k, const void *v, const void *out, const int8_t *mask,
                      const float *logs, void *of_q, void *of_k, void *of_v, bool is_bf16, const Layout *layouts,
                      const Shape *shape, int threads) {
    of_type(is_bf16, [&](auto number) {
        using T = decltype(number);
        attend_back((const T *)slopes, (const T *)q, (const T *)k, (const T *)v, (const T *)out, mask, logs, (T *)of_q, (T *)of_k,
                    (T *)of_v, layouts, *shape, threads);
    });
}
}
