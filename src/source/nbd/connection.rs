//! One connection to a server, with many reads in flight.
//!
//! What must hold: every read ends, with its bytes or with the failure that ended the connection. A read that nothing
//! waits for any more harms no other: its data is read and dropped.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::wire::{self, Export};
use crate::source::http::Failure;

/// A socket of either kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for S {}

type Answer = oneshot::Sender<Result<Vec<u8>, Failure>>;

/// Reads whose replies have not come.
#[derive(Default)]
struct InFlight {
    reads: HashMap<u64, (u32, Answer)>,
    /// Why the connection ended.
    ended: Option<Failure>,
}

/// See the module. The connection is closed when it is dropped.
pub(super) struct Connection {
    /// The export that is open.
    pub export: Export,
    cookies: AtomicU64,
    in_flight: Arc<Mutex<InFlight>>,
    requests: mpsc::UnboundedSender<[u8; 28]>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Connection {
    /// Opens an export over a connected socket.
    ///
    /// # Errors
    /// As [`wire::open`].
    pub async fn open(mut stream: Box<dyn Stream>, export: &str, runtime: &Handle) -> Result<Self, Failure> {
        let export = wire::open(&mut stream, export).await?;
        let (incoming, outgoing) = split(stream);
        let in_flight = Arc::<Mutex<InFlight>>::default();
        let (requests, queue) = mpsc::unbounded_channel();
        let tasks = [
            runtime.spawn(send(outgoing, queue, in_flight.clone())),
            runtime.spawn(receive(incoming, in_flight.clone())),
        ];
        Ok(Self { export, cookies: AtomicU64::new(1), in_flight, requests, tasks })
    }

    /// Whether reads may succeed.
    pub fn works(&self) -> bool {
        self.in_flight.lock().ended.is_none()
    }

    /// Ends the connection: reads in flight fail.
    pub fn end(&self, why: Failure) {
        end(&self.in_flight, why);
    }

    /// Reads bytes; both numbers are multiples of the block, and the range lies inside the export.
    ///
    /// # Errors
    /// `Again` or `Protocol` when the connection ended, `Again` when the server answers with an error.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, Failure> {
        let cookie = self.cookies.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut in_flight = self.in_flight.lock();
            if let Some(why) = &in_flight.ended {
                return Err(why.clone());
            }
            in_flight.reads.insert(cookie, (length, answer));
        }
        // The task that sends ends after the connection does, which answers all reads.
        let _ = self.requests.send(wire::read(cookie, offset, length));
        answered.await.unwrap_or_else(|_| Err(Failure::again("the connection ended")))
    }
}

fn end(in_flight: &Mutex<InFlight>, why: Failure) {
    let reads = {
        let mut in_flight = in_flight.lock();
        in_flight.ended.get_or_insert_with(|| why.clone());
        std::mem::take(&mut in_flight.reads)
    };
    for (_, answer) in reads.into_values() {
        let _ = answer.send(Err(why.clone()));
    }
}

async fn send(
    mut stream: WriteHalf<Box<dyn Stream>>,
    mut queue: mpsc::UnboundedReceiver<[u8; 28]>,
    in_flight: Arc<Mutex<InFlight>>,
) {
    while let Some(request) = queue.recv().await {
        let sent = async {
            stream.write_all(&request).await?;
            stream.flush().await
        };
        if let Err(error) = sent.await {
            return end(&in_flight, Failure::again(format!("the connection failed: {error}")));
        }
    }
}

async fn receive(mut stream: ReadHalf<Box<dyn Stream>>, in_flight: Arc<Mutex<InFlight>>) {
    let why = replies(&mut stream, &in_flight).await;
    end(&in_flight, why);
}

/// Takes replies until the connection ends; returns why it did.
async fn replies(stream: &mut ReadHalf<Box<dyn Stream>>, in_flight: &Mutex<InFlight>) -> Failure {
    loop {
        let (cookie, error) = match wire::reply(stream).await {
            Ok(reply) => reply,
            Err(why) => return why,
        };
        let Some((length, answer)) = in_flight.lock().reads.remove(&cookie) else {
            return Failure::Protocol("its server answers a read that was not sent".into());
        };
        if error != 0 {
            let _ = answer.send(Err(Failure::again(wire::error_text(error))));
            continue;
        }
        let mut bytes = vec![0; length as usize];
        if let Err(why) = wire::data(stream, &mut bytes).await {
            let _ = answer.send(Err(why.clone()));
            return why;
        }
        let _ = answer.send(Ok(bytes));
    }
}
