// Attention and its gradient, a key's head of a row at a time: its scores never leave a core's cache.
//
// Products are of units (tiles.h), a float32 or, where the processor multiplies them, a pair of bfloat16, summed in
// float32. The weights and their gradient are rounded to the numbers' type before they are multiplied. No sum depends on
// how many threads there are, or on other rows.
//
// T queries, S keys, E head width; G query heads share a key's. model/fused.py says what is computed.

#include "tiles.h"

constexpr int QUERIES = 32;  // of a head that are taken at once; an even number

struct Shape { int rows, heads, kv_heads, queries, keys, width; int64_t of_mask; };  // numbers between rows' masks

template <class T> static Head<T> head_of(const T *x, const Layout &layout, int row, int head, int count, int width) {
    return {x + row * layout.row + head * layout.head, layout.token, count, width};
}

// Rows of sums (count, wide) as the tokens of a head from `begin` on.
template <class T>
static void give(const Room<float> &sums, int wide, T *x, const Layout &layout, int row, int head, int begin, int count,
                 int width) {
    for (int i = 0; i < count; i++) {
        T *to = x + row * layout.row + head * layout.head + (begin + i) * layout.token;
        along(width, [&](int e, auto part) { part.set(to + e, part.get(&sums[i * wide + e])); });
    }
}
// The same of sums (width, wide), a column a token.
template <class T>
static void give_turned(const Room<float> &sums, int wide, T *x, const Layout &layout, int row, int head, int count, int width) {
    for (int begin = 0; begin < count; begin += LANES)
        along(width, [&](int e, auto part) {
            Ints held[LANES];
            turned_square(&sums[e * wide + begin], wide, LANES, LANES, 0, held);
            T *to = x + row * layout.row + head * layout.head + begin * layout.token + e;
            for (int i = 0; i < std::min(LANES, count - begin); i++, to += layout.token) part.set(to, (Floats)held[i]);
        });
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
        static thread_local Room<uint32_t> key_room, value_room;
        static thread_local Room<float> scores, sums;
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
                const auto [at_most, total] = weigh(held, wide, b.sees(i), b.marks_of(i), scale);
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
        static thread_local Room<uint32_t> rooms[7];
        static thread_local Room<float> weights, of_scores, sums, key_sums, value_sums;
        const int row = task / s.kv_heads, key_head = task % s.kv_heads, wide_out = padded(s.width, LANES);
        const int units = in_units<T>(s.width);
        const Head<T> keys = head_of(k, layouts[2], row, key_head, s.keys, s.width);
        const Right by_key = keys.turned(rooms[0]), key_rows = keys.paired(rooms[1]);
        const Right by_value = head_of(v, layouts[3], row, key_head, s.keys, s.width).turned(rooms[2]);
        const int of_keys = padded(s.keys, LANES);
        for (auto part : {&key_sums, &value_sums}) part->assign(wide_out * of_keys, 0);
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
            const Right by_weight = paired<T>(weights.data(), b.count, wide, rooms[3]);
            product<T>(slope.across(rooms[5], rooms[6]), by_weight, in_units<T>(b.count), value_sums.data(), of_keys, wide_out, wide, true);
            const Right by_slope = paired<T>(of_scores.data(), b.count, wide, rooms[4]);
            product<T>(queries.across(rooms[5], rooms[6]), by_slope, in_units<T>(b.count), key_sums.data(), of_keys, wide_out, wide, true);
            const Left of_weights = left_of<T>(of_scores.data(), b.count, wide);
            product<T>(of_weights, key_rows, in_units<T>(seen), sums.data(), wide_out, b.count, wide_out);
            give(sums, wide_out, of_q, layouts[5], row, b.head, b.begin, b.count, s.width);
        });
        give_turned(key_sums, of_keys, of_k, layouts[6], row, key_head, s.keys, s.width);
        give_turned(value_sums, of_keys, of_v, layouts[7], row, key_head, s.keys, s.width);
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
