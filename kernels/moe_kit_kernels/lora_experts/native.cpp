// Routed LoRA experts on the CPU in float32: only chosen experts are computed, and no row of an activation is copied.
//
//     forward    H_p = A_e x_t                     y_t  += s_p B_e H_p             with s_p = scale * weight of pair p
//     backward   U_p = B_e^T dy_t                  dw_p  = scale * <U_p, H_p>      dx_t += s_p A_e^T U_p
//                dA_e = sum_p s_p U_p x_t^T        dB_e  = sum_p s_p H_p dy_t^T
//
// Pairs are sorted by (block of tokens, expert). A block's rows stay in a core's cache while its experts pass; four rows share
// every load of an expert. A token lies in one block and a block on one thread, so nothing is added by two threads; the sums of
// dA and dB are cut by expert and by columns. Every sum has one order, whatever the number of threads.
//
// Both products of a step are over a matrix M [L, W] of one expert with contiguous rows: A_e [L, D], or B_e^T [L, O]. B lies as
// [O, L]; the chosen experts are transposed on the way: a few columns at a time where up to four rows are multiplied, all of an expert
// into a core's cache where more are. The gradient of B is transposed as it leaves the registers. (A B that lies as [L, O] is read as
// it is: `by_rank`.) None of that changes the order of a sum.
//
// Legend: T tokens, P pairs, E experts, D width in, O width out, L rank, W one of the widths, R rows, C columns of registers.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int DOT_RANKS = 4, ADD_COLUMNS = 4, SUM_RANKS = 8, SUM_COLUMNS = 3, TURNED_COLUMNS = 3;
#else
constexpr int DOT_RANKS = 3, ADD_COLUMNS = 3, SUM_RANKS = 4, SUM_COLUMNS = 3, TURNED_COLUMNS = 1;
#endif
// ranks of a tile of B's gradient, which is turned in blocks of 8 by 8
constexpr int TURNED_RANKS = 8;
constexpr int ROWS = 4;
// rows of one column lie far apart, where no hardware looks ahead
constexpr int64_t AHEAD = 8;
constexpr int64_t MAX_RANK = 256;
// pairs of a table that a thread sorts by insertion
constexpr int64_t FEW_PAIRS = 128;
constexpr int64_t TASKS_A_THREAD = 8;

typedef float Eight __attribute__((vector_size(8 * sizeof(float)), aligned(alignof(float)), may_alias));
typedef int EightIndices __attribute__((vector_size(8 * sizeof(int))));

