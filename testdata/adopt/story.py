# story.py NAME PORT [PORT2]: programs that open their sockets in ways of their own. They serve on 127.0.0.1, and
# answer line by line: what they have found out, or what they were told.
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time


def opened(*options):
    s = socket.socket()
    for level, name, value in ((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), *options):
        s.setsockopt(level, name, value)
    return s


def bound(port, *options):
    s = opened(*options)
    s.bind(("127.0.0.1", port))
    s.listen()
    return s


def attempt(port, *options):
    """Binds, and returns the socket, or the name of the error."""
    try:
        return bound(port, *options)
    except OSError as e:
        return errno.errorcode[e.errno]


def serve(listener, answer=lambda line, conn: line):
    def talk(conn):
        with conn, conn.makefile("rw") as lines:
            for line in lines:
                lines.write(answer(line.strip(), conn) + "\n")
                lines.flush()

    while True:
        select.select([listener], [], [])  # it may be non-blocking
        conn, _ = listener.accept()
        threading.Thread(target=talk, args=(conn,), daemon=True).start()


def plain(port):
    serve(bound(port))


def late(port, port2):
    """One address is bound by a child process, the other by a second thread, both after a while."""
    parent = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == parent:
            time.sleep(0.3)
            serve(bound(port2))
        os._exit(0)

    def other():
        time.sleep(0.2)
        serve(bound(port))

    threading.Thread(target=other).start()
    signal.pause()


def others(port, port2):
    """It has sockets that are nobody's business: of another port, any port, a path, netlink."""
    listener = bound(port)
    beside = bound(port2)
    threading.Thread(target=serve, args=(beside,), daemon=True).start()
    anywhere = bound(0)
    path = socket.socket(socket.AF_UNIX)
    path.bind(f"\0story-{port}")
    route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    route.bind((0, 0))
    report = {"beside": beside.getsockname()[1] == port2, "anywhere": anywhere.getsockname()[1] > 0,
              "path": path.getsockname() == f"\0story-{port}".encode(), "route": route.getsockname()[0] > 0}
    serve(listener, lambda line, conn: json.dumps(report))


def again(port):
    """It binds its address once more, alone and shared."""
    listener = bound(port)
    alone = attempt(port)
    shared = attempt(port, (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1))
    same = not isinstance(shared, str) and os.fstat(shared.fileno()).st_ino == os.fstat(listener.fileno()).st_ino
    report = {"alone": alone if isinstance(alone, str) else "bound", "shared": shared if isinstance(shared, str) else "bound", "same": same}
    serve(listener, lambda line, conn: json.dumps(report))


def flags(port, nonblock, cloexec):
    """It sets flags and options before it binds, and looks at them afterwards."""
    s = opened((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.SOL_SOCKET, socket.SO_RCVBUF, 20000),
               (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))
    s.setblocking(not nonblock)
    s.set_inheritable(not cloexec)

    def now():
        return [fcntl.fcntl(s, fcntl.F_GETFL), fcntl.fcntl(s, fcntl.F_GETFD)]

    def options(s):
        return [s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
                s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)]

    before, set_before = now(), options(s)
    s.bind(("127.0.0.1", port))
    s.listen()
    after = now()
    serve(s, lambda line, conn: json.dumps({"before": before, "after": after, "set": set_before, "accepted": options(conn)}))


def binder(port):
    """It binds another address whenever it is told to, and says what came of it."""
    def answer(line, conn):
        if line != "bind":
            return line
        s = attempt(0)
        return s if isinstance(s, str) else "bound"

    serve(bound(port), answer)


globals()[sys.argv[1]](*map(int, sys.argv[2:]))
