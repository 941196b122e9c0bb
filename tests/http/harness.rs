//! A client, and the questions that the tests ask it.

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
/// No test waits for anything for longer.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Client {
    pub http: Arc<Http>,
    pub runtime: tokio::runtime::Runtime,
}

/// A configuration with which a failure shows soon.
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
        Self::made_of(config, Proxies::default(), Arc::new(NoCredentials))
    }

    pub fn made_of(config: &HttpConfig, proxies: Proxies, credentials: Arc<dyn Credentials>) -> Self {
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

    /// The object behind a URL, as it is now.
    #[track_caller]
    pub fn open(&self, url: &str, object: &Object) -> Arc<HttpSource> {
        self.open_with(&[url], object, RemoteOptions::default())
    }

    /// With a deadline that ends what would be waited for.
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

    /// Starts a read, and goes on.
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
            .block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("it takes for ever") })
    }
}

pub struct Reading {
    /// What has been delivered so far.
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

/// A deadline that ends what would be waited for, after the first answers.
pub fn briefly() -> RemoteOptions {
    RemoteOptions { deadline: Some(Duration::from_millis(700)), ..RemoteOptions::default() }
}

pub fn identity(object: &Object) -> HttpIdentity {
    HttpIdentity {
        size: object.bytes.len() as u64,
        etag: object.etag.clone(),
        last_modified: object.last_modified.clone(),
    }
}

/// It fails, in this way, and says these things, on one line.
#[track_caller]
pub fn fails<T: std::fmt::Debug>(
    result: Result<T, SourceError>,
    kind: SourceErrorKind,
    parts: &[&str],
) -> String {
    let error = result.expect_err("it must fail");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!text.contains('\n'), "{text}");
    text
}

/// Waits until something is so; fails after half a minute.
#[track_caller]
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < end, "it never came to this: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
