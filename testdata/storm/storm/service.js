// A service of the storm: node service.js JOURNAL. It does what service.py does.
'use strict'
const fs = require('fs')
const net = require('net')

const log = fs.openSync(process.argv[2], 'a')
const note = (event, port = 0, name = '-') =>
  fs.writeSync(log, `${Math.round((performance.timeOrigin + performance.now()) * 1000)} ${process.pid} ${event} ${port} ${name}\n`)

note('start')
// Node runs nothing else between accept(2) and this function.
const server = net.createServer({ allowHalfOpen: true }, (socket) => {
  const port = socket.remotePort || 0 // none: the client has reset it already
  note('accept', port)
  let line = ''
  let answered = false
  socket.setEncoding('latin1')
  socket.on('data', (data) => {
    line += data
    if (answered || !line.includes('\n')) return
    answered = true
    const name = line.split('\n')[0]
    socket.end(`${name} ${process.pid}\n`, () => note('answer', port, name))
  })
  socket.on('end', () => {
    if (answered) return
    note('drop', port, 'eof')
    socket.destroy()
  })
  socket.on('error', (e) => note('drop', port, e.code))
})
process.on('SIGTERM', () => {
  note('term')
  process.exit(0)
})
server.listen({ fd: 3 })
