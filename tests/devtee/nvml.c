/* A stand-in for libnvidia-ml.so.1: the few calls that an attester makes through nvidia-ml-py, answered by the
 * development TEE over the unix socket ../nvml.sock beside this library. Built by the development TEE when it starts;
 * loaded only where LD_LIBRARY_PATH names that folder. Stateless: one connection per call, so it is safe across fork
 * and threads. Every length that comes back is checked against the caller's buffer before it is used.
 *
 * The structures are written down from the public NVML interface as nvidia-ml-py declares it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, UNKNOWN = 999
};
enum {
    OP_COUNT = 1, OP_UUID, OP_NAME, OP_PCI, OP_DRIVER, OP_VBIOS, OP_ARCH, OP_STATE, OP_SETTINGS, OP_CAPS,
    OP_GET_READY, OP_SET_READY, OP_REPORT, OP_CERT, OP_MEMORY, OP_BOARD
};
#define MAGIC 0x4c4d564eu /* "NVML" */
#define MAX_DEVICES 16
#define REPORT_SIZE 0x2000
#define CHAIN_SIZE 0x1400

struct request { uint32_t magic, op, index, argument; uint8_t nonce[32]; };
struct reply { uint32_t magic, status, length; };

struct pci_info {
    char bus_id_legacy[16];
    uint32_t domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};
struct system_state { uint32_t environment, cc_feature, dev_tools; };
struct system_settings { uint32_t version, environment, cc_feature, dev_tools, multi_gpu; };
struct system_caps { uint32_t cpu, gpus; };
struct memory_size { unsigned long long protected_kib, unprotected_kib; };
struct report {
    uint32_t cec_present, size, cec_size;
    uint8_t nonce[32], body[REPORT_SIZE], cec_body[0x1000];
};
struct certificate {
    uint32_t chain_size, attestation_chain_size;
    uint8_t chain[0x1000], attestation_chain[CHAIN_SIZE];
};

static char handles[MAX_DEVICES]; /* a device handle is the address of its byte */

static int socket_path(struct sockaddr_un *address)
{
    Dl_info info;
    if (!dladdr((void *)&socket_path, &info) || !info.dli_fname)
        return -1;
    const char *slash = strrchr(info.dli_fname, '/');
    int folder = slash ? (int)(slash - info.dli_fname) : 0;
    int size = snprintf(address->sun_path, sizeof address->sun_path, "%.*s/../nvml.sock", folder ? folder : 1,
                        folder ? info.dli_fname : ".");
    return size > 0 && (size_t)size < sizeof address->sun_path ? 0 : -1;
}

static int move(int fd, void *buffer, size_t size, int out)
{
    for (size_t done = 0; done < size;) {
        char *at = (char *)buffer + done;
        ssize_t n = out ? send(fd, at, size - done, MSG_NOSIGNAL) : recv(fd, at, size - done, 0);
        if (n <= 0)
            return -1;
        done += (size_t)n;
    }
    return 0;
}

/* One exchange. `out` receives exactly the reply's payload; *length is its room before, its size after. */
static int call(uint32_t op, uint32_t index, uint32_t argument, const uint8_t *nonce, void *out, uint32_t *length)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct request ask = {MAGIC, op, index, argument, {0}};
    struct reply answer;
    struct timeval limit = {10, 0};
    int status = UNKNOWN, fd;
    if (nonce)
        memcpy(ask.nonce, nonce, sizeof ask.nonce);
    if (socket_path(&address) || (fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0)
        return UNKNOWN;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        status = DRIVER_NOT_LOADED;
    else if (!move(fd, &ask, sizeof ask, 1) && !move(fd, &answer, sizeof answer, 0) && answer.magic == MAGIC) {
        uint32_t room = length ? *length : 0;
        if (answer.status)
            status = (int)answer.status;
        else if (answer.length > room)
            status = INSUFFICIENT_SIZE;
        else if (!answer.length || !move(fd, out, answer.length, 0)) {
            status = OK;
            if (length)
                *length = answer.length;
        }
    }
    close(fd);
    return status;
}

static int whole(uint32_t op, uint32_t index, void *out, uint32_t size)
{
    uint32_t length = size;
    if (!out)
        return INVALID_ARGUMENT;
    int status = call(op, index, 0, NULL, out, &length);
    return status || length == size ? status : UNKNOWN;
}

static int text(uint32_t op, uint32_t index, char *out, uint32_t size)
{
    uint32_t length = size ? size - 1 : 0;
    if (!out || !size)
        return INVALID_ARGUMENT;
    memset(out, 0, size);
    return call(op, index, 0, NULL, out, &length);
}

