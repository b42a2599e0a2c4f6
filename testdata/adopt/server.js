// server.js PORT [HOST]. Without a host it listens on both IP versions.
const server = require('node:http').createServer((_, response) => {
	response.end('hello\n');
});
server.listen(...process.argv.slice(2));
