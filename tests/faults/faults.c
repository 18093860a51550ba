/* Preloaded into a program, counts the system calls that change files under FAULT_PREFIX, and at the FAULT_AT-th fails or kills:
 * FAULT_ACTION is eio, enospc, before (SIGKILL instead of the call) or after (SIGKILL behind it). Each call is a line of FAULT_LOG.
 * Calls are counted where the C library makes them, so those of every crate are seen.
 * And memory of a page and more runs out for rank FAULT_RANK once there is a file FAULT_STARVE. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int seen;

static void record(const char *call, const char *path) {
    const char *log = getenv("FAULT_LOG");
    if (!log) return;
    char line[5000];
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
}

/* What to do with this call: 0 make it, 1 make it and die, or fail with this errno (as a negative number). */
static int decide(const char *call, const char *path) {
    const char *prefix = getenv("FAULT_PREFIX");
    if (!prefix || strncmp(path, prefix, strlen(prefix)) != 0) return 0;
    record(call, path);
    const char *at = getenv("FAULT_AT"), *action = getenv("FAULT_ACTION");
    if (atomic_fetch_add(&seen, 1) + 1 != (at ? atoi(at) : 0) || !action) return 0;
    if (strcmp(action, "before") == 0) {
        syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
        for (;;) pause();
    }
    if (strcmp(action, "after") == 0) return 1;
    return strcmp(action, "enospc") == 0 ? -ENOSPC : -EIO;
}

static int decide_fd(const char *call, int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return decide(call, path);
}

static int decide_at(const char *call, int dir, const char *name) {
    char whole[8300], folder[4096] = "";
    if (name[0] == '/') return decide(call, name);
    if (dir == AT_FDCWD) {
        if (!getcwd(folder, sizeof folder)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        long length = syscall(SYS_readlinkat, AT_FDCWD, link, folder, sizeof folder - 1);
        if (length < 0) return 0;
        folder[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", folder, name);
    return decide(call, whole);
}

#define FAULT(type, decision, real)                        \
    int verdict = (decision);                              \
    if (verdict < 0) {                                     \
        errno = -verdict;                                  \
        return -1;                                         \
    }                                                      \
    type result = (real);                                  \
    if (verdict == 1) {                                    \
        syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);   \
        for (;;) pause();                                  \
    }                                                      \
    return result

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) { FAULT(ssize_t, decide_fd("write", fd), REAL(write)(fd, data, size)); }
ssize_t writev(int fd, const struct iovec *v, int n) { FAULT(ssize_t, decide_fd("writev", fd), REAL(writev)(fd, v, n)); }
ssize_t pwrite(int fd, const void *d, size_t n, off_t o) { FAULT(ssize_t, decide_fd("pwrite", fd), REAL(pwrite)(fd, d, n, o)); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t o) { FAULT(ssize_t, decide_fd("pwrite", fd), REAL(pwrite64)(fd, d, n, o)); }
int fsync(int fd) { FAULT(int, decide_fd("fsync", fd), REAL(fsync)(fd)); }
int fdatasync(int fd) { FAULT(int, decide_fd("fdatasync", fd), REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t n) { FAULT(int, decide_fd("ftruncate", fd), REAL(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { FAULT(int, decide_fd("ftruncate", fd), REAL(ftruncate64)(fd, n)); }
ssize_t copy_file_range(int a, off64_t *i, int b, off64_t *o, size_t n, unsigned f) {
    FAULT(ssize_t, decide_fd("copy_file_range", b), REAL(copy_file_range)(a, i, b, o, n, f));
}
ssize_t sendfile(int to, int from, off_t *o, size_t n) {
    FAULT(ssize_t, decide_fd("sendfile", to), ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(to, from, o, n));
}
ssize_t sendfile64(int to, int from, off64_t *o, size_t n) {
    FAULT(ssize_t, decide_fd("sendfile", to), ((ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64"))(to, from, o, n));
}
int rename(const char *a, const char *b) { FAULT(int, decide_at("rename", AT_FDCWD, b), REAL(rename)(a, b)); }
int renameat(int x, const char *a, int y, const char *b) { FAULT(int, decide_at("renameat", y, b), REAL(renameat)(x, a, y, b)); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) {
    FAULT(int, decide_at("renameat2", y, b), REAL(renameat2)(x, a, y, b, f));
}
int unlink(const char *path) { FAULT(int, decide_at("unlink", AT_FDCWD, path), REAL(unlink)(path)); }
int unlinkat(int dir, const char *path, int flags) { FAULT(int, decide_at("unlinkat", dir, path), REAL(unlinkat)(dir, path, flags)); }
int mkdir(const char *path, mode_t mode) { FAULT(int, decide_at("mkdir", AT_FDCWD, path), REAL(mkdir)(path, mode)); }
int rmdir(const char *path) { FAULT(int, decide_at("rmdir", AT_FDCWD, path), REAL(rmdir)(path)); }

#define OPEN(name, dir, ...)                                                                       \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                           \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }                                                                                              \
    int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;                                     \
    FAULT(int, writes ? decide_at("open", dir, path) : 0, REAL(name)(__VA_ARGS__, flags, mode))

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path); }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path); }
int openat(int dir, const char *path, int flags, ...) { OPEN(openat, dir, dir, path); }
int openat64(int dir, const char *path, int flags, ...) { OPEN(openat64, dir, dir, path); }

static int starved(size_t size) {
    if (size < 4096) return 0;
    const char *file = getenv("FAULT_STARVE"), *wanted = getenv("FAULT_RANK"), *rank = getenv("RANK");
    return file && wanted && rank && strcmp(wanted, rank) == 0 && syscall(SYS_faccessat, AT_FDCWD, file, F_OK) == 0;
}

extern void *__libc_malloc(size_t size);
void *malloc(size_t size) {
    if (!starved(size)) return __libc_malloc(size);
    errno = ENOMEM;
    return NULL;
}
