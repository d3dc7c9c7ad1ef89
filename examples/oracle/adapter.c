/* AWQ INT4 in C, speaking the oracle's protocol on stdin and stdout (miniawq/oracle/stdio.py):
 *
 *     cc -O2 -o adapter examples/oracle/adapter.c -lm
 *     python -m miniawq.oracle --command ./adapter
 *
 * It has pack, unpack, dequantize and matmul (float32 sums; x of float16 or float32). Requests are one line of JSON with
 * keys in a fixed order, so looking for a key is parsing enough.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* nibble i of a word holds column ORDER[i] */

typedef struct {
    char dtype[16];
    long rows, columns, leading; /* the last two dimensions; 1 where there are fewer */
    int dimensions;
    char shape[128];
    void *data;
} Tensor;

static float half_to_float(uint16_t h) {
    int exponent = (h >> 10) & 31, mantissa = h & 1023;
    float value = exponent == 0 ? ldexpf((float)mantissa, -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : ldexpf((float)(mantissa + 1024), exponent - 25);
    return h & 0x8000 ? -value : value;
}

static uint16_t float_to_half(float f) { /* to nearest, ties to even, with subnormals and infinity */
    uint16_t sign = signbit(f) ? 0x8000 : 0;
    double a = fabs((double)f);
    if (isnan(f)) return 0x7e00;
    if (a == 0) return sign;
    if (a >= 65520.0) return sign | 0x7c00;
    int exponent;
    frexp(a, &exponent);
    if (exponent < -13) exponent = -13; /* subnormals share the smallest exponent */
    double steps = nearbyint(ldexp(a, 11 - exponent));
    return sign | (uint16_t)(steps + (double)(exponent + 13) * 1024);
}

static const char *find(const char *text, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *at = strstr(text, quoted);
    return at ? at + strlen(quoted) : NULL;
}

static void copy_string(const char *at, char *to, size_t size) {
    size_t length = strcspn(++at, "\"");
    if (length >= size) length = size - 1;
    memcpy(to, at, length);
    to[length] = 0;
}

/* The tensor called `name`, or one without data. */
static Tensor tensor(const char *line, const char *name) {
    Tensor t = {.rows = 1, .columns = 1, .leading = 1};
    char wanted[64], path[512];
    snprintf(wanted, sizeof wanted, "{\"name\":\"%s\",", name);
    const char *at = strstr(line, wanted);
    if (!at) return t;
    copy_string(find(at, "dtype"), t.dtype, sizeof t.dtype);
    const char *shape = find(at, "shape") + 1;
    size_t length = strcspn(shape, "]");
    memcpy(t.shape, shape, length);
    long count = 1;
    for (char *p = t.shape; *p; p += strcspn(p, ","), p += *p == ',') {
        t.leading *= t.rows, t.rows = t.columns, t.columns = strtol(p, NULL, 10);
        count *= t.columns, t.dimensions++;
    }
    copy_string(find(at, "path"), path, sizeof path);
    size_t width = strstr(t.dtype, "32") ? 4 : strstr(t.dtype, "16") ? 2 : 1;
    t.data = calloc(count * width + 1, 1);
    FILE *file = fopen(path, "rb");
    if (!file || fread(t.data, width, count, file) != (size_t)count) exit(3);
    fclose(file);
    return t;
}

static int is(Tensor t, const char *dtype) { return !strcmp(t.dtype, dtype); }

static void answer(long seq, const char *out, const char *dtype, const char *shape, const void *data, size_t bytes) {
    char path[600];
    snprintf(path, sizeof path, "%s.0", out);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, bytes, file) != bytes) exit(3);
    fclose(file);
    printf("{\"seq\":%ld,\"tensors\":[{\"dtype\":\"%s\",\"shape\":[%s]}]}\n", seq, dtype, shape);
}

static void say(long seq, const char *kind, const char *why) {
    printf("{\"seq\":%ld,\"%s\":\"%s\"}\n", seq, kind, why);
}

static int code_at(const int32_t *words, long words_in_row, long row, long column) {
    uint32_t word = (uint32_t)words[row * words_in_row + column / 8];
    for (int nibble = 0; nibble < 8; nibble++)
        if (ORDER[nibble] == column % 8) return word >> 4 * nibble & 15;
    return 0;
}

static void run_pack(long seq, const char *out, Tensor codes) {
    char shape[64];
    const uint8_t *c = codes.data;
    if (!is(codes, "uint8")) return say(seq, "refused", "codes are uint8");
    if (codes.columns % 8) return say(seq, "refused", "the columns do not fill whole words");
    for (long i = 0; i < codes.rows * codes.columns; i++)
        if (c[i] > 15) return say(seq, "refused", "a code above 15");
    long count = codes.rows * codes.columns / 8;
    uint32_t *words = calloc(count + 1, 4);
    for (long i = 0; i < count; i++)
        for (int nibble = 0; nibble < 8; nibble++) words[i] |= (uint32_t)c[i * 8 + ORDER[nibble]] << 4 * nibble;
    snprintf(shape, sizeof shape, "%ld,%ld", codes.rows, codes.columns / 8);
    answer(seq, out, "int32", shape, words, count * 4);
    free(words);
}

