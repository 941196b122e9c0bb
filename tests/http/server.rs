//! A web server that misbehaves on request: HTTP/1.1 over plain threads, with or without TLS.
//!
//! The test's handler chooses the reply to each request; without a handler the server answers correctly. It records all
//! requests. Beside its file it has a proof only when it was given one; other requests for a proof are answered with 404
//! and not recorded. It can be stopped, and started again on the same port. Other test programs use it too, by `#[path]`.

#![allow(dead_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// The file that the server has at every path.
#[derive(Clone, Debug, Default)]
pub struct Object {
    pub bytes: Arc<Vec<u8>>,
    pub etag: Option<String>,
    pub last_modified: Option<String>,
}

impl Object {
    /// Pseudorandom bytes, so that no two places are alike.
    pub fn new(len: usize) -> Self {
        Self::seeded(len, 1)
    }

    pub fn seeded(len: usize, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(len);
        Self {
            bytes: Arc::new(bytes),
            etag: Some(format!("\"v{seed}\"")),
            last_modified: Some("Mon, 02 Feb 2026 10:00:00 GMT".into()),
        }
    }
}

/// A received request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Counted from 0, over all connections.
    pub number: usize,
    pub connection: usize,
    pub method: String,
    /// Path and query; for a proxy, the URL, or the host and port of CONNECT.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The first and the last byte requested.
    pub fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

impl Request {
    /// Whether it is for the proof beside a file.
    pub fn is_for_a_proof(&self) -> bool {
        self.target.split('?').next().is_some_and(|path| path.ends_with(".obao"))
    }
}

/// The reply to a request. A correct answer is the requested range of the server's object.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A correct answer.
    Object,
    /// A correct answer for this object instead of the server's.
    Of(Object),
    /// A correct answer with these header lines changed; those without a value are removed.
    With(Vec<(&'static str, Option<String>)>),
    /// A status, header lines and a body.
    Status(u16, Vec<(String, String)>, Vec<u8>),
    /// The whole object with status 200.
    Whole,
    /// A correct answer, cut after this many bytes of its body; the connection is closed.
    Cut(usize),
    /// A correct answer that stops after this many bytes of its body; the connection stays open.
    Stall(usize),
    /// A correct answer, sent byte by byte with this pause.
    Trickle(Duration),
    /// A correct answer with chunked encoding instead of a length; with `true`, one byte too long.
    Chunked(bool),
    /// These bytes, then the end of the connection.
    Raw(Vec<u8>),
    /// The connection is closed without an answer.
    Close,
    /// For CONNECT: a tunnel to this address.
    Tunnel(SocketAddr),
    /// The given reply after this delay.
    After(Duration, Box<Reply>),
}

impl Reply {
    pub fn status(code: u16) -> Self {
        Self::Status(code, Vec::new(), Vec::new())
    }

    pub fn redirect(to: impl Into<String>) -> Self {
        Self::Status(302, vec![("Location".into(), to.into())], Vec::new())
    }
}

type Handler = Box<dyn Fn(&Request) -> Reply + Send + Sync>;

/// A certificate authority, and a server certificate that it issued for 127.0.0.1 and localhost.
pub struct Tls {
    pub ca_pem: String,
    pub config: Arc<rustls::ServerConfig>,
}

impl Tls {
    pub fn new(protocols: &[&[u8]]) -> Self {
        let key = || rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_key = key();
        let ca = params.self_signed(&ca_key).unwrap();
        let issuer = rcgen::Issuer::new(params, ca_key);
        let leaf_key = key();
        let leaf = rcgen::CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])
            .unwrap()
            .signed_by(&leaf_key, &issuer)
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(leaf_key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], private)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Self { ca_pem: ca.pem(), config: Arc::new(config) }
    }

    /// A certificate of an authority that the server sends as its own, as `openssl req -x509` makes one.
    pub fn self_signed() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        Self { ca_pem: certificate.pem(), config: Arc::new(config) }
    }
}

struct Shared {
    object: Mutex<Object>,
    proof: Mutex<Option<Object>>,
    handler: Mutex<Arc<Handler>>,
    tls: Option<Arc<rustls::ServerConfig>>,
    requests: Mutex<Vec<Request>>,
    received: Condvar,
    connections: AtomicUsize,
    open: Mutex<Vec<TcpStream>>,
    stopping: AtomicBool,
    body_bytes: AtomicU64,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

/// A running server; stops when dropped.
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<thread::JoinHandle<()>>,
}

impl Server {
    pub fn start(object: Object) -> Self {
        Self::start_with(object, None)
    }

    pub fn start_tls(object: Object, tls: &Tls) -> Self {
        Self::start_with(object, Some(tls.config.clone()))
    }

