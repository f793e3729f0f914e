/* The first process of our enclave image: what stands between the kernel and the image's command.
 *
 * It does what the init of aws-nitro-enclaves-sdk-bootstrap does, in the same order and with the same files, so that
 * one image layout serves both, and adds two checks: the kernel's command line is the measured one (checks.h), and the
 * ramdisks were unpacked to the end. Whatever goes wrong ends the machine, with a line on the console that says why;
 * nothing is retried or left out.
 *
 *   ramdisk 0   /init /cmdline [/nsm.ko] /dev
 *   ramdisk 1   /cmd /env /rootfs
 *
 * Linked statically against musl: 42 KB, and no part of the building machine's own C library. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/statfs.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "checks.h"

enum {
    HEARTBEAT_PORT = 9000, /* where nitro-cli, or our launcher, listens while the enclave boots */
    HEARTBEAT = 0xb7,
    HEARTBEAT_SECONDS = 20,
    CMDLINE_MOST = 4096, /* bytes; the kernel's own limit is 2048 */
    FILE_MOST = 256 * 1024, /* bytes of /cmd, and of /env */
    LINES_MOST = 4096,
};

/* linux/vm_sockets.h, which musl does not bring. */
struct sockaddr_vm {
    sa_family_t family;
    unsigned short reserved;
    uint32_t port, cid;
    unsigned char zero[4];
};
_Static_assert(sizeof(struct sockaddr_vm) == sizeof(struct sockaddr), "the kernel's size");

/* ---- the end ---- */

/* There is no power switch in an enclave: a reboot is what ends it, on Nitro as in QEMU (-no-reboot). */
static _Noreturn void end_machine(void)
{
    fflush(stderr);
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

static _Noreturn void halt(const char *what, const char *why)
{
    fprintf(stderr, "init: halt: %s: %s\n", what, why);
    end_machine();
}

static void must(bool done, const char *what)
{
    if (!done)
        halt(what, strerror(errno));
}

/* ---- files ---- */

/* Reads all of a file, which has to have less than `most` bytes, into buffer. Returns its length. No link leads to it,
 * and it has no other name: with one, a ramdisk could change what a list of its files shows under this one. */
static size_t read_file(const char *path, char *buffer, size_t most)
{
    struct stat status;
    size_t length = 0;
    ssize_t count;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); /* the last for a pipe, which would wait */

    must(file >= 0, path);
    must(fstat(file, &status) == 0, path);
    if (!S_ISREG(status.st_mode) || status.st_nlink != 1)
        halt(path, "it is no regular file with one name");
    while ((count = read(file, buffer + length, most - length)) > 0) {
        length += (size_t)count;
        if (length == most)
            halt(path, "it is too long");
    }
    must(count == 0, path);
    close(file);
    return length;
}

static char **read_lines(const char *path)
{
    char *text = malloc(FILE_MOST), **lines = malloc(LINES_MOST * sizeof *lines);
    const char *wrong;

    must(text != NULL && lines != NULL, path);
    wrong = split_lines(text, read_file(path, text, FILE_MOST), lines, LINES_MOST);
    if (wrong != NULL)
        halt(path, wrong);
    must(unlink(path) == 0, path);
    return lines;
}

/* ---- mounts ---- */

static void make_directory(const char *path)
{
    must(mkdir(path, 0755) == 0 || errno == EEXIST, path);
}

static void mount_at(const char *type, const char *path, unsigned long flags, const char *options)
{
    make_directory(path);
    must(mount(type, path, type, flags, options) == 0, path);
}

static void mount_new_root(void)
{
    const unsigned long plain = MS_NODEV | MS_NOSUID | MS_NOEXEC;

    mount_at("proc", "/proc", plain, NULL);
    mount_at("sysfs", "/sys", plain, NULL);
    mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
    mount_at("tmpfs", "/dev/shm", plain, "mode=1777");
    mount_at("tmpfs", "/run", plain, "mode=0755");
    mount_at("tmpfs", "/tmp", plain, "mode=1777");
    must(symlink("/proc/self/fd", "/dev/fd") == 0, "/dev/fd");
    must(symlink("/proc/self/fd/0", "/dev/stdin") == 0, "/dev/stdin");
    must(symlink("/proc/self/fd/1", "/dev/stdout") == 0, "/dev/stdout");
    must(symlink("/proc/self/fd/2", "/dev/stderr") == 0, "/dev/stderr");
}

/* The kernel opens the console from its own initial /dev; where it could not, devtmpfs has one. */
static void open_console(void)
{
    if (fcntl(STDERR_FILENO, F_GETFD) >= 0)
        return;
    for (int expected = STDIN_FILENO; expected <= STDERR_FILENO; expected++)
        if (open("/dev/console", O_RDWR) != expected)
            end_machine(); /* without a word: there is nowhere to say it */
}

/* ---- what happens before the hand-over ---- */

/* The kernel unpacks the ramdisks into a file system of half the memory; where that is full it says so and goes on with
 * what there is. The parent chooses the memory, and could so cut off an image behind any file, with the same PCRs.
 * Nothing is freed while it unpacks, so there was room for everything if there is room left. A file system without
 * limits reports no blocks at all. */
