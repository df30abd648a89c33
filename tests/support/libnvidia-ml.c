/* Stands in for NVIDIA's management library where there is no GPU: answers what hpcray asks of it through pynvml.
 *
 * What it answers is set in the environment, and read at each call:
 *   FAKE_NVML_GPUS    how many GPUs there are; unset: the driver is not loaded
 *   FAKE_NVML_NAMES   their names, separated by ';', the last one for all that follow
 *   FAKE_NVML_MIG     for each GPU how many MIG instances it has, separated by ','; '-' or nothing: MIG is off
 *   FAKE_NVML_FAIL    FUNCTION[:GPU]=ERROR: this function fails with this number, for this GPU or for all
 *
 * UUIDs differ between hosts, and by the first digit between the GPUs of one. Device files are numbered from 4 on, as where others
 * have GPUs 0 to 3.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };
enum { MOST_GPUS = 16, MOST_INSTANCES = 7, FIRST_FILE = 4 };
#define GIB (1ULL << 30)

typedef struct { int gpu, instance; } Device; /* instance -1: the whole GPU */
typedef struct { unsigned long long total, free, used; } Memory;

static Device gpus[MOST_GPUS], instances[MOST_GPUS][MOST_INSTANCES];

static int count(void) {
    const char *told = getenv("FAKE_NVML_GPUS");
    return told ? atoi(told) : -1;
}

/* Copies the field of this number of a list; the last one where the list is shorter and `repeats`. */
static void field(const char *list, char separator, int number, int repeats, char *out, size_t size) {
    const char *end;
    while ((end = strchr(list, separator)) && number-- > 0)
        list = end + 1;
    if (!end && number > 0 && !repeats)
        list = "";
    size_t length = end ? (size_t)(end - list) : strlen(list);
    snprintf(out, size, "%.*s", (int)length, list);
}

static int mig_instances(int gpu) {
    char text[16];
    const char *told = getenv("FAKE_NVML_MIG");
    field(told ? told : "", ',', gpu, 0, text, sizeof text);
    return text[0] && text[0] != '-' ? atoi(text) : -1;
}

static int failure(const char *function, int gpu) {
    const char *told = getenv("FAKE_NVML_FAIL");
    size_t length = strlen(function);
    if (!told || strncmp(told, function, length) || (told[length] != '=' && told[length] != ':'))
        return SUCCESS;
    if (told[length] == ':' && atoi(told + length + 1) != gpu)
        return SUCCESS;
    return atoi(strchr(told, '=') + 1);
}

#define MAY_FAIL(gpu)                                   \
    do {                                                \
        int error = failure(__func__, gpu);             \
        if (error) return error;                        \
    } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    MAY_FAIL(-1);
    return count() < 0 ? DRIVER_NOT_LOADED : SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int error) {
    static char text[32];
    snprintf(text, sizeof text, "fake error %d", error);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    MAY_FAIL(-1);
    *out = (unsigned)count();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out) {
    MAY_FAIL((int)index);
    if ((int)index >= count() || index >= MOST_GPUS)
        return INVALID_ARGUMENT;
    gpus[index] = (Device){(int)index, -1};
    *out = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(Device *device, unsigned *out) {
    MAY_FAIL(device->gpu);
    *out = (unsigned)device->gpu + FIRST_FILE;
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *out, unsigned size) {
    MAY_FAIL(device->gpu);
    char host[64] = "";
    unsigned sum = 0;
    gethostname(host, sizeof host - 1);
    for (const char *c = host; *c; c++)
        sum = sum * 31 + (unsigned char)*c;
    int is_part = device->instance >= 0;
    int length = snprintf(out, size, "%s-%x%x000000-0000-0000-0000-0000%08x", is_part ? "MIG" : "GPU", device->gpu,
                          is_part ? device->instance : 0, sum);
    return length < (int)size ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetName(Device *device, char *out, unsigned size) {
    MAY_FAIL(device->gpu);
    char name[64];
    const char *told = getenv("FAKE_NVML_NAMES");
    field(told ? told : "NVIDIA H100 80GB HBM3", ';', device->gpu, 1, name, sizeof name);
    snprintf(out, size, device->instance < 0 ? "%s" : "%s MIG 1g.10gb", name);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *out) {
    MAY_FAIL(device->gpu);
    out->total = out->free = (device->instance < 0 ? 80 : 10) * GIB;
    out->used = 0;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    MAY_FAIL(device->gpu);
    *current = *pending = mig_instances(device->gpu) >= 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *out) {
    MAY_FAIL(device->gpu);
    *out = MOST_INSTANCES;
    return SUCCESS;
}

/* The first number is taken by none, since numbers may have gaps. */
int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **out) {
    MAY_FAIL(device->gpu);
    int there = mig_instances(device->gpu), number = (int)index - (there < MOST_INSTANCES);
    if (number < 0 || number >= there)
        return NOT_FOUND;
    instances[device->gpu][number] = (Device){device->gpu, number};
    *out = &instances[device->gpu][number];
    return SUCCESS;
}
