# two.py PORT: sends lines back, on a socket for each IP version, both served by one loop.
import selectors
import socket
import sys

port = int(sys.argv[1])
selector = selectors.DefaultSelector()


def accept(listener):
    conn, _ = listener.accept()
    selector.register(conn, selectors.EVENT_READ, echo)


def echo(conn):
    data = conn.recv(1024)
    if data:
        conn.sendall(data)
    else:
        selector.unregister(conn)
        conn.close()


for family, host in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, port))
    listener.listen()
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ, accept)
while True:
    for key, _ in selector.select():
        key.data(key.fileobj)
