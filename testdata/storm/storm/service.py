# A service of the storm: service.py default|handler|loop JOURNAL
# It answers "ID\n" with "ID PID\n" and writes to its journal what it accepted and answered. What says
# "accept" in the journal was accepted and nothing else was: a stop signal never comes between the two.
import os, signal, socket, sys, time

mode, journal = sys.argv[1:]
log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
pid = os.getpid()
TERM = {signal.SIGTERM}


def note(event, port=0, name="-"):
    os.write(log, f"{time.time_ns() // 1000} {pid} {event} {port} {name}\n".encode())


class Connection:
    def __init__(self, sock, port):
        sock.setblocking(False)
        self.sock, self.port, self.line = sock, port, b""

    def drop(self, why):
        note("drop", self.port, why)
        self.sock.close()
        return True

    def readable(self):
        """Returns whether the connection is over."""
        try:
            data = self.sock.recv(1024)
        except BlockingIOError:
            return False
        except OSError as e:
            return self.drop(type(e).__name__)
        if not data:
            return self.drop("eof")
        self.line += data
        if b"\n" not in self.line:
            return False
        name = self.line.split(b"\n")[0].decode()
        try:
            self.sock.send(f"{name} {pid}\n".encode())
        except OSError as e:
            return self.drop(type(e).__name__)
        note("answer", self.port, name)
        self.sock.close()
        return True


def accept(listener):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, TERM)
    try:
        sock, peer = listener.accept()
        note("accept", peer[1])
        return Connection(sock, peer[1])
    except OSError:  # taken by another, or aborted by the client
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def serve_by_poll(listener):
    import select

    poll, open_ = select.poll(), {}
    poll.register(listener, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                c = accept(listener)
                if c:
                    open_[c.sock.fileno()] = c
                    poll.register(c.sock, select.POLLIN)
            else:
                c = open_[fd]
                if c.readable():
                    poll.unregister(fd)
                    del open_[fd]


def serve_by_loop(listener):
    import asyncio
    loop = asyncio.new_event_loop()

    def on_connection():
        c = accept(listener)
        if c:
            fd = c.sock.fileno()
            loop.add_reader(fd, lambda: c.readable() and loop.remove_reader(fd))

    def on_term():
        note("term")
        loop.stop()

    loop.add_reader(listener, on_connection)
    loop.add_signal_handler(signal.SIGTERM, on_term)
    loop.run_forever()
    note("exit")


note("start")
listener = socket.socket(fileno=3)
listener.setblocking(False)
if mode == "handler":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if mode == "loop":
    serve_by_loop(listener)
else:
    serve_by_poll(listener)
