/* What init believes about the bytes it is given: the kernel's command line, and the files /cmd and /env. No system
 * calls, so that the tests (tests/machine) compile this file alone. Each check returns NULL, or the reason for which
 * the machine has to halt. */
#ifndef CHECKS_H
#define CHECKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* linux/vm_sockets.h: 0 is the hypervisor, 1 local, 2 the host; the highest number stands for any. AWS's parent is 3. */
enum { PARENT_CID_DEFAULT = 3, PARENT_CID_LOWEST = 2 };
#define PARENT_CID_HIGHEST 0xfffffffeU

struct cursor {
    const char *at, *end;
};

static bool skip_text(struct cursor *c, const char *text)
{
    size_t length = strlen(text);
    if ((size_t)(c->end - c->at) < length || memcmp(c->at, text, length) != 0)
        return false;
    c->at += length;
    return true;
}

/* A number without sign, of at most ten decimal digits, or of at most 16 hexadecimal ones behind 0x. */
static bool skip_number(struct cursor *c, uint64_t *value)
{
    bool hexadecimal = skip_text(c, "0x");
    int most = hexadecimal ? 16 : 10, digits = 0;
    *value = 0;
    for (; c->at < c->end; c->at++, digits++) {
        char digit = *c->at;
        unsigned worth;
        if (digit >= '0' && digit <= '9')
            worth = (unsigned)(digit - '0');
        else if (hexadecimal && digit >= 'a' && digit <= 'f')
            worth = (unsigned)(digit - 'a') + 10;
        else
            break;
        if (digits == most)
            return false;
        *value = *value * (hexadecimal ? 16 : 10) + worth;
    }
    return digits > 0;
}

/* <size>[K|M]@<address>:<interrupt>[:<id>], the kernel's syntax (admin-guide/kernel-parameters, virtio_mmio.device).
 * Firecracker writes 4K@0xd0000000:5, QEMU's microvm and nitro-enclave machines 512@0xfeb00e00:12. */
static bool skip_device(struct cursor *c)
{
    uint64_t number;
    if (!skip_number(c, &number))
        return false;
    if (!skip_text(c, "K"))
        skip_text(c, "M");
    if (!skip_text(c, "@") || !skip_number(c, &number) || !skip_text(c, ":") || !skip_number(c, &number))
        return false;
    return !skip_text(c, ":") || skip_number(c, &number);
}

/* The command line that the kernel got has to be the measured one, followed by nothing but what a hypervisor has to
 * add: its virtio devices and, where the parent is not CID 3, parent_cid=<decimal>, once.
 *
 * Why: PCR0 and PCR1 are hashes over kernel || command line || ramdisks, without separators or lengths. An image whose
 * command line begins some bytes later, its first bytes appended to the kernel, has the same PCRs and boots with other
 * parameters. The copy of the line lies in ramdisk 0, behind all that could be shifted: where the boundary was moved,
 * the copy and the real one differ. */
static const char *check_cmdline(const char *actual, size_t actual_length, const char *measured, size_t measured_length,
                                 uint32_t *parent_cid)
{
    struct cursor c = {actual, actual + actual_length};
    bool named = false;

    *parent_cid = PARENT_CID_DEFAULT;
    if (measured_length == 0)
        return "the measured command line is empty";
    for (size_t i = 0; i < measured_length; i++)
        if (measured[i] < ' ' || measured[i] > '~')
            return "the measured command line is not one line of printable ASCII";
    if (actual_length > 0 && actual[actual_length - 1] == '\n') /* /proc/cmdline ends so */
        c.end--;
    if ((size_t)(c.end - c.at) < measured_length || memcmp(c.at, measured, measured_length) != 0)
        return "the kernel's command line does not begin with the measured one";
    c.at += measured_length;

    while (c.at < c.end) {
        if (!skip_text(&c, " "))
            return "the kernel's command line goes on behind the measured one without a space";
        while (skip_text(&c, " "))
            ;
        if (c.at == c.end)
            break;
        if (skip_text(&c, "parent_cid=")) {
            bool leading_zero = c.at < c.end && *c.at == '0'; /* of 0x as well */
            uint64_t cid;
            if (named)
                return "parent_cid stands twice on the kernel's command line";
            if (leading_zero || !skip_number(&c, &cid) || cid < PARENT_CID_LOWEST || cid > PARENT_CID_HIGHEST)
                return "parent_cid on the kernel's command line is not a number from 2 to 4294967294";
            *parent_cid = (uint32_t)cid;
            named = true;
        } else if (!skip_text(&c, "virtio_mmio.device=") || !skip_device(&c)) {
            return "the kernel's command line has more than parent_cid and virtio devices behind the measured one";
        }
        if (c.at < c.end && *c.at != ' ')
            return "the kernel's command line has more than parent_cid and virtio devices behind the measured one";
    }
    return NULL;
}

/* Cuts text, of which text[length] may be written, into its lines; entries gets a pointer to each and a final NULL. A
 * last line needs no newline. `most` is the number of pointers that entries has room for, the NULL included. */
static const char *split_lines(char *text, size_t length, char **entries, size_t most)
{
    char *end = text + length;
    size_t count = 0;

    if (memchr(text, '\0', length) != NULL)
        return "it has a NUL byte";
    while (text < end) {
        char *newline = memchr(text, '\n', (size_t)(end - text));
        if (count + 1 == most)
            return "it has too many lines";
        entries[count++] = text;
        text = newline == NULL ? end : newline;
        *text++ = '\0';
    }
    entries[count] = NULL;
    return NULL;
}

/* execve(2) takes anything for an environment; what has no name is a mistake of the image. */
static const char *check_environment(char *const *entries)
{
    for (; *entries != NULL; entries++)
        if (strchr(*entries, '=') == NULL || **entries == '=')
            return "it has a line that is not NAME=VALUE";
    return NULL;
}

#endif
