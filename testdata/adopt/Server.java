import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;

/** Server PORT. */
class Server {
	public static void main(String[] args) throws Exception {
		byte[] hello = "hello\n".getBytes();
		HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(args[0])), 0);
		server.createContext("/", exchange -> {
			exchange.sendResponseHeaders(200, hello.length);
			exchange.getResponseBody().write(hello);
			exchange.close();
		});
		server.start();
	}
}
