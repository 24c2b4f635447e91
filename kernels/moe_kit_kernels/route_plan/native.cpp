// The sorted pieces of a routing plan in two passes over its pairs.

#include <cstdint>
#include <cstring>

extern "C" {

// Stable sort of P pairs by expert; ids are in [0, E], those of dropped pairs are E. token_P: token of each free pair, else null and
// pair p belongs to token p / slots. `first` [E + 1] is scratch. The other arrays are as in plan.py. Returns how many ids lie outside;
// with any, nothing else is written.
int64_t moe_kit_sort(const int64_t* expert_P, const int64_t* token_P, int64_t* order_P, int64_t* inverse_P,
                     int64_t* sorted_token_P, int64_t* sorted_expert_P, int64_t* counts_E, int64_t* offsets_E1, int64_t* first,
                     int64_t P, int64_t slots, int64_t E) {
    std::memset(first, 0, (E + 1) * sizeof(int64_t));
    int64_t outside = 0;
    for (int64_t p = 0; p < P; p++) {
        const int64_t e = expert_P[p];
        if (e < 0 || e > E)
            outside++;
        else
            first[e]++;
    }
    if (outside) return outside;
    std::memcpy(counts_E, first, E * sizeof(int64_t));
    int64_t sum = 0;
    for (int64_t e = 0; e <= E; e++) {
        const int64_t count = first[e];
        offsets_E1[e] = first[e] = sum;
        sum += count;
    }
    for (int64_t p = 0; p < P; p++) {
        const int64_t e = expert_P[p], place = first[e]++;
        order_P[place] = p;
        inverse_P[p] = place;
        sorted_token_P[place] = token_P ? token_P[p] : p / slots;
        sorted_expert_P[place] = e;
    }
    return 0;
}

}  // extern "C"