    fn start_with(object: Object, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let shared = Arc::new(Shared {
            object: Mutex::new(object),
            proof: Mutex::default(),
            handler: Mutex::new(Arc::new(Box::new(|_| Reply::Object))),
            tls,
            requests: Mutex::default(),
            received: Condvar::new(),
            connections: AtomicUsize::new(0),
            open: Mutex::default(),
            stopping: AtomicBool::new(false),
            body_bytes: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Self { shared, address, acceptor: None };
        server.accept(listener);
        server
    }

    fn accept(&mut self, listener: TcpListener) {
        let shared = self.shared.clone();
        shared.stopping.store(false, Ordering::SeqCst);
        self.acceptor = Some(thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let _ = stream.set_nodelay(true);
                let Ok(copy) = stream.try_clone() else { continue };
                shared.open.lock().unwrap().push(copy);
                let shared = shared.clone();
                thread::spawn(move || serve(&shared, stream));
            }
        }));
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self, path: &str) -> String {
        let scheme = if self.shared.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.address)
    }

    /// Sets the handler of all further requests.
    pub fn on(&self, handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) {
        *self.shared.handler.lock().unwrap() = Arc::new(Box::new(handler));
    }

    pub fn set_object(&self, object: Object) {
        *self.shared.object.lock().unwrap() = object;
    }

    /// Puts a proof beside the file.
    pub fn set_proof(&self, bytes: Vec<u8>) {
        let proof = Object { bytes: Arc::new(bytes), etag: Some("\"proof\"".into()), last_modified: None };
        *self.shared.proof.lock().unwrap() = Some(proof);
    }

    pub fn object(&self) -> Object {
        self.shared.object.lock().unwrap().clone()
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    pub fn forget_requests(&self) {
        self.shared.requests.lock().unwrap().clear();
    }

    /// Waits until this many requests have been received; panics after 30 s.
    #[track_caller]
    pub fn wait_for_requests(&self, count: usize) {
        let requests = self.shared.requests.lock().unwrap();
        let too_few = |requests: &mut Vec<Request>| requests.len() < count;
        let (requests, timeout) =
            self.shared.received.wait_timeout_while(requests, Duration::from_secs(30), too_few).unwrap();
        assert!(!timeout.timed_out(), "{} requests were received, {count} expected", requests.len());
    }

    /// The number of accepted connections.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The number of body bytes sent.
    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::SeqCst)
    }

    /// The largest number of concurrent requests.
    pub fn most_at_once(&self) -> usize {
        self.shared.most_running.load(Ordering::SeqCst)
    }

    /// Closes all connections and the listener.
    pub fn stop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
        let _ = acceptor.join();
        for stream in self.shared.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Listens on the same port again.
    pub fn start_again(&mut self) {
        assert!(self.acceptor.is_none());
        let listener = (0..100).find_map(|_| match TcpListener::bind(self.address) {
            Ok(listener) => Some(listener),
            Err(_) => {
                thread::sleep(Duration::from_millis(20));
                None
            }
        });
        self.accept(listener.expect("the port is taken"));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn serve(shared: &Arc<Shared>, tcp: TcpStream) {
    let connection = shared.connections.fetch_add(1, Ordering::SeqCst);
    let raw = tcp.try_clone().unwrap();
    let stream: Box<dyn Stream> = match &shared.tls {
        None => Box::new(tcp),
        Some(config) => {
            let Ok(session) = rustls::ServerConnection::new(config.clone()) else { return };
            Box::new(rustls::StreamOwned::new(session, tcp))
        }
    };
    let mut stream = BufReader::new(stream);
    while let Ok(Some(request)) = read_request(&mut stream, shared, connection) {
        let running = shared.running.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_running.fetch_max(running, Ordering::SeqCst);
        let handler = shared.handler.lock().unwrap().clone();
        let reply = if is_unknown_proof(shared, &request) { Reply::status(404) } else { handler(&request) };
        let keep_alive = answer(shared, &request, reply, stream.get_mut(), &raw);
        shared.running.fetch_sub(1, Ordering::SeqCst);
        if !keep_alive.unwrap_or(false) {
            break;
        }
    }
    let _ = stream.get_mut().flush();
    let _ = raw.shutdown(Shutdown::Both);
}

fn read_request(
    stream: &mut impl BufRead,
    shared: &Shared,
    connection: usize,
) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.push((name.to_owned(), value.trim().to_owned())),
            None => break,
        }
    }
    let length = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let mut body = vec![0; length.map_or(0, |(_, value)| value.parse().unwrap_or(0))];
    stream.read_exact(&mut body)?;
    let mut request = Request { number: usize::MAX, connection, method, target, headers, body };
    if is_unknown_proof(shared, &request) {
        return Ok(Some(request));
    }
    let mut requests = shared.requests.lock().unwrap();
    request.number = requests.len();
    requests.push(request.clone());
    shared.received.notify_all();
    Ok(Some(request))
}

/// Whether a request is for a proof that the server does not have.
fn is_unknown_proof(shared: &Shared, request: &Request) -> bool {
    request.is_for_a_proof() && shared.proof.lock().unwrap().is_none()
}

