//! A client and helpers for the tests.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use plyfs::config::HttpConfig;
use plyfs::source::http::{
    Credentials, Http, HttpIdentity, HttpSource, Network, NoCredentials, Probed, Proxies, RemoteOptions,
    Strictness,
};
use plyfs::source::{Purpose, RemoteSource, SourceError, SourceErrorKind};

use crate::server::Object;

pub const MIB: usize = 1 << 20;
/// The longest time that a test waits for a result.
const TIMEOUT: Duration = Duration::from_secs(60);

pub struct Client {
    pub http: Arc<Http>,
    pub runtime: tokio::runtime::Runtime,
}

/// A configuration with short timeouts, so that failures are detected quickly.
pub fn quick() -> HttpConfig {
    HttpConfig {
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(700),
        ..HttpConfig::default()
    }
}

impl Client {
    pub fn new() -> Self {
        Self::with(&quick())
    }

    pub fn with(config: &HttpConfig) -> Self {
        Self::with_parts(config, Proxies::default(), Arc::new(NoCredentials))
    }

    pub fn with_parts(config: &HttpConfig, proxies: Proxies, credentials: Arc<dyn Credentials>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let network = Network::prepare(config, proxies);
        let http = Http::new(config, &network, credentials, runtime.handle().clone()).unwrap();
        Self { http, runtime }
    }

    pub fn probe(&self, url: &str) -> Result<Probed, SourceError> {
        self.probe_all(&[url], Strictness::Strong)
    }

    pub fn probe_all(&self, urls: &[&str], strictness: Strictness) -> Result<Probed, SourceError> {
        let urls: Vec<String> = urls.iter().map(|url| (*url).to_owned()).collect();
        let options = RemoteOptions { strictness, ..RemoteOptions::default() };
        self.wait(async move { self.http.probe(&urls, &options).await })
    }

    /// A source at a URL for an object, with default options.
    #[track_caller]
    pub fn open(&self, url: &str, object: &Object) -> Arc<HttpSource> {
        self.open_with(&[url], object, RemoteOptions::default())
    }

    /// Like `open`, with a short deadline: reads that would wait fail instead.
    pub fn open_briefly(&self, url: &str, object: &Object) -> Arc<HttpSource> {
        self.open_with(&[url], object, briefly())
    }

    pub fn open_with(&self, urls: &[&str], object: &Object, options: RemoteOptions) -> Arc<HttpSource> {
        let urls: Vec<String> = urls.iter().map(|url| (*url).to_owned()).collect();
        self.http.open(&urls, identity(object), options)
    }

    pub fn read(&self, source: &Arc<HttpSource>, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        self.read_for(source, range, Purpose::Demand)
    }

    pub fn read_for(
        &self,
        source: &Arc<HttpSource>,
        range: Range<u64>,
        purpose: Purpose,
    ) -> Result<Vec<u8>, SourceError> {
        let reading = self.start(source, range, purpose);
        self.wait(reading.done)
    }

    /// Starts a read and does not wait for it.
    pub fn start(&self, source: &Arc<HttpSource>, range: Range<u64>, purpose: Purpose) -> Reading {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = bytes.clone();
        let fetch = source.clone().fetch(
            range,
            purpose,
            Instant::now(),
            Box::new(move |piece| into.lock().unwrap().extend_from_slice(piece)),
        );
        let (send, done) = tokio::sync::oneshot::channel();
        let all = bytes.clone();
        let task = self.runtime.spawn(async move {
            let result = fetch.await.map(|()| all.lock().unwrap().clone());
            let _ = send.send(result);
        });
        Reading { bytes, task, done: Done(done) }
    }

    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime
            .block_on(async { tokio::time::timeout(TIMEOUT, future).await.expect("no result in 60 s") })
    }
}

pub struct Reading {
    /// The bytes delivered so far.
    pub bytes: Arc<Mutex<Vec<u8>>>,
    pub task: tokio::task::JoinHandle<()>,
    pub done: Done,
}

pub struct Done(tokio::sync::oneshot::Receiver<Result<Vec<u8>, SourceError>>);

impl Future for Done {
    type Output = Result<Vec<u8>, SourceError>;
    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        std::pin::Pin::new(&mut self.0).poll(context).map(|done| done.expect("the read panicked"))
    }
}

/// Options with a short deadline: a read that would wait fails after the first answers.
pub fn briefly() -> RemoteOptions {
    RemoteOptions { deadline: Some(Duration::from_millis(700)), ..RemoteOptions::default() }
}

pub fn identity(object: &Object) -> HttpIdentity {
    HttpIdentity {
        size: object.bytes.len() as u64,
        etag: object.etag.clone(),
        last_modified: object.last_modified.clone(),
        version: None,
    }
}

/// Asserts that the result is an error of this kind whose text is one line and contains these parts; returns the text.
#[track_caller]
pub fn fails<T: std::fmt::Debug>(
    result: Result<T, SourceError>,
    kind: SourceErrorKind,
    parts: &[&str],
) -> String {
    let error = result.expect_err("an error was expected");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!text.contains('\n'), "{text}");
    text
}

/// Waits until a condition holds; panics after 30 s.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "did not happen within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
