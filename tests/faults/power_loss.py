"""What a power loss would leave: a shim logs what processes do to files, a model replays it.

Only what was synced survives: a file's bytes by an fsync of the file after its last write, a name
by an fsync of its folder after the name came to be. That is less than any file system keeps, and
all that POSIX promises.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dataset.journal import decode_line

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* One line: operation, inode, inode of the folder, size, path. One write each, which O_APPEND
   makes whole; by raw system calls, so that the log does not log itself. */
static void record(char op, struct stat *at, const char *path) {
    const char *root = getenv("POWER_LOSS_ROOT"), *log = getenv("POWER_LOSS_LOG");
    if (!root || !log || strncmp(path, root, strlen(root))) return;
    char folder[PATH_MAX], line[PATH_MAX + 128];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) *slash = 0;
    struct stat parent;
    if (stat(folder, &parent)) parent.st_ino = 0;
    int length = snprintf(line, sizeof line, "%c\t%lu\t%lu\t%lu\t%s\n", op,
        (unsigned long)at->st_ino, (unsigned long)parent.st_ino, (unsigned long)at->st_size, path);
    int out = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    syscall(SYS_write, out, line, length);
    syscall(SYS_close, out);
}
static void record_fd(char op, int fd) {
    struct stat at;
    char link[64], path[PATH_MAX];
    if (fd < 3 || fstat(fd, &at) || !(S_ISREG(at.st_mode) || S_ISDIR(at.st_mode))) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    record(op, &at, path);
}
static void record_name(char op, int folder, const char *name) {
    char path[PATH_MAX], base[PATH_MAX], link[64];
    struct stat at;
    if (name[0] == '/') snprintf(path, sizeof path, "%s", name);
    else {
        const char *where = folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d";
        snprintf(link, sizeof link, where, folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return;
        base[length] = 0;
        if (snprintf(path, sizeof path, "%s/%s", base, name) >= (int)sizeof path) return;
    }
    if (!lstat(path, &at)) record(op, &at, path);
}
#define OPENING(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    int is_new = (flags & O_CREAT) && access(path, F_OK); \
    int fd = REAL(name)(path, flags, mode); \
    if (fd >= 0 && is_new) record_name('C', AT_FDCWD, path); \
    else if (fd >= 0 && (flags & O_TRUNC)) record_fd('W', fd); \
    return fd; }
OPENING(open)
OPENING(open64)
#define OPENING_AT(name) int name(int at, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    int is_new = (flags & O_CREAT) && faccessat(at, path, F_OK, 0); \
    int fd = REAL(name)(at, path, flags, mode); \
    if (fd >= 0 && is_new) record_name('C', at, path); \
    else if (fd >= 0 && (flags & O_TRUNC)) record_fd('W', fd); \
    return fd; }
OPENING_AT(openat)
OPENING_AT(openat64)
#define WRITING(name, parameters, arguments) ssize_t name parameters { \
    ssize_t done = REAL(name) arguments; if (done > 0) record_fd('W', fd); return done; }
WRITING(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITING(writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
WRITING(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITING(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITING(sendfile, (int fd, int in, off_t *at, size_t size), (fd, in, at, size))
WRITING(sendfile64, (int fd, int in, off64_t *at, size_t size), (fd, in, at, size))
int ftruncate64(int fd, off64_t size) {
    int status = REAL(ftruncate64)(fd, size); if (!status) record_fd('W', fd); return status; }
int fsync(int fd) { int status = REAL(fsync)(fd); if (!status) record_fd('S', fd); return status; }
int fdatasync(int fd) {
    int status = REAL(fdatasync)(fd); if (!status) record_fd('S', fd); return status; }
int mkdir(const char *path, mode_t mode) {
    int status = REAL(mkdir)(path, mode); if (!status) record_name('D', AT_FDCWD, path);
    return status; }
int mkdirat(int at, const char *path, mode_t mode) {
    int status = REAL(mkdirat)(at, path, mode); if (!status) record_name('D', at, path);
    return status; }
int rename(const char *old, const char *path) {
    int status = REAL(rename)(old, path); if (!status) record_name('N', AT_FDCWD, path);
    return status; }
int renameat(int from, const char *old, int to, const char *path) {
    int status = REAL(renameat)(from, old, to, path); if (!status) record_name('N', to, path);
    return status; }
int link(const char *old, const char *path) {
    int status = REAL(link)(old, path); if (!status) record_name('N', AT_FDCWD, path);
    return status; }
int symlink(const char *old, const char *path) {
    int status = REAL(symlink)(old, path); if (!status) record_name('N', AT_FDCWD, path);
    return status; }
"""


@dataclass
class Disk:
    """What is on the disk below `root`, which was there and synced before the log began."""

    root: Path
    unwritten: set[int] = field(default_factory=set)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    synced: dict[int, dict[str, int]] = field(default_factory=dict)

    def replay(self, log: Path) -> Iterator[tuple[str, Path, int]]:
        """Each fsync of a file as ("S", path, size in bytes), when the disk is as it left it."""
        for line in log.read_text().splitlines():
            operation, *numbers, path = line.split("\t", 4)
            inode, parent, size = map(int, numbers)
            if operation in "CDN":
                self.names.setdefault(parent, {})[Path(path).name] = inode
            if operation in "CD":  # the number may have been another file's
                self.names[inode], self.synced[inode] = {}, {}
            if operation in "CW":
                self.unwritten.add(inode)
            if operation == "S":
                self.unwritten.discard(inode)
                self.synced[inode] = dict(self.names.get(inode, {}))
                yield operation, Path(path), size

    def survives(self, path: Path) -> str:
        """Why a file or folder would be lost or empty after a power loss now; "" if it is safe."""
        inode, place = self.root.stat().st_ino, self.root
        for name in path.relative_to(self.root).parts:
            place /= name
            found = self.synced.get(inode, {}).get(name)
            if found is None or found != self.names.get(inode, {}).get(name):
                return f"the name {place} is lost"
            inode = found
        return f"{path} is empty or cut short" if inode in self.unwritten else ""


def journalled_losses(root: Path, log: Path, dataset: Path) -> tuple[int, list[str]]:
    """How many files journal lines named, and those that a power loss after the line would take."""
    disk, named, losses = Disk(root), 0, list[str]()
    seen: dict[Path, int] = {}
    for _, path, size in disk.replay(log):
        if path.suffix != ".jsonl" or not path.is_relative_to(dataset / "status"):
            continue
        # What a line names at the moment when it begins to count.
        data = path.read_bytes()[seen.get(path, 0) : size]
        seen[path] = size
        wanted = [path, dataset / "dataset.json"]
        for line in data.decode().splitlines():
            entry = decode_line(line)
            assert entry is not None
            wanted += [dataset / file.path for file in entry.files]
        named += len(wanted)
        losses += [f"{path.parent.name}: {why}" for one in wanted if (why := disk.survives(one))]
    return named, losses


def final_losses(root: Path, log: Path, folder: Path) -> list[str]:
    """The files in a folder that a power loss right after the commands would take."""
    disk = Disk(root)
    for _ in disk.replay(log):
        pass
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [why for path in files if (why := disk.survives(path))]