/// Status, header lines and body of a correct answer.
fn correct(request: &Request, object: &Object) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let line = |name: &str, value: String| (name.to_owned(), value);
    let mut headers = vec![
        line("Content-Type", "application/octet-stream".into()),
        line("Date", "Sat, 21 Nov 2026 12:00:00 GMT".into()),
        line("Accept-Ranges", "bytes".into()),
    ];
    headers.extend(object.etag.iter().map(|etag| line("ETag", etag.clone())));
    headers.extend(object.last_modified.iter().map(|date| line("Last-Modified", date.clone())));
    if request.header("if-match").is_some_and(|etag| Some(etag) != object.etag.as_deref()) {
        return (412, headers, Vec::new());
    }
    let size = object.bytes.len() as u64;
    let Some((first, last)) = request.range() else { return (200, headers, object.bytes.to_vec()) };
    if first >= size {
        headers.push(line("Content-Range", format!("bytes */{size}")));
        return (416, headers, Vec::new());
    }
    let last = last.min(size - 1);
    headers.push(line("Content-Range", format!("bytes {first}-{last}/{size}")));
    (206, headers, object.bytes[first as usize..=last as usize].to_vec())
}

fn head(status: u16, headers: &[(String, String)]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} Whatever\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

fn set(headers: &mut Vec<(String, String)>, name: &str, value: Option<String>) {
    headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
    headers.extend(value.map(|value| (name.to_owned(), value)));
}

/// Sends the reply; returns whether the connection stays open.
fn answer(
    shared: &Shared,
    request: &Request,
    reply: Reply,
    out: &mut Box<dyn Stream>,
    raw: &TcpStream,
) -> io::Result<bool> {
    let object = match shared.proof.lock().unwrap().clone() {
        Some(proof) if request.is_for_a_proof() => proof,
        _ => shared.object.lock().unwrap().clone(),
    };
    let send = |out: &mut Box<dyn Stream>, head: &[u8], body: &[u8]| -> io::Result<()> {
        out.write_all(head)?;
        for piece in body.chunks(64 << 10) {
            // Counted before it is sent: the test may look as soon as it has received it.
            shared.body_bytes.fetch_add(piece.len() as u64, Ordering::SeqCst);
            out.write_all(piece)?;
        }
        out.flush()
    };
    let (mut status, mut headers, mut body) = correct(request, &object);
    let mut keep_alive = true;
    match reply {
        Reply::After(time, reply) => {
            thread::sleep(time);
            return answer(shared, request, *reply, out, raw);
        }
        Reply::Object => {}
        Reply::Of(other) => (status, headers, body) = correct(request, &other),
        Reply::With(changes) => {
            set(&mut headers, "Content-Length", Some(body.len().to_string()));
            for (name, value) in changes {
                set(&mut headers, name, value);
            }
            send(out, &head(status, &headers), &body)?;
            return Ok(true);
        }
        Reply::Status(code, lines, text) => {
            (status, headers, body) = (code, lines, text);
        }
        Reply::Whole => {
            set(&mut headers, "Content-Range", None);
            (status, body) = (200, object.bytes.to_vec());
        }
        Reply::Cut(after) => {
            set(&mut headers, "Content-Length", Some(body.len().to_string()));
            send(out, &head(status, &headers), &body[..after.min(body.len())])?;
            return Ok(false);
        }
        Reply::Stall(after) => {
            set(&mut headers, "Content-Length", Some(body.len().to_string()));
            send(out, &head(status, &headers), &body[..after.min(body.len())])?;
            // Returns when the server stops or the client disconnects.
            let _ = (&*raw).read(&mut [0; 1]);
            return Ok(false);
        }
        Reply::Trickle(pause) => {
            set(&mut headers, "Content-Length", Some(body.len().to_string()));
            send(out, &head(status, &headers), &[])?;
            for byte in body.chunks(1) {
                if shared.stopping.load(Ordering::SeqCst) {
                    break;
                }
                send(out, &[], byte)?;
                thread::sleep(pause);
            }
            return Ok(false);
        }
        Reply::Chunked(too_much) => {
            set(&mut headers, "Transfer-Encoding", Some("chunked".into()));
            if too_much {
                body.push(0);
            }
            let mut text = Vec::new();
            for piece in body.chunks(10_000) {
                text.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                text.extend_from_slice(piece);
                text.extend_from_slice(b"\r\n");
            }
            text.extend_from_slice(b"0\r\n\r\n");
            send(out, &head(status, &headers), &text)?;
            return Ok(true);
        }
        Reply::Raw(bytes) => {
            send(out, &bytes, &[])?;
            return Ok(false);
        }
        Reply::Close => return Ok(false),
        Reply::Tunnel(to) => {
            send(out, b"HTTP/1.1 200 Connected\r\n\r\n", &[])?;
            let other = TcpStream::connect(to)?;
            let (mut up, mut down) = (raw.try_clone()?, other.try_clone()?);
            let back = thread::spawn(move || {
                let _ = io::copy(&mut down, &mut up);
                let _ = up.shutdown(Shutdown::Both);
            });
            let _ = io::copy(&mut raw.try_clone()?, &mut &other);
            let _ = other.shutdown(Shutdown::Both);
            let _ = back.join();
            keep_alive = false;
        }
    }
    if keep_alive {
        if status != 204 && status != 304 {
            set(&mut headers, "Content-Length", Some(body.len().to_string()));
        }
        send(out, &head(status, &headers), &body)?;
    }
    Ok(keep_alive)
}
