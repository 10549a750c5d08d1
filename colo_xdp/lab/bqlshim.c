/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * LD_PRELOAD shim that makes QEMU's COLO usable under TCG (laboratory only; KVM needs none of it).
 *
 * 1. Primary: during a COLO checkpoint the migration thread syncs the dirty log
 *    without holding QEMU's big lock; under TCG that sync does run_on_cpu(),
 *    whose qemu_cond_wait(&qemu_work_cond, big lock) then returns with the big
 *    lock held by a thread that never took it. The thread's next lock is a
 *    self-deadlock: the primary stays stopped and its monitor is dead.
 *    Here a pthread_cond_wait() on a mutex that the caller does not own takes
 *    the mutex, waits a short time (a spurious wake-up for the caller, which is
 *    allowed) and releases the mutex. The kick of the vCPU thread is not under
 *    the lock either and can be lost, so owned waits become 5 ms polls as well.
 *
 * 2. Secondary: the checkpoint's RAM is memcpy()d over the guest's memory without
 *    notifying TCG, which continues to run stale translations of changed code
 *    pages. When the secondary answers VMSTATE_RECEIVED (4 bytes, value 5, sent
 *    while the guest is stopped and before the memcpy), the shim therefore queues
 *    a tb_flush().
 *
 * 3. Both, QEMU 7.2: the dirty-log sync clears the dirty bits but leaves TCG's
 *    TLB entries writable without a dirty mark, so later writes to those pages
 *    are missed. Here every large write to a socket (migration data) and every
 *    VMSTATE_SIZE message (4) queues a tlb_flush() of each vCPU (they all have a
 *    TLB: with that of the first alone, what the others wrote was missing in the
 *    SVM, whose kernel then panicked); the guest must be stopped (QMP stop) before
 *    the first `migrate`.
 *
 * COLO_SHIM=lock disables 2 and 3.
 *
 * cc -shared -fPIC -O2 -o bqlshim.so bqlshim.c -ldl -pthread
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
{
    struct timespec ts;
    int owned = m->__data.__owner == gettid();
    if (!owned)
        pthread_mutex_lock(m);
    clock_gettime(CLOCK_REALTIME, &ts);
    ts.tv_nsec += owned ? 5000000 : 200000;
    if (ts.tv_nsec >= 1000000000) { ts.tv_sec++; ts.tv_nsec -= 1000000000; }
    pthread_cond_timedwait(c, m, &ts);
    if (!owned)
        pthread_mutex_unlock(m);
    return 0;
}

ssize_t sendmsg(int fd, const struct msghdr *h, int flags)
{
    static ssize_t (*real)(int, const struct msghdr *, int);
    static void (*flush)(void *), (*tlb)(void *);
    static void *(*getcpu)(int);
    static int tb = -1;
    void *cpu;

    if (!real) {
        const char *e = getenv("COLO_SHIM");
        real = dlsym(RTLD_NEXT, "sendmsg");
        flush = (void (*)(void *))dlsym(RTLD_DEFAULT, "tb_flush");
        if (!flush)
            flush = (void (*)(void *))dlsym(RTLD_DEFAULT, "queue_tb_flush");
        tlb = (void (*)(void *))dlsym(RTLD_DEFAULT, "tlb_flush");
        getcpu = (void *(*)(int))dlsym(RTLD_DEFAULT, "qemu_get_cpu");
        tb = flush && getcpu && !(e && !strcmp(e, "lock"));
    }
    if (tb && h->msg_iovlen == 1 && h->msg_iov[0].iov_len == 4 &&
        !memcmp(h->msg_iov[0].iov_base, "\0\0\0\5", 4))
        flush(getcpu(0));
    ssize_t r = real(fd, h, flags);
    if (tb && tlb && (r > 4096 || (h->msg_iovlen == 1 && h->msg_iov[0].iov_len == 4 &&
                                   !memcmp(h->msg_iov[0].iov_base, "\0\0\0\4", 4))))
        for (int i = 0; (cpu = getcpu(i)); i++)
            tlb(cpu);
    return r;
}
