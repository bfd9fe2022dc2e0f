/* An ILogger of TensorRT 10, as a C++ object laid out by hand (Itanium C++ ABI): its first word points to a
 * table of functions. In C because the second function returns a struct by value, which ctypes can't. */

#include <stdint.h>

struct interface {
    char const *kind;
    int32_t major, minor;
};

static void (*sink)(int32_t severity, char const *text);

static int32_t language(void *self) { (void)self; return 0; /* C++ */ }

static struct interface interface(void *self) {
    (void)self;
    struct interface const this_one = {"ILogger", 1, 0};
    return this_one;
}

static void destroy(void *self) { (void)self; }

static void take(void *self, int32_t severity, char const *text) { (void)self; sink(severity, text); }

static void *const table[] = {(void *)language, (void *)interface, (void *)destroy, (void *)destroy, (void *)take};

static void *const *const logger = table;

/* The logger, whose messages go to `to` from now on: severity 0 or 1 is an error, 2 a warning, 3 news. */
void const *logger_to(void (*to)(int32_t, char const *)) {
    sink = to;
    return &logger;
}
