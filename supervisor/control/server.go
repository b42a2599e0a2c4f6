package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"hibergate/supervisor"
)

const (
	maxConns      = 64               // connections served at once, or an eighth of the limit on open files; more wait in the backlog
	maxHeader     = 8 << 10          // bytes
	headerTimeout = 5 * time.Second  // for a request line and its headers
	idleTimeout   = 30 * time.Second // between two requests of one connection
	writeTimeout  = 10 * time.Second // for a reply
	closeTimeout  = time.Second      // for the replies under way when the server is closed
)

// Options of a [Server].
type Options struct {
	Path    string       // of the socket, absolute
	Version string       // what GET /v1/version says
	Logger  *slog.Logger // never nil
}

// Server owns the control socket of one supervisor.
type Server struct {
	opts     Options
	uid      uint32 // of the supervisor: it and root may ask
	listener net.Listener
	lock     *lock
	http     *http.Server
}

// Listen opens the control socket, with its directory where that is missing. From then on
// this process is the only supervisor with this path, and clients that connect
// wait until [Server.Serve]. The error is [ErrRunning] where there is another already.
func Listen(ctx context.Context, opts Options) (*Server, error) {
	ln, l, err := listen(ctx, opts.Path)
	if err != nil {
		return nil, fmt.Errorf("open control socket %s: %w", opts.Path, err)
	}
	s := &Server{opts: opts, uid: uint32(os.Geteuid()), listener: ln, lock: l}
	slots := make(chan struct{}, connections())
	s.http = &http.Server{
		MaxHeaderBytes: maxHeader,
		// No ReadTimeout and no WriteTimeout: they would run while a service wakes, and the first
		// would even end the request's context. The header has its limit, a body is
		// refused, and reply limits the writing.
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(opts.Logger.Handler(), slog.LevelDebug),
		ConnContext:       withPeer,
		// The accept loop itself calls this for a new connection, so to
		// wait here is to pause accepting.
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				slots <- struct{}{}
			case http.StateClosed:
				<-slots
			case http.StateActive, http.StateIdle, http.StateHijacked:
			}
		},
	}
	return s, nil
}

// connections says how many are served at once.
func connections() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return maxConns
	}
	return int(max(1, min(maxConns, limit.Cur/8)))
}

// Serve answers until Close, and then returns nil.
func (s *Server) Serve(sup Supervisor) error {
	s.http.Handler = s.permit(s.routes(sup))
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve control socket %s: %w", s.opts.Path, err)
	}
	return nil
}

// Close lets the replies under way finish for a moment, removes the socket and
// gives up the path. Call it once. Where ctx has ended already it does not wait.
func (s *Server) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	// Closed already where it was served; the listener removes its socket file.
	if e := s.listener.Close(); !errors.Is(e, net.ErrClosed) {
		err = errors.Join(err, e)
	}
	return errors.Join(err, s.lock.release())
}

type peerKey struct{}

// peer is who connected, as the kernel noted it at connect(2).
type peer struct {
	cred *unix.Ucred
	err  error
}

// withPeer reads SO_PEERCRED (unix(7)) once for each connection.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	var p peer
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			p.cred, p.err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		})
	}
	if err != nil {
		p.err = err
	}
	return context.WithValue(ctx, peerKey{}, p)
}

// permit passes on what root and the supervisor's own user ask, and nothing else.
// The mode of the socket already keeps others out; this holds where somebody
// changed it.
func (s *Server) permit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, ok := r.Context().Value(peerKey{}).(peer)
		switch {
		case !ok || p.err != nil:
			s.opts.Logger.Debug("control request refused", slog.Any("err", p.err))
			s.fail(w, http.StatusForbidden, "cannot tell who asks")
		case p.cred.Uid != 0 && p.cred.Uid != s.uid:
			s.opts.Logger.Debug("control request refused", slog.Int("pid", int(p.cred.Pid)), slog.Uint64("uid", uint64(p.cred.Uid)))
			s.fail(w, http.StatusForbidden, fmt.Sprintf("user %d may not: only root and the user that hibergated runs as", p.cred.Uid))
		case r.ContentLength != 0:
			// net/http would wait for the rest of a body that nobody reads.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(closeTimeout))
			w.Header().Set("Connection", "close")
			s.fail(w, http.StatusRequestEntityTooLarge, "no request takes a body")
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func (s *Server) routes(sup Supervisor) http.Handler {
	mux := http.NewServeMux()
	handle := func(method, path string, answer func(*http.Request) (any, int, error)) {
		mux.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) {
			v, code, err := answer(r)
			switch {
			case r.Context().Err() != nil: // the client is gone
			case err != nil:
				s.fail(w, code, err.Error())
			default:
				s.reply(w, http.StatusOK, v)
			}
		})
		// Without this the reply would not be JSON.
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", method)
			s.fail(w, http.StatusMethodNotAllowed, fmt.Sprintf("%s takes %s, not %s", r.URL.Path, method, r.Method))
		})
	}
	handle(http.MethodGet, pathStatus, func(r *http.Request) (any, int, error) {
		name, flows, err := statusQuery(r.URL)
		if err != nil {
			return nil, http.StatusBadRequest, err
		}
		list, err := sup.Status(r.Context(), name, flows)
		if list == nil {
			list = []supervisor.Status{} // "[]", not "null"
		}
		return list, statusCode(err), err
	})
	for path, act := range map[string]func(context.Context, string) (supervisor.Status, error){
		pathWake: sup.Wake, pathSleep: sup.Sleep, pathRestart: sup.Restart,
		pathFreeze: sup.Freeze, pathThaw: sup.Thaw, pathReset: sup.Reset,
	} {
		handle(http.MethodPost, path, func(r *http.Request) (any, int, error) {
			st, err := act(r.Context(), r.PathValue("name"))
			return st, statusCode(err), err
		})
	}
	handle(http.MethodPost, pathLearn, func(r *http.Request) (any, int, error) {
		list, err := sup.Learn(r.Context(), r.PathValue("name"))
		return list, statusCode(err), err
	})
	handle(http.MethodGet, pathVersion, func(*http.Request) (any, int, error) {
		return Version{Version: s.opts.Version}, 0, nil
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, http.StatusNotFound, "no such path: "+r.URL.Path)
	})
	return mux
}

// statusQuery is strict: a misspelt parameter that is ignored would answer another question.
func statusQuery(u *url.URL) (name string, flows bool, err error) {
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", false, err
	}
	for key, values := range query {
		if len(values) != 1 {
			return "", false, fmt.Errorf("parameter %q is given %d times", key, len(values))
		}
		switch key {
		case paramService:
			name = values[0]
		case paramFlows:
			if flows, err = strconv.ParseBool(values[0]); err != nil {
				return "", false, fmt.Errorf("parameter %q: %q is not a boolean", key, values[0])
			}
		default:
			return "", false, fmt.Errorf("unknown parameter %q", key)
		}
	}
	return name, flows, nil
}

func (s *Server) fail(w http.ResponseWriter, code int, text string) {
	s.reply(w, code, ErrorReply{Error: text})
}

func (s *Server) reply(w http.ResponseWriter, code int, v any) {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil { // a type that JSON does not know: a mistake of ours, not of the client
		code, body = http.StatusInternalServerError, []byte(`{"error": "encode reply"}`)
		s.opts.Logger.Error("reply not encoded", slog.Any("err", err))
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if _, err := w.Write(append(body, '\n')); err != nil {
		s.opts.Logger.Debug("reply not sent", slog.Any("err", err))
	}
}
