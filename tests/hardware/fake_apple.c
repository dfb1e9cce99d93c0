/* A stand-in for IOKit, CoreFoundation and libSystem, so that the ctypes calls run on Linux.
   The fake_* functions script it. It checks what the real libraries check: the matching dictionary, the
   80-byte struct, the task port, and (on demand) that a connection was primed by one call by index.
   Every owned object is counted, so a leak shows in fake_live(). */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define UTF8 0x08000100u
#define SINT32 3
#define TASK 0x103u
#define KEYS_ENDPOINT 0x32u
#define CONNECTION 0x77u
#define TOKEN 7

typedef struct {
    uint32_t key;
    uint8_t version[6];
    uint16_t pad0;
    uint8_t limits[16];
    uint32_t size, type;
    uint8_t attributes, pad1[3];
    uint8_t result, status, command, pad2;
    uint32_t index;
    uint8_t bytes[32];
} KeyData;
_Static_assert(sizeof(KeyData) == 80, "the kernel wants 80 bytes");

typedef struct {
    int number; /* a CFNumber's value, an array's length, an event's service, 1 for the right dictionary */
    char text[64];
} Object;

static struct { char name[64]; double value; int has_event; } services[128];
static struct { uint32_t key, type, size; uint8_t bytes[32]; } keys[256];
static int service_count, key_count, require_prime, primed, live, matched, connections, tokens;
static uint64_t level, footprint, most_footprint;
static char model[64];
static int in_vm;

uint32_t mach_task_self_ = TASK;
char kCFTypeDictionaryKeyCallBacks[48], kCFTypeDictionaryValueCallBacks[40];

void fake_reset(void) { service_count = key_count = require_prime = primed = 0; level = 0; footprint = most_footprint = 0; in_vm = 0; strcpy(model, "MacBookAir10,1"); }
void fake_hid(const char *name, double value, int has_event) {
    strncpy(services[service_count].name, name, 63);
    services[service_count].value = value;
    services[service_count++].has_event = has_event;
}
void fake_smc(uint32_t key, uint32_t type, uint32_t size, const uint8_t *bytes) {
    keys[key_count].key = key;
    keys[key_count].type = type;
    keys[key_count].size = size;
    memcpy(keys[key_count++].bytes, bytes, size);
}
void fake_level(uint64_t l) { level = l; }
void fake_footprint(uint64_t now, uint64_t most) { footprint = now; most_footprint = most; }
void fake_model(const char *name, int virtual) { strncpy(model, name, 63); in_vm = virtual; }
void fake_require_prime(void) { require_prime = 1; }
int fake_live(void) { return live; }
int fake_open(void) { return connections + tokens; }

/* CoreFoundation */
static Object *make(void) { live++; return calloc(1, sizeof(Object)); }
void CFRelease(void *object) { live--; free(object); }
void *CFStringCreateWithCString(void *allocator, const char *text, uint32_t encoding) {
    if (encoding != UTF8) return 0;
    Object *o = make();
    strncpy(o->text, text, 63);
    return o;
}
unsigned char CFStringGetCString(void *string, char *buffer, long size, uint32_t encoding) {
    if (encoding != UTF8) return 0;
    strncpy(buffer, ((Object *)string)->text, size);
    return 1;
}
void *CFNumberCreate(void *allocator, long type, const void *value) {
    if (type != SINT32) return 0;
    Object *o = make();
    o->number = *(const int32_t *)value;
    return o;
}
void *CFDictionaryCreate(void *allocator, const void **k, const void **v, long n, const void *kc, const void *vc) {
    if (n != 2 || kc != kCFTypeDictionaryKeyCallBacks || vc != kCFTypeDictionaryValueCallBacks) return 0;
    Object *o = make();
    o->number = ((Object *)v[0])->number == 0xff00 && ((Object *)v[1])->number == 5 &&
                !strcmp(((Object *)k[0])->text, "PrimaryUsagePage") &&
                !strcmp(((Object *)k[1])->text, "PrimaryUsage");
    return o;
}
long CFArrayGetCount(void *array) { return ((Object *)array)->number; }
const void *CFArrayGetValueAtIndex(void *array, long i) { return (void *)(uintptr_t)(0x1000 + i); }

/* IOHID: a service is the number 0x1000 + i, borrowed, so releasing one would crash, as it should */
void *IOHIDEventSystemClientCreate(void *allocator) { return make(); }
int IOHIDEventSystemClientSetMatching(void *client, void *wanted) {
    matched = wanted && ((Object *)wanted)->number;
    return 0;
}
void *IOHIDEventSystemClientCopyServices(void *client) {
    if (!matched) return 0;
    Object *o = make();
    o->number = service_count;
    return o;
}
void *IOHIDServiceClientCopyProperty(void *service, void *key) {
    int i = (int)((uintptr_t)service - 0x1000);
    if (strcmp(((Object *)key)->text, "Product") || !*services[i].name) return 0;
    return CFStringCreateWithCString(0, services[i].name, UTF8);
}
void *IOHIDServiceClientCopyEvent(void *service, int64_t type, int32_t options, int64_t timestamp) {
    int i = (int)((uintptr_t)service - 0x1000);
    if (type != 15 || !services[i].has_event) return 0;
    Object *o = make();
    o->number = i;
    return o;
}
double IOHIDEventGetFloatValue(void *event, int32_t field) {
    return field == (15 << 16) ? services[((Object *)event)->number].value : -12345.0;
}

