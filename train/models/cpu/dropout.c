/* Dropout as torch computes it on a CPU, mask, rounding and the generator's state included; see dropout.py.
 *
 * torch draws one double per element from a Mersenne Twister (Matsumoto and Nishimura 1998), value by value. Here whole
 * blocks of the twister are made and tempered at once, in loops that the compiler vectorises. */

#include <stdint.h>

#define WORDS 624
#define SHIFTED 397

/* The head of what torch.Generator.get_state() returns. */
typedef struct {
    uint64_t seed;
    int32_t left, seeded; /* `left` - 1 words of the block are still to be drawn */
    uint64_t next;
    uint64_t words[WORDS];
} Generator;

static inline uint32_t mixed(uint32_t high, uint32_t low) {
    const uint32_t both = (high & 0x80000000u) | (low & 0x7fffffffu);
    return (both >> 1) ^ ((low & 1u) ? 0x9908b0dfu : 0u);
}

static void next_block(uint32_t *restrict w) {
    int i;
    for (i = 0; i < WORDS - SHIFTED; i++) w[i] = w[i + SHIFTED] ^ mixed(w[i], w[i + 1]);
    for (; i < WORDS - 1; i++) w[i] = w[i + SHIFTED - WORDS] ^ mixed(w[i], w[i + 1]);
    w[i] = w[SHIFTED - 1] ^ mixed(w[i], w[0]);
}

static inline uint32_t tempered(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* 1 where the double of 53 bits that the two words make lies below threshold / 2^53. */
static inline uint8_t drawn(uint32_t first, uint32_t second, uint64_t threshold) {
    return ((((uint64_t)first << 32) | second) & ((1ull << 53) - 1)) < threshold;
}

/* n bytes: 1 for what stays. */
void dropout_mask(Generator *generator, int64_t n, uint64_t threshold, uint8_t *restrict keep) {
    uint32_t words[WORDS], block[WORDS];
    int left = generator->left - 1; /* words of the block that are left */
    for (int i = 0; i < WORDS; i++) words[i] = (uint32_t)generator->words[i];
    for (int i = 0; i < WORDS; i++) block[i] = tempered(words[i]);
    while (n > 0) {
        if (left == 1) {
            const uint32_t first = block[WORDS - 1];
            next_block(words);
            for (int i = 0; i < WORDS; i++) block[i] = tempered(words[i]);
            left = WORDS - 1;
            *keep++ = drawn(first, block[0], threshold);
            n--;
            continue;
        }
        if (left == 0) {
            next_block(words);
            for (int i = 0; i < WORDS; i++) block[i] = tempered(words[i]);
            left = WORDS;
        }
        const uint32_t *restrict from = block + WORDS - left;
        const int64_t pairs = n < left / 2 ? n : left / 2;
        for (int64_t i = 0; i < pairs; i++) keep[i] = drawn(from[2 * i], from[2 * i + 1], threshold);
        keep += pairs;
        n -= pairs;
        left -= 2 * (int)pairs;
    }
    for (int i = 0; i < WORDS; i++) generator->words[i] = words[i];
    generator->left = left + 1;
    generator->next = WORDS - left;
}

/* out = x times scale where kept, times 0 elsewhere: a NaN stays one. */
void dropout_fp32(const float *restrict x, const uint8_t *restrict keep, float *restrict out, int64_t n, float scale,
                  int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * (keep[i] ? scale : 0.0f);
}

static inline float widened(uint16_t bits) {
    union { uint32_t u; float f; } v = {(uint32_t)bits << 16};
    return v.f;
}

static inline uint16_t rounded(float x) {
    union { float f; uint32_t u; } v = {x};
    const uint32_t even = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
    return (uint16_t)((v.u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : even);
}

void dropout_bf16(const uint16_t *restrict x, const uint8_t *restrict keep, uint16_t *restrict out, int64_t n,
                  float scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) out[i] = rounded(widened(x[i]) * (keep[i] ? scale : 0.0f));
}