// to[c][r] = from[r][c] for 8 by 8 numbers, whose rows lie so many numbers apart
inline void turn_block(const float* from, int64_t apart, float* to, int64_t stride) {
    Eight rows[8], pairs[8], fours[8];
    for (int i = 0; i < 8; i++) rows[i] = *reinterpret_cast<const Eight*>(from + i * apart);
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = __builtin_shuffle(rows[i], rows[i + 1], EightIndices{0, 8, 1, 9, 4, 12, 5, 13});
        pairs[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], EightIndices{2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = __builtin_shuffle(pairs[i + j], pairs[i + j + 2], EightIndices{0, 1, 8, 9, 4, 5, 12, 13});
            fours[i + 2 * j + 1] = __builtin_shuffle(pairs[i + j], pairs[i + j + 2], EightIndices{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; i++) {
        const Eight low = __builtin_shuffle(fours[i], fours[i + 4], EightIndices{0, 1, 2, 3, 8, 9, 10, 11});
        const Eight high = __builtin_shuffle(fours[i], fours[i + 4], EightIndices{4, 5, 6, 7, 12, 13, 14, 15});
        *reinterpret_cast<Eight*>(to + i * stride) = low;
        *reinterpret_cast<Eight*>(to + (i + 4) * stride) = high;
    }
}

// to[c][r] = from[r][c] for any number of rows and columns
inline void turn(const float* from, int64_t rows, int64_t columns, int64_t apart, float* to, int64_t stride) {
    for (int64_t r = 0; r < rows; r += 8) {
        int64_t c = 0;
        if (r + 8 <= rows)
            for (; c + 8 <= columns; c += 8) turn_block(from + r * apart + c, apart, to + c * stride + r, stride);
        for (; c < columns; c++)
            for (int64_t i = r; i < std::min(r + 8, rows); i++) to[c * stride + i] = from[i * apart + c];
    }
}

// a thread's own numbers, kept: fresh memory of an expert's size takes longer to get than to fill
inline float* scratch(int64_t numbers) {
    thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < numbers) kept.resize(numbers);
    return kept.data();
}

// h[r][c] = <x_r, m_c> over W
template <int R, int C>
inline void dots(const float* const* x, const float* m, int64_t W, float* h, int64_t L) {
    Vector sums[R][C] = {};
    int64_t w = 0;
    for (; w + LANES <= W; w += LANES) {
        Vector column[C];
        for (int c = 0; c < C; c++) column[c] = load(m + c * W + w);
        for (int r = 0; r < R; r++) {
            const Vector row = load(x[r] + w);
            for (int c = 0; c < C; c++) sums[r][c] = fused(row, column[c], sums[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float sum = sum_of(sums[r][c]);
            for (int64_t rest = w; rest < W; rest++) sum = fused(x[r][rest], m[c * W + rest], sum);
            h[r * L + c] = sum;
        }
}

// h [R, L] = x M^T
template <int R>
inline void down(const float* const* x, const float* m, int64_t W, int64_t L, float* h) {
    int64_t l = 0;
    for (; l + DOT_RANKS <= L; l += DOT_RANKS) dots<R, DOT_RANKS>(x, m + l * W, W, h + l, L);
    for (; l + 2 <= L; l += 2) dots<R, 2>(x, m + l * W, W, h + l, L);
    for (; l < L; l++) dots<R, 1>(x, m + l * W, W, h + l, L);
}

// y [R, C registers from w] += h M; the columns of M from w have `stride` numbers a row
template <int R, int C>
inline void add_columns(float* const* y, int64_t w, const float* h, const float* m, int64_t stride, int64_t L) {
    Vector sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load(y[r] + w + c * LANES);
    for (int64_t l = 0; l < L; l++) {
        Vector row[C];
        for (int c = 0; c < C; c++) row[c] = load(m + l * stride + c * LANES);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sums[r][c] = fused(h[r * L + l], row[c], sums[r][c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(y[r] + w + c * LANES, sums[r][c]);
}

// y [R, columns from w to end] += h M; m points to column w
template <int R>
inline void add_range(float* const* y, int64_t w, int64_t end, const float* h, const float* m, int64_t stride, int64_t L) {
    for (; w + ADD_COLUMNS * LANES <= end; w += ADD_COLUMNS * LANES, m += ADD_COLUMNS * LANES)
        add_columns<R, ADD_COLUMNS>(y, w, h, m, stride, L);
    for (; w + LANES <= end; w += LANES, m += LANES) add_columns<R, 1>(y, w, h, m, stride, L);
    for (; w < end; w++, m++)
        for (int r = 0; r < R; r++) {
            float sum = y[r][w];
            for (int64_t l = 0; l < L; l++) sum = fused(h[r * L + l], m[l * stride], sum);
            y[r][w] = sum;
        }
}

// y [R, W] += h M
template <int R>
inline void up(float* const* y, const float* h, const float* m, int64_t W, int64_t L) {
    add_range<R>(y, 0, W, h, m, W, L);
}

// the same for M^T [W, L], turned a few columns of M at a time
template <int R>
inline void up_turned(float* const* y, const float* h, const float* m, int64_t W, int64_t L) {
    constexpr int64_t width = ADD_COLUMNS * LANES;
    float panel[width * MAX_RANK];
    for (int64_t w = 0; w < W; w += width) {
        const int64_t end = std::min(W, w + width);
        turn(m + w * L, end - w, L, L, panel, width);
        add_range<R>(y, w, end, h, panel, width, L);
    }
}

}  // namespace

// Pairs by (block, expert).
struct Order {
    const int32_t* token;  // [P] token of each sorted pair
    const int32_t* pair;   // [P] its place in the caller's order
    const int32_t* start;  // [blocks * E + 1] first sorted pair of each (block, expert)
    int64_t blocks, experts;
};

namespace {

struct Linear {
    const Order& order;
    const float *x, *A, *B, *weights;
    float scale;
    int64_t D, O, L;
    bool by_rank;  // B lies as [E, L, O] instead of [E, O, L]

    // B_e^T [L, O] with contiguous rows, until the thread's next one
    const float* turned(int64_t e) const {
        const float* b = B + e * O * L;
        if (by_rank) return b;
        float* to = scratch(O * L);
        turn(b, O, L, L, to, O);
        return to;
    }
};

// b: B_e^T [L, O], or null: B_e is turned on the way
template <int R>
void forward_rows(const Linear& call, int64_t first, int64_t e, const float* b, float* y, float* H) {
    const int64_t L = call.L;
    const float* rows[R];
    float* results[R];
    float h[R * MAX_RANK];
    for (int r = 0; r < R; r++) {
        const int64_t t = call.order.token[first + r];
        rows[r] = call.x + t * call.D;
        results[r] = y + t * call.O;
    }
    down<R>(rows, call.A + e * L * call.D, call.D, L, h);
    for (int r = 0; r < R; r++) {
        const int64_t p = call.order.pair[first + r];
        if (H) std::memcpy(H + p * L, h + r * L, L * sizeof(float));
        for (int64_t l = 0; l < L; l++) h[r * L + l] *= call.scale * call.weights[p];
    }
    if (b)
        up<R>(results, h, b, call.O, L);
    else
        up_turned<R>(results, h, call.B + e * L * call.O, call.O, L);
}

// G [P, L] = s H and dH [P, L] = s U, both in sorted order; null where nobody reads them
struct Gradients {
    const float *H, *dy;
    float *dx, *dweights, *G, *dH;
    bool add_weights;

    bool need_U() const { return dweights || dH; }
};

template <int R>
void backward_rows(const Linear& call, const Gradients& to, int64_t first, int64_t e, const float* b) {
    const int64_t L = call.L;
    const float* rows[R];
    float* inputs[R];
    float u[R * MAX_RANK];
    const bool need_U = to.need_U();
    for (int r = 0; r < R; r++) {
        const int64_t t = call.order.token[first + r];
        rows[r] = to.dy + t * call.O;
        inputs[r] = to.dx + (to.dx ? t * call.D : 0);
    }
    if (need_U) down<R>(rows, b, call.O, L, u);
    for (int r = 0; r < R; r++) {
        const int64_t p = call.order.pair[first + r];
        const float factor = call.scale * call.weights[p];
        const float* h = to.H + (to.H ? p * L : 0);
        if (to.dweights) {
            float sum = 0;
            for (int64_t l = 0; l < L; l++) sum = fused(u[r * L + l], h[l], sum);
            to.dweights[p] = fused(call.scale, sum, to.add_weights ? to.dweights[p] : 0);
        }
        if (to.G)
            for (int64_t l = 0; l < L; l++) to.G[(first + r) * L + l] = factor * h[l];
        if (to.dH)
            for (int64_t l = 0; l < L; l++) to.dH[(first + r) * L + l] = u[r * L + l] * factor;
    }
    if (to.dx) up<R>(inputs, to.dH + first * L, call.A + e * L * call.D, call.D, L);
}

// calls rows(Number<R>, first, e) for the pairs [s, end) of one expert, up to four of different tokens at a time: the rows of y that
// they add to must not be one row. Pairs of one expert are in the order of their tokens.
template <class Rows>
void each_rows(const int32_t* token, int64_t s, int64_t end, int64_t e, const Rows& rows) {
    static_assert(ROWS == 4, "one case for each count");
    while (s < end) {
        int count = 1;
        while (count < ROWS && s + count < end && token[s + count] != token[s + count - 1]) count++;
        switch (count) {
            case 4: rows(Number<4>(), s, e); break;
            case 3: rows(Number<3>(), s, e); break;
            case 2: rows(Number<2>(), s, e); break;
            default: rows(Number<1>(), s, e); break;
        }
        s += count;
    }
}

// all pairs [s, end) of one expert
void forward_pairs(const Linear& call, int64_t s, int64_t end, int64_t e, float* y, float* H) {
    // the same bits either way
    const float* b = call.by_rank || end - s > ROWS ? call.turned(e) : nullptr;
    each_rows(call.order.token, s, end, e,
              [&](auto rows, int64_t first, int64_t e) { forward_rows<rows()>(call, first, e, b, y, H); });
}

void backward_pairs(const Linear& call, const Gradients& to, int64_t s, int64_t end, int64_t e) {
    const float* b = to.need_U() ? call.turned(e) : nullptr;
    each_rows(call.order.token, s, end, e,
              [&](auto rows, int64_t first, int64_t e) { backward_rows<rows()>(call, to, first, e, b); });
}

// calls pairs(s, end, e) for the experts of a block that have pairs
template <class Pairs>
void each_expert(const Order& order, int64_t block, const Pairs& pairs) {
    const int32_t* start = order.start + block * order.experts;
    for (int64_t e = 0; e < order.experts; e++)
        if (start[e] < start[e + 1]) pairs(start[e], start[e + 1], e);
}

// where the sums over pairs go: rows of W numbers, or TURNED into columns of them, rows of L
template <bool TURNED>
struct Sums {
    float* out;
    int64_t W, L;

    template <int R, int C>
    void write(const Vector (&sums)[R][C], int64_t l, int64_t w) const {
        if constexpr (TURNED) {
            float tile[R * C * LANES];
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) store(tile + (r * C + c) * LANES, sums[r][c]);
            turn(tile, R, C * LANES, C * LANES, out + w * L + l, L);
        } else {
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) store(out + (l + r) * W + w + c * LANES, sums[r][c]);
        }
    }
    float& at(int64_t l, int64_t w) const { return TURNED ? out[w * L + l] : out[l * W + w]; }
};

// ranks l to l + R by C registers of columns from w: sum over the pairs of expert e of g_p [L] times row t(p) of v [T, W]
template <int R, int C, bool TURNED>
inline void sum_columns(const Order& order, int64_t e, const float* g, const float* v, int64_t l, int64_t w,
                        const Sums<TURNED>& to) {
    const int64_t W = to.W, L = to.L;
    g += l, v += w;
    Vector sums[R][C] = {};
    const int64_t last = order.start[order.blocks * order.experts] - 1;
    for (int64_t b = 0; b < order.blocks; b++) {
        const int32_t* bounds = order.start + b * order.experts + e;
        for (int64_t s = bounds[0]; s < bounds[1]; s++) {
            const float* ahead = v + order.token[std::min(s + AHEAD, last)] * W;
            for (int c = 0; c < C; c++) __builtin_prefetch(ahead + c * LANES);
            Vector row[C];
            for (int c = 0; c < C; c++) row[c] = load(v + order.token[s] * W + c * LANES);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) sums[r][c] = fused(g[s * L + r], row[c], sums[r][c]);
        }
    }
    to.write(sums, l, w);
}

template <int R, bool TURNED>
inline void sum_ranks(const Order& order, int64_t e, const float* g, const float* v, int64_t l, int64_t w, int64_t end,
                      const Sums<TURNED>& to) {
    constexpr int C = TURNED ? TURNED_COLUMNS : SUM_COLUMNS;
    const int64_t W = to.W, L = to.L;
    for (; w + C * LANES <= end; w += C * LANES) sum_columns<R, C>(order, e, g, v, l, w, to);
    for (; w + LANES <= end; w += LANES) sum_columns<R, 1>(order, e, g, v, l, w, to);
    for (; w < end; w++)
        for (int r = 0; r < R; r++) {
            float sum = 0;
            for (int64_t b = 0; b < order.blocks; b++) {
                const int32_t* bounds = order.start + b * order.experts + e;
                for (int64_t s = bounds[0]; s < bounds[1]; s++)
                    sum = fused(g[s * L + l + r], v[order.token[s] * W + w], sum);
            }
            to.at(l + r, w) = sum;
        }
}

// columns [w, end) of the sums of expert e
template <bool TURNED>
void sum_pairs(const Order& order, int64_t e, const float* g, const float* v, int64_t w, int64_t end, const Sums<TURNED>& to) {
    constexpr int R = TURNED ? TURNED_RANKS : SUM_RANKS;
    const int64_t L = to.L;
    int64_t l = 0;
    for (; l + R <= L; l += R) sum_ranks<R>(order, e, g, v, l, w, end, to);
    for (; l + 2 <= L; l += 2) sum_ranks<2>(order, e, g, v, l, w, end, to);
    for (; l < L; l++) sum_ranks<1>(order, e, g, v, l, w, end, to);
}

// columns of one of `parts` of W, in whole groups of registers
int64_t part_width(int64_t W, int64_t parts) {
    constexpr int64_t group = SUM_COLUMNS * LANES;
    return ((W + parts - 1) / parts + group - 1) / group * group;
}

}  // namespace

extern "C" {

// Sort P pairs by (block of `block` tokens, expert), stable; ids outside of [0, E) are left out.
// token_P: token of each free pair, else null and pair p belongs to token p / slots. by_token_P: free pairs in the order of
// their tokens, else null. start has blocks * E + 2 entries, of which the last is scratch.
void moe_kit_order(const int64_t* expert_P, const int64_t* token_P, const int64_t* by_token_P, int32_t* token, int32_t* pair,
                   int32_t* start, int64_t P, int64_t slots, int64_t E, int64_t block, int64_t blocks) {
    std::memset(start, 0, (blocks * E + 2) * sizeof(int32_t));
    // counted two places on, so that after placing every entry is where the next one began
    for (int64_t p = 0; p < P; p++) {
        const int64_t e = expert_P[p];
        if (e >= 0 && e < E) start[(token_P ? token_P[p] : p / slots) / block * E + e + 2]++;
    }
    for (int64_t i = 2; i < blocks * E + 2; i++) start[i] += start[i - 1];
    for (int64_t i = 0; i < P; i++) {
        const int64_t p = by_token_P ? by_token_P[i] : i, e = expert_P[p];
        if (e < 0 || e >= E) continue;
        const int64_t t = token_P ? token_P[p] : p / slots;
        const int32_t place = start[t / block * E + e + 1]++;
        token[place] = static_cast<int32_t>(t);
        pair[place] = static_cast<int32_t>(p);
    }
}

// y [T, O] += experts of x [T, D]; H [P, L] in the caller's order unless null. Rows of pairs that were left out are not written.
void moe_kit_lora_forward(const int32_t* token, const int32_t* pair, const int32_t* start, const float* x, const float* A,
                          const float* B, const float* weights, float* y, float* H, float scale, int64_t, int64_t,
                          int64_t blocks, int64_t E, int64_t D, int64_t O, int64_t L, int by_rank, int threads) {
    const Order order{token, pair, start, blocks, E};
    const Linear call{order, x, A, B, weights, scale, D, O, L, by_rank != 0};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        each_expert(order, block, [&](int64_t s, int64_t end, int64_t e) { forward_pairs(call, s, end, e, y, H); });
}

// Gradients that are not null: dx is added to, dweights too if `add_weights`, dA [E, L, D] and dB, which lies as B, are written, empty
// experts as zeros. G and dH [P, L] are scratch; G is needed for dB, dH for dx and dA.
void moe_kit_lora_backward(const int32_t* token, const int32_t* pair, const int32_t* start, const float* x, const float* A,
                           const float* B, const float* weights, const float* H, const float* dy, float* dx, float* dweights,
                           float* dA, float* dB, float* G, float* dH, float scale, int64_t, int64_t, int64_t blocks, int64_t E,
                           int64_t D, int64_t O, int64_t L, int by_rank, int add_weights, int threads) {
    const Order order{token, pair, start, blocks, E};
    const Linear call{order, x, A, B, weights, scale, D, O, L, by_rank != 0};
    const Gradients to{H, dy, dx, dweights, G, dH, add_weights != 0};
    // as wide as the threads allow: what one task writes is one piece of memory, whose pages are often touched for the first time
    const int64_t parts = (TASKS_A_THREAD * threads + E - 1) / E;
    const int64_t wide_A = part_width(D, parts), wide_B = part_width(O, parts);
    const int64_t tasks_A = dA ? (D + wide_A - 1) / wide_A : 0;
    const int64_t tasks = tasks_A + (dB ? (O + wide_B - 1) / wide_B : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++)
            each_expert(order, block, [&](int64_t s, int64_t end, int64_t e) { backward_pairs(call, to, s, end, e); });
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < E * tasks; task++) {
            const int64_t e = task / tasks, part = task % tasks;
            if (part < tasks_A) {
                const int64_t w = part * wide_A;
                sum_pairs(order, e, dH, x, w, std::min(D, w + wide_A), Sums<false>{dA + e * L * D, D, L});
            } else {
                const int64_t w = (part - tasks_A) * wide_B;
                float* out = dB + e * L * O;
                const int64_t end = std::min(O, w + wide_B);
                if (by_rank)
                    sum_pairs(order, e, G, dy, w, end, Sums<false>{out, O, L});
                else
                    sum_pairs(order, e, G, dy, w, end, Sums<true>{out, O, L});
            }
        }
    }
}

// y [T, O] += experts of x [T, D] for a table of ids [T, slots] with few pairs: sorted here, on each thread those of its tokens.
// Returns the lowest id; with one below -1 nothing is written.
int64_t moe_kit_lora_table(const int64_t* ids, const float* x, const float* A, const float* B, const float* weights, float* y,
                           float scale, int64_t T, int64_t slots, int64_t E, int64_t D, int64_t O, int64_t L, int by_rank,
                           int threads) {
    const int64_t P = T * slots;
    int64_t lowest = P > FEW_PAIRS ? INT64_MIN : 0;
    for (int64_t p = 0; p < P; p++) lowest = std::min(lowest, ids[p]);
    if (lowest < -1) return lowest;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        int32_t token[FEW_PAIRS], pair[FEW_PAIRS];
        int64_t count = 0;
        for (int64_t p = T * thread / threads * slots; p < T * (thread + 1) / threads * slots; p++) {
            if (ids[p] < 0 || ids[p] >= E) continue;
            int64_t place = count++;
            for (; place > 0 && ids[pair[place - 1]] > ids[p]; place--) pair[place] = pair[place - 1];
            pair[place] = static_cast<int32_t>(p);
        }
        for (int64_t s = 0; s < count; s++) token[s] = static_cast<int32_t>(pair[s] / slots);
        const Order order{token, pair, nullptr, 1, E};
        const Linear call{order, x, A, B, weights, scale, D, O, L, by_rank != 0};
        for (int64_t s = 0, end = 0; s < count; s = end) {
            while (end < count && ids[pair[end]] == ids[pair[s]]) end++;
            forward_pairs(call, s, end, ids[pair[s]], y, nullptr);
        }
    }
    return lowest;
}

}  // extern "C"