static int device(const void *handle, uint32_t *index)
{
    const char *at = handle;
    if (at < handles || at >= handles + MAX_DEVICES)
        return INVALID_ARGUMENT;
    *index = (uint32_t)(at - handles);
    return OK;
}

#define WITH_DEVICE(handle) \
    uint32_t index; \
    if (device(handle, &index)) \
        return INVALID_ARGUMENT

int nvmlInitWithFlags(unsigned flags)
{
    uint32_t count;
    (void)flags;
    return whole(OP_COUNT, 0, &count, sizeof count);
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int status)
{
    switch (status) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned *count) { return whole(OP_COUNT, 0, count, sizeof *count); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    uint32_t count;
    int status = whole(OP_COUNT, 0, &count, sizeof count);
    if (status)
        return status;
    if (!handle || index >= count || index >= MAX_DEVICES)
        return INVALID_ARGUMENT;
    *handle = handles + index;
    return OK;
}

int nvmlDeviceGetIndex(void *handle, unsigned *out)
{
    WITH_DEVICE(handle);
    if (!out)
        return INVALID_ARGUMENT;
    *out = index;
    return OK;
}

int nvmlSystemGetDriverVersion(char *out, unsigned size) { return text(OP_DRIVER, 0, out, size); }
int nvmlSystemGetNVMLVersion(char *out, unsigned size) { return text(OP_DRIVER, 0, out, size); }

int nvmlDeviceGetUUID(void *handle, char *out, unsigned size)
{
    WITH_DEVICE(handle);
    return text(OP_UUID, index, out, size);
}

int nvmlDeviceGetName(void *handle, char *out, unsigned size)
{
    WITH_DEVICE(handle);
    return text(OP_NAME, index, out, size);
}

int nvmlDeviceGetVbiosVersion(void *handle, char *out, unsigned size)
{
    WITH_DEVICE(handle);
    return text(OP_VBIOS, index, out, size);
}

int nvmlDeviceGetPciInfo_v3(void *handle, struct pci_info *out)
{
    WITH_DEVICE(handle);
    return whole(OP_PCI, index, out, sizeof *out);
}

int nvmlDeviceGetArchitecture(void *handle, unsigned *out)
{
    WITH_DEVICE(handle);
    return whole(OP_ARCH, index, out, sizeof *out);
}

int nvmlDeviceGetBoardId(void *handle, unsigned *out)
{
    WITH_DEVICE(handle);
    return whole(OP_BOARD, index, out, sizeof *out);
}

int nvmlSystemGetConfComputeState(struct system_state *out) { return whole(OP_STATE, 0, out, sizeof *out); }
int nvmlSystemGetConfComputeCapabilities(struct system_caps *out) { return whole(OP_CAPS, 0, out, sizeof *out); }

int nvmlSystemGetConfComputeSettings(struct system_settings *out)
{
    uint32_t got[4];
    if (!out || out->version != (0x1000000u | sizeof *out))
        return 25; /* argument version mismatch */
    int status = whole(OP_SETTINGS, 0, got, sizeof got);
    if (!status)
        memcpy(&out->environment, got, sizeof got);
    return status;
}

int nvmlSystemGetConfComputeGpusReadyState(unsigned *out) { return whole(OP_GET_READY, 0, out, sizeof *out); }

int nvmlSystemSetConfComputeGpusReadyState(unsigned state)
{
    return state > 1 ? INVALID_ARGUMENT : call(OP_SET_READY, 0, state, NULL, NULL, NULL);
}

int nvmlDeviceGetConfComputeMemSizeInfo(void *handle, struct memory_size *out)
{
    WITH_DEVICE(handle);
    return whole(OP_MEMORY, index, out, sizeof *out);
}

int nvmlDeviceGetConfComputeGpuAttestationReport(void *handle, struct report *out)
{
    WITH_DEVICE(handle);
    if (!out)
        return INVALID_ARGUMENT;
    uint32_t length = sizeof out->body;
    int status = call(OP_REPORT, index, 0, out->nonce, out->body, &length);
    out->cec_present = out->cec_size = 0;
    out->size = status ? 0 : length;
    return status;
}

int nvmlDeviceGetConfComputeGpuCertificate(void *handle, struct certificate *out)
{
    WITH_DEVICE(handle);
    if (!out)
        return INVALID_ARGUMENT;
    uint32_t length = sizeof out->attestation_chain;
    int status = call(OP_CERT, index, 0, NULL, out->attestation_chain, &length);
    out->chain_size = 0;
    out->attestation_chain_size = status ? 0 : length;
    return status;
}
