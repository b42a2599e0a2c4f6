# unix.py PATH: sends lines back, on a path that it removes first, as many programs do.
import os
import socketserver
import sys


class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)


path = sys.argv[1]
try:
    os.unlink(path)
except FileNotFoundError:
    pass
server = socketserver.ThreadingUnixStreamServer(path, Echo)
server.daemon_threads = True
server.serve_forever()
