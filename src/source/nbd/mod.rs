//! Bases on NBD servers: exports of qemu-nbd, nbdkit, nbd-server and others, over TCP or a socket of this host.
//!
//! The protocol has no validator: a server says how large an export is, and nothing of what is in it. What must hold:
//! - An export with another size than the registered one is another object: no byte of it is used (D107).
//! - A read waits for a server that is down, refuses, lost the export, or answers with an error, as a read of a web server
//!   does (H3, H4). The waiting, the pauses, the slots and the rates are those of `http`.
//! - A URL is one that the operator gave; the protocol has no redirects. So an address is not judged, as that of an
//!   `http` URL that the operator gave is not.
//! - A socket of this host is connected to by the opener alone, and only where `[security] nbd_socket_dirs` allows it:
//!   behind other sockets are the host's services.

mod connection;
mod place;
mod source;
mod wire;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use connection::{Connection, Stream};
pub use place::shown;
use place::{Place, Server};
pub use source::NbdSource;

use super::http::{Failure, Http, RemoteOptions, failed};
use super::nbd_identity::NbdIdentity;
use super::{OpenImage, SourceError, SourceErrorKind};

/// Bytes of the first read.
const HEAD: u64 = 64 << 10;
/// Attempts of a probe, and the pause between them.
const PROBE_TRIES: u32 = 3;
const PROBE_PAUSE: Duration = Duration::from_millis(300);

/// The NBD client of this process. Its limits are those of the HTTP client.
pub struct Nbd {
    http: Arc<Http>,
    opener: Arc<dyn OpenImage>,
}

/// Checks that a URL can be that of an export.
///
/// # Errors
/// `Protocol`, with the mistake.
pub fn check_url(url: &str) -> Result<(), SourceError> {
    Place::parse(url).map(drop)
}

impl Nbd {
    /// `opener` connects to sockets of this host.
    pub fn new(http: &Arc<Http>, opener: &Arc<dyn OpenImage>) -> Arc<Self> {
        Arc::new(Self { http: http.clone(), opener: opener.clone() })
    }

    /// Opens an export once, and reads its first bytes: 64 KiB, or all of a smaller one. All URLs have to have an export
    /// of the same size that begins with the same bytes; one that does not answer is not compared.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable`, of the first URL, when none answers; `Protocol` when two differ.
    pub async fn probe(
        self: &Arc<Self>,
        urls: &[String],
        options: &RemoteOptions,
    ) -> Result<(NbdIdentity, Vec<u8>), SourceError> {
        let (mut first, mut refusal) = (None::<(String, NbdIdentity, Vec<u8>)>, None);
        for url in urls {
            let place = Place::parse(url)?;
            match (self.probe_one(&place, options).await, &first) {
                (Ok((identity, head)), None) => first = Some((place.shown, identity, head)),
                (Ok((identity, head)), Some((other, pinned, begins))) => {
                    let why = match pinned.size == identity.size {
                        false => format!("it has {} bytes, not {}", identity.size, pinned.size),
                        true if head != *begins => "it begins with other bytes".into(),
                        true => continue,
                    };
                    let why = format!("it is another object than {other}: {why}");
                    let advice = "all URLs of a base must have one object";
                    return Err(SourceError::remote(
                        SourceErrorKind::Protocol,
                        "use",
                        place.shown,
                        why,
                        advice,
                    ));
                }
                (Err(error), _) => {
                    tracing::debug!(%error, "a URL of a new base is not usable now");
                    refusal.get_or_insert(error);
                }
            }
        }
        let none = || failed("no URL", &Failure::Protocol("the source has no URL".into()));
        first.map(|(_, identity, head)| (identity, head)).ok_or_else(|| refusal.unwrap_or_else(none))
    }