/* AppleSMC */
void *IOServiceMatching(const char *name) { return strcmp(name, "AppleSMC") ? 0 : (void *)0x5; }
int IOServiceGetMatchingServices(uint32_t port, void *matching, uint32_t *iterator) {
    *iterator = 0x900;
    return matching ? 0 : -1;
}
uint32_t IOIteratorNext(uint32_t iterator) {
    static const uint32_t found[] = {0x31, KEYS_ENDPOINT, 0};
    static int at;
    uint32_t service = found[at];
    at = service ? at + 1 : 0;
    return service;
}
int IORegistryEntryGetName(uint32_t entry, char *name) {
    strcpy(name, entry == KEYS_ENDPOINT ? "AppleSMCKeysEndpoint" : "AppleSMCPMU");
    return 0;
}
int IOServiceOpen(uint32_t service, uint32_t task, uint32_t type, uint32_t *connection) {
    if (task != TASK || service != KEYS_ENDPOINT) return 0xE00002C7;
    *connection = CONNECTION;
    connections++;
    return 0;
}
int IOServiceClose(uint32_t connection) { connections--; return 0; }
int IOObjectRelease(uint32_t object) { return 0; }
int IOConnectCallStructMethod(uint32_t connection, uint32_t selector, const void *in, size_t in_size, void *out,
                              size_t *out_size) {
    if (connection != CONNECTION || selector != 2 || in_size != 80 || *out_size != 80) return 0xE00002C2;
    const KeyData *question = in;
    KeyData *answer = out;
    memset(answer, 0, 80);
    answer->result = 132; /* key not found */
    if (question->command == 8) {
        primed = 1;
        if (question->index >= (uint32_t)key_count) return 0;
        answer->key = keys[question->index].key;
        answer->result = 0;
        return 0;
    }
    if (require_prime && !primed) return 0;
    for (int i = 0; i < key_count; i++) {
        if (keys[i].key != question->key) continue;
        if (question->command == 9) {
            answer->size = keys[i].size;
            answer->type = keys[i].type;
            answer->result = 0;
        } else if (question->command == 5 && question->size == keys[i].size && !question->result) {
            memcpy(answer->bytes, keys[i].bytes, keys[i].size);
            answer->result = 0;
        }
    }
    return 0;
}

/* libSystem */
uint32_t notify_register_check(const char *name, int *token) {
    if (strcmp(name, "com.apple.system.thermalpressurelevel")) return 1;
    *token = TOKEN;
    tokens++;
    return 0;
}
uint32_t notify_get_state(int token, uint64_t *state) {
    *state = level;
    return token == TOKEN ? 0 : 2;
}
uint32_t notify_cancel(int token) { tokens--; return 0; }
int sysctlbyname(const char *name, void *old, size_t *size, void *new, size_t new_size) {
    if (!strcmp(name, "kern.hv_vmm_present")) {
        if (*size < sizeof(int)) return -1;
        memcpy(old, &in_vm, sizeof(int)); /* a number, not a text */
        *size = sizeof(int);
        return 0;
    }
    const char *value = !strcmp(name, "hw.model") ? model
                        : !strcmp(name, "kern.osversion") ? "24D60"
                        : !strcmp(name, "machdep.cpu.brand_string") ? "Apple M1" : 0;
    if (!value || *size < strlen(value) + 1) return -1;
    strcpy(old, value);
    *size = strlen(value) + 1;
    return 0;
}

/* libproc, as <sys/resource.h> of macOS has it */
typedef struct {
    uint8_t uuid[16];
    uint64_t user_time, system_time, pkg_idle_wkups, interrupt_wkups, pageins, wired_size, resident_size, phys_footprint,
        proc_start_abstime, proc_exit_abstime, child_user_time, child_system_time, child_pkg_idle_wkups,
        child_interrupt_wkups, child_pageins, child_elapsed_abstime, diskio_bytesread, diskio_byteswritten, qos_default,
        qos_maintenance, qos_background, qos_utility, qos_legacy, qos_user_initiated, qos_user_interactive,
        billed_system_time, serviced_system_time, logical_writes, lifetime_max_phys_footprint, instructions, cycles,
        billed_energy, serviced_energy, interval_max_phys_footprint, runnable_time;
} Usage;
_Static_assert(sizeof(Usage) == 296, "rusage_info_v4");
int proc_pid_rusage(int pid, int flavor, void *buffer) {
    if (flavor != 4 || pid <= 0 || !footprint) return -1;
    memset(buffer, 0x11, sizeof(Usage));
    ((Usage *)buffer)->phys_footprint = footprint;
    ((Usage *)buffer)->lifetime_max_phys_footprint = most_footprint;
    return 0;
}
