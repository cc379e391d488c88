/* Vectors of 64 bytes and their exponential, for the loops of relations.c and vocabulary.c. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef IN_DOUBLE /* by which the tests compare with the formula */
#define REAL double
#define WHOLE int64_t
#else
#define REAL float
#define WHOLE int32_t
#endif
#define LANES ((int64_t)(64 / sizeof(REAL)))
#define FAR ((REAL)-1e30) /* behind the last relation or logit: less than any, and finite */

typedef REAL Vector __attribute__((vector_size(64)));
typedef WHOLE Mask __attribute__((vector_size(64)));
typedef REAL Loose __attribute__((vector_size(64), aligned(4), may_alias)); /* the same anywhere in memory */

static inline Vector load(const REAL *at) { return *(const Loose *)at; }
static inline void store(REAL *at, Vector value) { *(Loose *)at = value; }

static inline REAL total(Vector v) {
    REAL sum = 0;
    for (int64_t i = 0; i < LANES; ++i)
        sum += v[i];
    return sum;
}

/* exp(x) of x <= 0; 0 below -88 (IN_DOUBLE: where it underflows). A NaN stays one. */
static inline Vector exponential(Vector x) {
#ifdef IN_DOUBLE
    Vector y;
    for (int64_t i = 0; i < LANES; ++i)
        y[i] = exp(x[i]);
    return y;
#else
    /* By powers of two and the polynomial of Cephes' expf: within 2 units in the last place. */
    const Vector low = (Vector){} - 88.0f;
    const Mask below = x < low;
    x = (Vector)(((Mask)x & ~below) | ((Mask)low & below));
    /* 1.5 x 2^23 + 127: adding it leaves the power of two's exponent field, 0 at -88, in the last bits. */
    const float rounder = 12583039.0f;
    const Vector shifted = x * 1.44269504088896341f + rounder;
    const Vector whole = shifted - rounder;
    const Vector r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Vector y = (Vector){} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return y * (Vector)((Mask)shifted << 23);
#endif
}