static void check_unpacked(void)
{
    struct statfs root;

    must(statfs("/", &root) == 0, "/");
    if (root.f_blocks != 0 && (root.f_bfree == 0 || root.f_ffree == 0))
        halt("/", "the ramdisks did not fit: the machine needs more memory");
}

/* Returns the CID of the parent. */
static uint32_t check_kernel_cmdline(void)
{
    static char actual[CMDLINE_MOST], measured[CMDLINE_MOST];
    size_t actual_length, measured_length;
    uint32_t parent_cid;
    const char *wrong;

    mount_at("proc", "/proc", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL);
    actual_length = read_file("/proc/cmdline", actual, sizeof actual);
    measured_length = read_file("/cmdline", measured, sizeof measured);
    must(umount("/proc") == 0, "/proc");
    wrong = check_cmdline(actual, actual_length, measured, measured_length, &parent_cid);
    if (wrong != NULL)
        halt("/proc/cmdline", wrong);
    return parent_cid;
}

/* AWS's kernel has the NSM driver as a module; ours has it built in, and no modules. */
static void load_nsm_module(void)
{
    int module = open("/nsm.ko", O_RDONLY | O_CLOEXEC);

    if (module < 0 && errno == ENOENT)
        return;
    must(module >= 0, "/nsm.ko");
    must(syscall(SYS_finit_module, module, "", 0) == 0, "/nsm.ko");
    close(module);
    must(unlink("/nsm.ko") == 0, "/nsm.ko");
}

/* Tells the parent that the kernel is up. Who does not answer with the same byte is no parent of an enclave. */
static void beat_heart(uint32_t parent_cid)
{
    const struct sockaddr_vm parent = {.family = AF_VSOCK, .port = HEARTBEAT_PORT, .cid = parent_cid};
    const struct timeval patience = {.tv_sec = HEARTBEAT_SECONDS};
    unsigned char beat = HEARTBEAT;
    int channel = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

    must(channel >= 0, "heartbeat: socket");
    must(setsockopt(channel, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0, "heartbeat: time limit");
    must(connect(channel, (const struct sockaddr *)&parent, sizeof parent) == 0, "heartbeat: connect");
    must(write(channel, &beat, 1) == 1, "heartbeat: write");
    beat = 0;
    errno = ECONNRESET; /* for a read of nothing */
    must(read(channel, &beat, 1) == 1, "heartbeat: read");
    if (beat != HEARTBEAT)
        halt("heartbeat", "the parent answered with another byte");
    close(channel);
}

/* Makes /rootfs the root of everything, as switch_root does. A chroot alone could be left again. */
static void switch_root(void)
{
    make_directory("/rootfs/dev");
    must(mount("/rootfs", "/rootfs", NULL, MS_BIND, NULL) == 0, "/rootfs");
    must(mount("/dev", "/rootfs/dev", NULL, MS_MOVE, NULL) == 0, "/rootfs/dev");
    must(chdir("/rootfs") == 0, "/rootfs");
    must(mount(".", "/", NULL, MS_MOVE, NULL) == 0, "/rootfs to /");
    must(chroot(".") == 0, "chroot");
    must(chdir("/") == 0, "/");
}

/* ---- the command ---- */

static _Noreturn void become(char **command, char **environment, const sigset_t *signals)
{
    environ = environment; /* and with it the PATH that a command without a slash is looked for in */
    setsid();
    sigprocmask(SIG_SETMASK, signals, NULL);
    execvp(command[0], command);
    fprintf(stderr, "init: %s: %s\n", command[0], strerror(errno));
    _exit(127);
}

/* Waits for child, and for every process that lost its parent. */
static void reap_until(pid_t child)
{
    for (;;) {
        int status;
        pid_t pid = wait(&status);

        must(pid > 0 || errno == EINTR, "wait");
        if (pid != child)
            continue;
        if (WIFSIGNALED(status))
            fprintf(stderr, "init: the command was ended by signal %d\n", WTERMSIG(status));
        else
            fprintf(stderr, "init: the command exited with status %d\n", WEXITSTATUS(status));
        return;
    }
}

int main(void)
{
    char **command, **environment;
    const char *wrong;
    sigset_t all, before;
    pid_t child;

    if (getpid() != 1)
        return 2; /* it would reboot the machine of whoever tries it */

    /* Nothing that is sent to process 1 disturbs it; wait(2) needs no handler. */
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);

    mount_at("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755");
    open_console();
    check_unpacked();
    uint32_t parent_cid = check_kernel_cmdline();
    load_nsm_module();
    beat_heart(parent_cid);

    environment = read_lines("/env");
    wrong = check_environment(environment);
    if (wrong != NULL)
        halt("/env", wrong);
    command = read_lines("/cmd");
    if (command[0] == NULL || command[0][0] == '\0')
        halt("/cmd", "it names no command");
    switch_root();
    mount_new_root();

    child = fork();
    must(child >= 0, "fork");
    if (child == 0)
        become(command, environment, &before);
    reap_until(child);
    end_machine();
}