    async fn probe_one(
        &self,
        place: &Place,
        options: &RemoteOptions,
    ) -> Result<(NbdIdentity, Vec<u8>), SourceError> {
        let longest = self.http.answer_timeout();
        let longest = options.deadline.map_or(longest, |deadline| deadline.min(longest));
        let mut tries = 0;
        loop {
            tries += 1;
            let once = async {
                let connection = self.connect(place).await?;
                let size = connection.export.size;
                if i64::try_from(size).is_err() {
                    return Err(Failure::Protocol(format!("it says that it has {size} bytes")));
                }
                let head = source::piece(&connection, 0..size.min(HEAD)).await?;
                Ok((NbdIdentity { size, export: place.export.clone() }, head))
            };
            let failure = match timeout(longest, once).await {
                Ok(Ok(probed)) => return Ok(probed),
                Ok(Err(failure)) => failure,
                Err(_) => Failure::again(format!("it does not answer within {longest:?}")),
            };
            if !matches!(failure, Failure::Again { .. }) || tries >= PROBE_TRIES {
                return Err(failed(&place.shown, &failure));
            }
            tokio::time::sleep(PROBE_PAUSE * tries).await;
        }
    }

    /// The source of an export that was probed before, by this or another process. Connects to nothing.
    pub fn open(
        self: &Arc<Self>,
        urls: &[String],
        identity: &NbdIdentity,
        options: RemoteOptions,
    ) -> Arc<NbdSource> {
        Arc::new(NbdSource::new(self.clone(), urls, identity.size, options))
    }

    /// Connects to a server and opens an export.
    async fn connect(&self, place: &Place) -> Result<Connection, Failure> {
        self.http.usable().await?;
        let limit = self.http.config().connect_timeout;
        let late = |_| Failure::again(format!("no connection within {limit:?}"));
        let stream = timeout(limit, self.stream(&place.server)).await.map_err(late)??;
        let limit = self.http.config().stall_timeout;
        // A server with one client at a time lets the second one wait here.
        let late = |_| {
            let why = format!("its server does not open the export within {limit:?}");
            Failure::advised(why, "check that the server takes more than one client (of qemu-nbd: -e 0)")
        };
        let opening = Connection::open(stream, &place.export, self.http.runtime());
        timeout(limit, opening).await.map_err(late)?
    }

    async fn stream(&self, server: &Server) -> Result<Box<dyn Stream>, Failure> {
        match server {
            Server::Host(host, port) => {
                let mut last = Failure::again("its name has no address");
                for address in self.addresses(host).await? {
                    match TcpStream::connect(SocketAddr::new(address, *port)).await {
                        Ok(stream) => {
                            let _ = stream.set_nodelay(true);
                            return Ok(Box::new(stream));
                        }
                        Err(error) => last = Failure::again(format!("no connection: {error}")),
                    }
                }
                Err(last)
            }
            Server::Socket(path) => {
                let (opener, path) = (self.opener.clone(), path.clone());
                let connecting = self.http.runtime().spawn_blocking(move || opener.connect(&path));
                let stream = match connecting.await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => return Err(refusal(&error)),
                    Err(_) => return Err(Failure::again("the connection was cancelled")),
                };
                let ready = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
                ready
                    .map(|stream| Box::new(stream) as Box<dyn Stream>)
                    .map_err(|error| Failure::again(error.to_string()))
            }
        }
    }

    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, Failure> {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match bare.parse() {
            Ok(address) => Ok(vec![address]),
            Err(_) => self.http.addresses(host).await,
        }
    }
}

/// Of a socket that was not connected to.
fn refusal(error: &SourceError) -> Failure {
    let why = || error.why().map_or_else(|| error.to_string(), str::to_owned);
    match error.kind() {
        SourceErrorKind::Outside => Failure::Denied {
            status: 0,
            why: "its socket lies in none of the directories for sockets".into(),
            advice: Some("name the directory in [security] nbd_socket_dirs and restart the daemon"),
        },
        SourceErrorKind::NotFound => Failure::again("there is no such socket"),
        _ => Failure::again(error.io_error().map_or_else(why, |error| format!("no connection: {error}"))),
    }
}