static void run_unpack(long seq, const char *out, Tensor words) {
    char shape[64];
    if (!is(words, "int32")) return say(seq, "refused", "words are int32");
    uint8_t *codes = malloc(words.rows * words.columns * 8 + 1);
    for (long r = 0; r < words.rows; r++)
        for (long c = 0; c < words.columns * 8; c++)
            codes[r * words.columns * 8 + c] = code_at(words.data, words.columns, r, c);
    snprintf(shape, sizeof shape, "%ld,%ld", words.rows, words.columns * 8);
    answer(seq, out, "uint8", shape, codes, words.rows * words.columns * 8);
    free(codes);
}

/* The weight [K, N], or NULL when the shapes or the dtypes do not fit. */
static uint16_t *decode(Tensor qweight, Tensor qzeros, Tensor scales, long group_size) {
    long k = qweight.rows, n = qweight.columns * 8, size = group_size == -1 ? k : group_size;
    if (!is(qweight, "int32") || !is(qzeros, "int32") || !is(scales, "float16")) return NULL;
    if (size < 1 || k % size || scales.rows != k / size || scales.columns != n) return NULL;
    if (qzeros.rows != scales.rows || qzeros.columns != qweight.columns) return NULL;
    uint16_t *weight = malloc(k * n * 2);
    const uint16_t *s = scales.data;
    for (long i = 0; i < k; i++)
        for (long j = 0; j < n; j++) {
            int step = code_at(qweight.data, qweight.columns, i, j) - code_at(qzeros.data, qzeros.columns, i / size, j);
            weight[i * n + j] = float_to_half((float)step * half_to_float(s[i / size * n + j]));
        }
    return weight;
}

static void run_matmul(long seq, const char *out, Tensor x, const uint16_t *weight, Tensor bias, long k, long n) {
    int half = is(x, "float16");
    if (is(x, "bfloat16")) return say(seq, "skipped", "no bfloat16 here");
    if (!half && !is(x, "float32")) return say(seq, "refused", "x of float16 and float32 only");
    if (x.columns != k) return say(seq, "refused", "x has another number of features");
    if (bias.data && (bias.dimensions != 1 || bias.columns != n || !is(bias, x.dtype))) return say(seq, "refused", "bias is no [N] of x's dtype");
    long rows = x.leading * x.rows;
    uint16_t *y16 = malloc(rows * n * 2 + 1);
    float *y32 = malloc(rows * n * 4 + 1);
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < n; j++) {
            float sum = 0;
            for (long i = 0; i < k; i++) {
                float a = half ? half_to_float(((uint16_t *)x.data)[r * k + i]) : ((float *)x.data)[r * k + i];
                sum += a * half_to_float(weight[i * n + j]);
            }
            if (bias.data) sum += half ? half_to_float(((uint16_t *)bias.data)[j]) : ((float *)bias.data)[j];
            y32[r * n + j] = sum;
            y16[r * n + j] = float_to_half(sum);
        }
    char shape[192] = "", *last = strrchr(x.shape, ',');
    if (last) snprintf(shape, sizeof shape, "%.*s,%ld", (int)(last - x.shape), x.shape, n);
    else snprintf(shape, sizeof shape, "%ld", n);
    answer(seq, out, x.dtype, shape, half ? (void *)y16 : (void *)y32, rows * n * (half ? 2 : 4));
    free(y16), free(y32);
}

static void run(const char *line) {
    char function[32], out[512], shape[64];
    long seq = strtol(find(line, "seq"), NULL, 10);
    copy_string(find(line, "function"), function, sizeof function);
    copy_string(find(line, "out"), out, sizeof out);
    if (!strcmp(function, "pack")) return run_pack(seq, out, tensor(line, "codes"));
    if (!strcmp(function, "unpack")) return run_unpack(seq, out, tensor(line, "words"));
    Tensor qweight = tensor(line, "qweight"), scales = tensor(line, "scales");
    uint16_t *weight = decode(qweight, tensor(line, "qzeros"), scales, strtol(find(line, "group_size"), NULL, 10));
    if (!weight) return say(seq, "refused", "the shapes or dtypes of qweight, qzeros and scales do not fit");
    long k = qweight.rows, n = qweight.columns * 8;
    if (!strcmp(function, "matmul")) return run_matmul(seq, out, tensor(line, "x"), weight, tensor(line, "bias"), k, n);
    snprintf(shape, sizeof shape, "%ld,%ld", k, n);
    answer(seq, out, "float16", shape, weight, k * n * 2);
    free(weight);
}

int main(void) {
    static char line[1 << 16];
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(line, sizeof line, stdin)) {
        if (strstr(line, "\"cmd\":\"stop\"")) return 0;
        if (strstr(line, "\"cmd\":\"start\""))
            puts("{\"name\":\"C example\",\"version\":\"1\",\"limits\":{\"dtypes\":[\"float16\",\"float32\"]},"
                 "\"functions\":[\"pack\",\"unpack\",\"dequantize\",\"matmul\"]}");
        else
            run(line);
    }
    return 0;
}
